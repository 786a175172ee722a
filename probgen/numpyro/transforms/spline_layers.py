"""Flows that move every dimension by a monotone spline, whose knots other dimensions tell."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from probgen.flow_shapes import Shape, halves
from probgen.numpyro.nn.bound import as_tree
from probgen.numpyro.transforms.bijection import Bijection, event_sum
from probgen.numpyro.transforms.coupling import apart, together
from probgen.numpyro.transforms.spline import bins, inverse_spline, spline


class SplineCoupling(Bijection):
    """y_a = x_a,   y_b = spline(x_b; θ),   θ = network(x_a)   (Durkan et al., arXiv:1906.04032).

    log |det ∂y/∂x| = Σ log spline′. Splines of K bins on [−bound, bound], the identity outside. The first half of the
    channels is x_a, the second x_b, or the other way round with `flip`; the channels of a vector are its dimensions.

    Parameters
    ----------
    network
        x_a [*, A, ...] → [*, B (3 K − 1), ...] for the B channels of x_b; `SplineCoupling.sizes` gives (A, B).
    shape
        Of an event; its first axis are the channels.
    """

    traced = ("network",)
    sizes = staticmethod(halves)

    def __init__(
        self, network: Callable[[jax.Array], jax.Array], shape: Shape, flip: bool = False, bound: float = 5.0
    ) -> None:
        super().__init__(shape)
        halves(shape[0])
        self.network, self.flip, self.bound = as_tree(network), flip, bound

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The splines of x_b beside x_a."""
        kept, changed = apart(x, self.shape, self.flip)
        moved, log_slope = spline(changed, bins(self._each(self.network(kept)), self.bound), self.bound)
        return together(kept, moved, self.shape, self.flip), event_sum(log_slope, self.shape)

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Their inverses, of y_b."""
        kept, changed = apart(y, self.shape, self.flip)
        moved, log_slope = inverse_spline(changed, bins(self._each(self.network(kept)), self.bound), self.bound)
        return together(kept, moved, self.shape, self.flip), event_sum(log_slope, self.shape)

    def _each(self, said: jax.Array) -> jax.Array:
        """[*, B (3 K − 1), ...] → [*, B, ..., 3 K − 1]."""
        axis = said.ndim - len(self.shape)
        theta = said.reshape(*said.shape[:axis], halves(self.shape[0], self.flip)[1], -1, *said.shape[axis + 1 :])
        return jnp.moveaxis(theta, axis + 1, -1)


class SplineAutoregressive(Bijection):
    """y_d = spline(x_d; θ_d),   θ = network(x), where θ_d depends on the x before x_d alone  (arXiv:1906.04032).

    log |det ∂y/∂x| = Σ_d log spline′(x_d), one pass; the way back takes `passes` of them.

    Parameters
    ----------
    network
        x [*, D] → [*, D, 3 K − 1], such as `probgen.numpyro.nn.MaskedConditioner` with its weights.
    shape
        (D,).
    passes
        After how many passes no dimension waits for another: D if left out, 2 for a network of two groups.
    """

    traced = ("network",)

    def __init__(
        self,
        network: Callable[[jax.Array], jax.Array],
        shape: Shape,
        passes: int | None = None,
        bound: float = 5.0,
    ) -> None:
        super().__init__(shape)
        self.network, self.bound, self.passes = as_tree(network), bound, passes or shape[0]

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One pass."""
        y, ladj = spline(x, bins(self.network(x), self.bound), self.bound)
        return y, ladj.sum(-1)

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """After each pass one more x is what it has to be, and stays so."""

        def again(_: int, known: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return inverse_spline(y, bins(self.network(known[0]), self.bound), self.bound)

        x, ladj = lax.fori_loop(0, self.passes, again, (jnp.zeros_like(y), jnp.zeros_like(y)))
        return x, ladj.sum(-1)
