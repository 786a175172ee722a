"""What a likelihood is of, and by what it is estimated: the two things that decide whether two of them compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from probgen.data.steps import Binarize, Dequantize, Flatten, Step
from probgen.sites import arrays_of

LIKELIHOOD = "log_likelihood"
_LOSSY = (Binarize, Dequantize)  # steps that lose or add something; all others can be undone


def measure_of(structure: Any, preparation: Any, spec: Mapping[str, Any]) -> dict[str, str]:
    """What the program's log-likelihood is of: `name` says it, and tells any two apart; `head` and `by` head a column."""
    drawn = arrays_of(structure, preparation.spec(spec))
    sites = {array: drawn_as for drawn_as, array in sorted(drawn.items(), key=lambda pair: pair[1])}
    steps = {array: _kept(preparation.steps.get(array, ())) for array in sites}
    kinds = {array: "probability" if _discrete(structure, site) else "density" for array, site in sites.items()}
    given = sorted(name for name, role in structure.arrays.items() if role == "given")
    P = "P" if set(kinds.values()) == {"probability"} else "p"
    of = ", ".join(_symbol(array, chain) for array, chain in steps.items())
    head = f"log {P}({of}{' | ' + ', '.join(given) if given else ''})"
    by = "; ".join(f"{array} by {', '.join(map(_words, chain))}" for array, chain in steps.items() if chain)
    said = "; ".join(_said(array, kinds[array], steps[array]) for array in steps)
    return {"name": f"{head}{', ' + by if by else ''}: {said}", "head": head, "by": by or "as in the data"}


def estimates(evaluation: Mapping[str, Any], trained: Any, dims: int, rows: int, ode_rows: int) -> list[dict[str, Any]]:
    """The estimates of one likelihood that an evaluation holds, the tightest kind first, in nats and bits a dimension."""
    kinds = {LIKELIHOOD: estimator(evaluation, trained), "ode_log_likelihood": "ODE", "elbo": "bound"}
    if not trained.structure.sampled:
        del kinds["elbo"]  # it is the log-likelihood
    found = []
    for name, kind in kinds.items():
        value, error = evaluation.get(name), evaluation.get(f"{name}_se")
        if value is None or not math.isfinite(value):
            continue
        per_bit = dims * math.log(2)
        found.append(
            {
                "estimator": kind,
                "value": value,
                "se": error,
                "mc_se": evaluation.get(f"{name}_mc_se"),
                "bits_per_dim": -value / per_bit,
                "bits_per_dim_se": None if error is None else error / per_bit,
                "rows": min(rows, ode_rows) if name == "ode_log_likelihood" else rows,
            }
        )
    return found


def estimator(evaluation: Mapping[str, Any], trained: Any) -> str:
    """By what `log_likelihood` is known: exact, ODE, importance-weighted, ..."""
    if getattr(trained, "draws", None) is not None:
        return "posterior predictive"
    if "log_z" in evaluation:
        return "annealed importance sampling"
    if trained.structure.kind == "latent":
        return "importance-weighted, predictive" if trained.structure.has_global_latents else "importance-weighted"
    return "ODE" if _solves(trained) else "exact"


def _solves(trained: Any) -> bool:
    """Whether the density is that of a continuous flow, which a solver integrates."""
    networks = [network for network in trained.modules.values() if hasattr(network, "modules")]
    return any(getattr(part, "integrates", False) for network in networks for part in network.modules())


def why_none(evaluation: Mapping[str, Any]) -> str:
    """The sentence of an evaluation on why it has no log-likelihood."""
    notes = [str(note) for note in evaluation.get("notes", ())]
    return next(
        (note for note in notes if note.startswith(LIKELIHOOD)), "log_likelihood is not defined for this program"
    )


def _discrete(structure: Any, site: str) -> bool:
    """Of a data site, or of the first of a numbered series of them."""
    found = structure.observed.get(site)
    return (found or next(s for n, s in structure.observed.items() if n.startswith(f"{site}_"))).discrete


def _kept(chain: Sequence[Step]) -> list[Step]:
    """The steps on which a likelihood depends: those up to the last that loses or adds something, but for shapes."""
    last = max((i for i, step in enumerate(chain) if isinstance(step, _LOSSY)), default=-1)
    return [step for step in chain[: last + 1] if not isinstance(step, Flatten)]


def _words(step: Step) -> str:
    """`Binarize(threshold=8)`: a step with all that the values depend on, to the last digit."""
    kept = {name: value for name, value in step.to_json().items() if name != "step" and value is not None}
    if isinstance(step, Binarize):
        names = ("stochastic", "low", "high") if step.stochastic else ("threshold",)
        kept = {name: kept[name] for name in names}
    inside = ", ".join(f"{name}={str(value).removesuffix('.0')}" for name, value in kept.items())
    return type(step).__name__ + (f"({inside})" if inside else "")


def _symbol(array: str, chain: Sequence[Step]) -> str:
    if any(isinstance(step, Binarize) for step in chain):
        return f"bits of {array}"
    return f"{array} + u" if chain else array


def _said(array: str, kind: str, chain: Sequence[Step]) -> str:
    if any(isinstance(step, Binarize) for step in chain):
        return f"the {kind} of the bits of {array}, without what lies between a value and its bit"
    if chain:
        return (
            f"the density of {array} + u, u uniform between 0 and 1, in the units of the data; in the mean it is below "
            f"the log-probability of the whole numbers {array}"
        )
    return f"the {kind} of the values of {array}, in the units of the data"
