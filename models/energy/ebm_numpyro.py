"""Energy-based model: a density known up to a constant, written as a factor (LeCun et al., 2006; Song & Kingma,
arXiv:2101.03288), in NumPyro.

    p(x) = N(x | 0, s² I) exp(−U_θ(x)) / Z            x: [D], or images [H, W], [H, W, C]
    guide: none
    loss = E ½‖σ ∇ log p(x + σ ε) + ε‖²,  ε ~ N(0, I)    the score of the data with a little noise; Z does not enter

The program draws x from the Gaussian and weighs it by exp(−U): run as it is, it draws from the Gaussian alone. The draws
of p are those of a chain: `run.sample(n, sampler=NUTS(warmup=500, chains=4))`, or Langevin(). The twin of `ebm.py`: the
same layers at the same places.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from numpyro.contrib.module import flax_module

from probgen import Dequantize, Program, Standardize
from probgen.numpyro import DenoisingScoreMatching


def dense(hidden: int, layers: int) -> nn.Module:
    """x [B, *shape] → U [B, 1]."""
    inner = [part for _ in range(layers) for part in (nn.Dense(hidden), nn.silu)]
    return nn.Sequential([flatten, *inner, nn.Dense(1, use_bias=False)])


def convolutional(shape: tuple[int, ...], hidden: int) -> nn.Module:
    """The same for images [H, W] or [H, W, C] whose sides are multiples of four."""
    return nn.Sequential(
        [
            lambda x: x.reshape(-1, *(*shape, 1)[:3]),
            nn.Conv(hidden // 4, (3, 3), padding=1),
            nn.silu,
            nn.Conv(hidden // 2, (4, 4), strides=2, padding=1),
            nn.silu,
            nn.Conv(hidden, (4, 4), strides=2, padding=1),
            nn.silu,
            lambda h: flatten(jnp.moveaxis(h, -1, 1)),
            nn.Dense(1, use_bias=False),
        ]
    )


def flatten(x: jax.Array) -> jax.Array:
    """x [B, ...] → [B, D]."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


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
    energy = convolutional(shape, hidden) if images else dense(hidden, layers)

    def model(x: jax.Array) -> None:
        U = flax_module("energy", energy, input_shape=(1, *shape))
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", dist.Normal(jnp.zeros(shape), width).to_event(len(shape)), obs=x)
            numpyro.factor("weight", -U(x).squeeze(-1))

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
