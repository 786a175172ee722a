"""A self-contained HTML document in the house's style: its shell, its sections, pictures inside it, writing it whole.

Nothing is loaded from elsewhere: style and pictures lie in the file, drawn so that they follow light and dark mode.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import io
import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probgen.errors import ProbgenError
from probgen.pictures import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLE = 0.22  # inches that a line of a picture's title takes, which the page sets itself
_COLOURS = {
    canvas.INK: "ink",
    canvas.MUTED: "muted",
    canvas.FAINT: "faint",
    canvas.PAPER: "paper",
    canvas.BLUE: "blue",
    canvas.ORANGE: "orange",
    canvas.SHADE: "shade",
}
_PACKAGES = ("probgen", "torch", "pyro-ppl", "jax", "numpyro", "numpy", "arviz-base")


def document(heading: str, title: str, kicker: str, headline: str, body: str) -> str:
    """The document around `body`, which is HTML; all other words are text."""
    style = importlib.resources.files("probgen").joinpath("report.css").read_text(encoding="utf-8")
    written = f"Written by probgen {_version('probgen') or ''}".strip()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(heading)}</h1>'
        f'<p class="headline">{escape(headline)}</p></header>\n'
        f"{body}\n<footer>{escape(written)}. Likelihoods are in "
        "nats per datum, in the units of the data given, losses in those the program sees; ± is one standard error."
        "</footer>\n</main>\n</body>\n</html>\n"
    )


def section(title: str, lead: str, content: str) -> str:
    """A part of the page: `content` is HTML under a title and a leading sentence."""
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{lead}{content}\n</section>"


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values as a table of two columns."""
    rows = "".join(
        f'<tr><td class="key">{escape(str(name))}</td><td>{escape(str(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def svg(ax: Axes, name: str) -> str:
    """A picture as inline SVG without its title, its colours taken from the page's style."""
    from matplotlib import rc_context

    title = ax.get_title(loc="left")
    ax.set_title("", loc="left")
    width, height = ax.figure.get_size_inches()
    ax.figure.set_size_inches(width, height - _TITLE * (1 + title.count("\n")))
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        ax.figure.savefig(file, format="svg", transparent=True, dpi=200, metadata=nothing)
    ax.set_title(title, loc="left")
    ax.figure.set_size_inches(width, height)
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', text, count=1
    )
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    # Identifiers are made unique in the page: every figure counts its own from one.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)


def write_file(path: Path, content: bytes, name: str, what: str) -> Path:
    """Write `what`, whole or not at all; a folder gets it under `name`."""
    path = path / name if path.is_dir() else path
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise ProbgenError(f"cannot write the {what} to {path}: {error.strerror or error}") from error
    return path


def versions() -> dict[str, str]:
    """The versions of those packages on which numbers depend, as far as they are installed."""
    return {name: found for name in _PACKAGES if (found := _version(name))}


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
