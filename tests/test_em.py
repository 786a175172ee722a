"""EM: against scikit-learn, against the updates written out, and against its own promises, on both backends."""

import itertools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions import constraints
from scipy import stats
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

import probgen
from probgen import ProbgenError, Program
from probgen.data import as_rows
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.fit import Options
from probgen.parsing import called
from probgen.pyro import ELBO, EM

PARALLEL = {"enumerate": "parallel"}
KINDS = ("full", "tied", "diagonal", "spherical")


@pytest.fixture(autouse=True)
def a_store_of_its_own():
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def blobs(rows=150, dims=2, centres=((0, 0), (4, 1), (-2, 4)), seed=0):
    """Overlapping Gaussian clusters, float64."""
    random = np.random.default_rng(seed)
    parts = [
        random.normal(size=(rows // len(centres), dims)) @ random.normal(size=(dims, dims)) * 0.6 + c for c in centres
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def start_of(x, K, covariance, seed=1):
    """Unequal weights, rows as means, the data's variances: what every contender starts from."""
    random = np.random.default_rng(seed)
    pi, mu = random.dirichlet(5 * np.ones(K)), x[random.choice(len(x), K, replace=False)]
    sd = x.std(0)
    scale = {
        "full": np.tile(np.diag(sd), (K, 1, 1)), "tied": np.diag(sd),
        "diagonal": np.tile(sd, (K, 1)), "spherical": np.full(K, sd.mean()),
    }[covariance]  # fmt: skip
    return pi, mu, scale


def gaussians(start, covariance, tensor=torch.tensor):
    """A mixture of Gaussians with these start values."""
    pi_0, mu_0, scale_0 = start

    def model(x):
        pi = pyro.param("weights", tensor(pi_0), constraint=constraints.simplex)
        mu = pyro.param("locations", tensor(mu_0))
        matrix = covariance in ("full", "tied")
        positive = constraints.lower_cholesky if matrix else constraints.positive
        scale = pyro.param("scale", tensor(scale_0), constraint=positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(pi), infer=PARALLEL)
            own = scale if covariance == "tied" else scale[z]
            own = own[..., None].expand(*own.shape, mu.shape[1]) if covariance == "spherical" else own
            fn = dist.MultivariateNormal(mu[z], scale_tril=own) if matrix else dist.Normal(mu[z], own).to_event(1)
            pyro.sample("x", fn, obs=x)

    return Program(model)


def fit(program, arrays, steps=30, by=None, precision="64", **options):
    by = EM(init="program", tol=0, floor=0) if by is None else by
    return probgen.fit(
        program, arrays, by=by, steps=steps, precision=precision, progress=False, device="cpu", **options
    )


def engine(program, arrays, by=None, batch_size=None, **options):
    options = {"steps": 10, "batch_size": batch_size, "device": "cpu", "precision": "64", **options}
    by = EM(init="program", tol=0, floor=0) if by is None else by
    feed = Feed(as_rows(arrays), Preparation({}, {}), batch_size, options.get("seed", 0))
    return by.engine(program, by, feed, Options(**options))


def covariances(params, covariance, K, D):
    scale = np.asarray(params["scale"], np.float64)
    if covariance in ("full", "tied"):
        return np.broadcast_to(scale @ np.swapaxes(scale, -1, -2), (K, D, D))
    return np.stack([np.diag(np.broadcast_to(scale[k], (D,)) ** 2) for k in range(K)])


def log_joint(x, params, covariance):
    K, D = params["locations"].shape
    sigma = covariances(params, covariance, K, D)
    return np.stack(
        [
            np.log(params["weights"][k]) + stats.multivariate_normal(params["locations"][k], sigma[k]).logpdf(x)
            for k in range(K)
        ],
        1,
    )


# -- against scikit-learn, and against the updates --------------------------------------------------------------------


@pytest.mark.parametrize("covariance", KINDS)
def test_it_is_scikit_learns_from_the_same_start(covariance):
    x, K, steps = blobs(), 3, 25
    pi, mu, scale = start = start_of(x, K, covariance)
    run = fit(gaussians(start, covariance), {"x": x}, steps)
    inverse = {"full": np.linalg.inv, "tied": np.linalg.inv}.get(covariance, lambda variance: 1 / variance)
    variance = scale @ np.swapaxes(scale, -1, -2) if covariance in ("full", "tied") else scale**2
    peer = GaussianMixture(
        K, covariance_type={"diagonal": "diag"}.get(covariance, covariance), max_iter=steps, tol=0, reg_covar=0,
        weights_init=pi, means_init=mu, precisions_init=inverse(variance),
    ).fit(x)  # fmt: skip
    np.testing.assert_allclose(run.params["weights"], peer.weights_, rtol=1e-4)
    np.testing.assert_allclose(run.params["locations"], peer.means_, rtol=1e-4, atol=1e-4)
    theirs = peer.covariances_
    if covariance in ("diagonal", "spherical"):
        theirs = np.stack([np.diag(np.broadcast_to(theirs[k], (2,))) for k in range(K)])
    np.testing.assert_allclose(
        covariances(run.params, covariance, K, 2), np.broadcast_to(theirs, (K, 2, 2)), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(-run.metrics["loss"][-1], _at(x, run, -2, covariance), rtol=1e-10)
    assert run.history["locations"].shape == (steps + 1, K, 2)
    np.testing.assert_array_equal(run.history["locations"][0], mu)


def _at(x, run, step, covariance):
    params = {name: path[step] for name, path in run.history.items()}
    return logsumexp(log_joint(x, params, covariance), 1).mean()


def test_one_step_is_the_updates_of_the_notes():
    x, K = blobs(60), 3
    start = start_of(x, K, "full")
    run = fit(gaussians(start, "full"), {"x": x}, 1)
    before = {name: path[0] for name, path in run.history.items()}
    joint = log_joint(x, before, "full")
    gamma = np.exp(joint - logsumexp(joint, 1)[:, None])  # γ(z_nk)
    N_k = gamma.sum(0)
    mu = gamma.T @ x / N_k[:, None]
    sigma = np.stack([(gamma[:, k, None] * (x - mu[k])).T @ (x - mu[k]) / N_k[k] for k in range(K)])
    np.testing.assert_allclose(run.params["weights"], N_k / len(x), rtol=1e-8)  # π_k
    np.testing.assert_allclose(run.params["locations"], mu, rtol=1e-8)  # μ_k
    np.testing.assert_allclose(covariances(run.params, "full", K, 2), sigma, rtol=1e-7, atol=1e-9)  # Σ_k
    np.testing.assert_allclose(-run.metrics["loss"][0], logsumexp(joint, 1).mean(), rtol=1e-12)


def test_its_fixed_point_is_stationary_also_on_the_simplex():
    x, K = blobs(), 3
    run = fit(gaussians(start_of(x, K, "full"), "full"), {"x": x}, 3000, EM(init="program", tol=1e-15, floor=0))
    leaves = {name: torch.tensor(run.params[name], requires_grad=True) for name in run.params}
    normal = torch.distributions.MultivariateNormal(leaves["locations"], scale_tril=leaves["scale"])
    total = torch.logsumexp(leaves["weights"].log() + normal.log_prob(torch.tensor(x)[:, None]), 1).mean()
    total.backward()
    gradient = leaves["weights"].grad
    assert leaves["locations"].grad.abs().max() < 1e-6
    assert leaves["scale"].grad.tril().abs().max() < 1e-6
    assert (
        gradient - (gradient * leaves["weights"]).sum()
    ).abs().max() < 1e-5  # all alike: no direction along Σ π = 1 rises
    assert run.metrics["loss"][0] - run.metrics["loss"][-1] > 0.1, "it went somewhere"


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000), rows=st.integers(12, 60), K=st.integers(1, 4), D=st.integers(1, 3),
    covariance=st.sampled_from(KINDS),
)  # fmt: skip
def test_the_log_likelihood_never_falls(seed, rows, K, D, covariance):
    random = np.random.default_rng(seed)
    x = random.standard_t(2, size=(rows, D)) * 10 ** random.uniform(-2, 2) + 10 ** random.uniform(-2, 3)
    pyro.clear_param_store()
    run = fit(gaussians(start_of(x, K, covariance, seed), covariance), {"x": x}, 15, EM(tol=0, floor=1e-3))
    assert (np.diff(run.metrics["loss"]) <= 1e-9).all()


# -- programs of a user's own ---------------------------------------------------------------------------------------


def poissons(x):
    pi = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    rate = pyro.param("rate", torch.tensor([1.0, 5.0]), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi), infer=PARALLEL)
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


def exponentials(x):
    pi = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    rate = pyro.param("rate", torch.tensor([0.5, 3.0]), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Exponential(rate[pyro.sample("z", dist.Categorical(pi), infer=PARALLEL)]), obs=x)


def bernoullis(x):
    pi = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    p = pyro.param(
        "p", lambda: torch.linspace(0.2, 0.8, 2 * x.shape[1]).reshape(2, -1), constraint=constraints.unit_interval
    )
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi), infer=PARALLEL)
        pyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)


