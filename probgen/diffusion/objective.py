"""The bound of a Gaussian chain, step by step in closed form, and the weighted errors that are trained in its place.

    −ELBO = L_T + Σ_{i=2..T} L_{i−1} + L_0
    L_T = KL(q(x_T | x) ‖ p(x_T)),   L_{i−1} = KL(q(x_{i−1} | x_i, x) ‖ p(x_{i−1} | x_i)),   L_0 = −log p(x | x_1)

of which a training step takes one i for each row (Ho et al., arXiv:2006.11239, eq. 5).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.arrays import namespace
from probgen.diffusion.denoiser import GaussianChain, Prediction, target
from probgen.errors import ProbgenError, did_you_mean

WEIGHTINGS = ("vlb", "simple", "snr", "min-snr")


def refuse_weighting(weighting: str, proposal: str) -> None:
    """Refuse what `DiffusionELBO` knows nothing of."""
    if weighting not in WEIGHTINGS:
        raise ProbgenError(
            f"DiffusionELBO: weighting={weighting!r} is none of {', '.join(WEIGHTINGS)}{did_you_mean(weighting, WEIGHTINGS)}"
        )
    if proposal not in ("uniform", "importance"):
        raise ProbgenError(f'DiffusionELBO: proposal={proposal!r}; it is "uniform" or "importance"')


def rows_mean(values: Any) -> Any:
    """Means over all axes but that of the rows, [B]."""
    return values.reshape(len(values), -1).mean(-1)


def weighted_error(
    chain: GaussianChain, x: Any, noise: Any, said: Prediction, t: Any, weighting: str, most: float
) -> Any:
    """The mean over dimensions of a squared error, [B].

    "simple": of what the network predicts;  "snr": SNR_t ‖x − x̂‖² = ‖ε − ε̂‖², whatever it predicts;  "min-snr":
    min(SNR_t, γ) ‖x − x̂‖² (Hang et al., arXiv:2303.09556).
    """
    if not isinstance(chain, GaussianChain):
        raise ProbgenError(
            f"DiffusionELBO(weighting={weighting!r}) weighs a squared error of Gaussian noise, which a {type(chain).__name__} "
            'has none of: take the bound itself, weighting="vlb"'
        )
    if weighting == "simple":
        return rows_mean((said.output - target(chain.schedule, chain.predicts, x, noise, t)) ** 2)
    error = rows_mean((noise - said.noise) ** 2)
    if weighting == "snr":
        return error
    log_snr = chain.schedule.log_snr(t)
    xp = namespace(log_snr)
    excess = log_snr - float(np.log(most))
    return error * xp.exp(-(excess + abs(excess)) / 2)  # min(SNR, γ) / SNR


def proposal_of(chain: GaussianChain, proposal: str) -> np.ndarray:
    """The probability of each step 1..T, [T]; never less than a tenth of what it is when all are alike."""
    if proposal == "uniform":
        return np.full(chain.steps, 1 / chain.steps)
    costs = chain.expected_costs()
    return 0.9 * costs / costs.sum() + 0.1 / chain.steps
