"""Tables: named arrays with one row per datum, in memory, mapped from a file, or fetched row by row.

A table has `names`, `rows`, `shapes`, `dtypes`, `where` (for messages), `in_memory`, `fixed` (whether reading a row
twice gives the same row), `read(indices) -> {name: array}` and `column(name)`. Nothing here splits or describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from probgen.errors import ProbgenError

IN_MEMORY_BYTES = 256 * 2**20
"""Files and folders up to this size are read at once; larger ones stay on disk."""

_CHUNK_BYTES = 16 * 2**20


class Table(Protocol):
    """What `Rows` reads from."""

    names: tuple[str, ...]
    rows: int
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    classes: Mapping[str, int]
    where: str
    in_memory: bool
    fixed: bool

    def read(self, indices: np.ndarray | slice) -> dict[str, np.ndarray]:
        """These rows of every array."""

    def column(self, name: str) -> np.ndarray:
        """One whole array."""


class Arrays:
    """A table of arrays that are in memory, or mapped from files too large to be read at once."""

    fixed = True

    def __init__(self, arrays: Mapping[str, Any], where: str, classes: Mapping[str, int] | None = None) -> None:
        if not arrays:
            raise ProbgenError(f"{where} holds no arrays: give at least `x`, with one row per datum")
        self._arrays = {str(name): _settled(checked(value, name, where)) for name, value in arrays.items()}
        self.names = tuple(self._arrays)
        self.rows = _common_rows(self._arrays, where)
        self.shapes = {name: array.shape[1:] for name, array in self._arrays.items()}
        self.dtypes = {name: native(array[:0]).dtype for name, array in self._arrays.items()}
        self.classes = dict(classes or {})
        self.where = where
        self.in_memory = not any(isinstance(array, np.memmap) for array in self._arrays.values())
        for name, array in self._arrays.items():
            if not isinstance(array, np.memmap):
                refuse_not_finite(array, name, where)

    def read(self, indices: np.ndarray | slice) -> dict[str, np.ndarray]:
        """These rows of every array; only they are read from a mapped file."""
        found = {name: native(np.asarray(array[indices])) for name, array in self._arrays.items()}
        for name, array in self._arrays.items():
            if isinstance(array, np.memmap):
                refuse_not_finite(found[name], name, self.where, _positions(indices, self.rows))
        return found

    def column(self, name: str) -> np.ndarray:
        """One whole array."""
        return self._arrays[name] if self.in_memory else self.read(slice(None))[name]


class Fetched:
    """A table whose rows are fetched when they are asked for: a map-style dataset, a folder of images."""

    in_memory = False

    def __init__(
        self,
        fetch: Callable[[np.ndarray], Mapping[str, Any]],
        rows: int,
        where: str,
        fixed: bool = False,
        classes: Mapping[str, int] | None = None,
    ) -> None:
        if rows == 0:
            raise ProbgenError(f"{where} is empty: give it at least one row")
        self._fetch = fetch
        self.rows, self.where, self.fixed, self.classes = rows, where, fixed, dict(classes or {})
        self.names = ()
        first = self.read(np.arange(1))
        self.names = tuple(first)
        self.shapes = {name: array.shape[1:] for name, array in first.items()}
        self.dtypes = {name: array.dtype for name, array in first.items()}

    def read(self, indices: np.ndarray | slice) -> dict[str, np.ndarray]:
        """These rows of every array."""
        positions = _positions(indices, self.rows)
        found = {str(k): native(checked(v, k, self.where)) for k, v in self._fetch(positions).items()}
        for name, array in found.items():
            refuse_not_finite(array, name, self.where, positions)
            if self.names and array.shape[1:] != self.shapes.get(name):
                raise ProbgenError(
                    f"{name!r} in {self.where} has rows of shape {list(array.shape[1:])} near row {positions[0]} and "
                    f"of shape {list(self.shapes.get(name, ()))} at row 0: make every row the same shape"
                )
        return found

    def column(self, name: str) -> np.ndarray:
        """One whole array."""
        return self.read(slice(None))[name]

    def settled(self) -> Arrays | Fetched:
        """The same rows in memory when they are fixed and small enough."""
        row_bytes = sum(int(np.prod(self.shapes[n])) * self.dtypes[n].itemsize for n in self.names)
        if not self.fixed or self.rows * row_bytes > IN_MEMORY_BYTES:
            return self
        return Arrays(self.read(slice(None)), self.where, self.classes)


def map_style(dataset: Any, where: str) -> Fetched:
    """A table over any object with `len` and `[indices]` or `[i]`, whose items are arrays, tuples or mappings."""
    batched = _takes_indices(dataset)

    def fetch(indices: np.ndarray) -> dict[str, Any]:
        if batched:
            return _named(dataset[indices], where)
        items = [_named(dataset[int(i)], where) for i in indices]
        return {name: stacked([item[name] for item in items], name, where, indices) for name in items[0]}

    try:
        rows = len(dataset)
    except TypeError as error:
        raise ProbgenError(
            f"{where} does not say how many rows it has ({error}): give an array, or define `len`"
        ) from error
    return Fetched(fetch, rows, where)


def _takes_indices(dataset: Any) -> bool:
    """Whether `dataset[array of indices]` gives a batch: tried once, on row 0 three times."""
    try:
        batch = _named(dataset[np.zeros(3, np.int64)], "")
        item = _named(dataset[0], "")
    except Exception:  # foreign code: whatever it raises means that it does not take indices
        return False
    shapes = {name: np.shape(value) for name, value in item.items()}
    return {name: np.shape(value) for name, value in batch.items()} == {n: (3, *s) for n, s in shapes.items()}


def _named(item: Any, where: str) -> dict[str, Any]:
    """The arrays of one item: a mapping names them, a pair is (x, y), anything else is x."""
    if isinstance(item, Mapping):
        return {str(name): as_array(value, str(name), where) for name, value in item.items()}
    if not isinstance(item, tuple | list):
        return {"x": as_array(item, "x", where)}
    if len(item) > 2:
        raise ProbgenError(
            f"an item of {where} is a tuple of {len(item)}: return a dict that names its arrays, "
            "e.g. {'x': ..., 'y': ...}"
        )
    return {name: as_array(value, name, where) for name, value in zip(("x", "y"), item, strict=False)}


def as_array(value: Any, name: str, where: str) -> np.ndarray:
    """A numpy array of whatever holds numbers: a list, a tensor on any device, a JAX array, an image."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ProbgenError(
            f"{name!r} in {where} cannot be read as an array ({error}): give numbers, every row of the same shape"
        ) from error


