"""The evidence lower bound and its importance-weighted tightening, on any Pyro program.

    ELBO    = E_q[log p(x, z) − log q(z | x)] ≤ log p(x)
    IWAE-K  = E_q[log 1/K Σ_k p(x, z_k) / q(z_k | x)] ≤ log p(x),  increasing in K

Both read no number off a tensor while they build the loss, so that a whole training step is one graph.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.autoguide import AutoGuide
from pyro.infer.enum import get_importance_trace
from pyro.infer.trace_elbo import _compute_log_r
from torch import Tensor
from torch.distributions import kl_divergence

from probgen.errors import ProbgenError
from probgen.program import Site, Structure
from probgen.pyro.enumeration import enumerated_traces, expected_terms, marginal_per_datum
from probgen.pyro.loss import Loss, scheduled
from probgen.pyro.trace import plan_structure, rows_stood_for
from probgen.schedules import refuse_other


@dataclass(frozen=True)
class Plan:
    """What one look at a pair says about how its bound is computed.

    `analytic` are the sites with a closed-form KL; `tiles` says that k draws can be rows of one long batch, `shares`
    that rows share a draw of the guide; `depth` is the nesting of plates. `owners` names, for each site that the
    guide alone has (an autoguide's unconstrained draw), the latent whose term its −log q counts to.
    """

    structure: Structure
    analytic: frozenset[str]
    enumerates: bool
    tiles: bool
    shares: bool
    depth: int
    owners: Mapping[str, str]


class Bound(Loss, pyro.infer.ELBO):
    """What ELBO and IWAE share: the look at the program, and the PPL's own interface."""

    def __init__(self, num_particles: int) -> None:
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ProbgenError(f"num_particles must be a whole number, at least 1, not {num_particles!r}")
        pyro.infer.ELBO.__init__(self, num_particles=num_particles)
        self._plans: dict[tuple, tuple[Any, Any, Plan]] = {}

    def plan(self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: dict) -> Plan:
        """The plan of a pair, made on its first batch; labels that come and go (`y=None`) make two plans."""
        key = (id(model), id(guide), *map(_kind, args), *((name, _kind(v)) for name, v in sorted(kwargs.items())))
        if key not in self._plans:  # the pair is kept too, so that its ids are not given to others
            self._plans[key] = (model, guide, make_plan(model, guide, args, kwargs))
        return self._plans[key][2]

    def objective(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **arrays: Tensor) -> Any:
        """Minus the bound for all N rows, and its terms per site."""
        return self.loss_and_terms(model, guide, *args, **arrays)

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound, as a scalar whose gradient is an unbiased estimate."""
        return self.loss_and_terms(model, guide, *args, **kwargs)[0]

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Minus the bound, as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Minus the bound, as a number; its gradients are added to the parameters' `.grad`."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()


class ELBO(Bound):
    r"""E_q[log p(x, z) − log q(z | x)], Monte Carlo in the guide's draws.

    The KL at a site is taken in closed form where that is exact (`Structure.analytic_kl`); `kl="sampled"` never does.
    Latents marked ``infer={"enumerate": "parallel"}`` are summed out in the model, averaged over in the guide.

    Parameters
    ----------
    num_particles
        Draws of the guide a step.
    beta
        Weight of the KL terms (Higgins et al. 2017), a number or a schedule of the step (warm-up).
    free_bits
        Nats per datum below which a local latent's KL costs nothing more (Kingma et al., arXiv:1606.04934).
    kl
        "analytic" or "sampled".

    Reference: Kingma & Welling, arXiv:1312.6114.
    """

    def __init__(self, num_particles: int = 1, beta: Any = 1.0, free_bits: Any = 0.0, kl: str = "analytic") -> None:
        if kl not in ("analytic", "sampled"):
            raise ProbgenError(f'kl must be "analytic" or "sampled", not {kl!r}')
        refuse_other("ELBO", beta=beta, free_bits=free_bits)
        super().__init__(num_particles)
        self.beta, self.free_bits, self.kl = beta, free_bits, kl

    def __repr__(self) -> str:
        return f"ELBO(num_particles={self.num_particles}, beta={self.beta}, free_bits={self.free_bits}, kl={self.kl!r})"

    def at(self, step: Any) -> ELBO:
        """With beta and free bits as they are at `step`."""
        return scheduled(self, step, "beta", "free_bits")

    def terms(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The bound's summands for all N rows: log p(x_s | ·) of data sites, −KL of latents, unweighted."""
        return self._terms_and_rows(model, guide, args, kwargs)[0]

    def _terms_and_rows(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[dict[str, Tensor], Any]:
        """The terms, averaged over the particles, and the N that the batch stands for."""
        plan = self.plan(model, guide, args, kwargs)
        particles = [self._particle(plan, model, guide, args, kwargs) for _ in range(self.num_particles)]
        terms = {name: sum(p[name] for p, _ in particles) / len(particles) for name in particles[0][0]}
        return terms, particles[0][1]

    def loss_and_terms(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple:
        """Minus the weighted bound, and the unweighted terms."""
        terms, rows = self._terms_and_rows(model, guide, args, kwargs)
        structure = self.plan(model, guide, args, kwargs).structure
        loss = 0.0
        for name, term in terms.items():
            if name in structure.guide or name in structure.sampled:
                local = name in structure.sampled and structure.model[name].local
                loss = loss + self._weighted(-term, rows if local else None)
            else:
                loss = loss - term
        return loss, {name: term.detach() for name, term in terms.items()}

    def _weighted(self, kl: Tensor, rows: float | None) -> Tensor:
        if rows is not None and not is_identically_zero(self.free_bits):
            kl = torch.maximum(kl, torch.as_tensor(self.free_bits * rows, dtype=kl.dtype, device=kl.device))
        return kl if is_identically_zero(self.beta - 1.0) else self.beta * kl

    def _particle(self, plan: Plan, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[dict, Any]:
        if plan.enumerates:
            p, q = enumerated_traces(model, guide, args, kwargs, plan.depth)
            terms = expected_terms(p, q)
        else:
            p, q = get_importance_trace("flat", plan.depth, model, guide, args, kwargs)
            terms = _terms(p, q, plan.analytic if self.kl == "analytic" else frozenset())
        return owned(terms, plan.owners), rows_stood_for(p, plan.structure.data_plates)[0]


class IWAE(Bound):
    r"""E_q[log 1/K Σ_k p(x_n, z_k) / q(z_k | x_n)], per datum; for global latents, of all data at once.

    Latents that the model alone has, marked ``infer={"enumerate": "parallel"}``, are summed out in every weight.

    With `alpha` the Rényi bound 1/(1−α) log 1/K Σ_k w_k^{1−α} (Li & Turner, arXiv:1602.02311); α = 0 is IWAE.
    Reference: Burda, Grosse & Salakhutdinov, arXiv:1509.00519.
    """

    def __init__(self, num_particles: int, alpha: float = 0.0) -> None:
        super().__init__(num_particles)
        if alpha == 1.0:
            raise ProbgenError("alpha = 1 is the ELBO itself: use ELBO()")
        self.alpha = alpha

    def __repr__(self) -> str:
        return f"IWAE(num_particles={self.num_particles}" + (f", alpha={self.alpha})" if self.alpha else ")")

    def loss_and_terms(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple:
        """Minus the bound for all N rows; it has no terms per site."""
        plan = self.plan(model, guide, args, kwargs)
        self.check(plan.structure)
        weights, scale = log_weights(plan, model, guide, args, kwargs, self.num_particles, tempered=True)
        power = 1.0 - self.alpha
        bound = (torch.logsumexp(power * weights, 0) - math.log(self.num_particles)) / power
        return -(bound * scale).sum(), {}

    def check(self, structure: Structure) -> None:
        """Its gradient is by reparametrisation: the guide's draws must be differentiable."""
        for name, site in structure.guide.items():
            if site.role == "latent" and not site.reparametrised:
                raise ProbgenError(
                    f"IWAE needs reparametrised draws, but the guide's {name!r} is a {site.family}: mark it "
                    'infer={"enumerate": "parallel"} in the model alone, or use ELBO()'
                )


def _kind(value: Any) -> Any:
    """What a plan depends on of an argument: whether it is there, and its axes."""
    return value.dim() if isinstance(value, Tensor) else type(value)


def make_plan(model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: dict) -> Plan:
    """Look at a pair once, on the arguments of its first call."""
    structure = plan_structure(model, guide, args, kwargs)
    sites = [*structure.model.values(), *structure.guide.values()]
    depth = max([-plate.dim for site in sites for plate in site.plates if plate.dim is not None], default=0)
    inner = [site for site in sites if site.role != "deterministic"]
    enumerates = any(site.enumerated for site in sites)
    if enumerates:
        _refuse_score_gradients(structure)
    tiles = (
        bool(structure.data_plates)
        and not structure.states_rows
        and all(_rows_lead(site) for site in inner)
        and not isinstance(inspect.unwrap(guide), AutoGuide)
    )
    return Plan(
        structure=structure,
        analytic=frozenset(name for name in structure.analytic_kl() if _has_pathwise_kl(structure.guide[name])),
        enumerates=enumerates,
        tiles=tiles,
        shares=any(site.role == "latent" and not site.local for site in sites),
        depth=depth,
        owners={name: _owner(name, structure) for name in structure.guide if name not in structure.model},
    )


def _rows_lead(site: Site) -> bool:
    """Whether the rows are the first axis of a site's values."""
    return site.local and min(site.plates, key=lambda plate: plate.dim or 0).data


def _has_pathwise_kl(site: Site) -> bool:
    """Not a `Delta`, whose KL in Pyro drops the log-Jacobian, nor a draw that needs its score-function gradient."""
    return site.reparametrised and not site.delta


def _owner(name: str, structure: Structure) -> str:
    """The latent that an auxiliary draw makes; the first one, where it makes several."""
    latent = name.removesuffix("_unconstrained")
    return latent if latent in structure.sampled else next(iter(structure.sampled), name)


def owned(terms: Mapping[str, Tensor], owners: Mapping[str, str]) -> dict[str, Tensor]:
    """Terms by site of the model, those of auxiliary draws added to their owners'."""
    found: dict[str, Tensor] = {}
    for name, term in terms.items():
        owner = owners.get(name, name)
        found[owner] = found[owner] + term if owner in found else term
    return found


def _refuse_score_gradients(structure: Structure) -> None:
    for name, site in structure.guide.items():
        if not site.reparametrised and not site.enumerated:
            raise ProbgenError(
                f"beside enumerated latents the guide's {name!r} ({site.family}) has no differentiable draws: mark it "
                'infer={"enumerate": "parallel"} too'
            )


def _batch(args: tuple, kwargs: dict) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    return 0


def _terms(p: poutine.Trace, q: poutine.Trace, analytic: frozenset[str]) -> dict[str, Tensor]:
    """log p of data sites, −KL of the guide's; draws without a reparametrisation get a score-function gradient."""
    terms: dict[str, Tensor] = {}
    for name, site in p.nodes.items():
        if site["type"] == "sample" and name not in q.nodes and not site["infer"].get("_deterministic"):
            terms[name] = site["log_prob_sum"]
    for name, site in q.nodes.items():
        if site["type"] != "sample":
            continue
        other = p.nodes.get(name)
        divergence = _kl(site, other) if name in analytic else None
        if divergence is not None:
            terms[name] = -divergence
        else:
            terms[name] = (other["log_prob_sum"] if other else 0.0) - site["log_prob"].sum()
            score = site["score_parts"].score_function
            if not is_identically_zero(score):
                terms[name] = terms[name] + _score_gradient(site, score, p, q)
    return terms


def _kl(guide_site: dict, model_site: dict) -> Tensor | None:
    """KL(q ‖ p) at a site in closed form, scaled and masked, or None where the two have none."""
    try:
        divergence = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return None
    return scale_and_mask(divergence, scale=guide_site["scale"], mask=guide_site["mask"]).sum()


def _score_gradient(site: dict, score: Tensor, p: poutine.Trace, q: poutine.Trace) -> Tensor:
    """A term of value zero whose gradient is log r · ∇ log q, less the pathwise part that −log q already has."""
    log_r = _compute_log_r(p, q).sum_to(site["cond_indep_stack"])
    surrogate = (log_r * score).sum() + (0.0 if site["fn"].has_rsample else site["log_prob"].sum())
    return surrogate - surrogate.detach()


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
