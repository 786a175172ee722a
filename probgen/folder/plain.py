"""Plain values on disk: scalars, lists and mappings as JSON and YAML, nothing that could build an object.

JSON has no NaN and no infinity, so they are written as the strings "NaN", "Infinity" and "-Infinity" (which
JavaScript's `Number` and Python's `float` both understand) and read back as floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from probgen.errors import ProbgenError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any, where: str) -> Any:
    """`value` in Python's own numbers, text, lists and dicts; anything else is refused."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None:
        return None
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_key(k, where): plain(v, f"{where}: {k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, where) for v in value]
    raise ProbgenError(f"{where} holds a {type(value).__name__}: a run folder keeps numbers, text, lists and mappings")


def _key(key: Any, where: str) -> str:
    if isinstance(key, str):
        return key
    raise ProbgenError(f"{where} has the name {key!r}, which is not text: write it in quotes")


def to_json(value: Any, where: str, indent: int | None = None) -> str:
    """JSON that every reader accepts."""
    return json.dumps(_spelled(plain(value, where)), indent=indent, allow_nan=False, ensure_ascii=False)


def from_json(text: str | bytes) -> Any:
    """What `to_json` wrote; raises ValueError for anything that is not JSON."""
    try:
        return _unspelled(json.loads(text))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {k: _spelled(v) for k, v in value.items()}
    return [_spelled(v) for v in value] if isinstance(value, list) else value


def _unspelled(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: _unspelled(v) for k, v in value.items()}
    return [_unspelled(v) for v in value] if isinstance(value, list) else value


def to_yaml(value: Mapping[str, Any], where: str) -> str:
    """Plain YAML, in the order given."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(plain(value, where), Dumper=Dumper, sort_keys=False)


def from_yaml(text: str, where: str) -> dict[str, Any]:
    """A mapping of plain values; tags, aliases, dates and named classes are refused in one sentence."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few nested aliases unfold to billions of values
                raise yaml.YAMLError("it uses an alias")
            return super().compose_node(parent, index)

    try:
        value = yaml.load(text, Loader=Loader)  # a SafeLoader: it knows no tag that builds an object
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProbgenError(
            f"{where} is not the plain YAML of a run ({_first_line(error)}): do not trust it, restore a copy"
        ) from error
    if not isinstance(value, dict):
        raise ProbgenError(f"{where} must hold a mapping of options, not {type(value).__name__}")
    _no_classes(value, where)
    return plain(value, where)


def _first_line(error: BaseException) -> str:
    text = getattr(error, "problem", None) or str(error) or "nested too deeply"
    return text.strip().splitlines()[0][:120]


def _no_classes(value: Any, where: str) -> None:
    if isinstance(value, dict):
        if "class_path" in value:
            raise ProbgenError(f"{where} names a class (`class_path`): options are plain values, remove it")
        for item in value.values():
            _no_classes(item, where)
    elif isinstance(value, list):
        for item in value:
            _no_classes(item, where)
