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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from probgen.calibration.uniformity import Calibration, ranks
from probgen.chunks import particles, pieces, seed_at
from probgen.components import Axes, component_axes, renumbered, state_sites
from probgen.errors import ProbgenError
from probgen.program import Program, Structure
from probgen.sites import arrays_of, stack_numbered

SIMULATIONS, REFITS = 1000, 100  # by default, with the guide as it is and with a fit for each simulation
DRAW, POSTERIOR, CHOOSE, FIT, TOSS = 0, 1, 2, 3, 4  # places of the seeds
_RECIPE = ("steps", "batch_size", "lr", "optimizer", "clip", "ema", "precision", "device")


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
    latents, and the local ones of its first row. Components that are exchangeable are put in order first, truths and
    draws alike. Parameters of the model are those of the run where data are simulated, and learned again with the
    rest. Arrays that the program is given come from the data.

    Raises:
        ProbgenError: the program has no latents, no joint draws (a factor), or a data array that no site draws.
    """
    run = _fitted(run_or_program, data, seed, progress)
    rows_given = _rows(run, data)
    structure = run.trained.structure
    anew = structure.has_global_latents or _drawn(run)
    simulations = (REFITS if anew else SIMULATIONS) if simulations is None else int(simulations)
    _refuse(structure, simulations, draws)
    source = _Source(run, rows_given, seed)
    if anew:
        pairs = _refitted(source, simulations, draws, rows or len(rows_given), progress)
    else:
        pairs = _amortised(source, simulations, draws)
    rng, found = np.random.default_rng(seed_at(seed, TOSS)), {}
    for truth, posterior in pairs:
        for name in truth:
            found.setdefault(name, []).append(ranks(truth[name], posterior[name], rng))
    protocol = {
        "simulations": simulations,
        "draws": draws,
        "seed": seed,
        "guide": bool(structure.guide) and not _drawn(run),
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


def _drawn(run: Any) -> bool:
    """Whether the posterior is the draws of chains, which are of the rows they were run on."""
    return getattr(run.trained, "draws", None) is not None


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
    from probgen.nuts.draws import latent_draws

    structure, components = source.run.trained.structure, _components(source, rows)
    for i in range(simulations):
        began = time.monotonic()
        truth, arrays = source.draw(rows, i)
        trained = _refit(source.run, arrays, seed_at(source.seed, FIT, i))
        posterior = latent_draws(trained, arrays, draws, seed_at(source.seed, POSTERIOR, i))
        found = len(next(iter(posterior.values())))
        if found < draws:
            raise ProbgenError(
                f"calibration: the chains have {found} draws and `draws` is {draws}: ask for fewer, or let NUTS draw more"
            )
        first = {n for n, site in structure.latents.items() if site.local}
        one = {n: np.asarray(v[0] if n in first else v)[None] for n, v in truth.items()}
        many = {n: posterior[n][:, 0] if n in first else posterior[n] for n in truth}
        for site, axes in components.items():
            one, many = (_in_order(values, site, axes, _key(structure, axes)) for values in (one, many))
        yield one, {n: v[:, None] for n, v in many.items()}
        if i == 0 and progress:
            _say(simulations - 1, time.monotonic() - began)


def _components(source: _Source, rows: int) -> dict[str, Axes]:
    """The axes of exchangeable components, by the enumerated latent they belong to; found at draws of the prior."""
    trained = source.run.trained
    found, draws = {}, [source.draw(rows, CHOOSE, i) for i in range(3)]
    names = [n for n in trained.structure.latents if n not in trained.structure.enumerated]
    values = {n: np.stack([truth[n] for truth, _ in draws]) for n in names}
    for site in state_sites(trained.structure) if values else ():
        axes = component_axes(trained, draws[-1][1], values, site)
        if axes is not None:
            found[site] = axes
    return found


def _key(structure: Structure, axes: Axes) -> str:
    """The latent whose values put components in order: one on the real line, where there is one."""
    return next((n for n in axes if structure.latents[n].support.lower().startswith("real")), next(iter(axes)))


def _in_order(values: Draws, site: str, axes: Axes, key: str) -> dict[str, np.ndarray]:
    """Draws [S, ...] with components in ascending order of `key`, so that truth and posterior number them alike.

    That is a function of the latents, the same for both, so that its ranks are uniform wherever theirs are.
    """
    where = np.moveaxis(np.asarray(values[key]), axes[key][0] + 1, 1)
    order = np.argsort(where.reshape(*where.shape[:2], -1).mean(2), axis=1)
    ordered = renumbered(values, axes, order)
    states = np.asarray(values[site]).astype(np.int64)
    ordered[site] = np.take_along_axis(np.argsort(order, 1), states[:, None], 1)[:, 0]
    return ordered


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
