"""Optional dependencies: imported where they are needed, and named by their extra when they are missing."""

from __future__ import annotations

import importlib
import types

from probgen.errors import ProbgenError


def need(module: str, extra: str, purpose: str) -> types.ModuleType:
    """Import `module`, or say which extra of probgen brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ProbgenError(
            f"{purpose} needs `{error.name}`, which is not installed: pip install 'probgen[{extra}]'"
        ) from error
