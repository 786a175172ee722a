"""Noise-conditional score network (Song & Ermon, arXiv:1907.05600), whose program is annealed Langevin dynamics.

    model   x_T ~ N(0, σ_1²),   x_{i−1} | x_i ~ N(x_i + ½ h σ² s_θ(x_i, σ), h σ²),   x | x_1 ~ N(x̂_θ(x_1), σ_L²)
            K steps at each of L noise levels σ_1 > … > σ_L:  T = L K, σ that of the step's level
    guide   the same dynamics for the noisy data themselves, whose score is known: s(x_i) = (x − x_i) / σ²
    loss    E σ² ‖s_θ(x + σ ε, σ) + ε / σ‖² over the noise levels: denoising score matching

Where model and guide step from the same x_i, KL(q ‖ p) = h/8 · σ² ‖s_θ − s‖²: the bound of this program is its loss, at the places
that Langevin visits. x: [D] or images, real or whole numbers; every x_i has their shape.
"""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
from torch import Tensor

from probgen import Dequantize, Program, Standardize
from probgen.diffusion import GeometricSchedule
from probgen.pyro import Denoiser, DenoisingScoreMatching
from probgen.pyro.nn import DenoisingMLP, UNet


def program(
    spec,
    levels: int = 5,
    repeats: int = 3,
    step_size: float = 0.4,
    sigma_max: float = 5.0,
    sigma_min: float = 0.05,
    network: Literal["dense", "conv"] | None = None,
    hidden: int = 64,
    layers: int = 3,
) -> Program:
    """A score network for any array `x`, sampled by annealed Langevin dynamics.

    Parameters
    ----------
    levels
        L, noise levels that the program visits; the network knows all between σ_min and σ_max.
    repeats
        K, Langevin steps at each.
    step_size
        h, in units of σ².
    sigma_max, sigma_min
        The most and the least noise, in units of the standardised data.
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
    schedule = GeometricSchedule(sigma_min, sigma_max)
    steps, h = levels * repeats, step_size
    whole = spec["x"].dtype[:1] in "ui"

    def denoiser() -> Denoiser:
        return Denoiser(pyro.module("network", net), schedule, "noise", steps)

    def time(i: int) -> float:
        """Of x_i: 1 for the first K of them, x_T to x_{T−K+1}, and 0 for the last."""
        return ((i - 1) // repeats) / max(1, levels - 1)

    def langevin(x_i: Tensor, noise: Tensor, sigma: float) -> dist.TorchDistribution:
        """x_{i−1} | x_i, where the score is −ε̂ / σ."""
        return dist.Normal(x_i - 0.5 * h * sigma * noise, h**0.5 * sigma).to_event(len(shape))

    def model(x: Tensor) -> None:
        chain = denoiser()
        with pyro.plate("data", len(x)):
            x_i = pyro.sample(f"x_{steps}", chain.prior(x))
            for i in pyro.markov(range(steps, 1, -1)):
                x_i = pyro.sample(f"x_{i - 1}", langevin(x_i, chain(x_i, time(i)).noise, schedule.sigma(time(i))))
            pyro.sample("x", chain.decoded(chain(x_i, 0.0), 0.0), obs=x)

    def guide(x: Tensor) -> None:
        sigma = schedule.sigma(1.0)
        with pyro.plate("data", len(x)):
            x_i = pyro.sample(f"x_{steps}", dist.Normal(x, sigma).to_event(len(shape)))
            for i in pyro.markov(range(steps, 1, -1)):
                sigma = schedule.sigma(time(i))
                x_i = pyro.sample(f"x_{i - 1}", langevin(x_i, (x_i - x) / sigma, sigma))

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
