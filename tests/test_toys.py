"""The toys: each density against an independent integral, and each sampler against its density."""

import itertools
import math

import numpy as np
import pytest

from probgen.data import load_data
from probgen.data.toys import TOYS

BOX = {  # holds all but ~1e-9 of the mass
    "ring": (-1.1, 1.1),
    "grid": (-4.5, 4.5),
    "eight-gaussians": (-5.5, 5.5),
    "checkerboard": (-4.0, 4.0),
    "two-spirals": (-4.0, 4.0),
    "two-moons": (-2.0, 3.0),
    "swiss-roll": (-5.0, 5.0),
}


def cells(name: str, per_axis: int) -> tuple[np.ndarray, float]:
    """Midpoints of a square grid over the box, and the area of a cell."""
    low, high = BOX[name]
    width = (high - low) / per_axis
    ticks = low + width * (np.arange(per_axis) + 0.5)
    return np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2), width**2


@pytest.mark.parametrize("name", TOYS)
def test_the_density_integrates_to_one(name):
    # the midpoint rule converges faster than any power for these smooth tubes; their widths are > 1.5 cells
    points, area = cells(name, {"ring": 500, "grid": 300, "two-spirals": 150, "two-moons": 100}.get(name, 100))
    assert np.exp(TOYS[name].log_prob(points)).sum() * area == pytest.approx(1, abs=1e-4)


CURVES = {
    # (arms of c(t), width), written independently of the package
    "two-spirals": (
        [
            lambda t, s=s: (-s * math.cos(a := 3 * math.pi * math.sqrt(t)) * a / 3, s * math.sin(a) * a / 3)
            for s in (1, -1)
        ],
        0.1,
    ),
    "two-moons": (
        [
            lambda t: (math.cos(math.pi * t), math.sin(math.pi * t)),
            lambda t: (1 - math.cos(math.pi * t), 1 - math.sin(math.pi * t) - 0.5),
        ],
        0.1,
    ),
    "swiss-roll": (
        [lambda t: tuple((a := 1.5 * math.pi * (1 + 2 * t)) * f(a) / 5 for f in (math.cos, math.sin))],
        0.2,
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_tubes_density_equals_adaptive_quadrature(name):
    from scipy.integrate import quad

    arms, sigma = CURVES[name]
    low, high = BOX[name]
    points = np.concatenate([TOYS[name].sample(12, seed=1), np.random.default_rng(0).uniform(low, high, (6, 2))])

    def density(t, x, arm):
        c = arm(t)
        return math.exp(-((x[0] - c[0]) ** 2 + (x[1] - c[1]) ** 2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)

    for x, log_p in zip(points, TOYS[name].log_prob(points), strict=True):
        cuts = np.linspace(0, 1, 41)
        truth = sum(
            quad(density, a, b, args=(x, arm), epsabs=1e-15, epsrel=1e-11)[0]
            for arm in arms
            for a, b in itertools.pairwise(cuts)
        ) / len(arms)
        assert math.exp(log_p) == pytest.approx(truth, rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("name", TOYS)
def test_the_sampler_follows_the_density(name):
    """Pearson's chi-square over coarse cells whose probabilities come from the density."""
    n, coarse, fine = 40_000, 12, {"ring": 40, "grid": 25}.get(name, 20)
    points, area = cells(name, coarse * fine)
    mass = (np.exp(TOYS[name].log_prob(points)) * area).reshape(coarse, fine, coarse, fine).sum((1, 3)).ravel()
    low, high = BOX[name]
    x = TOYS[name].sample(n, seed=11)
    counts = np.histogram2d(*x.T, bins=coarse, range=[(low, high)] * 2)[0].ravel()
    used = mass * n >= 10
    expected = np.append(mass[used], 1 - mass[used].sum()) * n
    observed = np.append(counts[used], n - counts[used].sum())
    keep = expected > 1
    statistic = ((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    from scipy.stats import chi2

    # false alarm 1e-5 for each toy, fixed seed
    assert chi2.sf(statistic, keep.sum() - 1) > 1e-5


@pytest.mark.parametrize("name", TOYS)
def test_the_mean_log_density_of_draws_is_the_negative_entropy(name):
    points, area = cells(name, {"ring": 500, "grid": 300, "two-spirals": 150}.get(name, 120))
    log_p = TOYS[name].log_prob(points)
    p = np.exp(log_p)
    negative_entropy = (p[p > 0] * log_p[p > 0]).sum() * area
    drawn = TOYS[name].log_prob(TOYS[name].sample(10_000, seed=5))
    # 5 standard errors: false alarm 6e-7, fixed seed
    assert abs(drawn.mean() - negative_entropy) < 5 * drawn.std() / 100 + 1e-6


def test_the_sizes_of_the_pacgan_protocol():
    ring, grid = TOYS["ring"].sample(100_000), TOYS["grid"].sample(100_000)
    angle = 2 * np.pi * np.arange(8) / 8
    for x, centres, sigma in (
        (ring, np.c_[np.cos(angle), np.sin(angle)], 0.01),
        (grid, np.array([(i, j) for i in (-4, -2, 0, 2, 4) for j in (-4, -2, 0, 2, 4)]), 0.05),
    ):
        distance = np.linalg.norm(x[:, None] - centres, axis=-1)
        assert len(np.unique(distance.argmin(1))) == len(centres)
        # P(within 3σ) = 1 − e^(−4.5) = 0.98889 ± 0.00033; 5 standard errors, false alarm 6e-7
        assert abs((distance.min(1) < 3 * sigma).mean() - (1 - math.exp(-4.5))) < 5 * 0.00033


def test_load_data_gives_toys_with_their_density():
    for name, toy in TOYS.items():
        data = load_data(name)
        assert data.train["x"].shape == (8000, 2) and data.train["x"].dtype == np.float64
        x = data.test["x"]
        assert np.array_equal(data.log_prob(x), toy.log_prob(x)) and np.isfinite(data.log_prob(x)).all()
        assert data.fingerprint == load_data(name).fingerprint
        assert not np.array_equal(toy.sample(5, seed=0), toy.sample(5, seed=1))


def test_far_away_the_log_density_stays_finite():
    for name in set(TOYS) - {"checkerboard"}:
        assert np.isfinite(TOYS[name].log_prob(np.array([[1e3, -1e3]]))).all()
    assert TOYS["checkerboard"].log_prob(np.array([[5.0, 0.0], [1.0, 3.0], [1.0, 1.0]])).tolist() == [
        -np.inf,
        -np.inf,
        -math.log(32),
    ]
