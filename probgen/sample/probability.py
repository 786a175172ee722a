r"""`probability` and `expectation`: Monte Carlo estimates with their standard errors.

.. math::
    \operatorname{E} f(x) \approx \frac1n \sum_i f(x_i), \qquad
    \mathrm{SE}^2 = \frac1{n^2} \sum_g \Big( \sum_{i \in g} f(x_i) - \bar f \Big)^2

over groups g of draws that share their global latents (one draw each, where there are none). An event that hardly ever
happens is importance-sampled where the program's density is exact: see `rare`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.chunks import particles, pieces, seed_at
from probgen.errors import ProbgenError
from probgen.sample import sample_in_groups
from probgen.sample.rare import HITS, rare_probability, refusal

Draws = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A mean over draws: `value` with its standard error `se`, from `n` draws worth `ess` independent ones.

    `value` and `se` are arrays where the function has several values. `method` says how it was estimated.
    """

    value: Any
    se: Any
    n: int
    ess: Any
    method: str

    def __str__(self) -> str:
        if np.ndim(self.value):
            pairs = zip(np.ravel(self.value), np.ravel(self.se), strict=True)
            return f"[{', '.join(_written(v, e) for v, e in pairs)}]"
        return _written(self.value, self.se)


def _written(value: float, se: float) -> str:
    """Value ± error to the first two digits of the error; small ones with a power of ten."""
    if not (math.isfinite(se) and se > 0):
        return f"{value:.6g} ± {se:.2g}"
    if 0 < abs(value) < 1e-4:
        exponent = math.floor(math.log10(abs(value)))
        return f"({_written(value / 10.0**exponent, se / 10.0**exponent)})e{exponent:+03d}"
    places = max(0, 1 - math.floor(math.log10(se)))
    return f"{value:.{places}f} ± {se:.{places}f}"


def probability(
    trained: Any,
    preparation: Any,
    spec: Mapping[str, Any],
    event: Callable[[Draws], Any],
    n: int = 100_000,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
    prior: bool = False,
) -> Estimate:
    """P(event) under the trained program, or given known entries of the data.

    `event` takes draws as `sample` returns them and gives `n` booleans, or `n` real scores, the event being
    score > 0. Where fewer than 100 of the draws of a score lie in the event, it is importance-sampled: in programs
    of real-valued data whose density is exact. Of an event that never happened the standard error is 1 / n.

    Raises:
        ProbgenError: `event` does not give one number a draw.
    """
    found, groups = _evaluated(trained, preparation, spec, event, n, seed, given, prior, "event")
    if found.ndim != 1:
        raise ProbgenError(
            f"probability: `event` returned the shape {found.shape}; it must give one value a draw, ({n},)"
        )
    hits = found > 0
    if hits.sum() < HITS and not hits.all():
        reason = (
            ""
            if found.dtype.kind == "f"
            else "return a real score, the event being score > 0, to have it importance-sampled"
        )
        reason = reason or refusal(trained, given)
        estimate = None if reason else rare_probability(trained, preparation, spec, event, n, seed, given)
        if estimate is not None:
            return Estimate(*estimate, method=f"importance sampling from Gaussian mixtures, {n:,} draws")
        reason = reason or "no proposal reached it"
        warnings.warn(
            f"probability: the event happened in {hits.sum()} of {n:,} draws, so its probability is only roughly known: "
            f"{reason}",
            stacklevel=3,
        )
    return _mean(hits.astype(np.float64), groups, least=1 / n)


def expectation(
    trained: Any,
    preparation: Any,
    spec: Mapping[str, Any],
    function: Callable[[Draws], Any],
    n: int = 100_000,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
    prior: bool = False,
) -> Estimate:
    """E f under the trained program, or given known entries of the data; `function` maps draws to [n] or [n, ...].

    Raises:
        ProbgenError: `function` does not give one value a draw, or one that is not finite.
    """
    found, groups = _evaluated(trained, preparation, spec, function, n, seed, given, prior, "function")
    if not np.isfinite(found).all():
        raise ProbgenError("expectation: `function` returned NaN or Inf for some draws, so it has no mean")
    return _mean(found.astype(np.float64), groups)


def _evaluated(
    trained: Any,
    preparation: Any,
    spec: Mapping[str, Any],
    function: Callable[[Draws], Any],
    n: int,
    seed: int,
    given: Mapping[str, Any] | None,
    prior: bool,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The function at `n` draws, a bounded number at a time, and the group of each."""
    if int(n) != n or n < 2:
        raise ProbgenError(f"`n` is {n!r}, and an error estimate needs at least 2 draws")
    whole = trained.structure.has_global_latents
    values, groups, first = [], [], 0
    for i, size in enumerate(pieces(n, n if whole else particles(trained.structure))):
        rows = {key: _rows(value, spec, key, n, first, size) for key, value in (given or {}).items()}
        draws, group = sample_in_groups(trained, preparation, spec, size, seed_at(seed, i), rows, prior)
        values.append(checked(function(draws), size, name))
        groups.append(group + first)
        first += size
    return np.concatenate(values), np.concatenate(groups)


def _rows(value: Any, spec: Mapping[str, Any], name: str, n: int, first: int, size: int) -> Any:
    """The rows of a given array that belong to a piece of the draws; one value for all stays as it is."""
    each = name in spec and np.shape(value) == (n, *spec[name].shape)
    return np.asarray(value)[first : first + size] if each else value


def checked(values: Any, n: int, name: str) -> np.ndarray:
    """What a function of the draws returned, which must have one entry a draw."""
    found = np.asarray(values)
    if found.ndim == 0 or len(found) != n or found.dtype.kind not in "biuf":
        raise ProbgenError(
            f"`{name}` returned {found.dtype} of shape {found.shape} for {n} draws; it must give numbers, one (or one row) "
            "a draw"
        )
    return found


def _mean(values: np.ndarray, groups: np.ndarray, least: float = 0.0) -> Estimate:
    """The mean of values [n, ...] with the standard error of groups that share their global latents."""
    n, mean = len(values), values.mean(0)
    _, which = np.unique(groups, return_inverse=True)
    sums = np.zeros((which.max() + 1, *values.shape[1:]))
    np.add.at(sums, which.reshape(-1), values - mean)
    G = len(sums)
    se = np.sqrt((sums**2).sum(0) * (G / max(1, G - 1))) / n
    variance = values.var(0)
    ess = np.full(mean.shape, float(n)) if n == G else np.where(se > 0, variance / np.maximum(se, 1e-300) ** 2, n)
    se = np.where(variance > 0, se, least)
    method = f"Monte Carlo, {n:,} draws" + (f" in {G:,} groups of one draw of the global latents" if n > G else "")
    plain = (lambda a: float(a)) if mean.ndim == 0 else np.asarray
    return Estimate(plain(mean), plain(se), n, plain(ess), method)
