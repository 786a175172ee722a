"""Steps of preparation: maps of an array's values, with their inverse and log-Jacobian.

    y = f(x),    log p(x) = log p(y) + log |det ∂y/∂x|

A step's constants come from the training rows (`fitted`), are recorded with the run and come back exactly. Each
log-Jacobian is per row, in nats.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from probgen.data.rows import ArraySpec
from probgen.errors import ProbgenError


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
            raise ProbgenError(f"Dequantize() needs integers, and {name!r} holds others: leave this step out")
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


@dataclass(frozen=True, eq=False)
class Flatten(Step):
    """y [N, D] of x [N, *shape]: each row as one vector, for a program that is written on vectors.

    The inverse gives rows their shape back. The log-Jacobian is 0.
    """

    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))

    def fitted(self, train: np.ndarray, spec: ArraySpec, name: str = "x") -> Flatten:
        """Resolve the shape of a row."""
        return replace(self, shape=tuple(spec.shape) if self.shape is None else self.shape)

    def forward(self, x: np.ndarray, rng: Uniforms | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows as vectors, and zeros."""
        x = np.asarray(x)
        return x.reshape(len(x), math.prod(x.shape[1:])), np.zeros(len(x))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Vectors as rows of the shape."""
        y = np.asarray(y)
        return y.reshape(*y.shape[:-1], *self.shape)

    def range(self, low: float, high: float) -> tuple[float, float]:
        """(low, high)."""
        return low, high


STEPS: dict[str, type[Step]] = {s.__name__: s for s in (Binarize, Dequantize, Flatten, Scale, Standardize, Logit)}
"""The steps a record can name."""


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
