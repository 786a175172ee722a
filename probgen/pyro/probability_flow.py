"""The probability flow of a denoiser: the differential equation whose law at every time is that of the noisy data."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from probgen.diffusion.path import path
from probgen.pyro.denoiser import Denoiser
from probgen.pyro.transforms.continuous import ContinuousFlow


def log_density(
    chain: Denoiser,
    x_t: Tensor,
    t: float | None = None,
    steps: int = 100,
    trace: Literal["exact", "hutchinson"] = "exact",
) -> Tensor:
    """log p(x_t) of each row [B], at time t, or the earliest at which the network is asked   (arXiv:2011.13456, eq. 39).

        dy / d log ς = ς ε̂(α y, t),  y = x_t / α_t,  ς = σ_t / α_t;      log p(x_t) = log p(y_1) + ∫ tr ∂(ς ε̂)/∂y d log ς − D log α_t

    by Runge–Kutta steps that are even in log ς. Hutchinson's trace makes one unbiased draw of it for each row.
    """
    ratios, times, alphas = path(chain, t, steps)
    span, size = math.log(ratios[-1] / ratios[0]), math.prod(x_t.shape[1:])

    def field(y: Tensor, tau: Tensor) -> Tensor:
        """dy / dτ, where log ς = log ς_t + τ · span."""
        i = round(float(tau) * 2 * steps)
        state = alphas[i] * y.unflatten(-1, x_t.shape[1:])
        return span * ratios[i] * chain(state, times[i]).noise.flatten(1)

    flow = ContinuousFlow(field, size, steps=steps, trace=trace)
    y, ladj = flow.forth(x_t.flatten(1) / alphas[0])
    end = torch.distributions.Normal(0.0, float(chain.schedule.in_numbers().end_scale) / alphas[-1])
    return end.log_prob(y).sum(-1) + ladj - size * math.log(alphas[0])
