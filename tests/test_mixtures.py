"""The zoo's mixtures against scipy, scikit-learn, closed forms and loops in numpy; and their twins against each other."""

import itertools
import math
import os
import re
import warnings

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # most of the twins' time is compiling

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.decomposition import FactorAnalysis
from sklearn.neighbors import KernelDensity

import probgen
from probgen import ProbgenError, cli
from probgen.check.subject import Subject
from probgen.data.feed import evaluation_batches
from probgen.data.prepare import Preparation
from probgen.program import backend_of
from probgen.pyro import EM
from probgen.pyro.distributions import WishartCholesky
from probgen.schedules import Cosine
from probgen.zoo import options_of

KINDS = ("full", "tied", "diagonal", "spherical")
POINTS = {"x": np.random.default_rng(0).normal(size=(12, 2)) @ np.array([[1.0, 0.4], [0.0, 0.7]]) + (2.0, -1.0)}
BITS = {"x": (np.random.default_rng(1).random((12, 6)) < np.linspace(0.2, 0.8, 6)).astype(np.uint8)}


@pytest.fixture(autouse=True)
def a_store_of_its_own():
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- programs at given weights --------------------------------------------------------------------------------------


def prepared(program, data):
    """(arrays as the program takes them, log |det| of their preparation, per row)."""
    preparation = Preparation.of(program.prepare, data)
    batches = evaluation_batches(data.train, preparation, len(data.train))
    return next((arrays, log_jacobian) for _, arrays, log_jacobian in batches)


def parameters_of(program, arrays):
    """{name: (constraint, value at the start)} of a Pyro program's parameters."""
    tensors = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in arrays.items()}
    runs = [pyro.poutine.trace(fn) for fn in (program.model, program.guide) if fn is not None]
    nodes = {name: node for run in runs for name, node in run.get_trace(**tensors).nodes.items()}
    params = {name: node for name, node in nodes.items() if node["type"] == "param"}
    return {n: (node["kwargs"].get("constraint"), node["value"].detach().numpy()) for n, node in params.items()}


def random_parameters(program, arrays, seed=0):
    """Constrained values, by the constraint's name."""
    rng, values = np.random.default_rng(seed), {}
    for name, (constraint, start) in sorted(parameters_of(program, arrays).items()):
        word, shape = "" if constraint is None else type(constraint).__name__.lower().strip("_"), start.shape
        if word == "simplex":
            values[name] = rng.dirichlet(np.full(shape[-1], 3.0), shape[:-1])
        elif "cholesky" in word:
            diagonal = np.eye(shape[-1]) * rng.lognormal(-0.3, 0.4, (*shape[:-1], 1))
            values[name] = np.tril(0.5 * rng.normal(size=shape), -1) + diagonal
        elif word == "interval":
            values[name] = rng.uniform(0.1, 0.9, shape)
        elif word == "greaterthan":
            values[name] = float(constraint.lower_bound) + rng.lognormal(0, 0.4, shape)
        else:
            values[name] = start if name == "centres" else rng.normal(size=shape)
    return values


def trained(program, arrays, values):
    """The Pyro program with these constrained values, in double precision."""
    weights = {name: torch.tensor(np.asarray(value, np.float64)) for name, value in values.items()}
    for name, (constraint, _) in parameters_of(program, arrays).items():
        if constraint is not None:
            weights[name] = torch.distributions.transform_to(constraint).inv(weights[name])
    weights = {name: value.numpy() for name, value in weights.items()}
    rows = len(arrays["x"])
    return backend_of(program).trained_of(program, weights, arrays, rows=rows, seed=0, device="cpu", precision="64")


def at_random(name, data, seed=0, **options):
    """(trained program, its arrays, its parameters) at random weights."""
    data = probgen.load_data(data)
    program = probgen.load(name, data, **options)
    arrays, _ = prepared(program, data)
    values = random_parameters(program, arrays, seed)
    return trained(program, arrays, values), arrays, values


# -- twins ----------------------------------------------------------------------------------------------------------


