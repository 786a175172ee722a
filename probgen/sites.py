"""What a program's sites are outside it: a variable of the data, or one variable with an index.

Numbered sites of one shape are one variable: `z_1, ..., z_T` is `z` with an axis of length T. A data site bears the
name of its array; in a program written elsewhere (`pyro.sample("obs", ..., obs=x)`) the array is found by its size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from probgen.chunks import numbers_of
from probgen.program import Structure


def arrays_of(structure: Structure, spec: Mapping[str, Any]) -> dict[str, str]:
    """Data variables and the arrays they hold, as far as that is known.

    `spec` maps the arrays, as the program sees them, to something with a `shape` per row. A site, or a numbered
    series of sites, bears its array's name; one with a name of its own is the only data array of its size.
    """
    sizes = {name: numbers_of(site) for name, site in structure.observed.items()}
    for base, names in numbered(structure.model).items():
        if all(name in sizes for name in names):
            sizes[base] = sum(sizes.pop(name) for name in names)
    found = {name: name for name in sizes if name in spec}
    free = [a for a, role in structure.arrays.items() if role == "data" and a in spec and a not in found]
    for name in sizes.keys() - found.keys():
        fitting = [a for a in free if int(np.prod(spec[a].shape)) == sizes[name]]
        rivals = [other for other in sizes.keys() - found.keys() if sizes[other] == sizes[name]]
        if len(fitting) == len(rivals) == 1:
            found[name] = fitting[0]
    return found


def numbered(names: Iterable[str]) -> dict[str, list[str]]:
    """The sites `z_0, z_1, ...` or `z_1, z_2, ...` under their common name, in order.

    Only unbroken series of two or more whose common name is free: a diffusion's `x_1..x_T` beside its data `x`
    keep their names.
    """
    names = list(names)
    series: dict[str, dict[int, str]] = {}
    for name in names:
        match = re.fullmatch(r"(.+)_(0|[1-9]\d*)", name)
        if match:
            series.setdefault(match[1], {})[int(match[2])] = name
    return {
        base: [found[i] for i in sorted(found)]
        for base, found in series.items()
        if len(found) > 1 and base not in names and _unbroken(found)
    }


def stack_numbered(values: Mapping[str, np.ndarray], axis: int) -> dict[str, np.ndarray]:
    """`values` with every numbered series of one shape stacked into one array, the index at `axis`.

    The axis lies behind those of draws and rows. The stacked variable takes the place of the first of its sites.
    """
    first = {}
    for base, names in numbered(values).items():
        if len({np.shape(values[name]) for name in names}) == 1:
            first[names[0]] = (base, names)
    taken = {name for _, names in first.values() for name in names}
    stacked = {}
    for name, value in values.items():
        if name in first:
            base, names = first[name]
            stacked[base] = np.stack([values[n] for n in names], axis=axis)
        elif name not in taken:
            stacked[name] = value
    return stacked


def _unbroken(found: Mapping[int, str]) -> bool:
    low = min(found)
    return low in (0, 1) and len(found) == max(found) - low + 1
