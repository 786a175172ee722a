"""The plate diagram of a program, drawn from its structure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from probgen.errors import ProbgenError
from probgen.pictures.canvas import INK, MUTED, PAPER, SHADE, axes, entitle, plain
from probgen.pictures.layout import RADIUS, Node, arranged, collapsed, layers
from probgen.program import Plate, Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def diagram(run: Any, data: Any = None, ax: Axes | None = None) -> Axes:
    """The plate diagram: sites as circles (observed ones shaded), plates as rounded boxes, dependence as arrows.

    A dashed circle is a discrete latent summed out by enumeration, a double one a value that is not random, a
    square a factor. Of many numbered sites the first two and the last are drawn. `run` may be a Structure too.
    """
    structure = getattr(run, "structure", run)
    if not structure.model:
        raise ProbgenError("the program has no sites, so there is no diagram to draw")
    nodes = collapsed(structure.model)
    depth = layers(nodes)
    places, frames, (left, low, right, high) = arranged(nodes.values(), depth)
    ax = axes(ax, height=max(2.4, min(7.5, (high - low) * 0.95 + 0.4)))
    for plate, frame in frames:
        _plate(ax, plate, frame)
    shapes = {name: _node(ax, node, places[name]) for name, node in nodes.items()}
    for name, node in nodes.items():
        for parent in node.parents:
            _arrow(ax, (parent, name), shapes, places)
    ax.set(xlim=(left, right), ylim=(low, high), aspect="equal")
    ax.set_axis_off()
    return entitle(ax, "Plate diagram")


def _plate(ax: Axes, plate: Plate, frame: tuple[float, float, float, float]) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, bottom, right, top = frame
    style = "round,pad=0,rounding_size=0.14"
    ax.add_patch(
        FancyBboxPatch(
            (left, bottom), right - left, top - bottom, boxstyle=style, fill=False, edgecolor=MUTED, linewidth=1.1
        )
    )
    size = "N" if plate.data else f"{plate.size:,}"
    label = f"{plain(plate.name)} · {size}"
    ax.text(right - 0.12, bottom + 0.07, label, ha="right", va="bottom", fontsize=8.5, color=MUTED)


def _node(ax: Axes, node: Node, at: tuple[float, float]) -> Any:
    from matplotlib.patches import Circle, Rectangle

    x, y = at
    site = node.site
    if node.stands_for_many:
        ax.text(x, y, "⋯", ha="center", va="center", fontsize=16, color=INK)
        return ax.add_patch(Circle(at, RADIUS, visible=False))
    if site.role == "factor":
        half = RADIUS * 0.5
        shape = ax.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, color=INK, zorder=3))
    else:
        fill = SHADE if site.role == "observed" else PAPER
        dashes = (0, (3, 2)) if site.enumerated else "-"
        circle = {"facecolor": fill, "edgecolor": INK, "linewidth": 1.3, "linestyle": dashes, "zorder": 3}
        shape = ax.add_patch(Circle(at, RADIUS, **circle))
        if site.role == "deterministic":
            ax.add_patch(Circle(at, RADIUS * 0.84, **circle))
    right = x + RADIUS + 0.09
    quiet = {"fontsize": 8, "color": MUTED, "linespacing": 1.25, "zorder": 2.5}
    quiet["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}  # over arrows that pass
    if len(node.name) <= 4 and site.role != "factor":
        ax.text(x, y, symbol(node.name), ha="center", va="center", fontsize=13, color=INK, zorder=4)
        ax.text(right, y, caption(site), va="center", **quiet)
    else:
        ax.text(right, y + 0.02, symbol(node.name), va="bottom", fontsize=10, color=INK, zorder=4)
        ax.text(right, y - 0.02, caption(site), va="top", **quiet)
    return shape


def symbol(name: str) -> str:
    """A site's name as set on its node: one letter in italics, a number as subscript."""
    found = re.fullmatch(r"([A-Za-z])(?:_(\d+))?", name)
    if not found:
        return plain(name)
    return f"${found[1]}$" if found[2] is None else f"${found[1]}_{{{found[2]}}}$"


def caption(site: Site) -> str:
    """A site's family, the shape of one event where it has one, and what is done to it."""
    lines = _lines(site.family) if site.role != "factor" else ["factor"]
    event = site.shape[len(site.shape) - site.event_dim :] if site.event_dim else ()
    if event:
        lines.append(" × ".join(str(n) for n in event))
    if site.enumerated:
        lines.append("summed out")
    return plain("\n".join(lines))


def _lines(family: str, width: int = 12) -> list[str]:
    """A long family name, broken before its capitals."""
    lines = [""]
    for word in re.findall(r"[A-Z]?[^A-Z]+|[A-Z]+", family):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    return lines


def _arrow(
    ax: Axes, names: tuple[str, str], shapes: Mapping[str, Any], places: Mapping[str, tuple[float, float]]
) -> None:
    """An arrow from node to node, bent around nodes that lie in its way."""
    from matplotlib.patches import FancyArrowPatch

    start, end = (places[name] for name in names)
    in_the_way = any(_between(start, end, at) for at in places.values())
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=5.5,head_width=2.6",
            color=INK,
            linewidth=1.1,
            zorder=2,
            connectionstyle=f"arc3,rad={0.35 if in_the_way else 0.0}",
            shrinkA=0,
            shrinkB=1.5,
            patchA=shapes[names[0]],
            patchB=shapes[names[1]],
        )
    )


def _between(start: tuple[float, float], end: tuple[float, float], at: tuple[float, float]) -> bool:
    """Whether the node at `at` lies on the straight line from start to end."""
    (x0, y0), (x1, y1), (x, y) = start, end, at
    length = (x1 - x0) ** 2 + (y1 - y0) ** 2
    if not length or at in (start, end):
        return False
    along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length
    off = (x0 + along * (x1 - x0) - x) ** 2 + (y0 + along * (y1 - y0) - y) ** 2
    return 0 < along < 1 and off < (RADIUS + 0.08) ** 2
