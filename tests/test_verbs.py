"""`sample`, `posterior`, `evaluate` on tiny programs of both PPLs, against the same programs in closed form."""

import numpy as np
import pytest
from linear_gaussian import LinearGaussian, NormalMean
from scipy.stats import multivariate_normal

from probgen.data import load_data
from probgen.data.prepare import Preparation, Standardize
from probgen.evaluate import evaluate
from probgen.posterior import loo, posterior
from probgen.program import Program
from probgen.sample import sample

BACKENDS = ["pyro", "numpyro"]


def pyro_words():
    pyro = pytest.importorskip("pyro")
    import torch

    from probgen.pyro import Trained

    return pyro, pyro.distributions, lambda a: torch.as_tensor(a, dtype=torch.get_default_dtype()), Trained


def numpyro_words():
    numpyro = pytest.importorskip("numpyro")
    import jax.numpy as jnp

    from probgen.numpyro import Trained

    return numpyro, numpyro.distributions, jnp.asarray, Trained


def words(backend):
    return pyro_words() if backend == "pyro" else numpyro_words()


def linear_gaussian(backend, twin, labelled=False):
    """p(z) p(x | z, y) with the guide of `twin`, all constants."""
    ppl, dist, constant, _ = words(backend)

    def model(x, y=None):
        W, b, c = constant(twin.W), constant(twin.b), constant(twin.c)
        shift = b + (c[y] if labelled else 0.0)
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Normal(constant(np.zeros(twin.Z)), constant(np.ones(twin.Z))).to_event(1))
            ppl.sample("x", dist.Normal(z @ W.T + shift, constant(np.full(twin.D, twin.s))).to_event(1), obs=x)

    def guide(x, y=None):
        W, b, c = constant(twin.W), constant(twin.b), constant(twin.c)
        shift = b + (c[y] if labelled else 0.0)
        mean = (x - shift) @ W @ constant(twin.V) / twin.s**2 + twin.moved
        with ppl.plate("data", len(x)):
            ppl.sample("z", dist.MultivariateNormal(mean, scale_tril=constant(twin.L)))

    return Program(model, guide)


def trained_on(backend, program, arrays, rows=None, prepare=None):
    Trained = words(backend)[-1]
    data = load_data(arrays)
    preparation = Preparation.of(prepare or {}, data)
    example = preparation.forward({name: a[:10] for name, a in arrays.items()})[0]
    return Trained(program, {}, example, rows=rows or len(data.train), precision="64"), preparation, data


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.nightly_on("numpyro")
def test_exact_posterior(backend):
    twin = LinearGaussian()
    arrays = {"x": twin.generate(130, 1)[1]}
    trained, preparation, data = trained_on(backend, linear_gaussian(backend, twin), arrays)
    found = evaluate(trained, preparation, data.train, data.spec, k=40)
    evidence = twin.log_evidence(arrays)
    assert found["log_likelihood"] == pytest.approx(evidence.mean(), abs=1e-9)
    assert found["elbo"] == pytest.approx(evidence.mean(), abs=1e-9)
    assert found["active_units"] == 2 and found["ess"] == pytest.approx(40)
    assert found["term/x"] + found["term/z"] == pytest.approx(evidence.mean(), abs=1e-9)
    assert found["reconstruction_error"] == pytest.approx(twin.s**2, abs=5 * found["reconstruction_error_se"])
    tree = posterior(trained, preparation, data.train, draws=50)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
    np.testing.assert_allclose(tree["log_likelihood"]["x"][0, 0], evidence, atol=1e-9)
    z = tree["posterior"]["z"].values[0].mean(0)
    assert np.abs(z - twin.posterior_mean(arrays)).max() < 5 * np.sqrt(np.diag(twin.V).max() / 50)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.nightly_on("numpyro")
