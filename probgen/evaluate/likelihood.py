r"""Log-likelihood per datum, exact or importance-weighted, with its errors.

With weights :math:`w_k = p(x, z_k) / q(z_k \mid x)`, :math:`z_k \sim q`, of one datum

.. math::
    \hat L = \log \tfrac1K \sum_k w_k, \qquad
    \mathrm{ESS} = \frac{(\sum_k w_k)^2}{\sum_k w_k^2}, \qquad
    \operatorname{Var} \hat L \approx \frac{\operatorname{Var} w}{K\, \bar w^2} = \frac{K / \mathrm{ESS} - 1}{K - 1}.

:math:`\operatorname{E} \hat L \le \log p(x)`: a lower bound in the mean,
low by about half the estimate's variance.

References:
    | Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
    | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import logsumexp

from probgen.chunks import particles
from probgen.evaluate.batch import Batch, mean_and_error
from probgen.evaluate.khat import FEWEST, equal_weights, summarise_k_hat

ELBO_DRAWS = 100  # where global latents enter the bound; elsewhere the importance weights give it
ELBO, WEIGHTS = 0, 1  # places of the seeds


def log_mean_weight(log_weights: np.ndarray) -> np.ndarray:
    """log (1/K) Σ_k w_k of log-weights [K, B]: one estimate of log p(x) per datum, [B]."""
    return logsumexp(log_weights, axis=0) - np.log(len(log_weights))


def effective_sample_size(log_weights: np.ndarray) -> np.ndarray:
    """(Σ w)² / Σ w² of log-weights [K, B], between 1 and K, [B]."""
    with np.errstate(invalid="ignore"):  # −inf − (−inf): no size where no weight is positive
        return np.exp(2 * logsumexp(log_weights, axis=0) - logsumexp(2 * log_weights, axis=0))


def monte_carlo_variance(log_weights: np.ndarray, shared: bool = False) -> float:
    """Variance of Σ_n log (1/K) Σ_k w_kn over the draws of z, by the delta method.

    Rows are independent unless they are `shared`: draw k of the global latents serves all of them, so that it is
    Σ_n w_kn / w̄_n whose spread over k counts. Needs K ≥ 2.
    """
    K = len(log_weights)
    if shared:
        relative = np.exp(log_weights - log_mean_weight(log_weights)).sum(axis=1)
        return float(relative.var(ddof=1) / K)
    return float((np.maximum(0.0, K / effective_sample_size(log_weights) - 1) / (K - 1)).sum())


class Likelihood:
    """Importance-weighted log-likelihood of a latent-variable program; at K = 1 the exact one of an exact program.

    Global latents are drawn from the guide: the estimate is then of the log posterior predictive density.
    """

    def __init__(self, trained: Any, k: int, dims: int) -> None:
        self.trained, self.dims = trained, dims
        self.exact = trained.structure.kind == "exact"
        self.k = 1 if self.exact else k
        self.shared = trained.structure.has_global_latents
        self.particles = particles(trained.structure)
        self.rows: dict[str, list[np.ndarray]] = {"elbo": [], "log_likelihood": [], "ess": [], "k_hat": []}
        self.variance = 0.0
        self.equal = 0

    def add(self, batch: Batch) -> None:
        """Take one more batch in."""
        weights = self._log_weights(batch)
        self._keep("log_likelihood", log_mean_weight(weights) + batch.log_jacobian)
        self._keep("elbo", self._elbo(batch, weights) + batch.log_jacobian)
        if self.k > 1:
            self._diagnose(weights)

    def result(self) -> tuple[dict[str, float], list[str]]:
        """Numbers, and what is to be said about them."""
        rows = {name: np.concatenate(parts) for name, parts in self.rows.items() if parts}
        numbers, notes = {}, []
        for name in ("elbo", "log_likelihood"):
            said = undefined(name, rows[name])
            if said:
                notes.append(said)
            else:
                numbers |= mean_and_error(name, rows[name])
        if "log_likelihood" in numbers:
            if self.k > 1:
                numbers["log_likelihood_mc_se"] = float(np.sqrt(self.variance) / len(rows["log_likelihood"]))
            numbers |= per_dimension(rows["log_likelihood"], self.dims)
        if self.k > 1 and np.isfinite(rows["ess"]).any():
            numbers["ess"] = float(np.nanmedian(rows["ess"]))
        if "k_hat" in rows:
            k_hat, said = summarise_k_hat(rows["k_hat"], self.equal)
            numbers, notes = numbers | k_hat, notes + said
        elif self.k > 1:
            notes.append(f"k_hat needs at least {FEWEST} importance samples, and `k` is {self.k}")
        return numbers, notes

    @property
    def estimator(self) -> str:
        """What the numbers estimate, in words for the protocol."""
        if self.exact:
            return "exact log p(x)"
        weights = f"log of the mean of {self.k} weights p(x, z) / q(z | x), a lower bound in the mean"
        return f"log posterior predictive density: {weights}" if self.shared else weights

    def _keep(self, name: str, values: np.ndarray) -> None:
        self.rows[name].append(np.asarray(values, dtype=np.float64))

    def _log_weights(self, batch: Batch) -> np.ndarray:
        pieces = batch.draws(self.k, self.particles, WEIGHTS)
        parts = [self.trained.log_weights(batch.arrays, size, seed) for size, seed in pieces]
        return np.concatenate(parts).astype(np.float64)

    def _elbo(self, batch: Batch, weights: np.ndarray) -> np.ndarray:
        if not self.shared:
            return weights.mean(axis=0)
        number = min(self.k, ELBO_DRAWS)
        pieces = batch.draws(number, self.particles, ELBO)
        sums = [self.trained.elbo(batch.arrays, size, seed).sum(axis=0) for size, seed in pieces]
        return np.sum(sums, axis=0, dtype=np.float64) / number

    def _diagnose(self, weights: np.ndarray) -> None:
        self._keep("ess", effective_sample_size(weights))
        self.variance += monte_carlo_variance(weights, self.shared)
        if self.k < FEWEST:
            return
        equal = equal_weights(weights)
        k_hat = np.zeros(weights.shape[1])
        if not equal.all():
            k_hat[~equal] = self.trained.k_hat(weights[:, ~equal])
        self.equal += int(equal.sum())
        self._keep("k_hat", k_hat)


def undefined(name: str, rows: np.ndarray) -> str | None:
    """The sentence that takes the place of a mean which is not finite."""
    wrong = np.flatnonzero(~np.isfinite(rows))
    if not len(wrong):
        return None
    return (
        f"{name} is not defined: {len(wrong)} of {len(rows)} rows (the first is row {wrong[0]}) have no finite "
        "density under the program"
    )


def per_dimension(log_likelihood: np.ndarray, dims: int) -> dict[str, float]:
    """−log p(x) / D in nats and, divided by log 2, in bits."""
    nats = mean_and_error("nats_per_dim", -log_likelihood / dims)
    return nats | mean_and_error("bits_per_dim", -log_likelihood / (dims * np.log(2)))
