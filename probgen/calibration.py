"""`calibration`: simulation-based calibration, whether posteriors hold the truth as often as they say.

    (z*, x*) ~ p(z, x),   z_s ~ q(z | x*), s = 1..L,   rank of z* among the z_s

If q is the posterior of the model, the truth is one more draw of it, and its ranks are uniform. Latents of a row are
looked at with the guide as it is trained. Latents that all rows share have another posterior for every data set: each
simulation draws a whole data set and learns anew from it.

References:
    | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
      https://arxiv.org/abs/1804.06788
    | Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018), https://arxiv.org/abs/1802.02538
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from probgen.chunks import particles, pieces, seed_at
from probgen.errors import ProbgenError
from probgen.program import Program, Structure
from probgen.ranks import inside, ks_pvalue, normalised, ranks, shape
from probgen.sites import arrays_of, stack_numbered

SIMULATIONS, REFITS = 1000, 100  # by default, with the guide as it is and with a fit for each simulation
KS, BAND = 1e-4, 0.99  # what a site's p-value must exceed, and how surely a calibrated site lies in its band
SURE = 3.0  # standard errors from which a shift or a width is put in words
DRAW, POSTERIOR, CHOOSE, FIT, TIES = 0, 1, 2, 3, 4  # places of the seeds
_RECIPE = ("steps", "batch_size", "lr", "optimizer", "clip", "ema", "precision", "device")


@dataclass(frozen=True)
class Calibration:
    """The ranks of simulated truths, [simulations, ...] in 0..draws by latent site, and what they say.

    A site passes if the Kolmogorov-Smirnov p-value of its normalised ranks exceeds 1e-4 and their ECDF lies inside the
    simultaneous 99 % band. Where it holds several numbers both are those of its worst one with Bonferroni's correction,
    so that a calibrated site fails in at most 1 % of all seeds.
    """

    ranks: Mapping[str, np.ndarray]
    draws: int
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def normalised(self) -> dict[str, np.ndarray]:
        """The ranks as numbers in (0, 1), uniform where the site is calibrated: [simulations, ...]."""
        rng = np.random.default_rng(seed_at(self.protocol.get("seed", 0), TIES))
        return {name: normalised(values, self.draws, rng) for name, values in self.ranks.items()}

    @cached_property
    def components(self) -> dict[str, dict[str, np.ndarray]]:
        """The normalised ranks of each number of each site, [simulations], by the number's name."""
        return {
            site: {_component(site, at): values[(slice(None), *at)] for at in np.ndindex(values.shape[1:])}
            for site, values in self.normalised.items()
        }

    @cached_property
    def ks_pvalue(self) -> dict[str, float]:
        """The smallest p-value of each site's numbers, times how many they are."""
        found = {site: [ks_pvalue(u) for u in parts.values()] for site, parts in self.components.items()}
        return {site: min(1.0, min(values) * len(values)) for site, values in found.items()}

    @cached_property
    def inside_band(self) -> dict[str, bool]:
        """Whether the ECDFs of all numbers of a site lie in the band that holds them together with 99 %."""
        return {
            site: all(inside(u, self.level(site)) for u in parts.values()) for site, parts in self.components.items()
        }

    def level(self, site: str) -> float:
        """The probability of the band of one number, so that those of the site lie in theirs with 99 %."""
        return 1 - (1 - BAND) / len(self.components[site])

    @cached_property
    def passed(self) -> bool:
        """Whether every site is calibrated, as far as these simulations can tell."""
        return all(map(self.site_passed, self.ranks))

    def site_passed(self, site: str) -> bool:
        """Whether one site is."""
        return self.inside_band[site] and self.ks_pvalue[site] > KS

    @cached_property
    def verdicts(self) -> dict[str, str]:
        """A sentence on each site: calibrated, or in what way it is not, and the cure."""
        return {site: self._verdict(site) for site in self.ranks}

    def _verdict(self, site: str) -> str:
        count = self.protocol.get("simulations", len(self.ranks[site]))
        if self.site_passed(site):
            return f"calibrated, as far as {count:,} simulations can tell"
        name = min(self.components[site], key=lambda n: ks_pvalue(self.components[site][n]))
        failing = [n for n, u in self.components[site].items() if not inside(u, self.level(site))]
        if failing and name not in failing:
            name = failing[0]
        words, cure = in_words(self.components[site][name], bool(self.protocol.get("guide", True)))
        return f"the posterior of {name} is {words}: {cure}"

    def __str__(self) -> str:
        """A table: a line for each site, and how it was measured."""
        rows = [("site", "numbers", "KS p", "ECDF in band", "")]
        for site, parts in self.components.items():
            inside_band = "yes" if self.inside_band[site] else "NO"
            rows.append((site, str(len(parts)), f"{self.ks_pvalue[site]:.2g}", inside_band, self.verdicts[site]))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        return "\n".join(["Simulation-based calibration", *(line.rstrip() for line in lines), self.said])

    @property
    def said(self) -> str:
        """How it was measured, in one line."""
        how = self.protocol
        parts = [f"{how['simulations']:,} simulations", f"{self.draws} draws each"] if "simulations" in how else []
        parts += [str(how["posterior"])] if "posterior" in how else []
        return "; ".join([*parts, "band of 99 % for all numbers of a site together", f"seed {how.get('seed', 0)}"])


