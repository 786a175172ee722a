"""One step of Langevin's chain, for draws from a density that is known up to a constant.

    y = x + h/2 ∇ log p(x) + √h ε,   ε ~ N(0, I)
    adjusted:  accepted with probability min(1, p(y) q(x | y) / (p(x) q(y | x))),   q(y | x) = N(x + h/2 ∇ log p(x), h I)

Adjusted, p is exactly stationary. Unadjusted it is so as h → 0: on N(0, C) in one dimension the chain's variance is
C / (1 − h / 4C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from probgen.arrays import namespace, rows_sum, spread
from probgen.energy.settings import refuse_no_bool, refuse_not_positive, refuse_not_whole

TARGET = 0.57  # the acceptance at which chains of many dimensions mix best (Roberts & Rosenthal, 1998)
GAIN = 0.1

Density = Callable[[Any], tuple[Any, Any]]
Place = tuple[Any, Any, Any, Any]


@dataclass(frozen=True)
class Langevin:
    """`steps` of Langevin's chain for every row, from a draw of the program run as it is (its factors left out).

    `step_size` is h. With `adjusted`, steps are accepted or refused so that the density itself is stationary (MALA); if it
    `adapts`, h follows in the first half of the steps the share that is accepted. Chains that start apart seldom meet: the weights of modes far
    from each other are those of the start.

    References:
        | Exponential convergence of Langevin distributions (Roberts & Tweedie, 1996), Bernoulli 2
    """

    steps: int = 1000
    step_size: float = 0.1
    adjusted: bool = True
    adapts: bool = True

    def __post_init__(self) -> None:
        refuse_not_whole("Langevin", 1, steps=self.steps)
        refuse_not_positive("Langevin", step_size=self.step_size)
        refuse_no_bool("Langevin", adjusted=self.adjusted, adapts=self.adapts)

    def start(self, density: Density, x: Any) -> Place:
        """Rows x [B, ...], log p(x) [B], ∇ log p(x) [B, ...] and h, from which `move` goes on."""
        log_p, score = density(x)
        return x, log_p, score, self.step_size

    def move(self, density: Density, place: Place, noise: Any, log_uniform: Any, step: Any) -> Place:
        """One step of all rows; `density(x)` gives log p [B] and its gradient, `log_uniform` [B] decides who is accepted."""
        x, log_p, score, h = place
        y = moved(x, score, noise, h)
        there = density(y)
        if not self.adjusted:
            return y, *there, h
        taken = log_uniform < log_ratio((x, log_p, score), (y, *there), h)
        x, log_p, score = chosen(taken, (y, *there), (x, log_p, score))
        if not self.adapts:
            return x, log_p, score, h
        xp, gain = namespace(x), GAIN * (step < self.steps // 2)
        return x, log_p, score, h * xp.exp(gain * (xp.where(taken, 1.0, 0.0).mean() - TARGET))


def moved(x: Any, score: Any, noise: Any, h: Any) -> Any:
    """x + h/2 · score + √h · noise; h may be one number for each row."""
    return x + spread(h / 2, x) * score + spread(h**0.5, x) * noise


def log_ratio(here: tuple[Any, Any, Any], there: tuple[Any, Any, Any], h: Any) -> Any:
    """log p(y) q(x | y) / (p(x) q(y | x)) of rows, from (x, log p(x), ∇ log p(x)) and the same of y, [B]."""
    (x, log_x, score_x), (y, log_y, score_y) = here, there
    back, on = (rows_sum((a - moved(b, score, 0.0, h)) ** 2) for a, b, score in ((x, y, score_y), (y, x, score_x)))
    return log_y - log_x - (back - on) / (2 * h)


def chosen(taken: Any, there: tuple[Any, ...], here: tuple[Any, ...]) -> tuple[Any, ...]:
    """`there` in the rows that are taken, `here` in the others."""
    xp = namespace(here[0])
    return tuple(xp.where(spread(taken, b), a, b) for a, b in zip(there, here, strict=True))