def bernoulli_logits(x):
    pi = pyro.param("weight", torch.tensor(0.4), constraint=constraints.unit_interval)
    logits = pyro.param("logits", lambda: torch.linspace(-1.0, 1.0, 2 * x.shape[1]).reshape(2, -1))
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Bernoulli(pi), infer=PARALLEL)
        with pyro.plate("pixels", x.shape[1], dim=-1):
            pyro.sample("x", dist.Bernoulli(logits=logits[z.long().squeeze(-1)]), obs=x)


def _by_hand(x, weights, log_p, update, steps):
    """EM written out: `log_p(x, θ)` [N, K], `update(r, x)` the new θ."""
    theta, pi = weights[1], weights[0]
    for _ in range(steps):
        joint = np.log(pi) + log_p(x, theta)
        r = np.exp(joint - logsumexp(joint, 1)[:, None])
        pi, theta = r.mean(0), update(r, x)
    return pi, theta


def test_a_users_mixture_of_poissons_bernoullis_exponentials():
    random = np.random.default_rng(0)
    counts = np.concatenate([random.poisson(2, 40), random.poisson(9, 60)]).astype(float)
    times = np.concatenate([random.exponential(1, 40), random.exponential(0.1, 60)])
    bits = (random.uniform(size=(80, 4)) < np.where(np.arange(80) < 30, 0.2, 0.7)[:, None]).astype(float)
    mean = lambda r, x: r.T @ x / r.sum(0).reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    bernoulli = lambda x, p: (x[:, None] * np.log(p) + (1 - x[:, None]) * np.log(1 - p)).sum(-1)  # noqa: E731
    cases = [
        (poissons, counts, "rate", ([0.4, 0.6], np.array([1.0, 5.0])), lambda x, l: stats.poisson.logpmf(x[:, None], l), mean),
        (exponentials, times, "rate", ([0.4, 0.6], np.array([0.5, 3.0])),
         lambda x, l: np.log(l) - l * x[:, None], lambda r, x: 1 / mean(r, x)),
        (bernoullis, bits, "p", ([0.3, 0.7], np.linspace(0.2, 0.8, 8).reshape(2, -1)), bernoulli, mean),
    ]  # fmt: skip
    for model, x, name, start, log_p, update in cases:
        pyro.clear_param_store()
        run = fit(Program(model), {"x": x}, 12)
        pi, theta = _by_hand(x, start, log_p, update, 12)
        np.testing.assert_allclose(run.params[name], theta, rtol=1e-5)
        np.testing.assert_allclose(run.params["weights"], pi, rtol=1e-5)
        assert "gradient" not in run.config["note"]


