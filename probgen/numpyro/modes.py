"""Train and eval mode of the flax and equinox modules that a program calls.

Both libraries keep the mode in attributes of the module (`deterministic`, `use_running_average`, `inference`), which
`numpyro.contrib.module` reads each time the program runs. A scope sets them and puts them back.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

EVALUATION = {"deterministic": True, "use_running_average": True, "inference": True}


def mode(training: bool, *fns: Callable[..., Any] | None) -> contextlib.AbstractContextManager[None]:
    """Run a block with every module behind the callables in train or in eval mode."""
    return mode_of(training, modules_of(*fns))


@contextlib.contextmanager
def mode_of(training: bool, modules: list[Any]) -> Iterator[None]:
    """The same for modules that are known."""
    changed = []
    try:
        for module in modules:
            for attribute, evaluating in EVALUATION.items():
                before = getattr(module, attribute, None)
                if isinstance(before, bool):
                    changed.append((module, attribute, before))
                    object.__setattr__(module, attribute, evaluating is not training)
        yield
    finally:
        for module, attribute, before in reversed(changed):
            object.__setattr__(module, attribute, before)


def modules_of(*fns: Any) -> list[Any]:
    """The flax nnx and equinox modules, with those inside them, that the callables hold or name."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    pending = list(fns)
    while pending:
        value = pending.pop()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        library = _library(value)
        if library:
            found[id(value)] = value
        pending += _held(value, library)
    return list(found.values())


def _library(value: Any) -> str | None:
    """ "flax" or "equinox" when the value is a module of theirs."""
    for cls in type(value).__mro__:
        if cls.__name__ == "Module" and cls.__module__.split(".")[0] in ("flax", "equinox"):
            return cls.__module__.split(".")[0]
    return None


def _held(value: Any, library: str | None) -> list[Any]:
    """The values inside a callable, a module or a container in which a module may hide."""
    if library or type(value).__module__.split(".")[0] in ("flax", "equinox"):
        return list(getattr(value, "__dict__", {}).values())
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        return _named(value)
    if callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        return [*vars(value).values(), type(value).__call__]
    return []


def _named(function: types.FunctionType) -> list[Any]:
    """Values of the closure cells and global names of a function written outside the libraries."""
    if function.__module__.split(".")[0] in ("jax", "numpyro", "flax", "equinox", "optax", "numpy"):
        return []
    values, codes = [], [function.__code__]
    while codes:
        code = codes.pop()
        values += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that its function has not bound yet
            values.append(cell.cell_contents)
    wrapped = getattr(function, "__wrapped__", None)
    return [v for v in [*values, wrapped] if not isinstance(v, types.ModuleType)]
