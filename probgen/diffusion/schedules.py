"""Noise schedules: how much of the data and how much noise there is at time t, from t = 0 (data) to t = 1 (noise).

    x_t = α_t x + σ_t ε,   ε ~ N(0, I)
    λ_t = log α_t² / σ_t²                                 the log signal-to-noise ratio, falling in t
    q(x_t | x_s) = N(α_{t|s} x_s, σ²_{t|s}),  s < t:      α_{t|s} = α_t / α_s,  σ²_{t|s} = (1 − e^{λ_t − λ_s}) σ_t²

Variance-preserving schedules have α² + σ² = 1 (Ho et al., arXiv:2006.11239: ᾱ_t = α_t², β_t = σ²_{t|s}). `t` is a number or
an array of NumPy's, PyTorch's or JAX's, and so is what comes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.arrays import namespace
from probgen.errors import ProbgenError

NOISE_ENOUGH = 0.05  # the largest share of the data's variance that may be left at t = 1
BISECTIONS = 60


class NoiseSchedule:
    """α_t and σ_t with their derivatives; a schedule of one's own gives these four."""

    def alpha(self, t: Any) -> Any:
        """α_t, what is left of the data."""
        raise TypeError(f"{type(self).__name__} must define `alpha`")

    def sigma(self, t: Any) -> Any:
        """σ_t, the standard deviation of the noise."""
        raise TypeError(f"{type(self).__name__} must define `sigma`")

    def alpha_rate(self, t: Any) -> Any:
        """dα_t / dt."""
        raise TypeError(f"{type(self).__name__} must define `alpha_rate`")

    def sigma_rate(self, t: Any) -> Any:
        """dσ_t / dt."""
        raise TypeError(f"{type(self).__name__} must define `sigma_rate`")

    def log_snr(self, t: Any) -> Any:
        """λ_t = log α_t² / σ_t²; infinite where there is no noise."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        with np.errstate(divide="ignore"):
            return 2 * (namespace(alpha).log(alpha) - namespace(sigma).log(sigma))

    def between(self, s: Any, t: Any) -> tuple[Any, Any]:
        """(α_{t|s}, σ_{t|s}): what of x_s is left in x_t, and the standard deviation of the noise that was added."""
        fresh = self.fresh(s, t)
        return self.alpha(t) / self.alpha(s), namespace(fresh).sqrt(fresh) * self.sigma(t)

    def fresh(self, s: Any, t: Any) -> Any:
        """1 − e^{λ_t − λ_s} = σ²_{t|s} / σ_t²: which part of the noise at t came after s."""
        change = self.log_snr(t) - self.log_snr(s)
        return -namespace(change).expm1(change)

    @property
    def end_scale(self) -> Any:
        """The standard deviation of x_1 for data of unit variance, √(α_1² + σ_1²)."""
        variance = self.alpha(1.0) ** 2 + self.sigma(1.0) ** 2
        return namespace(variance).sqrt(variance)

    def refuse_no_noise(self) -> None:
        """Refuse a schedule that leaves too much of the data at t = 1 for the chain to start from noise."""
        left = 1 / (1 + math.exp(-float(self.log_snr(1.0))))
        if not left <= NOISE_ENOUGH:
            raise ProbgenError(
                f"{self!r} does not end in noise: {left:.0%} of the variance at t = 1 is the data's, and at most "
                f"{NOISE_ENOUGH:.0%} may be, since samples start from noise alone: let it add more noise"
            )

    def time_of(self, sigma: Any, start: float = 0.0) -> np.ndarray:
        """The times at which the noise-to-signal ratio σ_t / α_t is `sigma`, by bisection between `start` and 1."""
        at, wanted = self.in_numbers(), -2 * np.log(np.asarray(sigma, np.float64))
        low, high = np.full(wanted.shape, start), np.ones(wanted.shape)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            noisier = at.log_snr(middle) < wanted
            low, high = np.where(noisier, low, middle), np.where(noisier, middle, high)
        return (low + high) / 2

    def noise_to_signal(self, t: Any) -> np.ndarray:
        """σ_t / α_t as numbers."""
        return np.exp(-self.in_numbers().log_snr(np.asarray(t, np.float64)) / 2)

    def in_numbers(self) -> NoiseSchedule:
        """The same with NumPy's numbers for its parameters."""
        return self


