"""What a program trains and carries: its unconstrained leaves and its buffers, found by running it once.

A Pyro program keeps its weights in three places: the global parameter store, the modules it calls, and both at once
(`pyro.module`, `PyroModule`, autoguides). `collect` finds them all; `Leaves.substituted` runs a block of code with
other tensors in their places and puts everything back, so that fitting leaves the user's objects as they were and a
trace can see every leaf as an input.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import Transform, transform_to

from probgen.errors import ProbgenError
from probgen.program import Program, arguments
from probgen.pyro.device import numbers
from probgen.pyro.nn.snapshot import original
from probgen.pyro.trace import bound, callables, forked, is_sample, tensors

Place = tuple[dict, str]  # the `_parameters` or `_buffers` of a module, and the key there


@dataclass
class Leaves:
    """Names to tensors, and where each of them lives.

    `params` are unconstrained and trained, `buffers` are carried along (BatchNorm's statistics, weights that the
    program never registered), `constraints` take a leaf of the store to its constrained value. `aliases` are further
    names under which the store holds the same leaf.
    """

    params: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    constraints: dict[str, Any] = field(default_factory=dict)
    in_store: frozenset[str] = frozenset()
    aliases: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    recurrent: list[nn.RNNBase] = field(default_factory=list)

    @contextlib.contextmanager
    def substituted(self, values: Mapping[str, Tensor], training: bool | None = False) -> Iterator[None]:
        """Run with `values` (params and buffers by name) in the places of the collected tensors.

        `training` is the mode of the modules; None leaves it.
        """
        store = pyro.get_param_store()
        before = (store._params, store._param_to_name, store._constraints)
        originals = [(owner, key, owner[key]) for places in self.places.values() for owner, key in places]
        modes = [(m, m.training) for root in self.modules.values() for m in root.modules()]
        flat = [(m, m._flat_weights) for m in self.recurrent]
        waiting = self._waiting()
        store._params = {name: values[self.aliases.get(name, name)] for name in self.in_store}
        store._param_to_name = {value: name for name, value in store._params.items()}
        store._constraints = {name: self.constraints[name] for name in self.in_store}
        try:
            for name, places in self.places.items():
                for owner, key in places:
                    owner[key] = values[name]
            for module in self.recurrent:  # an RNN keeps a second list of its weights
                object.__setattr__(module, "_flat_weights", [getattr(module, n) for n in module._flat_weights_names])
            for module, _ in modes if training is not None else ():
                object.__setattr__(module, "training", training)
            for module in waiting:  # the values have seen their data
                module.waits_for_data = False
            _forget(module for module, _ in modes)
            yield
        finally:
            _forget(module for module, _ in modes)
            for owner, key, tensor in originals:
                owner[key] = tensor
            for module, weights in flat:
                object.__setattr__(module, "_flat_weights", weights)
            for module, mode in modes:
                object.__setattr__(module, "training", mode)
            for module in waiting:
                module.waits_for_data = True
            store._params, store._param_to_name, store._constraints = before

    def take_start(self, run: Callable[[], Any]) -> None:
        """Let modules that wait for a first batch (ActNorm) see the one of `run`; the program's own tensors stay."""
        waiting = self._waiting()
        if not waiting:
            return
        values = {name: tensor.detach().clone() for name, tensor in self.values().items()}
        with self.substituted(values), torch.no_grad():
            for module in waiting:
                module.waits_for_data = True
            run()
        for held in (self.params, self.buffers):
            held.update({name: values[name] for name in held})

    def _waiting(self) -> list[Any]:
        return [part for root in self.modules.values() for part in waiting_parts(root)]

    def values(self) -> dict[str, Tensor]:
        """The tensors as they were collected: the start weights."""
        return {**self.params, **self.buffers}

    def constrained(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters as the program sees them."""
        return {
            name: transform_to(self.constraints[name])(values[name]) if name in self.constraints else values[name]
            for name in self.params
        }


def _forget(modules: Iterable[nn.Module]) -> None:
    """Empty the caches of Pyro's transforms: what they keep was computed with other weights."""
    for module in modules:
        if isinstance(module, Transform) and module._cache_size:
            module._cached_x_y = None, None


def leaves_of(
    program: Program, arrays: Mapping[str, Any], dtype: torch.dtype, seed: int = 0, parts: tuple[Any, ...] = ()
) -> Leaves:
    """The leaves of a program and of the further `parts` of its loss, as they stand before training.

    The modules run where and in the precision in which they were made: that of the default, or else of `dtype`.
    """
    model, guide = callables(program)
    others = [bound(part) for part in parts if part is not program.model and part is not program.guide]
    for fn in (program.model, program.guide):
        if fn is not None:
            arguments(fn, arrays, program.model)  # a missing array is told here, before Pyro adds a trace to the error

    def touch(batch: Mapping[str, Tensor]) -> poutine.Trace:
        run = poutine.replay(model, trace=poutine.trace(guide).get_trace(**batch))
        trace = poutine.trace(run).get_trace(**batch)
        for part in others:
            part(**batch)
        return trace

    def see(batch: Mapping[str, Tensor]) -> None:
        for site in touch(batch).nodes.values():
            if is_sample(site):
                with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # told when it is asked for
                    site["fn"].log_prob(site["value"])

    def attempt(dtype: torch.dtype) -> Leaves:
        with forked(seed), pyro.validation_enabled(False), numbers(dtype, torch.device("cpu")):
            batch = tensors(arrays, dtype, "cpu")
            leaves = collect(lambda: touch(batch), (program.model, program.guide, *parts))
            leaves.take_start(lambda: see(batch))
            return leaves

    default = torch.get_default_dtype()
    if dtype is default:
        return attempt(default)
    try:
        return attempt(default)
    except RuntimeError:  # the user's modules may have the precision of the fit already
        return attempt(dtype)


def own_program(program: Program) -> Program:
    """The program with an autoguide of its own, if that has not seen its model yet.

    An autoguide takes its shapes from the first batch that it is called on, and the user's must not keep ours.
    """
    guide = _fresh(program.guide)
    return program if guide is program.guide else replace(program, guide=guide)


def _fresh(guide: Any) -> Any:
    if not isinstance(guide, AutoGuide) or guide.prototype_trace is not None:
        return guide
    clone = object.__new__(type(guide))  # AutoGuide's own copying takes the model away from the original
    clone.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in guide.__dict__.items()})
    for name, part in guide._modules.items():
        clone._modules[name] = _fresh(part)
        if isinstance(part, AutoGuide):
            clone._modules[name]._update_master(weakref.ref(clone))
    return clone


