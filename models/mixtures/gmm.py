"""Mixture of Gaussians (Bishop, Pattern Recognition and Machine Learning, 2006, chapter 9), learned by EM or ELBO.

z ~ Categorical(π)                   z: one of K components, summed out:  p(x) = Σ_k π_k N(x | μ_k, Σ_k)
x | z ~ N(μ_z, Σ_z)                  Σ_k = L_k L_kᵀ: full, tied (one for all k), diagonal or spherical
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from probgen import Flatten, ProbgenError, Program, Standardize
from probgen.pyro import ELBO


def gaussian(covariance: str, mu: Tensor, scale: Tensor, z: Tensor) -> dist.Distribution:
    """N(μ_z, Σ_z); `scale` is L_k [K, D, D], L [D, D], or the standard deviations [K, D] or [K]."""
    if covariance == "full":
        return dist.MultivariateNormal(mu[z], scale_tril=scale[z])
    if covariance == "tied":
        return dist.MultivariateNormal(mu[z], scale_tril=scale)
    sd = scale[z] if covariance == "diagonal" else scale[z].unsqueeze(-1)
    return dist.Normal(mu[z], sd).to_event(1)


def program(
    spec,
    components: int = 4,
    covariance: Literal["full", "tied", "diagonal", "spherical"] = "full",
) -> Program:
    """A mixture of Gaussians on the rows of `x` as standardized vectors.

    Parameters
    ----------
    components
        How many Gaussians, K.
    covariance
        "full", "tied" (one full matrix for all components), "diagonal" or "spherical".
    """
    if components < 1:
        raise ProbgenError(f"gmm: components={components} leaves no Gaussian; ask for at least 1")
    K, D = components, math.prod(spec["x"].shape)

    def model(x: Tensor) -> None:
        pi = pyro.param("weights", torch.full((K,), 1 / K), constraint=constraints.simplex)
        mu = pyro.param("locations", lambda: torch.randn(K, D))
        if covariance in ("full", "tied"):
            eye = torch.eye(D).expand(K, D, D) if covariance == "full" else torch.eye(D)
            scale = pyro.param("scale_tril", eye.clone(), constraint=constraints.lower_cholesky)
        else:
            ones = torch.ones((K, D) if covariance == "diagonal" else (K,))
            scale = pyro.param("scales", ones, constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(pi), infer={"enumerate": "parallel"})
            pyro.sample("x", gaussian(covariance, mu, scale, z), obs=x)

    return Program(
        model,
        by=ELBO(),
        prepare={"x": (Flatten(), Standardize())},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-2},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec, components=10), data).evaluate(data.test))
