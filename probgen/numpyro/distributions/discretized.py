"""Whole numbers that are a Gaussian's value, rounded."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import promote_shapes, validate_sample

from probgen.diffusion.levels import log_mass, nearest


class DiscretizedGaussian(Distribution):
    """P(k) = Φ((e_{k+1} − μ) / σ) − Φ((e_k − μ) / σ) for k = 0..L−1, which lie evenly in −1..1   (arXiv:2006.11239, eq. 13).

    The bins meet half way between the numbers, and the outermost are open.

    Parameters
    ----------
    loc, scale
        μ and σ, in −1..1.
    levels
        L, how many numbers there are: 256 for bytes.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    pytree_aux_fields = ("levels",)

    def __init__(
        self, loc: jax.Array, scale: jax.Array, levels: int = 256, *, validate_args: bool | None = None
    ) -> None:
        self.levels, (self.loc, self.scale) = levels, promote_shapes(jnp.asarray(loc), jnp.asarray(scale))
        super().__init__(jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale)), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """0..L−1."""
        return constraints.integer_interval(0, self.levels - 1)

    @validate_sample
    def log_prob(self, value: jax.Array) -> jax.Array:
        """log P(k)."""
        return log_mass(value, self.loc, self.scale, self.levels, log_ndtr)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws k, as floats."""
        noise = jax.random.normal(key, (*sample_shape, *self.batch_shape))
        return nearest(self.loc + self.scale * noise, self.levels)

    @property
    def mean(self) -> jax.Array:
        """Σ_k k P(k)."""
        return self._moment(1)

    @property
    def variance(self) -> jax.Array:
        """Σ_k k² P(k) − mean²."""
        return self._moment(2) - self._moment(1) ** 2

    def _moment(self, power: int) -> jax.Array:
        """Level by level, as images with an axis of levels would be large."""

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            k = jnp.full(self.batch_shape, k, total.dtype)
            return total + k**power * jnp.exp(log_mass(k, self.loc, self.scale, self.levels, log_ndtr))

        return jax.lax.fori_loop(1, self.levels, add, jnp.zeros(self.batch_shape))
