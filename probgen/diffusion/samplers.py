"""Samplers of a diffusion: one step of each, on plain array operators; the loops belong to the backends.

    x_t = α_t x + σ_t ε,   y = x_t / α_t,   ς = σ_t / α_t          then dy / dς = ε̂  along the probability flow

All read one `GaussianChain`, whatever its network predicts. `t` falls from 1 to 0 on a grid of `steps` steps; what a step needs
of the schedule is computed once, in double precision, and handed to it as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from probgen.arrays import namespace
from probgen.diffusion.denoiser import GaussianChain, Prediction
from probgen.diffusion.schedules import NoiseSchedule
from probgen.errors import ProbgenError

Numbers = Mapping[str, Any]  # of one step: t, s, and what the schedule says there
FIRST_TIME = 1e-3  # the earliest time at which a network is asked, where the grid is not that of its chain


class Sampler:
    """A grid of times, and a step from t to s < t.

    `noises` is how many arrays of N(0, 1) a step takes; `memory` what it hands to the next one.
    """

    steps: int
    guidance: float
    noises: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise ProbgenError(
                    f"{type(self).__name__}: `{field.name}` is {value!r}; it is a whole number, at least 1"
                )
            if field.type == "float" and (not isinstance(value, Real) or not math.isfinite(value) or value < 0):
                raise ProbgenError(f"{type(self).__name__}: `{field.name}` is {value!r}; it is a number, at least 0")

    def times(self, chain: GaussianChain) -> np.ndarray:
        """From 1 to 0, [steps + 1]: evenly, unless a sampler has its own."""
        return np.linspace(1.0, 0.0, self.steps + 1)

    def numbers(self, chain: GaussianChain) -> dict[str, np.ndarray]:
        """What each step is told, [steps] each."""
        times, at = self.times(chain), chain.schedule.in_numbers()
        return ratios(at, times[:-1], times[1:])

    def start(self, x: Any) -> tuple[Any, ...]:
        """The memory before the first step."""
        return ()

    def step(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> tuple[Any, tuple]:
        """From x_t to x_s."""
        raise TypeError(f"{type(self).__name__} must define `step`")

    def last(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> Any:
        """The step to s = 0, where there is no noise to be asked about: to x̂ itself."""
        return at["alpha_s"] * asked(chain, x, at).data


def ratios(schedule: NoiseSchedule, t: np.ndarray, s: np.ndarray) -> dict[str, np.ndarray]:
    """α, σ and their ratio ς at both ends of each step, and c, the part of the noise at t that came after s."""
    found = {"t": t, "s": s}
    for name, time in (("t", t), ("s", s)):
        found[f"alpha_{name}"], found[f"sigma_{name}"] = (
            schedule.alpha(time) + 0 * time,
            schedule.sigma(time) + 0 * time,
        )
    with np.errstate(divide="ignore"):  # no data at t = 1, or no noise at s = 0
        found |= {f"ratio_{name}": found[f"sigma_{name}"] / found[f"alpha_{name}"] for name in ("t", "s")}
        return {**found, "fresh": schedule.fresh(s, t) + 0 * t}


def karras(chain: GaussianChain, steps: int, rho: float) -> np.ndarray:
    """Times whose ς^{1/ρ} fall evenly, and then 0, [steps + 1]   (Karras et al., arXiv:2206.00364, eq. 5)."""
    low, high = (ratio ** (1 / rho) for ratio in asked_at(chain))
    return times_at(chain, np.linspace(high, low, steps) ** rho)


def asked_at(chain: GaussianChain) -> tuple[float, float]:
    """The smallest ς at which the network is asked, and that of t = 1."""
    at = chain.schedule.in_numbers()
    if not float(at.alpha(1.0)) > 0:
        raise ProbgenError(
            f"a grid of noise-to-signal ratios has no end where nothing of the data is left, as in {at!r} at t = 1: take DDIM, "
            "whose grid is of times, and which there is Euler's method along straight lines"
        )
    low, high = at.noise_to_signal(np.array([first_time(chain), 1.0]))
    return float(low), float(high)


def times_at(chain: GaussianChain, ratios: np.ndarray) -> np.ndarray:
    """The times of falling ratios ς, and then 0."""
    inner = chain.schedule.in_numbers().time_of(ratios[1:], start=first_time(chain))
    return np.concatenate([[1.0], inner, [0.0]])


def first_time(chain: GaussianChain) -> float:
    """The earliest time at which the network is asked."""
    return min(FIRST_TIME, 1 / chain.steps)


@dataclass(frozen=True)
class Ancestral(Sampler):
    """The program's own reverse chain, p(x_s | x_t) step by step, on a grid of as many steps as one likes.

    At s = 0 the mean is taken; `run.sample(n)` without a sampler also draws from p(x | x_1).
    """

    steps: int = 1000
    guidance: float = 0.0
    noises: ClassVar[int] = 1

    def step(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> tuple[Any, tuple]:
        """The mean of q(x_s | x_t, x̂) and noise of the chain's variance."""
        said = asked(chain, x, at)
        variance = chain.reverse_variance(said, at["t"], at["s"])
        return posterior_mean(said.data, x, at) + namespace(variance, x).sqrt(variance) * noise[0], memory


