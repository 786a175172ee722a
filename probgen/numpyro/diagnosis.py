"""Where a number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from probgen.numpyro.trace import log_density, run_pair


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
    return f"the loss is not finite{site}" if site else "every site, parameter and gradient is finite here"


def _site(key: jax.Array, params: Mapping[str, Any], engine: Any, arrays: Mapping[str, Any]) -> str:
    """The first site whose value or log density is not finite, guide before model."""
    with numpyro.validation_enabled(False):
        p, q, _ = run_pair(key, params, engine.model, engine.guide, (), arrays)
    for where, trace in (("guide", q), ("model", p)):
        for name, site in trace.items():
            if site["type"] != "sample":
                continue
            if _broken(site["value"]):
                return f"; the first such value is that of the site {name!r} in the {where}"
            with numpyro.validation_enabled(False):
                density = log_density(site)
            if _broken(density):
                return f"; the first such density is that of the site {name!r} in the {where}"
    return ""


def _broken(array: Any) -> bool:
    array = jnp.asarray(array)
    return bool(jnp.issubdtype(array.dtype, jnp.floating) and not jnp.isfinite(array).all())
