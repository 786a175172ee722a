"""The page of a comparison: the table, samples of every run beside data, and the protocol of it all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen import pictures
from probgen.compare.table import Cell, Column, Table, protocol_lines, table_of
from probgen.document import document, pairs, section, svg, write_file
from probgen.pictures import material, tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRIP = {"image": 16, "vector": 6}  # how many samples of a run stand side by side


def write(
    comparison: Mapping[str, Any],
    runs: Mapping[str, Any],
    drawn: Mapping[str, np.ndarray | None],
    against: Any,
    path: Path,
) -> None:
    """Write the page to `path`, and the mapping beside it as .json."""
    write_file(path, page(comparison, runs, drawn, against).encode(), path.name, "comparison")
    text = json.dumps(comparison, indent=1, allow_nan=False, ensure_ascii=False)
    write_file(path.with_suffix(".json"), text.encode(), path.name, "comparison")


def page(
    comparison: Mapping[str, Any], runs: Mapping[str, Any], drawn: Mapping[str, np.ndarray | None], against: Any
) -> str:
    """The comparison as one HTML document; `drawn` holds each run's draws."""
    said, name = comparison["protocol"], comparison["data"]["name"]
    with pictures.detached():
        shown = _samples(runs, drawn, against)
    count = len(comparison["runs"])
    headline = (
        f"{count} program{'' if count == 1 else 's'} · {said['rows']:,} {said['split']} rows · "
        f"{said['samples']:,} samples · {said['date'][:10]}"
    )
    body = "\n".join(
        [
            section("One table", "", _table(table_of(comparison))),
            section(
                "Samples",
                "Draws of each program, not chosen, beside rows of the data; all in the data's own units.",
                shown,
            ),
            section(
                "Protocol",
                "All numbers but the time of training were measured anew, alike for all.",
                pairs(protocol_lines(comparison)),
            ),
            section("How to repeat the runs", "", _repeat(comparison)),
        ]
    )
    return document(name, f"{name}: comparison", "comparison", headline, body)


def _table(table: Table) -> str:
    parts = [(part, len(list(columns))) for part, columns in groupby(c.part for c in table.columns)]
    over = "".join(f'<th colspan="{n}"{" class=part" if part else ""}>{escape(part)}</th>' for part, n in parts)
    heads = "".join(_head(column) for column in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, cells))}</tr>" for cells in table.rows)
    floors = "".join(f'<tr class="floor">{"".join(map(_cell, cells))}</tr>' for cells in table.floors)
    told = "".join(f"<li>{escape(sentence)}</li>" for sentence in table.sentences)
    notes = "".join(f"<li><sup>{letter}</sup> {escape(text)}</li>" for letter, text in table.footnotes.items())
    return (
        f'<div class="scroll"><table class="comparison"><thead><tr>{over}</tr><tr>{heads}</tr></thead>'
        f"<tbody>{rows}{floors}</tbody></table></div>"
        '<p class="protocol">± is one standard error over rows. Numbers of different columns do not compare; distances compare '
        "with those of real rows, the last lines, which are the best to be had.</p>"
        f'<ul class="notes">{told}</ul><ul class="notes letters">{notes}</ul>'
    )


def _head(column: Column) -> str:
    below = f"<small>{escape(column.below)}</small>" if column.below else ""
    return f"<th>{escape(column.head)}{below}</th>"


def _cell(cell: Cell) -> str:
    lines = []
    for line in cell:
        marks = f"<sup>{escape(' '.join(line.marks))}</sup>" if line.marks else ""
        below = "".join(f"<small>{escape(part)}</small>" for part in line.below)
        lines.append(f"<div>{escape(line.text)}{marks}{below}</div>")
    return f"<td>{''.join(lines)}</td>"


def _samples(runs: Mapping[str, Any], drawn: Mapping[str, np.ndarray | None], against: Any) -> str:
    """Strips of images or lines below each other, points and histograms side by side; data first."""
    one = next(iter(runs.values()))
    look = material.look_of(one, against.array)
    figures = []
    if look.kind in STRIP:
        rows = against.real[np.random.default_rng(0).permutation(len(against.real))]
        for i, (label, values) in enumerate([("test rows", rows), *drawn.items()]):
            figures.append(_strip(look, label, values, i))
        return f'<div class="strips">{"".join(figures)}</div>'
    for i, (label, values) in enumerate(drawn.items()):
        if values is None:
            figures.append(_none(label))
            continue
        run = runs[label]
        ax = pictures.samples(run, against.test, n=len(values), name=against.array)
        figures.append(_figure(label, ax, f"samples-{i}"))
    return f'<div class="figures three">{"".join(figures)}</div>'


def _strip(look: material.Look, label: str, values: np.ndarray | None, i: int) -> str:
    if values is None:
        return _none(label)
    cells = np.asarray(values)[None, : STRIP[look.kind]]
    ax = tiles.grid(None, look, cells, "", muted_rows=(0,) if i == 0 else ())
    return _figure(label, ax, f"samples-{i}", ink=look.ink)


def _figure(label: str, ax: Axes, name: str, ink: bool = False) -> str:
    kind = ' class="ink"' if ink else ""
    return f"<figure{kind}><figcaption>{escape(label)}</figcaption>\n{svg(ax, name)}\n</figure>"


def _none(label: str) -> str:
    return (
        f'<figure><figcaption>{escape(label)}</figcaption><p class="undefined">No samples: see the table.</p></figure>'
    )


def _repeat(comparison: Mapping[str, Any]) -> str:
    measured, parts = comparison["protocol"]["versions"], []
    for run in comparison["runs"]:
        there = {n: v for n, v in run["trained_on"]["versions"].items() if measured.get(n) not in (None, v)}
        said = [run["path"] or "", *run["prepare"], f"trained on {run['trained_on']['device']}"]
        said += [f"with {', '.join(f'{n} {v}' for n, v in there.items())}"] if there else []
        line = "; ".join(part for part in said if part)
        parts.append(
            f'<h3>{escape(run["label"])}</h3><pre>{escape(run["command"])}</pre><p class="protocol">{escape(line)}.</p>'
        )
    return "\n".join(parts)
