"""Which parameter feeds which argument of a site: what decides whether EM has a closed form.

The Jacobian of an argument over the parameters has rows with a single one where the argument is a gather of parameter
entries (`locations[z]`). It is read off runs of the program: every parameter entry gets a value of its own, and the
entry of an argument that shows that value, and shows the new one in a second run, is fed by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probgen.em.exponential import family_of

Arguments = Mapping[str, Mapping[str, np.ndarray]]  # site -> argument -> [S, E, *event]
CONSTANT = -1  # in an index: no parameter feeds this entry


@dataclass(frozen=True)
class Vector:
    """All parameter entries in one vector; `slot` maps each to the first entry that always has the same value."""

    shapes: Mapping[str, tuple[int, ...]]
    slot: np.ndarray

    @property
    def size(self) -> int:
        """How many entries there are."""
        return len(self.slot)

    def places(self) -> dict[str, slice]:
        """Where each parameter lies."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        return {n: slice(int(e) - int(np.prod(s)), int(e)) for (n, s), e in zip(self.shapes.items(), ends, strict=True)}


@dataclass(frozen=True)
class Link:
    """One argument of a site that parameters feed entry by entry: `index` [S, E, *event] into the vector of entries."""

    site: str
    argument: str
    index: np.ndarray
    parameters: tuple[str, ...]

    def groups(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Of a matrix argument: the group of each cell [S·E], and each group's slots [G, D, D]; None if diagonal."""
        size = self.index.shape[-1]
        blocks = self.index.reshape(-1, size, size)
        if (blocks[:, ~np.eye(size, dtype=bool)] == CONSTANT).all():
            return None
        slots, group = np.unique(blocks, axis=0, return_inverse=True)
        return group.reshape(-1), slots


@dataclass(frozen=True)
class Wiring:
    """What feeds what: `closed` links in the order of their updates, and why other parameters take gradient steps."""

    vector: Vector
    closed: tuple[Link, ...]
    steps: Mapping[str, str] = field(default_factory=dict)

    def without(self, name: str, why: str) -> Wiring:
        """The same with gradient steps for one more parameter, and for those that share its links."""
        out = {name}.union(*(link.parameters for link in self.closed if name in link.parameters))
        kept = tuple(link for link in self.closed if not out & set(link.parameters))
        return Wiring(self.vector, kept, {**self.steps, **dict.fromkeys(sorted(out), why)})

    def lines(self) -> list[tuple[str, str, str]]:
        """A row for each parameter: its name, what it feeds, how it is learned."""
        rows = []
        for name in self.vector.shapes:
            link = next((link for link in self.closed if name in link.parameters), None)
            if link is not None:
                simplex = link.argument == "probs" and link.index.ndim == 3
                how = "closed form (simplex)" if simplex else f"closed form{_pooled(link)}"
                rows.append((name, f"{link.site}.{link.argument}", how))
            else:
                rows.append((name, "", f"gradient steps: {self.steps[name]}" if name in self.steps else "not trained"))
        return rows

    def __str__(self) -> str:
        return "; ".join(
            f"{name} -> {feeds}: {how}" if feeds else f"{name}: {how}" for name, feeds, how in self.lines()
        )


def _pooled(link: Link) -> str:
    cells = link.index.reshape(link.index.shape[0] * link.index.shape[1], -1)
    return ", tied" if len(np.unique(cells, axis=0)) < len(cells) else ""


def fillings(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Two fillings of unconstrained leaves in which no two entries are alike, nor any entry twice the same."""
    random, total = np.random.default_rng(seed), sum(int(np.prod(shape)) for shape in shapes.values())
    found = []
    for low, high in ((-0.9, 0.95), (1.05, 2.9)):
        values, start, filled = random.permutation(np.linspace(low, high, total)), 0, {}
        for name, shape in shapes.items():
            stop = start + int(np.prod(shape))
            filled[name], start = values[start:stop].reshape(shape), stop
        found.append(filled)
    return found


def wired(
    families: Mapping[str, str],
    params: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    arguments: tuple[Arguments, Arguments],
    swapped: Callable[[str], tuple[Arguments, Mapping[str, np.ndarray]]],
    densities: Mapping[str, np.ndarray],
) -> Wiring:
    """Find the links of sites with an exponential family.

    Parameters
    ----------
    families
        The sites to look at, and the class name of each one's distribution.
    params, arguments
        Constrained parameters in two fillings, and the arguments that they gave.
    swapped
        For a parameter's name: arguments, and densities of all other sites, of the first filling with that parameter
        as in the second.
    densities
        The densities of all other sites in the first filling.
    """
    vector = _vector(*params)
    first, second = (_flat(filled) for filled in params)
    found = [link for site in families for link in _links(site, families[site], vector, first, second, arguments)]
    use: dict[str, list[Link]] = {}
    for link in found:
        for name in link.parameters:
            use.setdefault(name, []).append(link)
    steps: dict[str, str] = {}
    for name in vector.shapes:
        changed, others = swapped(name)
        touched = _touched(arguments[0], changed) | {
            (site, "") for site in others if _differ(densities[site], others[site])
        }
        why = _objection(name, use.get(name, []), touched, families)
        if why and touched:
            steps[name] = why
    closed = Wiring(vector, tuple(found), {})
    for name, why in steps.items():
        closed = closed.without(name, why)
    return Wiring(vector, closed.closed, {**closed.steps, **steps})


def _vector(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> Vector:
    a, b = _flat(first), _flat(second)
    order = np.lexsort((np.arange(len(a)), b, a))
    slot, leader = np.arange(len(a)), -1
    for place in order:
        leader = place if leader < 0 or not (_close(a[place], a[leader]) and _close(b[place], b[leader])) else leader
        slot[place] = leader
    return Vector({name: np.shape(value) for name, value in first.items()}, slot)


def _flat(params: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(value, np.float64).reshape(-1) for value in params.values()] or [np.zeros(0)])


def _close(a: Any, b: Any) -> Any:
    return np.abs(a - b) <= 1e-5 * np.maximum(np.abs(a), np.abs(b)) + 1e-12


def _links(
    site: str, kind: str, vector: Vector, first: np.ndarray, second: np.ndarray, arguments: tuple[Arguments, Arguments]
) -> list[Link]:
    family, one, two = family_of(kind), arguments[0][site], arguments[1][site]
    found: list[Link] = []
    for argument in family.closed:
        if any(_same_thing(family, argument, link.argument) for link in found):
            continue
        index = _matched(one[argument], two[argument], vector, first, second)
        if index is None or not _has_closed_form(family, argument, index):
            continue
        if argument == "loc" and not _shares_scale(index, family, one, two):
            continue
        owners = {
            name for name, place in vector.places().items() if np.isin(_members(vector, index), _range(place)).any()
        }
        found.append(Link(site, argument, index, tuple(n for n in vector.shapes if n in owners)))
    return found


def _matched(
    one: np.ndarray, two: np.ndarray, vector: Vector, first: np.ndarray, second: np.ndarray
) -> np.ndarray | None:
    """The slot that feeds each entry, CONSTANT where none does; None where an entry is computed in another way."""
    a, b = one.reshape(-1).astype(np.float64), two.reshape(-1).astype(np.float64)
    index = np.full(len(a), CONSTANT)
    moving = ~_close(a, b)
    order = np.argsort(first, kind="stable")
    near = np.searchsorted(first[order], a[moving])
    best = np.full(int(moving.sum()), CONSTANT)
    for shift in (-2, -1, 0, 1, 2):
        place = order[np.clip(near + shift, 0, len(order) - 1)] if len(order) else near
        hit = _close(first[place], a[moving]) & _close(second[place], b[moving]) if len(order) else best > CONSTANT
        best = np.where((best == CONSTANT) & hit, place, best)
    if (best == CONSTANT).any() or not len(best):
        return None
    index[moving] = vector.slot[best]
    return index.reshape(one.shape)


def _has_closed_form(family: Any, argument: str, index: np.ndarray) -> bool:
    """Blocks of a matrix or a simplex must be whole, and shared as a whole or not at all."""
    rank = family.ranks.get(argument, 0)
    if argument == "loc" or rank == 0:
        return True
    size = index.shape[-1]
    cells = index.reshape(-1, *index.shape[2:])
    if rank == 1:
        part = np.ones(size, bool)
    else:
        eye = np.eye(size, dtype=bool)
        part = eye if (cells[:, ~eye] == CONSTANT).all() else np.tril(np.ones((size, size), bool))
        if part is eye:
            return bool((cells[:, eye] != CONSTANT).all())
    entries = cells[:, part].reshape(len(cells), -1)
    if (entries == CONSTANT).any() or any(len(np.unique(row)) < len(row) for row in entries):
        return False
    blocks = np.unique(entries, axis=0)
    return len(np.unique(blocks)) == blocks.size


def _shares_scale(index: np.ndarray, family: Any, one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]) -> bool:
    """Whether all cells that one entry of a location feeds have the same scale, so that a plain mean is its maximum."""
    scale = family.reads[1]
    cells = index.shape[0] * index.shape[1]
    _, lead, group = np.unique(index.reshape(cells, -1), return_index=True, return_inverse=True)
    width = max(1, index.size // cells)
    own, leader = np.arange(index.size) // width, (lead // width)[group.reshape(-1)]
    fed = index.reshape(-1) != CONSTANT
    flat = [filled[scale].reshape(cells, -1) for filled in (one, two)]
    return all(bool(_close(values[own], values[leader])[fed].all()) for values in flat)


def _members(vector: Vector, index: np.ndarray) -> np.ndarray:
    """All entries that share a slot with an index."""
    return np.flatnonzero(np.isin(vector.slot, index[index != CONSTANT]))


def _range(place: slice) -> np.ndarray:
    return np.arange(place.start, place.stop)


def _same_thing(family: Any, one: str, other: str) -> bool:
    """Whether two arguments say the same in other words: scale_tril and covariance_matrix, probs and logits."""
    if family.located:
        return (one == "loc") == (other == "loc")
    return "total_count" not in (one, other)


def _touched(before: Arguments, after: Arguments) -> set[tuple[str, str]]:
    return {(site, name) for site in before for name in before[site] if _differ(before[site][name], after[site][name])}


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape != b.shape or not bool(_close(np.nan_to_num(a), np.nan_to_num(b)).all())


def _objection(name: str, links: list[Link], touched: set[tuple[str, str]], families: Mapping[str, str]) -> str:
    """Why a parameter has no closed form; empty if it has."""
    beyond = [
        f"{site}.{argument}" if argument else site
        for site, argument in sorted(touched)
        if not any(
            link.site == site and argument and _same_thing(family_of(families[site]), argument, link.argument)
            for link in links
        )
    ]
    if not links:
        return f"it is not itself an argument of {_listed(beyond)}" if beyond else ""
    if len(links) > 1:
        return "it feeds " + " and ".join(f"{link.site}.{link.argument}" for link in links)
    return f"it also enters {_listed(beyond)}" if beyond else ""


def _listed(words: list[str]) -> str:
    return ", ".join(words[:2]) + (", ..." if len(words) > 2 else "")
