"""DDPM's training step written by hand: the opponents of the engines. Those in torch belong into a file of their own.

`scan` takes a chunk of steps in one jitted `lax.scan` with donated state, Adam by optax, its batches gathered inside from
rows that lie on the device. It leaves out the norm of the gradient, which the engine records at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probgen.diffusion import CosineSchedule


def simple_loss(weights: Any, net: Any, table: jax.Array, t: jax.Array, noise: jax.Array, x: jax.Array) -> jax.Array:
    """‖ε − ε̂(α_t x + σ_t ε, t / T)‖² at t ∈ 1..T, averaged; `table` holds α and σ of every step, [2, T]."""
    alpha, sigma = table[:, t - 1, None]
    said = net.apply({"params": weights}, alpha * x + sigma * noise, t / table.shape[1])
    return jnp.mean((said - noise) ** 2)


def tabled(T: int) -> jax.Array:
    """α and σ of the cosine schedule at 1/T, ..., 1, as a training script would keep them, [2, T]."""
    times = np.arange(1, T + 1) / T
    return jnp.asarray(np.stack([CosineSchedule().alpha(times), CosineSchedule().sigma(times)]), jnp.float32)


def scan(net: Any, weights: Any, lr: float, T: int) -> tuple[Any, Callable[..., Any]]:
    """(state, `chunk(state, key, data, rows [S, B]) -> (state, losses [S])`)."""
    adam, table = optax.adam(lr), tabled(T)
    weights = jax.tree.map(jnp.array, weights)
    start = (weights, adam.init(weights), jnp.zeros((), jnp.int32))

    def chunk(state: Any, key: jax.Array, data: jax.Array, rows: jax.Array) -> tuple[Any, jax.Array]:
        def step(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            weights, slots, i = state
            x, (own, other) = data[rows], jax.random.split(jax.random.fold_in(key, i))
            t, noise = jax.random.randint(own, (len(x),), 1, T + 1), jax.random.normal(other, x.shape)
            loss, gradient = jax.value_and_grad(simple_loss)(weights, net, table, t, noise, x)
            change, slots = adam.update(gradient, slots)
            return (optax.apply_updates(weights, change), slots, i + 1), loss

        return jax.lax.scan(step, state, rows)

    return start, jax.jit(chunk, donate_argnums=0)
