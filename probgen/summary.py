"""The numbers of a run in words and tables: in the terminal, in a notebook, in the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from probgen.sites import numbered

if TYPE_CHECKING:
    from rich.table import Table

_MEANING = {
    "log_likelihood": ("log-likelihood", "nats per datum", "log p(x), by importance weights where there are latents"),
    "elbo": ("ELBO", "nats per datum", "a lower bound of log p(x); the gap is what the guide misses"),
    "ode_log_likelihood": ("log-likelihood, ODE", "nats per datum", "log p(x) by the probability flow of a diffusion"),
    "bits_per_dim": ("bits per dimension", "bits", "−log₂ p(x) divided by the number of values per datum"),
    "nats_per_dim": ("nats per dimension", "nats", "−log p(x) divided by the number of values per datum"),
    "k_hat": ("k-hat, median", "", "tail of the importance weights: below 0.5 good, above 0.7 not to be trusted"),
    "k_hat_above_0.7": ("share with k-hat > 0.7", "", "the share of data whose estimate is not to be trusted"),
    "ess": ("effective sample size", "", "median per datum, of the importance weights"),
    "r_hat": ("R-hat, worst", "", "how far the chains differ: above 1.01 they have not mixed"),
    "ess_bulk": ("ESS of the bulk, least", "draws", "independent draws that would give means as sure"),
    "ess_tail": ("ESS of the tails, least", "draws", "independent draws that would give 5% and 95% quantiles as sure"),
    "divergences": ("divergences", "", "draws whose trajectory left the posterior: none is as it should be"),
    "reconstruction_error": ("reconstruction error", "", "mean squared error per value, in data units"),
    "active_units": ("active units", "", "latent dimensions whose posterior mean moves with the data"),
}
_FIRST = tuple(_MEANING)
_LONG = 8  # a longer series of numbered sites is one line
_SERIES = {"term": "their sum; the evaluation has each", "active_units": "from the fewest at a site to the most"}
_APART = ("protocol", "notes")


@dataclass(frozen=True)
class Number:
    """One line of the table: what it is, its value, and its standard error where it has one."""

    name: str
    label: str
    value: float
    error: float | None
    monte_carlo: float | None
    unit: str
    meaning: str
    most: float | None = None  # of a range, which begins at `value`

    @property
    def text(self) -> str:
        """`−89.73 ± 0.31`: as many digits as the error leaves certain; of a range `60 to 64`."""
        if self.most is not None and self.most != self.value:
            return f"{with_error(self.value, None)} to {with_error(self.most, None)}"
        return with_error(self.value, self.error) if self.name != "k_hat_above_0.7" else f"{self.value:.1%}"


def numbers(evaluation: Mapping[str, Any] | None) -> list[Number]:
    """The numbers of an evaluation, likelihoods first; what is undefined is not among them.

    Of more than 8 numbered sites, as a chain has them, terms are one line with their sum, active units one with their range.
    """
    found = {
        name: value
        for name, value in (evaluation or {}).items()
        if name not in _APART and not name.endswith("_se") and isinstance(value, int | float)
    }
    alone = [n for n in found if n.startswith("active_units/")]
    if len(alone) == 1:
        found.pop(alone[0])
    order = [n for n in _FIRST if n in found] + [n for n in found if n not in _FIRST]
    lines = {name: _number(name, found[name], evaluation or {}) for name in order}
    for names in _long_series(found):
        lines[names[0]] = _one_line(names, found)
        for name in names[1:]:
            del lines[name]
    return list(lines.values())


def _long_series(found: Mapping[str, float]) -> list[list[str]]:
    """`term/x_1` … `term/x_T` and the like, in order; also where there is a `term/x` beside them."""
    ends = [name for name in found if name.partition("/")[0] in _SERIES and name.rpartition("_")[2].isdigit()]
    return [names for names in numbered(ends).values() if len(names) > _LONG]


def _one_line(names: list[str], found: Mapping[str, float]) -> Number:
    """A series of numbers as one, which bears the first one's name."""
    head, values = names[0].partition("/")[0], [found[name] for name in names]
    sites = " … ".join(name.partition("/")[2] for name in (names[0], names[-1]))
    if head == "term":
        return Number(names[0], f"terms of {sites}", math.fsum(values), None, None, "nats per datum", _SERIES[head])
    return Number(names[0], f"active units of {sites}", min(values), None, None, "", _SERIES[head], max(values))


def _number(name: str, value: float, evaluation: Mapping[str, Any]) -> Number:
    head, _, site = name.partition("/")
    if name == "term/prepare":
        label, unit, meaning = "log-Jacobian of prepare", "nats per datum", "what the change of units adds to log p(x)"
    elif head == "term":
        label, unit, meaning = f"term of {site}", "nats per datum", "log p where observed, log p − log q where latent"
    else:
        label, unit, meaning = _MEANING.get(head, (head.replace("_", " "), "", ""))
        label = f"{label} of {site}" if site else label
    error, monte_carlo = evaluation.get(f"{name}_se"), evaluation.get(f"{name}_mc_se")
    return Number(name, label, value, error, monte_carlo, unit, meaning)


def with_error(value: float, error: float | None) -> str:
    """A value to the second digit of its error; whole numbers and those without an error to four digits."""
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int):
        return _signed(f"{value:,}")
    if error is None or not math.isfinite(error) or error <= 1e-7 * abs(value):
        return _signed(f"{value:.4g}")
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{_signed(f'{value:.{places}f}')} ± {error:.{places}f}"


def _signed(text: str) -> str:
    return text.replace("-", "−")


