"""Planar flows on the four energies of Rezende & Mohamed (arXiv:1505.05770, section 6.1).

    p(z) = exp(−U(z)) / Z on [−4, 4]²,      q_K: K planar flows of a Gaussian, then 4 tanh onto the square
    KL(q_K ‖ p) = log Z + E_q[log q(z) + U(z)] = log Z − log 64 − ELBO

An energy is a factor of the model, whose latent z is uniform on the square; log Z is a sum over a grid. `python
examples/energies.py --steps 300` is quick; the table in the documentation takes the default.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform, TanhTransform

import probgen
from probgen.pyro import ELBO
from probgen.pyro.distributions import Flow
from probgen.pyro.transforms import Compose, PlanarLayer

SIDE, DRAWS = 4.0, 256


def waves(z):
    """w_1, w_2 and w_3 of the paper, by the first coordinate."""
    w1 = torch.sin(2 * torch.pi * z[..., 0] / 4)
    w2 = 3 * torch.exp(-0.5 * ((z[..., 0] - 1) / 0.6) ** 2)
    w3 = 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)
    return w1, w2, w3


def rings(z):
    """U_1: two halves of a ring."""
    far = 0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2
    sides = [-0.5 * ((z[..., 0] + c) / 0.6) ** 2 for c in (2, -2)]
    return far - torch.logaddexp(*sides)


def wave(z):
    """U_2: a wave."""
    return 0.5 * ((z[..., 1] - waves(z)[0]) / 0.4) ** 2


def bump(z):
    """U_3: a wave that divides."""
    w1, w2, _ = waves(z)
    return -torch.logaddexp(-0.5 * ((z[..., 1] - w1) / 0.35) ** 2, -0.5 * ((z[..., 1] - w1 + w2) / 0.35) ** 2)


def step(z):
    """U_4: a wave that divides for good."""
    w1, _, w3 = waves(z)
    return -torch.logaddexp(-0.5 * ((z[..., 1] - w1) / 0.4) ** 2, -0.5 * ((z[..., 1] - w1 + w3) / 0.35) ** 2)


ENERGIES = {"U1": rings, "U2": wave, "U3": bump, "U4": step}


def log_evidence(energy) -> float:
    """log Z on the square, by the midpoint rule."""
    side = torch.linspace(-SIDE, SIDE, 2001, dtype=torch.float64)
    middle = (side[1:] + side[:-1]) / 2
    z = torch.stack(torch.meshgrid(middle, middle, indexing="ij"), -1)
    return float((-energy(z)).flatten().logsumexp(0) + 2 * torch.log(side[1] - side[0]))


def program(energy, length: int, seed: int) -> probgen.Program:
    """z uniform on the square and weighed by its energy; q_K is the guide."""
    torch.manual_seed(seed)
    flow = Compose(*[PlanarLayer(2) for _ in range(length)])
    onto_square = [TanhTransform(cache_size=1), AffineTransform(0.0, SIDE, event_dim=0)]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(-SIDE * torch.ones(2), SIDE * torch.ones(2)).to_event(1))
            pyro.factor("energy", -energy(z))

    def guide(x):
        pyro.module("flow", flow)
        mean = pyro.param("mean", torch.zeros(2))
        scale = pyro.param("scale", 0.5 * torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            q = Flow(flow.inv, dist.Normal(mean, scale).to_event(1))
            pyro.sample("z", dist.TransformedDistribution(q, onto_square))

    return probgen.Program(model, guide, by=ELBO())


def gap(energy, length: int, steps: int, seed: int) -> tuple[float, float]:
    """KL(q_K ‖ p) after so many steps, and its Monte-Carlo error."""
    rows = {"x": np.zeros(DRAWS, np.float32)}  # as many draws of q a step
    run = probgen.fit(
        program(energy, length, seed), rows, steps=steps, batch_size=None, lr=0.01, clip=10.0, seed=seed,
        schedule=probgen.Cosine(1, 0.01, steps), progress=False,
    )  # fmt: skip
    weights = run.trained.elbo(rows, 40, seed)  # log p(z) − U(z) − log q(z), [draws, rows]
    values = log_evidence(energy) - 2 * np.log(2 * SIDE) - np.asarray(weights, np.float64).ravel()
    return values.mean(), values.std() / np.sqrt(values.size)


def main() -> None:
    """The table: one line for each energy, one column for each K."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    print("KL(q_K || p), nats: the best of the seeds, and in brackets all of them")
    for name, energy in ENERGIES.items():
        cells = []
        for length in asked.lengths:
            found = sorted(gap(energy, length, asked.steps, seed)[0] for seed in range(asked.seeds))
            cells.append(f"K={length}: {found[0]:.3f} [{', '.join(f'{value:.3f}' for value in found)}]")
        print(f"{name}  log Z = {log_evidence(energy):.4f}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
