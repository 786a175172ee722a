"""Programs that cannot be trained as asked: one sentence each, the same on both backends."""

from __future__ import annotations

from probgen.errors import ProbgenError
from probgen.program import Structure


def refuse_unguided(structure: Structure) -> None:
    """A latent that the guide does not draw and that is not enumerated."""
    for name, site in structure.unguided.items():
        refuse_latent(name, site.discrete)


def refuse_latent(name: str, discrete: bool) -> None:
    """The latent `name` has no guide and is not enumerated."""
    mark = 'mark it infer={"enumerate": "parallel"} or ' if discrete else ""
    raise ProbgenError(f"the latent {name!r} has neither a guide nor enumeration: {mark}draw it in the guide")


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
