"""NUTS on both backends: against closed forms and a grid, against NumPyro by hand, stopped and resumed, and refused.

Statistical gates have fixed seeds and allow 4 Monte Carlo standard errors: a sampler that is right fails one of them
with probability 6e-5 for each number, below 3e-3 for all in this file together.
"""

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as npd
import pyro
import pyro.distributions as pyd
import pytest
import torch
from scipy import stats

import probgen
from probgen import ProbgenError, Program
from probgen import numpyro as on_numpyro
from probgen import pyro as on_pyro
from probgen.nuts.draws import Draws
from probgen.posterior import loo

N = 30
LONG = {"pyro": dict(draws=200, warmup=80, chains=2), "numpyro": dict(draws=1500, warmup=300, chains=2)}
MIXED = {"pyro": dict(draws=70, warmup=40, chains=1), "numpyro": LONG["numpyro"]}
SHORT = dict(draws=6, warmup=8, chains=2)

slow_on_numpyro = pytest.mark.parametrize("backend", ["pyro", pytest.param("numpyro", marks=pytest.mark.nightly)])

PPL = {
    "pyro": SimpleNamespace(
        sample=pyro.sample, plate=pyro.plate, dist=pyd, param=pyro.param, np=torch, array=torch.tensor, home=on_pyro
    ),
    "numpyro": SimpleNamespace(
        sample=numpyro.sample,
        plate=numpyro.plate,
        dist=npd,
        param=numpyro.param,
        np=jnp,
        array=jnp.array,
        home=on_numpyro,
    ),
}


@pytest.fixture(scope="module", params=PPL)
def backend(request):
    return request.param


def conjugate(ppl):
    """A mean of known variance, and a coin."""

    def model(x, y):
        mu = ppl.sample("mu", ppl.dist.Normal(0.0, 2.0))
        p = ppl.sample("p", ppl.dist.Uniform(0.0, 1.0))  # Beta(1, 1), without its slow draws
        with ppl.plate("data", len(x)):
            ppl.sample("x", ppl.dist.Normal(mu, 1.0), obs=x)
            ppl.sample("y", ppl.dist.Bernoulli(p), obs=y)

    return model


def mixture(ppl):
    """Two components, of which one has a place of its own; their labels cannot change places."""

    def model(x):
        w = ppl.sample("w", ppl.dist.Uniform(0.0, 1.0))
        mu = ppl.sample("mu", ppl.dist.Normal(2.0, 1.0))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Bernoulli(w), infer={"enumerate": "parallel"})
            ppl.sample("x", ppl.dist.Normal(ppl.np.where(z > 0, mu, ppl.array(-1.0)), 1.0), obs=x)

    return model


def data_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(1.3, 1.0, rows).astype(np.float32), "y": (rng.random(rows) < 0.3).astype(np.float32)}


def fitted(backend, model, data, **options):
    sampling = {name: options.pop(name) for name in (*SHORT, "target_accept", "max_tree_depth") if name in options}
    by = PPL[backend].home.NUTS(**{**SHORT, **sampling})
    return probgen.fit(Program(model(PPL[backend]), by=by), data, progress=False, **options)


@pytest.fixture(scope="module")
def coin(backend):
    """A long run of the conjugate program, and rows that were held out."""
    train, test = data_of(N), data_of(12, seed=1)
    splits = {"train": train, "valid": test, "test": test}
    data = {f"{name}_{split}": part[name] for split, part in splits.items() for name in part}
    return fitted(backend, conjugate, data, **LONG[backend]), train, test


def exact(train):
    """The posteriors in closed form."""
    precision = 1 / 4 + len(train["x"])
    ones = train["y"].sum()
    return stats.norm(train["x"].sum() / precision, precision**-0.5), stats.beta(1 + ones, 1 + len(train["y"]) - ones)


def assert_agrees(draws, mean, sd):
    """Mean and standard deviation of draws [chains, draws] within 4 MCSE."""
    from arviz_stats import mcse

    draws = np.asarray(draws, np.float64)
    for found, truth, method in ((draws.mean(), mean, "mean"), (draws.std(), sd, "sd")):
        error = float(mcse(draws, method=method, chain_axis=0, draw_axis=1))
        assert 0 < error < 0.3 * sd
        assert abs(found - truth) < 4 * error, (method, found, truth, error)


# -- truth ------------------------------------------------------------------------------------------------------------


