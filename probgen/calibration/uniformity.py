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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

GRID = 100  # points at most at which an ECDF is compared with its band
KS, BAND = 1e-4, 0.99  # what a site's p-value must exceed, and how surely a calibrated site lies in its band
SURE = 3.0  # standard errors from which a shift or a width is put in words


@dataclass(frozen=True)
class Calibration:
    """The ranks of simulated truths, [simulations, ...] in 0..draws by latent site, and what they say.

    A site passes if the Kolmogorov-Smirnov p-value of its normalised ranks exceeds 1e-4 and their ECDF lies inside the
    simultaneous 99 % band. Where it holds several numbers both are those of its worst one with Bonferroni's correction,
    so that a calibrated site fails in at most 1 % of all seeds.
    """

    ranks: Mapping[str, np.ndarray]
    draws: int
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def normalised(self) -> dict[str, np.ndarray]:
        """The ranks as numbers in (0, 1), uniform where the site is calibrated: [simulations, ...]."""
        rng = np.random.default_rng(self.protocol.get("seed", 0))
        return {name: normalised(values, self.draws, rng) for name, values in self.ranks.items()}

    @cached_property
    def components(self) -> dict[str, dict[str, np.ndarray]]:
        """The normalised ranks of each number of each site, [simulations], by the number's name."""
        return {
            site: {_component(site, at): values[(slice(None), *at)] for at in np.ndindex(values.shape[1:])}
            for site, values in self.normalised.items()
        }

    @cached_property
    def ks_pvalue(self) -> dict[str, float]:
        """The smallest p-value of each site's numbers, times how many they are."""
        found = {site: [ks_pvalue(u) for u in parts.values()] for site, parts in self.components.items()}
        return {site: min(1.0, min(values) * len(values)) for site, values in found.items()}

    @cached_property
    def inside_band(self) -> dict[str, bool]:
        """Whether the ECDFs of all numbers of a site lie in the band that holds them together with 99 %."""
        return {
            site: all(inside(u, self.level(site)) for u in parts.values()) for site, parts in self.components.items()
        }

    def level(self, site: str) -> float:
        """The probability of the band of one number, so that those of the site lie in theirs with 99 %."""
        return 1 - (1 - BAND) / len(self.components[site])

    @cached_property
    def passed(self) -> bool:
        """Whether every site is calibrated, as far as these simulations can tell."""
        return all(map(self.site_passed, self.ranks))

    def site_passed(self, site: str) -> bool:
        """Whether one site is."""
        return self.inside_band[site] and self.ks_pvalue[site] > KS

    @cached_property
    def verdicts(self) -> dict[str, str]:
        """A sentence on each site: calibrated, or in what way it is not, and the cure."""
        return {site: self._verdict(site) for site in self.ranks}

    def _verdict(self, site: str) -> str:
        count = self.protocol.get("simulations", len(self.ranks[site]))
        if self.site_passed(site):
            return f"calibrated, as far as {count:,} simulations can tell"
        name = min(self.components[site], key=lambda n: ks_pvalue(self.components[site][n]))
        failing = [n for n, u in self.components[site].items() if not inside(u, self.level(site))]
        if failing and name not in failing:
            name = failing[0]
        words, cure = in_words(self.components[site][name], bool(self.protocol.get("guide", True)))
        return f"the posterior of {name} is {words}: {cure}"

    def __str__(self) -> str:
        """A table: a line for each site, and how it was measured."""
        rows = [("site", "numbers", "KS p", "ECDF in band", "")]
        for site, parts in self.components.items():
            inside_band = "yes" if self.inside_band[site] else "NO"
            rows.append((site, str(len(parts)), f"{self.ks_pvalue[site]:.2g}", inside_band, self.verdicts[site]))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        return "\n".join(["Simulation-based calibration", *(line.rstrip() for line in lines), self.said])

    @property
    def said(self) -> str:
        """How it was measured, in one line."""
        how = self.protocol
        parts = [f"{how['simulations']:,} simulations", f"{self.draws} draws each"] if "simulations" in how else []
        parts += [str(how["posterior"])] if "posterior" in how else []
        return "; ".join([*parts, "band of 99 % for all numbers of a site together", f"seed {how.get('seed', 0)}"])


def in_words(values: np.ndarray, guide: bool = True) -> tuple[str, str]:
    """What the shape of normalised ranks [S] says of the posteriors, and what helps.

    U-shaped ranks are those of posteriors that are too narrow, hump-shaped ones of too wide; truths that lie high
    among the draws are those of posteriors that are biased down.
    """
    shift, width, shift_z, width_z = shape(values)
    words = []
    if width_z > SURE:
        words.append(f"too narrow (under-dispersed; the true one is about {width:.2g} times as wide)")
    if width_z < -SURE:
        words.append(f"too wide (over-dispersed; the true one is about {width:.2g} times as wide)")
    if abs(shift_z) > SURE:
        way = "down" if shift > 0 else "up"
        words.append(f"biased {way} (by about {abs(shift):.2g} of its standard deviations)")
    if not words:
        words.append("of another shape than the true one")
    if not guide:
        return " and ".join(words), "sample longer, with more warm-up, and see that the chains agree"
    if width_z > SURE:
        cure = (
            "let the guide know how latents depend on one another (AutoMultivariateNormal, a flow, draws that follow "
            "draws), or train it longer"
        )
    else:
        cure = "train the guide longer, or give it a larger family: a deeper encoder, a flow"
    return " and ".join(words), cure


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


def _component(site: str, at: tuple[int, ...]) -> str:
    return f"{site}[{', '.join(map(str, at))}]" if at else site
