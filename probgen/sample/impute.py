r"""`sample(n, given={"x": row with NaN})`: exact draws of what is not known, given what is.

.. math::
    p(s \mid x_k, \theta) \propto p(s \mid \theta) \, p(x_k \mid s, \theta), \qquad
    v_u \mid v_k, s \sim \mathcal N\!\big(m_u + C_{uk} C_{kk}^{-1} (v_k - m_k),\; C_{uu} - C_{uk} C_{kk}^{-1} C_{ku}\big)

in the notation of `joint`: the known entries weigh the states; within a state the Gaussian sites are conditioned in
closed form, and the other data sites are independent. Global latents are drawn from the guide T times and weighed:

.. math:: p(x_u \mid x_k, D) \propto \int p(x_u \mid x_k, \theta)\, p(x_k \mid \theta)\, q(\theta)\, d\theta

which is exact as T grows, where q is the posterior; without global latents every draw is exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from probgen.chunks import particles, pieces, seed_at
from probgen.errors import ProbgenError
from probgen.program import Structure
from probgen.sample.joint import EXACT, Joint, Roles, Run, joint_of, roles_of
from probgen.sample.known import Known

GLOBAL_DRAWS = 1000  # T
FEW = 20  # effective draws of the global latents below which it is said
DRAW, GLOBAL = 0, 1  # places of the seeds
AUTOREGRESSIVE = "Autoregressive"  # the family that completes what it has begun

Draws = dict[str, np.ndarray]


def impute(
    trained: Any, known: Known, arrays: Mapping[str, np.ndarray], n: int, seed: int = 0, prior: bool = False
) -> tuple[Draws, Draws]:
    """`n` draws of every site given the known entries, in the program's units: those with an axis of rows, and others.

    `arrays` are `n` prepared rows of all that the program reads. Every row has its own draw of the global latents,
    from the guide or, with `prior`, from the model.

    Raises:
        ProbgenError: the program is no mixture and not linear-Gaussian, or the known entries have no density.
    """
    structure = trained.structure
    if structure.kind not in ("exact", "latent") or not structure.data_plates:
        what = f"is {structure.kind}" if structure.data_plates else "has no data plate"
        raise ProbgenError(f"sample: {EXACT}, and this program {what}")
    _refuse_unguided(structure, prior)
    if AUTOREGRESSIVE in {site.family for site in structure.observed.values()}:
        return _completed(trained, known, arrays, seed_at(seed, DRAW)), {}
    cases = Cases.of(known, {name: arrays[name] for name, role in structure.arrays.items() if role == "given"}, n)
    rng = np.random.default_rng(seed_at(seed, DRAW))
    thetas = global_draws(trained, arrays, GLOBAL_DRAWS, seed_at(seed, GLOBAL), prior)
    runs = [[_run(trained, arrays, theta, row) for row in cases.contexts] for theta in thetas]
    roles = roles_of(runs[0][0], structure)
    chosen = np.zeros(n, np.int64) if len(thetas) == 1 else _chosen(runs, roles, cases, rng)
    parts, order = [], []
    for t in np.unique(chosen):
        for c, run in enumerate(runs[t]):
            rows = np.flatnonzero((chosen == t) & (cases.context[cases.of_row] == c))
            for size in pieces(len(rows), particles(structure)) if len(rows) else ():
                taken, rows = rows[:size], rows[size:]
                drawn = _draw(run, joint_of(run, roles), cases, taken, rng, seed_at(seed, DRAW, len(parts)))
                parts.append(drawn | {name: np.repeat(v[None], size, axis=0) for name, v in thetas[t].items()})
                order.append(taken)
    return _joined(parts, np.argsort(np.concatenate(order)), structure)


def _completed(trained: Any, known: Known, arrays: Mapping[str, np.ndarray], seed: int) -> Draws:
    """Draws of one autoregressive site whose known entries come first in its order, and of nothing else."""
    structure = trained.structure
    others = [name for name in (*structure.latents, *structure.observed) if name not in known.values]
    if others:
        raise ProbgenError(
            f"sample: an autoregressive site is completed exactly where it is all that a program draws, and this one has "
            f"{others[0]!r} too: give all of a row, or nothing"
        )
    return trained.complete(arrays, known.values, seed)


def _refuse_unguided(structure: Structure, prior: bool) -> None:
    free = [name for name, site in structure.latents.items() if not site.local and name not in structure.guide]
    if free and not prior:
        raise ProbgenError(f"sample: {EXACT}, and the global latent {free[0]!r} has no guide")


@dataclass(frozen=True)
class Cases:
    """The different rows that are given: U of them, among C contexts of given arrays, and the case of each draw.

    `values` maps sites to [U, *shape] with NaN where not known; `contexts` are indices of rows of the arrays.
    """

    values: Mapping[str, np.ndarray]
    context: np.ndarray
    contexts: np.ndarray
    of_row: np.ndarray

    @classmethod
    def of(cls, known: Known, given: Mapping[str, np.ndarray], n: int) -> Cases:
        """Equal rows are one case."""
        contexts, context = _unique([np.asarray(value).reshape(n, -1) for value in given.values()], n)
        flat = [value.reshape(n, -1) for value in known.values.values()]
        marks = [np.isnan(value) for value in flat]
        first, of_row = _unique([np.nan_to_num(value) for value in flat] + marks + [context[:, None]], n)
        values = {name: value[first] for name, value in known.values.items()}
        return cls(values, context[first], contexts, of_row)

    def site(self, name: str, roles: Roles, of: np.ndarray) -> np.ndarray:
        """A site's values in some cases, [len(of), *shape], NaN where not known."""
        if name in self.values:
            return self.values[name][of]
        return np.full((len(of), *roles.shapes[name]), np.nan)


