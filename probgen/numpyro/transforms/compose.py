"""Bijections one after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
from numpyro.distributions.transforms import Transform

from probgen.errors import ProbgenError
from probgen.numpyro.transforms.bijection import Bijection, call_and_ladj, inverse_and_ladj


class Compose(Bijection):
    """f = f_n ∘ … ∘ f_1, and log |det| is the sum of theirs; `Compose(f_1, …, f_n)`.

    Parts are bijections of this package or transforms of NumPyro's, each on the events that the one before it gives.
    NumPyro's `ComposeTransform` takes two passes for a draw with its density; this takes one.
    """

    traced = ("parts",)

    def __init__(self, *parts: Transform) -> None:
        if not parts or not all(isinstance(part, Transform) for part in parts):
            raise ProbgenError("Compose takes one or more transforms, e.g. Compose(Squeeze((1, 8, 8)))")
        for before, after in pairwise(parts):
            if before.codomain.event_dim != after.domain.event_dim:
                raise ProbgenError(
                    f"Compose: {type(before).__name__} gives events of {before.codomain.event_dim} axes, and "
                    f"{type(after).__name__} takes {after.domain.event_dim}: put a transform of the shape between them"
                )
        super().__init__(_shape(parts[0], "shape", "domain"), _shape(parts[-1], "onto", "codomain"))
        self.parts = parts

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Every part in turn."""
        total = 0.0
        for part in self.parts:
            x, ladj = call_and_ladj(part, x)
            total = total + ladj
        return x, total

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Every part in turn, from the last."""
        total = 0.0
        for part in reversed(self.parts):
            y, ladj = inverse_and_ladj(part, y)
            total = total + ladj
        return y, total

    def forward_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """That of every part in turn."""
        for part in self.parts:
            shape = part.forward_shape(tuple(shape))
        return tuple(shape)

    def inverse_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """That of every part in turn, from the last."""
        for part in reversed(self.parts):
            shape = part.inverse_shape(tuple(shape))
        return tuple(shape)


def _shape(part: Transform, name: str, constraint: str) -> tuple[int | None, ...]:
    """The shape of the events of a part, as far as it says."""
    return getattr(part, name) if isinstance(part, Bijection) else (None,) * getattr(part, constraint).event_dim