def latents_for(name, options, rows, rng):
    """Values of every latent of a file."""
    K, D = options.get("components", 0), 2
    if name == "kde":
        return {}
    if name == "ppca":
        return {"z": rng.normal(size=(rows, 2))}
    z = {"z": rng.integers(0, K, rows)}
    if not options.get("bayesian"):
        return z
    z |= {"weights": rng.dirichlet(np.ones(K)), "locations": rng.normal(size=(K, D))}
    kind = options["covariance"]
    if kind in ("diagonal", "spherical"):
        return z | {"precisions": rng.lognormal(0, 0.5, (K, D) if kind == "diagonal" else (K,))}
    return z | {"precision_tril": random_tril((K, D, D) if kind == "full" else (D, D), rng)}


def random_tril(shape, rng):
    return np.tril(0.5 * rng.normal(size=shape), -1) + np.eye(shape[-1]) * rng.lognormal(0.2, 0.4, (*shape[:-1], 1))


TWINS = [
    *[
        pytest.param("gmm", {"components": 3, "covariance": k, "bayesian": b}, POINTS, id=f"gmm-{k}{'-bayesian' * b}")
        for b in (False, True)
        for k in KINDS
    ],
    *[pytest.param("ppca", {"noise": noise}, POINTS, id=f"ppca-{noise}") for noise in ("isotropic", "diagonal")],
    pytest.param("bernoulli_mixture", {"components": 3}, BITS, id="bernoulli_mixture"),
    pytest.param("kde", {}, POINTS, id="kde"),
]


def densities_on_numpyro(program, arrays, values, latents):
    """log p and log q of every site, at given parameters and latents."""
    import jax
    from numpyro import handlers

    def run(values, latents, arrays):
        found = []
        for fn in (program.model, program.guide):
            held = handlers.substitute(handlers.seed(fn, 0), data={**values, **latents})
            nodes = handlers.trace(held).get_trace(**arrays) if fn is not None else {}
            found.append({n: s["fn"].log_prob(s["value"]) for n, s in nodes.items() if s["type"] == "sample"})
        return found

    with jax.enable_x64(True):
        given = jax.tree.map(np.asarray, ({n: np.float64(v) for n, v in values.items()}, latents, arrays))
        return jax.tree.map(np.asarray, jax.jit(run)(*given))


@pytest.mark.parametrize(("name", "options", "data"), TWINS)
def test_twins_are_one_program(name, options, data):
    """With the same parameters every site of model and guide has the same density at given latents: ≤1e-6 relative."""
    ours, arrays, values = at_random(name, data, **options)
    twin = probgen.load(f"{name}_numpyro", probgen.load_data(data), **options)
    arrays = {name: np.float64(value) for name, value in arrays.items()}
    latents = latents_for(name, options, len(arrays["x"]), np.random.default_rng(1))
    theirs = densities_on_numpyro(twin, arrays, values, latents)
    for a, b in zip(ours.log_joint(arrays, latents, 0), theirs, strict=True):
        assert a.keys() == b.keys()
        for site in a:
            np.testing.assert_allclose(a[site], b[site], rtol=1e-6, atol=1e-6, err_msg=site)


@pytest.mark.parametrize("name", sorted({case.values[0] for case in TWINS}))
def test_twins_have_the_same_options_preparation_and_recipe(name):
    ours, theirs = (options_of(file)[1] for file in (name, f"{name}_numpyro"))
    assert ours == theirs
    for data in (POINTS, {"x": np.arange(24).reshape(12, 2)}):
        one, two = (probgen.load(file, probgen.load_data(data)) for file in (name, f"{name}_numpyro"))
        assert (one.prepare, one.defaults) == (two.prepare, two.defaults)


# -- mixture of Gaussians -------------------------------------------------------------------------------------------


def covariances(scale, kind, K, D):
    """Σ_k [K, D, D] of a scale as `gmm` keeps it."""
    if kind in ("full", "tied"):
        return np.broadcast_to(scale @ np.swapaxes(scale, -1, -2), (K, D, D))
    return np.stack([np.diag(np.broadcast_to(s**2, D)) for s in scale])


