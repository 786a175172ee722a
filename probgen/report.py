"""`report`: one self-contained HTML page that shows a run: what it says, its numbers, its pictures.

Nothing is loaded from elsewhere: style and pictures lie in the file, drawn so that they follow light and dark mode.
"""

from __future__ import annotations

import inspect
import os
import platform
import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probgen import pictures
from probgen.adversarial.health import signs
from probgen.data.toys import TOYS
from probgen.document import document, pairs, section, svg, versions, write_file
from probgen.errors import ProbgenError
from probgen.evaluate.modes import mode_coverage
from probgen.pictures import material
from probgen.program import Site, arguments
from probgen.show import Description
from probgen.summary import headline, numbers, prepared_by, protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "report.html"

_SHOWN = (("r_hat", 3), ("ess_bulk", 0), ("ess_tail", 0))  # what is said of a chain, and to how many places

_TRUST = (
    '<p class="text">The log-likelihood averages importance weights <i>p</i>(<i>x</i>, <i>z</i>) / <i>q</i>(<i>z</i> | '
    "<i>x</i>) over draws of the guide. k-hat is the tail index of these weights for one datum.</p>"
    '<p class="text">Below 0.5 the guide stands close to the posterior and the estimate converges fast; up to 0.7 it is '
    "usable; above, a few draws decide it, and neither the number nor its error bar is to be trusted.</p>"
    '<p class="protocol">Yao et al. 2018, Yes, but did it work? Evaluating variational inference. Vehtari et al. 2024, '
    "Pareto smoothed importance sampling.</p>"
)


def write(run: Any, path: str | os.PathLike[str] | None = None) -> Path:
    """Write the report to `path`, or to `report.html` in the run's folder with every picture in `pictures/`.

    Raises:
        ProbgenError: neither a path nor a folder to write to.
    """
    folder = getattr(run, "folder", None)
    if path is None and folder is None:
        raise ProbgenError(
            "this run is not saved, so its report has no folder: give a path, `run.report('report.html')`"
        )
    drawn: dict[str, Axes] = {}
    content = page(run, drawn).encode()
    if path is not None:
        return write_file(Path(path), content, FILE, "report")
    with folder.writer():
        folder.write_bytes(FILE, content)
        for name, ax in drawn.items():
            folder.write_with(f"pictures/{name}.png", lambda p, ax=ax: ax.figure.savefig(p, dpi=200))
    return Path(folder.path) / FILE


def page(run: Any, drawn: dict[str, Axes] | None = None) -> str:
    """The report as one HTML document; the pictures' axes are put into `drawn` by name."""
    drawn = {} if drawn is None else drawn
    with pictures.detached():
        body = "\n".join(_sections(run, _Figures(run, drawn)))
    return document(str(run.name), f"{run.name}: report", _origin(run), headline(run), body)


def _sections(run: Any, figures: _Figures) -> Iterator[str]:
    yield section("The program", "", _program(run, figures))
    yield section("Numbers", "", _numbers(run))
    yield section("Training", "", figures.row("curves", "terms") + _played(run))
    yield section(
        "Samples",
        "Draws of the program beside rows of the data, and beside the training data nearest to them: a model that copies "
        f"its training set shows everything twice. {_seen(run)}",
        figures.row("data", "samples", *figures.beside_samples()),
    )
    if run.structure.has_global_latents:
        yield section("Global latents", "Their posterior, one line for each number.", figures.row("forest"))
    if getattr(run, "draws", None) is not None:
        yield section("Chains", "Whether the draws are to be trusted.", _chains(*run.agreed_draws))
    chain = figures.of_chain()
    if chain:
        yield section(
            "The chain", "How draws come out of noise, and what each step of it costs the bound.", figures.row(*chain)
        )
    elif any(site.local for site in run.structure.sampled.values()):
        yield section(
            "Latent space",
            "Where the guide places data, what latents decode to, and what is lost on the way there and back.",
            figures.row("reconstructions", "latents", "traversal", *figures.if_possible("manifold")),
        )
    if run.structure.weighed and any(site.local for site in run.structure.sampled.values()):
        yield section(
            "Trust in the guide",
            "",
            f'<div class="figures">{figures.figure("khat")}\n<div>{_TRUST}</div></div>',
        )
    yield section("How to repeat it", "", _repeat(run))


def _played(run: Any) -> str:
    """What the curves of a critic say, and how many modes of a toy the samples find."""
    said = signs(run.metrics)
    if said and run.data is not None and getattr(TOYS.get(run.data.name), "centres", None) is not None:
        found = mode_coverage(run.sample(2500)[material.shown_array(run)], run.data.name)
        said.append(
            f"2,500 samples find {found['modes']} of {found['of']} modes; {found['high_quality']:.1%} of them lie within three "
            f"standard deviations of one, where a perfect sampler has {found['high_quality_floor']:.1%}"
            + (
                ""
                if found["modes"] == found["of"]
                else ": against collapse try pac=2, a penalty, or objective='relativistic'"
            )
        )
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in said)}</ul>' if said else ""


