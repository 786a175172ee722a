"""Binomial diffusion of bits (Sohl-Dickstein et al., Deep unsupervised learning using nonequilibrium thermodynamics,
arXiv:1503.03585).

    model   p(x_T) ∏_{t=T..2} p_θ(x_{t−1} | x_t) · p_θ(x | x_1)           x_T ~ Bernoulli(½), bit by bit
            p_θ(x_{t−1} | x_t) = b̂ q(x_{t−1} | x_t, x = 1) + (1 − b̂) q(x_{t−1} | x_t, x = 0),   b̂ = b̂_θ(x_t, t)
            p_θ(x | x_1) = Bernoulli(b̂_θ(x_1, 1/T))
    guide   ∏_{t=1..T} q(x_t | x_{t−1}),   q = Bernoulli(x_{t−1} (1 − β_t) + β_t / 2),   x_0 = x: nothing to learn
    loss    the bound from one random t a row, by closed-form KLs against q(x_{t−1} | x_t, x): DiffusionELBO("vlb"); or
            ELBO() on the whole chain, whose gradient needs none through the guide's bits

A DDPM of bits: a Markovian hierarchical VAE whose guide is fixed. x: [D] or images [H, W], [H, W, C], binarised; every x_t
has their shape. β_t is the probability that step t tosses a bit anew; by the paper's 1 / (T − t + 1) each step takes the same
1/T of the signal, and x_T has none of it.
"""

from __future__ import annotations

from typing import Literal

import pyro
from torch import Tensor

from probgen import Binarize, Program
from probgen.diffusion import CosineSchedule, LinearSchedule, RectifiedSchedule
from probgen.pyro import BinomialDenoiser, DiffusionELBO
from probgen.pyro.nn import DenoisingMLP, UNet


def program(
    spec,
    steps: int = 10,
    schedule: Literal["rectified", "cosine", "linear"] = "rectified",
    network: Literal["dense", "conv"] | None = None,
    hidden: int = 64,
    layers: int = 3,
) -> Program:
    """A binomial diffusion for any array `x`, of which it models the bits.

    Parameters
    ----------
    steps
        T, latents of the chain.
    schedule
        Which share α_t of the bits is still the data's: "rectified", the paper's 1 − t, or that of "cosine" or "linear".
    network
        "dense", or "conv", a U-Net with attention; by the shape of the data unless it is named.
    hidden
        Units of a layer, or channels at full size.
    layers
        Residual layers, or sizes of the image.
    """
    shape = spec["x"].shape
    images = (network or ("conv" if len(shape) > 1 and min(shape[:2]) >= 16 else "dense")) == "conv"
    net = (UNet if images else DenoisingMLP)(shape, hidden, layers)
    noise = {"rectified": RectifiedSchedule, "cosine": CosineSchedule, "linear": LinearSchedule}[schedule]()

    def denoiser() -> BinomialDenoiser:
        pyro.module("network", net)
        return BinomialDenoiser(net, noise, steps)

    def model(x: Tensor) -> None:
        chain = denoiser()
        with pyro.plate("data", len(x)):
            x_t = pyro.sample(f"x_{steps}", chain.prior(x))
            for t in pyro.markov(range(steps, 1, -1)):
                x_t = pyro.sample(f"x_{t - 1}", chain.reverse(x_t, t / steps))
            pyro.sample("x", chain.decoder(x_t), obs=x)

    def guide(x: Tensor) -> None:
        chain, x_t = denoiser(), x
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(1, steps + 1)):
                x_t = pyro.sample(f"x_{t}", chain.forward(x_t, t / steps))

    return Program(
        model,
        guide,
        by=DiffusionELBO(),
        prepare={"x": Binarize()},
        defaults={"epochs": 200, "batch_size": 128, "lr": 1e-3, "ema": 0.995},
        denoiser=denoiser,
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
