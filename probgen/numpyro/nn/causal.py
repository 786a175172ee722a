"""Causal networks: a sequence x_1..x_D in, the parameters of every p(x_d | x_<d) out, in one pass or bit by bit.

Beside the call a causal network has `bit_by_bit`, with which a draw computes each unit once:

    start, step, take = network(method="bit_by_bit")
    known = start(batch_shape, context)
    theta, known = step(known, d)                   # θ_d [*, P], for d = 0, 1, ...
    known = take(known, d, x)                       # x_d [*]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from probgen.causal import hidden_degrees
from probgen.errors import ProbgenError

Known = tuple[jax.Array, ...]


class Masked(nn.Module):
    """A linear layer in which a unit reads only units whose degree is not above its own."""

    reads: tuple[int, ...]
    units: tuple[int, ...]
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.lecun_uniform()

    def setup(self) -> None:
        """The kernel [reads, units], and the bias."""
        self.kernel = self.param("kernel", self.kernel_init, (len(self.reads), len(self.units)))
        self.bias = self.param("bias", nn.initializers.zeros, (len(self.units),)) if self.use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [*, reads] → [*, units]."""
        return x @ self.masked() if self.bias is None else x @ self.masked() + self.bias

    def masked(self) -> jax.Array:
        """The kernel with zeros where nothing is read."""
        return self.kernel * (np.array(self.reads)[:, None] <= np.array(self.units))


class MADE(nn.Module):
    """Masked autoencoder (Germain et al., arXiv:1502.03509) with direct connections from the inputs to the outputs.

        h_l = ReLU((W_l ⊙ M_l) h_{l−1} + b_l),   θ = (V ⊙ M) h_L + (A ⊙ T) x + c,   T strictly lower-triangular

    x [*, D] → θ [*, D, P], where θ_d depends on x_1..x_{d−1} and on the context alone. Without hidden layers, and that
    is the default, these are D logistic (or linear) regressions, each on the values before its own: the fully visible
    sigmoid belief network (Neal, 1992; Frey, 1998). Direct weights start near zero.

    Parameters
    ----------
    size
        D, the length of the sequence.
    outputs
        P, the parameters of one conditional.
    hidden
        Units of each hidden layer.
    context
        Length of a further input that every unit may read.
    levels
        Values 0..levels − 1 are read as numbers in −1..1; without it they are read as they are.
    """

    size: int
    outputs: int = 1
    hidden: tuple[int, ...] = ()
    context: int = 0
    levels: int | None = None

    def setup(self) -> None:
        """The layers, in which x_d has degree d and θ_d degree d − 1."""
        if self.size < 1 or self.outputs < 1:
            raise ProbgenError(
                f"MADE(size={self.size}, outputs={self.outputs}) computes nothing; both must be at least 1"
            )
        inputs = (*[0] * self.context, *range(1, self.size + 1))
        results = tuple(np.repeat(np.arange(self.size), self.outputs).tolist())
        self.degrees = (inputs, *(tuple(hidden_degrees(self.size, units).tolist()) for units in self.hidden))
        self.layers = [Masked(reads, units) for reads, units in pairwise(self.degrees)]
        # Many small random weights on few rows would never be unlearned.
        self.direct = Masked(inputs, results, kernel_init=nn.initializers.normal(1e-3))
        self.out = Masked(self.degrees[-1], results, use_bias=False) if self.hidden else None

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """x [*, D], context [*, C] → θ [*, D, P]."""
        h = inputs = _joined(_scaled(x, self.levels), context)
        for layer in self.layers:
            h = nn.relu(layer(h))
        theta = self.direct(inputs) if self.out is None else self.direct(inputs) + self.out(h)
        return theta.reshape(*theta.shape[:-1], self.size, self.outputs)

    def sizes(self) -> tuple[int, int, int]:
        """D, P, and the length of the context."""
        return self.size, self.outputs, self.context

    # -- bit by bit -----------------------------------------------------------------------------------------------

    def bit_by_bit(self) -> tuple[Callable, Callable, Callable]:
        """`start`, `step` and `take`, over arrays of all units in which those not known yet hold anything finite.

        The masks keep what is not known from what reads it.
        """
        size, before, levels, widths = self.size, self.context, self.levels, self.hidden
        layers = [(layer.masked().T, layer.bias, *_turns(layer.units, size)) for layer in self.layers]
        direct = self.direct.masked().T.reshape(size, self.outputs, -1)
        bias = self.direct.bias.reshape(size, self.outputs)
        out = None if self.out is None else self.out.masked().T.reshape(size, self.outputs, -1)

        def start(batch_shape: Sequence[int], context: jax.Array | None = None) -> Known:
            inputs = _joined(jnp.zeros((*batch_shape, size), bias.dtype), context)
            return inputs, *(jnp.zeros((*batch_shape, units), bias.dtype) for units in widths)

        def step(known: Known, d: jax.Array) -> tuple[jax.Array, Known]:
            """θ_d, after the hidden units of degree d, which the values before x_d have settled."""
            found = [known[0]]
            for values, (kernel, offset, first, width) in zip(known[1:], layers, strict=True):
                rows = lax.dynamic_slice_in_dim(kernel, first[d], width)
                settled = nn.relu(found[-1] @ rows.T + lax.dynamic_slice_in_dim(offset, first[d], width))
                found.append(lax.dynamic_update_slice_in_dim(values, settled, first[d], -1))
            theta = found[0] @ direct[d].T + bias[d]
            return theta if out is None else theta + found[-1] @ out[d].T, tuple(found)

        def take(known: Known, d: jax.Array, x: jax.Array) -> Known:
            return known[0].at[..., before + d].set(_scaled(x, levels)), *known[1:]

        return start, step, take


def _turns(units: Sequence[int], size: int) -> tuple[jax.Array, int]:
    """Where the units of each degree begin in a layer, [D], and how many there are of one degree at most."""
    degrees = np.array(units)
    width = int(np.bincount(degrees).max())
    return jnp.asarray(np.minimum(np.searchsorted(degrees, np.arange(size)), len(degrees) - width)), width


def _scaled(x: jax.Array, levels: int | None) -> jax.Array:
    """The values as the units read them."""
    return x if levels is None else x * (2 / (levels - 1)) - 1


def _joined(x: jax.Array, context: jax.Array | None) -> jax.Array:
    """Context and values as one input."""
    if context is None:
        return x
    lead = jnp.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    return jnp.concatenate([jnp.broadcast_to(part, (*lead, part.shape[-1])) for part in (context, x)], -1)
