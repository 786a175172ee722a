"""The plate diagram of a program as text and as graphviz source; no graphviz is needed to read the first.

(latent)  [observed]  {summed out}  ■ factor;  a plate is a box, `← z` names the parents
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from probgen.program import Plate, Structure


def boxes(structure: Structure, rows: int) -> str:
    """The diagram in text."""
    return "\n".join(_box(_tree(structure), rows))


def _tree(structure: Structure) -> dict[Any, Any]:
    """Nodes by plate: {None: [nodes here], plate: tree inside it}."""
    from probgen.pictures.diagram import collapsed

    tree: dict[Any, Any] = {None: []}
    for node in collapsed(structure.model).values():
        here = tree
        for plate in node.site.plates:
            here = here.setdefault(plate, {None: []})
        here[None].append(node)
    return tree


def _mark(node: Any) -> str:
    site = node.site
    if node.stands_for_many:
        return " ⋮"
    if site.role == "factor":
        return f" ■  {node.name}"
    if site.role == "latent" and site.enumerated:
        return f"{{{node.name}}}"
    return {"latent": f"({node.name})", "observed": f"[{node.name}]"}.get(site.role, f" {node.name} ")


def _box(tree: Mapping[Any, Any], rows: int) -> list[str]:
    width = max((len(_mark(node)) for node in tree[None]), default=0)
    lines = []
    for node in tree[None]:
        site = node.site
        event = "×".join(str(n) for n in site.shape[len(site.shape) - site.event_dim :]) if site.event_dim else ""
        arrow = f"  ← {', '.join(node.parents)}" if node.parents else ""
        told = "" if node.stands_for_many else f"  {site.family} {event}".rstrip()
        lines.append(f"{_mark(node):<{width}}{told}{arrow}".rstrip())
    for plate, inside in tree.items():
        if plate is not None:
            lines += _framed(_box(inside, rows), _size(plate, rows))
    return lines


def _size(plate: Plate, rows: int) -> str:
    return f"{plate.name} · N = {rows:,}" if plate.data else f"{plate.name} · {plate.size:,}"


def _framed(lines: list[str], title: str) -> list[str]:
    width = max([len(line) for line in lines] + [len(title) + 1])
    top = f"┌ {title} " + "─" * (width - len(title)) + "┐"
    return [top, *(f"│ {line:<{width}} │" for line in lines), "└" + "─" * (width + 2) + "┘"]


def dot(structure: Structure, rows: int) -> str:
    """The plate diagram as graphviz source: latents white, data grey, summed-out latents dashed, plates as boxes."""
    tree = _tree(structure)
    lines = ["digraph program {", '  node [fontname="Helvetica", style="filled", fillcolor="white"];']
    lines += _dot_box(tree, rows, "  ", "cluster")
    for node in _nodes(tree):
        lines += [f"  {_quoted(parent)} -> {_quoted(node.name)};" for parent in node.parents]
    return "\n".join([*lines, "}"]) + "\n"


def _nodes(tree: Mapping[Any, Any]) -> Iterator[Any]:
    yield from tree[None]
    for plate, inside in tree.items():
        if plate is not None:
            yield from _nodes(inside)


def _dot_box(tree: Mapping[Any, Any], rows: int, pad: str, path: str) -> list[str]:
    lines = [f"{pad}{_quoted(node.name)} [{_dot_style(node)}];" for node in tree[None]]
    for i, (plate, inside) in enumerate((p, t) for p, t in tree.items() if p is not None):
        name = f"{path}_{i}"
        lines += [
            f"{pad}subgraph {_quoted(name)} {{",
            f"{pad}  label={_quoted(_size(plate, rows))}; labeljust=r; labelloc=b;",
        ]
        lines += [*_dot_box(inside, rows, pad + "  ", name), pad + "}"]
    return lines


def _dot_style(node: Any) -> str:
    site = node.site
    if node.stands_for_many:
        return 'label="…", shape=plaintext'
    if site.role == "factor":
        return 'shape=box, fillcolor=black, label="", width=0.2, height=0.2'
    shape = "doublecircle" if site.role == "deterministic" else "circle"
    style = 'style="filled,dashed"' if site.role == "latent" and site.enumerated else 'style="filled"'
    fill = "lightgrey" if site.role == "observed" else "white"
    return f"shape={shape}, {style}, fillcolor={fill}, tooltip={_quoted(site.family)}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
