"""Which axes of which latents belong to the components of a mixture, found by running the program.

    p(x_n, z_n = σ(k) | θ) = p(x_n, z_n = k | σθ)   for all k, n,   and   p(θ) = p(σθ)

Components are exchangeable if the density does not change when they are renumbered: the states of z and, at the same
time, one axis of every latent that holds something for each component. Names play no part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from probgen.program import Structure
from probgen.sites import numbered

MOST_AXES = 6  # beyond, only the first axis of the right length of each latent is tried
PROBES, ROWS = 3, 64  # draws and rows that a renumbering is tried on
TOLERANCE = 1e-3  # relative, of float32 sums over rows

Axes = dict[str, tuple[int, ...]]


def state_sites(structure: Structure) -> list[str]:
    """The enumerated latents with one value a row."""
    return [n for n, s in structure.enumerated.items() if s.local and all(plate.data for plate in s.plates)]


def component_axes(
    trained: Any, arrays: Mapping[str, np.ndarray], variables: Mapping[str, np.ndarray], site: str
) -> Axes | None:
    """The axes, counted without that of draws, that are renumbered with the states of `site`; None if there are none.

    `variables` are draws [S, ...] of the latents that are not enumerated, a numbered series being one of them. Of
    several such sets of axes, which can differ only in latents that the data say nothing of, it is the largest.
    """
    shared = [n for n, s in trained.structure.latents.items() if not s.local]
    shared += [base for base, names in numbered(trained.structure.latents).items() if names[0] in shared]
    some = np.unique(np.linspace(0, len(next(iter(variables.values()), [0])) - 1, PROBES).astype(int))
    probes = {name: np.asarray(values)[some] for name, values in variables.items()}
    local = {n for n, s in trained.structure.latents.items() if s.local}
    rows = {name: np.asarray(a)[:ROWS] for name, a in arrays.items()}
    local |= {base for base, names in numbered(trained.structure.latents).items() if names[0] in local}
    probes = {n: v[:, :ROWS] if n in local else v for n, v in probes.items()}
    tables, prior = trained.log_states(rows, sites_of(trained.structure, probes), [site])
    states = tables[site].shape[-1]
    for axes in _candidates({n: np.shape(v)[1:] for n, v in probes.items() if n in shared}, states):
        if all(_invariant(trained, rows, probes, axes, site, order, tables[site], prior) for order in _orders(states)):
            return axes
    return None


def _orders(states: int) -> list[np.ndarray]:
    """A cycle and a swap: every order is made of these two."""
    cycle, swap = np.roll(np.arange(states), 1), np.arange(states)
    swap[:2] = swap[:2][::-1]
    return [cycle, swap] if states > 2 else [swap]


def _invariant(
    trained: Any,
    rows: Mapping[str, np.ndarray],
    probes: Mapping[str, np.ndarray],
    axes: Axes,
    site: str,
    order: np.ndarray,
    table: np.ndarray,
    prior: np.ndarray,
) -> bool:
    """Whether renumbered latents have the density of the others, with the states renumbered."""
    moved = renumbered(probes, axes, np.broadcast_to(order, (len(table), len(order))))
    there, prior_there = trained.log_states(rows, sites_of(trained.structure, moved), [site])
    return _close(there[site], table[..., order]) and _close(prior_there, prior)


def renumbered(variables: Mapping[str, np.ndarray], axes: Axes, order: np.ndarray) -> dict[str, np.ndarray]:
    """Draws [S, ...] whose component k is what was component `order[s, k]`, `order` [S, K]."""
    moved = dict(variables)
    for name, found in axes.items():
        value = np.asarray(moved[name])
        for axis in found:
            index = order.reshape(len(order), *(-1 if i == axis else 1 for i in range(value.ndim - 1)))
            value = np.take_along_axis(value, index, axis + 1)
        moved[name] = value
    return moved


def sites_of(structure: Structure, variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Draws by site: a numbered series that is one variable is taken apart again."""
    values = dict(variables)
    for base, names in numbered(structure.latents).items():
        if base in values and base not in structure.latents:
            series = values.pop(base)
            axis = 2 if structure.latents[names[0]].local else 1
            values |= {name: np.take(series, i, axis=axis) for i, name in enumerate(names)}
    return values


def _candidates(shapes: Mapping[str, tuple[int, ...]], states: int) -> Iterator[Axes]:
    """Sets of axes as long as there are states: first the first one of each latent, then all sets, large ones first."""
    fitting = [(name, i) for name, shape in shapes.items() for i, size in enumerate(shape) if size == states]
    first = tuple((name, i) for name, i in fitting if i == min(j for n, j in fitting if n == name))
    rest: Iterator[tuple] = iter(())
    if len(fitting) <= MOST_AXES:
        sizes = range(len(fitting), 0, -1)
        rest = (chosen for size in sizes for chosen in itertools.combinations(fitting, size) if chosen != first)
    for chosen in itertools.chain([first] if first else [], rest):
        yield {name: tuple(i for n, i in chosen if n == name) for name, _ in chosen}


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(np.abs(a - b) <= TOLERANCE * (1 + np.abs(b))) and np.isfinite(a).all())
