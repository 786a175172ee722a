"""`probability` and `expectation` against closed forms: plain, importance-sampled, given known entries.

Gates at 4.5 reported standard errors: a false alarm of 6.8e-6 each.
"""

import importlib
import warnings

import numpy as np
import pytest
from impute_programs import MU, PI, TRIL, B, K, W, programs
from linear_gaussian import LinearGaussian
from scipy import optimize, stats
from test_impute import conditional, setting

from probgen.data import load_data
from probgen.data.prepare import Preparation, Scale
from probgen.errors import ProbgenError
from probgen.sample.probability import Estimate, _mean, expectation, probability

A = np.array([1.0, -0.5, 0.3, 0.8])  # the event: A · x > c
MEANS, SDS = MU @ A, np.sqrt([A @ L @ L.T @ A for L in TRIL])


def tail(c):
    """P(A · x > c) of the mixture."""
    return PI @ stats.norm(MEANS, SDS).sf(c)


def level(p):
    """c with P(A · x > c) = p."""
    return optimize.brentq(lambda c: np.log(tail(c)) - np.log(p), 0, 60)


@pytest.fixture(scope="module", params=["pyro", "numpyro"])
def make(request):
    pytest.importorskip(request.param)
    return programs(request.param)


@pytest.fixture(scope="module")
def gmm(make):
    return make.gmm("full")


def run(verb, trained, f, *args, prepare=None, raw=None, **options):
    return verb(trained, *setting(trained, prepare, **(raw or {})), f, *args, **options)


def test_a_common_event(gmm):
    c = level(0.01)
    found = run(probability, gmm, lambda d: d["x"] @ A > c)
    assert abs(found.value - 0.01) < 4.5 * found.se
    assert found.se == pytest.approx(np.sqrt(0.01 * 0.99 / 100_000), rel=0.1)
    assert found.n == found.ess == 100_000 and "Monte Carlo" in found.method
    assert found == run(probability, gmm, lambda d: d["x"] @ A - c)  # a score that happens often enough


