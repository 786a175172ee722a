"""What the points of latent space decode to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.pictures import material, tiles
from probgen.pictures.canvas import CLASSES, SHADE, axes, height_for, legend, plot
from probgen.pictures.latents import CHUNK, latent_site, mathematical, posterior_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DRAWS = 1000  # draws of the model that its prior's mean and sd are taken from
_BELOW = 64  # draws of the latents between the one that is shown and the data


def traversal(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    site: str | None = None,
    steps: int = 9,
    dims: int = 10,
    reach: float = 2.5,
    seed: int = 0,
) -> Axes:
    """What each latent dimension does: moved from −`reach` to `reach` sd of its prior, the others at their mean.

    Shows p(x | z)'s mean. The `dims` most active dimensions are shown, by the variance of E[z | x] over the data; without a
    guide, by how far the ends of a dimension lie apart.
    """
    site, shown = latent_site(run, site, guided=False), material.shown_array(run)
    look = material.look_of(run, shown)
    centre, scale = prior_scale(run, data, site, seed)
    order, title = np.arange(centre.size), f"Each dimension of {mathematical(site)}, moved by ±{reach:g} sd"
    if centre.size > dims:
        order = np.argsort(-_activity(run, data, site, shown, centre, reach * scale, seed), kind="stable")[:dims]
        title += f"\nThe {dims} most active of {centre.size} dimensions"
    offsets = np.linspace(-reach, reach, steps)
    points = np.repeat(centre[None], len(order) * steps, 0)
    points[np.arange(len(points)), np.repeat(order, steps)] += np.tile(offsets, len(order)) * np.repeat(
        scale[order], steps
    )
    decoded = decode(run, data, site, points, shown, seed)
    if look.kind in ("plane", "scalar"):
        return _paths(ax, run, data, shown, look, decoded.reshape(len(order), steps, -1), order, title)
    cells = decoded.reshape(len(order), steps, *decoded.shape[1:])
    names = [mathematical(f"{site}_{d + 1}") if "_" not in site else f"{d + 1}" for d in order]
    return tiles.grid(
        ax, look, cells, title, row_labels=names, column_labels=[f"{o:+.2g}".replace("-", "−") for o in offsets]
    )


def manifold(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    site: str | None = None,
    n: int = 16,
    seed: int = 0,
) -> Axes:
    """The data manifold of a two-dimensional latent: p(x | z)'s mean on an n × n grid of Gaussian quantiles.

    z = μ + σ Φ⁻¹((i − ½) / n), left to right and bottom to top (Kingma & Welling 2014, figure 4).
    """
    site, shown = latent_site(run, site, guided=False), material.shown_array(run)
    look = material.look_of(run, shown)
    centre, scale = prior_scale(run, data, site, seed)
    if centre.size != 2:
        raise ProbgenError(
            f"the manifold needs a latent of two dimensions, and {site!r} has {centre.size}: use `traversal`"
        )
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])
    across, up = centre[0] + scale[0] * quantiles, centre[1] + scale[1] * quantiles[::-1]
    points = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    decoded = decode(run, data, site, points, shown, seed)
    title = f"Means of the data over the quantiles of {mathematical(site)}"
    if look.kind in ("plane", "scalar"):
        return _net(ax, run, data, shown, look, decoded.reshape(n, n, -1), title)
    return tiles.grid(ax, look, decoded.reshape(n, n, *decoded.shape[1:]), title)


def _activity(
    run: Any, data: Any, site: str, shown: str, centre: np.ndarray, reach: np.ndarray, seed: int
) -> np.ndarray:
    """How much each dimension of a latent does, one number each."""
    if site in run.structure.sampled:
        rows = material.rows_of(run, data)
        return posterior_means(run, rows, material.choose(rows, CHUNK, seed), site, 8, seed).var(0)
    ends = np.concatenate([centre + np.diag(reach), centre - np.diag(reach)])
    high, low = np.split(decode(run, data, site, ends, shown, seed).astype(float), 2)
    return np.abs(high - low).reshape(centre.size, -1).sum(1)


def prior_scale(run: Any, data: Any, site: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each dimension of a latent under the model.

    From draws of the model; those that agree with the standard normal within five standard errors are taken as
    exactly 0 and 1.
    """
    arrays = material.placeholders(run, data, _DRAWS, seed)
    drawn = run.trained.draw(_DRAWS, seed=seed, arrays=arrays)
    values = np.asarray(drawn[site], dtype=float).reshape(_DRAWS, -1)
    mean, sd = values.mean(0), values.std(0, ddof=1)
    standard = np.all(np.abs(mean) < 5 / math.sqrt(_DRAWS)) and np.all(np.abs(sd - 1) < 5 / math.sqrt(2 * _DRAWS))
    return (np.zeros_like(mean), np.ones_like(sd)) if standard else (mean, sd)


