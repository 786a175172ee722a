"""A distribution through a bijection: data on one side, a base whose density is known on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from probgen.flow_shapes import refuse_misfit
from probgen.numpyro.transforms.bijection import call_and_ladj, inverse_and_ladj


class Flow(Distribution):
    """x with f(x) ~ base:   log p(x) = log p_base(f(x)) + log |det ∂f/∂x|.

    One pass gives value and log-determinant, where NumPyro's `TransformedDistribution` makes two. A draw comes with
    its own density, as NumPyro's intermediates, so that a guide need not invert what it has just drawn. For a flow
    that is written from the base to the data give `f.inv`.

    Parameters
    ----------
    transform
        f, from data to base: one of `probgen.numpyro.transforms` or of NumPyro's.
    base
        The distribution of f(x); what it lacks in event axes is made of its batch.
    """

    arg_constraints: ClassVar = {}
    pytree_data_fields = ("transform", "base_dist")

    def __init__(self, transform: Transform, base: Distribution, *, validate_args: bool | None = None) -> None:
        wanted = transform.codomain.event_dim
        refuse_misfit(type(transform).__name__, wanted, base.batch_shape, base.event_shape)
        missing = wanted - base.event_dim
        self.transform, self.base_dist = transform, base.to_event(missing) if missing else base
        shape = transform.inverse_shape(self.base_dist.event_shape)
        super().__init__(self.base_dist.batch_shape, tuple(shape), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients: if the base's do."""
        return self.base_dist.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """Where f is defined."""
        return self.transform.domain

    @validate_sample
    def log_prob(self, value: jax.Array, intermediates: list[Any] | None = None) -> jax.Array:
        """log p_base(f(x)) + log |det ∂f/∂x|, [*batch_shape]; of a draw what `sample_with_intermediates` knows."""
        if intermediates:
            return intermediates[0]
        z, ladj = call_and_ladj(self.transform, value)
        return self.base_dist.log_prob(z) + ladj

    def sample(self, key: jax.Array, sample_shape: Sequence[int] = ()) -> jax.Array:
        """Draws f⁻¹(z) with z from the base, [*sample_shape, *batch_shape, *event_shape]."""
        return self.transform.inv(self.base_dist.sample(key, tuple(sample_shape)))

    def sample_with_intermediates(
        self, key: jax.Array, sample_shape: Sequence[int] = ()
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Draws, and their log densities."""
        z = self.base_dist.sample(key, tuple(sample_shape))
        x, ladj = inverse_and_ladj(self.transform, z)
        return x, [self.base_dist.log_prob(z) - ladj]
