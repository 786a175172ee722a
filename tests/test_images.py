"""Image measures against closed forms, and set measures against their expectations."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from probgen.errors import ProbgenError
from probgen.evaluate import images
from probgen.evaluate.images import inception_scores, kid, lpips, mse, precision_recall_density_coverage, psnr, ssim
from probgen.evaluate.quality import quality

rng = np.random.default_rng


def test_a_constant_offset():
    """Of x and x + c: MSE c², PSNR −20 log₁₀ c; of flat images a and a + c, SSIM = (2 a (a + c) + c₁) / (a² + (a + c)² + c₁)."""
    x = 0.5 * rng(0).random((3, 1, 16, 16))
    offset = np.array([0.1, 0.01, 0.5])
    y = x + offset[:, None, None, None]
    np.testing.assert_allclose(mse(x, y), offset**2)
    np.testing.assert_allclose(psnr(x, y), -20 * np.log10(offset))
    flat = np.full((3, 3, 16, 16), 0.3)
    expected = (2 * 0.3 * (0.3 + offset) + 1e-4) / (0.3**2 + (0.3 + offset) ** 2 + 1e-4)
    np.testing.assert_allclose(ssim(flat, flat + offset[:, None, None, None]), expected)
    assert psnr(x, x)[0] == np.inf and np.all(ssim(x, x) == 1)


def test_ssim_of_scaled_contrast():
    """Of x = ½ + a s and y = ½ + b s, s = ±1 by turns: means ½, variances a², b², covariance a b, as every window sees them."""
    s = np.indices((20, 20)).sum(0) % 2 * 2 - 1
    a, b, c2 = 0.4, 0.1, 9e-4
    expected = (2 * a * b + c2) / (a**2 + b**2 + c2)
    assert ssim((0.5 + a * s)[None], (0.5 + b * s)[None])[0] == pytest.approx(expected, rel=1e-3)
    opposite = ssim((0.5 + a * s)[None], (0.5 - a * s)[None])[0]
    assert opposite == pytest.approx((-2 * a**2 + c2) / (2 * a**2 + c2), rel=1e-3)
    assert ssim((0.5 + a * s)[None, :8, :8], (0.5 + b * s)[None, :8, :8])[0] == pytest.approx(expected, rel=1e-3)


def test_ranges():
    """Bytes, floats and counts up to `top` of the same images have the same numbers."""
    x, y = (rng(seed).integers(0, 17, (2, 8, 8)) * 15 for seed in (0, 1))
    for measure in (mse, psnr, ssim):
        floats = measure(x / 255, y / 255)
        np.testing.assert_allclose(measure(x.astype(np.uint8), y.astype(np.uint8)), floats)
        np.testing.assert_allclose(measure(x // 15, y // 15, top=17), measure(x / 15 / 17, y / 15 / 17))


def alexnet(path):
    """A file as torchvision's, with random weights."""
    g, state = rng(0), {}
    for place, (out, into, side) in {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3)}.items():
        weight = g.normal(size=(out, into, side, side)) / np.sqrt(into * side**2)
        state[f"features.{place}.weight"] = torch.from_numpy(weight.astype(np.float32))
        state[f"features.{place}.bias"] = torch.from_numpy((0.1 * g.normal(size=out)).astype(np.float32))
    weight = g.normal(size=(256, 256, 3, 3)) / np.sqrt(256 * 9)
    state["features.10.weight"] = torch.from_numpy(weight.astype(np.float32))
    state["features.10.bias"] = torch.from_numpy((0.1 * g.normal(size=256)).astype(np.float32))
    torch.save(state, path)
    return g


def test_lpips(tmp_path):
    """The numbers are those of torchmetrics 1.9 with the AlexNet of torchvision 0.28 and the same weights."""
    x, y = alexnet(tmp_path / "alex.pth").random((2, 3, 3, 64, 64))
    np.testing.assert_allclose(lpips(x, y, tmp_path / "alex.pth"), [0.0990411, 0.09539996, 0.09823173], rtol=1e-5)
    assert np.all(lpips(x, x, tmp_path / "alex.pth") == 0)
    grey = x[:, :1]
    found = lpips(grey, y[:, :1], tmp_path / "alex.pth")
    np.testing.assert_allclose(found, lpips(np.repeat(grey, 3, 1), np.repeat(y[:, :1], 3, 1), tmp_path / "alex.pth"))


