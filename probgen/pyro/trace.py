"""Running a Pyro program: arrays bound by name, the data plate scaled, and what one trace tells of its structure."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, ExpandedDistribution, Independent, MaskedDistribution, Unit
from pyro.infer.autoguide import AutoGuide
from pyro.infer.inspect import get_dependencies
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor, nn

from probgen.errors import ProbgenError
from probgen.program import Plate, Program, Site, Structure, arguments, rows_of
from probgen.refusals import enumerable, refuse_local_autoguide, refuse_self_subsampling
from probgen.supports import refuse_shape

_LONG, _FEW = 32, 8  # a program of more sites, which may each be a deep network, is looked at with so few rows


def bound(fn: Callable[..., Any], like: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`fn` as a callable that takes every array of the batch by keyword and uses those it names.

    Positional arrays, as loss functions of Pyro's own convention pass them on, go by the names of `like`.
    """

    @functools.wraps(fn, updated=())
    def call(*args: Tensor, **arrays: Tensor) -> Any:
        if args:
            arrays = {**dict(zip(parameter_names(like or fn), args, strict=False)), **arrays}
        return fn(**arguments(fn, arrays, like))

    return call


def parameter_names(fn: Callable[..., Any]) -> list[str]:
    """What a callable or module names its arguments, in order."""
    return list(inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters)


def nothing(*_: Tensor, **__: Tensor) -> None:
    """The guide of a program that needs none."""


def callables(program: Program) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide, each called with the whole batch by keyword."""
    guide = nothing if program.guide is None else bound(program.guide, like=program.model)
    return bound(program.model), guide


class DataPlate(Messenger):
    """Scale the sites in the data plates by N / B: the batch stands for all N rows.

    A plate that scales for itself, since it states N or subsamples, is left alone.
    """

    def __init__(self, names: tuple[str, ...], scale: float) -> None:
        super().__init__()
        self.names = frozenset(names)
        self.scale = scale

    def _pyro_sample(self, msg: dict) -> None:
        if any(frame.name in self.names and frame.full_size == frame.size for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.scale


def rows_factor() -> float:
    """N / B, by which an engine makes a batch stand for all rows: what a loss that has no sites scales by itself."""
    return next((h.scale for h in _PYRO_STACK if isinstance(h, DataPlate)), 1.0)


def rows_stood_for(trace: poutine.Trace, plates: tuple[str, ...]) -> tuple[Any, Any]:
    """(N, N / B) of the data plates in a trace: how many rows they stand for, and what one row at hand counts."""
    active = rows_factor()
    for site in trace.nodes.values():
        for frame in site["cond_indep_stack"] if site["type"] == "sample" else ():
            if frame.name in plates:
                scale = active if frame.full_size == frame.size else frame.full_size / frame.size
                return frame.size * scale, scale
    return 1.0, 1.0


@contextlib.contextmanager
def whole_plates(names: tuple[str, ...], rows: int) -> Iterator[None]:
    """Inside, the named plates hold the `rows` at hand, however they subsample.

    A plate that states N and takes the rows at hand is left alone, unless these are more than N.
    """
    original = SubsampleMessenger._subsample

    def whole(name: str, size: int | None = None, subsample_size: int | None = None, subsample: Any = None, *more: Any):
        if name in names and subsample is None and not subsample_size == rows <= size:
            size, subsample_size = rows, None
        return original(name, size, subsample_size, subsample, *more)

    SubsampleMessenger._subsample = staticmethod(whole)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(original)


@contextlib.contextmanager
def forked(seed: int) -> Iterator[None]:
    """Run under generators seeded with `seed`, and leave the caller's as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def tensors(arrays: Mapping[str, np.ndarray], dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """Arrays as tensors on the device: floats in the precision of the fit, integers as int64."""

    def one(array: np.ndarray) -> Tensor:
        if not isinstance(array, Tensor):
            array = np.ascontiguousarray(array)
            array = torch.from_numpy(array if array.flags.writeable else array.copy())
        tensor = array
        if tensor.is_floating_point():
            return tensor.to(device=device, dtype=dtype)
        if tensor.dtype in (torch.bool, torch.int64):
            return tensor.to(device=device)
        return tensor.to(device=device, dtype=torch.int64)

    return {name: one(array) for name, array in arrays.items()}


def is_sample(site: Mapping[str, Any]) -> bool:
    """Whether a node of a trace is a sample statement of the program's own."""
    return site["type"] == "sample" and not isinstance(site["fn"], _Subsample)


