"""Timing side by side: contenders take turns in one process, so what slows the machine slows them all.

A round times one block of steps of every contender, in an order that turns from round to round. Two contenders of
one round are a pair; what is reported is the median of the pairs' ratios with a bootstrap interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Ratio:
    """The median over pairs of time(a) / time(b), and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    pairs: int

    @property
    def equal(self) -> bool:
        """Whether the interval holds 1."""
        return self.low <= 1 <= self.high

    def __str__(self) -> str:
        words = f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"
        return f"equal, {words}" if self.equal else words


def ratio(a: np.ndarray, b: np.ndarray, resamples: int = 4000, seed: int = 0) -> Ratio:
    """Of paired times a[i], b[i]: how many times as long a takes as b."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError("pairs need two equally long lists of times")
    each = a / b
    drawn = np.random.default_rng(seed).integers(len(each), size=(resamples, len(each)))
    low, high = np.quantile(np.median(each[drawn], axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(np.median(each)), float(low), float(high), len(each))


def rounds(
    contenders: Mapping[str, tuple[Callable[[int], object], int]],
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds a step of every contender in each of `count` rounds.

    A contender is (run, steps): `run(steps)` takes that many steps. Each is run twice unmeasured first.
    """
    names = list(contenders)
    for run, steps in contenders.values():
        run(steps)
        run(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(count):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run, steps = contenders[name]
            began = clock()
            run(steps)
            times[name].append((clock() - began) / steps)
    return {name: np.array(values) for name, values in times.items()}
