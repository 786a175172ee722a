"""`evaluate`: the numbers of a trained program on held-out rows, each with its error and its protocol.

    elbo ≤ log_likelihood = log p(x)   in nats per datum, in the units of the raw data

What a program's kind leaves undefined is missing, and `notes` say why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.chunks import particles, seed_at
from probgen.components.relabel import agreed
from probgen.data.feed import evaluation_batches
from probgen.energy.requirements import weighs_its_data
from probgen.errors import ProbgenError
from probgen.evaluate.batch import Batch
from probgen.evaluate.latents import ActiveUnits
from probgen.evaluate.likelihood import Likelihood
from probgen.evaluate.predictive import NO_GUIDE, Predictive, no_density
from probgen.evaluate.probability_flow import ProbabilityFlow
from probgen.evaluate.reconstruction import Reconstruction
from probgen.evaluate.terms import Terms
from probgen.evaluate.unnormalised import Weighed
from probgen.nuts.draws import gives_density
from probgen.sites import arrays_of
from probgen.supports import refuse_outside

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["evaluate", "log_likelihood"]

ROWS = 500  # rows a batch
TERM_DRAWS = 20
UNIT_DRAWS = 50  # a unit's noise, Var_q / 50, is taken off: what is left of it is far below the threshold

NO_LIKELIHOOD = {
    "implicit": "log_likelihood, elbo and bits_per_dim are not defined: the program is implicit, its data site has "
    "all its mass at one point",
    "unnormalised": "log_likelihood, elbo and bits_per_dim are not defined: the program has a factor, so its density "
    "is known only up to a constant",
}

NO_POSTERIOR = "log_likelihood, elbo and bits_per_dim need draws of the latent {!r} given the data, and the program has no guide for it"

NO_ELBO = "elbo and term/<site> are not defined: the program has a factor, and its constant is estimated, not bounded"


def evaluate(
    trained: Any,
    preparation: Any,
    rows: Any,
    spec: Mapping[str, Any],
    k: int = 1000,
    seed: int = 0,
    split: str | None = None,
) -> dict[str, Any]:
    """Likelihood, diagnostics and reconstruction of `rows`.

    Returns:
        `log_likelihood`, `elbo` in nats per datum and `nats_per_dim`, `bits_per_dim` = −log p / (D log 2), with the
        log-Jacobians of `prepare`; `<name>_se` is the standard error of the mean over rows, `log_likelihood_mc_se`
        the part of it that comes from drawing latents. `k_hat` (median) and `k_hat_above_0.7` (share), `ess`
        (median effective sample size of the `k` weights), `term/<site>`, `reconstruction_error`, `active_units`
        (and `active_units/<site>`), `protocol`, `notes`. Of a program learned by NUTS, `log_likelihood` is the log
        posterior predictive density over `k` of its draws, and `r_hat`, `ess_bulk`, `ess_tail` and `divergences` say
        how far the chains are to be trusted; what needs a guide is missing.

    Raises:
        ProbgenError: no rows, or `k` below 2.
    """
    if not len(rows):
        raise ProbgenError("evaluate: there are no rows to evaluate on; give a split that has some")
    if k < 2:
        raise ProbgenError(f"evaluate: `k` is {k}, and an error estimate needs at least 2 importance samples")
    structure = trained.structure
    parts, notes = _parts(trained, preparation, spec, k, seed)
    for batch in batches(trained, preparation, rows, seed):
        for part in parts:
            part.add(batch)
    numbers: dict[str, Any] = {}
    for part in parts:
        found, said = part.result()
        numbers, notes = numbers | found, notes + said
    draws = getattr(trained, "draws", None)
    if draws is not None:
        draws, said = agreed(trained, draws)
        numbers, notes = numbers | draws.diagnostics(), notes + said + draws.notes()
    if preparation.random:
        notes.append("prepare is random: every row was prepared once, by seed")
    estimators = [part.estimator for part in parts if hasattr(part, "estimator")]
    protocol = {
        "prepare": preparation.to_json(),
        "split": split,
        "rows": len(rows),
        "k": k if (structure.kind == "latent" and draws is None) or "log_z" in numbers else None,
        "seed": seed,
        "estimator": estimators[0] if estimators else None,
        "kind": structure.kind,
    }
    return {**numbers, "protocol": protocol, "notes": notes}


def log_likelihood(trained: Any, preparation: Any, rows: Any, spec: Mapping[str, Any], k: int, seed: int) -> Dataset:
    """`log_likelihood` of every row, in nats and in the units of the data; dims (data,).

    `attrs` say what it estimates. Where latents are drawn by a guide, `ess` and `k_hat` tell how far each row's number is
    to be trusted.

    Raises:
        ProbgenError: no rows, `k` below 2, or a program that gives rows no density.
    """
    import xarray

    if not len(rows) or k < 2:
        what = "there are no rows" if not len(rows) else f"`k` is {k}"
        raise ProbgenError(f"log_likelihood: {what}; give at least one row and two importance samples")
    parts, notes = _parts(trained, preparation, spec, k, seed)
    kept = [part for part in parts if isinstance(part, Likelihood | Predictive | Weighed)]
    if not kept:
        raise ProbgenError(notes[0])
    for batch in batches(trained, preparation, rows, seed):
        kept[0].add(batch)
    numbers = {name: ("data", np.concatenate(values)) for name, values in kept[0].rows.items() if values}
    numbers.pop("elbo", None)
    attrs = {"estimator": kept[0].estimator, "units": "nats per datum"}
    return xarray.Dataset(numbers, coords={"data": np.arange(len(rows))}, attrs=attrs)


def batches(trained: Any, preparation: Any, rows: Any, seed: int) -> Iterator[Batch]:
    """Rows as the program sees them, in pieces that fit into memory; refused if they lie outside its support."""
    draws, structure = getattr(trained, "draws", None), trained.structure
    whole = draws is not None and any(structure.model[name].local for name in draws.values)
    size = len(rows) if whole else min(ROWS, len(rows), particles(structure))
    for i, (indices, arrays, log_jacobian) in enumerate(evaluation_batches(rows, preparation, size, seed)):
        refuse_outside(trained, arrays, rows.where)
        yield Batch(arrays, np.asarray(log_jacobian), np.asarray(indices), seed_at(seed, i))


def _parts(trained: Any, preparation: Any, spec: Mapping[str, Any], k: int, seed: int) -> tuple[list[Any], list[str]]:
    """What the program's kind allows to be computed, and what is to be said about the rest."""
    structure = trained.structure
    parts: list[Any] = []
    if weighs_its_data(structure) and "given" not in structure.arrays.values():
        return [Weighed(trained, k, data_dims(trained, preparation, spec), seed)], [NO_ELBO]
    notes = [NO_LIKELIHOOD[structure.kind]] if structure.kind in NO_LIKELIHOOD else []
    if structure.unguided and getattr(trained, "draws", None) is None:
        return [], notes or [NO_POSTERIOR.format(next(iter(structure.unguided)))]
    if getattr(trained, "draws", None) is not None:
        if gives_density(structure):
            parts.append(Predictive(trained, k, data_dims(trained, preparation, spec)))
        else:
            notes += [NO_GUIDE] if notes else [no_density(structure), NO_GUIDE]
    elif not notes:
        draws = 1 if structure.kind == "exact" else min(k, TERM_DRAWS)
        dims = data_dims(trained, preparation, spec)
        parts += [Likelihood(trained, k, dims), Terms(trained, draws)]
        if getattr(trained, "has_probability_flow", False):
            parts.append(ProbabilityFlow(trained, dims))
    if structure.sampled:
        parts += [Reconstruction(trained, preparation, spec), ActiveUnits(trained, UNIT_DRAWS)]
    return parts, notes


def data_dims(trained: Any, preparation: Any, spec: Mapping[str, Any]) -> int:
    """D: how many numbers of one datum the program gives a density."""
    held = arrays_of(trained.structure, preparation.spec(spec))
    sizes = [np.prod(spec[array].shape) for array in held.values()]
    return max(1, int(sum(sizes)))