def test_kid_of_two_gaussians():
    """Of N(0, 1) and N(m, 1): E (x y + 1)³ = E x³ E y³ + 3 E x² E y² + 3 E x E y + 1. Unbiased: 60 repetitions, 4 SE (6e-5)."""
    for m in (0.0, 1.0):
        moments = np.array([[1, 0, 1, 0], [1, m, m**2 + 1, m**3 + 3 * m]])  # E x^0 .. x^3 of both
        between = [(moments[i] * moments[j] * [1, 3, 3, 1]).sum() for i, j in ((0, 0), (1, 1), (0, 1))]
        draws = [(rng(2 * i).normal(size=(100, 1)), rng(2 * i + 1).normal(m, 1, size=(140, 1))) for i in range(60)]
        found = np.array([kid(x, y, subsets=5, seed=i)[0] for i, (x, y) in enumerate(draws)])
        assert abs(found.mean() - (between[0] + between[1] - 2 * between[2])) < 4 * found.std(ddof=1) / np.sqrt(60)


def test_kid_divides_by_the_dimension():
    """Features repeated D times are the same inner product over D; the deviation is that of the subsets."""
    x, y = rng(0).normal(size=(60, 1)), rng(1).normal(size=(60, 1)) + 1
    mean, deviation = kid(x, y)
    assert kid(np.repeat(x, 4, 1), np.repeat(y, 4, 1)) == pytest.approx((mean, deviation))
    values = [kid(x, y, subsets=1, seed=seed)[0] for seed in range(200)]
    assert np.std(values) == pytest.approx(deviation, rel=0.3)
    assert kid(x, y, size=60)[1] == pytest.approx(0, abs=1e-12)  # each subset is the whole


def test_of_two_sets_of_one_law():
    """Density 1 and coverage 1 − Π (N − 1 − i) / (N + M − 1 − i), in any space: means of 40 pairs within 4 SE (6e-5 each)."""
    n, m, k = 100, 150, 3
    found = [
        precision_recall_density_coverage(rng(2 * i).normal(size=(n, 3)), rng(2 * i + 1).normal(size=(m, 3)), k)
        for i in range(40)
    ]
    coverage = 1 - np.prod([(n - 1 - i) / (n + m - 1 - i) for i in range(k)])
    for name, expected in (("density", 1.0), ("coverage", coverage)):
        values = np.array([f[name] for f in found])
        assert abs(values.mean() - expected) < 4 * values.std(ddof=1) / np.sqrt(40)


def test_extremes():
    """Far away: nothing. One of two modes: precise, half recalled, half covered. Two where one is real: half precise."""
    left, right = rng(0).normal(size=(200, 2)), rng(1).normal(size=(200, 2)) + 100
    again, both = rng(2).normal(size=(200, 2)), np.concatenate([left[:100], right[:100]])
    assert set(precision_recall_density_coverage(left, right).values()) == {0}
    found = precision_recall_density_coverage(both, again)
    assert found["precision"] > 0.8 and found["density"] > 0.8
    assert 0.4 < found["recall"] <= 0.5 and 0.4 < found["coverage"] <= 0.5
    found = precision_recall_density_coverage(again, both)
    assert 0.4 < found["precision"] <= 0.5 and found["recall"] > 0.8
    same = precision_recall_density_coverage(left, left)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] == pytest.approx(6 / 5)  # each of five neighbours' balls, and its own


def test_by_hand():
    """On a line, k = 1: real 0, 1, 5 with radii 1, 1, 4; fake 2, 9 with radii 7, 7."""
    found = precision_recall_density_coverage([[0.0], [1.0], [5.0]], [[2.0], [9.5]], k=1)
    assert found == {"precision": 0.5, "recall": 1.0, "density": 1.0, "coverage": pytest.approx(2 / 3)}


class Inception(torch.nn.Module):
    """In the place of the network: 2 features of an image, its mean red and its mean green, in tenths of white."""

    def __init__(self, feature, feature_extractor_weights_path, antialias):
        super().__init__()
        assert (feature, antialias) == (2048, False)
        self.inception = self
        self.fc = torch.nn.Linear(2, 2)
        self.fc.load_state_dict(torch.load(feature_extractor_weights_path))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return x.float().mean((2, 3))[:, :2] / 25.5


