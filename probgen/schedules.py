"""Schedules are values: functions of the step that a loss or an optimizer reads inside the compiled step.

They use nothing but arithmetic that NumPy, PyTorch and JAX share, so one schedule serves every backend and is
never frozen by a trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from probgen.errors import ProbgenError


@runtime_checkable
class Schedule(Protocol):
    """A function of the step number (counted from 0), which may be a traced scalar."""

    def __call__(self, step: Any) -> Any:
        """The value at `step`."""


def _clip01(u: Any) -> Any:
    """min(max(u, 0), 1) from |·| alone, so that it is the same expression on every array library."""
    return (abs(u) - abs(u - 1) + 1) / 2


def refuse_other(owner: str, **values: Any) -> None:
    """Refuse arguments of `owner` that are no numbers (of any array library) and no functions of the step."""
    for name, value in values.items():
        no_number = value is None or isinstance(value, str | list | tuple | dict)
        if no_number or (isinstance(value, Real) and not math.isfinite(value)):
            raise ProbgenError(
                f"{owner}: `{name}` must be a number or a schedule, e.g. Linear(0, 1, 1000), not {value!r}"
            )


def _numbers(schedule: Any, *names: str) -> None:
    """Refuse values that are no numbers, and a length that is not positive."""
    for name in names:
        value = getattr(schedule, name)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ProbgenError(f"{type(schedule).__name__}: `{name}` must be a number, not {value!r}")
    if "steps" in names and schedule.steps <= 0:
        raise ProbgenError(f"{type(schedule).__name__}: `steps` is {schedule.steps}: it must be positive")


@dataclass(frozen=True)
class Linear:
    """start + (end − start) · min(step / steps, 1)."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _numbers(self, "start", "end", "steps")

    def __call__(self, step: Any) -> Any:
        """The value at `step`."""
        return self.start + (self.end - self.start) * _clip01(step / self.steps)


@dataclass(frozen=True)
class Cosine:
    """end + (start − end) · ½(1 + cos(π · min(step / steps, 1)))  (Loshchilov & Hutter, arXiv:1608.03983)."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _numbers(self, "start", "end", "steps")

    def __call__(self, step: Any) -> Any:
        """The value at `step`."""
        angle = math.pi * _clip01(step / self.steps)
        return self.end + (self.start - self.end) * (1 + _cos(angle)) / 2


@dataclass(frozen=True)
class Steps:
    """A staircase: `start` times `factor` at each of the `milestones` passed."""

    start: float
    factor: float
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        _numbers(self, "start", "factor")
        if not isinstance(self.milestones, tuple | list) or not all(isinstance(m, Real) for m in self.milestones):
            raise ProbgenError(f"Steps: `milestones` must be steps, e.g. (1000, 2000), not {self.milestones!r}")

    def __call__(self, step: Any) -> Any:
        """The value at `step`."""
        value = self.start
        for milestone in self.milestones:
            passed = _clip01(step - milestone + 1)  # whole steps: 0 before the milestone, 1 from it on
            value = value * (1 + (self.factor - 1) * passed)
        return value


def _cos(angle: Any) -> Any:
    """cos, whoever owns the array."""
    if isinstance(angle, float | int):
        return math.cos(angle)
    owner = type(angle).__module__.partition(".")[0]
    if owner == "torch":
        return angle.cos()
    if owner == "numpy":
        import numpy

        return numpy.cos(angle)
    import jax.numpy

    return jax.numpy.cos(angle)


def value_at(value: float | Schedule, step: Any) -> Any:
    """`value` itself, or what it says at `step` when it is a schedule."""
    return value(step) if callable(value) else value
