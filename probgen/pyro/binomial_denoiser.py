"""A denoiser of bits in Pyro: the two chains of a binomial diffusion as ordinary distributions."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from probgen.diffusion.binomial import BinomialChain, BitPrediction


class BinomialDenoiser(BinomialChain):
    """The two chains of a binomial diffusion as Pyro distributions; its parameters are those of `BinomialChain`."""

    def prior(self, x: Tensor) -> dist.TorchDistribution:
        """p(x_T), tossed coins, for as many rows, and of the shape, as the data `x` [B, *shape]."""
        half = torch.full(x.shape[1:], 0.5, dtype=torch.get_default_dtype(), device=x.device)
        return dist.Bernoulli(half).to_event(half.dim())

    def noise_like(self, x: Tensor) -> Tensor:
        """Uniform in 0..1, a number for each bit of the data."""
        return torch.rand_like(x)

    def forward(self, x_s: Tensor, t: Any, s: Any = None) -> dist.TorchDistribution:
        """q(x_t | x_s); without s the step before t."""
        one, _ = self.chances(x_s, self.before(t, s), t)
        one = one.clamp(0.0, 1.0)  # of bits it lies there; data that are none then fail at their own site, by name
        return dist.Bernoulli(one).to_event(one.dim() - 1)

    def reverse(self, x_t: Tensor, t: Any, s: Any = None) -> dist.TorchDistribution:
        """p(x_s | x_t), the posterior q(x_s | x_t, x) averaged over the network's b̂ of x; without s the step before t."""
        one, zero = self.reversed_chances(self(x_t, t), t, self.before(t, s))
        return dist.Bernoulli(logits=one.log() - zero.log()).to_event(one.dim() - 1)

    def decoder(self, x_1: Tensor) -> dist.TorchDistribution:
        """p(x | x_1) = Bernoulli(b̂)."""
        return self.decoded(self(x_1, 1 / self.steps), 1 / self.steps)

    def decoded(self, said: BitPrediction, t: Any) -> dist.TorchDistribution:
        """p(x | x_t) by what the network has said at t, the first step of the chain."""
        return dist.Bernoulli(logits=said.logits).to_event(said.logits.dim() - 1)
