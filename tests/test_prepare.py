"""Preparation: log-Jacobians against autograd, inverses, constants that come back exactly, and refusals."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as drawn_arrays

from probgen.data import load_data
from probgen.data.prepare import Binarize, Dequantize, Logit, Preparation, Scale, Standardize
from probgen.errors import ProbgenError
from probgen.program import Program

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 17, (200, 3, 2)).astype(np.uint8)
REALS = RNG.normal(3.0, [0.1, 2.0, 50.0], (300, 3))

CHAINS = {
    "scale": (Scale(),),
    "scale to [-1, 1]": (Scale(8, 16),),
    "standardize": (Standardize(),),
    "logit": (Scale(-500, 500), Logit(0.01)),
    "all": (Scale(-500, 500), Logit(1e-6), Standardize()),
    "given": (Standardize(mean=1.0, std=2.5),),
}


def prepared(steps, x=REALS):
    return Preparation.of({"x": steps}, load_data({"x": x}))


# ---------------------------------------------------------------------------------------- log-Jacobians


@pytest.mark.parametrize("name", CHAINS)
def test_log_jacobians_equal_the_determinant_by_differences(name):
    preparation = prepared(CHAINS[name])
    x, step = REALS[:5], 1e-5
    _, log_jacobian = preparation.forward({"x": x})
    for n in range(5):
        columns = []
        for d in range(3):
            ends = np.stack([x[n], x[n]])
            ends[0, d] -= step
            ends[1, d] += step
            low, high = preparation.forward({"x": ends})[0]["x"]
            columns.append((high - low) / (2 * step))
        assert log_jacobian[n] == pytest.approx(np.linalg.slogdet(np.array(columns))[1], abs=1e-6)


def test_the_chain_of_an_image_flow_equals_autograd():
    """Dequantize → Scale → Logit written once more in torch, at the same noise."""
    torch = pytest.importorskip("torch")
    preparation = Preparation.of({"x": (Dequantize(), Scale(), Logit(0.05))}, load_data({"x": PIXELS.astype(float)}))
    ready, log_jacobian = preparation.forward({"x": PIXELS[:4].astype(float)}, np.random.default_rng(3))
    noise = np.random.default_rng(3).random((4, 3, 2))

    def chain(raw):
        p = 0.05 + 0.9 * (raw / 17)  # dequantized pixels reach up to 17
        return torch.log(p) - torch.log(1 - p)

    raw = torch.tensor(PIXELS[:4] + noise)
    assert np.allclose(ready["x"], chain(raw), rtol=1e-12)
    for n in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda r: chain(r).reshape(-1), raw[n]).reshape(6, 6)
        assert log_jacobian[n] == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-10)


def test_a_density_keeps_its_units():
    """Normal data through Scale and Logit: log p(y) + log-Jacobian is the density of the raw values, which is one."""
    preparation = prepared((Scale(-40, 46), Logit(1e-3)), REALS[:, :1])
    grid = np.linspace(-30, 36, 200_001)[:, None]
    ready, log_jacobian = preparation.forward({"x": grid})
    y = ready["x"][:, 0]
    log_p = -0.5 * ((y - 0.1) / 0.3) ** 2 - np.log(0.3 * np.sqrt(2 * np.pi))
    assert np.trapezoid(np.exp(log_p + log_jacobian), grid[:, 0]) == pytest.approx(1, abs=1e-6)


def test_only_the_arrays_that_count_are_in_the_log_jacobian():
    data = load_data({"x": REALS, "y": REALS[:, 0]})
    preparation = Preparation.of({"x": Standardize(), "y": Scale(0, 4)}, data)
    both = preparation.forward({"x": REALS, "y": REALS[:, 0]})[1]
    x = preparation.counting(["x"]).forward({"x": REALS, "y": REALS[:, 0]})[1]
    y = preparation.counting(["y"]).forward({"x": REALS, "y": REALS[:, 0]})[1]
    assert np.allclose(y, -np.log(4)) and np.allclose(x, -np.log(REALS.std(0)).sum()) and np.allclose(both, x + y)


# --------------------------------------------------------------------------------------------- inverses


@settings(deadline=None, max_examples=60)
@given(x=drawn_arrays(np.float64, (7, 3), elements=st.floats(-480, 480)), name=st.sampled_from(sorted(CHAINS)))
def test_inverse_of_forward_is_the_identity(x, name):
    preparation = prepared(CHAINS[name])
    ready, _ = preparation.forward({"x": x})
    # 1e-6 / (p (1 − p)) of rounding is what a logit at its ends leaves: p is at least 0.02 here
    assert np.allclose(preparation.inverse(ready)["x"], x, rtol=1e-9, atol=1e-8)


@settings(deadline=None, max_examples=60)
@given(
    x=drawn_arrays(np.uint8, (9, 2)),
    seed=st.integers(0, 2**32 - 1),
    float64=st.booleans(),
)
def test_the_floor_of_dequantized_pixels_is_the_pixels(x, seed, float64):
    raw = x.astype(np.float64) if float64 else x
    preparation = Preparation.of({"x": Dequantize()}, load_data({"x": raw}))
    ready, log_jacobian = preparation.forward({"x": raw}, np.random.default_rng(seed))
    assert np.array_equal(preparation.inverse(ready)["x"], x) and not log_jacobian.any()
    assert (ready["x"] >= x).all() and (ready["x"] < x.astype(float) + 1).all()


def test_dequantized_pixels_never_round_up_to_the_next_integer():
    class Ones:
        def random(self, size, dtype=np.float64):
            return np.full(size, np.nextafter(1, 0))

    pixels = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    preparation = Preparation.of({"x": Dequantize()}, load_data({"x": pixels}))
    ready, _ = preparation.forward({"x": pixels}, Ones())
    assert ready["x"].dtype == np.float32 and np.array_equal(preparation.inverse(ready)["x"], pixels)


def test_the_image_chain_inverts_to_the_pixels():
    preparation = Preparation.of({"x": (Dequantize(), Scale(), Logit())}, load_data({"x": PIXELS.astype(float)}))
    ready, _ = preparation.forward({"x": PIXELS.astype(float)}, np.random.default_rng(1))
    assert np.array_equal(preparation.inverse(ready)["x"], PIXELS)


def test_inverse_takes_any_axes_in_front():
    preparation = prepared(CHAINS["all"])
    ready, _ = preparation.forward({"x": REALS})
    stacked = np.stack([ready["x"].reshape(2, 150, 3)] * 4)
    assert np.allclose(preparation.inverse({"x": stacked})["x"][2], REALS.reshape(2, 150, 3))


# --------------------------------------------------------------------------------------- each step's law


def test_binarize_at_the_middle_of_the_range_or_at_a_threshold():
    data = load_data("digits")
    x = data.train["x"]
    middle = Preparation.of({"x": Binarize()}, data)
    assert np.array_equal(middle.forward({"x": x})[0]["x"], x > 8)
    assert np.array_equal(Preparation.of({"x": Binarize(3.5)}, data).forward({"x": x})[0]["x"], x > 3.5)
    bits = np.array([[0.0, 1.0, 0.25]], np.float32)
    assert np.allclose(middle.inverse({"x": bits})["x"], [[0, 16, 4]])
    assert not middle.forward({"x": x})[1].any() and not middle.random


def test_stochastic_binarization_is_bernoulli_and_anew():
    x = np.repeat(np.array([[0, 4, 12, 16]], np.uint8), 20_000, axis=0)
    preparation = Preparation.of({"x": Binarize(stochastic=True)}, load_data({"x": x}))
    rng = np.random.default_rng(0)
    first, second = (preparation.forward({"x": x}, rng)[0]["x"] for _ in range(2))
    # 4.5 standard errors of a fair share at 20,000 draws: false alarm 1e-5, fixed seed
    assert np.abs(first.mean(0) - [0, 0.25, 0.75, 1]).max() < 4.5 * np.sqrt(0.1875 / 20_000)
    assert first.mean(0)[0] == 0 and first.mean(0)[3] == 1
    assert preparation.random and not np.array_equal(first, second)


def test_standardized_rows_have_mean_zero_and_deviation_one():
    ready, _ = prepared(CHAINS["all"]).forward({"x": REALS})
    assert np.allclose(ready["x"].mean(0), 0, atol=1e-9) and np.allclose(ready["x"].std(0), 1)


def test_constant_elements_are_centred_and_not_scaled_with_one_warning():
    x = REALS.copy()
    x[:, 1] = 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        preparation = prepared((Standardize(),), x)
        ready, log_jacobian = preparation.forward({"x": x})
    assert [str(w.message) for w in caught] == [
        "Standardize: 1 of 3 elements of 'x' are constant over the training rows; they are centred and not scaled"
    ]
    assert np.allclose(ready["x"][:, 1], 0) and np.allclose(log_jacobian, -np.log(x[:, [0, 2]].std(0)).sum())
    assert np.allclose(preparation.inverse(ready)["x"], x)


def test_steps_are_fitted_on_the_training_rows_alone():
    data = load_data({"x_train": REALS[:200], "x_valid": REALS[200:250] + 1e3, "x_test": REALS[250:] - 1e3})
    (step,) = Preparation.of({"x": Standardize()}, data).steps["x"]
    assert np.allclose(step.mean, REALS[:200].mean(0)) and np.allclose(step.std, REALS[:200].std(0))


def test_the_spec_of_prepared_arrays():
    data = load_data("digits")
    chain = Preparation.of({"x": (Dequantize(), Scale(), Logit(0.05))}, data)
    spec = chain.spec(data.spec)
    end = np.log(0.95 / 0.05)
    assert spec["x"].range == pytest.approx((-end, end)) and spec["x"].dtype == "float32" and spec["y"].classes == 10
    bits = Preparation.of({"x": Binarize()}, data).spec(data.spec)["x"]
    assert bits.range == (0.0, 1.0) and np.allclose(bits.mean, (data.train["x"] > 8).mean(0))
    assert chain.spec(data.spec)["x"].shape == (8, 8)


# --------------------------------------------------------------------------------------- the law of dtypes


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.zeros((4, 3), np.uint8), "float32"),
        (np.zeros((4, 3), bool), "float32"),
        (np.zeros(4, np.uint8), "int64"),
        (np.zeros(4, bool), "bool"),
        (np.zeros(4, np.int32), "int64"),
        (np.zeros((4, 3), np.int32), "int64"),
        (np.zeros((4, 3), np.int64), "int64"),
        (np.zeros((4, 3), np.float32), "float32"),
        (np.zeros((4, 3), np.float64), "float64"),
    ],
)
def test_pixels_and_bits_are_floats_labels_are_integers_and_floats_stay(array, dtype):
    data = load_data({"x": array})
    preparation = Preparation.of({}, data)
    assert preparation.forward({"x": array})[0]["x"].dtype == dtype
    assert preparation.spec(data.spec)["x"].dtype == dtype


def test_a_prepared_array_keeps_the_precision_of_a_float():
    for raw, dtype in ((PIXELS, "float32"), (PIXELS.astype("float32"), "float32"), (PIXELS.astype(float), "float64")):
        data = load_data({"x": raw})
        preparation = Preparation.of({"x": Scale()}, data)
        assert preparation.forward({"x": raw})[0]["x"].dtype == dtype == preparation.spec(data.spec)["x"].dtype


# --------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize(
    "steps",
    [*CHAINS.values(), (Binarize(),), (Binarize(5.0, stochastic=True),), (Dequantize(), Scale(), Logit())],
    ids=str,
)
def test_constants_come_back_exactly(steps):
    x = np.round(REALS) if isinstance(steps[0], Dequantize) else REALS
    preparation = prepared(steps, x).counting(["x"])
    again = Preparation.from_json(json.loads(json.dumps(preparation.to_json())))
    assert again == preparation
    one, other = (p.forward({"x": x}, np.random.default_rng(5)) for p in (preparation, again))
    assert one[0]["x"].tobytes() == other[0]["x"].tobytes() and one[1].tobytes() == other[1].tobytes()
    assert again.prepared["x"].mean.tobytes() == preparation.prepared["x"].mean.tobytes()


def test_a_program_takes_one_step_or_several():
    data = load_data({"x": REALS})
    for prepare in ({"x": Scale()}, {"x": [Scale(), Standardize()]}):
        program = Program(lambda x: None, prepare=prepare)
        assert Preparation.of(program.prepare, data).forward({"x": REALS})[0]["x"].shape == REALS.shape


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prepare", "x", "says"),
    [
        ({"w": Scale()}, REALS, "prepares an array 'w', and the data has x"),
        ({"x": Scale}, REALS, "is not a step: use .* with parentheses"),
        ({"x": "scale"}, REALS, "is not a step"),
        ({"x": Dequantize()}, REALS, "Dequantize.* needs integers, and 'x'"),
        ({"x": Logit()}, REALS, r"Logit.* takes values in \[0, 1\], and 'x'"),
        ({"x": Scale()}, np.ones((4, 2)), "Scale: the range of 'x' is 1..1, which is empty"),
        ({"x": Scale(3, 3)}, REALS, "range of 'x' is 3..3"),
        ({"x": Binarize()}, np.ones((4, 2)), "Binarize: the range of 'x'"),
        ({"x": Binarize(99)}, PIXELS, r"Binarize\(threshold=99\) makes every value of 'x' equal"),
    ],
)
def test_steps_that_cannot_be_done_are_refused(prepare, x, says):
    with pytest.raises(ProbgenError, match=says) as caught:
        Preparation.of(prepare, load_data({"x": x}))
    assert "\n" not in str(caught.value)


def test_values_outside_the_logits_interval_are_refused_later_too():
    preparation = prepared((Scale(), Logit()))
    with pytest.raises(ProbgenError, match="bounds that hold every value"):
        preparation.forward({"x": REALS + 1000})


def test_bad_constants_are_refused():
    for make in (lambda: Logit(0.5), lambda: Logit(0), lambda: Standardize(std=0.0)):
        with pytest.raises(ProbgenError):
            make()
    with pytest.raises(ProbgenError, match="did you mean 'Scale'"):
        Preparation.from_json({"steps": {"x": [{"step": "Scales"}]}, "prepared": {}, "counted": None})
    preparation = prepared((Dequantize(),), np.round(REALS))
    with pytest.raises(ProbgenError, match=r"pass a `numpy\.random\.Generator`"):
        preparation.forward({"x": REALS})
