"""Variational autoencoder (Kingma & Welling, arXiv:1312.6114; Rezende et al., arXiv:1401.4082), in NumPyro.

    z ~ N(0, I)                          z: [z_dim]
    x | z ~ Bernoulli(σ(f_θ(z)))         or  N(f_θ(z), s²), one learned s for all of x
    q(z | x) = N(μ_φ(x), diag σ_φ²(x))
    loss = −ELBO = KL(q(z | x) ‖ p(z)) − E_q[log p(x | z)]

f_θ and (μ_φ, log σ_φ) are a dense network with one hidden layer, or a small convolutional one. The twin of `vae.py`:
the same layers at the same places.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints

from probgen import Binarize, Program, Standardize
from probgen.numpyro import ELBO


def dense(size: int, z_dim: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """x [B, *shape] → (μ, log σ) [B, 2 z_dim], and z [B, z_dim] → the parameters of x [B, size]."""
    encoder = nn.Sequential([flatten, nn.Dense(hidden), nn.relu, nn.Dense(2 * z_dim)])
    decoder = nn.Sequential([nn.Dense(hidden), nn.relu, nn.Dense(size)])
    return encoder, decoder


def convolutional(shape: tuple[int, ...], z_dim: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """The same for images [H, W] or [H, W, C] whose sides are multiples of four."""
    height, width, channels = (*shape, 1)[:3]
    wide, inner = hidden // 8, (hidden // 4, height // 4, width // 4)
    encoder = nn.Sequential(
        [
            lambda x: x.reshape(-1, height, width, channels),
            nn.Conv(wide, (4, 4), strides=2, padding=1),
            nn.relu,
            nn.Conv(inner[0], (4, 4), strides=2, padding=1),
            nn.relu,
            lambda h: flatten(jnp.moveaxis(h, -1, 1)),
            nn.Dense(2 * z_dim),
        ]
    )
    decoder = nn.Sequential(
        [
            nn.Dense(math.prod(inner)),
            nn.relu,
            lambda h: jnp.moveaxis(h.reshape(-1, *inner), 1, -1),
            nn.ConvTranspose(wide, (4, 4), strides=(2, 2)),
            nn.relu,
            nn.ConvTranspose(channels, (4, 4), strides=(2, 2)),
            flatten,
        ]
    )
    return encoder, decoder


def flatten(x: jax.Array) -> jax.Array:
    """x [B, ...] → [B, D]."""
    return x.reshape(len(x), -1)


def program(
    spec,
    z_dim: int = 16,
    hidden: int = 256,
    likelihood: Literal["bernoulli", "gaussian"] | None = None,
    network: Literal["dense", "conv"] = "dense",
) -> Program:
    """A VAE for any array `x`; the likelihood follows the data unless it is named.

    Parameters
    ----------
    z_dim
        Dimensions of the latent code.
    hidden
        Width of the hidden layer (dense) or of the code before the latent (conv).
    likelihood
        "bernoulli" for pixels and bits, "gaussian" for real numbers.
    network
        "dense", or "conv" for images whose sides are multiples of four.
    """
    shape, low = spec["x"].shape, spec["x"].range[0]
    likelihood = likelihood or ("bernoulli" if low >= 0 else "gaussian")
    size = math.prod(shape)
    encoder, decoder = dense(size, z_dim, hidden) if network == "dense" else convolutional(shape, z_dim, hidden)

    def model(x: jax.Array) -> None:
        decode = flax_module("decoder", decoder, input_shape=(1, z_dim))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(z_dim), 1.0).to_event(1))
            theta = decode(z).reshape(-1, *shape)
            if likelihood == "bernoulli":
                x_given_z = dist.Bernoulli(logits=theta)
            else:
                x_given_z = dist.Normal(theta, numpyro.param("scale", 0.5, constraint=constraints.positive))
            numpyro.sample("x", x_given_z.to_event(len(shape)), obs=x)

    def guide(x: jax.Array) -> None:
        encode = flax_module("encoder", encoder, input_shape=(1, *shape))
        with numpyro.plate("data", len(x)):
            mean, log_scale = jnp.split(encode(x), 2, axis=-1)
            numpyro.sample("z", dist.Normal(mean, jnp.exp(log_scale)).to_event(1))

    return Program(
        model,
        guide,
        by=ELBO(),
        prepare={"x": Binarize() if likelihood == "bernoulli" else Standardize()},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-3},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec, z_dim=2), data).evaluate(data.test))
