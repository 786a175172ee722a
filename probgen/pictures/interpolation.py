"""Ways between points of latent space, and sums of them, decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.pictures import material, tiles
from probgen.pictures.canvas import CLASSES, axes, height_for, plot
from probgen.pictures.decoded import backdrop, decode, prior_scale
from probgen.pictures.latents import latent_site, mathematical, posterior_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATHS = ("spherical", "linear")


def interpolation(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    site: str | None = None,
    pairs: int = 6,
    steps: int = 9,
    path: str = "spherical",
    seed: int = 0,
) -> Axes:
    """From one draw of a latent to another, decoded: `pairs` ways of `steps` points.

    Spherical ways, sin((1 − t) ω) / sin ω · z_a + sin(t ω) / sin ω · z_b with the angle ω between z_a and z_b, keep the length
    that draws of a Gaussian have; the points between two of them on a line are shorter than any draw (White 2016).
    """
    if path not in PATHS:
        raise ProbgenError(f"interpolation: `path` is {path!r}; it is one of {', '.join(PATHS)}")
    site, shown = latent_site(run, site, guided=False), material.shown_array(run)
    look = material.look_of(run, shown)
    centre, scale = prior_scale(run, data, site, seed)
    ends = np.random.default_rng(seed).standard_normal((2, pairs, centre.size))
    points = np.stack([between(*ends, t, path) for t in np.linspace(0, 1, steps)], 1) * scale + centre
    decoded = decode(run, data, site, points.reshape(pairs * steps, -1), shown, seed)
    decoded = decoded.reshape(pairs, steps, *decoded.shape[1:])
    title = f"From one draw of {mathematical(site)} to another"
    if look.kind in ("plane", "scalar"):
        return _ways(ax, run, data, shown, look, decoded.reshape(pairs, steps, -1), title)
    return tiles.grid(ax, look, decoded, title)


def between(a: np.ndarray, b: np.ndarray, t: float, path: str = "spherical") -> np.ndarray:
    """The point t ∈ [0, 1] of the way from rows a to rows b, [N, D]."""
    if path == "linear":
        return (1 - t) * a + t * b
    lengths = np.linalg.norm(a, axis=-1, keepdims=True) * np.linalg.norm(b, axis=-1, keepdims=True)
    angle = np.arccos(np.clip((a * b).sum(-1, keepdims=True) / np.maximum(lengths, np.finfo(float).tiny), -1, 1))
    straight = np.sin(angle) < 1e-6
    safe = np.where(straight, 1.0, np.sin(angle))
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / safe)
    return first * a + np.where(straight, t, np.sin(t * angle) / safe) * b


def arithmetic(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    classes: Sequence[Any] | None = None,
    points: Sequence[Any] | None = None,
    site: str | None = None,
    seed: int = 0,
) -> Axes:
    """z_a − z_b + z_c, decoded beside its parts.

    Each z is the mean of E[z | x] over the rows of a class, for `classes` (a, b, c) of labelled data and a program with a
    guide; or one of three `points`, or the mean of several [n, D] (Radford et al. 2016, figure 7).
    """
    site, shown = latent_site(run, site, guided=points is None), material.shown_array(run)
    look = material.look_of(run, shown)
    if (classes is None) == (points is None):
        raise ProbgenError("arithmetic: give `classes`, three labels (a, b, c), or `points`, three latents")
    chosen = classes if points is None else points
    if len(chosen) != 3:
        raise ProbgenError(f"arithmetic: z_a − z_b + z_c takes three, not {len(chosen)}")
    if points is None:
        parts, names = _class_means(run, data, site, classes, seed), [str(label) for label in classes]
    else:
        parts, names = [np.atleast_2d(np.asarray(p, float)).mean(0).reshape(-1) for p in points], ["a", "b", "c"]
    a, b, c = parts
    decoded = decode(run, data, site, np.stack([a, b, c, a - b + c]), shown, seed)
    labels = [names[0], f"− {names[1]}", f"+ {names[2]}", "="]
    title = f"Arithmetic of {mathematical(site)}"
    if look.kind in ("plane", "scalar"):
        return _marks(ax, run, data, shown, look, decoded.reshape(4, -1), labels, title)
    return tiles.grid(ax, look, decoded[None], title, column_labels=labels)


def _class_means(run: Any, data: Any, site: str, classes: Sequence[Any], seed: int) -> list[np.ndarray]:
    rows = material.rows_of(run, data)
    labelled = material.labels_of(run, rows, np.arange(len(rows)))
    if labelled is None:
        raise ProbgenError("arithmetic: the data have no labels to choose `classes` by: give `points`")
    means = []
    for label in classes:
        index = np.flatnonzero(np.asarray(labelled[1]) == label)
        if not len(index):
            raise ProbgenError(
                f"arithmetic: no row has the label {label!r}; there are {', '.join(map(str, np.unique(labelled[1])))}"
            )
        means.append(posterior_means(run, rows, index[:200], site, 8, seed).mean(0))
    return means


def _ways(ax: Axes | None, run: Any, data: Any, shown: str, look: Any, ways: np.ndarray, title: str) -> Axes:
    """Points: every way as a line in data space."""
    both = ways.reshape(-1, ways.shape[-1])
    ax = axes(ax, height_for(both.min(0), both.max(0)) if look.kind == "plane" else 3.4)
    backdrop(ax, run, data, shown, look)
    for i, way in enumerate(ways):
        at = (way[:, 0], way[:, 1]) if look.kind == "plane" else (np.linspace(0, 1, len(way)), way[:, 0])
        ax.plot(*at, color=CLASSES[i % len(CLASSES)], marker="o", markersize=3)
    return plot(ax, title)


def _marks(
    ax: Axes | None, run: Any, data: Any, shown: str, look: Any, points: np.ndarray, labels: list[str], title: str
) -> Axes:
    """Points: the three parts and their sum, by name."""
    ax = axes(ax, height_for(points.min(0), points.max(0)) if look.kind == "plane" else 3.4)
    backdrop(ax, run, data, shown, look)
    at = points[:, :2] if look.kind == "plane" else np.column_stack([np.arange(4), points[:, 0]])
    ax.scatter(*at.T, color=[CLASSES[0]] * 3 + [CLASSES[1]], zorder=3)
    for place, label in zip(at, labels, strict=True):
        ax.annotate(label, place, xytext=(6, 4), textcoords="offset points")
    return plot(ax, title)
