"""Milliseconds a GAN step, one update of each player, of the zoo's programs and of other packages on the same networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch import nn

import probgen
from benchmarks.diffusion_pyro_steps import _words
from benchmarks.flow_steps import advanced, raced, readied
from benchmarks.opponents_adversarial import FORMS, PEERS, PENALTY, Opponent
from benchmarks.pairs import rounds
from benchmarks.problems import LR
from models.adversarial import dcgan, gan
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.fit import Options
from probgen.pyro import Adversarial, Engine, GradientPenalty

ADVANCE = "probgen.fit (Engine.advance)"
ROWS = 1024
OBJECTIVES = ("non-saturating", "wgan-gp")


@dataclass(frozen=True)
class Case:
    """Two networks of the zoo and the rows that they see; images, if these have more than one axis."""

    shape: tuple[int, ...]
    hidden: int
    z_dim: int
    batch: int

    @property
    def images(self) -> bool:
        """Whether the networks are convolutional."""
        return len(self.shape) > 1

    def networks(self, objective: str) -> tuple[nn.Module, nn.Module]:
        """A fresh generator and critic, as the zoo makes them."""
        if self.images:
            generator, critic = dcgan.convolutional(self.shape, self.z_dim, self.hidden)
            return generator, _without_norm(critic) if objective == "wgan-gp" else critic
        size, inner = torch.Size(self.shape).numel(), [self.hidden] * 2
        return gan.dense([self.z_dim, *inner, size]), nn.Sequential(nn.Flatten(), *gan.dense([size, *inner, 1], 0.2))


CASES = {"dense": Case((2,), 128, 2, 128), "images": Case((16, 16, 3), 16, 32, 64)}


def _without_norm(critic: nn.Sequential) -> nn.Sequential:
    """No BatchNorm: a gradient penalty is of rows one by one."""
    return nn.Sequential(*(nn.Identity() if isinstance(part, nn.BatchNorm2d) else part for part in critic))


def engine(objective: str, case: Case, compile: bool = True, rows: int = ROWS) -> Engine:
    """The engine of the zoo's program, as `probgen.fit` would make it: no other penalty than the peers', no averages."""
    noise = np.random.default_rng(0).standard_normal((rows, *case.shape))
    data = probgen.load_data({"x": (noise + np.roll(noise, 1, 1)).astype(np.float32)})
    sizes, by = {"z_dim": case.z_dim, "hidden": case.hidden}, None
    if case.images:
        program = probgen.load("dcgan", data, **sizes)
        if objective == "wgan-gp":
            critic = _without_norm(program.by.critic)
            by = Adversarial(critic, objective="wasserstein", penalties=[GradientPenalty(PENALTY)])
    elif objective == "wgan-gp":
        program = probgen.load("wgan_gp", data, **sizes, penalty=PENALTY, critic_steps=1)
    else:
        program = probgen.load("gan", data, **sizes, r1=0.0)
    feed = Feed(data.train, Preparation.of(program.prepare, data), case.batch, 0)
    options = Options(steps=10**6, batch_size=case.batch, lr=LR, device="cpu", compile=compile)
    return Engine(program, by, feed, options)


def builders(objective: str, case: Case) -> tuple[dict[str, Callable[[], Opponent]], dict[str, str]]:
    """What makes each peer that can be made, and what is to be said of those that cannot."""
    able, failed = {}, {}
    for name, peer in PEERS.items():
        build = partial(_seeded, peer, objective, case)
        try:
            build()
        except ImportError as error:
            failed[name] = f"cannot be imported here ({_words(error)})"
        except RuntimeError as error:
            failed[name] = f"left out: {error}"
        else:
            able[name] = build
    return able, failed


def _seeded(peer: type[Opponent], objective: str, case: Case) -> Opponent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peer(*case.networks(objective), objective, case.shape, case.z_dim)


def measured(objective: str, case: str, pairs: int, steps: int) -> dict[str, Any]:
    """Seconds a step of every contender in every round, and what is to be said of each.

    A peer takes part in the fastest of its forms; `forms` holds the seconds of all of them, or why one does not run.
    """
    pyro.enable_validation(False)
    ours = engine(objective, CASES[case])
    ready, run = readied(advanced(ours))
    able, failed = builders(objective, CASES[case])
    found: dict[str, Any] = {
        "ready": {ADVANCE: ready},
        "parameters": {ADVANCE: sum(p.numel() for p in ours.leaves.params.values())},
        "chosen": {ADVANCE: "compiled" if ours.compiled else "eager"},
        "forms": {ADVANCE: {}},
        "failed": failed,
    }
    runs = {ADVANCE: run}
    for peer, build in able.items():
        found["parameters"][peer] = sum(p.numel() for p in build().parameters())
        found["forms"][peer], forms = raced(build, ours.feed, steps, FORMS)
        form = min(forms, key=found["forms"][peer].get)
        found["chosen"][peer], (found["ready"][peer], runs[peer]) = form, forms[form]
    times = rounds({name: (run, steps) for name, run in runs.items()}, pairs)
    return {**found, "times": {name: list(values) for name, values in times.items()}}
