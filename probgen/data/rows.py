"""Rows: named arrays with one row per datum, and the spec that describes each array.

rows["x"]                             # the whole array
rows[np.array([3, 1, 4])]             # {name: these rows}; only they are read where the data lies on disk
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probgen.data.tables import Arrays, Table
from probgen.errors import ProbgenError, did_you_mean

_SAMPLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ArraySpec:
    """What one array looks like: the shape of a row, dtype, range, classes, mean.

    `range` is (lowest, highest) over the training rows; `classes` is the number of classes of an integer per row
    (−1 counts as missing), else None; `mean` is the mean training row in float64. Where the data is too large to be
    read at once these come from a sample. Two specs are equal when all but their means are.
    """

    shape: tuple[int, ...]
    dtype: str
    range: tuple[float, float]
    classes: int | None = None
    mean: np.ndarray = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    def __str__(self) -> str:
        shape = f"{list(self.shape)} " if self.shape else ""
        low, high = self.range
        values = f"{self.classes} classes" if self.classes else f"{low:.4g}..{high:.4g}"
        return f"{shape}{self.dtype} {values}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives back the same spec exactly."""
        mean = None if self.mean is None else np.asarray(self.mean).tolist()
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "range": list(self.range),
            "classes": self.classes,
            "mean": mean,
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> ArraySpec:
        """The spec that `to_json` wrote."""
        mean = None if obj["mean"] is None else np.asarray(obj["mean"], dtype=np.float64)
        low, high = obj["range"]
        return cls(tuple(obj["shape"]), obj["dtype"], (float(low), float(high)), obj["classes"], mean)


class Specs(dict[str, ArraySpec]):
    """What is known of each array, by name; a program that asks for one that there is not is told so."""

    def __missing__(self, name: str) -> ArraySpec:
        near = did_you_mean(str(name), self)
        raise ProbgenError(
            f"the program asks for the array {name!r}, and the data has {', '.join(map(repr, self))}"
            f"{near if 'mean' in near else ''}: rename the array, or name it in the program as it is in the data"
        )


class Rows:
    """Named arrays with one row per datum: `rows["x"]` is a whole array, `rows[indices]` a batch of all of them."""

    def __init__(self, table: Table, index: np.ndarray | None = None) -> None:
        if index is not None and table.in_memory and len(index):
            table, index = Arrays(table.read(index), table.where, table.classes), None
        self._table, self._index = table, index

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays there are."""
        return self._table.names

    @property
    def in_memory(self) -> bool:
        """Whether every row is in memory already."""
        return self._table.in_memory

    @property
    def fixed(self) -> bool:
        """Whether a row is the same each time it is read (a dataset of the user's may augment it)."""
        return self._table.fixed

    @property
    def where(self) -> str:
        """Where the rows come from, in words."""
        return self._table.where

    def __len__(self) -> int:
        return self._table.rows if self._index is None else len(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._column(key)
        if isinstance(key, int | np.integer):
            if not -len(self) <= key < len(self):
                raise IndexError(f"row {key} of {len(self)}")
            return {name: array[0] for name, array in self[np.array([key])].items()}
        if not isinstance(key, slice):
            key = np.asarray(key, dtype=None if len(key) else np.int64)
            key = np.flatnonzero(key) if key.dtype == bool else key
        return self._table.read(key if self._index is None else self._index[key])

    def _column(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise ProbgenError(f"there is no array {name!r} in {self.where}, which has {', '.join(self.names)}")
        if self._index is None:
            return self._table.column(name)
        if not len(self._index):
            return np.empty((0, *self._table.shapes[name]), self._table.dtypes[name])
        return self._table.read(self._index)[name]

    def take(self, indices: Any) -> Rows:
        """These rows as `Rows`."""
        positions = np.arange(len(self))[indices]
        return Rows(self._table, positions if self._index is None else self._index[positions])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each array."""
        return dict(self._table.shapes)

    def dtypes(self) -> dict[str, np.dtype]:
        """The dtype of each array."""
        return dict(self._table.dtypes)

    def classes(self) -> dict[str, int]:
        """How many classes the source says an array has."""
        return dict(self._table.classes)

    def sample(self, limit: int = _SAMPLE_BYTES) -> dict[str, np.ndarray]:
        """All rows where they are in memory, else evenly spaced ones that take at most `limit` bytes."""
        if self.in_memory or not len(self):
            return {name: self[name] for name in self.names}
        row = sum(int(np.prod(s)) * self._table.dtypes[n].itemsize for n, s in self._table.shapes.items())
        count = min(len(self), max(100, limit // max(1, row)))
        return self[np.linspace(0, len(self) - 1, count).astype(np.int64)]

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows of {', '.join(self.names)} in {self.where})"