def test_logits_a_bernoulli_latent_and_an_inner_plate():
    random = np.random.default_rng(0)
    bits = (random.uniform(size=(80, 4)) < np.where(np.arange(80) < 30, 0.2, 0.7)[:, None]).astype(float)
    run = fit(Program(bernoulli_logits), {"x": bits}, 10)
    pi, p = _by_hand(
        bits, (np.array([0.6, 0.4]), 1 / (1 + np.exp(-np.linspace(-1, 1, 8).reshape(2, -1)))),
        lambda x, p: (x[:, None] * np.log(p) + (1 - x[:, None]) * np.log(1 - p)).sum(-1),
        lambda r, x: r.T @ x / r.sum(0)[:, None], 10,
    )  # fmt: skip
    np.testing.assert_allclose(run.params["weight"], pi[1], rtol=1e-4)
    np.testing.assert_allclose(1 / (1 + np.exp(-run.params["logits"])), p, rtol=1e-4)
    assert "gradient" not in run.config["note"]


def test_two_data_sites_and_two_latents_are_enumerated_jointly():
    """z and w choose the means of x and of counts; the likelihood is that of all pairs, and it never falls."""

    def model(x, counts):
        pi = pyro.param("pi", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        rho = pyro.param("rho", torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([[-1.0, 0.5, 2.0], [-2.0, 1.0, 3.0]]))
        sd = pyro.param("sd", torch.tensor(1.5), constraint=constraints.positive)
        rate = pyro.param("rate", torch.tensor([2.0, 6.0]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(pi), infer=PARALLEL)
            w = pyro.sample("w", dist.Categorical(rho[z]), infer=PARALLEL)
            pyro.sample("x", dist.Normal(mu[z, w], sd), obs=x)
            pyro.sample("counts", dist.Poisson(rate[z]), obs=counts)

    random = np.random.default_rng(0)
    arrays = {"x": random.normal(size=90) * 3, "counts": random.poisson(4, 90).astype(float)}
    run = fit(Program(model), arrays, 20)
    assert (np.diff(run.metrics["loss"]) <= 1e-10).all()
    assert "gradient" not in run.config["note"]
    assert "sd -> x.scale: closed form, tied" in run.config["note"]
    last = {name: path[-2] for name, path in run.history.items()}
    joint = [
        np.log(last["pi"][z] * last["rho"][z, w])
        + stats.norm(last["mu"][z, w], last["sd"]).logpdf(arrays["x"])
        + stats.poisson(last["rate"][z]).logpmf(arrays["counts"])
        for z, w in itertools.product(range(2), range(3))
    ]
    np.testing.assert_allclose(-run.metrics["loss"][-1], logsumexp(joint, 0).mean(), rtol=1e-9)


def regressions(x, y):
    """y is one of two lines in x: the location depends on the row."""
    pi = pyro.param("weights", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    slope = pyro.param("slope", torch.tensor([0.5, -0.5]))
    offset = pyro.param("offset", torch.tensor([0.1, -0.1]))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi), infer=PARALLEL)
        pyro.sample("y", dist.Normal(slope[z] * x + offset[z], sd), obs=y)


def test_arguments_that_depend_on_the_row_take_gradient_steps():
    random = np.random.default_rng(0)
    x, z = random.normal(size=200), random.integers(2, size=200)
    y = np.array([2.0, -1.0])[z] * x + np.array([1.0, -2.0])[z] + 0.2 * random.normal(size=200)
    run = fit(Program(regressions), {"x": x, "y": y}, 60)
    assert (np.diff(run.metrics["loss"]) <= 1e-9).all()
    order = np.argsort(-run.params["slope"])
    np.testing.assert_allclose(run.params["slope"][order], [2, -1], atol=0.1)
    np.testing.assert_allclose(run.params["offset"][order], [1, -2], atol=0.1)
    np.testing.assert_allclose(run.params["sd"], 0.2, atol=0.05)
    assert "slope: gradient steps" in run.config["note"]
    assert "weights -> z.probs: closed form (simplex)" in run.config["note"]


def test_a_parameter_without_a_closed_form_is_named_and_never_lowers_the_likelihood():
    """The scale is exp of a parameter: its maximum, by gradient steps, is that of the closed form."""

    def model(x):
        pi = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        log_sd = pyro.param("log_sd", torch.tensor([0.0, 0.3]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(pi), infer=PARALLEL)
            pyro.sample("x", dist.Normal(mu[z], log_sd[z].exp()), obs=x)

    x = np.concatenate([np.random.default_rng(0).normal(-2, 1, 60), np.random.default_rng(1).normal(3, 0.5, 60)])
    run = fit(Program(model), {"x": x}, 40)
    assert (np.diff(run.metrics["loss"]) <= 1e-9).all()
    assert "log_sd: gradient steps: it is not itself an argument of x.scale" in run.config["note"]
    peer = GaussianMixture(2, reg_covar=0, tol=1e-12, max_iter=500, means_init=[[-2], [3]]).fit(x[:, None])
    np.testing.assert_allclose(run.params["log_sd"], 0.5 * np.log(peer.covariances_.ravel()), atol=1e-4)
    np.testing.assert_allclose(run.params["mu"], peer.means_.ravel(), atol=1e-4)


def test_a_closed_form_whose_gradient_does_not_vanish_is_found_out(monkeypatch):
    """A wrong closed form is named once, and gradient steps take its place."""
    from probgen.em import exponential

    wrong = exponential.Poisson()
    monkeypatch.setattr(wrong, "value", lambda ops, target, ratio: 1.5 * ratio, raising=False)
    monkeypatch.setitem(exponential.FAMILIES, "Poisson", wrong)
    counts = np.random.default_rng(0).poisson(4, 60).astype(float)
    run = fit(Program(poissons), {"x": counts}, 40)
    assert "the gradient of Q in the parameter 'rate' does not vanish" in run.config["note"]
    assert (np.diff(run.metrics["loss"]) <= 1e-9).all()
    monkeypatch.setitem(exponential.FAMILIES, "Poisson", exponential.Poisson())
    pyro.clear_param_store()
    right = fit(Program(poissons), {"x": counts}, 40)
    np.testing.assert_allclose(run.metrics["loss"][-1], right.metrics["loss"][-1], atol=1e-4)


def test_a_parameter_that_feeds_two_arguments_takes_gradient_steps():
    def model(x):
        scale = pyro.param("scale", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])), infer=PARALLEL)
            pyro.sample("x", dist.Normal(scale[z], scale[z]), obs=x)

    x = np.random.default_rng(0).gamma(2.0, 2.0, 80)
    run = fit(Program(model), {"x": x}, 15)
    assert "it feeds x.loc and x.scale" in run.config["note"]
    assert (np.diff(run.metrics["loss"]) <= 1e-9).all()


