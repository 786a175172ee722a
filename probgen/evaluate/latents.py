r"""Active units: the coordinates of the latents that the guide moves with the data.

.. math:: A_u = \operatorname{Var}_x\!\big(\operatorname{E}_{q(z \mid x)}[z_u]\big) > 0.01

The posterior mean is one of S draws, whose own noise :math:`\operatorname{Var}_q(z_u) / S` would count every unit of
a collapsed posterior as active; it is taken off.

References:
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.chunks import particles
from probgen.evaluate.batch import Batch

THRESHOLD = 0.01
PLACE = 3


class ActiveUnits:
    """Counts active units of the local continuous latents, together and by site."""

    def __init__(self, trained: Any, draws: int) -> None:
        structure = trained.structure
        self.trained, self.draws = trained, max(2, draws)
        self.sites = [n for n, s in structure.sampled.items() if s.local and not s.discrete]
        self.particles = particles(structure)
        self.means = {site: Spread() for site in self.sites}
        self.noise: dict[str, np.ndarray] = {}
        self.rows = 0

    def add(self, batch: Batch) -> None:
        """Take one more batch in."""
        if not self.sites:
            return
        moments = {site: Spread() for site in self.sites}
        for size, seed in batch.draws(self.draws, self.particles, PLACE):
            values = self.trained.guided(batch.arrays, size, seed)
            for site in self.sites:
                moments[site].add(values[site])
        self.rows += len(batch)
        for site, moment in moments.items():
            self.means[site].add(moment.mean)
            self.noise[site] = self.noise.get(site, 0.0) + moment.variance.sum(axis=0) / self.draws

    def result(self) -> tuple[dict[str, float], list[str]]:
        """Numbers, and what is to be said about them."""
        if not self.sites:
            return {}, []
        if self.rows < 2:
            return {}, ["active_units needs at least two rows"]
        counts = {f"active_units/{site}": int((self._activity(site) > THRESHOLD).sum()) for site in self.sites}
        return {"active_units": sum(counts.values()), **counts}, []

    def _activity(self, site: str) -> np.ndarray:
        return self.means[site].variance - self.noise[site] / self.rows


class Spread:
    """Mean and variance over the first axis, taken in piece by piece (Chan et al.)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Take one more piece in."""
        values = np.asarray(values, dtype=np.float64)
        count, mean = len(values), values.mean(axis=0)
        squares = ((values - mean) ** 2).sum(axis=0)
        total, shift = self.count + count, mean - self.mean
        self.squares = self.squares + squares + shift**2 * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def variance(self) -> np.ndarray:
        """Unbiased."""
        return self.squares / (self.count - 1)
