"""`posterior`: draws of the latents given rows of data, as ArviZ groups.

    θ_s ~ q(θ),   z_sn ~ q(z | x_n, θ_s),   s = 1..draws, n over rows

Dimensions: `chain` (one), `draw`, `data` (carries the row number), `<site>_dim_k`. What it returns is an xarray
DataTree on every ArviZ from 0.8 (arviz-base) on; its netCDF file opens with ArviZ 0.23 and 1.x alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen import groups
from probgen.chunks import numbers_of, particles, pieces, seed_at
from probgen.errors import ProbgenError
from probgen.evaluate.likelihood import log_mean_weight
from probgen.feed import evaluation_batches
from probgen.program import Structure, rows_of
from probgen.sites import numbered

if TYPE_CHECKING:
    from xarray import DataTree

ROWS = 100  # rows a batch
LARGEST = 2**29  # values of latents a tree may hold
DRAW, WEIGH, PREPARE, CHOOSE = 0, 1, 2, 3  # places of the seeds


def posterior(
    trained: Any,
    preparation: Any,
    rows: Any,
    draws: int = 100,
    max_rows: int = 1000,
    seed: int = 0,
    k: int = 200,
) -> DataTree:
    """Draws of the guide for `rows`, or for `max_rows` of them chosen by seed.

    Groups: `posterior`; `sample_stats` with `log_p` = log p(x, z) and `log_q` = log q(z | x) per datum, those of
    global latents divided by N; `log_likelihood`, log p(x_n | θ_s) in the units of the raw data, local latents
    integrated out by `k` importance weights (so one value for all draws where no latent is global); `observed_data`
    raw; `constant_data`, every other array. Arrays of one number a row (labels) are coordinates along `data`.

    Raises:
        ProbgenError: no rows, a program without latents, or draws that would not fit into memory.
    """
    structure = trained.structure
    _check(structure, len(rows), draws, max_rows)
    indices = _chosen(len(rows), max_rows, seed)
    chosen = rows.take(indices)
    # A draw of the global latents holds for all rows, so these cannot be cut into batches.
    size = len(indices) if structure.has_global_latents else min(ROWS, particles(structure))
    batches = []
    for i, (_, arrays, log_jacobian) in enumerate(
        evaluation_batches(chosen, preparation, size, seed_at(seed, PREPARE))
    ):
        values, log_p, log_q = _draws(trained, arrays, draws, seed_at(seed, DRAW, i))
        likelihood = _log_likelihood(trained, arrays, log_jacobian, values, draws, k, seed_at(seed, WEIGH, i))
        batches.append((values, log_p, log_q, likelihood))
    values = {name: _along_rows(structure, name, [batch[0][name] for batch in batches]) for name in batches[0][0]}
    stats = {name: np.concatenate([b[i] for b in batches], axis=1) for i, name in ((1, "log_p"), (2, "log_q"))}
    likelihood = {name: np.concatenate([b[3][name] for b in batches], axis=1) for name in batches[0][3]}
    raw = chosen[np.arange(len(chosen))]
    return groups.tree(trained, values, stats, likelihood, raw, indices, k)


def loo(tree: DataTree, **options: Any) -> Any:
    """Leave-one-out cross-validation of a program with global latents, by `arviz_stats.loo_approximate_posterior`.

    `options` go to it (`pointwise`, `var_name`). PSIS-LOO takes one datum out of a posterior that holds it, so the
    tree must be that of all N training rows.

    Raises:
        ProbgenError: the program has no global latents (its parameters were fitted to the very datum that would be
            left out), or the tree does not hold N rows.

    References:
        | Bayesian Leave-One-Out Cross-Validation for Large Data (Magnusson et al., 2019),
          https://arxiv.org/abs/1904.10679
    """
    from arviz_stats import loo_approximate_posterior

    group = tree["log_likelihood"] if "log_likelihood" in tree.children else None
    if group is None or not group.attrs["loo_valid"]:
        raise ProbgenError(
            "LOO is valid only where all that was learned is a global latent with a posterior; this program's "
            "parameters were fitted to the data that would be left out: use evaluate on held-out rows"
        )
    needed, there = int(group.attrs["training_rows"]), group.sizes["data"]
    if there != needed:
        raise ProbgenError(
            f"LOO needs the posterior of all {needed} training rows, and this one holds {there}: "
            f"make it with run.posterior(data.train, rows={needed})"
        )
    stats = tree["sample_stats"]
    total = {name: stats[name].sum("data") for name in ("log_p", "log_q")}
    return loo_approximate_posterior(tree, total["log_p"], total["log_q"], **options)


def _check(structure: Structure, rows: int, draws: int, max_rows: int) -> None:
    if not structure.latents:
        raise ProbgenError("posterior: this program has no latents, so there is nothing to draw given the data")
    for name, number in (("draws", draws), ("rows", max_rows)):
        if number < 1:
            raise ProbgenError(f"posterior: `{name}` is {number}; ask for at least one")
    if not rows:
        raise ProbgenError("posterior: there are no rows; give a split that has some")
    numbers = sum(numbers_of(site) * (min(rows, max_rows) if site.local else 1) for site in structure.latents.values())
    if draws * numbers > LARGEST:
        raise ProbgenError(
            f"posterior: {draws} draws of {min(rows, max_rows)} rows are {draws * numbers:.1e} numbers, more than are "
            f"held in memory ({LARGEST:.1e}); ask for fewer `draws` or `rows`"
        )


def _chosen(rows: int, max_rows: int, seed: int) -> np.ndarray:
    """Row numbers in order: all of them, or `max_rows` drawn by seed."""
    if rows <= max_rows:
        return np.arange(rows)
    rng = np.random.default_rng(seed_at(seed, CHOOSE))
    return np.sort(rng.choice(rows, max_rows, replace=False))


def _draws(
    trained: Any, arrays: Mapping[str, np.ndarray], draws: int, seed: int
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Draws [draws, B, ...] with their log p and log q [draws, B], a bounded number at a time."""
    sizes = pieces(draws, particles(trained.structure) // rows_of(arrays))
    parts = [trained.posterior(arrays, size, seed_at(seed, i)) for i, size in enumerate(sizes)]
    values = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    return values, np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])


