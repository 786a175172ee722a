"""Arguments that samplers and losses of unnormalised densities refuse."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from probgen.errors import ProbgenError


def refuse_not_whole(owner: str, least: int, **values: Any) -> None:
    """Refuse what is no whole number, `least` or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ProbgenError(f"{owner}: `{name}` is {value!r}: it must be a whole number, {least} or more")


def refuse_not_positive(owner: str, least: str = "positive", **values: Any) -> None:
    """Refuse what is no finite number, or not positive; zero is let through where `least` is "zero or more"."""
    for name, value in values.items():
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and least == "positive"):
            raise ProbgenError(f"{owner}: `{name}` is {value!r}: it must be a number, {least}")


def refuse_no_bool(owner: str, **values: Any) -> None:
    """Refuse what is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ProbgenError(f"{owner}: `{name}` is {value!r}: it must be True or False")