def _seen(run: Any) -> str:
    """What the program sees of the data, where that is not the data itself."""
    chains = prepared_by(run.preparation.to_json())
    return f"The program sees {'; '.join(chains)}; samples are taken back to the data's own units." if chains else ""


class _Figures:
    """The pictures of one run as HTML figures, each drawn once."""

    def __init__(self, run: Any, drawn: dict[str, Axes]) -> None:
        self.run, self.drawn = run, drawn
        self.refused: dict[str, str] = {}
        self.told: set[str] = set()  # a reason is given once
        self.draw: dict[str, Callable[[Any], Axes]] = {
            name: getattr(pictures, name) for name in pictures.__all__ if name != "detached"
        }
        self.draw["means"] = lambda run: pictures.samples(run, mean=True)

    def row(self, *names: str) -> str:
        """These pictures side by side; one that cannot be drawn says why."""
        return '<div class="figures">\n' + "\n".join(self.figure(name) for name in names) + "\n</div>"

    def if_possible(self, name: str) -> tuple[str, ...]:
        """The picture's name if it can be drawn, for pictures that only some programs have."""
        return (name,) if self._axes(name) is not None else ()

    def beside_samples(self) -> tuple[str, ...]:
        """Neighbours of samples, and means where a sample is a picture whose noise hides what was drawn."""
        try:
            kind = material.look_of(self.run, material.shown_array(self.run)).kind
        except ProbgenError:
            return ()
        noisy = kind in ("image", "vector") and self.run.structure.latents
        means = self.if_possible("means") if noisy else ()
        return (*means, "nearest") if kind != "scalar" else means

    def of_chain(self) -> tuple[str, ...]:
        """Pictures of a diffusion, whose latents are noisy data and no latent space."""
        if getattr(self.run.program, "denoiser", None) is None:
            return ()
        return tuple(name for each in ("filmstrip", "chain_terms") for name in self.if_possible(each))

    def _axes(self, name: str) -> Axes | None:
        if name not in self.drawn and name not in self.refused:
            try:
                self.drawn[name] = self.draw[name](self.run)
            except ProbgenError as error:
                self.refused[name] = str(error)
        return self.drawn.get(name)

    def figure(self, name: str) -> str:
        """One picture with its caption, or why there is none."""
        ax = self._axes(name)
        if ax is None:
            why = escape(self.refused[name])
            if why in self.told:
                return ""
            self.told.add(why)
            return (
                f'<figure><figcaption>{escape(name.capitalize())}</figcaption><p class="undefined">{why}</p></figure>'
            )
        title = _plain(ax.get_title(loc="left"))
        head, _, more = title.partition("\n")
        small = f"<small>{escape(more)}</small>" if more else ""
        ink = any(getattr(image.get_cmap(), "name", "") == "gray_r" for image in ax.images)
        kind = ' class="ink"' if ink else ""
        return f"<figure{kind}><figcaption>{escape(head)}{small}</figcaption>\n{svg(ax, name)}\n</figure>"


def _plain(title: str) -> str:
    """A title's mathematics as plain text: `$z_{1}$` as z_1."""
    title = title.replace(r"\$", "\0")
    title = re.sub(r"\$([^$]*)\$", lambda m: re.sub(r"[{}]", "", m[1]), title)
    return title.replace("\0", "$")


def _program(run: Any, figures: _Figures) -> str:
    halves = f"{_equations(run)}\n{figures.figure('diagram')}"
    return f'{_words(run.program.model)}<div class="figures">{halves}</div>'


def _equations(run: Any) -> str:
    """The factorisation of model and guide, typeset."""
    arrays = {name: name for name in run.structure.arrays}
    guide = getattr(run.program, "guide", None)
    reads = () if guide is None else tuple(arguments(guide, arrays, like=lambda: None))
    rows = len(run.data.train) if run.data is not None else 0
    lines = Description(str(run.name), run.structure, rows, reads).factorisation.splitlines()
    sites = "".join(_site(site) for site in run.structure.model.values())
    items = "".join(f"<li>{_typeset(line)}</li>" for line in lines)
    table = (
        '<div class="scroll"><table class="sites"><thead><tr><th>site</th><th></th><th>distribution</th><th>one event</th>'
        f"<th>plates</th></tr></thead><tbody>{sites}</tbody></table></div>"
    )
    return f'<div><ul class="equations">{items}</ul>{table}</div>'