def mixture_log_density(x, pi, mu, sigma):
    """log Σ_k π_k N(x | μ_k, Σ_k), by scipy."""
    parts = [np.log(p) + stats.multivariate_normal(m, s).logpdf(x) for p, m, s in zip(pi, mu, sigma, strict=True)]
    return logsumexp(parts, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gmm_is_the_mixture_that_scipy_sums_and_integrates_to_one(kind):
    K = 3
    run, arrays, values = at_random("gmm", POINTS, components=K, covariance=kind)
    sigma = covariances(values["scale_tril" if kind in ("full", "tied") else "scales"], kind, K, 2)
    expected = mixture_log_density(arrays["x"], values["weights"], values["locations"], sigma)
    np.testing.assert_allclose(run.log_weights(arrays, 1, 0)[0], expected, rtol=1e-6, atol=1e-6)
    # The trapezoidal rule is exact to rounding on Gaussians whose step is below their least standard deviation.
    sd = np.sqrt(np.linalg.eigvalsh(sigma))
    reach, step = abs(values["locations"]).max() + 9 * sd.max(), 0.5 * sd.min()
    axis = np.arange(-reach, reach, step)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    assert abs(np.exp(run.log_weights({"x": grid}, 1, 0)[0]).sum() * step**2 - 1) < 1e-6


def log_wishart_cholesky(P, freedom, scale):
    """log density of P where P Pᵀ ~ Wishart: scipy's, and log |∂ P Pᵀ / ∂ P| = D log 2 + Σ_i (D + 1 − i) log P_ii."""
    D = len(P)
    jacobian = D * np.log(2) + (np.arange(D, 0, -1) * np.log(np.diag(P))).sum()
    return stats.wishart(freedom, scale).logpdf(P @ P.T) + jacobian


def test_the_jacobian_of_the_cholesky_factor():
    """In closed form as by differentiating P Pᵀ."""
    P = random_tril((3, 3), np.random.default_rng(0))
    below = np.tril_indices(3)

    def lower(entries):
        full = torch.zeros(3, 3, dtype=torch.float64).index_put(tuple(map(torch.as_tensor, below)), entries)
        return (full @ full.mT)[below]

    jacobian = torch.autograd.functional.jacobian(lower, torch.tensor(P[below])).numpy()
    expected = 3 * np.log(2) + (np.arange(3, 0, -1) * np.log(np.diag(P))).sum()
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], expected, rtol=1e-10)


