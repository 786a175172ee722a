"""Networks that say, from one part of the data, how a flow is to move the other."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class DenseConditioner(nn.Module):
    """x [*, size] → [*, outputs], through ReLU layers; the last layer starts at zero, so that a flow starts as 1."""

    def __init__(self, size: int, outputs: int, hidden: int, layers: int = 2) -> None:
        super().__init__()
        sizes = (size, *(hidden,) * layers)
        inner = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*inner, zeroed(nn.Linear(sizes[-1], outputs)))

    def forward(self, x: Tensor) -> Tensor:
        """x [*, size] → [*, outputs]."""
        return self.layers(x)


class ConvConditioner(nn.Module):
    """x [*, C, H, W] → [*, outputs, H, W]: 3×3, 1×1 and 3×3 convolutions, the last from zero  (arXiv:1807.03039)."""

    def __init__(self, channels: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            zeroed(nn.Conv2d(hidden, outputs, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [*, C, H, W] → [*, outputs, H, W]."""
        y = self.layers(x.reshape(-1, *x.shape[-3:]))
        return y.reshape(*x.shape[:-3], *y.shape[-3:])


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all weights zero, so that a branch or an answer starts as nothing."""
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    return layer
