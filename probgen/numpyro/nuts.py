"""`NUTS`: draws from the posterior of a NumPyro program, by `numpyro.infer.NUTS`.

A step is one draw of all chains. Chains run one after another, each in one compiled loop whose number of steps is an
argument; with the same seed their draws are those of `numpyro.infer.MCMC`. A chain is a tuple of arrays, so a run goes
on from a checkpoint bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import Delta
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import NUTS as Kernel
from numpyro.infer import init_to_uniform

from probgen.errors import ProbgenError
from probgen.numpyro import terms
from probgen.numpyro.leaves import collect, from_numpy, named, own_containers, to_numpy
from probgen.numpyro.loss import Loss
from probgen.numpyro.modes import modules_of
from probgen.numpyro.scope import Scope, device_of
from probgen.numpyro.structure import inspect, structure_of
from probgen.numpyro.trace import as_jax, bound
from probgen.numpyro.trained import Trained, point_masses
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

CAPACITY = 1024  # draws of a chain in one call of the compiled loop, at most
KEPT_BYTES = 2**26  # of which the loop keeps as much
STATS = ("lp", "energy", "acceptance_rate", "diverging", "n_steps", "step_size")
CHAIN = "chain"  # before the names of a chain's arrays in a checkpoint


class Chains(Watched):
    """Runs the chains of `NUTS` over the rows of a feed; all arrays in and out are NumPy's.

    A state holds the chains, the number of steps taken, and the draws so far in pieces.
    """

    compiled, note = True, None

    def __init__(self, program: Program, by: NUTS, feed: Any, options: Any) -> None:
        self.by, self.options, self.rows = by, options, feed.rows
        refuse_minibatches(feed.batch_size, feed.rows)
        self._device = device_of(options.device)
        self.device = f"{self._device.platform}:{self._device.id}" if self._device.platform != "cpu" else "cpu"
        self.program, self._modules = replace(program, guide=None), modules_of(program.model)
        arrays = feed.batch(0)
        with self._scope():
            self.arrays = jax.device_put(as_jax(arrays), self._device)
            leaves = collect(self.program, self.arrays, options.seed)
            self.buffers = leaves.buffers
            structure = structure_of(self.program, self.arrays, self.buffers, self.rows)
            refuse_undrawable(structure, list(leaves.params))
            self.names = drawn(structure)
            self.model = bound(program.model)
            if self.buffers:
                self.model = substitute(self.model, data=own_containers(self.buffers))
            somewhere = self._somewhere()
        self.view = DrawnProgram(self.program, self._named(somewhere), arrays, rows=self.rows, **self._numbers())
        self.structure = self.view.structure
        self.view.refuse_outside(arrays)
        self.kernel = Kernel(self.model, target_accept_prob=by.target_accept, max_tree_depth=by.max_tree_depth)
        self._start = self._started()

    def _numbers(self) -> dict[str, Any]:
        return {"device": self.device, "precision": self.options.precision, "seed": self.options.seed}

    def _scope(self) -> Scope:
        return Scope(self._device, self.options.precision, False, self._modules)

    def _somewhere(self) -> Draws:
        """One place where the chains could be, by which the program is looked at."""
        run = substitute(seed(self.model, jax.random.key(self.options.seed)), substitute_fn=init_to_uniform)
        found = trace(run).get_trace(**self.arrays)
        for name, site in found.items():
            if site["type"] == "plate":
                size, subsample = site["args"]
                refuse_subsampling(name, size, size if subsample is None else subsample)
        return Draws({name: to_numpy(found[name]["value"])[None, None] for name in self.names}, {})

    # -- the state ------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The chains before their first step, each at a place of its own: a pure function of the seed."""
        return {"chains": self._start, "step": 0, "pieces": ()}

    def _started(self) -> tuple[Any, ...]:
        """Keys are split, and chains begun, as `numpyro.infer.MCMC` does it."""
        with self._scope():
            key = jax.random.key(self.options.seed)
            keys = jax.random.split(key, self.by.chains) if self.by.chains > 1 else [key]
            try:
                chains = tuple(self.kernel.init(key, self.by.warmup, None, (), self.arrays) for key in keys)
                return jax.device_put(chains, self._device)  # as the loop returns them, so that it is compiled once
            except RuntimeError as error:
                raise ProbgenError(NOWHERE) from error

    def weights(self, state: State) -> dict[str, np.ndarray]:
        """The draws so far, or where the chains are while they warm up; and the buffers that the program carries."""
        if state["pieces"]:
            return self._named(Draws.joined(state["pieces"]))
        with self._scope():
            return self._named(_stacked([self._recorded(chain, self.arrays) for chain in state["chains"]], None))

    def _named(self, draws: Draws) -> dict[str, np.ndarray]:
        return draws.weights() | {name: to_numpy(leaf) for name, leaf in named({}, self.buffers).items()}

    def export(self, state: State) -> dict[str, np.ndarray]:
        """Everything that is needed to go on bit for bit."""
        flat = [jax.tree_util.tree_flatten_with_path(chain)[0] for chain in state["chains"]]
        found = {
            f"{CHAIN}{jax.tree_util.keystr(leaves[0][0])}": np.stack([to_numpy(leaf) for _, leaf in leaves])
            for leaves in zip(*flat, strict=True)
        }
        kept = Draws.joined(state["pieces"]).weights() if state["pieces"] else {}
        return {**found, **kept, "step": np.asarray(state["step"])}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> State:
        """The state that `export` wrote."""
        with self._scope():
            chains = tuple(self._restored(arrays, i, chain) for i, chain in enumerate(self._start))
        draws = Draws.of(arrays)
        return {"chains": chains, "step": int(arrays["step"]), "pieces": () if draws is None else (draws,)}

    def _restored(self, arrays: Mapping[str, np.ndarray], chain: int, like: Any) -> Any:
        flat, tree = jax.tree_util.tree_flatten_with_path(like)
        leaves = []
        for path, leaf in flat:
            name = f"{CHAIN}{jax.tree_util.keystr(path)}"
            if name not in arrays or arrays[name].shape != (self.by.chains, *np.shape(to_numpy(leaf))):
                raise ProbgenError(f"the checkpoint does not fit the program: {name} is missing or has another shape")
            leaves.append(from_numpy(arrays[name][chain], leaf))
        return jax.device_put(jax.tree.unflatten(tree, leaves), self._device)

    # -- steps ----------------------------------------------------------------------------------------------------

    def advance(self, state: State, first: int, last: int) -> tuple[State, dict[str, np.ndarray]]:
        """Draws `first` to `last` − 1 of all chains, those of the warm-up included; curves as `metrics` says."""
        with self._scope():
            moved = [self._moved(chain, last - first) for chain in state["chains"]]
        piece = _stacked([records for _, records in moved], last - first)
        chains, pieces = tuple(chain for chain, _ in moved), self.kept(state, piece, first)
        return {"chains": chains, "step": last, "pieces": pieces}, metrics(piece.stats, self.rows)

    def _moved(self, chain: Any, steps: int) -> tuple[Any, dict]:
        """A chain so many steps on, and what was recorded on the way, [steps, ...]."""
        parts = []
        while steps:
            count = min(self._capacity, steps)
            chain, log = self._loop(chain, self.arrays, np.int32(count))
            parts.append(jax.tree.map(lambda a, count=count: np.asarray(a)[:count], log))
            steps -= count
        values, packed = jax.tree.map(lambda *a: np.concatenate(a), *parts)
        return chain, (values, {n: packed[:, i].astype(self._kinds[n]) for i, n in enumerate(STATS)})

    def _record(self, chain: Any, arrays: Mapping[str, jax.Array]) -> tuple[dict, dict]:
        """Where a chain is, as the program sees it, and how it came there."""
        values = self.kernel.postprocess_fn((), arrays)(chain.z)
        stats = (
            -chain.potential_energy, chain.energy, chain.accept_prob, chain.diverging, chain.num_steps,
            chain.adapt_state.step_size,
        )  # fmt: skip
        return {name: values[name] for name in self.names}, dict(zip(STATS, stats, strict=True))

    @functools.cached_property
    def _recorded(self) -> Callable[..., tuple[dict, dict]]:
        return jax.jit(self._record)

    def _packed(self, chain: Any, arrays: Mapping[str, jax.Array]) -> tuple[dict, jax.Array]:
        """The same with the statistics as one array: a loop pays for each that it writes to."""
        values, stats = self._record(chain, arrays)
        return values, jnp.stack([jnp.asarray(stats[name], jnp.result_type(float)) for name in STATS])

    @functools.cached_property
    def _shapes(self) -> Any:
        return jax.eval_shape(self._packed, self._start[0], self.arrays)

    @functools.cached_property
    def _kinds(self) -> dict[str, Any]:
        with self._scope():
            return {n: like.dtype for n, like in jax.eval_shape(self._record, self._start[0], self.arrays)[1].items()}

    @functools.cached_property
    def _capacity(self) -> int:
        size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._shapes))
        return max(1, min(CAPACITY, KEPT_BYTES // size))

    @functools.cached_property
    def _loop(self) -> Callable[..., tuple[Any, Any]]:
        """`count` steps of one chain, at most the loop's capacity."""

        def run(chain: Any, arrays: Mapping[str, jax.Array], count: jax.Array) -> tuple[Any, Any]:
            def body(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                chain, log = carry
                chain = self.kernel.sample(chain, (), arrays)
                return chain, jax.tree.map(lambda a, v: a.at[i].set(v), log, self._packed(chain, arrays))

            empty = jax.tree.map(lambda a: jnp.zeros((self._capacity, *a.shape), a.dtype), self._shapes)
            return jax.lax.fori_loop(0, count, body, (chain, empty))

        return jax.jit(run)

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

        def one(values: Any, key: jax.Array, arrays: Any, drawn: Mapping[str, jax.Array]) -> tuple[dict, dict]:
            run = self._pair(values, key, arrays, guide=point_masses(drawn))
            found = {n: t for n, t in terms.site_terms(run).items() if run.frames(n)}
            if self.structure.enumerated:
                drawn = drawn | self._conditional(values, jax.random.fold_in(key, 1), arrays, drawn)
            return {n: self._rows_first(v, n) for n, v in drawn.items()}, found

        number = len(next(iter(latents.values())))
        return self._many("given", one, arrays, number, seed, latents)


def _guide(draws: Draws, structure: Structure) -> Callable[..., None]:
    """A guide that puts all its mass at one of the draws."""
    number, flat = draws.chains * draws.length, draws.flat()

    def guide(*args: Any, **arrays: Any) -> None:
        rows = rows_of(arrays or dict(enumerate(args)))
        place = jax.random.randint(numpyro.prng_key(), (), 0, number)
        for name, values in flat.items():
            site = structure.model[name]
            value = first_rows(jnp.asarray(values)[place], site, rows)
            with ExitStack() as plates:
                for plate in site.plates:
                    size = rows if plate.data else plate.size
                    plates.enter_context(numpyro.plate(plate.name, size, dim=plate.dim))
                numpyro.sample(name, Delta(value, event_dim=site.event_dim))

    return guide


def _stacked(records: list[tuple[dict, dict]], steps: int | None) -> Draws:
    """What chains recorded, [steps, ...] each or at one place, side by side."""
    one = steps is None
    values, stats = jax.tree.map(
        lambda *a: np.stack([np.asarray(v)[None] if one else np.asarray(v) for v in a]), *records
    )
    depth = tree_depth(stats["n_steps"])
    return Draws(values, {**stats, "n_steps": stats["n_steps"].astype(np.int32), "tree_depth": depth})


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
