"""Flow matching: a continuous flow learned without a solver (Lipman et al., arXiv:2210.02747; Liu et al., arXiv:2209.03003).

    dx/dt = u(x, t),   x(0) = x: data,   x(1) = z ~ N(0, I)
    log p(x) = log N(z | 0, I) + ∫₀¹ tr ∂u/∂x dt
    loss = E ‖u(x_t, t) − (z − x)‖²,   x_t = (1 − t) x + t z,   t ~ U(0, 1)

The program is that of cnf.py, a transformed distribution; only the way to learn it is another: by=ELBO() is maximum
likelihood, differentiated through the solver. z is paired with x at random, or by transport within the batch (coupling=
"ot"), or given (rectified flows). x: [D] or images; as for every flow, whole numbers are dequantised and scaled.
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import Dequantize, Flatten, Logit, Program, Scale, Standardize
from probgen.diffusion import RectifiedSchedule
from probgen.pyro import Denoiser, FlowMatching
from probgen.pyro.distributions import Flow
from probgen.pyro.nn import DenoisingMLP, UNet
from probgen.pyro.transforms import ContinuousFlow

FASTEST = 10.0  # frequency of the time that the network is told: eight steps of the solver follow it


class Velocity(nn.Module):
    """u(x, t) of vectors: x [*, D] and one t → [*, D]."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.shape = network, shape

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rows = x.reshape(-1, *self.shape)
        return self.network(rows, t.expand(len(rows))).reshape(x.shape)


def program(
    spec,
    hidden: int = 64,
    layers: int = 3,
    network: Literal["dense", "conv"] | None = None,
    coupling: Literal["independent", "ot", "given"] = "independent",
    steps: int = 8,
    trace: Literal["exact", "hutchinson"] | None = None,
    method: Literal["rk4", "dopri5"] = "rk4",
) -> Program:
    """A flow by flow matching, for an array `x` of real or whole numbers.

    Parameters
    ----------
    hidden
        Units of a layer, or channels at full size.
    layers
        Residual layers, or sizes of the image.
    network
        "dense", or "conv" for a U-Net; by the shape of the data unless it is named.
    coupling
        Of data and noise: "independent", "ot" within the batch, or "given" as the array `z`.
    steps
        Of the Runge–Kutta method, for densities and for draws.
    trace
        "exact" or "hutchinson"; exact for up to 4 dimensions unless it is named.
    method
        "rk4" in equal steps, or "dopri5" in steps of its own choice (torchdiffeq).
    """
    shape, size = spec["x"].shape, math.prod(spec["x"].shape)
    images = (network or ("conv" if len(shape) > 1 and min(shape[:2]) >= 16 else "dense")) == "conv"
    field = Velocity((UNet if images else DenoisingMLP)(shape, hidden, layers, fastest=FASTEST), shape)
    trace = trace or ("exact" if size <= 4 else "hutchinson")
    flow = ContinuousFlow(field, size, steps=steps, trace=trace, method=method)
    whole = spec["x"].dtype[:1] in "ui"
    prepare = (Dequantize(), Scale(), Logit(0.05)) if whole else ()

    def denoiser() -> Denoiser:
        pyro.module("flow", flow)
        return Denoiser(
            lambda x, t: field.network(x.unflatten(-1, shape), t).flatten(1), RectifiedSchedule(), "velocity"
        )

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(size), 1.0).to_event(1)
            pyro.sample("x", Flow(flow, base), obs=x)

    return Program(
        model,
        by=FlowMatching(coupling),
        prepare={"x": (*prepare, Standardize(), Flatten())},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-3, "ema": 0.995},
        denoiser=denoiser,
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
