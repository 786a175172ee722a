"""`python -m benchmarks`: the tables of docs/benchmarks.md, measured on this machine.

Every measurement runs in a process of its own with one thread. Ratios are medians over interleaved pairs with a 95 %
bootstrap interval; an interval that holds 1 is reported as "equal". A prediction stands beside each result.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import adversarial_tables, diffusion_tables, flow_tables, mixture_tables
from benchmarks.pairs import Ratio, ratio
from benchmarks.problems import PROBLEMS
from benchmarks.worker import in_own_process

SECTIONS = (
    "pyro-small", "pyro-medium", "pyro-conv", "numpyro-small", "first-loss", "memory", "growth",
    "em", "em-growth", "em-memory", "nuts", "flows", "pixels", "diffusion", "adversarial", "cuda",
)  # fmt: skip
BLOCK = {"small": 100, "medium": 25, "conv": 20}  # steps of a block, at least a fifth of a chunk of `fit`
STOCK, DROP_IN, ADVANCE = "pyro.infer.SVI.step", "probgen.pyro.SVI.step", "probgen.fit (Engine.advance)"
HAND, HAND_FED, IDIOM = "by hand, whole step", "by hand, whole step + gather", "by hand, loss only compiled"
UPDATE, SCAN = "jitted svi.update", "by hand, lax.scan + gather"
# (slower, faster, predicted, target): the target is for time(slower) / time(faster).
PYRO = {
    "small": (
        (STOCK, DROP_IN, "8.4 (prototype)", "≥ 6"),
        (DROP_IN, HAND, "equal", "≤ 1.05"),
        (ADVANCE, HAND_FED, "equal", "≤ 1.05"),
        (IDIOM, DROP_IN, "2.1 (prototype)", ""),
    ),
    "medium": (
        (STOCK, DROP_IN, "1.3: matrix products dominate", ""),
        (DROP_IN, HAND, "equal", "≤ 1.05"),
        (ADVANCE, HAND_FED, "equal", "≤ 1.05"),
        (IDIOM, DROP_IN, "1.1", ""),
    ),
    "conv": (
        (STOCK, DROP_IN, "1.2: convolutions dominate", ""),
        (DROP_IN, HAND, "equal", "≤ 1.05"),
        (ADVANCE, HAND_FED, "equal", "≤ 1.05"),
        (IDIOM, DROP_IN, "1.1", ""),
    ),
}
NUMPYRO = ((UPDATE, ADVANCE, "2.3 (prototype)", "≥ 2"), (ADVANCE, SCAN, "equal", "≤ 1.05"))
DIFFUSION = {"numpyro": ((ADVANCE, "by hand, lax.scan + optax", "equal", "≤ 1.05"),)}
CONSOLE = Console(width=132)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the sections asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--pairs", type=int, default=40, help="interleaved pairs of each comparison")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}: {', '.join(SECTIONS)}")
    CONSOLE.print(_versions())
    for name in asked.sections or SECTIONS:
        _SECTIONS[name](name, asked.pairs)


def _versions() -> str:
    packages = (
        "probgen", "torch", "pyro-ppl", "jax", "numpyro", "flax", "numpy", "scikit-learn", "pomegranate", "zuko", "normflows",
        "nflows", "diffusers", "denoising-diffusion-pytorch", "torchcfm", "torchgan", "torch-mimicry",
    )  # fmt: skip
    found = ", ".join(f"{name} {_version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {found}"


def _version(name: str) -> str:
    if name == "probgen":
        import probgen

        return getattr(probgen, "__version__", "here")
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _steps(section: str, pairs: int) -> None:
    """Milliseconds a step and ratios, on one backend and problem."""
    backend, _, name = section.partition("-")
    result = in_own_process(backend, name=name, pairs=pairs, steps=BLOCK[name])
    times = {contender: np.array(values) for contender, values in result["times"].items()}
    _print_times(f"{backend}: VAE {PROBLEMS[name].words}", times, result["ready"])
    comparisons = PYRO[name] if backend == "pyro" else NUMPYRO
    _print_ratios(times, comparisons)
    if backend == "pyro":  # the drop-in compiles first, with an empty cache
        seconds, saved = result["ready"][DROP_IN], float(np.median(times[STOCK] - times[DROP_IN]))
        steps = f"{seconds / saved:,.0f} steps" if saved > 0 else "no number of steps"
        CONSOLE.print(f"Compiling took {seconds:.1f} s and pays after {steps}.\n")


def _print_times(title: str, times: dict[str, np.ndarray], ready: dict[str, float]) -> None:
    table = Table("", "ms a step, median", "fastest block", "s until ready", title=title, title_justify="left")
    for name, values in times.items():
        table.add_row(name, f"{1e3 * np.median(values):.3f}", f"{1e3 * values.min():.3f}", f"{ready[name]:.1f}")
    CONSOLE.print(table)


def _print_ratios(times: dict[str, np.ndarray], comparisons: Sequence[tuple[str, str, str, str]]) -> None:
    table = Table("time of", "over time of", "predicted", "measured, 95 % interval", "target", "")
    for slow, fast, predicted, target in comparisons:
        if slow in times and fast in times:
            found = ratio(times[slow], times[fast])
            table.add_row(slow, fast, predicted, str(found), target, verdict(found, target))
    CONSOLE.print(table)


def verdict(found: Ratio, target: str) -> str:
    """Whether a ratio meets "≥ a" or "≤ b"; one that cannot be told from 1 meets every "≤ b" with b ≥ 1."""
    if not target:
        return ""
    relation, bound = target.split()
    met = found.median >= float(bound) if relation == "≥" else found.median <= float(bound) or found.equal
    return "met" if met else "missed"


def _diffusion(_: str, pairs: int) -> None:
    """Milliseconds a training step of the DDPM on NumPyro; then on Pyro, and of a draw, beside other packages."""
    for backend, comparisons in DIFFUSION.items():
        result = in_own_process(f"diffusion-{backend}", backend=backend, pairs=pairs, steps=BLOCK["small"])
        times = {contender: np.array(values) for contender, values in result["times"].items()}
        _print_times(f"{backend}: DDPM of two moons, T = 20, dense, 128 wide, batch 128", times, result["ready"])
        _print_ratios(times, comparisons)
    diffusion_tables.pyro(CONSOLE, pairs, verdict)


def _first_loss(_: str, __: int) -> None:
    table = Table("", "import", "+ load", "first loss", "its processor time", "predicted", "target", "")
    table.title, table.title_justify = "Seconds from `import probgen` to the first printed loss (median of 5)", "left"
    for model in ("vae", "vae_numpyro"):
        laps = [in_own_process("first-loss", model=model) for _ in range(5)]
        median = {key: float(np.median([lap[key] for lap in laps])) for key in laps[0]}
        row = [f"{median[key]:.2f}" for key in ("import", "load", "first loss", "first loss (processor)")]
        table.add_row(model, *row, "1.8", "≤ 2", "met" if median["first loss"] <= 2 else "missed")
    CONSOLE.print(table)


def _memory(_: str, __: int) -> None:
    table = Table("", "MiB", "over the imports", "predicted", title_justify="left")
    table.title = f"Peak memory of a process that trains 50 steps of the VAE {PROBLEMS['medium'].words}"
    backends = (("pyro", (STOCK, DROP_IN, ADVANCE, HAND)), ("numpyro", (UPDATE, ADVANCE, SCAN)))
    for backend, contenders in backends:
        imports = in_own_process(f"memory-{backend}", name="medium", contender=None)
        table.add_row(f"{backend}: imports alone", f"{imports:.0f}", "", "")
        for contender in contenders:
            peak = in_own_process(f"memory-{backend}", name="medium", contender=contender)
            predicted = "as by hand" if contender in (DROP_IN, ADVANCE) else ""
            table.add_row(f"{backend}: {contender}", f"{peak:.0f}", f"{peak - imports:.0f}", predicted)
    CONSOLE.print(table)


def _growth(_: str, pairs: int) -> None:
    table = Table("", "batch", "width", "its own SVI, ms", "probgen, ms", "times that at half")
    table.title, table.title_justify = "Growth of a step of the small VAE as batch and width double twice", "left"
    CONSOLE.print(
        "Predicted: a doubled batch 1.3 to 1.9 times the time, a doubled width 1.5 to 3 (between overhead and W²)."
    )
    for backend, stock in (("pyro", STOCK), ("numpyro", UPDATE)):
        done: dict[tuple[int, int], float] = {}
        for batch, hidden in ((64, 64), (128, 64), (256, 64), (64, 128), (64, 256)):
            result = in_own_process(
                f"growth-{backend}", batch=batch, hidden=hidden, pairs=max(20, pairs // 2), steps=30
            )
            own, ours = (1e3 * float(np.median(result[name])) for name in (stock, ADVANCE))
            half = done.get((batch // 2, hidden)) or done.get((batch, hidden // 2))
            done[batch, hidden] = ours
            factor = f"{ours / half:.2f}" if half else ""
            table.add_row(backend, str(batch), str(hidden), f"{own:.3f}", f"{ours:.3f}", factor)
        table.add_section()
    CONSOLE.print(table)


def _cuda(_: str, pairs: int) -> None:
    import torch

    if not torch.cuda.is_available():
        CONSOLE.print("No CUDA device here: its table was not measured.")
        return
    for name in PROBLEMS:
        result = in_own_process("cuda", name=name, pairs=pairs, steps=BLOCK["small"])
        times = {contender: np.array(values) for contender, values in result["times"].items()}
        _print_times(f"pyro on {result['device']}: VAE {PROBLEMS[name].words}", times, result["ready"])
        replay = (DROP_IN, "by hand, whole step, CUDA graph replayed", "equal", "≤ 1.05")
        _print_ratios(times, (*PYRO[name], replay))
        gaps = ", ".join(f"{contender} {gap:.0%}" for contender, gap in result["gaps"].items())
        CONSOLE.print(f"Share of a step in which the device is idle: {gaps}\n")


_SECTIONS = {
    **dict.fromkeys(("pyro-small", "pyro-medium", "pyro-conv", "numpyro-small"), _steps),
    "first-loss": _first_loss,
    "memory": _memory,
    "growth": _growth,
    "em": lambda _, __: mixture_tables.em(CONSOLE, verdict),
    "em-growth": lambda _, __: mixture_tables.growth(CONSOLE),
    "em-memory": lambda _, __: mixture_tables.memory(CONSOLE),
    "nuts": lambda _, pairs: mixture_tables.nuts(CONSOLE, pairs, verdict),
    "flows": lambda _, pairs: flow_tables.flows(CONSOLE, pairs, verdict),
    "pixels": lambda _, pairs: flow_tables.pixels(CONSOLE, pairs, verdict),
    "diffusion": _diffusion,
    "adversarial": lambda _, pairs: adversarial_tables.adversarial(CONSOLE, pairs, verdict),
    "cuda": _cuda,
}

if __name__ == "__main__":
    main()
