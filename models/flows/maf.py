"""Masked autoregressive flow (Papamakarios, Pavlakou & Murray, MAF, arXiv:1705.07057), through Zuko.

    z = f(x) ~ N(0, I)                    log p(x) = log N(f(x) | 0, I) + log |det ∂f/∂x|
    f = f_K ∘ … ∘ f_1                     f_k: z_d = x_d exp(s_d(x_<d)) + t_d(x_<d),  log |det| = Σ_d s_d

s and t are a masked network's outputs (MADE), in an order of the dimensions that alternates from layer to layer; the
paper writes μ = −t exp(−s) and α = −s. One layer is a Gaussian autoregressive model, whose noise the next layer models in turn. A density is one pass of every
network, a draw D passes. x: [D], other shapes as one vector. The loss is −log p(x).
"""

from __future__ import annotations

import math

import pyro
from torch import Tensor

from probgen import Dequantize, Flatten, Logit, Program, Scale, Standardize
from probgen.pyro import ELBO
from probgen.pyro.distributions import Zuko, zuko_flows


def program(spec, transforms: int = 5, hidden: int = 64, layers: int = 2) -> Program:
    """A masked autoregressive flow for an array `x` of real or whole numbers.

    Parameters
    ----------
    transforms
        K, how many autoregressive layers.
    hidden
        Units of a hidden layer of the networks.
    layers
        Hidden layers.
    """
    size = math.prod(spec["x"].shape)
    flow = zuko_flows().MAF(size, transforms=transforms, hidden_features=(hidden,) * layers)
    prepare = (Dequantize(), Scale(), Logit(0.05)) if spec["x"].dtype[:1] in "ui" else ()

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Zuko(flow), obs=x)

    return Program(
        model,
        by=ELBO(),
        prepare={"x": (*prepare, Standardize(), Flatten())},
        defaults={"epochs": 50, "batch_size": 128, "lr": 1e-3, "clip": 50.0},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
