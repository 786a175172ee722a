"""What NUTS leaves behind: draws of the latents chain by chain, and what tells whether they are to be trusted.

Weights of such a run are arrays under the names of ArviZ's groups: `posterior/<latent>` [chains, draws, ...], as the
program sees it, and `sample_stats/<statistic>` [chains, draws]. During warm-up they hold one draw, where the chains are.

References:
    | Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021),
      https://arxiv.org/abs/1903.08008
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from probgen.cells import row_axis
from probgen.errors import ProbgenError
from probgen.program import Site, Structure

POSTERIOR, STATS = "posterior/", "sample_stats/"
R_HAT = 1.01  # above it the chains have not mixed
ESS = 100  # effective draws a chain, below which quantiles are rough
TAILS = (0.05, 0.95)  # quantiles whose ESS is that of the tails
FEWEST = 4  # draws a chain, below which R-hat and ESS are not defined

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Draws:
    """Draws of latents, {name: [chains, draws, ...]}, and their statistics, {name: [chains, draws]}."""

    values: Arrays
    stats: Arrays

    @classmethod
    def of(cls, weights: Arrays) -> Draws | None:
        """The draws among a run's weights; None where it was learned another way."""
        parts = (
            {n.removeprefix(group): a for n, a in weights.items() if n.startswith(group)}
            for group in (POSTERIOR, STATS)
        )
        values, stats = parts
        return cls(values, stats) if values else None

    def weights(self) -> dict[str, np.ndarray]:
        """The arrays that a run keeps."""
        found = {POSTERIOR + name: value for name, value in self.values.items()}
        return found | {STATS + name: value for name, value in self.stats.items()}

    @classmethod
    def joined(cls, pieces: Sequence[Draws]) -> Draws:
        """Pieces of the same chains, one after the other."""

        def along(parts: Sequence[Arrays]) -> dict[str, np.ndarray]:
            return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}

        return cls(along([p.values for p in pieces]), along([p.stats for p in pieces]))

    def after(self, first: int) -> Draws:
        """Without the first draws of every chain."""
        return self._each(lambda a: a[:, first:])

    def thinned(self, draws: int) -> Draws:
        """At most `draws` of every chain, evenly spaced, the last one among them."""
        if draws >= self.length:
            return self
        kept = self.length - 1 - np.arange(draws)[::-1] * self.length // draws
        return self._each(lambda a: a[:, kept])

    def flat(self) -> dict[str, np.ndarray]:
        """The draws of all chains in a row, [chains · draws, ...]."""
        return {name: value.reshape(-1, *value.shape[2:]) for name, value in self.values.items()}

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> Draws:
        return Draws(*({n: change(a) for n, a in part.items()} for part in (self.values, self.stats)))

    @property
    def chains(self) -> int:
        """How many chains there are."""
        return next(iter(self.values.values())).shape[0]

    @property
    def length(self) -> int:
        """How many draws a chain has."""
        return next(iter(self.values.values())).shape[1]

    # -- whether they are to be trusted ---------------------------------------------------------------------------

    @cached_property
    def by_site(self) -> dict[str, dict[str, float]]:
        """The worst `r_hat`, `ess_bulk` and `ess_tail` of each latent's numbers, as far as they are defined.

        Numbers that never move have none, and a single chain has no R-hat.
        """
        if self.length < FEWEST:
            return {}
        found = {}
        for name, value in self.values.items():
            numbers = np.asarray(value, np.float64).reshape(*value.shape[:2], -1)
            numbers = numbers[..., np.ptp(numbers, axis=(0, 1)) > 0]  # zeros of a triangle
            if numbers.shape[-1]:
                found[name] = _worst(numbers)
        return found

    @property
    def divergences(self) -> int:
        """How many draws came from a trajectory that diverged."""
        return int(np.sum(self.stats["diverging"]))

    def diagnostics(self) -> dict[str, float]:
        """The worst of all latents: `r_hat`, `ess_bulk`, `ess_tail`; and the number of `divergences`."""
        worst = {"r_hat": max, "ess_bulk": min, "ess_tail": min}
        columns = {name: [site[name] for site in self.by_site.values() if name in site] for name in worst}
        found = {name: worst[name](column) for name, column in columns.items() if column}
        return found | {"divergences": self.divergences}

    def notes(self) -> list[str]:
        """What is wrong with the chains, each with what to try; empty where nothing is."""
        total, said = self.chains * self.length, []
        if not self.by_site:
            said.append(
                f"R-hat and ESS are not defined for {self.length} draws a chain: they need at least {FEWEST} after warm-up"
            )
        elif self.chains == 1:
            said.append(
                "R-hat is not defined for one chain: run two or more, e.g. NUTS(chains=4), to see whether they agree"
            )
        high = {name: site["r_hat"] for name, site in self.by_site.items() if site.get("r_hat", 0.0) > R_HAT}
        if high:
            name = max(high, key=high.__getitem__)
            said.append(
                f"R-hat of {name!r} is {high[name]:.3g}, above {R_HAT}: the chains have not mixed; try more warmup and "
                "draws, or a program whose parts cannot change places (as the components of a mixture do)"
            )
        sizes = {name: [s[n] for n in ("ess_bulk", "ess_tail") if n in s] for name, s in self.by_site.items()}
        low = {name: min(each) for name, each in sizes.items() if each}
        name = min(low, key=low.__getitem__, default="")
        if low and not high and low[name] < ESS * self.chains:
            said.append(
                f"the effective sample size of {name!r} is {low[name]:.0f} of {total:,} draws, below {ESS} a chain: ask for "
                "more draws"
            )
        if self.divergences:
            said.append(
                f"{self.divergences:,} of {total:,} draws diverged: the posterior has a place too narrow for the step; try "
                "NUTS(target_accept=0.95), or latents of another scale (a non-centred program)"
            )
        return said


