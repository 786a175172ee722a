"""Known entries of data: rows in the data's own units with NaN for what is not known, as a program's sites see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.cells import row_shape
from probgen.errors import ProbgenError
from probgen.program import Structure
from probgen.sites import arrays_of, numbered


@dataclass(frozen=True)
class Known:
    """`raw` maps data variables to rows as given, [n, ...]; `values` maps sites to prepared ones, NaN where not known."""

    raw: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]

    def restored(self, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Draws in the data's units with the known entries exactly as they were given."""
        found = dict(draws)
        for name, raw in self.raw.items():
            drawn = np.asarray(draws[name])
            raw = raw.reshape(drawn.shape)
            merged = np.where(np.isnan(raw), drawn, raw)
            found[name] = merged.astype(drawn.dtype) if drawn.dtype.kind in "biu" else merged
        return found


def known_entries(
    structure: Structure, preparation: Any, spec: Mapping[str, Any], given: Mapping[str, Any], n: int
) -> Known:
    """`n` rows of the data arrays in `given`.

    Raises:
        ProbgenError: not numbers, another shape, infinite, not whole where the data are, an array whose site is not
            known, or a `prepare` that draws at random or mixes entries.
    """
    variables = {array: name for name, array in arrays_of(structure, preparation.spec(spec)).items()}
    series = numbered(structure.observed)
    raw, values = {}, {}
    for array, value in given.items():
        if array not in variables:
            raise ProbgenError(
                f"sample: it is not known which site holds the array {array!r}, so its entries cannot be given: name the "
                "site after the array"
            )
        rows = _rows(array, value, spec[array], n)
        name = variables[array]
        raw[name] = rows
        prepared = _prepared(array, rows, preparation)
        members = series.get(name, [name])
        parts = np.split(prepared.reshape(n, -1), len(members), axis=1)
        values |= {m: part.reshape(n, *row_shape(structure.model[m])) for m, part in zip(members, parts, strict=True)}
    return Known(raw, values)


def _rows(array: str, value: Any, spec: Any, n: int) -> np.ndarray:
    """One row for all draws, or one for each, in float64 with NaN where not known."""
    shape, rows = tuple(spec.shape), np.asarray(value)
    if rows.dtype.kind not in "biuf":
        raise ProbgenError(f"sample: given {array!r} must be numbers, with NaN for what is not known, not {rows.dtype}")
    if rows.shape not in (shape, (n, *shape)):
        raise ProbgenError(
            f"sample: given {array!r} has shape {rows.shape}; it needs {shape}, one row for all draws, or {(n, *shape)}"
        )
    rows = rows.astype(np.float64)
    if np.isinf(rows).any():
        raise ProbgenError(f"sample: given {array!r} holds Inf; give finite values, and NaN for what is not known")
    known = rows[~np.isnan(rows)]
    if np.dtype(spec.dtype).kind in "iu" and (known != np.round(known)).any():
        raise ProbgenError(f"sample: given {array!r} must be whole numbers where it is not NaN, as in the data")
    return np.broadcast_to(rows, (n, *shape))


def _prepared(array: str, rows: np.ndarray, preparation: Any) -> np.ndarray:
    """Rows after `prepare`, which must act on each entry alone: what is not known must not spread."""
    chain = preparation.steps.get(array, ())
    for step in chain:
        if step.random:
            raise ProbgenError(
                f"sample: {array!r} is prepared by {type(step).__name__}, which draws at random, so its known entries "
                "cannot be held fixed: give all of it to run.posterior, or leave that step out of the program"
            )
    missing = np.isnan(rows)
    prepared = np.asarray(preparation.forward({array: rows})[0][array], np.float64)
    if prepared.size != rows.size or (np.isnan(prepared) & ~missing.reshape(prepared.shape)).any():
        raise ProbgenError(
            f"sample: a step of the preparation of {array!r} mixes entries, so some cannot be known without the others"
        )
    return np.where(missing.reshape(prepared.shape), np.nan, prepared)
