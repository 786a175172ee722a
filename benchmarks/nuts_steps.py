"""Milliseconds a draw of NUTS on the Bayesian mixture of Gaussians: probgen's engine, and NumPyro's kernel in a loop by hand.

Both go on from the same seed through the same blocks of draws, so they take the same leapfrog steps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import NUTS as Kernel
from numpyro.util import fori_collect

import probgen
from benchmarks.pairs import rounds
from probgen.data import as_rows
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.fit.recipe import Options
from probgen.numpyro import NUTS

ENGINE, HAND = "probgen.fit (NUTS)", "NumPyro's NUTS by hand"
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
    """`run(steps)` of `numpyro.util.fori_collect`, what `MCMC.run` consists of: its own `run` compiles at every call."""

    def __init__(self, program: Any, x: np.ndarray, steps: int) -> None:
        kernel, arrays = Kernel(program.model), {"x": jnp.asarray(x)}
        self.state = kernel.init(jax.random.key(SEED), WARMUP, None, model_args=(), model_kwargs=arrays)

        def kept(state: Any) -> Any:
            return kernel.postprocess_fn((), arrays)(state.z), state.potential_energy, state.num_steps, state.diverging

        @jax.jit
        def block(state: Any) -> Any:
            move = lambda state: kernel.sample(state, (), arrays)  # noqa: E731
            return fori_collect(0, steps, move, state, transform=kept, progbar=False, return_last_val=True)

        self.block = block
        for _ in range(WARMUP // steps):
            self(steps)

    def __call__(self, steps: int) -> None:
        _, self.state = jax.block_until_ready(self.block(self.state))

    def place(self) -> dict[str, np.ndarray]:
        """Where the chain is."""
        return {name: np.asarray(value) for name, value in self.state.z.items()}