@pytest.mark.nightly_on("numpyro")
def test_conjugate_posteriors(coin):
    run, train, _ = coin
    for name, truth in zip(("mu", "p"), exact(train), strict=True):
        assert_agrees(run.draws.values[name], truth.mean(), truth.std())
    assert run.draws.diagnostics()["r_hat"] < 1.05
    assert run.params == {}


def test_log_joint_is_that_of_the_program(coin):
    """`lp` is the log joint in unconstrained coordinates: log |dp/du| = log p(1 − p); the loss is −lp / N."""
    run, train, _ = coin
    mu, p = (np.asarray(run.draws.values[name], np.float64)[..., None] for name in ("mu", "p"))
    ones = train["y"]
    likelihood = stats.norm.logpdf(train["x"], mu, 1) + ones * np.log(p) + (1 - ones) * np.log1p(-p)
    prior = stats.norm.logpdf(mu, 0, 2) + np.log(p) + np.log1p(-p)
    joint = likelihood.sum(-1) + prior[..., 0]
    assert np.allclose(run.draws.stats["lp"], joint, atol=1e-3)
    last = run.metrics["loss"][-1]
    assert last == pytest.approx(-joint[:, -run_of_last_row(run) :].mean() / N, rel=1e-5)


def run_of_last_row(run):
    steps = run.metrics["step"]
    return steps[-1] - steps[-2]


def test_predictive_density(coin):
    """Of held-out rows, against Normal and Beta-Bernoulli in closed form."""
    run, train, test = coin
    numbers = run.evaluate()
    mu, p = exact(train)
    truth = stats.norm.logpdf(test["x"], mu.mean(), np.hypot(1, mu.std()))
    truth = truth + np.where(test["y"] > 0, np.log(p.mean()), np.log(1 - p.mean()))
    assert 0 < numbers["log_likelihood_mc_se"] < 0.02
    assert abs(numbers["log_likelihood"] - truth.mean()) < 4 * numbers["log_likelihood_mc_se"]
    assert run.metrics["valid_loss"][-1] == pytest.approx(-truth.mean(), abs=0.02)  # of 100 draws
    assert {"elbo", "k_hat", "term/x"}.isdisjoint(numbers)
    assert any("without a guide" in note for note in numbers["notes"])
    assert numbers["r_hat"] == run.draws.diagnostics()["r_hat"] and numbers["divergences"] == 0


def test_leave_one_out(coin):
    """PSIS-LOO of the mean against Σ log p(x_n | x_−n) in closed form.

    What it takes off the fit is about 1 nat, N times the posterior's variance, known to √(2 / ESS): the gate is 4 of it.
    """
    run, train, _ = coin
    tree = run.posterior(run.data.train, draws=250)
    x = train["x"].astype(np.float64)
    precision = 1 / 4 + N - 1
    truth = stats.norm.logpdf(x, (x.sum() - x) / precision, np.sqrt(1 + 1 / precision)).sum()
    found = loo(tree, var_name="x", pointwise=True)
    ess = min(500, run.draws.by_site["mu"]["ess_bulk"])
    assert ess > 100 and found.elpd == pytest.approx(truth, abs=4 * np.sqrt(2 / ess))
    assert np.nanmedian(found.pareto_k) < 0.5
    with pytest.raises(ProbgenError, match="all 30 training rows"):
        loo(run.posterior(run.data.test))


