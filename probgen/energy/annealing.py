r"""log Z of a density p(x) ψ(x) / Z by annealed importance sampling, from p, which can be drawn from, to p ψ.

.. math::
    Z = \operatorname{E} \exp \sum_k (\beta_k - \beta_{k-1}) \log \psi(x_{k-1}), \qquad x_0 \sim p, \quad
    x_k \text{ from } x_{k-1} \text{ by steps that leave } p\, \psi^{\beta_k} \text{ as it is}

The steps are Langevin's, adjusted. The temperatures β and the steps' sizes are chosen by a population of chains of its own,
which is drawn anew from itself by weight; the chains that count come after, so that their mean weight is unbiased.

References:
    | Annealed importance sampling (Neal, 2001), Statistics and Computing 11
    | Toward automatic model comparison (Zhou, Johansen & Aston, 2016), for the choice of β
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from probgen.chunks import seed_at
from probgen.energy.langevin import TARGET, chosen, log_ratio, moved
from probgen.errors import ProbgenError

PILOTS = 200  # chains by which temperatures are chosen
KEPT = 0.999  # share of their effective size that one temperature may leave
MOVES = 3  # steps at each temperature
MOST = 2000  # temperatures
FIRST_SIZE = 0.1

Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Path:
    """Temperatures from 0 to 1, [K + 1], and the size of the steps at each but the first, [K]."""

    temperatures: np.ndarray
    sizes: np.ndarray


def log_weights(
    draw: Callable[[int, int], np.ndarray], parts: Callable[[np.ndarray], Parts], number: int, seed: int
) -> tuple[np.ndarray, Path]:
    """Logs of `number` independent unbiased estimates of Z, [number], and the path that they took.

    `draw(n, seed)` gives rows of p, [n, ...]; `parts(x)` log p and log ψ of rows, [n] each, and their gradients.
    """
    path = _path(draw(PILOTS, seed_at(seed, 0)), parts, np.random.default_rng(seed_at(seed, 1)))
    rng, x = np.random.default_rng(seed_at(seed, 2)), draw(number, seed_at(seed, 3))
    place, found = (x, *parts(x)), np.zeros(number)
    for low, high, size in zip(path.temperatures, path.temperatures[1:], path.sizes, strict=False):
        found += (high - low) * place[2]
        for _ in range(MOVES):
            place, _ = _move(place, parts, high, size, rng)
    return found, path


def _path(x: np.ndarray, parts: Callable[[np.ndarray], Parts], rng: np.random.Generator) -> Path:
    """Temperatures that are as far apart as the weights allow, and sizes by the share of the steps that is accepted."""
    place, temperatures, sizes, size = (x, *parts(x)), [0.0], [], FIRST_SIZE
    while temperatures[-1] < 1:
        if len(temperatures) > MOST:
            raise ProbgenError(
                f"log Z: {MOST:,} temperatures do not lead from the program without its factors to the one with them: they "
                "are too far apart for annealed importance sampling"
            )
        high = _next(temperatures[-1], place[2])
        weights = _relative((high - temperatures[-1]) * place[2])
        taken = rng.choice(len(x), len(x), p=weights / weights.sum())
        place = tuple(part[taken] for part in place)
        for _ in range(MOVES):
            place, share = _move(place, parts, high, size, rng)
            size *= float(np.exp(0.5 * (share - TARGET)))
        temperatures.append(high)
        sizes.append(size)
    return Path(np.array(temperatures), np.array(sizes))


def _next(low: float, log_psi: np.ndarray) -> float:
    """The largest β, up to 1, at which the weights ψ^{β − low} still have the share `KEPT` of their effective size."""
    ends = [low, 1.0]
    if _effective((1 - low) * log_psi) >= KEPT:
        return 1.0
    for _ in range(40):
        middle = sum(ends) / 2
        ends[0 if _effective((middle - low) * log_psi) >= KEPT else 1] = middle
    return max(ends[0], low + 1e-6)


def _relative(log_weights: np.ndarray) -> np.ndarray:
    return np.exp(log_weights - log_weights.max())


def _effective(log_weights: np.ndarray) -> float:
    """(Σ w)² / (n Σ w²)."""
    weights = _relative(log_weights)
    return float(weights.sum() ** 2 / (weights**2).sum() / len(weights))


def _move(
    place: tuple[np.ndarray, ...],
    parts: Callable[[np.ndarray], Parts],
    beta: float,
    size: float,
    rng: np.random.Generator,
) -> tuple[tuple[np.ndarray, ...], float]:
    """One step of all chains that leaves p ψ^β as it is, and the share that was accepted."""

    def tempered(place: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, log_p, log_psi, score_p, score_psi = place
        return x, log_p + beta * log_psi, score_p + beta * score_psi

    x, _, score = here = tempered(place)
    y = moved(x, score, rng.normal(size=x.shape), size)
    there = (y, *parts(y))
    with np.errstate(invalid="ignore", over="ignore"):
        taken = np.log(rng.random(len(x))) < log_ratio(here, tempered(there), size)
    return chosen(taken, there, place), float(taken.mean())
