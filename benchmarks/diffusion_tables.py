"""The tables of `python -m benchmarks diffusion` that are about Pyro's half: beside other packages, on the same networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.flow_tables import Verdict, ratios, said
from benchmarks.worker import in_own_process

NETWORKS = {
    "unet": "U-Net of 2 levels from 16 channels with attention, images 1×16×16, batch 64",
    "dense": "DenoisingMLP of 3 residual layers of 64, 2-D, batch 128",
}
LOSSES = {"noise": "DDPM, ‖ε − ε̂‖²", "velocity": "flow matching, ‖u − û‖²"}
STEPS = {"unet": 5, "dense": 20}  # of a block
DRAWS = {"unet": 1, "dense": 4}
TRAINING = {"unet": "equal: convolutions dominate", "dense": "0.9: no guards, Adam on one vector"}
DRAWING = {"eager": "equal", "compiled": "0.9: the whole step is one graph, theirs the network"}


def pyro(console: Console, pairs: int, verdict: Verdict) -> None:
    """A training step by each loss, and a draw in 50 steps, of each network."""
    for case, words in NETWORKS.items():
        for predicts, loss in LOSSES.items():
            asked = {"predicts": predicts, "case": case, "pairs": pairs, "steps": STEPS[case]}
            found = in_own_process("diffusion-pyro", **asked)
            times = {name: np.array(values) for name, values in found["times"].items()}
            console.print(_steps(f"pyro: a training step of {loss}; {words}, float32", times, found))
            console.print(ratios(times, verdict, TRAINING[case]))
        found = in_own_process("diffusion-draws", case=case, pairs=pairs, draws=DRAWS[case])
        for form, each in found["times"].items():
            times = {name: np.array(values) for name, values in each.items()}
            console.print(_draws(f"pyro: a batch in 50 steps of DDIM, {form}; {words}", form, times, found))
            console.print(ratios(times, verdict, DRAWING[form]))


def _steps(title: str, times: Mapping[str, np.ndarray], found: Mapping[str, Any]) -> Table:
    columns = ("", "runs", "parameters", "ms a step, median", "fastest block", "s until ready", "other forms, ms")
    table = Table(*columns, title=title, title_justify="left")
    for name, values in times.items():
        chosen = found["chosen"][name]
        others = [f"{form} {said(ms)}" for form, ms in found["forms"][name].items() if form != chosen]
        ms = (f"{1e3 * np.median(values):.3f}", f"{1e3 * values.min():.3f}")
        row = (chosen, f"{found['parameters'][name]:,}", *ms, f"{found['ready'][name]:.0f}", "; ".join(others))
        table.add_row(name, *row)
    return _with_failed(table, found)


def _draws(title: str, form: str, times: Mapping[str, np.ndarray], found: Mapping[str, Any]) -> Table:
    table = Table("", "ms a batch, median", "fastest block", "s until ready", title=title, title_justify="left")
    for name, values in times.items():
        ready = f"{found['ready'][name][form]:.0f}"
        table.add_row(name, f"{1e3 * np.median(values):.1f}", f"{1e3 * values.min():.1f}", ready)
    return _with_failed(table, found)


def _with_failed(table: Table, found: Mapping[str, Any]) -> Table:
    for name, words in found["failed"].items():
        table.add_row(name, words)
    return table
