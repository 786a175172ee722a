"""The feed: which rows make up which training batch, prepared.

The order of an epoch is a pure function of (seed, epoch) and random preparation of (seed, step), so a run that stops
anywhere goes on with the same batches, however they are chunked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from probgen.data import Rows
from probgen.data.prepare import Preparation
from probgen.errors import ProbgenError

_ORDER, _STEP, _ROW = 0, 1, 2  # what a stream of random numbers is for


class Feed:
    """Training batches of `rows`: `batch_size` rows a step (None, or at least N: all of them, in their own order)."""

    def __init__(self, rows: Rows, preparation: Preparation, batch_size: int | None, seed: int = 0) -> None:
        if not len(rows):
            raise ProbgenError(f"there are no training rows in {rows.where}: give it at least one")
        if batch_size is not None and batch_size < 1:
            raise ProbgenError(f"`batch_size` is {batch_size}: it must be at least 1, or None for all rows")
        self.rows = len(rows)
        self.batch_size = self.rows if batch_size is None else min(int(batch_size), self.rows)
        self.steps_per_epoch = self.rows // self.batch_size
        self.preparation, self.seed = preparation, seed
        self._rows = rows
        self._epoch, self._order = -1, np.empty((0, 0), np.int64)
        self._resident: dict[str, np.ndarray] | None = None

    def indices(self, first: int, last: int) -> np.ndarray:
        """Rows of the steps first, ..., last − 1: int64 [last − first, batch_size]."""
        per_epoch, parts = self.steps_per_epoch, []
        while True:
            epoch, offset = divmod(first, per_epoch)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._shuffled(epoch)
            stop = min(last - first, per_epoch - offset)
            parts.append(self._order[offset : offset + stop])
            first += stop
            if first >= last:
                return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self.batch_size == self.rows:
            return np.arange(self.rows, dtype=np.int64)[None]
        order = _generator(self.seed, _ORDER, epoch).permutation(self.rows)
        return order[: self.steps_per_epoch * self.batch_size].reshape(self.steps_per_epoch, self.batch_size)

    def resident(self) -> dict[str, np.ndarray] | None:
        """All prepared rows, where they are in memory and the same at every pass; else None."""
        if self.preparation.random or not self._rows.in_memory:
            return None
        if self._resident is None:
            whole = {name: self._rows[name] for name in self._rows.names}
            self._resident, _ = self.preparation.forward(whole)
        return self._resident

    def batches(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Prepared batches of the steps first, ..., last − 1: each array [last − first, batch_size, ...]."""
        indices = self.indices(first, last)
        resident = self.resident()
        if resident is not None:
            return {name: array[indices] for name, array in resident.items()}
        raw = self._rows[indices.reshape(-1)]
        streams = [_generator(self.seed, _STEP, step) for step in range(first, last)] if self.preparation.random else []
        flat, _ = self.preparation.forward(raw, _Streams(streams))
        return {name: array.reshape(*indices.shape, *array.shape[1:]) for name, array in flat.items()}

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The prepared batch of one step."""
        return {name: array[0] for name, array in self.batches(step, step + 1).items()}


def evaluation_batches(
    rows: Rows, preparation: Preparation, batch_size: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]]:
    """All rows in order, the short last batch included: (indices, prepared arrays, log-Jacobian [B]).

    Random preparation is a function of (seed, row), so that a number does not depend on the batch size.
    """
    for start in range(0, len(rows), batch_size):
        indices = np.arange(start, min(start + batch_size, len(rows)))
        streams = [_generator(seed, _ROW, row) for row in indices] if preparation.random else []
        arrays, log_jacobian = preparation.forward(rows[indices], _Streams(streams))
        yield indices, arrays, log_jacobian


class _Streams:
    """Several generators as one: each fills its equal share of the rows."""

    def __init__(self, streams: Sequence[np.random.Generator]) -> None:
        self._streams = streams

    def random(self, size: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
        """Uniform draws in [0, 1)."""
        each = (size[0] // len(self._streams), *size[1:])
        if len(self._streams) == 1:
            return self._streams[0].random(each, dtype=dtype)
        return np.concatenate([stream.random(each, dtype=dtype) for stream in self._streams])


def _generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, int(number))))
