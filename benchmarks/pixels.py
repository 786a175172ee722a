"""Seconds to draw binary images of 784 pixels from a fully visible sigmoid belief network: probgen, and loops by hand.

The weights are random and small, N(0, 0.05²), of the size that training gives; the loops run with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import probgen
from benchmarks.pairs import rounds

SIDE, SPREAD = 28, 0.05
OURS = "probgen, run.sample"
PLAIN, MASKED_ONCE = "by hand, the network at every pixel", "by hand, the same, masked once"
CAREFUL = "by hand, one row at every pixel"
NAMES = {"pyro": "fvsbn", "numpyro": "fvsbn_numpyro"}


def measured(backend: str, n: int, pairs: int) -> dict[str, Any]:
    """Seconds of a draw of n images, of each contender in every round, and the share of ones in the last images."""
    run = trained(backend)
    weight, bias = parts(run.params)
    contenders = {
        OURS: lambda: run.sample(n)["x"],
        PLAIN: lambda: plain(weight, bias, n).numpy(),
        MASKED_ONCE: lambda: masked_once(weight, bias, n).numpy(),
        CAREFUL: lambda: careful(weight, bias, n).numpy(),
    }
    last: dict[str, np.ndarray] = {}
    times = rounds({name: (_kept(last, name, draw), 1) for name, draw in contenders.items()}, pairs)
    ones = {name: float(images.mean()) for name, images in last.items()}
    return {"times": {name: list(values) for name, values in times.items()}, "ones": ones}


def _kept(last: dict[str, np.ndarray], name: str, draw: Callable[[], np.ndarray]) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in range(steps):
            last[name] = draw()

    return run


def trained(backend: str, side: int = SIDE) -> probgen.Run:
    """A run of the zoo's program with weights N(0, `SPREAD`²)."""
    rng = np.random.default_rng(0)
    data = probgen.load_data({"x": (rng.random((128, side, side)) < 0.5).astype(np.float32)})
    program = probgen.load(NAMES[backend], data)
    run = probgen.fit(program, data, steps=1, compile=False, progress=False)
    weights = {
        name: rng.normal(0, SPREAD, value.shape).astype(np.float32) if value.dtype == np.float32 else value
        for name, value in run._weights.items()
    }
    return probgen.Run(program, run.config, weights, run._example, [], data=data)


def parts(params: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """The weights [D, D] and biases [D] of D logistic regressions, from a run on either backend."""
    (name, weight), (_, bias) = sorted(params.items(), key=lambda item: -item[1].ndim)
    weight = weight.T if name.endswith("kernel") else weight  # Flax has a column for each unit
    return torch.from_numpy(weight.copy()), torch.from_numpy(bias.copy())


@torch.no_grad()
def plain(weight: Tensor, bias: Tensor, n: int) -> Tensor:
    """Ask the network for all pixels, keep one; a masked layer multiplies its weights by its mask whenever it is asked."""
    x = torch.zeros(n, len(bias))
    for d in range(len(bias)):
        logits = F.linear(x, torch.tril(weight, -1), bias)
        x[:, d] = torch.bernoulli(torch.sigmoid(logits[:, d]))
    return x


@torch.no_grad()
def masked_once(weight: Tensor, bias: Tensor, n: int) -> Tensor:
    """The same with the mask put on before."""
    x, weight = torch.zeros(n, len(bias)), torch.tril(weight, -1)
    for d in range(len(bias)):
        logits = F.linear(x, weight, bias)
        x[:, d] = torch.bernoulli(torch.sigmoid(logits[:, d]))
    return x


@torch.no_grad()
def careful(weight: Tensor, bias: Tensor, n: int) -> Tensor:
    """Multiply the pixels so far by the row of the next; all random numbers are drawn before, images are columns."""
    x, noise = torch.zeros(len(bias), n), torch.logit(torch.rand(len(bias), n))
    for d in range(len(bias)):
        x[d] = noise[d] < bias[d] + weight[d, :d] @ x[:d]
    return x.T
