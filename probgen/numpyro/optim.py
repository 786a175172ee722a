"""Optimizers by name or as optax transformations, with the learning rate read at every step.

Names mean what they mean in PyTorch, so that twins of a program take the same steps on both backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from probgen.errors import ProbgenError, did_you_mean
from probgen.play import Optimistic, play_of
from probgen.schedules import value_at

NAMES = {
    "adam": lambda: optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
    "adamw": lambda: optax.chain(optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8), optax.add_decayed_weights(1e-2)),
    "sgd": optax.identity,
    "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-20),
    "rmsprop": lambda: optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False),
}


class Optimizer:
    """One player's optimizer: a transformation, and the rate by which its updates are scaled.

    A name, or a function of the learning rate (`functools.partial(optax.adam, b1=0.5)`), is scaled by −lr · schedule(step);
    an optax transformation brings its own learning rate and sign, and only the schedule scales it.
    """

    def __init__(self, optimizer: Any, lr: Any, schedule: Any, clip: float | None) -> None:
        self.play, inner = play_of(optimizer)
        self.transform, self.own_rate = _resolve(inner)
        if self.play == Optimistic.name:
            self.transform = optax.chain(self.transform, optax.scale_by_optimistic_gradient(alpha=1.0, beta=1.0))
        self.lr, self.schedule, self.clip = lr, schedule, clip

    def init(self, params: Any) -> Any:
        """The optimizer's state for fresh parameters."""
        return self.transform.init(params if self.own_rate else _flat(params))

    def update(self, grads: Any, state: Any, params: Any, step: Any) -> tuple[Any, Any, jax.Array]:
        """New parameters, new state, and the gradient's norm before it was clipped."""
        flat, unravel = ravel_pytree(grads)
        norm = jnp.sqrt(jnp.vdot(flat, flat))
        if self.clip is not None:
            flat = flat * jnp.minimum(1.0, self.clip / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        rate = 1.0 if self.schedule is None else value_at(self.schedule, step)
        if self.own_rate:
            updates, state = self.transform.update(unravel(flat), state, params)
        else:  # one long vector is updated faster than many small arrays
            updates, state = self.transform.update(flat, state, _flat(params))
            updates, rate = unravel(updates), -rate * value_at(self.lr, step)
        params = jax.tree.map(lambda p, u: p + jnp.asarray(rate, p.dtype) * u, params, updates)
        return params, state, norm


def _flat(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]


def _resolve(optimizer: Any) -> tuple[optax.GradientTransformation, bool]:
    if isinstance(optimizer, str):
        if optimizer not in NAMES:
            raise ProbgenError(f"optimizer={optimizer!r} is not known{did_you_mean(optimizer, NAMES)}")
        return NAMES[optimizer](), False
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return optimizer, True
    if callable(optimizer):
        return optax.chain(optimizer(learning_rate=1.0), optax.scale(-1.0)), False
    raise ProbgenError(
        f"optimizer={optimizer!r} is neither a name ({', '.join(NAMES)}), nor an optax transformation such as optax.adam(1e-3), nor "
        "a function of the learning rate such as functools.partial(optax.adam, b1=0.5)"
    )


def of_player(value: Any, name: str, what: str) -> Any:
    """A player's share of an option that may be a mapping by player."""
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ProbgenError(f"`{what}` names no value for the player {name!r}{did_you_mean(name, value)}")
    return value[name]
