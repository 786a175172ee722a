"""`sample`: draws of the unconditioned program, in the data's own units, or of what is not known of given data.

θ ~ q(θ) (or p(θ)),   z_i ~ p(z | θ, given_i),   x_i ~ p(x | z_i, θ, given_i),   i = 1..n

Data in `given`, with NaN for what is not known, are held fixed: see `impute`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from probgen.chunks import particles, pieces, seed_at
from probgen.energy import Langevin
from probgen.energy.requirements import usual_chain, weighs_its_data
from probgen.errors import ProbgenError, did_you_mean
from probgen.nuts.chains import Sampling
from probgen.program import Site, Structure
from probgen.sample.impute import GLOBAL_DRAWS, global_draws, impute
from probgen.sample.known import known_entries
from probgen.sites import arrays_of, stack_numbered


def sample(
    trained: Any,
    preparation: Any,
    spec: Mapping[str, Any],
    n: int,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
    prior: bool = False,
    sampler: Any = None,
) -> dict[str, np.ndarray]:
    """`n` rows of every site of the model, data sites taken back through `prepare`.

    Local latents come from the model. Global latents come from the guide, one draw for each row; with `prior=True`
    they come from the model, one draw for all rows (no axis of rows). `given` holds the arrays that the program is
    conditioned on, one value for all rows or `n` of them, in the data's own units; and data, with NaN for the entries
    that are not known: the known ones are held fixed, the rest of the data and the latents are drawn from their exact
    conditional, which mixtures and linear-Gaussian programs have (each row then with its own draw of the global
    latents, also of the prior), and autoregressive ones where in every row the known entries come first. Data that are
    prepared at random (`Dequantize`) have no such conditional. A `sampler` (`DDIM(50)`) draws the data site alone, by the
    program's denoiser instead of a run of its model. Sites `z_1..z_T` of one shape are returned as `z`,
    [n, T, ...].

    Raises:
        ProbgenError: a given array is missing, unknown, of another shape or out of its range, or holds data of a
            program whose conditional is not known.
    """
    if int(n) != n or n < 1:
        raise ProbgenError(f"sample: `n` is {n!r}; ask for at least one row")
    n, structure = int(n), trained.structure
    held = {name: value for name, value in (given or {}).items() if structure.arrays.get(name) == "data"}
    conditions = {name: value for name, value in (given or {}).items() if name not in held}
    arrays = prepared_arrays(structure, preparation, spec, n, conditions, seed)
    if sampler is None and not held and not prior and weighs_its_data(structure):
        sampler = usual_chain()
    if sampler is not None:
        return _by_sampler(trained, preparation, spec, sampler, arrays, seed, held)
    known = known_entries(structure, preparation, spec, held, n)
    by_row, whole = impute(trained, known, arrays, n, seed, prior) if held else _run(trained, n, seed, arrays, prior)
    draws = stack_numbered(whole, 0) | stack_numbered(by_row, 1)
    return known.restored(draws | to_data_units(draws, preparation, arrays_of(structure, preparation.spec(spec))))


Draws = dict[str, np.ndarray]


def sample_in_groups(
    trained: Any,
    preparation: Any,
    spec: Mapping[str, Any],
    n: int,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
    prior: bool = False,
) -> tuple[Draws, np.ndarray]:
    """`n` rows as `sample` gives them, and the number of the draw of the global latents that each row has, [n].

    Where latents are global, at most `GLOBAL_DRAWS` draws of them, of the prior too, serve all rows in equal groups,
    so that many rows are drawn in the time of few; elsewhere every row is a group of its own.
    """
    structure = trained.structure
    if not structure.has_global_latents:
        return sample(trained, preparation, spec, n, seed, given, prior), np.arange(n)
    if any(structure.arrays.get(name) == "data" for name in given or {}):
        drawn = sample(trained, preparation, spec, n, seed, given, prior)
        stacked = stack_numbered({n: np.empty(s.shape) for n, s in structure.latents.items() if not s.local}, 0)
        thetas = np.concatenate([drawn[name].reshape(n, -1) for name in drawn if name in stacked], axis=1)
        return drawn, np.unique(thetas, axis=0, return_inverse=True)[1].reshape(n)
    arrays = prepared_arrays(structure, preparation, spec, n, dict(given or {}), seed)
    sizes, first, parts = list(pieces(n, -(-n // min(n, GLOBAL_DRAWS)))), 0, []
    for i, theta in enumerate(global_draws(trained, arrays, len(sizes), seed_at(seed, 0), prior)):
        rows = {name: value[first : first + sizes[i]] for name, value in arrays.items()}
        cells = trained.cells(rows, theta, seed_at(seed, 1, i))
        values = {
            name: cell.value for name, cell in cells.items() if _has_rows(structure.model[name], cell.value, sizes[i])
        }
        parts.append(values | {name: np.repeat(value[None], sizes[i], axis=0) for name, value in theta.items()})
        first += sizes[i]
    draws = stack_numbered({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, 1)
    draws |= to_data_units(draws, preparation, arrays_of(structure, preparation.spec(spec)))
    return draws, np.repeat(np.arange(len(sizes)), sizes)


def _run(trained: Any, n: int, seed: int, arrays: Draws, prior: bool) -> tuple[Draws, Draws]:
    """Runs of the unconditioned model on pieces of the rows, joined: sites with an axis of rows, and those without.

    A draw of the global latents from the guide serves one row, so that rows are independent; from the prior, all.
    """
    structure = trained.structure
    shared, first, parts = structure.has_global_latents, 0, []
    sizes = list(pieces(n, 1 if shared and not prior else n if shared else particles(structure)))
    for i, size in enumerate(sizes):
        rows = {name: values[first : first + size] for name, values in arrays.items()}
        parts.append(trained.draw(size, seed_at(seed, i), rows, prior=prior))
        first += size
    by_row, whole = {}, {}
    for name, value in parts[0].items():
        site = structure.model.get(name)
        if _has_rows(site, value, sizes[0]):
            by_row[name] = np.concatenate([part[name] for part in parts])
        elif shared and not prior:
            by_row[name] = np.stack([np.reshape(part[name], site.shape) for part in parts])
        else:
            whole[name] = value
    return by_row, whole


def _by_sampler(
    trained: Any, preparation: Any, spec: Mapping[str, Any], sampler: Any, arrays: Draws, seed: int, held: Draws
) -> Draws:
    """Rows of the data site from the program's denoiser, or from chains that follow its density, some thousands at a time."""
    if held:
        raise ProbgenError(
            f"sample: a sampler draws whole rows, and {next(iter(held))!r} in `given` holds a part of them: leave the sampler "
            "out, or the data"
        )
    parts, first = [], 0
    for i, size in enumerate(pieces(len(next(iter(arrays.values()))), particles(trained.structure))):
        rows = {name: value[first : first + size] for name, value in arrays.items()}
        draw = trained.by_chain if isinstance(sampler, Langevin | Sampling) else trained.sampled
        parts.append(draw(sampler, rows, seed_at(seed, i)))
        first += size
    draws = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return to_data_units(draws, preparation, arrays_of(trained.structure, preparation.spec(spec)))


