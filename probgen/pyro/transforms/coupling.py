"""Affine coupling: a part of the entries passes unchanged, and says how the others are scaled and shifted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probgen.flow_shapes import Shape, halves, refuse_one_position
from probgen.pyro.transforms.bijection import Bijection, event_sum


class ChannelCoupling(Bijection):
    """y_a = x_a,   y_b = x_b exp(s) + t,   (t, s) = network(x_a)   (Dinh et al., RealNVP, arXiv:1605.08803).

    log |det ∂y/∂x| = Σ s. The first half of the channels is x_a, the second x_b, or the other way round with `flip`;
    the channels of a vector are its dimensions. |s| is less than `bound`.

    Parameters
    ----------
    network
        x_a [*, A, ...] → [*, 2 B, ...], shifts and then scales, for the B channels of x_b; `ChannelCoupling.sizes`
        gives (A, B).
    shape
        Of an event; its first axis are the channels.
    """

    def __init__(
        self, network: Callable[[Tensor], Tensor], shape: Shape, flip: bool = False, bound: float = 2.0
    ) -> None:
        super().__init__(shape)
        self.network, self.flip, self.bound = network, flip, bound
        self.kept, self.changed = self.sizes(shape[0], flip)

    @staticmethod
    def sizes(channels: int, flip: bool = False) -> tuple[int, int]:
        """How many of the channels are kept, and how many changed.

        Raises:
            ProbgenError: a single channel, which has nothing beside it to be told by.
        """
        return halves(channels, flip)

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x_b exp(s) + t beside x_a."""
        kept, changed = self._split(x)
        shift, scale = self._said(kept)
        return self._joined(kept, changed * scale.exp() + shift), event_sum(scale, self.shape)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(y_b − t) exp(−s) beside y_a."""
        kept, changed = self._split(y)
        shift, scale = self._said(kept)
        return self._joined(kept, (changed - shift) * (-scale).exp()), -event_sum(scale, self.shape)

    def _said(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.network(kept).chunk(2, -len(self.shape))
        return shift, bounded(scale, self.bound)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axis = -len(self.shape)
        if self.flip:
            changed, kept = x.split((self.changed, self.kept), axis)
        else:
            kept, changed = x.split((self.kept, self.changed), axis)
        return kept, changed

    def _joined(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat((changed, kept) if self.flip else (kept, changed), -len(self.shape))


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

    def __init__(
        self, network: Callable[[Tensor], Tensor], shape: Shape, flip: bool = False, bound: float = 2.0
    ) -> None:
        super().__init__(shape)
        refuse_one_position(shape)
        self.network, self.bound = network, bound
        board = (torch.arange(shape[1]).view(-1, 1) + torch.arange(shape[2])) % 2 == int(flip)
        self.register_buffer("mask", board.unsqueeze(0))

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x exp(s) + t where the mask is 0."""
        shift, scale = self._said(x)
        return torch.where(self.mask, x, x * scale.exp() + shift), event_sum(scale, self.shape)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(y − t) exp(−s) where the mask is 0."""
        shift, scale = self._said(y)
        return torch.where(self.mask, y, (y - shift) * (-scale).exp()), -event_sum(scale, self.shape)

    def _said(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.network(x * self.mask).chunk(2, -3)
        return shift, bounded(scale, self.bound) * ~self.mask


def bounded(value: Tensor, bound: float) -> Tensor:
    """Bound · tanh(value / bound): near 0 the value itself."""
    return bound * (value / bound).tanh()
