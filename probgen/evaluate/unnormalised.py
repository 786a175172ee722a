r"""Log-likelihood of a program whose factors weigh its data: log p̃(x) − log Z, with log Z by annealed importance sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.chunks import seed_at
from probgen.energy.annealing import log_weights
from probgen.evaluate.batch import Batch, mean_and_error
from probgen.evaluate.likelihood import log_mean_weight, monte_carlo_variance, per_dimension, undefined

PLACE = 6
FEW = 100  # effective chains below which log Z is not to be trusted


class Weighed:
    """log p(x) = log p̃(x) − log Z of rows; one log Z, by `k` chains, serves all of them."""

    def __init__(self, trained: Any, k: int, dims: int, seed: int) -> None:
        self.trained, self.k, self.dims, self.seed = trained, k, dims, seed
        self.rows: dict[str, list[np.ndarray]] = {"log_likelihood": []}
        (self.site,) = trained.structure.observed
        self.temperatures, self._weights = 0, None

    @property
    def weights(self) -> np.ndarray:
        """Logs of k unbiased estimates of Z, [k]."""
        if self._weights is None:
            example = self.trained.arrays

            def arrays(n: int) -> dict[str, np.ndarray]:
                return {name: np.resize(value, (n, *np.shape(value)[1:])) for name, value in example.items()}

            def draw(n: int, seed: int) -> np.ndarray:
                return np.asarray(self.trained.draw(n, seed, arrays(n))[self.site], np.float64)

            def parts(x: np.ndarray) -> tuple[np.ndarray, ...]:
                return self.trained.log_parts({**arrays(len(x)), self.site: x})

            self._weights, path = log_weights(draw, parts, self.k, seed_at(self.seed, PLACE))
            self.temperatures = len(path.sizes)
        return self._weights

    @property
    def log_z(self) -> float:
        """The estimate of log Z, low by about half its variance in the mean."""
        return float(log_mean_weight(self.weights[:, None])[0])

    @property
    def estimator(self) -> str:
        """What the numbers estimate, in words for the protocol."""
        return f"log p̃(x) − log Z; Z by annealed importance sampling, {self.k} chains, {self.temperatures} temperatures"

    def add(self, batch: Batch) -> None:
        """Take one more batch in."""
        log_p, log_psi, *_ = self.trained.log_parts(batch.arrays)
        self.rows["log_likelihood"].append(log_p + log_psi - self.log_z + batch.log_jacobian)

    def result(self) -> tuple[dict[str, float], list[str]]:
        """Numbers, and what is to be said about them."""
        rows = np.concatenate(self.rows["log_likelihood"])
        said = undefined("log_likelihood", rows)
        if said:
            return {}, [said]
        error = float(np.sqrt(monte_carlo_variance(self.weights[:, None])))
        ess = self.k / (1 + (self.k - 1) * error**2)
        numbers = {**mean_and_error("log_likelihood", rows), "log_likelihood_mc_se": error}
        numbers |= {"log_z": self.log_z, "log_z_se": error, "ess": ess}
        few = f"log_z: {ess:.0f} of {self.k} chains count, so that it is low, and log_likelihood high, by more than its error"
        return numbers | per_dimension(rows, self.dims), [few] if ess < FEW else []
