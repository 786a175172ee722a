"""Densities known up to a constant: what score matching and contrastive divergence learn, what chains draw, and log Z.

On a Gaussian everything has a closed form. Statistical gates have fixed seeds and allow 4 standard errors: a right
program fails one of them once in 16,000 seeds.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import probgen
import probgen.numpyro
import probgen.pyro
from probgen import Cosine, Program
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.energy import Langevin
from probgen.energy.annealing import log_weights
from probgen.errors import ProbgenError
from probgen.fit import Options
from probgen.numpyro.loss import as_result
from probgen.program import backend_of
from probgen.pyro.loss import with_terms

BACKENDS = {"pyro": probgen.pyro, "numpyro": probgen.numpyro}
WIDE = 3.0
both = pytest.mark.parametrize("name", BACKENDS)
quick = pytest.mark.parametrize("name", ["pyro", pytest.param("numpyro", marks=pytest.mark.nightly)])


def quadratic(name, by, D, P=None):
    """N(x | 0, 9 I) exp(−½ xᵀ P x): Gaussian with precision P + I / 9; P is learned where it is not given."""
    start = np.eye(D, dtype=np.float32)

    def torch_model(x):
        A = pyro.param("P", torch.tensor(start, dtype=torch.get_default_dtype())) if P is None else torch.tensor(P)
        A = A.to(x.dtype)
        with pyro.plate("data", len(x)):
            x = pyro.sample("x", dist.Normal(torch.zeros(D), WIDE).to_event(1), obs=x)
            pyro.factor("energy", -0.5 * ((x @ A) * x).sum(-1))

    def jax_model(x):
        A = numpyro.param("P", jnp.asarray(start)) if P is None else jnp.asarray(P, jnp.float32)
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", ndist.Normal(jnp.zeros(D), WIDE).to_event(1), obs=x)
            numpyro.factor("energy", -0.5 * ((x @ A) * x).sum(-1))

    return Program(torch_model if name == "pyro" else jax_model, by=by)


def weighed(name, energy, width=WIDE):
    """N(x | 0, s² I) exp(−U(x)) in the plane for a U(x, xp) that is written for NumPy's names."""

    def torch_model(x):
        with pyro.plate("data", len(x)):
            x = pyro.sample("x", dist.Normal(torch.zeros(2), width).to_event(1), obs=x)
            pyro.factor("energy", -energy(x, torch))

    def jax_model(x):
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", ndist.Normal(jnp.zeros(2), width).to_event(1), obs=x)
            numpyro.factor("energy", -energy(x, jnp))

    return Program(torch_model if name == "pyro" else jax_model, by=BACKENDS[name].ScoreMatching())


def ring(x, xp):
    """Rezende and Mohamed's U_1: two halves of a ring of radius 2."""
    far = 0.5 * (((x**2).sum(-1) ** 0.5 - 2) / 0.4) ** 2
    return far - xp.logaddexp(*[-0.5 * ((x[..., 0] + c) / 0.6) ** 2 for c in (2, -2)])


def untrained(program, D=2):
    """A run whose weights are those that the program starts with."""
    return probgen.fit(program, np.zeros((8, D), np.float32), steps=0, progress=False)


def gaussian_data(n, D=2, seed=0):
    rng = np.random.default_rng(seed)
    C = np.array([[1.0, 0.6], [0.6, 0.8]]) if D == 2 else np.eye(D)
    return (rng.normal(size=(n, D)) @ np.linalg.cholesky(C).T).astype(np.float32)


def objective(name, loss, program, x, seeds=1):
    """A loss of rows as they are, for all of them: with each of so many seeds, and its terms, [seeds]."""
    if name == "pyro":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = [with_terms(loss.objective(program.model, None, x=torch.tensor(x))) for _ in range(seeds)]
        return np.array([float(v.detach()) for v, _ in found]), {n: float(t.detach()) for n, t in found[0][1].items()}

    def one(key):
        found = as_result(loss.objective(key, {}, program.model, None, x=jnp.asarray(x)))
        return found["loss"], found["terms"]

    value, terms = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds))
    return np.asarray(value), {n: float(t[0]) for n, t in terms.items()}


