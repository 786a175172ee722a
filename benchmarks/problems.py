"""What is timed: the zoo's VAE at three sizes, on data whose values do not matter to a clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import probgen
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.fit import Options

LR = 1e-3


@dataclass(frozen=True)
class Problem:
    """A VAE: images of `side` × `side` bits, one hidden layer (or convolutions), a latent code, a batch size."""

    side: int
    hidden: int
    z_dim: int
    batch: int
    network: str = "dense"
    rows: int = 4096

    @property
    def words(self) -> str:
        """As in "64-64-8, batch 64"."""
        if self.network == "conv":
            return f"convolutional, {self.side}x{self.side}, z {self.z_dim}, batch {self.batch}"
        return f"{self.side**2}-{self.hidden}-{self.z_dim}, batch {self.batch}"


PROBLEMS = {
    "small": Problem(8, 64, 8, 64),
    "medium": Problem(28, 400, 20, 128),
    "conv": Problem(28, 128, 16, 64, network="conv", rows=1024),
}


@dataclass(frozen=True)
class Setting:
    """A problem made ready for one backend."""

    problem: Problem
    program: Any
    feed: Feed
    options: Options


def setting(problem: Problem, backend: str, device: str = "cpu", compile: bool = True) -> Setting:
    """Program, feed and options, as `probgen.fit` would make them."""
    bits = np.random.default_rng(0).random((problem.rows, problem.side, problem.side)) < 0.5
    data = probgen.load_data({"x": bits.astype(np.float32)})
    name = {"pyro": "vae", "numpyro": "vae_numpyro"}[backend]
    sizes = {"z_dim": problem.z_dim, "hidden": problem.hidden, "network": problem.network}
    program = probgen.load(name, data, **sizes, likelihood="bernoulli")
    feed = Feed(data.train, Preparation.of(program.prepare, data), problem.batch, 0)
    options = Options(steps=10**6, batch_size=problem.batch, lr=LR, device=device, compile=compile)
    return Setting(problem, program, feed, options)
