"""What is done to raw values before a program sees them, and undone on its samples.

A `Preparation` is a program's steps (`probgen.data.steps`) fitted on the training rows. Its log-Jacobian, per row and in
nats, puts every likelihood in the units of the raw data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from probgen.data import ArraySpec, Data
from probgen.data.steps import STEPS, Binarize, Dequantize, Flatten, Logit, Scale, Standardize, Step, Uniforms
from probgen.errors import ProbgenError, did_you_mean

__all__ = ["Binarize", "Dequantize", "Flatten", "Logit", "Preparation", "Scale", "Standardize", "Step", "program_dtype"]

_SAMPLE_ELEMENTS = 2**23


@dataclass(frozen=True)
class Preparation:
    """The fitted steps of every prepared array, in order.

    `prepared` describes the arrays after their steps; `counted` names the arrays whose log-Jacobian is in the
    likelihood (None: all that have steps).
    """

    steps: Mapping[str, tuple[Step, ...]]
    prepared: Mapping[str, ArraySpec]
    counted: tuple[str, ...] | None = None

    @classmethod
    def of(cls, prepare: Mapping[str, Any], data: Data) -> Preparation:
        """Fit a program's steps on the training rows."""
        steps, prepared = {}, {}
        for name, chain in prepare.items():
            if name not in data.spec:
                raise ProbgenError(
                    f"the program prepares an array {name!r}, and the data has {', '.join(data.spec)}: rename one"
                )
            chain = tuple(chain) if isinstance(chain, Sequence) else (chain,)
            if chain:
                steps[name], prepared[name] = _fitted_chain(chain, data, name)
        return cls(steps, prepared)

    @property
    def random(self) -> bool:
        """Whether some step draws anew at each pass."""
        return any(step.random for chain in self.steps.values() for step in chain)

    def counting(self, names: Sequence[str]) -> Preparation:
        """The same, with the log-Jacobians of these arrays alone in the likelihood: the data, not what is given."""
        return replace(self, counted=tuple(names))

    def forward(
        self, arrays: Mapping[str, np.ndarray], rng: Uniforms | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Arrays as a program sees them, and log |det ∂prepared/∂raw| [rows] summed over the arrays that count.

        Pixels and bits (uint8, bool) become float32, other integers int64; a float array keeps its precision.
        """
        ready = {name: np.asarray(array) for name, array in arrays.items()}
        rows = len(next(iter(ready.values())))
        log_jacobian = np.zeros(rows)
        for name, chain in self.steps.items():
            if name not in ready:
                continue
            for step in chain:
                ready[name], term = step.forward(ready[name], rng)
                if self.counted is None or name in self.counted:
                    log_jacobian = log_jacobian + term
        kinds = {n: program_dtype(np.asarray(a), n in self.steps) for n, a in arrays.items()}
        return {name: array.astype(kinds[name], copy=False) for name, array in ready.items()}, log_jacobian

    def inverse(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Prepared values (samples, means) in the data's own units; arrays without steps pass through."""
        raw = dict(arrays)
        for name in self.steps.keys() & arrays.keys():
            value = np.asarray(arrays[name])
            kind = value.dtype if value.dtype.kind == "f" else np.float64
            for step in reversed(self.steps[name]):
                value = step.inverse(value)
            raw[name] = value.astype(kind, copy=False)
        return raw

    def spec(self, spec: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
        """The spec of the prepared arrays, of that of the raw ones."""
        return {name: self.prepared.get(name) or _as_seen(raw) for name, raw in spec.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives back the same preparation exactly."""
        return {
            "steps": {name: [step.to_json() for step in chain] for name, chain in self.steps.items()},
            "prepared": {name: spec.to_json() for name, spec in self.prepared.items()},
            "counted": None if self.counted is None else list(self.counted),
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Preparation:
        """The preparation that `to_json` wrote."""
        steps = {name: tuple(_step(entry) for entry in chain) for name, chain in obj["steps"].items()}
        prepared = {name: ArraySpec.from_json(entry) for name, entry in obj["prepared"].items()}
        return cls(steps, prepared, None if obj["counted"] is None else tuple(obj["counted"]))


def program_dtype(array: np.ndarray, prepared: bool = False) -> np.dtype:
    """The dtype in which raw values reach a program: pixels and bits as floats, labels and counts as int64."""
    if prepared or (array.dtype in (np.uint8, np.bool_) and array.ndim > 1):
        return np.result_type(array.dtype, np.float32)
    if array.dtype.kind in "iu":
        return np.dtype(np.int64)
    return array.dtype


def _as_seen(raw: ArraySpec) -> ArraySpec:
    seen = program_dtype(np.empty((1, *raw.shape), raw.dtype))
    return replace(raw, dtype=seen.name)


def _fitted_chain(chain: Sequence[Step], data: Data, name: str) -> tuple[tuple[Step, ...], ArraySpec]:
    """Fit each step on what the ones before it make of the training rows."""
    array, spec, rng = data.train.sample()[name], data.spec[name], np.random.default_rng(0)
    dtype = program_dtype(array, prepared=True).name
    fitted = []
    for i, step in enumerate(chain):
        if not isinstance(step, Step):
            raise ProbgenError(
                f"prepare[{name!r}] holds {step!r}, which is not a step: use {', '.join(STEPS)}"
                + (" with parentheses" if isinstance(step, type) else "")
            )
        step = step.fitted(array, spec, name)
        if not any(later.reads_all for later in chain[i + 1 :]):
            array = _thinned(array)
        array, _ = step.forward(array, rng)
        ends = step.range(*spec.range) or (float(array.min()), float(array.max()))
        spec = ArraySpec(array.shape[1:], dtype, ends, None, np.asarray(array.mean(axis=0, dtype=np.float64)))
        fitted.append(step)
    return tuple(fitted), spec


def _thinned(array: np.ndarray) -> np.ndarray:
    """Evenly spaced rows where all would cost a noticeable time; enough for a mean."""
    rows = max(1, _SAMPLE_ELEMENTS // max(1, math.prod(array.shape[1:])))
    return array if len(array) <= rows else array[np.linspace(0, len(array) - 1, rows).astype(np.int64)]


def _step(entry: Mapping[str, Any]) -> Step:
    values = dict(entry)
    name = values.pop("step")
    if name not in STEPS:
        raise ProbgenError(f"the run was prepared by a step {name!r} that is not known{did_you_mean(name, STEPS)}")
    return STEPS[name](**values)