# -- the objectives -------------------------------------------------------------------------------------------------


@both
def test_score_matching_is_its_closed_form_on_a_gaussian(name):
    """½‖Λ x‖² − tr Λ of rows; and a batch stands for all rows."""
    x = gaussian_data(50)
    P = np.array([[1.5, 0.4], [0.4, 0.7]], np.float32)
    precision = P + np.eye(2) / WIDE**2
    closed = 0.5 * ((x @ precision) ** 2).sum() - len(x) * np.trace(precision)
    loss = BACKENDS[name].ScoreMatching()
    assert objective(name, loss, quadratic(name, loss, 2, P), x)[0] == pytest.approx(closed, rel=1e-5)
    data = probgen.load_data(x)
    feed = Feed(data.train, Preparation.of({}, data), 10, 0)
    engine = BACKENDS[name].engine_of(quadratic(name, loss, 2, P), None, feed, Options(steps=3, batch_size=10))
    losses = engine.advance(engine.start(), 0, 3)[1]["loss"]
    by_hand = [0.5 * ((feed.batch(i)["x"] @ precision) ** 2).sum() / 10 - np.trace(precision) for i in range(3)]
    np.testing.assert_allclose(losses, by_hand, rtol=1e-5)


@both
def test_slices_are_unbiased(name):
    """The mean over draws of two slices is the exact objective, of an energy with terms across and of fourth order."""
    x = gaussian_data(20)
    program = weighed(name, lambda x, xp: 0.3 * x[..., 0] ** 2 * x[..., 1] ** 2 + xp.sin(x[..., 0] * x[..., 1]))
    exact = objective(name, BACKENDS[name].ScoreMatching(), program, x)[0][0]
    sliced = BACKENDS[name].ScoreMatching("sliced", slices=2)
    draws, _ = objective(name, sliced, program, x, seeds=100)
    assert draws.std() > 0
    assert abs(draws.mean() - exact) < 4 * draws.std(ddof=1) / np.sqrt(len(draws)) + 1e-4 * abs(exact)


# -- what they learn ------------------------------------------------------------------------------------------------


def learned(name, by, x, steps=300, lr=0.05, batch_size=None):
    """The precision of a Gaussian that is learned, its two halves averaged."""
    run = probgen.fit(
        quadratic(name, by, x.shape[1]), x, steps=steps, lr=lr, batch_size=batch_size,
        schedule=Cosine(1, 0.0, steps), progress=False,
    )  # fmt: skip
    P = np.asarray(run.params["P"])
    return (P + P.T) / 2 + np.eye(x.shape[1]) / WIDE**2


@quick
@pytest.mark.parametrize("method", ["exact", "sliced"])
def test_score_matching_returns_the_precision(name, method):
    """C⁻¹ of the 2,000 rows themselves, within 1 % (3 % sliced, whose random directions are averaged over steps)."""
    x = gaussian_data(2000)
    found = learned(name, BACKENDS[name].ScoreMatching(method), x)
    np.testing.assert_allclose(found @ (x.T @ x / len(x)), np.eye(2), atol=0.01 if method == "exact" else 0.03)


@both
def test_denoising_score_matching_returns_the_precision_of_noisy_data(name):
    """(C + σ² I)⁻¹ within 3 %; without the noise it would be 40 % off."""
    x, sigma = gaussian_data(2000), 0.5
    found = learned(name, BACKENDS[name].DenoisingScoreMatching(sigma), x)
    np.testing.assert_allclose(found @ (x.T @ x / len(x) + sigma**2 * np.eye(2)), np.eye(2), atol=0.03)


