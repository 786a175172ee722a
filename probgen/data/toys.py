"""Two-dimensional toys with exact log-densities.

Each is a law on R²: Gaussians on centres, p(x) = Σ_k N(x; c_k, σ²I) / K; a Gaussian tube around curves,
p(x) = Σ_a ∫₀¹ N(x; c_a(t), σ²I) dt / A, the integral taken by Gauss–Legendre quadrature to rounding; or a
checkerboard. `ring` and `grid` have the sizes of the PacGAN protocol (Lin et al., arXiv:1712.04086); the others are
those of FFJORD (Grathwohl et al., arXiv:1810.01367) and scikit-learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

ROWS = 10_000
_NODES = 512
_CHUNK = 2048


@dataclass(frozen=True)
class Toy:
    """A law on R²: `sample(n, seed) -> [n, 2]` and its exact `log_prob(x [N, 2]) -> [N]` in nats.

    Gaussians on centres also have their `centres` [K, 2] and their width `sigma`.
    """

    name: str
    draw: Callable[[np.random.Generator, int], np.ndarray]
    log_prob: Callable[[np.ndarray], np.ndarray]
    centres: np.ndarray | None = field(default=None, compare=False)  # arrays neither compare nor hash
    sigma: float | None = None

    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """n independent draws, a pure function of (n, seed)."""
        return self.draw(np.random.default_rng(seed), n)


def _gaussians(name: str, centres: np.ndarray, sigma: float) -> Toy:
    """Equally likely Gaussians of one width."""
    weights = np.full(len(centres), 1 / len(centres))

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return centres[rng.integers(len(centres), size=n)] + sigma * rng.standard_normal((n, 2))

    return Toy(name, draw, lambda x: _log_mixture(x, centres, weights, sigma), centres, sigma)


def _tube(name: str, arms: tuple[Callable[[np.ndarray], np.ndarray], ...], sigma: float) -> Toy:
    """Gaussian noise around curves c_a(t), t uniform on [0, 1], arms equally likely."""

    @lru_cache(maxsize=1)
    def nodes() -> tuple[np.ndarray, np.ndarray]:
        s, weights = _gauss_legendre(_NODES)
        # t = s² keeps curves in √t smooth at 0
        points = np.concatenate([arm(s**2) for arm in arms])
        return points, np.tile(2 * s * weights / len(arms), len(arms))

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        t, arm = rng.random(n), rng.integers(len(arms), size=n)
        curves = np.stack([curve(t) for curve in arms])
        return curves[arm, np.arange(n)] + sigma * rng.standard_normal((n, 2))

    return Toy(name, draw, lambda x: _log_mixture(x, *nodes(), sigma))


def _gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of ∫₀¹ f."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


def _log_mixture(x: np.ndarray, centres: np.ndarray, weights: np.ndarray, sigma: float) -> np.ndarray:
    """log Σ_k w_k N(x; c_k, σ²I), in chunks of rows."""
    x = np.asarray(x, dtype=np.float64)
    constant = np.log(weights) - math.log(2 * math.pi * sigma**2)
    out = np.empty(len(x))
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK, None, :] - centres
        terms = constant - (part**2).sum(-1) / (2 * sigma**2)
        top = terms.max(axis=1)
        out[start : start + _CHUNK] = top + np.log(np.exp(terms - top[:, None]).sum(axis=1))
    return out


def _circle(k: int, radius: float) -> np.ndarray:
    angle = 2 * math.pi * np.arange(k) / k
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _lattice() -> np.ndarray:
    ticks = np.arange(-4.0, 5.0, 2.0)
    return np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2)


def _spiral(sign: float) -> Callable[[np.ndarray], np.ndarray]:
    def curve(t: np.ndarray) -> np.ndarray:
        angle = 3 * math.pi * np.sqrt(t)
        return sign * np.stack([-np.cos(angle), np.sin(angle)], axis=1) * angle[:, None] / 3

    return curve


def _outer_moon(t: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(math.pi * t), np.sin(math.pi * t)], axis=1)


def _inner_moon(t: np.ndarray) -> np.ndarray:
    return np.stack([1 - np.cos(math.pi * t), 0.5 - np.sin(math.pi * t)], axis=1)


def _roll(t: np.ndarray) -> np.ndarray:
    angle = 1.5 * math.pi * (1 + 2 * t)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * angle[:, None] / 5


def _draw_checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    column = rng.integers(-2, 2, size=n)
    row = 2 * rng.integers(-1, 1, size=n) + column % 2
    return 2 * (np.stack([column, row], axis=1) + rng.random((n, 2)))


def _log_checkerboard(x: np.ndarray) -> np.ndarray:
    cell = np.floor(np.asarray(x, dtype=np.float64) / 2)
    inside = (cell >= -2).all(axis=1) & (cell < 2).all(axis=1) & (cell.sum(axis=1) % 2 == 0)
    return np.where(inside, -math.log(32), -np.inf)


TOYS: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        _gaussians("ring", _circle(8, 1.0), 0.01),
        _gaussians("grid", _lattice(), 0.05),
        _gaussians("eight-gaussians", _circle(8, 2 * math.sqrt(2)), math.sqrt(2) / 4),
        Toy("checkerboard", _draw_checkerboard, _log_checkerboard),
        _tube("two-spirals", (_spiral(1.0), _spiral(-1.0)), 0.1),
        _tube("two-moons", (_outer_moon, _inner_moon), 0.1),
        _tube("swiss-roll", (_roll,), 0.2),
    )
}
"""The toys by name."""
