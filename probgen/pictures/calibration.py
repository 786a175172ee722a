"""Whether the posteriors are calibrated, number by number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.calibration.uniformity import band, ecdf, inside
from probgen.pictures.canvas import BLUE, INK, MUTED, ORANGE, SHADE, axes, entitle, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST, ACROSS = 24, 4  # panels that one picture shows, and those side by side


def calibration(result: Any, ax: Axes | None = None) -> Axes:
    """ECDF of the normalised ranks minus the diagonal, a panel for each number, with the simultaneous 99 % band.

    `result` is what `probgen.calibration` returns. Too narrow posteriors rise above the band on the left and fall
    below it on the right, too wide ones the other way; one arch above is a bias up, one below a bias down
    (Säilynoja et al. 2022, Graphical Test for Discrete Uniformity).
    """
    panels = [(site, name, u) for site, parts in result.components.items() for name, u in parts.items()]
    count, shown = len(panels), panels[:MOST]
    across = min(ACROSS, len(shown))
    down = -(-len(shown) // across)
    title = f"Ranks of {len(shown[0][2]):,} simulated truths: ECDF minus uniform, and its 99 % band"
    if count > MOST:
        title += f"\nThe first {MOST} of {count} numbers"
    ax = axes(ax, height=0.4 + 1.25 * down if down > 1 else 2.0)
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    width, height = 1 / across, 1 / down
    reach = 1.15 * max(_reach(u, result.level(site)) for site, _, u in shown)
    for i, (site, name, u) in enumerate(shown):
        left, top = i % across * width, 1 - i // across * height
        inset = ax.inset_axes((left + 0.13 * width, top - 0.8 * height, 0.84 * width, 0.62 * height))
        _panel(inset, name, u, result.level(site), reach)
        if i % across:
            inset.set_yticklabels([])
        if i + across >= len(shown):
            inset.set_xlabel("rank / (draws + 1)", fontsize=7.5, color=INK, labelpad=2)
    return entitle(ax, title)


def _reach(values: np.ndarray, level: float) -> float:
    grid, lower, upper = band(len(values), level)
    return float(max(np.abs(ecdf(values, grid) - grid).max(), (upper - grid).max(), (grid - lower).max()))


def _panel(ax: Axes, name: str, values: np.ndarray, level: float, reach: float) -> None:
    """One number: blue inside its band, orange where it leaves it."""
    grid, lower, upper = band(len(values), level)
    fine = np.linspace(0, 1, 401)
    ax.fill_between(
        [0, *grid, 1], [0, *(lower - grid), 0], [0, *(upper - grid), 0], color=SHADE, alpha=0.6, linewidth=0
    )
    ax.axhline(0, color=MUTED, linewidth=0.6)
    ax.plot(fine, ecdf(values, fine) - fine, color=BLUE if inside(values, level) else ORANGE, linewidth=1.3)
    ax.set(xlim=(0, 1), ylim=(-reach, reach))
    ax.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    ax.locator_params(axis="y", nbins=4)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=7, width=0.6, length=2, pad=2)
    ax.set_title(plain(name), loc="left", fontsize=8.5, color=INK, pad=3)
    ax.patch.set_alpha(0)
