"""Radial flows: a pull towards a point or a push away from it, with its inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from probgen.pyro.transforms.bijection import Bijection

LEAST = 1e-3  # of the slope 1 + β / α at the centre; 0 would not be invertible


class Radial(Bijection):
    """y = x + β̂ (x − c) / (α + r),   r = ‖x − c‖   (Rezende & Mohamed, arXiv:1505.05770, section 4.1).

        α = softplus(raw),   β̂ = −α + LEAST α + softplus(β),   h = 1 / (α + r)
        log |det ∂y/∂x| = (D − 1) log(1 + β̂ h) + log(1 + β̂ α h²)

    β̂ > −α makes it invertible whatever α and β are. The distance of y from c is r (1 + β̂ / (α + r)), a quadratic
    equation in r.

    Parameters
    ----------
    center, raw, beta
        Tensors [*, D], [*] and [*], of one flow for all rows or of one for each (amortised).
    """

    def __init__(self, center: Tensor, raw: Tensor, beta: Tensor) -> None:
        super().__init__((center.shape[-1],))
        self.center = center
        self.alpha = softplus(raw).clamp(min=LEAST)
        self.beta = softplus(beta) - (1 - LEAST) * self.alpha

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pulled or pushed."""
        away = x - self.center
        h = 1 / (self.alpha + length(away))
        return x + (self.beta * h).unsqueeze(-1) * away, self._ladj(h)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The other way."""
        away = y - self.center
        far = length(away)
        # r² + (α + β̂ − far) r − α far = 0, of which the positive root in the form that does not cancel
        half = (self.alpha + self.beta - far) / 2
        root = (half * half + self.alpha * far).sqrt()
        r = torch.where(half > 0, self.alpha * far / (half.abs() + root), root - half)
        h = 1 / (self.alpha + r)
        return self.center + away / (1 + self.beta * h).unsqueeze(-1), -self._ladj(h)

    def _ladj(self, h: Tensor) -> Tensor:
        around = (self.shape[0] - 1) * (self.beta * h).log1p()
        return around + (self.beta * self.alpha * h * h).log1p()


class RadialLayer(Bijection):
    """A radial flow that owns its parameters, the same for all rows."""

    def __init__(self, size: int, std: float = 0.1) -> None:
        super().__init__((size,))
        self.center = nn.Parameter(std * torch.randn(size))
        self.raw = nn.Parameter(torch.tensor(math.log(math.e - 1)) + std * torch.randn(()))
        self.beta = nn.Parameter(torch.tensor(math.log(math.e - 1)) + std * torch.randn(()))

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pulled or pushed."""
        return Radial(self.center, self.raw, self.beta).forth(x)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The other way."""
        return Radial(self.center, self.raw, self.beta).back(y)


def length(x: Tensor) -> Tensor:
    """‖x‖ over the last axis, with a gradient of 0 where x is 0."""
    return ((x * x).sum(-1) + torch.finfo(x.dtype).tiny).sqrt()
