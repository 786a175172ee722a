"""Masked autoencoder for distribution estimation (Germain et al., MADE, arXiv:1502.03509), with direct connections.

    p(x) = ∏_d p(x_d | x_<d)                    x: [*shape] with D entries, in a given order
    h_l = ReLU((W_l ⊙ M_l) h_{l−1} + b_l)       h_0 = x; the masks M let a unit of degree m read x_1..x_m alone
    θ = (V ⊙ M) h_L + (A ⊙ T) x + c             θ_d: the parameters of p(x_d | x_<d)
    x_d | x_<d ~ Bernoulli(σ(θ_d))              or  Categorical(softmax θ_d) over the levels of a pixel,
                                                or  N(θ_d1, softplus(θ_d2)²)

There is no latent: the loss is −log p(x), one pass of the network. An image [H, W, 3] is drawn pixel by pixel as
p(R | ·) p(G | R, ·) p(B | R, G, ·), or plane by plane with order="planes".
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
from torch import Tensor
from torch.nn.functional import softplus

from probgen import Binarize, ProbgenError, Program, Standardize
from probgen.causal import drawing_order
from probgen.pyro import ELBO
from probgen.pyro.distributions import Autoregressive
from probgen.pyro.nn import MADE


def bernoulli(theta: Tensor) -> dist.Distribution:
    """θ [*, 1] → a bit."""
    return dist.Bernoulli(logits=theta[..., 0])


def categorical(theta: Tensor) -> dist.Distribution:
    """θ [*, levels] → a level."""
    return dist.Categorical(logits=theta)


def gaussian(theta: Tensor) -> dist.Distribution:
    """θ [*, 2] → a real number; its scale is at least 0.001."""
    return dist.Normal(theta[..., 0], softplus(theta[..., 1]) + 1e-3)


def program(
    spec,
    hidden: int = 500,
    layers: int = 1,
    order: Literal["raster", "planes", "random"] = "raster",
    likelihood: Literal["bernoulli", "categorical", "gaussian"] | None = None,
) -> Program:
    """A MADE over the entries of `x`; the likelihood follows the data unless it is named.

    Parameters
    ----------
    hidden
        Units of a hidden layer.
    layers
        Hidden layers.
    order
        "raster" (row by row; R, G, B within a pixel), "planes" (all of R, of G, of B), or one "random" permutation.
    likelihood
        "bernoulli" for bits, "categorical" for the levels of whole numbers as they are, "gaussian" for real numbers.
    """
    shape, (low, high) = spec["x"].shape, spec["x"].range
    likelihood = likelihood or ("bernoulli" if low >= 0 else "gaussian")
    if likelihood == "categorical" and (low < 0 or spec["x"].dtype[:1] not in "ui"):
        raise ProbgenError("made: likelihood='categorical' needs whole numbers from 0 up; 'gaussian' takes any")
    levels = {"bernoulli": None, "categorical": max(int(high) + 1, 2), "gaussian": None}[likelihood]
    conditional = {"bernoulli": bernoulli, "categorical": categorical, "gaussian": gaussian}[likelihood]
    parameters = {"bernoulli": 1, "categorical": levels, "gaussian": 2}[likelihood]
    network = MADE(math.prod(shape), parameters, hidden=(hidden,) * layers, levels=levels)
    positions = drawing_order(shape, order)

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Autoregressive(network, conditional, shape, order=positions), obs=x)

    return Program(
        model,
        by=ELBO(),
        prepare={"bernoulli": {"x": Binarize()}, "categorical": {}, "gaussian": {"x": Standardize()}}[likelihood],
        defaults={"epochs": 100, "batch_size": 100, "lr": 1e-3},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
