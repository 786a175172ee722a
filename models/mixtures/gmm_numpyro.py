"""Mixture of Gaussians (Bishop, Pattern Recognition and Machine Learning, 2006, chapters 9 and 10.2), in NumPyro.

    z ~ Categorical(π)                   z: one of K components, summed out:  p(x) = Σ_k π_k N(x | μ_k, Σ_k)
    x | z ~ N(μ_z, Σ_z)                  Σ_k: full, tied (one for all k), diagonal or spherical

`bayesian=True` puts the conjugate priors on π, μ and Σ, for x of unit scale (it is standardized), and q has their form,
q(π, μ, Λ) = q(π) Π_k q(Λ_k) q(μ_k | Λ_k):

    π ~ Dirichlet(α_0)
    Λ_k = P_k P_kᵀ ~ Wishart(ν_0, Ψ_0⁻¹),  Σ_k = Λ_k⁻¹                                   full, tied
    τ_kd ~ Gamma(a_0, b_0),  Σ_k = diag 1/τ_k                                            diagonal; spherical: one τ_k
    μ_k | Λ_k ~ N(0, (β_0 Λ_k)⁻¹)

ν_0 = D + 2 and a_0 = 3/2 are the least that give E[Σ_k] = Ψ_0 = SPREAD I a value, and agree where D = 1.

Learned by EM, in closed form; with priors by the ELBO, by EM (coordinate ascent, in closed form too) or by NUTS.

The twin of `gmm.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import constraints

from probgen import Dequantize, Flatten, ProbgenError, Program, Standardize
from probgen.numpyro import ELBO, EM
from probgen.numpyro.distributions import WishartCholesky

ALPHA_0, BETA_0, SPREAD = 1.0, 0.1, 0.5
A_0, B_0 = 1.5, SPREAD / 2
START = 20.0  # the guide starts as if each component had seen so many data


def gaussian(mu: jax.Array, scale: jax.Array, matrix: bool) -> dist.Distribution:
    """N(μ, Σ); `scale` is a lower Cholesky factor of Σ, or standard deviations."""
    return dist.MultivariateNormal(mu, scale_tril=scale) if matrix else dist.Normal(mu, scale).to_event(1)


def covariance_tril(P: jax.Array) -> jax.Array:
    """L with L Lᵀ = (P Pᵀ)⁻¹, both lower triangular: P⁻¹ = Q R gives R = ± Lᵀ, without squaring P's condition."""
    R = jnp.linalg.qr(solve_triangular(P, jnp.broadcast_to(jnp.eye(P.shape[-1]), P.shape), lower=True))[1]
    return (R * jnp.sign(jnp.diagonal(R, axis1=-2, axis2=-1))[..., None]).mT


def program(
    spec,
    components: int = 4,
    covariance: Literal["full", "tied", "diagonal", "spherical"] = "full",
    bayesian: bool = False,
) -> Program:
    """A mixture of Gaussians on the rows of `x` as standardized vectors.

    Parameters
    ----------
    components
        How many Gaussians, K.
    covariance
        "full", "tied" (one full matrix for all components), "diagonal" or "spherical".
    bayesian
        Conjugate priors on weights, locations and precisions, and a guide of the same form.
    """
    if components < 1:
        raise ProbgenError(f"gmm_numpyro: components={components} leaves no Gaussian; ask for at least 1")
    K, D, matrix = components, math.prod(spec["x"].shape), covariance in ("full", "tied")
    own = {"full": (K, D, D), "tied": (D, D), "diagonal": (K, D), "spherical": (K,)}[covariance]
    count = () if covariance == "tied" else (K,)  # how many Σ there are
    eye = jnp.broadcast_to(jnp.eye(D), own) if matrix else jnp.ones(own)

    whole = (Dequantize(),) if "int" in spec["x"].dtype else ()  # whole numbers have no density

    def parameters() -> tuple[jax.Array, jax.Array, jax.Array]:
        """π [K], μ [K, D] and the scale: L_k [K, D, D], L [D, D], or sd [K, D] or [K, 1]."""
        pi = numpyro.param("weights", jnp.full(K, 1 / K), constraint=constraints.simplex)
        mu = numpyro.param("locations", lambda key: jax.random.normal(key, (K, D)))
        if matrix:
            return pi, mu, numpyro.param("scale_tril", eye, constraint=constraints.lower_cholesky)
        return pi, mu, numpyro.param("scales", eye, constraint=constraints.positive).reshape(K, -1)

    def prior() -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same, drawn."""
        pi = numpyro.sample("weights", dist.Dirichlet(jnp.full(K, ALPHA_0)))
        if matrix:
            Lambda = WishartCholesky(jnp.full(count, D + 2.0), scale_tril=eye / math.sqrt(SPREAD))
            scale = covariance_tril(numpyro.sample("precision_tril", Lambda.to_event(len(count))))
        else:
            tau = numpyro.sample("precisions", dist.Gamma(jnp.full(own, A_0), B_0).to_event(len(own)))
            scale = (tau**-0.5).reshape(K, -1)
        return pi, numpyro.sample("locations", around(jnp.zeros((K, D)), jnp.full(K, BETA_0), scale)), scale

    def around(mean: jax.Array, beta: jax.Array, scale: jax.Array) -> dist.Distribution:
        """μ_k ~ N(m_k, Σ_k / β_k) for all k."""
        shrunk = scale / jnp.sqrt(beta).reshape(K, *[1] * (2 if matrix else 1))
        return gaussian(mean, shrunk, matrix).to_event(1)

    def model(x: jax.Array) -> None:
        pi, mu, scale = prior() if bayesian else parameters()
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Categorical(pi), infer={"enumerate": "parallel"})
            numpyro.sample("x", gaussian(mu[z], scale if covariance == "tied" else scale[z], matrix), obs=x)

    def guide(x: jax.Array) -> None:
        positive = constraints.positive
        alpha = numpyro.param("weights_concentration", jnp.full(K, ALPHA_0 + START), constraint=positive)
        mean = numpyro.param("locations_mean", lambda key: jax.random.normal(key, (K, D)))
        beta = numpyro.param("locations_count", jnp.full(K, BETA_0 + START), constraint=positive)
        numpyro.sample("weights", dist.Dirichlet(alpha))
        if matrix:
            above = constraints.greater_than(D - 1)
            freedom = numpyro.param("precision_freedom", jnp.full(count, D + 2 + START), constraint=above)
            T = numpyro.param("precision_mean_tril", eye, constraint=constraints.lower_cholesky)  # E[Λ] = T Tᵀ
            Lambda = WishartCholesky(freedom, scale_tril=T / jnp.sqrt(freedom)[..., None, None]).to_event(len(count))
            scale = covariance_tril(numpyro.sample("precision_tril", Lambda))
        else:
            a = numpyro.param("precisions_shape", jnp.full(own, A_0 + START), constraint=positive)
            b = numpyro.param("precisions_rate", jnp.full(own, A_0 + START), constraint=positive)
            tau = numpyro.sample("precisions", dist.Gamma(a, b).to_event(len(own)))
            scale = (tau**-0.5).reshape(K, -1)
        numpyro.sample("locations", around(mean, beta, scale))

    return Program(
        model,
        guide if bayesian else None,
        by=ELBO() if bayesian else EM(),
        prepare={"x": (Flatten(), *whole, Standardize())},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-2},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec, components=10), data).evaluate(data.test))
