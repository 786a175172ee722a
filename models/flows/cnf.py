"""Continuous normalizing flow (Chen et al., Neural ODE, arXiv:1806.07366; Grathwohl et al., FFJORD, arXiv:1810.01367).

    dx/dt = v(x, t),   x(0) = x: data,   x(1) = z ~ N(0, I)
    log p(x) = log N(z | 0, I) + ∫₀¹ tr ∂v/∂x dt

v is a dense network of x and t. The integral is taken along with x(t) by the classical Runge–Kutta method, or by an
adaptive one; the trace is exact for few dimensions, and else Hutchinson's estimate, with which a log density is one
unbiased draw. x: [D], other shapes as one vector. The loss is −log p(x), differentiated through the solver.
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import Dequantize, Flatten, Logit, Program, Scale, Standardize
from probgen.pyro import ELBO
from probgen.pyro.distributions import Flow
from probgen.pyro.transforms import ContinuousFlow


class Velocity(nn.Module):
    """v(x, t): x [*, D] and t [] → [*, D]."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size + 1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, size)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))


def program(
    spec,
    hidden: int = 32,
    steps: int = 6,
    trace: Literal["exact", "hutchinson"] | None = None,
    method: Literal["rk4", "dopri5"] = "rk4",
) -> Program:
    """A continuous flow for an array `x` of real or whole numbers.

    Parameters
    ----------
    hidden
        Units of the two hidden layers of v.
    steps
        Of the Runge–Kutta method.
    trace
        "exact" or "hutchinson"; exact for up to 4 dimensions unless it is named.
    method
        "rk4" in equal steps, which can be compiled, or "dopri5" in steps of its own choice (torchdiffeq).
    """
    size = math.prod(spec["x"].shape)
    trace = trace or ("exact" if size <= 4 else "hutchinson")
    flow = ContinuousFlow(Velocity(size, hidden), size, steps=steps, trace=trace, method=method)
    prepare = (Dequantize(), Scale(), Logit(0.05)) if spec["x"].dtype[:1] in "ui" else ()

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(size), 1.0).to_event(1)
            pyro.sample("x", Flow(flow, base), obs=x)

    return Program(
        model,
        by=ELBO(),
        prepare={"x": (*prepare, Standardize(), Flatten())},
        defaults={"epochs": 50, "batch_size": 128, "lr": 2e-3, "clip": 50.0},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
