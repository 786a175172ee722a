"""Affine coupling: a part of the entries passes unchanged, and says how the others are scaled and shifted."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from probgen.flow_shapes import Shape, halves, refuse_one_position
from probgen.numpyro.nn.bound import as_tree
from probgen.numpyro.transforms.bijection import Bijection, event_sum


class ChannelCoupling(Bijection):
    """y_a = x_a,   y_b = x_b exp(s) + t,   (t, s) = network(x_a)   (Dinh et al., RealNVP, arXiv:1605.08803).

    log |det ∂y/∂x| = Σ s. The first half of the channels is x_a, the second x_b, or the other way round with `flip`;
    the channels of a vector are its dimensions. |s| is less than `bound`.

    Parameters
    ----------
    network
        x_a [*, A, ...] → [*, 2 B, ...], shifts and then scales, for the B channels of x_b, such as `flax_module`
        returns; `ChannelCoupling.sizes` gives (A, B).
    shape
        Of an event; its first axis are the channels.
    """

    traced = ("network",)
    sizes = staticmethod(halves)

    def __init__(
        self, network: Callable[[jax.Array], jax.Array], shape: Shape, flip: bool = False, bound: float = 2.0
    ) -> None:
        super().__init__(shape)
        halves(shape[0])
        self.network, self.flip, self.bound = as_tree(network), flip, bound

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x_b exp(s) + t beside x_a."""
        kept, changed = apart(x, self.shape, self.flip)
        shift, scale = parted(self.network(kept), self.bound, -len(self.shape))
        return together(kept, changed * jnp.exp(scale) + shift, self.shape, self.flip), event_sum(scale, self.shape)

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(y_b − t) exp(−s) beside y_a."""
        kept, changed = apart(y, self.shape, self.flip)
        shift, scale = parted(self.network(kept), self.bound, -len(self.shape))
        return together(kept, (changed - shift) * jnp.exp(-scale), self.shape, self.flip), -event_sum(scale, self.shape)


class CheckerboardCoupling(Bijection):
    """y = m ⊙ x + (1 − m) ⊙ (x exp(s) + t),   (t, s) = network(m ⊙ x)   (Dinh et al., RealNVP, arXiv:1605.08803).

    The mask m is 1 on the black squares of a checkerboard over the positions of an image, on the white with `flip`;
    log |det ∂y/∂x| = Σ (1 − m) s, and |s| is less than `bound`.

    Parameters
    ----------
    network
        x [*, C, H, W] → [*, 2 C, H, W], shifts and then scales.
    shape
        (C, H, W) of an image.
    """

    traced = ("network",)

    def __init__(
        self, network: Callable[[jax.Array], jax.Array], shape: Shape, flip: bool = False, bound: float = 2.0
    ) -> None:
        super().__init__(shape)
        refuse_one_position(shape)
        self.network, self.flip, self.bound = as_tree(network), flip, bound

    @property
    def mask(self) -> np.ndarray:
        """m, [H, W]."""
        _, height, width = self.shape
        return (np.arange(height)[:, None] + np.arange(width)) % 2 == int(self.flip)

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x exp(s) + t where the mask is 0."""
        shift, scale = self._said(x)
        return jnp.where(self.mask, x, x * jnp.exp(scale) + shift), event_sum(scale, self.shape)

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(y − t) exp(−s) where the mask is 0."""
        shift, scale = self._said(y)
        return jnp.where(self.mask, y, (y - shift) * jnp.exp(-scale)), -event_sum(scale, self.shape)

    def _said(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shift, scale = parted(self.network(x * self.mask), self.bound, -3)
        return shift, scale * ~self.mask


def parted(said: jax.Array, bound: float, axis: int) -> tuple[jax.Array, jax.Array]:
    """Shifts t and scales s = bound · tanh(s' / bound): near 0 the network's own."""
    shift, scale = jnp.split(said, 2, axis)
    return shift, bound * jnp.tanh(scale / bound)


def apart(x: jax.Array, shape: Shape, flip: bool) -> tuple[jax.Array, jax.Array]:
    """The channels of events [*, *shape] that a coupling keeps, and those that it changes."""
    kept, changed = halves(shape[0], flip)
    first, second = jnp.split(x, [changed if flip else kept], -len(shape))
    return (second, first) if flip else (first, second)


def together(kept: jax.Array, changed: jax.Array, shape: Shape, flip: bool) -> jax.Array:
    """The events again."""
    return jnp.concatenate((changed, kept) if flip else (kept, changed), -len(shape))
