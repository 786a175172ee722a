"""Milliseconds a step on NumPyro: a jitted `svi.update`, probgen's engine, and a `lax.scan` written by hand."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.opponents_numpyro import scan, update_loop
from benchmarks.pairs import rounds
from benchmarks.problems import LR, PROBLEMS, Setting, setting
from models.autoencoders.vae_numpyro import convolutional, dense
from probgen.numpyro import Engine

STOCK, ADVANCE, HAND = "jitted svi.update", "probgen.fit (Engine.advance)", "by hand, lax.scan + gather"


def networks(problem: Any) -> tuple[Any, Any]:
    """The zoo's encoder and decoder."""
    if problem.network == "conv":
        return convolutional((problem.side, problem.side), problem.z_dim, problem.hidden)
    return dense(problem.side**2, problem.z_dim, problem.hidden)


def contenders(name: str, device: str = "cpu", only: str | None = None) -> dict[str, Callable[[int], None]]:
    """What takes turns, or only one of them: each a `run(steps)` that is not compiled yet."""
    made = setting(PROBLEMS[name], "numpyro", device)
    engine = Engine(made.program, None, made.feed, made.options)
    makers = {
        STOCK: lambda: update_loop(made.program, jnp.asarray(made.feed.batch(0)["x"], jnp.float32), LR),
        ADVANCE: lambda: _advanced(engine),
        HAND: lambda: _scanned(made, engine.start()["params"]),
    }
    return {contender: make() for contender, make in makers.items() if only in (None, contender)}


def measured(name: str, pairs: int, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Seconds a step of every contender in every round, and the seconds until each was ready."""
    runs, ready = contenders(name, device), {}
    for contender, run in runs.items():
        began = time.perf_counter()
        run(steps)
        ready[contender] = time.perf_counter() - began
    times = rounds({contender: (run, steps) for contender, run in runs.items()}, pairs)
    return {"times": {contender: list(values) for contender, values in times.items()}, "ready": ready}


def grown(batch: int, hidden: int, pairs: int, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Seconds a step of the engine and of a jitted `svi.update`, at another batch size and width of the small VAE."""
    made = setting(replace(PROBLEMS["small"], batch=batch, hidden=hidden), "numpyro", device)
    engine = Engine(made.program, None, made.feed, made.options)
    x = jnp.asarray(made.feed.batch(0)["x"], jnp.float32)
    runs = {STOCK: (update_loop(made.program, x, LR), steps), ADVANCE: (_advanced(engine), steps)}
    return {name: list(values) for name, values in rounds(runs, pairs).items()}


def peak_memory(name: str, contender: str | None, steps: int = 50) -> float:
    """Mebibytes at the peak of a process that imports everything and, if one is named, trains one contender."""
    if contender is not None:
        contenders(name, only=contender)[contender](steps)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _advanced(engine: Engine) -> Callable[[int], None]:
    held = [engine.start(), 0]

    def run(steps: int) -> None:
        state, first = held
        held[:] = engine.advance(state, first, first + steps)[0], first + steps

    return run


def _scanned(made: Setting, start: Any) -> Callable[[int], None]:
    state, chunk = scan(networks(made.problem), start, LR)
    data, key, held = jnp.asarray(made.feed.resident()["x"], jnp.float32), jax.random.key(0), [state, 0]

    def run(steps: int) -> None:
        state, first = held
        rows = jnp.asarray(made.feed.indices(first, first + steps).astype(np.int32))
        state, losses = chunk(state, key, data, rows)
        np.asarray(losses)
        held[:] = state, first + steps

    return run