def collect(run: Callable[[], Any], program_parts: tuple[Any, ...] = (), private: bool = True) -> Leaves:
    """Run once, in a parameter store of its own or in the global one, and gather each leaf and buffer touched.

    `run` is called under no-grad; parameters that the program makes on its first call (autoguides, lazy
    `pyro.param`) are made here. Random numbers are drawn from the generator as it stands.
    """
    seen: dict[int, nn.Module] = {}
    for part in program_parts:
        owner = getattr(part, "__self__", part)
        if isinstance(owner, nn.Module):
            seen[id(owner)] = owner
    scope = private_store() if private else contextlib.nullcontext(pyro.get_param_store())
    with scope as store, _recording(seen, private), torch.no_grad(), poutine.trace(param_only=True) as touched:
        run()
        names = [name for name in store._params if private or name in touched.trace.nodes]
        params = {name: store._params[name] for name in names}
        constraints = {name: store._constraints[name] for name in names}
    return _assemble(params, constraints, list(seen.values()))


@contextlib.contextmanager
def private_store() -> Iterator[Any]:
    """A parameter store that starts empty; the global one comes back unchanged."""
    store = pyro.get_param_store()
    before = (store._params, store._param_to_name, store._constraints)
    store._params, store._param_to_name, store._constraints = {}, {}, {}
    try:
        yield store
    finally:
        store._params, store._param_to_name, store._constraints = before


