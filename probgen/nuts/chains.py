"""`NUTS` on both backends: what it is asked for, what it refuses, and what its chains say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.nuts.draws import Draws, drawn, gives_density, log_density, log_mean
from probgen.program import Structure

VALIDATION = 100  # draws by which rows that were held out are judged while the chains run

NOWHERE = (
    "NUTS found no place to start from: the log joint or its gradient is not finite within (−2, 2) of the unconstrained "
    "space; check the priors, and prepare data that are far from zero (Standardize)"
)

Arrays = Mapping[str, np.ndarray]
State = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How NUTS draws: `draws` of each of `chains` chains after `warmup` steps that adapt step size and mass matrix.

    `target_accept` is the mean acceptance the step size is adapted to: higher means smaller steps and fewer divergences.
    A trajectory has at most 2^`max_tree_depth` − 1 steps.

    References:
        | The No-U-Turn Sampler (Hoffman & Gelman, 2014), https://arxiv.org/abs/1111.4246
    """

    draws: int = 1000
    warmup: int = 1000
    chains: int = 4
    target_accept: float = 0.8
    max_tree_depth: int = 10

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("warmup", 0), ("chains", 1), ("max_tree_depth", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ProbgenError(f"NUTS: `{name}` is {value!r}: it must be a whole number, {least} or more")
        if not isinstance(self.target_accept, int | float) or not 0 < self.target_accept < 1:
            raise ProbgenError(f"NUTS: `target_accept` is {self.target_accept!r}: it must lie between 0 and 1")

    @property
    def defaults(self) -> dict[str, Any]:
        """What `fit` takes where the caller is silent: all rows at once, and a step for every draw of all chains."""
        return {"batch_size": None, "steps": self.warmup + self.draws}

    def objective(self, *_: Any, **__: Any) -> Any:
        """It has none."""
        raise ProbgenError("NUTS draws from the posterior and minimises nothing, so it cannot be part of a loss")


class Watched:
    """Chains as `fit` sees them between steps: `view` is the program under their draws, `weights(state)` the draws."""

    batches_per_step, counts = 1, ("divergences",)
    by: Sampling
    rows: int
    view: Any
    structure: Structure
    weights: Callable[[State], dict[str, np.ndarray]]

    def kept(self, state: State, piece: Draws, first: int) -> tuple[Draws, ...]:
        """The draws so far and those of `piece`, steps `first` and on, that do not belong to the warm-up."""
        new = piece.after(max(0, self.by.warmup - first))
        return (*state["pieces"], new) if new.length else state["pieces"]

    @property
    def validates(self) -> bool:
        """Whether rows that were held out have a density given the draws."""
        return gives_density(self.structure)

    def loss_on(self, state: State, batches: Iterable[Any], seed: int = 0) -> float:
        """−log (1/S) Σ_s p(x_n | θ_s) per datum of held-out rows, under at most `VALIDATION` draws so far.

        Where that is not known, −log joint per datum of the training rows at the chains' places.
        """
        draws = Draws.of(self.weights(state))
        if not self.validates:
            return float(metrics(draws.after(draws.length - 1).stats, self.rows)["loss"][0])
        draws = draws.thinned(-(-VALIDATION // draws.chains))
        rows = [log_mean(log_density(self.view, arrays, draws, seed)) for arrays in batches]
        return -float(np.mean(np.concatenate(rows)))

    def diagnose(self, state: State, step: int) -> str:
        """What a log joint that is not finite means."""
        return (
            f"at step {step} the log joint of a chain is not finite: a prior or a likelihood has no density where the "
            "chain is; bound its scale, or give it a wider support"
        )


def metrics(stats: Arrays, rows: int) -> dict[str, np.ndarray]:
    """The curves of steps whose statistics are [chains, steps]: means over chains, and how many of them diverged.

    `loss` is the mean −log joint of the chains in nats per datum: priors included, in the unconstrained coordinates
    in which NUTS moves (with their log-Jacobian, as Stan's `lp__`).
    """
    mean = {name: np.mean(stats[name], axis=0, dtype=np.float64) for name in ("lp", "acceptance_rate", "step_size")}
    return {
        "loss": -mean["lp"] / rows,
        "accept_prob": mean["acceptance_rate"],
        "step_size": mean["step_size"],
        "divergences": np.sum(stats["diverging"], axis=0).astype(np.float64),
    }


def refuse_minibatches(batch: int, rows: int) -> None:
    """NUTS needs the density of all rows."""
    if batch < rows:
        raise ProbgenError(
            f"NUTS takes all {rows} rows at every step, and `batch_size` is {batch}: leave it out, or give batch_size=None"
        )


def refuse_undrawable(structure: Structure, params: Sequence[str]) -> None:
    """What NUTS can neither draw nor hold: parameters, discrete latents, point masses; and a program without latents."""
    if params:
        raise ProbgenError(
            f"NUTS draws latents and learns no parameters, and this program has the parameter {params[0]!r}: give it a "
            "prior (a sample site; the mixtures of the zoo do so with bayesian=True), or learn it by ELBO() or EM()"
        )
    for name, site in structure.latents.items():
        if site.discrete and not site.enumerated:
            raise ProbgenError(
                f'NUTS cannot draw the discrete latent {name!r}: mark it infer={{"enumerate": "parallel"}} so that it is '
                "summed out"
            )
        if site.delta:
            raise ProbgenError(f"NUTS cannot draw the latent {name!r}, a point mass: make it a deterministic site")
    if not drawn(structure):
        raise ProbgenError(
            "NUTS: this program has no continuous latents, so there is nothing to draw: use ELBO() or EM()"
        )


def refuse_subsampling(name: str, size: int, subsample: int) -> None:
    """A plate that draws a part of its rows at every call makes the density a random number."""
    if subsample < size:
        raise ProbgenError(
            f"NUTS needs the density of all rows, and the plate {name!r} subsamples {subsample} of {size}: leave out "
            "its subsample_size"
        )
