"""VEEGAN (Srivastava et al., arXiv:1705.07761): ALI, with a guide that gives the noise back.

    z ~ N(0, I)                          z: [z_dim]
    x = G(z)                             a point mass
    q(z | x) = N(F(x), s²)               the guide
    min_{G, F} max_D  E_{q(x) q(z | x)} log D(x, z) + E_{p(z)} log(1 − D(G(z), z)) + λ/2 E_{p(z)} ‖z − F(G(z))‖²

The first two terms are ALI's. The last is −λs² E_{p(x, z)} log q(z | x) but for a constant: a generator that sends much of z
to one mode cannot be undone, and a map F that is undone by G on all of z finds the modes that G has missed. The networks
are dense. With "kl" G descends KL(p(x, z) ‖ q(x, z)), the critic's own estimate, and F the last term alone, as the paper does.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import Program, Scale, Standardize
from probgen.pyro import R1, Adversarial, MutualInformation, Objective


def dense(sizes: list[int], slope: float = 0.0) -> nn.Sequential:
    """[B, sizes[0]] → [B, sizes[-1]]: linear layers with (leaky) rectifiers between them."""
    layers = []
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers[:-1])


class Critic(nn.Module):
    """(x [B, *shape], z [B, z_dim]) → logits [B, 1]."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.network = dense(sizes, slope=0.2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.network(torch.cat([x.flatten(1), z], dim=-1))


def logistic(real: Tensor, fake: Tensor) -> Tensor:
    """−log D(real) − log(1 − D(fake)), of logits."""
    return nn.functional.softplus(-real) + nn.functional.softplus(fake)


KL = Objective("kl", logistic, lambda real, fake: -fake)


def program(
    spec,
    z_dim: int | None = None,
    hidden: int = 128,
    layers: int = 2,
    scale: float = 0.5,
    reconstruction: float = 0.1,
    objective: Literal["kl", "non-saturating", "least-squares", "hinge", "relativistic"] = "non-saturating",
    r1: float = 0.1,
) -> Program:
    """A VEEGAN of any array `x` of real or whole numbers.

    Parameters
    ----------
    z_dim
        Dimensions of the latent; 2 for vectors of two numbers, 16 for others, unless it is named.
    hidden
        Units of a layer, of all networks.
    layers
        Hidden layers of all networks.
    scale
        s, of the guide.
    reconstruction
        λ, the weight of the noise's reconstruction.
    objective
        What the two players minimise.
    r1
        γ of the penalty γ/2 ‖∇ d(x, z)‖² on the critic at real rows; 0 leaves it out.
    """
    shape, whole, (low, high) = spec["x"].shape, spec["x"].dtype[:1] in "ui", spec["x"].range
    size = torch.Size(shape).numel()
    z_dim = z_dim or (2 if size == 2 else 16)
    generator = dense([z_dim, *[hidden] * layers, size])
    if whole:
        generator.append(nn.Tanh())  # pixels lie in [−1, 1]
    encoder = nn.Sequential(nn.Flatten(), *dense([size, *[hidden] * layers, z_dim], slope=0.2))
    critic = Critic([size + z_dim, *[hidden] * layers, 1])

    def model(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z).reshape(-1, *shape), event_dim=len(shape)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    pairs = Adversarial(critic, ("x", "z"), KL if objective == "kl" else objective, [R1(r1)] if r1 else [])
    return Program(
        model,
        guide,
        by=pairs + reconstruction * scale**2 * MutualInformation("z"),
        prepare={"x": Scale((low + high) / 2, high) if whole else Standardize()},
        defaults={
            "epochs": 200,
            "batch_size": 128,
            "lr": 1e-3,
            "optimizer": partial(torch.optim.Adam, betas=(0.0, 0.99)),
            "ema": 0.995,
        },
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("ring")
    print(probgen.fit(program(data.spec), data).sample(8)["x"])
