"""The tables of `python -m benchmarks adversarial`: a GAN step beside other packages', on the same networks."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from benchmarks.diffusion_tables import _steps
from benchmarks.flow_tables import Verdict, ratios
from benchmarks.worker import in_own_process

NETWORKS = {
    "dense": "two hidden layers of 128 in each player, 2-D, z 2, batch 128",
    "images": "DCGAN of 16 channels, images 16×16×3, z 32, batch 64",
}
OBJECTIVES = {"non-saturating": "a non-saturating GAN", "wgan-gp": "WGAN-GP, λ = 10"}
STEPS = {"dense": 20, "images": 5}  # of a block
PREDICTED = {"dense": "0.9: one graph, Adam on one vector", "images": "equal: convolutions dominate"}
REMARK = (
    "torchgan's penalty is an update of the critic by itself, with one ε and one norm for the whole batch; torch-mimicry's "
    "takes images of three channels only. The critic of images has BatchNorm only where there is no penalty."
)


def adversarial(console: Console, pairs: int, verdict: Verdict) -> None:
    """One update of the critic and one of the generator, by each objective, of each pair of networks."""
    for case, words in NETWORKS.items():
        for objective, loss in OBJECTIVES.items():
            found = in_own_process("adversarial", objective=objective, case=case, pairs=pairs, steps=STEPS[case])
            times = {name: np.array(values) for name, values in found["times"].items()}
            console.print(_steps(f"pyro: a step of both players of {loss}; {words}, float32", times, found))
            console.print(ratios(times, verdict, PREDICTED[case]))
    console.print(f"{REMARK}\n")
