"""`evaluate` against closed forms: evidence, predictive density, errors against repeated runs."""

import json

import numpy as np
import pytest
from linear_gaussian import LinearGaussian, NormalMean

from probgen import chunks
from probgen.data import as_rows, load_data
from probgen.data.prepare import Preparation, Standardize
from probgen.errors import ProbgenError
from probgen.evaluate import evaluate, log_likelihood
from probgen.evaluate.khat import equal_weights, summarise_k_hat
from probgen.evaluate.latents import Spread
from probgen.evaluate.likelihood import effective_sample_size, log_mean_weight, monte_carlo_variance


def setting(trained, n=200, prepare=None, scale=1.0, seed=1):
    """Rows of the program's own, their spec, and a preparation fitted to them."""
    y = np.arange(n) % max(1, trained.classes)
    x = trained.generate(n, seed, y)[1]
    arrays = {"x": x * scale, "y": y} if trained.classes else {"x": x * scale}
    data = load_data(arrays)
    return data, Preparation.of(prepare or {}, data), arrays


def numbers(trained, k=100, seed=0, **options):
    data, preparation, arrays = setting(trained, **options)
    return evaluate(trained, preparation, data.train, data.spec, k=k, seed=seed), arrays


def test_with_the_exact_posterior_every_weight_is_the_evidence():
    trained = LinearGaussian()
    found, arrays = numbers(trained)
    evidence = trained.log_evidence(arrays)
    assert found["log_likelihood"] == pytest.approx(evidence.mean(), abs=1e-9)
    assert found["elbo"] == pytest.approx(evidence.mean(), abs=1e-9)
    assert found["log_likelihood_se"] == pytest.approx(evidence.std(ddof=1) / np.sqrt(200), rel=1e-9)
    assert found["log_likelihood_mc_se"] < 1e-9
    assert found["ess"] == pytest.approx(100)
    assert found["k_hat"] == found["k_hat_above_0.7"] == 0.0
    assert "equal" in " ".join(found["notes"])


def test_every_row_has_its_own_likelihood():
    trained = LinearGaussian()
    data, preparation, arrays = setting(trained, n=1100)  # three batches, the last a short one
    found = log_likelihood(trained, preparation, data.train, data.spec, k=50, seed=0)
    np.testing.assert_allclose(found["log_likelihood"].values, trained.log_evidence(arrays), atol=1e-9)
    assert found["log_likelihood"].dims == ("data",) and (found["k_hat"] == 0).all() and "50 weights" in found.estimator
    with pytest.raises(ProbgenError, match="`k` is 1"):
        log_likelihood(trained, preparation, data.train, data.spec, k=1, seed=0)


def test_a_mismatched_guide_orders_elbo_estimate_and_evidence():
    trained = LinearGaussian(moved=0.3, wider=1.4)
    few, arrays = numbers(trained, k=5)
    many, _ = numbers(trained, k=500)
    evidence = trained.log_evidence(arrays).mean()
    # One-sided at 4 Monte-Carlo standard errors: false alarm 3e-5 each.
    assert few["elbo"] <= few["log_likelihood"] <= evidence + 4 * few["log_likelihood_mc_se"]
    assert many["elbo"] < few["log_likelihood"] < many["log_likelihood"]
    assert many["log_likelihood"] == pytest.approx(evidence, abs=4 * many["log_likelihood_mc_se"] + 0.002)
    # KL(q ‖ posterior) in closed form: ½ Σ (w² − 1 − log w²) + ½ mᵀ V⁻¹ m, sampled 500 times for each of 200 rows.
    m = np.full(trained.Z, trained.moved)
    kl = 0.5 * trained.Z * (1.4**2 - 1 - np.log(1.4**2)) + 0.5 * m @ np.linalg.solve(trained.V, m)
    assert evidence - many["elbo"] == pytest.approx(kl, abs=0.05)


def test_bits_and_nats_per_dimension():
    trained = LinearGaussian(moved=0.2)
    found, _ = numbers(trained)
    assert found["nats_per_dim"] == pytest.approx(-found["log_likelihood"] / 5)
    assert found["bits_per_dim"] == pytest.approx(-found["log_likelihood"] / (5 * np.log(2)))
    assert found["bits_per_dim_se"] == pytest.approx(found["log_likelihood_se"] / (5 * np.log(2)))


