"""Where the nodes and plates of a diagram lie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from probgen.program import Plate, Site

RADIUS = 0.30
COLUMN, ROW, MARGIN, LABEL = 1.75, 1.15, 0.16, 0.30

Point = tuple[float, float]
Frame = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Node:
    """A node of the drawing: a site, or a "…" that stands for the middle of numbered ones."""

    name: str
    site: Site
    parents: tuple[str, ...]
    stands_for_many: bool = False


@dataclass
class Box:
    """A plate with what lies in it; the outermost box has no plate."""

    plate: Plate | None = None
    nodes: list[Node] = field(default_factory=list)
    boxes: dict[str, Box] = field(default_factory=dict)

    def put(self, node: Node) -> None:
        """Place a node in the box of its innermost plate."""
        box = self
        for plate in node.site.plates:
            box = box.boxes.setdefault(plate.name, Box(plate))
        box.nodes.append(node)

    def everything(self) -> list[Node]:
        """The nodes in this box and in those inside it."""
        return self.nodes + [node for inner in self.boxes.values() for node in inner.everything()]

    def nesting(self) -> int:
        """How many boxes deep it is inside."""
        return 1 + max((inner.nesting() for inner in self.boxes.values()), default=-1)


def collapsed(sites: Mapping[str, Site], most: int = 4) -> dict[str, Node]:
    """Nodes to draw: of more than `most` numbered sites `z_1 … z_T` the first two, "…", and the last."""
    families: dict[str, list[tuple[int, str]]] = {}
    for name in sites:
        found = re.fullmatch(r"(.+?)_(\d+)", name)
        if found:
            families.setdefault(found[1], []).append((int(found[2]), name))
    renamed = {name: name for name in sites}
    for stem, members in families.items():
        if len(members) > most:
            middle = [name for _, name in sorted(members)[2:-1]]
            renamed.update(dict.fromkeys(middle, f"{stem}_…"))
    nodes: dict[str, Node] = {}
    for name, site in sites.items():
        to = renamed[name]
        parents = tuple(dict.fromkeys(renamed[p] for p in site.parents if p in renamed and renamed[p] != to))
        if to in nodes:
            parents = tuple(dict.fromkeys(nodes[to].parents + parents))
        nodes[to] = Node(to, nodes[to].site if to in nodes else site, parents, to != name)
    return {name: replace(node, parents=_forward(nodes, node)) for name, node in nodes.items()}


def _forward(nodes: Mapping[str, Node], node: Node) -> tuple[str, ...]:
    """A node's parents without those that would close a circle through a "…"."""
    return tuple(p for p in node.parents if node.name not in nodes[p].parents or not nodes[p].stands_for_many)


def layers(nodes: Mapping[str, Node]) -> dict[str, int]:
    """The row of every node: one below its lowest parent."""
    depth: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...] = ()) -> int:
        if name not in depth:
            above = [visit(p, (*path, name)) for p in nodes[name].parents if p not in path]
            depth[name] = 1 + max(above) if above else 0
        return depth[name]

    for name in nodes:
        visit(name)
    return depth


def arranged(
    nodes: Iterable[Node], depth: Mapping[str, int]
) -> tuple[dict[str, Point], list[tuple[Plate, Frame]], Frame]:
    """Places of the nodes, frames of the plates, and the frame of it all.

    What lies outside a plate shares a column with it only above or below it, so that no box encloses a stranger.
    """
    outer = Box()
    for node in nodes:
        outer.put(node)
    levels = _Levels(outer, depth)
    places: dict[str, Point] = {}
    frames: list[tuple[Plate, Frame]] = []
    right = _place(outer, 0.0, levels, places, frames)
    bottom = min([y - 0.6 for _, y in places.values()] + [frame[1] for _, frame in frames])
    top = max([y + 0.5 for _, y in places.values()] + [frame[3] for _, frame in frames])
    return places, frames, (-0.2, bottom - 0.15, max(right, 2.0) + 0.2, top + 0.15)


