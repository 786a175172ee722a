r"""Log posterior predictive density per datum, over the draws of NUTS, with its errors.

With S draws :math:`\theta_s \sim p(\theta \mid x_{1:N})`, and the latents of the row itself summed out,

.. math::
    \hat L_n = \log \tfrac1S \sum_s p(x_n \mid \theta_s), \qquad
    \operatorname{Var} \sum_n \hat L_n \approx \frac{\operatorname{Var}_s r_s}{\mathrm{ESS}(r)}, \quad
    r_s = \sum_n \frac{p(x_n \mid \theta_s)}{\tfrac1S \sum_t p(x_n \mid \theta_t)}.

Draws of one chain depend on each other, which the effective sample size of :math:`r` counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.evaluate.batch import Batch, mean_and_error
from probgen.evaluate.likelihood import per_dimension, undefined
from probgen.nuts import draws as chains
from probgen.program import Structure

NO_GUIDE = "elbo, term/<site> and k_hat are not defined: NUTS draws from the posterior itself, without a guide"
PLACE = 0


class Predictive:
    """The density of rows given what was drawn; at most `k` draws are used, evenly spaced in every chain."""

    def __init__(self, trained: Any, k: int, dims: int) -> None:
        self.trained, self.dims = trained, dims
        self.draws = trained.draws.thinned(max(1, k // trained.draws.chains))
        self.rows: dict[str, list[np.ndarray]] = {"log_likelihood": []}
        self.relative = 0.0

    @property
    def estimator(self) -> str:
        """What the numbers estimate, in words for the protocol."""
        number = f"{self.draws.chains * self.draws.length:,} draws of {self.draws.chains} chains"
        return f"log posterior predictive density: log of the mean of p(x | draw) over {number}"

    def add(self, batch: Batch) -> None:
        """Take one more batch in."""
        log_p = chains.log_density(self.trained, batch.arrays, self.draws, batch.seed)
        mean = chains.log_mean(log_p)
        with np.errstate(invalid="ignore"):  # −inf − (−inf): a row without density under any draw
            self.relative = self.relative + np.exp(log_p - mean).sum(axis=1)
        self.rows["log_likelihood"].append(mean + batch.log_jacobian)

    def result(self) -> tuple[dict[str, float], list[str]]:
        """Numbers, and what is to be said about them."""
        rows = np.concatenate(self.rows["log_likelihood"])
        said = undefined("log_likelihood", rows)
        if said:
            return {}, [said, NO_GUIDE]
        numbers = mean_and_error("log_likelihood", rows)
        error = self._error()
        if error is not None:
            numbers["log_likelihood_mc_se"] = error / len(rows)
        return numbers | per_dimension(rows, self.dims), [NO_GUIDE]

    def _error(self) -> float | None:
        """The standard error of Σ_n L_n that comes from a finite number of draws; None where it is not known."""
        relative = np.reshape(self.relative, (self.draws.chains, -1))
        if relative.shape[1] < chains.FEWEST:
            return None
        from arviz_stats import ess

        size = float(ess(relative, method="mean", chain_axis=0, draw_axis=1)) if np.ptp(relative) > 0 else np.inf
        return float(relative.std(ddof=1) / np.sqrt(size)) if size > 0 else None


def no_density(structure: Structure) -> str:
    """Why a row has no density given the draws."""
    local = [name for name in chains.drawn(structure) if structure.model[name].local]
    why = (
        f"NUTS drew the local latent {local[0]!r} for each training row, so it is not integrated out"
        if local
        else "no plate is as long as the batch, so there is no density per datum"
    )
    return f"log_likelihood is not defined: {why}"
