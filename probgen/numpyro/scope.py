"""Precision, device and mode for a block of code; nothing global stays changed."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from probgen.errors import ProbgenError
from probgen.numpyro.modes import mode_of


class Scope:
    """Precision, device and the modules' mode for a block of code; nothing global stays changed."""

    def __init__(self, device: jax.Device, precision: str, training: bool, modules: list[Any]) -> None:
        self.contexts = [precision_scope(precision), jax.default_device(device), mode_of(training, modules)]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def precision_scope(precision: str) -> contextlib.AbstractContextManager:
    """The scope in which arrays have the precision asked for: "32" or "64"."""
    if precision not in ("32", "64"):
        raise ProbgenError(
            f'precision={precision!r} is not NumPyro\'s to give: use "32" or "64", and set a network\'s own `dtype` '
            "to compute in bfloat16"
        )
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(precision == "64")
    from jax.experimental import enable_x64  # jax < 0.8

    return enable_x64(precision == "64")


def device_of(name: str) -> jax.Device:
    """The device called "auto", "cpu", "cuda" or "cuda:1"."""
    kind, _, index = str(name).partition(":")
    try:
        devices = jax.devices() if kind == "auto" else jax.devices("gpu" if kind == "cuda" else kind)
        return devices[int(index or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        there = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise ProbgenError(f'device={name!r} is not here: JAX has {there}; use device="auto"') from error


def has_cuda() -> bool:
    """Whether JAX sees a CUDA device."""
    return any(device.platform in ("gpu", "cuda") for device in jax.devices())
