"""Generative adversarial network (Goodfellow et al., arXiv:1406.2661), in NumPyro.

    z ~ N(0, I)                          z: [z_dim]
    x = G(z)                             a point mass; with `noise` s, x | z ~ N(G(z), s²)
    min_G max_D  E log D(x) + E log(1 − D(G(z)))       or any other objective of `Adversarial`

G and D are dense networks. The program draws x and says nothing of how likely it is: its likelihood is not defined, unless
there is noise, with which an ELBO can train the very same program. The twin of `gan.py`: the same layers at the same places.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from flax import linen as nn
from numpyro.contrib.module import flax_module

from probgen import Program, Scale, Standardize
from probgen.numpyro import R1, Adversarial


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
    size = math.prod(shape)
    z_dim = z_dim or (2 if size == 2 else 32)
    pixels = [nn.tanh] if whole else []  # which lie in [−1, 1]
    generator = nn.Sequential([*dense([z_dim, *[hidden] * layers, size]), *pixels])
    critic = nn.Sequential([flatten, *dense([pac * size, *[hidden] * layers, 1], slope=0.2)])

    def model(x: jax.Array) -> None:
        generate = flax_module("generator", generator, input_shape=(1, z_dim))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(z_dim), 1.0).to_event(1))
            mean = generate(z).reshape(-1, *shape)
            x_given_z = (
                dist.Normal(mean, noise).to_event(len(shape)) if noise else dist.Delta(mean, event_dim=len(shape))
            )
            numpyro.sample("x", x_given_z, obs=x)

    return Program(
        model,
        by=Adversarial(critic, objective=objective, penalties=[R1(r1)] if r1 else [], pac=pac),
        prepare={"x": Scale((low + high) / 2, high) if whole else Standardize()},
        defaults={
            "epochs": 200,
            "batch_size": 128,
            "lr": 1e-3,
            "ema": 0.995,
            "optimizer": functools.partial(optax.adam, b1=0.0, b2=0.99),
        },
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("ring")
    print(probgen.fit(program(data.spec), data).sample(8)["x"])
