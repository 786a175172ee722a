"""Networks that take a noisy x_t and its time t, and a class where there is one."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from probgen.errors import ProbgenError

zeros = nn.initializers.zeros


class TimeEmbedding(nn.Module):
    """sin and cos of t ∈ [0, 1] at frequencies from 1 to `fastest`, and a layer of them: t [B] → [B, width].

    With `classes` the embedding of a label y [B] is added; the label `classes` stands for none (arXiv:2207.12598).
    """

    width: int
    classes: int | None = None
    fastest: float = 1000.0

    def setup(self) -> None:
        """The layer, and a row for each label."""
        self.layer = nn.Dense(self.width)
        if self.classes is not None:
            self.label = nn.Embed(self.classes + 1, self.width, embedding_init=nn.initializers.normal(1.0))

    def __call__(self, t: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """t [B], y [B] → [B, width]."""
        angles = t[:, None] * np.logspace(0, math.log10(self.fastest), self.width // 2, dtype=np.float32)
        embedded = self.layer(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))
        if self.classes is None:
            return nn.silu(embedded)
        return nn.silu(embedded + self.label(jnp.full(t.shape, self.classes) if y is None else y))


class DenoisingMLP(nn.Module):
    """Residual layers that are told the time: x_t [B, *shape], t [B], y [B] → [B, *shape], or [B, *shape, outputs].

        h ← h + V silu(W h + U τ(t, y)),    the answer A silu(h), of weights that start at zero

    For vectors and small images, which it sees as vectors. `fastest` is the highest frequency of the embedding of time: where an
    equation is solved in time, it limits how large a step may be.
    """

    shape: tuple[int, ...]
    hidden: int = 128
    layers: int = 3
    classes: int | None = None
    outputs: int = 1
    fastest: float = 1000.0

    def setup(self) -> None:
        """The layers."""
        self.time = TimeEmbedding(self.hidden, self.classes, self.fastest)
        self.first = nn.Dense(self.hidden)
        self.into, self.told, self.out_of = ([nn.Dense(self.hidden) for _ in range(self.layers)] for _ in range(3))
        self.last = nn.Dense(math.prod(self.shape) * self.outputs, kernel_init=zeros)

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """x [B, *shape], t [B], y [B] → [B, *shape], with `outputs` > 1 [B, *shape, outputs]."""
        time, h = self.time(t, y), self.first(x.reshape(len(x), -1))
        for into, told, out_of in zip(self.into, self.told, self.out_of, strict=True):
            h = h + out_of(nn.silu(into(h) + told(time)))
        return answers(self.last(nn.silu(h)), self.shape, self.outputs)


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

    shape: tuple[int, ...]
    hidden: int = 32
    levels: int = 3
    classes: int | None = None
    outputs: int = 1
    fastest: float = 1000.0

    def setup(self) -> None:
        """The blocks, of each level and between them."""
        hidden, levels, shape = self.hidden, self.levels, self.shape
        if len(shape) not in (2, 3) or levels < 1 or any(side % 2 ** (levels - 1) for side in shape[:2]):
            raise ProbgenError(
                f"UNet: images {list(shape)} cannot be halved {levels - 1} times: take [H, W] or [H, W, C] with sides that are "
                f"multiples of {2 ** max(0, levels - 1)}, or fewer levels"
            )
        wide = [hidden * 2**k for k in range(levels)]
        self.time = TimeEmbedding(hidden * 2, self.classes, self.fastest)
        self.first = conv(hidden)
        self.down = [Block(wide[max(0, k - 1)], wide[k]) for k in range(levels)]
        self.halve = [conv(wide[k], strides=2) for k in range(levels - 1)]
        self.middle = [Block(wide[-1], wide[-1]), Block(wide[-1], wide[-1])]
        self.attention = Attention(wide[-1])
        self.up = [Block(2 * wide[k], wide[max(0, k - 1)]) for k in reversed(range(levels))]
        self.norm = norm(hidden)
        self.last = conv((*shape, 1)[2] * self.outputs, kernel_init=zeros)

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """x [B, *shape], t [B], y [B] → [B, *shape], with `outputs` > 1 [B, *shape, outputs]."""
        time, kept = self.time(t, y), []
        h = self.first(x.reshape(len(x), *(*self.shape, 1)[:3]))
        for k, block in enumerate(self.down):
            h = block(h, time)
            kept.append(h)
            h = self.halve[k](h) if k < len(self.halve) else h
        h = self.middle[1](self.attention(self.middle[0](h, time)), time)
        for k, block in enumerate(self.up):
            h = h.repeat(2, axis=1).repeat(2, axis=2) if k else h
            h = block(jnp.concatenate([h, kept.pop()], -1), time)
        return answers(self.last(nn.silu(self.norm(h))), self.shape, self.outputs)


class Block(nn.Module):
    """h ← skip(h) + conv(silu(norm(conv(silu(norm(h))) + U τ))), on [B, H, W, C]."""

    before: int
    after: int

    def setup(self) -> None:
        """Two norms and convolutions, what is told, and a way around where the channels change."""
        self.norms = [norm(self.before), norm(self.after)]
        self.convs = [conv(self.after), conv(self.after)]
        self.told = nn.Dense(self.after)
        if self.before != self.after:
            self.skip = nn.Conv(self.after, (1, 1))

    def __call__(self, h: jax.Array, time: jax.Array) -> jax.Array:
        """h [B, H, W, C], τ [B, T] → [B, H, W, C']."""
        inner = self.convs[0](nn.silu(self.norms[0](h))) + self.told(time)[:, None, None]
        around = h if self.before == self.after else self.skip(h)
        return around + self.convs[1](nn.silu(self.norms[1](inner)))


class Attention(nn.Module):
    """Each position looks at all: h ← h + W softmax(q kᵀ / √C) v, on [B, H, W, C]."""

    channels: int

    def setup(self) -> None:
        """The norm, and what a position asks, shows and says."""
        self.norm, self.qkv = norm(self.channels), nn.Dense(3 * self.channels)
        self.out = nn.Dense(self.channels, kernel_init=zeros)

    def __call__(self, h: jax.Array) -> jax.Array:
        """The same shape."""
        q, k, v = jnp.split(self.qkv(self.norm(h).reshape(len(h), -1, self.channels)), 3, -1)
        weights = nn.softmax(q @ k.mT / math.sqrt(self.channels))
        return h + self.out(weights @ v).reshape(h.shape)


def answers(found: jax.Array, shape: tuple[int, ...], outputs: int) -> jax.Array:
    """[B, ..., numbers] as [B, *shape], with `outputs` > 1 [B, *shape, outputs]."""
    return found.reshape(len(found), *shape, *([outputs] if outputs > 1 else []))


def conv(channels: int, strides: int = 1, kernel_init: nn.initializers.Initializer | None = None) -> nn.Conv:
    """3×3, padded by one."""
    init = nn.initializers.lecun_normal() if kernel_init is None else kernel_init
    return nn.Conv(channels, (3, 3), strides=strides, padding=1, kernel_init=init)


def norm(channels: int) -> nn.GroupNorm:
    """Of eight groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), epsilon=1e-5)
