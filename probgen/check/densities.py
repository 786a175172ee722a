"""The total mass of an exact program's density: by quadrature on the line and the plane, by enumeration of bits.

On the real line x = c + s u / (1 − u²) maps (−1, 1) onto all of it, so that no tail is cut off.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

_LINE, _PLANE, _BITS, _CHUNK = 4001, 601, 12, 4096


def total_mass(subject: Any) -> float | str:
    """∫ p(x) dx or Σ p(x) over the one data array, or a sentence that says why it is not computed."""
    names = [name for name in subject.structure.arrays]
    sites = list(subject.structure.observed.values())
    if len(names) != 1 or len(sites) != 1:
        return "only the density of a single data array is summed up"
    (name,), (site,) = names, sites
    batch = subject.arrays[name]
    dims = int(np.prod(batch.shape[1:]))
    if "bool" in site.support.lower():
        if dims > _BITS:
            return f"the density of {dims} bits has too many terms to sum"
        points = np.array(list(itertools.product((0, 1), repeat=dims)))
        return float(np.exp(_log_density(subject, name, points)).sum())
    if site.discrete or dims > 2:
        return f"a density in {dims} dimensions is not integrated" if not site.discrete else "it is no density of bits"
    points, log_volume = _grid(batch.reshape(len(batch), -1).astype(np.float64))
    return float(np.exp(_log_density(subject, name, points) + log_volume).sum())


def _grid(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of all space, and the logarithm of the volume that each stands for."""
    dims = rows.shape[1]
    n = _LINE if dims == 1 else _PLANE
    u = (np.arange(n) + 0.5) / n * 2 - 1
    center, scale = np.median(rows, 0), np.maximum(rows.std(0), 1e-3)
    axes = [c + s * u / (1 - u**2) for c, s in zip(center, scale, strict=True)]
    volume = [np.log(s * (1 + u**2) / (1 - u**2) ** 2 * 2 / n) for s in scale]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, dims)
    return points, sum(np.meshgrid(*volume, indexing="ij")).reshape(-1)


def _log_density(subject: Any, name: str, points: np.ndarray) -> np.ndarray:
    like = subject.arrays[name]
    rows = points.reshape(len(points), *like.shape[1:]).astype(like.dtype)
    parts = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
    found = [subject.trained.log_weights({name: part}, 1, subject.seed)[0] for part in parts]
    log_p = np.concatenate(found).astype(np.float64)
    return np.where(np.isnan(log_p), -np.inf, log_p)  # so far out that the arithmetic overflows
