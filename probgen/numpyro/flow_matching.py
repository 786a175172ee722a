"""Losses at a random time of [0, 1]: what a network says of x_t = α_t x + σ_t z, against what it ought to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute

from probgen.arrays import rows_mean
from probgen.diffusion.coupling import Coupled, assigned
from probgen.diffusion.denoiser import Prediction
from probgen.diffusion.requirements import denoiser_of
from probgen.diffusion.samplers import first_time
from probgen.numpyro.denoiser import Denoiser
from probgen.numpyro.loss import Loss, Result
from probgen.numpyro.trace import Buffers, bound, own_containers, rows_factor
from probgen.program import Player, Program, rows_of

Arrays = Mapping[str, jax.Array]


@dataclass(frozen=True)
class FlowMatching(Coupled, Loss):
    """E ‖u(x_t, t) − (dα/dt x + dσ/dt z)‖², t ~ U(0, 1): a velocity that carries the data to noise and back.

    Another way to learn the same continuous flow: u is what the program's flow integrates, and no solver runs. z is
    paired with x by `coupling`: "independent"; "ot", the optimal transport between the rows of the batch and as many draws
    of noise, found on the host, which straightens the paths; or "given", the array `z` of the data (rectified flows: the
    noise from which a first flow has drawn x). With dimensions averaged.

    Parameters
    ----------
    coupling
        Of data and noise.

    References:
        | Flow matching (Lipman et al., 2022), arXiv:2210.02747;   Rectified flow (Liu et al., 2022), arXiv:2209.03003
        | Minibatch optimal transport (Tong et al., 2023), arXiv:2302.00482
    """

    def players(self, program: Program) -> dict[str, Player]:
        """One: the program, whose weights are all that its denoiser touches."""

        def of_rows(chain: Denoiser, x: jax.Array, arrays: Arrays, key: jax.Array) -> jax.Array:
            own, other = jax.random.split(key)
            noise = self.paired(x, arrays, own)
            t, said = noisy(chain, x, noise, 0.0, other)
            return rows_mean((said.output - self.wanted(chain, x, noise, t)) ** 2)

        return {"program": denoising_player(program, "FlowMatching", of_rows)}

    def paired(self, x: jax.Array, arrays: Arrays, rng_key: jax.Array) -> jax.Array:
        """z of each row."""
        if self.coupling == "given":
            return self.given(x, arrays)
        noise = jax.random.normal(rng_key, x.shape, x.dtype)
        return noise[assignment(x, noise)] if self.coupling == "ot" else noise


def assignment(x: jax.Array, noise: jax.Array) -> jax.Array:
    """The row of `noise` that goes with each of `x` at the least sum of squared distances, [B]; found on the host."""
    a, b = x.reshape(len(x), -1), noise.reshape(len(noise), -1)
    cost = jnp.square(a[:, None] - b[None]).sum(-1)
    like = jax.ShapeDtypeStruct((len(x),), jnp.int32)
    return jax.pure_callback(lambda cost: assigned(cost).astype(np.int32), like, jax.lax.stop_gradient(cost))


def noisy(
    chain: Denoiser, x: jax.Array, noise: jax.Array, first: float, rng_key: jax.Array
) -> tuple[jax.Array, Prediction]:
    """A time for each row, [B], evenly spread over [first, 1] and moved by one random number; and what is said of x_t."""
    places = jnp.arange(len(x), dtype=x.dtype) / len(x)
    t = first + (1 - first) * ((jax.random.uniform(rng_key, (), x.dtype) + places) % 1)
    return t, chain(chain.noised(x, t, noise), t)


def matched_noise(chain: Denoiser, x: jax.Array, arrays: Arrays, rng_key: jax.Array) -> jax.Array:
    """σ_t² ‖s(x_t, t) − ∇ log q(x_t | x)‖² = ‖ε − ε̂‖² with dimensions averaged, [B], at a random time for each row."""
    own, other = jax.random.split(rng_key)
    noise = jax.random.normal(own, x.shape, x.dtype)
    _, said = noisy(chain, x, noise, first_time(chain), other)
    return rows_mean((noise - said.noise) ** 2)


def denoising_player(program: Program, loss: str, of_rows: Callable[..., jax.Array]) -> Player:
    """The one player of a loss that asks the denoiser at times of its own; `of_rows(chain, x, arrays, key)` gives [B]."""
    denoiser = bound(denoiser_of(program, loss), like=program.model)

    def objective(rng_key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> Result:
        buffers, (own, other) = Buffers(), jax.random.split(rng_key)
        with buffers, substitute(data=own_containers(params)), seed(rng_seed=other):
            chain = denoiser(**arrays)
            losses = of_rows(chain, chain.embed(arrays[chain.site]), arrays, own)
        scale = rows_factor(model, rows_of(arrays))
        return {"loss": losses.sum() * scale, "mutable_state": dict(buffers.held) or None}

    return Player((program.model, program.denoiser), objective)
