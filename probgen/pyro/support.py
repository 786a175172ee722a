"""Data must lie where its site says it does: checked on every row before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from probgen.errors import ProbgenError
from probgen.pyro.trace import forked, is_sample


def refuse_out_of_support(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Mapping[str, Tensor],
    all_rows: Callable[[], Mapping[str, Tensor] | None],
    seed: int,
) -> None:
    """Refuse data outside the support of the site that observes it.

    Every row of an array that a site observes as it is; the first batch alone of data that a program computes, or
    that does not fit into memory.
    """
    with forked(seed), torch.no_grad(), pyro.validation_enabled(False):
        q = poutine.trace(guide).get_trace(**batch)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(**batch)
    rows = all_rows() or {}
    for name, site in p.nodes.items():
        if is_sample(site) and site["is_observed"] and not site["infer"].get("_deterministic"):
            array = next((a for a, value in batch.items() if value is site["value"]), None)
            _refuse_outside(name, array, site["fn"], rows.get(array, site["value"]))


def _refuse_outside(site: str, array: str | None, fn: Any, values: Tensor) -> None:
    try:
        inside = fn.support.check(values)
    except (NotImplementedError, AttributeError, ValueError, RuntimeError):
        return  # a distribution that does not say where it lives, or whose support differs from row to row
    if bool(inside.all()):
        return
    where = f"the array {array!r}" if array else f"the data of the site {site!r}"
    row = values[~inside.reshape(len(values), -1).all(-1)][0].reshape(-1)
    support = getattr(fn.support, "base_constraint", fn.support)
    single = [v.item() for v in row if not bool(support.check(v).all())] or [row[0].item()]
    raise ProbgenError(
        f"{where} holds {single[0]:g}, outside the support {support} of the site {site!r}: change the likelihood, or "
        "prepare the data (Binarize, Scale, ...)"
    )
