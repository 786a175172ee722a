"""The log density of rows by one run of a NumPyro model, known up to a constant, its gradient, and Langevin's loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import Unit
from numpyro.handlers import seed, substitute, trace, uncondition
from numpyro.infer import MCMC, NUTS

from probgen.energy.langevin import Langevin
from probgen.numpyro.structure import unwrapped
from probgen.numpyro.terms import row_plates
from probgen.numpyro.trace import Trace, log_density, own_containers
from probgen.nuts.chains import Sampling
from probgen.program import rows_of

Model = Callable[..., None]
Arrays = Mapping[str, jax.Array]


def traced(model: Model, params: Mapping[str, Any], arrays: Arrays) -> Trace:
    """One run of a model that draws nothing; its random layers, if any, always the same."""
    return trace(substitute(seed(model, jax.random.key(0)), data=own_containers(params))).get_trace(**arrays)


def looked_at(model: Model, params: Mapping[str, Any], arrays: Arrays) -> tuple[str, float]:
    """The array that the data site bears the name of, and N / B, by which an engine makes a batch stand for all rows."""
    found: list[tuple[str, float]] = []

    def look(params: Any, arrays: Arrays) -> None:
        p = traced(model, params, arrays)
        name = next(n for n in arrays if n in p and p[n]["type"] == "sample" and p[n]["is_observed"])
        found.append((name, rows_factor(p)))

    jax.eval_shape(look, dict(params), dict(arrays))
    return found[0]


def log_parts(model: Model, params: Mapping[str, Any], arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """log p(x_n) of the data site and the log of all factors, [B] each; what the batch stands for is left out."""
    p = traced(model, params, arrays)
    rows, stood_for = row_plates(p), rows_factor(p)
    parts = [jnp.zeros(rows_of(arrays)) for _ in range(2)]
    for site in p.values():
        dims = [f.dim for f in site.get("cond_indep_stack", ()) if f.name in rows]
        if site["type"] != "sample" or not dims:
            continue
        term = log_density(site) * ((1.0 if site["scale"] is None else site["scale"]) / stood_for)
        factor = isinstance(unwrapped(site["fn"]), Unit)
        parts[factor] = parts[factor] + term.sum(tuple(d for d in range(-term.ndim, 0) if d not in dims))
    return parts[0], parts[1]


def rows_factor(p: Trace) -> float:
    """N / B of the plates of the rows in a trace."""
    plates = [p[name] for name in row_plates(p) if name in p]
    return math.prod(plate["args"][0] / len(plate["value"]) for plate in plates)


def scored(
    model: Model, params: Mapping[str, Any], arrays: Arrays, name: str
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """x → log p(x) of rows in the place of the array `name`, [B], and its gradient [B, ...]."""

    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p = sum(log_parts(model, params, {**arrays, name: x}))
        return log_p.sum(), log_p

    def density(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        (_, log_p), score = jax.value_and_grad(total, has_aux=True)(x)
        return log_p, score

    return density


def parts_and_scores(model: Model, params: Mapping[str, Any], arrays: Arrays, name: str) -> tuple[jax.Array, ...]:
    """log p(x_n) of the data site and the log of all factors, [B] each, and their gradients by x, [B, ...]."""
    parts, back = jax.vjp(lambda x: log_parts(model, params, {**arrays, name: x}), arrays[name])
    ones, zeros = jnp.ones_like(parts[0]), jnp.zeros_like(parts[0])
    return *parts, *back((ones, zeros)), *back((zeros, ones))


def drawn(model: Model, params: Mapping[str, Any], arrays: Arrays, name: str, key: jax.Array) -> jax.Array:
    """A draw of the data site by a run that is conditioned on nothing, in which factors count for nothing."""
    own = own_containers(params)
    return trace(substitute(seed(uncondition(model), key), data=own)).get_trace(**arrays)[name]["value"]


def langevin(density: Callable[..., Any], key: jax.Array, x: jax.Array, chain: Langevin) -> jax.Array:
    """Rows after the steps of a chain that starts at `x`; no gradient goes through them."""
    log_p, score = density(x)
    place = (x, log_p, score, jnp.asarray(chain.step_size, log_p.dtype))

    def move(step: jax.Array, place: Any) -> Any:
        own, other = jax.random.split(jax.random.fold_in(key, step))
        noise, log_uniform = jax.random.normal(own, x.shape, x.dtype), jnp.log(jax.random.uniform(other, log_p.shape))
        return chain.move(density, place, noise, log_uniform, step)

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, chain.steps, move, place)[0])


def nuts(
    density: Callable[..., Any], key: jax.Array, starts: jax.Array, chain: Sampling, draws: int
) -> tuple[jax.Array, int]:
    """`draws` of each of the chains that start at `starts` [C, ...], [draws, C, ...], and how many steps diverged."""

    def potential(x: jax.Array) -> jax.Array:
        return -density(x[None])[0][0]

    kernel = NUTS(potential_fn=potential, target_accept_prob=chain.target_accept, max_tree_depth=chain.max_tree_depth)
    number = len(starts)
    mcmc = MCMC(
        kernel,
        num_warmup=chain.warmup,
        num_samples=draws,
        num_chains=number,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, init_params=starts if number > 1 else starts[0], extra_fields=("diverging",))
    found = mcmc.get_samples(group_by_chain=True)
    return jnp.moveaxis(found, 0, 1), int(mcmc.get_extra_fields()["diverging"].sum())
