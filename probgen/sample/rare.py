r"""Probabilities of rare events by importance sampling, where the density of the data is exact.

.. math::
    P(s(x) > 0) = \operatorname{E}_q \frac{p(x)}{q(x)} 1\{s(x) > 0\}, \qquad q = \alpha\, p + (1 - \alpha)\, g

The proposal g is a Gaussian mixture fitted to draws of p(x | s(x) > 0), which multilevel splitting finds: of draws of
the program the half with the largest scores are kept, multiplied and moved by Metropolis steps, along the differences of
others and to draws of a mixture fitted to all of them, level by level, until the level is the event itself.

The share α of the program bounds the weights by 1 / α, and q is drawn from anew, so that the estimate is unbiased; but a
part of the event that no draw has found hardly ever shows, neither in the value nor in its error: with several far
apart, compare seeds. Everything happens in the program's units, where p is a density on the real line; the event sees
the data's own.

References:
    | Estimation of small failure probabilities by subset simulation (Au and Beck, 2001), Prob. Eng. Mech. 16
    | Differential evolution Markov chain (ter Braak, 2006), Stat. Comput. 16
    | Safe and effective importance sampling (Owen and Zhou, 2000), JASA 95
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.cells import row_shape
from probgen.chunks import particles, pieces, seed_at
from probgen.sample import prepared_arrays, to_data_units
from probgen.sites import arrays_of, stack_numbered
from probgen.supports import word

HITS = 100  # draws in the event that plain Monte Carlo needs: a relative error of a tenth
PARTICLES, KEPT, LEVELS = 5000, 0.5, 200  # draws a level, the share of them that is kept, levels at most
FITTED = 4000  # points that a mixture is fitted to
MOVES = 3  # Metropolis steps of each kind a level
REFINED = 3  # fits to weighed draws of the proposal before
SHARE = 0.1  # α
COMPONENTS = (1, 2, 4, 8)
TAILS = {1.3: 0.7, 4.0: 0.3}  # factors on the fitted variances, and their shares
REAL = ("real", "realvector")


def refusal(trained: Any, given: Mapping[str, Any] | None) -> str:
    """Why importance sampling is not possible, or nothing."""
    structure = trained.structure
    if structure.kind != "exact" or structure.has_global_latents or not structure.data_plates:
        return (
            "importance sampling needs a program with an exact likelihood and without global latents; take more draws"
        )
    odd = [n for n, s in structure.observed.items() if word(s.support).replace("_", "") not in REAL]
    if odd:
        return f"importance sampling needs data on the whole real line, and the site {odd[0]!r} is bounded or discrete; take more draws"
    if any(structure.arrays.get(name) == "data" for name in given or {}):
        return "importance sampling with known entries is not done; take more draws"
    return ""


def rare_probability(
    trained: Any,
    preparation: Any,
    spec: Mapping[str, Any],
    score: Callable[[Mapping[str, np.ndarray]], Any],
    n: int,
    seed: int,
    given: Mapping[str, Any] | None,
) -> tuple[float, float, int, float] | None:
    """P(score > 0) as (value, standard error, n, effective sample size); None where no proposal reaches the event."""
    rows = Data(trained, preparation, spec, given or {})
    rng = np.random.default_rng(seed_at(seed, 0))
    inside = _in_the_event(rows, score, rng, seed)
    if inside is None:
        return None
    proposal = Proposal(rows, _fitted(inside, rng))
    for i in range(REFINED):  # weights put right what share of the event each mode is
        x, w = proposal.weighed(PARTICLES, score, rng, seed_at(seed, 3, i))
        if np.count_nonzero(w) < HITS:
            break
        chosen = rng.choice(len(x), size=PARTICLES, p=w / w.sum())
        proposal = Proposal(rows, _fitted(x[chosen], rng))
    sizes = pieces(n, 10 * PARTICLES)
    w = np.concatenate([proposal.weighed(m, score, rng, seed_at(seed, 4, i))[1] for i, m in enumerate(sizes)])
    if not w.any():
        return None
    return float(w.mean()), float(w.std(ddof=1) / np.sqrt(n)), n, float(w.sum() ** 2 / (w**2).sum())


def _in_the_event(rows: Data, score: Callable, rng: np.random.Generator, seed: int) -> np.ndarray | None:
    """Draws of p(x | score > 0) by multilevel splitting, [R, M]; None where the levels stop rising."""
    x = rows.draw(PARTICLES, seed_at(seed, 1))
    walkers = Walkers(rows, score, x, rows.log_density(x, seed), rows.scores(score, x, seed_at(seed, 1)), seed)
    below = -np.inf
    for _ in range(LEVELS):
        level = min(0.0, float(np.quantile(walkers.score, 1 - KEPT)))
        if not level > below:
            return None
        walkers.multiply(level, rng)
        for _ in range(MOVES):
            walkers.move(level, rng)
        states = walkers.leap(level, rng)
        below = level
        if level == 0.0:
            return np.concatenate([*states, *walkers.leap(level, rng)])
    return None


class Walkers:
    """Draws of p(x | score beyond a level) that multiply and move; `scale` follows their rate of acceptance."""

    def __init__(
        self, rows: Data, score: Callable, x: np.ndarray, log_p: np.ndarray, scores: np.ndarray, seed: int
    ) -> None:
        self.rows, self.of, self.x, self.log_p, self.score = rows, score, x, log_p, scores
        self.seed, self.steps, self.scale = seed, 0, 1.0

    def multiply(self, level: float, rng: np.random.Generator) -> None:
        """Replace those below the level by copies of the others."""
        good = rng.permutation(np.flatnonzero(_beyond(self.score, level)))
        chosen = np.resize(good, len(self.x))  # each as often as every other: chance copies would lose small modes
        self.x, self.log_p, self.score = self.x[chosen], self.log_p[chosen], self.score[chosen]

    def move(self, level: float, rng: np.random.Generator) -> np.ndarray:
        """One Metropolis step of each, x + γ (x_a − x_b) for two others, that does not fall below the level."""
        R, M = self.x.shape
        a, b = rng.integers(R, size=(2, R))
        x = self.x + self.scale * 2.38 / np.sqrt(2 * M) * (self.x[a] - self.x[b])
        taken = self._accept(x + 1e-4 * self.x.std(0) * rng.normal(size=(R, M)), 0.0, level, rng)
        self.scale *= np.exp(0.5 * (taken - 0.25))
        return self.x

    def leap(self, level: float, rng: np.random.Generator) -> list[np.ndarray]:
        """Metropolis steps to draws of a Gaussian mixture fitted to all of them: between modes, too."""
        g, states = _fitted(self.x, rng, COMPONENTS[2:3]), []
        for _ in range(MOVES):
            g.random_state = int(rng.integers(2**31))
            x = rng.permutation(g.sample(len(self.x))[0])
            self._accept(x, g.score_samples(self.x) - g.score_samples(x), level, rng)
            states.append(self.x)
        return states

    def _accept(self, x: np.ndarray, log_ratio: Any, level: float, rng: np.random.Generator) -> float:
        """Go to x with probability p(x) / p(x_old) · ratio where x is beyond the level; the share that went."""
        place = seed_at(self.seed, 2, self.steps)
        log_p, score = self.rows.log_density(x, place), self.rows.scores(self.of, x, place)
        taken = (np.log(rng.random(len(x))) < log_p - self.log_p + log_ratio) & _beyond(score, level)
        self.x = np.where(taken[:, None], x, self.x)
        self.log_p, self.score = np.where(taken, log_p, self.log_p), np.where(taken, score, self.score)
        self.steps += 1
        return float(taken.mean())


def _beyond(score: np.ndarray, level: float) -> np.ndarray:
    return score > 0 if level == 0.0 else score >= level


def _fitted(x: np.ndarray, rng: np.random.Generator, components: tuple[int, ...] = COMPONENTS) -> Any:
    """A Gaussian mixture fitted to points, as many components as BIC says, with tails."""
    from sklearn.mixture import GaussianMixture

    points = x[rng.permutation(len(x))[:FITTED]]
    floor = 1e-4 * max(float(points.var(0).mean()), 1e-300)
    most = max(1, len(points) // (20 * (x.shape[1] + 1)))
    seeds = rng.integers(2**31, size=len(components))
    choices = [min(k, most) for k in components]
    fits = [
        GaussianMixture(k, reg_covar=floor, random_state=int(seed)).fit(points)
        for k, seed in zip(choices, seeds, strict=True)
    ]
    return _with_tails(min(fits, key=lambda fit: fit.bic(points)))


def _with_tails(fit: Any) -> Any:
    """Every Gaussian of a fitted mixture in several widths: weights must not grow where the points were few."""
    factors = np.repeat(list(TAILS), fit.n_components)
    fit.weights_ = np.repeat(list(TAILS.values()), fit.n_components) * np.tile(fit.weights_, len(TAILS))
    fit.means_ = np.tile(fit.means_, (len(TAILS), 1))
    fit.covariances_ = np.tile(fit.covariances_, (len(TAILS), 1, 1)) * factors[:, None, None]
    fit.precisions_cholesky_ = np.tile(fit.precisions_cholesky_, (len(TAILS), 1, 1)) / np.sqrt(factors)[:, None, None]
    fit.n_components = len(fit.weights_)
    return fit


@dataclass(frozen=True)
class Proposal:
    """q = α p + (1 − α) g over rows of data as vectors, in the program's units."""

    rows: Data
    g: Any

    def weighed(self, n: int, score: Callable, rng: np.random.Generator, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """`n` draws of q [n, M], and their weights p / q where the event happens, [n]."""
        own = max(1, round(SHARE * n))
        share = own / n
        self.g.random_state = int(rng.integers(2**31))
        x = np.concatenate([self.rows.draw(own, seed), self.g.sample(n - own)[0]])
        log_p = self.rows.log_density(x, seed)
        log_q = np.logaddexp(np.log(share) + log_p, np.log1p(-share) + self.g.score_samples(x))
        inside = self.rows.scores(score, x, seed) > 0
        return x, np.where(inside, np.exp(np.where(inside, log_p - log_q, 0.0)), 0.0)


class Data:
    """Rows of all data sites as vectors, in the program's units: draws of the program, its density, the event's scores."""

    def __init__(self, trained: Any, preparation: Any, spec: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        self.trained, self.preparation, self.structure = trained, preparation, trained.structure
        self.prepared = preparation.spec(spec)
        self.conditions = prepared_arrays(self.structure, preparation, spec, 1, dict(given), 0)
        self.variables = arrays_of(self.structure, self.prepared)
        self.names = list(self.structure.observed)
        shapes = [row_shape(self.structure.model[name]) for name in self.names]
        ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        self.parts = {n: (slice(*ends[i : i + 2]), shapes[i]) for i, n in enumerate(self.names)}

    def draw(self, n: int, seed: int) -> np.ndarray:
        """`n` rows of the program, [n, M]."""
        found = [np.zeros((0, sum(part.stop - part.start for part, _ in self.parts.values())))]
        for i, size in enumerate(pieces(n, particles(self.structure))):
            drawn = self.trained.draw(size, seed_at(seed, i), self._rows(size))
            found.append(np.concatenate([drawn[name].reshape(size, -1) for name in self.names], axis=1))
        return np.concatenate(found).astype(np.float64)

    def log_density(self, x: np.ndarray, seed: int) -> np.ndarray:
        """log p(x) in the program's units, latents summed out, [n]."""
        found = [self.trained.log_weights(self._arrays(part), 1, seed)[0] for part in self._pieces(x)]
        return np.nan_to_num(np.concatenate(found).astype(np.float64), nan=-np.inf)

    def scores(self, score: Callable, x: np.ndarray, seed: int) -> np.ndarray:
        """The event's score at rows of data, with latents drawn given them, [n]."""
        found = []
        for i, part in enumerate(self._pieces(x)):
            held = self._sites(part)
            if self.structure.latents:
                drawn = self.trained.posterior(self._arrays(part), 1, seed_at(seed, i))[0]
                held |= {name: value[0] for name, value in drawn.items()}
            cells = self.trained.cells(self._rows(len(part)), held, seed)
            draws = stack_numbered({name: held.get(name, cell.value) for name, cell in cells.items()}, 1)
            draws |= to_data_units(draws, self.preparation, self.variables)
            found.append(np.asarray(score(draws)))
        return np.concatenate(found).astype(np.float64)

    def _pieces(self, x: np.ndarray) -> list[np.ndarray]:
        return np.array_split(x, -(-len(x) // particles(self.structure)))

    def _sites(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {name: x[:, part].reshape(len(x), *shape) for name, (part, shape) in self.parts.items()}

    def _rows(self, n: int) -> dict[str, np.ndarray]:
        return {name: np.repeat(value, n, axis=0) for name, value in self.conditions.items()}

    def _arrays(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays that the program reads, with these rows as its data."""
        values = stack_numbered(self._sites(x), 1)
        data = {a: values[v].reshape(len(x), *self.prepared[a].shape) for v, a in self.variables.items()}
        return self._rows(len(x)) | data
