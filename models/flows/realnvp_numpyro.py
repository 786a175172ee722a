"""Real-valued non-volume-preserving flow (Dinh, Sohl-Dickstein & Bengio, RealNVP, arXiv:1605.08803), in NumPyro.

    z = f(x) ~ N(0, I)                    log p(x) = log N(f(x) | 0, I) + log |det ∂f/∂x|
    f = coupling_K ∘ … ∘ coupling_1       coupling: y_a = x_a,  y_b = x_b exp(s(x_a)) + t(x_a);  log |det| = Σ s

On vectors [D] a and b are the halves of the dimensions, in turn, and s, t a dense network. On images [H, W] or
[H, W, C] they are the squares of a checkerboard; then 2×2 pixels become channels, a and b are halves of the channels,
half of the channels are done, and the next level works on the others (section 3.6). ActNorm takes the place of batch
normalisation. There is no latent: the loss is −log p(x), one pass. The twin of `realnvp.py`: the same layers at the
same places.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.module import flax_module

from probgen import Dequantize, Flatten, Logit, Program, Scale, Standardize
from probgen.numpyro import ELBO
from probgen.numpyro.distributions import Flow
from probgen.numpyro.nn import ConvConditioner, DenseConditioner
from probgen.numpyro.transforms import (
    Bijection,
    ChannelCoupling,
    ChannelsFirst,
    CheckerboardCoupling,
    Compose,
    FirstRows,
    MultiScale,
    Squeeze,
    actnorm,
)


def dense(x: jax.Array, couplings: int, hidden: int) -> Bijection:
    """A flow of vectors [D], whose ActNorms start from the rows x [B, D]."""
    shape, rows, parts = x.shape[1:], FirstRows(x), []
    for k in range(couplings):
        kept, changed = ChannelCoupling.sizes(*shape, flip=k % 2 == 1)
        network = flax_module(f"coupling_{k}", DenseConditioner(2 * changed, hidden), input_shape=(1, kept))
        parts.append(rows.through(actnorm(f"norm_{k}", shape, rows)))
        parts.append(rows.through(ChannelCoupling(network, shape, flip=k % 2 == 1)))
    return Compose(*parts)


def convolutional(x: jax.Array, levels: int, couplings: int, hidden: int) -> Bijection:
    """A flow of images [H, W] or [H, W, C] onto vectors, whose ActNorms start from the images x."""
    rows, first, parts = FirstRows(x), ChannelsFirst(x.shape[1:]), []
    rows.through(first)
    image = first.onto
    for level in range(levels):
        parts.append(Compose(*one_level(f"level_{level}", image, couplings, hidden, rows)))
        image = MultiScale.handed_on(parts[-1].onto)
        rows.through(MultiScale.rest)
    return Compose(first, MultiScale(first.onto, parts))


def one_level(name: str, shape: tuple[int, ...], couplings: int, hidden: int, rows: FirstRows) -> list[Bijection]:
    """Checkerboards on [C, H, W], then couplings of the channels on [4 C, H/2, W/2]."""
    squeeze, parts = Squeeze(shape), []
    for k in range(couplings):
        network = flax_module(f"{name}_board_{k}", ConvConditioner(2 * shape[0], hidden), input_shape=(1, *shape))
        parts.append(rows.through(actnorm(f"{name}_board_norm_{k}", shape, rows)))
        parts.append(rows.through(CheckerboardCoupling(network, shape, flip=k % 2 == 1)))
    parts.append(rows.through(squeeze))
    channels, *sides = squeeze.onto
    for k in range(couplings):
        kept, changed = ChannelCoupling.sizes(channels, flip=k % 2 == 1)
        conditioner = ConvConditioner(2 * changed, hidden)
        network = flax_module(f"{name}_coupling_{k}", conditioner, input_shape=(1, kept, *sides))
        parts.append(rows.through(actnorm(f"{name}_norm_{k}", squeeze.onto, rows)))
        parts.append(rows.through(ChannelCoupling(network, squeeze.onto, flip=k % 2 == 1)))
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
    prepare = (Dequantize(), Scale(), Logit(0.05)) if spec["x"].dtype[:1] in "ui" else (Standardize(),)

    def model(x: jax.Array) -> None:
        flow = convolutional(x, levels, couplings or 2, hidden) if images else dense(x, couplings or 8, hidden)
        with numpyro.plate("data", len(x)):
            base = dist.Normal(jnp.zeros(size), 1.0).to_event(1)
            numpyro.sample("x", Flow(flow, base), obs=x)

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
