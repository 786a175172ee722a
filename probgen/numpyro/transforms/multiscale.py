"""Levels of bijections of images, at each of which half of the channels are done."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from probgen.errors import ProbgenError
from probgen.flow_shapes import handed_on
from probgen.numpyro.transforms.bijection import Bijection, call_and_ladj, inverse_and_ladj


class MultiScale(Bijection):
    """[*, C, H, W] → [*, C H W]: after each level but the last, half of its channels join z (arXiv:1605.08803, 3.6).

        h_0 = x,   (z_l, h_l) = level_l(h_{l−1}),   z = (z_1, …, z_L),   log |det ∂z/∂x| = Σ_l log |det_l|

    One flat z for all levels, so that a program has one site and one base.

    Parameters
    ----------
    shape
        (C, H, W) of an image.
    levels
        Bijections of images, each on what the one before it hands on: `MultiScale.handed_on` gives that shape.
    """

    traced = ("levels",)
    handed_on = staticmethod(handed_on)

    def __init__(self, shape: Sequence[int], levels: Sequence[Bijection]) -> None:
        if not levels:
            raise ProbgenError("MultiScale needs at least one level")
        super().__init__(shape, (math.prod(shape),))
        self.levels, self.shapes = tuple(levels), ()
        for level in levels:
            self.shapes = (*self.shapes, tuple(level.forward_shape(tuple(shape))))
            shape = handed_on(self.shapes[-1]) if len(self.shapes) < len(levels) else shape

    @staticmethod
    def rest(x: jax.Array) -> jax.Array:
        """What of a level's channels [*, C, H, W] is handed on to the next."""
        return jnp.split(x, 2, -3)[1]

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Half of the channels of every level, and all of the last one's."""
        done, total = [], 0.0
        for i, level in enumerate(self.levels):
            x, ladj = call_and_ladj(level, x)
            total = total + ladj
            if i + 1 < len(self.levels):
                done.append(_flat(jnp.split(x, 2, -3)[0]))
                x = self.rest(x)
        return jnp.concatenate([*done, _flat(x)], -1), total

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The levels from the last one."""
        shapes = [handed_on(shape) for shape in self.shapes[:-1]] + [self.shapes[-1]]
        parts = jnp.split(y, np.cumsum([math.prod(shape) for shape in shapes])[:-1], -1)
        *done, x = (part.reshape(*y.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True))
        x, total = inverse_and_ladj(self.levels[-1], x)
        for level, part in zip(reversed(self.levels[:-1]), reversed(done), strict=True):
            x, ladj = inverse_and_ladj(level, jnp.concatenate([part, x], -3))
            total = total + ladj
        return x, total


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-3], -1)
