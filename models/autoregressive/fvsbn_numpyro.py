"""Fully visible sigmoid belief network (Neal, 1992; Frey, 1998; Gan et al., AISTATS 2015): logistic regressions.

    p(x) = p(x_1) ∏_{d=2..D} p(x_d | x_<d)          x: [*shape] with D entries, in a given order
    x_1 ~ Bernoulli(σ(c_1)),   x_d | x_<d ~ Bernoulli(σ(c_d + Σ_{j<d} A_dj x_j))
    or, for real numbers, linear regressions:   x_d | x_<d ~ N(μ_d, s_d²), μ_d and softplus⁻¹(s_d) linear in x_<d

There is no latent: the loss is −log p(x), one product with a strictly lower-triangular A. An image [H, W, 3] is drawn
pixel by pixel as p(R | ·) p(G | R, ·) p(B | R, G, ·), or plane by plane with order="planes".
The twin of `fvsbn.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import numpyro
import numpyro.distributions as dist
from jax.nn import softplus
from numpyro.contrib.module import flax_module

from probgen import Binarize, Program, Standardize
from probgen.causal import drawing_order
from probgen.numpyro import ELBO
from probgen.numpyro.distributions import Autoregressive
from probgen.numpyro.nn import MADE


def bernoulli(theta: jax.Array) -> dist.Distribution:
    """θ [*, 1] → a bit."""
    return dist.Bernoulli(logits=theta[..., 0])


def gaussian(theta: jax.Array) -> dist.Distribution:
    """θ [*, 2] → a real number; its scale is at least 0.001."""
    return dist.Normal(theta[..., 0], softplus(theta[..., 1]) + 1e-3)


def program(
    spec,
    order: Literal["raster", "planes", "random"] = "raster",
    likelihood: Literal["bernoulli", "gaussian"] | None = None,
) -> Program:
    """Regressions of every entry of `x` on those before it; the likelihood follows the data unless it is named.

    Parameters
    ----------
    order
        "raster" (row by row; R, G, B within a pixel), "planes" (all of R, of G, of B), or one "random" permutation.
    likelihood
        "bernoulli" for pixels and bits, "gaussian" for real numbers.
    """
    shape, low = spec["x"].shape, spec["x"].range[0]
    likelihood = likelihood or ("bernoulli" if low >= 0 else "gaussian")
    conditional, parameters = (bernoulli, 1) if likelihood == "bernoulli" else (gaussian, 2)
    size = math.prod(shape)
    network = MADE(size, parameters)  # no hidden layer: every output is a regression
    positions = drawing_order(shape, order)

    def model(x: jax.Array) -> None:
        theta = flax_module("network", network, input_shape=(1, size))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", Autoregressive(theta, conditional, shape, order=positions), obs=x)

    return Program(
        model,
        by=ELBO(),
        prepare={"x": Binarize() if likelihood == "bernoulli" else Standardize()},
        defaults={"epochs": 100, "batch_size": 100, "lr": 1e-3},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
