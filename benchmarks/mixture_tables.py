"""The tables of `python -m benchmarks em em-growth em-memory nuts`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.pairs import Ratio, ratio
from benchmarks.worker import in_own_process

SIZE = {"rows": 100_000, "dims": 16, "components": 10}
THREADS = (1, 2)
ROUNDS = 3
LONGER = {"numpyro": 205, "pyro": 205}  # iterations of the longer fit, so that all take seconds
WORDS = {"numpyro": "probgen, NumPyro", "pyro": "probgen, Pyro"}
TARGETS = {"numpyro": ("6 (prototype)", "≥ 4"), "pyro": ("3.5 (prototype)", "≥ 3")}
CONTENDERS = ("numpyro", "pyro", "scikit-learn", *(("pomegranate",) if find_spec("pomegranate") else ()))


def em(console: Console, verdict: Callable[[Ratio, str], str]) -> None:
    """Seconds an iteration at the size of the target, in processes that take turns."""
    cases = [(name, threads) for threads in THREADS for name in CONTENDERS]
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    found: dict[tuple[str, int], dict] = {}
    for i in range(ROUNDS):
        for name, threads in cases[i % len(cases) :] + cases[: i % len(cases)]:
            result = in_own_process("em", threads=threads, contender=name, repeats=1, **SIZE)
            times[name, threads] += result["seconds"]
            found[name, threads] = result
    table = Table("", "threads", "ms an iteration, median", "fastest", "mean log-likelihood", "peak MiB")
    table.title, table.title_justify = (
        "EM on {rows:,} rows, {dims} dims, {components} full covariances".format(**SIZE),
        "left",
    )
    for case in cases:
        each = 1e3 * np.array(times[case])
        last = found[case]
        row = (f"{np.median(each):.1f}", f"{each.min():.1f}", f"{last['log_likelihood']:.6f}", f"{last['peak']:.0f}")
        table.add_row(WORDS.get(case[0], case[0]), str(case[1]), *row)
    console.print(table)
    best = min(THREADS, key=lambda threads: float(np.median(times["scikit-learn", threads])))
    table = Table("time of", "over time of", "threads", "predicted", "measured, 95 % interval", "target", "")
    for name, (predicted, target) in TARGETS.items():
        for threads in THREADS:
            rival = ("scikit-learn", best if threads == THREADS[-1] else 1)
            quotient = ratio(np.array(times[rival]), np.array(times[name, threads]))
            words = f"{rival[1]} and {threads}"
            row = (words, predicted, str(quotient), target, verdict(quotient, target))
            table.add_row("scikit-learn", WORDS[name], *row)
    console.print(table)
    console.print(f"scikit-learn's better thread count here: {best}.")


def growth(console: Console) -> None:
    """Milliseconds an iteration as N, D and K double."""
    table = Table("N", "D", "K", *(WORDS.get(name, name) for name in CONTENDERS))
    table.title, table.title_justify = (
        "Growth of an EM iteration, ms, one thread (predicted: N, K linear; D quadratic)",
        "left",
    )
    for rows, dims, components in (
        (25_000, 16, 10), (50_000, 16, 10), (100_000, 16, 10), (50_000, 8, 10), (50_000, 32, 10), (50_000, 16, 5), (50_000, 16, 20),
    ):  # fmt: skip
        size = {"rows": rows, "dims": dims, "components": components}
        each = [
            np.median(in_own_process("em", contender=name, long=LONGER.get(name, 45), **size)["seconds"])
            for name in CONTENDERS
        ]
        table.add_row(f"{rows:,}", str(dims), str(components), *(f"{1e3 * seconds:.1f}" for seconds in each))
    console.print(table)


def memory(console: Console) -> None:
    """Peak memory of a process that fits a million rows; the data themselves are 61 MiB."""
    table = Table("", "ms an iteration", "peak MiB", "mean log-likelihood")
    table.title, table.title_justify = (
        "N = 1,000,000, D = 16, K = 10, one thread (predicted for probgen: under 1.5 GiB)",
        "left",
    )
    for name in CONTENDERS:
        result = in_own_process("em", contender=name, repeats=1, **{**SIZE, "rows": 1_000_000})
        row = (1e3 * np.median(result["seconds"]), result["peak"], result["log_likelihood"])
        table.add_row(WORDS.get(name, name), f"{row[0]:.0f}", f"{row[1]:.0f}", f"{row[2]:.6f}")
    console.print(table)


def nuts(console: Console, pairs: int, verdict: Callable[[Ratio, str], str]) -> None:
    """Milliseconds a draw, and the ratio."""
    result = in_own_process("nuts-numpyro", pairs=pairs, steps=100)
    (ours, a), (theirs, b) = result["times"].items()
    table = Table("", "ms a draw, median", "fastest block", title_justify="left")
    table.title = "NUTS on the Bayesian mixture of Gaussians (500 of two-moons, K = 3, full covariances), one chain"
    for name, values in ((ours, a), (theirs, b)):
        table.add_row(name, f"{1e3 * np.median(values):.2f}", f"{1e3 * min(values):.2f}")
    console.print(table)
    quotient = ratio(np.array(a), np.array(b))
    console.print(f"{ours} over {theirs}: {quotient}; predicted equal; target ≤ 1.05: {verdict(quotient, '≤ 1.05')}")
    console.print(f"The places of both after the last draw differ by at most {result['apart']:.1e}.")
