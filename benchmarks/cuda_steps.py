"""The Pyro table on a CUDA device, with launch gaps: how much of a step's time the device waits for the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro
import torch

from benchmarks import pyro_steps
from benchmarks.opponents_pyro import whole
from benchmarks.pairs import rounds
from benchmarks.problems import LR, PROBLEMS, setting

REPLAY = "by hand, whole step, CUDA graph replayed"


def measured(name: str, pairs: int, steps: int) -> dict[str, Any]:
    """As on the CPU, with a replayed CUDA graph beside it; and each contender's launch gap.

    The gap is 1 − (time in kernels) / (wall time): the share of a step in which the device stands idle.
    """
    pyro.enable_validation(False)
    runs, ready = pyro_steps.contenders(name, "cuda"), {}
    runs[REPLAY] = _replayed(name)
    for contender, run in runs.items():
        began = time.perf_counter()
        run(3)
        torch.cuda.synchronize()
        ready[contender] = time.perf_counter() - began
    times = rounds({contender: (_finished(run), steps) for contender, run in runs.items()}, pairs)
    gaps = {contender: _gap(run, steps) for contender, run in runs.items()}
    return {
        "times": {contender: list(values) for contender, values in times.items()},
        "ready": ready,
        "gaps": gaps,
        "device": torch.cuda.get_device_name(),
    }


def _finished(run: Callable[[int], None]) -> Callable[[int], None]:
    def finished(steps: int) -> None:
        run(steps)
        torch.cuda.synchronize()

    return finished


def _replayed(name: str) -> Callable[[int], None]:
    """The hand-written step, captured once as a CUDA graph and replayed; its loss read each time."""
    made = setting(PROBLEMS[name], "pyro", "cuda")
    x = torch.as_tensor(made.feed.batch(0)["x"], dtype=torch.float32, device="cuda")
    step = whole(pyro_steps.parameters(made.problem), LR, closed=False, device="cuda", cudagraphs=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x)

    def run(steps: int) -> None:
        for _ in range(steps):
            graph.replay()
            loss.item()

    return run


def _gap(run: Callable[[int], None], steps: int) -> float:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    began = time.perf_counter()
    run(steps)
    torch.cuda.synchronize()
    wall = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run(steps)
        torch.cuda.synchronize()
    busy = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
    return max(0.0, 1 - busy / wall)
