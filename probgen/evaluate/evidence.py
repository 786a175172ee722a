r"""`evidence`: log p(x) by drawing latents from the prior, beside the importance-weighted estimate, for growing K.

.. math::
    \log \tfrac1K \sum_k p(x \mid z_k), \; z_k \sim p(z) \qquad\text{and}\qquad
    \log \tfrac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}, \; z_k \sim q(z \mid x)

Both are lower bounds of log p(x) in the mean, which rise with K: the first is the second with the prior as guide, and
needs the more draws the more the posterior differs from the prior. The first K of the same draws serve each K.

Latents that are enumerated are summed out in both; a mixture, which has no others, draws them from their prior, and its
exact log p(x) stands beside. Where latents are shared by all rows, the evidence is that of all N rows together.

References:
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from probgen.chunks import particles, seed_at
from probgen.data.feed import evaluation_batches
from probgen.errors import ProbgenError
from probgen.evaluate.batch import Batch
from probgen.program import Structure
from probgen.summary import with_error
from probgen.supports import refuse_outside

PRIOR, GUIDE, EXACT = 0, 1, 2  # places of the seeds
FEW = 10  # effective draws below which a Monte Carlo error is itself hardly known

REFUSED = {
    "implicit": "the program is implicit: its data site has all its mass at one point",
    "unnormalised": "the program has a factor, so its density is known only up to a constant",
}


@dataclass(frozen=True)
class Bound:
    """An estimate of log p(x): `se` over the data, `mc_se` over the draws, `ess` of the weights (median over the data).

    `se` is missing for a single datum, `mc_se` and `ess` where nothing is drawn.
    """

    value: float
    se: float | None = None
    mc_se: float | None = None
    ess: float | None = None

    @property
    def words(self) -> tuple[str, str]:
        """Value with its error over the draws, and the effective sample size."""
        if not np.isfinite(self.value):
            return "—", "—"
        return with_error(self.value, self.mc_se), f"{self.ess:.3g}"


@dataclass(frozen=True)
class Evidence:
    """Estimates of log p(x), one for each `k`: with draws of the `prior`, and of the guide (`importance`); and `exact`.

    In nats per datum, or, where latents are shared (`joint`), for all rows together; in the units of the raw data.
    """

    k: tuple[int, ...]
    prior: tuple[Bound, ...]
    importance: tuple[Bound, ...] | None
    exact: Bound | None
    rows: int
    joint: bool
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, tuple[Bound, ...]]:
        """What there is, by its heading."""
        found = {"prior sampling": self.prior}
        return found | ({"importance-weighted": self.importance} if self.importance is not None else {})

    @property
    def title(self) -> str:
        """What the numbers are."""
        what = (
            f"of all {self.rows:,} rows together, in nats" if self.joint else f"in nats per datum, {self.rows:,} rows"
        )
        return f"log p(x) {what}: value ± error over the draws, effective sample size"

    @property
    def lines(self) -> list[str]:
        """What is to be said below the table."""
        exact = [] if self.exact is None else [f"exact log p(x): {with_error(self.exact.value, self.exact.se)}"]
        errors = [b.se for column in self.columns.values() for b in column[-1:] if b.se is not None]
        data = [f"error over the data: {errors[-1]:.2g}"] if errors and self.exact is None else []
        return [*exact, *data, *self.notes]

    def cells(self) -> list[list[str]]:
        """The table as text, its heading first."""
        head = ["K"] + [word for name in self.columns for word in (name, "ESS")]
        rows = []
        for i, k in enumerate(self.k):
            bounds = [column[i] for column in self.columns.values()]
            rows.append([f"{k:,}"] + [word for bound in bounds for word in bound.words])
        return [head, *rows]

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(w.rjust(n) for w, n in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, "", *table, "", *self.lines]).rstrip()

    def _repr_html_(self) -> str:
        head, *rows = self.cells()

        def line(words: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag} style='text-align:right'>{escape(w)}</{tag}>" for w in words) + "</tr>"

        said = "".join(f"<div style='opacity:.65;font-size:90%'>{escape(s)}</div>" for s in self.lines)
        body = line(head, "th") + "".join(line(row, "td") for row in rows)
        return f"<div>{escape(self.title)}</div><table>{body}</table>{said}"


def evidence(
    trained: Any, preparation: Any, rows: Any, k: Sequence[int] = (10, 100, 1000, 10_000, 100_000), seed: int = 0
) -> Evidence:
    """log p(x) of `rows` by prior sampling and by importance weights, for every number of draws in `k`.

    Raises:
        ProbgenError: the program has no latents, or no density; `rows` are not N where latents are shared by all.
    """
    k = tuple(sorted({int(number) for number in k}))
    if not k or k[0] < 2:
        raise ProbgenError(f"evidence: `k` is {k}: give numbers of draws, each 2 or more")
    if not len(rows):
        raise ProbgenError("evidence: there are no rows to take it of; give a split that has some")
    _refuse(trained, len(rows))
    structure, chains = trained.structure, getattr(trained, "draws", None)
    joint = structure.has_global_latents
    prior, notes = trained.under_prior(drawn_from_prior(structure)), []
    guided = trained if structure.kind == "latent" and chains is None else None
    columns = {PRIOR: Column(prior, k, joint, PRIOR)}
    if guided is not None:
        columns[GUIDE] = Column(guided, k, joint, GUIDE)
    elif chains is not None:
        notes.append("no importance-weighted column: NUTS draws from the posterior itself, without a guide")
    else:
        notes.append("no importance-weighted column: the program has no guide, for its latents can be summed out")
        columns[EXACT] = Column(trained, (1,), joint, EXACT)
    size = len(rows) if joint else min(len(rows), particles(structure))
    for i, (indices, arrays, log_jacobian) in enumerate(evaluation_batches(rows, preparation, size, seed)):
        refuse_outside(trained, arrays, rows.where)
        batch = Batch(arrays, np.broadcast_to(log_jacobian, len(indices)), np.asarray(indices), seed_at(seed, i))
        for column in columns.values():
            column.add(batch)
    found = {place: column.result() for place, column in columns.items()}
    if not np.isfinite([bound.value for bounds in found.values() for bound in bounds]).all():
        notes.append("—: for some rows no draw has a positive density, so that there is no estimate")
    if not found[PRIOR][-1].ess >= FEW:
        notes.append(
            f"prior sampling: fewer than {FEW} of {k[-1]:,} draws count, so that its error is larger than it says and its "
            "value too low"
        )
    exact = found[EXACT][0] if EXACT in found else None
    return Evidence(k, found[PRIOR], found.get(GUIDE), exact, len(rows), joint, tuple(notes))


def drawn_from_prior(structure: Structure) -> frozenset[str]:
    """The latents that prior sampling draws: all but those that can be summed out given the others.

    Where nothing else is to draw, or where what is drawn depends on them, those too.
    """
    hidden = set(structure.enumerated)
    rest = [name for name in structure.latents if name not in hidden]
    needed = any(hidden & set(structure.model[name].parents) for name in rest)
    return frozenset(structure.latents if needed or not rest else rest)


def _refuse(trained: Any, rows: int) -> None:
    structure = trained.structure
    if structure.kind in REFUSED:
        raise ProbgenError(f"evidence: it is not defined here, for {REFUSED[structure.kind]}")
    if not structure.latents:
        raise ProbgenError("evidence: this program has no latents, so its likelihood is exact: evaluate gives it")
    shared = [name for name, site in structure.latents.items() if not site.local]
    if shared and rows != trained.rows:
        raise ProbgenError(
            f"evidence: the latent {shared[0]!r} is shared by all {trained.rows:,} training rows, whose evidence is that of "
            f"all together, and there are {rows:,} rows: give all training rows, e.g. run.evidence(run.data.train)"
        )


class Column:
    """Estimates for several K from one stream of weights, of which only sums are kept."""

    def __init__(self, trained: Any, k: tuple[int, ...], joint: bool, place: int) -> None:
        self.trained, self.k, self.joint, self.place = trained, k, joint, place
        self.particles = particles(trained.structure)
        self.parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in k]

    def add(self, batch: Batch) -> None:
        """Take one more batch of rows in."""
        jacobian = batch.log_jacobian.sum(keepdims=True) if self.joint else batch.log_jacobian
        for part, (log_mean, ess) in zip(self.parts, _running(self._weights(batch), self.k), strict=True):
            part.append((log_mean + jacobian, ess))

    def result(self) -> tuple[Bound, ...]:
        """One number for each K."""
        return tuple(
            _bound(*map(np.concatenate, zip(*p, strict=True)), k) for p, k in zip(self.parts, self.k, strict=True)
        )

    def _weights(self, batch: Batch) -> Iterator[np.ndarray]:
        """Log-weights [size, B], or [size, 1] of all rows together, in pieces of one size that fit into memory."""
        number = -(-self.k[-1] // max(1, self.particles // len(batch)))
        size, i = -(-self.k[-1] // number), 0
        one: Callable[..., np.ndarray] = self.trained.elbo if self.joint else self.trained.log_weights
        while True:
            weights = np.asarray(one(batch.arrays, size, seed_at(batch.seed, self.place, i)), np.float64)
            yield weights.sum(1, keepdims=True) if self.joint else weights
            i += 1


def _running(pieces: Iterator[np.ndarray], k: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """log (1/K) Σ w and (Σ w)² / Σ w² of the first K weights of a stream, for each K."""
    held, taken, first, second = next(pieces), 0, -np.inf, -np.inf
    for number in k:
        while taken < number:
            if not len(held):
                held = next(pieces)
            part, held = held[: number - taken], held[number - taken :]
            first = np.logaddexp(first, np.logaddexp.reduce(part, axis=0))
            second = np.logaddexp(second, np.logaddexp.reduce(2 * part, axis=0))
            taken += len(part)
        with np.errstate(invalid="ignore"):  # no weight is positive yet
            yield first - np.log(number), np.exp(2 * first - second)


def _bound(log_mean: np.ndarray, ess: np.ndarray, k: int) -> Bound:
    """The mean over the data with its errors."""
    n, value = len(log_mean), float(log_mean.mean())
    se = float(log_mean.std(ddof=1) / np.sqrt(n)) if n > 1 and np.isfinite(value) else None
    if k == 1:
        return Bound(value, se)
    if np.isnan(ess).all():  # no draw counts for any row
        return Bound(value, se)
    variance = np.maximum(0.0, k / ess - 1) / (k - 1)
    return Bound(value, se, float(np.sqrt(variance.sum()) / n), float(np.nanmedian(ess)))
