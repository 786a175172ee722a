"""The ArviZ groups of a posterior: what each variable's axes are called, and what stands along the rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.cells import row_axis
from probgen.sites import stack_numbered

if TYPE_CHECKING:
    from xarray import DataTree

    from probgen.nuts.draws import Draws
    from probgen.program import Site, Structure

GLOBAL = {"log_ratio_global", "lp"}  # of which one is known where LOO is valid: of a guide, or of NUTS
RESERVED = ("chain", "draw", "data")  # the dimensions; a site of such a name gets a trailing underscore


def tree(
    trained: Any,
    values: Mapping[str, np.ndarray],
    stats: Mapping[str, np.ndarray],
    likelihood: Mapping[str, np.ndarray],
    raw: Mapping[str, np.ndarray],
    indices: np.ndarray,
    k: int,
    replicates: Mapping[str, np.ndarray] | None = None,
    chains: int = 1,
) -> DataTree:
    """The groups of `posterior`.

    `values` are draws [draws, B, ...] of local latents and [draws, ...] of global ones, `stats` [draws, B] (those of
    a whole draw: [draws]), `likelihood` [draws, B], `replicates` draws [draws, B, ...] of the data, `raw` the rows as
    they came and `indices` their numbers. The draws are those of `chains` chains in a row.
    """
    structure = trained.structure
    latents, whole = _stacked(structure, values)
    observed = {name: v for name, v in raw.items() if structure.arrays.get(name) == "data"}
    others = {name: v for name, v in raw.items() if name not in observed}
    drawn = {
        "posterior": latents, "sample_stats": stats, "log_likelihood": likelihood,
        "posterior_predictive": replicates or {},
    }  # fmt: skip
    found = {group: {name: _by_chain(v, chains) for name, v in part.items()} for group, part in drawn.items()}
    found |= {"observed_data": observed, "constant_data": {n: v for n, v in others.items() if v.ndim > 1}}
    found = {group: {_free(name): v for name, v in part.items()} for group, part in found.items() if part}
    whole |= {name for name, v in stats.items() if np.ndim(v) == 1}
    dims = {name: [] if name in whole else ["data"] for part in found.values() for name in part}
    made = _made(found, dims, coords={"data": indices}, attrs=_attributes(trained, found, k))
    return _labelled(made, {_free(name): v for name, v in others.items() if v.ndim == 1})


def chains(structure: Structure, draws: Draws) -> DataTree:
    """The groups `posterior` and `sample_stats` of the draws of NUTS, as they are: all of them, of every chain."""
    values = {name: _rows_first(structure.model[name], value) for name, value in draws.flat().items()}
    latents, whole = _stacked(structure, values)
    found = {
        "posterior": {_free(name): _by_chain(v, draws.chains) for name, v in latents.items()},
        "sample_stats": dict(draws.stats),
    }
    dims = {name: [] if name in whole or name in draws.stats else ["data"] for part in found.values() for name in part}
    return _made(found, dims)


def _made(found: Mapping[str, Any], dims: Mapping[str, list[str]], **options: Any) -> DataTree:
    import arviz_base

    with warnings.catch_warnings():  # it takes few draws of more chains for a mistake
        warnings.filterwarnings("ignore", message=".*chain dimension to be longer", category=UserWarning)
        return arviz_base.from_dict(found, dims=dims, **options)


def _by_chain(values: np.ndarray, chains: int) -> np.ndarray:
    values = np.asarray(values)
    return values.reshape(chains, -1, *values.shape[1:])


def _stacked(structure: Structure, values: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], set[str]]:
    """Latents with numbered ones as one variable, and which variables have no axis of rows."""
    alone = stack_numbered({name: v for name, v in values.items() if not structure.model[name].local}, 1)
    local = stack_numbered({name: v for name, v in values.items() if structure.model[name].local}, 2)
    return alone | local, {_free(name) for name in alone}


def _rows_first(site: Site, values: np.ndarray) -> np.ndarray:
    """Draws [draws, ...] of a site with its axis of rows, if it has one, behind that of draws."""
    axis = row_axis(site)
    return values if axis is None else np.moveaxis(values, axis, 1)


def _free(name: str) -> str:
    return f"{name}_" if name in RESERVED else name


def _attributes(trained: Any, found: Mapping[str, Any], k: int) -> dict[str, dict[str, Any]]:
    """Whole numbers for truths: netCDF has no others."""
    structure = trained.structure
    if "log_likelihood" not in found:
        return {}
    alone = structure.kind == "latent" and not structure.has_global_latents
    integrated = alone and any(site.local for site in structure.latents.values())
    said = {
        "loo_valid": int(structure.has_global_latents and bool(GLOBAL & found["sample_stats"].keys())),
        "training_rows": int(trained.rows),
        "importance_samples": k if integrated else 0,
    }
    return {"log_likelihood": said}


def _labelled(made: DataTree, labels: Mapping[str, np.ndarray]) -> DataTree:
    """Arrays of one number a row as coordinates along `data`, in every group that has rows."""
    for group in made.children.values():
        dataset = group.to_dataset()
        if "data" in dataset.dims:
            free = {name: ("data", v) for name, v in labels.items() if name not in dataset}
            group.dataset = dataset.assign_coords(free)
    return made
