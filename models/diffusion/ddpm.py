"""Denoising diffusion (Sohl-Dickstein et al., arXiv:1503.03585; Ho, Jain & Abbeel, DDPM, arXiv:2006.11239).

    model   p(x_T) ∏_{t=T..2} p_θ(x_{t−1} | x_t) · p_θ(x | x_1)           x_T ~ N(0, I)
            p_θ(x_{t−1} | x_t) = q(x_{t−1} | x_t, x = x̂_θ(x_t, t)), its variance β_t, β̃_t or learned between them
    guide   q(x_1 | x) ∏_{t=2..T} q(x_t | x_{t−1}),   x_t = α_t x + σ_t ε: nothing to learn, but the schedule if asked
    loss    ‖ε − ε_θ(x_t, t)‖² at one random t a row, or the bound itself: DiffusionELBO("vlb"), or ELBO() on the chain

A Markovian hierarchical VAE whose guide is fixed. x: [D] or images [H, W], [H, W, C]; every x_t has their shape. Real data
have a Gaussian p(x | x_1), whole numbers 0..L−1 lie in −1..1 and have the Gaussian's mass in each of L bins. With
`conditional` the network is also told the class y.
"""

from __future__ import annotations

from typing import Literal

import pyro
import torch
from torch import Tensor, nn

from probgen import Program, Standardize
from probgen.diffusion import CosineSchedule, LearnedSchedule, LinearSchedule, NoiseSchedule
from probgen.pyro import Denoiser, DiffusionELBO
from probgen.pyro.nn import DenoisingMLP, UNet


class Learned(nn.Module):
    """γ_0, γ_1 and the weights of a learned schedule, from cosine's ends and straight."""

    def __init__(self, pieces: int = 16) -> None:
        super().__init__()
        self.low, self.span = nn.Parameter(torch.tensor(-8.0)), nn.Parameter(torch.tensor(16.0))
        self.weights = nn.Parameter(torch.zeros(pieces))

    def forward(self) -> LearnedSchedule:
        return LearnedSchedule((self.low, self.low + self.span), self.weights)


def program(
    spec,
    steps: int = 20,
    schedule: Literal["cosine", "linear", "learned"] = "cosine",
    predicts: Literal["noise", "data", "v", "score"] = "noise",
    variance: Literal["beta", "posterior", "learned"] = "beta",
    network: Literal["dense", "conv"] | None = None,
    hidden: int = 64,
    layers: int = 3,
    conditional: bool = False,
) -> Program:
    """A DDPM for any array `x`; network and p(x | x_1) follow the data.

    Parameters
    ----------
    steps
        T, latents of the chain.
    schedule
        How noise is added: "cosine", "linear", or "learned" with the bound.
    predicts
        What the network says of x_t.
    variance
        Of the reverse steps.
    network
        "dense", or "conv", a U-Net with attention; by the shape of the data unless it is named.
    hidden
        Units of a layer, or channels at full size.
    layers
        Residual layers, or sizes of the image.
    conditional
        Whether the network is told the class `y`; a tenth of the rows are not, so that samples can be guided.
    """
    shape = spec["x"].shape
    images = (network or ("conv" if len(shape) > 1 and min(shape[:2]) >= 16 else "dense")) == "conv"
    classes, levels = spec["y"].classes if conditional else None, None
    if spec["x"].dtype[:1] in "ui":
        levels = int(spec["x"].range[1]) + 1
    net = (UNet if images else DenoisingMLP)(shape, hidden, layers, classes, 2 if variance == "learned" else 1)
    noise: NoiseSchedule | Learned = {"cosine": CosineSchedule, "linear": LinearSchedule, "learned": Learned}[
        schedule
    ]()
    bound = schedule == "learned" or variance == "learned"

    def denoiser(y: Tensor | None = None) -> Denoiser:
        pyro.module("network", net)
        at = pyro.module("schedule", noise)() if schedule == "learned" else noise
        labels = y if conditional else None
        return Denoiser(net, at, predicts, steps, variance, levels, labels=labels, classes=classes)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        chain = denoiser(y)
        with pyro.plate("data", len(x)):
            x_t = pyro.sample(f"x_{steps}", chain.prior(x))
            for t in pyro.markov(range(steps, 1, -1)):
                x_t = pyro.sample(f"x_{t - 1}", chain.reverse(x_t, t / steps))
            pyro.sample("x", chain.decoder(x_t), obs=x)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        chain = denoiser(y)
        x_t = chain.embed(x)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(1, steps + 1)):
                x_t = pyro.sample(f"x_{t}", chain.forward(x_t, t / steps))

    return Program(
        model,
        guide,
        by=DiffusionELBO("vlb" if bound else "simple", drop=0.1 if conditional else 0.0),
        prepare={} if levels else {"x": Standardize()},
        defaults={"epochs": 200, "batch_size": 128, "lr": 1e-3, "ema": 0.995},
        denoiser=denoiser,
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
