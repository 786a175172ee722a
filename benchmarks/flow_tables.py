"""The tables of `python -m benchmarks flows pixels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.pairs import Ratio, ratio
from benchmarks.worker import in_own_process

Verdict = Callable[[Ratio, str], str]
PEERS = ("Zuko", "normflows", "nflows")
WORDS = {
    "realnvp": "RealNVP, 8 affine couplings with ActNorm",
    "maf": "MAF, 5 masked affine layers",
    "nsf": "NSF, 3 masked layers of splines of 8 bins",
    "nsf-coupling": "NSF, 3 couplings of splines of 8 bins",
}
STEPS = {"realnvp": 20, "maf": 20, "nsf": 20, "nsf-coupling": 20}  # of a block, a fifth of a chunk of `fit` or more
DRAWS = {"realnvp": 20, "maf": 4, "nsf": 1, "nsf-coupling": 4}
COMPILED = ("realnvp",)  # draws that every package gets through torch.compile; D passes would be one graph of minutes
TARGET = "≤ 1.05"
IMAGES = {1: 1, 64: 4, 1000: 8}  # images at once, and the share of the pairs that there is time for
PIXELS = ("≥ 20", "≥ 5"), ("5 to 20", "≥ 5"), ("1 to 2, below 1 at 1,000", "≥ 5")  # (predicted, target) of each loop


def flows(console: Console, pairs: int, verdict: Verdict) -> None:
    """A training step, then a draw, of each family."""
    for family, words in WORDS.items():
        found = in_own_process("flows", family=family, pairs=pairs, steps=STEPS[family])
        times = {name: np.array(values) for name, values in found["times"].items()}
        console.print(_steps(f"A training step of {words}; D 16, hidden (64, 64), batch 256, float32", times, found))
        console.print(ratios(times, verdict))
        for compile in (False, True) if family in COMPILED else (False,):
            drawn = in_own_process("flow-draws", family=family, pairs=pairs, steps=DRAWS[family], compile=compile)
            times = {name: np.array(values) for name, values in drawn["times"].items()}
            how = "through torch.compile" if compile else "as the packages ship it"
            console.print(_draws(f"256 points of {family}, {how}", times, drawn["failed"]))
            console.print(ratios(times, verdict))


def _steps(title: str, times: Mapping[str, np.ndarray], found: Mapping[str, Any]) -> Table:
    columns = ("", "runs", "parameters", "ms a step, median", "fastest block", "s until ready", "other forms, ms")
    table = Table(*columns, title=title, title_justify="left")
    for name, values in times.items():
        chosen = found["chosen"][name]
        others = [f"{form} {said(ms)}" for form, ms in found["forms"][name].items() if form != chosen]
        row = (f"{found['parameters'][name]:,}", f"{1e3 * np.median(values):.3f}", f"{1e3 * values.min():.3f}")
        table.add_row(name, chosen, *row, f"{found['ready'][name]:.0f}", "; ".join(others))
    return _with_missing(table, times)


def _draws(title: str, times: Mapping[str, np.ndarray], failed: Mapping[str, str]) -> Table:
    table = Table("", "ms a draw, median", "fastest block", title=title, title_justify="left")
    for name, values in times.items():
        table.add_row(name, f"{1e3 * np.median(values):.3f}", f"{1e3 * values.min():.3f}")
    for name, words in failed.items():
        table.add_row(name, words)
    return _with_missing(table, {**times, **failed})


def _with_missing(table: Table, there: Mapping[str, Any]) -> Table:
    for name in PEERS:
        if name not in there:
            table.add_row(name, "not installed")
    return table


def said(seconds: float | str) -> str:
    """Milliseconds, or why there are none."""
    return f"fails ({seconds})" if isinstance(seconds, str) else f"{1e3 * seconds:.3f}"


def ratios(times: Mapping[str, np.ndarray], verdict: Verdict, predicted: str = "equal") -> Table:
    """Our time over that of each peer; the target is for the fastest."""
    ours, *peers = times
    table = Table("time of", "over time of", "predicted", "measured, 95 % interval", "target", "")
    fastest = min(peers, key=lambda name: float(np.median(times[name])), default=None)
    for name in sorted(peers, key=lambda name: name != fastest):
        found = ratio(times[ours], times[name])
        target = TARGET if name == fastest else ""
        table.add_row(ours, f"{name}, the fastest" if target else name, predicted if target else "", str(found), target, verdict(found, target))  # fmt: skip
    return table


def pixels(console: Console, pairs: int, verdict: Verdict) -> None:
    """Images of 784 pixels, drawn one after another, on both backends."""
    table = Table("", "images", "", "ms, median", "over probgen's", "predicted", "target", "")
    table.title = "Binary images of 784 pixels from an FVSBN, weights N(0, 0.05²), one thread"
    table.title_justify = "left"
    for backend in ("pyro", "numpyro"):
        for n, share in IMAGES.items():
            result = in_own_process("pixels", backend=backend, n=n, pairs=max(3, pairs // share))
            times = {name: np.array(values) for name, values in result["times"].items()}
            (name, ours), *loops = times.items()
            table.add_row(backend, f"{n:,}", name, f"{1e3 * np.median(ours):.1f}")
            for (name, values), (predicted, target) in zip(loops, PIXELS, strict=True):
                found = ratio(values, ours)
                ms = f"{1e3 * np.median(values):.1f}"
                table.add_row("", "", name, ms, str(found), predicted, target, verdict(found, target))
        table.add_section()
    console.print(table)
