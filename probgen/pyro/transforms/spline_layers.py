"""Flows that move every dimension by a monotone spline, whose knots other dimensions tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probgen.errors import ProbgenError
from probgen.flow_shapes import Shape, halves
from probgen.pyro.quiet_zuko import zuko_module
from probgen.pyro.transforms.bijection import Bijection, event_sum


class SplineCoupling(Bijection):
    """y_a = x_a,   y_b = spline(x_b; θ),   θ = network(x_a)   (Durkan et al., arXiv:1906.04032).

    log |det ∂y/∂x| = Σ log spline′. Splines of K bins on [−bound, bound], the identity outside: Zuko's, which are
    monotone rational quadratics. The first half of the channels is x_a, the second x_b, or the other way round with
    `flip`; the channels of a vector are its dimensions. Zuko's own coupling looks its halves up in a mask, which
    cannot be compiled.

    Parameters
    ----------
    network
        x_a [*, A, ...] → [*, B (3 K − 1), ...] for the B channels of x_b; `SplineCoupling.sizes` gives (A, B).
    shape
        Of an event; its first axis are the channels.
    """

    sizes = staticmethod(halves)

    def __init__(
        self, network: Callable[[Tensor], Tensor], shape: Shape, flip: bool = False, bound: float = 5.0
    ) -> None:
        super().__init__(shape)
        self.network, self.flip, self.bound = network, flip, bound
        self.kept, self.changed = halves(shape[0], flip)
        self._spline = zuko_module("zuko.transforms").MonotonicRQSTransform

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The splines of x_b beside x_a."""
        kept, changed = self._split(x)
        moved, log_slope = self._told(kept).call_and_ladj(changed)
        return self._joined(kept, moved), event_sum(log_slope, self.shape)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Their inverses, of y_b."""
        kept, changed = self._split(y)
        moved, log_slope = inverse_and_slope(self._told(kept), changed)
        return self._joined(kept, moved), event_sum(log_slope, self.shape)

    def _told(self, kept: Tensor) -> Any:
        """The splines of x_b, each with its 3 K − 1 numbers."""
        said, axis = self.network(kept), -len(self.shape)
        theta = said.unflatten(axis, (self.changed, -1)).movedim(axis, -1)
        bins = (theta.shape[-1] + 1) // 3
        if bins < 1 or theta.shape[-1] != 3 * bins - 1:
            raise ProbgenError(
                f"a spline of K bins takes 3 K − 1 numbers, and the network gives {theta.shape[-1]} for each dimension: let "
                "it give e.g. 23 for 8 bins"
            )
        return self._spline(*theta.split((bins, bins, bins - 1), -1), bound=self.bound)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axis = -len(self.shape)
        if self.flip:
            changed, kept = x.split((self.changed, self.kept), axis)
        else:
            kept, changed = x.split((self.kept, self.changed), axis)
        return kept, changed

    def _joined(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat((changed, kept) if self.flip else (kept, changed), -len(self.shape))


def inverse_and_slope(spline: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and log dx/dy of Zuko's splines at y, in one look at their bins, where Zuko takes two.

    The root z in [0, 1] of a z² + b z + c = 0, where a > 0 if b < 0, and c ≤ 0, in the form that does not cancel.
    """
    inside, x0, x1, y0, y1, before, after, steep = spline.bin(spline.searchsorted(spline.vertical, y) - 1)
    up, bend = torch.where(inside, y - y0, 0.0), before + after - 2 * steep
    a, b, c = (y1 - y0) * (steep - before) + up * bend, (y1 - y0) * before - up * bend, -steep * up
    root = (b * b - 4 * a * c).clamp(min=torch.finfo(y.dtype).tiny).sqrt()
    z = torch.where(b < 0, (root - b) / torch.where(b < 0, 2 * a, 1.0), -2 * c / (b.abs() + root)).clamp(0, 1)
    rise = after * z * z + 2 * steep * z * (1 - z) + before * (1 - z) * (1 - z)
    log_slope = rise.log() + 2 * (steep.log() - (steep + bend * z * (1 - z)).log())
    return torch.where(inside, x0 + z * (x1 - x0), y), torch.where(inside, -log_slope, 0.0)
