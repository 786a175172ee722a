"""Adversarially learned inference (Dumoulin et al., arXiv:1606.00704), or BiGAN (Donahue et al., arXiv:1605.09782).

    z ~ N(0, I)                          z: [z_dim]
    x = G(z)                             a point mass
    q(z | x) = N(μ(x), diag σ²(x))       the guide; BiGAN's is a point mass at μ(x)
    min_{G, q} max_D  E_{q(x) q(z | x)} log D(x, z) + E_{p(z)} log(1 − D(G(z), z))

D tells pairs (x, z) of a datum and its latent, drawn by the guide, from pairs of a latent and its datum, drawn by the
program. Where it cannot, the two joint laws are one: G draws data, and the guide is the posterior. Both players see both
logits. The networks are dense.
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
from probgen.pyro import R1, Adversarial


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


def program(
    spec,
    z_dim: int | None = None,
    hidden: int = 128,
    layers: int = 2,
    encoder: Literal["gaussian", "point"] = "gaussian",
    objective: Literal["non-saturating", "least-squares", "hinge", "wasserstein", "relativistic"] = "non-saturating",
    r1: float = 0.1,
) -> Program:
    """ALI, or BiGAN, for any array `x` of real or whole numbers.

    Parameters
    ----------
    z_dim
        Dimensions of the latent; 2 for vectors of two numbers, 16 for others, unless it is named.
    hidden
        Units of a layer, of all networks.
    layers
        Hidden layers of all networks.
    encoder
        "gaussian", ALI's guide, or "point", BiGAN's.
    objective
        What the two players minimise.
    r1
        γ of the penalty γ/2 ‖∇ d(x, z)‖² on the critic at real rows; 0 leaves it out.
    """
    shape, whole, (low, high) = spec["x"].shape, spec["x"].dtype[:1] in "ui", spec["x"].range
    size = torch.Size(shape).numel()
    z_dim = z_dim or (2 if size == 2 else 16)
    decode = dense([z_dim, *[hidden] * layers, size])
    if whole:
        decode.append(nn.Tanh())  # pixels lie in [−1, 1]
    encode = nn.Sequential(nn.Flatten(), *dense([size, *[hidden] * layers, 2 * z_dim], slope=0.2))
    critic = Critic([size + z_dim, *[hidden] * layers, 1])

    def model(x: Tensor) -> None:
        pyro.module("generator", decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(decode(z).reshape(-1, *shape), event_dim=len(shape)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encode)
        with pyro.plate("data", len(x)):
            mean, log_scale = encode(x).chunk(2, dim=-1)
            q = (
                dist.Normal(mean, log_scale.exp()).to_event(1)
                if encoder == "gaussian"
                else dist.Delta(mean, event_dim=1)
            )
            pyro.sample("z", q)

    return Program(
        model,
        guide,
        by=Adversarial(critic, ("x", "z"), objective, penalties=[R1(r1)] if r1 else []),
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
    print(probgen.fit(program(data.spec), data).posterior(data.test[:4]))
