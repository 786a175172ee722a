"""The posterior of the latents that all data share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.components import state_sites
from probgen.components.relabel import agreeing
from probgen.errors import ProbgenError
from probgen.pictures.canvas import BLUE, MUTED, axes, plain, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 24  # numbers that one picture shows


def forest(run: Any, data: Any = None, ax: Axes | None = None, draws: int = 400, seed: int = 0) -> Axes:
    """Global latents, one line for each of their numbers: median, half and 94% of the posterior's draws."""
    names = [name for name, site in run.structure.sampled.items() if not site.local and not site.discrete]
    if not names:
        raise ProbgenError("this program has no continuous global latent that a guide draws")
    arrays = dict(run.trained.arrays)
    values, done = run.trained.posterior(arrays, draws=draws, seed=seed)[0], {}
    if state_sites(run.structure):
        values, done = agreeing(run.trained, arrays, values)
    lines = [line for name in names for line in _lines(name, np.asarray(values[name], dtype=float))]
    title = "Posterior of the global latents"
    if any(renumbering.moved for renumbering in done.values()):
        title += "\nComponents bear the same number in all draws"
    if len(lines) > MOST:
        title += f"\nThe first {MOST} of {len(lines)} numbers"
        lines = lines[:MOST]
    ax = axes(ax, height=0.9 + 0.24 * len(lines))
    for i, (_, drawn) in enumerate(lines):
        low, lower, middle, upper, high = np.quantile(drawn, [0.03, 0.25, 0.5, 0.75, 0.97])
        ax.plot([low, high], [i, i], color=BLUE, linewidth=1.2)
        ax.plot([lower, upper], [i, i], color=BLUE, linewidth=3.6, solid_capstyle="round")
        ax.plot([middle], [i], marker="o", markersize=5, color=BLUE, markeredgecolor="white", markeredgewidth=0.8)
    plot(ax, title, "median, 50% and 94% of the draws")
    ax.set_yticks(range(len(lines)), [name for name, _ in lines])
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.axvline(0, color=MUTED, linewidth=0.8, zorder=0.5)
    return ax


def _lines(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Each number of a site with its name and draws."""
    if values.ndim == 1:
        return [(plain(name), values)]
    places = np.ndindex(values.shape[1:])
    return [(plain(f"{name}[{', '.join(map(str, at))}]"), values[(slice(None), *at)]) for at in places]