def in_words(values: np.ndarray, guide: bool = True) -> tuple[str, str]:
    """What the shape of normalised ranks [S] says of the posteriors, and what helps.

    U-shaped ranks are those of posteriors that are too narrow, hump-shaped ones of too wide; truths that lie high
    among the draws are those of posteriors that are biased down.
    """
    shift, width, shift_z, width_z = shape(values)
    words = []
    if width_z > SURE:
        words.append(f"too narrow (under-dispersed; the true one is about {width:.2g} times as wide)")
    if width_z < -SURE:
        words.append(f"too wide (over-dispersed; the true one is about {width:.2g} times as wide)")
    if abs(shift_z) > SURE:
        way = "down" if shift > 0 else "up"
        words.append(f"biased {way} (by about {abs(shift):.2g} of its standard deviations)")
    if not words:
        words.append("of another shape than the true one")
    if not guide:
        return " and ".join(words), "sample longer, with more warm-up, and see that the chains agree"
    if width_z > SURE:
        cure = (
            "let the guide know how latents depend on one another (AutoMultivariateNormal, a flow, draws that follow "
            "draws), or train it longer"
        )
    else:
        cure = "train the guide longer, or give it a larger family: a deeper encoder, a flow"
    return " and ".join(words), cure


def calibration(
    run_or_program: Any,
    data: Any = None,
    simulations: int | None = None,
    draws: int = 199,
    rows: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Simulation-based calibration of a run, or of a program that is first fitted to `data` by its own recipe.

    Without global latents `simulations` rows (1,000) are drawn from the trained model, and their latents `draws` times
    from the guide; nothing is fitted. With global latents every simulation (100) draws all of them from their prior,
    then a data set of `rows` rows (as many as the data have), is fitted by the run's own recipe, and ranks the global
    latents, and the local ones of its first row; parameters of the model are those of the run where data are simulated,
    and learned again with the rest. Arrays that the program is given come from the data.

    Raises:
        ProbgenError: the program has no latents, no joint draws (a factor), or a data array that no site draws.
    """
    run = _fitted(run_or_program, data, seed, progress)
    rows_given = _rows(run, data)
    structure = run.trained.structure
    anew = structure.has_global_latents or _bound_to_rows(run)
    simulations = (REFITS if anew else SIMULATIONS) if simulations is None else int(simulations)
    _refuse(structure, simulations, draws)
    source = _Source(run, rows_given, seed)
    if anew:
        pairs = _refitted(source, simulations, draws, rows or len(rows_given), progress)
    else:
        pairs = _amortised(source, simulations, draws)
    rng, found = np.random.default_rng(seed_at(seed, TIES)), {}
    for truth, posterior in pairs:
        for name in truth:
            found.setdefault(name, []).append(ranks(truth[name], posterior[name], rng))
    protocol = {
        "simulations": simulations,
        "draws": draws,
        "seed": seed,
        "guide": bool(structure.guide) and not _bound_to_rows(run),
        "posterior": _how(run, anew, rows or len(rows_given)),
    }
    return Calibration({name: np.concatenate(parts) for name, parts in found.items()}, draws, protocol)


def _fitted(run_or_program: Any, data: Any, seed: int, progress: bool) -> Any:
    """The run, or a fit of the program by its own recipe."""
    if not isinstance(run_or_program, Program):
        return run_or_program
    if data is None:
        raise ProbgenError("calibration of a program needs data to fit it to: calibration(program, data)")
    from probgen.fit import fit

    return fit(run_or_program, data, seed=seed, progress=progress)


def _rows(run: Any, data: Any) -> Any:
    """The rows that stand for the data: those given, else the run's training rows."""
    source = run.data if data is None else data
    if source is None:
        raise ProbgenError("the data of this run cannot be found again: give them, run.calibration(data)")
    if hasattr(source, "train"):
        return source.train
    from probgen.data import as_rows

    return as_rows(source, run.spec)


def undefined(structure: Structure) -> str | None:
    """Why a program has no calibration, if it has none."""
    if not structure.latents:
        return "this program has no latents, so it has no posterior to be calibrated"
    if structure.kind == "unnormalised":
        return (
            "a factor changes the density but not the draws of this program, so that truths cannot be simulated: write "
            "the factor as a sample site"
        )
    return None


def _refuse(structure: Structure, simulations: int, draws: int) -> None:
    why = undefined(structure)
    if why:
        raise ProbgenError(f"calibration: {why}")
    if simulations < 20:
        raise ProbgenError(f"calibration: `simulations` is {simulations}; below 20 ranks say nothing")
    if draws < 9:
        raise ProbgenError(f"calibration: `draws` is {draws}; below 9 the ranks are too coarse")


def _bound_to_rows(run: Any) -> bool:
    """Whether the posterior is that of the training rows alone, as a chain's draws are."""
    return hasattr(run.program.by, "trained") and bool(run.trained.structure.unguided)


def _how(run: Any, anew: bool, rows: int) -> str:
    if not anew:
        return "the guide as trained"
    by = run.program.by
    learned = "" if by is None else f" by {by!r}" if hasattr(by, "players") else f" by {type(by).__name__}"
    return f"each data set of {rows:,} rows fitted anew{learned}"


@dataclass(frozen=True)
class _Source:
    """Where simulated rows come from: the trained model, with given arrays from rows of the data."""

    run: Any
    rows: Any
    seed: int

    def given(self, n: int, *place: int) -> dict[str, np.ndarray]:
        """`n` prepared rows of the data, drawn with replacement: the model's own draws overwrite the data among them."""
        rng = np.random.default_rng(seed_at(self.seed, CHOOSE, *place))
        raw = self.rows[rng.integers(0, len(self.rows), n)]
        arrays = self.run.preparation.forward(raw, rng)[0]
        return {name: arrays[name] for name in self.run.trained.structure.arrays}

    def draw(self, n: int, *place: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Latents, and arrays as the program sees them, of `n` rows drawn from the joint distribution."""
        trained = self.run.trained
        structure, arrays = trained.structure, self.given(n, *place)
        values = trained.draw(n, seed_at(self.seed, DRAW, *place), arrays, prior=True)
        drawn = stack_numbered({name: values[name] for name in structure.observed}, 1)
        there = arrays_of(structure, self.run.preparation.spec(self.run.spec))
        for name, role in structure.arrays.items():
            if role != "data":
                continue
            site = next((s for s, array in there.items() if array == name and s in drawn), None)
            if site is None:
                raise ProbgenError(
                    f"calibration: no site draws the data array {name!r}, so that it cannot be simulated: give the "
                    "site that observes it the array's name"
                )
            arrays[name] = np.reshape(drawn[site], arrays[name].shape).astype(arrays[name].dtype)
        return {name: values[name] for name in structure.latents}, arrays


Draws = Mapping[str, np.ndarray]


def _amortised(source: _Source, simulations: int, draws: int) -> Iterator[tuple[Draws, Draws]]:
    """Truths [B, ...] and posterior draws [L, B, ...] of rows, batch by batch."""
    trained = source.run.trained
    for i, size in enumerate(pieces(simulations, max(1, particles(trained.structure) // draws))):
        truth, arrays = source.draw(size, i)
        yield truth, trained.posterior(arrays, draws, seed_at(source.seed, POSTERIOR, i))[0]


def _refitted(
    source: _Source, simulations: int, draws: int, rows: int, progress: bool
) -> Iterator[tuple[Draws, Draws]]:
    """One truth [1, ...] and its posterior draws [L, 1, ...] at a time: of global latents, and of the first row's."""
    structure = source.run.trained.structure
    for i in range(simulations):
        began = time.monotonic()
        truth, arrays = source.draw(rows, i)
        trained = _refit(source.run, arrays, seed_at(source.seed, FIT, i))
        posterior = trained.posterior(arrays, draws, seed_at(source.seed, POSTERIOR, i))[0]
        first = {n for n, site in structure.latents.items() if site.local}
        yield (
            {n: np.asarray(v[0] if n in first else v)[None] for n, v in truth.items()},
            {n: (posterior[n][:, 0] if n in first else posterior[n])[:, None] for n in truth},
        )
        if i == 0 and progress:
            _say(simulations - 1, time.monotonic() - began)


def _refit(run: Any, arrays: Draws, seed: int) -> Any:
    """The program trained on a simulated data set, by the recipe of the run, as the verbs see it.

    The simulated rows are as the program sees them already, so nothing prepares them again.
    """
    from probgen.fit import fit
    from probgen.parsing import called
    from probgen.schedules import Cosine, Linear, Steps

    recipe = {name: run.options[name] for name in _RECIPE if name in run.options}
    if run.options.get("schedule") is not None:
        known = {"Linear": Linear, "Cosine": Cosine, "Steps": Steps}
        recipe["schedule"] = called(run.options["schedule"], known, "schedule")
    program = replace(run.program, prepare={}, defaults={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said by the run's own fit
        return fit(program, dict(arrays), seed=seed, progress=False, **recipe).trained


def _say(left: int, seconds: float) -> None:
    from probgen.summary import duration

    said = f"calibration: {left} more fits of {duration(seconds)} each, about {duration(left * seconds)} in all"
    print(said, file=sys.stderr, flush=True)


def _component(site: str, at: tuple[int, ...]) -> str:
    return f"{site}[{', '.join(map(str, at))}]" if at else site