def _has_rows(site: Site | None, value: np.ndarray, rows: int) -> bool:
    """Whether a drawn value has an axis of rows; a deterministic site need not lie in the data plate to have one."""
    if site is None or site.role == "deterministic":
        return np.ndim(value) > 0 and len(value) == rows
    return site.local or site.role == "observed"


def to_data_units(
    values: Mapping[str, np.ndarray], preparation: Any, arrays: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Those of `values` that hold an array of the data, taken back through `prepare`."""
    there = {name: array for name, array in arrays.items() if name in values}
    back = preparation.inverse({array: values[name] for name, array in there.items()})
    return {name: back[array] for name, array in there.items()}


def prepared_arrays(
    structure: Structure, preparation: Any, spec: Mapping[str, Any], n: int, given: dict[str, Any], seed: int
) -> dict[str, np.ndarray]:
    """`n` prepared rows of every array that the program names: the given ones, and anything valid for the rest."""
    required = [name for name, role in structure.arrays.items() if role == "given"]
    for name in given:
        if name not in required:
            raise ProbgenError(_not_given(name, structure, required))
    missing = [name for name in required if name not in given]
    if missing:
        wanted = ", ".join(f"{name!r}: ..." for name in required)
        raise ProbgenError(
            f"sample: this program is conditioned on {', '.join(map(repr, missing))}; give a value: given={{{wanted}}}"
        )
    values = {name: _broadcast(name, given[name], spec[name], n) for name in required}
    if values:
        values = preparation.forward(values, np.random.default_rng(seed))[0]
    prepared = preparation.spec(spec)
    placeholders = {name: _anything(prepared[name], n) for name in structure.arrays if name not in values}
    return {**values, **placeholders}


def _not_given(name: str, structure: Structure, required: list[str]) -> str:
    if name in structure.observed:
        data = [array for array, role in structure.arrays.items() if role == "data"]
        return f"sample: {name!r} is a site and no array of the data: give {', '.join(map(repr, data))} in its place"
    if not required:
        return f"sample: {name!r} is in `given`, and this program is conditioned on no array; leave it out"
    return f"sample: {name!r} in `given` is no array that the program is conditioned on{did_you_mean(name, required)}"


def _broadcast(name: str, value: Any, spec: Any, n: int) -> np.ndarray:
    """One value for all rows, or one for each, checked against what the data holds."""
    shape, kind = tuple(spec.shape), np.dtype(spec.dtype)
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ProbgenError(f"sample: given {name!r} must be numbers, not {array.dtype}")
    if array.shape not in (shape, (n, *shape)):
        raise ProbgenError(
            f"sample: given {name!r} has shape {array.shape}; it needs {shape}, one for all rows, or {(n, *shape)}"
        )
    if not np.isfinite(array).all():
        raise ProbgenError(f"sample: given {name!r} holds NaN or Inf; give finite values")
    if kind.kind in "iu" and (array != np.round(array)).any():
        raise ProbgenError(f"sample: given {name!r} must be whole numbers, as in the data")
    if spec.classes is not None and (array.min() < min(0, spec.range[0]) or array.max() >= spec.classes):
        raise ProbgenError(f"sample: given {name!r} must lie in 0..{spec.classes - 1}, the classes of the data")
    return np.broadcast_to(array, (n, *shape)).astype(kind)


def _anything(spec: Any, n: int) -> np.ndarray:
    """Rows that an unconditioned draw may ignore: the mean of the data, or its least value where that is whole."""
    dtype = np.dtype(spec.dtype)
    row = np.asarray(spec.mean) if dtype.kind == "f" else np.full(tuple(spec.shape), spec.range[0])
    return np.broadcast_to(row, (n, *spec.shape)).astype(dtype)