def checked(value: Any, name: str, where: str) -> np.ndarray:
    """The array, or one sentence about its dtype or rank."""
    array = as_array(value, name, where)
    if array.dtype.kind not in "biuf":
        raise ProbgenError(
            f"{name!r} in {where} has dtype {array.dtype}: convert it to real numbers (float, integer or bool), "
            "every row of the same shape"
        )
    if np.ma.is_masked(array):
        raise ProbgenError(f"{name!r} in {where} has masked values: fill them, or give the mask as an array of its own")
    if array.ndim == 0:
        raise ProbgenError(f"{name!r} in {where} is a single number: its first axis must be the rows")
    if array.size == 0:
        raise ProbgenError(f"{name!r} in {where} is empty (shape {list(array.shape)}): give it at least one row")
    return array


def stacked(values: Sequence[np.ndarray], name: str, where: str, indices: np.ndarray) -> np.ndarray:
    """Rows as one array, or the first row whose shape differs."""
    for index, value in zip(indices, values, strict=True):
        if np.shape(value) != np.shape(values[0]):
            raise ProbgenError(
                f"{name!r} in {where} has shape {list(np.shape(value))} at row {index} and "
                f"{list(np.shape(values[0]))} at row {indices[0]}: make every row the same shape"
            )
    return np.stack(values)


def refuse_not_finite(array: np.ndarray, name: str, where: str, rows: np.ndarray | None = None) -> None:
    """Raise when rows hold NaN or infinity, saying how many and the first (as numbered by `rows`)."""
    if array.dtype.kind != "f":
        return
    count, first = 0, None
    step = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        finite = np.isfinite(array[start : start + step])
        if finite.all():
            continue
        bad = np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1)) + start
        count, first = count + len(bad), bad[0] if first is None else first
    if count:
        row = first if rows is None else rows[first]
        number = "1 row" if count == 1 else f"{count} rows"
        raise ProbgenError(
            f"{name!r} in {where} has NaN or infinite values in {number}, the first is row {row}: remove or fill them"
        )


def _settled(array: np.ndarray) -> np.ndarray:
    """Small files in memory; what is there already in a form that every library takes."""
    if isinstance(array, np.memmap):
        return native(np.array(array)) if array.nbytes <= IN_MEMORY_BYTES else array
    array = native(array)
    return array if array.flags.writeable else array.copy()


def native(array: np.ndarray) -> np.ndarray:
    """In this machine's byte order, and not wider than float64."""
    dtype = np.dtype(np.float64) if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array.dtype
    return array.astype(dtype.newbyteorder("="), copy=False)


def _common_rows(arrays: Mapping[str, np.ndarray], where: str) -> int:
    first, *others = arrays
    for name in others:
        if len(arrays[name]) != len(arrays[first]):
            raise ProbgenError(
                f"{name!r} has {len(arrays[name])} rows and {first!r} has {len(arrays[first])} in {where}: "
                "every array needs one row per datum"
            )
    return len(arrays[first])


def _positions(indices: np.ndarray | slice, rows: int) -> np.ndarray:
    return np.arange(rows)[indices] if isinstance(indices, slice) else np.atleast_1d(np.asarray(indices))
