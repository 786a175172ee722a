"""Discrete latents summed out exactly: in the model by variable elimination, in the guide by an expectation.

    log p(x, z) = log Σ_y p(x, y, z),        E_q[c] = Σ_y q(y | x) c(y)

The elimination is funsor's; what is added is that row plates stay, so that every datum has a number of its own, and
that scales stay outside the sum: a minibatch scales log p(x_n), not the parts of the sum.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import funsor
import funsor.optimizer
import jax
import jax.numpy as jnp
from funsor import ops
from numpyro.contrib.funsor import enum, infer_discrete, plate_to_enum_plate
from numpyro.contrib.funsor import trace as packed_trace
from numpyro.contrib.funsor.infer_util import _get_shift, _shift_name, compute_markov_factors
from numpyro.distributions import ExpandedDistribution, MaskedDistribution
from numpyro.handlers import seed, trace
from numpyro.primitives import Messenger

from probgen.errors import ProbgenError
from probgen.numpyro.trace import Trace, enumerated, log_density, run_pair

if TYPE_CHECKING:
    from probgen.numpyro.terms import Run


def packed_pair(
    key: jax.Array,
    params: Mapping[str, Any],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    plain: tuple[Trace, Trace],
) -> tuple[Trace, Trace, dict[str, Any]]:
    """Both traces with every marked site enumerated, their dimensions named; `plain` is a run without."""
    nesting = max([-f.dim for tr in plain for s in tr.values() for f in s.get("cond_indep_stack", ())], default=0)
    ranks = [len(s["fn"].batch_shape) for tr in plain for s in tr.values() if s["type"] == "sample"]
    with plate_to_enum_plate(), enum(first_available_dim=-1 - max(nesting, *ranks)):
        return run_pair(key, params, model, guide, args, kwargs, tracing=packed_trace)


def summed_terms(run: Run, analytic: tuple[str, ...]) -> dict[str, jax.Array]:
    """The ELBO's terms, unscaled: the model's enumerated latents summed out, the guide's averaged over."""
    from probgen.numpyro.terms import divergence

    kls = {n: kl for n in analytic if (kl := divergence(run, n)) is not None}
    costs = [(n, -_named(kl, _dims(run.p[n]) | _dims(run.q[n]))) for n, kl in kls.items()]
    costs += _marginal(run, [(n, f) for n, f in _factors(run, run.p) if n not in kls], _hidden(run))
    costs += [(n, -f) for n, f in _factors(run, run.q) if n not in kls]
    weights = [f for n, f in _factors(run, run.q, unmasked=True) if enumerated(run.q[n])]
    expected: dict[str, list] = defaultdict(list)
    for name, cost in costs:
        expected[name].append(_rows_of(run, _expectation(run, cost, weights), name))
    return {name: sum(parts) for name, parts in expected.items()}


def summed_weight(run: Run) -> dict[str, jax.Array]:
    """log Σ_y p(x, y, z) / q(z | x, y): every enumerated latent, the model's and the guide's, summed out."""
    factors = _factors(run, run.p, unmasked=True)
    factors += [(n, -f) for n, f in _factors(run, run.q) if not enumerated(run.q[n])]
    summed: dict[str, list] = defaultdict(list)
    for name, factor in _marginal(run, factors, _hidden(run) | _averaged(run)):
        summed[name].append(_rows_of(run, factor, name))
    return {name: sum(parts) for name, parts in summed.items()}


def state_table(run: Run, name: str) -> jax.Array:
    """log p(x_n, y_n = k) over the K states of one latent enumerated in the model, [B, K], the others summed out."""
    factors = [(n, f) for n, f in _factors(run, run.p, unmasked=True) if run.frames(n)]
    rows = sorted(run.frames(name), key=lambda f: f.dim)
    names = [*(f.name for f in rows), name]
    total = 0.0
    for _, part in _marginal(run, factors, _hidden(run) - {name}):
        summed = part.reduce(ops.add, frozenset(part.inputs) - frozenset(names))
        axes = OrderedDict((n, i - len(names)) for i, n in enumerate(names) if n in summed.inputs)
        total = total + funsor.to_data(summed, name_to_dim=axes)
    return jnp.broadcast_to(total, (*(f.size for f in rows), total.shape[-1]))


