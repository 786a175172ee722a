"""Generative adversarial network (Goodfellow et al., arXiv:1406.2661).

    z ~ N(0, I)                          z: [z_dim]
    x = G(z)                             a point mass; with `noise` s, x | z ~ N(G(z), s²)
    min_G max_D  E log D(x) + E log(1 − D(G(z)))       or any other objective of `Adversarial`

G and D are dense networks. The program draws x and says nothing of how likely it is: its likelihood is not defined, unless
there is noise, with which an ELBO can train the very same program.
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import Program, Scale, Standardize
from probgen.pyro import R1, Adversarial


def dense(sizes: list[int], slope: float = 0.0) -> nn.Sequential:
    """[B, sizes[0]] → [B, sizes[-1]]: linear layers with (leaky) rectifiers between them."""
    layers = []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers[:-1])


def program(
    spec,
    z_dim: int | None = None,
    hidden: int = 128,
    layers: int = 2,
    noise: float = 0.0,
    objective: Literal[
        "minimax", "non-saturating", "least-squares", "hinge", "wasserstein", "relativistic"
    ] = "non-saturating",
    r1: float = 0.01,
    pac: int = 1,
) -> Program:
    """A GAN of any array `x` of real or whole numbers.

    Parameters
    ----------
    z_dim
        Dimensions of the latent; 2 for vectors of two numbers, 32 for others, unless it is named.
    hidden
        Units of a layer, of both networks.
    layers
        Hidden layers of both networks.
    noise
        s, in units of the prepared data; 0 is a point mass.
    objective
        What the two minimise.
    r1
        γ of the penalty γ/2 ‖∇ d(x)‖² on the critic at real rows; 0 leaves it out.
    pac
        Rows that the critic judges at once.
    """
    shape, whole, (low, high) = spec["x"].shape, spec["x"].dtype[:1] in "ui", spec["x"].range
    size = torch.Size(shape).numel()
    z_dim = z_dim or (2 if size == 2 else 32)
    generator = dense([z_dim, *[hidden] * layers, size])
    if whole:
        generator.append(nn.Tanh())  # pixels lie in [−1, 1]
    critic = nn.Sequential(nn.Flatten(), *dense([pac * size, *[hidden] * layers, 1], slope=0.2))

    def model(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            mean = generator(z).reshape(-1, *shape)
            x_given_z = (
                dist.Normal(mean, noise).to_event(len(shape)) if noise else dist.Delta(mean, event_dim=len(shape))
            )
            pyro.sample("x", x_given_z, obs=x)

    return Program(
        model,
        by=Adversarial(critic, objective=objective, penalties=[R1(r1)] if r1 else [], pac=pac),
        prepare={"x": Scale((low + high) / 2, high) if whole else Standardize()},
        defaults={
            "epochs": 200,
            "batch_size": 128,
            "lr": 1e-3,
            "ema": 0.995,
            "optimizer": functools.partial(torch.optim.Adam, betas=(0.0, 0.99)),
        },
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("ring")
    print(probgen.fit(program(data.spec), data).sample(8)["x"])
