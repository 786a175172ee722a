"""`show`: what a program says, read off one trace: sites, shapes, plates, the factorisation, the plate diagram.

p(x, z) = p(z) p(x | z),    q(z | x)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from probgen.blame import blaming
from probgen.program import Program, Site, Structure, arguments, backend_of
from probgen.show.factors import Factor, guide_factors, latex, model_factors, text
from probgen.show.plates import boxes, dot
from probgen.sites import numbered
from probgen.supports import described

_BATCH = 64
_LONG = 8  # sites of a numbered series, of which more are not listed one by one
# Families whose KL from themselves is known in closed form to both PPLs.
_CLOSED = frozenset(
    [
        "Bernoulli",
        "Beta",
        "Categorical",
        "CategoricalLogits",
        "CategoricalProbs",
        "BernoulliLogits",
        "BernoulliProbs",
        "Dirichlet",
        "Gamma",
        "LowRankMultivariateNormal",
        "MultivariateNormal",
        "Normal",
        "OneHotCategorical",
    ]
)


@dataclass(frozen=True)
class Description:
    """What one trace tells of a program, as text, as LaTeX, and as a diagram in graphviz's language."""

    name: str
    structure: Structure
    rows: int
    guide_reads: tuple[str, ...] = ()

    @property
    def factorisation(self) -> str:
        """`p(x, z) = p(z) p(x | z)`, and below it the guide, `q(z | x)`."""
        return "\n".join(text(*part) for part in self._factors())

    @property
    def latex(self) -> str:
        """The same as LaTeX, with the product over the N rows."""
        per_row = set(self.structure.arrays)
        return "\n".join(latex(*part, per_row) for part in self._factors())

    @property
    def dot(self) -> str:
        """The plate diagram as graphviz source."""
        return dot(self.structure, self.rows)

    @property
    def diagram(self) -> str:
        """The plate diagram in text: (latent), [observed], {summed out}; plates are boxes, arrows name parents."""
        return boxes(self.structure, self.rows)

    @property
    def kl(self) -> dict[str, str]:
        """How the KL of each latent is taken, and why."""
        return {name: _kl(self.structure, name) for name in self.structure.latents}

    def _factors(self) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...], list[Factor]]]:
        """For model and guide: p or q, the names before and after the bar, the factors."""
        given = tuple(name for name, use in self.structure.arrays.items() if use == "given")
        factors = model_factors(self.structure, given)
        drawn = [s for f in factors for s in f.sites]
        order = [*self.structure.observed, *(s for s in drawn if s not in self.structure.observed)]
        yield "p", tuple(s for s in order if s in drawn), given, factors
        if self.structure.guide:
            factors = guide_factors(self.structure, self.guide_reads)
            yield "q", tuple(s for f in factors for s in f.sites), self.guide_reads, factors

    def __str__(self) -> str:
        parts = [
            f"{self.name}: {_kind(self.structure)}",
            self.factorisation,
            _plate_line(self),
            _table(self.structure, self.guide_reads),
        ]
        parts += ["\n".join(_kl_lines(self)), self.diagram, self.latex]
        return "\n\n".join(part for part in parts if part)

    def _repr_markdown_(self) -> str:
        body = f"{_table(self.structure, self.guide_reads)}\n\n{self.diagram}"
        formulas = "\n\n".join(f"$${line}$$" for line in self.latex.splitlines())
        return f"**{self.name}**: {_kind(self.structure)}\n\n{formulas}\n\n```text\n{body}\n```"


def show(program: Program, data: Any, seed: int = 0) -> Description:
    """Trace `program` on one batch of `data` and describe it.

    Raises:
        ProbgenError: what the backend refuses: a latent without guide or enumeration, an array read as its own input.
    """
    from probgen.data import load_data
    from probgen.data.feed import Feed
    from probgen.data.prepare import Preparation

    data = data if hasattr(data, "train") else load_data(data)
    preparation = Preparation.of(program.prepare, data)
    feed = Feed(data.train, preparation, program.defaults.get("batch_size", _BATCH), seed)
    batch = feed.batch(0)
    with blaming(program, data.train.shapes()):
        structure = backend_of(program).inspect(program, batch, rows=feed.rows, seed=seed)
    return Description(program.origin.name, structure, feed.rows, _guide_reads(program, batch))