def decode(run: Any, data: Any, site: str, points: np.ndarray, shown: str, seed: int) -> np.ndarray:
    """Means of a data array, in data units, at the given values of one latent.

    Latents above it are held at one draw of the model, those below it are averaged over.
    """
    n, structure = len(points), run.structure
    arrays = material.placeholders(run, data, _DRAWS, seed)
    drawn = run.trained.draw(_DRAWS, seed=seed, arrays=arrays)  # the draws of `prior_scale`: one shape, compiled once
    drawn = {name: np.asarray(value)[:1] for name, value in drawn.items()}
    arrays = {name: np.repeat(value[:1], n, 0) for name, value in arrays.items()}
    held = [name for name, s in structure.latents.items() if s.local and not _follows(structure, name, site)]
    latents = {name: np.repeat(np.asarray(drawn[name]), n, 0) for name in held if name in drawn}
    latents[site] = points.reshape(n, *np.shape(drawn[site])[1:]).astype(np.asarray(drawn[site]).dtype)
    times = _BELOW if any(_follows(structure, name, site) for name in structure.latents) else 1
    decoded = [run.trained.decode(latents, n, seed=seed + i, arrays=arrays) for i in range(times)]
    return material.data_means(run, shown, {name: np.mean([d[name] for d in decoded], axis=0) for name in decoded[0]})


def _follows(structure: Any, name: str, site: str) -> bool:
    """Whether a latent depends on `site`, directly or through others."""
    parents = structure.model[name].parents if name in structure.model else ()
    return any(parent == site or _follows(structure, parent, site) for parent in parents)


def backdrop(ax: Axes, run: Any, data: Any, shown: str, look: material.Look) -> None:
    """The data behind what is drawn in their space, where they are at hand."""
    if look.kind == "plane" and (data is not None or run.data is not None):
        rows = material.rows_of(run, data)
        cloud = np.asarray(rows[material.choose(rows, 2000, 0)][shown], dtype=float).reshape(-1, 2)
        ax.scatter(*cloud.T, s=5, color=SHADE, linewidths=0, rasterized=True, label="data")


def _paths(
    ax: Axes | None,
    run: Any,
    data: Any,
    shown: str,
    look: material.Look,
    paths: np.ndarray,
    order: Sequence[int],
    title: str,
) -> Axes:
    """Points: the path each latent dimension draws in data space."""
    both = paths.reshape(-1, paths.shape[-1])
    ax = axes(ax, height_for(both.min(0), both.max(0)) if look.kind == "plane" else 3.4)
    backdrop(ax, run, data, shown, look)
    for i, (dim, path) in enumerate(zip(order, paths, strict=True)):
        at = (path[:, 0], path[:, 1]) if look.kind == "plane" else (np.arange(len(path)), path[:, 0])
        ax.plot(*at, color=CLASSES[i % len(CLASSES)], marker="o", markersize=3, label=f"dimension {dim + 1}")
    legend(ax, markerscale=1.5)
    return plot(ax, title)


def _net(ax: Axes | None, run: Any, data: Any, shown: str, look: material.Look, net: np.ndarray, title: str) -> Axes:
    """Points: the grid of quantiles as it lies in data space."""
    both = net.reshape(-1, net.shape[-1])
    ax = axes(ax, height_for(both.min(0), both.max(0)) if look.kind == "plane" else 4.6)
    if look.kind == "scalar":
        shown_values = ax.imshow(net[..., 0], cmap="cividis", interpolation="nearest")
        ax.figure.colorbar(shown_values, ax=ax, shrink=0.8)
        return plot(ax, title)
    backdrop(ax, run, data, shown, look)
    for i in range(len(net)):
        ax.plot(*net[i].T, color=CLASSES[0], linewidth=0.9)
        ax.plot(*net[:, i].T, color=CLASSES[1], linewidth=0.9)
    return plot(ax, title)
