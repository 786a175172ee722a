"""Whole numbers 0..L−1 that lie evenly in −1..1, and the Gaussian's mass in the bin of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probgen.arrays import namespace

FAR = 1e6  # standard deviations: where the outermost bins end


def log_mass(value: Any, loc: Any, scale: Any, levels: int, log_ndtr: Callable[[Any], Any]) -> Any:
    """log [Φ((e_{k+1} − μ) / σ) − Φ((e_k − μ) / σ)] at k = `value`; `log_ndtr` is the backend's log Φ."""
    xp = namespace(loc, scale)
    center, half = value * (2 / (levels - 1)) - 1, 1 / (levels - 1)
    low = xp.where(value <= 0, -FAR, (center - half - loc) / scale)
    high = xp.where(value >= levels - 1, FAR, (center + half - loc) / scale)
    turned = low > 0  # the two tails are alike, and small numbers are exact in the lower one
    low, high = xp.where(turned, -high, low), xp.where(turned, -low, high)
    log_high = log_ndtr(high)
    return log_high + xp.log1p(-xp.exp(log_ndtr(low) - log_high))


def nearest(x: Any, levels: int) -> Any:
    """The whole numbers that are nearest to x in −1..1."""
    xp = namespace(x)
    return xp.clip(xp.round((x + 1) * ((levels - 1) / 2)), 0, levels - 1)
