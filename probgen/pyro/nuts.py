"""`NUTS`: draws from the posterior of a Pyro program, by `pyro.infer.NUTS`.

A step is one draw of all chains, one after another. Random numbers are a pure function of (seed, chain, step). A chain of
Pyro's cannot be stored: a resumed run draws the steps it had taken once more, and so ends bit for bit where an
uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import NUTS as Sampler
from pyro.infer import infer_discrete
from torch import Tensor

from probgen.chunks import seed_at
from probgen.errors import ProbgenError
from probgen.nuts.chains import (
    NOWHERE,
    Sampling,
    State,
    Watched,
    metrics,
    refuse_minibatches,
    refuse_subsampling,
    refuse_undrawable,
)
from probgen.nuts.draws import Draws, drawn, first_rows, fitting, refuse_other_rows, tree_depth
from probgen.program import Program, Structure, rows_of
from probgen.pyro.device import generators_restored, numbers, resolve_device, resolve_precision, seed_step
from probgen.pyro.leaves import leaves_of, start_values
from probgen.pyro.loss import Loss
from probgen.pyro.trace import bound, forked, structure_of, tensors
from probgen.pyro.trained import Trained, drawn_whole, inspect
from probgen.pyro.weights import datum_terms, drawn_traces

STEP = "step"


class Kernel(Sampler):
    """Pyro's kernel, which keeps the energy and the number of leapfrog steps of its last trajectory."""

    energy, leapfrogs = float("nan"), 0

    def _sample_r(self, name: str) -> tuple:
        momentum = super()._sample_r(name)
        self.energy = float(self._kinetic_energy(momentum[1]) + self._potential_energy_last)
        self.leapfrogs = 0
        return momentum

    def _build_basetree(self, *args: Any) -> Any:
        self.leapfrogs += 1
        return super()._build_basetree(*args)


