"""Networks that take a noisy x_t and its time t, and a class where there is one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probgen.errors import ProbgenError
from probgen.pyro.nn.conditioner import zeroed


class TimeEmbedding(nn.Module):
    """sin and cos of t ∈ [0, 1] at frequencies from 1 to `fastest`, and a layer of them: t [B] → [B, width].

    With `classes` the embedding of a label y [B] is added; the label `classes` stands for none (arXiv:2207.12598).
    """

    def __init__(self, width: int, classes: int | None = None, fastest: float = 1000.0) -> None:
        super().__init__()
        self.layer = nn.Linear(width - width % 2, width)
        self.register_buffer("frequencies", torch.logspace(0, math.log10(fastest), width // 2))
        self.label = None if classes is None else nn.Embedding(classes + 1, width)

    def forward(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """t [B], y [B] → [B, width]."""
        angles = t[:, None] * self.frequencies
        embedded = self.layer(torch.cat([angles.sin(), angles.cos()], -1))
        if self.label is None:
            return F.silu(embedded)
        y = torch.full_like(t, self.label.num_embeddings - 1, dtype=torch.int64) if y is None else y
        return F.silu(embedded + self.label(y))


class DenoisingMLP(nn.Module):
    """Residual layers that are told the time: x_t [B, *shape], t [B], y [B] → [B, *shape], or [B, *shape, outputs].

        h ← h + V silu(W h + U τ(t, y)),    the answer A silu(h), of weights that start at zero

    For vectors and small images, which it sees as vectors. `fastest` is the highest frequency of the embedding of time: where an
    equation is solved in time, it limits how large a step may be.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: int = 128,
        layers: int = 3,
        classes: int | None = None,
        outputs: int = 1,
        fastest: float = 1000.0,
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        self.shape, self.outputs = tuple(shape), outputs
        self.time = TimeEmbedding(hidden, classes, fastest)
        self.first = nn.Linear(size, hidden)
        self.into = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.told = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.out_of = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.last = zeroed(nn.Linear(hidden, size * outputs))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x [B, *shape], t [B], y [B] → [B, *shape], with `outputs` > 1 [B, *shape, outputs]."""
        time, h = self.time(t, y), self.first(x.flatten(1))
        for into, told, out_of in zip(self.into, self.told, self.out_of, strict=True):
            h = h + out_of(F.silu(into(h) + told(time)))
        found = self.last(F.silu(h))
        return found.reshape(len(x), *self.shape, *([self.outputs] if self.outputs > 1 else []))


class UNet(nn.Module):
    """A U-Net of images (Ronneberger et al., arXiv:1505.04597; Ho et al., arXiv:2006.11239): [B, H, W] or [B, H, W, C].

    At each level one residual block down and one up, told the time; self-attention at the smallest; the answer's
    weights start at zero.

    Parameters
    ----------
    shape
        [H, W] or [H, W, C]; the sides are multiples of 2^(levels − 1).
    hidden
        Channels at the first level, twice as many at each that follows.
    levels
        Sizes of the image: each has half the sides of the one before.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: int = 32,
        levels: int = 3,
        classes: int | None = None,
        outputs: int = 1,
        fastest: float = 1000.0,
    ) -> None:
        super().__init__()
        height, width, channels = (*shape, 1)[:3]
        if len(shape) not in (2, 3) or levels < 1 or height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
            raise ProbgenError(
                f"UNet: images {list(shape)} cannot be halved {levels - 1} times: take [H, W] or [H, W, C] with sides that are "
                f"multiples of {2 ** max(0, levels - 1)}, or fewer levels"
            )
        self.shape, self.outputs, self.channels = tuple(shape), outputs, channels
        wide = [hidden * 2**k for k in range(levels)]
        self.time = TimeEmbedding(hidden * 2, classes, fastest)
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.down = nn.ModuleList(Block(wide[max(0, k - 1)], wide[k], hidden * 2) for k in range(levels))
        self.halve = nn.ModuleList(nn.Conv2d(wide[k], wide[k], 3, stride=2, padding=1) for k in range(levels - 1))
        self.middle = nn.ModuleList([Block(wide[-1], wide[-1], hidden * 2), Block(wide[-1], wide[-1], hidden * 2)])
        self.attention = Attention(wide[-1])
        self.up = nn.ModuleList(Block(2 * wide[k], wide[max(0, k - 1)], hidden * 2) for k in reversed(range(levels)))
        self.norm = nn.GroupNorm(groups(hidden), hidden)
        self.last = zeroed(nn.Conv2d(hidden, channels * outputs, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x [B, *shape], t [B], y [B] → [B, *shape], with `outputs` > 1 [B, *shape, outputs]."""
        time, kept = self.time(t, y), []
        images = x.reshape(len(x), *self.shape[:2], self.channels).permute(0, 3, 1, 2)
        # Channels that lie last would do so throughout, where GroupNorm has no forward derivative.
        h = self.first(images.clone(memory_format=torch.contiguous_format))
        for k, block in enumerate(self.down):
            h = block(h, time)
            kept.append(h)
            h = self.halve[k](h) if k < len(self.halve) else h
        h = self.middle[1](self.attention(self.middle[0](h, time)), time)
        for k, block in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if k else h
            h = block(torch.cat([h, kept.pop()], 1), time)
        found = self.last(F.silu(self.norm(h))).unflatten(1, (self.channels, self.outputs)).permute(0, 3, 4, 1, 2)
        return found.reshape(len(x), *self.shape, *([self.outputs] if self.outputs > 1 else []))


class Block(nn.Module):
    """h ← skip(h) + conv(silu(norm(conv(silu(norm(h))) + U τ))), on [B, C, H, W]."""

    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(groups(before), before), nn.GroupNorm(groups(after), after)])
        self.convs = nn.ModuleList([nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)])
        self.told = nn.Linear(time, after)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        """h [B, C, H, W], τ [B, T] → [B, C', H, W]."""
        inner = self.convs[0](F.silu(self.norms[0](h))) + self.told(time)[..., None, None]
        return self.skip(h) + self.convs[1](F.silu(self.norms[1](inner)))


class Attention(nn.Module):
    """Each position looks at all: h ← h + W softmax(q kᵀ / √C) v, on [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups(channels), channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), zeroed(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        """The same shape."""
        q, k, v = self.qkv(self.norm(h).flatten(2).mT).chunk(3, -1)
        seen = F.scaled_dot_product_attention(q, k, v)
        return h + self.out(seen).mT.reshape(h.shape)


def groups(channels: int) -> int:
    """Groups of a norm: eight, or as many as divide the channels."""
    return math.gcd(8, channels)
