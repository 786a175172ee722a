"""A trained Pyro program, and the numbers the verbs ask of it: arrays in, arrays out."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.infer import infer_discrete
from pyro.infer.autoguide import AutoGuide
from pyro.infer.enum import prune_subsample_sites
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor, nn

from probgen.cells import GAUSSIAN, Cell, row_axis
from probgen.diffusion.requirements import denoiser_of, refuse_not_gaussian
from probgen.diffusion.samplers import Sampler
from probgen.energy import Langevin
from probgen.energy.requirements import refuse_escaped, refuse_unscored
from probgen.errors import ProbgenError
from probgen.nuts.chains import Sampling
from probgen.program import Program, Site, Structure, rows_of
from probgen.pyro.denoiser import Denoiser
from probgen.pyro.device import numbers, resolve_device, resolve_precision
from probgen.pyro.distributions import Flow
from probgen.pyro.energy import langevin, parts_and_scores
from probgen.pyro.enumeration import enumerated_traces, state_table
from probgen.pyro.leaves import leaves_of, own_program, start_values
from probgen.pyro.plan import Plan, make_plan, owned
from probgen.pyro.probability_flow import log_density
from probgen.pyro.samplers import CompiledSteps, sampled
from probgen.pyro.support import refuse_out_of_support
from probgen.pyro.trace import bound, callables, forked, is_sample, structure_of, tensors, unwrapped, whole_plates
from probgen.pyro.transforms.bijection import call_and_ladj
from probgen.pyro.weights import datum_terms, drawn_traces, local_terms, row_dim

ROWS_AT_ONCE = 16384  # rows of a tiled pass: bounds memory at any k and any number of data


class TrainedCallable:
    """A model or guide that runs with the trained weights in place, and puts back what was there before.

    It is what the PPL expects of a callable (`Predictive`, `poutine.trace`, `render_model`); the methods of an
    autoguide (`median`, `quantiles`, ...) run with the trained weights too.
    """

    def __init__(self, fn: Callable[..., Any], running: Callable[[], Any]) -> None:
        functools.update_wrapper(self, fn, updated=())
        self._fn, self._running = fn, running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The program's own call, with the trained weights."""
        with self._running():
            return self._fn(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._fn, name)
        return TrainedCallable(value, self._running) if callable(value) else value


