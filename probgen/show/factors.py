"""The factorisation that a program's structure spells out: p(x, z) = p(z) p(x | z), q(z | x)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from probgen.program import Site, Structure

_GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "pi",
        "rho",
        "sigma",
        "tau",
        "phi",
        "chi",
        "psi",
        "omega",
    ]
)


@dataclass(frozen=True)
class Factor:
    """One factor: p(sites | parents), or a potential ψ of them; `local` where there is one for every row."""

    sites: tuple[str, ...]
    parents: tuple[str, ...]
    local: bool
    potential: bool = False


def model_factors(structure: Structure, given: tuple[str, ...] = ()) -> list[Factor]:
    """One factor a site, in the order they are drawn, those of the data plate last.

    A value that is computed is no factor: its own parents stand in for it. What is `given` stands behind the bar of
    every local factor.
    """
    factors = []
    for name, site in structure.model.items():
        if site.role != "deterministic":
            parents = _through_computed(structure.model, site)
            behind = (*parents, *given) if site.local else parents
            potential = site.role == "factor"
            factors.append(Factor(() if potential else (name,), behind, site.local, potential))
    return sorted(factors, key=lambda factor: factor.local)


def guide_factors(structure: Structure, reads: tuple[str, ...] = ()) -> list[Factor]:
    """The guide's factors: one a site where its parents are known, else one for the global and one for the local.

    What an autoguide draws on the way to the model's latents is left out.
    """
    drawn = {n: s for n, s in structure.guide.items() if s.role == "latent" and n in structure.latents}
    if any(site.parents for site in drawn.values()):
        parents = {n: [p for p in _through_computed(structure.guide, s) if p in drawn] for n, s in drawn.items()}
        each = [Factor((n,), (*parents[n], *(reads if s.local else ())), s.local) for n, s in drawn.items()]
        return sorted(each, key=lambda factor: factor.local)
    shared = tuple(n for n, s in drawn.items() if not s.local)
    local = tuple(n for n, s in drawn.items() if s.local)
    factors = [Factor(shared, () if local else reads, False)] if shared else []
    return [*factors, Factor(local, reads, True)] if local else factors


def _through_computed(sites: Mapping[str, Site], site: Site, seen: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A site's parents, with those of a computed value in its place."""
    found: list[str] = []
    for parent in site.parents:
        if parent in seen:
            continue
        computed = parent in sites and sites[parent].role == "deterministic"
        found += _through_computed(sites, sites[parent], (*seen, parent)) if computed else [parent]
    return tuple(dict.fromkeys(found))


# Formulas


def text(letter: str, names: Sequence[str], given: Sequence[str], factors: Sequence[Factor]) -> str:
    """`p(x, z | y) = p(z | y) p(x | z, y)`; of a long product the beginning and the end."""
    left = _density(letter, _elided(names), given)
    right = [f"ψ({', '.join(f.parents)})" if f.potential else _density(letter, f.sites, f.parents) for f in factors]
    sign = "∝" if any(f.potential for f in factors) else "="
    return left if right == [left] else f"{left} {sign} {' '.join(_elided(right))}"


def _density(letter: str, names: Iterable[str], given: Iterable[str]) -> str:
    behind = ", ".join(given)
    return f"{letter}({', '.join(_elided(names))}{' | ' if behind else ''}{behind})"


def _elided(items: Iterable[str], most: int = 8) -> list[str]:
    items = list(items)
    return items if len(items) <= most else [*items[:3], "⋯", *items[-2:]]


def latex(
    letter: str, names: Sequence[str], given: Sequence[str], factors: Sequence[Factor], per_row: Iterable[str]
) -> str:
    r"""The same in LaTeX, with \prod over the rows n of what is local; `per_row` names the arrays."""
    weights = {"p": "theta", "q": "phi"}.get(letter)
    head = rf"{letter}_\{weights}" if weights and weights not in names else letter
    local = {site for f in factors if f.local for site in f.sites} | set(per_row)

    def written(sites: Iterable[str], parents: Iterable[str], indexed: bool, head: str = head) -> str:
        before, behind = ([_tex(n, indexed and n in local) for n in part] for part in (sites, parents))
        bar = r" \mid " if before and behind else ""
        return f"{head}({', '.join(_dots(before))}{bar}{', '.join(_dots(behind))})"

    factor = {f: written(f.sites, f.parents, f.local, r"\psi" if f.potential else head) for f in factors}
    outer = [factor[f] for f in factors if not f.local]
    inner = [factor[f] for f in factors if f.local]
    if inner:
        outer.append(r"\prod_{n=1}^{N} " + r"\, ".join(_dots(inner)))
    sign = r"\propto" if any(f.potential for f in factors) else "="
    return f"{written(names, given, False)} {sign} " + r"\, ".join(outer)


def _dots(terms: Iterable[str]) -> list[str]:
    return [r"\cdots" if term == "⋯" else term for term in _elided(terms)]


def _tex(name: str, indexed: bool) -> str:
    """A site's name in LaTeX: Greek words as letters, a number behind `_` as subscript, the row as n."""
    found = re.fullmatch(r"(.+?)_(\d+)", name)
    stem, number = (found[1], found[2]) if found else (name, "")
    word = stem.replace("_", r"\_")
    body = f"\\{stem}" if stem in _GREEK else stem if len(stem) == 1 else rf"\mathrm{{{word}}}"
    below = ",".join(part for part in (number, "n" if indexed else "") if part)
    return f"{body}_{{{below}}}" if below else body
