"""Deep convolutional GAN (Radford, Metz & Chintala, arXiv:1511.06434).

    z ~ N(0, I)                          z: [z_dim]
    x = G(z)                             a point mass; images [H, W] or [H, W, C] whose sides are multiples of four
    min_G max_D  E log D(x) + E log(1 − D(G(z)))       both logistic, G's not saturating

G doubles the sides twice by transposed convolutions, D halves them twice by strided ones; neither pools. There is
BatchNorm in both, but not at G's output nor D's input; ReLU in G and tanh at its end, leaky ReLU in D; all weights start at
N(0, 0.02²), and Adam's β₁ is 0.5. On vectors the convolutions are linear layers, and weights start as PyTorch has them.
Samples are drawn with the running statistics of G.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import Program, Scale, Standardize
from probgen.pyro import Adversarial


def dense(size: int, z_dim: int, hidden: int) -> tuple[nn.Sequential, nn.Sequential]:
    """z [B, z_dim] → x [B, size], and x [B, *shape] → logits [B, 1]."""
    generator = nn.Sequential(
        nn.Linear(z_dim, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, size),
    )
    critic = nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, 1),
    )
    return generator, critic


def convolutional(shape: tuple[int, ...], z_dim: int, hidden: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The same for images, with `hidden` channels at half of the size and twice as many at a quarter."""
    height, width, channels = (*shape, 1)[:3]
    inner = (2 * hidden, height // 4, width // 4)
    generator = nn.Sequential(
        nn.Linear(z_dim, torch.Size(inner).numel(), bias=False),
        nn.Unflatten(1, inner),
        nn.BatchNorm2d(2 * hidden),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * hidden, hidden, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.ConvTranspose2d(hidden, channels, 4, stride=2, padding=1),
        ChannelsLast(),
    )
    critic = nn.Sequential(
        ChannelsFirst((height, width, channels)),
        nn.Conv2d(channels, hidden, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(hidden, 2 * hidden, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * hidden),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(torch.Size(inner).numel(), 1),
    )
    for weight in [*generator.parameters(), *critic.parameters()]:
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.02)
    return generator, critic


class ChannelsFirst(nn.Module):
    """[B, H, W] or [B, H, W, C] → [B, C, H, W]."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape).permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """[B, C, H, W] → [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def program(
    spec,
    z_dim: int | None = None,
    hidden: int | None = None,
    network: Literal["dense", "conv"] | None = None,
) -> Program:
    """A DCGAN of any array `x` of real or whole numbers.

    Parameters
    ----------
    z_dim
        Dimensions of the latent; 2 for vectors of two numbers, 32 for others, unless it is named.
    hidden
        Channels at half of the size, 32, or units of a layer, 128, unless it is named.
    network
        "dense", or "conv" for images whose sides are multiples of four; by the shape of the data unless it is named.
    """
    shape, whole, (low, high) = spec["x"].shape, spec["x"].dtype[:1] in "ui", spec["x"].range
    size = torch.Size(shape).numel()
    z_dim = z_dim or (2 if size == 2 else 32)
    quarters = len(shape) in (2, 3) and shape[0] % 4 == shape[1] % 4 == 0
    if (network or ("conv" if quarters else "dense")) == "conv":
        generator, critic = convolutional(shape, z_dim, hidden or 32)
    else:
        generator, critic = dense(size, z_dim, hidden or 128)
    if whole:
        generator.append(nn.Tanh())  # pixels lie in [−1, 1]

    def model(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z).reshape(-1, *shape), event_dim=len(shape)), obs=x)

    return Program(
        model,
        by=Adversarial(critic),
        prepare={"x": Scale((low + high) / 2, high) if whole else Standardize()},
        defaults={
            "epochs": 100,
            "batch_size": 128,
            "lr": 2e-4,
            "optimizer": partial(torch.optim.Adam, betas=(0.5, 0.999)),
        },
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec), data).sample(8)["x"])
