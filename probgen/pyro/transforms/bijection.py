"""A bijection whose value and log-determinant come out of one pass: y = f(x) with log |det ∂y/∂x|, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from probgen.flow_shapes import Shape, filled, refuse_shape


class Bijection(TransformModule):
    """An ordinary `torch.distributions.Transform` that is an `nn.Module` and keeps no cache.

    A part defines `forth` and `back`, each a value with the log-determinant of its own direction, for a batch [*] of
    events of one shape. Nothing goes stale when parameters change.

    Parameters
    ----------
    shape
        Of an event of x: `(3, None, None)` for images of three channels.
    onto
        Of an event of y, where that is another.
    """

    bijective = True

    def __init__(self, shape: Shape, onto: Shape | None = None) -> None:
        super().__init__()
        self.shape, self.onto = tuple(shape), tuple(shape if onto is None else onto)
        self.domain, self.codomain = (
            constraints.independent(constraints.real, len(s)) for s in (self.shape, self.onto)
        )

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [*, *shape] → y and log |det ∂y/∂x| [*]."""
        raise TypeError(f"{type(self).__name__} must define `forth`")

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y [*, *onto] → x and log |det ∂x/∂y| [*]."""
        raise TypeError(f"{type(self).__name__} must define `back`")

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log |det ∂y/∂x|, as Zuko's transforms have it.

        Raises:
            ProbgenError: events of another shape.
        """
        refuse_shape(type(self).__name__, x.shape, self.shape)
        return self.forth(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and log |det ∂x/∂y|.

        Raises:
            ProbgenError: events of another shape.
        """
        refuse_shape(type(self).__name__, y.shape, self.onto)
        return self.back(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det ∂y/∂x| [*]."""
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of y for x of a shape."""
        refuse_shape(type(self).__name__, shape, self.shape)
        return torch.Size((*shape[: len(shape) - len(self.shape)], *filled(self.onto, shape)))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of x for y of a shape."""
        refuse_shape(type(self).__name__, shape, self.onto)
        return torch.Size((*shape[: len(shape) - len(self.onto)], *filled(self.shape, shape)))


def call_and_ladj(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and log |det ∂y/∂x| of any transform: in one pass where it can."""
    if isinstance(transform, _InverseTransform):
        return inverse_and_ladj(transform.inv, x)
    if isinstance(transform, Bijection):
        return transform.call_and_ladj(x)
    x = x.view_as(x)  # another object, for which a cache of Pyro's holds nothing old
    if hasattr(transform, "call_and_ladj"):
        return transform.call_and_ladj(x)
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def inverse_and_ladj(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and log |det ∂x/∂y| of any transform: in one pass where it can."""
    if isinstance(transform, _InverseTransform):
        return call_and_ladj(transform.inv, y)
    if isinstance(transform, Bijection):
        return transform.inverse_and_ladj(y)
    if not isinstance(transform.inv, _InverseTransform):  # Zuko's compositions have inverses of their own
        return call_and_ladj(transform.inv, y)
    y = y.view_as(y)
    x = transform.inv(y)
    return x, -transform.log_abs_det_jacobian(x, y)


def event_sum(value: Tensor, shape: Shape) -> Tensor:
    """Σ over the axes of an event: [*, *shape] → [*]."""
    return value.sum(tuple(range(-len(shape), 0)))