@quick
@pytest.mark.parametrize("adjusted", [True, False])
def test_the_fixed_point_of_contrastive_divergence(name, adjusted):
    """Steps that leave p as it is: the variance C of the data. Unadjusted ones leave C_θ / (1 − h / 4C_θ) as it is, so that
    C_θ = (C + √(C² − h C)) / 2 is learned. 4 standard errors of the variance of 4,000 rows are 9 %.
    """
    x, h = gaussian_data(4000, 1), 0.8
    by = BACKENDS[name].ContrastiveDivergence(steps=5, step_size=h, adjusted=adjusted)
    C = float((x**2).mean())
    expected = C if adjusted else (C + np.sqrt(C**2 - h * C)) / 2
    assert 1 / learned(name, by, x, steps=200, lr=0.1)[0, 0] == pytest.approx(expected, rel=0.09)
    assert (C + np.sqrt(C**2 - h * C)) / 2 < 0.8 * C


@both
def test_penalty_and_noise_of_contrastive_divergence(name):
    """λ (U(x)² + U(x⁻)²) is added, and chains from noise start at a run of the program: log p(x⁻) is that of N(0, 9 I)."""
    x, losses = gaussian_data(4000), {}
    P = np.eye(2, dtype=np.float32) * 1e-6
    by = BACKENDS[name].ContrastiveDivergence(steps=1, step_size=1e-6, start="noise")
    (loss,), terms = objective(name, by, quadratic(name, by, 2, P), x)
    noise, se = 2 * (-0.5 - 0.5 * np.log(2 * np.pi) - np.log(WIDE)), np.sqrt(2 * 0.5 / 4000)
    assert abs(terms["x_chain"] / 4000 - noise) < 4 * se
    assert terms["x"] == pytest.approx(stats.norm(0, WIDE).logpdf(x).sum(), rel=1e-4)
    assert loss == pytest.approx(terms["x_chain"] - terms["x"], rel=1e-4)
    P = np.eye(2, dtype=np.float32)
    for penalty in (0.0, 0.5):
        by = BACKENDS[name].ContrastiveDivergence(steps=1, step_size=1e-8, penalty=penalty)
        losses[penalty] = objective(name, by, quadratic(name, by, 2, P), x)[0][0]
    U = 0.5 * (x**2).sum(-1)
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * 2 * (U**2).sum(), rel=1e-2)


@pytest.mark.parametrize("loss", ["ScoreMatching()", "ScoreMatching('sliced')", "ContrastiveDivergence(steps=2)"])
def test_the_traced_step_is_the_eager_one(loss):
    """make_fx holds the derivatives of the score too. The zoo's default is held by the law of compiling."""
    from test_pyro_graph import agree

    by = eval(loss, vars(probgen.pyro))
    agree(types.SimpleNamespace(program=quadratic("pyro", by, 2), arrays=gaussian_data(64), batch_size=16), by, "64")


# -- chains ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("adjusted", [True, False])
def test_the_stationary_variance_of_langevin(name, adjusted):
    """On N(0, 1), from N(0, 9): v ← (1 − h/2)² v + h, whose fixed point is 1 / (1 − h/4); adjusted it is 1."""
    h, n = 0.9, 20_000
    run = untrained(quadratic(name, BACKENDS[name].ScoreMatching(), 1, np.array([[1 - 1 / WIDE**2]])), 1)
    x = run.sample(n, sampler=Langevin(60, h, adjusted=adjusted, adapts=False))["x"]
    expected = 1.0 if adjusted else 1 / (1 - h / 4)
    assert abs(x.var() - expected) < 4 * np.sqrt(2 / n) * expected
    if not adjusted:
        x = run.sample(n, sampler=Langevin(2, h, adjusted=False))["x"]
        v = functools.reduce(lambda v, _: (1 - h / 2) ** 2 * v + h, range(2), WIDE**2)
        assert abs(x.var() - v) < 4 * np.sqrt(2 / n) * v


