"""The densities of one run of guide and model, site by site and datum by datum.

    log p(x_n, z_n) − log q(z_n | x_n) = Σ_s term_s

A site inside the row plates keeps their axes, so that its term is one number per datum; every other site's term is
one number. Scales stay apart: they say how many data a row stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import MaskedDistribution, Normal
from numpyro.distributions.kl import kl_divergence

from probgen.errors import ProbgenError
from probgen.numpyro.structure import parents, sites, unwrapped
from probgen.numpyro.trace import Trace, enumerated, log_density, refuse_unguided, run_pair
from probgen.program import Structure


@dataclass(frozen=True)
class Run:
    """Guide and model run once against each other.

    `rows` are the plates that hold one row each. Where latents are enumerated (`summed`), the traces `p` and `q` are
    packed (see `enumeration.py`), and `plain` are those of a run that drew them.
    """

    p: Trace
    q: Trace
    buffers: Mapping[str, Any]
    rows: frozenset[str]
    plain: tuple[Trace, Trace]

    @property
    def summed(self) -> bool:
        """Whether latents are enumerated."""
        return self.p is not self.plain[0]

    @property
    def latents(self) -> list[str]:
        """The model's latents that the guide draws."""
        return [n for n, s in self.p.items() if s["type"] == "sample" and not s["is_observed"] and n in self.q]

    @property
    def auxiliary(self) -> list[str]:
        """The guide's own draws, which the model does not know."""
        return [n for n, s in self.q.items() if s["type"] == "sample" and not s["is_observed"] and n not in self.p]

    @property
    def observed(self) -> list[str]:
        """The model's observed sites, factors included."""
        return [n for n, s in self.p.items() if s["type"] == "sample" and s["is_observed"]]

    def frames(self, name: str) -> list[Any]:
        """The row plates around a site: the model's where it has the site."""
        site = self.p[name] if name in self.p else self.q[name]
        return [f for f in site["cond_indep_stack"] if f.name in self.rows]

    def scale(self, name: str) -> Any:
        """How many data an element of the site stands for."""
        site = self.p[name] if name in self.p else self.q[name]
        return 1.0 if site["scale"] is None else site["scale"]

    def row_shape(self) -> tuple[int, ...]:
        """The sizes of the row plates, from the left."""
        for name in [*self.observed, *self.latents]:
            frames = self.frames(name)
            if frames:
                return tuple(f.size for f in sorted(frames, key=lambda f: f.dim))
        return ()

    def per_row(self, values: jax.Array, name: str) -> jax.Array:
        """Sum an array of the site's batch shape over everything but the row plates."""
        keep = {f.dim for f in self.frames(name)}
        values = jnp.asarray(values)
        return values.sum(tuple(d for d in range(-values.ndim, 0) if d not in keep))


def run(
    key: jax.Array,
    params: Mapping[str, Any],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    rows: frozenset[str] | None = None,
    sum_out: bool = True,
) -> Run:
    """Run the guide and the model against it; latents marked for enumeration are enumerated where `sum_out`."""
    p, q, buffers = run_pair(key, params, model, guide, args, kwargs)
    refuse_unguided(p, q)
    plain = (p, q)
    if sum_out and any(enumerated(s) for tr in plain for s in tr.values() if drawn(s)):
        from probgen.numpyro.enumeration import packed_pair

        p, q, buffers = packed_pair(key, params, model, guide, args, kwargs, plain)
    return Run(p, q, buffers, row_plates(plain[0]) if rows is None else rows, plain)


def drawn(site: Mapping[str, Any]) -> bool:
    """Whether a site is a latent draw."""
    return site["type"] == "sample" and not site["is_observed"]


def row_plates(p: Trace) -> frozenset[str]:
    """The plates that every data site has, and every latent that shares one with them: the independent rows.

    With global latents the rows are independent only given those.
    """
    plates = {n: {f.name for f in s["cond_indep_stack"]} for n, s in p.items() if s["type"] == "sample"}
    observed = [plates[n] for n in plates if p[n]["is_observed"]]
    common = set.intersection(*observed) if observed else set()
    local = [names & common for n, names in plates.items() if names & common]
    return frozenset(set.intersection(*local) if local else ())