@pytest.mark.parametrize("D", [1, 2, 4])
def test_wishart_cholesky_has_scipys_density_and_draws_of_its_moments(D):
    """Six standard errors for each of at most 20 moments: false alarms below 1e-7."""
    rng = np.random.default_rng(D)
    freedom, S, P = rng.uniform(D, D + 3, 3), random_tril((3, D, D), rng), random_tril((5, 3, D, D), rng)
    fn = WishartCholesky(torch.tensor(freedom), torch.tensor(S))
    expected = [[log_wishart_cholesky(P[i, j], freedom[j], S[j] @ S[j].T) for j in range(3)] for i in range(5)]
    np.testing.assert_allclose(fn.log_prob(torch.tensor(P)).numpy(), expected, rtol=1e-10)
    torch.manual_seed(0)
    draws = fn.sample((40_000,)).numpy()
    assert (np.triu(draws, 1) == 0).all()
    for values, mean in ((draws, fn.mean.numpy()), (draws @ np.swapaxes(draws, -1, -2), None)):
        mean = freedom[:, None, None] * (S @ np.swapaxes(S, -1, -2)) if mean is None else mean
        assert (abs(values.mean(0) - mean) <= 6 * values.std(0) / len(values) ** 0.5 + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bayesian_gmm_has_scipys_priors_and_a_guide_of_their_form(kind):
    """log p and log q of π, Λ and μ, each by scipy; given them, the rows have the mixture's density."""
    K, D, rng = 3, 2, np.random.default_rng(2)
    options = {"components": K, "covariance": kind, "bayesian": True}
    run, arrays, values = at_random("gmm", POINTS, **options)
    latents = latents_for("gmm", options, len(arrays["x"]), rng)
    p, q = run.log_joint(arrays, latents, 0)
    alpha, beta = values["weights_concentration"], values["locations_count"]
    np.testing.assert_allclose(p["weights"], stats.dirichlet(np.ones(K)).logpdf(latents["weights"]), rtol=1e-6)
    np.testing.assert_allclose(q["weights"], stats.dirichlet(alpha).logpdf(latents["weights"]), rtol=1e-6)
    if kind in ("full", "tied"):
        P, T = latents["precision_tril"], values["precision_mean_tril"]
        V = T @ np.swapaxes(T, -1, -2) / values["precision_freedom"][..., None, None]
        cases = zip(*(np.reshape(a, (-1, D, D)) for a in (P, V)), np.ravel(values["precision_freedom"]), strict=True)
        each = [(log_wishart_cholesky(P, D + 2, np.eye(D) / 0.5), log_wishart_cholesky(P, nu, V)) for P, V, nu in cases]
        sigma, site = np.broadcast_to(np.linalg.inv(P @ np.swapaxes(P, -1, -2)), (K, D, D)), "precision_tril"
    else:
        tau, a, b = latents["precisions"], values["precisions_shape"], values["precisions_rate"]
        each = [(stats.gamma(1.5, scale=4).logpdf(tau).sum(), stats.gamma(a, scale=1 / b).logpdf(tau).sum())]
        sigma, site = np.stack([np.diag(np.broadcast_to(1 / t, D)) for t in tau]), "precisions"
    np.testing.assert_allclose((p[site], q[site]), np.sum(each, 0), rtol=1e-6)
    for found, mean, count in ((p, np.zeros((K, D)), np.full(K, 0.1)), (q, values["locations_mean"], beta)):
        expected = [
            stats.multivariate_normal(mean[k], sigma[k] / count[k]).logpdf(latents["locations"][k]) for k in range(K)
        ]
        np.testing.assert_allclose(found["locations"], np.sum(expected), rtol=1e-6)
    z = latents["z"]
    np.testing.assert_allclose(p["z"], np.log(latents["weights"][z]), rtol=1e-6)
    expected = [
        stats.multivariate_normal(latents["locations"][k], sigma[k]).logpdf(x)
        for x, k in zip(arrays["x"], z, strict=True)
    ]
    np.testing.assert_allclose(p["x"], expected, rtol=1e-6)
    held = {name: np.asarray(value)[None] for name, value in latents.items() if name != "z"}
    states, prior = run.log_states(arrays, held, ["z"])
    summed = mixture_log_density(arrays["x"], latents["weights"], latents["locations"], sigma)
    np.testing.assert_allclose(logsumexp(states["z"], -1)[0], summed, rtol=1e-6)
    np.testing.assert_allclose(prior, sum(p[name] for name in held), rtol=1e-6)


def test_gmm_from_the_command_line_is_in_closed_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "fit gmm --data digits --components 10 --by em --steps 4 --no-report --out run"
    assert cli.main(words.split()) == 0
    run = probgen.Run.open("run")
    assert "locations -> x.loc: closed form" in run.config["note"]
    assert "scale_tril -> x.scale_tril: closed form" in run.config["note"]
    assert "weights -> z.probs: closed form (simplex)" in run.config["note"]
    assert "gradient" not in run.config["note"]
    assert run.params["locations"].shape == (10, 64)
    assert (np.diff(run.metrics["loss"]) <= 1e-6).all()
    words = "fit gmm --data two-moons --by EM(restarts=2,init='random') --steps 3 --no-report --out other"
    assert cli.main(words.split()) == 0
    assert "restarts=2" in probgen.Run.open("other").config["by"]


# -- probabilistic PCA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_ppca_is_a_gaussian_and_its_guide_the_posterior(noise):
    """log p(x) = log N(x | μ, W Wᵀ + Ψ), at every draw of the guide."""
    run, arrays, values = at_random("ppca", POINTS, noise=noise)
    W, scale = values["loadings"], np.broadcast_to(values["scale"], 2)
    expected = stats.multivariate_normal(values["mean"], W @ W.T + np.diag(scale**2)).logpdf(arrays["x"])
    found = run.log_weights(arrays, 20, 0)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-8)


