"""Conditional GAN (Mirza & Osindero, arXiv:1411.1784).

    z ~ N(0, I)                          z: [z_dim];  y in 0..K−1 is given
    x = G(z, y)                          a point mass
    min_G max_D  E log D(x, y) + E log(1 − D(G(z, y), y))

Both networks are dense and are told y by a learned vector of its class, side by side with z or x. The fake rows of a batch
have the labels of its real ones, so D judges how well x fits y.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import ProbgenError, Program, Scale, Standardize
from probgen.pyro import R1, Adversarial


class Told(nn.Module):
    """(a [B, *shape], y [B]) → [B, outputs]: dense layers on what `a` holds and on a vector of the class y."""

    def __init__(self, size: int, classes: int, hidden: int, layers: int, outputs: int, slope: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, hidden // 4)
        sizes = [size + hidden // 4, *[hidden] * layers]
        parts = [(nn.Linear(a, b), nn.LeakyReLU(slope)) for a, b in pairwise(sizes)]
        self.network = nn.Sequential(*[part for pair in parts for part in pair], nn.Linear(sizes[-1], outputs))

    def forward(self, a: Tensor, y: Tensor) -> Tensor:
        return self.network(torch.cat([a.flatten(1), self.embedding(y)], dim=-1))


def program(
    spec,
    z_dim: int | None = None,
    hidden: int = 128,
    layers: int = 2,
    objective: Literal[
        "minimax", "non-saturating", "least-squares", "hinge", "wasserstein", "relativistic"
    ] = "non-saturating",
    r1: float = 0.1,
) -> Program:
    """A GAN of any array `x` of real or whole numbers, given its class `y`.

    Parameters
    ----------
    z_dim
        Dimensions of the latent; 2 for vectors of two numbers, 32 for others, unless it is named.
    hidden
        Units of a layer, of both networks; a class has a vector of a quarter of these.
    layers
        Hidden layers of both networks.
    objective
        What the two minimise.
    r1
        γ of the penalty γ/2 ‖∇ d(x, y)‖² by x on the critic at real rows; 0 leaves it out.
    """
    if "y" not in spec or not spec["y"].classes:
        raise ProbgenError(
            "cgan is told classes `y`, whole numbers from 0, and the data has none: add `y`, or take gan"
        )
    shape, whole, (low, high) = spec["x"].shape, spec["x"].dtype[:1] in "ui", spec["x"].range
    size, classes = torch.Size(shape).numel(), spec["y"].classes
    z_dim = z_dim or (2 if size == 2 else 32)
    generator = Told(z_dim, classes, hidden, layers, size)
    critic = Told(size, classes, hidden, layers, 1, slope=0.2)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            drawn = generator(z, y).reshape(-1, *shape)
            pyro.sample("x", dist.Delta(drawn.tanh() if whole else drawn, event_dim=len(shape)), obs=x)

    return Program(
        model,
        by=Adversarial(critic, ("x", "y"), objective, penalties=[R1(r1)] if r1 else []),
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

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec), data).sample(8, given={"y": 3})["x"])
