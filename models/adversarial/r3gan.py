"""R3GAN, a modern baseline (Huang et al., "The GAN is dead; long live the GAN!", arXiv:2501.05441).

    z ~ N(0, I)                          z: [z_dim]
    x = G(z)                             a point mass
    critic    E log(1 + exp(d(G(z)) − d(x))) + γ/2 E‖∇ d(x)‖² + γ/2 E‖∇ d(G(z))‖²
    program   E log(1 + exp(d(x) − d(G(z))))

The relativistic loss asks that real rows look realer than fake ones, pair by pair, and with penalties on both sides training
converges locally; so it needs no tricks. G and D mirror each other: residual blocks without normalisation, whose last layer
starts at zero, so that all of them start as the identity (Fixup); the other layers of the L blocks of a network start L^(−1/4)
smaller, those of dense blocks, two layers each, L^(−1/2). Adam has no momentum, and samples are drawn with averaged weights.

The blocks of vectors are dense, those of images [H, W] or [H, W, C] 1×1, grouped 3×3 and 1×1 convolutions at a quarter, half
and all of the size. The paper lets γ and β₂ go, 10 times down and from 0.9 to 0.99; here they stay.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import Program, Scale, Standardize
from probgen.pyro import R1, R2, Adversarial


class Residual(nn.Module):
    """h + f(h), where f has `layers` between which there are leaky rectifiers; in a network of `depth` such blocks."""

    def __init__(self, layers: list[nn.Module], depth: int) -> None:
        super().__init__()
        gain = nn.init.calculate_gain("leaky_relu", 0.2) * depth ** (-1 / (2 * len(layers) - 2))
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            layer.weight.data.mul_(0.0 if layer is layers[-1] else gain)
        self.inner = nn.Sequential(*[part for layer in layers for part in (nn.LeakyReLU(0.2), layer)])

    def forward(self, h: Tensor) -> Tensor:
        return h + self.inner(h)


def dense(inputs: int, hidden: int, blocks: int, outputs: int) -> nn.Sequential:
    """[B, inputs] → [B, outputs]."""
    pairs = [[nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)] for _ in range(blocks)]
    inner = [Residual(pair, blocks) for pair in pairs]
    return nn.Sequential(nn.Linear(inputs, hidden), *inner, nn.LeakyReLU(0.2), nn.Linear(hidden, outputs))


def bottlenecks(channels: int, blocks: int, depth: int) -> list[Residual]:
    """Blocks on [B, channels, H, W], inside twice as wide, in groups of 16 channels."""
    wide = 2 * channels

    def block() -> Residual:
        middle = nn.Conv2d(wide, wide, 3, padding=1, groups=max(wide // 16, 1), bias=False)
        return Residual([nn.Conv2d(channels, wide, 1), middle, nn.Conv2d(wide, channels, 1, bias=False)], depth)

    return [block() for _ in range(blocks)]


class Pixels(nn.Module):
    """[B, H, W] or [B, H, W, C] → [B, C, H, W], or the latter back to [B, H, W, C]."""

    def __init__(self, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.shape = shape and (*shape, 1)[:3]

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape).permute(0, 3, 1, 2) if self.shape else x.permute(0, 2, 3, 1)


def convolutional(shape: tuple[int, ...], z_dim: int, hidden: int, blocks: int) -> tuple[nn.Sequential, nn.Sequential]:
    """z [B, z_dim] → images, and images → logits [B, 1]; at each of three sizes `blocks` blocks of `hidden` channels."""
    height, width, channels = (*shape, 1)[:3]
    inner, depth = (hidden, height // 4, width // 4), 3 * blocks
    features = torch.Size(inner).numel()
    up, down = [nn.Linear(z_dim, features), nn.Unflatten(1, inner)], [Pixels(shape), nn.Conv2d(channels, hidden, 1)]
    for size in range(3):
        up += [*([nn.Upsample(scale_factor=2)] if size else []), *bottlenecks(hidden, blocks, depth)]
        down += [*([nn.AvgPool2d(2)] if size else []), *bottlenecks(hidden, blocks, depth)]
    generator = nn.Sequential(*up, nn.LeakyReLU(0.2), nn.Conv2d(hidden, channels, 1), Pixels())
    return generator, nn.Sequential(*down, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(features, 1))


def program(
    spec,
    z_dim: int | None = None,
    hidden: int | None = None,
    blocks: int | None = None,
    network: Literal["dense", "conv"] | None = None,
    gamma: float = 0.1,
    beta2: float = 0.99,
) -> Program:
    """An R3GAN of any array `x` of real or whole numbers.

    Parameters
    ----------
    z_dim
        Dimensions of the latent; 2 for vectors of two numbers, 32 for others, unless it is named.
    hidden
        Channels, 16, or units of a layer, 128, unless it is named.
    blocks
        Residual blocks at each size of an image, 1, or of a dense network, 2, unless it is named.
    network
        "dense", or "conv" for images whose sides are multiples of four; the latter from 16×16 on unless it is named.
    gamma
        γ, of both penalties. Data want their own: too small and training oscillates, too large and modes are lost.
    beta2
        Adam's, for both players.
    """
    shape, whole, (low, high) = spec["x"].shape, spec["x"].dtype[:1] in "ui", spec["x"].range
    size = torch.Size(shape).numel()
    z_dim = z_dim or (2 if size == 2 else 32)
    images = len(shape) > 1 and min(shape[:2]) >= 16
    if (network or ("conv" if images else "dense")) == "conv":
        generator, critic = convolutional(shape, z_dim, hidden or 16, blocks or 1)
    else:
        generator = dense(z_dim, hidden or 128, blocks or 2, size)
        critic = nn.Sequential(nn.Flatten(), *dense(size, hidden or 128, blocks or 2, 1))
    if whole:
        generator.append(nn.Tanh())  # pixels lie in [−1, 1]

    def model(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z).reshape(-1, *shape), event_dim=len(shape)), obs=x)

    return Program(
        model,
        by=Adversarial(critic, objective="relativistic", penalties=[R1(gamma), R2(gamma)]),
        prepare={"x": Scale((low + high) / 2, high) if whole else Standardize()},
        defaults={
            "epochs": 200,
            "batch_size": 128,
            "lr": 5e-4,
            "optimizer": partial(torch.optim.Adam, betas=(0.0, beta2)),
            "ema": 0.995,
        },
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("ring")
    print(probgen.fit(program(data.spec), data).sample(8)["x"])
