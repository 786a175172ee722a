"""The table of a comparison in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from probgen.compare.table import Cell, Column, table_of

if TYPE_CHECKING:
    from rich.console import Group


def printed(comparison: Mapping[str, Any]) -> Group:
    """Likelihoods, then samples and costs, then what is said of both; the one table of the page is too wide for most windows."""
    from rich.console import Group
    from rich.markup import escape as literal
    from rich.text import Text

    table = table_of(comparison)
    parts = [column.part for column in table.columns]
    likelihoods = [0, *[i for i, part in enumerate(parts) if part.startswith("log")]]
    others = [0, *[i for i, part in enumerate(parts) if i and i not in likelihoods]]
    said, data = comparison["protocol"], comparison["data"]
    title = f"{data['name']}: {said['rows']:,} {said['split']} rows, {said['samples']:,} samples, k = {said['k']:,}, seed {said['seed']}"
    notes = [*table.sentences, *[f"({letter}) {sentence}" for letter, sentence in table.footnotes.items()]]
    return Group(
        _printed(literal(title), table.columns, table.rows, likelihoods, {0}),
        _printed("", table.columns, table.rows + table.floors, others, set()),
        Text("\n".join(notes), style="dim"),
    )


def _printed(title: str, columns: list[Column], rows: list[list[Cell]], shown: list[int], wide: set[int]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape as literal
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for i in shown:
        below = f"\n[dim]{literal(columns[i].below)}[/]" if columns[i].below else ""
        table.add_column("" if i == 0 else literal(columns[i].head) + below, style="bold" if i == 0 else "")
    for cells in rows:
        table.add_row(*[_text(cells[i], i or i in wide) for i in shown])
    return table


def _text(cell: Cell, below: bool | int) -> str:
    from rich.markup import escape as literal

    lines = []
    for line in cell:
        marks = f" ({','.join(line.marks)})" if line.marks else ""
        lines.append(literal(line.text) + literal(marks))
        if line.below and below:
            lines += [f"[dim]{literal(part.strip())}[/]" for part in line.below.split("; ")]
    return "\n".join(lines)
