"""Expectation-maximisation on NumPyro programs: the operators and the runs that `probgen.em.settings` asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import MaskedDistribution
from numpyro.handlers import seed, substitute, trace

from probgen.em.exponential import family_of
from probgen.em.observed import observed, some_rows
from probgen.em.settings import Settings
from probgen.em.states import refuse_latents
from probgen.errors import ProbgenError
from probgen.numpyro.conjugate import Runs
from probgen.numpyro.leaves import QUICK, collect, named, prepared, to_numpy, touched
from probgen.numpyro.loss import Loss
from probgen.numpyro.modes import modules_of
from probgen.numpyro.operators import Operators
from probgen.numpyro.scope import Scope, device_of
from probgen.numpyro.structure import structure_of, unwrapped
from probgen.numpyro.support import refuse_out_of_support
from probgen.numpyro.trace import Trace, as_jax, callables, log_density, own_containers
from probgen.program import Program


class Host:
    """Runs a NumPyro program for EM: its leaves, its sites' arguments and densities with latents held."""

    compiled = True

    def __init__(self, program: Program, feed: Any, options: Any) -> None:
        self.options, self._device = options, device_of(options.device)
        self.device = f"{self._device.platform}:{self._device.id}" if self._device.platform != "cpu" else "cpu"
        self._modules: list[Any] = []
        batch = feed.batch(0)
        with Scope(self._device, options.precision, False, []):
            self.dtype = jnp.result_type(float)
            head = as_jax(some_rows(batch))
            self.program = prepared(program, head, options.seed)
            self._alone = replace(self.program, guide=None)
            self._modules = modules_of(self.program.model)
            self._model = callables(self._alone)[0]
        with self.scope(False):
            self._leaves = collect(self.program, as_jax(batch) if program.guide is not None else head, options.seed)
            own = touched([self.program.model], self._leaves, head)
            self._all = named(self._leaves.params, self._leaves.buffers)
            self.start = named({name: leaf for name, leaf in self._leaves.params.items() if name in own}, {})
            self.buffers = {
                name: leaf for name, leaf in self._all.items() if name not in self.start
            }  # the guide's, too
            values = self._leaves.values
            self.structure = structure_of(self._alone, head, values, feed.rows)
            refuse_latents(self.structure, "EM")
            refuse_out_of_support(*callables(self._alone), head, values, batch)
            self._refuse_stated()
            self._notice(head)

    def _refuse_stated(self) -> None:
        if self.structure.states_rows:
            raise ProbgenError(
                f"EM runs the program on batches of its own, but the plate {self.structure.data_plates[0]!r} states how "
                'many rows there are: write it as plate("data", len(x))'
            )

    def _notice(self, head: Mapping[str, jax.Array]) -> None:
        """Which sites are masked or scaled, which observe an array as it is, and the values of the marked latents."""
        self._masked, self._observes = set(), {}

        def look(head: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            sites = self._trace(self.start, head, {})
            for name, described in self.structure.model.items():
                if described.role in ("latent", "observed") and (
                    sites[name]["scale"] is not None or _has_mask(sites[name]["fn"])
                ):
                    self._masked.add(name)
                if described.role == "observed" and described.local and self._leads(sites[name]):
                    whole = _elements(sites[name], self._axis(sites[name]))
                    same = [
                        a for a, array in head.items() if sites[name]["value"] is array and array.size == whole.size
                    ]
                    if same:
                        self._observes[name] = (same[0], tuple(whole.shape[1:]))
            return {name: _support(sites[name]) for name, s in self.structure.latents.items() if s.enumerated}

        self._supports = {
            name: np.asarray(value) for name, value in jax.jit(look, compiler_options=QUICK)(head).items()
        }

    def _leads(self, site: Mapping[str, Any]) -> bool:
        """Whether the rows are the first axis of a site's value."""
        return jnp.ndim(site["value"]) - site["fn"].event_dim == -self._axis(site)

    # -- precision, autodiff --------------------------------------------------------------------------------------

    def ops(self, double: bool) -> Operators:
        """The operators in double precision, or in that of the run."""
        return Operators(np.float64 if double else self.dtype)

    @contextlib.contextmanager
    def scope(self, double: bool) -> Iterator[None]:
        """Where everything is computed; products are never rounded to fewer bits."""
        with (
            Scope(self._device, "64" if double else self.options.precision, False, self._modules),
            numpyro.validation_enabled(False),
            jax.default_matmul_precision("highest"),
        ):
            yield

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled, once for the shapes of its arrays."""
        return jax.jit(fn)

    def quick(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled in half the time: what runs a few times only."""
        return jax.jit(fn, compiler_options=QUICK)

    def value_and_grad(self, fn: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Any]]:
        """`fn(leaves, *rest)` and its gradient in the leaves."""
        return jax.value_and_grad(fn)

    def bend(self, fn: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """`fn(leaf, *rest)`: its slope along its own gradient, and the second derivative in that direction."""

        def both(leaf: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
            slope = jax.grad(lambda leaf: fn(leaf, *rest))
            gradient = slope(leaf)
            length = jnp.sqrt((gradient**2).sum())
            along = gradient / jnp.where(length > 0, length, 1.0)
            return length, (jax.jvp(slope, (leaf,), (along,))[1] * along).sum()

        return both

    # -- the program ----------------------------------------------------------------------------------------------

    def arrays(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Arrays as the program takes them."""
        return as_jax(arrays)

    def leaf(self, name: str, value: Any) -> jax.Array:
        """A leaf with new values, in its own dtype."""
        return jnp.asarray(value, self.start[name].dtype)

    def kept(self, value: np.ndarray) -> jax.Array:
        """A number of a state, as it was."""
        return jnp.asarray(value, value.dtype)

    def numpy(self, value: Any) -> np.ndarray:
        """As a numpy array."""
        return to_numpy(jnp.asarray(value))

    def _params(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Leaves by name as the tree that the program registers, in the precision in force."""
        whole = {name: _in_force(leaves.get(name, leaf)) for name, leaf in named(self._leaves.params, {}).items()}
        return jax.tree.unflatten(jax.tree.structure(self._leaves.params), list(whole.values()))

    def constrained(self, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Parameters as the program sees them."""
        found = named(self._leaves.constrained(self._params(leaves)), {})
        return {name: found[name] for name in self.start}

    def unconstrained(self, name: str, value: jax.Array) -> jax.Array:
        """The leaf that gives a parameter its value."""
        transform = self._leaves.transforms.get(name)
        return (value if transform is None else transform.inv(value)).astype(self.start[name].dtype)

    def support(self, name: str) -> np.ndarray:
        """The values of a latent, [K, *event]."""
        return self._supports[name]

    def masked(self, name: str) -> bool:
        """Whether a site is masked or scaled, so that its arguments alone do not tell its density."""
        return name in self._masked

    def values(self, arrays: Mapping[str, np.ndarray], held: Mapping[str, np.ndarray], names: Any) -> dict[str, Any]:
        """The data that sites observe, [N, E, *event]; `held` are values of the latents for one row."""
        return observed(arrays, held, names, self._observes, self._seen)

    def _seen(self, arrays: Mapping[str, np.ndarray], held: Mapping[str, np.ndarray], names: Any) -> dict[str, Any]:
        sites = self._trace(self.start, self.arrays(arrays), held)
        return {name: np.asarray(_elements(sites[name], self._axis(sites[name]))) for name in names}

    def arguments(
        self,
        leaves: Mapping[str, Any],
        arrays: Mapping[str, jax.Array],
        held: Mapping[str, np.ndarray],
        wanted: Mapping[str, tuple[str, ...]],
    ) -> dict[str, dict[str, jax.Array]]:
        """Arguments of sites' distributions, [R, E, *event], with the latents held."""
        sites = self._trace(leaves, arrays, held)
        return {site: {n: self._argument(sites[site], n) for n in names} for site, names in wanted.items()}

    def _argument(self, site: Mapping[str, Any], name: str) -> jax.Array:
        fn, base = site["fn"], unwrapped(site["fn"])
        rank = family_of(type(base).__name__).ranks.get(name, 0)
        value = jnp.asarray(getattr(base, name))
        whole = (*fn.batch_shape, *fn.event_shape[: fn.event_dim - base.event_dim])
        value = jnp.broadcast_to(value, (*whole, *value.shape[value.ndim - rank :]))
        return _rows_first(value, len(fn.batch_shape) + self._axis(site), value.ndim - rank)

    def densities(
        self, leaves: Mapping[str, Any], arrays: Mapping[str, jax.Array], held: Mapping[str, np.ndarray], names: Any
    ) -> dict[str, jax.Array]:
        """log p of sites, [R], with the latents held."""
        sites, found = self._trace(leaves, arrays, held), {}
        for name in names:
            site = sites[name]
            density = log_density(site) * (1.0 if site["scale"] is None else site["scale"])
            found[name] = _rows_first(density, density.ndim + self._axis(site), density.ndim).sum(1)
        return found

    def refuse_outside(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse rows that lie outside the support of the site that observes them."""
        values = self._leaves.values
        refuse_out_of_support(*callables(self._alone), as_jax(arrays), values, arrays)

    def _trace(self, leaves: Mapping[str, Any], arrays: Mapping[str, jax.Array], held: Mapping[str, Any]) -> Trace:
        """One run of the model with its latents held at values [R, *event]."""
        values = {**self._leaves.constrained(self._params(leaves)), **self._leaves.buffers}
        values = own_containers(values) | {name: self._shaped(name, value) for name, value in held.items()}
        return trace(substitute(seed(self._model, jax.random.key(self.options.seed)), data=values)).get_trace(**arrays)

    def _shaped(self, name: str, value: np.ndarray) -> jax.Array:
        """A latent's values [R, *event] on the axis where its site has its rows."""
        site = self.structure.model[name]
        shape = [1] * (len(site.shape) - site.event_dim)
        shape[next(plate.dim for plate in site.plates if plate.data)] = len(value)
        return jnp.asarray(value).reshape(*shape, *value.shape[1:])

    def _axis(self, site: Mapping[str, Any]) -> int:
        """Where the rows are in a site's batch shape, from the right."""
        return next(f.dim for f in site["cond_indep_stack"] if f.name in self.structure.data_plates)


class EM(Settings, Loss):
    """Expectation-maximisation on a NumPyro program: what `probgen.em.settings.Settings` says."""

    host, runs = Host, Runs


def _in_force(leaf: Any) -> jax.Array:
    dtype = jnp.result_type(leaf)
    return jnp.asarray(leaf, jnp.result_type(float) if jnp.issubdtype(dtype, jnp.floating) else dtype)


def _support(site: Mapping[str, Any]) -> jax.Array:
    """All values of a latent, [K, *event]."""
    found = site["fn"].enumerate_support(expand=False)
    return found.reshape(len(found), *found.shape[found.ndim - site["fn"].event_dim :])


def _has_mask(fn: Any) -> bool:
    return isinstance(fn, MaskedDistribution) or (hasattr(fn, "base_dist") and _has_mask(fn.base_dist))


def _rows_first(value: jax.Array, rows: int, elements: int) -> jax.Array:
    """An array with the axis `rows` in front, the other axes before `elements` as one: [R, E, *event]."""
    value = jnp.moveaxis(value, rows, 0)
    return value.reshape(value.shape[0], int(np.prod(value.shape[1:elements])), *value.shape[elements:])


def _elements(site: Mapping[str, Any], axis: int) -> jax.Array:
    """A site's value as [R, E, *event]."""
    fn = site["fn"]
    whole = jnp.broadcast_to(site["value"], fn.batch_shape + fn.event_shape)
    return _rows_first(whole, len(fn.batch_shape) + axis, whole.ndim - unwrapped(fn).event_dim)
