"""The probability flow of a denoiser: the differential equation whose law at every time is that of the noisy data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Normal

from probgen.diffusion.path import path as core_path
from probgen.numpyro.denoiser import Denoiser

Path = Mapping[str, Any]


def log_density(
    chain: Denoiser,
    x_t: jax.Array,
    t: float | None = None,
    steps: int = 100,
    trace: Literal["exact", "hutchinson"] = "exact",
    rng_key: jax.Array | None = None,
) -> jax.Array:
    """log p(x_t) of each row [B], at time t, or the earliest at which the network is asked   (arXiv:2011.13456, eq. 39).

        dy / d log ς = ς ε̂(α y, t),  y = x_t / α_t,  ς = σ_t / α_t;      log p(x_t) = log p(y_1) + ∫ tr ∂(ς ε̂)/∂y d log ς − D log α_t

    by Runge–Kutta steps that are even in log ς. Hutchinson's trace makes one unbiased draw of it for each row.
    """
    key = jax.random.key(0) if rng_key is None else rng_key
    return jax.jit(lambda *args: along(chain, trace, *args))(path(chain, t, steps), x_t, key)


def path(chain: Denoiser, t: float | None = None, steps: int = 100) -> dict[str, Any]:
    """Where the steps look: ς, time and α at the start, in the middle and at the end of each, [steps, 3]; and both ends.

    Computed in double precision, of a schedule that is not traced.
    """
    ratio, time, alpha = core_path(chain, t, steps)
    looks = np.arange(steps)[:, None] * 2 + np.arange(3)
    found = {
        name: jnp.asarray(values[looks], float) for name, values in (("ratio", ratio), ("t", time), ("alpha", alpha))
    }
    ends = {"step": math.log(ratio[-1] / ratio[0]) / steps, "alpha_start": alpha[0], "alpha_end": alpha[-1]}
    return {"looks": found, **ends, "scale": float(chain.schedule.in_numbers().end_scale)}


def along(chain: Denoiser, trace: str, path: Path, x_t: jax.Array, rng_key: jax.Array) -> jax.Array:
    """log p(x_t) of each row [B] by the numbers of a path; it may be traced."""
    size = math.prod(x_t.shape[1:])
    signs = jax.random.rademacher(rng_key, (len(x_t), size), x_t.dtype) if trace == "hutchinson" else None

    def slope(y: jax.Array, at: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """dy / d log ς [B, D] and its divergence [B]."""

        def field(y: jax.Array) -> jax.Array:
            said = chain(at["alpha"] * y.reshape(x_t.shape), at["t"])
            return at["ratio"] * said.noise.reshape(y.shape)

        if signs is not None:
            rate, change = jax.jvp(field, (y,), (signs,))
            return rate, (change * signs).sum(-1)
        rate, change = jax.linearize(field, y)
        axes = jnp.broadcast_to(jnp.eye(size, dtype=y.dtype)[:, None], (size, *y.shape))
        return rate, jnp.einsum("dbd->b", jax.vmap(change)(axes))

    def step(state: tuple, looks: Mapping[str, jax.Array]) -> tuple:
        (y, ladj), h = state, path["step"]
        first, middle, last = ({name: values[i] for name, values in looks.items()} for i in range(3))
        k1 = slope(y, first)
        k2 = slope(y + h / 2 * k1[0], middle)
        k3 = slope(y + h / 2 * k2[0], middle)
        k4 = slope(y + h * k3[0], last)
        y, ladj = (now + h / 6 * (a + 2 * b + 2 * c + d) for now, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True))
        return (y, ladj), None

    start = x_t.reshape(len(x_t), size) / path["alpha_start"], jnp.zeros(len(x_t), x_t.dtype)
    (y, ladj), _ = jax.lax.scan(step, start, path["looks"])
    return (
        Normal(0.0, path["scale"] / path["alpha_end"]).log_prob(y).sum(-1) + ladj - size * jnp.log(path["alpha_start"])
    )
