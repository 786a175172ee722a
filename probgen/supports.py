"""The support of a site in a word, however its PPL writes it, and rows that must lie in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from probgen.errors import ProbgenError


def word(support: str) -> str:
    """The innermost constraint's name, in lower case: "IndependentConstraint(Real(), 1)" is "real"."""
    while support.startswith("Independent") and support.endswith(")"):
        support = support.partition("(")[2].rpartition(",")[0]
    return support.partition("(")[0].strip("_").lower()


def described(support: str) -> str:
    """The same for a reader: "positive", "non-negative", "0.0 .. 1.0", "real"."""
    name, bounds = word(support), re.findall(r"=(-?[\d.]+(?:e[+-]?\d+)?)", support)
    if name in ("greaterthan", "greaterthaneq") and bounds and float(bounds[0]) == 0:
        return {"greaterthan": "positive", "greaterthaneq": "non-negative"}[name]
    if name in ("interval", "integerinterval") and len(bounds) == 2:
        return f"{bounds[0]} .. {bounds[1]}"
    return name


def refuse_shape(site: str, value: tuple[int, ...], drawn: tuple[int, ...], event_dim: int) -> None:
    """Refuse data of a site whose shape is not that of the site's draws: events equal, batches broadcastable."""
    try:
        fits = len(value) >= event_dim and value[len(value) - event_dim :] == drawn[len(drawn) - event_dim :]
        np.broadcast_shapes(value, drawn)
    except ValueError:
        fits = False
    if not fits:
        raise ProbgenError(
            f"the data of the site {site!r} have the shape {list(value)}, and its distribution draws {list(drawn)}: give "
            "data of that shape, or build the likelihood for these, e.g. from spec['x'].shape"
        )


def refuse_outside(runner: Any, arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Refuse a prepared batch whose values lie outside their sites' support, naming `where` the rows come from.

    `runner` is an engine or a trained program: a density there is not defined, whatever number comes out.
    """
    try:
        runner.refuse_outside(arrays)
    except ProbgenError as error:
        raise ProbgenError(f"{where}: {error}") from error
