"""The table of a comparison in words: columns, lines of cells, floors, and the footnotes of what is not defined."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from probgen.compare.likelihoods import LIKELIHOOD
from probgen.summary import duration, with_error

DASH = "–"
SAMPLES = "samples"
NOTICED = 0.01  # a smaller share of untrusted rows is not worth a footnote
APART = "a likelihood of something else, which does not compare: it stands in a column of its own"
UNFINISHED = "the fit was stopped before its last step"
_DISTANCES = {"fd_classifier": "FD (classifier)", "sliced_wasserstein": "sliced Wasserstein"}
_NAMES = {**_DISTANCES, "modes": "modes"}
_COSTS = {
    "seconds_a_sample": "a sample",
    "seconds_to_train": "training",
    "parameters": "parameters",
    "posterior": "posterior",
}
_POSTERIOR = {"guide": "by its guide", "exact": "exact", "draws": "by draws"}


@dataclass(frozen=True)
class Column:
    """One column: its key, the part of the table it belongs to, its head, and a quieter word below."""

    key: str
    part: str
    head: str
    below: str = ""


@dataclass
class Line:
    """One line of a cell: its main text, what is said below it in quieter lines, and the letters of its footnotes."""

    text: str
    below: tuple[str, ...] = ()
    marks: list[str] = field(default_factory=list)


Cell = list[Line]


@dataclass
class Table:
    """Columns, a row of cells for each run, rows of real data, and what is said below."""

    columns: list[Column]
    rows: list[list[Cell]]
    floors: list[list[Cell]]
    sentences: list[str]
    footnotes: dict[str, str]


class _Footnotes:
    """Sentences and their letters, each said once."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def mark(self, sentence: str) -> str:
        """The letter of a sentence: a..z, aa..."""
        if sentence not in self.letters:
            more, place = divmod(len(self.letters), 26)
            self.letters[sentence] = string.ascii_lowercase[more - 1] * bool(more) + string.ascii_lowercase[place]
        return self.letters[sentence]


def table_of(comparison: Mapping[str, Any]) -> Table:
    """The table of what `compare` returns; a column that no run has a number for is a sentence instead."""
    runs, likelihoods = comparison["runs"], comparison["likelihoods"]
    shown = [name for name in _DISTANCES if any(_distance(run, name) is not None for run in runs)]
    shown += ["modes"] * any(run["modes"] for run in runs)
    absent = [name for name in (*_DISTANCES, "modes") if name not in shown]
    whys = dict.fromkeys(
        f"{_NAMES[n]} is not shown: {run['undefined'][n]}" for n in absent for run in runs if n in run["undefined"]
    )
    columns, notes = list(_columns(likelihoods, shown)), _Footnotes()
    rows = [
        [[Line(run["label"], _made(run, runs))], *(_cell(run, column.key, notes) for column in columns[1:])]
        for run in runs
    ]
    floors = [[_floor(floor, column.key) for column in columns] for floor in comparison["floors"] if shown]
    said = [*likelihoods, *whys]
    footnotes = {letter: sentence for sentence, letter in notes.letters.items()}
    return Table(columns, rows, floors, [f"{sentence}." for sentence in said], footnotes)


def _columns(likelihoods: Mapping[str, Mapping[str, str]], shown: list[str]) -> Iterator[Column]:
    yield Column("model", "", "model")
    for name, each in (likelihoods or {LIKELIHOOD: {"head": "log p", "by": ""}}).items():
        yield Column(name, "log-likelihood, nats per datum", each["head"], each["by"])
    for name in shown:
        yield Column(name, SAMPLES, _NAMES[name], "of high quality" if name == "modes" else "")
    for name, head in _COSTS.items():
        yield Column(name, "cost", head)


def _cell(run: Mapping[str, Any], key: str, notes: _Footnotes) -> Cell:
    """The cell of one run in the column of a key; a dash with a footnote where it has no number."""
    if key in _DISTANCES:
        value = _distance(run, key)
        return _dash(run, key, notes) if value is None else [Line(with_error(value, None))]
    if key in _COSTS or key == "modes":
        return _plain_cell(run, key, notes) if run[key] is not None or key == "posterior" else _dash(run, key, notes)
    if not run["estimates"]:
        return _dash(run, LIKELIHOOD, notes)
    return _likelihood(run, notes) if key == run["likelihood_of"] else [Line(DASH, marks=[notes.mark(APART)])]


