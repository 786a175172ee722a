"""What is done to raw values before a program sees them, and undone on its samples.

    y = f(x),    log p(x) = log p(y) + log |det ∂y/∂x|

A step's constants come from the training rows (`fitted`), are recorded with the run and come back exactly. Each
log-Jacobian is per row, in nats, so that every likelihood is in the units of the raw data.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from probgen.data import ArraySpec, Data
from probgen.errors import ProbgenError, did_you_mean

_SAMPLE_ELEMENTS = 2**23


class Uniforms(Protocol):
    """What random steps draw from: a `numpy.random.Generator`, or several behind one face."""

    def random(self, size: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
        """Uniform draws in [0, 1)."""


class Step:
    """One invertible (or, for `Binarize`, lossy) map of an array's values."""

    random: bool = False
    reads_all: ClassVar[bool] = False  # whether `fitted` needs every row rather than their range

    def fitted(self, train: np.ndarray, spec: ArraySpec, name: str = "x") -> Step:
        """The step with its constants resolved on the training rows of the array `name`."""
        return self

    def forward(self, x: np.ndarray, rng: Uniforms | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(y [N, ...], log |det ∂y/∂x| [N])."""
        raise TypeError(f"{type(self).__name__} must define `forward`")

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """x of y, whatever axes stand in front of a row's."""
        raise TypeError(f"{type(self).__name__} must define `inverse`")

    def range(self, low: float, high: float) -> tuple[float, float] | None:
        """The range of y when that of x is (low, high); None when it has to be measured."""
        return None

    def to_json(self) -> dict[str, Any]:
        """The step's name and constants."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
        return {"step": type(self).__name__, **plain}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(repr(self.to_json()))


@dataclass(frozen=True, eq=False)
class Binarize(Step):
    """Bits: y = 1[x > threshold], or y ~ Bernoulli((x − low) / (high − low)) anew at each pass if `stochastic`.

    `threshold` is the middle of the training range unless given. The likelihood is that of the bits: the
    log-Jacobian is 0. The inverse maps 0 and 1 to the lowest and highest training value. Dynamic binarization:
    Salakhutdinov & Murray, ICML 2008.
    """

    threshold: float | None = None
    stochastic: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def random(self) -> bool:  # type: ignore[override]
        """Whether each pass draws anew."""
        return self.stochastic

    def fitted(self, train: np.ndarray, spec: ArraySpec, name: str = "x") -> Binarize:
        """Resolve the range and the threshold."""
        low, high = _range(self, spec, name)
        threshold = (low + high) / 2 if self.threshold is None else float(self.threshold)
        if not low <= threshold < high:
            raise ProbgenError(
                f"Binarize(threshold={threshold:g}) makes every value of {name!r} equal: its range is "
                f"{low:g}..{high:g}, take a threshold inside"
            )
        return replace(self, threshold=threshold, low=low, high=high)

    def forward(self, x: np.ndarray, rng: Uniforms | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Bits as floats, and zeros."""
        if self.stochastic:
            probability = (np.asarray(x, np.float32) - np.float32(self.low)) / np.float32(self.high - self.low)
            bits = _drawing(rng, self).random(np.shape(x), dtype=np.float32) < probability
        else:
            bits = np.asarray(x) > self.threshold
        return bits.astype(np.float32), np.zeros(len(bits))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """low + y (high − low), so that a mean of bits is a value between."""
        return self.low + np.asarray(y, np.float64) * (self.high - self.low)

    def range(self, low: float, high: float) -> tuple[float, float]:
        """(0, 1)."""
        return 0.0, 1.0


@dataclass(frozen=True, eq=False)
class Dequantize(Step):
    """y = x + u, u ~ Uniform[0, 1) anew at each pass, for integer x; the inverse is ⌊y⌋.

    E_u log p(x + u) ≤ log P(x), so a density of y bounds the probability of x (Theis et al., arXiv:1511.01844). The
    log-Jacobian is 0.
    """

    random: bool = field(default=True, init=False)

    def fitted(self, train: np.ndarray, spec: ArraySpec, name: str = "x") -> Dequantize:
        """Refuse values that are not integers."""
        train = np.asarray(train)
        if train.dtype.kind == "f" and not (train == np.floor(train)).all():
            raise ProbgenError(
                f"Dequantize() needs integers, and {name!r} holds values between them: leave it out, or put Scale after it"
            )
        return self

    def forward(self, x: np.ndarray, rng: Uniforms | None = None) -> tuple[np.ndarray, np.ndarray]:
        """x + u, and zeros."""
        x = np.asarray(x, np.float64)
        # below the next integer even when rounded to float32
        ceiling = np.nextafter((x + 1).astype(np.float32), np.float32(-np.inf))
        return np.minimum(x + _drawing(rng, self).random(x.shape), ceiling), np.zeros(len(x))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """⌊y⌋."""
        return np.floor(np.asarray(y, np.float64))

    def range(self, low: float, high: float) -> tuple[float, float]:
        """(low, high + 1)."""
        return low, high + 1

    def to_json(self) -> dict[str, Any]:
        """The step's name: it has no constants."""
        return {"step": "Dequantize"}


@dataclass(frozen=True, eq=False)
class Scale(Step):
    """y = (x − low) / (high − low): to [0, 1] from the training range, or from the bounds given.

    Bounds that are the middle and the end of the range scale to [−1, 1]: `Scale(127.5, 255)`. Log-Jacobian:
    −D log(high − low).
    """

    low: float | None = None
    high: float | None = None

    def fitted(self, train: np.ndarray, spec: ArraySpec, name: str = "x") -> Scale:
        """Resolve the bounds."""
        low, high = _range(self, spec, name)
        return replace(self, low=low, high=high)

    def forward(self, x: np.ndarray, rng: Uniforms | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(x − low) / (high − low)."""
        x, width = np.asarray(x, np.float64), self.high - self.low
        return (x - self.low) / width, np.full(len(x), -math.prod(x.shape[1:]) * math.log(width))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """low + y (high − low)."""
        return self.low + np.asarray(y, np.float64) * (self.high - self.low)

    def range(self, low: float, high: float) -> tuple[float, float]:
        """The bounds of x, mapped."""
        width = self.high - self.low
        return (low - self.low) / width, (high - self.low) / width


@dataclass(frozen=True, eq=False)
class Standardize(Step):
    """y = (x − mean) / std, element by element over the training rows. Log-Jacobian: −Σ log std.

    An element that is constant over the training rows is only centred (std 1), with a warning.
    """

    reads_all: ClassVar[bool] = True

    mean: np.ndarray | None = None
    std: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        if self.std is not None and not (self.std > 0).all():
            raise ProbgenError("Standardize: every `std` must be positive")

    def fitted(self, train: np.ndarray, spec: ArraySpec, name: str = "x") -> Standardize:
        """Resolve mean and standard deviation."""
        train = np.asarray(train)
        mean = train.mean(axis=0, dtype=np.float64) if self.mean is None else self.mean
        if self.std is not None:
            return replace(self, mean=mean)
        std = np.asarray(train.std(axis=0, dtype=np.float64))
        constant = std <= 1e-12 * np.abs(train[0].astype(np.float64))
        if constant.any():
            warnings.warn(
                f"Standardize: {int(constant.sum())} of {constant.size} elements of {name!r} are constant over the "
                "training rows; they are centred and not scaled",
                stacklevel=2,
            )
        return replace(self, mean=mean, std=np.where(constant, 1.0, std))

    def forward(self, x: np.ndarray, rng: Uniforms | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(x − mean) / std."""
        x = np.asarray(x, np.float64)
        log_jacobian = -np.log(np.broadcast_to(self.std, x.shape[1:])).sum()
        return (x - self.mean) / self.std, np.full(len(x), log_jacobian)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Mean + std · y."""
        return self.mean + np.asarray(y, np.float64) * self.std


@dataclass(frozen=True, eq=False)
class Logit(Step):
    """y = log p − log(1 − p) with p = alpha + (1 − 2 alpha) x, for x in [0, 1]  (Dinh et al., arXiv:1605.08803).

    Log-Jacobian: Σ log(1 − 2 alpha) − log p − log(1 − p).
    """

    alpha: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5:
            raise ProbgenError(f"Logit(alpha={self.alpha:g}): alpha must lie between 0 and 0.5, e.g. 1e-6")

    def fitted(self, train: np.ndarray, spec: ArraySpec, name: str = "x") -> Logit:
        """Refuse values outside [0, 1]."""
        _refuse_outside(*spec.range, name)
        return self

    def forward(self, x: np.ndarray, rng: Uniforms | None = None) -> tuple[np.ndarray, np.ndarray]:
        """logit(alpha + (1 − 2 alpha) x)."""
        x = np.asarray(x, np.float64)
        if x.size:
            _refuse_outside(float(x.min()), float(x.max()), "the data")
        inner = 1 - 2 * self.alpha
        log_p, log_q = np.log(self.alpha + inner * x), np.log(self.alpha + inner * (1 - x))
        return log_p - log_q, _per_row(math.log(inner) - log_p - log_q)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """(sigmoid(y) − alpha) / (1 − 2 alpha)."""
        y = np.asarray(y, np.float64)
        small = np.exp(-np.abs(y))
        sigmoid = np.where(y >= 0, 1.0, small) / (1 + small)
        return (sigmoid - self.alpha) / (1 - 2 * self.alpha)

    def range(self, low: float, high: float) -> tuple[float, float]:
        """The ends, mapped."""
        ends, _ = self.forward(np.array([low, high]))
        return float(ends[0]), float(ends[1])


STEPS: dict[str, type[Step]] = {s.__name__: s for s in (Binarize, Dequantize, Scale, Standardize, Logit)}
"""The steps a record can name."""


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
                    f"the program prepares an array {name!r}, and the data has {', '.join(data.spec)}: rename one of them"
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
        spec = ArraySpec(spec.shape, dtype, ends, None, np.asarray(array.mean(axis=0, dtype=np.float64)))
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


def _range(step: Binarize | Scale, spec: ArraySpec, name: str) -> tuple[float, float]:
    low = spec.range[0] if step.low is None else float(step.low)
    high = spec.range[1] if step.high is None else float(step.high)
    if not low < high:
        raise ProbgenError(
            f"{type(step).__name__}: the range of {name!r} is {low:g}..{high:g}, which is empty: give `low` and `high`"
        )
    return low, high


def _refuse_outside(low: float, high: float, name: str) -> None:
    if low < 0 or high > 1:
        raise ProbgenError(
            f"Logit() takes values in [0, 1], and {name!r} has {low:g}..{high:g}: put Scale(low, high) before it, with "
            "bounds that hold every value"
        )


def _drawing(rng: Uniforms | None, step: Step) -> Uniforms:
    if rng is None:
        raise ProbgenError(f"{type(step).__name__} draws random numbers: pass a `numpy.random.Generator`")
    return rng


def _per_row(terms: np.ndarray) -> np.ndarray:
    return terms.sum(axis=tuple(range(1, terms.ndim)))
