"""The same VAE step written by hand in JAX: the opponents of the NumPyro engine.

`scan` takes a chunk of steps in one jitted `lax.scan` with donated state, its batches gathered inside from rows that
lie on the device. `update_loop` is NumPyro's own: a jitted `svi.update` called from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

B1, B2, EPS = 0.9, 0.999, 1e-8


def negative_elbo(weights: Mapping[str, Any], key: jax.Array, x: jax.Array, networks: Any, closed: bool) -> jax.Array:
    """−ELBO in nats per datum; the KL in closed form, or at the draw of z as `Trace_ELBO` takes it."""
    encoder, decoder = networks
    mean, log_scale = jnp.split(encoder.apply({"params": weights["encoder$params"]}, x), 2, -1)
    noise = jax.random.normal(key, mean.shape)
    z = mean + jnp.exp(log_scale) * noise
    logits = decoder.apply({"params": weights["decoder$params"]}, z)
    x = x.reshape(len(x), -1)
    nll = jnp.sum(jnp.maximum(logits, 0) - logits * x + jnp.log1p(jnp.exp(-jnp.abs(logits))))
    if closed:
        kl = jnp.sum(0.5 * (jnp.exp(2 * log_scale) + mean**2 - 1) - log_scale)
    else:
        kl = jnp.sum(0.5 * (z**2 - noise**2) - log_scale)
    return (nll + kl) / len(x)


def scan(networks: Any, weights: Any, lr: float, closed: bool = True) -> tuple[Any, Callable[..., Any]]:
    """(state, `chunk(state, key, data, rows [S, B]) -> (state, losses [S])`)."""
    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = (jax.tree.map(jnp.array, weights), zeros, jax.tree.map(jnp.array, zeros), jnp.zeros((), jnp.int32))

    def chunk(state: Any, key: jax.Array, data: jax.Array, rows: jax.Array) -> tuple[Any, jax.Array]:
        def step(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            p, m, v, t = state
            noise = jax.random.fold_in(key, t)
            loss, g = jax.value_and_grad(negative_elbo)(p, noise, data[rows], networks, closed)
            t = t + 1
            m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, m, g)
            v = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g * g, v, g)
            rate, shrink = lr / (1 - B1**t), 1 / (1 - B2**t)
            p = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v * shrink) + EPS), p, m, v)
            return (p, m, v, t), loss

        return jax.lax.scan(step, state, rows)

    return state, jax.jit(chunk, donate_argnums=0)


def update_loop(program: Any, x: jax.Array, lr: float) -> Callable[[int], None]:
    """`run(steps)`: NumPyro's own SVI on one batch, `update` jitted, called once a step."""
    svi = numpyro.infer.SVI(program.model, program.guide, numpyro.optim.Adam(lr), numpyro.infer.Trace_ELBO())
    held = [svi.init(jax.random.key(0), x)]
    update = jax.jit(svi.update)

    def run(steps: int) -> None:
        state = held[0]
        for _ in range(steps):
            state, loss = update(state, x)
        loss.block_until_ready()
        held[0] = state

    return run
