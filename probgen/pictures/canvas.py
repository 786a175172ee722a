"""What all pictures share: axes, colours and type. Global matplotlib settings are never touched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, FAINT, PAPER = "#20242c", "#6e7580", "#e3e5e9", "#fefefe"
BLUE, ORANGE, SHADE = "#0a6fae", "#d1850b", "#c9ced6"

# Ten colours that stay apart for colour-blind readers (seaborn's "colorblind", after Okabe and Ito).
CLASSES = (
    "#0173b2",
    "#de8f05",
    "#029e73",
    "#d55e00",
    "#cc78bc",
    "#ca9161",
    "#fbafe4",
    "#949494",
    "#ece133",
    "#56b4e9",
)
WIDTH = 5.4  # inches: the one width of every picture

_detached: ContextVar[bool] = ContextVar("detached", default=False)


@contextlib.contextmanager
def detached() -> Iterator[None]:
    """Inside, new pictures are figures of their own that pyplot neither shows nor keeps."""
    token = _detached.set(True)
    try:
        yield
    finally:
        _detached.reset(token)


def axes(ax: Axes | None, height: float = 3.4, width: float = WIDTH) -> Axes:
    """The axes to draw on: those given, else new ones, which a notebook shows as any pyplot figure."""
    if ax is not None:
        return ax
    size = {"figsize": (width, height), "layout": "constrained"}
    if _detached.get():
        from matplotlib.figure import Figure

        return Figure(**size).add_subplot()
    from matplotlib import pyplot

    return pyplot.subplots(**size)[1]


def plot(ax: Axes, title: str, xlabel: str = "", ylabel: str = "") -> Axes:
    """Dress axes that carry numbers: two spines, quiet ticks, a title set left."""
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, width=0.8, length=3)
    ax.grid(True, color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel(xlabel, fontsize=10, color=INK)
    ax.set_ylabel(ylabel, fontsize=10, color=INK)
    return entitle(ax, title)


def height_for(low: Any, high: Any, margin: float = 0.6) -> float:
    """The height that equal axes over these corners [2], [2] want at the one width."""
    across, up = (float(b - a) or 1.0 for a, b in zip(low, high, strict=True))
    return min(5.4, max(2.6, (WIDTH - 0.4) * up / across + margin))


def sheet(ax: Axes, title: str) -> Axes:
    """Dress axes that carry pictures alone: no spines, no ticks."""
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0, labelcolor=MUTED, labelsize=8, pad=4)
    ax.set_xticks([])
    ax.grid(False)
    return entitle(ax, title)


def entitle(ax: Axes, title: str) -> Axes:
    """Set the title left, in the pictures' own type."""
    ax.set_title(title, loc="left", fontsize=10.5, color=INK)
    ax.patch.set_alpha(0)
    return ax


def plain(text: Any) -> str:
    """Text as it stands: a dollar sign in a user's name does not open mathematics."""
    return str(text).replace("$", r"\$")


def legend(ax: Axes, **options: Any) -> None:
    """A legend without a frame, in ink."""
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, **options)
