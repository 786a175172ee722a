"""Running a Pyro program: arrays bound by name, the data plate scaled, and what one trace tells of its structure."""

from __future__ import annotations

import contextlib
import functools
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
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from probgen.errors import ProbgenError
from probgen.program import Plate, Program, Site, Structure, arguments, rows_of


def bound(fn: Callable[..., Any], like: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`fn` as a callable that takes every array of the batch by keyword and uses those it names."""

    @functools.wraps(fn, updated=())
    def call(**arrays: Tensor) -> Any:
        return fn(**arguments(fn, arrays, like))

    return call


def nothing(**_: Tensor) -> None:
    """The guide of a program that needs none."""


def callables(program: Program) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide, each called with the whole batch by keyword."""
    guide = nothing if program.guide is None else bound(program.guide, like=program.model)
    return bound(program.model), guide


class DataPlate(Messenger):
    """Scale the sites in the data plates by N / B: the batch stands for all N rows."""

    def __init__(self, names: tuple[str, ...], scale: float) -> None:
        super().__init__()
        self.names = frozenset(names)
        self.scale = scale

    def _pyro_sample(self, msg: dict) -> None:
        if any(frame.name in self.names for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.scale


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
    """Sites, plates and parents of a pair, from one run of the guide and of the model against it.

    Raises `ProbgenError` for a latent that has neither guide nor enumeration.
    """
    q, p = _run_pair(model, guide, args, kwargs, seed)
    _refuse_unguided(p, q)
    frames = _frames(p) | _frames(q)
    data_plates = _data_plates(model, guide, args, kwargs, frames, seed)
    with forked(seed):
        found = get_dependencies(model, args, dict(kwargs))["prior_dependencies"]
    parents = {name: tuple(u for u in upstream if u != name) for name, upstream in found.items()}
    return Structure(
        model=_sites(p, data_plates, parents),
        guide=_sites(q, data_plates, {}),
        data_plates=data_plates,
        states_rows=any(frames[name].full_size != frames[name].size for name in data_plates),
    )


def structure_of(program: Program, arrays: Mapping[str, Tensor], rows: int, seed: int = 0) -> Structure:
    """The structure of a program on one batch of its N `rows`, with the use it makes of each array.

    Raises `ProbgenError` for a latent that has neither guide nor enumeration, for an array that is read as input to
    its own site, for a plate that subsamples a minibatch for itself, and for an autoguide that keeps one value per
    row under minibatches.
    """
    model, guide = callables(program)
    structure = plan_structure(model, guide, (), arrays, seed)
    batch = rows_of(arrays)
    q, p = _run_pair(model, guide, (), arrays, seed)
    _refuse_self_subsampling(_frames(p) | _frames(q), batch, rows)
    _refuse_local_autoguide(program, structure, batch, rows)
    return replace(structure, arrays=_use_of_arrays(model, program, arrays, p, seed))


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
    seed: int,
) -> tuple[str, ...]:
    """The plates as long as the batch: of those with its size, the ones that follow it when it is shorter."""
    lengths = [len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()]
    batch = lengths[0] if lengths else 0
    candidates = tuple(name for name, frame in frames.items() if frame.size == batch)
    if batch <= 1 or len(candidates) == 0:
        return candidates

    def shorter(value: Any) -> Any:
        return value[: batch - 1] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value

    try:
        q, p = _run_pair(model, guide, tuple(map(shorter, args)), {n: shorter(a) for n, a in kwargs.items()}, seed)
    except (RuntimeError, ValueError, IndexError):
        return candidates  # a program made for one batch length: the plate of that length is the data's
    sizes = {name: frame.size for name, frame in (_frames(p) | _frames(q)).items()}
    return tuple(name for name in candidates if sizes.get(name, batch - 1) == batch - 1)


def _refuse_unguided(p: poutine.Trace, q: poutine.Trace) -> None:
    for name, site in p.nodes.items():
        if is_sample(site) and not site["is_observed"] and name not in q.nodes and not marked(site):
            discrete = getattr(site["fn"], "has_enumerate_support", False)
            cure = (
                'mark it infer={"enumerate": "parallel"} or draw it in the guide'
                if discrete
                else "draw it in the guide"
            )
            raise ProbgenError(f"the latent {name!r} has neither a guide nor enumeration: {cure}")


def _refuse_self_subsampling(frames: Mapping[str, Any], batch: int, rows: int) -> None:
    for name, frame in frames.items():
        if frame.full_size == batch < rows and frame.size < batch:
            raise ProbgenError(
                f"the plate {name!r} subsamples {frame.size} of the {batch} rows of a minibatch that is itself a part of "
                f"the {rows} rows: give batch_size=None so that the program gets whole arrays"
            )


def _refuse_local_autoguide(program: Program, structure: Structure, batch: int, rows: int) -> None:
    local = [name for name, site in structure.sampled.items() if site.local]
    if isinstance(program.guide, AutoGuide) and local and batch < rows:
        raise ProbgenError(
            f"the autoguide {type(program.guide).__name__} keeps one value per row for the local latent {local[0]!r}, which "
            "minibatches cannot share: give batch_size=None, or write a guide that computes it from the data"
        )


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


def _use_of_arrays(
    model: Callable, program: Program, arrays: Mapping[str, Tensor], conditioned: poutine.Trace, seed: int
) -> dict[str, str]:
    """For each array the model names: "data" if an unconditioned draw does not depend on its values, else "given"."""
    named = arguments(program.model, arrays)
    names = named if set(named) <= set(arrays) else arrays
    free = poutine.uncondition(model)

    def draw(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with forked(seed), torch.no_grad(), pyro.validation_enabled(False):
            trace = poutine.trace(free).get_trace(**values)
        return {name: site["value"] for name, site in trace.nodes.items() if is_sample(site)}

    reference, use = draw(arrays), {}
    for name in names:
        other = draw({**arrays, name: arrays[name].roll(1, 0)})
        changed = [s for s in reference if s in other and not _same(reference[s], other[s])]
        use[name] = "given" if changed else "data"
        own = [
            s
            for s, node in conditioned.nodes.items()
            if is_sample(node) and node["is_observed"] and _reads(node, arrays[name])
        ]
        if set(changed) & set(own):
            raise ProbgenError(
                f"the array {name!r} is read as input to its own site {own[0]!r}, so the program cannot be sampled: "
                "write it as one distribution (autoregressive programs are one site with an autoregressive distribution)"
            )
    return use


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


def _reads(site: Mapping[str, Any], array: Tensor) -> bool:
    """Whether an observed value is the array, or a view into it."""
    return site["value"].untyped_storage().data_ptr() == array.untyped_storage().data_ptr()
