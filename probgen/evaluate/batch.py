"""What every part of an evaluation sees: one batch of rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from probgen.chunks import pieces, seed_at


@dataclass(frozen=True)
class Batch:
    """Prepared rows, their log |d prepared / d raw|, their row numbers, and the seed of this batch."""

    arrays: Mapping[str, np.ndarray]
    log_jacobian: np.ndarray
    indices: np.ndarray
    seed: int

    def __len__(self) -> int:
        return len(self.indices)

    def draws(self, number: int, particles: int, place: int) -> list[tuple[int, int]]:
        """`number` draws for every row in pieces that fit into memory: pairs of (size, seed)."""
        sizes = pieces(number, max(1, particles // len(self)))
        return [(size, seed_at(self.seed, place, i)) for i, size in enumerate(sizes)]


def mean_and_error(name: str, rows: np.ndarray) -> dict[str, float]:
    """The mean over rows with its standard error, sd / √n (left out for a single row)."""
    numbers = {name: float(rows.mean())}
    if len(rows) > 1:
        numbers[f"{name}_se"] = float(rows.std(ddof=1) / np.sqrt(len(rows)))
    return numbers
