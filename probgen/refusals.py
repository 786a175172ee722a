"""Programs that cannot be trained as asked: one sentence each, the same on both backends."""

from __future__ import annotations

import math
from typing import Any

from probgen.errors import ProbgenError
from probgen.program import Structure

MOST = 1_000_000  # joint values of the enumerated latents that one site depends on


def refuse_unguided(structure: Structure) -> None:
    """A latent that the guide does not draw and that is not enumerated, or enumerated latents that are too many."""
    for name, site in structure.unguided.items():
        refuse_latent(name, site.discrete)
    for name, site in structure.model.items():
        summed = {parent: structure.model[parent].values for parent in site.parents if parent in structure.enumerated}
        size = math.prod(summed.values())
        if size > MOST:
            raise ProbgenError(
                f"the site {name!r} depends on {len(summed)} latents that are enumerated, which have {size:,} joint values, "
                f"more than the {MOST:,} that are summed out: draw some of them in the guide, without the mark"
            )


def refuse_latent(name: str, discrete: bool) -> None:
    """The latent `name` has no guide and is not enumerated."""
    mark = 'mark it infer={"enumerate": "parallel"} or ' if discrete else ""
    raise ProbgenError(f"the latent {name!r} has neither a guide nor enumeration: {mark}draw it in the guide")


def enumerable(name: str, fn: Any) -> int:
    """How many values the latent `name`, marked for enumeration, has; refused where its distribution cannot list them."""
    try:
        return len(fn.enumerate_support(expand=False))
    except NotImplementedError as error:
        base = fn
        while hasattr(base, "base_dist"):
            base = base.base_dist
        family = type(base).__name__.removesuffix("Probs").removesuffix("Logits")
        asks = f"the latent {name!r} ({family}) is marked for enumeration"
        if not fn.support.is_discrete:
            said = "and it is continuous: leave out the mark and draw it in the guide"
        elif base.has_enumerate_support:
            said = (
                f"as one event of {math.prod(fn.event_shape)} values, whose combinations are too many to list: put them in a "
                "plate instead of `to_event`, or leave out the mark and draw it in the guide"
            )
        else:
            said = (
                "and there is no end to its values: leave out the mark and draw it in the guide, or use a distribution with "
                "finitely many values"
            )
        raise ProbgenError(f"{asks}{'' if said.startswith('as') else ','} {said}") from error


def refuse_self_subsampling(plate: str, full: int, size: int, batch: int, rows: int) -> None:
    """A plate that subsamples a minibatch, as if it were all N rows."""
    if full == batch < rows and size < batch:
        raise ProbgenError(
            f"the plate {plate!r} subsamples {size} of the {batch} rows of a minibatch that is itself a part of the "
            f"{rows} rows: give batch_size=None so that the program gets whole arrays"
        )


def refuse_local_autoguide(autoguide: str, structure: Structure, batch: int, rows: int) -> None:
    """An autoguide over a local latent under minibatches: it keeps one value for each row."""
    local = [name for name, site in structure.sampled.items() if site.local]
    if local and batch < rows:
        raise ProbgenError(
            f"the autoguide {autoguide} keeps one value per row for the local latent {local[0]!r}, which minibatches "
            "cannot share: give batch_size=None, or write a guide that computes it from the data"
        )
