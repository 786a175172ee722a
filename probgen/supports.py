"""The support of a site in a word, however its PPL writes it."""

from __future__ import annotations

import re


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