def marked(site: Mapping[str, Any]) -> bool:
    """Whether a site asks to be enumerated."""
    return site["infer"].get("enumerate") is not None


def plan_structure(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    seed: int = 0,
) -> Structure:
    """Sites, plates and parents of a pair, from one run of the guide and of the model against it."""
    return _structure(model, guide, args, kwargs, seed)[0]


def _structure(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], seed: int
) -> tuple[Structure, tuple[poutine.Trace, poutine.Trace], Callable[[Any], Any]]:
    """The structure, the two traces it was read from, and what cuts an array to the rows that are looked at."""
    q, p = _run_pair(model, guide, args, kwargs, seed)
    for name, site in p.nodes.items():
        if is_sample(site) and site["is_observed"] and isinstance(site["value"], Tensor):
            refuse_shape(name, tuple(site["value"].shape), tuple(site["fn"].shape()), site["fn"].event_dim)
    few = _few(args, kwargs)
    data_plates, follow, shorter = _data_plates(model, guide, args, kwargs, _frames(q) | _frames(p), few, seed)
    few = few if shorter and sum(map(is_sample, p.nodes.values())) > _LONG else _unchanged
    with forked(seed):
        found = get_dependencies(model, tuple(map(few, args)), _each(few, kwargs))["prior_dependencies"]
    parents = {name: tuple(u for u in upstream if u != name) for name, upstream in found.items()}
    structure = Structure(
        model=_sites(p, data_plates, parents),
        guide=_sites(q, data_plates, {}),
        data_plates=data_plates,
        states_rows=not follow,
    )
    return structure, (q, p), few


def structure_of(program: Program, arrays: Mapping[str, Tensor], rows: int, seed: int = 0) -> Structure:
    """The structure of a program on one batch of its N `rows`, with the use it makes of each array.

    Raises `ProbgenError` for an array that is read as input to its own site, for a plate that subsamples a minibatch
    for itself, and for an autoguide that keeps one value per row under minibatches.
    """
    model, guide = callables(program)
    structure, (q, p), few = _structure(model, guide, (), arrays, seed)
    batch = rows_of(arrays)
    for frame in (_frames(q) | _frames(p)).values():
        refuse_self_subsampling(frame.name, frame.full_size, frame.size, batch, rows)
    if isinstance(program.guide, AutoGuide):
        refuse_local_autoguide(type(program.guide).__name__, structure, batch, rows)
    return replace(structure, arrays=_use_of_arrays(model, program, _each(few, arrays), seed))


def _run_pair(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], seed: int) -> tuple:
    with forked(seed), torch.no_grad(), pyro.validation_enabled(False):
        q = poutine.trace(guide).get_trace(*args, **kwargs)
        return q, poutine.trace(poutine.replay(model, trace=q)).get_trace(*args, **kwargs)


def _frames(trace: poutine.Trace) -> dict[str, Any]:
    return {
        frame.name: frame
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    }


def _data_plates(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    frames: Mapping[str, Any],
    few: Callable[[Any], Any],
    seed: int,
) -> tuple[tuple[str, ...], bool, bool]:
    """The plates of the rows, of those with the batch's size those shorter when it is.

    Also whether they follow the batch, and whether a batch of few rows leaves nothing of its length behind.
    """
    batch = _length(args, kwargs)
    candidates = tuple(name for name, frame in frames.items() if batch in (frame.size, frame.full_size))
    if batch <= 1 or len(candidates) == 0:
        return candidates, all(frames[name].full_size == frames[name].size for name in candidates), False

    try:
        q, p = _run_pair(model, guide, tuple(map(few, args)), _each(few, kwargs), seed)
    except (RuntimeError, ValueError, IndexError):
        return candidates, False, False  # a program made for one batch length: the plate of that length is the data's
    after, rows = _frames(q) | _frames(p), min(_FEW, batch - 1)
    following = tuple(n for n in candidates if n not in after or rows in (after[n].size, after[n].full_size))
    follow = all(n in after and rows == after[n].size == after[n].full_size for n in following)
    shorter = all(rows == frame.size for trace in (q, p) for n, frame in _frames(trace).items() if n in candidates)
    return following, follow, follow and shorter


