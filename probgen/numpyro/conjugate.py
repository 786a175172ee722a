"""Coordinate-ascent variational Bayes on a conjugate NumPyro program: what `probgen.conjugate.variational` asks of the backend."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.handlers import seed, substitute, trace

from probgen.conjugate.conjugacy import Seen, View, arguments_of, family_name, in_full
from probgen.em.states import refuse_many
from probgen.numpyro.leaves import (
    QUICK,
    collect,
    from_numpy,
    named,
    own_containers,
    prepared,
    to_numpy,
    touched,
    unnamed,
)
from probgen.numpyro.modes import modules_of
from probgen.numpyro.operators import Operators
from probgen.numpyro.scope import Scope, device_of
from probgen.numpyro.structure import structure_of, unwrapped
from probgen.numpyro.support import refuse_out_of_support
from probgen.numpyro.trace import Trace, as_jax, callables, log_density
from probgen.program import Program

Arrays = Mapping[str, np.ndarray]


class Runs:
    """A NumPyro program that is run at given values."""

    def __init__(self, program: Program, feed: Any, options: Any) -> None:
        self._options, self._device = options, device_of(options.device)
        self.device = f"{self._device.platform}:{self._device.id}" if self._device.platform != "cpu" else "cpu"
        self._modules = modules_of(program.model, program.guide)
        with self.scope():
            arrays = as_jax(feed.batch(0))
            self.program = prepared(program, arrays, options.seed)
            self._model, self._guide = callables(self.program)
            self._leaves = collect(self.program, arrays, options.seed)
            self._constrain = jax.jit(self._leaves.constrained)
            values = self._values(self._leaves.params)
            self.structure = structure_of(self.program, arrays, values, feed.rows)
            refuse_out_of_support(self._model, self._guide, arrays, values, feed.batch(0))
            self._few = {name: array[:2] for name, array in arrays.items()}
            fns = () if self.program.guide is None else (self.program.guide,)
            self._params = sorted(touched(fns, self._leaves, arrays, self.program.model))
            self.fitted = sorted(touched((self.program.model,), self._leaves, arrays))
        self.ops = Operators(np.float64 if options.precision == "64" else np.float32)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """The precision and device of the fit."""
        with Scope(self._device, self._options.precision, False, self._modules), numpyro.validation_enabled(False):
            yield

    def numpy(self, value: jax.Array) -> np.ndarray:
        """As a NumPy array."""
        return np.asarray(value)

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._constrain(params), **self._leaves.buffers}

    def _trace(
        self, fn: Any, values: Mapping[str, Any], weights: Mapping[str, Any], arrays: Mapping[str, Any]
    ) -> Trace:
        free = substitute(seed(fn, jax.random.key(0)), data=dict(values))
        return trace(substitute(free, data=own_containers(weights))).get_trace(**arrays)

    # -- the program at given values ------------------------------------------------------------------------------

    def model_at(self, values: Arrays, arrays: Arrays) -> tuple[View, View]:
        """Global and local sites of the model at values of the global latents, in every joint state."""
        with self.scope():
            arrays, fixed = as_jax(arrays), as_jax({n: np.asarray(v, np.float64) for n, v in values.items()})
            sites = self._abstract(self._model, fixed, arrays)
            latents = {name: sites[name] for name in self.structure.enumerated}
            supports = [np.ravel(site["fn"].enumerate_support(expand=False)) for site in latents.values()]
            refuse_many({name: len(support) for name, support in zip(latents, supports, strict=True)}, "EM")
            states = [grid.ravel() for grid in np.meshgrid(*supports, indexing="ij")]
            count = np.arange(len(states[0]) if states else 1)
            outer, inner = self._at_states(fixed, count, dict(zip(latents, states, strict=True)), arrays)
            local = {}
            for name in self._local:  # in the program's order: a compiled function returns them sorted
                arguments, value, log_prob = jax.tree.map(to_numpy, inner[name])
                own = states[list(latents).index(name)] if name in latents else value[0]
                family = family_name(unwrapped(sites[name]["fn"]))
                local[name] = Seen(family, _float64(arguments), own, log_prob.astype(np.float64), name in latents)
            return {n: _seen(sites[n], value, outer[n]) for n, value in values.items()}, local

    def _abstract(self, fn: Any, values: Mapping[str, Any], arrays: Mapping[str, Any]) -> Trace:
        """A trace whose arrays have shapes but no values."""
        found = {}

        def run(arrays: Mapping[str, Any]) -> None:
            found.update(self._trace(fn, values, self._values(self._leaves.params), arrays))

        jax.eval_shape(run, arrays)
        return found

    @functools.cached_property
    def _local(self) -> list[str]:
        return [n for n, site in self.structure.model.items() if site.local and site.role != "deterministic"]

    @functools.cached_property
    def _at_states(self) -> Any:
        """The arguments of global sites; arguments, values and densities of local ones at every state; compiled."""

        def one(fixed: dict, _: jax.Array, states: dict, arrays: dict) -> tuple[dict, dict]:
            sites = self._trace(self._model, {**fixed, **states}, self._values(self._leaves.params), arrays)
            shapes = {name: jnp.shape(log_density(sites[name])) for name in states}
            at = {name: jnp.broadcast_to(states[name], shape) for name, shape in shapes.items()}
            sites = self._trace(self._model, {**fixed, **at}, self._values(self._leaves.params), arrays)
            inner = {name: _looked_at(sites[name], self.structure.data_plates) for name in self._local}
            return {name: _arguments(sites[name]) for name in fixed}, inner

        return jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None), out_axes=(None, 0)), compiler_options=QUICK)

    def guide_at(self, values: Arrays, weights: Arrays) -> View:
        """The guide's sites at values of the latents and of its weights."""
        with self.scope():
            fixed = as_jax({name: np.asarray(value, np.float64) for name, value in values.items()})
            sites = self._abstract(self._guide, fixed, self._few)
            found = self._guide_arguments(fixed, self._filled(weights), self._few)
            return {name: _seen(sites[name], values.get(name), arguments) for name, arguments in found.items()}

    @functools.cached_property
    def _guide_arguments(self) -> Any:
        def run(fixed: dict, params: dict, arrays: dict) -> dict[str, dict]:
            tr = self._trace(self._guide, fixed, self._values(params), arrays)
            return {name: _arguments(site) for name, site in tr.items() if site["type"] == "sample"}

        return jax.jit(run, compiler_options=QUICK)

    def observed(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The values of the observed sites, rows first."""

        def run(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            tr = self._trace(self._model, {}, self._values(self._leaves.params), arrays)
            return {
                name: jnp.moveaxis(tr[name]["value"], _row_axis(tr[name], self.structure.data_plates), 0)
                for name in self.structure.observed
            }

        with self.scope():  # compiled, so that what nobody reads is not drawn
            return jax.tree.map(to_numpy, jax.jit(run, compiler_options=QUICK)(as_jax(arrays)))

    def refuse_outside(self, arrays: Arrays) -> None:
        """Refuse rows outside the support of their site."""
        with self.scope():
            refuse_out_of_support(self._model, self._guide, as_jax(arrays), self._values(self._leaves.params), arrays)

    # -- weights --------------------------------------------------------------------------------------------------

    def start(self) -> dict[str, np.ndarray]:
        """The unconstrained leaves and buffers before training."""
        return {name: to_numpy(leaf) for name, leaf in named(self._leaves.params, self._leaves.buffers).items()}

    def _filled(self, weights: Arrays) -> Any:
        return unnamed(weights, (self._leaves.params, self._leaves.buffers))[0]

    def constrained(self, weights: Arrays) -> dict[str, np.ndarray]:
        """The guide's parameters as it sees them, of weights."""
        with self.scope():
            values = self._constrain(self._filled(weights))
            return {name: to_numpy(values[name]) for name in self._params}

    def unconstrained(self, params: Arrays) -> dict[str, np.ndarray]:
        """The reverse."""
        with self.scope():
            return {
                name: to_numpy(
                    from_numpy(self._leaves.transforms[name].inv(jnp.asarray(value)), self._leaves.params[name])
                )
                for name, value in params.items()
            }


def _looked_at(site: Mapping[str, Any], data_plates: tuple[str, ...]) -> tuple[dict, jax.Array, jax.Array]:
    """The arguments of a local site, its value and its log density, rows in front."""
    axis = _row_axis(site, data_plates)
    density = jnp.moveaxis(jnp.broadcast_to(log_density(site), site["fn"].batch_shape), axis, 0)
    density = density.reshape(len(density), -1).sum(-1) * (1.0 if site["scale"] is None else site["scale"])
    arguments = {name: jnp.moveaxis(value, axis, 0) for name, value in _arguments(site).items()}
    return arguments, jnp.moveaxis(site["value"], axis, 0), density


def _arguments(site: Mapping[str, Any]) -> dict[str, jax.Array]:
    base, shape = unwrapped(site["fn"]), tuple(site["fn"].shape())
    return in_full(family_name(base), arguments_of(base), shape[: len(shape) - base.event_dim], jnp)


def _seen(site: Mapping[str, Any], value: Any, arguments: Mapping[str, Any]) -> Seen:
    """A site outside the data plate; its density is not looked at."""
    return Seen(family_name(unwrapped(site["fn"])), _float64(arguments), np.asarray(value), np.zeros(()))


def _float64(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in arrays.items()}


def _row_axis(site: Mapping[str, Any], data_plates: tuple[str, ...]) -> int:
    """Which axis of a site's value is the rows."""
    dim = next(frame.dim for frame in site["cond_indep_stack"] if frame.name in data_plates)
    return len(site["fn"].batch_shape) + dim
