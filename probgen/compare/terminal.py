"""The table of a comparison in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from probgen.compare.table import SAMPLES, Cell, Column, table_of

if TYPE_CHECKING:
    from rich.console import Group


def printed(comparison: Mapping[str, Any]) -> Group:
    """One table for each part, and what is said of them: the one table of the page is too wide for most windows."""
    from rich.console import Group
    from rich.text import Text

    table = table_of(comparison)
    parts: dict[str, list[int]] = {}
    for i, column in enumerate(table.columns[1:], 1):
        parts.setdefault(column.part, [0]).append(i)
    said, data = comparison["protocol"], comparison["data"]
    title = f"{data['name']}: {said['rows']:,} {said['split']} rows, {said['samples']:,} samples, k = {said['k']:,}, seed {said['seed']}"
    notes = [*table.sentences, *[f"({letter}) {sentence}" for letter, sentence in table.footnotes.items()]]
    return Group(
        Text(title, style="bold"),
        *(_printed(part, table.columns, table.rows + table.floors * (part == SAMPLES), i) for part, i in parts.items()),
        Text("\n".join(notes), style="dim"),
    )


def _printed(part: str, columns: list[Column], rows: list[list[Cell]], shown: list[int]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape as literal
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=part, title_justify="left")
    widest = min(16, max((len(line.text) for cells in rows for line in cells[0]), default=0))
    for i in shown:
        below = f"\n[dim]{literal(columns[i].below)}[/]" if columns[i].below else ""
        options = {"style": "bold", "min_width": widest} if i == 0 else {"min_width": _longest_word(rows, i)}
        table.add_column("" if i == 0 else literal(columns[i].head) + below, overflow="fold", **options)
    for cells in rows:
        table.add_row(*[_text(cells[i]) for i in shown])
    return table


def _longest_word(rows: list[list[Cell]], i: int) -> int:
    texts = [text for cells in rows for line in cells[i] for text in (line.text, *line.below)]
    return min(20, max((len(word) for text in texts for word in text.split()), default=0))


def _text(cell: Cell) -> str:
    from rich.markup import escape as literal

    lines = []
    for line in cell:
        marks = f" ({','.join(line.marks)})" if line.marks else ""
        lines += [literal(line.text + marks), *(f"[not bold dim]{literal(part)}[/]" for part in line.below)]
    return "\n".join(lines)