def test_the_density_is_that_of_the_raw_data():
    """Data ten times as large, standardised away: the density is 10^−D of what it was."""
    trained = LinearGaussian(moved=0.2)
    one, _ = numbers(trained, prepare={"x": (Standardize(),)})
    ten, _ = numbers(trained, prepare={"x": (Standardize(),)}, scale=10.0)
    for name in ("log_likelihood", "elbo"):
        assert ten[name] == pytest.approx(one[name] - 5 * np.log(10), abs=1e-5)
    assert ten["reconstruction_error"] == pytest.approx(100 * one["reconstruction_error"], rel=1e-5)
    assert ten["term/x"] == pytest.approx(one["term/x"], abs=1e-5)
    assert ten["term/prepare"] == pytest.approx(one["term/prepare"] - 5 * np.log(10), abs=1e-5)


def test_monte_carlo_error_agrees_with_repeated_runs():
    """sd over 200 repeats is known to 5%: 20% is 4 of its own standard errors (false alarm 6e-5)."""
    trained = LinearGaussian(moved=0.2, wider=1.2)
    data, preparation, _arrays = setting(trained, n=50)
    runs = [evaluate(trained, preparation, data.train, data.spec, k=100, seed=s) for s in range(200)]
    measured = np.std([run["log_likelihood"] for run in runs], ddof=1)
    assert np.mean([run["log_likelihood_mc_se"] for run in runs]) == pytest.approx(measured, rel=0.2)


def test_row_error_agrees_with_fresh_data():
    """sd over 200 data sets is known to 5% (gate 20%, false alarm 6e-5)."""
    trained = LinearGaussian()
    runs = []
    for s in range(200):
        data, preparation, _ = setting(trained, n=50, seed=100 + s)
        runs.append(evaluate(trained, preparation, data.train, data.spec, k=2))
    measured = np.std([run["log_likelihood"] for run in runs], ddof=1)
    assert np.mean([run["log_likelihood_se"] for run in runs]) == pytest.approx(measured, rel=0.2)


