"""Data: named raw arrays with a train / valid / test split, and what a program needs to know of them.

    data = load_data("digits")            # a name, a path, "hf:NAME", arrays, a mapping, a map-style dataset
    data.train["x"]                       # the whole array
    data.train[np.array([3, 1, 4])]       # {name: these rows}; only they are read where the data lies on disk

Values stay raw, in the data's own units; what a program sees is decided by `Preparation`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from probgen.data import sources
from probgen.data.rows import ArraySpec, Rows, Specs
from probgen.data.tables import IN_MEMORY_BYTES
from probgen.errors import ProbgenError

SPLIT_SEED = 0
FRACTIONS = (0.8, 0.1, 0.1)
SPLITS = ("train", "valid", "test")
_MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Data:
    """Named arrays split into `train`, `valid` and `test` rows; `spec` describes each array over train.

    `log_prob(x) -> [N]` is the exact log-density where it is known (the toys). `note` says what the loader decided,
    `source` where it can be read again: a name, an absolute path, or None for arrays.
    """

    train: Rows
    valid: Rows
    test: Rows
    spec: Mapping[str, ArraySpec]
    name: str
    log_prob: Callable[[np.ndarray], np.ndarray] | None = None
    note: str = ""
    source: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays there are."""
        return self.train.names

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of names, shapes, dtypes and values; of evenly spaced rows where all would be too many."""
        digest = hashlib.sha256()
        for split in SPLITS:
            rows: Rows = getattr(self, split)
            digest.update(f"{split} {len(rows)}".encode())
            _update(digest, rows)
        return digest.hexdigest()

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name} {spec}" for name, spec in self.spec.items())
        sizes = ", ".join(f"{len(getattr(self, split))} {split}" for split in SPLITS)
        note = f"; {self.note}" if self.note else ""
        return f"Data({self.name!r}: {sizes}; {arrays}{note})"


def load_data(source: Any, split: Sequence[float] | None = None) -> Data:
    """Read data and split it into train, valid and test.

    `source` is "digits" or a toy's name, the path of a `.npz`, `.npy`, `.csv` or `.parquet` file or of a folder of
    images, "hf:NAME", an array, a mapping of arrays, or any object with `len` and `[indices]`. Files hold `x_train`,
    `x_valid`, `x_test` (likewise `y_…`), or a bare `x`. One set from a name or a file is split 80/10/10 by a fixed
    seed; plain arrays all train unless `split`, three fractions, says otherwise. Images are [N, H, W] or
    [N, H, W, C], as in their files.

    Raises ProbgenError, in one sentence, on anything that cannot be trained on.
    """
    if isinstance(source, Data):
        if split is not None:
            raise ProbgenError("`split` was given for data that is split already: leave `split` out")
        return source
    found = sources.read(source)
    train, valid, test, note = _divided(found, split)
    spec = describe(train, (valid, test))
    return Data(train, valid, test, spec, found.name, found.log_prob, note, _read_again(source, split))


def _read_again(source: Any, split: Any) -> str | None:
    """What `load_data` would read the same data from: a name, or a path that no longer depends on the folder."""
    if not isinstance(source, str | Path) or split is not None:
        return None
    return str(Path(source).expanduser().resolve()) if Path(source).expanduser().exists() else str(source)


def split(rows: int, fractions: Sequence[float] = FRACTIONS, seed: int = SPLIT_SEED) -> tuple[np.ndarray, ...]:
    """Row numbers of train, valid and test, each in order: a pure function of (rows, fractions, seed)."""
    try:
        shares = [float(share) for share in fractions]
    except (TypeError, ValueError):
        shares = []
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6 or shares[0] == 0:
        raise ProbgenError(
            f"`split` is {fractions!r}: give the fractions of train, valid and test, which sum to one, "
            "e.g. (0.8, 0.1, 0.1)"
        )
    valid, test = round(rows * shares[1]), round(rows * shares[2])
    test = min(test, max(0, rows - 1))  # train keeps at least one row
    valid = min(valid, max(0, rows - 1 - test))
    order = np.random.default_rng(seed).permutation(rows)
    parts = np.split(order, [rows - valid - test, rows - test])
    return tuple(np.sort(part) for part in parts)


def as_rows(obj: Any, like: Mapping[str, ArraySpec] | None = None) -> Rows:
    """Rows of whatever holds data: `Data` (its test rows), `Rows`, arrays, a mapping, a map-style dataset.

    A single array is bound to the only array of `like`, else to `x`. With `like`, rows of another shape are refused.
    """
    if isinstance(obj, Data):
        if not len(obj.test):
            raise ProbgenError(
                f"the data {obj.name!r} has no test rows: pass `data.train`, or load it with `split=(0.8, 0.1, 0.1)`"
            )
        rows = obj.test
    elif isinstance(obj, Rows):
        rows = obj
    else:
        only = next(iter(like)) if like and len(like) == 1 else "x"
        rows = Rows(sources.plain(obj, only))
    for name, spec in (like or {}).items():
        if name in rows and tuple(rows.shapes()[name]) != tuple(spec.shape):
            raise ProbgenError(
                f"{name!r} in {rows.where} has rows of shape {list(rows.shapes()[name])}, and the run was made for "
                f"{list(spec.shape)}: give it rows of that shape"
            )
    return rows


def describe(train: Rows, others: Sequence[Rows] = ()) -> dict[str, ArraySpec]:
    """The spec of each array: range and mean over train, classes over every split."""
    sample = train.sample()
    further = [rows.sample() for rows in others if len(rows)]
    specs = Specs()
    for name in train.names:
        array = sample[name]
        classes = train.classes().get(name) or _classes([array, *(f[name] for f in further)])
        low, high = float(array.min()), float(array.max())
        mean = np.asarray(array.mean(axis=0, dtype=np.float64))
        specs[name] = ArraySpec(tuple(array.shape[1:]), array.dtype.name, (low, high), classes, mean)
    return specs


def _classes(arrays: Sequence[np.ndarray]) -> int | None:
    if arrays[0].ndim != 1 or arrays[0].dtype.kind not in "iu":
        return None
    low, high = min(int(a.min()) for a in arrays), max(int(a.max()) for a in arrays)
    return high + 1 if low >= -1 and 0 <= high < _MOST_CLASSES else None


def _divided(found: sources.Found, fractions: Sequence[float] | None) -> tuple[Rows, Rows, Rows, str]:
    """The three splits, and what was decided."""
    if "all" not in found.tables:
        return _given_splits(found, fractions)
    table = found.tables["all"]
    if fractions is None and not found.from_file:
        none = np.empty(0, np.int64)
        return Rows(table), Rows(table, none), Rows(table, none), ""
    parts = split(table.rows, FRACTIONS if fractions is None else fractions)
    train, valid, test = (Rows(table, index) for index in parts)
    return train, valid, test, ""


def _given_splits(found: sources.Found, fractions: Sequence[float] | None) -> tuple[Rows, Rows, Rows, str]:
    where = found.tables["train"].where
    if fractions is not None:
        raise ProbgenError(f"`split` was given, and {where} is split already: leave `split` out")
    rows = {name: Rows(table) for name, table in found.tables.items()}
    for name in rows:
        _same_arrays(rows["train"], rows[name], name)
    train, note, none = rows["train"], "", np.empty(0, np.int64)
    if "valid" not in rows and (found.from_file or "test" in rows):
        kept, held, _ = split(len(train), (0.9, 0.1, 0.0))
        rows["valid"], train = train.take(held), train.take(kept)
        note = "valid is a tenth of train, held out by a fixed seed"
    empty = train.take(none)
    return train, rows.get("valid", empty), rows.get("test", empty), note


def _same_arrays(train: Rows, other: Rows, name: str) -> None:
    missing = [f"{a}_{name}" for a in train.names if a not in other]
    missing += [f"{a}_train" for a in other.names if a not in train]
    if missing:
        raise ProbgenError(f"{train.where} lacks the array {missing[0]!r}: every split needs the same arrays")
    for array, shape in train.shapes().items():
        if other.shapes()[array] != shape:
            raise ProbgenError(
                f"'{array}_{name}' in {train.where} has rows of shape {list(other.shapes()[array])} and "
                f"'{array}_train' of {list(shape)}: every split needs rows of one shape"
            )


def _update(digest: Any, rows: Rows) -> None:
    """Feed a digest with names, shapes, dtypes, and the values where reading them twice gives the same."""
    dtypes = rows.dtypes()
    for name, shape in rows.shapes().items():
        digest.update(f"{name} {shape} {dtypes[name]}".encode())
    if not len(rows) or not rows.fixed:
        return
    arrays = rows.sample(2**20)
    for array in arrays.values():
        if array.nbytes > IN_MEMORY_BYTES:
            array = array[np.linspace(0, len(array) - 1, 1000).astype(np.int64)]
        digest.update(np.ascontiguousarray(array).data.cast("B"))
