"""Coordinate-ascent variational Bayes on a conjugate Pyro program: what `probgen.conjugate.variational` asks of the backend."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints, transform_to

from probgen.conjugate.conjugacy import Seen, View, arguments_of, family_name, in_full
from probgen.em.states import refuse_many
from probgen.program import Program, rows_of
from probgen.pyro.device import numbers, resolve_device, resolve_precision
from probgen.pyro.leaves import leaves_of, own_program, start_values
from probgen.pyro.operators import Operators
from probgen.pyro.support import refuse_out_of_support
from probgen.pyro.trace import callables, forked, is_sample, structure_of, tensors, unwrapped, whole_plates

Arrays = Mapping[str, np.ndarray]


class Runs:
    """A Pyro program that is run at given values, eagerly and without gradients."""

    def __init__(self, program: Program, feed: Any, options: Any) -> None:
        self.program = own_program(program)
        self.device, (self.dtype, _) = resolve_device(options.device), resolve_precision(options.precision)
        self.ops = Operators(self.dtype, self.device)
        self._seed = options.seed
        self._model, self._guide = callables(self.program)
        batch = feed.batch(0)
        self._few = {name: array[:2] for name, array in batch.items()}
        self._leaves = leaves_of(self.program, batch, self.dtype, options.seed)
        self._start = start_values(self._leaves, self.dtype, self.device)
        with self._running():
            own = self._tensors(batch)
            self.structure = structure_of(self.program, own, feed.rows, options.seed)
            refuse_out_of_support(self._model, self._guide, own, lambda: own, options.seed)
            self._params = self._read(self._guide, own)
            self.fitted = self._read(self._model, own)

    @contextlib.contextmanager
    def _running(self, weights: Arrays | None = None) -> Iterator[None]:
        """The program with these weights in place, its generators forked."""
        values = self._start if weights is None else {n: self._tensor(weights[n], v) for n, v in self._start.items()}
        with (
            numbers(self.dtype, self.device),
            forked(self._seed),
            torch.no_grad(),
            pyro.validation_enabled(False),
            self._leaves.substituted({name: value.clone() for name, value in values.items()}),
        ):
            yield

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """No gradients are needed."""
        return torch.no_grad()

    def numpy(self, value: Tensor) -> np.ndarray:
        """As a NumPy array."""
        return _array(value)

    def _tensor(self, array: np.ndarray, like: Tensor) -> Tensor:
        return torch.from_numpy(np.array(array)).to(device=self.device, dtype=like.dtype)

    def _fixed(self, values: Arrays) -> dict[str, Tensor]:
        """Values of latents in the precision of the fit, numbers without axes included."""
        return {n: torch.as_tensor(np.array(v)).to(device=self.device, dtype=self.dtype) for n, v in values.items()}

    def _tensors(self, arrays: Arrays) -> dict[str, Tensor]:
        return tensors(arrays, self.dtype, self.device)

    def _read(self, fn: Any, batch: Mapping[str, Tensor]) -> list[str]:
        """The parameters that a callable reads."""
        with poutine.trace(param_only=True) as seen:
            fn(**batch)
        touched = {self._leaves.aliases.get(name, name) for name in seen.trace.nodes}
        return [name for name in self._leaves.params if name in touched]

    # -- the program at given values ------------------------------------------------------------------------------

    def model_at(self, values: Arrays, arrays: Arrays) -> tuple[View, View]:
        """Global and local sites of the model at values of the global latents, in every joint state."""
        batch, states = self._tensors(arrays), []
        fixed = self._fixed(values)
        with self._running(), self._whole(rows_of(arrays)):
            first = poutine.trace(poutine.condition(self._model, data=fixed)).get_trace(**batch)
            latents = {n: first.nodes[n] for n in self.structure.enumerated}
            supports = [site["fn"].enumerate_support(expand=False).ravel() for site in latents.values()]
            refuse_many({name: len(support) for name, support in zip(latents, supports, strict=True)}, "EM")
            for state in itertools.product(*supports):
                at = {n: s.expand(site["value"].shape) for (n, site), s in zip(latents.items(), state, strict=True)}
                trace = poutine.trace(poutine.condition(self._model, data={**fixed, **at})).get_trace(**batch)
                trace.compute_log_prob()
                states.append({n: (trace.nodes[n], dict(zip(latents, state, strict=True))) for n in self._local()})
            return {n: _global(first.nodes[n]) for n in values}, {n: self._local_site(n, states) for n in self._local()}

    def _whole(self, rows: int) -> contextlib.AbstractContextManager[None]:
        """A plate with a length of its own holds the rows at hand."""
        if not self.structure.states_rows:
            return contextlib.nullcontext()
        return whole_plates(self.structure.data_plates, rows)

    def _local(self) -> list[str]:
        return [n for n, site in self.structure.model.items() if site.local and site.role != "deterministic"]

    def _local_site(self, name: str, states: list[dict]) -> Seen:
        sites = [state[name][0] for state in states]
        rows = [_row_axis(site, self.structure.data_plates) for site in sites]
        seen = [_arguments(site) for site in sites]
        arguments = {
            a: np.stack([np.moveaxis(s[a], axis, 0) for s, axis in zip(seen, rows, strict=True)]) for a in seen[0]
        }
        density = [np.moveaxis(_array(s["log_prob"]), axis, 0) for s, axis in zip(sites, rows, strict=True)]
        enumerated = name in self.structure.enumerated
        value = (
            np.array([float(state[name][1][name]) for state in states])
            if enumerated
            else np.moveaxis(_array(sites[0]["value"]), rows[0], 0)
        )
        log_prob = np.stack([d.reshape(len(d), -1).sum(-1) for d in density])
        return Seen(family_name(unwrapped(sites[0]["fn"])), arguments, value, log_prob, enumerated)

    def guide_at(self, values: Arrays, weights: Arrays) -> View:
        """The guide's sites at values of the latents and of its weights."""
        fixed = self._fixed(values)
        with self._running(weights):
            trace = poutine.trace(poutine.condition(self._guide, data=fixed)).get_trace(**self._tensors(self._few))
            return {n: _global(site) for n, site in trace.nodes.items() if is_sample(site)}

    def observed(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The values of the observed sites, rows first."""
        with self._running(), self._whole(rows_of(arrays)):
            trace = poutine.trace(self._model).get_trace(**self._tensors(arrays))
            sites = {n: trace.nodes[n] for n in self.structure.observed}
            return {
                n: np.moveaxis(_array(s["value"]), _row_axis(s, self.structure.data_plates), 0)
                for n, s in sites.items()
            }

    def refuse_outside(self, arrays: Arrays) -> None:
        """Refuse rows outside the support of their site."""
        with self._running(), self._whole(rows_of(arrays)):
            batch = self._tensors(arrays)
            refuse_out_of_support(self._model, self._guide, batch, lambda: batch, self._seed)

    # -- weights --------------------------------------------------------------------------------------------------

    def start(self) -> dict[str, np.ndarray]:
        """The unconstrained leaves and buffers before training."""
        return {name: _array(value) for name, value in self._start.items()}

    def _transform(self, name: str) -> Any:
        return transform_to(self._leaves.constraints.get(name, constraints.real))

    def constrained(self, weights: Arrays) -> dict[str, np.ndarray]:
        """The guide's parameters as it sees them, of weights."""
        return {n: _array(self._transform(n)(self._tensor(weights[n], self._start[n]))) for n in self._params}

    def unconstrained(self, params: Arrays) -> dict[str, np.ndarray]:
        """The reverse, computed in float64."""
        found = {}
        for name, value in params.items():
            leaf = self._transform(name).inv(torch.from_numpy(np.array(value, np.float64)))
            found[name] = _array(leaf.to(self._start[name].dtype)).reshape(self._start[name].shape)
        return found


def _global(site: dict) -> Seen:
    """A site outside the data plate; its density is not looked at."""
    return Seen(
        family_name(unwrapped(site["fn"])), _arguments(site), _array(site["value"]).astype(np.float64), np.zeros(())
    )


def _arguments(site: dict) -> dict[str, np.ndarray]:
    base, shape = unwrapped(site["fn"]), tuple(site["fn"].shape())
    found = {name: _array(torch.as_tensor(value)).astype(np.float64) for name, value in arguments_of(base).items()}
    return in_full(family_name(base), found, shape[: len(shape) - base.event_dim])


def _row_axis(site: dict, data_plates: tuple[str, ...]) -> int:
    """Which axis of a site's value is the rows."""
    dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name in data_plates)
    return len(site["fn"].batch_shape) + dim


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().copy()