LINE = np.random.default_rng(3)
PLANE = {
    "x": LINE.normal(size=(200, 2)) @ LINE.normal(size=(2, 5)) + LINE.normal(size=5) + 0.5 * LINE.normal(size=(200, 5))
}


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_ppca_learns_the_maximum(noise):
    """Of Tipping & Bishop in the eigenvalues of the covariance; of factor analysis as scikit-learn finds it."""
    program = probgen.load("ppca", PLANE, noise=noise)
    run = probgen.fit(
        program, PLANE, steps=400, batch_size=None, lr=0.05, schedule=Cosine(1, 0, 400), precision="64", progress=False
    )
    arrays, _ = prepared(program, run.data)
    found = run.trained.log_weights(arrays, 1, 0).mean()
    if noise == "diagonal":
        assert found > FactorAnalysis(2, tol=1e-8, max_iter=5000).fit(arrays["x"]).score(arrays["x"]) - 1e-2
        return
    eigenvalues = np.linalg.eigvalsh(np.cov(arrays["x"].T, bias=True))[::-1]
    rest = eigenvalues[2:].mean()
    best = -0.5 * (5 * np.log(2 * np.pi) + np.log(eigenvalues[:2]).sum() + 3 * np.log(rest) + 5)
    assert best - 1e-2 < found <= best + 1e-9
    np.testing.assert_allclose(run.params["scale"] ** 2, rest, rtol=0.01)


# -- mixture of Bernoullis ------------------------------------------------------------------------------------------


def test_a_mixture_of_bernoullis_sums_to_one():
    run, _, values = at_random("bernoulli_mixture", BITS, components=3)
    points = np.array(list(itertools.product((0.0, 1.0), repeat=6)))
    p = np.exp(run.log_weights({"x": points}, 1, 0)[0])
    assert abs(p.sum() - 1) < 1e-7
    each = np.where(points[:, None] > 0, values["probs"], 1 - values["probs"]).prod(-1)
    np.testing.assert_allclose(p, each @ values["weights"], rtol=1e-6)


def test_a_mixture_of_bernoullis_takes_the_steps_of_em_by_hand():
    rng = np.random.default_rng(4)
    bits = (rng.random((80, 5)) < np.where(rng.random((80, 1)) < 0.4, 0.2, 0.7)).astype(np.uint8)
    run = probgen.fit(
        probgen.load("bernoulli_mixture", {"x": bits}, components=2), {"x": bits}, by=EM(init="program", tol=0),
        steps=12, precision="64", progress=False,
    )  # fmt: skip
    pi, p, losses = run.history["weights"][0], run.history["probs"][0], []
    for _ in range(12):
        joint = np.log(pi) + bits @ np.log(p).T + (1 - bits) @ np.log(1 - p).T
        losses.append(-logsumexp(joint, 1).mean())
        r = np.exp(joint - logsumexp(joint, 1)[:, None])
        pi, p = r.mean(0), r.T @ bits / r.sum(0)[:, None]
    np.testing.assert_allclose(run.params["probs"], p, rtol=1e-5)
    np.testing.assert_allclose(run.params["weights"], pi, rtol=1e-5)
    np.testing.assert_allclose(run.metrics["loss"], losses, rtol=1e-6)


# -- Parzen windows -------------------------------------------------------------------------------------------------


def test_kde_is_scikit_learns_and_integrates_to_one():
    run, _, values = at_random("kde", POINTS)
    peer = KernelDensity(bandwidth=float(values["bandwidth"])).fit(values["centres"])
    others = np.random.default_rng(0).normal(size=(50, 2))
    np.testing.assert_allclose(run.log_weights({"x": others}, 1, 0)[0], peer.score_samples(others), rtol=1e-6)
    step = 0.25 * float(values["bandwidth"])
    axis = np.arange(-8 - abs(values["centres"]).max(), 8 + abs(values["centres"]).max(), step)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    assert abs(np.exp(run.log_weights({"x": grid}, 1, 0)[0]).sum() * step**2 - 1) < 1e-6


def left_out(rows, centres, h):
    """1/N Σ_n of the log of the mean of N(x_n | x_i, h² I) over i ≠ n with x_i ≠ x_n, term by term."""
    D, found = rows.shape[1], []
    for n, x in enumerate(rows):
        others = [
            stats.multivariate_normal(c, h**2 * np.eye(D)).logpdf(x)
            for i, c in enumerate(centres)
            if i != n and (c != x).any()
        ]
        found.append(logsumexp(others) - math.log(len(others)))
    return np.mean(found)