def _length(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """B of the first array that has rows; 0 if none has."""
    return next((len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), 0)


def _few(args: tuple, kwargs: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What cuts the arrays of B rows to fewer: a program may be a chain of a thousand networks."""
    batch = _length(args, kwargs)
    rows = min(_FEW, batch - 1)

    def cut(value: Any) -> Any:
        return value[:rows] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value

    return cut if rows > 0 else _unchanged


def _unchanged(value: Any) -> Any:
    return value


def _each(change: Callable[[Any], Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: change(value) for name, value in arrays.items()}


def _sites(trace: poutine.Trace, data_plates: tuple[str, ...], parents: Mapping[str, tuple]) -> dict[str, Site]:
    return {name: _site(name, s, data_plates, parents) for name, s in trace.nodes.items() if is_sample(s)}


def _site(name: str, site: Mapping[str, Any], data_plates: tuple[str, ...], parents: Mapping[str, tuple]) -> Site:
    fn = site["fn"]
    base = unwrapped(fn)
    deterministic = bool(site["infer"].get("_deterministic"))
    role = "observed" if site["is_observed"] else "latent"
    role = "factor" if isinstance(base, Unit) else "deterministic" if deterministic else role
    return Site(
        name=name,
        role=role,
        family=type(base).__name__,
        shape=tuple(site["value"].shape),
        event_dim=fn.event_dim,
        plates=tuple(
            Plate(f.name, f.size, f.dim, f.name in data_plates) for f in site["cond_indep_stack"] if f.vectorized
        ),
        support=str(fn.support) if _has_support(fn) else "",
        discrete=bool(getattr(fn.support, "is_discrete", False)) if _has_support(fn) else False,
        enumerated=marked(site),
        values=enumerable(name, fn) if marked(site) and not site["is_observed"] else 0,
        reparametrised=bool(fn.has_rsample),
        delta=isinstance(base, Delta) and not deterministic,
        parents=parents.get(name, ()),
    )


def unwrapped(fn: Any) -> Any:
    """The distribution under `to_event`, `mask` and `expand`."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _has_support(fn: Any) -> bool:
    try:
        return fn.support is not None
    except NotImplementedError:
        return False


def _use_of_arrays(model: Callable, program: Program, arrays: Mapping[str, Tensor], seed: int) -> dict[str, str]:
    """For each array the model names: "data" if an unconditioned draw does not depend on its values, else "given".

    An array whose change shows in a draw of the very site that observes it is read as input to itself: refused.
    """
    named = arguments(program.model, arrays)
    names, use = named if set(named) <= set(arrays) else arrays, {}
    with forked(seed), torch.no_grad(), pyro.validation_enabled(False):
        drawn = poutine.trace(poutine.uncondition(model)).get_trace(**arrays)
        held = drawn.copy()
        for name in [n for n, site in drawn.nodes.items() if is_sample(site) and site["infer"].get("_deterministic")]:
            held.remove_node(name)
        free = poutine.replay(poutine.uncondition(model), trace=held)
        seen = poutine.trace(model).get_trace(**arrays)
        for name in names:
            other = {**arrays, name: _another(arrays[name])}
            try:
                changed = _differing(drawn, poutine.trace(free).get_trace(**other), _density)
                own = _differing(seen, poutine.trace(model).get_trace(**other), _observation)
            except (RuntimeError, ValueError, IndexError):  # a value that the program cannot take is one that it reads
                changed, own = {name}, set()
            use[name] = "given" if changed else "data"
            if changed & own:
                raise ProbgenError(
                    f"the array {name!r} is read as input to its own site {min(changed & own)!r}, so the program cannot "
                    "be sampled: write it as one distribution (autoregressive programs are one site with an "
                    "autoregressive distribution)"
                )
    return use


def _differing(a: poutine.Trace, b: poutine.Trace, told: Callable[[dict], Tensor | None]) -> set[str]:
    """The sites of which two traces tell different things."""
    both = [name for name, site in a.nodes.items() if is_sample(site) and name in b.nodes]
    pairs = {name: (told(a.nodes[name]), told(b.nodes[name])) for name in both}
    return {name for name, (x, y) in pairs.items() if x is not None and not (y is not None and _same(x, y))}


def _density(site: dict) -> Tensor:
    """What shows that a site's distribution is another one: its log density where it is.

    At a copy, since a flow remembers the density of its own draw, and computes that of the same value in other digits;
    with the same random numbers, since a density may be an estimate.
    """
    if site["infer"].get("_deterministic"):
        return site["value"]
    with forked(0):
        return site["fn"].log_prob(site["value"].clone())


def _observation(site: dict) -> Tensor | None:
    return site["value"] if site["is_observed"] and not site["infer"].get("_deterministic") else None


def _another(array: Tensor) -> Tensor:
    """Other values of the same kind: its rows moved by one, or where they are all alike, changed."""
    moved = array.roll(1, 0)
    if not torch.equal(moved, array):
        return moved
    return array + 1 if array.is_floating_point() else (array <= 0).to(array.dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))
