"""The log density of rows by one run of a Pyro model, known up to a constant, its gradient, and Langevin's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from probgen.energy.langevin import Langevin
from probgen.program import rows_of
from probgen.pyro.trace import is_sample, rows_stood_for, unwrapped
from probgen.pyro.weights import in_plates, local_terms

Model = Callable[..., None]
Arrays = Mapping[str, Tensor]


def data_array(model: Model, arrays: Arrays) -> str:
    """The array that the data site bears the name of."""
    if len(arrays) == 1:
        return next(iter(arrays))
    with torch.no_grad():
        nodes = poutine.trace(model).get_trace(**arrays).nodes
    return next(name for name in arrays if name in nodes and is_sample(nodes[name]) and nodes[name]["is_observed"])


def log_parts(model: Model, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """log p(x_n) of the data site and the log of all factors, [B] each; what the batch stands for is left out."""
    trace, rows = poutine.trace(model).get_trace(**arrays), rows_of(arrays)
    trace.compute_log_prob()
    sites = {name: site for name, site in trace.nodes.items() if is_sample(site)}
    plates = tuple({f.name for site in sites.values() for f in site["cond_indep_stack"] if f.size == rows})
    _, scale = rows_stood_for(trace, plates)
    for site in sites.values():
        site["log_prob"] = site["log_prob"] / (scale if in_plates(site, plates) else 1.0)
    parts = [arrays[next(iter(arrays))].new_zeros(rows, dtype=torch.get_default_dtype()) for _ in range(2)]
    for name, term in local_terms(trace, plates, rows).items():
        factor = isinstance(unwrapped(sites[name]["fn"]), Unit)
        parts[factor] = parts[factor] + term
    return parts[0], parts[1]


def scored(model: Model, arrays: Arrays, x: Tensor, name: str, keep: bool = False) -> tuple[Tensor, Tensor]:
    """log p(x) of rows in the place of the array `name`, [B], and its gradient [B, ...]; differentiable if `keep`.

    What is not kept has no gradient, and is computed whether or not gradients are on.
    """
    with torch.enable_grad():
        x = x if keep else x.detach().requires_grad_()
        log_p = sum(log_parts(model, {**arrays, name: x}))
        (score,) = torch.autograd.grad(log_p.sum(), x, create_graph=keep)
    return (log_p, score) if keep else (log_p.detach(), score)


def parts_and_scores(model: Model, arrays: Arrays, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(x_n) of the data site and the log of all factors, [B] each, and their gradients by x, [B, ...]."""
    with torch.enable_grad():
        x = arrays[name].detach().requires_grad_()
        parts = log_parts(model, {**arrays, name: x})
        scores = [
            torch.autograd.grad(part.sum(), x, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for part in parts
        ]
    return parts[0].detach(), parts[1].detach(), scores[0], scores[1]


def langevin(model: Model, arrays: Arrays, x: Tensor, name: str, chain: Langevin) -> Tensor:
    """Rows after the steps of a chain that starts at `x`; no gradient goes through them."""

    def density(x: Tensor) -> tuple[Tensor, Tensor]:
        return scored(model, arrays, x, name)

    place = chain.start(density, x)
    for step in range(chain.steps):
        noise = torch.randn_like(x)
        log_uniform = torch.rand_like(place[1]).log() if chain.adjusted else None
        place = chain.move(density, place, noise, log_uniform, step)
    return place[0].detach()