@pytest.mark.parametrize("backend", ["kde", "kde_numpyro"])
@pytest.mark.parametrize("kind", ["floats", "twice", "whole numbers"])
def test_kde_leaves_every_row_out_of_its_own_density(backend, kind):
    """Also where rows are equal, and where they are dequantized anew at each step."""
    x = np.random.default_rng(5).normal(size=(12, 2)) * 3
    x = {"floats": x, "twice": np.concatenate([x, x[:3]]), "whole numbers": np.round(x).astype(np.int64)}[kind]
    data = probgen.load_data({"x": x})
    subject = Subject(probgen.load(backend, data), data)
    engine = subject.engine(precision="64")
    state, rows = engine.start(), subject.feed(None).batch(1)["x"]
    centres, h = engine.weights(state)["centres"], float(subject.trained.params["bandwidth"])
    assert (abs(rows - centres).max() < 1e-6) == (kind != "whole numbers")
    np.testing.assert_allclose(-engine.loss_on(state, [{"x": rows}], 0), left_out(rows, centres, h), rtol=1e-5)


def test_kde_learns_the_bandwidth_that_a_grid_finds():
    data = {"x": np.random.default_rng(6).normal(size=(150, 2)) ** 3}
    run = probgen.fit(probgen.load("kde", data), data, progress=False)
    arrays, _ = prepared(run.program, run.data)
    grid = np.geomspace(0.02, 2, 200)
    x = np.asarray(arrays["x"], np.float64)
    square = ((x[:, None] - x) ** 2).sum(-1) + np.diag(np.full(len(x), np.inf))
    score = [logsumexp(-square / (2 * h**2), 1).mean() - 2 * np.log(h) for h in grid]
    np.testing.assert_allclose(run.params["bandwidth"], grid[int(np.argmax(score))], rtol=0.1)


# -- bad input ------------------------------------------------------------------------------------------------------

LATENT = """
import {ppl} as ppl
import {ppl}.distributions as dist
from probgen.{ppl} import EM

def model(x):
    with ppl.plate("data", len(x)):
        z = ppl.sample("z", dist.{latent}, infer={{"enumerate": "parallel"}})
        ppl.sample("x", dist.Normal(z[..., None] + 0 * x, 1.0).to_event(1), obs=x)

by = EM()
"""
EQUAL = np.full((20, 2), 3.0)
FEW = np.random.default_rng(7).normal(size=(5, 2))
REFUSED = [
    ("gmm --components 6", FEW, "'z' makes 6 states, and there are only 5 rows.*ask for fewer components"),
    ("bernoulli_mixture --components 6", FEW, "'z' makes 6 states, and there are only 5 rows"),
    ("gmm --components 0", FEW, "components=0 leaves no Gaussian"),
    ("gmm --covariance diag", FEW, "covariance.*'diag'"),
    ("gmm", EQUAL, "all rows of 'x' are equal, so no variance fits them"),
    ("bernoulli_mixture", EQUAL, "the range of 'x' is 3..3, which is empty"),
    ("kde", FEW[:1], "a row left out leaves no centre behind; give training rows of which two differ"),
    ("gmm", np.where(np.arange(10).reshape(5, 2) == 3, np.nan, FEW), "'x'.*NaN.*row 1"),
    ("Poisson(2.0)", FEW, "'z' .Poisson. is marked for enumeration, and there is no end to its values: leave out"),
    ("Normal(0.0, 1.0)", FEW, "'z' .Normal. is marked for enumeration, and it is continuous: leave out the mark"),
]


