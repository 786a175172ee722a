"""Images as stacks of channels: their layout, and 2×2 pixels as four channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probgen.flow_shapes import channels_first, squeezed
from probgen.pyro.transforms.bijection import Bijection


class ChannelsFirst(Bijection):
    """Images as data have them, [H, W] or [H, W, C], as networks take them, [C, H, W]; log |det| = 0."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape, channels_first(shape))

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[*, H, W, C] → [*, C, H, W]."""
        lead = x.shape[: x.dim() - len(self.shape)]
        return (x.unsqueeze(-3) if len(self.shape) == 2 else x.movedim(-1, -3)), x.new_zeros(lead)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """[*, C, H, W] → [*, H, W, C]."""
        return (y.squeeze(-3) if len(self.shape) == 2 else y.movedim(-3, -1)), y.new_zeros(y.shape[:-3])


class Squeeze(Bijection):
    """[*, C, H, W] → [*, 4 C, H/2, W/2]: the 2×2 pixels of a block become channels; log |det| = 0."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape, squeezed(shape))

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks of pixels → channels."""
        return torch.pixel_unshuffle(x, 2), x.new_zeros(x.shape[:-3])

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Channels → blocks of pixels."""
        return torch.pixel_shuffle(y, 2), y.new_zeros(y.shape[:-3])
