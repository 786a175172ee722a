"""Data must lie where its site says it does: checked on every row before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import MaskedDistribution, constraints

from probgen.errors import ProbgenError
from probgen.flow_shapes import outside_the_base
from probgen.numpyro.distributions.flow import Flow
from probgen.numpyro.leaves import QUICK
from probgen.numpyro.trace import Trace, as_jax, run_pair


def refuse_out_of_support(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Mapping[str, jax.Array],
    params: Mapping[str, Any],
    rows: Mapping[str, Any] | None,
) -> None:
    """Refuse data outside the support of the site that observes it, where the site is not masked.

    Every row of an array that a site observes as it is; of other sites, the rows of the first batch.
    """
    whole, computed, flows = _observed(model, guide, batch, params)
    for site, (array, support) in whole.items():
        values = as_jax({array: (rows or batch)[array]})[array]
        _refuse_outside(site, f"the array {array!r}", support, values, support(values))
    if computed:

        def look(batch: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
            p, _, _ = run_pair(jax.random.key(0), params, model, guide, (), batch)
            return {site: (p[site]["value"], _inside(p[site])) for site in computed}

        for site, (values, inside) in jax.jit(look, compiler_options=QUICK)(dict(batch)).items():
            _refuse_outside(site, f"the data of the site {site!r}", computed[site], values, inside)
    if flows:

        def mapped(batch: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
            p, _, _ = run_pair(jax.random.key(0), params, model, guide, (), batch)
            z = {site: (_flow(p[site]["fn"]), p[site]["value"]) for site in flows}
            z = {site: (fn, fn.transform(value)) for site, (fn, value) in z.items()}
            return {site: (value, fn.base_dist.support(value)) for site, (fn, value) in z.items()}

        for site, (z, inside) in jax.jit(mapped, compiler_options=QUICK)(dict(batch)).items():
            if not inside.all():
                row = np.asarray(z)[~np.asarray(inside)][0].reshape(-1)
                farthest = float(row[np.abs(row).argmax()])
                raise ProbgenError(outside_the_base(site, f"the data of the site {site!r}", farthest))


def _observed(
    model: Callable, guide: Callable, batch: Mapping[str, jax.Array], params: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, Any]], dict[str, Any], set[str]]:
    """Sites with a bounded support, those that observe an array as it is and the others; and flows of a bounded base."""
    whole: dict[str, tuple[str, Any]] = {}
    computed: dict[str, Any] = {}
    flows: set[str] = set()

    def look(batch: Mapping[str, jax.Array]) -> None:
        p, _, _ = run_pair(jax.random.key(0), params, model, guide, (), batch)
        for site, support in _bounded(p).items():
            array = next((name for name, value in batch.items() if p[site]["value"] is value), None)
            if array is None or isinstance(p[site]["fn"], MaskedDistribution) or _traced(support):
                computed[site] = support
            else:
                whole[site] = (array, support)
        observed = {n: s for n, s in p.items() if s["type"] == "sample" and s["is_observed"]}
        flows.update(name for name, site in observed.items() if _flow(site["fn"]) is not None)

    jax.eval_shape(look, dict(batch))
    return whole, computed, flows


def _bounded(p: Trace) -> dict[str, Any]:
    """Observed sites whose support is not all real numbers, nor unknown."""
    sites = {}
    for name, site in p.items():
        if site["type"] == "sample" and site["is_observed"]:
            support = site["fn"].support
            support = constraints.real if isinstance(support, type(None)) else support
            if getattr(support, "base_constraint", support) is not constraints.real:
                sites[name] = support
    return sites


def _flow(fn: Any) -> Flow | None:
    """The flow behind plates, if its base is bounded."""
    while not isinstance(fn, Flow) and not isinstance(fn, MaskedDistribution) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if not isinstance(fn, Flow):
        return None
    support = fn.base_dist.support
    return None if getattr(support, "base_constraint", support) is constraints.real else fn


def _traced(support: Any) -> bool:
    """Whether a support's bounds are computed by the program."""
    return any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves(vars(support)))


def _inside(site: Mapping[str, Any]) -> jax.Array:
    inside = site["fn"].support(site["value"])
    mask = site["fn"]._mask if isinstance(site["fn"], MaskedDistribution) else True
    return inside | ~jnp.asarray(mask)


def _refuse_outside(site: str, where: str, support: Any, values: jax.Array, inside: jax.Array) -> None:
    inside = np.broadcast_to(np.asarray(inside), np.shape(values)[: np.ndim(inside)])
    if inside.all():
        return
    row = np.asarray(values)[~inside].reshape(-1)
    base = getattr(support, "base_constraint", support)
    single = [v for v in row[:1000] if np.ndim(base(v)) == 0 and not base(v)] if base.event_dim == 0 else []
    raise ProbgenError(
        f"{where} holds {float((single or row)[0]):g}, outside the support {base} of the site {site!r}: change the "
        "likelihood, or prepare the data (Binarize, Scale, ...)"
    )
