"""Ranks of simulated truths among draws of their posterior: whether they are uniform, and if not, in what way.

    r = #{s : z_s < z*},   u = (r + v) / (L + 1),   v ~ U(0, 1)

Where the L draws come from the posterior, u is uniform on (0, 1) exactly, for discrete latents too (ties are broken
at random). The band of the ECDF holds it whole with the stated probability.

References:
    | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
      https://arxiv.org/abs/1804.06788
    | Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and Multiple Sample
      Comparison (Säilynoja, Bürkner and Vehtari, 2022), https://arxiv.org/abs/2103.10522
"""

from __future__ import annotations

import functools

import numpy as np

GRID = 100  # points at most at which an ECDF is compared with its band


def ranks(truth: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many of `draws` [L, S, ...] lie below `truth` [S, ...], each tie counting with its toss: [S, ...] in 0..L."""
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + rng.integers(0, ties + 1)


def normalised(ranks: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Ranks as numbers that are uniform on (0, 1) if the ranks are uniform on 0..draws."""
    return (ranks + rng.random(ranks.shape)) / (draws + 1)


def ecdf(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The share of `values` [S] at or below each point of the grid."""
    return np.searchsorted(np.sort(values), grid, side="right") / len(values)


@functools.lru_cache(maxsize=64)
def band(simulations: int, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grid [G], lower and upper ends [G] of the band that holds the ECDF of uniform numbers with probability `level`.

    Pointwise binomial intervals of one coverage, the largest whose simultaneous coverage reaches `level`. That one is
    computed exactly, by the recursion over the grid, and not simulated.
    """
    points = min(simulations, GRID)
    grid = np.arange(1, points) / points
    low, high = np.log((1 - level) / (2 * points)), np.log(1 - level)  # Bonferroni is too strict, one point too lax
    for _ in range(18):
        middle = (low + high) / 2
        within = _coverage(simulations, grid, *_interval(simulations, grid, np.exp(middle))) >= level
        low, high = (middle, high) if within else (low, middle)
    lower, upper = _interval(simulations, grid, np.exp(low))
    return grid, lower / simulations, upper / simulations


def inside(values: np.ndarray, level: float) -> bool:
    """Whether the ECDF of `values` [S] lies in the band of `level`."""
    grid, lower, upper = band(len(values), level)
    share = ecdf(values, grid)
    return bool(np.all((share >= lower - 1e-9) & (share <= upper + 1e-9)))


def ks_pvalue(values: np.ndarray) -> float:
    """P-value of the Kolmogorov-Smirnov test that `values` [S] are uniform on (0, 1)."""
    from scipy.stats import kstest

    return float(kstest(values, "uniform").pvalue)


def shape(values: np.ndarray) -> tuple[float, float, float, float]:
    """Shift and width of Φ⁻¹(u) with the z-score of each: what posterior would have given such ranks.

    For Gaussians the true posterior lies `shift` of the drawn one's standard deviations above it, and is `width`
    times as wide. Where most truths lie beyond all draws on one side the width says nothing, and is 1.
    """
    from scipy.stats import norm

    scores = norm.ppf(np.clip(values, 1e-9, 1 - 1e-9))
    shift, width, count = float(scores.mean()), float(scores.std()), len(values)
    if width < 1 and abs(shift) > 1.5:
        return shift, 1.0, shift * np.sqrt(count), 0.0
    return shift, width, shift * np.sqrt(count) / max(width, 1e-9), np.log(max(width, 1e-9)) * np.sqrt(2 * count)


def _interval(simulations: int, grid: np.ndarray, outside: float) -> tuple[np.ndarray, np.ndarray]:
    """Counts between which a binomial count lies but for the probability `outside`, at each point."""
    from scipy.stats import binom

    return binom.ppf(outside / 2, simulations, grid).astype(int), binom.ppf(1 - outside / 2, simulations, grid).astype(
        int
    )


def _coverage(simulations: int, grid: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """P(lower_i ≤ #{u ≤ grid_i} ≤ upper_i for all i): the counts are a Markov chain with binomial steps."""
    from scipy.special import gammaln

    log_factorial = gammaln(np.arange(simulations + 2) + 1.0)
    counts, mass, before = np.array([0]), np.array([1.0]), 0.0
    for point, low, high in zip(grid, lower, upper, strict=True):
        p = (point - before) / (1 - before)
        reached = np.arange(low, high + 1)
        left, step = simulations - counts[:, None], reached[None] - counts[:, None]
        possible = (step >= 0) & (step <= left)
        step = np.where(possible, step, 0)
        log_pmf = log_factorial[left] - log_factorial[step] - log_factorial[left - step]
        log_pmf = log_pmf + step * np.log(p) + (left - step) * np.log1p(-p)
        mass = mass @ np.where(possible, np.exp(log_pmf), 0.0)
        counts, before = reached, point
    return float(mass.sum())
