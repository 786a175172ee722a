"""`posterior`: draws of the latents given rows of data, as ArviZ groups.

    θ_s ~ q(θ),   z_sn ~ q(z | x_n, θ_s),   s = 1..draws, n over rows

Dimensions: `chain` (one), `draw`, `data` (carries the row number), `<site>_dim_k`. What it returns is an xarray
DataTree on every ArviZ from 0.8 (arviz-base) on; its netCDF file opens with ArviZ 0.23 and 1.x alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen import groups
from probgen.chunks import numbers_of, particles, pieces, seed_at
from probgen.data.feed import evaluation_batches
from probgen.errors import ProbgenError
from probgen.evaluate.likelihood import log_mean_weight
from probgen.nuts.draws import Draws
from probgen.program import Structure, rows_of
from probgen.sample import to_data_units
from probgen.sites import arrays_of, numbered, stack_numbered
from probgen.supports import refuse_outside

if TYPE_CHECKING:
    from xarray import DataTree

ROWS = 500  # rows a batch
LARGEST = 2**29  # values of latents a tree may hold
DRAW, WEIGH, PREPARE, CHOOSE, REPLICATE = 0, 1, 2, 3, 4  # places of the seeds


def posterior(
    trained: Any,
    preparation: Any,
    rows: Any,
    draws: int = 100,
    max_rows: int = 1000,
    seed: int = 0,
    k: int = 200,
    predictive: bool = False,
    spec: Mapping[str, Any] | None = None,
) -> DataTree:
    """`draws` of the latents for `rows`, or for `max_rows` of them chosen by seed.

    They are draws of the guide; of a run learned by NUTS those of its chains, at most `draws` of each, evenly spaced.

    Groups: `posterior`; `sample_stats` with `log_p` = log p(x, z | θ) and `log_q` = log q(z | x, θ) per datum, and
    `log_ratio_global` = log p(θ) − log q(θ) per draw where latents are global; `log_likelihood`, log p(x_n | θ_s) in
    the units of the raw data, local latents integrated out by `k` importance weights (so one value for all draws
    where no latent is global); `observed_data`, raw; `constant_data`, every other array. Arrays of one number a row
    (labels) are coordinates along `data`. Of NUTS, `sample_stats` holds what its chains recorded instead. With
    `predictive` (which needs the data's `spec`), `posterior_predictive` holds a draw of the data in their own units at
    each draw of the latents.

    Raises:
        ProbgenError: no rows, a program without latents, or draws that would not fit into memory.
    """
    structure, chains = trained.structure, _chains(trained, draws)
    draws = draws if chains is None else chains.chains * chains.length
    _check(structure, len(rows), draws, max_rows, list(structure.unguided) if chains is None else [])
    indices = _chosen(len(rows), max_rows, seed)
    chosen = rows.take(indices)
    # A draw of the guide's global latents holds for all rows, so these cannot be cut into batches.
    size = len(indices) if _together(structure, chains) else min(ROWS, particles(structure))
    batches, replicates = [], []
    feed = evaluation_batches(chosen, preparation, size, seed_at(seed, PREPARE))
    for i, (_, arrays, log_jacobian) in enumerate(feed):
        refuse_outside(trained, arrays, rows.where)
        drawn = _draw(trained, arrays, draws if chains is None else chains, seed_at(seed, DRAW, i))
        estimates = _log_likelihood(trained, arrays, log_jacobian, drawn, k, seed_at(seed, WEIGH, i))
        batches.append((drawn, estimates))
        if predictive:
            replicates.append(_replicates(trained, preparation, spec, arrays, drawn, seed_at(seed, REPLICATE, i)))
    values = {name: _along_rows(structure, name, [b.values[name] for b, _ in batches]) for name in batches[0][0].values}
    stats = _stats(trained, [drawn for drawn, _ in batches]) if chains is None else _flat(chains.stats)
    likelihood = _joined([estimates for _, estimates in batches])
    raw = chosen[np.arange(len(chosen))]
    count = 1 if chains is None else chains.chains
    return groups.tree(trained, values, stats, likelihood, raw, indices, k, _joined(replicates), count)


def _chains(trained: Any, draws: int) -> Draws | None:
    """What NUTS drew, thinned; None where a guide was learned."""
    kept = getattr(trained, "draws", None)
    return kept if kept is None or draws < 1 else kept.thinned(draws)


def _together(structure: Structure, chains: Draws | None) -> bool:
    """Whether all rows must be in one batch."""
    if chains is None:
        return structure.has_global_latents
    return any(structure.model[name].local for name in chains.values)


def _flat(stats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.reshape(-1) for name, value in stats.items()}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches of variables [draws, B, ...], put together along the rows."""
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in (parts[0] if parts else ())}


