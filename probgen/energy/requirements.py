"""The site whose density is differentiated by its data: what a program must be for score matching and for Langevin."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np

from probgen.energy.langevin import Langevin
from probgen.errors import ProbgenError
from probgen.program import Structure
from probgen.supports import word

REAL = ("real", "realvector")


def lacking(structure: Structure) -> str | None:
    """What keeps a program from having ∇_x log p(x) of each row by one run of its model; None where nothing does."""
    if structure.latents:
        return (
            f"this program has the latent {next(iter(structure.latents))!r}: learn it by ELBO(), which sums latents out"
        )
    if len(structure.observed) != 1:
        found = ", ".join(map(repr, structure.observed)) or "none"
        return f"this program has other data sites than one: {found}"
    name, site = next(iter(structure.observed.items()))
    if site.discrete:
        return f"the data of the site {name!r} are discrete ({site.family}), and have no gradient"
    if site.delta:
        return f"the site {name!r} has all its mass at one point, and no density"
    if word(site.support).replace("_", "") not in REAL:
        return f"the site {name!r} ({site.family}) lives on {word(site.support)}: prepare its data onto the real line (Logit)"
    if not site.local:
        return f'no plate holds the rows of {name!r}: write `with plate("data", len({name})):` around it'
    if structure.arrays and structure.arrays.get(name) != "data":
        return f"the site {name!r} is not named after its array, {', '.join(map(repr, structure.arrays))}: name it so"
    return None


def refuse_unscored(structure: Structure, owner: str) -> None:
    """Refuse a program without ∇_x log p(x); `owner` is what wants it."""
    why = lacking(structure)
    if why:
        raise ProbgenError(f"{owner} follows the gradient of log p(x) by continuous data, and {why}")


def weighs_its_data(structure: Structure) -> bool:
    """Whether factors change the law of the data, and a chain can follow it: running the program does not draw from it."""
    return structure.kind == "unnormalised" and lacking(structure) is None


def usual_chain() -> Langevin:
    """What draws from a program with factors on its data where no sampler is given, saying so."""
    chain = Langevin()
    warnings.warn(
        f"a factor weighs the data of this program, so running it does not draw from its density: {chain} does; give "
        "another as sampler=, or prior=True for the program without its factors",
        stacklevel=4,
    )
    return chain


def refuse_escaped(rows: dict[str, np.ndarray], chain: Langevin) -> dict[str, np.ndarray]:
    """The rows that a chain ended in; refused where it left for infinity."""
    for name, value in rows.items():
        if not np.isfinite(value).all():
            raise ProbgenError(
                f"Langevin: {name!r} is no longer finite after {chain.steps} steps of {chain.step_size:g}: make `step_size` "
                "smaller, or leave adjusted=True"
            )
    return rows


def refuse_different(structure: Structure, arrays: Mapping[str, np.ndarray]) -> None:
    """A chain of NUTS draws all its rows from one density, so that what they are given must be the same for all."""
    for name, use in structure.arrays.items():
        if use == "given" and (arrays[name] != arrays[name][:1]).any():
            raise ProbgenError(
                f"NUTS draws all rows from one density, and {name!r} in `given` differs between them: ask for each value "
                "by itself, or give sampler=Langevin()"
            )


def tell_diverged(diverged: int, draws: int) -> None:
    """Say how many steps of NUTS diverged, if any."""
    if diverged:
        warnings.warn(
            f"NUTS: {diverged} of {draws} steps diverged, so the draws may miss a part of the density: a higher "
            "target_accept is the usual cure",
            stacklevel=2,
        )
