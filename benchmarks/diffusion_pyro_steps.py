"""Milliseconds a training step, and a draw in 50 steps, of the zoo's diffusion and flow matching and of other packages'."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

import probgen
from benchmarks.flow_steps import RACE, Run, advanced, raced, readied, repeated
from benchmarks.opponents_diffusion_pyro import PEERS, STEPS, Opponent
from benchmarks.pairs import rounds
from benchmarks.problems import LR
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.diffusion import DDIM
from probgen.fit import Options
from probgen.pyro import Engine
from probgen.pyro.nn import DenoisingMLP, UNet
from probgen.pyro.trained import Trained

ADVANCE, DRAW = "probgen.fit (Engine.advance)", "probgen, run.sample(sampler=DDIM(50))"
ROWS = 1024
MODELS = {"noise": "ddpm", "velocity": "flow_matching"}  # by what the network predicts


@dataclass(frozen=True)
class Case:
    """A network of the zoo and the rows that it sees."""

    shape: tuple[int, ...]
    hidden: int
    layers: int
    batch: int

    def network(self) -> nn.Module:
        """A fresh one, as the zoo makes it."""
        return (UNet if len(self.shape) > 1 else DenoisingMLP)(self.shape, self.hidden, self.layers)


CASES = {"unet": Case((16, 16), 16, 2, 64), "dense": Case((2,), 64, 3, 128)}


def engine(predicts: str, case: Case, compile: bool = True, rows: int = ROWS) -> Engine:
    """The engine of the zoo's program, as `probgen.fit` would make it."""
    noise = np.random.default_rng(0).standard_normal((rows, *case.shape))
    data = probgen.load_data({"x": (noise + np.roll(noise, 1, -1)).astype(np.float32)})
    network = "conv" if len(case.shape) > 1 else "dense"
    program = probgen.load(MODELS[predicts], data, hidden=case.hidden, layers=case.layers, network=network)
    feed = Feed(data.train, Preparation.of(program.prepare, data), case.batch, 0)
    options = Options(steps=10**6, batch_size=case.batch, lr=LR, device="cpu", compile=compile)
    return Engine(program, None, feed, options)


def builders(predicts: str, case: Case) -> tuple[dict[str, Callable[[], Opponent]], dict[str, str]]:
    """What makes each peer that can be imported, and what is to be said of those that cannot."""
    able, failed = {}, {}
    for name, peer in PEERS[predicts].items():
        build = partial(_seeded, peer, case)
        try:
            build()
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
            failed[name] = f"cannot be imported here ({_words(error)})"
        else:
            able[name] = build
    return able, failed


def _seeded(peer: type[Opponent], case: Case) -> Opponent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peer(case.network(), case.shape)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"


# -- training ---------------------------------------------------------------------------------------------------------


def measured(predicts: str, case: str, pairs: int, steps: int) -> dict[str, Any]:
    """Seconds a step of every contender in every round, and what is to be said of each.

    A peer takes part in the fastest of its forms; `forms` holds the seconds of all of them, or why one does not run.
    """
    pyro.enable_validation(False)
    ours = engine(predicts, CASES[case])
    ready, run = readied(advanced(ours))
    able, failed = builders(predicts, CASES[case])
    found: dict[str, Any] = {
        "ready": {ADVANCE: ready},
        "parameters": {ADVANCE: sum(p.numel() for p in ours.leaves.params.values())},
        "chosen": {ADVANCE: "compiled" if ours.compiled else "eager"},
        "forms": {ADVANCE: {}},
        "failed": failed,
    }
    runs = {ADVANCE: run}
    for peer, build in able.items():
        found["parameters"][peer] = sum(p.numel() for p in build().parameters())
        found["forms"][peer], forms = raced(build, ours.feed, steps)
        form = min(forms, key=found["forms"][peer].get)
        found["chosen"][peer], (found["ready"][peer], runs[peer]) = form, forms[form]
    times = rounds({name: (run, steps) for name, run in runs.items()}, pairs)
    return {**found, "times": {name: list(values) for name, values in times.items()}}


# -- drawing ----------------------------------------------------------------------------------------------------------


def drawn(case: str, pairs: int, draws: int) -> dict[str, Any]:
    """Seconds a draw of a batch in 50 steps of DDIM, eager and compiled, of every contender; the same fields as `measured`."""
    pyro.enable_validation(False)
    chosen = CASES[case]
    able, failed = builders("noise", chosen)
    contenders = {DRAW: _own(chosen)} | {peer: _peers(build(), chosen.batch) for peer, build in able.items()}
    found: dict[str, Any] = {"failed": failed, "forms": {}, "ready": {}, "times": {}}
    with torch.no_grad():
        for name, forms in contenders.items():
            made = {form: readied(partial(_once, repeated(draw))) for form, draw in forms.items()}
            found["ready"][name] = {form: seconds for form, (seconds, _) in made.items()}
            contenders[name] = {form: run.args[0] for form, (_, run) in made.items()}
        for form in ("eager", "compiled"):
            gc.collect()
            times = rounds({name: (forms[form], draws) for name, forms in contenders.items()}, max(RACE, pairs))
            found["times"][form] = {name: list(values) for name, values in times.items()}
    return found


def _once(run: Run, _: int) -> None:
    run(1)


def _own(case: Case) -> dict[str, Callable[[], Any]]:
    """What `run.sample` asks of a trained program, in the two ways in which it may run."""
    ours = engine("noise", case, compile=False)
    batch = ours.feed.batch(0)
    trained = Trained(ours.program, ours.weights(ours.start()), batch, rows=ours.feed.rows)
    draw = partial(trained.sampled, DDIM(STEPS), {"x": np.zeros_like(batch["x"])}, 0)
    return {"eager": partial(draw, compile=False), "compiled": partial(draw, compile=True)}


def _peers(model: Opponent, n: int) -> dict[str, Callable[[], Tensor]]:
    network = model.network.eval()
    return {"eager": partial(model.draw, network, n), "compiled": partial(model.draw, torch.compile(network), n)}