def _log_likelihood(
    trained: Any,
    arrays: Mapping[str, np.ndarray],
    log_jacobian: np.ndarray,
    values: Mapping[str, np.ndarray],
    draws: int,
    k: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """log p(x_n | θ_s) in raw units, [draws, B], by data site; of all together where they share local latents."""
    structure = trained.structure
    if structure.kind not in ("exact", "latent"):
        return {}
    latents = {name: values[name] for name, site in structure.latents.items() if not site.local and name in values}
    integrated = any(site.local for site in structure.latents.values())
    if latents and not integrated:
        sites = _by_site(trained, arrays, latents, draws, seed)
    elif latents:
        one = [{name: value[s] for name, value in latents.items()} for s in range(draws)]
        parts = [_weighed(trained, arrays, k, seed_at(seed, s), latents=fixed) for s, fixed in enumerate(one)]
        sites = {"joint": np.stack(parts)}
    else:
        estimate = _weighed(trained, arrays, 1 if structure.kind == "exact" else k, seed)
        sites = {"joint": np.broadcast_to(estimate, (draws, len(estimate)))}
    if len(sites) > 1 and np.any(log_jacobian):  # one Jacobian for all: there is no saying which site's it is
        sites = {"joint": sum(sites.values())}
    if len(structure.observed) == 1:
        sites = {next(iter(structure.observed)): next(iter(sites.values()))}
    return {name: value + log_jacobian for name, value in sites.items()}


def _weighed(trained: Any, arrays: Mapping[str, np.ndarray], k: int, seed: int, **fixed: Any) -> np.ndarray:
    """log (1/k) Σ w per datum, local latents integrated out, [B]."""
    sizes = pieces(k, particles(trained.structure) // rows_of(arrays))
    parts = [trained.log_weights(arrays, size, seed_at(seed, i), **fixed) for i, size in enumerate(sizes)]
    return log_mean_weight(np.concatenate(parts).astype(np.float64))


def _by_site(
    trained: Any, arrays: Mapping[str, np.ndarray], latents: Mapping[str, np.ndarray], draws: int, seed: int
) -> dict[str, np.ndarray]:
    """log p(x_n | θ_s) of every data site, or numbered series of data sites, where all latents are global."""
    series = numbered(trained.structure.observed)
    single = [name for name in trained.structure.observed if not any(name in names for names in series.values())]
    groups = {**{name: [name] for name in single}, **series}
    found: dict[str, list[np.ndarray]] = {name: [] for name in groups}
    for s in range(draws):
        one = {name: value[s] for name, value in latents.items()}
        model = trained.log_joint(arrays, one, seed_at(seed, s))[0]
        for name, members in groups.items():
            found[name].append(sum(np.asarray(model[member], dtype=np.float64) for member in members))
    return {name: np.stack(parts) for name, parts in found.items()}


def _along_rows(structure: Structure, name: str, parts: list[np.ndarray]) -> np.ndarray:
    """Batches of a local latent joined; a global one has one batch."""
    return np.concatenate(parts, axis=1) if structure.model[name].local else parts[0]
