"""A small DDPM of images in a file, on a CPU: its samples against real rows, its bound and its probability flow in bits a dimension.

`python examples/diffusion_images.py --data digits --steps 200` is quick; the card in the documentation takes MNIST's file.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import probgen
from probgen.diffusion import DDIM

CHAIN = 100


def main() -> None:
    """Train, sample, compare, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--hidden", type=int, default=16, help="channels at full size")
    parser.add_argument("--layers", type=int, default=3, help="sizes of the image")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=200, help="test rows that are evaluated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a picture of samples")
    asked = parser.parse_args()
    data = probgen.load_data(asked.data)
    program = probgen.load(
        "ddpm", data, seed=asked.seed, steps=CHAIN, hidden=asked.hidden, layers=asked.layers, network="conv"
    )
    began = time.perf_counter()
    run = probgen.fit(
        program, data, steps=asked.steps, batch_size=64, lr=1e-3, ema=0.998, seed=asked.seed,
        schedule=probgen.Cosine(1, 0, asked.steps), compile=asked.steps > 500, progress=False,
    )  # fmt: skip
    print(f"{asked.steps:,} steps, {time.perf_counter() - began:.0f} s, loss {run.metrics['loss'][-1]:.4f}", flush=True)
    held, known = data.test[:]["x"], data.train[:]
    labels, n = known["y"][:20_000] if "y" in known else None, min(asked.draws, len(held))
    drawn = run.sample(n, seed=asked.seed, sampler=DDIM(50))["x"]
    found = probgen.quality(drawn, held[:n], known["x"][:20_000], labels, rows=n)
    print("  ".join(f"{name} {value:.4f}" for name, value in found.items()), flush=True)
    numbers = run.evaluate({"x": held[: asked.rows]}, k=2)
    for name in ("elbo", "log_likelihood", "ode_log_likelihood"):
        if name in numbers:
            bits = -numbers[name] / np.log(2) / np.prod(held.shape[1:])
            error = numbers[f"{name}_se"] / np.log(2) / np.prod(held.shape[1:])
            print(
                f"{name}: {bits:.3f} ± {error:.3f} bits a dimension of {min(asked.rows, len(held))} test rows",
                flush=True,
            )
    if asked.out:
        probgen.pictures.samples(run).figure.savefig(asked.out, dpi=150)


if __name__ == "__main__":
    main()
