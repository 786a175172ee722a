"""Planar flows: a wave across a plane, added to every point, with its inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from probgen.pyro.transforms.bijection import Bijection

LEAST = 1e-3  # of the slope 1 + û·w of the wave where it is steepest; 0 would not be invertible
IDENTITY = math.log(math.e - 1)  # where softplus is 1
STEPS = 8  # of Newton's method, and two more: enough for any û·w up to 1e8


class Planar(Bijection):
    """y = x + û tanh(w·x + b),   log |det ∂y/∂x| = log(1 + û·w tanh′(w·x + b))   (arXiv:1505.05770, section 4.1).

        û = u + (m − w·u) w / ‖w‖²,   m = (1 − LEAST) softplus(w·u + log(e − 1)) − 1 + LEAST

    û·w = m > −1 makes it invertible whatever u and w are; the paper's m has no log(e − 1), with which u = 0 is the
    identity. Along w it is one equation in one unknown, a + m tanh(a) = w·y + b, which Newton's method solves, and then
    x = y − û tanh(a). Both ways carry gradients.

    Parameters
    ----------
    u, w, b
        Tensors [*, D], [*, D] and [*], of one flow for all rows or of one for each (amortised).
    """

    def __init__(self, u: Tensor, w: Tensor, b: Tensor) -> None:
        super().__init__((u.shape[-1],))
        self.w, self.b = w, b
        dot, square = (w * u).sum(-1), (w * w).sum(-1)
        moved = (1 - LEAST) * (softplus(dot + IDENTITY) - 1) - dot
        self.u = u + (moved / square.clamp(min=torch.finfo(w.dtype).tiny)).unsqueeze(-1) * w
        self.m = (w * self.u).sum(-1)

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The wave added."""
        wave = ((x * self.w).sum(-1) + self.b).tanh()
        return x + self.u * wave.unsqueeze(-1), self._ladj(wave)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The wave taken away."""
        wave = solved((y * self.w).sum(-1) + self.b, self.m).tanh()
        return y - self.u * wave.unsqueeze(-1), -self._ladj(wave)

    def _ladj(self, wave: Tensor) -> Tensor:
        return (1 + self.m * (1 - wave * wave)).log()


class PlanarLayer(Bijection):
    """A planar flow that owns its parameters, the same for all rows."""

    def __init__(self, size: int, std: float = 0.1) -> None:
        super().__init__((size,))
        self.u, self.w = (nn.Parameter(std * torch.randn(size)) for _ in range(2))
        self.b = nn.Parameter(torch.zeros(()))

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The wave added."""
        return Planar(self.u, self.w, self.b).forth(x)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The wave taken away."""
        return Planar(self.u, self.w, self.b).back(y)


def solved(s: Tensor, m: Tensor) -> Tensor:
    """The root a of a + m tanh(a) = s, for m > −1, elementwise.

    On the side of the sign of s the left side is concave (m > 0) or convex (m < 0), so that Newton's method from a bound
    on the root approaches it from one side and cannot miss. Its last two steps are differentiated, which gives first
    and second derivatives exactly: each step doubles the order to which the root is right.
    """
    with torch.no_grad():
        a = _bound(s.abs(), m)
        for _ in range(STEPS):
            a = _newton(a, s.abs(), m)
        a = a * s.sign()
    return _newton(_newton(a, s, m), s, m)


def _bound(s: Tensor, m: Tensor) -> Tensor:
    """A number below the root where m > 0, and above it where m < 0, for s ≥ 0."""
    tangent, far, wide = s / (1 + m), s - m, m.clamp(min=LEAST)
    most = torch.minimum(s, _atanh(s / wide))  # the root is less, so that tanh(a) = (s − a) / m is more than with it
    below = torch.maximum(torch.maximum(tangent, far), _atanh((s - most) / wide))
    return torch.where(m > 0, below, torch.minimum(tangent, far))


def _atanh(x: Tensor) -> Tensor:
    return x.clamp(0, 1 - 1e-7).atanh()


def _newton(a: Tensor, s: Tensor, m: Tensor) -> Tensor:
    wave = a.tanh()
    return a - (a + m * wave - s) / (1 + m * (1 - wave * wave))