@both
def test_langevin_gets_the_weights_of_far_modes_wrong(name):
    """0.8 of N((5, 5), I) and 0.2 of N(−(5, 5), I): chains that start symmetrically stay where they fall (0.51 in NCSN)."""

    def energy(x, xp):
        modes = [np.log(w) - 0.5 * ((x - m) ** 2).sum(-1) for w, m in ((0.8, 5.0), (0.2, -5.0))]
        return -xp.logaddexp(*modes) - 0.5 * (x**2).sum(-1) / 25

    n = 1000
    x = untrained(weighed(name, energy, 5.0)).sample(n, sampler=Langevin(300, 0.5, adjusted=False))["x"]
    weight = (x.sum(-1) > 0).mean()
    assert abs(weight - 0.5) < 4 * 0.5 / np.sqrt(n) + 0.05, "about half, though 0.8 of the mass lies there"
    assert abs(np.abs(x).mean() - 5) < 0.2


@pytest.mark.nightly
def test_nuts_draws_from_the_density():
    """Moments of the two halves of a ring by quadrature; NUTS goes from one to the other."""
    run = untrained(weighed("numpyro", ring))
    x = run.sample(4000, sampler=probgen.numpyro.NUTS(warmup=300, chains=4))["x"]
    grid, p, _ = quadrature(lambda x: -ring(x, np))
    for moment in (lambda x: (x**2).sum(-1), lambda x: np.abs(x[..., 0]), lambda x: x[..., 1] ** 2):
        exact = (p * moment(grid)).sum()
        draws = moment(x).reshape(-1, 4).T
        from arviz_stats import ess

        se = draws.std() / np.sqrt(float(ess(draws, method="mean", chain_axis=0, draw_axis=1)))
        assert abs(draws.mean() - exact) < 4 * se


@quick
def test_running_the_program_is_not_mistaken_for_its_density(name):
    """Without a sampler a chain is run, and said; `prior=True` is the program without its factor."""
    run = untrained(quadratic(name, BACKENDS[name].ScoreMatching(), 1, np.array([[1 - 1 / WIDE**2]])), 1)
    with pytest.warns(UserWarning, match="Langevin.*sampler=.*prior=True"):
        x = run.sample(2000)["x"]
    assert abs(x.var() - 1) < 4 * np.sqrt(2 / 2000)
    assert abs(run.sample(2000, prior=True)["x"].var() - 9) < 4 * 9 * np.sqrt(2 / 2000)


# -- log Z ----------------------------------------------------------------------------------------------------------


def quadrature(log_weight, width=WIDE, side=12.0, number=601):
    """A grid [n, 2], the mass of p in its cells, and log Z of N(x | 0, s² I) exp(log_weight(x))."""
    axis = np.linspace(-side, side, number)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log_p = stats.norm(0, width).logpdf(grid).sum(-1) + log_weight(grid) + 2 * np.log(axis[1] - axis[0])
    log_z = logsumexp(log_p)
    return grid, np.exp(log_p - log_z), log_z


@both
def test_log_z_by_annealing_is_that_of_quadrature(name):
    """Within 4 standard errors, which are below 0.04; and `log_likelihood` of rows is log p̃ less log Z."""
    run = untrained(weighed(name, ring))
    x = np.random.default_rng(0).normal(size=(40, 2))
    found = run.evaluate(x, k=400)
    *_, log_z = quadrature(lambda x: -ring(x, np))
    assert 0 < found["log_z_se"] < 0.04 and found["protocol"]["k"] == 400
    assert abs(found["log_z"] - log_z) < 4 * found["log_z_se"]
    plain = stats.norm(0, WIDE).logpdf(x).sum(-1) - ring(x, np) - found["log_z"]
    assert found["log_likelihood"] == pytest.approx(plain.mean(), abs=1e-4)
    np.testing.assert_allclose(run.log_likelihood(x, k=400)["log_likelihood"], plain, atol=1e-3)
    assert "elbo" not in found and "elbo" in found["notes"][0]


