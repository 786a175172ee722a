"""Data must lie where its site says it does: checked on every row before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from probgen.errors import ProbgenError
from probgen.flow_shapes import outside_the_base
from probgen.program import rows_of
from probgen.pyro.distributions.flow import Flow
from probgen.pyro.trace import forked, is_sample

_LOOKED_AT = 200  # batches of a program that computes its data: a second or so


def refuse_out_of_support(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Mapping[str, Tensor],
    all_rows: Callable[[], Mapping[str, Tensor] | None],
    seed: int,
) -> dict[str, tuple[str, Any]] | None:
    """Refuse data outside the support of the site that observes it, where the site is not masked.

    Every row of an array that a site observes as it is or in another shape; of data that a program computes, and of
    a masked site, the rows of the first `_LOOKED_AT` batches. Returns what `refuse_rows` needs for more rows, if
    they can be judged without the program, which may be a chain of a thousand networks.
    """
    unchecked, judged = set(), {}
    for name, site in _observed(model, guide, batch, seed).items():
        array = next((a for a, value in batch.items() if _is_view(site["value"], value)), None)
        rows = all_rows()
        if rows is None or array is None or site["mask"] is not None or len(site["value"]) != len(batch[array]):
            unchecked.add(name)
        else:
            values = rows[array].reshape(-1, *site["value"].shape[1:])
            _refuse_outside(name, array, site["fn"], values, None)
            judged[name] = (array, site)
    for part in _parts(batch, all_rows()) if unchecked else ():
        for name, site in _observed(model, guide, part, seed).items():
            if name in unchecked:
                _refuse_outside(name, None, site["fn"], site["value"], site["mask"])
    if unchecked or not all(_same_for_all_rows(site) for _, site in judged.values()):
        return None
    return {name: (array, site["fn"]) for name, (array, site) in judged.items()}


def refuse_rows(judged: Mapping[str, tuple[str, Any]], rows: Mapping[str, Tensor]) -> None:
    """Refuse more rows of the arrays that `refuse_out_of_support` has judged."""
    for name, (array, fn) in judged.items():
        _refuse_outside(name, array, fn, rows[array].reshape(-1, *fn.event_shape), None)


def _same_for_all_rows(site: Mapping[str, Any]) -> bool:
    """Whether a site's support is a constant; that of a flow's base is reached through its network."""
    try:
        return not isinstance(site["fn"], Flow) and not _has_tensors(site["fn"].support)
    except NotImplementedError:
        return True  # it does not say where it lives, of no row


def _has_tensors(support: Any) -> bool:
    """Whether a constraint, or one inside it, has bounds that are tensors: those of one batch."""
    inside = [
        part for value in vars(support).values() for part in (value if isinstance(value, list | tuple) else [value])
    ]
    return any(
        isinstance(part, Tensor) or (isinstance(part, constraints.Constraint) and _has_tensors(part)) for part in inside
    )


def _observed(model: Callable, guide: Callable, batch: Mapping[str, Tensor], seed: int) -> dict[str, dict]:
    with forked(seed), torch.no_grad(), pyro.validation_enabled(False):
        q = poutine.trace(guide).get_trace(**batch)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(**batch)
    sites = {name: site for name, site in p.nodes.items() if is_sample(site) and site["is_observed"]}
    return {name: site for name, site in sites.items() if not site["infer"].get("_deterministic")}


def _is_view(value: Tensor, array: Tensor) -> bool:
    """Whether a site's value is all of an array, perhaps in another shape."""
    return value.data_ptr() == array.data_ptr() and value.numel() == array.numel() and value.is_contiguous()


def _parts(batch: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None) -> Iterator[Mapping[str, Tensor]]:
    """Batches of the size of the first one that cover the rows, up to a bound; the first one where rows are not at hand."""
    size, total = rows_of(batch), rows_of(rows) if rows else 0
    if total <= size:
        yield batch
        return
    for start in range(0, min(total, size * _LOOKED_AT), size):
        start = min(start, total - size)  # the last one overlaps: a program may be made for one size
        yield {name: array[start : start + size] for name, array in rows.items()}


def _refuse_outside(site: str, array: str | None, fn: Any, values: Tensor, mask: Any) -> None:
    try:
        inside = fn.support.check(values)
        inside = inside if mask is None else inside | ~torch.as_tensor(mask)
    except (NotImplementedError, AttributeError, ValueError, RuntimeError):
        return  # a distribution that does not say where it lives, or whose support differs from row to row
    where = f"the array {array!r}" if array else f"the data of the site {site!r}"
    if bool(inside.all()):
        away = fn.outside(values) if isinstance(fn, Flow) and mask is None else None
        if away is not None:
            raise ProbgenError(outside_the_base(site, where, float(away)))
        return
    value = values[~inside.reshape(len(values), -1).all(-1)][0].reshape(-1)
    support = getattr(fn.support, "base_constraint", fn.support)
    single = [v.item() for v in value if not bool(support.check(v).all())] or [value[0].item()]
    raise ProbgenError(
        f"{where} holds {single[0]:g}, outside the support {support} of the site {site!r}: change the likelihood, or "
        "prepare the data (Binarize, Scale, ...)"
    )