class Chain:
    """One chain: a kernel, where it is, and its stream of random numbers."""

    def __init__(self, kernel: Kernel, warmup: int, arrays: Mapping[str, Tensor], seed: int, device: Any) -> None:
        self.kernel, self.warmup, self.seed, self.device = kernel, warmup, seed, device
        self.taken, self.accepted = 0, 0.0
        seed_step(seed, 0, device)
        kernel.setup(warmup, **arrays)
        self.z = kernel.initial_params

    def move(self) -> None:
        """One draw."""
        kernel, before, diverged = self.kernel, self.kernel._mean_accept_prob, len(self.kernel._divergences)
        self.taken += 1
        seed_step(self.seed, self.taken, self.device)
        self.z = kernel.sample(self.z)
        since = self.taken if self.taken <= self.warmup else self.taken - self.warmup
        self.accepted = before + (kernel._mean_accept_prob - before) * since  # of the mean that the kernel keeps
        self.diverging = len(kernel._divergences) > diverged

    diverging = False

    def record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Where the chain is, as the program sees it, and how it came there."""
        with torch.no_grad():
            values = {name: _array(self.kernel.transforms[name].inv(z)) for name, z in self.z.items()}
        return values, {
            "lp": -float(self.kernel._potential_energy_last),
            "energy": self.kernel.energy,
            "acceptance_rate": self.accepted,
            "diverging": self.diverging,
            "n_steps": self.kernel.leapfrogs,
            "step_size": float(self.kernel.step_size),
        }


class Chains(Watched):
    """Runs the chains of `NUTS` over the rows of a feed; all arrays in and out are NumPy's.

    A state holds the number of steps taken, where the chains are, and the draws so far in pieces; the chains
    themselves live here, and are begun again where a state is not the one they are in.
    """

    compiled = False

    def __init__(self, program: Program, by: NUTS, feed: Any, options: Any) -> None:
        self.by, self.options, self.rows = by, options, feed.rows
        refuse_minibatches(feed.batch_size, feed.rows)
        self.device, (self.dtype, autocast) = resolve_device(options.device), resolve_precision(options.precision)
        if autocast:
            raise ProbgenError('NUTS follows gradients far, which bfloat16 cannot: use precision "32" or "64"')
        self.note = "Pyro's NUTS runs eagerly, as Python: it is not compiled" if options.compile else None
        self.program = replace(program, guide=None)
        self.model = bound(program.model)
        arrays = feed.batch(0)
        self.arrays = tensors(arrays, self.dtype, self.device)
        self.leaves = leaves_of(self.program, arrays, self.dtype, options.seed)
        self.buffers = start_values(self.leaves, self.dtype, self.device)
        with self._running():
            structure = structure_of(self.program, self.arrays, self.rows, options.seed)
            refuse_undrawable(structure, list(self.leaves.params))
            self.names = drawn(structure)
            somewhere = self._somewhere()
        self.view = DrawnProgram(self.program, self._named(somewhere), arrays, rows=self.rows, **self._numbers())
        self.structure = self.view.structure
        self.view.refuse_outside(arrays)
        self._begin()
        self._start = {STEP: 0, "place": self._recorded(), "pieces": ()}

    def _numbers(self) -> dict[str, Any]:
        return {"device": str(self.device), "precision": self.options.precision, "seed": self.options.seed}

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with numbers(self.dtype, self.device), generators_restored(self.device), torch.enable_grad():
            with self.leaves.substituted(self.buffers), pyro.validation_enabled(False):
                yield

    def _somewhere(self) -> Draws:
        """One place where the chains could be, by which the program is looked at."""
        with forked(self.options.seed), torch.no_grad():
            trace = poutine.trace(self.model).get_trace(**self.arrays)
        for site in trace.nodes.values():
            for frame in site["cond_indep_stack"] if site["type"] == "sample" else ():
                refuse_subsampling(frame.name, frame.full_size or frame.size, frame.size)
        return Draws({name: _array(trace.nodes[name]["value"])[None, None] for name in self.names}, {})

    def _begin(self) -> None:
        """All chains, each at a place of its own: a pure function of the seed."""
        self._at, self._chains = 0, []
        with self._running():
            for chain in range(self.by.chains):
                kernel = Kernel(
                    self.model, target_accept_prob=self.by.target_accept, max_tree_depth=self.by.max_tree_depth
                )
                seed = seed_at(self.options.seed, chain)
                try:
                    self._chains.append(Chain(kernel, self.by.warmup, self.arrays, seed, self.device))
                except ValueError as error:
                    if "initial params" not in str(error):
                        raise
                    raise ProbgenError(NOWHERE) from error

    def _recorded(self) -> Draws:
        return _stacked([[chain.record()] for chain in self._chains])

    # -- the state ------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The state before step 0, a pure function of the seed."""
        return self._start

    def weights(self, state: State) -> dict[str, np.ndarray]:
        """The draws so far, or where the chains are while they warm up; and the buffers that the program carries."""
        return self._named(Draws.joined(state["pieces"]) if state["pieces"] else state["place"])

    def _named(self, draws: Draws) -> dict[str, np.ndarray]:
        return draws.weights() | {name: _array(value) for name, value in self.buffers.items()}

    def export(self, state: State) -> dict[str, np.ndarray]:
        """How far the chains are, and their draws."""
        draws = Draws.joined(state["pieces"]) if state["pieces"] else state["place"]
        return {**draws.weights(), STEP: np.asarray(state[STEP])}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> State:
        """The state that `export` wrote."""
        step = int(arrays[STEP])
        draws = fitting(Draws.of(arrays), self.structure)
        return {STEP: step, "place": draws.after(draws.length - 1), "pieces": (draws,) if step > self.by.warmup else ()}

    # -- steps ----------------------------------------------------------------------------------------------------

    def advance(self, state: State, first: int, last: int) -> tuple[State, dict[str, np.ndarray]]:
        """Draws `first` to `last` − 1 of all chains, those of the warm-up included; curves as `metrics` says."""
        self._go_to(first)
        self._at = -1  # an interrupted move leaves the chains nowhere
        with self._running():
            records = [[self._moved(chain) for _ in range(first, last)] for chain in self._chains]
        self._at, piece = last, _stacked(records)
        place, pieces = piece.after(piece.length - 1), self.kept(state, piece, first)
        return {STEP: last, "place": place, "pieces": pieces}, metrics(piece.stats, self.rows)

    @staticmethod
    def _moved(chain: Chain) -> tuple[dict, dict]:
        chain.move()
        return chain.record()

    def _go_to(self, step: int) -> None:
        """The chains as they were at a step, begun again where they are at another."""
        if self._at == step:
            return
        if step:
            warnings.warn(
                f"a chain of Pyro's NUTS cannot be stored: all chains start again from their seed and draw the {step} steps "
                "before this one once more",
                stacklevel=4,
            )
        self._begin()
        with self._running():
            for chain in self._chains:
                for _ in range(step):
                    chain.move()
        self._at = step

    # -- looking at it --------------------------------------------------------------------------------------------

    def refuse_outside(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse rows that lie outside the support of the site that observes them."""
        Trained.refuse_outside(self.view, arrays)


class DrawnProgram(Trained):
    """A program whose guide is the draws of `NUTS`: it picks one of them at random."""

    def __init__(self, program: Program, weights: Mapping[str, np.ndarray], arrays: Any, **options: Any) -> None:
        program = replace(program, guide=None)
        structure = inspect(program, arrays, options["rows"], options.get("seed", 0))
        self.draws = fitting(Draws.of(weights), structure)
        super().__init__(replace(program, guide=_guide(self.draws, structure)), weights, arrays, **options)

    def refuse_outside(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse rows outside the support of their site, and others than local latents were drawn for."""
        refuse_other_rows(self.structure, self.arrays, arrays)
        super().refuse_outside(arrays)

    def given(
        self, arrays: Mapping[str, np.ndarray], latents: Mapping[str, np.ndarray], seed: int
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """At draws {name: [S, ...]}: all latents, [S, B, ...] where they are local, and log p by local site, [S, B].

        Latents that are summed out are drawn from their exact conditional, and summed out in the density.
        """
        batch, found = self._tensors(arrays), []
        with self._quiet(seed):
            latents = self._tensors(latents)
            for i in range(len(next(iter(latents.values())))):
                found.append(self._given_one(batch, {name: value[i] for name, value in latents.items()}))
        values, terms = ({n: np.stack([_array(f[part][n]) for f in found]) for n in found[0][part]} for part in (0, 1))
        return values, terms

    def _given_one(self, batch: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> tuple[dict, dict]:
        rows = rows_of(batch)

        def guide(**_: Tensor) -> None:
            _point_masses(drawn, self.structure, rows)

        p, q = drawn_traces(self._plan, self._model, guide, (), batch)
        log_p, _, _ = datum_terms(self._plan, p, q, rows)
        if self.structure.enumerated:
            model = infer_discrete(
                poutine.replay(self._model, trace=q), first_available_dim=-1 - self._plan.depth, temperature=1
            )
            nodes = poutine.trace(model).get_trace(**batch).nodes
            drawn = {**drawn, **{name: drawn_whole(nodes[name]) for name in self.structure.enumerated}}
        return drawn, log_p


def _guide(draws: Draws, structure: Structure) -> Callable[..., None]:
    """A guide that puts all its mass at one of the draws."""
    number, flat = draws.chains * draws.length, draws.flat()

    def guide(*args: Any, **arrays: Any) -> None:
        batch = arrays or dict(enumerate(args))
        like, place = next(iter(batch.values())), int(torch.randint(number, ()))
        drawn = {name: torch.as_tensor(value[place], device=like.device) for name, value in flat.items()}
        _point_masses(tensors(drawn, torch.get_default_dtype(), like.device), structure, rows_of(batch))

    return guide


def _point_masses(drawn: Mapping[str, Tensor], structure: Structure, rows: int) -> None:
    """Sites with all their mass at given values, in the plates of the model."""
    all_plates = {plate.name: plate for name in drawn for plate in structure.model[name].plates}
    made = {p.name: pyro.plate(p.name, rows if p.data else p.size, dim=p.dim) for p in all_plates.values()}
    for name, value in drawn.items():
        site = structure.model[name]
        value = first_rows(value, site, rows)
        with contextlib.ExitStack() as plates:
            for plate in site.plates:
                plates.enter_context(made[plate.name])
            pyro.sample(name, pyro.distributions.Delta(value, event_dim=site.event_dim))


def _stacked(records: list[list[tuple[dict, dict]]]) -> Draws:
    """What chains recorded at each step, side by side."""

    def side_by_side(part: int) -> dict[str, np.ndarray]:
        first = records[0][0][part]
        return {n: np.stack([np.stack([r[part][n] for r in chain]) for chain in records]) for n in first}

    values, stats = side_by_side(0), side_by_side(1)
    stats = {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in stats.items()}
    depth = tree_depth(stats["n_steps"])
    return Draws(values, {**stats, "n_steps": stats["n_steps"].astype(np.int32), "tree_depth": depth})


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().copy()


@dataclass(frozen=True)
class NUTS(Sampling, Loss):
    """`draws` from the posterior by each of `chains` chains, after `warmup` steps that adapt step size and mass matrix.

    `target_accept` is the mean acceptance the step size is adapted to: higher means smaller steps and fewer divergences.
    Discrete latents marked for enumeration are summed out. All rows are used at once, and the guide not at all.

    References:
        | The No-U-Turn Sampler (Hoffman & Gelman, 2014), https://arxiv.org/abs/1111.4246
    """

    engine = Chains
    trained = DrawnProgram