def _dash(run: Mapping[str, Any], name: str, notes: _Footnotes) -> Cell:
    return [Line(DASH, marks=[notes.mark(run["undefined"].get(name, "the number is not finite"))])]


def _plain_cell(run: Mapping[str, Any], key: str, notes: _Footnotes) -> Cell:
    value = run[key]
    if key == "modes":
        return [
            Line(f"{value['modes']} of {value['of']}", (with_error(value["high_quality"], value["high_quality_se"]),))
        ]
    if key == "seconds_a_sample":
        return [Line(brief(value))]
    if key == "seconds_to_train":
        return [Line(brief(value), (f"{run['steps']:,} steps",), [] if run["finished"] else [notes.mark(UNFINISHED)])]
    if key == "parameters":
        return [Line(f"{value:,}")]
    return [Line("yes", (_POSTERIOR[value],))] if value else [Line("no")]


def _floor(floor: Mapping[str, Any], key: str) -> Cell:
    if key == "model":
        return [Line(floor["label"])]
    value = floor["quality"].get(key)
    return [] if value is None else [Line(with_error(value, None))]


def _likelihood(run: Mapping[str, Any], notes: _Footnotes) -> Cell:
    """Every estimate with its error, by what it is estimated, and its bits; footnotes stand at the first."""
    cell = []
    for found in run["estimates"]:
        bits = with_error(found["bits_per_dim"], found["bits_per_dim_se"])
        cell.append(Line(with_error(found["value"], found["se"]), (found["estimator"], f"{bits} bits/dim")))
    cell[0].marks = [notes.mark(note) for note in run["notes"]]
    few = run["trust"].get("k_hat_above_0.7") or 0.0
    if few > NOTICED:
        cell[0].marks.append(
            notes.mark(f"k-hat is above 0.7 for {few:.0%} of the rows: a few draws decide the number there")
        )
    if LIKELIHOOD in run["undefined"]:
        cell[0].marks.append(notes.mark(run["undefined"][LIKELIHOOD]))
    return cell


def _made(run: Mapping[str, Any], runs: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """How it was learned, and what tells it apart from the other runs of one program: options and losses that differ."""
    twins = [other for other in runs if other["name"] == run["name"]]
    differ = [n for n in run["options"] if any(other["options"].get(n) != run["options"][n] for other in twins)]
    by = run["by"] or ""
    by = by if any(other["by"] != run["by"] for other in twins) else by.partition("(")[0]
    return (*(f"{name}={run['options'][name]}" for name in differ), *([by] if by else []))


def _distance(run: Mapping[str, Any], name: str) -> float | None:
    return (run["quality"] or {}).get(name)


def brief(seconds: float) -> str:
    """Seconds in the unit a reader would choose; below one, to two digits."""
    if seconds >= 1:
        return duration(seconds)
    value, unit = (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def protocol_lines(comparison: Mapping[str, Any]) -> dict[str, str]:
    """How it was measured, by name."""
    data, said = comparison["data"], comparison["protocol"]
    counts = ", ".join(f"{n:,} {split}" for split, n in data["rows"].items())
    trained = {f"{run['label']} on {run['trained_on']['device']}" for run in comparison["runs"]}
    devices = {run["trained_on"]["device"] for run in comparison["runs"]}
    samplers = {run["sampler"] for run in comparison["runs"]} - {None}
    return {
        "data": f"{data['name']} ({counts} rows), fingerprint {data['fingerprint'][:12]}",
        "likelihoods": f"the first {said['rows']:,} rows of {said['split']}; k = {said['k']:,} where latents are integrated out",
        "samples": f"{said['samples']:,} draws of {said['array']} by {' or '.join(sorted(samplers)) or 'nothing'}, against as "
        f"many {said['split']} rows; the classifier learns from training rows",
        "a sample": "the second of two equal draws of all samples, divided by their number",
        "training": f"measured when it was fitted, on {', '.join(sorted(devices if len(devices) == 1 else trained))}",
        "seed": str(said["seed"]),
        "device": f"{said['device']}; threads {said['threads']}, cores {said['cores']}",
        "versions": ", ".join(f"{name} {version}" for name, version in said["versions"].items()),
        "date": said["date"],
    }
