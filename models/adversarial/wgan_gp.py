"""Wasserstein GAN (Arjovsky et al., arXiv:1701.07875) with gradient penalty (Gulrajani et al., arXiv:1704.00028).

    z ~ N(0, I)                          z: [z_dim]
    x = G(z)
    min_G max_d  E d(x) − E d(G(z)) − λ E (‖∇d(x̂)‖ − 1)²,     x̂ = ε x + (1 − ε) G(z),  ε ~ U(0, 1)

The critic d has no sigmoid: with slopes of one, its mean difference between real and fake rows estimates the Wasserstein
distance W₁. Five updates of the critic to one of the generator, and Adam without momentum, are Algorithm 1's. `clip` is the
first paper's way: weights in [−c, c] in the place of the penalty.
"""

from __future__ import annotations

import functools
import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import Program, Scale, Standardize
from probgen.pyro import Adversarial, GradientPenalty, WeightClip


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
    penalty: float = 10.0,
    clip: float | None = None,
    critic_steps: int = 5,
) -> Program:
    """A Wasserstein GAN of any array `x` of real or whole numbers.

    Parameters
    ----------
    z_dim
        Dimensions of the latent; 2 for vectors of two numbers, 32 for others, unless it is named.
    hidden
        Units of a layer, of both networks.
    layers
        Hidden layers of both networks.
    penalty
        λ; the paper's toys have 0.1.
    clip
        c: the critic's weights are kept in [−c, c], and there is no penalty.
    critic_steps
        Updates of the critic to one of the generator.
    """
    shape, whole, (low, high) = spec["x"].shape, spec["x"].dtype[:1] in "ui", spec["x"].range
    size = torch.Size(shape).numel()
    z_dim = z_dim or (2 if size == 2 else 32)
    generator = dense([z_dim, *[hidden] * layers, size])
    if whole:
        generator.append(nn.Tanh())  # pixels lie in [−1, 1]
    critic = nn.Sequential(nn.Flatten(), *dense([size, *[hidden] * layers, 1], slope=0.2))

    def model(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z).reshape(-1, *shape), event_dim=len(shape)), obs=x)

    return Program(
        model,
        by=Adversarial(
            critic,
            objective="wasserstein",
            penalties=[GradientPenalty(penalty) if clip is None else WeightClip(clip)],
            critic_steps=critic_steps,
        ),
        prepare={"x": Scale((low + high) / 2, high) if whole else Standardize()},
        defaults={
            "epochs": 200,
            "batch_size": 64,
            "lr": 1e-4 if clip is None else 5e-5,
            "optimizer": functools.partial(torch.optim.Adam, betas=(0.0, 0.9)) if clip is None else "rmsprop",
        },
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("ring")
    print(probgen.fit(program(data.spec), data).sample(8)["x"])
