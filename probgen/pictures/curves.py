"""Curves of training: the losses, and the terms they are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.pictures.canvas import BLUE, CLASSES, INK, MUTED, ORANGE, axes, legend, plain, plot
from probgen.sites import numbered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EARLY = 0.05  # the share of a run whose high start would flatten the rest of the curve


def curves(run: Any, data: Any = None, ax: Axes | None = None) -> Axes:
    """Training and validation loss, in nats per datum, by step; of several players, the loss of each."""
    players = [name for name in run.metrics if name.startswith("loss/")]
    colours = (BLUE, *CLASSES[2:])
    series = {name: (name.removeprefix("loss/"), colours[i % len(colours)]) for i, name in enumerate(players)}
    series = (series or {"loss": ("training", BLUE)}) | {"valid_loss": ("validation", ORANGE)}
    lines = {name: _series(run, name) for name in series}
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if not lines:
        raise ProbgenError("this run has no training curve yet: its metrics are empty")
    ax = axes(ax)
    for name, (steps, values) in lines.items():
        label, colour = series[name]
        marker = "o" if len(steps) < 40 else None
        ax.plot(steps, values, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3)
        end = f"{values[-1]:.4g}"
        ax.annotate(
            end,
            (steps[-1], values[-1]),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            va="top" if name == next(iter(lines)) and len(lines) > 1 else "bottom",
        )
    plot(ax, "Loss by step", "step", "loss per datum" if players else "loss (nats per datum)")
    _frame(ax, list(lines.values()))
    if len(lines) > 1:
        legend(ax)
    return ax


def terms(run: Any, data: Any = None, ax: Axes | None = None) -> Axes:
    """The loss's terms by site: log p of observed sites, log p − log q of latent ones, in nats per datum.

    Of a critic, its mean logits at real and fake rows.
    """
    names = [name for name in run.metrics if name.startswith("term/") and not name.endswith("_accuracy")]
    lines = {name: _series(run, name) for name in names}
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if not lines:
        raise ProbgenError("this run has no terms to draw: its loss reports no `term/<site>`")
    if len(lines) > len(CLASSES):
        lines = _summed(lines)
    ax = axes(ax)
    colours = (BLUE, ORANGE, *CLASSES[2:])
    for i, (name, (steps, values)) in enumerate(lines.items()):
        ax.plot(steps, values, color=colours[i % len(colours)], label=plain(name.removeprefix("term/")), linewidth=1.6)
    played = any(name.startswith("loss/") for name in run.metrics)
    plot(ax, "Terms of the losses" if played else "Terms of the loss by site", "step", "term (nats per datum)")
    _frame(ax, list(lines.values()))
    legend(ax, ncols=2 if len(lines) > 6 else 1)
    return ax


def _series(run: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, where it was measured."""
    values = run.metrics.get(name, ())
    steps = run.metrics.get("step", ())
    pairs = [(s, v) for s, v in zip(steps, values, strict=False) if v is not None and np.isfinite(v)]
    return tuple(np.array(pairs, dtype=float).reshape(-1, 2).T)


def _summed(lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numbered sites `z_1 … z_T` as one line, their sum."""
    series = {site: (base, sites) for base, sites in numbered(lines).items() for site in sites}
    summed: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, line in lines.items():
        base, sites = series.get(name, (name, [name]))
        label = f"{base} (sum of {len(sites)})" if len(sites) > 1 else name
        summed[label] = (line[0], np.sum([lines[site][1] for site in sites], axis=0))
    return summed


def _frame(ax: Axes, lines: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Frame what follows the first steps; what starts outside the frame is told by its number."""
    last = max(steps[-1] for steps, _ in lines)
    late = np.concatenate([values[steps >= _EARLY * last] for steps, values in lines])
    everything = np.concatenate([values for _, values in lines])
    low, high = late.min(), late.max()
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    for beyond, limit, arrow in ((everything.max(), high, "↑"), (everything.min(), low, "↓")):
        outside = beyond > high if arrow == "↑" else beyond < low
        if outside and abs(beyond - limit) > 0.5 * (high - low):
            corner = (0.17, 0.97) if arrow == "↑" else (0.17, 0.03)
            ax.text(
                *corner,
                f"{arrow} {beyond:.4g} in the first steps".replace("-", "−"),
                transform=ax.transAxes,
                fontsize=8.5,
                color=MUTED,
                va="top" if arrow == "↑" else "bottom",
            )
        elif outside:
            low, high = min(low, beyond), max(high, beyond)
    ax.set_ylim(low - pad, high + pad)
    ax.margins(x=0.09)
    ax.spines["left"].set_color(INK)
    ax.spines["left"].set_alpha(0.4)