def test_mismatched_guide_in_raw_units(backend):
    """A guide 1.2 times too wide; gates at 4 Monte-Carlo standard errors (false alarm 6e-5)."""
    twin = LinearGaussian(moved=0.1, wider=1.2)
    arrays = {"x": twin.generate(60, 1)[1]}
    step = {"x": (Standardize(mean=np.zeros(5), std=np.full(5, 0.1)),)}
    trained, preparation, data = trained_on(
        backend, linear_gaussian(backend, twin), {"x": arrays["x"] * 0.1}, prepare=step
    )
    found = evaluate(trained, preparation, data.train, data.spec, k=300)
    exact = twin.log_evidence(arrays).mean() + 5 * np.log(10)
    assert found["log_likelihood"] == pytest.approx(exact, abs=4 * found["log_likelihood_mc_se"] + 1e-3)
    assert found["elbo"] < found["log_likelihood"]
    assert found["k_hat"] < 0.5 and 1 < found["ess"] < 300


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.nightly_on("numpyro")
def test_given_labels(backend):
    twin = LinearGaussian(classes=3)
    y = np.arange(90) % 3
    arrays = {"x": twin.generate(90, 1, y)[1], "y": y}
    trained, preparation, data = trained_on(backend, linear_gaussian(backend, twin, labelled=True), arrays)
    x = sample(trained, preparation, data.spec, 2000, given={"y": 2})["x"]
    sd = np.sqrt(np.diag(twin.W @ twin.W.T) + twin.s**2)
    assert np.abs((x.mean(0) - twin.b - twin.c[2]) / sd).max() < 4.5 / np.sqrt(2000)
    found = evaluate(trained, preparation, data.train, data.spec, k=2)
    assert found["log_likelihood"] == pytest.approx(twin.log_evidence(arrays).mean(), abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.nightly_on("numpyro")
def test_global_latent(backend):
    """The exact posterior, then PSIS-LOO (gate as in test_posterior)."""
    ppl, dist, constant, _ = words(backend)
    x = np.random.default_rng(0).normal(1.0, 1.0, size=30)
    twin = NormalMean(x)

    def model(x):
        theta = ppl.sample("theta", dist.Normal(constant(0.0), constant(twin.tau)))
        with ppl.plate("data", len(x)):
            ppl.sample("x", dist.Normal(theta, constant(twin.s)), obs=x)

    def guide(x):
        ppl.sample("theta", dist.Normal(constant(twin.m), constant(np.sqrt(twin.v))))

    trained, preparation, data = trained_on(backend, Program(model, guide), {"x": x})
    found = evaluate(trained, preparation, data.train, data.spec, k=400)
    assert found["elbo"] == pytest.approx(twin.log_evidence() / 30, abs=1e-9)
    predictive = twin.log_predictive(x).mean()
    assert found["log_likelihood"] == pytest.approx(predictive, abs=4 * found["log_likelihood_mc_se"] + 1e-3)
    tree = posterior(trained, preparation, data.train, draws=1000)
    stats = tree["sample_stats"]
    total = (stats["log_p"] - stats["log_q"]).sum("data") + stats["log_ratio_global"]
    np.testing.assert_allclose(total[0], twin.log_evidence(), atol=1e-8)
    assert loo(tree).elpd == pytest.approx(twin.exact_loo(), abs=0.3)
    draws = sample(trained, preparation, data.spec, 300)
    assert draws["theta"].shape == draws["x"].shape == (300,)
    assert abs(draws["theta"].mean() - twin.m) < 4.5 * np.sqrt(twin.v / 300)
    assert draws["theta"].std() == pytest.approx(np.sqrt(twin.v), rel=0.2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.nightly_on("numpyro")
def test_bayesian_regression_with_a_joint_autoguide(backend):
    """Whatever its weights, an autoguide's importance ratio averages to the evidence: E_q[p(y, θ) / q(θ)] = p(y).

    Its scale is set to that of the prior, so that the weights are bounded.
    """
    ppl, dist, constant, Trained = words(backend)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2)), rng.normal(size=2)

    def model(x, y=None):
        w = ppl.sample("w", dist.Normal(constant(np.zeros(2)), constant(np.ones(2))).to_event(1))
        with ppl.plate("data", len(x)):
            ppl.sample("y", dist.Normal(x @ w, constant(1.0)), obs=y)

    if backend == "pyro":
        from pyro.infer.autoguide import AutoMultivariateNormal

        guide = AutoMultivariateNormal(model, init_scale=1.0)
    else:
        from numpyro.infer.autoguide import AutoMultivariateNormal

        guide = AutoMultivariateNormal(model, init_scale=1.0)
    program = Program(model, guide)
    trained = Trained(program, start(backend, program, {"x": x, "y": y}), {"x": x, "y": y}, rows=2, precision="64")
    data = load_data({"x": x, "y": y})
    tree = posterior(trained, Preparation.of({}, data), data.train, draws=1000)
    stats = tree["sample_stats"]
    log_w = ((stats["log_p"] - stats["log_q"]).sum("data") + stats["log_ratio_global"]).values[0]
    evidence = multivariate_normal(np.zeros(2), np.eye(2) + x @ x.T).logpdf(y)
    w = np.exp(log_w - evidence)
    assert w.mean() == pytest.approx(1.0, abs=4.5 * w.std() / np.sqrt(1000))  # false alarm 7e-6


def start(backend, program, arrays):
    """The weights a program starts with."""
    if backend == "pyro":
        import torch

        from probgen.pyro.leaves import collect, start_values
        from probgen.pyro.trace import callables, tensors

        native = torch.get_default_dtype()
        batch = tensors(arrays, native, "cpu")
        leaves = collect(lambda: [part(**batch) for part in callables(program)], (program.model, program.guide))
        return {n: v.detach().numpy() for n, v in start_values(leaves, native, torch.device("cpu")).items()}
    from probgen.numpyro.leaves import collect, named, prepared, to_numpy
    from probgen.numpyro.trace import as_jax

    ready = prepared(program, as_jax(arrays), 0)
    leaves = collect(ready, as_jax(arrays), 0)
    return {name: to_numpy(value) for name, value in named(leaves.params, leaves.buffers).items()}