def _stats(trained: Any, batches: list[_Drawn]) -> dict[str, np.ndarray]:
    if batches[0].log_p is None:
        return {}
    stats = {name: np.concatenate([getattr(b, name) for b in batches], axis=1) for name in ("log_p", "log_q")}
    if batches[0].terms is not None:
        stats["log_ratio_global"] = _log_ratio(trained, batches[0].terms)
    return stats


def _replicates(
    trained: Any, preparation: Any, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray], drawn: _Drawn, seed: int
) -> dict[str, np.ndarray]:
    """Data drawn given each draw of the latents, [draws, B, ...], by array and in its units; else by site."""
    values = stack_numbered(trained.replicate(arrays, drawn.values, seed), 2)
    shape = next(iter(values.values())).shape[:2]
    held = arrays_of(trained.structure, preparation.spec(spec))
    flat = {name: np.reshape(value, (-1, *value.shape[2:])) for name, value in values.items()}
    raw = flat | to_data_units(flat, preparation, held)
    return {held.get(name, name): np.reshape(value, (*shape, *value.shape[1:])) for name, value in raw.items()}


def loo(tree: DataTree, **options: Any) -> Any:
    """Leave-one-out cross-validation of a program with global latents.

    By `arviz_stats.loo` where the draws are those of NUTS, by `loo_approximate_posterior` where they are a guide's;
    `options` go to it (`pointwise`, `var_name`). PSIS-LOO takes one datum out of a posterior that holds it, so the
    tree must be that of all N training rows.

    Raises:
        ProbgenError: the program has no global latents (its parameters were fitted to the very datum that would be
            left out), or the tree does not hold N rows.

    References:
        | Bayesian Leave-One-Out Cross-Validation for Large Data (Magnusson et al., 2019),
          https://arxiv.org/abs/1904.10679
    """
    import arviz_stats

    if "log_likelihood" not in tree.children:
        raise ProbgenError("LOO needs the group log_likelihood, which this posterior has not: see its warning")
    group = tree["log_likelihood"]
    if not group.attrs["loo_valid"]:
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
    if "log_ratio_global" not in stats:
        return arviz_stats.loo(tree, **{"reff": _relative_efficiency(tree), **options})
    log_p = stats["log_p"].sum("data") + stats["log_ratio_global"]
    return arviz_stats.loo_approximate_posterior(tree, log_p, stats["log_q"].sum("data"), **options)


def _relative_efficiency(tree: DataTree) -> float:
    """ESS / draws, the mean over the global latents: draws of the rows' own latents are independent given these."""
    from arviz_stats import ess

    latents = [value.values for value in tree["posterior"].data_vars.values() if "data" not in value.dims]
    numbers = np.concatenate([v.reshape(*v.shape[:2], -1) for v in latents], axis=-1).astype(np.float64)
    numbers = numbers[..., np.ptp(numbers, axis=(0, 1)) > 0]
    found = np.asarray(ess(numbers, method="mean", chain_axis=0, draw_axis=1)) if numbers.shape[1] > 3 else np.nan
    return min(1.0, float(np.nanmean(found)) / numbers[..., 0].size) if np.isfinite(found).any() else 1.0


def _check(structure: Structure, rows: int, draws: int, max_rows: int, unguided: list[str]) -> None:
    if not structure.latents:
        raise ProbgenError("posterior: this program has no latents, so there is nothing to draw given the data")
    if unguided and not structure.sampled:
        raise ProbgenError(
            f"posterior: the program has no guide that draws the latent {unguided[0]!r} given the data; a guide that is trained "
            "beside it gives one, as in models/adversarial/ali.py"
        )
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


@dataclass(frozen=True)
class _Drawn:
    """Draws [draws, B, ...] of local latents, [draws, ...] of global ones; log p and log q of local terms [draws, B].

    `terms` are the ELBO's summands of the same draws, for a program with global latents. Where the program gives its data
    no density, or the guide draws some latents only, there are draws alone.
    """

    values: dict[str, np.ndarray]
    log_p: np.ndarray | None = None
    log_q: np.ndarray | None = None
    terms: dict[str, np.ndarray] | None = None


