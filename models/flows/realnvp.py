"""Real-valued non-volume-preserving flow (Dinh, Sohl-Dickstein & Bengio, RealNVP, arXiv:1605.08803).

    z = f(x) ~ N(0, I)                    log p(x) = log N(f(x) | 0, I) + log |det ∂f/∂x|
    f = coupling_K ∘ … ∘ coupling_1       coupling: y_a = x_a,  y_b = x_b exp(s(x_a)) + t(x_a);  log |det| = Σ s

On vectors [D] a and b are the halves of the dimensions, in turn, and s, t a dense network. On images [H, W] or
[H, W, C] they are the squares of a checkerboard; then 2×2 pixels become channels, a and b are halves of the channels,
half of the channels are done, and the next level works on the others (section 3.6). ActNorm takes the place of batch
normalisation. There is no latent: the loss is −log p(x), one pass.
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
    CheckerboardCoupling,
    Compose,
    MultiScale,
    Squeeze,
)


def dense(size: int, couplings: int, hidden: int) -> Bijection:
    """A flow of vectors [size]."""
    parts = []
    for k in range(couplings):
        kept, changed = ChannelCoupling.sizes(size, flip=k % 2 == 1)
        network = DenseConditioner(kept, 2 * changed, hidden)
        parts += [ActNorm((size,)), ChannelCoupling(network, (size,), flip=k % 2 == 1)]
    return Compose(*parts)


def convolutional(shape: tuple[int, ...], levels: int, couplings: int, hidden: int) -> Bijection:
    """A flow of images [H, W] or [H, W, C] onto vectors."""
    first = ChannelsFirst(shape)
    image, parts = first.onto, []
    for _ in range(levels):
        parts.append(Compose(*one_level(image, couplings, hidden)))
        image = MultiScale.handed_on(parts[-1].onto)
    return Compose(first, MultiScale(first.onto, parts))


def one_level(shape: tuple[int, ...], couplings: int, hidden: int) -> list[Bijection]:
    """Checkerboards on [C, H, W], then couplings of the channels on [4 C, H/2, W/2]."""
    squeeze, parts = Squeeze(shape), []
    for k in range(couplings):
        network = ConvConditioner(shape[0], 2 * shape[0], hidden)
        parts += [ActNorm(shape), CheckerboardCoupling(network, shape, flip=k % 2 == 1)]
    parts.append(squeeze)
    for k in range(couplings):
        kept, changed = ChannelCoupling.sizes(squeeze.onto[0], flip=k % 2 == 1)
        network = ConvConditioner(kept, 2 * changed, hidden)
        parts += [ActNorm(squeeze.onto), ChannelCoupling(network, squeeze.onto, flip=k % 2 == 1)]
    return parts


def program(
    spec,
    couplings: int | None = None,
    hidden: int = 64,
    levels: int = 2,
    network: Literal["dense", "conv"] | None = None,
) -> Program:
    """A RealNVP for any array `x` of real or whole numbers: on images multi-scale, on all else dense.

    Parameters
    ----------
    couplings
        Coupling layers; on images of each kind, at each level. 8, on images 2.
    hidden
        Units, or channels, of a layer of their networks.
    levels
        Of an image, each of half the size of the one before; its sides are multiples of two to this power.
    network
        "dense", or "conv" for images; by the shape of the data unless it is named.
    """
    shape, size = spec["x"].shape, math.prod(spec["x"].shape)
    images = (network or ("conv" if len(shape) > 1 else "dense")) == "conv"
    flow = convolutional(shape, levels, couplings or 2, hidden) if images else dense(size, couplings or 8, hidden)
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

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