def _guide_reads(program: Program, batch: Mapping[str, Any]) -> tuple[str, ...]:
    """The arrays that the guide names; an autoguide is handed the model's, and reads none."""
    if program.guide is None:
        return ()
    named = arguments(program.guide, batch, like=_names_nothing)
    return tuple(name for name, value in batch.items() if any(value is v for v in named.values()))


def _names_nothing() -> None: ...


# Words


def _kind(structure: Structure) -> str:
    words = {
        "exact": "exact: no latents but enumerated ones, so log p(x) itself is computed",
        "latent": "latent: log p(x) is bounded below, and estimated by importance sampling",
        "implicit": "implicit: a data site has all its mass at one point, so there is no likelihood",
        "unnormalised": "unnormalised: it has a factor, so its density is known up to a constant",
    }
    return words[structure.kind]


def _plate_line(description: Description) -> str:
    structure, rows = description.structure, description.rows
    if not structure.data_plates:
        return f"data plate: none is as long as the batch, so every batch must hold all {rows:,} rows"
    names = ", ".join(structure.data_plates)
    if structure.states_rows:
        return f"data plate: {names}, which states its {rows:,} rows itself and is left alone"
    return f"data plate: {names}, which stands for all {rows:,} rows: its sites are scaled by N/B"


def _table(structure: Structure, guide_reads: tuple[str, ...]) -> str:
    rows = [("site", "role", "distribution", "event", "support", "plates", "depends on")]
    for where, sites in (("", structure.model), ("guide ", structure.guide)):
        left_out = _left_out(sites)
        for name, site in sites.items():
            if name in left_out:
                rows += [("…", left_out[name], "", "", "", "", "")] if left_out[name] else []
                continue
            event = site.shape[len(site.shape) - site.event_dim :] if site.event_dim else ()
            shape = "×".join(str(n) for n in event) or "scalar"
            plates = ", ".join(f"{p.name} ({'N' if p.data else p.size})" for p in site.plates) or "none: global"
            behind = (*site.parents, *guide_reads) if where and site.local else site.parents
            role = "summed out" if name in structure.enumerated and not where else f"{where}{site.role}"
            rows.append((name, role, site.family, shape, described(site.support) or "–", plates, ", ".join(behind)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _kl_lines(description: Description) -> Iterator[str]:
    """How each KL is taken; of a long series a few."""
    left_out = _left_out(description.structure.latents)
    for name, how in description.kl.items():
        if name not in left_out:
            yield f"KL of {name}: {how}"
        elif left_out[name]:
            yield f"KL of {left_out[name]}, such as {name}: {how}"


def _left_out(sites: Mapping[str, Site]) -> dict[str, str]:
    """The inner sites of long numbered series, and what stands in the place of the first of each."""
    found = {}
    latents = [name for name, site in sites.items() if site.role == "latent"]
    for base, names in numbered(latents).items():
        inner = names[2:-1] if len(names) > _LONG else []
        found |= dict.fromkeys(inner, "")
        if inner:
            first = next(name for name in sites if name in inner)
            found[first] = f"{len(inner)} more {base}"
    return found


def _kl(structure: Structure, name: str) -> str:
    if name in structure.enumerated:
        return "none: it is summed out in the model"
    if name not in structure.guide:
        return "none: no guide draws it"
    p, q = structure.model[name], structure.guide[name]
    if q.enumerated:
        return "exact: averaged over its values in the guide"
    if name not in structure.analytic_kl():
        order = list(structure.guide)
        later = [u for u in p.parents if u in order and order.index(u) >= order.index(name)]
        why = (
            f"p({name}) depends on {', '.join(later)}, which the guide draws at or after it"
            if later
            else "p sums over it"
        )
        return f"sampled: {why}"
    if q.delta:
        return "sampled: the guide computes it from another draw"
    pair = f"{q.family} ‖ {p.family}"
    if p.family == q.family and p.family in _CLOSED:
        return f"analytic: {pair} has a closed form, and p({name}) depends on nothing that the guide draws later"
    return f"in closed form where the PPL knows one for {pair}, else sampled"
