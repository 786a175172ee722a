"""Pictures in data space: data, samples, samples beside their nearest training data, reconstructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.pictures import canvas, material, tiles
from probgen.pictures.canvas import BLUE, FAINT, INK, MUTED, ORANGE, SHADE, axes, legend, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PAIRS = {"image": 32, "vector": 16, "plane": 150, "scalar": 200}  # how many samples or data are shown with a partner


def data(
    run: Any, data: Any = None, ax: Axes | None = None, n: int = 64, name: str | None = None, seed: int = 0
) -> Axes:
    """Rows of the data, drawn as `samples` draws samples."""
    shown = material.shown_array(run, name)
    rows = material.rows_of(run, data)
    look = material.look_of(run, shown)
    index = material.choose(rows, n if look.kind in ("image", "vector") else 2000, seed)
    return _show(ax, look, rows[index][shown], "Data", MUTED, None)


def samples(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    n: int | None = None,
    name: str | None = None,
    mean: bool = False,
    seed: int = 0,
) -> Axes:
    """Draws of the unconditioned program: a sheet of images, a scatter, or small-multiple lines.

    With `mean` each sample is the mean of the data site's distribution at the drawn latents, as papers often show.
    Points are laid over the data, or over the data's exact density where it is known.
    """
    shown = material.shown_array(run, name)
    look = material.look_of(run, shown)
    n = n or _samples(run, look)
    values = means(run, n, data, shown, seed) if mean else material.drawn_data(run, n, shown, data, seed)
    given = material.given_names(run)
    title = "Means of the data at drawn latents" if mean else "Samples"
    title += f" given {', '.join(given)}" if given else ""
    behind = None
    if look.kind in ("plane", "scalar") and (run.data is not None or data is not None):
        rows = material.rows_of(run, data)
        behind = rows[material.choose(rows, 2000, seed)][shown]
    density = getattr(run.data, "log_prob", None) if look.kind == "plane" else None
    return _show(ax, look, values, title, BLUE, behind, density)


def nearest(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    n: int | None = None,
    name: str | None = None,
    seed: int = 0,
    rows: int = 60_000,
) -> Axes:
    """Samples, the first of `samples`, beside the training data nearest to them, by Euclidean distance in data units.

    A model that copies its training set shows twice the same picture. At most `rows` training rows are searched,
    as the title says.
    """
    shown = material.shown_array(run, name)
    look = material.look_of(run, shown)
    n = n or _PAIRS[look.kind]
    drawn = material.drawn_data(run, max(n, _samples(run, look)), shown, data, seed)[:n]
    found, searched = nearest_rows(material.training_rows(run, data), shown, drawn, rows)
    title = f"Samples and the nearest of {searched:,} training rows"
    return _pairs(ax, look, drawn, found, ("sample", "nearest"), title, muted=1)


def reconstructions(
    run: Any, data: Any = None, ax: Axes | None = None, n: int | None = None, name: str | None = None, seed: int = 0
) -> Axes:
    """Data above their reconstructions: the mean of p(x | z) at one draw z ~ q(z | x)."""
    if not run.structure.sampled:
        raise ProbgenError("this program has no latents that a guide draws, so it has no reconstructions")
    shown = material.shown_array(run, name)
    look = material.look_of(run, shown)
    rows = material.rows_of(run, data)
    index = material.choose(rows, n or _PAIRS[look.kind], seed)
    means = run.trained.reconstruct(material.prepared(run, rows, index, seed), seed=seed)
    rebuilt = material.data_means(run, shown, means)
    return _pairs(ax, look, rows[index][shown], rebuilt, ("data", "rebuilt"), "Data and their reconstructions", muted=0)


def _samples(run: Any, look: material.Look) -> int:
    """How many samples are shown; where latents are global, each is a run of its own."""
    if look.kind in ("image", "vector"):
        return 64
    return 300 if run.structure.has_global_latents else 2000


def means(run: Any, n: int, data: Any, shown: str, seed: int) -> np.ndarray:
    """Means of a data array, in data units, at `n` latents drawn from the model."""
    arrays = material.placeholders(run, data, n, seed)
    drawn = run.trained.draw(n, seed=seed, arrays=arrays)
    latents = {name: drawn[name] for name, s in run.structure.latents.items() if s.local and name in drawn}
    decoded = run.trained.decode(latents, n, seed=seed, arrays=arrays)
    return material.data_means(run, shown, decoded)


def nearest_rows(rows: Any, name: str, values: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """The row nearest to each value by Euclidean distance, and how many rows were searched."""
    searched = min(len(rows), most)
    if not searched:
        raise ProbgenError("there are no training rows to search for the nearest one")
    flat = np.asarray(values, dtype=float).reshape(len(values), -1)
    best = np.full(len(flat), np.inf)
    where = np.zeros(len(flat), dtype=np.int64)
    for first in range(0, searched, 4096):
        block = np.asarray(rows[slice(first, min(first + 4096, searched))][name], dtype=float)
        block = block.reshape(len(block), -1)
        distance = (flat**2).sum(1)[:, None] - 2.0 * flat @ block.T + (block**2).sum(1)
        closest = distance.argmin(1)
        near = distance[np.arange(len(flat)), closest]
        where = np.where(near < best, first + closest, where)
        best = np.minimum(best, near)
    order, back = np.unique(where, return_inverse=True)
    return np.asarray(rows[order][name])[back], searched


def _show(
    ax: Axes | None,
    look: material.Look,
    values: np.ndarray,
    title: str,
    colour: str,
    behind: np.ndarray | None,
    density: Any = None,
) -> Axes:
    values = np.asarray(values)
    if look.kind == "plane":
        return _plane(ax, look, values, title, colour, behind, density)
    if look.kind == "scalar":
        return _histogram(ax, values, title, colour, behind)
    columns = tiles.columns_for(len(values))
    values = values[: len(values) // columns * columns]
    cells = values.reshape(-1, columns, *values.shape[1:])
    muted = range(len(cells)) if colour == MUTED else ()
    return tiles.grid(ax, look, cells, title, muted_rows=muted)


def _plane(
    ax: Axes | None,
    look: material.Look,
    values: np.ndarray,
    title: str,
    colour: str,
    behind: np.ndarray | None,
    density: Any,
) -> Axes:
    points = np.asarray(values, dtype=float).reshape(len(values), 2)
    around = points if behind is None else np.asarray(behind, dtype=float).reshape(-1, 2)
    low, high = around.min(0), around.max(0)
    pad = 0.08 * (high - low)
    (left, bottom), (right, top) = low - pad, high + pad
    ax = axes(ax, canvas.height_for(low, high))
    if density is not None:
        _density(ax, density, (left, right, bottom, top))
        title += ", over the exact density"
    elif behind is not None:
        ax.scatter(*around.T, s=5, color=SHADE, linewidths=0, label="data", rasterized=True)
    ax.scatter(*points.T, s=4, color=colour, alpha=0.65, linewidths=0, label="samples", rasterized=True)
    outside = np.mean(~np.all((points >= (left, bottom)) & (points <= (right, top)), axis=1))
    if outside > 0:
        title += f" ({outside:.1%} outside the frame)"
    plot(ax, title)
    ax.grid(False)
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    if behind is not None and density is None:
        legend(ax, loc="upper right", markerscale=3)
    return ax


def _density(ax: Axes, log_prob: Any, extent: tuple[float, float, float, float]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    across, up = (np.linspace(extent[i], extent[i + 1], 160) for i in (0, 2))
    at = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    p = np.exp(np.asarray(log_prob(at), dtype=float)).reshape(160, 160)
    shade = LinearSegmentedColormap.from_list("shade", [(0.55, 0.58, 0.64, 0.0), (0.55, 0.58, 0.64, 0.75)])
    ax.imshow(p, extent=extent, origin="lower", cmap=shade, aspect="equal", interpolation="bilinear")


def _histogram(ax: Axes | None, values: np.ndarray, title: str, colour: str, behind: np.ndarray | None) -> Axes:
    ax = axes(ax)
    flat = np.asarray(values, dtype=float).ravel()
    everything = flat if behind is None else np.concatenate([flat, np.ravel(behind).astype(float)])
    edges = np.histogram_bin_edges(everything, bins=40)
    if behind is not None:
        ax.hist(np.ravel(behind), edges, density=True, color=SHADE, label="data")
    ax.hist(flat, edges, density=True, histtype="step", color=colour, linewidth=1.6, label=title)
    if behind is not None:
        legend(ax)
    return plot(ax, title, "value", "density")


def _pairs(
    ax: Axes | None,
    look: material.Look,
    first: np.ndarray,
    second: np.ndarray,
    names: tuple[str, str],
    title: str,
    muted: int,
) -> Axes:
    first, second = np.asarray(first), np.asarray(second)
    if look.kind in ("plane", "scalar"):
        return _moves(ax, look, first, second, names, title)
    columns = min(8 if look.kind == "image" else 4, len(first))
    bands = len(first) // columns
    cells = np.stack([a[: bands * columns].reshape(bands, columns, *a.shape[1:]) for a in (first, second)], axis=1)
    cells = cells.reshape(2 * bands, *cells.shape[2:])
    grey = range(muted, 2 * bands, 2)
    return tiles.grid(ax, look, cells, title, row_labels=names * bands, group=2, muted_rows=grey)


def _moves(
    ax: Axes | None,
    look: material.Look,
    first: np.ndarray,
    second: np.ndarray,
    names: tuple[str, str],
    title: str,
) -> Axes:
    """Points joined to their partners; scalars against their partners."""
    start, end = (np.asarray(a, dtype=float).reshape(len(a), -1) for a in (first, second))
    both = np.concatenate([start, end])
    ax = axes(ax, canvas.height_for(both.min(0), both.max(0)) if look.kind == "plane" else 4.6)
    if look.kind == "scalar":
        ends = (min(start.min(), end.min()), max(start.max(), end.max()))
        ax.plot(ends, ends, color=MUTED, linewidth=0.8)
        ax.scatter(start, end, s=10, color=BLUE, linewidths=0, alpha=0.7)
        return plot(ax, title, names[0], names[1])
    from matplotlib.collections import LineCollection

    ax.add_collection(LineCollection(np.stack([start, end], 1), colors=MUTED, linewidths=0.6, alpha=0.6))
    ax.scatter(*start.T, s=12, color=BLUE, linewidths=0, label=names[0], zorder=3)
    ax.scatter(*end.T, s=12, color=ORANGE, linewidths=0, label=names[1], zorder=3)
    plot(ax, title)
    ax.set_aspect("equal")
    ax.grid(True, color=FAINT)
    legend(ax, loc="upper right")
    ax.spines["left"].set_color(INK)
    return ax
