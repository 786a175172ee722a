"""Generative flow with invertible 1×1 convolutions (Kingma & Dhariwal, Glow, arXiv:1807.03039).

    z = f(x) ~ N(0, I)                    log p(x) = log N(f(x) | 0, I) + log |det ∂f/∂x|
    f = step_K ∘ … ∘ step_1 at each level;   a step is three maps:
        ActNorm       y = (x − loc) exp(log_scale)              one pair of numbers for each channel
        1×1 conv      y = W x                                   W [C, C] in LU factors
        coupling      y_a = x_a,  y_b = x_b exp(s(x_a)) + t(x_a)  halves of the channels

On images [H, W] or [H, W, C] a level first turns 2×2 pixels into channels, and hands on half of its channels to the
next. On vectors [D] the channels are the dimensions, and there is one level. The loss is −log p(x), one pass.
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen import Dequantize, Flatten, Logit, Program, Scale, Standardize
from probgen.pyro import ELBO
from probgen.pyro.distributions import Flow
from probgen.pyro.nn import ConvConditioner, DenseConditioner
from probgen.pyro.transforms import (
    ActNorm,
    Bijection,
    ChannelCoupling,
    ChannelsFirst,
    Compose,
    InvertibleConv1x1,
    MultiScale,
    Squeeze,
)


def step(shape: tuple[int, ...], hidden: int) -> list[Bijection]:
    """One step of flow on [D] or [C, H, W]."""
    kept, changed = ChannelCoupling.sizes(shape[0])
    conditioner = DenseConditioner if len(shape) == 1 else ConvConditioner
    network = conditioner(kept, 2 * changed, hidden)
    return [ActNorm(shape), InvertibleConv1x1(shape), ChannelCoupling(network, shape)]


def dense(size: int, steps: int, hidden: int) -> Bijection:
    """A flow of vectors [size]."""
    return Compose(*[part for _ in range(steps) for part in step((size,), hidden)])


def convolutional(shape: tuple[int, ...], levels: int, steps: int, hidden: int) -> Bijection:
    """A flow of images [H, W] or [H, W, C] onto vectors."""
    first = ChannelsFirst(shape)
    image, parts = first.onto, []
    for _ in range(levels):
        squeeze = Squeeze(image)
        parts.append(Compose(squeeze, *[part for _ in range(steps) for part in step(squeeze.onto, hidden)]))
        image = MultiScale.handed_on(squeeze.onto)
    return Compose(first, MultiScale(first.onto, parts))


def program(
    spec,
    steps: int = 4,
    hidden: int = 64,
    levels: int = 2,
    network: Literal["dense", "conv"] | None = None,
) -> Program:
    """A Glow for any array `x` of real or whole numbers: on images multi-scale, on all else dense.

    Parameters
    ----------
    steps
        Steps of flow, at each level.
    hidden
        Channels, or units, of a layer of the couplings' networks.
    levels
        Of an image, each of half the size of the one before; its sides are multiples of two to this power.
    network
        "dense", or "conv" for images; by the shape of the data unless it is named.
    """
    shape, size = spec["x"].shape, math.prod(spec["x"].shape)
    images = (network or ("conv" if len(shape) > 1 else "dense")) == "conv"
    flow = convolutional(shape, levels, steps, hidden) if images else dense(size, steps, hidden)
    prepare = (Dequantize(), Scale(), Logit(0.05)) if spec["x"].dtype[:1] in "ui" else (Standardize(),)

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(size), 1.0).to_event(1)
            pyro.sample("x", Flow(flow, base), obs=x)

    return Program(
        model,
        by=ELBO(),
        prepare={"x": prepare if images else (*prepare, Flatten())},
        defaults={"epochs": 50, "batch_size": 128, "lr": 1e-3, "clip": 50.0},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