@slow_on_numpyro
def test_mixture_against_a_grid(backend):
    """p(w, μ | x) and the assignments, z summed out, on a grid of 300 × 300."""
    rng = np.random.default_rng(4)
    x = np.where(rng.random(40) < 0.4, rng.normal(1.5, 1, 40), rng.normal(-1, 1, 40)).astype(np.float32)
    run = fitted(backend, mixture, {"x": x}, **MIXED[backend])
    w, mu = np.meshgrid((np.arange(300) + 0.5) / 300, np.linspace(-2, 5, 300), indexing="ij")
    one = np.log(w)[..., None] + stats.norm.logpdf(x, mu[..., None], 1)
    none = np.log1p(-w)[..., None] + stats.norm.logpdf(x, -1, 1)
    joint = np.logaddexp(one, none).sum(-1) + stats.norm.logpdf(mu, 2, 1)
    weight = np.exp(joint - joint.max())
    weight /= weight.sum()
    for name, grid in (("w", w), ("mu", mu)):
        mean = (weight * grid).sum()
        assert_agrees(run.draws.values[name], mean, np.sqrt((weight * (grid - mean) ** 2).sum()))
    tree = run.posterior(run.data.train, draws=100)
    share = np.exp(one - np.logaddexp(one, none))
    truth = np.einsum("ij,ijn->n", weight, share)
    # 200 draws of z a row, of which those of the globals depend on each other: an ESS of 50 at least
    error = np.sqrt(truth * (1 - truth) / 50)
    found = tree["posterior"]["z"].mean(("chain", "draw")).values
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data")
    assert np.all(np.abs(found - truth) < 4 * error + 1e-3)
    drawn = {name: tree["posterior"][name].values.astype(np.float64)[..., None] for name in ("w", "mu")}
    by_hand = np.logaddexp(
        np.log(drawn["w"]) + stats.norm.logpdf(x, drawn["mu"], 1), np.log1p(-drawn["w"]) + stats.norm.logpdf(x, -1, 1)
    )
    assert np.allclose(tree["log_likelihood"]["x"].values, by_hand, atol=1e-4)
    assert np.isfinite(loo(tree).elpd)
    assert np.isfinite(run.evaluate(run.data.train)["reconstruction_error"])