def draw_conditional(
    model: Callable[..., Any], key: jax.Array, arrays: Mapping[str, Any], names: list[str]
) -> dict[str, jax.Array]:
    """A draw of the enumerated latents from their exact conditional, everything else of the model being given."""
    run_key, draw_key = jax.random.split(key)
    inferred = infer_discrete(Unscaled(Certain(seed(model, run_key))), rng_key=draw_key)
    tr = trace(inferred).get_trace(**arrays)
    return {name: tr[name]["value"] for name in names}


class Unscaled(Messenger):
    """Densities as they are: a plate that states its N scales none of them."""

    def process_message(self, msg: dict) -> None:
        """Take the scale off."""
        if msg["type"] == "sample":
            msg["scale"] = None


class Certain(Messenger):
    """Latents of one state are in it: a funsor of one state has no name for it, and cannot be drawn from."""

    def process_message(self, msg: dict) -> None:
        """Hold such a latent at its only value."""
        if msg["type"] != "sample" or msg["value"] is not None or msg["infer"].get("enumerate") != "parallel":
            return
        support = msg["fn"].enumerate_support(expand=False)
        if len(support) == 1:
            msg["value"] = jnp.broadcast_to(support[0], msg["fn"].shape())
            msg["infer"] = {}


def _hidden(run: Run) -> frozenset[str]:
    """The model's enumerated latents that the guide does not know."""
    return frozenset(n for n, s in run.p.items() if _latent(s) and enumerated(s) and n not in run.q)


def _averaged(run: Run) -> frozenset[str]:
    """The guide's enumerated latents."""
    return frozenset(n for n, s in run.q.items() if _latent(s) and enumerated(s))


