"""Milliseconds a draw of NUTS on the Bayesian mixture of Gaussians: probgen's engine, and `numpyro.infer.MCMC` by hand.

Both go on from the same seed through the same blocks of draws, so they take the same leapfrog steps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC
from numpyro.infer import NUTS as Kernel

import probgen
from benchmarks.pairs import rounds
from probgen.data import as_rows
from probgen.feed import Feed
from probgen.numpyro import NUTS
from probgen.prepare import Preparation
from probgen.recipe import Options

ENGINE, HAND = "probgen.fit (NUTS)", "numpyro.infer.MCMC by hand"
ROWS, COMPONENTS, WARMUP, SEED = 500, 3, 300, 0


def measured(pairs: int, steps: int) -> dict[str, Any]:
    """Seconds a draw of both in every round, and by how much their last places differ."""
    data = probgen.load_data("two-moons")
    x = np.asarray(data.train[np.arange(ROWS)]["x"], np.float32)
    program = probgen.load("gmm_numpyro", data, components=COMPONENTS, bayesian=True)
    engine, by_hand = Engine(program, x), ByHand(program, x, steps)
    times = rounds({ENGINE: (engine, steps), HAND: (by_hand, steps)}, pairs)
    ours, theirs = engine.place(), by_hand.place()
    apart = max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)
    return {"times": {name: list(values) for name, values in times.items()}, "apart": apart}


class Engine:
    """`run(steps)` of the engine that `probgen.fit` drives, after the warm-up."""

    def __init__(self, program: Any, x: np.ndarray) -> None:
        by = NUTS(draws=10**6, warmup=WARMUP, chains=1)
        feed = Feed(as_rows({"x": x}), Preparation({}, {}), None, SEED)
        options = Options(steps=10**6, batch_size=None, device="cpu", seed=SEED)
        self.engine = by.engine(program, by, feed, options)
        self.state, _ = self.engine.advance(self.engine.start(), 0, WARMUP)

    def __call__(self, steps: int) -> None:
        first = self.state["step"]
        self.state, _ = self.engine.advance(self.state, first, first + steps)

    def place(self) -> dict[str, np.ndarray]:
        """Where the chain is."""
        return {name: np.asarray(value) for name, value in self.state["chains"][0].z.items()}


class ByHand:
    """`run(steps)` of a warmed-up `MCMC`, going on from its last state."""

    def __init__(self, program: Any, x: np.ndarray, steps: int) -> None:
        self.x = jnp.asarray(x)
        self.mcmc = MCMC(Kernel(program.model), num_warmup=WARMUP, num_samples=steps, progress_bar=False)
        self.mcmc.warmup(jax.random.key(SEED), x=self.x)

    def __call__(self, steps: int) -> None:
        self.mcmc.run(self.mcmc.post_warmup_state.rng_key, x=self.x)
        self.mcmc.post_warmup_state = jax.block_until_ready(self.mcmc.last_state)

    def place(self) -> dict[str, np.ndarray]:
        """Where the chain is."""
        return {name: np.asarray(value) for name, value in self.mcmc.last_state.z.items()}