def _words(model: Any) -> str:
    """What the author says of the program: the docstring of the model, else of its file."""
    doc = inspect.getdoc(model) if inspect.isroutine(model) else None
    module = getattr(model, "__globals__", {})
    if not doc and module.get("__name__") != "__main__":
        doc = inspect.cleandoc(module.get("__doc__") or "")
    first, _, rest = (doc or "").strip().partition("\n\n")
    said = f'<p class="text">{escape(first)}</p>' if first else ""
    return said + (f'<pre class="words">{escape(rest)}</pre>' if rest else "")


def _site(site: Site) -> str:
    event = site.shape[len(site.shape) - site.event_dim :] if site.event_dim else ()
    plates = ", ".join(f"{plate.name} (N)" if plate.data else f"{plate.name} ({plate.size})" for plate in site.plates)
    role = "summed out" if site.enumerated else site.role
    cells = (role, site.family, " × ".join(map(str, event)) or "a number", plates or "none")
    quiet = "".join(f'<td class="quiet">{escape(cell)}</td>' for cell in cells)
    return f"<tr><td>{_typeset(site.name)}</td>{quiet}</tr>"


def _typeset(line: str) -> str:
    """One line of plain mathematics as HTML: names in italics, numbers behind a low line as subscripts."""

    def name(found: re.Match[str]) -> str:
        stem, below = found[1], found[2]
        return f"<i>{stem}</i>" + (f"<sub>{below}</sub>" if below else "")

    return re.sub(r"(?<![&\w])([^\W\d_]+)(?:_(\d+|\w))?(?![\w;])", name, escape(line))


def _numbers(run: Any) -> str:
    found = numbers(run.evaluation)
    notes = list((run.evaluation or {}).get("notes", ()))
    if not found and not notes:
        return (
            '<p class="undefined">This run was not evaluated yet: run.evaluate(data.test), or `probgen evaluate`.</p>'
        )
    rows = []
    for number in found:
        main = ' class="main"' if number.name in ("log_likelihood", "elbo") else ""
        meaning = number.meaning
        if number.monte_carlo is not None:
            meaning += f"; {number.monte_carlo:.2g} of the error is from drawing latents"
        rows.append(
            f'<tr{main}><td class="first">{escape(number.label)}</td><td class="value">{escape(number.text)}</td>'
            f'<td class="quiet unit">{escape(number.unit)}</td><td class="quiet">{escape(meaning)}</td></tr>'
        )
    said = protocol(run.evaluation)
    listed = "".join(f"<li>{escape(str(note))}</li>" for note in notes)
    return (
        '<div class="scroll"><table class="numbers"><thead><tr><th></th><th>value ± standard error</th><th>unit</th>'
        f"<th>meaning</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + (f'<p class="protocol">Protocol: {escape(said)}.</p>' if said else "")
        + (f'<ul class="notes">{listed}</ul>' if listed else "")
    )


def _chains(draws: Any, said: list[str]) -> str:
    """R-hat and ESS of every latent NUTS drew, divergences, what was done to them and what is wrong."""
    rows = "".join(
        f'<tr><td class="first">{_typeset(name)}</td>'
        + "".join(f'<td class="value">{site[n]:.{places}f}</td>' if n in site else "<td></td>" for n, places in _SHOWN)
        + "</tr>"
        for name, site in draws.by_site.items()
    )
    total = f"{draws.chains} chains of {draws.length:,} draws; {draws.divergences:,} of these diverged."
    listed = "".join(f"<li>{escape(note)}</li>" for note in [*said, *draws.notes()])
    return (
        '<div class="scroll"><table class="numbers"><thead><tr><th>latent</th><th>R-hat</th><th>ESS, bulk</th>'
        f"<th>ESS, tails</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="protocol">{escape(total)} The worst of a latent\'s numbers. Vehtari et al. 2021, Rank-normalization, '
        "folding, and localization: an improved R-hat.</p>" + (f'<ul class="notes">{listed}</ul>' if listed else "")
    )


def _repeat(run: Any) -> str:
    config = getattr(run, "config", {})
    settings = {name: value for name, value in dict(run.options).items() if value is not None}
    settings |= {name: config[name] for name in ("by", "device", "compiled", "note") if config.get(name) is not None}
    program = getattr(run.program, "origin", None)
    chosen = {f"program: {name}": value for name, value in dict(getattr(program, "options", {}) or {}).items()}
    found = {"python": platform.python_version(), **(config.get("versions") or versions())}
    return (
        f"<pre>{escape(str(run.command))}</pre>\n"
        '<div class="figures" style="margin-top:24px">'
        f"<div><h3>Settings</h3>{pairs({**chosen, **settings})}</div>"
        f"<div><h3>Versions</h3>{pairs(found)}</div></div>"
    )


def _origin(run: Any) -> str:
    origin = getattr(run.program, "origin", None)
    return Path(origin.path).name if origin is not None and origin.path else "probgen report"
