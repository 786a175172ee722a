"""What a network says of the noise in x_t, in whichever of five ways, and the Gaussians that follow from it.

    x_t = α_t x + σ_t ε;   x̂ estimates x, ε̂ estimates ε, and either gives the other: x_t = α_t x̂ + σ_t ε̂
    noise      ε̂                                data       x̂
    v          α_t ε̂ − σ_t x̂                    score      −ε̂ / σ_t ≈ ∇ log q(x_t)
    velocity   α̇_t x̂ + σ̇_t ε̂ = dx_t / dt along the probability flow

    q(x_s | x_t, x) = N(κ x_t + α_s c x, c σ_s²),   c = 1 − e^{λ_t − λ_s},   κ = α_t σ_s² / (α_s σ_t²)

The reverse chain p(x_s | x_t) puts x̂ in the place of x; its variance is the smaller c σ_s² ("posterior", Ho's β̃_t), the
larger c σ_t² ("beta", Ho's β_t), or learned between the two (Nichol & Dhariwal, arXiv:2102.09672).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from probgen.arrays import namespace, rows_sum, spread
from probgen.diffusion.levels import nearest
from probgen.diffusion.schedules import NoiseSchedule
from probgen.errors import ProbgenError, did_you_mean

PREDICTIONS = ("noise", "data", "v", "score", "velocity")
VARIANCES = ("beta", "posterior", "learned")


class Prediction:
    """What a network said at (x_t, t), read as data or as noise."""

    def __init__(
        self, schedule: NoiseSchedule, predicts: str, x_t: Any, t: Any, output: Any, between: Any, scales: Any = None
    ) -> None:
        self.schedule, self.x_t, self.t, self.output, self.between = schedule, x_t, t, output, between
        at = (schedule.alpha(t), schedule.sigma(t)) if scales is None else scales
        self.alpha, self.sigma = (spread(value, x_t) for value in at)
        self._predicts = predicts

    @property
    def noise(self) -> Any:
        """ε̂."""
        if self._predicts == "noise":
            return self.output
        if self._predicts == "score":
            return -self.sigma * self.output
        if self._predicts == "v":
            return (self.sigma * self.x_t + self.alpha * self.output) / (self.alpha**2 + self.sigma**2)
        if self._predicts == "velocity":
            alpha_rate, _, turn = self._rates()
            return (self.alpha * self.output - alpha_rate * self.x_t) / turn
        return (self.x_t - self.alpha * self.output) / self.sigma

    @property
    def data(self) -> Any:
        """x̂."""
        if self._predicts == "data":
            return self.output
        if self._predicts == "v":
            return (self.alpha * self.x_t - self.sigma * self.output) / (self.alpha**2 + self.sigma**2)
        if self._predicts == "velocity":
            _, sigma_rate, turn = self._rates()
            return (sigma_rate * self.x_t - self.sigma * self.output) / turn
        return (self.x_t - self.sigma * self.noise) / self.alpha

    @property
    def score(self) -> Any:
        """−ε̂ / σ_t."""
        return self.output if self._predicts == "score" else -self.noise / self.sigma

    @property
    def velocity(self) -> Any:
        """α̇_t x̂ + σ̇_t ε̂."""
        if self._predicts == "velocity":
            return self.output
        alpha_rate, sigma_rate, _ = self._rates()
        return alpha_rate * self.data + sigma_rate * self.noise

    def _rates(self) -> tuple[Any, Any, Any]:
        """α̇, σ̇ and α σ̇ − α̇ σ."""
        rates = [spread(r, self.x_t) for r in (self.schedule.alpha_rate(self.t), self.schedule.sigma_rate(self.t))]
        return *rates, self.alpha * rates[1] - rates[0] * self.sigma


def target(schedule: NoiseSchedule, predicts: str, x: Any, noise: Any, t: Any) -> Any:
    """What a network that `predicts` this ought to say of x_t = α_t x + σ_t ε."""
    if predicts in ("noise", "data"):
        return noise if predicts == "noise" else x
    alpha, sigma = spread(schedule.alpha(t), x), spread(schedule.sigma(t), x)
    if predicts == "score":
        return -noise / sigma
    if predicts == "v":
        return alpha * noise - sigma * x
    return spread(schedule.alpha_rate(t), x) * x + spread(schedule.sigma_rate(t), x) * noise


class GaussianChain:
    """A network, a noise schedule and the Gaussians of the two chains, as means and variances.

    Parameters
    ----------
    network
        (x_t [B, *shape], t [B]) → what it predicts, [B, *shape]; with a learned variance [B, *shape, 2], of which the
        second says where between the two variances it lies.
    schedule
        α_t and σ_t.
    predicts
        "noise", "data", "v", "score" or "velocity".
    steps
        T: the chain has the times 1/T, 2/T, ..., 1.
    variance
        Of the reverse chain: "beta", "posterior", "learned", or a function (t, s) → σ².
    levels
        Of whole-numbered data 0..levels − 1, which lie in −1..1 as far as the chain is concerned; None for real data.
    site
        The data site, which bears the name of its array.
    labels, classes
        y [B] of a conditional network, (x_t, t, y), and how many classes there are; the label `classes` stands for none.
    """

    def __init__(
        self,
        network: Callable[[Any, Any], Any],
        schedule: NoiseSchedule,
        predicts: str = "noise",
        steps: int = 1000,
        variance: str | Callable[[Any, Any], Any] = "beta",
        levels: int | None = None,
        site: str = "x",
        labels: Any = None,
        classes: int | None = None,
    ) -> None:
        if predicts not in PREDICTIONS:
            raise ProbgenError(
                f"Denoiser: predicts={predicts!r} is none of {', '.join(PREDICTIONS)}{did_you_mean(predicts, PREDICTIONS)}"
            )
        if not callable(variance) and variance not in VARIANCES:
            raise ProbgenError(
                f"Denoiser: variance={variance!r} is none of {', '.join(VARIANCES)}, and no function of (t, s)"
            )
        refuse_no_steps(steps)
        left = schedule.alpha(1.0)
        if predicts in ("noise", "score") and isinstance(left, Real) and left == 0:
            raise ProbgenError(
                f"Denoiser: a network that predicts {predicts} says nothing of the data at t = 1, where {schedule!r} leaves nothing "
                "of them: predict velocity, v or data"
            )
        self.network, self.schedule, self.predicts = network, schedule, predicts
        self.steps, self.variance, self.levels, self.site = steps, variance, levels, site
        self.labels, self.classes, self.guidance = labels, classes, 0.0

    def __call__(self, x_t: Any, t: Any, scales: tuple[Any, Any] | None = None) -> Prediction:
        """What the network says of x_t [B, *shape] at time t, a number or one for each row [B].

        `scales` are α_t and σ_t, where they are known.
        """
        rows = time_of_rows(x_t, t)
        output = self._output(x_t, rows)
        learned = self.variance == "learned"
        wanted = (*x_t.shape, 2) if learned else tuple(x_t.shape)
        if tuple(output.shape) != wanted:
            raise ProbgenError(
                f"Denoiser: of x_t {tuple(x_t.shape)} the network gives {tuple(output.shape)}, and {wanted} is needed"
                + (": a learned variance takes a second number for each" if learned else "")
            )
        said, between = (output[..., 0], output[..., 1]) if learned else (output, None)
        return Prediction(self.schedule, self.predicts, x_t, t, said, between, scales)

    def _output(self, x_t: Any, t: Any) -> Any:
        if self.labels is None:
            return self.network(x_t, t)
        output = self.network(x_t, t, self.labels)
        if not self.guidance:
            return output
        return (1 + self.guidance) * output - self.guidance * self.network(x_t, t, self.labels * 0 + self.classes)

    def guided(self, guidance: float) -> GaussianChain:
        """(1 + w) times what the network says with its labels, minus w times what it says without (arXiv:2207.12598)."""
        if guidance and self.labels is None:
            raise ProbgenError(
                f"guidance={guidance} strengthens the label, and this program has none: fit one that is conditional, or leave "
                "guidance out"
            )
        found = copy.copy(self)
        found.guidance = guidance
        return found

    def dropped(self, chosen: Any) -> GaussianChain:
        """Without the labels of the rows that are chosen, [B] of truth values."""
        found = copy.copy(self)
        found.labels = namespace(chosen).where(chosen, self.labels * 0 + self.classes, self.labels)
        return found

    def embed(self, x: Any) -> Any:
        """Data as the chain sees them: real ones as they are, levels 0..L − 1 in −1..1."""
        return x if self.levels is None else x * (2.0 / (self.levels - 1)) - 1.0

    def restored(self, x: Any) -> Any:
        """The reverse of `embed`: whole numbers are the nearest ones."""
        return x if self.levels is None else nearest(x, self.levels)

    def before(self, t: Any, s: Any = None) -> Any:
        """The time one step before t, where no other is given."""
        return t - 1 / self.steps if s is None else s

    def posterior(self, x_t: Any, x: Any, t: Any, s: Any) -> tuple[Any, Any]:
        """Mean [B, *shape] and variance of q(x_s | x_t, x)."""
        at = self.schedule
        fresh, sigma_s = at.fresh(s, t), at.sigma(s)
        kept = at.alpha(t) * sigma_s**2 / (at.alpha(s) * at.sigma(t) ** 2)
        mean = spread(kept, x_t) * x_t + spread(at.alpha(s) * fresh, x_t) * x
        return mean, spread(fresh * sigma_s**2, x_t)

    def reverse_variance(self, said: Prediction, t: Any, s: Any) -> Any:
        """The variance of p(x_s | x_t)."""
        at, x_t = self.schedule, said.x_t
        if callable(self.variance):
            return spread(self.variance(t, s), x_t)
        fresh = at.fresh(s, t)
        large = spread(fresh * at.sigma(t) ** 2, x_t)
        if self.variance == "beta":
            return large
        small = spread(fresh * at.sigma(s) ** 2, x_t)
        if self.variance == "posterior":
            return small
        share = 1 / (1 + namespace(x_t).exp(-said.between))
        logs = [namespace(value).log(value) for value in (large, small)]
        return namespace(x_t).exp(share * logs[0] + (1 - share) * logs[1])

    def last_variance(self, said: Prediction, t: Any) -> Any:
        """That of x itself given x_{1/T}, where the posterior's would be zero: β_1, or that of the function given."""
        if callable(self.variance):
            return spread(self.variance(t, 0.0), said.x_t)
        return spread(self.schedule.sigma(t) ** 2, said.x_t)

    def between(self, t: Any, s: Any) -> tuple[Any, Any]:
        """(α_{t|s}, σ_{t|s}); data are clean at s = 0, also where the schedule begins with some noise."""
        if isinstance(s, Real) and s <= 0:
            return self.schedule.alpha(t), self.schedule.sigma(t)
        return self.schedule.between(s, t)

    def noised(self, x: Any, t: Any, noise: Any) -> Any:
        """x_t = α_t x + σ_t ε, of embedded data."""
        return spread(self.schedule.alpha(t), x) * x + spread(self.schedule.sigma(t), x) * noise

    def prior_kl(self, x: Any) -> Any:
        """L_T of each row, [B]; `x` is embedded data."""
        at = self.schedule
        end = at.end_scale**2
        return rows_sum(gaussian_kl(at.alpha(1.0) * x, at.sigma(1.0) ** 2 + 0 * x, 0.0, end))

    def step_kl(self, x: Any, said: Prediction, t: Any, s: Any) -> Any:
        """KL(q(x_s | x_t, x) ‖ p(x_s | x_t)) of each row, [B]: the means differ by α_s c (x − x̂)."""
        mean, variance = self.posterior(said.x_t, x, t, s)
        other, other_variance = self.posterior(said.x_t, said.data, t, s)[0], self.reverse_variance(said, t, s)
        return rows_sum(gaussian_kl(mean, variance + 0 * x, other, other_variance))

    def expected_costs(self) -> np.ndarray:
        """What each step of the chain costs data that are N(0, 1), in nats per dimension, [T].

        The best x̂ errs by σ² / (α² + σ²), so L_{i−1} ≈ ½ (SNR_{i−1} − SNR_i) of that; the steps are drawn in this
        proportion by proposal="importance".
        """
        times = np.arange(1, self.steps + 1) / self.steps
        ratio = self.schedule.noise_to_signal(times) ** -2.0  # SNR_i
        before = np.concatenate([ratio[:1] * 4, ratio[:-1]])  # of the first step, which is x's own, something like it
        return 0.5 * (before - ratio) / (1 + ratio)


def refuse_no_steps(steps: Any) -> None:
    """Refuse a chain that has no latents."""
    if not isinstance(steps, int) or steps < 1:
        raise ProbgenError(f"Denoiser: a chain of steps={steps!r} has no latents; it needs at least 1 step")


def time_of_rows(x_t: Any, t: Any) -> Any:
    """A time for each row, [B], of one for all or of as many as x_t [B, *shape] has rows."""
    axes = getattr(t, "ndim", 0)
    if axes > 1 or (axes == 1 and len(t) != len(x_t)):
        raise ProbgenError(
            f"Denoiser: time has the shape {tuple(t.shape)}, and x_t {tuple(x_t.shape)}: give one number, or one for each "
            f"row, [{len(x_t)}]"
        )
    return t if axes else namespace(x_t).zeros_like(x_t.reshape(len(x_t), -1)[:, 0]) + t


def gaussian_kl(mean: Any, variance: Any, other_mean: Any, other_variance: Any) -> Any:
    """KL(N(mean, variance) ‖ N(other_mean, other_variance)) of each number, in nats."""
    ratio = variance / other_variance
    return 0.5 * (ratio - 1 - namespace(ratio).log(ratio) + (mean - other_mean) ** 2 / other_variance)
