"""Discrete latents summed out exactly: in the model by message passing, in the guide by an exact expectation.

    log p(x, z) = log Σ_y p(x, y, z),        E_q[c] = Σ_y q(y | x) c(y)

The contraction is Pyro's own; what is added is that a data plate can be kept as an axis (one number per datum), and
an expectation without data-dependent shapes, which a traced graph can hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from probgen.errors import ProbgenError


def enumerated_traces(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    max_plate_nesting: int,
    in_guide: bool = True,
) -> tuple[poutine.Trace, poutine.Trace]:
    """Model and guide traces with every site marked "parallel" enumerated along dimensions left of the plates.

    With `in_guide` false the guide draws its own; what the model alone has is enumerated all the same.
    """
    first = -1 - max_plate_nesting
    if in_guide:  # the model goes on where the guide's dimensions end
        guide, model = EnumMessenger(first_available_dim=first)(guide), EnumMessenger()(model)
    else:
        model = EnumMessenger(first_available_dim=first)(model)
    return get_importance_trace("flat", max_plate_nesting, model, guide, args, kwargs)


def expected_terms(p: poutine.Trace, q: poutine.Trace) -> dict[str, Tensor]:
    """The ELBO's terms (scaled sums), with the model's marked latents summed out and the guide's averaged over.

    Sites that meet at an enumerated latent of the model share one term, named after its data.
    """
    q.pack_tensors()
    p.pack_tensors(q.plate_to_symbol)
    costs, ordering = _costs(p, q)
    weights = [
        (ordering[name], site["packed"]["unscaled_log_prob"])
        for name, site in q.nodes.items()
        if site["type"] == "sample" and site["infer"].get("_enumerate_dim") is not None
    ]
    terms: dict[str, Tensor] = {}
    for ordinal, name, cost in costs:
        upstream = [w for t, w in weights if t <= ordinal]
        value = _expectation(cost, upstream)
        terms[name] = terms[name] + value if name in terms else value
    return terms


def _costs(p: poutine.Trace, q: poutine.Trace) -> tuple[list[tuple[frozenset, str, Tensor]], dict]:
    """(ordinal, name, packed log density) of each term: log p per site, log marginals, −log q per site."""
    costs, ordering = _model_costs(p, q)
    for name, site in q.nodes.items():
        if site["type"] == "sample":
            costs.append((ordering[name], name, packed.neg(site["packed"]["log_prob"])))
    return costs, ordering


def _model_costs(
    p: poutine.Trace, q: poutine.Trace, keep: frozenset[str] = frozenset()
) -> tuple[list[tuple[frozenset, str, Tensor]], dict]:
    """The model's terms, with what it enumerates contracted; the plates in `keep` stay as axes of the marginals."""
    marginal_costs, log_factors, ordering, sum_dims, scale = _compute_model_factors(p, q)
    names = {id(s["packed"]["log_prob"]): n for n, s in p.nodes.items() if s["type"] == "sample"}
    costs = [(t, names[id(c)], c) for t, terms in marginal_costs.items() for c in terms]
    if log_factors:
        tree: OrderedDict = OrderedDict()
        for ordinal, terms in log_factors.items():
            tree.setdefault(ordinal - keep, []).extend(terms)
        with shared_intermediates() as cache:
            tree = contract_tensor_tree(tree, sum_dims, cache=cache)
        name = marginal_name(p, q)
        costs += [(t | keep, name, packed.scale_and_mask(c, scale=scale)) for t, terms in tree.items() for c in terms]
    return costs, ordering


def marginal_name(p: poutine.Trace, q: poutine.Trace) -> str:
    """The name of the marginal term: the observed site that the enumerated latents explain."""
    enumerated = [
        n
        for n, s in p.nodes.items()
        if s["type"] == "sample" and s["infer"].get("_enumerate_dim") is not None and n not in q.nodes
    ]
    after = list(p.nodes)[list(p.nodes).index(enumerated[0]) :]
    observed = [n for n in after if p.nodes[n]["type"] == "sample" and p.nodes[n]["is_observed"]]
    return observed[0] if observed else enumerated[0]


