r"""The joint distribution of one datum's sites where it is known exactly: mixtures and linear-Gaussian programs.

.. math::
    p(s) \; \mathcal N(v \mid m_s, C_s) \; \prod_j p(x_j \mid s), \qquad v = c_s + A_s v + F_s \eta, \quad
    m_s = (I - A_s)^{-1} c_s, \quad C_s = G_s G_s^\top, \quad G_s = (I - A_s)^{-1} F_s

The states s run over the joint values of the discrete latents; v stacks the Gaussian sites, latents and data alike; the
other data sites x_j are independent given s. That a program has this form is found out by running it at chosen
values: A from unit vectors, and a refusal where means are not linear or a density depends on what it may not.

References:
    | Pattern Recognition and Machine Learning (Bishop, 2006), sections 2.3, 8.1.4 and 12.2
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from probgen import chunks
from probgen.cells import Cell, row_shape
from probgen.errors import ProbgenError
from probgen.program import Structure

Cells = Mapping[str, Cell]
Run = Callable[..., Cells]
"""`run(held, rows, seed=0)`: the cells of a run of so many rows with values of local sites held."""

STATES = 10_000  # joint values of the discrete latents that are enumerated
TRIED = 16  # rows of the draws at which dependencies are looked for
EXACT = "the known entries can be held fixed exactly only in mixtures and linear-Gaussian programs"


@dataclass(frozen=True)
class Roles:
    """What each local site is: a switch (a discrete site that is enumerated), Gaussian, or another data site.

    `shapes` are those of one row, `blocks` the number of independent parts of a row, `supports` what a part of a
    switch can be; `anything` holds a valid value of every other data site. `moving` are the Gaussian sites that
    other Gaussian sites may depend on.
    """

    switches: tuple[str, ...]
    gaussian: tuple[str, ...]
    others: tuple[str, ...]
    moving: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    blocks: Mapping[str, tuple[int, ...]]
    supports: Mapping[str, np.ndarray]
    anything: Mapping[str, np.ndarray]

    @property
    def slices(self) -> dict[str, slice]:
        """Where each Gaussian site lies in v."""
        ends = np.cumsum([0, *(int(np.prod(self.shapes[name])) for name in self.gaussian)])
        return {name: slice(*ends[i : i + 2]) for i, name in enumerate(self.gaussian)}

    @property
    def size(self) -> int:
        """The length of v."""
        return sum(int(np.prod(self.shapes[name])) for name in self.gaussian)

    def states(self) -> dict[str, np.ndarray]:
        """Every joint value of the switches, {name: [S, *shape]}; S = 1 where there is none."""
        choices = [range(len(self.supports[n])) for n in self.switches for _ in range(int(np.prod(self.blocks[n])))]
        number = int(np.prod([len(choice) for choice in choices], dtype=np.float64))
        if number > STATES:
            raise ProbgenError(
                f"sample: the discrete sites {', '.join(map(repr, self.switches))} have {number:,} joint values a row, "
                f"more than the {STATES:,} that are enumerated to hold known entries fixed"
            )
        index = np.array(list(itertools.product(*choices)), dtype=np.int64).reshape(number, len(choices))
        found, first = {}, 0
        for name in self.switches:
            width = int(np.prod(self.blocks[name]))
            picked = self.supports[name][index[:, first : first + width]]
            found[name] = picked.reshape(number, *self.shapes[name])
            first += width
        return found

    def split(self, v: np.ndarray) -> dict[str, np.ndarray]:
        """v [..., M] by site, [..., *shape]."""
        return {n: v[..., part].reshape(*v.shape[:-1], *self.shapes[n]) for n, part in self.slices.items()}


def roles_of(run: Run, structure: Structure) -> Roles:
    """What each local site is, from draws of the model and from runs in which one site at a time takes other values.

    Raises:
        ProbgenError: naming the site that is neither of a mixture nor linear-Gaussian.
    """
    local = {n: s for n, s in structure.model.items() if s.role == "observed" or (s.role == "latent" and s.local)}
    cells = run({}, TRIED)
    for name, site in local.items():
        _refuse_unknown(name, cells[name], site.role == "latent")
    roles = Roles(
        switches=tuple(n for n, s in local.items() if s.role == "latent" and not cells[n].gaussian),
        gaussian=tuple(n for n in local if cells[n].gaussian),
        others=tuple(n for n, s in local.items() if s.role == "observed" and not cells[n].gaussian),
        moving=(),
        shapes={n: row_shape(site) for n, site in local.items()},
        blocks={n: cells[n].log_prob.shape[1:] for n in local},
        supports={n: cells[n].support for n in local if cells[n].support is not None},
        anything={n: cells[n].value[0] for n in local},
    )
    return _with_dependencies(roles, run, cells, structure)


def _refuse_unknown(name: str, cell: Cell, latent: bool) -> None:
    if cell.log_prob is None:
        raise ProbgenError(f"sample: {EXACT}, and the site {name!r} is masked")
    if latent and not cell.gaussian and cell.support is None:
        raise ProbgenError(
            f"sample: {EXACT}, and the latent {name!r} ({cell.family}) is neither enumerable nor Gaussian"
        )


def _with_dependencies(roles: Roles, run: Run, cells: Cells, structure: Structure) -> Roles:
    """Data that other sites depend on are switches where they can be enumerated; the rest must not be depended on."""
    held = {name: cells[name].value for name in roles.shapes}
    before = run(held, TRIED)

    def moved_by(*names: str) -> list[str]:
        after = run(held | {name: np.roll(held[name], 1, axis=0) for name in names}, TRIED)
        return [n for n in roles.shapes if n not in names and not _same(before[n], after[n])]

    for name in roles.others:
        for child in moved_by(name):
            if name not in roles.supports:
                raise ProbgenError(
                    f"sample: {EXACT}, and the site {child!r} depends on the data {name!r} ({cells[name].family})"
                )
            if name not in roles.switches:
                roles = replace(roles, switches=(*roles.switches, name))
    roles = replace(roles, others=tuple(n for n in roles.others if n not in roles.switches))
    for parent in roles.gaussian:
        for child in moved_by(parent):
            if child not in roles.gaussian:
                raise ProbgenError(
                    f"sample: {EXACT}, and the site {child!r} ({cells[child].family}) depends on the continuous "
                    f"{structure.model[parent].role} site {parent!r}"
                )
            if parent not in roles.moving:
                roles = replace(roles, moving=(*roles.moving, parent))
    return roles


def _same(a: Cell, b: Cell) -> bool:
    """Whether a site has the same distribution in two runs, seen at the same value."""
    pairs = [(a.log_prob, b.log_prob)] if a.mean is None else [(a.mean, b.mean), (a.scale, b.scale)]
    return all(np.allclose(x, y, rtol=1e-5, atol=1e-6, equal_nan=True) for x, y in pairs)


@dataclass(frozen=True)
class Joint:
    """log p(s) [S], and m_s [S, M], C_s [S, M, M] of the Gaussian sites v; `states` are the values of the switches."""

    roles: Roles
    states: Mapping[str, np.ndarray]
    log_prior: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray


def joint_of(run: Run, roles: Roles) -> Joint:
    """The joint of one datum's sites, from runs at v = 0, at unit vectors and at two random points."""
    states = roles.states()
    S, M = len(next(iter(states.values()), [0])), roles.size
    origin = _at(run, roles, states, np.zeros((1, M)))
    log_prior = sum((_total(origin[n].log_prob) for n in roles.switches), np.zeros(S))
    c = _means(origin, roles, S)
    F = _factors(origin, roles, S)
    A = np.zeros((S, M, M))
    free = np.concatenate([np.arange(M)[roles.slices[n]] for n in roles.moving] or [np.arange(0)])
    step = max(1, chunks.NUMBERS // max(1, S * sum(int(np.prod(origin[n].scale.shape[1:])) for n in roles.gaussian)))
    for first in range(0, len(free), step):
        columns = free[first : first + step]
        probed = _means(_at(run, roles, states, np.eye(M)[columns]), roles, S * len(columns))
        A[:, :, columns] = (probed.reshape(S, len(columns), M) - c[:, None]).transpose(0, 2, 1)
    if len(free):
        _refuse_nonlinear(run, roles, states, c, A, origin)
        inverse = np.linalg.inv(np.eye(M) - A)
        c, F = (inverse @ c[..., None])[..., 0], inverse @ F
    return Joint(roles, states, log_prior, c, F @ F.transpose(0, 2, 1))


def _at(run: Run, roles: Roles, states: Mapping[str, np.ndarray], points: np.ndarray) -> Cells:
    """Every state at every point v of [P, M]: rows run over states first, [S · P]."""
    S, P = len(next(iter(states.values()), [0])), len(points)
    held = {name: np.repeat(value, P, axis=0) for name, value in states.items()}
    held |= roles.split(np.tile(points, (S, 1)))
    held |= {n: np.broadcast_to(roles.anything[n], (S * P, *roles.shapes[n])) for n in roles.others}
    return run(held, S * P)


def _means(cells: Cells, roles: Roles, rows: int) -> np.ndarray:
    """The means of the Gaussian sites side by side, [rows, M]."""
    parts = [np.asarray(cells[name].mean, np.float64).reshape(rows, -1) for name in roles.gaussian]
    return np.concatenate([np.zeros((rows, 0)), *parts], axis=1)


def _factors(cells: Cells, roles: Roles, S: int) -> np.ndarray:
    """F, block by block: standard deviations, or the lower factors of covariances, [S, M, M]."""
    F = np.zeros((S, roles.size, roles.size))
    for name, part in roles.slices.items():
        scale = np.asarray(cells[name].scale, np.float64)
        width = scale.shape[-1] if scale.ndim > cells[name].value.ndim else 1  # of one jointly Gaussian block
        blocks = scale.reshape(S, -1, width, width)
        for i in range(blocks.shape[1]):
            place = slice(part.start + i * width, part.start + (i + 1) * width)
            F[:, place, place] = blocks[:, i]
    return F


def _refuse_nonlinear(
    run: Run, roles: Roles, states: Mapping[str, np.ndarray], c: np.ndarray, A: np.ndarray, origin: Cells
) -> None:
    """Refuse a mean that is not c + A v, or a scale that changes with v, at a small and at a large random v."""
    points = np.random.default_rng(0).normal(size=(2, roles.size)) * np.array([[1.0], [10.0]])
    for point in points:
        cells = _at(run, roles, states, point[None])
        means, linear = _means(cells, roles, len(c)), c + A @ point
        for name, part in roles.slices.items():
            size = np.abs(c[:, part]) + np.abs(A[:, part]) @ np.abs(point)
            if (np.abs(means[:, part] - linear[:, part]) > 1e-4 * size.max() + 1e-6).any():
                raise ProbgenError(
                    f"sample: {EXACT}, and the mean of the site {name!r} is not linear in what it depends on"
                )
            if not np.allclose(cells[name].scale, origin[name].scale, rtol=1e-4):
                raise ProbgenError(
                    f"sample: {EXACT}, and the scale of the site {name!r} depends on the continuous latents"
                )


def _total(log_prob: np.ndarray) -> np.ndarray:
    """Summed over the blocks of a row, [R]."""
    return np.asarray(log_prob, np.float64).reshape(len(log_prob), -1).sum(1)
