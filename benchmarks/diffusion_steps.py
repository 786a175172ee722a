"""Milliseconds a training step of the zoo's DDPM, and of the same network and loss in loops written by hand.

Each backend is measured in a process of its own; JAX and torch are imported where they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import probgen
from benchmarks.pairs import rounds
from benchmarks.problems import LR
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.fit import Options
from probgen.program import backend_of

ADVANCE, SCAN = "probgen.fit (Engine.advance)", "by hand, lax.scan + optax"
BATCH, STEPS = 128, 20  # rows, and T
SIZES = {"steps": STEPS, "hidden": 128, "layers": 3}
Run = Callable[[int], None]


def engine(name: str, batch: int = BATCH, **sizes: Any) -> Any:
    """The engine of the zoo's DDPM on two moons with ‖ε − ε̂‖² as its loss, as `probgen.fit` would make it."""
    data = probgen.load_data("two-moons")
    program = probgen.load(name, data, **{**SIZES, **sizes})
    feed = Feed(data.train, Preparation.of(program.prepare, data), batch, 0)
    options = Options(steps=10**6, batch_size=batch, lr=LR, device="cpu")
    return backend_of(program).Engine(program, None, feed, options)


def measured(backend: str, pairs: int, steps: int) -> dict[str, Any]:
    """Seconds a step of every contender in every round, and the seconds until each was ready."""
    runs, ready = CONTENDERS[backend](), {}
    for contender, run in runs.items():
        began = time.perf_counter()
        run(steps)
        ready[contender] = time.perf_counter() - began
    times = rounds({contender: (run, steps) for contender, run in runs.items()}, pairs)
    return {"times": {contender: list(values) for contender, values in times.items()}, "ready": ready}


def advanced(engine: Any) -> Run:
    """The engine as `fit` calls it: batches drawn, the metrics of all steps read at the end of the chunk."""
    held = [engine.start(), 0]

    def run(steps: int) -> None:
        state, first = held
        held[:] = engine.advance(state, first, first + steps)[0], first + steps

    return run


# -- NumPyro ----------------------------------------------------------------------------------------------------------


def on_numpyro() -> dict[str, Run]:
    """The engine, and a scan by hand over the same rows, from the same weights."""
    ours = engine("ddpm_numpyro")
    return {ADVANCE: advanced(ours), SCAN: _scanned(ours)}


def _scanned(engine: Any) -> Run:
    import jax
    import jax.numpy as jnp

    from benchmarks.opponents_diffusion import scan
    from probgen.numpyro.nn import DenoisingMLP

    net = DenoisingMLP((2,), SIZES["hidden"], SIZES["layers"])
    state, chunk = scan(net, engine.start()["params"]["network$params"], LR, STEPS)
    data, key, held = jnp.asarray(engine.feed.resident()["x"], jnp.float32), jax.random.key(0), [state, 0]

    def run(steps: int) -> None:
        state, first = held
        rows = jnp.asarray(engine.feed.indices(first, first + steps).astype(np.int32))
        state, losses = chunk(state, key, data, rows)
        np.asarray(losses)
        held[:] = state, first + steps

    return run


# -- Pyro: `on_pyro` with its opponents belongs here, and into CONTENDERS ----------------------------------------------

CONTENDERS: dict[str, Callable[[], dict[str, Run]]] = {"numpyro": on_numpyro}
