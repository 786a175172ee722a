"""The M-step: parameters from pooled statistics in closed form, and gradient steps that never lower Q for the others.

    Q(θ) = Σ_sites Σ_s [Σ_m T_sm η_m(θ_s) − n_s A(θ_s)]

What one parameter entry feeds is pooled: numerators and denominators of all its cells are added up before they are
divided. Locations come before scales, which are second moments about the new locations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from probgen.em.exponential import family_of
from probgen.em.links import CONSTANT, Link, Vector

TRIES = 30  # halvings of a gradient step before it is given up
INNER = 10  # gradient steps in one M-step

Args = dict[str, Any]


class ClosedForm:
    """The update of one link: `update(flat, args, stats, n) -> (flat, args, floored)`.

    `flat` is the vector of all parameter entries, `floored` says of each cell [S, E] whether its moment was kept at
    its bound. `spread` [E, *event] are the variances of the data, of which `floor` is the least share.
    """

    def __init__(self, ops: Any, link: Link, kind: str, vector: Vector, centre: Any, spread: Any, floor: float) -> None:
        self.ops, self.link, self.vector, self.family = ops, link, vector, family_of(kind)
        self.centre, self.groups = centre, link.groups() if self._is_matrix else None
        self.fed = np.flatnonzero(link.index.reshape(-1) != CONSTANT)
        self.slots = link.index.reshape(-1)[self.fed]
        members = np.flatnonzero(np.isin(vector.slot, self.slots))
        self.members, self.leaders = members, vector.slot[members]
        if self.groups is None:
            low, high = self.family.bounds(link.argument, spread, floor, ops.eps)
            self.low, self.high = self._pooled_bound(low), high
        else:
            group, slots = self.groups
            scales = np.sqrt(np.broadcast_to(spread, (link.index.shape[0], *spread.shape)).reshape(len(group), -1))
            mean = np.stack([scales[group == g].mean(0) for g in range(len(slots))])
            self.unit, self.floor = ops.array(mean), floor

    @property
    def _is_matrix(self) -> bool:
        return self.link.index.ndim == 4

    def _pooled_bound(self, low: Any) -> Any:
        """A bound for every entry of the vector: the mean of those of its cells."""
        if low is None:
            return None
        cells = np.broadcast_to(low, self.link.index.shape).reshape(-1)[self.fed]
        total = np.bincount(self.slots, cells, self.vector.size)
        return self.ops.array(total / np.maximum(np.bincount(self.slots, minlength=self.vector.size), 1))

    def update(self, flat: Any, args: Args, stats: Any, n: Any) -> tuple[Any, Args, Any]:
        """The entries that maximise Q, the arguments they give, and the cells kept at their bound."""
        above, below = self.family.moment(self.ops, self.link.argument, stats, n, args, self.centre)
        below = self.ops.xp.broadcast_to(below, above.shape)
        found, floored = (self._entries if self.groups is None else self._matrices)(flat, above, below)
        flat = self.ops.put(flat, self.members, found[self.leaders])
        return flat, {**args, **self._seen(flat, args)}, floored

    def _entries(self, flat: Any, above: Any, below: Any) -> tuple[Any, Any]:
        """Entry by entry: a ratio of pooled sums, kept within its bounds; what has no mass stays as it is."""
        xp, ops, size = self.ops.xp, self.ops, self.vector.size
        below = ops.scatter(below.reshape(-1)[self.fed], self.slots, size)
        empty = below <= ops.tiny
        ratio = ops.scatter(above.reshape(-1)[self.fed], self.slots, size) / xp.where(empty, 1 + 0 * below, below)
        kept = ratio if self.low is None else xp.maximum(ratio, self.low + 0 * ratio)
        kept = kept if self.high is None else xp.minimum(kept, self.high + 0 * kept)
        used = xp.where(empty, 1 + 0 * kept, kept)
        low = (kept != ratio) & ~empty
        floored = ops.put(0 * above.reshape(-1), self.fed, ops.floats(low[self.slots]))
        floored = floored.reshape(*self.link.index.shape[:2], -1).sum(-1) > 0
        return xp.where(empty, flat, self.family.value(ops, self.link.argument, used)), floored

    def _matrices(self, flat: Any, above: Any, below: Any) -> tuple[Any, Any]:
        """Covariances of whole groups of cells, their eigenvalues kept above the floor, in the data's own units."""
        xp, ops, (group, slots) = self.ops.xp, self.ops, self.groups
        size, count = slots.shape[-1], len(slots)
        above = ops.scatter(above.reshape(len(group), -1), group, count).reshape(count, size, size)
        below = ops.scatter(below.reshape(len(group), -1), group, count).reshape(count, size, size)
        empty = below[:, 0, 0] <= ops.tiny
        unit = self.unit[:, :, None] * self.unit[:, None, :]
        hollow = empty[:, None, None]
        whole = above / unit / xp.where(hollow, 1 + 0 * below, below)
        whole, low = ops.clipped(xp.where(hollow, ops.array(np.eye(size)) + 0 * above, whole), self.floor)
        matrix = self.family.matrix(ops, self.link.argument, whole * unit)
        matrix = xp.where(hollow, flat[np.maximum(slots, 0)], matrix)  # what has no mass stays as it is
        fed = slots.reshape(-1) != CONSTANT
        found = ops.put(flat, slots.reshape(-1)[fed], matrix.reshape(-1)[fed])
        return found, (low & ~empty)[group].reshape(self.link.index.shape[:2])

    def _seen(self, flat: Any, args: Args) -> Args:
        """The new location, which the scale is taken about."""
        if self.link.argument != "loc":
            return {}
        index = self.link.index
        return {"loc": self.ops.xp.where(self.ops.mask(index != CONSTANT), flat[np.maximum(index, 0)], args["loc"])}


def ascent(
    value: Callable[[Any], Any],
    value_and_grad: Callable[[Any], tuple[Any, Any]],
    start: Mapping[str, Any],
    rate: float,
) -> tuple[dict[str, Any], float]:
    """A few steps up a gradient, with the step length of Barzilai and Borwein, halved until the value does not fall.

    Returns the place and the last step length. Reference: Barzilai & Borwein, IMA J. Numer. Anal. 8 (1988).
    """
    here = dict(start)
    height, slope = value_and_grad(here)
    height = float(height)
    for _ in range(INNER):
        squared = _dot(slope, slope)
        if not 0 < squared < float("inf"):
            break
        for _ in range(TRIES):
            there = {name: leaf + rate * slope[name] for name, leaf in here.items()}
            if float(value(there)) >= height + 1e-4 * rate * squared:
                break
            rate /= 2
        else:
            break
        height, after = value_and_grad(there)
        height = float(height)
        bend = rate * (squared - _dot(slope, after))
        rate = rate * rate * squared / bend if bend > 0 else 2 * rate
        here, slope = there, after
    return here, min(max(rate, 1e-12), 1e12)


def _dot(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))
