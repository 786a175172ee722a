"""The log-likelihood of a diffusion by its probability flow, beside the bound of its chain.

    E_{q(x_1 | x)}[log p_flow(x_1) + log p(x | x_1) − log q(x_1 | x)] ≤ log p(x)

x_1 is the first latent: what has little noise. Its density is exact along the flow, up to the solver and, in many dimensions,
to Hutchinson's estimate of the trace, which is unbiased.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.evaluate.batch import Batch, mean_and_error

EXACT_UP_TO = 4  # dimensions: beyond, the trace is estimated
ROWS = {"exact": 500, "hutchinson": 100}  # at most: a path asks the network some four hundred times
PLACE = 5


class ProbabilityFlow:
    """Mean over rows, in nats per datum, in the units of the data."""

    def __init__(self, trained: Any, dims: int) -> None:
        self.trained, self.dims = trained, dims
        self.trace = "exact" if dims <= EXACT_UP_TO else "hutchinson"
        self.rows: list[np.ndarray] = []
        self.seen = 0

    def add(self, batch: Batch) -> None:
        """Take one more batch in, until there are enough rows."""
        done, self.seen = sum(map(len, self.rows)), self.seen + len(batch)
        left = min(len(batch), ROWS[self.trace] - done)
        if left <= 0:
            return
        ((_, seed),) = batch.draws(1, 1, PLACE)
        arrays = {name: values[:left] for name, values in batch.arrays.items()}
        found = self.trained.flow_log_likelihood(arrays, self.trace, seed)
        self.rows.append(np.asarray(found, np.float64) + batch.log_jacobian[:left])

    def result(self) -> tuple[dict[str, float], list[str]]:
        """The number, and how it was made."""
        rows = np.concatenate(self.rows)
        if not np.isfinite(rows).all():
            return {}, ["ode_log_likelihood is not defined: it is not finite for some row"]
        few = f", of {len(rows)} of the {self.seen} rows" if len(rows) < self.seen else ""
        note = f"ode_log_likelihood: the probability flow with the {self.trace} trace{few}"
        return mean_and_error("ode_log_likelihood", rows), [note]