class Trained:
    """A program with its trained weights.

    `arrays` is one prepared batch that shows the shapes; `rows` is the N the program was trained on. Every method
    takes prepared arrays and a seed, and leaves modules, parameter store and generators as they were.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        *,
        rows: int,
        device: str = "cpu",
        precision: str = "32",
        seed: int = 0,
    ) -> None:
        self.program, self.rows = own_program(program), rows
        program = self.program
        self.device, (self.dtype, _) = resolve_device(device), resolve_precision(precision)
        self.leaves = leaves_of(program, arrays, self.dtype, seed)
        self.values = self._fitting(weights)
        self._model, self._guide = map(self._running_call, callables(program))
        self.model = TrainedCallable(program.model, self.running)
        self.guide = None if program.guide is None else TrainedCallable(program.guide, self.running)
        self.arrays = dict(arrays)
        batch = self._tensors(arrays)
        with self.running():
            self.structure: Structure = structure_of(program, batch, rows, seed)
        self._plan: Plan = make_plan(self._model, self._guide, (), batch)
        self._compiled: dict[Any, CompiledSteps] = {}

    def _fitting(self, weights: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        values = start_values(self.leaves, self.dtype, self.device)
        for name, like in values.items():
            if name not in weights:
                raise ProbgenError(f"the weights hold no {name!r}: they belong to another program or other options")
            if tuple(weights[name].shape) != tuple(like.shape):
                raise ProbgenError(
                    f"the weights of {name!r} have shape {tuple(weights[name].shape)} where the program has "
                    f"{tuple(like.shape)}: they belong to other options"
                )
            values[name] = torch.from_numpy(np.array(weights[name])).to(device=self.device, dtype=like.dtype)
        return values

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The trained weights in the program's places, in eval mode and the precision of the fit."""
        with numbers(self.dtype, self.device), self.leaves.substituted(self.values, training=False):
            yield

    def _running_call(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(**arrays: Tensor) -> Any:
            with self.running(), self._whole(rows_of(arrays)):
                return fn(**arrays)

        return call

    def _whole(self, rows: int) -> contextlib.AbstractContextManager[None]:
        """A plate with a length of its own holds the rows at hand, so that any number of rows can be looked at."""
        if not self.structure.states_rows:
            return contextlib.nullcontext()
        return whole_plates(self.structure.data_plates, rows)

    def refuse_outside(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse rows that lie outside the support of the site that observes them."""
        self._refuse_other_rows(arrays)
        with self._quiet(0):
            batch = self._tensors(arrays)
            refuse_out_of_support(self._model, self._guide, batch, lambda: batch, 0)

    def _refuse_other_rows(self, arrays: Mapping[str, np.ndarray]) -> None:
        """An autoguide with one value per training row says nothing of others."""
        local = [name for name, site in self.structure.sampled.items() if site.local]
        if not isinstance(self.program.guide, AutoGuide) or not local:
            return
        if any(not np.array_equal(arrays[name], value) for name, value in self.arrays.items() if name in arrays):
            raise ProbgenError(
                f"the autoguide {type(self.program.guide).__name__} keeps one value of {local[0]!r} for each training row, "
                "so it has no posterior of other rows or of a part of them: give all training rows in one batch (at most "
                "500), or write a guide that computes it from the data"
            )

    @contextlib.contextmanager
    def _quiet(self, seed: int) -> Iterator[None]:
        with forked(seed), torch.no_grad(), pyro.validation_enabled(False), self.running():  # densities run late
            yield

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return tensors(arrays, self.dtype, self.device)

    # -- what was learned -----------------------------------------------------------------------------------------

    @property
    def params(self) -> dict[str, np.ndarray]:
        """Parameters by name, constrained as the program sees them."""
        return {name: _array(value) for name, value in self.leaves.constrained(self.values).items()}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Copies of the program's modules that hold the trained weights."""
        with self.running():
            return {name: _copied(module) for name, module in self.leaves.modules.items()}

    # -- sampling -------------------------------------------------------------------------------------------------

    def draw(self, n: int, seed: int, arrays: Mapping[str, np.ndarray], prior: bool = False) -> dict[str, np.ndarray]:
        """One run of the unconditioned model on n rows: every site's value.

        Global latents come from the guide, one draw for each of the n samples, unless `prior`.
        """
        batch = self._tensors(arrays)
        with self._quiet(seed):
            if prior or not self.structure.has_global_latents:
                return _values(poutine.trace(poutine.uncondition(self._model)).get_trace(**batch))
            singles = []
            for i in range(n):
                row = {name: value[i : i + 1] for name, value in batch.items()}
                model = poutine.replay(poutine.uncondition(self._model), trace=self._global_draw())
                singles.append(_values(poutine.trace(model).get_trace(**row)))
        local = {name for name, site in self.structure.model.items() if site.local}
        return {
            name: np.concatenate([s[name] for s in singles]) if name in local else np.stack([s[name] for s in singles])
            for name in singles[0]
        }

    def _global_draw(self) -> poutine.Trace:
        """The guide's draw of the global latents alone."""
        trace = prune_subsample_sites(poutine.trace(self._guide).get_trace(**self._tensors(self.arrays)))
        for name in [n for n, site in self.structure.guide.items() if site.local]:
            trace.remove_node(name)
        return trace

    def cells(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], seed: int) -> dict[str, Cell]:
        """Every site in one run of the unconditioned model with `values`, of latents and of data, held."""
        with self._quiet(seed):
            model = poutine.condition(poutine.uncondition(self._model), data=self._tensors(values))
            nodes = poutine.trace(model).get_trace(**self._tensors(arrays)).nodes
            return {name: _cell(site, nodes[name]) for name, site in self.structure.model.items() if name in nodes}

    def complete(
        self, arrays: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], seed: int
    ) -> dict[str, np.ndarray]:
        """Values of autoregressive sites, rows first, with their NaNs drawn given what comes before."""
        with self._quiet(seed):
            nodes = poutine.trace(self._model).get_trace(**self._tensors(arrays)).nodes
            return {name: _array(nodes[name]["fn"].complete(v)) for name, v in self._tensors(values).items()}

    def sampled(
        self, sampler: Sampler, arrays: Mapping[str, np.ndarray], seed: int, compile: bool | None = None
    ) -> dict[str, np.ndarray]:
        """As many rows of the data site as there are in `arrays`, by a sampler of the program's denoiser.

        Its steps are compiled, if `compile` says so, or where that pays.
        """
        with self._quiet(seed):
            batch = self._tensors(arrays)
            chain = self.denoiser(batch, type(sampler).__name__)
            refuse_not_gaussian(chain, Denoiser, type(sampler).__name__)
            rows = batch[chain.site]
            start, steps = chain.prior(rows).sample((len(rows),)), functools.partial(self._steps, sampler, batch)
            return {chain.site: _array(chain.restored(sampled(chain, sampler, start, steps, compile)))}

    def _steps(self, sampler: Sampler, batch: Mapping[str, Tensor], names: Sequence[str]) -> CompiledSteps:
        """The compiled steps of a sampler, made once for batches of a shape."""
        weights, arrays = list(self.values), list(batch)
        shapes = tuple((name, value.shape, value.dtype) for name, value in batch.items())

        @contextlib.contextmanager
        def chain_of(held: Sequence[Tensor]) -> Iterator[Denoiser]:
            given = iter(held)
            values = {name: next(given) for name in weights}
            with self.leaves.substituted(values, training=False):
                yield self.denoiser({name: next(given) for name in arrays}, type(sampler).__name__)

        made = self._compiled.setdefault((sampler, shapes), CompiledSteps(sampler, chain_of))
        return made.on(names, [*self.values.values(), *batch.values()])

    def by_chain(self, chain: Langevin, arrays: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """As many rows of the data site as there are in `arrays`, each after the last step of a chain of its own."""
        refuse_unscored(self.structure, type(chain).__name__)
        if isinstance(chain, Sampling):
            raise ProbgenError(
                "NUTS as a sampler of data is NumPyro's: give sampler=Langevin(), or write the program in it"
            )
        (name,) = self.structure.observed
        with self._quiet(seed):
            batch = self._tensors(arrays)
            start = poutine.trace(poutine.uncondition(self._model)).get_trace(**batch).nodes[name]["value"]
            return refuse_escaped({name: _array(langevin(self._model, batch, start, name, chain))}, chain)

    def log_parts(self, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """log p(x_n) of the only data site and the log of all factors, [B] each, and their gradients, [B, ...]; float64."""
        with self._quiet(0):
            (name,) = self.structure.observed
            return tuple(
                _array(v).astype(np.float64) for v in parts_and_scores(self._model, self._tensors(arrays), name)
            )

    @property
    def has_probability_flow(self) -> bool:
        """Whether the program is a Gaussian diffusion, so that its data have a density by the probability flow too."""
        if self.program.denoiser is None or self.structure.kind != "latent":
            return False
        with self._quiet(0):
            return isinstance(self.denoiser(self._tensors(self.arrays), "the probability flow"), Denoiser)

    def flow_log_likelihood(self, arrays: Mapping[str, np.ndarray], trace: str, seed: int) -> np.ndarray:
        """log p(x_1) + log p(x | x_1) − log q(x_1 | x) at a draw of x_1, p(x_1) by the probability flow, [B]."""
        with self._quiet(seed):
            batch = self._tensors(arrays)
            chain = self.denoiser(batch, "the probability flow")
            t, x = 1 / chain.steps, batch[chain.site]
            near = chain.forward(chain.embed(x), t, 0.0)
            x_1 = near.sample()
            decoded = chain.decoder(x_1).log_prob(x) - near.log_prob(x_1)
            return _array(decoded + log_density(chain, x_1, t, trace=trace))

    def bases(self, arrays: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
        """f(x) of the rows, by data site that is a flow: where in its base a datum comes from, [B, ...]."""
        with self._quiet(seed):
            nodes = poutine.trace(self._model).get_trace(**self._tensors(arrays)).nodes
            flows = {n: nodes[n] for n in self.structure.observed if isinstance(unwrapped(nodes[n]["fn"]), Flow)}
            return {n: _array(call_and_ladj(unwrapped(s["fn"]).transform, s["value"])[0]) for n, s in flows.items()}

    def denoiser(self, batch: Mapping[str, Tensor], needs: str) -> Denoiser:
        """What the program's denoiser says with the weights in place; `needs` is named where there is none."""
        return bound(denoiser_of(self.program, needs), like=self.program.model)(**batch)

    def decode(
        self, latents: Mapping[str, np.ndarray], n: int, seed: int, arrays: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The mean of each data site's distribution at given latents."""
        with self._quiet(seed):
            model = poutine.condition(poutine.uncondition(self._model), data=self._tensors(latents))
            trace = poutine.trace(model).get_trace(**self._tensors(arrays))
            return {name: _mean(trace.nodes[name]["fn"]) for name in self.structure.observed}

    def replicate(
        self, arrays: Mapping[str, np.ndarray], latents: Mapping[str, np.ndarray], seed: int
    ) -> dict[str, np.ndarray]:
        """A draw of every data site, [S, B, ...], at each draw of the latents: [S, B, ...] local, [S, ...] global ones."""
        batch, found = self._tensors(arrays), []
        with self._quiet(seed):
            latents = self._tensors(latents)
            for i in range(len(next(iter(latents.values())))):
                given = {name: value[i] for name, value in latents.items()}
                nodes = (
                    poutine.trace(poutine.condition(poutine.uncondition(self._model), given)).get_trace(**batch).nodes
                )
                found.append({name: _array(nodes[name]["value"]) for name in self.structure.observed})
        return {name: np.stack([draw[name] for draw in found]) for name in found[0]}

    def reconstruct(self, arrays: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """The mean of each data site's distribution at one draw z ~ q(z | x)."""
        with self._quiet(seed):
            _, p = self._traces(self._tensors(arrays))
            return {name: _mean(p.nodes[name]["fn"]) for name in self.structure.observed}

    def _traces(self, batch: Mapping[str, Tensor]) -> tuple[poutine.Trace, poutine.Trace]:
        """A draw of the guide, and of the model against it; what is enumerated is drawn given the data."""
        q = poutine.trace(self._guide).get_trace(**batch)
        model = poutine.replay(self._model, trace=q)
        if self.structure.enumerated:
            model = infer_discrete(model, first_available_dim=-1 - self._plan.depth, temperature=1)
        return q, poutine.trace(model).get_trace(**batch)

    # -- densities ------------------------------------------------------------------------------------------------

    def log_weights(self, arrays: Mapping[str, np.ndarray], k: int, seed: int) -> np.ndarray:
        """log p(x_n, z | θ) − log q(z | x_n) of the local terms, [k, B]; θ is drawn anew for each k."""
        self._refuse_other_rows(arrays)
        self._refuse_shared_draws()
        exact = self.structure.kind == "exact" and not self.structure.has_global_latents  # then nothing is drawn
        with self._quiet(seed):
            passes = [self._terms_once(*p, shared=False) for p in self._passes(arrays, 1 if exact else k)]
        weights = self._by_draw([sum(terms.values(), torch.zeros(())) for terms in passes], arrays)
        return np.broadcast_to(weights, (k, rows_of(arrays))).copy()

    def _refuse_shared_draws(self) -> None:
        """A guide that draws local latents jointly has no weight per datum."""
        joint = [n for n, site in self.structure.guide.items() if site.role == "latent" and not site.local]
        if joint and not self.structure.has_global_latents and self.structure.data_plates:
            raise ProbgenError(
                f"the guide draws {joint[0]!r} for all rows together, so there is no likelihood per datum: use AutoNormal, "
                "or write a guide that draws inside the data plate"
            )

    def elbo(self, arrays: Mapping[str, np.ndarray], draws: int, seed: int) -> np.ndarray:
        """Per-datum draws of the ELBO, [draws, B]: the local terms, and the global ones divided by N."""
        if not self.structure.has_global_latents:
            return self.log_weights(arrays, draws, seed)
        return sum(self.terms(arrays, draws, seed).values())

    def terms(self, arrays: Mapping[str, np.ndarray], draws: int, seed: int) -> dict[str, np.ndarray]:
        """The ELBO's summands per site, [draws, B]: log p of data sites, log p − log q of latents.

        A global latent's term is divided by N. Enumerated latents are summed out in their data site's term. What
        an autoguide draws for several latents together counts to the first of them.
        """
        self._refuse_other_rows(arrays)
        with self._quiet(seed):
            passes = [self._terms_once(*at_once) for at_once in self._passes(arrays, draws)]
        return {name: self._by_draw([p[name] for p in passes], arrays) for name in passes[0]}

    def _passes(self, arrays: Mapping[str, np.ndarray], draws: int) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Batches, and their rows, that make up so many draws: every row several times where draws are independent."""
        batch, rows = self._tensors(arrays), rows_of(arrays)
        while draws:
            count = min(draws, max(1, ROWS_AT_ONCE // rows)) if self._plan.tiles else 1
            yield {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in batch.items()}, count * rows
            draws -= count

    def _by_draw(self, parts: list[Tensor], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Values of several passes, [count · B, ...] each, as [draws, B, ...]."""
        rows = rows_of(arrays)
        return _array(torch.cat([part.reshape(-1, rows, *part.shape[1:]) for part in parts]))

    def _terms_once(self, batch: dict[str, Tensor], rows: int, shared: bool = True) -> dict[str, Tensor]:
        """One draw's terms by site, [B]; the `shared` ones, 1/N of each global term, on request."""
        p, q = drawn_traces(self._plan, self._model, self._guide, (), batch)
        log_p, log_q, _ = datum_terms(self._plan, p, q, rows)
        terms = log_p | {name: log_p.get(name, 0.0) - log_q[name] for name in log_q}
        if shared:
            for sign, trace in ((1.0, p), (-1.0, q)):
                for name, value in self._global_terms(trace, rows).items():
                    terms[name] = terms.get(name, 0.0) + sign * (value / self.rows).expand(rows)
        return owned(terms, self._plan.owners)

    def _global_terms(self, trace: poutine.Trace, rows: int) -> dict[str, Tensor]:
        """Log densities of the sites outside the data plate, those enumerated left out: they are in their data's."""
        return {
            name: site["log_prob"].sum()
            for name, site in trace.nodes.items()
            if is_sample(site)
            and not site["infer"].get("_deterministic")
            and site["infer"].get("_enumerate_dim") is None
            and row_dim(site, self.structure.data_plates, rows) is None
        }

    def under_prior(self, names: Collection[str]) -> Trained:
        """The program with the prior of the latents `names` as its guide, in which weights are p(x_n | those latents).

        Latents that are enumerated and not among them are summed out.
        """
        found = copy.copy(self)
        found.program = replace(self.program, guide=None)
        found._model = poutine.infer_config(
            self._model, lambda site: {"enumerate": None} if site["name"] in names else {}
        )
        found._guide = poutine.block(found._model, expose=list(names))
        found._plan = make_plan(found._model, found._guide, (), self._tensors(self.arrays))
        found.structure = replace(found._plan.structure, arrays=self.structure.arrays)
        return found

    def log_joint(
        self, arrays: Mapping[str, np.ndarray], latents: Mapping[str, np.ndarray], seed: int = 0
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Model and guide log densities at given latents, unscaled: [B] for a local site, a number for a global one."""
        batch, rows = self._tensors(arrays), rows_of(arrays)
        fixed = self._tensors(latents)
        with self._quiet(seed):
            q = poutine.trace(poutine.condition(self._guide, data=fixed)).get_trace(**batch)
            p = poutine.trace(poutine.condition(self._model, data=fixed)).get_trace(**batch)
            return self._densities(p, rows), self._densities(q, rows)

    def _densities(self, trace: poutine.Trace, rows: int) -> dict[str, np.ndarray]:
        for site in prune_subsample_sites(trace).nodes.values():
            if site["type"] == "sample":
                site["scale"] = 1.0
        trace.compute_log_prob()
        found = self._global_terms(trace, rows) | local_terms(trace, self.structure.data_plates, rows)
        return {name: _array(value) for name, value in found.items()}

    def log_states(
        self, arrays: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], sites: Iterable[str]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """log p(x_n, y_n = k | θ_s) of enumerated local latents, [S, B, K] by site, and log p(θ_s), [S].

        `values` are S draws of every other latent, [S, ...] or [S, B, ...]; without any, S is 1. Other enumerated
        latents are summed out.
        """
        batch, rows, tables, prior = self._tensors(arrays), rows_of(arrays), [], []
        for i in range(len(next(iter(values.values()), [0]))):
            with self._quiet(0):
                model = poutine.condition(self._model, data=self._tensors({n: v[i] for n, v in values.items()}))
                p, q = enumerated_traces(model, lambda **_: None, (), batch, self._plan.depth, in_guide=False)
                prior.append(float(sum(self._global_terms(p, rows).values())))
                plates = self.structure.data_plates
                tables.append({name: _array(state_table(p, q, name, plates, rows)) for name in sites})
        return {name: np.stack([table[name] for table in tables]) for name in sites}, np.array(prior)

    # -- posterior ------------------------------------------------------------------------------------------------

    def posterior(
        self, arrays: Mapping[str, np.ndarray], draws: int, seed: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Draws of the latents given the rows, with their log densities.

        Returns values {site: [draws, B, ...] or [draws, ...] for a global one}, log p(x_n, z_n) and log q(z_n | x_n)
        of the local terms, [draws, B]. Latents that the model enumerates are drawn from their exact conditional, and
        summed out in log p.
        """
        self._refuse_other_rows(arrays)
        with self._quiet(seed):
            passes = [self._posterior_once(*p, seed + i) for i, p in enumerate(self._passes(arrays, draws))]
        log_p, log_q = (self._by_draw([p[i] for p in passes], arrays) for i in (1, 2))
        values = {}
        for name, site in self.structure.latents.items():
            parts = [p[0][name] for p in passes]
            values[name] = self._by_draw(parts, arrays) if site.local else _array(torch.stack(parts))
        return values, log_p, log_q

    def guided(self, arrays: Mapping[str, np.ndarray], draws: int, seed: int) -> dict[str, np.ndarray]:
        """Draws of the guide's latents given the rows, {site: [draws, B, ...] or [draws, ...] for a global one}."""
        self._refuse_other_rows(arrays)
        with self._quiet(seed):
            passes = [poutine.trace(self._guide).get_trace(**batch).nodes for batch, _ in self._passes(arrays, draws)]
        found = {}
        for name, site in self.structure.sampled.items():
            parts = [drawn_whole(nodes[name]) for nodes in passes]
            found[name] = self._by_draw(parts, arrays) if site.local else _array(torch.stack(parts))
        return found

    def _posterior_once(
        self, batch: dict[str, Tensor], rows: int, seed: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        p, q = drawn_traces(self._plan, self._model, self._guide, (), batch)
        log_p, log_q, _ = datum_terms(self._plan, p, q, rows)
        if self.structure.enumerated:
            model = poutine.replay(self._model, trace=q)
            drawn = infer_discrete(model, first_available_dim=-1 - self._plan.depth, temperature=1)
            with forked(seed):  # so that the guide's draws are those of `terms` with this seed
                p = poutine.trace(drawn).get_trace(**batch)
        values = {name: drawn_whole(p.nodes[name]) for name in self.structure.latents}
        return values, *(sum(terms.values(), torch.zeros(rows)) for terms in (log_p, log_q))

    def k_hat(self, log_weights: np.ndarray) -> np.ndarray:
        """Pareto k-hat of each column of log weights [k, B], by Pyro's generalised-Pareto fit to the upper tail.

        Below 0.5 the importance-weighted estimate is reliable, above 0.7 it is not (Vehtari et al.,
        arXiv:1507.02646). Weights that are all equal have no tail, and get 0.
        """
        return np.array([_k_hat(column) for column in np.asarray(log_weights, dtype=np.float64).T])


def drawn_whole(site: Mapping[str, Any]) -> Tensor:
    """A site's value in the shape of its distribution: Pyro leaves a latent of one state with an axis of its own."""
    value, shape = site["value"], site["fn"].shape()
    return torch.broadcast_to(value.reshape(value.shape[max(0, value.dim() - len(shape)) :]), shape)


def _copied(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters are `nn.Parameter`s again."""
    tensors = {id(t): t for part in module.modules() for t in part._parameters.values() if t is not None}
    return copy.deepcopy(module, {key: nn.Parameter(tensor.clone()) for key, tensor in tensors.items()}).eval()


def _k_hat(log_weights: np.ndarray) -> float:
    ordered = np.sort(log_weights)
    tail = int(min(0.2 * len(ordered), 3 * np.sqrt(len(ordered))))
    if tail < 5 or ordered[-1] - ordered[0] < 1e-6:
        return 0.0
    weights = np.exp(ordered[-tail - 1 :] - ordered[-1])
    excess = torch.from_numpy(np.maximum(weights[1:] - weights[0], 1e-300))
    return float(fit_generalized_pareto(excess)[0])


def _mean(fn: Any) -> np.ndarray:
    """A distribution's mean; one draw where it has none in closed form."""
    try:
        mean = fn.mean
    except NotImplementedError:
        mean = fn.sample()
    return _array(mean)


def _cell(site: Site, node: Mapping[str, Any]) -> Cell:
    """What a node of a trace says of its site, entry by entry where its distribution is."""
    fn, value, axis = unwrapped(node["fn"]), node["value"], row_axis(site)
    first = 0 if axis is None else value.dim() + axis

    def shown(array: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        return _array(array.expand(shape).movedim(first, 0) if axis is not None else array.expand(shape))

    parts = {"value": value}
    if site.role != "deterministic" and node["mask"] is None and not _masked(node["fn"]):
        parts["log_prob"] = fn.log_prob(value)
        if site.family in GAUSSIAN:
            parts |= {"mean": fn.loc, "scale": fn.scale if site.family == "Normal" else fn.scale_tril}
    full = tuple(value.shape)
    shapes = {"log_prob": full[: len(full) - fn.event_dim], "scale": full + full[-1:] * fn.event_dim}
    found = {name: shown(array, shapes.get(name, full)) for name, array in parts.items()}
    return Cell(site.family, support=_support(fn), **found)


def _masked(fn: Any) -> bool:
    """Whether a mask lies anywhere in a stack of `to_event`, `expand` and `mask`."""
    return isinstance(fn, MaskedDistribution) or (hasattr(fn, "base_dist") and _masked(fn.base_dist))


def _support(fn: Any) -> np.ndarray | None:
    """All the values that a discrete distribution takes, [K, *event]; None where there is no end of them."""
    if not fn.has_enumerate_support:
        return None
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return _array(values.reshape(len(values), *fn.event_shape))


def _values(trace: poutine.Trace) -> dict[str, np.ndarray]:
    return {
        name: _array(site["value"])
        for name, site in trace.nodes.items()
        if is_sample(site) and site["value"].numel() and site["fn"].__class__.__name__ != "Unit"
    }


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().copy()


def inspect(program: Program, arrays: Mapping[str, np.ndarray], rows: int | None = None, seed: int = 0) -> Structure:
    """The structure of a program that has not been trained, from one run on a prepared batch."""
    program, dtype = own_program(program), torch.get_default_dtype()
    leaves, batch = leaves_of(program, arrays, dtype, seed), tensors(arrays, dtype, "cpu")
    with leaves.substituted(start_values(leaves, dtype, torch.device("cpu"))):
        return structure_of(program, batch, rows or rows_of(arrays), seed)