def test_the_error_of_log_z_is_its_spread():
    """Z of a Gaussian in closed form: estimates from 30 seeds lie around it as far as they say; in plain NumPy."""
    precision = np.diag([4.0, 0.5, 1.0])

    def parts(x):
        return -0.5 * (x**2).sum(-1), -0.5 * ((x @ precision) * x).sum(-1) - x[:, 0], -x, -x @ precision - [1.0, 0, 0]

    def draw(n, seed):
        return np.random.default_rng(seed).normal(size=(n, 3))

    total = np.diag(precision) + 1
    log_z = -0.5 * np.log(total).sum() + 0.5 / total[0]
    found = np.array([logsumexp(w) - np.log(len(w)) for w in (log_weights(draw, parts, 50, s)[0] for s in range(30))])
    one = log_weights(draw, parts, 2000, 0)[0]
    said = np.std(np.exp(one - one.max())) / np.mean(np.exp(one - one.max())) / np.sqrt(50)
    assert found.std(ddof=1) == pytest.approx(said, rel=0.52)  # 4 standard errors of a standard deviation of 30
    assert abs(np.exp(found - log_z).mean() - 1) < 4 * said / np.sqrt(30)


@pytest.mark.nightly
def test_a_fitted_energy():
    """The zoo's file on two moons: log Z and the moments of NUTS by quadrature."""
    data = probgen.load_data("two-moons")
    run = probgen.fit(probgen.load("ebm_numpyro", data), data, steps=3000, progress=False)
    found = run.evaluate(data.test)
    (step,) = run.preparation.steps["x"]

    def log_weight(grid):
        return run.trained.log_parts({"x": grid.astype(np.float32)})[1]

    grid, p, log_z = quadrature(log_weight, width=1.5, side=6.0, number=401)
    assert abs(found["log_z"] - log_z) < 4 * found["log_z_se"] and found["log_z_se"] < 0.03
    assert -1.3 < found["log_likelihood"] < data.log_prob(data.test[:]["x"]).mean()
    x = run.sample(8000, sampler=probgen.numpyro.NUTS(warmup=1000, chains=8))["x"]
    exact = (p[:, None] * (step.mean + step.std * grid)).sum(0)
    from arviz_stats import ess

    for i in range(2):
        draws = x[:, i].reshape(-1, 8).T
        se = draws.std() / np.sqrt(float(ess(draws, method="mean", chain_axis=0, draw_axis=1)))
        assert abs(draws.mean() - exact[i]) < 4 * se


# -- twins ----------------------------------------------------------------------------------------------------------


CONV = pytest.param({"network": "conv", "hidden": 16}, marks=pytest.mark.nightly)


def as_torch(theirs, ours):
    """Flax's weights under torch's names and in its layout: layers in the order of their numbers."""

    def order(names):
        return sorted(names, key=lambda n: (int("".join(c for c in n if c.isdigit())), "bias" in n))

    axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    pairs = zip(order(ours), order(theirs), strict=True)
    return {a: np.ascontiguousarray(theirs[b].transpose(axes[theirs[b].ndim])) for a, b in pairs}


