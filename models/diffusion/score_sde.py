"""Score-based generative model through a stochastic differential equation (Song et al., arXiv:2011.13456).

    dx = f(t) x dt + g(t) dw                       noise is added: x_t | x ~ N(α_t x, σ_t² I)
    dx = [f(t) x − g(t)² s_θ(x, t)] dt + g(t) dw̄   and taken away, t from 1 to 0;  s_θ(x, t) ≈ ∇ log q(x_t)
    loss = E σ_t² ‖s_θ(x_t, t) − ∇ log q(x_t | x)‖²,  t ~ U(0, 1)

    vp      f = −β_t / 2, g² = β_t                          α² + σ² = 1
    subvp   f = −β_t / 2, g² = β_t (1 − α_t⁴)               σ = 1 − α²
    ve      f = 0, σ_t = σ_min (σ_max / σ_min)^t

The program is the second equation in T steps, each with the Gaussian that is exact where s_θ is; its guide is the first one.
So the bound of ddpm.py is one of this too, and so are its samplers; the probability flow has its density. x: [D] or
images, real or whole numbers.
"""

from __future__ import annotations

from typing import Literal

import pyro
from torch import Tensor

from probgen import Dequantize, Program, Standardize
from probgen.diffusion import GeometricSchedule, LinearSchedule, NoiseSchedule, SubVPSchedule
from probgen.pyro import Denoiser, DenoisingScoreMatching
from probgen.pyro.nn import DenoisingMLP, UNet


def program(
    spec,
    sde: Literal["vp", "subvp", "ve"] = "vp",
    steps: int = 20,
    predicts: Literal["score", "noise"] = "noise",
    network: Literal["dense", "conv"] | None = None,
    hidden: int = 64,
    layers: int = 3,
) -> Program:
    """A score model for any array `x`.

    Parameters
    ----------
    sde
        How noise is added: "vp", "subvp" or "ve".
    steps
        T of the program; samplers take their own.
    predicts
        What the network says: the score, or the noise −σ_t s, which has one size at all times.
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
    whole = spec["x"].dtype[:1] in "ui"
    schedule: NoiseSchedule = {"vp": LinearSchedule, "subvp": SubVPSchedule, "ve": GeometricSchedule}[sde]()

    def denoiser() -> Denoiser:
        return Denoiser(pyro.module("network", net), schedule, predicts, steps)

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
        by=DenoisingScoreMatching(),
        prepare={"x": (Dequantize(), Standardize()) if whole else Standardize()},
        defaults={"epochs": 200, "batch_size": 128, "lr": 1e-3, "ema": 0.995},
        denoiser=denoiser,
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
