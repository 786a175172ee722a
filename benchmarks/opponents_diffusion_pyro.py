"""Diffusion and flow matching by other packages, around the zoo's own networks, so that parameters are equal.

Every peer's loss is its own, one random time a row, the network's t in 0..1. Where a chain of steps is needed it is of 1000, on the
cosine schedule; ours may be of fewer, since a training step asks for one of them and a sampler for none. The forms of a
training step are those of `opponents_flows`; a draw is 50 steps of DDIM, η = 0, with the network as it is or through
`torch.compile`: no package's loop, and none of their steps, is compiled as a whole, since they branch on the number of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probgen.diffusion import CosineSchedule

CHAIN, STEPS = 1000, 50


class Opponent(nn.Module):
    """A peer's loss around a network (x [B, *shape], t [B]) → [B, *shape]: x → its mean squared error."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.shape = network, shape

    def draw(self, network: Callable[[Tensor, Tensor], Tensor], n: int) -> Tensor:
        """`n` draws [n, *shape] in 50 steps of the network that is given."""
        raise NotImplementedError


class ByHand(Opponent):
    """α and σ of every step in a table, as a script of one's own would keep them."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__(network, shape)
        times = np.arange(CHAIN + 1) / CHAIN
        alpha, sigma = CosineSchedule().alpha(times), CosineSchedule().sigma(times)
        self.register_buffer("table", torch.as_tensor(np.stack([alpha, sigma]), dtype=torch.float32))
        self.grid = [
            (i / CHAIN, alpha[i], sigma[i], alpha[j], sigma[j]) for i, j in pairwise(range(CHAIN, -1, -CHAIN // STEPS))
        ]

    def forward(self, x: Tensor) -> Tensor:
        noise, t = torch.randn_like(x), torch.randint(1, CHAIN + 1, (len(x),))
        alpha, sigma = self.table[:, t].reshape(2, -1, *[1] * len(self.shape))
        return F.mse_loss(self.network(alpha * x + sigma * noise, t / CHAIN), noise)

    def draw(self, network: Callable[[Tensor, Tensor], Tensor], n: int) -> Tensor:
        x = torch.randn(n, *self.shape)
        for t, alpha, sigma, alpha_s, sigma_s in self.grid:
            x = (alpha_s / alpha) * x + (sigma_s - alpha_s * sigma / alpha) * network(x, torch.full((n,), t))
        return x


class Diffusers(Opponent):
    """`DDPMScheduler.add_noise` and the squared error, as in its training scripts; `DDIMScheduler` for draws.

    Draws are not clipped to −1..1, as ours are not.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__(network, shape)
        from diffusers import DDIMScheduler, DDPMScheduler

        self.scheduler = DDPMScheduler(CHAIN, beta_schedule="squaredcos_cap_v2")
        self.ddim = DDIMScheduler(CHAIN, beta_schedule="squaredcos_cap_v2", clip_sample=False)
        self.ddim.set_timesteps(STEPS)

    def forward(self, x: Tensor) -> Tensor:
        noise, t = torch.randn_like(x), torch.randint(0, CHAIN, (len(x),))
        return F.mse_loss(self.network(self.scheduler.add_noise(x, noise, t), t / CHAIN), noise)

    def draw(self, network: Callable[[Tensor, Tensor], Tensor], n: int) -> Tensor:
        x = torch.randn(n, *self.shape)
        for t in self.ddim.timesteps:
            x = self.ddim.step(network(x, (t / CHAIN).expand(n)), t, x).prev_sample
        return x


class Lucidrains(Opponent):
    """`GaussianDiffusion` of denoising-diffusion-pytorch, on x as an image of one channel; draws are clipped to −1..1."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__(network, shape)
        from denoising_diffusion_pytorch import denoising_diffusion_pytorch as package

        package.tqdm = _without_bar
        self.diffusion = package.GaussianDiffusion(
            Imaged(network, shape), image_size=(1, *shape)[-2:], timesteps=CHAIN, sampling_timesteps=STEPS,
            objective="pred_noise", beta_schedule="cosine", auto_normalize=False,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.diffusion(x.reshape(len(x), 1, *self.diffusion.image_size))

    def draw(self, network: Callable[[Tensor, Tensor], Tensor], n: int) -> Tensor:
        self.diffusion.model.ask = network
        return self.diffusion.sample(n).reshape(n, *self.shape)


def _without_bar(values: Iterable[Any], **_: Any) -> Iterable[Any]:
    return values


class Imaged(nn.Module):
    """A network with the interface of its U-Net: images [B, 1, H, W] and whole-numbered times."""

    channels = out_dim = 1
    self_condition = False

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.shape, self.ask = network, shape, None

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
        network = self.network if self.ask is None else self.ask
        return network(x.reshape(len(x), *self.shape), t / CHAIN).reshape(x.shape)


class TorchCFM(Opponent):
    """`ConditionalFlowMatcher` with σ = 0 and independent pairs, as in its examples; it draws at no cost that is its own."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__(network, shape)
        from torchcfm import ConditionalFlowMatcher

        self.matcher = ConditionalFlowMatcher(sigma=0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), *self.shape)
        t, x_t, velocity = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return F.mse_loss(self.network(x_t, t), velocity)


PEERS: dict[str, dict[str, type[Opponent]]] = {
    "noise": {"by hand": ByHand, "denoising-diffusion-pytorch": Lucidrains, "diffusers": Diffusers},
    "velocity": {"torchcfm": TorchCFM},
}