def site_terms(run: Run, analytic: tuple[str, ...] = ()) -> dict[str, jax.Array]:
    """Each site's term, unscaled: log p of data, log p − log q (or −KL, for the sites of `analytic`) of latents.

    Enumerated latents of the model are summed out, and the term of the sites they touch bears the name of the data
    they explain; enumerated latents of the guide are averaged over.
    """
    if run.summed:
        from probgen.numpyro.enumeration import summed_terms

        return summed_terms(run, analytic)
    terms = {name: run.per_row(log_density(run.p[name]), name) for name in run.observed}
    for name in run.latents:
        kl = divergence(run, name) if name in analytic else None
        terms[name] = (
            run.per_row(log_density(run.p[name]), name) - run.per_row(log_density(run.q[name]), name)
            if kl is None
            else -run.per_row(kl, name)
        )
    return terms | {name: -run.per_row(log_density(run.q[name]), name) for name in run.auxiliary}


def log_weight(run: Run) -> dict[str, jax.Array]:
    """Terms whose sum is log p(x, z) − log q(z | x) with every enumerated latent summed out."""
    if run.summed:
        from probgen.numpyro.enumeration import summed_weight

        return summed_weight(run)
    return site_terms(run)


def divergence(run: Run, name: str) -> jax.Array | None:
    """KL(q ‖ p) at a site in closed form, or None where the two distributions have none."""
    q, p = run.q[name]["fn"], run.p[name]["fn"]
    if isinstance(unwrapped(q), Normal) and isinstance(unwrapped(p), Normal) and not masked(q, p):
        return _normal_kl(q, p)
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _normal_kl(q: Any, p: Any) -> jax.Array:
    """The KL of Normals with their logarithms apart: XLA makes log exp s, which networks give, into s."""
    a, b = unwrapped(q), unwrapped(p)
    kl = ((a.scale / b.scale) ** 2 + ((a.loc - b.loc) / b.scale) ** 2 - 1) / 2 + jnp.log(b.scale) - jnp.log(a.scale)
    shape = jnp.broadcast_shapes(q.shape(), p.shape())
    return jnp.broadcast_to(kl, shape).sum(tuple(range(-q.event_dim, 0)))


def masked(*fns: Any) -> bool:
    """Whether a mask lies anywhere in a stack of `to_event`, `expand` and `mask`."""
    bases = [base for fn in fns if (base := getattr(fn, "base_dist", None)) is not None]
    return any(isinstance(fn, MaskedDistribution) for fn in fns) or (bool(bases) and masked(*bases))


def total(run: Run, terms: Mapping[str, jax.Array]) -> jax.Array:
    """Σ scale · term: the sum for all the data that the rows stand for."""
    return sum((run.scale(name) * term.sum() for name, term in terms.items()), jnp.zeros(()))


def per_datum(run: Run, terms: Mapping[str, jax.Array]) -> jax.Array:
    """Sum of the local terms, one number per row."""
    local = [term for name, term in terms.items() if run.frames(name)]
    if not local:
        raise ProbgenError(
            "the program has no plate as long as the batch, so it has no number per datum: put the data in "
            '`with numpyro.plate("data", len(x))`'
        )
    return sum(local)


def exact_kl(run: Run, model: Callable, args: tuple, kwargs: Mapping[str, Any], params: Mapping[str, Any]) -> tuple:
    """The sites whose KL may be taken in closed form (`Structure.analytic_kl`)."""
    p, q = run.plain
    found = parents(model, kwargs, params, p, args)
    structure = Structure(model=sites(p, (), found), guide=sites(q, (), {}))
    hidden = set(structure.enumerated)
    return tuple(n for n in structure.analytic_kl() if not hidden & set(found.get(n, ())))


def score_function(run: Run, terms: Mapping[str, jax.Array]) -> jax.Array:
    """Zero, whose gradient is that of E_q[terms] through draws that are not reparametrised (REINFORCE).

    A local draw is weighted by its own datum's terms, a global one by all of them.
    """
    free = [n for n in [*run.latents, *run.auxiliary] if not run.q[n]["fn"].has_rsample and not enumerated(run.q[n])]
    surrogate = jnp.zeros(())
    for name in free:
        log_q = run.per_row(log_density(run.q[name]), name)
        local = bool(run.frames(name))
        cost = run.scale(name) * per_datum(run, terms) if local else total(run, terms)
        surrogate += (jax.lax.stop_gradient(cost) * (log_q - jax.lax.stop_gradient(log_q))).sum()
    return surrogate
