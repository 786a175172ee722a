"""A bijection whose value and log-determinant come out of one pass: y = f(x) with log |det ∂y/∂x|, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, _InverseTransform
from numpyro.distributions.util import array_equiv

from probgen.errors import ProbgenError
from probgen.flow_shapes import Shape, filled, refuse_shape


class Bijection(Transform):
    """An ordinary `numpyro.distributions.transforms.Transform`, and a pytree of its networks and numbers.

    A part defines `forth` and `back`, each a value with the log-determinant of its own direction, for a batch [*] of
    events of one shape. To NumPyro the log-determinant is the intermediate of a call.

    Parameters
    ----------
    shape
        Of an event of x: `(3, None, None)` for images of three channels.
    onto
        Of an event of y, where that is another.
    """

    traced: ClassVar[tuple[str, ...]] = ()  # the attributes that hold arrays; all others are fixed when JAX compiles

    def __init__(self, shape: Shape, onto: Shape | None = None) -> None:
        super().__init__()
        self.shape, self.onto = tuple(shape), tuple(shape if onto is None else onto)

    @property
    def domain(self) -> constraints.Constraint:
        """All real events of x."""
        return constraints.independent(constraints.real, len(self.shape))

    @property
    def codomain(self) -> constraints.Constraint:
        """All real events of y."""
        return constraints.independent(constraints.real, len(self.onto))

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [*, *shape] → y and log |det ∂y/∂x| [*]."""
        raise ProbgenError(f"{type(self).__name__} must define `forth`")

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """y [*, *onto] → x and log |det ∂x/∂y| [*]."""
        raise ProbgenError(f"{type(self).__name__} must define `back`")

    def call_with_intermediates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """y and log |det ∂y/∂x|.

        Raises:
            ProbgenError: events of another shape.
        """
        refuse_shape(type(self).__name__, x.shape, self.shape)
        return self.forth(x)

    def inverse_and_ladj(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x and log |det ∂x/∂y|.

        Raises:
            ProbgenError: events of another shape.
        """
        refuse_shape(type(self).__name__, y.shape, self.onto)
        return self.back(y)

    def log_abs_det_jacobian(self, x: jax.Array, y: jax.Array, intermediates: jax.Array | None = None) -> jax.Array:
        """log |det ∂y/∂x| [*]."""
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def __call__(self, x: jax.Array) -> jax.Array:
        """y."""
        return self.call_with_intermediates(x)[0]

    def _inverse(self, y: jax.Array) -> jax.Array:
        return self.inverse_and_ladj(y)[0]

    def forward_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of y for x of a shape."""
        refuse_shape(type(self).__name__, shape, self.shape)
        return (*shape[: len(shape) - len(self.shape)], *filled(self.onto, shape))

    def inverse_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of x for y of a shape."""
        refuse_shape(type(self).__name__, shape, self.onto)
        return (*shape[: len(shape) - len(self.onto)], *filled(self.shape, shape))

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """What is traced, and all else by name, as NumPyro's `tree_unflatten` wants it."""
        fixed = {name: value for name, value in vars(self).items() if name not in (*self.traced, "_inv")}
        return tuple(getattr(self, name) for name in self.traced), (self.traced, fixed)

    def eq(self, other: object, static: bool = False) -> Any:
        """Whether another one has the same parts and the same numbers."""
        (ours, one), (theirs, two) = jax.tree.flatten(self), jax.tree.flatten(other)
        if type(self) is not type(other) or one != two:
            return False
        same = True
        for a, b in zip(ours, theirs, strict=True):
            same &= array_equiv(a, b, static=static)
        return same


def call_and_ladj(transform: Transform, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y and log |det ∂y/∂x| of any transform: in one pass where it can."""
    if isinstance(transform, _InverseTransform):
        return inverse_and_ladj(transform.inv, x)
    y, seen = transform.call_with_intermediates(x)
    return y, transform.log_abs_det_jacobian(x, y, seen)


def inverse_and_ladj(transform: Transform, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and log |det ∂x/∂y| of any transform: in one pass where it can."""
    if isinstance(transform, _InverseTransform):
        return call_and_ladj(transform.inv, y)
    if isinstance(transform, Bijection):
        return transform.inverse_and_ladj(y)
    x = transform.inv(y)
    return x, -transform.log_abs_det_jacobian(x, y)


def event_sum(value: jax.Array, shape: Shape) -> jax.Array:
    """Σ over the axes of an event: [*, *shape] → [*]."""
    return value.sum(tuple(range(-len(shape), 0)))