def _draw(trained: Any, arrays: Mapping[str, np.ndarray], draws: int | Draws, seed: int) -> _Drawn:
    """So many draws of the guide, a bounded number at a time; or the given draws, with the rows' own latents."""
    if isinstance(draws, Draws):
        values, terms = trained.given(arrays, draws.flat(), seed)
        local = sum(terms.values(), np.zeros((len(next(iter(values.values()))), rows_of(arrays))))
        return _Drawn(values, local, np.zeros_like(local), terms)
    sizes = list(pieces(draws, particles(trained.structure) // rows_of(arrays)))
    if not trained.structure.weighed:
        parts = [trained.guided(arrays, size, seed_at(seed, i)) for i, size in enumerate(sizes)]
        return _Drawn({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    parts = [trained.posterior(arrays, size, seed_at(seed, i)) for i, size in enumerate(sizes)]
    values = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    drawn = _Drawn(values, *(np.concatenate([part[i] for part in parts]) for i in (1, 2)))
    if not trained.structure.has_global_latents:
        return drawn
    parts = [trained.terms(arrays, size, seed_at(seed, i)) for i, size in enumerate(sizes)]
    terms = {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]}
    return replace(drawn, terms=terms) if _same_draws(trained.structure, drawn, terms) else drawn


def _same_draws(structure: Structure, drawn: _Drawn, terms: Mapping[str, np.ndarray]) -> bool:
    """Whether the terms of this seed are those of these very draws: the local ones add up to log p − log q."""
    whole = {name for name, site in structure.latents.items() if not site.local}
    local = sum(terms[name] for name in terms if _is_local(structure, name))
    return whole <= set(terms) and np.allclose(local, drawn.log_p - drawn.log_q, rtol=1e-3, atol=1e-2)


def _is_local(structure: Structure, name: str) -> bool:
    """Whether a term belongs to the rows; an autoguide's joint draw of global latents is a site of the guide alone."""
    site = structure.model.get(name) or structure.guide[name]
    return site.local or site.role == "observed"


def _log_ratio(trained: Any, terms: Mapping[str, np.ndarray]) -> np.ndarray:
    """log p(θ_s) − log q(θ_s) of all global latents together, [draws]."""
    return sum(terms[name][:, 0] for name in terms if not _is_local(trained.structure, name)) * trained.rows


def _log_likelihood(
    trained: Any, arrays: Mapping[str, np.ndarray], log_jacobian: np.ndarray, drawn: _Drawn, k: int, seed: int
) -> dict[str, np.ndarray]:
    """log p(x_n | θ_s) in raw units, [draws, B], by data site; `joint` where data sites share local latents."""
    structure = trained.structure
    if structure.kind not in ("exact", "latent") or drawn.log_p is None:
        return {}
    if drawn.terms is not None or structure.has_global_latents:
        sites = _given_globals(structure, drawn)
    else:
        estimate = _weighed(trained, arrays, 1 if structure.kind == "exact" else k, seed)
        sites = {"joint": np.broadcast_to(estimate, (len(drawn.log_p), len(estimate)))}
    if len(sites) > 1 and np.any(log_jacobian):  # one Jacobian for all: there is no saying which site's it is
        sites = {"joint": sum(sites.values())}
    if len(sites) == 1 and len(structure.observed) == 1:
        sites = {next(iter(structure.observed)): next(iter(sites.values()))}
    return {name: value + log_jacobian for name, value in sites.items()}


def _weighed(trained: Any, arrays: Mapping[str, np.ndarray], k: int, seed: int) -> np.ndarray:
    """log (1/k) Σ w per datum, local latents integrated out, [B]."""
    sizes = pieces(k, particles(trained.structure) // rows_of(arrays))
    parts = [trained.log_weights(arrays, size, seed_at(seed, i)) for i, size in enumerate(sizes)]
    return log_mean_weight(np.concatenate(parts).astype(np.float64))


def _given_globals(structure: Structure, drawn: _Drawn) -> dict[str, np.ndarray]:
    """log p(x_n | θ_s) from the terms of the same draws: of each data site, or of each numbered series of them."""
    local = [name for name, site in structure.latents.items() if site.local]
    if drawn.terms is None or any(name in structure.guide for name in local):
        warnings.warn(
            "posterior: no log_likelihood group, since log p(x_n | θ) is not known for the draws of the global latents "
            f"of this program (local latents: {', '.join(local) or 'none'})",
            stacklevel=4,
        )
        return {}
    terms = {name: term for name, term in drawn.terms.items() if _is_local(structure, name)}
    if local:
        return {"joint": sum(terms.values())}
    series = numbered(structure.observed)
    members = {member: base for base, names in series.items() for member in names}
    sites: dict[str, np.ndarray] = {}
    for name in structure.observed:
        base = members.get(name, name)
        sites[base] = sites.get(base, 0.0) + terms[name]
    return sites


def _along_rows(structure: Structure, name: str, parts: list[np.ndarray]) -> np.ndarray:
    """Batches of a local latent joined; a global one has one batch."""
    return np.concatenate(parts, axis=1) if structure.model[name].local else parts[0]
