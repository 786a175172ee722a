"""Networks that say, from one part of the data, how a flow is to move the other."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from probgen.numpyro.nn.causal import Masked

zeros = nn.initializers.zeros


class DenseConditioner(nn.Module):
    """x [*, size] → [*, outputs], through ReLU layers; the last layer starts at zero, so that a flow starts as 1."""

    outputs: int
    hidden: int
    layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [*, size] → [*, outputs]."""
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.outputs, kernel_init=zeros)(x)


class ConvConditioner(nn.Module):
    """x [*, C, H, W] → [*, outputs, H, W]: 3×3, 1×1 and 3×3 convolutions, the last from zero  (arXiv:1807.03039)."""

    outputs: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [*, C, H, W] → [*, outputs, H, W]."""
        h = jnp.moveaxis(x, -3, -1)
        h = nn.relu(nn.Conv(self.hidden, (3, 3))(h))
        h = nn.relu(nn.Conv(self.hidden, (1, 1))(h))
        return jnp.moveaxis(nn.Conv(self.outputs, (3, 3), kernel_init=zeros)(h), -1, -3)


class MaskedConditioner(nn.Module):
    """x [*, D] → θ [*, D, P], where θ_d depends on the x that come before x_d; the last layer starts at zero.

    The dimensions come in `passes` groups of one size, in their order or, with `reverse`, from the last; without
    `passes` each is a group of its own. The masks are those of Zuko's `MaskedMLP`.

    Parameters
    ----------
    size
        D.
    outputs
        P, the parameters of one dimension.
    hidden
        Units of each hidden layer.
    """

    size: int
    outputs: int
    hidden: tuple[int, ...] = (64, 64)
    passes: int | None = None
    reverse: bool = False

    def setup(self) -> None:
        """The layers, in which x_d has degree 1 + its group, and θ_d its group."""
        groups = self.groups(self.size, self.passes)
        group = tuple((groups[::-1] if self.reverse else groups).tolist())
        last = max(group)  # the highest degree that anything reads
        hidden = [tuple((1 + np.arange(units) % max(last, 1)).tolist()) for units in self.hidden]
        degrees = [tuple(1 + g for g in group), *hidden]
        results = tuple(np.repeat(group, self.outputs).tolist())
        self.layers = [Masked(*pair) for pair in pairwise(degrees)]
        self.out = Masked(degrees[-1], results, kernel_init=zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [*, D] → θ [*, D, P]."""
        for layer in self.layers:
            x = nn.relu(layer(x))
        theta = self.out(x)
        return theta.reshape(*theta.shape[:-1], self.size, self.outputs)

    @staticmethod
    def groups(size: int, passes: int | None = None) -> np.ndarray:
        """The group of each dimension, [D], from 0; the last is the number of groups less 1."""
        passes = size if passes is None else min(max(passes, 1), size)
        return np.arange(size) // -(-size // passes)
