"""Which library an array belongs to, for formulas that are written once for NumPy, PyTorch and JAX."""

from __future__ import annotations

import types
from typing import Any


def namespace(*values: Any) -> types.ModuleType:
    """`torch`, `jax.numpy` or `numpy`: that of the first array among the values, NumPy's for plain numbers."""
    for value in values:
        owners = {cls.__module__.partition(".")[0] for cls in type(value).__mro__}
        if "torch" in owners:
            import torch

            return torch
        if owners & {"jax", "jaxlib"}:
            import jax.numpy

            return jax.numpy
    import numpy

    return numpy


def spread(values: Any, like: Any) -> Any:
    """One number for each row, [B], made to multiply rows of any shape; a single number is left as it is."""
    axes = getattr(values, "ndim", 0)
    return values if axes == 0 else values.reshape(*values.shape, *[1] * (like.ndim - axes))


def rows_sum(values: Any) -> Any:
    """Sums over all axes but that of the rows, [B]."""
    return values.reshape(len(values), -1).sum(-1)


def rows_mean(values: Any) -> Any:
    """Means over all axes but that of the rows, [B]."""
    return values.reshape(len(values), -1).mean(-1)
