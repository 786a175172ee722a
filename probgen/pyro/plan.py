"""One look at a model and a guide, kept: what decides how their bound is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from probgen.errors import ProbgenError
from probgen.program import Site, Structure
from probgen.pyro.trace import plan_structure


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