@dataclass(frozen=True)
class DDIM(Sampler):
    """x_s = α_s x̂ + √(σ_s² − η² β̃) ε̂ + η √β̃ z   (Song, Meng & Ermon, arXiv:2010.02502).

    η = 0 is deterministic: Euler's method in (y, ς); η = 1 is ancestral sampling with the smaller variance.
    """

    steps: int = 50
    eta: float = 0.0
    guidance: float = 0.0
    noises: ClassVar[int] = 1

    def numbers(self, chain: GaussianChain) -> dict[str, np.ndarray]:
        """With the shares of the old noise and of the new."""
        found = super().numbers(chain)
        fresh = self.eta**2 * found["fresh"] * found["sigma_s"] ** 2
        return {**found, "kept": np.sqrt(np.maximum(0.0, found["sigma_s"] ** 2 - fresh)), "added": np.sqrt(fresh)}

    def step(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> tuple[Any, tuple]:
        """One step."""
        said = asked(chain, x, at)
        return at["alpha_s"] * said.data + at["kept"] * said.noise + at["added"] * noise[0], memory


@dataclass(frozen=True)
class Euler(Sampler):
    """y_s = y_t + (ς_s − ς_t) ε̂, of first order, on Karras' grid."""

    steps: int = 50
    rho: float = 7.0
    guidance: float = 0.0

    def times(self, chain: GaussianChain) -> np.ndarray:
        """Karras' grid."""
        return karras(chain, self.steps, self.rho)

    def step(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> tuple[Any, tuple]:
        """One step."""
        return moved(x, asked(chain, x, at).noise, at), memory


@dataclass(frozen=True)
class Heun(Euler):
    """Euler's step, corrected by the slope at its end: of second order, two runs of the network a step (arXiv:2206.00364)."""

    steps: int = 25

    def step(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> tuple[Any, tuple]:
        """One step."""
        slope = asked(chain, x, at).noise
        return moved(x, (slope + asked(chain, moved(x, slope, at), at, "s").noise) / 2, at), memory


@dataclass(frozen=True)
class StochasticHeun(Heun):
    """EDM's sampler: noise up to ς̂ = ς (1 + γ), then Heun's step from there   (arXiv:2206.00364, Algorithm 2).

    γ = min(churn / steps, √2 − 1) where ς lies between `low` and `high`; `inflation` scales the new noise.
    """

    churn: float = 20.0
    low: float = 0.05
    high: float = 50.0
    inflation: float = 1.003
    noises: ClassVar[int] = 1

    def numbers(self, chain: GaussianChain) -> dict[str, np.ndarray]:
        """With the noisier time from which each step sets out."""
        schedule, times = chain.schedule.in_numbers(), self.times(chain)
        ratio = schedule.noise_to_signal(times[:-1])
        churned = (ratio >= self.low) & (ratio <= self.high)
        raised = np.minimum(ratio * (1 + churned * min(self.churn / self.steps, math.sqrt(2) - 1)), ratio[0])
        start = np.where(raised > ratio, schedule.time_of(raised), times[:-1])
        found = ratios(schedule, start, times[1:])
        before = schedule.alpha(times[:-1]) + 0 * start
        added = self.inflation * np.sqrt(np.maximum(0.0, raised**2 - ratio**2))
        return {**found, "lift": found["alpha_t"] / before, "added": found["alpha_t"] * added}

    def step(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> tuple[Any, tuple]:
        """One step."""
        return super().step(chain, at["lift"] * x + at["added"] * noise[0], at, noise, memory)

    def last(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> Any:
        """Noise, and then x̂."""
        return super().last(chain, at["lift"] * x + at["added"] * noise[0], at, noise, memory)


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++(2M): x̂ extrapolated from two steps, exact in the linear part   (Lu et al., arXiv:2211.01095).

        x_s = (σ_s / σ_t) x_t + α_s (1 − e^{−h}) D,   h = ½ (λ_s − λ_t),   D = x̂_t + h / (2 h′) (x̂_t − x̂′)

    with h′ and x̂′ of the step before. Of second order, one run of the network a step; λ rises evenly.
    """

    steps: int = 20
    guidance: float = 0.0

    def times(self, chain: GaussianChain) -> np.ndarray:
        """λ evenly, and then 0."""
        return times_at(chain, np.geomspace(*reversed(asked_at(chain)), self.steps))

    def numbers(self, chain: GaussianChain) -> dict[str, np.ndarray]:
        """With e^{−h} α_s ... and h / (2 h′), which is zero for the first step."""
        found = super().numbers(chain)
        with np.errstate(divide="ignore"):
            h = np.log(found["ratio_t"]) - np.log(found["ratio_s"])
        before = np.concatenate([[np.inf], h[:-1]])
        shrink = found["sigma_s"] / found["sigma_t"]
        ahead = np.where(np.isfinite(h), h, 0.0) / (2 * before)
        return {**found, "shrink": shrink, "gain": -np.expm1(-h) * found["alpha_s"], "ahead": ahead}

    def start(self, x: Any) -> tuple[Any, ...]:
        """The x̂ of no step."""
        return (namespace(x).zeros_like(x),)

    def step(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> tuple[Any, tuple]:
        """One step."""
        data = asked(chain, x, at).data
        ahead = data + at["ahead"] * (data - memory[0])
        return at["shrink"] * x + at["gain"] * ahead, (data,)


@dataclass(frozen=True)
class AnnealedLangevin(Sampler):
    """Langevin dynamics at falling noise: y ← y − ½ h ς ε̂ + √h ς z, `repeats` times at each level   (arXiv:1907.05600).

    `steps` levels whose ς fall geometrically from that of t = 1 to that of t = 0, or of the earliest time that has noise;
    h = `step_size` is the step in units of ς². Of as many runs of the network as levels times repeats; with
    `denoise` the last answer is x̂ itself.
    """

    steps: int = 20
    repeats: int = 50
    step_size: float = 0.2
    denoise: bool = True
    guidance: float = 0.0
    noises: ClassVar[int] = 1

    def times(self, chain: GaussianChain) -> np.ndarray:
        """Every level `repeats` times, and then 0."""
        at = chain.schedule.in_numbers()
        first = 0.0 if float(at.sigma(0.0)) > 0 else first_time(chain)
        levels = at.time_of(np.geomspace(*at.noise_to_signal(np.array([1.0, first])), self.steps), start=first)
        return np.concatenate([np.repeat(levels, self.repeats), [first]])

    def step(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> tuple[Any, tuple]:
        """Langevin at t, then the same y at the next level."""
        h = self.step_size
        slope = asked(chain, x, at).noise
        x = x + at["sigma_t"] * (math.sqrt(h) * noise[0] - 0.5 * h * slope)
        return at["alpha_s"] / at["alpha_t"] * x, memory

    def last(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> Any:
        """A last step, and if asked what is left of the noise taken off."""
        x, _ = self.step(chain, x, at, noise, memory)
        return asked(chain, x, at, "s").data if self.denoise else x


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """An ancestral step, then Langevin steps at the new noise level   (Song et al., arXiv:2011.13456, Algorithms 1, 4 and 5).

    A correction moves by ε s + √(2ε) z with ε = 2 r² σ², r being `snr`: there ε = 2 (r ‖z‖ / ‖s‖)² with norms averaged over the
    batch, which is this where ‖s‖ is √D / σ, as it should be, and here no row depends on the others.
    """

    steps: int = 100
    corrections: int = 1
    snr: float = 0.16
    guidance: float = 0.0

    @property
    def noises(self) -> int:  # type: ignore[override]
        """One for the step and one for each correction."""
        return 1 + self.corrections

    def step(self, chain: GaussianChain, x: Any, at: Numbers, noise: Any, memory: tuple) -> tuple[Any, tuple]:
        """One step and its corrections."""
        said = asked(chain, x, at)
        x = posterior_mean(said.data, x, at) + at["fresh"] ** 0.5 * at["sigma_t"] * noise[0]
        size = self.snr * at["sigma_s"]  # ε = 2 size²
        for z in noise[1:]:
            x = x + 2 * size * (size * asked(chain, x, at, "s").score + z)
        return x, memory


def asked(chain: GaussianChain, x: Any, at: Numbers, time: str = "t") -> Prediction:
    """What the network says of x at t, or at s, where α and σ are those of the table."""
    return chain(x, at[time], (at[f"alpha_{time}"], at[f"sigma_{time}"]))


def posterior_mean(data: Any, x: Any, at: Numbers) -> Any:
    """The mean of q(x_s | x_t, x)."""
    kept = at["alpha_t"] * at["sigma_s"] ** 2 / (at["alpha_s"] * at["sigma_t"] ** 2)
    return kept * x + at["alpha_s"] * at["fresh"] * data


def moved(x: Any, slope: Any, at: Numbers) -> Any:
    """y_t + (ς_s − ς_t) · slope, as x_s."""
    return at["alpha_s"] * (x / at["alpha_t"] + (at["ratio_s"] - at["ratio_t"]) * slope)


SAMPLERS = (Ancestral, DDIM, Euler, Heun, StochasticHeun, DPMSolver, AnnealedLangevin, PredictorCorrector)


def runs(sampler: Sampler, chain: GaussianChain) -> int:
    """How often a sampler runs the network."""
    steps = len(sampler.times(chain)) - 1
    if isinstance(sampler, Heun):
        return 2 * steps - 1
    if isinstance(sampler, PredictorCorrector):
        return (1 + sampler.corrections) * (steps - 1) + 1
    return steps + (isinstance(sampler, AnnealedLangevin) and sampler.denoise)