def _unique(columns: list[np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the first of equal rows, and for each row which of these it is."""
    if not columns:
        return np.zeros(1, np.int64), np.zeros(n, np.int64)
    _, first, which = np.unique(np.concatenate(columns, axis=1), axis=0, return_index=True, return_inverse=True)
    return first, which.reshape(n)


def global_draws(
    trained: Any, arrays: Mapping[str, np.ndarray], number: int, seed: int, prior: bool = False
) -> list[Draws]:
    """`number` draws of the global latents from the guide or, with `prior`, the model; one empty one if there are none."""
    structure = trained.structure
    names = [name for name, site in structure.latents.items() if not site.local]
    if not names:
        return [{}]
    row = {name: value[:1] for name, value in arrays.items()}
    draws = [trained.draw(1, seed_at(seed, i), row, prior=prior) for i in range(number)]
    return [{name: draw[name].reshape(structure.model[name].shape) for name in names} for draw in draws]


def _run(trained: Any, arrays: Mapping[str, np.ndarray], theta: Draws, row: int) -> Run:
    """Runs of the model at one draw of the global latents, with one row of the given arrays for all."""

    def run(held: Mapping[str, np.ndarray], rows: int, seed: int = 0) -> Mapping[str, Any]:
        repeated = {name: np.repeat(value[row : row + 1], rows, axis=0) for name, value in arrays.items()}
        return trained.cells(repeated, {**theta, **held}, seed)

    return run


def _chosen(runs: list[list[Run]], roles: Roles, cases: Cases, rng: np.random.Generator) -> np.ndarray:
    """Which draw of the global latents each row gets: t with probability ∝ p(known | θ_t), [n]."""
    evidence = np.empty((len(runs), len(cases.context)))
    for t, contexts in enumerate(runs):
        for c, run in enumerate(contexts):
            of = np.flatnonzero(cases.context == c)
            joint = joint_of(run, roles)
            evidence[t, of] = logsumexp(_log_weights(run, joint, cases, of), axis=1)
    weights = np.exp(evidence - logsumexp(evidence, axis=0))
    effective = 1 / (weights**2).sum(0)
    if effective.min() < FEW:
        warnings.warn(
            f"sample: the known entries leave {effective.min():.1f} effective draws of {len(runs)} of the global latents, "
            "so the draws are only roughly those of the conditional",
            stacklevel=4,
        )
    uniform = rng.random(len(cases.of_row))
    return (np.cumsum(weights, axis=0)[:, cases.of_row] < uniform).sum(0).clip(max=len(runs) - 1)


def _log_weights(run: Run, joint: Joint, cases: Cases, of: np.ndarray) -> np.ndarray:
    """log p(s) + log p(known | s) of some cases, [len(of), S]."""
    roles, found = joint.roles, np.repeat(joint.log_prior[None], len(of), axis=0)
    for name in roles.switches:
        given = cases.site(name, roles, of)[:, None]
        agrees = (np.isnan(given) | (given == joint.states[name])).reshape(*found.shape, -1).all(-1)
        found = np.where(agrees, found, -np.inf)
    for name in roles.others:
        found += _other(name, run, joint, cases.site(name, roles, of))
    v = _gaussian_values(cases, roles, of)
    for part in _patterns(v):
        found[part] += Conditional.of(joint, ~np.isnan(v[part[0]])).log_density(v[part])
    lost = ~np.isfinite(found).any(axis=1) | np.isnan(found).any(axis=1)
    if lost.any():
        raise ProbgenError(
            "sample: the known entries have no density under the program: they lie outside the support of their site"
        )
    return found


def _other(name: str, run: Run, joint: Joint, given: np.ndarray) -> np.ndarray:
    """log p of the known blocks of a data site that is independent given the state, [U, S]."""
    roles, S = joint.roles, len(joint.log_prior)
    known = ~np.isnan(given)
    blocks = known.reshape(len(given), *roles.blocks[name], -1)
    if (blocks.any(-1) & ~blocks.all(-1)).any():
        raise ProbgenError(
            f"sample: {EXACT}, and the entries of the site {name!r} are not independent: give all of a row, or nothing"
        )
    anything = roles.anything[name]
    filled = np.where(known, given, anything).astype(anything.dtype)
    if name in roles.supports and roles.supports[name].ndim == 1 and not np.isin(filled, roles.supports[name]).all():
        raise ProbgenError(f"sample: known entries of the site {name!r} lie outside its support")
    found, first = [], 0
    for size in pieces(len(given), max(1, 2**22 // (S * max(1, anything.size)))):
        rows = filled[first : first + size]
        held = {
            n: np.repeat(value[None], size, axis=0).reshape(-1, *value.shape[1:]) for n, value in joint.states.items()
        }
        held |= {n: np.repeat(roles.anything[n][None], size * S, axis=0) for n in roles.others}
        held |= roles.split(np.zeros((size * S, roles.size)))
        log_prob = run(held | {name: np.repeat(rows, S, axis=0)}, size * S)[name].log_prob
        log_prob = np.asarray(log_prob, np.float64).reshape(size, S, -1)
        counted = blocks.all(-1)[first : first + size].reshape(size, 1, -1)
        found.append(np.where(counted, log_prob, 0.0).sum(-1))
        first += size
    return np.concatenate(found)


def _gaussian_values(cases: Cases, roles: Roles, of: np.ndarray) -> np.ndarray:
    """v of some cases, [len(of), M], NaN where not known."""
    parts = [cases.site(name, roles, of).reshape(len(of), -1) for name in roles.gaussian]
    return np.concatenate(parts, axis=1) if parts else np.zeros((len(of), 0))


def _patterns(v: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of v that know the same entries, set by set."""
    _, which = np.unique(np.isnan(v), axis=0, return_inverse=True)
    for pattern in range(which.max() + 1):
        yield np.flatnonzero(which.reshape(-1) == pattern)


@dataclass(frozen=True)
class Conditional:
    """N(v_u | v_k, s) for one set of known entries: gains C_uk C_kk⁻¹ and square roots of the covariances, by state."""

    known: np.ndarray
    mean: np.ndarray
    factor: np.ndarray
    gain: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, joint: Joint, known: np.ndarray) -> Conditional:
        """Condition the Gaussian sites of a joint on the entries marked `known`, [M]."""
        C = joint.covariance
        across = C[:, known][:, :, ~known]
        try:
            factor = np.linalg.cholesky(C[:, known][:, :, known])
        except np.linalg.LinAlgError as error:
            raise ProbgenError(
                "sample: the known entries have a singular covariance under the program, so they cannot be held fixed"
            ) from error
        half = np.linalg.solve(factor, across)  # L⁻¹ C_ku
        gain = np.linalg.solve(factor.transpose(0, 2, 1), half).transpose(0, 2, 1)
        rest = C[:, ~known][:, :, ~known] - half.transpose(0, 2, 1) @ half
        return cls(known, joint.mean, factor, gain, rest)

    def log_density(self, v: np.ndarray) -> np.ndarray:
        """log N(v_k | m_k, C_kk), [U, S]."""
        away = (v[:, None, self.known] - self.mean[:, self.known]).transpose(1, 2, 0)
        whitened = np.linalg.solve(self.factor, away)
        log_det = np.log(np.diagonal(self.factor, axis1=1, axis2=2)).sum(1)
        constant = 0.5 * self.known.sum() * np.log(2 * np.pi)
        return (-0.5 * (whitened**2).sum(1) - log_det[:, None] - constant).T

    def draw(self, v: np.ndarray, states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """v with the unknown entries drawn, given the state of each row, [R, M]."""
        found, noise = v.copy(), rng.normal(size=(len(v), int((~self.known).sum())))
        for s in np.unique(states):
            rows = np.flatnonzero(states == s)
            size, vectors = np.linalg.eigh(self.covariance[s])
            root = vectors * np.sqrt(np.maximum(size, 0.0))
            away = v[np.ix_(rows, self.known)] - self.mean[s, self.known]
            found[np.ix_(rows, ~self.known)] = self.mean[s, ~self.known] + away @ self.gain[s].T + noise[rows] @ root.T
        return found


def _draw(
    run: Run, joint: Joint, cases: Cases, rows: np.ndarray, rng: np.random.Generator, seed: int
) -> dict[str, np.ndarray]:
    """Every site of some of the draws, given the known entries of their cases."""
    roles = joint.roles
    of, case = np.unique(cases.of_row[rows], return_inverse=True)
    case = case.reshape(-1)
    log_weights = _log_weights(run, joint, cases, of)
    weights = np.exp(log_weights - logsumexp(log_weights, axis=1, keepdims=True))
    states = (np.cumsum(weights, axis=1)[case] < rng.random((len(rows), 1))).sum(1).clip(max=weights.shape[1] - 1)
    v = _gaussian_values(cases, roles, of)[case]
    for part in _patterns(v):
        v[part] = Conditional.of(joint, ~np.isnan(v[part[0]])).draw(v[part], states[part], rng)
    held = {name: value[states] for name, value in joint.states.items()} | roles.split(v)
    cells = run(held, len(rows), seed)
    for name in roles.others:
        given = cases.site(name, roles, of)[case]
        drawn = cells[name].value
        held[name] = np.where(np.isnan(given), drawn, given).astype(drawn.dtype)
    if roles.others and any(cell.family == "Delta" or cell.log_prob is None for cell in cells.values()):
        cells = run(held, len(rows), seed)  # deterministic sites may read what was known
    return {name: held[name] if name in roles.others else cell.value for name, cell in cells.items()}


def _joined(parts: list[Draws], order: np.ndarray, structure: Structure) -> tuple[Draws, Draws]:
    """Parts of the rows joined and put in order; what has no axis of rows is that of one part."""
    by_row, whole = {}, {}
    for name in (name for name in structure.model if name in parts[0]):
        sizes = [len(np.atleast_1d(part[name])) for part in parts]
        if sum(sizes) == len(order):
            by_row[name] = np.concatenate([part[name] for part in parts])[order]
        else:
            whole[name] = parts[0][name]
    return by_row, whole
