"""Chains of noisy data: what noise makes of them, how they come out of it again, and what each step costs."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.diffusion.denoiser import GaussianChain
from probgen.errors import ProbgenError
from probgen.pictures import material, tiles
from probgen.pictures.canvas import BLUE, INK, MUTED, ORANGE, WIDTH, axes, entitle, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBERS = 4_000_000  # of all latents, that a picture asks the network about
_BINS = 120
_APART = 30  # times the median: where bars need a logarithmic scale
_OTHER = 0.3  # how far the spread of the guide's x_t may be from σ_t where it is the chain of the denoiser


def noising(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    paths: int = 8,
    name: str | None = None,
    entry: int | None = None,
    seed: int = 0,
) -> Axes:
    """q(x_t) of one number of the data as a heat map over t, and some of the guide's paths from the data into noise.

    t = 0 are the data as the chain sees them. Of several numbers the one is shown that varies most, or `entry`, its place
    in a flat datum; the shade is the square root of the density.
    """
    shown, sites = chain_of_data(run, name)
    rows = material.rows_of(run, data)
    index = material.choose(rows, 2000, seed)
    arrays = material.prepared(run, rows, index, seed)
    start = _embedded(run, shown, arrays[shown]).reshape(len(index), -1)
    entry = _entry(start, entry)
    many = max(1, 5 * _NUMBERS // (len(sites) * start.shape[1]))  # numbers of the guide, which asks no network
    draws = min(20, max(1, many // len(index)))
    size, parts = max(1, min(len(index), many)), []
    for first in range(0, len(index), size):
        batch = {key: values[first : first + size] for key, values in arrays.items()}
        drawn = run.trained.posterior(batch, draws=draws, seed=seed + first)[0]
        parts.append(np.stack([np.reshape(drawn[s], (draws, len(batch[shown]), -1))[..., entry] for s in sites], -1))
    later = np.concatenate(parts, axis=1)
    walks = np.concatenate([np.broadcast_to(start[:, entry, None], (*later.shape[:2], 1)), later], -1)
    title = f"{_number(start, entry)} on its way into noise: $q(x_t)$" + (f" and {paths} paths" if paths else "")
    return _heat(ax, walks.reshape(-1, walks.shape[-1]), walks[0, :paths], title)


def denoising(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    paths: int = 8,
    name: str | None = None,
    entry: int | None = None,
    seed: int = 0,
) -> Axes:
    """p(x_t) of one number of the program's draws as a heat map over t, and some of the model's paths out of noise.

    Drawn as `noising` draws the data: where the program has learned them the two are alike.
    """
    shown, sites = chain_of_data(run, name)
    spec = run.preparation.spec(run.spec)[shown]
    n = int(np.clip(_NUMBERS // (len(sites) * max(1, math.prod(spec.shape))), 200, 4000))
    drawn = _drawn(run, data, n, seed)
    start = _embedded(run, shown, drawn[shown]).reshape(n, -1)
    entry = _entry(start, entry)
    walks = np.stack([start[:, entry], *(drawn[s].reshape(n, -1)[:, entry] for s in sites)], -1)
    title = f"{_number(start, entry)} on its way out of noise: $p(x_t)$" + (f" and {paths} paths" if paths else "")
    return _heat(ax, walks, walks[:paths], title)


def filmstrip(
    run: Any,
    data: Any = None,
    ax: Axes | None = None,
    n: int | None = None,
    frames: int = 8,
    name: str | None = None,
    seed: int = 0,
) -> Axes:
    """Draws of the program while they come about, x_T … x_1, x from left to right, in data units.

    A row is one draw of an image or a vector; points in the plane are drawn together; of single numbers `denoising` has
    the paths.
    """
    shown, sites = chain_of_data(run, name)
    look, steps = material.look_of(run, shown), len(sites)
    if look.kind == "scalar":
        return denoising(run, data, ax, name=name, seed=seed)
    times = np.unique(np.linspace(0, steps, max(2, min(frames, steps + 1))).round().astype(int))[::-1]
    n = n or (400 if look.kind == "plane" else 6)
    drawn = _drawn(run, data, n, seed)
    cells = np.stack([_in_units(run, shown, drawn[sites[t - 1] if t else shown], noisy=t > 0) for t in times], 1)
    labels = [f"$x_{{{t}}}$" if t else "$x$" for t in times]
    title = f"{n} draws on their way out of noise"
    if look.kind == "plane":
        return _clouds(ax, cells.reshape(n, len(times), 2), labels, title)
    return tiles.grid(ax, look, cells, title, column_labels=labels)


def chain_terms(run: Any, data: Any = None, ax: Axes | None = None, rows: int = 200, seed: int = 0) -> Axes:
    """What each step of a diffusion costs: KL(q(x_{t−1} | x_t, x) ‖ p(x_{t−1} | x_t)) in nats per datum, ± one standard error.

    By the terms of the program's own ELBO. The title adds them to −ELBO with the two ends, −log p(x | x_1) of the data as
    the program sees them and KL(q(x_T | x) ‖ p(x_T)). On a logarithmic scale where one step outweighs the others.
    """
    costs, errors = step_costs(run, data, rows, seed)
    inner, times = costs[1:-1], np.arange(2, len(costs))
    ax = axes(ax)
    ax.bar(times, inner, width=0.8, color=BLUE)
    ax.errorbar(times, inner, errors[1:-1], fmt="none", ecolor=INK, elinewidth=0.9)
    sums = f"−ELBO {costs.sum():.4g}: at x {costs[0]:.3g}, in these steps {inner.sum():.3g}, at x_T {costs[-1]:.1g}"
    sums = sums.replace("-", "−").replace("x_T", "$x_T$").replace("at x ", "at $x$ ")
    plot(ax, f"What each step costs\n{sums}", "step t, from $x_t$ to $x_{t-1}$", "KL (nats per datum)")
    if len(inner) and inner.max() > _APART * max(float(np.median(inner)), 0.0):
        ax.set_yscale("log", nonpositive="clip")
        ax.set_ylim(0.5 * max(float(inner[inner > 0].min(initial=inner.max())), 1e-4 * inner.max()), 2 * inner.max())
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(False, axis="x")
    return ax


def step_costs(run: Any, data: Any, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """L_0, L_1, …, L_T of −ELBO = Σ_t L_t and their standard errors over rows, [T + 1] each, in nats per datum.

    A site's term pairs log p(x_t | x_{t+1}) with log q(x_t | x_{t−1}), the step of the guide below it; L_t has
    log q(x_t | x_{t+1}, x) there. The two differ by the entropies of Gaussians, which are known, and over the chain by nothing.
    """
    shown, sites = chain_of_data(run, None)
    alpha, sigma, fresh = _schedule(run, len(sites))
    source, steps = material.rows_of(run, data), len(sites)
    size = math.prod(run.preparation.spec(run.spec)[shown].shape)
    budget = max(1, _NUMBERS // (steps * max(1, size)))
    index = material.choose(source, min(rows, max(20, budget)), seed)
    draws = int(np.clip(budget // len(index), 1, 20))
    arrays = material.prepared(run, source, index, seed)
    _refuse_other_guide(run, arrays, sites, _embedded(run, shown, arrays[shown]), alpha, sigma)
    terms = run.trained.terms(arrays, draws, seed)
    each = np.stack([np.asarray(terms[name], float).mean(0) for name in (shown, *sites)])  # [T + 1, rows]
    half = 0.5 * np.log(fresh)
    forward = np.log(sigma) + np.append(0.0, half)  # log sd of q(x_t | x_{t−1}), with x_0 = x
    posterior = np.log(sigma) + np.append(half, 0.0)  # log sd of q(x_t | x_{t+1}, x), and at T of q(x_T | x)
    each[1:] -= size * (forward - posterior)[:, None]
    return -each.mean(1), each.std(1, ddof=1) / math.sqrt(each.shape[1])


def chain_of_data(run: Any, name: str | None = None) -> tuple[str, list[str]]:
    """The data array that a picture shows, and the latents x_1 … x_T that are noisy data."""
    shown = material.shown_array(run, name)
    site = run.structure.model.get(shown)
    latents, sites = run.structure.latents, []
    while f"{shown}_{len(sites) + 1}" in latents:
        sites.append(f"{shown}_{len(sites) + 1}")
    if not sites or site is None or any(latents[each].shape != site.shape for each in sites):
        raise ProbgenError(
            f"this program has no chain of noisy data to draw: its latents would be {shown}_1, {shown}_2, … of the shape of {shown}"
        )
    return shown, sites


def _schedule(run: Any, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """α_t and σ_t of the denoiser at 1/T, …, 1, and which part of the noise at t + 1 came after t."""
    if getattr(run.program, "denoiser", None) is None:
        raise ProbgenError("the cost of each step is known of diffusions with a denoiser, and this program has none")
    with getattr(run.trained, "running", contextlib.nullcontext)():  # in Pyro the weights are there only while it runs
        chain = run.trained.denoiser(run.trained.arrays, "chain_terms")
        if not isinstance(chain, GaussianChain):
            raise ProbgenError(
                f"the cost of each step is known of Gaussian noise, and this program has a {type(chain).__name__}"
            )
        at, times = chain.schedule.in_numbers(), np.arange(1, steps + 1) / steps
        return at.alpha(times) + 0 * times, at.sigma(times) + 0 * times, at.fresh(times[:-1], times[1:]) + 0 * times[1:]


def _refuse_other_guide(
    run: Any, arrays: dict[str, np.ndarray], sites: list[str], x: np.ndarray, alpha: np.ndarray, sigma: np.ndarray
) -> None:
    """Refuse a guide that does not draw x_t = α_t x + σ_t ε, by what is left of x_t without α_t x."""
    drawn = run.trained.posterior(arrays, draws=1, seed=0)[0]
    for t, site in enumerate(sites):
        ratio = float(np.std(np.asarray(drawn[site][0], float) - alpha[t] * x) / sigma[t])
        if abs(ratio - 1) > _OTHER:
            raise ProbgenError(
                f"the cost of each step is known where the guide is the noising chain of the denoiser, and here {site} has "
                f"{ratio:.2g} times its noise"
            )


def _drawn(run: Any, data: Any, n: int, seed: int) -> dict[str, np.ndarray]:
    """`n` runs of the model, as the program sees them."""
    return run.trained.draw(n, seed=seed, arrays=material.placeholders(run, data, n, seed))


def _whole(run: Any, shown: str) -> bool:
    """Whether the data are whole numbers that the chain sees in −1..1."""
    return run.structure.model[shown].family == "DiscretizedGaussian"


def _embedded(run: Any, shown: str, values: np.ndarray) -> np.ndarray:
    """Prepared data as the chain sees them."""
    if not _whole(run, shown):
        return np.asarray(values, float)
    return np.asarray(values, float) * (2 / run.preparation.spec(run.spec)[shown].range[1]) - 1


def _in_units(run: Any, shown: str, values: np.ndarray, noisy: bool) -> np.ndarray:
    """Data or noisy data, as the chain sees them, in the units of the data."""
    spec = run.preparation.spec(run.spec)[shown]
    if noisy and _whole(run, shown):
        values = (np.asarray(values) + 1) / 2 * spec.range[1]
    return np.asarray(run.preparation.inverse({shown: np.reshape(values, (len(values), *spec.shape))})[shown], float)


def _entry(values: np.ndarray, entry: int | None) -> int:
    if entry is None:
        return int(values.var(0).argmax())
    if not 0 <= entry < values.shape[1]:
        raise ProbgenError(f"`entry` is {entry}; a datum has the entries 0 to {values.shape[1] - 1}")
    return entry


def _number(values: np.ndarray, entry: int) -> str:
    return "A number" if values.shape[1] == 1 else f"Entry {entry}"


def _heat(ax: Axes | None, walks: np.ndarray, paths: np.ndarray, title: str) -> Axes:
    """The density of each column of `walks` [n, T + 1] as a shade, and `paths` [k, T + 1] as lines."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    low, high = np.quantile(walks, (0.0005, 0.9995))
    edges = np.linspace(low - 0.04 * (high - low), high + 0.04 * (high - low), _BINS + 1)
    density = np.stack([np.histogram(column, edges)[0] for column in walks.T], 1) / len(walks) / (edges[1] - edges[0])
    steps = walks.shape[1] - 1
    shade = LinearSegmentedColormap.from_list("shade", [(0.04, 0.44, 0.68, 0.0), (0.04, 0.44, 0.68, 0.95)])
    ax = axes(ax)
    ax.imshow(
        density,
        extent=(-0.5, steps + 0.5, edges[0], edges[-1]),
        origin="lower",
        aspect="auto",
        cmap=shade,
        norm=PowerNorm(0.5, 0, np.quantile(density, 0.995)),
        interpolation="bilinear",
    )
    for path in paths:
        ax.plot(np.arange(steps + 1), path, color=ORANGE, linewidth=0.9)
    plot(ax, title, "step t", "$x_t$, as the program sees it")
    ax.grid(False)
    ax.set(xlim=(-0.5, steps + 0.5), ylim=(edges[0], edges[-1]))
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def _clouds(ax: Axes | None, points: np.ndarray, labels: list[str], title: str) -> Axes:
    """Points [n, frames, 2], a panel for each frame, on one scale."""
    low, high = np.quantile(points.reshape(-1, 2), (0.002, 0.998), axis=0)
    centre, reach = (low + high) / 2, 0.55 * (high - low).max()
    frames = points.shape[1]
    across = frames if frames <= 4 else -(-frames // 2)
    down = -(-frames // across)
    ax = axes(ax, height=0.4 + down * (WIDTH / across + 0.2))
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    for i, label in enumerate(labels):
        left, bottom = i % across / across + 0.01, 1 - (i // across + 1) / down + 0.01
        box = (left, bottom, 1 / across - 0.02, 0.88 / down - 0.02)
        panel = ax.inset_axes(box)
        panel.scatter(*points[:, i].T, s=3, color=BLUE, alpha=0.6, linewidths=0, rasterized=True)
        panel.set(
            xlim=(centre[0] - reach, centre[0] + reach), ylim=(centre[1] - reach, centre[1] + reach), aspect="equal"
        )
        panel.set(xticks=[], yticks=[])
        panel.grid(False)
        panel.patch.set_alpha(0)
        for spine in panel.spines.values():
            spine.set_color(MUTED)
            spine.set_linewidth(0.6)
        panel.set_title(label, loc="left", fontsize=10, color=INK, pad=4)
    return entitle(ax, title)
