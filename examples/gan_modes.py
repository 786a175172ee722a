"""Modes found by the zoo's `gan` on the ring (8) and the grid (25), for each objective.

    the same two networks, each objective with what it is used with; 2,500 draws of the averaged generator

`python examples/gan_modes.py --steps 500 --seeds 1` is quick; the tables in the documentation take the defaults.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace

import numpy as np
import torch

import probgen
from probgen.pyro import R1, R2, GradientPenalty

DRAWS = 2500
ADAM = functools.partial(torch.optim.Adam, betas=(0.0, 0.99))
GAMMA = 0.01
RECIPES = {
    "minimax": {"objective": "minimax", "penalties": [R1(GAMMA)]},
    "non-saturating": {"objective": "non-saturating", "penalties": [R1(GAMMA)]},
    "non-saturating, no penalty": {"objective": "non-saturating", "penalties": []},
    "non-saturating, pac=2": {"objective": "non-saturating", "penalties": [R1(GAMMA)], "pac": 2},
    "least-squares": {"objective": "least-squares", "penalties": [R1(GAMMA)]},
    "hinge": {"objective": "hinge", "penalties": [R1(GAMMA)]},
    "wasserstein": {"objective": "wasserstein", "penalties": [GradientPenalty(0.1)]},
    "relativistic": {"objective": "relativistic", "penalties": [R1(GAMMA), R2(GAMMA)]},
}


def run(source: str, recipe: dict, steps: int, seed: int, hidden: int, layers: int) -> dict[str, float]:
    """What one training finds."""
    data, pac = probgen.load_data(source), recipe.get("pac", 1)
    program = probgen.load("gan", data, seed=seed, hidden=hidden, layers=layers, pac=pac)
    program = program.learned_by(replace(program.by, **recipe))
    began = time.perf_counter()
    found = probgen.fit(
        program, data, steps=steps, batch_size=128, lr=1e-3, optimizer=ADAM, ema=0.999, seed=seed,
        schedule=probgen.Cosine(1, 0, steps), compile=steps > 2000, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    held = np.concatenate([split[:]["x"] for split in (data.valid, data.test)])
    numbers = probgen.mode_coverage(found.sample(DRAWS, seed=seed)["x"], source, true=held)
    return {**numbers, "seconds": seconds}


def main() -> None:
    """A table for each toy: one line for each objective, mean ± standard error over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--data", nargs="+", default=["ring", "grid"], choices=["ring", "grid", "eight-gaussians"])
    parser.add_argument("--objective", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    asked = parser.parse_args()
    for source in asked.data:
        print(
            f"{source}: {asked.steps:,} steps, {asked.seeds} seeds, {asked.layers} layers of {asked.hidden}", flush=True
        )
        for name in asked.objective:
            rows = [
                run(source, RECIPES[name], asked.steps, seed, asked.hidden, asked.layers) for seed in range(asked.seeds)
            ]
            print(f"{name:28}{said(rows)}", flush=True)


def said(rows: list[dict[str, float]]) -> str:
    """Mean ± standard error of each number, the fewest modes and the least quality of all seeds, and the floors."""
    parts = []
    for key in ("modes", "high_quality", "reverse_kl", "w1"):
        values = np.array([row[key] for row in rows])
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        floor = f" (floor {rows[0][f'{key}_floor']:.4g})" if f"{key}_floor" in rows[0] else f" of {rows[0]['of']}"
        parts.append(f"{key} {values.mean():.4g} ± {error:.2g}{floor}")
    worst = f"worst {min(r['modes'] for r in rows)} modes, {min(r['high_quality'] for r in rows):.3f}"
    return "  ".join([*parts, worst, f"{np.mean([r['seconds'] for r in rows]):.0f} s"])


if __name__ == "__main__":
    main()
