"""How far the guide can be trusted, datum by datum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.chunks import particles
from probgen.errors import ProbgenError
from probgen.pictures import material
from probgen.pictures.canvas import BLUE, MUTED, ORANGE, axes, legend, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def khat(
    run: Any, data: Any = None, ax: Axes | None = None, k: int | None = None, rows: int = 200, seed: int = 0
) -> Axes:
    """Histogram of k-hat per datum: the tail index of the importance weights p(x, z) / q(z | x).

    Measured with `k` weights: as many as the evaluation had, at most 1000, drawn anew. Below 0.5 the guide stands close to
    the posterior; above 0.7 numbers weighted by it are not to be trusted (Vehtari et al. 2024, Pareto smoothed importance
    sampling).
    """
    k = k or min(1000, ((run.evaluation or {}).get("protocol") or {}).get("k") or 1000)
    values = measured(run, data, k, rows, seed)
    values = values[np.isfinite(values)]
    if not len(values):
        raise ProbgenError("k-hat is not finite for any datum, so there is nothing to draw")
    ax = axes(ax)
    low, high = min(0.0, float(values.min())), max(0.8, float(values.max()))
    ax.hist(values, np.linspace(low, high, 41), color=BLUE)
    for limit, word, colour in ((0.5, "good", MUTED), (0.7, "usable", ORANGE)):
        ax.axvline(limit, color=colour, linewidth=1.4, linestyle=(0, (4, 3)), label=f"{word} below {limit}")
    legend(ax)
    share = float(np.mean(values > 0.7))
    title = f"k-hat: median {np.median(values):.2f}, {share:.1%} above 0.7"
    return plot(ax, title, f"k-hat of {len(values):,} data, {k:,} weights each", "data")


def measured(run: Any, data: Any, k: int, rows: int, seed: int) -> np.ndarray:
    """k-hat per datum of `rows` rows, from `k` importance weights each; 0 where they are all equal."""
    if not any(site.local for site in run.structure.sampled.values()):
        raise ProbgenError("k-hat needs a latent per datum that the guide draws, and this program has none")
    if not run.structure.weighed:
        raise ProbgenError(
            "k-hat needs weights p(x, z) / q(z | x), and this program gives its data no density given its guide"
        )
    source = material.rows_of(run, data)
    index = material.choose(source, rows, seed)
    parts = []
    size = max(1, particles(run.structure) // k)
    for first in range(0, len(index), size):
        arrays = material.prepared(run, source, index[first : first + size], seed)
        weights = np.asarray(run.trained.log_weights(arrays, k=k, seed=seed), dtype=float)
        equal = np.ptp(weights, axis=0) <= 1e-5 * np.maximum(1.0, np.abs(weights[0]))
        parts.append(np.where(equal, 0.0, run.trained.k_hat(weights)))
    return np.concatenate(parts)
