"""Markovian hierarchical VAE (Kingma et al., arXiv:1606.04934; Luo, Understanding diffusion models, arXiv:2208.11970).

    z_T ~ N(0, I)                                              z_t: [z_dim]
    z_{t−1} | z_t ~ N(μ_θ,t(z_t), diag σ²_θ,t(z_t))            t = T, ..., 2
    x | z_1 ~ Bernoulli(σ(f_θ(z_1)))                           or  N(f_θ(z_1), s²), one learned s for all of x
    q(z_1, ..., z_T | x) = q(z_1 | x) Π_{t≥2} q(z_t | z_{t−1}),   each N(μ_φ,t, diag σ²_φ,t) of what lies below it
    loss = −ELBO = E_q[−log p(x | z_1) + β Σ_t (log q(z_t | z_{t−1}) − log p(z_t | z_{t+1}))],   z_0 = x, β = 1

The guide runs against the model: the prior of z_t depends on z_{t+1}, drawn after it. A KL site by site would be wrong
there, so these terms are taken at the draw; that of z_T, whose prior depends on nothing, is in closed form. T = 1 is the
plain VAE. With warm-up β rises from 0 to 1, against upper layers that die early (Sønderby et al., arXiv:1602.02282).

Every network is dense with one hidden layer: of rectifiers at x, of tanh between latents, so that no log σ is driven off
by a latent drawn far away: chains of rectifiers, each of whose outputs is exponentiated, overflow. The twin of `hvae.py`:
the same layers at the same places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints

from probgen import Binarize, ProbgenError, Program, Standardize
from probgen.numpyro import ELBO
from probgen.schedules import Linear


def dense(hidden: int, outputs: int, activation: Callable[[jax.Array], jax.Array]) -> nn.Module:
    """[B, inputs] → [B, outputs], with one hidden layer."""
    return nn.Sequential([nn.Dense(hidden), activation, nn.Dense(outputs)])


def normal(parameters: jax.Array) -> dist.Distribution:
    """N(μ, diag σ²) of (μ, log σ) [B, 2 z_dim]."""
    mean, log_scale = jnp.split(parameters, 2, axis=-1)
    return dist.Normal(mean, jnp.exp(log_scale)).to_event(1)


def program(
    spec,
    z_dim: int = 16,
    hidden: int = 256,
    depth: int = 2,
    warmup: int = 0,
    likelihood: Literal["bernoulli", "gaussian"] | None = None,
) -> Program:
    """A chain of latents over any array `x`; the likelihood follows the data unless it is named.

    Parameters
    ----------
    z_dim
        Dimensions of each latent.
    hidden
        Width of the hidden layer of every network.
    depth
        T, how many latents stand above each other; 1 is the plain VAE.
    warmup
        Steps in which β, the weight of the latents' terms, rises from 0 to 1; 0 for none.
    likelihood
        "bernoulli" for pixels and bits, "gaussian" for real numbers.
    """
    if min(depth, z_dim) < 1:
        raise ProbgenError(
            f"hvae_numpyro: depth={depth} with z_dim={z_dim} leaves no latent; ask for at least 1 of each"
        )
    if warmup < 0:
        raise ProbgenError(f"hvae_numpyro: warmup={warmup} is no number of steps; ask for 0, which is none, or more")
    shape, low = spec["x"].shape, spec["x"].range[0]
    likelihood = likelihood or ("bernoulli" if low >= 0 else "gaussian")
    size, layers, inner = math.prod(shape), range(1, depth + 1), range(2, depth + 1)
    # encoder_t gives z_t from z_{t−1}, decoder_t z_{t−1} from z_t, where z_0 is x
    encoders = {1: dense(hidden, 2 * z_dim, nn.relu)} | {t: dense(hidden, 2 * z_dim, nn.tanh) for t in inner}
    decoders = {1: dense(hidden, size, nn.relu)} | {t: dense(hidden, 2 * z_dim, nn.tanh) for t in inner}

    def model(x: jax.Array) -> None:
        decode = {t: flax_module(f"decoder_{t}", decoders[t], input_shape=(1, z_dim)) for t in layers}
        with numpyro.plate("data", len(x)):
            z = numpyro.sample(f"z_{depth}", dist.Normal(jnp.zeros(z_dim), 1.0).to_event(1))
            for t in reversed(inner):
                z = numpyro.sample(f"z_{t - 1}", normal(decode[t](z)))
            theta = decode[1](z).reshape(-1, *shape)
            if likelihood == "bernoulli":
                x_given_z = dist.Bernoulli(logits=theta)
            else:
                x_given_z = dist.Normal(theta, numpyro.param("scale", 0.5, constraint=constraints.positive))
            numpyro.sample("x", x_given_z.to_event(len(shape)), obs=x)

    def guide(x: jax.Array) -> None:
        widths = {t: size if t == 1 else z_dim for t in layers}
        encode = {t: flax_module(f"encoder_{t}", encoders[t], input_shape=(1, widths[t])) for t in layers}
        with numpyro.plate("data", len(x)):
            z = x.reshape(len(x), -1)
            for t in layers:
                z = numpyro.sample(f"z_{t}", normal(encode[t](z)))

    return Program(
        model,
        guide,
        by=ELBO(beta=Linear(0, 1, warmup)) if warmup else ELBO(),
        prepare={"x": Binarize() if likelihood == "bernoulli" else Standardize()},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-3},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec, z_dim=8), data).evaluate(data.test))
