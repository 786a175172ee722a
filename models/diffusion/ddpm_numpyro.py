"""Denoising diffusion (Sohl-Dickstein et al., arXiv:1503.03585; Ho, Jain & Abbeel, DDPM, arXiv:2006.11239), in NumPyro.

    model   p(x_T) ∏_{t=T..2} p_θ(x_{t−1} | x_t) · p_θ(x | x_1)           x_T ~ N(0, I)
            p_θ(x_{t−1} | x_t) = q(x_{t−1} | x_t, x = x̂_θ(x_t, t)), its variance β_t, β̃_t or learned between them
    guide   q(x_1 | x) ∏_{t=2..T} q(x_t | x_{t−1}),   x_t = α_t x + σ_t ε: nothing to learn, but the schedule if asked
    loss    ‖ε − ε_θ(x_t, t)‖² at one random t a row, or the bound itself: DiffusionELBO("vlb"), or ELBO() on the chain

A Markovian hierarchical VAE whose guide is fixed. x: [D] or images [H, W], [H, W, C]; every x_t has their shape. Real data
have a Gaussian p(x | x_1), whole numbers 0..L−1 lie in −1..1 and have the Gaussian's mass in each of L bins. With
`conditional` the network is also told the class y. The chain is a Python loop, not `scan`: that keeps latents in one array, and
here each x_t is a site of its own, as on Pyro. The twin of `ddpm.py`: the same layers at the same places.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
from numpyro.contrib.module import flax_module

from probgen import Program, Standardize
from probgen.diffusion import CosineSchedule, LearnedSchedule, LinearSchedule
from probgen.numpyro import Denoiser, DiffusionELBO
from probgen.numpyro.nn import DenoisingMLP, UNet


def learned(pieces: int = 16) -> LearnedSchedule:
    """γ_0, γ_1 and the weights of a learned schedule, from cosine's ends and straight."""
    low, span = numpyro.param("schedule.low", -8.0), numpyro.param("schedule.span", 16.0)
    return LearnedSchedule((low, low + span), numpyro.param("schedule.weights", jnp.zeros(pieces)))


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
    noise = {"cosine": CosineSchedule, "linear": LinearSchedule, "learned": learned}[schedule]
    bound = schedule == "learned" or variance == "learned"

    def denoiser(y: jax.Array | None = None) -> Denoiser:
        labels = y if conditional else None
        told = flax_module("network", net, jnp.zeros((1, *shape)), jnp.zeros(1), None if labels is None else labels[:1])
        return Denoiser(told, noise(), predicts, steps, variance, levels, labels=labels, classes=classes)

    def model(x: jax.Array, y: jax.Array | None = None) -> None:
        chain = denoiser(y)
        with numpyro.plate("data", len(x)):
            x_t = numpyro.sample(f"x_{steps}", chain.prior(x))
            for t in range(steps, 1, -1):
                x_t = numpyro.sample(f"x_{t - 1}", chain.reverse(x_t, t / steps))
            numpyro.sample("x", chain.decoder(x_t), obs=x)

    def guide(x: jax.Array, y: jax.Array | None = None) -> None:
        chain = denoiser(y)
        x_t = chain.embed(x)
        with numpyro.plate("data", len(x)):
            for t in range(1, steps + 1):
                x_t = numpyro.sample(f"x_{t}", chain.forward(x_t, t / steps))

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
