"""Losses of densities that are known up to a constant: their gradient by the data is all that these look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from probgen.energy.losses import Contrast, Denoising, Matching
from probgen.numpyro.energy import drawn, langevin, log_parts, looked_at, scored
from probgen.numpyro.flow_matching import denoising_player, matched_noise
from probgen.numpyro.loss import Loss
from probgen.program import Player, Program
from probgen.schedules import value_at


@dataclass(frozen=True)
class ScoreMatching(Matching, Loss):
    """½‖s‖² + tr ∇s, which up to a constant is half the expected ‖s − ∇ log p_data‖²; no constant of p enters.

    "exact" takes D derivatives of the score, "sliced" `slices` random directions in their place. Networks must be smooth:
    of a ReLU's score the second derivative says nothing.

    References:
        | Estimation of non-normalized statistical models by score matching (Hyvärinen, 2005), JMLR 6
        | Sliced score matching (Song et al., 2019), https://arxiv.org/abs/1905.07088
    """

    def objective(self, rng_key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> jax.Array:
        """Half the expected squared distance of the scores, up to a constant."""
        name, rows = looked_at(model, params, arrays)
        density, x = scored(model, params, arrays, name), arrays[name]
        score, along = jax.linearize(lambda x: density(x)[1], x)
        directions = self._directions(rng_key, x)
        return rows * self.of_rows(score, jax.vmap(along)(directions), directions).sum()

    def _directions(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Every axis, or random signs, [K, B, ...]."""
        if self.method == "exact":
            axes = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
            return jnp.broadcast_to(axes, (len(axes), *x.shape))
        return jax.random.rademacher(key, (self.slices, *x.shape), x.dtype)


@dataclass(frozen=True)
class DenoisingScoreMatching(Denoising, Loss):
    """½‖σ s(x + σ ε) + ε‖²: s becomes the score of the data with Gaussian noise of standard deviation `sigma` added.

    `sigma` is in the units of the prepared data, a number or a schedule of the step. Without it, all the noise levels of the
    program's denoiser are learned, at a random time for each row: E ‖σ_t s(x_t, t) + ε‖², with dimensions averaged.

    References:
        | A connection between score matching and denoising autoencoders (Vincent, 2011), Neural Computation 23
    """

    def players(self, program: Program) -> dict[str, Player]:
        """One: the program; without `sigma` all that its denoiser touches."""
        if self.sigma is not None:
            return super().players(program)
        return {"program": denoising_player(program, "DenoisingScoreMatching without `sigma`", matched_noise)}

    def at(self, step: Any) -> DenoisingScoreMatching:
        """With sigma as it is at `step`."""
        return replace(self, sigma=value_at(self.sigma, step))

    def objective(self, rng_key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> jax.Array:
        """The squared error of the score as a denoiser."""
        name, rows = looked_at(model, params, arrays)
        noise = jax.random.normal(rng_key, arrays[name].shape, arrays[name].dtype)
        _, score = scored(model, params, arrays, name)(arrays[name] + self.sigma * noise)
        return rows * self.of_rows(score, noise).sum()


@dataclass(frozen=True)
class ContrastiveDivergence(Contrast, Loss):
    """log p(x⁻) − log p(x), where x⁻ comes after `steps` of Langevin's chain; no gradient goes through them.

    Its gradient is that of −log p as far as x⁻ is a draw of p; after few steps from the data it is a biased estimate
    (contrastive divergence). Unless they are `adjusted`, the steps are only right as h = `step_size` → 0, and run
    away where the energy is steep. `start` is "data", or "noise": a draw of the program without its factors. `penalty` is λ
    in λ (U(x)² + U(x⁻)²), U = −log of the factors, which keeps energies from growing apart. A loss holds no state, so chains
    are not carried from step to step (no persistent contrastive divergence). Terms: log p(x) and log p(x⁻).

    References:
        | Training products of experts by minimizing contrastive divergence (Hinton, 2002), Neural Computation 14
        | Implicit generation and modeling with energy-based models (Du & Mordatch, 2019), arXiv:1903.08689
    """

    def objective(self, rng_key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> Any:
        """log p(x⁻) − log p(x), and its two parts."""
        name, rows = looked_at(model, params, arrays)
        own, other = jax.random.split(rng_key)
        fixed = jax.lax.stop_gradient(dict(params))
        start = drawn(model, fixed, arrays, name, other) if self.start == "noise" else arrays[name]
        after = langevin(scored(model, fixed, arrays, name), own, start, self.chain)
        here, there = log_parts(model, params, arrays), log_parts(model, params, {**arrays, name: after})
        terms = {name: rows * sum(here).sum(), f"{name}_chain": rows * sum(there).sum()}
        return rows * self.of_rows(here, there).sum(), terms
