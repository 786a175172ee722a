"""Imputation against closed forms: `sample(n, given=...)` with NaN for what is not known, on both backends.

Gates: moments within 4.5 standard errors, a false alarm of 6.8e-6 each; a test compares at most 40, so that one of
them fails without cause with probability below 3e-4.
"""

import importlib
import itertools
import warnings

import numpy as np
import pytest
from impute_programs import BITS, MU, PI, RATES, SD, TRIL, B, D, K, W, programs
from scipy import stats
from scipy.special import logsumexp

from probgen.data import load_data
from probgen.data.prepare import Binarize, Dequantize, Logit, Preparation, Scale, Standardize
from probgen.errors import ProbgenError
from probgen.sample import sample

N = 20_000
NAN = np.nan
BACKENDS = ("pyro", "numpyro")


@pytest.fixture(scope="module", params=BACKENDS)
def make(request):
    pytest.importorskip(request.param)
    return programs(request.param)


def setting(trained, prepare=None, **raw):
    data = load_data({**trained.arrays, **raw})
    return Preparation.of(prepare or {}, data), data.spec


def impute(trained, n=N, given=None, seed=0, **rest):
    return sample(trained, *setting(trained, **rest), n, seed=seed, given=given)


def close(draws, mean, variance):
    """Sample means within 4.5 standard errors of the truth; each column its own."""
    z = (np.mean(draws, 0) - mean) / np.sqrt(np.asarray(variance) / len(draws))
    assert np.abs(z).max() < 4.5, z


def conditional(mean, cov, x):
    """Mean and covariance of the NaN entries of x under N(mean, cov), and log N of the others."""
    u, k = np.isnan(x), ~np.isnan(x)
    gain = cov[np.ix_(u, k)] @ np.linalg.inv(cov[np.ix_(k, k)])
    log_p = stats.multivariate_normal(mean[k], cov[np.ix_(k, k)]).logpdf(x[k]) if k.any() else 0.0
    return mean[u] + gain @ (x[k] - mean[k]), cov[np.ix_(u, u)] - gain @ cov[np.ix_(k, u)], log_p


def covariances(kind):
    return {
        "full": [L @ L.T for L in TRIL],
        "tied": [TRIL[0] @ TRIL[0].T] * K,
        "diagonal": [np.diag(s**2) for s in SD],
    }[kind]


def check_mixture(draws, states, x, means, covs):
    """Weights of the states, conditional mean and covariance of the missing entries of x [D]."""
    parts = [conditional(m, C, x) for m, C in zip(means, covs, strict=True)]
    log_w = np.log(PI) + np.array([p[2] for p in parts])
    w = np.exp(log_w - logsumexp(log_w))
    close(np.eye(K)[states], w, np.maximum(w * (1 - w), 1e-9))
    u = np.isnan(x)
    assert np.array_equal(draws[:, ~u], np.tile(x[~u], (len(draws), 1)))
    if not u.any():
        return
    mean = sum(p * part[0] for p, part in zip(w, parts, strict=True))
    second = sum(p * (part[1] + np.outer(part[0], part[0])) for p, part in zip(w, parts, strict=True))
    cov = second - np.outer(mean, mean)
    close(draws[:, u], mean, np.diag(cov))
    away = draws[:, u] - mean
    products = away[:, :, None] * away[:, None, :]
    close(products, cov, products.var(0))


@pytest.mark.parametrize("kind", ["full", "tied", "diagonal"])
def test_a_gaussian_mixture(make, kind):
    x = np.array([0.3, NAN, NAN, 0.5]) + (MU[0] + MU[1]) / 2
    drawn = impute(make.gmm(kind), given={"x": x})
    check_mixture(drawn["x"], drawn["z"], x, MU, covariances(kind))