def _latent(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _factors(run: Run, tr: Trace, unmasked: bool = False) -> list[tuple[str, funsor.Funsor]]:
    """log densities as funsors; those that are summed over carry no mask, or their sum would not be one."""
    hidden = _hidden(run)
    factors = []
    for name, site in tr.items():
        if site["type"] != "sample" or (tr is run.q and site["is_observed"]):
            continue
        bare = name in hidden or (unmasked and enumerated(site))
        fn = _without_mask(site["fn"]) if bare else site["fn"]
        factor = _named(log_density(site, fn), _dims(site))
        factors.append((name, factor(**_model_plates(run)) if tr is run.q else factor))
    return factors


def _without_mask(fn: Any) -> Any:
    shape = fn.batch_shape
    while isinstance(fn, MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn.expand(shape)


def _dims(site: Mapping[str, Any]) -> dict[int, str]:
    return dict(site["infer"]["dim_to_name"])


def _named(values: jax.Array, names: Mapping[int, str]) -> funsor.Funsor:
    values = jnp.asarray(values) if names else jnp.asarray(values).reshape(())
    return funsor.to_funsor(values, output=funsor.Real, dim_to_name=OrderedDict(sorted(names.items())))


def _model_plates(run: Run) -> dict[str, str]:
    """The guide's names of plates, where they differ, to the model's."""
    renamed = {}
    for name in run.latents:
        theirs = {f.dim: f.name for f in run.p[name]["cond_indep_stack"]}
        renamed |= {
            f.name: theirs[f.dim]
            for f in run.q[name]["cond_indep_stack"]
            if f.dim in theirs and f.name not in theirs.values()
        }
    return renamed


def _marginal(
    run: Run, factors: list[tuple[str, funsor.Funsor]], hidden: frozenset[str]
) -> list[tuple[str, funsor.Funsor]]:
    """Sum out the hidden latents; factors that meet at one become one, named after the data that it explains."""
    plates = frozenset(f.name for s in run.p.values() for f in s.get("cond_indep_stack", ()))
    kept, groups = _connected(factors, hidden)
    for names, parts in groups:
        summed = hidden & frozenset().union(*(part.inputs for part in parts))
        local = all(run.frames(_plain(v)) for v in summed)
        name = next((n for n in names if run.p.get(n, {}).get("is_observed")), names[0])
        _one_scale(run, names)
        parts = _without_time(run, names, parts, hidden, plates)
        with funsor.interpretations.lazy:
            lazy = funsor.sum_product.sum_product(
                ops.logaddexp,
                ops.add,
                parts,
                eliminate=(summed | plates) - (run.rows if local else frozenset()),
                plates=plates,
            )
        kept.append((name if local else sorted(summed)[0], funsor.optimizer.apply_optimizer(lazy)))
    return kept


def _connected(factors: list[tuple[str, funsor.Funsor]], hidden: frozenset[str]) -> tuple[list, list]:
    """Factors without hidden latents, and the others in groups that share some: pairs of (names, factors)."""
    kept = [(n, f) for n, f in factors if not hidden & set(f.inputs)]
    groups: list[tuple[set, list[str], list]] = []
    for name, factor in ((n, f) for n, f in factors if hidden & set(f.inputs)):
        variables, names, parts = hidden & set(factor.inputs), [name], [factor]
        for group in [g for g in groups if g[0] & variables]:
            groups.remove(group)
            variables, names, parts = variables | group[0], group[1] + names, group[2] + parts
        groups.append((variables, names, parts))
    return kept, [(names, parts) for _, names, parts in groups]


def _plain(name: str) -> str:
    """A site's own name without the marks that `scan` puts before the first steps of a chain."""
    return _shift_name(name, -_get_shift(name))


def _one_scale(run: Run, names: list[str]) -> None:
    scales = {float(run.scale(name)) for name in names}
    if len(scales) > 1:
        raise ProbgenError(
            f"the enumerated latents of {', '.join(map(repr, names))} meet data of another scale, so a minibatch cannot "
            "stand for all rows: give batch_size=None, or put them inside the data plate"
        )


def _without_time(
    run: Run, names: list[str], parts: list, hidden: frozenset[str], plates: frozenset[str]
) -> list[funsor.Funsor]:
    """Eliminate the time axes that `scan` makes, in O(log T), as `numpyro.contrib.funsor.log_density` does."""
    factors, steps = [], defaultdict(list)
    first, markov = defaultdict(frozenset), defaultdict(frozenset)
    history = 0
    for name, part in zip(names, parts, strict=True):
        dims = _dims(run.p[name] if name in run.p else run.q[name])
        time = next((n for n in dims.values() if n.startswith("_time")), None)
        if time is None:
            factors.append(part)
            continue
        axis = funsor.Variable(time, part.inputs[time])
        history = max([history, *(_get_shift(n) for n in dims.values())])
        steps[axis].append(part)
        first[axis] |= frozenset(n for n in dims.values() if n.startswith("_PREV_"))
    for axis, variables in first.items():
        for variable in variables:
            dims = _dims(run.p[_plain(variable)])
            if variable in dims.values():
                markov[axis] |= frozenset(dims.values())
    if steps:
        factors += compute_markov_factors(steps, first, markov, hidden, plates, history, ops.logaddexp, ops.add)
    return factors


def _expectation(run: Run, cost: funsor.Funsor, weights: list[funsor.Funsor]) -> funsor.Funsor:
    """Σ_y Π q(y) cost(y) over the guide's enumerated latents that the cost depends on, directly or through others."""
    averaged = _averaged(run)
    variables = averaged & set(cost.inputs)
    linked: list[funsor.Funsor] = []
    while found := [w for w in weights if variables & set(w.inputs) and not any(w is seen for seen in linked)]:
        linked += found
        variables |= averaged & frozenset().union(*(w.inputs for w in found))
    if not linked:
        return cost
    return (sum(linked).exp() * cost).reduce(ops.add, variables)


def _rows_of(run: Run, factor: funsor.Funsor, name: str) -> jax.Array:
    """A factor summed over everything but the row plates, as an array."""
    frames = sorted(run.frames(name), key=lambda f: f.dim)
    rows = frozenset(f.name for f in frames)
    summed = factor.reduce(ops.add, frozenset(factor.inputs) - rows)
    axes = {f.name: i - len(frames) for i, f in enumerate(frames)}
    values = funsor.to_data(summed, name_to_dim=OrderedDict((n, axes[n]) for n in summed.inputs))
    return jnp.broadcast_to(values, tuple(f.size for f in frames))
