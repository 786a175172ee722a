"""Probabilistic PCA (Tipping & Bishop, J. R. Statist. Soc. B 61, 1999) and factor analysis, in NumPyro.

    z ~ N(0, I)                          z: [z_dim]
    x | z ~ N(W z + μ, Ψ)                Ψ = σ² I (PPCA), or diag σ_d² (factor analysis)
    q(z | x) = p(z | x) = N(G Wᵀ Ψ⁻¹ (x − μ), G),   G = (I + Wᵀ Ψ⁻¹ W)⁻¹

The guide is the exact posterior, made of the model's own parameters, so that log p(x, z) − log q(z | x) is
log p(x) = log N(x | μ, W Wᵀ + Ψ) whatever z was drawn: the loss is −log p(x), without Monte Carlo error.

The twin of `ppca.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from probgen import Dequantize, Flatten, ProbgenError, Program, Standardize
from probgen.numpyro import ELBO


def program(spec, z_dim: int = 2, noise: Literal["isotropic", "diagonal"] = "isotropic") -> Program:
    """A linear-Gaussian model of the rows of `x` as standardized vectors.

    Parameters
    ----------
    z_dim
        Dimensions of the latent.
    noise
        "isotropic" (probabilistic PCA) or "diagonal" (factor analysis: one variance for each element).
    """
    if z_dim < 1:
        raise ProbgenError(f"ppca_numpyro: z_dim={z_dim} leaves no latent; ask for at least 1")
    D = math.prod(spec["x"].shape)

    whole = (Dequantize(),) if "int" in spec["x"].dtype else ()  # whole numbers have no density

    def parameters() -> tuple[jax.Array, jax.Array, jax.Array]:
        """W [D, z_dim], μ [D] and σ, [1] or [D]."""
        W = numpyro.param("loadings", lambda key: 0.1 * jax.random.normal(key, (D, z_dim)))
        mu = numpyro.param("mean", jnp.zeros(D))
        sd = jnp.ones(1 if noise == "isotropic" else D)
        return W, mu, numpyro.param("scale", sd, constraint=constraints.positive)

    def model(x: jax.Array) -> None:
        W, mu, sd = parameters()
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(z_dim), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z @ W.mT + mu, sd).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        W, mu, sd = parameters()
        scaled = (W.mT / sd**2).mT  # Ψ⁻¹ W
        precision = jnp.eye(z_dim) + W.mT @ scaled  # G⁻¹
        with numpyro.plate("data", len(x)):
            mean = jnp.linalg.solve(precision, ((x - mu) @ scaled).mT).mT
            numpyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))

    return Program(
        model,
        guide,
        by=ELBO(kl="sampled"),
        prepare={"x": (Flatten(), *whole, Standardize())},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-2},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec, z_dim=10), data).evaluate(data.test))