def test_given_labels_are_supervised_learning():
    def model(x, y):
        pi = pyro.param("weights", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(pi), obs=y)
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    x, y = np.random.default_rng(0).normal(size=50), np.arange(50) % 5 == 0
    run = fit(Program(model), {"x": x, "y": y.astype(np.int64)}, 10)
    np.testing.assert_allclose(run.params["mu"], [x[~y].mean(), x[y].mean()], atol=1e-5)
    np.testing.assert_allclose(run.params["weights"], [0.8, 0.2], atol=1e-8)


# -- k-means, minibatches, precision --------------------------------------------------------------------------------


def test_its_hard_limit_is_lloyds_k_means():
    x, K = blobs(90), 3
    _, start, _ = start_of(x, K, "spherical", seed=3)

    def model(x):
        mu = pyro.param("mu", torch.tensor(start))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.full((K,), 1 / K)), infer=PARALLEL)
            pyro.sample("x", dist.Normal(mu[z], 1.0).to_event(1), obs=x)

    run = fit(Program(model), {"x": x}, 50, EM(init="program", hard=True, tol=1e-12))
    peer = KMeans(K, init=start, n_init=1, algorithm="lloyd", tol=0).fit(x)
    np.testing.assert_allclose(run.params["mu"], peer.cluster_centers_, rtol=1e-7)
    assert (np.diff(run.metrics["loss"]) <= 1e-12).all()
    last = ((x[:, None] - run.history["mu"][-2]) ** 2).sum(-1).min(1).mean() / 2 + np.log(2 * np.pi) + np.log(K)
    np.testing.assert_allclose(run.metrics["loss"][-1], last, rtol=1e-9)


def test_stepwise_em_ends_near_the_optimum_of_all_rows():
    x = blobs(1200)
    start = start_of(x, 3, "full")
    whole = fit(gaussians(start, "full"), {"x": x}, 100, EM(tol=1e-9))
    pyro.clear_param_store()
    run = fit(gaussians(start, "full"), {"x": x}, None, EM(stepwise=0.7), batch_size=100, epochs=10)
    assert len(run.history["locations"]) == 11, "after every epoch"
    mine = logsumexp(log_joint(x, run.params, "full"), 1).mean()
    best = logsumexp(log_joint(x, whole.params, "full"), 1).mean()
    assert best - 0.02 < mine <= best + 1e-9


FAMILIES = {
    "Normal": (lambda a: dist.Normal(a, 1 + a.exp()), lambda r: r.normal(size=30)),
    "LogNormal": (lambda a: dist.LogNormal(a, 1 + a.exp()), lambda r: r.lognormal(size=30)),
    "Bernoulli": (lambda a: dist.Bernoulli(logits=a), lambda r: r.integers(2, size=30) * 1.0),
    "Binomial": (lambda a: dist.Binomial(5, logits=a), lambda r: r.integers(6, size=30) * 1.0),
    "Poisson": (lambda a: dist.Poisson(a.exp()), lambda r: r.integers(6, size=30) * 1.0),
    "Exponential": (lambda a: dist.Exponential(a.exp()), lambda r: r.exponential(size=30)),
    "Geometric": (lambda a: dist.Geometric(logits=a), lambda r: r.integers(6, size=30) * 1.0),
    "Gamma": (lambda a: dist.Gamma(a.exp(), 1 + a.exp()), lambda r: r.exponential(size=30)),
    "Beta": (lambda a: dist.Beta(a.exp(), 1 + a.exp()), lambda r: r.uniform(0.1, 0.9, size=30)),
    "Categorical": (lambda a: dist.Categorical(logits=a[..., None] * torch.arange(3.0)), lambda r: r.integers(3, size=30)),
    "OneHotCategorical": (
        lambda a: dist.OneHotCategorical(logits=a[..., None] * torch.arange(3.0)), lambda r: np.eye(3)[r.integers(3, size=30)],
    ),
    "StudentT": (lambda a: dist.StudentT(3.0, a, 1 + a.exp()), lambda r: r.normal(size=30)),
    "Masked": (lambda a: dist.Normal(a, 1.0).mask(False), lambda r: r.normal(size=30)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_density_of_its_distribution(name):
    """The first loss, from features and natural parameters, is that of the PPL's own densities; and none ever rises."""
    make, draw = FAMILIES[name]

    def model(x):
        a = pyro.param("a", torch.tensor([-0.5, 0.7]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])), infer=PARALLEL)
            pyro.sample("x", make(a[z]), obs=x)

    x = draw(np.random.default_rng(0))
    run = fit(Program(model), {"x": x}, 5)
    fn = make(torch.tensor([[-0.5], [0.7]], dtype=torch.float64))
    joint = fn.log_prob(torch.tensor(x)) + torch.tensor([[0.3], [0.7]], dtype=torch.float64).log()
    np.testing.assert_allclose(run.metrics["loss"][0], -joint.logsumexp(0).mean(), rtol=1e-6, atol=1e-12)
    assert (np.diff(run.metrics["loss"]) <= 1e-9).all()
    if name not in ("StudentT", "Masked"):
        assert next(site for site in engine(Program(model), {"x": x}).states.data) == "x", "a table, not runs on rows"