@pytest.mark.nightly_on("numpyro")
@pytest.mark.parametrize("p", [1e-5, 1e-8])
@pytest.mark.nightly_on("08")
def test_a_rare_event(gmm, p):
    c = level(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(probability, gmm, lambda d: d["x"] @ A - c, 20_000)
    assert abs(found.value - p) < 4.5 * found.se and found.se < 0.1 * p
    assert 100 < found.ess < 20_000 and "importance" in found.method


@pytest.mark.nightly_on("numpyro")
def test_a_rare_event_in_two_places_and_in_data_units(gmm):
    """|A · x| > c has two tails; scaled data leave its probability as it is."""
    c = level(1e-7)
    both = tail(c) + PI @ stats.norm(MEANS, SDS).cdf(-c)
    unit = {"prepare": {"x": (Scale(low=10.0, high=30.0),)}, "raw": {"x": 10 + 20 * gmm.arrays["x"]}}
    found = run(probability, gmm, lambda d: np.abs((d["x"] - 10) / 20 @ A) - c, 20_000, **unit)
    assert abs(found.value - both) < 4.5 * found.se and found.se < 0.1 * both


@pytest.mark.nightly_on("numpyro")
def test_a_rare_event_of_the_latents(gmm):
    """x far out in one component alone: latents are drawn given the data that is proposed."""
    c = MEANS[2] + 5.5 * SDS[2]
    truth = PI[2] * stats.norm.sf(5.5)
    found = run(probability, gmm, lambda d: np.where(d["z"] == 2, d["x"] @ A - c, -1e3 + d["x"] @ A), 20_000)
    assert abs(found.value - truth) < 4.5 * found.se and found.se < 0.2 * truth


@pytest.mark.nightly
def test_reported_errors_are_those_of_repetitions():
    """8 estimates of their own proposals: deviations in reported errors have sd 1 (0.3..2.0: 3e-3 of seeds)."""
    pytest.importorskip("pyro")
    trained, c = programs("pyro").gmm("full"), level(1e-4)
    runs = [run(probability, trained, lambda d: d["x"] @ A - c, 2_000, seed=s) for s in range(8)]
    errors = np.array([(r.value - 1e-4) / r.se for r in runs])
    assert 0.3 < errors.std(ddof=1) < 2.0 and abs(errors.mean()) < 4.5 / np.sqrt(8)


def test_a_rare_boolean_event_is_said(gmm):
    c = level(1e-6)
    with pytest.warns(UserWarning, match="return a real score"):
        found = run(probability, gmm, lambda d: d["x"] @ A > c, 2_000)
    assert found.value == 0 and found.se == pytest.approx(1 / 2_000)


def test_a_score_of_a_program_that_cannot_be_importance_sampled_is_said(make):
    trained = make.factor_analysis(W[0], np.ones(4))
    with pytest.warns(UserWarning, match="exact likelihood"):
        run(probability, trained, lambda d: d["x"] @ A - 100, 2_000)
    with pytest.warns(UserWarning, match="whole real line, and the site 'x' is bounded"):
        run(probability, make.poisson_mixture(), lambda d: d["x"].sum(1) - 100.0, 2_000)


def test_given_known_entries(make):
    """P(x_2 > 1 | x_1, x_3) and E[x_2 | x_1, x_3] in factor analysis."""
    trained = make.factor_analysis(W[0], np.ones(4) * 0.5)
    x = np.array([B[0] + 1, np.nan, B[2] - 1, np.nan])
    mean, cov, _ = conditional(B, W[0] @ W[0].T + 0.25 * np.eye(4), x)
    found = run(probability, trained, lambda d: d["x"][:, 1] > 1, 20_000, given={"x": x})
    assert abs(found.value - stats.norm(mean[0], cov[0, 0] ** 0.5).sf(1)) < 4.5 * found.se
    moments = run(expectation, trained, lambda d: d["x"][:, [1, 3]], 20_000, given={"x": x})
    assert (np.abs(moments.value - mean) < 4.5 * moments.se).all()
    np.testing.assert_allclose(moments.se, np.sqrt(np.diag(cov) / 20_000), rtol=0.05)


def test_moments(gmm):
    mean = PI @ MU
    cov = sum(p * (L @ L.T + np.outer(m - mean, m - mean)) for p, m, L in zip(PI, MU, TRIL, strict=True))
    found = run(expectation, gmm, lambda d: d["x"])
    assert (np.abs(found.value - mean) < 4.5 * found.se).all()
    products = run(expectation, gmm, lambda d: (d["x"] - mean)[:, :, None] * (d["x"] - mean)[:, None, :])
    assert products.value.shape == (4, 4) and (np.abs(products.value - cov) < 4.5 * products.se).all()
    share = run(expectation, gmm, lambda d: np.eye(K)[d["z"]])
    assert (np.abs(share.value - PI) < 4.5 * share.se).all()


def numpy_setting(trained):
    data = load_data({"x": trained.x if hasattr(trained, "x") else trained.generate(50, 0)[1]})
    return Preparation.of({}, data), data.spec


def test_coverage_of_the_reported_error():
    """200 seeds: 95% intervals hold the truth 182..198 times (binomial: false alarm 2e-3 by tail, seeds are fixed)."""
    trained = LinearGaussian()
    setting, truth = numpy_setting(trained), trained.b[0]
    inside = 0
    for seed in range(200):
        found = expectation(trained, *setting, lambda d: d["x"][:, 0], 400, seed=seed)
        inside += abs(found.value - truth) < 1.96 * found.se
    assert 180 <= inside <= 199


def test_rows_that_share_a_global_latent_are_one_group(make):
    """E x and its error where 20,000 rows share 1000 draws of θ: (v + 1 / 20) / 1000."""
    case = make.common_mean()
    found = run(expectation, case.trained, lambda d: d["x"][:, 0], 20_000)
    assert found.se == pytest.approx(np.sqrt((case.variance + 1 / 20) / 1000), rel=0.1)
    assert abs(found.value - case.mean) < 4.5 * found.se
    assert 1000 < found.ess < 20_000 and "1,000 groups" in found.method
    prior = run(expectation, case.trained, lambda d: d["x"][:, 0], 20_000, prior=True)
    assert abs(prior.value) < 4.5 * prior.se and prior.se == pytest.approx(np.sqrt(4.05 / 1000), rel=0.1)


def test_groups_of_known_entries(make, monkeypatch):
    """P(x_2 > 3 | x_1 = 3, D) with the conjugate posterior; 300 draws of θ are weighed."""
    monkeypatch.setattr(importlib.import_module("probgen.sample.impute"), "GLOBAL_DRAWS", 300)
    case = make.common_mean()
    v = 1 / (1 / case.variance + 1)
    truth = stats.norm(v * (case.mean / case.variance + 3.0), np.sqrt(v + 1)).sf(3)
    given = {"x": np.array([3.0, np.nan])}
    found = run(probability, case.trained, lambda d: d["x"][:, 1] > 3, 4_000, given=given)
    assert abs(found.value - truth) < 4.5 * found.se


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.01234, 0.00031, 10, 10, ""), "0.01234 ± 0.00031"),
        (Estimate(1.2341e-8, 3.1e-10, 10, 10, ""), "(1.234 ± 0.031)e-08"),
        (Estimate(np.array([1.0, 2.0]), np.array([0.1, 0.2]), 10, 10, ""), "[1.00 ± 0.10, 2.00 ± 0.20]"),
        (Estimate(0.0, 0.01, 10, 10, ""), "0.000 ± 0.010"),
        (Estimate(1.0, 0.0, 10, 10, ""), "1 ± 0"),
    ],
)
def test_an_estimate_in_words(estimate, text):
    assert str(estimate) == text


