"""Milliseconds a step on Pyro: its own SVI, probgen's, and the same step written by hand."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.infer
import pyro.optim
import torch

from benchmarks.opponents_pyro import Parameters, loss_only, whole
from benchmarks.pairs import rounds
from benchmarks.problems import LR, PROBLEMS, Problem, Setting, setting
from models.autoencoders.vae import convolutional, dense
from probgen.pyro import SVI, Engine

STOCK, DROP_IN, ADVANCE = "pyro.infer.SVI.step", "probgen.pyro.SVI.step", "probgen.fit (Engine.advance)"
HAND, HAND_FED, IDIOM = "by hand, whole step", "by hand, whole step + gather", "by hand, loss only compiled"


def parameters(problem: Problem, seed: int = 0) -> Parameters:
    """Fresh weights of the zoo's networks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if problem.network == "conv":
            encoder, decoder = convolutional((problem.side, problem.side), problem.z_dim, problem.hidden)
            return Parameters(encoder, decoder, inner=decoder[2].unflattened_size)
        return Parameters(*dense(problem.side**2, problem.z_dim, problem.hidden))


def contenders(name: str, device: str = "cpu", only: str | None = None) -> dict[str, Callable[[int], None]]:
    """What takes turns, or only one of them: each a `run(steps)` that is not compiled yet."""
    made = setting(PROBLEMS[name], "pyro", device)
    x = torch.as_tensor(made.feed.batch(0)["x"], dtype=torch.float32, device=device)
    fresh = functools.partial(parameters, made.problem)
    makers = {
        STOCK: lambda: _svi(pyro.infer.SVI, made, x),
        DROP_IN: lambda: _svi(SVI, setting(PROBLEMS[name], "pyro", device), x),
        HAND: lambda: _read(whole(fresh(), LR, closed=False, device=device), x),
        ADVANCE: lambda: _advanced(made),
        HAND_FED: lambda: _fed(whole(fresh(), LR, closed=True, device=device), made, device),
        IDIOM: lambda: _read(loss_only(fresh(), LR, closed=False, device=device), x),
    }
    return {contender: make() for contender, make in makers.items() if only in (None, contender)}


def measured(name: str, pairs: int, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Seconds a step of every contender in every round, and the seconds until each was ready."""
    pyro.enable_validation(False)  # Pyro's own steps are timed at their best
    runs, ready = contenders(name, device), {}
    for contender, run in runs.items():
        began = time.perf_counter()
        run(3)  # Pyro's own first step makes the parameters, the next one compiles
        ready[contender] = time.perf_counter() - began
    times = rounds({contender: (run, steps) for contender, run in runs.items()}, pairs)
    return {"times": {contender: list(values) for contender, values in times.items()}, "ready": ready}


def _svi(kind: Any, made: Setting, x: torch.Tensor) -> Callable[[int], None]:
    """An SVI in a parameter store of its own."""
    svi = kind(made.program.model, made.program.guide, pyro.optim.Adam({"lr": LR}), pyro.infer.Trace_ELBO())
    held: dict[str, Any] = {"params": {}, "constraints": {}}

    def run(steps: int) -> None:
        with pyro.get_param_store().scope(held):
            for _ in range(steps):
                svi.step(x)

    return run


def _read(step: Callable[..., torch.Tensor], x: torch.Tensor) -> Callable[[int], None]:
    """A hand-written step on one batch, its loss read as a number each time, as `SVI.step` does."""

    def run(steps: int) -> None:
        for _ in range(steps):
            step(x).item()

    return run


def _advanced(made: Setting) -> Callable[[int], None]:
    """The engine as `fit` calls it: batches drawn, the metrics of all steps read at the end of the chunk."""
    engine = Engine(made.program, None, made.feed, made.options)
    held = [engine.start(), 0]

    def run(steps: int) -> None:
        state, first = held
        held[:] = engine.advance(state, first, first + steps)[0], first + steps

    return run


def _fed(step: Callable[..., torch.Tensor], made: Setting, device: str) -> Callable[[int], None]:
    """A hand-written step on the same batches, gathered in its graph; losses read at the end of the chunk."""
    data = torch.as_tensor(made.feed.resident()["x"], dtype=torch.float32, device=device)
    place = [0]

    def run(steps: int) -> None:
        rows = torch.from_numpy(made.feed.indices(place[0], place[0] + steps)).to(device)
        losses = [step(data, row) for row in rows.unbind()]
        torch.stack(losses).cpu().numpy()
        place[0] += steps

    return run


def grown(batch: int, hidden: int, pairs: int, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Seconds a step of the engine and of Pyro's SVI, at another batch size and width of the small VAE."""
    pyro.enable_validation(False)
    made = setting(replace(PROBLEMS["small"], batch=batch, hidden=hidden), "pyro", device)
    x = torch.as_tensor(made.feed.batch(0)["x"], dtype=torch.float32, device=device)
    runs = {STOCK: (_svi(pyro.infer.SVI, made, x), steps), ADVANCE: (_advanced(made), steps)}
    return {name: list(values) for name, values in rounds(runs, pairs).items()}


def peak_memory(name: str, contender: str | None, steps: int = 50) -> float:
    """Mebibytes at the peak of a process that imports everything and, if one is named, trains one contender."""
    pyro.enable_validation(False)
    if contender is not None:
        contenders(name, only=contender)[contender](steps)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
