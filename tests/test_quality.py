"""Distances between samples and data, against closed forms and quadrature."""

from __future__ import annotations

import numpy as np
import pytest

import probgen
from probgen.errors import ProbgenError
from probgen.evaluate.quality import frechet, mmd2, quality, sliced_wasserstein


def normal(n, mean, scale, seed):
    return mean + scale * np.random.default_rng(seed).normal(size=(n, len(np.atleast_1d(mean))))


def test_sliced_wasserstein_of_a_shift():
    """W₁ of a shift by v along θ is |θ·v|; in the plane its mean over directions is 2 |v| / π."""
    x, shift = normal(500, np.zeros(2), 1.0, 0), np.array([0.6, -0.8])
    assert abs(sliced_wasserstein(x + shift, x, directions=20_000) - 2 / np.pi) < 0.01
    assert sliced_wasserstein(x, x) == 0


def test_mmd_of_two_gaussians():
    """E k between N(0, 1) and N(m, 1) with a kernel of width h is h / √(h² + 2) exp(−m² / 2(h² + 2)), averaged over three widths.

    The estimate is unbiased: mean over 40 repetitions within 4 SE (false alarm 6e-5), and that of equal laws about zero.
    """
    for m in (0.0, 1.0):
        widths = np.array([0.5, 1.0, 2.0])
        scale = widths / np.sqrt(widths**2 + 2)
        true = np.mean(2 * scale - 2 * scale * np.exp(-(m**2) / (2 * (widths**2 + 2))))
        found = [mmd2(normal(200, [0.0], 1.0, 2 * i), normal(200, [m], 1.0, 2 * i + 1), 1.0) for i in range(40)]
        assert abs(np.mean(found) - true) < 4 * np.std(found) / np.sqrt(40)


def test_frechet_of_two_gaussians():
    """|μ_a − μ_b|² + Σ (√c_a − √c_b)² of diagonal covariances, from 200,000 rows."""
    a, b = normal(200_000, np.zeros(2), np.array([1.0, 2.0]), 0), normal(200_000, np.ones(2), np.array([1.5, 1.0]), 1)
    assert abs(frechet(a, b) - (2 + 0.25 + 1)) < 0.03


def test_quality_tells_good_from_bad():
    """Of digits: real rows are at the floor, blurred ones and shuffled pixels are far above, in every distance."""
    data = probgen.load_data("digits")
    x, y = (np.concatenate([data.train[:][n], data.valid[:][n]]) for n in ("x", "y"))
    real, other, labels = x[:700], x[700:1400], y[700:1400]
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(real.reshape(700, 64), axis=1).reshape(real.shape)
    good, bad = probgen.quality(x[-600:], real, other, labels), probgen.quality(shuffled, real, other, labels)
    for name in ("sliced_wasserstein", "mmd2", "fd_classifier"):
        floor = good[f"{name}_floor"]
        assert bad[name] > 5 * abs(good[name]) and bad[name] > 5 * abs(floor)
    assert abs(good["sliced_wasserstein"] / good["sliced_wasserstein_floor"] - 1) < 0.5


def test_sets_that_do_not_compare_are_refused():
    with pytest.raises(ProbgenError, match=r"ten rows or more of one shape"):
        probgen.quality(np.zeros((20, 2)), np.zeros((20, 3)), np.zeros((20, 2)))


def test_rows_that_are_not_finite_and_labels_that_do_not_fit_are_refused():
    rows = np.random.default_rng(0).normal(size=(40, 3))
    lost = np.where(np.arange(120).reshape(40, 3) == 7, np.nan, rows)
    with pytest.raises(ProbgenError, match="1 of 40 rows of samples are not finite"):
        quality(lost, rows, rows)
    with pytest.raises(ProbgenError, match="39 `labels` of 40 rows"):
        quality(rows, rows, rows, labels=np.arange(39) % 2)
    with pytest.raises(ProbgenError, match="ten rows or more of each class"):
        quality(rows, rows, rows, labels=np.arange(40) == 0)
