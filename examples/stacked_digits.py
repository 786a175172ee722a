"""Modes of 1,000 found on stacked digits by `r3gan`, `dcgan` and `gan`: the channels of a picture are three 8×8 digits.

    a classifier names the digit of each channel of 26,000 draws; the last line is real rows through the same classifier

Model and classifier learn from four fifths of the digits; real rows are triples of the others. The classifier names
noise as well: `sure` is the share of draws whose three digits all have a probability of 0.9 or more, `sure modes` are
those found among them. `gan` is dense, its loss relativistic, with the penalties R1 and R2.

`python examples/stacked_digits.py --steps 300 --seeds 1` is quick; the table in the documentation takes the defaults.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import probgen
from probgen.evaluate.modes import class_coverage
from probgen.pyro import R1, R2

ROWS, DRAWS, SURE = 25_600, 26_000, 0.9
GAMMA = 1.0
MODELS = {  # options of the program and of fit
    "r3gan": ({"hidden": 384, "z_dim": 64, "gamma": GAMMA}, {"lr": 1e-3, "ema": 0.999}),
    "dcgan": ({"hidden": 32, "z_dim": 64}, {"lr": 5e-4, "ema": 0.999}),
    "gan": ({"hidden": 256, "layers": 3, "z_dim": 64}, {"lr": 5e-4, "ema": 0.999}),
}


def stacked(digits: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Pictures [rows, 8, 8, 3] whose channels are digits drawn at random."""
    return digits[np.random.default_rng(seed).integers(len(digits), size=(rows, 3))].transpose(0, 2, 3, 1)


def classifier(digits: np.ndarray, labels: np.ndarray) -> Any:
    """A network of one hidden layer."""
    return MLPClassifier((128,), alpha=0.01, max_iter=1000, random_state=0).fit(digits.reshape(-1, 64) / 16, labels)


def coverage(network: Any, pictures: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """The triples of classes that pictures show, and how far their shares are from the product of `shares`."""
    channels = pictures.transpose(0, 3, 1, 2).reshape(-1, 64)
    probabilities = network.predict_proba(channels / 16).reshape(-1, 3, 10)
    codes = probabilities.argmax(-1) @ [100, 10, 1]
    found = class_coverage(codes, 1000, np.einsum("i,j,k->ijk", shares, shares, shares).ravel())
    sure = (probabilities.max(-1) >= SURE).all(-1)
    return {**found, "sure": sure.mean(), "sure modes": len(np.unique(codes[sure]))}


def trained(name: str, pictures: np.ndarray, steps: int, seed: int) -> probgen.Run:
    """One training."""
    data, (options, recipe) = probgen.load_data({"x": pictures}), MODELS[name]
    program = probgen.load(name, data, seed=seed, **options)
    if name == "gan":
        program = program.learned_by(replace(program.by, objective="relativistic", penalties=[R1(GAMMA), R2(GAMMA)]))
    return probgen.fit(
        program, data, steps=steps, batch_size=64, schedule=probgen.Cosine(1, 0, steps), seed=seed,
        compile=steps > 1000, progress=False, **recipe,
    )  # fmt: skip


def said(name: str, rows: list[dict[str, float]]) -> str:
    """Mean ± standard error of each number over the seeds."""
    parts = []
    for key in ("modes", "reverse_kl", "sure", "sure modes"):
        values = np.array([row[key] for row in rows])
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        parts.append(f"{key} {values.mean():.4g} ± {error:.2g}")
    seconds = np.mean([row["seconds"] for row in rows])
    return f"{name:10}" + "  ".join(parts) + f"  {seconds:.0f} s of CPU"


def main() -> None:
    """One line for each model, and the floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    asked = parser.parse_args()
    digits, labels = load_digits().images.astype(np.uint8), load_digits().target
    ours, held, y, y_held = train_test_split(digits, labels, test_size=0.2, stratify=labels, random_state=0)
    network, shares = classifier(ours, y), np.bincount(y) / len(y)
    accuracy = network.score(held.reshape(-1, 64) / 16, y_held)
    digest = hashlib.sha256(b"".join(w.tobytes() for w in [*network.coefs_, *network.intercepts_])).hexdigest()
    print(f"classifier: {accuracy:.2%} of {len(held)} held-out digits, sha256 {digest}")
    print(f"{asked.steps:,} steps, {asked.seeds} seeds, {DRAWS:,} draws", flush=True)
    for name in asked.model:
        rows = []
        for seed in range(asked.seeds):
            began = time.process_time()
            run = trained(name, stacked(ours, ROWS, seed), asked.steps, seed)
            seconds = time.process_time() - began
            drawn = run.sample(DRAWS, seed=seed)["x"]
            rows.append({**coverage(network, drawn, shares), "seconds": seconds})
        print(said(name, rows), flush=True)
    real = [coverage(network, stacked(held, DRAWS, 1000 + seed), shares) for seed in range(asked.seeds)]
    floor = real[0]["reverse_kl_floor"]
    print(said("real rows", [{**row, "seconds": 0} for row in real]) + f"  (a perfect sampler: {floor:.4f})")


if __name__ == "__main__":
    main()
