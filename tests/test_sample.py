"""`sample`: moments in closed form, units, given arrays, numbered sites, bounded memory."""

import numpy as np
import pytest
from linear_gaussian import LinearGaussian, NormalMean

from probgen import chunks
from probgen.data import load_data
from probgen.data.prepare import Preparation, Scale, Standardize
from probgen.errors import ProbgenError
from probgen.program import Plate, Site, Structure
from probgen.sample import sample
from probgen.sites import arrays_of, numbered, stack_numbered


def setting(trained, prepare=None, n=100):
    y = np.arange(n) % max(1, trained.classes)
    x = trained.generate(n, 1, y)[1]
    data = load_data({"x": x, "y": y} if trained.classes else {"x": x})
    return Preparation.of(prepare or {}, data), data.spec


def test_moments_of_the_program():
    """Means within 4.5 standard errors, 5 of them (false alarm 4e-5); covariances likewise, of 15."""
    trained = LinearGaussian()
    x = sample(trained, *setting(trained), 20_000)["x"]
    cov = trained.W @ trained.W.T + trained.s**2 * np.eye(trained.D)
    assert np.abs((x.mean(0) - trained.b) / np.sqrt(np.diag(cov) / 20_000)).max() < 4.5
    error = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / 20_000)
    assert np.abs((np.cov(x.T) - cov) / error).max() < 4.5


def test_data_sites_come_back_in_their_own_units():
    trained = LinearGaussian()
    preparation, spec = setting(trained, {"x": (Scale(low=10.0, high=30.0),)})
    raw = sample(trained, preparation, spec, 50, seed=3)
    seen = sample(trained, *setting(trained), 50, seed=3)
    np.testing.assert_allclose(raw["x"], 10 + 20 * seen["x"])
    np.testing.assert_array_equal(raw["z"], seen["z"])


def test_memory_is_bounded_and_pieces_differ(monkeypatch):
    monkeypatch.setattr(chunks, "NUMBERS", 7 * 40)
    trained = LinearGaussian()
    z = sample(trained, *setting(trained), 100)["z"]
    assert max(trained.calls) <= 40 and sum(trained.calls) == 100
    assert len(np.unique(z, axis=0)) == 100
    np.testing.assert_array_equal(z, sample(trained, *setting(trained), 100)["z"])


def test_given_values_are_used():
    trained = LinearGaussian(classes=3)
    rest = setting(trained)
    x = sample(trained, *rest, 4000, given={"y": 2})["x"]
    assert np.abs(x.mean(0) - trained.b - trained.c[2]).max() < 0.2
    y = np.arange(4000) % 3
    each = sample(trained, *rest, 4000, given={"y": y})["x"]
    for c in range(3):
        assert np.abs(each[y == c].mean(0) - trained.b - trained.c[c]).max() < 0.35


def test_given_values_are_prepared():
    class Shifted(LinearGaussian):
        """Reads a vector `u`, and records how it arrives."""

        @property
        def structure(self):
            old = super().structure
            return Structure(old.model, old.guide, old.data_plates, False, {"x": "data", "u": "given"})

        def draw(self, n, seed, arrays, prior=False):
            self.u = arrays["u"]
            return {"x": np.zeros((n, self.D))}

    trained, u = Shifted(), np.random.default_rng(0).normal(5, 2, size=(100, 2))
    data = load_data({"x": np.random.default_rng(1).normal(size=(100, 5)), "u": u})
    preparation = Preparation.of({"u": (Standardize(),)}, data)
    sample(trained, preparation, data.spec, 3, given={"u": u[0]})
    np.testing.assert_allclose(trained.u, np.tile((u[0] - u.mean(0)) / u.std(0), (3, 1)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, r"conditioned on 'y'; give a value: given=\{'y'"),
        ({"y": 2, "yy": 1}, "'yy' in `given` is no array .* did you mean 'y'"),
        ({"y": 7}, r"must lie in 0\.\.2"),
        ({"y": [1, 2]}, r"shape \(2,\); it needs \(\)"),
        ({"y": 1.5}, "whole numbers"),
        ({"y": "cat"}, "must be numbers"),
        ({"y": 1, "x": np.zeros(4)}, r"shape \(4,\); it needs \(5,\)"),
        ({"y": 1, "x": np.full(5, np.inf)}, "holds Inf"),
        ({"y": 1, "x": ["a"] * 5}, "must be numbers"),
        ({"y": 1, "z": np.zeros(2)}, "no array that the program is conditioned on"),
        ({"y": np.nan}, "NaN"),
    ],
)
def test_bad_given_values_are_told_in_one_sentence(given, says):
    trained = LinearGaussian(classes=3)
    with pytest.raises(ProbgenError, match=says) as error:
        sample(trained, *setting(trained), 5, given=given)
    assert "\n" not in str(error.value)


