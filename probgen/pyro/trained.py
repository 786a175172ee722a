"""A trained Pyro program, and the numbers the verbs ask of it: arrays in, arrays out."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.infer.enum import get_importance_trace
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor, nn

from probgen.errors import ProbgenError
from probgen.program import Program, Structure, rows_of
from probgen.pyro.device import numbers, resolve_device, resolve_precision
from probgen.pyro.elbo import Plan, datum_weights, log_weights, make_plan, over_rows, per_datum
from probgen.pyro.leaves import collect, start_values
from probgen.pyro.trace import callables, forked, is_sample, structure_of, tensors

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
        self.program, self.rows = program, rows
        self.device, (self.dtype, _) = resolve_device(device), resolve_precision(precision)
        with forked(seed):
            native = tensors(arrays, torch.get_default_dtype(), "cpu")
            model, guide = callables(program)
            with pyro.validation_enabled(False):
                self.leaves = collect(
                    lambda: poutine.replay(model, trace=poutine.trace(guide).get_trace(**native))(**native),
                    (program.model, program.guide),
                )
        self.values = self._fitting(weights)
        self._model, self._guide = self._running_call(model), self._running_call(guide)
        self.model = TrainedCallable(program.model, self.running)
        self.guide = None if program.guide is None else TrainedCallable(program.guide, self.running)
        self.arrays = dict(arrays)
        with self.running():
            batch = self._tensors(arrays)
            self.structure: Structure = structure_of(program, batch, rows, seed)
            self._plan: Plan = make_plan(self._model, self._guide, (), batch)

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
            with self.running():
                return fn(**arrays)

        return call

    @contextlib.contextmanager
    def _quiet(self, seed: int) -> Iterator[None]:
        with forked(seed), torch.no_grad(), pyro.validation_enabled(False), numbers(self.dtype, self.device):
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
            copies = {}
            for name, module in self.leaves.modules.items():
                memo = {
                    id(tensor): nn.Parameter(tensor) for tensor in module._parameters.values() if tensor is not None
                }
                copies[name] = copy.deepcopy(module, memo).eval()
            return copies

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
        trace = poutine.trace(self._guide).get_trace(**self._tensors(self.arrays))
        for name in [n for n, site in self.structure.guide.items() if site.local]:
            trace.remove_node(name)
        return trace

    def decode(
        self, latents: Mapping[str, np.ndarray], n: int, seed: int, arrays: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The mean of each data site's distribution at given latents."""
        with self._quiet(seed):
            model = poutine.condition(poutine.uncondition(self._model), data=self._tensors(latents))
            trace = poutine.trace(model).get_trace(**self._tensors(arrays))
            return {name: _mean(trace.nodes[name]["fn"]) for name in self.structure.observed}

    def reconstruct(self, arrays: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
        """The mean of each data site's distribution at one draw z ~ q(z | x)."""
        with self._quiet(seed):
            _, p = self._traces(self._tensors(arrays))
            return {name: _mean(p.nodes[name]["fn"]) for name in self.structure.observed}

    def _traces(self, batch: Mapping[str, Tensor]) -> tuple[poutine.Trace, poutine.Trace]:
        q = poutine.trace(self._guide).get_trace(**batch)
        return q, poutine.trace(poutine.replay(self._model, trace=q)).get_trace(**batch)

    # -- densities ------------------------------------------------------------------------------------------------

    def log_weights(self, arrays: Mapping[str, np.ndarray], k: int, seed: int) -> np.ndarray:
        """log p(x_n, z | θ) − log q(z | x_n) of the local terms, [k, B]; θ is drawn anew for each k."""
        batch, rows = self._tensors(arrays), rows_of(arrays)
        with self._quiet(seed):
            if self.structure.kind == "exact" and not self.structure.has_global_latents:
                k_drawn, k = 1, k  # an exact program's weights are its density: nothing is drawn
            else:
                k_drawn = k
            parts, done = [], 0
            while done < k_drawn:
                count = min(k_drawn - done, max(1, ROWS_AT_ONCE // rows)) if self._plan.tiles else 1
                parts.append(self._local_weights(batch, count, rows))
                done += count
            weights = torch.cat(parts)
            return _array(weights.expand(k, rows) if k_drawn == 1 else weights)

    def _local_weights(self, batch: Mapping[str, Tensor], count: int, rows: int) -> Tensor:
        if count > 1:
            return log_weights(self._plan, self._model, self._guide, (), dict(batch), count)[0]
        return datum_weights(self._plan, self._model, self._guide, (), dict(batch), rows)[0].reshape(1, rows)

    def elbo(self, arrays: Mapping[str, np.ndarray], draws: int, seed: int) -> np.ndarray:
        """Per-datum draws of the ELBO, [draws, B]: the local terms, and the global ones divided by N."""
        if not self.structure.has_global_latents:
            return self.log_weights(arrays, draws, seed)
        return sum(self.terms(arrays, draws, seed).values())

    def terms(self, arrays: Mapping[str, np.ndarray], draws: int, seed: int) -> dict[str, np.ndarray]:
        """The ELBO's summands per site, [draws, B]: log p of data sites, log p − log q of latents.

        A global latent's term is divided by N. Enumerated latents are summed out in their data site's term.
        """
        batch, rows = self._tensors(arrays), rows_of(arrays)
        with self._quiet(seed):
            passes = [self._terms_once(batch, rows) for _ in range(draws)]
        return {name: _array(torch.stack([p[name] for p in passes])) for name in passes[0]}

    def _terms_once(self, batch: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
        if self._plan.enumerates:
            name = next(iter(self.structure.observed))
            weight, _ = datum_weights(self._plan, self._model, self._guide, (), batch, rows)
            return {name: weight}
        p, q = get_importance_trace("flat", self._plan.depth, self._model, self._guide, (), batch)
        return {
            name: self._share(site, rows) - (self._share(q.nodes[name], rows) if name in q.nodes else 0.0)
            for name, site in p.nodes.items()
            if is_sample(site) and not site["infer"].get("_deterministic")
        }

    def _share(self, site: dict, rows: int) -> Tensor:
        """A site's log density per datum: its own for a local site, 1/N of a global one's."""
        if any(f.name in self.structure.data_plates for f in site["cond_indep_stack"]):
            return per_datum(site, self.structure.data_plates, rows)
        if not self.structure.data_plates and site["unscaled_log_prob"].shape[-1:] == (rows,):
            return over_rows(site["unscaled_log_prob"], -1, rows)
        return (site["unscaled_log_prob"].sum() / self.rows).expand(rows)

    def log_joint(
        self, arrays: Mapping[str, np.ndarray], latents: Mapping[str, np.ndarray], seed: int = 0
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Model and guide log densities at given latents, unscaled: [B] for a local site, a number for a global one."""
        batch, rows = self._tensors(arrays), rows_of(arrays)
        fixed = self._tensors(latents)
        with self._quiet(seed):
            q = poutine.trace(poutine.condition(self._guide, data=fixed)).get_trace(**batch)
            p = poutine.trace(poutine.condition(self._model, data=fixed)).get_trace(**batch)
            both = []
            for trace in (p, q):
                trace.compute_log_prob()
                sites = {n: s for n, s in trace.nodes.items() if is_sample(s) and not s["infer"].get("_deterministic")}
                both.append({name: _array(self._density(site, rows)) for name, site in sites.items()})
        return both[0], both[1]

    def _density(self, site: dict, rows: int) -> Tensor:
        local = any(f.name in self.structure.data_plates for f in site["cond_indep_stack"])
        return per_datum(site, self.structure.data_plates, rows) if local else site["unscaled_log_prob"].sum()

    # -- posterior ------------------------------------------------------------------------------------------------

    def posterior(
        self, arrays: Mapping[str, np.ndarray], draws: int, seed: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Draws of the latents given the rows, with their log densities.

        Returns values {site: [draws, B, ...] or [draws, ...] for a global one}, log p(x_n, z_n) and log q(z_n | x_n)
        of the local terms, [draws, B]. Enumerated latents are drawn from their exact conditional.
        """
        batch, rows = self._tensors(arrays), rows_of(arrays)
        with self._quiet(seed):
            passes = [self._posterior_once(batch, rows) for _ in range(draws)]
        values = {name: np.stack([p[0][name] for p in passes]) for name in passes[0][0]}
        return values, np.stack([p[1] for p in passes]), np.stack([p[2] for p in passes])

    def _posterior_once(
        self, batch: dict[str, Tensor], rows: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        plates = self.structure.data_plates
        q = poutine.trace(self._guide).get_trace(**batch)
        model = poutine.replay(self._model, trace=q)
        if self.structure.enumerated:
            model = infer_discrete(model, first_available_dim=-1 - self._plan.depth, temperature=1)
        p = poutine.trace(model).get_trace(**batch)
        values = {name: _array(p.nodes[name]["value"]) for name in self.structure.latents}
        densities = []
        for trace in (p, q):
            trace.compute_log_prob()
            sites = [s for s in trace.nodes.values() if is_sample(s)]
            densities.append(sum((per_datum(s, plates, rows) for s in sites), torch.zeros(rows)))
        return values, _array(densities[0]), _array(densities[1])

    def k_hat(self, log_weights: np.ndarray) -> np.ndarray:
        """Pareto k-hat of each column of log weights [k, B], by Pyro's generalised-Pareto fit to the upper tail.

        Below 0.5 the importance-weighted estimate is reliable, above 0.7 it is not (Vehtari et al.,
        arXiv:1507.02646). Weights that are all equal have no tail, and get 0.
        """
        return np.array([_k_hat(column) for column in np.asarray(log_weights, dtype=np.float64).T])


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
    batch = tensors(arrays, torch.get_default_dtype(), "cpu")
    with forked(seed):
        leaves = collect(lambda: [part(**batch) for part in callables(program)], (program.model, program.guide))
    with leaves.substituted(start_values(leaves, torch.get_default_dtype(), torch.device("cpu"))):
        return structure_of(program, batch, rows or rows_of(arrays), seed)
