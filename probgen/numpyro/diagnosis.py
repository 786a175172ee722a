"""Where a number that is not finite comes from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from probgen.numpyro.provenance import eval_provenance
from probgen.numpyro.trace import Trace, log_density, run_pair


def diagnose(
    key: jax.Array,
    weights: Mapping[str, Any],
    params: Mapping[str, Any],
    gradients: Mapping[str, Any],
    engine: Any,
    arrays: Mapping[str, Any],
) -> str:
    """The first thing that is not finite: data, a parameter, a site's value or density, or a gradient."""
    for name, array in arrays.items():
        if _broken(array):
            return f"the array {name!r} holds a value that is not finite"
    for name, array in weights.items():
        if _broken(array):
            return f"the parameter {name!r} is no longer finite{_site(key, params, engine, arrays)}"
    site = _site(key, params, engine, arrays)
    for name, array in gradients.items():
        if _broken(array):
            return f"the gradient of the parameter {name!r} is not finite{site}"
    return (
        f"the loss is not finite{site}"
        if site
        else (
            "the loss is not finite, though every site, parameter and gradient is: look at what it computes beside densities"
        )
    )


def _site(key: jax.Array, params: Mapping[str, Any], engine: Any, arrays: Mapping[str, Any]) -> str:
    """The first site whose value or log density is not finite, guide before model."""

    def run(**params: Any) -> dict[str, Trace]:
        p, q, _ = run_pair(key, params, engine.model, engine.guide, (), arrays)
        return {"guide": q, "model": p}

    with numpyro.validation_enabled(False):
        traces = run(**params)
    for where, trace in traces.items():
        for name, site in trace.items():
            if site["type"] != "sample":
                continue
            if _broken(site["value"]):
                return f"; the first such value is that of the site {name!r} in the {where}"
            with numpyro.validation_enabled(False):
                density = log_density(site)
            if _broken(density):
                own = functools.partial(_density, run, where, name)
                return f"; the first such density is that of the site {name!r} in the {where}{_entering(own, params)}"
    return ""


def _density(run: Callable[..., dict[str, Trace]], where: str, name: str, **params: Any) -> jax.Array:
    return log_density(run(**params)[where][name])


def _entering(density: Callable[..., jax.Array], params: Mapping[str, Any]) -> str:
    """The parameters that a density depends on, in words."""
    with numpyro.validation_enabled(False):
        names = sorted(map(repr, eval_provenance(density, **params)))
    more = ", ..." if len(names) > 3 else ""
    return f", which depends on the parameter {', '.join(names[:3])}{more}" if names else ""


def _broken(array: Any) -> bool:
    array = jnp.asarray(array)
    return bool(jnp.issubdtype(array.dtype, jnp.floating) and not jnp.isfinite(array).all())
