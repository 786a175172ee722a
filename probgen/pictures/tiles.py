"""A sheet of small pictures on one pair of axes: images as one mosaic, vectors as small-multiple lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from probgen.pictures.canvas import BLUE, FAINT, MUTED, WIDTH, axes, sheet
from probgen.pictures.material import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def grid(
    ax: Axes | None,
    look: Look,
    cells: np.ndarray,
    title: str,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    group: int = 1,
    muted_rows: Sequence[int] = (),
) -> Axes:
    """Show `cells` [rows, columns, ...datum]; rows stand together in groups of `group`.

    Labels may hold mathematics. Lines in `muted_rows` are drawn grey: they are data beside a model's lines.
    """
    draw = _images if look.kind == "image" else _lines
    labels = (0.5 if row_labels else 0.0, 0.22 if column_labels else 0.0)  # inches they take on the left and below
    ax, row_centres, column_centres = draw(ax, look, cells, group, muted_rows, labels)
    sheet(ax, title)
    ax.set_yticks(row_centres if row_labels else [], list(row_labels))
    if column_labels:
        ax.set_xticks(column_centres, list(column_labels))
    return ax


def _images(
    ax: Axes | None, look: Look, cells: np.ndarray, group: int, muted_rows: Sequence[int], labels: tuple[float, float]
) -> tuple[Axes, list[float], list[float]]:
    rows, columns = cells.shape[:2]
    tiles = look.tiles(cells.reshape(rows * columns, *cells.shape[2:]))
    height, width = tiles.shape[1:3]
    gap = max(1, round(max(height, width) / 12))
    tops = [r * (height + gap) + (r // group) * (2 * gap if group > 1 else 0) for r in range(rows)]
    lefts = [c * (width + gap) for c in range(columns)]
    colour = tiles.shape[3:]
    mosaic = np.full((tops[-1] + height, lefts[-1] + width, *((4,) if colour else ())), 0.0 if colour else np.nan)
    for i, tile in enumerate(tiles):
        top, left = tops[i // columns], lefts[i % columns]
        mosaic[top : top + height, left : left + width, ...] = (
            np.concatenate([tile, np.ones((height, width, 1))], -1) if colour else tile
        )
    ax = axes(ax, height=min(WIDTH * 1.6, (WIDTH - labels[0]) * mosaic.shape[0] / mosaic.shape[1]) + 0.3 + labels[1])
    shown = mosaic if colour else np.ma.masked_invalid(mosaic)
    ax.imshow(shown, cmap=None if colour else "gray_r" if look.ink else "gray", vmin=0, vmax=1, interpolation="none")
    return ax, [t + (height - 1) / 2 for t in tops], [left + (width - 1) / 2 for left in lefts]


def _lines(
    ax: Axes | None, look: Look, cells: np.ndarray, group: int, muted_rows: Sequence[int], labels: tuple[float, float]
) -> tuple[Axes, list[float], list[float]]:
    from matplotlib.collections import LineCollection

    rows, columns = cells.shape[:2]
    lines = look.tiles(cells.reshape(rows * columns, *cells.shape[2:]))
    low, high = min(look.low, float(lines.min())), max(look.high, float(lines.max()))
    lines = (lines - low) / ((high - low) or 1.0)
    ax = axes(ax, height=min(WIDTH * 1.6, 0.62 * rows) + 0.4 + labels[1])
    across = np.linspace(0.06, 0.94, lines.shape[1])
    tops = [r * 1.0 + (r // group) * (0.25 if group > 1 else 0.0) for r in range(rows)]
    for row in range(rows):
        segments = []
        for column in range(columns):
            for curve in lines[row * columns + column].T:
                segments.append(np.column_stack([column + across, tops[row] + 0.9 - 0.8 * curve]))
            ax.plot([column + 0.06, column + 0.94], [tops[row] + 0.95] * 2, color=FAINT, linewidth=0.8)
        colour = MUTED if row in muted_rows else BLUE
        ax.add_collection(LineCollection(segments, colors=colour, linewidths=1.1))
    ax.set_xlim(0, columns)
    ax.set_ylim(tops[-1] + 1.0, 0)
    return ax, [t + 0.5 for t in tops], [c + 0.5 for c in range(columns)]


def columns_for(n: int, most: int = 16) -> int:
    """Columns of a sheet of `n` cells that come out near a square, at most `most`."""
    return max(1, min(most, int(np.ceil(np.sqrt(n)))))
