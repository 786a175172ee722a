"""How good samples of a diffusion and of a flow are on digits and two-moons, by sampler and runs of the network.

    sliced Wasserstein, MMD² and FD(classifier) to held-out rows; the last line is what two sets of real rows are apart

`python examples/sample_quality.py --steps 500` is quick; the table in the documentation takes the default.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import probgen
from probgen.diffusion import DDIM, Ancestral, DPMSolver, Heun
from probgen.diffusion.samplers import runs

CHAIN = 100
SAMPLERS = (Ancestral(CHAIN), DDIM(10), DDIM(20), DDIM(50), DDIM(100), Heun(18), DPMSolver(20))
OPTIONS = {"digits": {"hidden": 256, "layers": 4}, "two-moons": {"hidden": 128, "layers": 4}}


def sets(source: str) -> tuple[probgen.Data, np.ndarray, np.ndarray, np.ndarray | None]:
    """Data to learn from, held-out rows, and other rows with their labels."""
    data = probgen.load_data(source)
    held = [np.concatenate([split[:]["x"] for split in (data.valid, data.test)])]
    other = data.train[:]
    return data, held[0], other["x"], other.get("y") if source == "digits" else None


def table(source: str, steps: int, seed: int) -> None:
    """One line for each sampler, and the floor."""
    data, held, other, labels = sets(source)
    recipe = {"steps": steps, "schedule": probgen.Cosine(1, 0, steps), "ema": 0.999, "seed": seed, "progress": False}
    sizes = OPTIONS[source]
    diffusion = probgen.fit(probgen.load("ddpm", data, seed=seed, steps=CHAIN, **sizes), data, **recipe)
    flow = probgen.fit(probgen.load("flow_matching", data, seed=seed, steps=10, **sizes), data, **recipe)
    print(f"{source}: {len(other):,} rows to learn from, {len(held):,} held out", flush=True)
    chain = diffusion.program.denoiser()
    lines = [("DDPM, the program", CHAIN, diffusion, None)]
    lines += [
        (f"DDPM, {sampler!r}".replace(", guidance=0.0", ""), runs(sampler, chain), diffusion, sampler)
        for sampler in SAMPLERS
    ]
    lines += [("flow matching, RK4", 40, flow, None), ("flow matching, DDIM(20)", 20, flow, DDIM(20))]
    for name, count, run, sampler in lines:
        began = time.perf_counter()
        drawn = run.sample(len(held), seed=seed, sampler=sampler)["x"]
        seconds = time.perf_counter() - began
        found = probgen.quality(drawn.reshape(held.shape), held, other, labels, seed=seed)
        print(f"{name:44} {count:4} runs  {seconds:6.2f} s  " + said(found, ""), flush=True)
    print(f"{'real rows':44} {'':17}  " + said(found, "_floor"), flush=True)


def said(found: dict[str, float], floor: str) -> str:
    """The numbers of a line."""
    names = [name for name in ("sliced_wasserstein", "mmd2", "fd_classifier") if name in found]
    return "  ".join(f"{name} {found[name + floor]:.4f}" for name in names)


def main() -> None:
    """A table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--data", nargs="+", default=list(OPTIONS), choices=OPTIONS)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for source in asked.data:
        table(source, asked.steps, asked.seed)


if __name__ == "__main__":
    main()