CLOSED = {
    "Binomial": (
        "probs",
        lambda p: dist.Binomial(5, p),
        lambda r: r.binomial(5, np.where(np.arange(60) < 20, 0.2, 0.7)) * 1.0,
    ),
    "Geometric": ("probs", dist.Geometric, lambda r: r.geometric(np.where(np.arange(60) < 20, 0.2, 0.7)) - 1.0),
    "Bernoulli": ("probs", dist.Bernoulli, lambda r: r.integers(2, size=60) * 1.0),
    "LogNormal": (
        "scale",
        lambda s: dist.LogNormal(0.0, s),
        lambda r: r.lognormal(0, np.where(np.arange(60) < 20, 0.2, 1.5)),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_other_closed_forms_are_the_maximum_that_gradients_find(name):
    argument, make, draw = CLOSED[name]

    def model(x):
        limits = constraints.positive if argument == "scale" else constraints.unit_interval
        p = pyro.param("p", torch.tensor([0.3, 0.6]), constraint=limits)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", make(p[pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)]), obs=x
            )

    x = draw(np.random.default_rng(0))
    run = fit(Program(model), {"x": x}, 300, EM(init="program", tol=1e-14, floor=0))
    assert f"p -> x.{argument}: closed form" in run.config["note"]
    p = torch.tensor(run.params["p"], requires_grad=True)
    joint = make(p[:, None]).log_prob(torch.tensor(x)) + torch.tensor([[0.4], [0.6]], dtype=torch.float64).log()
    joint.logsumexp(0).mean().backward()
    assert p.grad.abs().max() < 1e-5


def test_covariances_and_precisions_take_the_path_of_their_factor():
    x = blobs(90)
    pi, mu, L = start_of(x, 3, "full")
    whole = L @ np.swapaxes(L, -1, -2)
    paths = {"scale_tril": fit(gaussians((pi, mu, L), "full"), {"x": x}, 8).metrics["loss"]}
    for argument, value in (("covariance_matrix", whole), ("precision_matrix", np.linalg.inv(whole))):
        pyro.clear_param_store()

        def model(x, argument=argument, value=value):
            weights = pyro.param("weights", torch.tensor(pi), constraint=constraints.simplex)
            loc = pyro.param("locations", torch.tensor(mu))
            matrix = pyro.param("matrix", torch.tensor(value), constraint=constraints.positive_definite)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Categorical(weights), infer=PARALLEL)
                pyro.sample("x", dist.MultivariateNormal(loc[z], **{argument: matrix[z]}), obs=x)

        run = fit(Program(model), {"x": x}, 8)
        assert f"matrix -> x.{argument}: closed form" in run.config["note"]
        paths[argument] = run.metrics["loss"]
    np.testing.assert_allclose(paths["covariance_matrix"], paths["scale_tril"], rtol=1e-8)
    np.testing.assert_allclose(paths["precision_matrix"], paths["scale_tril"], rtol=1e-8)


def test_a_guide_is_left_as_it_is():
    def guide(x):
        pyro.param("of_the_guide", torch.tensor(3.0))

    x = blobs(60)
    program = gaussians(start_of(x, 3, "full"), "full")
    run = fit(Program(program.model, guide), {"x": x}, 3)
    assert run.params["of_the_guide"] == 3.0
    assert "of_the_guide" not in run.history


