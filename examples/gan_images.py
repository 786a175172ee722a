"""How good pictures of `dcgan` and `r3gan` are, on the embedded digits or on a file such as MNIST's or Fashion-MNIST's.

    distances of the features of a small classifier; precision, recall, density and coverage by neighbours there;
    the last line is what other real rows get

FD(classifier) and KID(classifier) compare only with numbers of the same classifier: it learns from training rows, and
the floor is that of training rows against held-out ones.

`python examples/gan_images.py --steps 300` is quick; `--data mnist.npz --out pictures` also saves samples as pictures.
A file holds images `x_train`, `x_test` of whole numbers and labels `y_train`, `y_test`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import probgen

ROWS, LABELLED = 2000, 20_000  # that are compared, and that the classifier learns from
MODELS = ("dcgan", "r3gan")
COLUMNS = {
    "fd_classifier": "FD(classifier)",
    "kid_classifier": "KID(classifier)",
    **{name: name for name in ("precision", "recall", "density", "coverage")},
}


def card(drawn: np.ndarray, data: probgen.Data, seed: int) -> dict[str, float]:
    """The numbers of samples, and as `<name>_floor` of as many training rows, both against held-out rows."""
    rng = np.random.default_rng(seed)
    held = np.concatenate([split[:]["x"] for split in (data.valid, data.test)])
    held = held[rng.permutation(len(held))[:ROWS]]
    other = data.train[rng.permutation(len(data.train))[:LABELLED]]
    return probgen.quality(drawn[: len(held)], held, other["x"], other["y"], seed=seed, rows=ROWS)


def said(found: dict[str, float], suffix: str = "") -> str:
    """The numbers of a line."""
    return "  ".join(f"{shown} {found[name + suffix]:.4g}" for name, shown in COLUMNS.items())


def main() -> None:
    """A line for each model, and the floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or the path of an .npz file")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--hidden", type=int, help="channels, or units of a layer; by default the model's own")
    parser.add_argument("--lr", type=float, help="by default the model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for pictures of samples")
    asked = parser.parse_args()
    data, lr = probgen.load_data(asked.data), {} if asked.lr is None else {"lr": asked.lr}
    for number, name in enumerate(asked.model):
        program = probgen.load(name, data, seed=asked.seed, hidden=asked.hidden)
        began = time.process_time()
        run = probgen.fit(
            program, data, steps=asked.steps, batch_size=64, schedule=probgen.Cosine(1, 0, asked.steps),
            seed=asked.seed, compile=asked.steps > 1000, progress=False, **lr,
        )  # fmt: skip
        seconds = time.process_time() - began
        found = card(run.sample(ROWS, seed=asked.seed)["x"], data, asked.seed)
        if not number:
            print(f"{data.name}: {len(data.train):,} rows to learn from, {asked.steps:,} steps", flush=True)
        print(f"{name:10} {said(found)}  {seconds:.0f} s of CPU", flush=True)
        if asked.out:
            asked.out.mkdir(parents=True, exist_ok=True)
            picture = asked.out / f"{Path(asked.data).stem}_{name}.png"
            probgen.pictures.samples(run, n=64, seed=asked.seed).figure.savefig(picture, bbox_inches="tight", dpi=150)
    print(f"{'real rows':10} {said(found, '_floor')}")


if __name__ == "__main__":
    main()
