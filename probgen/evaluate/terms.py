"""The terms of the ELBO, site by site: log p(x | z) of data sites, log p − log q of latents.

They add up to the ELBO, together with `term/prepare`, the log-Jacobian of `prepare`, where that is not zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.chunks import particles
from probgen.evaluate.batch import Batch, mean_and_error

PLACE = 2


class Terms:
    """Mean of each site's term over rows and draws, in nats per datum."""

    def __init__(self, trained: Any, draws: int) -> None:
        self.trained, self.draws = trained, draws
        self.particles = particles(trained.structure)
        self.rows: dict[str, list[np.ndarray]] = {}

    def add(self, batch: Batch) -> None:
        """Take one more batch in."""
        sums: dict[str, np.ndarray] = {}
        for size, seed in batch.draws(self.draws, self.particles, PLACE):
            for site, term in self.trained.terms(batch.arrays, size, seed).items():
                sums[site] = sums.get(site, 0.0) + np.sum(term, axis=0, dtype=np.float64)
        for site, total in sums.items():
            self.rows.setdefault(f"term/{site}", []).append(np.broadcast_to(total / self.draws, len(batch)))
        self.rows.setdefault("term/prepare", []).append(np.asarray(batch.log_jacobian, dtype=np.float64))

    def result(self) -> tuple[dict[str, float], list[str]]:
        """Numbers, and what is to be said about them."""
        numbers: dict[str, float] = {}
        notes = []
        for name, parts in self.rows.items():
            rows = np.concatenate(parts)
            if name == "term/prepare" and not rows.any():
                continue
            if np.isfinite(rows).all():
                numbers |= mean_and_error(name, rows)
            else:
                notes.append(f"{name} is not defined: it is not finite for {(~np.isfinite(rows)).sum()} rows")
        return numbers, notes
