"""Milliseconds a training step, and a draw of 256 points, of the zoo's flows and of the same flows in other packages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

import probgen
from benchmarks import opponents_flows
from benchmarks.opponents_flows import BINS, FORMS, HIDDEN, LAYERS, SIZE, Opponent, Step
from benchmarks.pairs import rounds
from benchmarks.problems import LR
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.fit import Options
from probgen.pyro import Engine

ADVANCE, DRAW = "probgen.fit (Engine.advance)", "probgen"
PEERS = {"Zuko": "zuko", "normflows": "normflows", "nflows": "nflows"}
BATCH, ROWS = 256, 4096
RACE = 4  # rounds in which the forms of one peer run against each other
Run = Callable[[int], None]

_SPLINES = {"transforms": LAYERS["nsf"], "hidden": HIDDEN, "bins": BINS}
PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "realnvp": ("realnvp", {"couplings": LAYERS["realnvp"], "hidden": HIDDEN}),
    "maf": ("maf", {"transforms": LAYERS["maf"], "hidden": HIDDEN}),
    "nsf": ("spline", _SPLINES),
    "nsf-coupling": ("spline", {**_SPLINES, "coupling": True}),
}


def engine(family: str, compile: bool = True, rows: int = ROWS, batch: int = BATCH) -> Engine:
    """The engine of the zoo's flow, as `probgen.fit` would make it; the rows are not Gaussian, else of no interest."""
    noise = np.random.default_rng(0).standard_normal((rows, SIZE))
    data = probgen.load_data({"x": (noise + 0.5 * np.tanh(2 * np.roll(noise, 1, 1))).astype(np.float32)})
    name, sizes = PROGRAMS[family]
    program = probgen.load(name, data, **sizes)
    feed = Feed(data.train, Preparation.of(program.prepare, data), batch, 0)
    options = Options(steps=10**6, batch_size=batch, lr=LR, device="cpu", compile=compile)
    return Engine(program, None, feed, options)


def builders(family: str) -> dict[str, Callable[[], Opponent]]:
    """What makes the flow of each peer that is installed."""
    makers = {peer: getattr(opponents_flows, module) for peer, module in PEERS.items() if find_spec(module)}
    return {peer: lambda make=make: _seeded(make, family) for peer, make in makers.items()}


def _seeded(make: Callable[[str], Opponent], family: str) -> Opponent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(family)


# -- training ---------------------------------------------------------------------------------------------------------


def measured(family: str, pairs: int, steps: int) -> dict[str, Any]:
    """Seconds a step of every contender in every round, and what is to be said of each.

    A peer takes part in the fastest of its forms; `forms` holds the seconds of all of them, or why one does not run.
    """
    pyro.enable_validation(False)
    ours = engine(family)
    ready, run = readied(advanced(ours))
    found: dict[str, Any] = {
        "ready": {ADVANCE: ready},
        "parameters": {ADVANCE: sum(p.numel() for p in ours.leaves.params.values())},
        "chosen": {ADVANCE: "compiled" if ours.compiled else "eager"},
        "forms": {ADVANCE: {}},
    }
    runs = {ADVANCE: run}
    for peer, build in builders(family).items():
        found["parameters"][peer] = sum(p.numel() for p in build().parameters())
        found["forms"][peer], able = raced(build, ours.feed, steps)
        form = min(able, key=found["forms"][peer].get)
        found["chosen"][peer], (found["ready"][peer], runs[peer]) = form, able[form]
    times = rounds({name: (run, steps) for name, run in runs.items()}, pairs)
    return {**found, "times": {name: list(values) for name, values in times.items()}}


def raced(
    build: Callable[[], Any], feed: Feed, steps: int, forms: Mapping[str, Callable[..., Step]] = FORMS
) -> tuple[dict[str, Any], dict[str, tuple[float, Run]]]:
    """Seconds a step of each form, or its error in words; and the forms that run, each with the seconds until it did."""
    said: dict[str, Any] = {}
    able: dict[str, tuple[float, Run]] = {}
    for form, make in forms.items():
        try:
            able[form] = readied(fed(make(build(), LR), feed))
        except Exception as error:  # whatever torch.compile says of a peer's code, its next form runs
            said[form] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    times = rounds({form: (run, steps) for form, (_, run) in able.items()}, RACE)
    return said | {form: float(np.median(values)) for form, values in times.items()}, able


def readied(run: Run) -> tuple[float, Run]:
    began = time.perf_counter()
    run(3)
    return time.perf_counter() - began, run


def advanced(engine: Engine) -> Run:
    """The engine as `fit` calls it: batches drawn, the metrics of all steps read at the end of the chunk."""
    held = [engine.start(), 0]

    def run(steps: int) -> None:
        state, first = held
        held[:] = engine.advance(state, first, first + steps)[0], first + steps

    return run


def fed(step: Step, feed: Feed) -> Run:
    """A hand-written step on the same batches, gathered in its graph; losses read at the end of the chunk."""
    data, place = torch.as_tensor(feed.resident()["x"], dtype=torch.float32), [0]

    def run(steps: int) -> None:
        rows = torch.from_numpy(feed.indices(place[0], place[0] + steps))
        torch.stack([step(data, row) for row in rows.unbind()]).numpy()
        place[0] += steps

    return run


# -- drawing ----------------------------------------------------------------------------------------------------------


def drawn(family: str, pairs: int, steps: int, compile: bool) -> dict[str, Any]:
    """Seconds a draw of 256 points from each flow, as the packages ship it or through `torch.compile`.

    Without gradients; ours is the distribution of the program's own site. `failed` says what cannot be compiled.
    """
    pyro.enable_validation(False)
    draws = {DRAW: _site(engine(family, compile=False)).sample}
    draws |= {peer: _drawing(build()) for peer, build in builders(family).items()}
    runs, failed = {}, {}
    with torch.no_grad():
        for name, draw in draws.items():
            draw = torch.compile(draw) if compile else draw
            try:
                draw()
            except Exception as error:  # whatever torch.compile says of a peer's code, the others are timed
                failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
            else:
                runs[name] = repeated(draw)
        times = rounds({name: (run, steps) for name, run in runs.items()}, pairs)
    return {"times": {name: list(values) for name, values in times.items()}, "failed": failed}


def _site(engine: Engine) -> Any:
    """The distribution of the site x, for a batch."""
    x = torch.as_tensor(engine.feed.batch(0)["x"], dtype=torch.float32)
    with pyro.get_param_store().scope():
        fn = poutine.trace(engine.program.model).get_trace(x=x).nodes["x"]["fn"]
    fn.log_prob(x)  # ActNorm looks at its first batch
    return fn


def _drawing(model: Opponent) -> Callable[[], Tensor]:
    return lambda: model.draw(BATCH)


def repeated(draw: Callable[[], Tensor]) -> Run:
    def run(steps: int) -> None:
        for _ in range(steps):
            draw()

    return run
