"""Wasserstein GAN (Arjovsky et al., arXiv:1701.07875) with gradient penalty (Gulrajani et al., arXiv:1704.00028), in NumPyro.

    z ~ N(0, I)                          z: [z_dim]
    x = G(z)
    min_G max_d  E d(x) − E d(G(z)) − λ E (‖∇d(x̂)‖ − 1)²,     x̂ = ε x + (1 − ε) G(z),  ε ~ U(0, 1)

The critic d has no sigmoid: with slopes of one, its mean difference between real and fake rows estimates the Wasserstein
distance W₁. Five updates of the critic to one of the generator, and Adam without momentum, are Algorithm 1's. `clip` is the
first paper's way: weights in [−c, c] in the place of the penalty. The twin of `wgan_gp.py`: the same layers at the same places.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from flax import linen as nn
from numpyro.contrib.module import flax_module

from probgen import Program, Scale, Standardize
from probgen.numpyro import Adversarial, GradientPenalty, WeightClip


def dense(sizes: list[int], slope: float = 0.0) -> list:
    """[B, sizes[0]] → [B, sizes[-1]]: linear layers with (leaky) rectifiers between them."""
    rectifier = functools.partial(nn.leaky_relu, negative_slope=slope)
    return [part for size in sizes[1:] for part in (nn.Dense(size), rectifier)][:-1]


def flatten(x: jax.Array) -> jax.Array:
    """x [B, ...] → [B, D]."""
    return x.reshape(len(x), -1)


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
    size = math.prod(shape)
    z_dim = z_dim or (2 if size == 2 else 32)
    pixels = [nn.tanh] if whole else []  # which lie in [−1, 1]
    generator = nn.Sequential([*dense([z_dim, *[hidden] * layers, size]), *pixels])
    critic = nn.Sequential([flatten, *dense([size, *[hidden] * layers, 1], slope=0.2)])

    def model(x: jax.Array) -> None:
        generate = flax_module("generator", generator, input_shape=(1, z_dim))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(z_dim), 1.0).to_event(1))
            numpyro.sample("x", dist.Delta(generate(z).reshape(-1, *shape), event_dim=len(shape)), obs=x)

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
            "optimizer": functools.partial(optax.adam, b1=0.0, b2=0.9) if clip is None else "rmsprop",
        },
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("ring")
    print(probgen.fit(program(data.spec), data).sample(8)["x"])
