"""Energy-based model: a density known up to a constant, written as a factor (LeCun et al., 2006; Song & Kingma,
arXiv:2101.03288).

    p(x) = N(x | 0, s² I) exp(−U_θ(x)) / Z            x: [D], or images [H, W], [H, W, C]
    guide: none
    loss = E ½‖σ ∇ log p(x + σ ε) + ε‖²,  ε ~ N(0, I)    the score of the data with a little noise; Z does not enter

The program draws x from the Gaussian and weighs it by exp(−U): run as it is, it draws from the Gaussian alone. The draws
of p are those of a chain, `run.sample(n, sampler=Langevin(steps=1000))`; log Z is found by annealing from one to the other.
U_θ is a smooth network without a constant, since losses look at its derivatives; it grows no faster than |x|, so the
Gaussian makes p normalisable. Learned by score matching without noise, ScoreMatching("sliced"), or by its own draws,
ContrastiveDivergence(), it is another `by`.
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import Dequantize, Program, Standardize
from probgen.pyro import DenoisingScoreMatching


def dense(size: int, hidden: int, layers: int) -> nn.Module:
    """x [B, *shape] → U [B, 1]."""
    inner = [part for _ in range(layers - 1) for part in (nn.Linear(hidden, hidden), nn.SiLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.SiLU(), *inner, nn.Linear(hidden, 1, bias=False))


def convolutional(shape: tuple[int, ...], hidden: int) -> nn.Module:
    """The same for images [H, W] or [H, W, C] whose sides are multiples of four."""
    height, width, channels = (*shape, 1)[:3]
    return nn.Sequential(
        Channels((height, width, channels)),
        nn.Conv2d(channels, hidden // 4, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(hidden // 4, hidden // 2, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(hidden // 2, hidden, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(hidden * (height // 4) * (width // 4), 1, bias=False),
    )


class Channels(nn.Module):
    """Images [B, H, W] or [B, H, W, C] as [B, C, H, W]."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape).movedim(-1, 1)


def program(
    spec,
    hidden: int = 128,
    layers: int = 2,
    network: Literal["dense", "conv"] | None = None,
    width: float = 1.5,
) -> Program:
    """An energy-based model of any array `x` of real or whole numbers.

    Parameters
    ----------
    hidden
        Units of a layer, or channels of the last one.
    layers
        Of the dense network.
    network
        "dense", or "conv" for images whose sides are multiples of four; by the shape of the data unless it is named.
    width
        s, the standard deviation of the Gaussian, where the prepared data have about 1.
    """
    shape, whole = spec["x"].shape, spec["x"].dtype[:1] in "ui"
    images = (network or ("conv" if len(shape) > 1 and min(shape[:2]) >= 16 else "dense")) == "conv"
    energy = convolutional(shape, hidden) if images else dense(math.prod(shape), hidden, layers)

    def model(x: Tensor) -> None:
        pyro.module("energy", energy)
        with pyro.plate("data", len(x)):
            x = pyro.sample("x", dist.Normal(torch.zeros(shape), width).to_event(len(shape)), obs=x)
            pyro.factor("weight", -energy(x).squeeze(-1))

    return Program(
        model,
        by=DenoisingScoreMatching(sigma=0.5 if whole else 0.1),
        prepare={"x": (Dequantize(), Standardize()) if whole else Standardize()},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-3},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
