"""Options are the parameters of a function: names, annotations, and values checked against them."""

from __future__ import annotations

import inspect
import itertools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.errors import ProbgenError, did_you_mean


@dataclass(frozen=True)
class Option:
    """A parameter of a function: its name, its resolved annotation, its default."""

    name: str
    annotation: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty


def signature_options(factory: Callable[..., Any]) -> tuple[Option, ...]:
    """The parameters of `factory` but `spec`, in their order."""
    try:
        hints = typing.get_type_hints(factory)
    except (NameError, TypeError, AttributeError):  # names imported for the type checker alone
        hints = {}
    return tuple(
        Option(name, hints.get(name, Any), parameter.default)
        for name, parameter in inspect.signature(factory).parameters.items()
        if name != "spec" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    )


def bound(owner: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option with its value: the given ones checked, the others by default."""
    options = signature_options(factory)
    refuse_unknown(owner, given, [option.name for option in options])
    missing = [option.name for option in options if option.required and option.name not in given]
    if missing:
        raise ProbgenError(f"{owner} needs the option `{missing[0]}`, which has no default")
    return {o.name: _checked(owner, o, given[o.name]) if o.name in given else o.default for o in options}


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise for the first name that `owner` has no option of."""
    known = tuple(known)
    for name in given:
        if name not in known:
            raise ProbgenError(f"{owner} has no option `{name}`{did_you_mean(name, known) or '; it takes none'}")


def _checked(owner: str, option: Option, value: Any) -> Any:
    found = conforming(value, option.annotation)
    if found is Ellipsis:
        raise ProbgenError(f"{owner}: `{option.name}` must be {wanted(option.annotation)}, not {value!r}")
    return found


def conforming(value: Any, annotation: Any) -> Any:
    """`value` as `annotation` says (an int may stand for a float, a list for a tuple), or `...`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return next((v for v in (conforming(value, arg) for arg in args) if v is not Ellipsis), ...)
    if origin is typing.Literal:
        return value if value in args else ...
    if origin in (tuple, list):
        return _conforming_sequence(value, origin, args)
    kind = origin or annotation
    if kind is None or kind is types.NoneType:
        return None if value is None else ...
    if kind in (int, float):
        return _conforming_number(value, kind)
    if not isinstance(kind, type) or kind is Any or getattr(kind, "_is_protocol", False):
        return value
    return value if isinstance(value, kind) else ...


def _conforming_number(value: Any, kind: type) -> Any:
    whole = isinstance(value, int | np.integer)
    if isinstance(value, bool) or not (whole or (kind is float and isinstance(value, float | np.floating))):
        return ...
    return kind(value)


def _conforming_sequence(value: Any, origin: type, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, tuple | list):
        return ...
    if not args:
        return origin(value)
    one_kind = origin is list or args[-1] is Ellipsis
    if not one_kind and len(value) != len(args):
        return ...
    kinds = itertools.repeat(args[0]) if one_kind else args
    found = [conforming(v, kind) for v, kind in zip(value, kinds, strict=False)]
    return ... if any(v is Ellipsis for v in found) else origin(found)


def wanted(annotation: Any) -> str:
    """An annotation in words: "a whole number", "one of 'a', 'b'", ..."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if arg is types.NoneType else wanted(arg) for arg in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (tuple, list):
        return f"a {origin.__name__} such as {'(64, 64)' if int in args else '(...)'}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))