def _numbers(values: Any) -> np.ndarray:
    """An array of any library as NumPy's."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, np.float64)


class VariancePreserving(NoiseSchedule):
    """α² + σ² = 1; what is left to say is log α_t, and its derivative."""

    def log_alpha(self, t: Any) -> Any:
        """log α_t."""
        raise TypeError(f"{type(self).__name__} must define `log_alpha`")

    def log_alpha_rate(self, t: Any) -> Any:
        """d log α_t / dt."""
        raise TypeError(f"{type(self).__name__} must define `log_alpha_rate`")

    def alpha(self, t: Any) -> Any:
        """α_t."""
        log_alpha = self.log_alpha(t)
        return namespace(log_alpha).exp(log_alpha)

    def sigma(self, t: Any) -> Any:
        """√(1 − α_t²)."""
        variance = self._noise(t)
        return namespace(variance).sqrt(variance)

    def alpha_rate(self, t: Any) -> Any:
        """α_t d log α_t / dt."""
        return self.alpha(t) * self.log_alpha_rate(t)

    def sigma_rate(self, t: Any) -> Any:
        """−α_t² / σ_t d log α_t / dt."""
        return -(self.alpha(t) ** 2) / self.sigma(t) * self.log_alpha_rate(t)

    def _noise(self, t: Any) -> Any:
        twice = 2 * self.log_alpha(t)
        return -namespace(twice).expm1(twice)

    def fresh(self, s: Any, t: Any) -> Any:
        """(1 − α_{t|s}²) / σ_t², where little is lost when s and t are close."""
        change = 2 * (self.log_alpha(t) - self.log_alpha(s))
        return -namespace(change).expm1(change) / self._noise(t)


@dataclass(frozen=True)
class LinearSchedule(VariancePreserving):
    """β rises linearly: log α_t = −¼ t² (b − a) − ½ t a with a, b = `beta_min`, `beta_max` (Song et al., arXiv:2011.13456).

    The limit of Ho et al.'s 1000 betas from 1e-4 to 0.02; a chain of T steps has β_i = 1 − (α_{i/T} / α_{(i−1)/T})².
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t: Any) -> Any:
        """−¼ t² (b − a) − ½ t a."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def log_alpha_rate(self, t: Any) -> Any:
        """−½ (a + t (b − a))."""
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))


@dataclass(frozen=True)
class CosineSchedule(VariancePreserving):
    """α_t = cos θ_t / cos θ_0,  θ_t = (π/2) (t · end + s) / (1 + s)   (Nichol & Dhariwal, arXiv:2102.09672).

    `end` < 1 keeps a trace of the data at t = 1, where theirs clips the last β; their s, `offset`, is 0.008.
    """

    offset: float = 0.008
    end: float = 0.995

    def _angle(self, t: Any) -> Any:
        return (math.pi / 2) * (t * self.end + self.offset) / (1 + self.offset)

    def log_alpha(self, t: Any) -> Any:
        """log cos θ_t − log cos θ_0."""
        angle = self._angle(t)
        xp = namespace(angle)
        return xp.log(xp.cos(angle)) - math.log(math.cos(self._angle(0.0)))

    def log_alpha_rate(self, t: Any) -> Any:
        """−tan θ_t dθ/dt."""
        angle = self._angle(t)
        return -namespace(angle).tan(angle) * (math.pi / 2) * self.end / (1 + self.offset)


class LearnedSchedule(VariancePreserving):
    """α_t² = sigmoid(−γ_t), γ rising from γ_0 to γ_1 in straight pieces   (Kingma et al., VDM, arXiv:2107.00630).

    γ_t = γ_0 + (γ_1 − γ_0) Σ_k softmax(w)_k clip(K t − k, 0, 1). The bound depends on γ in between through its variance
    alone, so that what is learned is where noise is added slowly.

    Parameters
    ----------
    ends
        γ_0 and γ_1, two numbers or an array [2].
    weights
        w, [K].
    """

    def __init__(self, ends: Any, weights: Any) -> None:
        self.ends, self.weights = ends, weights

    def __repr__(self) -> str:
        return "LearnedSchedule(ends, weights)"

    def in_numbers(self) -> LearnedSchedule:
        """With its weights as they are now."""
        return LearnedSchedule([float(end) for end in self.ends], _numbers(self.weights))

    def _gamma(self, t: Any) -> tuple[Any, Any]:
        """γ_t and its derivative."""
        xp, pieces = namespace(self.weights, t), self.weights.shape[-1]
        exp = xp.exp(self.weights - self.weights.max())
        share, span = exp / exp.sum(), self.ends[1] - self.ends[0]
        t = t[..., None] if getattr(t, "ndim", 0) else t
        place = t * pieces - _counted(self.weights)
        inside = (abs(place) - abs(place - 1) + 1) / 2  # clip(place, 0, 1)
        slope = share * ((place >= 0) & (place < 1 + 0.5 * (t >= 1))) * pieces  # the last piece has its end
        return self.ends[0] + span * (share * inside).sum(-1), span * slope.sum(-1)

    def log_alpha(self, t: Any) -> Any:
        """−½ log(1 + e^{γ_t})."""
        gamma = self._gamma(t)[0]
        return -0.5 * namespace(gamma).logaddexp(gamma, 0 * gamma)

    def log_alpha_rate(self, t: Any) -> Any:
        """−½ sigmoid(γ_t) dγ_t / dt."""
        gamma, rate = self._gamma(t)
        return -0.5 * rate / (1 + namespace(gamma).exp(-gamma))

    def log_snr(self, t: Any) -> Any:
        """−γ_t."""
        return -self._gamma(t)[0]


def _counted(weights: Any) -> Any:
    """0, 1, ..., K − 1, where the weights are."""
    ones = weights * 0 + 1
    return namespace(weights).cumsum(ones, 0) - 1


@dataclass(frozen=True)
class GeometricSchedule(NoiseSchedule):
    """Variance-exploding: α = 1, σ_t = σ_min (σ_max / σ_min)^t   (Song & Ermon, arXiv:1907.05600; Song et al., arXiv:2011.13456)."""

    sigma_min: float = 0.01
    sigma_max: float = 10.0

    def alpha(self, t: Any) -> Any:
        """1."""
        return 0 * t + 1.0

    def sigma(self, t: Any) -> Any:
        """σ_min (σ_max / σ_min)^t."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def alpha_rate(self, t: Any) -> Any:
        """0."""
        return 0 * t

    def sigma_rate(self, t: Any) -> Any:
        """σ_t log(σ_max / σ_min)."""
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def log_snr(self, t: Any) -> Any:
        """−2 log σ_t."""
        return -2 * (math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True)
class SubVPSchedule(LinearSchedule):
    """α_t as in `LinearSchedule`, and less noise: σ_t = 1 − α_t²   (Song et al., arXiv:2011.13456)."""

    def sigma(self, t: Any) -> Any:
        """1 − α_t²."""
        return self._noise(t)

    def sigma_rate(self, t: Any) -> Any:
        """−2 α_t dα_t / dt."""
        return -2 * self.alpha(t) * self.alpha_rate(t)

    def fresh(self, s: Any, t: Any) -> Any:
        """1 − e^{λ_t − λ_s}."""
        return NoiseSchedule.fresh(self, s, t)


@dataclass(frozen=True)
class RectifiedSchedule(NoiseSchedule):
    """Straight lines from data to noise: α_t = 1 − t, σ_t = t   (Lipman et al., arXiv:2210.02747; Liu et al., arXiv:2209.03003)."""

    def alpha(self, t: Any) -> Any:
        """1 − t."""
        return 1 - t

    def sigma(self, t: Any) -> Any:
        """t."""
        return t

    def alpha_rate(self, t: Any) -> Any:
        """−1."""
        return 0 * t - 1.0

    def sigma_rate(self, t: Any) -> Any:
        """1."""
        return 0 * t + 1.0
