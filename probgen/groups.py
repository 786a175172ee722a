"""The ArviZ groups of a posterior: what each variable's axes are called, and what stands along the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.sites import stack_numbered

if TYPE_CHECKING:
    from xarray import DataTree

RESERVED = ("chain", "draw", "data")  # the dimensions; a site of such a name gets a trailing underscore


def tree(
    trained: Any,
    values: Mapping[str, np.ndarray],
    stats: Mapping[str, np.ndarray],
    likelihood: Mapping[str, np.ndarray],
    raw: Mapping[str, np.ndarray],
    indices: np.ndarray,
    k: int,
) -> DataTree:
    """The groups of `posterior`, made by `arviz_base.from_dict`.

    `values` are draws [draws, B, ...] of local latents and [draws, ...] of global ones, `stats` and `likelihood`
    [draws, B] (`log_ratio_global`: [draws]), `raw` the rows as they came and `indices` their numbers.
    """
    import arviz_base

    structure = trained.structure
    alone = {name: v for name, v in values.items() if not structure.model[name].local}
    latents = stack_numbered(alone, 1) | stack_numbered({n: v for n, v in values.items() if n not in alone}, 2)
    local = latents.keys() - stack_numbered(alone, 1).keys()
    observed = {name: v for name, v in raw.items() if structure.arrays.get(name) == "data"}
    others = {name: v for name, v in raw.items() if name not in observed}
    drawn = {"posterior": latents, "sample_stats": stats, "log_likelihood": likelihood}
    found = {group: {name: np.asarray(v)[None] for name, v in part.items()} for group, part in drawn.items()}
    found |= {"observed_data": observed, "constant_data": {n: v for n, v in others.items() if v.ndim > 1}}
    found = {group: {_free(name): v for name, v in part.items()} for group, part in found.items() if part}
    whole = {_free(name) for name in latents if name not in local} | {"log_ratio_global"}
    dims = {name: [] if name in whole else ["data"] for part in found.values() for name in part}
    made = arviz_base.from_dict(found, dims=dims, coords={"data": indices}, attrs=_attributes(trained, found, k))
    return _labelled(made, {_free(name): v for name, v in others.items() if v.ndim == 1})


def _free(name: str) -> str:
    return f"{name}_" if name in RESERVED else name


def _attributes(trained: Any, found: Mapping[str, Any], k: int) -> dict[str, dict[str, Any]]:
    """Whole numbers for truths: netCDF has no others."""
    structure = trained.structure
    if "log_likelihood" not in found:
        return {}
    integrated = structure.kind == "latent" and any(site.local for site in structure.latents.values())
    said = {
        "loo_valid": int(structure.has_global_latents and "log_ratio_global" in found["sample_stats"]),
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