def test_bad_input():
    setting = numpy_setting(LinearGaussian())
    for verb, f, n, says in (
        (probability, lambda d: True, 10, "one .* a draw"),
        (probability, lambda d: d["x"] > 0, 10, "must give one value a draw"),
        (expectation, lambda d: d["x"][:3], 10, "one .* a draw"),
        (expectation, lambda d: d["x"] / 0.0, 10, "NaN or Inf"),
        (expectation, lambda d: d["x"], 1, "at least 2"),
    ):
        with pytest.raises(ProbgenError, match=says), np.errstate(all="ignore"):
            verb(LinearGaussian(), *setting, f, n)


def test_the_error_of_a_mean_over_groups_is_that_of_the_groups_means(make, monkeypatch):
    """Five groups of four rows: sd of their means over √5, with G − 1 in the denominator, so that it is right also for few.

    E SE² is then the variance of the estimate, (v + 1 / 4) / 5 of θ and of its rows; 300 repetitions of five numbers
    that are Gaussian: SE² has relative sd √(2 / 4), its mean √(2 / 4 / 300) = 0.041, the gate is at 4 of these (6e-5),
    and without the factor it would be 0.8.
    """
    monkeypatch.setattr(importlib.import_module("probgen.sample"), "GLOBAL_DRAWS", 5)
    case, seen = make.common_mean(), []
    found = run(expectation, case.trained, lambda d: seen.append(d["x"][:, 0]) or d["x"][:, 0], 20)
    means = np.concatenate(seen).reshape(5, 4).mean(1)
    assert "in 5 groups" in found.method
    assert found.value == pytest.approx(means.mean()) and found.se == pytest.approx(means.std(ddof=1) / 5**0.5)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 5, 1)) * case.variance**0.5 + rng.normal(size=(300, 5, 4))
    errors = [_mean(one.reshape(20), np.repeat(np.arange(5), 4)).se for one in rows]
    assert np.mean(np.square(errors)) == pytest.approx((case.variance + 1 / 4) / 5, rel=4 * np.sqrt(2 / 4 / 300))