def _worst(numbers: np.ndarray) -> dict[str, float]:
    """R-hat and ESS of the number for which each is worst, of [chains, draws, numbers]."""
    from arviz_stats import ess, rhat

    def each(measure: Callable[..., Any], **options: Any) -> np.ndarray:
        return np.asarray(measure(numbers, chain_axis=0, draw_axis=1, **options), np.float64)

    with np.errstate(all="ignore"):
        found = {
            "r_hat": each(rhat),
            "ess_bulk": each(ess, method="bulk"),
            "ess_tail": each(ess, method="tail", prob=TAILS),
        }
    return {n: float(np.nanmax(v) if n == "r_hat" else np.nanmin(v)) for n, v in found.items() if np.isfinite(v).any()}


def tree_depth(steps: np.ndarray) -> np.ndarray:
    """How often a trajectory of so many leapfrog steps was doubled."""
    return np.floor(np.log2(np.maximum(steps, 1))).astype(np.int32) + 1


def drawn(structure: Structure) -> list[str]:
    """The latents that NUTS draws: those that are not summed out."""
    return [name for name, site in structure.latents.items() if not site.enumerated]


def gives_density(structure: Structure) -> bool:
    """Whether a row has a density p(x_n | θ) given the draws: it lies in a data plate, and no drawn latent is its own."""
    local = [name for name in drawn(structure) if structure.model[name].local]
    return bool(structure.data_plates) and not local and structure.kind == "latent"


def latent_draws(trained: Any, arrays: Arrays, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Draws of all latents of the rows: of the guide, or those of NUTS, evenly spaced over its chains.

    [S, B, ...] of local latents and [S, ...] of global ones; S is `draws`, or as many as the chains have if fewer.
    """
    kept = getattr(trained, "draws", None)
    if kept is None:
        return trained.posterior(arrays, draws, seed)[0]
    flat, total = kept.flat(), kept.chains * kept.length
    chosen = np.linspace(0, total - 1, min(draws, total)).round().astype(int)
    return trained.given(arrays, {name: value[chosen] for name, value in flat.items()}, seed)[0]


def log_density(trained: Any, arrays: Arrays, draws: Draws, seed: int) -> np.ndarray:
    """log p(x_n | θ_s) of every draw, all data sites together, [chains · draws, B]."""
    _, terms = trained.given(arrays, draws.flat(), seed)
    return np.sum([np.asarray(term, np.float64) for term in terms.values()], axis=0)


def log_mean(log_density: np.ndarray) -> np.ndarray:
    """log (1/S) Σ_s p(x_n | θ_s) of log densities [S, B], [B]."""
    return np.logaddexp.reduce(log_density, axis=0) - np.log(len(log_density))


def fitting(draws: Draws | None, structure: Structure) -> Draws:
    """The draws, if they are those of the program's latents."""
    wanted = drawn(structure)
    if draws is None or set(draws.values) != set(wanted):
        there = "none" if draws is None else ", ".join(draws.values)
        raise ProbgenError(
            f"the weights hold draws of {there} where the program has the latents {', '.join(wanted)}: they belong to "
            "another program or other options"
        )
    for name in wanted:
        if draws.values[name].shape[2:] != structure.model[name].shape:
            raise ProbgenError(
                f"the draws of {name!r} have shape {draws.values[name].shape[2:]} where the program has "
                f"{structure.model[name].shape}: they belong to other options"
            )
    return draws


def first_rows(value: Any, site: Site, rows: int) -> Any:
    """The first rows of a local latent's value; a global one's as it is."""
    axis = row_axis(site)
    return value if axis is None else value[(..., slice(rows), *[slice(None)] * (-axis - 1))]


def refuse_other_rows(structure: Structure, kept: Arrays, arrays: Arrays) -> None:
    """Draws of local latents belong to the training rows, in their order."""
    local = [name for name in drawn(structure) if structure.model[name].local]
    if local and any(not np.array_equal(arrays[n], a, equal_nan=True) for n, a in kept.items() if n in arrays):
        raise ProbgenError(
            f"NUTS drew the local latent {local[0]!r} for each training row, so it has no draws of it for other rows or "
            "for a part of them: give all training rows in one batch, or sum it out in the program"
        )