def _expectation(cost: Tensor, log_weights: list[Tensor]) -> Tensor:
    """Σ_y Π q(y) · cost(y) over the guide's enumerated dimensions, where the weight is positive."""
    linked, dims = [], set(cost._pyro_dims)
    pending = list(log_weights)
    while True:  # the weights that share an enumerated dimension with the cost, also through one another
        found = [w for w in pending if dims & set(w._pyro_dims)]
        if not found:
            break
        linked += found
        pending = [w for w in pending if not any(w is f for f in found)]
        dims |= {d for w in found for d in w._pyro_dims}
    if not linked:
        return cost.sum()
    equation = (
        ",".join(w._pyro_dims for w in linked)
        + "->"
        + "".join(d for d in cost._pyro_dims if any(d in w._pyro_dims for w in linked))
    )
    weight = torch.einsum(equation, *[w.exp() for w in linked])
    weight._pyro_dims = equation.partition("->")[2]
    cost, weight = packed.broadcast_all(cost, weight)
    return torch.where(weight > 0, weight * cost, torch.zeros_like(cost)).sum()


def marginal_per_datum(
    p: poutine.Trace, q: poutine.Trace, data_plates: tuple[str, ...], rows: int
) -> dict[str, Tensor]:
    """The model's local terms, log p of each site, [rows], what it enumerates summed out in its data site's term.

    The guide's trace must hold draws: none of its sites enumerated.
    """
    q.pack_tensors()
    p.pack_tensors(q.plate_to_symbol)
    keep = frozenset(p.plate_to_symbol[name] for name in data_plates if name in p.plate_to_symbol)
    if not keep:
        raise ProbgenError(
            "a program with enumerated latents and no data plate has no likelihood per datum: put its data in "
            'pyro.plate("data", len(x))'
        )
    terms: dict[str, Tensor] = {}
    for ordinal, name, cost in _model_costs(p, q, keep)[0]:
        if ordinal & keep:
            terms[name] = terms.get(name, 0.0) + _rows_of(cost, keep).expand(rows)
    return terms


def state_table(p: poutine.Trace, q: poutine.Trace, name: str, data_plates: tuple[str, ...], rows: int) -> Tensor:
    """log p(x_n, y_n = k) over the K states of one latent enumerated in the model, [rows, K], the others summed out."""
    q.pack_tensors()
    p.pack_tensors(q.plate_to_symbol)
    keep = frozenset(p.plate_to_symbol[plate] for plate in data_plates if plate in p.plate_to_symbol)
    state = p.nodes[name]["infer"]["_enumerate_symbol"]
    _, log_factors, _, sum_dims, _ = _compute_model_factors(p, q)
    tree: OrderedDict = OrderedDict()
    for ordinal, terms in log_factors.items():
        tree.setdefault(ordinal - keep, []).extend(terms)
    with shared_intermediates() as cache:
        tree = contract_tensor_tree(tree, sum_dims - {state}, cache=cache)
    states = p.nodes[name]["fn"].enumerate_support(expand=False).shape[0]
    parts = [_by_state(term, keep, state).expand(rows, states) for terms in tree.values() for term in terms]
    return torch.stack(parts).sum(0)


def _by_state(term: Tensor, keep: frozenset[str], state: str) -> Tensor:
    """A packed term as [rows or 1, K or 1], summed over every other plate."""
    others = [i for i, d in enumerate(term._pyro_dims) if d not in keep and d != state]
    dims = [d for d in term._pyro_dims if d in keep or d == state]
    value = term.sum(others) if others else term
    if dims and dims[0] == state:
        value = value.movedim(0, -1)
    if not any(d in keep for d in dims):
        value = value.unsqueeze(0)
    return value if state in dims else value.unsqueeze(-1)


def _rows_of(term: Tensor, keep: frozenset[str]) -> Tensor:
    axes = [i for i, d in enumerate(term._pyro_dims) if d not in keep]
    return term.sum(axes) if axes else term
