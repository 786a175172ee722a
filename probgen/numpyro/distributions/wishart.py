"""The Cholesky factor of a Wishart matrix, with draws that are known to be differentiable."""

from __future__ import annotations

import numpyro.distributions as dist


class WishartCholesky(dist.WishartCholesky):
    """P with P Pᵀ ~ Wishart(ν, V): NumPyro's own, whose draws are reparametrised in ν too.

    Its Bartlett draws χ² by `jax.random.gamma`, whose gradient JAX knows (implicit reparametrisation, Figurnov et al.,
    arXiv:1805.08498); NumPyro declares the gradients of the scale alone and so leaves the draw to score functions.
    """

    reparametrized_params = ["concentration", *dist.WishartCholesky.reparametrized_params]  # noqa: RUF012
