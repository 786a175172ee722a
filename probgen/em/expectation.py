"""The E-step: responsibilities of S states for N rows, as one matrix product on the features of the data.

    log p(x_n, s) = Σ_m F_mn W_sm,    r = softmax_s,    log p(x_n) = logsumexp_s,    T = r Fᵀ

Rows are taken in blocks, so that memory is bounded; features are kept where they fit, else made anew. Sites whose
arguments depend on the row, or whose distribution has no family, add log densities from runs of the program itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.em.exponential import family_of

BLOCK_NUMBERS = 2**24  # features and responsibilities in one block of rows, where features are kept
ANEW_NUMBERS = 2**20  # the same, where they are made anew: a block then stays in the processor's cache
GENERAL_NUMBERS = 2**18  # rows times states of a block that the program itself is run on
KEPT_BYTES = 2**28  # features that are kept from one step to the next


@dataclass(frozen=True)
class DataSite:
    """A data site with a family: its values, column by column.

    `centre` is [E, *event], taken off the values, and `spread` the variance of each column.
    """

    name: str
    kind: str
    elements: int
    centre: np.ndarray
    spread: np.ndarray
    base: float  # mean of log h(x), per row

    @property
    def family(self) -> Any:
        """Its exponential family."""
        return family_of(self.kind)


def columns(values: np.ndarray, event_dim: int) -> np.ndarray:
    """Values [N, E, *event] as [*event, E, N]."""
    order = [*range(2, 2 + event_dim), 1, 0]
    return np.transpose(values, order)


def seen(name: str, kind: str, values: np.ndarray, args: Mapping[str, np.ndarray]) -> DataSite:
    """What is kept of a data site, from its values [N, E, *event] and its arguments [S, E, *event]."""
    family = family_of(kind)
    scaled = family.values(values)
    centre, spread = scaled.mean(0, dtype=np.float64), scaled.var(0, dtype=np.float64)
    return DataSite(
        name, kind, values.shape[1], centre if family.located else 0 * centre, spread,
        family.base(columns(values, family.event_dim), args) / len(values),
    )  # fmt: skip


class Expectation:
    """The E-step over the sites of one program, at one precision.

    `latents` maps each enumerated latent to (kind, values of the joint states [*event, 1, S]); `general` names the
    sites that only the program itself can score; `hard` puts all responsibility on the best state.
    """

    def __init__(
        self,
        ops: Any,
        data: list[DataSite],
        latents: Mapping[str, tuple[str, np.ndarray]],
        general: tuple[str, ...],
        states: int,
        hard: bool,
    ) -> None:
        self.ops, self.data, self.latents, self.general = ops, data, latents, general
        self.states, self.hard = states, hard
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.centres = {site.name: ops.array(site.centre) for site in data}

    # -- the data -------------------------------------------------------------------------------------------------

    def block_rows(self, rows: int, numbers: int, keep: bool) -> int:
        """How many rows a block has: blocks of one length that just hold all rows."""
        most = max(64, (BLOCK_NUMBERS if keep else ANEW_NUMBERS) // (numbers + self.states))
        if self.general:
            most = min(most, max(1, GENERAL_NUMBERS // self.states))
        return -(-rows // -(-rows // most))

    def blocks(
        self,
        values: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        args: Mapping[str, Mapping[str, Any]],
        again: bool,
    ) -> dict[str, Any]:
        """All rows in blocks [C, ..., c]: values or features, which rows are real, and the arrays for the program.

        The last block is filled up with the first row, which counts for nothing there. Features are kept only for rows
        that come `again`.
        """
        rows = len(next(iter(arrays.values())))
        sizes = {site.name: self._feature_count(site, args) for site in self.data}
        keep = again and 4 * sum(sizes.values()) * rows <= KEPT_BYTES
        length = self.block_rows(rows, sum(sizes.values()) + 1, keep)
        count = -(-rows // length)
        order = np.arange(count * length)
        real, order = (order < rows).reshape(count, length), np.where(order < rows, order, 0).reshape(count, length)
        cut: dict[str, Any] = {"real": self.ops.array(real)}
        for site in self.data:
            raw = self._centred(site, values[site.name])
            parts = [self.ops.array(np.ascontiguousarray(raw[..., place])) for place in order]
            if keep:
                parts = [
                    self._features(site, part, self.ops.array(ok), args) for part, ok in zip(parts, real, strict=True)
                ]
            cut[f"{'features' if keep else 'values'}/{site.name}"] = self.ops.xp.stack(parts)
        if keep and self.data:
            named = [cut.pop(f"features/{site.name}") for site in self.data]
            cut["features"] = self.ops.stored(self.ops.xp.concatenate([*named, cut["real"][:, None]], 1))
        if self.general:
            cut |= {f"arrays/{name}": self.ops.raw(np.asarray(array)[order]) for name, array in arrays.items()}
        return cut

    def _feature_count(self, site: DataSite, args: Mapping[str, Mapping[str, Any]]) -> int:
        example = self.ops.array(np.full((*site.centre.shape[1:], site.elements, 1), 0.5))
        return int(self._features(site, example, None, args).shape[0])

    def _centred(self, site: DataSite, values: np.ndarray) -> np.ndarray:
        scaled = columns(site.family.values(values), site.family.event_dim)
        return scaled - columns(site.centre[None], site.family.event_dim) if site.family.located else scaled

    def _features(self, site: DataSite, values: Any, real: Any, args: Mapping[str, Mapping[str, Any]]) -> Any:
        found = site.family.features(self.ops, values, args[site.name])
        found = found.reshape(-1, found.shape[-1])
        return found if real is None else found * real

    def features(self, block: Mapping[str, Any], args: Mapping[str, Mapping[str, Any]]) -> Any:
        """The features of a block [M + 1, c]; the last row says which rows are real."""
        if "features" in block:
            return self.ops.read(block["features"])
        found = [self._features(site, block[f"values/{site.name}"], block["real"], args) for site in self.data]
        return self.ops.xp.concatenate([*found, block["real"][None]])

    # -- the step -------------------------------------------------------------------------------------------------

    def weights(self, args: Mapping[str, Mapping[str, Any]]) -> Any:
        """W [S, M + 1]: natural parameters of every data site; last the constants, log p of the latents among them."""
        parts, constant = [], self.ops.array(np.zeros(self.states))
        for site in self.data:
            natural, own = site.family.natural(self.ops, args[site.name], self.centres[site.name])
            self._shapes[site.name] = tuple(natural.shape)
            parts.append(natural.reshape(self.states, -1))
            constant = constant + own.sum(-1) + site.base
        for name in self.latents:
            constant = constant + self.log_prior(name, args[name])
        return self.ops.xp.concatenate([*parts, constant[:, None]], 1)

    def log_prior(self, name: str, args: Mapping[str, Any]) -> Any:
        """log p of each joint state's value of a latent, [S]."""
        features, (kind, _) = self._latent_features(name, args), self.latents[name]
        natural, own = family_of(kind).natural(self.ops, args, 0.0)
        return (natural * features).sum((1, 2)) + own.sum(-1)

    def _latent_features(self, name: str, args: Mapping[str, Any]) -> Any:
        """The statistics of each joint state's value, [S, M, 1]."""
        kind, values = self.latents[name]
        found = family_of(kind).features(self.ops, self.ops.array(values), args)
        return self.ops.xp.swapaxes(self.ops.xp.swapaxes(found, 1, 2), 0, 1)

    def step(self, weights: Any, blocks: Mapping[str, Any], args: Mapping[str, Any], log_joint: Any) -> tuple[Any, Any]:
        """({"total": Σ_n log p(x_n), "stats": T [S, M + 1]}, responsibilities [C, S, c], kept for general sites)."""
        xp = self.ops.xp

        def one(block: Mapping[str, Any]) -> tuple[Any, Any]:
            features = self.features(block, args)
            logits = self.ops.product(weights, features)
            if self.general:
                logits = logits + log_joint(_arrays(block))
            if self.hard:
                total, best = self.ops.best(logits)
                r = self.ops.floats(xp.arange(self.states)[:, None] == best[None])
            else:
                total, r = self.ops.softmax(logits)
            sums = {"total": (total * features[-1]).sum(), "stats": r @ features.T}
            return sums, r * features[-1] if self.general else None

        return self.ops.accumulated(one, blocks)

    def assigned(self, blocks: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[Any, Any]:
        """Statistics, and responsibilities for general sites, of rows that belong to the states `blocks["labels"]`."""

        def one(block: Mapping[str, Any]) -> tuple[Any, Any]:
            features = self.features(block, args)
            r = self.ops.floats(self.ops.xp.arange(self.states)[:, None] == block["labels"][None])
            return {"stats": r @ features.T}, r * features[-1] if self.general else None

        sums, kept = self.ops.accumulated(one, blocks)
        return sums["stats"], kept

    def labelled(self, labels: np.ndarray, blocks: Mapping[str, Any]) -> dict[str, Any]:
        """The blocks with the state of each row."""
        count, length = blocks["real"].shape
        padded = np.zeros(count * length, np.int64)
        padded[: len(labels)] = labels
        return {**blocks, "labels": self.ops.raw(padded.reshape(count, length))}

    def parts(self, stats: Any, args: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The statistics of each site, [S, M, E] for data and [S, M, 1] for latents."""
        found, start, n = {}, 0, stats[:, -1]
        for site in self.data:
            shape = self._shapes[site.name]
            stop = start + shape[1] * shape[2]
            found[site.name] = stats[:, start:stop].reshape(shape)
            start = stop
        for name in self.latents:
            found[name] = n[:, None, None] * self._latent_features(name, args[name])
        return found

    def condition(self, args: Mapping[str, Mapping[str, Any]]) -> Any:
        """What rounding may take off log p of a row, in nats: ε Σ_d of the data's variance over the components'."""
        worst = self.ops.array(0.0)
        for site in self.data:
            if site.family.located:
                precision = site.family.precision(self.ops, args[site.name])
                own = (precision * self.ops.array(site.spread)).reshape(self.states, -1).sum(1)
                worst = self.ops.xp.maximum(worst, own.max())
        return self.ops.eps * worst

    def bound(self, weights: Any, stats: Any) -> Any:
        """Q of the sites with a family: Σ_s Σ_m T_sm W_sm."""
        return (weights * stats).sum()


def _arrays(block: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("arrays/"): value for name, value in block.items() if name.startswith("arrays/")}
