"""Models of nine families on the digits in one table: `probgen.compare`, and the page it writes.

    likelihoods by what they are of: bits, dequantised values, whole numbers;   samples against held-out rows;   costs

`python examples/compare_digits.py --steps 300` is quick; the table in the README takes the default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

import probgen
from probgen.compare.terminal import printed

# What each model is made with, and which share of the steps it takes: those that overfit, or whose steps are slow, take few.
MODELS = {
    "fvsbn": ({}, 0.25),
    "made": ({}, 0.1),
    "gmm": ({"components": 5}, None),  # EM: until it has converged; more components overfit
    "vae": ({}, 0.25),
    "hvae": ({}, 0.25),
    "realnvp": ({}, 0.1),
    "ddpm": ({"steps": 100, "hidden": 256, "layers": 4}, 1.0),
    "flow_matching": ({"hidden": 256, "layers": 4}, 1.0),
    "gan": ({}, 1.0),
}
STOPPED_EARLY = (
    "fvsbn",
    "made",
    "vae",
    "hvae",
    "realnvp",
)  # by their validation loss, which is their likelihood or its bound


def fitted(name: str, data: probgen.Data, steps: int, seed: int, folder: Path | None) -> probgen.Run:
    """A model of the zoo, trained."""
    options, share = MODELS[name]
    recipe = {} if share is None else {"steps": max(1, round(share * steps))}
    if name in ("ddpm", "flow_matching"):
        recipe |= {"schedule": probgen.Cosine(1, 0, recipe["steps"]), "ema": 0.999}
    if name in STOPPED_EARLY:
        recipe["patience"] = 20
    program = probgen.load(name, data, seed=seed, **options)
    out = None if folder is None else folder / name
    return probgen.fit(program, data, seed=seed, progress=False, out=out, **recipe)


def main() -> None:
    """Fit them all, print the table, write the page."""
    there = [name for name in MODELS if name in {model.name for model in probgen.list_models()}]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12_000, help="of the longest fits")
    parser.add_argument("--models", nargs="+", default=there, choices=there)
    parser.add_argument("--k", type=int, default=100, help="importance samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page; the table beside it as .json")
    parser.add_argument("--runs", type=Path, help="keep the runs in this new folder")
    asked = parser.parse_args()
    data, runs = probgen.load_data("digits"), []
    for name in asked.models:
        runs.append(fitted(name, data, asked.steps, asked.seed, asked.runs))
        print(f"{name}: {runs[-1].step:,} steps, {runs[-1].metrics['seconds'][-1]:.0f} s", flush=True)
    comparison = probgen.compare(runs, k=asked.k, seed=asked.seed, out=asked.out)
    Console(highlight=False).print(printed(comparison))
    print(asked.out)


if __name__ == "__main__":
    main()
