"""A distribution over vectors and images as a product of conditionals, each on what was drawn before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.distributions import Distribution, constraints

from probgen.causal import known_prefix, permutation, refuse_misfit
from probgen.errors import ProbgenError
from probgen.numpyro.nn.bound import as_tree


class Autoregressive(Distribution):
    """p(x | context) = Π_d p(x_d | x_<d, context), with x_1..x_D the entries of x in a given order.

    A log density is one pass of the network. A draw is one loop over the entries, in which each unit of the network
    is computed once.

    Parameters
    ----------
    network
        A causal network such as `probgen.numpyro.nn.MADE` with its weights, as `flax_module` returns it: x [*, D] in the
        order of drawing → θ [*, D, P].
    conditional
        θ [*, P] → the distribution of single entries, [*]: `lambda theta: Bernoulli(logits=theta[..., 0])`.
    event_shape
        The shape of x; D is the number of its entries.
    order
        Flat positions in the order of drawing (`probgen.causal.drawing_order`); row by row if left out.
    context
        What the network reads beside x, [*batch_shape, C].
    """

    pytree_data_fields = ("network", "context")
    pytree_aux_fields = ("conditional", "order", "sizes")

    def __init__(
        self,
        network: Callable[..., jax.Array],
        conditional: Callable[[jax.Array], Distribution],
        event_shape: Sequence[int],
        *,
        order: Sequence[int] | None = None,
        context: jax.Array | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.network, self.conditional, self.context = as_tree(network), conditional, context
        self.sizes = network(method="sizes")
        size, _, wanted = self.sizes
        refuse_misfit(size, wanted, event_shape, None if context is None else context.shape[-1])
        self.order = tuple(permutation(order, event_shape).tolist())
        batch_shape = () if context is None else context.shape[:-1]
        super().__init__(batch_shape, tuple(event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """That of the conditionals, for every entry."""
        return constraints.independent(self._entry.support, len(self.event_shape))

    @property
    def _entry(self) -> Distribution:
        return self.conditional(jnp.zeros(self.sizes[1]))

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Σ_d log p(x_d | x_<d), [*batch_shape]; one pass of the network."""
        x = self._in_order(value)
        lead = jnp.broadcast_shapes(x.shape[:-1], self.batch_shape)
        fn = self.conditional(self.network(x, self.context))
        entry = x.astype(int) if fn.support.is_discrete else x
        return jnp.broadcast_to(fn.log_prob(entry).sum(-1), lead)

    def sample(self, key: jax.Array, sample_shape: Sequence[int] = ()) -> jax.Array:
        """Draws [*sample_shape, *batch_shape, *event_shape]."""
        return self._drawn(key, (*sample_shape, *self.batch_shape), None)

    def complete(self, key: jax.Array, value: jax.Array) -> jax.Array:
        """`value` with its NaNs drawn given the rest, exactly; in every row the known entries come first in the order.

        Raises:
            ProbgenError: a known entry after an unknown one, another shape, or a known value outside the support; under
                a transformation of JAX the shape alone is looked at.
        """
        if value.shape[value.ndim - len(self.event_shape) :] != self.event_shape:
            raise ProbgenError(
                f"complete: the values have the shape {list(value.shape)}, and an event has {list(self.event_shape)}"
            )
        held = self._in_order(value)
        if not isinstance(held, jax.core.Tracer):
            known, support = ~np.isnan(held), self._entry.support
            known_prefix(known)
            if not np.all(support(held[known])):
                raise ProbgenError(f"complete: a known value lies outside the support {support}")
        lead = jnp.broadcast_shapes(held.shape[:-1], self.batch_shape)
        return self._drawn(key, lead, jnp.broadcast_to(held, (*lead, held.shape[-1])))

    def _drawn(self, key: jax.Array, lead: tuple[int, ...], held: jax.Array | None) -> jax.Array:
        """Draws [*lead, *event_shape] with what `held` [*lead, D] knows kept."""
        start, step, take = self.network(method="bit_by_bit")
        size = len(self.order)

        def draw(carry: tuple, d: jax.Array) -> tuple[tuple, jax.Array]:
            theta, known = step(carry, d)
            x = self.conditional(theta).sample(jax.random.fold_in(key, d))
            if held is not None:
                x = jnp.where(jnp.isnan(held[..., d]), x, held[..., d])
            return take(known, d, x), x

        _, drawn = lax.scan(draw, start(lead, self.context), jnp.arange(size))
        return jnp.moveaxis(drawn[np.argsort(self.order)], 0, -1).reshape(*lead, *self.event_shape)

    def _in_order(self, value: jax.Array) -> jax.Array:
        """value [*, *event_shape] → [*, D] in the order of drawing, in floats."""
        flat = jnp.reshape(
            value, (*jnp.shape(value)[: jnp.ndim(value) - len(self.event_shape)], math.prod(self.event_shape))
        )
        flat = flat if jnp.issubdtype(flat.dtype, jnp.floating) else flat.astype(float)
        return flat[..., np.array(self.order)]