def test_more_bad_input():
    trained = LinearGaussian()
    with pytest.raises(ProbgenError, match="conditioned on no array"):
        sample(trained, *setting(trained), 5, given={"w": 1})
    with pytest.raises(ProbgenError, match="at least one row"):
        sample(trained, *setting(trained), 0)


def test_every_row_has_its_own_draw_of_a_global_latent():
    """Mean and sd of 4000 draws within 4.5 standard errors (false alarm 2e-5 together)."""
    x = np.random.default_rng(0).normal(3.0, 1.0, size=5)
    trained, data = NormalMean(x), load_data({"x": x})
    draws = sample(trained, Preparation.of({}, data), data.spec, 4000)
    assert draws["theta"].shape == draws["x"].shape == (4000,)
    for name, variance in (("theta", trained.v), ("x", trained.v + 1)):
        assert abs(draws[name].mean() - trained.m) < 4.5 * np.sqrt(variance / 4000)
        assert draws[name].std() == pytest.approx(np.sqrt(variance), rel=4.5 / np.sqrt(8000))


def test_one_prior_draw_of_a_global_latent_serves_all_rows(monkeypatch):
    monkeypatch.setattr(chunks, "NUMBERS", 10)
    x = np.random.default_rng(0).normal(3.0, 1.0, size=50)
    trained, data = NormalMean(x), load_data({"x": x})
    preparation = Preparation.of({}, data)
    draws = sample(trained, preparation, data.spec, 4000, prior=True)
    assert draws["theta"].shape == () and abs(draws["x"].mean() - draws["theta"]) < 4.5 / np.sqrt(4000)
    priors = [sample(trained, preparation, data.spec, 1, seed=s, prior=True)["theta"] for s in range(200)]
    assert np.std(priors) == pytest.approx(2.0, rel=0.25)  # known to 5%: false alarm 6e-7


def test_numbered_sites_are_one_variable():
    z = {f"z_{t}": np.full((4, 2), t) for t in range(1, 13)}
    stacked = stack_numbered({"a": np.zeros(4), **z, "x": np.zeros(4)}, 1)
    assert list(stacked) == ["a", "z", "x"]
    np.testing.assert_array_equal(stacked["z"][0, :, 0], np.arange(1, 13))


@pytest.mark.parametrize(
    "names", [["z_1"], ["z_1", "z_3"], ["z_2", "z_3"], ["z", "z_1", "z_2"], ["z_01", "z_02"], ["z1", "z2"]]
)
def test_other_sites_keep_their_names(names):
    assert numbered(names) == {}


def test_sites_of_different_shapes_keep_their_names():
    values = {"z_1": np.zeros((4, 2)), "z_2": np.zeros((4, 3))}
    assert list(stack_numbered(values, 1)) == ["z_1", "z_2"]


def _observed(*sites):
    plate = (Plate("data", 10, -1, True),)
    return {name: Site(name, "observed", "Normal", (10, *shape), len(shape), plate) for name, shape in sites}


def test_data_sites_find_their_arrays():
    class Shape:
        def __init__(self, *shape):
            self.shape = shape

    spec = {"x": Shape(5), "mask": Shape(), "w": Shape(3, 2)}
    roles = dict.fromkeys(spec, "data")
    assert arrays_of(Structure(_observed(("x", (5,))), {}, arrays=roles), spec) == {"x": "x"}
    assert arrays_of(Structure(_observed(("obs", (5,))), {}, arrays=roles), spec) == {"obs": "x"}
    series = _observed(("w_1", (2,)), ("w_2", (2,)), ("w_3", (2,)))
    assert arrays_of(Structure(series, {}, arrays=roles), spec) == {"w": "w"}
    assert arrays_of(Structure(_observed(("a", (5,)), ("b", (5,))), {}, arrays=roles), spec) == {}
    assert arrays_of(Structure(_observed(("obs", (5,))), {}, arrays={"x": "given"}), spec) == {}