@contextlib.contextmanager
def _recording(seen: dict[int, nn.Module], private: bool) -> Iterator[None]:
    """Note each module that is called, or whose parameters are asked for (`pyro.module` does that).

    What waits for a first batch goes on waiting through a private run.
    """

    modes: list[tuple[nn.Module, bool]] = []
    waiting: list[Any] = []

    def note(module: nn.Module, *_: Any) -> None:
        module = original(module)  # a distribution calls a snapshot of what the program holds
        seen.setdefault(id(module), module)
        for part in waiting_parts(module) if private else ():
            part.waits_for_data = False
            waiting.append(part)

    def evaluate(module: nn.Module, *_: Any) -> None:
        """Eval mode for this one run, so that it leaves no trace in BatchNorm's statistics."""
        note(module)
        if module.training:
            modes.append((module, True))
            object.__setattr__(module, "training", False)

    named_parameters = nn.Module.named_parameters

    def noting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        note(self)
        return named_parameters(self, *args, **kwargs)

    hook = nn.modules.module.register_module_forward_pre_hook(evaluate)
    nn.Module.named_parameters = noting
    try:
        yield
    finally:
        nn.Module.named_parameters = named_parameters
        hook.remove()
        for module, mode in modes:
            object.__setattr__(module, "training", mode)
        for module in waiting:
            module.waits_for_data = True


def waiting_parts(module: nn.Module) -> list[Any]:
    """The modules in one that take their start from the first batch they see (ActNorm), and have not seen one."""
    return [part for part in module.modules() if getattr(part, "waits_for_data", False)]


def _assemble(params: dict[str, Tensor], constraints: dict[str, Any], seen: list[nn.Module]) -> Leaves:
    inner = {id(child) for module in seen for child in module.modules() if child is not module}
    roots = [module for module in seen if id(module) not in inner]
    names: dict[int, str] = {}
    for name in sorted(
        params, key=lambda n: constraints[n] is torch.distributions.constraints.real
    ):  # constrained first
        names.setdefault(id(params[name]), name)
    leaves = Leaves(constraints=constraints, in_store=frozenset(params))
    leaves.aliases = {name: names[id(tensor)] for name, tensor in params.items() if names[id(tensor)] != name}
    for position, root in enumerate(roots):
        prefix = _prefix(root, names) or f"module_{position}"
        leaves.modules[prefix] = root
        for path, module in root.named_modules():
            for key, tensor in module._parameters.items():
                if tensor is None:
                    continue
                own = f"{path}.{key}" if path else key
                name = names.get(id(tensor))
                if name is None and own in params:
                    raise ProbgenError(
                        f"two modules both name a parameter {own!r}: give one a name of its own, "
                        f"PyroModule.__init__(self, name=...), or make both attributes of one PyroModule"
                    )
                if name is None:  # never registered: it stays fixed, as in Pyro, but goes where the program goes
                    name = names.setdefault(id(tensor), f"{prefix}$$${own}")
                    leaves.buffers[name] = tensor
                leaves.places.setdefault(name, []).append((module._parameters, key))
            for key, tensor in module._buffers.items():
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{prefix}$$${f'{path}.{key}' if path else key}")
                    leaves.buffers[name] = tensor
                    leaves.places.setdefault(name, []).append((module._buffers, key))
            if isinstance(module, nn.RNNBase):
                leaves.recurrent.append(module)
    for name, tensor in sorted(params.items()):  # by name: an autoguide makes its own in no fixed order
        if name not in leaves.aliases:
            (leaves.params if tensor.requires_grad else leaves.buffers)[name] = tensor
    return leaves


def _prefix(root: nn.Module, names: Mapping[int, str]) -> str | None:
    """The name under which `pyro.module` registered a root module, read off one of its parameters."""
    for path, tensor in root.named_parameters():
        name = names.get(id(tensor), "")
        if name.endswith("$$$" + path):
            return name.removesuffix("$$$" + path)
        if name.endswith("." + path):
            return name.removesuffix("." + path)
    return None


def start_values(leaves: Leaves, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Fresh copies of the collected tensors, in the precision and on the device of the fit."""

    def own(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().clone().to(device=device, dtype=wanted)

    return {name: own(tensor) for name, tensor in leaves.values().items()}
