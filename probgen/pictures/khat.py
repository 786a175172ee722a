"""How far the guide can be trusted, datum by datum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.chunks import particles
from probgen.errors import ProbgenError
from probgen.pictures import material
from probgen.pictures.canvas import BLUE, INK, MUTED, ORANGE, axes, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def khat(run: Any, data: Any = None, ax: Axes | None = None, k: int = 1000, rows: int = 200, seed: int = 0) -> Axes:
    """Histogram of k-hat per datum: the tail index of the importance weights p(x, z) / q(z | x).

    Below 0.5 the guide stands close to the posterior; above 0.7 numbers weighted by it are not to be trusted
    (Vehtari et al. 2024, Pareto smoothed importance sampling).
    """
    values = measured(run, data, k, rows, seed)
    values = values[np.isfinite(values)]
    if not len(values):
        raise ProbgenError("k-hat is not finite for any datum, so there is nothing to draw")
    ax = axes(ax)
    low, high = min(0.0, float(values.min())), max(0.8, float(values.max()))
    ax.hist(values, np.linspace(low, high, 41), color=BLUE)
    for limit, word in ((0.5, "good"), (0.7, "usable")):
        ax.axvline(limit, color=ORANGE if limit == 0.7 else MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        ax.annotate(
            f"{word} below {limit}",
            (limit, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -3),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=8,
            color=INK,
        )
    share = float(np.mean(values > 0.7))
    title = f"k-hat of {len(values):,} data: median {np.median(values):.2f}, {share:.1%} above 0.7"
    return plot(ax, title, "k-hat", "data")


def measured(run: Any, data: Any, k: int, rows: int, seed: int) -> np.ndarray:
    """k-hat per datum of `rows` rows, from `k` importance weights each."""
    if not any(site.local for site in run.structure.sampled.values()):
        raise ProbgenError("k-hat needs a latent per datum that the guide draws, and this program has none")
    source = material.rows_of(run, data)
    index = material.choose(source, rows, seed)
    parts = []
    size = max(1, particles(run.structure) // k)
    for first in range(0, len(index), size):
        arrays = material.prepared(run, source, index[first : first + size], seed)
        parts.append(run.trained.k_hat(run.trained.log_weights(arrays, k=k, seed=seed)))
    return np.concatenate([np.asarray(part, dtype=float) for part in parts])