@pytest.mark.parametrize("ppl", ["pyro", "numpyro"])
@pytest.mark.parametrize(("words", "x", "said"), REFUSED, ids=[words for words, _, _ in REFUSED])
def test_what_cannot_be_learned_is_refused_and_nothing_written(words, x, said, ppl, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("my.npz", x_train=x)
    if "(" in words:
        (tmp_path / "mine.py").write_text(LATENT.format(ppl=ppl, latent=words))
        words = "mine.py"
    elif ppl == "numpyro":
        words = words.replace(words.split()[0], f"{words.split()[0]}_numpyro")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["fit", *words.split(), "--data", "my.npz", "--steps", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("probgen: ") and error.count("\n") == 1 and re.search(said, error), error
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before


@pytest.mark.nightly_on("numpyro")
@pytest.mark.parametrize("ppl", ["pyro", "numpyro"])
def test_what_is_odd_is_said_and_the_fit_stays_finite(ppl):
    """A constant column, few distinct rows, more components than clusters: notes, and finite numbers."""
    name = {"pyro": "gmm", "numpyro": "gmm_numpyro"}[ppl]
    column = np.concatenate([np.random.default_rng(8).normal(size=(40, 1)), np.full((40, 1), 3.0)], 1)
    twice = np.repeat(FEW[:2], 20, 0)
    for x, said in ((column, "the column 1 of 'x' is constant"), (twice, "too few distinct rows for 4 states")):
        data = {"x": x}
        run = probgen.fit(probgen.load(name, data, components=4), data, steps=15, progress=False)
        assert said in run.config["note"]
        assert np.isfinite(run.metrics["loss"]).all()
        assert all(np.isfinite(value).all() for value in run.params.values())
        assert np.isfinite(run.sample(3)["x"]).all()


@pytest.mark.parametrize("model", ["gmm", "gmm_numpyro"])
def test_a_single_component_is_a_mixture_too(model):
    """z = 0 for every row, and log p(x) is that of one Gaussian."""
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    run = probgen.fit(probgen.load(model, {"x": x}, components=1), {"x": x}, progress=False)
    assert (run.posterior(x, draws=3)["posterior"]["z"].values == np.zeros((1, 3, 20))).all()
    found = run.evaluate(x)["log_likelihood"]
    assert found == pytest.approx(
        stats.multivariate_normal(x.mean(0), np.cov(x.T, bias=True)).logpdf(x).mean(), abs=1e-3
    )


# -- what the files refuse, and how they are learned and prepared -----------------------------------------------------


@pytest.mark.parametrize("twin", ["", "_numpyro"])
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("bernoulli_mixture", {"components": 0}, "components=0 leaves no component; ask for at least 1"),
        ("bernoulli_mixture", {"components": -2}, "components=-2 leaves no component"),
        ("gmm", {"components": 0}, "components=0 leaves no Gaussian; ask for at least 1"),
        ("ppca", {"z_dim": 0}, "z_dim=0 leaves no latent; ask for at least 1"),
        ("ppca", {"z_dim": -1}, "z_dim=-1 leaves no latent"),
    ],
)
def test_nothing_to_mix_is_refused_by_its_own_file(name, options, said, twin):
    with pytest.raises(ProbgenError, match=f"{name}{twin}: {said}"):
        probgen.load(f"{name}{twin}", BITS if name == "bernoulli_mixture" else POINTS, **options)


@pytest.mark.parametrize("twin", ["", "_numpyro"])
def test_a_mixture_is_learned_by_em_and_with_priors_by_the_elbo_of_its_guide(twin):
    """Unless the user says otherwise; the kinds that need no prior have no guide."""
    plain, bayesian = (probgen.load(f"gmm{twin}", POINTS, bayesian=b) for b in (False, True))
    kinds = [type(program.by).__name__ for program in (plain, bayesian)]
    assert kinds == ["EM", "ELBO"]
    assert plain.guide is None and bayesian.guide is not None
    assert type(probgen.load(f"bernoulli_mixture{twin}", BITS).by).__name__ == "EM"
    assert probgen.load(f"ppca{twin}", POINTS).by.kl == "sampled"


DICE = {"x": np.random.default_rng(9).integers(0, 3, size=(300, 1))}


@pytest.mark.parametrize(("name", "options"), [("gmm", {"components": 3}), ("ppca", {"z_dim": 1}), ("kde", {})])
def test_whole_numbers_have_no_density_above_their_probability(name, options):
    """Spread over the unit that they stand for, E log p(x + u) ≤ Σ_k P(k) log P(k) (Jensen), for 300 draws of u up to
    what is fitted to their noise: ever narrower Gaussians at the three numbers are no way round it.
    """
    run = probgen.fit(probgen.load(name, DICE, **options), DICE, steps=30, batch_size=None, progress=False)
    shares = np.bincount(DICE["x"][:, 0]) / 300
    assert -3 < run.evaluate(DICE["x"])["log_likelihood"] < (shares * np.log(shares)).sum() + 0.02
    for file in (name, f"{name}_numpyro"):
        kinds = [[type(step).__name__ for step in probgen.load(file, data).prepare["x"]] for data in (DICE, POINTS)]
        assert kinds == [["Flatten", "Dequantize", "Standardize"], ["Flatten", "Standardize"]]
