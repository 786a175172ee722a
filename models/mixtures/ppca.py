"""Probabilistic PCA (Tipping & Bishop, J. R. Statist. Soc. B 61, 1999) and factor analysis.

    z ~ N(0, I)                          z: [z_dim]
    x | z ~ N(W z + μ, Ψ)                Ψ = σ² I (PPCA), or diag σ_d² (factor analysis)
    q(z | x) = p(z | x) = N(G Wᵀ Ψ⁻¹ (x − μ), G),   G = (I + Wᵀ Ψ⁻¹ W)⁻¹

The guide is the exact posterior, made of the model's own parameters, so that log p(x, z) − log q(z | x) is
log p(x) = log N(x | μ, W Wᵀ + Ψ) whatever z was drawn: the loss is −log p(x), without Monte Carlo error.
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from probgen import Dequantize, Flatten, ProbgenError, Program, Standardize
from probgen.pyro import ELBO


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
        raise ProbgenError(f"ppca: z_dim={z_dim} leaves no latent; ask for at least 1")
    D = math.prod(spec["x"].shape)

    whole = (Dequantize(),) if "int" in spec["x"].dtype else ()  # whole numbers have no density

    def parameters() -> tuple[Tensor, Tensor, Tensor]:
        """W [D, z_dim], μ [D] and σ, [1] or [D]."""
        W = pyro.param("loadings", lambda: 0.1 * torch.randn(D, z_dim))
        mu = pyro.param("mean", torch.zeros(D))
        sd = torch.ones(1 if noise == "isotropic" else D)
        return W, mu, pyro.param("scale", sd, constraint=constraints.positive)

    def model(x: Tensor) -> None:
        W, mu, sd = parameters()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.mT + mu, sd).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        W, mu, sd = parameters()
        scaled = (W.mT / sd**2).mT  # Ψ⁻¹ W
        precision = torch.eye(z_dim) + W.mT @ scaled  # G⁻¹
        with pyro.plate("data", len(x)):
            mean = torch.linalg.solve(precision, (x - mu) @ scaled, left=False)
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))

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
