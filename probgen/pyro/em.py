"""Expectation-maximisation on Pyro programs: the operators and the runs that `probgen.em.settings` asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import transform_to

from probgen.em.exponential import family_of
from probgen.em.observed import observed, some_rows
from probgen.em.settings import Settings
from probgen.errors import ProbgenError
from probgen.program import Program, rows_of
from probgen.pyro.conjugate import Runs
from probgen.pyro.device import numbers, resolve_device, resolve_precision
from probgen.pyro.leaves import leaves_of, own_program, start_values
from probgen.pyro.loss import Loss
from probgen.pyro.operators import Operators
from probgen.pyro.support import refuse_out_of_support
from probgen.pyro.trace import callables, forked, structure_of, tensors, unwrapped, whole_plates


class Host:
    """Runs a Pyro program for EM: its leaves, its sites' arguments and densities with latents held."""

    compiled = False

    def __init__(self, program: Program, feed: Any, options: Any) -> None:
        self.program, self.options = own_program(program), options
        self.device, (self.dtype, mixed) = resolve_device(options.device), resolve_precision(options.precision)
        if mixed:
            raise ProbgenError('EM computes in precision "32" or "64", not "bf16-mixed"')
        batch = feed.batch(0)
        few = some_rows(batch)
        # A guide may have parameters for each row; a model on all of a million rows would fill the memory.
        self._leaves = leaves_of(self.program, few if program.guide is None else batch, self.dtype, options.seed)
        values = start_values(self._leaves, self.dtype, self.device)
        self._model = callables(replace(self.program, guide=None))[0]
        own = self._touched(few)
        self.start = {name: values[name] for name in self._leaves.params if name in own}
        self.buffers = {name: value for name, value in values.items() if name not in self.start}  # the guide's, too
        self._plates: tuple[str, ...] = ()
        with self.scope(False):
            self._look(batch, few, feed)

    def _touched(self, few: Mapping[str, np.ndarray]) -> set[str]:
        """The parameters that the model touches when run once."""
        head = tensors(few, self.dtype, self.device)
        if self.program.guide is None:
            return set(self._leaves.params)
        with numbers(self.dtype, self.device), forked(self.options.seed), pyro.validation_enabled(False):
            values = start_values(self._leaves, self.dtype, self.device)
            for name in self._leaves.params:
                values[name].requires_grad_()  # pyro.module passes over what needs no gradient
            with self._leaves.substituted(values), torch.no_grad(), poutine.trace(param_only=True) as seen:
                self._model(**head)
        return {self._leaves.aliases.get(name, name) for name in seen.trace.nodes}

    def _look(self, batch: Mapping[str, np.ndarray], few: Mapping[str, np.ndarray], feed: Any) -> None:
        alone, seed = replace(self.program, guide=None), self.options.seed
        with self._leaves.substituted({**self.start, **self.buffers}):
            head = tensors(few, self.dtype, self.device)
            everything = lambda: tensors(batch, self.dtype, self.device)  # noqa: E731
            try:
                self.structure = structure_of(alone, head, feed.rows, seed)
            except (RuntimeError, ValueError, IndexError):  # a plate that states N: the program takes whole arrays only
                head = everything()
                self.structure = structure_of(alone, head, feed.rows, seed)
            refuse_out_of_support(*callables(alone), head, everything, seed)
            self._plates = self.structure.data_plates if self.structure.states_rows else ()
            self._notice(head)

    def _notice(self, head: Mapping[str, Tensor]) -> None:
        """Which sites are masked or scaled, and which observe an array as it is, of what shape in a row."""
        with forked(self.options.seed):
            nodes = self._nodes = self._trace(self.start, head, {}).nodes
        self._masked, self._observes = set(), {}
        for name, described in self.structure.model.items():
            site = nodes[name]
            if site["mask"] is not None or site["scale"] != 1.0 or _has_mask(site["fn"]):
                self._masked.add(name)
            if described.role == "observed" and described.local:
                whole = _elements(site, site["value"], self._axis(site))
                same = [a for a, array in head.items() if _is_view(whole, array)]
                if same:
                    self._observes[name] = (same[0], tuple(whole.shape[1:]))

    # -- precision, autodiff --------------------------------------------------------------------------------------

    def ops(self, double: bool) -> Operators:
        """The operators in double precision, or in that of the run."""
        return Operators(torch.float64 if double else self.dtype, self.device)

    @contextlib.contextmanager
    def scope(self, double: bool) -> Iterator[None]:
        """Where everything is computed."""
        with numbers(self.dtype, self.device), torch.no_grad(), pyro.validation_enabled(False):
            yield

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Torch runs it as it is."""
        return fn

    quick = jit

    def value_and_grad(self, fn: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """`fn(leaves, *rest)` and its gradient in the leaves."""

        def both(leaves: Mapping[str, Tensor], *rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.enable_grad():
                own = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
                value = fn(own, *rest)
                reached = value.requires_grad
                grads = (
                    torch.autograd.grad(value, list(own.values()), allow_unused=True) if reached else [None] * len(own)
                )
            zero = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, own.values(), strict=True)]
            return value.detach(), dict(zip(own, zero, strict=True))

        return both

    def bend(self, fn: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        """`fn(leaf)`: its slope along its own gradient, and the second derivative in that direction."""

        def both(leaf: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = leaf.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(fn(leaf, *rest), leaf, create_graph=True)
                length = gradient.detach().norm()
                if not gradient.requires_grad or not bool(length > 0):
                    return length, 0 * length
                along = (gradient * (gradient.detach() / length)).sum()
                (turned,) = torch.autograd.grad(along, leaf)
            return length, (turned * gradient.detach()).sum() / length

        return both

    # -- the program ----------------------------------------------------------------------------------------------

    def arrays(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Arrays as the program takes them."""
        return tensors(arrays, self.dtype, self.device)

    def leaf(self, name: str, value: Any) -> Tensor:
        """A leaf with new values, in its own dtype."""
        return torch.as_tensor(value, device=self.device).to(self.start[name].dtype)

    def kept(self, value: np.ndarray) -> Tensor:
        """A number of a state, as it was."""
        return torch.from_numpy(np.array(value)).to(self.device)

    def numpy(self, value: Tensor) -> np.ndarray:
        """As a numpy array of its own."""
        return value.detach().cpu().numpy().copy()

    def constrained(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters as the program sees them."""
        kept = self._leaves.constraints
        return {n: transform_to(kept[n])(leaf) if n in kept else leaf for n, leaf in leaves.items()}

    def unconstrained(self, name: str, value: Tensor) -> Tensor:
        """The leaf that gives a parameter its value."""
        kept = self._leaves.constraints
        found = transform_to(kept[name]).inv(value) if name in kept else value
        return found.to(self.start[name].dtype)

    def support(self, name: str) -> np.ndarray:
        """The values of a latent, [K, *event]."""
        fn = self._nodes[name]["fn"]
        found = fn.enumerate_support(expand=False)
        return found.reshape(len(found), *found.shape[found.dim() - fn.event_dim :]).cpu().numpy()

    def masked(self, name: str) -> bool:
        """Whether a site is masked or scaled, so that its arguments alone do not tell its density."""
        return name in self._masked

    def values(self, arrays: Mapping[str, np.ndarray], held: Mapping[str, np.ndarray], names: Any) -> dict[str, Any]:
        """The data that sites observe, [N, E, *event]; `held` are values of the latents for one row."""
        return observed(arrays, held, names, self._observes, self._seen)

    def _seen(self, arrays: Mapping[str, np.ndarray], held: Mapping[str, np.ndarray], names: Any) -> dict[str, Any]:
        nodes = self._trace(self.start, self.arrays(arrays), held).nodes
        return {n: self.numpy(_elements(nodes[n], nodes[n]["value"], self._axis(nodes[n]))) for n in names}

    def arguments(
        self,
        leaves: Mapping[str, Tensor],
        arrays: Mapping[str, Tensor],
        held: Mapping[str, np.ndarray],
        wanted: Mapping[str, tuple[str, ...]],
    ) -> dict[str, dict[str, Tensor]]:
        """Arguments of sites' distributions, [R, E, *event], with the latents held."""
        nodes = self._trace(leaves, arrays, held).nodes
        return {site: {n: self._argument(nodes[site], n) for n in names} for site, names in wanted.items()}

    def _argument(self, site: Mapping[str, Any], name: str) -> Tensor:
        fn, base = site["fn"], unwrapped(site["fn"])
        rank = family_of(type(base).__name__).ranks.get(name, 0)
        value = torch.as_tensor(getattr(base, name))
        whole = (*fn.batch_shape, *fn.event_shape[: fn.event_dim - base.event_dim])
        value = value.expand(*whole, *value.shape[value.dim() - rank :])
        return _rows_first(value, len(fn.batch_shape) + self._axis(site), value.dim() - rank)

    def densities(
        self, leaves: Mapping[str, Tensor], arrays: Mapping[str, Tensor], held: Mapping[str, np.ndarray], names: Any
    ) -> dict[str, Tensor]:
        """log p of sites, [R], with the latents held."""
        nodes, found = self._trace(leaves, arrays, held).nodes, {}
        for name in names:
            site = nodes[name]
            density = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
            found[name] = _rows_first(density, density.dim() + self._axis(site), density.dim()).sum(1)
        return found

    def refuse_outside(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse rows that lie outside the support of the site that observes them."""
        with self._running(self.start, rows_of(arrays)):
            batch = self.arrays(arrays)
            refuse_out_of_support(
                *callables(replace(self.program, guide=None)), batch, lambda: batch, self.options.seed
            )

    def _trace(self, leaves: Mapping[str, Tensor], arrays: Mapping[str, Tensor], held: Mapping[str, np.ndarray]) -> Any:
        """One run of the model with its latents held at values [R, *event]."""
        with self._running(leaves, rows_of(arrays)):
            shaped = {name: self._shaped(name, value) for name, value in held.items()}
            model = poutine.condition(self._model, data=shaped) if held else self._model
            return poutine.trace(model).get_trace(**arrays)

    @contextlib.contextmanager
    def _running(self, leaves: Mapping[str, Tensor], rows: int) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._leaves.substituted({**self.buffers, **leaves}))
            if self._plates:
                stack.enter_context(whole_plates(self._plates, rows))
            yield

    def _shaped(self, name: str, value: np.ndarray) -> Tensor:
        """A latent's values [R, *event] on the axis where its site has its rows."""
        site = self.structure.model[name]
        shape = [1] * (len(site.shape) - site.event_dim)
        shape[next(plate.dim for plate in site.plates if plate.data)] = len(value)
        return torch.as_tensor(value, device=self.device).reshape(*shape, *value.shape[1:])

    def _axis(self, site: Mapping[str, Any]) -> int:
        """Where the rows are in a site's batch shape, from the right."""
        return next(f.dim for f in site["cond_indep_stack"] if f.name in self.structure.data_plates)


class EM(Settings, Loss):
    """Expectation-maximisation on a Pyro program: what `probgen.em.settings.Settings` says."""

    host, runs = Host, Runs


def _has_mask(fn: Any) -> bool:
    return isinstance(fn, MaskedDistribution) or (hasattr(fn, "base_dist") and _has_mask(fn.base_dist))


def _is_view(value: Tensor, array: Tensor) -> bool:
    """Whether values are all of an array, perhaps in another shape."""
    return value.data_ptr() == array.data_ptr() and value.numel() == array.numel() and value.is_contiguous()


def _rows_first(value: Tensor, rows: int, elements: int) -> Tensor:
    """An array with the axis `rows` in front, the other axes before `elements` as one: [R, E, *event]."""
    value = value.movedim(rows, 0)
    return value.reshape(value.shape[0], -1, *value.shape[elements:])


def _elements(site: Mapping[str, Any], value: Tensor, axis: int) -> Tensor:
    """A site's value as [R, E, *event]."""
    fn = site["fn"]
    whole = torch.broadcast_to(value, fn.batch_shape + fn.event_shape)
    return _rows_first(whole, len(fn.batch_shape) + axis, whole.dim() - unwrapped(fn).event_dim)
