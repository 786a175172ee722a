"""`assignments`: which component each row belongs to, as probabilities.

    p(z_n = k | x_n) = E[p(z_n = k | x_n, θ)],   θ ~ the posterior, components numbered alike in every draw

For parameters that are points (EM, the ELBO) these are the responsibilities, and exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.chunks import seed_at
from probgen.components import sites_of, state_sites
from probgen.components.relabel import orders, probabilities
from probgen.data.feed import evaluation_batches
from probgen.errors import ProbgenError
from probgen.nuts.draws import latent_draws
from probgen.supports import refuse_outside

if TYPE_CHECKING:
    from xarray import Dataset

ROWS = 500  # rows a batch
DRAW, PREPARE = 0, 1  # places of the seeds


def assignments(trained: Any, preparation: Any, rows: Any, draws: int = 100, seed: int = 0) -> Dataset:
    """p(z_n = k | x_n) of every enumerated latent of a row: a variable each, with dims (data, <site>_dim).

    `draws` of the other latents are averaged over, if there are any; their components are renumbered first so that
    they agree, and the variable's `attrs` say so.

    Raises:
        ProbgenError: there are no rows, or no enumerated latents.
    """
    import xarray

    structure = trained.structure
    names = state_sites(structure)
    if not names:
        raise ProbgenError("assignments: this program has no enumerated latent per datum, so no components")
    if not len(rows):
        raise ProbgenError("assignments: there are no rows; give a split that has some")
    # A draw of the global latents holds for all rows, so these cannot be cut into batches before they are drawn.
    size = len(rows) if structure.has_global_latents else ROWS
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    relabelled: dict[str, bool] = {}
    for i, (_, arrays, _) in enumerate(evaluation_batches(rows, preparation, size, seed_at(seed, PREPARE))):
        refuse_outside(trained, arrays, rows.where)
        drawn = _others(trained, arrays, draws, seed_at(seed, DRAW, i))
        for name in names:
            found = orders(trained, arrays, drawn, name) if structure.has_global_latents else None
            relabelled[name] = found is not None
            parts[name].append(_mean(trained, arrays, drawn, name, None if found is None else found[1]))
    made = {
        name: (("data", f"{name}_dim"), np.concatenate(means), {"relabelled": int(relabelled[name]), "draws": draws})
        for name, means in parts.items()
    }
    return xarray.Dataset(made, coords={"data": np.arange(len(rows))})


def _others(trained: Any, arrays: dict[str, np.ndarray], draws: int, seed: int) -> dict[str, np.ndarray]:
    """Draws of the latents that are not enumerated; none where there are none."""
    structure = trained.structure
    if not structure.latents.keys() - structure.enumerated.keys():
        return {}
    values = latent_draws(trained, arrays, draws, seed)
    return {name: value for name, value in values.items() if name not in structure.enumerated}


def _mean(
    trained: Any, arrays: dict[str, np.ndarray], drawn: dict[str, np.ndarray], name: str, order: np.ndarray | None
) -> np.ndarray:
    """p(z_n = k | x_n) averaged over the draws, [B, K], some rows at a time."""
    rows, parts = len(next(iter(arrays.values()))), []
    local = {n for n, s in trained.structure.latents.items() if s.local}
    for first in range(0, rows, ROWS):
        here = {n: a[first : first + ROWS] for n, a in arrays.items()}
        values = {n: v[:, first : first + ROWS] if n in local else v for n, v in drawn.items()}
        found = probabilities(trained.log_states(here, sites_of(trained.structure, values), [name])[0][name])
        if order is not None:
            found = np.take_along_axis(found, order[:, None], 2)
        parts.append(found.mean(0))
    return np.concatenate(parts)
