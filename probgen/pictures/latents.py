"""Where data lie in latent space."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.pictures import material
from probgen.pictures.canvas import BLUE, CLASSES, INK, MUTED, PAPER, SHADE, axes, legend, plain, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHUNK = 500  # rows whose posterior is drawn at once


def latents(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    n: int = 2000,
    site: str | None = None,
    draws: int = 16,
    seed: int = 0,
) -> Axes:
    """Posterior means E[z | x] of data, coloured by label where there is one.

    Latents of more than two dimensions are shown on their first two principal components, and the title says so.
    """
    site = latent_site(run, site)
    rows = material.rows_of(run, data)
    index = material.choose(rows, n, seed)
    means = posterior_means(run, rows, index, site, draws, seed)
    name = mathematical(site)
    if means.shape[1] == 1:
        return _strip(ax, run, rows, index, means[:, 0], name)
    title, labels = f"Posterior means of {name}", (f"{name}, first", f"{name}, second")
    if means.shape[1] > 2:
        width = means.shape[1]
        means, share = principal(means)
        title += f"\nPCA of {width} dimensions to 2, with {share:.0%} of the variance"
        labels = ("first principal component", "second principal component")
    ax = axes(ax, height=4.8)
    _scatter(ax, means, material.labels_of(run, rows, index))
    plot(ax, title, *labels)
    ax.set_aspect("equal", adjustable="datalim")
    return ax


def latent_site(run: Any, site: str | None = None, guided: bool = True) -> str:
    """The continuous local latent a picture shows: the one named, else the first the guide draws.

    Where the picture needs no guide, the model's other latents will do.
    """
    structure = run.structure
    there = [name for name in structure.guide if name in structure.sampled]
    there += [] if guided else list(structure.unguided)
    there = [name for name in there if structure.model[name].local and not structure.model[name].discrete]
    if site is not None and site not in there:
        raise ProbgenError(
            f"the program has no continuous latent {site!r} drawn per datum; there is {', '.join(there) or 'none'}"
        )
    if not there:
        raise ProbgenError("this program has no continuous latent per datum, so it has no latent space to draw")
    return site or there[0]


def posterior_means(run: Any, rows: Any, index: np.ndarray, site: str, draws: int, seed: int) -> np.ndarray:
    """E[z | x] of the rows as [rows, dimensions], by the mean of `draws` draws of the guide."""
    means = []
    for first in range(0, len(index), CHUNK):
        arrays = material.prepared(run, rows, index[first : first + CHUNK], seed)
        trained = run.trained
        weighed = run.structure.weighed
        drawn = trained.posterior(arrays, draws, seed)[0] if weighed else trained.guided(arrays, draws, seed)
        values = drawn[site]
        means.append(np.asarray(values).mean(0).reshape(np.shape(values)[1], -1))
    return np.concatenate(means)


def principal(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Coordinates on the first two principal components, and the share of the variance they hold."""
    centred = values - values.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    share = float((singular[:2] ** 2).sum() / max((singular**2).sum(), np.finfo(float).tiny))
    return left[:, :2] * singular[:2], share


def mathematical(name: str) -> str:
    """`z_1` as mathematics; other names as they stand."""
    found = re.fullmatch(r"([A-Za-z])(?:_(\w+))?", name)
    if not found:
        return plain(name)
    letter, below = found.groups()
    return f"${letter}_{{{below}}}$".replace("_{None}", "") if below is None or below.isalnum() else plain(name)


def _scatter(ax: Axes, points: np.ndarray, labels: tuple[str, np.ndarray] | None) -> None:
    """Points coloured by class, each class named at its median, so that colour alone says nothing."""
    options = {"s": 7 if len(points) > 500 else 14, "linewidths": 0, "alpha": 0.75, "rasterized": len(points) > 300}
    if labels is None:
        ax.scatter(*points.T, color=BLUE, **options)
        return
    name, values = labels
    missing = values == -1 if np.issubdtype(values.dtype, np.integer) else np.zeros(len(values), bool)
    ax.scatter(*points[missing].T, color=SHADE, **options)
    points, values = points[~missing], values[~missing]
    classes = np.unique(values)
    if len(classes) > len(CLASSES):
        shown = ax.scatter(*points.T, c=values, cmap="cividis", **options)
        bar = ax.figure.colorbar(shown, ax=ax, shrink=0.8)
        bar.set_label(plain(name), color=INK, fontsize=9)
        bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8)
        bar.outline.set_visible(False)
        return
    for i, value in enumerate(classes):
        chosen = points[values == value]
        ax.scatter(*chosen.T, color=CLASSES[i], **options)
    at = _apart(np.array([np.median(points[values == value], 0) for value in classes]), np.ptp(points, 0).max())
    for i, value in enumerate(classes):
        ax.text(
            *at[i],
            plain(value),
            color=INK,
            fontsize=10,
            fontweight="bold",
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.25", "facecolor": PAPER, "edgecolor": CLASSES[i], "linewidth": 1.4},
        )


def _apart(at: np.ndarray, extent: float) -> np.ndarray:
    """Places of labels [n, 2], pushed apart until none covers another."""
    least = 0.065 * extent
    for _ in range(60):
        between = at[:, None] - at[None] + 1e-9 * np.arange(len(at))[:, None, None]
        distance = np.maximum(np.linalg.norm(between, axis=-1), 1e-12) + np.diag(np.full(len(at), np.inf))
        push = np.maximum(least - distance, 0.0)[..., None] * between / distance[..., None]
        at = at + 0.5 * np.where(np.isfinite(push), push, 0.0).sum(1)
    return at


def _strip(ax: Axes | None, run: Any, rows: Any, index: np.ndarray, means: np.ndarray, name: str) -> Axes:
    """A one-dimensional latent: a histogram of its posterior means for each label."""
    ax = axes(ax)
    labels = material.labels_of(run, rows, index)
    edges = np.histogram_bin_edges(means, bins=40)
    classes = np.unique(labels[1]) if labels else []
    if labels is None or len(classes) > len(CLASSES):
        ax.hist(means, edges, color=BLUE)
    else:
        parts = [means[labels[1] == value] for value in classes]
        names = [plain(value) for value in classes]
        ax.hist(parts, edges, stacked=True, color=CLASSES[: len(parts)], label=names)
        legend(ax, title=plain(labels[0]))
    return plot(ax, f"Posterior means of {name}", name, "data")
