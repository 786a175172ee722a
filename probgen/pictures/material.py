"""What pictures are drawn from: rows of data, prepared batches, and what a datum looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.data import Data, as_rows
from probgen.errors import ProbgenError
from probgen.sites import arrays_of, stack_numbered


def rows_of(run: Any, data: Any = None) -> Any:
    """The rows a picture shows: those given, else the run's test rows, else its valid or train ones."""
    source = run.data if data is None else data
    if source is None:
        raise ProbgenError(
            "this run has no data at hand: give the picture some, e.g. `pictures.latents(run, data.test)`"
        )
    if isinstance(source, Data):
        for rows in (source.test, source.valid, source.train):
            if rows is not None and len(rows):
                return rows
    rows = as_rows(source, run.spec)
    if not len(rows):
        raise ProbgenError("the data given to the picture has no rows")
    return rows


def training_rows(run: Any, data: Any = None) -> Any:
    """The rows the run was trained on; without them, every row of the data given."""
    for source in (run.data, data):
        if isinstance(source, Data):
            return source.train
    return rows_of(run, data)


def choose(rows: Any, n: int, seed: int) -> np.ndarray:
    """`n` row numbers (fewer if there are fewer), without repeats, in ascending order."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(len(rows), min(n, len(rows)), replace=False))


def prepared(run: Any, rows: Any, index: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Those rows as the program sees them."""
    return dict(run.preparation.forward(rows[index], np.random.default_rng(seed))[0])


def placeholders(run: Any, data: Any, n: int, seed: int) -> dict[str, np.ndarray]:
    """`n` prepared rows that an unconditioned run of the program is handed: of the data, else of its example."""
    if data is None and run.data is None and not given_names(run):
        return {name: np.resize(value, (n, *np.shape(value)[1:])) for name, value in run.trained.arrays.items()}
    rows = rows_of(run, data)
    return prepared(run, rows, np.random.default_rng(seed).integers(0, len(rows), n), seed)


def data_means(run: Any, shown: str, means: Mapping[str, np.ndarray]) -> np.ndarray:
    """The means of one data array among those of the data sites, in the units of the data."""
    sites = data_arrays(run)
    for site, values in stack_numbered(means, 1).items():
        if sites.get(site) == shown:
            values = np.reshape(values, (len(values), *run.preparation.spec(run.spec)[shown].shape))
            return np.asarray(run.preparation.inverse({shown: values})[shown])
    raise ProbgenError(f"the distribution of {shown!r} has no mean to draw: draw `samples` instead")


def given_names(run: Any) -> tuple[str, ...]:
    """The arrays that a draw is conditioned on."""
    return tuple(name for name, role in run.structure.arrays.items() if role == "given")


def draw(run: Any, n: int, data: Any, seed: int) -> dict[str, np.ndarray]:
    """`n` draws of the program in data units; arrays it is conditioned on come from rows of the data."""
    names = given_names(run)
    if not names:
        return dict(run.sample(n, seed=seed))
    rows = rows_of(run, data)
    batch = rows[np.random.default_rng(seed).integers(0, len(rows), n)]
    return dict(run.sample(n, seed=seed, given={name: batch[name] for name in names}))


def drawn_data(run: Any, n: int, shown: str, data: Any, seed: int) -> np.ndarray:
    """`n` draws of one data array, in data units and in the shape of the data."""
    values = draw(run, n, data, seed)
    [site] = [site for site, array in data_arrays(run).items() if array == shown]
    return np.reshape(values[site], (n, *run.spec[shown].shape))


def data_arrays(run: Any) -> dict[str, str]:
    """Data sites and the arrays they hold."""
    return arrays_of(run.structure, run.preparation.spec(run.spec))


def shown_array(run: Any, name: str | None = None) -> str:
    """The data array a picture shows: the one named, else the one with the most values per datum."""
    there = list(data_arrays(run).values())
    if name is not None and name not in there:
        known = ", ".join(repr(n) for n in there) or "none"
        raise ProbgenError(f"the program draws no data {name!r} to show; there is {known}")
    if not there:
        raise ProbgenError("the program has no data site whose array is known: name the site after its array")
    return name or max(there, key=lambda n: math.prod(run.spec[n].shape))


def labels_of(run: Any, rows: Any, index: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Name and values of the rows' labels: `y`, else the first array with classes; None without either."""
    spec = run.spec
    scalars = [n for n in rows.names if n in spec and not spec[n].shape]
    named = [n for n in scalars if n == "y"] + [n for n in scalars if spec[n].classes]
    return (named[0], np.asarray(rows[index][named[0]])) if named else None


@dataclass(frozen=True)
class Look:
    """How one datum is shown: "image", "plane" (a point), "scalar" or "vector" (lines)."""

    kind: str
    shape: tuple[int, ...]
    low: float
    high: float
    ink: bool = False

    def tiles(self, values: np.ndarray) -> np.ndarray:
        """Values [n, ...] as images [n, H, W] or [n, H, W, 3] in [0, 1], or as lines [n, T, curves]."""
        values = np.asarray(values, dtype=float).reshape(len(values), *self.shape)
        if self.kind != "image":
            return values.reshape(len(values), self.shape[0] if self.shape else 1, -1)
        if len(self.shape) == 3:
            first = self.shape[0] in (1, 3) and self.shape[2] not in (1, 3)
            values = np.moveaxis(values, 1, -1) if first else values
            values = values[..., 0] if values.shape[-1] == 1 else values
        return np.clip((values - self.low) / ((self.high - self.low) or 1.0), 0.0, 1.0)


def look_of(run: Any, name: str) -> Look:
    """How an array of the run's data is shown; its mean lies with the data, not with a folder's settings."""
    return look(run.spec if run.data is None else run.data.spec, name)


def look(spec: Mapping[str, Any], name: str) -> Look:
    """How data of this shape and range is shown.

    Images are [H, W], [H, W, 1 or 3], [1 or 3, H, W], or a flat non-negative row whose length is a square (8x8 or
    more). Mostly empty grey images, such as handwriting, are drawn as ink on paper.
    """
    entry = spec[name]
    shape, (low, high) = tuple(entry.shape), (float(v) for v in entry.range)
    side = math.isqrt(math.prod(shape)) if shape else 0
    if len(shape) == 1 and side >= 8 and side * side == shape[0] and low >= 0:
        shape = (side, side)
    if _image_shaped(shape):
        fill = 1.0 if entry.mean is None else (float(np.mean(entry.mean)) - low) / ((high - low) or 1.0)
        colour = len(shape) == 3 and 3 in (shape[0], shape[-1])
        return Look("image", shape, low, high, ink=not colour and fill < 0.45)
    kind = {0: "scalar", 1: "scalar", 2: "plane"}.get(math.prod(shape) if shape else 0, "vector")
    return Look(kind, shape, low, high)


def _image_shaped(shape: tuple[int, ...]) -> bool:
    if len(shape) == 2:
        return min(shape) >= 6
    if len(shape) != 3:
        return False
    return (shape[0] in (1, 3) and min(shape[1:]) >= 6) or (shape[-1] in (1, 3) and min(shape[:2]) >= 6)