class _Levels:
    """The rows of a diagram: which box spans which, and their heights."""

    def __init__(self, outer: Box, depth: Mapping[str, int]) -> None:
        self.depth = depth
        spans = [(self.span(box.everything()), box) for box in _inside(outer)]
        self.y = [0.0]
        for level in range(max(depth.values())):
            ends = [box.nesting() + 1 for (_, last), box in spans if last == level]
            starts = [box.nesting() + 1 for (first, _), box in spans if first == level + 1]
            extra = LABEL * max(ends, default=0) + MARGIN * max(starts, default=0) if ends and starts else 0.0
            self.y.append(self.y[-1] - ROW - extra)

    def span(self, nodes: Iterable[Node]) -> tuple[int, int]:
        """The first and the last row of these nodes."""
        rows = [self.depth[node.name] for node in nodes]
        return min(rows), max(rows)

    def shelves(self, box: Box) -> list[list[Box | list[Node]]]:
        """What lies directly in a box, side by side; on one shelf stand those that share no row."""
        shelves: list[list[Box | list[Node]]] = []
        for block in ([box.nodes] if box.nodes else []) + list(box.boxes.values()):
            for shelf in shelves:
                if all(self._apart(block, other) for other in shelf):
                    shelf.append(block)
                    break
            else:
                shelves.append([block])
        return shelves

    def _apart(self, block: Box | list[Node], other: Box | list[Node]) -> bool:
        (first, last), (other_first, other_last) = (
            self.span(b.everything() if isinstance(b, Box) else b) for b in (block, other)
        )
        return last < other_first or other_last < first

    def rows(self, nodes: Iterable[Node]) -> dict[int, list[Node]]:
        """Nodes by row."""
        rows: dict[int, list[Node]] = {}
        for node in nodes:
            rows.setdefault(self.depth[node.name], []).append(node)
        return rows

    def width(self, block: Box | list[Node]) -> float:
        """How much room a box, or the nodes of one, need across."""
        if not isinstance(block, Box):
            return COLUMN * max(len(row) for row in self.rows(block).values())
        widths = [max(self.width(b) for b in shelf) for shelf in self.shelves(block)]
        return sum(widths) + MARGIN * (len(widths) - 1) + (2 * MARGIN if block.plate else 0.0)


def _inside(box: Box) -> list[Box]:
    return [b for inner in box.boxes.values() for b in (inner, *_inside(inner))]


def _place(
    box: Box, left: float, levels: _Levels, places: dict[str, Point], frames: list[tuple[Plate, Frame]]
) -> float:
    """Place what lies in a box whose left edge is given; returns its right edge."""
    x = left + (MARGIN if box.plate else 0.0)
    for shelf in levels.shelves(box):
        width = max(levels.width(block) for block in shelf)
        for block in shelf:
            start = x + (width - levels.width(block)) / 2
            if isinstance(block, Box):
                _place(block, start, levels, places, frames)
            else:
                _place_nodes(block, start, levels, places)
        x += width + MARGIN
    right = x - MARGIN + (MARGIN if box.plate else 0.0)
    if box.plate:
        first, last = levels.span(box.everything())
        bottom = levels.y[last] - 0.44 - LABEL * (1 + box.nesting())
        top = levels.y[first] + 0.36 + MARGIN * (1 + box.nesting())
        frames.append((box.plate, (left, bottom, right, top)))
    return right


def _place_nodes(nodes: list[Node], left: float, levels: _Levels, places: dict[str, Point]) -> None:
    """Nodes row by row, each row centred, in the order of their parents."""
    width = levels.width(nodes)
    for level, row in levels.rows(nodes).items():
        first = left + (width - COLUMN * len(row)) / 2 + RADIUS + 0.12
        for i, node in enumerate(sorted(row, key=lambda n: _pull(n, places))):
            places[node.name] = (first + i * COLUMN, levels.y[level])


def _pull(node: Node, places: Mapping[str, Point]) -> float:
    at = [places[p][0] for p in node.parents if p in places]
    return sum(at) / len(at) if at else 0.0
