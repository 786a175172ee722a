"""How close three flows come to the toys, whose own densities are known.

    gap = E[log p_true(x) − log p(x)] over 20,000 new points, in nats: a KL divergence, 0 at the entropy floor

`python examples/toy_flows.py --steps 500` is quick; the table in the documentation takes the default.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import probgen
from probgen.data.toys import TOYS

FLOWS = {
    "realnvp": {"couplings": 12, "hidden": 128},
    "maf": {"transforms": 8, "hidden": 128},
    "spline": {"transforms": 4, "hidden": 128, "bins": 16},
}


def gap(flow: str, toy: str, steps: int, seed: int = 0) -> tuple[float, float]:
    """The gap of a flow trained for so many steps on ever new points, and its standard error."""
    points, new = TOYS[toy].sample(100_000, seed), TOYS[toy].sample(20_000, seed + 1)
    data = probgen.load_data({"x": points.astype(np.float32)})
    run = probgen.fit(
        probgen.load(flow, data, seed=seed, **FLOWS[flow]), data, steps=steps, batch_size=512, lr=2e-3, ema=0.999, seed=seed,
        schedule=probgen.Cosine(1, 0, steps), compile=steps > 2000, progress=False,
    )  # fmt: skip
    density = run.log_likelihood({"x": new.astype(np.float32)})["log_likelihood"].values
    each = TOYS[toy].log_prob(new) - density
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))


def main() -> None:
    """The table: one line for each toy, one column for each flow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--flows", nargs="+", default=list(FLOWS), choices=FLOWS)
    parser.add_argument("--toys", nargs="+", default=list(TOYS), choices=TOYS)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for toy in asked.toys:
        for flow in asked.flows:
            began = time.perf_counter()
            value, error = gap(flow, toy, asked.steps, asked.seed)
            print(
                f"{toy:16} {flow:8} gap {value:.3f} ± {error:.3f} nats  ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
