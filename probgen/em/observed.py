"""The data that a program's sites observe: an array as it is where a site does so, else read off runs of the program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from probgen.chunks import spread
from probgen.program import rows_of

PIECE = 8192  # rows of one run that looks at the data
FEW = 1000  # rows by which a program is looked at

Arrays = Mapping[str, np.ndarray]


def some_rows(arrays: Arrays) -> dict[str, np.ndarray]:
    """Rows enough to look at a program."""
    rows = spread(rows_of(arrays), FEW)
    return {name: array[rows] for name, array in arrays.items()}


def observed(
    arrays: Arrays,
    held: Arrays,
    names: Iterable[str],
    views: Mapping[str, tuple[str, tuple[int, ...]]],
    seen: Callable[[Arrays, Arrays, list[str]], Arrays],
) -> dict[str, np.ndarray]:
    """The values of sites, [N, E, *event]; `held` are values of the latents for one row.

    `views` are the sites that observe a whole array, with the shape of a row there; `seen(arrays, held, names)` runs the
    program on some rows for the others.
    """
    rows, found = rows_of(arrays), {}
    parts: dict[str, list[np.ndarray]] = {}
    for name in names:
        if name in views:
            array, shape = views[name]
            found[name] = np.asarray(arrays[array]).reshape(rows, *shape)
        else:
            parts[name] = []
    for start in range(0, rows, PIECE) if parts else ():
        piece = {name: array[start : start + PIECE] for name, array in arrays.items()}
        own = {name: np.repeat(value, rows_of(piece), 0) for name, value in held.items()}
        values = seen(piece, own, list(parts))
        for name, kept in parts.items():
            kept.append(values[name])
    return {**found, **{name: np.concatenate(kept) for name, kept in parts.items()}}