def assert_drawn_by_hand(run):
    by = run.program.by
    kernel = numpyro.infer.NUTS(conjugate(PPL["numpyro"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one device: the chains are drawn one after another
        hand = dict(num_warmup=by.warmup, num_samples=by.draws, num_chains=by.chains, progress_bar=False)
        by_hand = numpyro.infer.MCMC(kernel, **hand)
        by_hand.run(jax.random.key(0), **{name: jnp.asarray(value) for name, value in data_of(N).items()})
    for name, value in by_hand.get_samples(group_by_chain=True).items():
        assert np.array_equal(run.draws.values[name], value), name


@pytest.mark.parametrize("backend", ["numpyro"], indirect=True)
def test_same_draws_as_numpyro_by_hand(coin):
    """All draws of both chains, bit for bit."""
    assert_drawn_by_hand(coin[0])


@pytest.mark.nightly
def test_one_chain_is_numpyros_too():
    assert_drawn_by_hand(fitted("numpyro", conjugate, data_of(N), draws=60, warmup=60, chains=1))


# -- what a run is ----------------------------------------------------------------------------------------------------


@slow_on_numpyro
def test_chains_start_apart_and_warm_up(backend):
    """Until the warm-up is over the run holds one draw: where the chains are."""
    seen = []
    on_chunk = lambda run, row: seen.append((run.draws.length, row))  # noqa: E731
    run = fitted(backend, conjugate, data_of(N), steps=8, on_chunk=on_chunk)
    assert run.draws.length == 1 and len(np.unique(run.draws.values["mu"])) == 2
    assert "not defined for 1 draws" in run.draws.notes()[0]
    assert run.sample(3)["x"].shape == (3,)
    assert seen[0][0] == 1 and seen[0][1]["step_size"] > 0 and 0 <= seen[0][1]["accept_prob"] <= 1


def test_tree(coin):
    run, train, _ = coin
    tree = run.posterior(run.data.train, draws=50, rows=10, predictive=True)
    assert dict(tree["posterior"]["mu"].sizes) == {"chain": 2, "draw": 50}
    kept = run.draws.thinned(50)
    assert np.array_equal(tree["posterior"]["mu"].values, kept.values["mu"])
    assert kept.values["mu"][0, -1] == run.draws.values["mu"][0, -1]
    assert {"diverging", "energy", "acceptance_rate", "tree_depth"} <= set(tree["sample_stats"].data_vars)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    mu, x = tree["posterior"]["mu"].values[..., None], tree["observed_data"]["x"].values
    assert np.allclose(tree["log_likelihood"]["x"].values, stats.norm.logpdf(x, mu, 1), atol=1e-4)
    assert np.array_equal(x, train["x"][tree["posterior_predictive"]["data"].values])
    replicates = tree["posterior_predictive"]["x"].values
    assert replicates.shape == (2, 50, 10)
    assert abs((replicates - mu).mean()) < 4 / np.sqrt(replicates.size)  # x_rep ~ N(μ_s, 1)
    assert abs((replicates - mu).std() - 1) < 4 / np.sqrt(2 * replicates.size)


def test_guide_is_one_of_the_draws(coin):
    run, *_ = coin
    drawn = run.draws.flat()
    if isinstance(run.program.by, on_pyro.NUTS):
        trace = pyro.poutine.trace(run.guide).get_trace(x=torch.zeros(4), y=torch.zeros(4))
        found = {name: trace.nodes[name]["value"].numpy() for name in drawn}
    else:
        seeded = numpyro.handlers.seed(run.guide, jax.random.key(0))
        trace = numpyro.handlers.trace(seeded).get_trace(x=jnp.zeros(4), y=jnp.zeros(4))
        found = {name: np.asarray(trace[name]["value"]) for name in drawn}
    [place] = np.flatnonzero((drawn["mu"] == found["mu"]) & (drawn["p"] == found["p"]))[:1]
    assert drawn["p"][place] == found["p"]
    sampled = run.sample(200, seed=2)
    assert np.isin(sampled["mu"], drawn["mu"]).all() and len(np.unique(sampled["mu"])) > 50


@slow_on_numpyro
def test_predictive_of_a_guide_in_data_units(backend):
    """Data near 50 and 10 wide, standardised for the program, come back as they were given."""
    ppl = PPL[backend]

    def model(x):
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Normal(0.0, 1.0))
            ppl.sample("x", ppl.dist.Normal(z, 0.1), obs=x)

    def guide(x):
        with ppl.plate("data", len(x)):
            ppl.sample("z", ppl.dist.Normal(x / 1.01, 0.0995))

    x = np.random.default_rng(0).normal(50, 10, 60).astype(np.float32)
    program = Program(model, guide, by=ppl.home.ELBO(), prepare={"x": probgen.Standardize()})
    run = probgen.fit(program, {"x": x}, steps=1, progress=False)
    tree = run.posterior(run.data.train, draws=40, predictive=True)
    found = tree["posterior_predictive"]["x"]
    assert found.dims == ("chain", "draw", "data") and found.shape == (1, 40, 60)
    # each row's mean of 40: sd of a replicate 10 (0.1² + 0.0995²)^½ = 1.4, shrunk towards 50 by 1%
    expected = 50 + (tree["observed_data"]["x"].values - 50) / 1.01
    assert np.abs(found.mean(("chain", "draw")).values - expected).max() < 5 * 1.4 / np.sqrt(40) + 0.1


@slow_on_numpyro
def test_local_latents(backend, tmp_path):
    """Latents of the rows are drawn too; there are none for other rows, and no density without them."""

    def model(ppl):
        def model(x):
            scale = ppl.sample("scale", ppl.dist.HalfNormal(1.0))
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", ppl.dist.Normal(0.0, scale))
                ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

        return model

    run = fitted(backend, model, {"x": data_of(7)["x"]}, out=tmp_path / "run")
    assert run.draws.values["z"].shape == (2, 6, 7)
    import xarray

    with xarray.open_datatree(tmp_path / "run" / "posterior.nc") as kept:
        assert kept["posterior"]["z"].dims == ("chain", "draw", "data")
        assert np.array_equal(kept["posterior"]["z"].values, run.draws.values["z"])
        assert kept["sample_stats"]["diverging"].shape == (2, 6)
    with pytest.warns(UserWarning, match="no log_likelihood"):
        tree = run.posterior(run.data.train, draws=3)
    assert dict(tree["posterior"]["z"].sizes) == {"chain": 2, "draw": 3, "data": 7}
    assert any("local latent 'z'" in note for note in run.evaluate(run.data.train)["notes"])
    with pytest.raises(ProbgenError, match="no draws of it for other rows"):
        run.posterior({"x": np.zeros(7, np.float32)})


# -- stopped and resumed ----------------------------------------------------------------------------------------------


def test_restored_goes_on_bit_for_bit(backend):
    """Stopped in the warm-up and after it, and restored in another engine."""
    from probgen.data.feed import Feed
    from probgen.data.prepare import Preparation

    data = probgen.load_data(data_of(N))
    program = Program(conjugate(PPL[backend]), by=PPL[backend].home.NUTS(**SHORT))
    feed = Feed(data.train, Preparation.of({}, data), None, 3)
    options = SimpleNamespace(steps=14, seed=3, device="cpu", precision="32", compile=False)
    engine, fresh = (PPL[backend].home.engine_of(program, program.by, feed, options) for _ in range(2))
    whole, curves = engine.advance(engine.start(), 0, 14)
    for stop in (5, 11):
        half, _ = engine.advance(engine.start(), 0, stop)
        state = fresh.restore({name: np.array(value) for name, value in engine.export(half).items()})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            state, rest = fresh.advance(state, stop, 12)
            state, _ = fresh.advance(state, 12, 14)
        again = [str(w.message) for w in said if "start again from their seed" in str(w.message)]
        assert len(again) == (backend == "pyro")  # and once only
        assert np.array_equal(rest["loss"], curves["loss"][stop:12])
        for name, value in engine.weights(whole).items():
            assert np.array_equal(fresh.weights(state)[name], value), name


@slow_on_numpyro
def test_a_stopped_run_ends_like_an_uninterrupted_one(backend, tmp_path, monkeypatch):
    import importlib

    monkeypatch.setattr(importlib.import_module("probgen.fit"), "SAVE_EVERY", 0.0)
    options = dict(draws=95, warmup=10, chains=1, max_tree_depth=2)

    def stop(run, row):
        raise InterruptedError

    whole = fitted(backend, conjugate, data_of(N), out=tmp_path / "whole", **options)
    with pytest.raises(InterruptedError):
        fitted(backend, conjugate, data_of(N), out=tmp_path / "stopped", on_chunk=stop, **options)
    assert probgen.Run.open(tmp_path / "stopped").draws.length == 90
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = fitted(backend, conjugate, data_of(N), out=tmp_path / "stopped", resume=True, **options)
    for name, value in whole.draws.weights().items():
        assert np.array_equal(resumed.draws.weights()[name], value), name
    drop = lambda row: {name: value for name, value in row.items() if name != "seconds"}  # noqa: E731
    assert [drop(row) for row in resumed._rows] == [drop(row) for row in whole._rows]
    opened = probgen.Run.open(tmp_path / "stopped", program=whole.program)
    assert opened.finished and np.array_equal(opened.sample(3)["x"], whole.sample(3)["x"])


FILE = """
import pyro, pyro.distributions as dist
from probgen import Program

def program(spec):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
    return Program(model)
"""


def test_command_line(tmp_path, capsys, monkeypatch):
    from probgen.cli import main

    (tmp_path / "mean.py").write_text(FILE)
    np.savez(tmp_path / "x.npz", x=data_of(N)["x"])
    monkeypatch.chdir(tmp_path)
    by = "NUTS(draws=20, warmup=20, chains=2)"
    assert main(["fit", "mean.py", "--data", "x.npz", "--by", by, "--out", "run"]) == 0
    assert main(["resume", "run"]) == 0
    run = probgen.Run.open("run")
    assert run.draws.length == 20 and run.options["steps"] == 40 and run.options["batch_size"] is None
    assert main(["evaluate", "run"]) == 0
    assert "R-hat" in capsys.readouterr().out
    html = run.report().read_text()
    assert "<h2>Chains</h2>" in html and "ESS, bulk" in html


# -- whether to trust it ----------------------------------------------------------------------------------------------


def test_notes_say_what_is_wrong():
    rng = np.random.default_rng(0)
    still = {"diverging": np.zeros((2, 400), bool)}
    good = rng.normal(size=(2, 400, 3))
    assert Draws({"a": good}, still).notes() == []
    apart = good + np.array([0, 2])[:, None, None] * np.array([0, 0, 1])
    [said] = Draws({"a": apart}, still).notes()
    assert "R-hat of 'a'" in said and "above 1.01" in said
    walk = np.cumsum(rng.normal(size=(2, 4000)), axis=1)
    slow = walk - walk.mean(1, keepdims=True)
    numbers = Draws({"a": good, "b": slow[:, ::10]}, still).by_site
    assert numbers["b"]["ess_bulk"] < 100 < numbers["a"]["ess_bulk"]
    halves = [rng.permutation(stats.norm.ppf((np.arange(30) + 0.5) / 30)) for _ in range(4)]  # all agree
    [said] = Draws({"a": np.reshape(halves, (2, 60))}, {"diverging": still["diverging"][:, :60]}).notes()
    assert "effective sample size" in said
    diverging = still["diverging"].copy()
    diverging[0, :3] = True
    [said] = Draws({"a": good}, {"diverging": diverging}).notes()
    assert said.startswith("3 of 800 draws diverged") and "target_accept" in said
    alone = Draws({"a": good[:1]}, {"diverging": still["diverging"][:1]})
    assert "R-hat is not defined for one chain" in alone.notes()[0] and len(alone.notes()) == 1
    assert "r_hat" not in alone.diagnostics() and alone.diagnostics()["ess_bulk"] > 300
    triangle = np.concatenate([good, np.zeros((2, 400, 1))], axis=-1)  # a number that never moves
    assert np.isfinite(Draws({"a": triangle}, still).diagnostics()["r_hat"])


@slow_on_numpyro
def test_divergences_are_counted(backend):
    """A funnel with a step too long."""

    def funnel(ppl):
        def model(x):
            v = ppl.sample("v", ppl.dist.Normal(0.0, 3.0))
            with ppl.plate("k", 5):
                ppl.sample("u", ppl.dist.Normal(0.0, ppl.np.exp(v)))
            with ppl.plate("data", len(x)):
                ppl.sample("x", ppl.dist.Normal(0.0, 1.0), obs=x)

        return model

    run = fitted(backend, funnel, {"x": data_of(3)["x"]}, draws=30, warmup=20, target_accept=0.3)
    assert 0 < run.draws.divergences <= sum(run.metrics["divergences"])  # the curve counts NumPyro's warm-up too
    assert any("diverged" in note for note in run.evaluate(run.data.train)["notes"])


# -- refused ----------------------------------------------------------------------------------------------------------


def with_parameter(ppl):
    def model(x):
        mu = ppl.sample("mu", ppl.dist.Normal(0.0, 1.0))
        with ppl.plate("data", len(x)):
            ppl.sample("x", ppl.dist.Normal(mu + ppl.param("shift", ppl.array(0.0)), 1.0), obs=x)

    return model


def without_latents(ppl):
    def model(x):
        with ppl.plate("data", len(x)):
            ppl.sample("x", ppl.dist.Normal(0.0, 1.0), obs=x)

    return model


def unmarked(ppl):
    def model(x):
        w = ppl.sample("w", ppl.dist.Uniform(0.0, 1.0))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", ppl.dist.Bernoulli(w))
            ppl.sample("x", ppl.dist.Normal(z, 1.0), obs=x)

    return model


def subsampling(ppl):
    def model(x):
        mu = ppl.sample("mu", ppl.dist.Normal(0.0, 1.0))
        with ppl.plate("some", len(x), subsample_size=5) as rows:
            ppl.sample("x", ppl.dist.Normal(mu, 1.0), obs=x[rows])

    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (with_parameter, "has the parameter 'shift': give it a prior"),
        (without_latents, "no continuous latents"),
        (unmarked, "discrete latent 'z': mark it"),
        (subsampling, "subsamples 5 of 30"),
    ],
)
def test_programs_refused(backend, model, said, tmp_path):
    with pytest.raises(ProbgenError, match=said):
        fitted(backend, model, {"x": data_of(N)["x"]}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_requests_refused(backend):
    home = PPL[backend].home
    with pytest.raises(ProbgenError, match="takes all 30 rows at every step, and `batch_size` is 8"):
        fitted(backend, conjugate, data_of(N), batch_size=8)
    bad = {**data_of(N), "y": np.full(N, 0.5, np.float32)}
    with pytest.raises(ProbgenError, match="outside the support"):
        fitted(backend, conjugate, bad)
    for wrong in (dict(draws=0), dict(chains=1.5), dict(target_accept=1.0)):
        with pytest.raises(ProbgenError, match=f"NUTS: `{next(iter(wrong))}`"):
            home.NUTS(**wrong)
    with pytest.raises(ProbgenError, match="cannot be part of a loss"):
        program = Program(without_latents(PPL[backend]), by=home.ELBO() + home.NUTS())
        probgen.fit(program, {"x": data_of(N)["x"]}, steps=1)


def test_a_mixture_with_parameters_is_told_of_priors(backend):
    x = {"x": np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)}
    name = {"pyro": "gmm", "numpyro": "gmm_numpyro"}[backend]
    with pytest.raises(ProbgenError, match=r"give it a prior \(.*bayesian=True\), or learn it by ELBO\(\) or EM\(\)$"):
        probgen.fit(probgen.load(name, x, components=2), x, by=PPL[backend].home.NUTS(**SHORT), progress=False)
