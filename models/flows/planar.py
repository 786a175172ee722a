"""Planar and radial flows (Rezende & Mohamed, Variational inference with normalizing flows, arXiv:1505.05770).

    z_0 ~ N(μ, diag σ²),   x = f_K ∘ … ∘ f_1(z_0)          log p(x) = log N(z_0 | μ, σ²) − Σ_k log |det ∂f_k|
    planar:  f(z) = z + û tanh(w·z + b)                     log |det| = log(1 + û·w tanh′(w·z + b))
    radial:  f(z) = z + β̂ (z − c) / (α + ‖z − c‖)           log |det| = (D − 1) log(1 + β̂ h) + log(1 + β̂ α h²)

û·w > −1 and β̂ > −α for all values of the parameters, so each f_k can be inverted: planar by Newton's method on one
number, radial by a square root. That is how the density of data is computed here, where the paper, which has f only
as a guide, needs no inverse. x: [D], other shapes as one vector. The loss is −log p(x).
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from probgen import Dequantize, Flatten, Logit, Program, Scale, Standardize
from probgen.pyro import ELBO
from probgen.pyro.distributions import Flow
from probgen.pyro.transforms import Compose, PlanarLayer, RadialLayer


def program(spec, flow_length: int = 16, kind: Literal["planar", "radial"] = "planar") -> Program:
    """K planar or radial flows of a normal distribution, for an array `x` of real or whole numbers.

    Parameters
    ----------
    flow_length
        K, how many of them.
    kind
        "planar" or "radial".
    """
    size = math.prod(spec["x"].shape)
    layer = {"planar": PlanarLayer, "radial": RadialLayer}[kind]
    flow = Compose(*[layer(size) for _ in range(flow_length)])
    prepare = (Dequantize(), Scale(), Logit(0.05)) if spec["x"].dtype[:1] in "ui" else ()

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        mean = pyro.param("mean", torch.zeros(size))
        scale = pyro.param("scale", torch.ones(size), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Flow(flow.inv, dist.Normal(mean, scale).to_event(1)), obs=x)

    return Program(
        model,
        by=ELBO(),
        prepare={"x": (*prepare, Standardize(), Flatten())},
        defaults={"epochs": 50, "batch_size": 128, "lr": 3e-3, "clip": 50.0},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