@pytest.mark.parametrize("options", [{"hidden": 64}, CONV], ids=str)
def test_twins_are_one_program(options):
    """Pyro and NumPyro agree on log p and log ψ of rows, and on their gradients, with the same weights."""
    data = probgen.load_data("digits")
    programs = [probgen.load(file, data, **options) for file in ("ebm", "ebm_numpyro")]
    arrays = Preparation.of(programs[0].prepare, data).forward(data.train[np.arange(7)], np.random.default_rng(0))[0]
    runs = [probgen.fit(p, data, steps=0, progress=False) for p in programs]
    ours, theirs = (run._weights for run in runs)
    twin = backend_of(programs[0]).trained_of(programs[0], as_torch(theirs, ours), arrays, rows=len(data.train))
    for a, b in zip(twin.log_parts(arrays), runs[1].trained.log_parts(arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# -- what is refused ------------------------------------------------------------------------------------------------


BAD = {
    "sigma": (lambda m: m.DenoisingScoreMatching(sigma=0.0), "`sigma` is 0.0: it must be a number, positive"),
    "no number": (lambda m: m.DenoisingScoreMatching(sigma="a"), "`sigma` is 'a'"),
    "method": (lambda m: m.ScoreMatching("slices"), 'is "exact" or "sliced", not \'slices\''),
    "slices": (lambda m: m.ScoreMatching("sliced", slices=0), "`slices` is 0: it must be a whole number, 1 or more"),
    "steps": (lambda m: m.ContrastiveDivergence(steps=0), "`steps` is 0"),
    "size": (lambda m: m.ContrastiveDivergence(step_size=-1.0), "`step_size` is -1.0"),
    "start": (lambda m: m.ContrastiveDivergence(start="here"), 'is "data" or "noise"'),
    "penalty": (lambda m: m.ContrastiveDivergence(penalty=-1), "`penalty` is -1: it must be a number, zero or more"),
    "chain": (lambda m: Langevin(steps=True), "`steps` is True"),
    "chain's size": (lambda m: Langevin(step_size=float("nan")), "`step_size` is nan"),
    "adjusted": (lambda m: Langevin(adjusted=1), "`adjusted` is 1: it must be True or False"),
}


@both
@pytest.mark.parametrize("case", BAD)
def test_arguments_that_are_refused(name, case):
    make, said = BAD[case]
    with pytest.raises(ProbgenError) as error:
        make(BACKENDS[name])
    assert said in str(error.value) and str(error.value).count(". ") == 0


def other(name, kind):
    P, D = (pyro, dist) if name == "pyro" else (numpyro, ndist)
    ones = torch.ones if name == "pyro" else jnp.ones

    def model(x):
        with P.plate("data", len(x)):
            z = P.sample("z", D.Normal(0.0, 1.0)) if kind == "latent" else 0.0
            if kind == "counts":
                P.sample("x", D.Poisson(ones(1) * 2.0).to_event(1), obs=x)
            elif kind == "bounded":
                P.sample("x", D.Beta(ones(1) * 2.0, 2.0).to_event(1), obs=x)
            elif kind == "name":
                P.sample("y", D.Normal(ones(1), 1.0).to_event(1), obs=x)
            else:
                P.sample("x", D.Normal(ones(1) * z, 1.0).to_event(1) if kind != "latent" else D.Normal(z, 1.0), obs=x)

    def guide(x):
        with P.plate("data", len(x)):
            P.sample("z", D.Normal(0.0, 1.0))

    return Program(model, guide if kind == "latent" else None, by=BACKENDS[name].ScoreMatching())


@both
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("latent", "the latent 'z': learn it by ELBO()"),
        ("counts", "'x' are discrete (Poisson)"),
        ("bounded", "lives on"),
        ("name", "'y' is not named after its array, 'x'"),
    ],
)
def test_programs_that_are_refused(name, kind, said):
    x = np.full((20, 1), 0.5, np.float32) if kind != "latent" else np.full(20, 0.5, np.float32)
    x = np.ones((20, 1), np.float32) if kind == "counts" else x
    with pytest.raises(ProbgenError, match="ScoreMatching follows the gradient") as error:
        probgen.fit(other(name, kind), x, steps=1, progress=False)
    assert said in str(error.value)


@both
def test_without_a_denoiser_the_noise_must_be_named(name):
    program = quadratic(name, BACKENDS[name].DenoisingScoreMatching(), 1)
    with pytest.raises(ProbgenError, match=r"DenoisingScoreMatching.*`sigma`"):
        probgen.fit(program, np.zeros((8, 1), np.float32), steps=1, progress=False)


@both
def test_what_chains_refuse(name):
    module, run = BACKENDS[name], untrained(other(name, "exact"), 1)
    program = other(name, "exact").learned_by(module.ContrastiveDivergence(penalty=0.1))
    with pytest.raises(ProbgenError, match="`penalty` is on the factors"):
        probgen.fit(program, np.zeros((8, 1), np.float32), steps=1, progress=False)
    with pytest.raises(ProbgenError, match="no longer finite after 300 steps of 50"):
        run.sample(3, sampler=Langevin(300, 50.0, adjusted=False))
    if name == "pyro":
        with pytest.raises(ProbgenError, match="NUTS as a sampler of data is NumPyro's"):
            run.sample(3, sampler=module.NUTS())
    assert run.sample(3, sampler=Langevin(2))["x"].shape == (3, 1)
