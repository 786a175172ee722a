"""The evidence lower bound and its importance-weighted tightening, on any Pyro program.

    ELBO    = E_q[log p(x, z) − log q(z | x)] ≤ log p(x)
    IWAE-K  = E_q[log 1/K Σ_k p(x, z_k) / q(z_k | x)] ≤ log p(x),  increasing in K

Both read no number off a tensor while they build the loss, so that a whole training step is one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.enum import get_importance_trace
from pyro.infer.trace_elbo import _compute_log_r
from torch import Tensor
from torch.distributions import kl_divergence

from probgen.errors import ProbgenError
from probgen.program import Structure
from probgen.pyro.enumeration import enumerated_traces, expected_terms
from probgen.pyro.loss import Loss, scheduled
from probgen.pyro.plan import Plan, make_plan, owned
from probgen.pyro.trace import rows_stood_for
from probgen.pyro.weights import log_weights
from probgen.refusals import refuse_unguided
from probgen.schedules import refuse_other


class Bound(Loss, pyro.infer.ELBO):
    """What ELBO and IWAE share: the look at the program, and the PPL's own interface."""

    __call__ = pyro.infer.ELBO.__call__

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
            refuse_unguided(self._plans[key][2].structure)
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
