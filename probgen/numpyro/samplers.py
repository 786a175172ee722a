"""The loop of a sampler in JAX, compiled as one scan over the steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from probgen.diffusion.samplers import Numbers, Sampler
from probgen.numpyro.denoiser import Denoiser


def sampled(chain: Denoiser, sampler: Sampler, start: jax.Array, rng_key: jax.Array) -> jax.Array:
    """From x_1 = `start` to data as the chain sees them, [B, *shape]."""
    chain = chain.guided(sampler.guidance)
    return jax.jit(lambda *args: looped(chain, sampler, *args))(table(chain, sampler), start, rng_key)


def table(chain: Denoiser, sampler: Sampler) -> dict[str, jax.Array]:
    """What each step is told, [steps] each, computed in double precision; of a schedule that is not traced."""
    return {name: jnp.asarray(values, float) for name, values in sampler.numbers(chain).items()}


def looped(chain: Denoiser, sampler: Sampler, table: Numbers, start: jax.Array, rng_key: jax.Array) -> jax.Array:
    """The same by the numbers of a table; it may be traced."""

    def noise(key: jax.Array) -> list[jax.Array]:
        return list(jax.random.normal(key, (sampler.noises, *start.shape), start.dtype))

    def step(state: tuple, told: tuple) -> tuple:
        at, key = told
        return sampler.step(chain, state[0], at, noise(key), state[1]), None

    keys, cut = jax.random.split(rng_key, len(table["t"])), {name: values[:-1] for name, values in table.items()}
    (x, memory), _ = jax.lax.scan(step, (start, sampler.start(start)), (cut, keys[:-1]))
    return sampler.last(chain, x, {name: values[-1] for name, values in table.items()}, noise(keys[-1]), memory)