def protocol(evaluation: Mapping[str, Any] | None) -> str:
    """How the numbers were measured, in one line."""
    said = (evaluation or {}).get("protocol") or {}
    parts = []
    if said.get("rows"):
        split = f"{said['split']} " if said.get("split") else ""
        parts.append(f"{said['rows']:,} {split}rows")
    if said.get("estimator"):
        parts.append(str(said["estimator"]))
    if said.get("k") and str(said["k"]) not in str(said.get("estimator")):
        parts.append(f"k = {said['k']:,}")
    if said.get("seed") is not None:
        parts.append(f"seed {said['seed']}")
    return "; ".join(parts + prepared_by(said.get("prepare")))


def prepared_by(preparation: Mapping[str, Any] | None) -> list[str]:
    """`x prepared by Binarize(threshold=8)`, for every array that is."""
    chains = (preparation or {}).get("steps") or {}
    return [f"{name} prepared by {', '.join(map(_step, chain))}" for name, chain in chains.items() if chain]


def notes(run: Any) -> list[str]:
    """What is to be said about the numbers of a run: of its evaluation, or of its chains where there is none."""
    if run.evaluation:
        return list(run.evaluation.get("notes", ()))
    draws, said = getattr(run, "agreed_draws", (None, []))
    return [] if draws is None else [*said, *draws.notes()]


def _step(step: Mapping[str, Any]) -> str:
    """`Binarize(threshold=8)`: a step with those of its constants that are one number."""
    constants = {name: value for name, value in step.items() if name != "step" and _one_number(value)}
    inside = ", ".join(f"{name}={value:.4g}" for name, value in constants.items())
    return f"{step['step']}({inside})"


def _one_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def headline(run: Any) -> str:
    """What the run is, in one line: its kind, its latents, its data, how long it was trained."""
    structure = run.structure
    words = [f"{structure.kind} program"]
    if structure.latents:
        words.append(_counted(len(structure.latents), "latent"))
    if run.data is not None:
        words.append(f"{run.data.name}, {len(run.data.train):,} training rows")
    steps = [s for s in run.metrics.get("step", ()) if s is not None]
    if steps:
        words.append(_counted(int(steps[-1]), "step"))
    seconds = [s for s in run.metrics.get("seconds", ()) if s is not None]
    if seconds:
        words.append(duration(float(seconds[-1])))
    return " · ".join(words)


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would choose."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def summary_table(run: Any) -> Table:
    """The numbers of a run as a table for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape as literal
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD, title=literal(str(run.name)), title_justify="left", title_style="bold", pad_edge=False
    )
    table.add_column("")
    table.add_column("value", justify="left", style="bold")
    table.add_column("", style="dim")
    for number in numbers(run.evaluation):
        table.add_row(literal(number.label), number.text, number.unit)
    if not run.evaluation:
        for label, text, unit in _training(run):
            table.add_row(label, text, unit)
    lines = [headline(run), protocol(run.evaluation), *notes(run)]
    table.caption = literal("\n".join(line for line in lines if line))
    table.caption_justify = "left"
    return table


def summary_html(run: Any) -> str:
    """The same for a notebook, with the loss beside it; it follows the notebook's own light or dark colours."""
    rows = [(n.label, n.text, n.unit) for n in numbers(run.evaluation)] or list(_training(run))
    cells = "".join(
        f"<tr><td style='text-align:left;padding:1px 14px 1px 0'>{escape(label)}</td>"
        f"<td style='text-align:left;padding:1px 14px 1px 0;font-variant-numeric:tabular-nums'><b>{escape(text)}</b></td>"
        f"<td style='text-align:left;padding:1px 0;opacity:.65'>{escape(unit)}</td></tr>"
        for label, text, unit in rows
    )
    said = [protocol(run.evaluation), *notes(run)]
    lines = "".join(f"<div style='opacity:.65;font-size:90%;margin-top:4px'>{escape(s)}</div>" for s in said if s)
    return (
        "<div style='border-left:3px solid #0a6fae;padding:2px 0 2px 14px;max-width:60em'>"
        f"<div style='font-size:120%;font-weight:600'>{escape(str(run.name))}</div>"
        f"<div style='opacity:.65;margin-bottom:6px'>{escape(headline(run))}</div>"
        "<div style='display:flex;flex-wrap:wrap;gap:24px;align-items:center'>"
        f"<table style='border:none;margin:0;background:none'>{cells}</table>{_sparkline(run)}</div>{lines}</div>"
    )


def _training(run: Any) -> Iterator[tuple[str, str, str]]:
    """The last losses of a run that was not evaluated yet, and whether its chains are to be trusted."""
    for name, label in (("loss", "training loss"), ("valid_loss", "validation loss")):
        values = [v for v in run.metrics.get(name, ()) if v is not None and math.isfinite(v)]
        if values:
            yield label, with_error(float(values[-1]), None), "nats per datum"
    draws, _ = getattr(run, "agreed_draws", (None, []))
    for number in numbers(draws.diagnostics()) if draws is not None else ():
        yield number.label, number.text, number.unit


def _sparkline(run: Any, width: int = 220, height: int = 56) -> str:
    """The loss as a small line, without axes."""
    values = [float(v) for v in run.metrics.get("loss", ()) if v is not None and math.isfinite(v)]
    if len(values) < 2:
        return ""
    shown = values[len(values) // 20 :][:: max(1, len(values) // 200)]
    low, high = min(shown), max(shown)
    step = width / max(1, len(shown) - 1)
    points = " ".join(
        f"{i * step:.1f},{2 + (height - 4) * (high - v) / ((high - low) or 1):.1f}" for i, v in enumerate(shown)
    )
    return (
        f"<svg width='{width}' height='{height}' viewBox='0 0 {width} {height}' role='img' aria-label='training loss'>"
        f"<polyline points='{points}' fill='none' stroke='#0a6fae' stroke-width='1.6'/></svg>"
    )