def test_inception_scores_with_the_users_network(tmp_path, monkeypatch):
    """Two kinds of images that the network is sure of, equally many: the score is 2, whatever the bias; FID by its formula."""
    from torchmetrics.image import fid

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setattr(fid, "FrechetInceptionDistance", Inception)
    weights = tmp_path / "inception.pth"
    torch.save({"weight": 100 * torch.eye(2), "bias": torch.tensor([1e6, 0.0])}, weights)
    samples = np.zeros((400, 3, 8, 8))
    samples[:200, 0], samples[200:, 1] = 1.0, 1.0
    found = inception_scores(samples, 0.2 + 0.6 * samples, weights)
    assert found["inception_score"] == pytest.approx(2, abs=0.15) and found["inception_score"] <= 2 + 1e-9
    # features ±5 about 5 along one diagonal: the real ones have 0.6 of the spread, and the same mean
    variance = 50 * 400 / 399
    assert found["fid"] == pytest.approx(variance * (1 - 0.6) ** 2, rel=1e-3)
    assert found["kid"] > 4 * found["kid_std"] > 0
    assert inception_scores(samples, samples, weights)["fid"] == pytest.approx(0, abs=1e-4)


def test_quality_tells_a_lost_class_by_recall():
    """Three clouds, of which samples have two: precise, and a third neither recalled nor covered. Real rows are at the floor."""
    centres = 4 * np.eye(3)
    labels = np.arange(600) % 3
    real, other, again = (centres[labels] + 0.5 * rng(seed).normal(size=(600, 3)) for seed in range(3))
    lost, good = quality(real[labels < 2], again, other, labels), quality(real, again, other, labels)
    for name in ("recall", "coverage"):
        assert abs(lost[name] - 2 / 3 * lost[f"{name}_floor"]) < 0.1 < lost[f"{name}_floor"] - lost[name]
    for name in ("precision", "recall", "density", "coverage"):
        assert good[name] == pytest.approx(good[f"{name}_floor"], abs=0.1)
    assert lost["precision"] == pytest.approx(lost["precision_floor"], abs=0.1)
    assert lost["kid_classifier"] > 10 * abs(lost["kid_classifier_floor"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mse(np.zeros((2, 4, 4)), np.zeros((2, 4, 5))), r"these sets have shapes \(2, 4, 4\) and \(2, 4, 5\)"),
        (lambda: psnr(np.full((2, 4, 4), 9.0), np.zeros((2, 4, 4))), r"run from 9 to 9 and not from 0 to 1, .* `top`"),
        (lambda: psnr(np.zeros((2, 4, 4)), np.full((2, 4, 4), -1.0)), r"second images run from -1 to -1"),
        (lambda: mse(np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4))), r"uint8 and float64 have two ranges"),
        (lambda: mse(np.zeros((2, 4)), np.zeros((2, 4))), r"\[N, C, H, W\] or \[N, H, W\]"),
        (lambda: mse(np.full((2, 4, 4), 16), np.zeros((2, 4, 4), int)), r"brightest value is 16: give .* `top`"),
        (lambda: ssim(np.zeros((1, 4, 4)), np.zeros((1, 4, 4))), r"reaches 5 pixels .* smaller sigma"),
        (
            lambda: lpips(*np.zeros((2, 1, 1, 64, 64)), "no.pth"),
            r"lpips finds no file 'no\.pth': .* nothing is downloaded",
        ),
        (lambda: inception_scores(*np.zeros((2, 20, 3, 8, 8)), "no.pth"), r"inception_scores finds no file 'no\.pth'"),
        (lambda: inception_scores(*np.zeros((2, 20, 2, 8, 8)), "no.pth"), r"1 or 3 channels, and these have 2"),
        (lambda: kid(np.zeros((9, 2)), np.zeros((9, 3))), r"features \[N, D\] of one network"),
        (lambda: kid(np.zeros((9, 2)), np.zeros((9, 2)), size=10), r"10 of 9 and 9 were asked for"),
        (lambda: precision_recall_density_coverage(np.zeros((5, 2)), np.zeros((9, 2))), r"5 nearest .* 5 and 9 rows"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ProbgenError, match=message):
        call()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ProbgenError, match=r"pip install 'probgen\[quality\]'"):
        images.ssim(np.zeros((1, 16, 16)), np.zeros((1, 16, 16)))
