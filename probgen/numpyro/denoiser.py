"""A denoiser in NumPyro: the two chains of a diffusion as ordinary distributions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from probgen.diffusion.denoiser import GaussianChain, Prediction
from probgen.numpyro.distributions.discretized import DiscretizedGaussian


class Denoiser(GaussianChain):
    """The two chains of a diffusion as NumPyro distributions; its parameters are those of `GaussianChain`."""

    def prior(self, x: jax.Array) -> dist.Distribution:
        """p(x_T), for as many rows, and of the shape, as the data `x` [B, *shape]."""
        return dist.Normal(jnp.zeros(x.shape[1:]), self.schedule.end_scale).to_event(x.ndim - 1)

    def noise_like(self, x: jax.Array, rng_key: jax.Array) -> jax.Array:
        """ε ~ N(0, 1), a number for each of the data."""
        return jax.random.normal(rng_key, x.shape, x.dtype)

    def forward(self, x_s: jax.Array, t: Any, s: Any = None) -> dist.Distribution:
        """q(x_t | x_s) = N(α_{t|s} x_s, σ²_{t|s}); without s the step before t."""
        alpha, sigma = self.between(t, self.before(t, s))
        return dist.Normal(alpha * x_s, sigma).to_event(x_s.ndim - 1)

    def reverse(self, x_t: jax.Array, t: Any, s: Any = None) -> dist.Distribution:
        """p(x_s | x_t), the posterior q(x_s | x_t, x) with the network's x̂ for x; without s the step before t."""
        s, said = self.before(t, s), self(x_t, t)
        mean, _ = self.posterior(x_t, said.data, t, s)
        return dist.Normal(mean, jnp.sqrt(self.reverse_variance(said, t, s))).to_event(mean.ndim - 1)

    def decoder(self, x_1: jax.Array) -> dist.Distribution:
        """p(x | x_1), of the data themselves: Gaussian, or over `levels` whole numbers."""
        t = 1 / self.steps
        return self.decoded(self(x_1, t), t)

    def decoded(self, said: Prediction, t: Any) -> dist.Distribution:
        """p(x | x_t) by what the network has said at t, the first step of the chain."""
        mean, scale = said.data, jnp.sqrt(self.last_variance(said, t))
        fn = dist.Normal(mean, scale) if self.levels is None else DiscretizedGaussian(mean, scale, self.levels)
        return fn.to_event(mean.ndim - 1)