def test_rows_of_their_own_and_rows_that_know_all_or_nothing(make):
    trained, covs = make.gmm("full"), covariances("full")
    rows = np.stack(
        [MU[0] + 0.3, np.where([1, 0, 1, 0], MU[1] - 0.2, NAN), np.full(D, NAN), np.where([0, 0, 1, 1], MU[2], NAN)]
    )
    which = np.arange(N) % len(rows)
    drawn = impute(trained, given={"x": rows[which]})
    for i, x in enumerate(rows):
        check_mixture(drawn["x"][which == i], drawn["z"][which == i], x, MU, covs)
    assert np.array_equal(drawn["x"][which == 0], np.tile(rows[0], (N // 4, 1)))


def test_factor_analysis_and_its_latents(make):
    w, sd = W[0], SD[0]
    trained = make.factor_analysis(w, sd)
    x = np.array([NAN, B[1] + 1.0, NAN, B[3] - 0.5])
    drawn = impute(trained, given={"x": x})
    joint = np.concatenate([drawn["z"], drawn["x"][:, [0, 2]]], 1)
    cov = np.block([[np.eye(2), w.T], [w, w @ w.T + np.diag(sd**2)]])
    mean, rest, _ = conditional(np.r_[0, 0, B], cov, np.r_[NAN, NAN, x])
    close(joint, mean, np.diag(rest))
    products = (joint - mean)[:, :, None] * (joint - mean)[:, None, :]
    close(products, rest, products.var(0))
    # all known: the posterior of z in closed form
    full = B + np.array([0.5, -1.0, 0.2, 1.0])
    z = impute(trained, given={"x": full})["z"]
    V = np.linalg.inv(np.eye(2) + (w.T / sd**2) @ w)
    close(z, V @ (w.T / sd**2) @ (full - B), np.diag(V))


def test_a_chain_of_linear_gaussian_latents(make):
    """Known x_1 and x_4 of an array whose columns are sites of their own; joint covariance by hand."""
    T, a, b = 4, 0.8, 0.3
    mean, cov = np.zeros(T), np.zeros((T, T))
    cov[0, 0] = 1.0
    for t in range(1, T):
        mean[t] = a * mean[t - 1] + b
        cov[t, :t] = cov[:t, t] = a * cov[t - 1, :t]
        cov[t, t] = a**2 * cov[t - 1, t - 1] + 0.36
    H = np.vstack([np.eye(T), 1.5 * np.eye(T)])
    whole = H @ cov @ H.T + np.diag([0] * T + [0.25] * T)
    x = np.array([1.0, NAN, NAN, -2.0])
    drawn = impute(make.chain(), given={"x": x})
    assert drawn["z"].shape == drawn["x"].shape == (N, T)
    m, rest, _ = conditional(H @ mean, whole, np.r_[[NAN] * T, x])
    joint = np.concatenate([drawn["z"], drawn["x"][:, 1:3]], 1)
    close(joint, m, np.diag(rest))
    products = (joint - m)[:, :, None] * (joint - m)[:, None, :]
    close(products, rest, products.var(0))


def test_a_mixture_of_factor_analysers(make):
    x = np.array([0.3, NAN, NAN, 0.5]) + (MU[0] + MU[2]) / 2
    drawn = impute(make.mixture_of_factor_analysers(), given={"x": x})
    check_mixture(drawn["x"], drawn["s"], x, MU, [w @ w.T + np.diag(s**2) for w, s in zip(W, SD, strict=True)])


def test_a_bernoulli_mixture_by_enumeration_of_all_completions(make):
    x = np.array([1.0, NAN, 0.0, NAN, NAN])
    drawn = impute(make.bernoulli_mixture(), given={"x": x})["x"]
    completions = np.array(list(itertools.product((0, 1), repeat=3)))
    full = np.stack([np.ones(8), completions[:, 0], np.zeros(8), completions[:, 1], completions[:, 2]], 1)
    p = (PI * np.prod(np.where(full[:, None], BITS, 1 - BITS), -1)).sum(1)
    p /= p.sum()
    which = drawn[:, [1, 3, 4]].astype(int) @ [4, 2, 1]
    close(np.eye(8)[which], p, p * (1 - p))
    assert (drawn[:, 0] == 1).all() and (drawn[:, 2] == 0).all()


def test_a_poisson_mixture(make):
    x = np.array([7.0, NAN, 2.0])
    drawn = impute(make.poisson_mixture(), given={"x": x})
    assert drawn["x"].dtype.kind in "if" and (drawn["x"][:, [0, 2]] == [7, 2]).all()
    log_w = np.log(PI) + stats.poisson(RATES[:, [0, 2]]).logpmf([7, 2]).sum(1)
    w = np.exp(log_w - logsumexp(log_w))
    mean = w @ RATES[:, 1]
    close(drawn["x"][:, 1], mean, w @ (RATES[:, 1] + RATES[:, 1] ** 2) - mean**2)
    close(np.eye(K)[drawn["z"]], w, w * (1 - w))
    with pytest.raises(ProbgenError, match="whole numbers"):
        impute(make.poisson_mixture(), 3, {"x": np.array([7.5, NAN, 2.0])})
    with pytest.raises(ProbgenError, match="outside the support"):
        impute(make.poisson_mixture(), 3, {"x": np.array([-1.0, NAN, 2.0])})


def test_one_data_site_of_two(make):
    """The class given x, and x given the class; what is made of both follows."""
    trained, covs = make.labelled(), covariances("diagonal")
    x = (MU[0] + MU[1]) / 2
    drawn = impute(trained, given={"x": x})
    check_mixture(drawn["x"], drawn["y"], x, MU, covs)
    drawn = impute(trained, given={"y": 2})
    assert (drawn["y"] == 2).all()
    close(drawn["x"], MU[2], SD[2] ** 2)
    np.testing.assert_allclose(drawn["total"], drawn["x"].sum(1), rtol=1e-6)
    both = impute(trained, given={"y": NAN, "x": np.where([1, 1, 0, 0], x, NAN)})
    check_mixture(both["x"], both["y"], np.where([1, 1, 0, 0], x, NAN), MU, covs)


def test_beside_an_array_that_the_program_is_conditioned_on(make):
    c, x = np.where(np.arange(N) % 2, 1.0, -1.0), np.array([0.5, NAN, NAN, -0.5])
    drawn = impute(make.conditional(), given={"c": c, "x": x})
    for value in (-1.0, 1.0):
        rows = c == value
        check_mixture(drawn["x"][rows], drawn["z"][rows], x, MU + value, [np.eye(D)] * K)


@pytest.mark.nightly_on("pyro")
def test_global_latents_are_weighed_by_what_is_known(make):
    """p(θ | x_1, D) with x_1 = 3 known: the conjugate posterior of one more number, and x_2 from it.

    1000 draws of the guide are weighed: means within 4.5 of the standard errors of their effective number.
    """
    case = make.common_mean()
    drawn = impute(case.trained, 4000, {"x": np.array([3.0, NAN])})
    variance = 1 / (1 / case.variance + 1)
    mean = variance * (case.mean / case.variance + 3.0)
    assert drawn["theta"].shape == (4000,) and drawn["x"].shape == (4000, 2)
    assert abs(mean - case.mean) > 0.25  # the known entry matters
    assert abs(drawn["theta"].mean() - mean) < 4.5 * np.sqrt(variance / 500)
    assert abs(drawn["x"][:, 1].mean() - mean) < 4.5 * np.sqrt(variance / 500 + 1 / 4000)
    assert drawn["theta"].var() == pytest.approx(variance, rel=4.5 * np.sqrt(2 / 400))
    np.testing.assert_array_equal(drawn["x"][:, 0], 3.0)


def test_known_entries_come_back_exactly_in_data_units(make):
    trained = make.gmm("diagonal")
    x = np.array([0.1, NAN, 0.7, NAN])
    plain = impute(trained, 50, {"x": x})["x"]
    raw = trained.arrays["x"] * 20 + 10
    step = Scale(low=10.0, high=30.0)
    scaled = impute(trained, 50, {"x": 10 + 20 * x}, x=raw, prepare={"x": (step,)})["x"]
    np.testing.assert_allclose(scaled, 10 + 20 * plain, rtol=1e-6)
    assert (scaled[:, [0, 2]] == (10 + 20 * x)[[0, 2]]).all()
    both = impute(trained, 50, {"x": raw[0] * [1, 1, NAN, NAN]}, x=raw, prepare={"x": (Standardize(),)})["x"]
    assert (both[:, :2] == raw[0, :2]).all() and np.isfinite(both).all()
    unit = (raw - raw.min() + 1) / (np.ptp(raw) + 2)
    logit = impute(trained, 50, {"x": unit[0] * [1, NAN, 1, NAN]}, x=unit, prepare={"x": (Logit(),)})["x"]
    assert (logit[:, [0, 2]] == unit[0, [0, 2]]).all() and ((logit > 0) & (logit < 1)).all()


def test_bits_are_known_through_a_threshold(make):
    trained = make.bernoulli_mixture()
    grey = np.round(trained.arrays["x"] * 200 + 20)
    given = np.array([180.0, NAN, 30.0, NAN, NAN])
    drawn = impute(trained, 200, {"x": given}, x=grey, prepare={"x": (Binarize(threshold=128.0),)})["x"]
    assert (drawn[:, 0] == 180).all() and (drawn[:, 2] == 30).all()
    assert set(np.unique(drawn[:, 1])) == {grey.min(), grey.max()}
    bits = impute(trained, 200, {"x": np.array([1, NAN, 0, NAN, NAN])})["x"]
    np.testing.assert_array_equal(drawn[:, [1, 3, 4]] > 128, bits[:, [1, 3, 4]] == 1)


@pytest.mark.parametrize("step", [Binarize(stochastic=True), Dequantize()])
def test_random_preparation_is_refused(make, step):
    trained = make.bernoulli_mixture()
    grey = np.round(trained.arrays["x"] * 200 + 20)
    with pytest.raises(ProbgenError, match="draws at random"):
        impute(trained, 5, {"x": np.array([180.0, NAN, 30.0, NAN, NAN])}, x=grey, prepare={"x": (step,)})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vae", ("tanh",), "mixtures and linear-Gaussian programs, and the mean of the site 'x' is not linear"),
        ("vae", ("scale",), "the scale of the site 'x' depends on the continuous"),
        ("vae", ("bits",), r"the site 'x' \(Bernoulli\) depends on the continuous latent site 'z'"),
        ("robust", (), r"the latent 'tau' \(Gamma\) is neither enumerable nor Gaussian"),
    ],
)
def test_other_programs_are_refused_by_the_site(make, name, options, says):
    trained = getattr(make, name)(*options)
    x = np.array([NAN, 1.0, NAN, 0.0])
    with pytest.raises(ProbgenError, match=says) as error:
        impute(trained, 5, {"x": x})
    assert "\n" not in str(error.value)


def test_the_same_seed_draws_the_same(make):
    trained, given = make.gmm("full"), {"x": np.array([0.3, NAN, NAN, 0.5])}
    one, two, other = (impute(trained, 20, given, seed=s)["x"] for s in (3, 3, 4))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_that_few_draws_of_the_global_latents_count_is_said(make, monkeypatch):
    """θ_t on a grid of 25 and x_1 known: w_t ∝ N(x_1 | θ_t, 1) leave 1 / Σ w² of them, and their mean is that of θ.

    Far out one end of the grid stands for all. The mean is taken at 4.5 errors of 2000 draws (7e-6).
    """
    case, grid = make.common_mean(), np.linspace(-1.5, 1.5, 25)
    module = importlib.import_module("probgen.sample.impute")
    monkeypatch.setattr(module, "global_draws", lambda *_, **__: [{"theta": np.asarray(t)} for t in grid])
    for known, few in ((0.0, False), (30.0, True)):
        weights = stats.norm(grid, 1).pdf(known)
        weights /= weights.sum()
        effective = 1 / (weights**2).sum()
        assert (effective < 20) == few
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            theta = impute(case.trained, 2000, {"x": np.array([known, NAN])})["theta"]
        said = [str(one.message) for one in said if "effective draws" in str(one.message)]
        assert len(said) == few
        assert not few or f"leave {effective:.1f} effective draws of 25 of the global latents" in said[0]
        close(theta[:, None], weights @ grid, weights @ grid**2 - (weights @ grid) ** 2)
