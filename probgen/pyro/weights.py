"""Importance weights: log p(x_n, z_n) − log q(z_n | x_n), one number per datum, or one for all that share a draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from probgen.pyro.enumeration import enumerated_traces, expected_terms, marginal_per_datum
from probgen.pyro.plan import Plan
from probgen.pyro.trace import rows_stood_for
from probgen.refusals import refuse_unguided


def log_weights(
    plan: Plan,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    k: int,
    tempered: bool = False,
) -> tuple[Tensor, Any]:
    """log p(x_n, z_k) − log q(z_k | x_n): [k, B] and what a row stands for; [k] and 1 where rows share latents.

    With an amortised guide the k draws are rows of one long batch: every row k times. `tempered` keeps the factors
    of a program's own `poutine.scale`, as training must and a likelihood must not.
    """
    if plan.shares or not plan.structure.data_plates:
        draws = [joint_weight(plan, model, guide, args, kwargs) for _ in range(k)]
        return torch.stack(draws), 1.0
    batch = _batch(args, kwargs)
    if plan.tiles and k > 1:
        tiled = tuple(_tile(a, k, batch) for a in args)
        named = {name: _tile(a, k, batch) for name, a in kwargs.items()}
        weights, scale = datum_weights(plan, model, guide, tiled, named, tempered)
        return weights.view(k, batch), scale
    draws, scales = zip(*[datum_weights(plan, model, guide, args, kwargs, tempered) for _ in range(k)], strict=True)
    return torch.stack(draws), scales[0]


def _tile(value: Any, k: int, batch: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == batch:
        return value.repeat(k, *[1] * (value.dim() - 1))
    return value


def joint_weight(plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor:
    """log p(x, z) − log q(z) of all data, scaled."""
    if plan.enumerates:
        return sum(expected_terms(*enumerated_traces(model, guide, args, kwargs, plan.depth)).values())
    p, q = get_importance_trace("flat", plan.depth, model, guide, args, kwargs)
    return p.log_prob_sum() - q.log_prob_sum()


def datum_weights(
    plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: dict, tempered: bool = False
) -> tuple[Tensor, Any]:
    """log p(x_n, z_n) − log q(z_n | x_n) of the local sites, [B], and what one row counts for."""
    p, q = drawn_traces(plan, model, guide, args, kwargs)
    log_p, log_q, scale = datum_terms(plan, p, q, _batch(args, kwargs), tempered)
    return sum(log_p.values()) - sum(log_q.values()), scale


def drawn_traces(plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
    """Model and guide traces at draws of the guide; what the model alone enumerates is enumerated."""
    refuse_unguided(plan.structure)
    if plan.structure.enumerated:
        return enumerated_traces(model, guide, args, kwargs, plan.depth, in_guide=False)
    return get_importance_trace("flat", plan.depth, model, guide, args, kwargs)


def datum_terms(
    plan: Plan, p: poutine.Trace, q: poutine.Trace, batch: int, tempered: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """log p(x_n, z_n) and log q(z_n | x_n) by local site, each [B]; and what one row counts for.

    Latents that the model enumerates are summed out in the term of the data they explain.
    """
    plates = plan.structure.data_plates
    total, scale = rows_stood_for(p, plates)
    rows = round(float(total / scale)) if plates else batch
    for trace in (p, q):
        for site in _samples(trace).values():
            factor = site["scale"] / (scale if in_plates(site, plates) else 1.0) if tempered else 1.0
            site["scale"], site["log_prob"] = factor, scale_and_mask(site["unscaled_log_prob"], factor, site["mask"])
    log_p = marginal_per_datum(p, q, plates, rows) if plan.structure.enumerated else local_terms(p, plates, rows)
    return log_p, local_terms(q, plates, rows), scale


def local_terms(trace: poutine.Trace, plates: tuple[str, ...], rows: int) -> dict[str, Tensor]:
    """Log densities of the local sites of a trace, summed to one number per datum, [rows].

    Where a program has no data plate, a site with one density per row is local.
    """
    dims = {name: row_dim(site, plates, rows) for name, site in _samples(trace).items()}
    return {name: over_rows(trace.nodes[name]["log_prob"], d, rows) for name, d in dims.items() if d is not None}


def row_dim(site: dict, plates: tuple[str, ...], rows: int) -> int | None:
    """The axis of a site's log density that runs over the rows, counted from the right; None for a global site."""
    if not plates:
        return -1 if site["log_prob"].shape[-1:] == (rows,) else None
    return next((f.dim for f in site["cond_indep_stack"] if f.name in plates), None)


def _samples(trace: poutine.Trace) -> dict[str, dict]:
    nodes = trace.nodes.items()
    return {n: s for n, s in nodes if s["type"] == "sample" and not s["infer"].get("_deterministic")}


def in_plates(site: dict, plates: tuple[str, ...]) -> bool:
    """Whether a node of a trace lies in the data plate."""
    return any(frame.name in plates for frame in site["cond_indep_stack"])


def over_rows(value: Tensor, dim: int, rows: int) -> Tensor:
    """Sum all axes but `dim` (counted from the right), broadcast to [rows]."""
    if value.dim() < -dim:
        return value.sum().expand(rows)
    others = [d for d in range(-value.dim(), 0) if d != dim]
    value = value.sum(others) if others else value
    return value.expand(rows)


def _batch(args: tuple, kwargs: dict) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    return 0
