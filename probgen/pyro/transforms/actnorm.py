"""An affine map of every channel, which starts by standardising the first rows it sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probgen.flow_shapes import Shape
from probgen.pyro.nn.snapshot import original
from probgen.pyro.transforms.bijection import Bijection, event_sum


class ActNorm(Bijection):
    """y = (x − loc) exp(log_scale), one pair of numbers for each channel  (Kingma & Dhariwal, arXiv:1807.03039).

    The first batch that is mapped from x to y sets them: each channel of y has mean 0 and variance 1 there. A channel
    that is constant is only centred. Asked for draws before it has seen any data, it stays the identity. A fit starts
    from its own first batch, and leaves a layer that still waits for data waiting.

    Parameters
    ----------
    shape
        Of an event; its first axis are the channels: `(2,)` for vectors, `(3, 8, 8)` or `(3, None, None)` for images.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        channels = (shape[0], *(1 for _ in shape[1:]))
        self.loc, self.log_scale = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.waits_for_data = True

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x − loc) exp(log_scale)."""
        if self.waits_for_data and original(self).waits_for_data:
            self._see(x.detach())
        return (x - self.loc) * self.log_scale.exp(), self._ladj(x)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loc + y exp(−log_scale)."""
        self._wait_no_more()
        return y * (-self.log_scale).exp() + self.loc, -self._ladj(y)

    def _ladj(self, x: Tensor) -> Tensor:
        """Every position of a channel counts its log-scale."""
        dims = len(self.shape)
        positions = x.shape[x.dim() - dims + 1 :].numel()
        return (event_sum(self.log_scale, self.shape) * positions).expand(x.shape[: x.dim() - dims])

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        """Take the parameters from a batch [*, *shape]."""
        self._wait_no_more()
        each = x.movedim(x.dim() - len(self.shape), 0).flatten(1)
        std, mean = torch.std_mean(each, 1, correction=0)
        std = torch.where(std > 1e-6 * mean.abs().clamp(min=1.0), std, torch.ones_like(std))
        self.loc.copy_(mean.view_as(self.loc))
        self.log_scale.copy_(-std.log().view_as(self.log_scale))

    def _wait_no_more(self) -> None:
        """A snapshot shares its parameters with the layer that it was taken of."""
        self.waits_for_data = original(self).waits_for_data = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._wait_no_more()  # what is loaded has seen its data
