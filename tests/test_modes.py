"""Mode coverage against a perfect sampler, a collapsed one, and numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import ncx2

import probgen
from probgen.data.toys import TOYS
from probgen.errors import ProbgenError
from probgen.evaluate.modes import class_coverage, mode_coverage

GAUSSIANS = ("ring", "grid", "eight-gaussians")
rng = np.random.default_rng


@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_perfect_sampler_meets_its_floors(name):
    """High quality within 4 SE of 1 − e^(−9/2), the KL's mean over 40 draws within 4 SE of (K − 1) / 2N (false alarm 6e-5 each).

    Neighbours of `eight-gaussians` are so near that a stray of one may be taken for the other: a noncentral χ² says how often.
    """
    found = [mode_coverage(TOYS[name].sample(2500, seed), name) for seed in range(40)]
    k = found[0]["of"]
    assert k == {"ring": 8, "grid": 25, "eight-gaussians": 8}[name]
    assert all(f["modes"] == k for f in found)
    floor = 1 - np.exp(-4.5)
    assert found[0]["high_quality_floor"] == pytest.approx(floor)
    apart = cdist(TOYS[name].centres[:1], TOYS[name].centres[1:])[0] / TOYS[name].sigma
    floor += ncx2.cdf(9, 2, apart**2).sum()
    shares = np.array([f["high_quality"] for f in found])
    assert abs(shares.mean() - floor) < 4 * np.sqrt(floor * (1 - floor) / (40 * 2500))
    assert np.mean([f["high_quality_se"] for f in found]) == pytest.approx(shares.std(ddof=1), rel=0.5)
    kls = np.array([f["reverse_kl"] for f in found])
    assert found[0]["reverse_kl_floor"] == pytest.approx((k - 1) / 5000)
    assert abs(kls.mean() - (k - 1) / 5000) < 4 * kls.std(ddof=1) / np.sqrt(40)


def test_a_collapsed_sampler():
    """One mode, and KL(one ‖ uniform) = log K, whatever the quality."""
    centre = TOYS["grid"].centres[7]
    found = probgen.mode_coverage(centre + 0.05 * rng(0).normal(size=(500, 2)), "grid")
    assert (found["modes"], found["of"], found["reverse_kl"]) == (1, 25, pytest.approx(np.log(25)))
    assert found["high_quality"] > 0.97


def test_by_hand():
    """Five samples, two modes on a line. A far sample counts for the KL and not for the modes; the weights are the true shares."""
    centres, samples = [[0.0], [10.0]], np.array([[0.0], [1.0], [-2.9], [3.1], [14.0]])
    found = mode_coverage(samples, centres, std=1.0, weights=[0.75, 0.25])
    assert (found["modes"], found["high_quality"]) == (1, 0.6)
    assert found["reverse_kl"] == pytest.approx(0.8 * np.log(0.8 / 0.75) + 0.2 * np.log(0.2 / 0.25))
    assert found["reverse_kl_floor"] == pytest.approx(1 / 10)
    assert found["high_quality_floor"] == pytest.approx(0.9973, abs=1e-4)
    wider = mode_coverage(samples, centres, std=1.0, within=4.0)
    assert (wider["modes"], wider["high_quality"]) == (2, 1.0)


def test_too_narrow_modes_are_seen_by_w1_alone():
    """A sampler of the centres themselves is perfect in modes and quality. W₁ to true samples costs the width: E|z| = σ √(π/2)."""
    true = TOYS["eight-gaussians"].sample(1600, 0)
    centres, sigma = TOYS["eight-gaussians"].centres, TOYS["eight-gaussians"].sigma
    narrow = centres[np.arange(800) % 8]
    found = mode_coverage(narrow, "eight-gaussians", true=true)
    assert (found["modes"], found["high_quality"], found["reverse_kl"]) == (8, 1.0, 0.0)
    assert found["w1"] > sigma * np.sqrt(np.pi / 2) - 4 * sigma * np.sqrt((2 - np.pi / 2) / 800)  # 4 SE
    assert found["w1"] > 1.3 * found["w1_floor"]
    perfect = mode_coverage(TOYS["eight-gaussians"].sample(800, 1), "eight-gaussians", true=true)
    assert perfect["w1"] / perfect["w1_floor"] == pytest.approx(1, abs=0.3)
    assert perfect["w1_floor"] == found["w1_floor"]


def test_true_samples_are_halved():
    """Of four true rows the first two are compared with the samples, and with the last two."""
    true = np.array([[0.0], [1.0], [5.0], [6.0]])
    found = mode_coverage(np.array([[2.0], [3.0], [9.0]]), [[0.0], [9.0]], std=1.0, true=true)
    assert (found["w1"], found["w1_floor"]) == (2.0, 5.0)


def test_classes():
    """A perfect sampler of 1,000 classes with 26,000 samples finds all, and 2N · KL is about χ² with 999 degrees (4 SE)."""
    found = class_coverage(rng(0).integers(1000, size=26_000), 1000)
    assert (found["modes"], found["of"]) == (1000, 1000)
    assert found["reverse_kl_floor"] == pytest.approx(0.0192, abs=5e-5)
    assert abs(2 * 26_000 * found["reverse_kl"] - 999 * (1 + 1000 / (6 * 26_000))) < 4 * np.sqrt(2 * 999)
    few = class_coverage(np.array([3, 3, 5, 5]), 10)
    assert (few["modes"], few["reverse_kl"]) == (2, pytest.approx(np.log(5)))
    skewed = class_coverage(np.array([0, 0, 0, 1]), 2, weights=[0.75, 0.25])
    assert skewed["reverse_kl"] == 0


def test_the_toys_say_where_their_modes_are():
    """The log-density at a centre is that of its own Gaussian, where the others are far."""
    for name in ("ring", "grid"):
        toy = TOYS[name]
        peak = -np.log(len(toy.centres)) - np.log(2 * np.pi * toy.sigma**2)
        np.testing.assert_allclose(toy.log_prob(toy.centres), peak, atol=1e-9)
    assert {name for name, toy in TOYS.items() if toy.centres is not None} == set(GAUSSIANS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mode_coverage(np.zeros((9, 2)), "two-moons"), r"'two-moons' is no toy of Gaussians"),
        (lambda: mode_coverage(np.zeros((9, 2)), "rings"), r"did you mean 'ring'"),
        (lambda: mode_coverage(np.zeros((9, 2)), np.eye(2)), r"their std, here None: give both"),
        (lambda: mode_coverage(np.zeros((9, 3)), "ring"), r"samples has shape \(9, 3\), .* \[N, 2\]"),
        (lambda: mode_coverage(np.full((9, 2), np.nan), "ring"), r"9 of 9 rows of samples are not finite"),
        (lambda: class_coverage(np.array([0, 10]), 10), r"run from 0 to 10, and 10 classes from 0 to 9"),
        (lambda: class_coverage(np.array([0.5]), 10), r"labels are integers \[N\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ProbgenError, match=message):
        call()