def test_a_network_in_the_program_takes_gradient_steps():
    """A mixture of experts: z given x by a linear layer, and y by its own line."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gate = torch.nn.Linear(1, 2)

    def model(x, y):
        pyro.module("gate", gate)
        sd = pyro.param("sd", torch.tensor([1.0, 1.0]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=gate(x)), infer=PARALLEL)
            pyro.sample("y", dist.Normal(torch.tensor([-2.0, 2.0])[z], sd[z]), obs=y)

    random = np.random.default_rng(0)
    x = random.normal(size=(80, 1)).astype(np.float32)
    y = (np.where(x[:, 0] > 0, 2, -2) + 0.5 * random.normal(size=80)).astype(np.float32)
    before = gate.weight.detach().clone()
    run = fit(Program(model), {"x": x, "y": y}, 15, EM(init="program", tol=0), precision="32")
    assert (np.diff(run.metrics["loss"]) <= 1e-6).all()
    assert "sd -> y.scale: closed form" in run.config["note"]
    assert "gate$$$weight: gradient steps" in run.config["note"]
    np.testing.assert_allclose(run.params["sd"], 0.5, atol=0.15)
    assert torch.equal(gate.weight, before), "the user's own stays as it was"


def test_data_far_from_zero_do_not_cancel_in_float32():
    x = blobs()
    near = fit(gaussians(start_of(x, 3, "full"), "full"), {"x": x}, 20)
    pyro.clear_param_store()
    far = (x + 1e4).astype(np.float32)
    start = [np.float32(part) for part in start_of(far.astype(np.float64), 3, "full")]
    run = fit(gaussians(start, "full"), {"x": far}, 20, precision="32")
    np.testing.assert_allclose(run.metrics["loss"], near.metrics["loss"], atol=2e-3)
    losses = np.array(run.metrics["loss"])
    assert (np.diff(losses) <= 1e-5 * abs(losses[-1])).all()
    assert run.params["locations"].dtype == np.float32


def test_a_narrow_component_takes_double_precision():
    """A component 4e-3 wide: x² loses it in float32, so EM says that it goes on in float64."""
    random = np.random.default_rng(0)
    x = np.concatenate([random.normal(0, 1, 100), random.normal(3, 4e-3, 50)]).astype(np.float32)[:, None]
    run = fit(gaussians([np.float32(p) for p in start_of(x, 2, "full")], "full"), {"x": x}, 30, EM(), precision="32")
    assert "double precision" in run.config["note"]
    sd = np.sort(run.params["scale"].ravel())
    np.testing.assert_allclose(sd[0], x[100:].std(), rtol=0.02)


# -- its start, its end, its memory ---------------------------------------------------------------------------------


def test_it_is_a_function_of_the_seed_and_restarts_do_not_do_worse():
    x = blobs(120, centres=((0, 0), (6, 0), (0, 6), (6, 6)))
    program = gaussians(start_of(x, 4, "full"), "full")
    one, again = (engine(program, {"x": x}, EM(), seed=3).start()["leaves"] for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
    for init in ("k-means++", "random"):
        single, several = (fit(program, {"x": x}, 40, EM(init=init, restarts=n), seed=3) for n in (1, 4))
        assert several.metrics["loss"][-1] <= single.metrics["loss"][-1] + 1e-3
    other = engine(program, {"x": x}, EM(init="random"), seed=4).start()["leaves"]
    assert not np.array_equal(one["locations"], other["locations"])


def test_it_ends_when_it_has_converged_and_counts_nats_per_datum():
    x = blobs()
    run = fit(gaussians(start_of(x, 3, "full"), "full"), {"x": x}, 500, EM(init="program", tol=1e-5))
    losses = run.metrics["loss"]
    assert len(losses) < 200
    assert 0 <= losses[-2] - losses[-1] < 1e-5 <= losses[-3] - losses[-2] + 1e-9
    assert run.metrics["step"] == list(range(1, len(losses) + 1))


@pytest.mark.parametrize("by", [EM(tol=0), EM(stepwise=0.6)], ids=["batch", "stepwise"])
def test_a_resumed_run_ends_bit_for_bit(by):
    x = blobs(60).astype(np.float32)
    program = gaussians([np.float32(p) for p in start_of(x, 3, "full")], "full")
    size = 20 if by.stepwise else None
    first, second = (engine(program, {"x": x}, by, size, precision="32") for _ in range(2))
    straight, _ = first.advance(first.start(), 0, 7)
    half, _ = first.advance(first.start(), 0, 3)
    resumed, _ = second.advance(second.restore(first.export(half)), 3, 7)
    ours, theirs = first.export(straight), second.export(resumed)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_run_that_is_reopened_has_its_history(tmp_path):
    x = blobs(60)
    program = gaussians(start_of(x, 3, "full"), "full")
    run = fit(program, {"x": x}, 5, out=tmp_path / "run")
    again = probgen.Run.open(tmp_path / "run", program=program)
    np.testing.assert_array_equal(again.history["locations"], run.history["locations"])
    np.testing.assert_array_equal(again.history["locations"][-1], again.params["locations"])
    assert again.sample(7)["x"].shape == (7, 2)


def test_the_text_of_it_is_read_back():
    by = EM(init="random", restarts=3, tol=0.0, floor=1e-3, stepwise=0.8, hard=True)
    again = called(repr(by), {"EM": EM}, "loss")
    assert repr(again) == repr(by)
    assert by.defaults == {"epochs": 100}
    assert EM().defaults == {"batch_size": None, "epochs": 100}
    with pytest.raises(ProbgenError, match="EM is a way to learn of its own"):
        (EM() + ELBO()).players(Program(poissons))


# -- components that die, and what is refused ---------------------------------------------------------------------------


def test_a_collapsing_component_is_held_at_the_floor_and_said():
    x = np.concatenate([blobs(60), np.full((20, 2), 50.0)])  # twenty rows in one point
    run = fit(gaussians(start_of(x, 3, "full"), "full"), {"x": x}, 30, EM(tol=0, floor=1e-4))
    assert "the variance of 'x' in the state z = " in run.config["note"]
    assert np.isfinite(run.metrics["loss"]).all()
    assert (np.diff(run.metrics["loss"]) <= 1e-9).all(), "the floor is the maximum under its bound"
    k = int(np.argmax(run.params["locations"].sum(1)))
    sigma = covariances(run.params, "full", 3, 2)[k]
    np.testing.assert_allclose(sigma, 1e-4 * np.diag(x.var(0)), rtol=1e-6, atol=1e-12)


def test_without_a_floor_a_collapse_is_told_in_one_sentence():
    x = np.concatenate([blobs(60), np.full((20, 2), 50.0)])
    with pytest.raises(ProbgenError, match="a component has collapsed, so give EM a floor above 0"):
        fit(gaussians(start_of(x, 3, "diagonal"), "diagonal"), {"x": x}, 30, EM(tol=0, floor=0))


def test_a_component_that_nothing_belongs_to_stays_and_is_named():
    x = blobs(60)
    pi, mu, scale = start_of(x, 3, "full")
    mu = mu.copy()
    mu[2] = 1e4
    run = fit(gaussians((pi, mu, scale), "full"), {"x": x}, 5)
    assert "the state z = 2 has died" in run.config["note"]
    np.testing.assert_allclose(run.params["locations"][2], 1e4)
    assert np.isfinite(run.params["scale"]).all()
    assert np.isfinite(run.metrics["loss"]).all()


def test_a_constant_column_is_held_at_the_floor_or_refused():
    x = np.concatenate([blobs(60), np.full((60, 1), 3.0)], 1)
    for covariance in ("full", "diagonal"):
        pyro.clear_param_store()
        start = start_of(x + 1e-3 * np.random.default_rng(0).normal(size=x.shape), 2, covariance)
        run = fit(gaussians(start, covariance), {"x": x}, 5, EM(tol=0))
        assert "the column 2 of 'x' is constant" in run.config["note"]
        assert np.isfinite(run.metrics["loss"]).all()
        with pytest.raises(ProbgenError, match="the column 2 of 'x' is constant, so no variance fits it"):
            fit(gaussians(start, covariance), {"x": x}, 5)


def test_duplicated_rows_are_said():
    x = np.repeat(blobs(6), 10, 0)[:20]  # two distinct rows
    run = fit(gaussians(start_of(blobs(), 4, "diagonal"), "diagonal"), {"x": x}, 3, EM(tol=0))
    assert "too few distinct rows for 4 states" in run.config["note"]
    assert np.isfinite(run.metrics["loss"]).all()


def _with(latent, plate=True, inside=True):
    def model(x):
        mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
        if not inside:
            pyro.sample("z", latent(), infer=PARALLEL)
        with pyro.plate("data", len(x)) if plate else pyro.plate("other", 1):
            z = pyro.sample("z", latent(), infer=PARALLEL) if inside else torch.zeros(len(x))
            pyro.sample("x", dist.Normal(mu[(z > 0).long()] + 0 * x, 1.0), obs=x)

    return Program(model)


def _unmarked(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x)


def _per_pixel(x):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Bernoulli(0.5), infer=PARALLEL)
        pyro.sample("x", dist.Normal(z, pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)), obs=x)


def _factor(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer=PARALLEL)
        pyro.factor("penalty", -z.to(x.dtype))
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.zeros(2))[z], 1.0), obs=x)


def _many(x):
    with pyro.plate("data", len(x)):
        z = [pyro.sample(f"z_{i}", dist.Categorical(torch.ones(30)), infer=PARALLEL) for i in range(3)]
        pyro.sample("x", dist.Normal(sum(z).to(x.dtype), 1.0), obs=x)


LINE = np.linspace(-1, 1, 12)


@pytest.mark.parametrize(
    ("program", "x", "by", "said"),
    [
        (_with(lambda: dist.Normal(0.0, 1.0)), LINE, EM(), "'z' .Normal. is marked for enumeration, and it is continuous"),
        (_with(lambda: dist.Bernoulli(0.5), inside=False), LINE, EM(), "the latent 'z' lies outside the data plate"),
        (_with(lambda: dist.Poisson(1.0)), LINE, EM(), "'z' .Poisson. is marked for enumeration, and there is no end"),
        (Program(_unmarked), LINE, EM(), "only where it is marked"),
        (Program(_per_pixel), np.stack([LINE, -LINE], 1), EM(), "each element of the plate 'pixels'"),
        (Program(_factor), LINE, EM(), "'penalty' is a factor"),
        (Program(_many), LINE, EM(), "27,000 joint states"),
        (gaussians(start_of(blobs(), 5, "full"), "full"), blobs(6)[:4], EM(), "5 states, and there are only 4 rows"),
        (Program(regressions), {"x": LINE, "y": LINE}, EM(stepwise=0.7), "the site 'y' has none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_it_cannot_learn_is_refused_in_one_sentence(program, x, by, said):
    pyro.clear_param_store()
    with pytest.raises(ProbgenError, match=said) as error:
        fit(program, x if isinstance(x, dict) else {"x": x}, 3, by)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [{"init": "best"}, {"restarts": 0}, {"tol": -1}, {"floor": 1.0}, {"stepwise": 0.5}, {"hard": 1},
     {"init": "program", "restarts": 2}],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ProbgenError, match="EM: "):
        EM(**wrong)


def test_minibatches_need_the_stepwise_form():
    x = blobs(60)
    with pytest.raises(ProbgenError, match=r"give batch_size=None, or EM\(stepwise=0.7\)"):
        fit(gaussians(start_of(x, 3, "full"), "full"), {"x": x}, 3, EM(), batch_size=10)


# -- the twin ---------------------------------------------------------------------------------------------------------


def numpyro_gaussians(start):
    import jax.numpy as jnp
    import numpyro
    from numpyro import distributions
    from numpyro.distributions import constraints

    pi_0, mu_0, scale_0 = start

    def model(x):
        pi = numpyro.param("weights", jnp.asarray(pi_0), constraint=constraints.simplex)
        mu = numpyro.param("locations", jnp.asarray(mu_0))
        L = numpyro.param("scale", jnp.asarray(scale_0), constraint=constraints.lower_cholesky)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", distributions.Categorical(pi), infer=PARALLEL)
            numpyro.sample("x", distributions.MultivariateNormal(mu[z], scale_tril=L[z]), obs=x)

    return Program(model)


def test_the_twins_take_the_same_path():
    from probgen.numpyro import EM as NumPyroEM

    x = blobs()
    start = start_of(x, 3, "full")
    ours = fit(gaussians(start, "full"), {"x": x}, 12)
    theirs = fit(numpyro_gaussians(start), {"x": x}, 12, NumPyroEM(init="program", tol=0, floor=0))
    np.testing.assert_allclose(ours.metrics["loss"], theirs.metrics["loss"], rtol=1e-9)
    for name in ours.history:
        np.testing.assert_allclose(ours.history[name], theirs.history[name], rtol=1e-6, atol=1e-8)
    assert ours.config["note"] == theirs.config["note"]


@pytest.mark.nightly
def test_the_twin_of_all_the_rest():
    """k-means++ in float32 with a switch to double, gradient steps, resuming: on NumPyro as on Pyro."""
    import jax.numpy as jnp
    import numpyro
    from numpyro import distributions
    from numpyro.distributions import constraints

    from probgen.numpyro import EM as NumPyroEM

    def lines(x, y):
        pi = numpyro.param("weights", jnp.array([0.5, 0.5]), constraint=constraints.simplex)
        slope, offset = numpyro.param("slope", jnp.array([0.5, -0.5])), numpyro.param("offset", jnp.array([0.1, -0.1]))
        sd = numpyro.param("sd", jnp.array(1.0), constraint=constraints.positive)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", distributions.Categorical(pi), infer=PARALLEL)
            numpyro.sample("y", distributions.Normal(slope[z] * x + offset[z], sd), obs=y)

    random = np.random.default_rng(0)
    x = random.normal(size=50)
    y = np.where(random.uniform(size=50) < 0.5, 2 * x + 1, -x - 2) + 0.2 * random.normal(size=50)
    theirs = fit(Program(lines), {"x": x, "y": y}, 5, NumPyroEM(init="program", tol=0))
    ours = fit(Program(regressions), {"x": x, "y": y}, 5)
    np.testing.assert_allclose(ours.metrics["loss"], theirs.metrics["loss"], rtol=1e-6)

    narrow = np.concatenate([random.normal(0, 1, 100), random.normal(3, 4e-3, 50)]).astype(np.float32)[:, None]
    program = numpyro_gaussians([np.float32(p) for p in start_of(narrow, 2, "full")])
    by = NumPyroEM(tol=0)
    first = engine(program, {"x": narrow}, by, precision="32")
    straight, _ = first.advance(first.start(), 0, 6)
    half, _ = first.advance(first.start(), 0, 2)
    resumed, _ = first.advance(first.restore(first.export(half)), 2, 6)
    ours, theirs = first.export(straight), first.export(resumed)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert "double precision" in first.note
    assert ours["leaf/scale"].dtype == np.float32


# -- restarts, zeros, and scikit-learn again --------------------------------------------------------------------------

CORNERS = np.array([(-20.0, -20.0), (-20.0, 20.0), (20.0, -20.0), (20.0, 20.0)])


@pytest.mark.parametrize("variational", [False, True])
def test_restarts_leave_a_bad_start(variational):
    """Four tight clusters: from one random start two Gaussians stand where two clusters each are; four starts, of seeds
    of their own, find all four clusters, and with them a likelihood (or ELBO) far above.
    """
    from conjugate_programs import Lib, gaussian_mixture

    x = np.concatenate([np.random.default_rng(k).normal(c, 0.5, (15, 2)) for k, c in enumerate(CORNERS)])
    start = np.full(4, 0.25), CORNERS, np.full((4, 2), 0.5)
    program = gaussian_mixture(Lib("pyro"), K=4) if variational else gaussians(start, "diagonal")
    losses, clusters = [], []
    for restarts in (1, 4):
        by = EM(init="random", restarts=restarts, tol=0, variational=variational)
        one = engine(program, {"x": x}, by, seed=1)
        state, metrics = one.advance(one.start(), 0, 20)
        locations = one.history(state)["m" if variational else "locations"][-1]
        clusters.append(int((np.abs(locations[:, None] - CORNERS).max(-1) < 2).any(0).sum()))
        losses.append(metrics["loss"][-1])
    assert clusters == [2, 4]
    assert losses[0] - losses[1] > 0.2


def test_a_column_of_zeros_keeps_its_rates_off_zero():
    """A rate of zero would make 0 log 0 = NaN; held just above it, the likelihood is that of the other column alone."""

    def counting(columns):
        def model(x):
            pi = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
            rates = torch.tensor([[1.0, 2.0], [5.0, 2.0]])[:, :columns]
            rate = pyro.param("rate", rates, constraint=constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Categorical(pi), infer=PARALLEL)
                pyro.sample("x", dist.Poisson(rate[z]).to_event(1), obs=x)

        return Program(model)

    counts = np.random.default_rng(0).poisson(np.where(np.arange(60) < 20, 2, 9))[:, None].astype(float)
    one = fit(counting(1), {"x": counts}, 12)
    pyro.clear_param_store()
    two = fit(counting(2), {"x": np.concatenate([counts, 0 * counts], 1)}, 12)
    losses = np.array(one.metrics["loss"]), np.array(two.metrics["loss"])
    assert losses[1][0] - losses[0][0] == pytest.approx(2.0)  # the rate that the column starts with
    np.testing.assert_allclose(losses[1][1:], losses[0][1:], atol=1e-6)
    np.testing.assert_allclose(two.params["rate"][:, 0], one.params["rate"][:, 0], rtol=1e-6)
    assert ((two.params["rate"][:, 1] > 0) & (two.params["rate"][:, 1] < 1e-6)).all()
    assert (two.sample(50)["x"][:, 1] == 0).all()


def test_on_numpyro_too_it_is_scikit_learns_from_the_same_start():
    from probgen.numpyro import EM as NumPyroEM

    x, steps = blobs(), 12
    pi, mu, scale = start = start_of(x, 3, "full")
    run = fit(numpyro_gaussians(start), {"x": x}, steps, NumPyroEM(init="program", tol=0, floor=0))
    peer = GaussianMixture(
        3, max_iter=steps, tol=0, reg_covar=0, weights_init=pi, means_init=mu,
        precisions_init=np.linalg.inv(scale @ np.swapaxes(scale, -1, -2)),
    ).fit(x)  # fmt: skip
    np.testing.assert_allclose(run.params["weights"], peer.weights_, rtol=1e-4)
    np.testing.assert_allclose(run.params["locations"], peer.means_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(covariances(run.params, "full", 3, 2), peer.covariances_, rtol=1e-4, atol=1e-4)
