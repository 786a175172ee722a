"""Levels of bijections of images, at each of which half of the channels are done."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probgen.errors import ProbgenError
from probgen.flow_shapes import handed_on
from probgen.pyro.transforms.bijection import Bijection, call_and_ladj, inverse_and_ladj


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

    def __init__(self, shape: Sequence[int], levels: Sequence[Bijection]) -> None:
        if not levels:
            raise ProbgenError("MultiScale needs at least one level")
        super().__init__(shape, (math.prod(shape),))
        self.levels, self.shapes = nn.ModuleList(levels), []
        for level in levels:
            self.shapes.append(tuple(level.forward_shape(shape)))
            shape = self.handed_on(self.shapes[-1]) if len(self.shapes) < len(levels) else shape

    @staticmethod
    def handed_on(shape: Sequence[int]) -> tuple[int, ...]:
        """The half of an image [C, H, W] on which the next level works.

        Raises:
            ProbgenError: an odd number of channels.
        """
        return handed_on(shape)

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Half of the channels of every level, and all of the last one's."""
        done, total = [], 0.0
        for i, level in enumerate(self.levels):
            x, ladj = call_and_ladj(level, x)
            total = total + ladj
            if i + 1 < len(self.levels):
                part, x = x.chunk(2, -3)
                done.append(part.flatten(-3))
        return torch.cat([*done, x.flatten(-3)], -1), total

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The levels from the last one."""
        sizes = [math.prod(shape) // 2 for shape in self.shapes[:-1]] + [math.prod(self.shapes[-1])]
        *done, x = y.split(sizes, -1)
        x, total = inverse_and_ladj(self.levels[-1], x.unflatten(-1, self.shapes[-1]))
        for level, shape, part in zip(
            reversed(self.levels[:-1]), reversed(self.shapes[:-1]), reversed(done), strict=True
        ):
            x = torch.cat([part.unflatten(-1, self.handed_on(shape)), x], -3)
            x, ladj = inverse_and_ladj(level, x)
            total = total + ladj
        return x, total
