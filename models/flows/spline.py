"""Neural spline flow (Durkan et al., arXiv:1906.04032), through Zuko.

    z = f(x) ~ N(0, I)                    log p(x) = log N(f(x) | 0, I) + log |det ∂f/∂x|
    f = f_K ∘ … ∘ f_1                     f_k: z_d = spline(x_d; θ_d(x_<d)),  log |det| = Σ_d log spline′(x_d)

A spline is monotone, made of `bins` rational quadratics on [−5, 5], and the identity outside. θ_d is a masked network's
output, of the x before it in an order that alternates from layer to layer, and a draw takes D passes of each network.
With coupling=True a layer moves one half of the dimensions by splines that the other half tells, in turn, and a draw is
one pass. x: [D], other shapes as one vector. The loss is −log p(x), one pass.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen import Dequantize, Flatten, Logit, Program, Scale, Standardize
from probgen.pyro import ELBO
from probgen.pyro.distributions import Flow, Zuko, zuko_flows
from probgen.pyro.nn import DenseConditioner
from probgen.pyro.transforms import Compose, SplineCoupling


def couplings(size: int, transforms: int, bins: int, hidden: int, layers: int) -> Compose:
    """Splines of one half of [size] and of the other, in turn."""
    parts = []
    for k in range(transforms):
        kept, changed = SplineCoupling.sizes(size, flip=k % 2 == 1)
        network = DenseConditioner(kept, changed * (3 * bins - 1), hidden, layers)
        parts.append(SplineCoupling(network, (size,), flip=k % 2 == 1))
    return Compose(*parts)


def program(
    spec, transforms: int = 3, bins: int = 8, hidden: int = 64, layers: int = 2, coupling: bool = False
) -> Program:
    """A neural spline flow for an array `x` of real or whole numbers.

    Parameters
    ----------
    transforms
        K, how many layers of splines.
    bins
        Pieces of a spline.
    hidden
        Units of a hidden layer of the networks.
    layers
        Hidden layers.
    coupling
        Whether one half of the dimensions tells the other's splines, instead of each dimension those after it.
    """
    size = math.prod(spec["x"].shape)
    if coupling:
        flow = couplings(size, transforms, bins, hidden, layers)
    else:
        flow = zuko_flows().NSF(size, transforms=transforms, bins=bins, hidden_features=(hidden,) * layers)
    prepare = (Dequantize(), Scale(), Logit(0.05)) if spec["x"].dtype[:1] in "ui" else ()

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(size), 1.0).to_event(1)
            pyro.sample("x", Flow(flow, base) if coupling else Zuko(flow), obs=x)

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
