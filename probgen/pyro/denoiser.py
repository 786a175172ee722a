"""A denoiser in Pyro: the two chains of a diffusion as ordinary distributions."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from probgen.diffusion.denoiser import GaussianChain, Prediction
from probgen.pyro.distributions.discretized import DiscretizedGaussian


class Denoiser(GaussianChain):
    """The two chains of a diffusion as Pyro distributions; its parameters are those of `GaussianChain`."""

    def prior(self, x: Tensor) -> dist.TorchDistribution:
        """p(x_T), for as many rows, and of the shape, as the data `x` [B, *shape]."""
        zeros = torch.zeros(x.shape[1:], dtype=torch.get_default_dtype(), device=x.device)
        return dist.Normal(zeros, _number(self.schedule.end_scale, zeros)).to_event(zeros.dim())

    def noise_like(self, x: Tensor) -> Tensor:
        """ε ~ N(0, 1), a number for each of the data."""
        return torch.randn_like(x)

    def forward(self, x_s: Tensor, t: Any, s: Any = None) -> dist.TorchDistribution:
        """q(x_t | x_s) = N(α_{t|s} x_s, σ²_{t|s}); without s the step before t."""
        alpha, sigma = self.between(t, self.before(t, s))
        return dist.Normal(alpha * x_s, _number(sigma, x_s)).to_event(x_s.dim() - 1)

    def reverse(self, x_t: Tensor, t: Any, s: Any = None) -> dist.TorchDistribution:
        """p(x_s | x_t), the posterior q(x_s | x_t, x) with the network's x̂ for x; without s the step before t."""
        s, said = self.before(t, s), self(x_t, t)
        mean, _ = self.posterior(x_t, said.data, t, s)
        return dist.Normal(mean, _root(self.reverse_variance(said, t, s), mean)).to_event(mean.dim() - 1)

    def decoder(self, x_1: Tensor) -> dist.TorchDistribution:
        """p(x | x_1), of the data themselves: Gaussian, or over `levels` whole numbers."""
        t = 1 / self.steps
        return self.decoded(self(x_1, t), t)

    def decoded(self, said: Prediction, t: Any) -> dist.TorchDistribution:
        """p(x | x_t) by what the network has said at t, the first step of the chain."""
        mean, scale = said.data, _root(self.last_variance(said, t), said.x_t)
        fn = dist.Normal(mean, scale) if self.levels is None else DiscretizedGaussian(mean, scale, self.levels)
        return fn.to_event(mean.dim() - 1)


def _number(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _root(variance: Any, like: Tensor) -> Tensor:
    return _number(variance, like).sqrt()