def test_weights_summaries():
    with np.errstate(divide="ignore"):
        log_w = np.log(np.array([[1.0, 2.0], [1.0, 0.0], [1.0, 0.0], [1.0, 2.0]]))
    np.testing.assert_allclose(log_mean_weight(log_w), [0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(effective_sample_size(log_w), [4.0, 2.0])
    # Var(mean w) / w̄²: 0 for the first; (4/3) / 4 for the second.
    assert monte_carlo_variance(log_w) == pytest.approx(1 / 3)
    assert monte_carlo_variance(log_w, shared=True) == pytest.approx(1 / 3)
    assert equal_weights(log_w).tolist() == [True, False]
    assert equal_weights(np.full((3, 1), -np.inf)).tolist() == [False]


def test_k_hat_is_summed_up():
    found, notes = summarise_k_hat(np.array([0.1, 0.69, 0.71, 2.0, np.nan]), 0)
    assert found == {"k_hat": pytest.approx(0.70), "k_hat_above_0.7": 0.5}
    assert "1 of 5" in notes[0]


def test_spread_is_the_same_in_pieces():
    values = np.sort(np.random.default_rng(0).normal(1e4, 1.0, size=(50, 3)), axis=0)
    spread = Spread()
    for piece in np.split(values, [1, 7, 30]):
        spread.add(piece)
    np.testing.assert_allclose(spread.mean, values.mean(0))
    np.testing.assert_allclose(spread.variance, values.var(0, ddof=1), rtol=1e-8)


def test_batches_have_draws_of_their_own():
    class Recording(LinearGaussian):
        def log_weights(self, arrays, k, seed):
            self.seeds.append(seed)
            return super().log_weights(arrays, k, seed)

    trained = Recording()
    trained.seeds = []
    numbers(trained, k=2, n=1200)
    assert len(set(trained.seeds)) == len(trained.seeds) == 3


def test_k_hat_and_ess_see_a_bad_guide():
    """A guide 0.4 times as wide as the posterior has weights of infinite variance: k → 1 − 0.4² = 0.84."""
    good, _ = numbers(LinearGaussian(Z=3, wider=1.2), k=400, n=20)
    bad, _ = numbers(LinearGaussian(Z=3, wider=0.4), k=400, n=20)
    assert good["k_hat"] < 0.3 and good["k_hat_above_0.7"] == 0
    assert bad["k_hat"] > 0.6 and bad["k_hat_above_0.7"] > 0.3
    assert bad["ess"] < 0.3 * good["ess"]


def test_terms_add_up_to_the_elbo():
    found, _ = numbers(LinearGaussian(moved=0.3, wider=1.2), prepare={"x": (Standardize(),)}, k=100)
    total = found["term/x"] + found["term/z"] + found["term/prepare"]
    assert total == pytest.approx(found["elbo"], abs=0.1)


def test_reconstruction_error_in_closed_form():
    """E over x, z ~ q(z|x) of |x − W z − b|² / D = s² (with the exact posterior (x, z) is a draw of the joint)."""
    trained = LinearGaussian()
    found, _ = numbers(trained, n=4000, k=2)
    assert found["reconstruction_error"] == pytest.approx(trained.s**2, abs=4 * found["reconstruction_error_se"])


def test_active_units_leave_out_collapsed_ones():
    """Three dead units: their posterior is the prior, whose noise in 100 draws has variance 0.01 = the threshold."""
    found, _ = numbers(LinearGaussian(Z=2, dead=3), n=300)
    assert found["active_units"] == found["active_units/z"] == 2


def test_global_latents_give_the_predictive_density():
    x = np.random.default_rng(0).normal(1.0, 1.0, size=30)
    trained = NormalMean(x)
    data = load_data({"x": x})
    preparation = Preparation.of({}, data)
    test = np.random.default_rng(1).normal(1.0, 1.0, size=100)
    found = evaluate(trained, preparation, as_rows({"x": test}), data.spec, k=2000)
    exact = trained.log_predictive(test).mean()
    assert found["log_likelihood"] == pytest.approx(exact, abs=4 * found["log_likelihood_mc_se"] + 1e-4)
    assert "predictive" in found["protocol"]["estimator"]
    on_train = evaluate(trained, preparation, data.train, data.spec, k=500)
    # With the exact posterior the ELBO of all N rows is the evidence for every draw, so its mean over rows is exact.
    assert on_train["elbo"] == pytest.approx(trained.log_evidence() / 30, abs=1e-9)


def test_monte_carlo_error_of_shared_draws():
    """θ_k serves all rows, so their errors add up: the sd over 200 repeats is known to 5% (gate 20%)."""
    x = np.random.default_rng(0).normal(1.0, 1.0, size=10)
    trained = NormalMean(x)
    data = load_data({"x": x})
    preparation = Preparation.of({}, data)
    test = as_rows({"x": np.full(50, 2.5)})
    runs = [evaluate(trained, preparation, test, data.spec, k=100, seed=s) for s in range(200)]
    measured = np.std([run["log_likelihood"] for run in runs], ddof=1)
    assert np.mean([run["log_likelihood_mc_se"] for run in runs]) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("kind", ["implicit", "unnormalised"])
def test_what_is_undefined_is_said(kind):
    found, _ = numbers(LinearGaussian(kind=kind), n=20)
    assert not {"log_likelihood", "elbo", "bits_per_dim", "k_hat", "ess", "term/x"} & set(found)
    assert any(("not defined" in note and kind in note) or "factor" in note for note in found["notes"])
    assert found["reconstruction_error"] > 0


def test_a_row_without_density_is_said_and_never_minus_infinity():
    class Bounded(LinearGaussian):
        def log_weights(self, arrays, k, seed):
            weights = super().log_weights(arrays, k, seed)
            weights[:, 0] = -np.inf
            return weights

    found, _ = numbers(Bounded(moved=0.1), n=20)
    assert "log_likelihood" not in found and "elbo" not in found and "bits_per_dim" not in found
    assert any("1 of 20 rows" in note for note in found["notes"])
    json.dumps(found, allow_nan=False)


def test_protocol_and_json():
    data, preparation, _ = setting(LinearGaussian())
    found = evaluate(LinearGaussian(), preparation, data.train, data.spec, k=7, seed=3, split="train")
    assert found["protocol"] == {
        "prepare": preparation.to_json(),
        "split": "train",
        "rows": 200,
        "k": 7,
        "seed": 3,
        "estimator": found["protocol"]["estimator"],
        "kind": "latent",
    }
    assert "7 weights" in found["protocol"]["estimator"]
    json.dumps(found, allow_nan=False)


def test_memory_is_bounded(monkeypatch):
    """No call sees more than the budget, and the pieces are those of one estimate."""
    trained = LinearGaussian(moved=0.2)
    monkeypatch.setattr(chunks, "NUMBERS", 7 * 60)  # 7 numbers a datum: 60 particles a call
    found, arrays = numbers(trained, k=130, n=70)
    assert max(trained.calls) <= 60
    assert found["log_likelihood"] == pytest.approx(trained.log_evidence(arrays).mean(), abs=0.05)


def test_same_seed_same_numbers():
    one, _ = numbers(LinearGaussian(moved=0.2), seed=1, k=10)
    two, _ = numbers(LinearGaussian(moved=0.2), seed=1, k=10)
    assert one == two


def test_bad_input():
    data, preparation, _ = setting(LinearGaussian())
    with pytest.raises(ProbgenError, match="no rows"):
        evaluate(LinearGaussian(), preparation, data.test, data.spec)
    with pytest.raises(ProbgenError, match="at least 2"):
        evaluate(LinearGaussian(), preparation, data.train, data.spec, k=1)
