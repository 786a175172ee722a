"""The bound of a Gaussian chain, step by step in closed form, and the weighted errors that are trained in its place.

    −ELBO = L_T + Σ_{i=2..T} L_{i−1} + L_0
    L_T = KL(q(x_T | x) ‖ p(x_T)),   L_{i−1} = KL(q(x_{i−1} | x_i, x) ‖ p(x_{i−1} | x_i)),   L_0 = −log p(x | x_1)

of which a training step takes one i for each row (Ho et al., arXiv:2006.11239, eq. 5).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.arrays import namespace, rows_mean
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


class ChainBound:
    """Minus the ELBO of a chain x_T → … → x_1 → x, of which each row takes one random step, in closed form.

        −ELBO = L_T + Σ_i L_{i−1} + L_0 = L_T + E_{i ~ p}[ L_{i−1} / p_i ]          (Ho et al., arXiv:2006.11239, eq. 5)

    An unbiased estimate of what `ELBO()` makes of the whole chain, for the cost of one run of the network. The program
    has a `denoiser`: a function that registers the network and returns a `Denoiser`. Terms: `x_T` is −L_T, `x_t` the
    sum of the KLs, `x` is −L_0. The other weightings are no bounds, but errors averaged over i and dimensions.

    Parameters
    ----------
    weighting
        "vlb", the bound; "simple": ‖·‖² of what the network predicts; "snr": ‖ε − ε̂‖²; "min-snr": min(SNR, γ) ‖x − x̂‖².
    proposal
        "uniform", or "importance": steps in proportion to what they would cost Gaussian data.
    min_snr
        γ of "min-snr" (arXiv:2303.09556).
    drop
        Share of the rows that a conditional network sees without their label, for guidance (arXiv:2207.12598).
    """

    def __init__(
        self, weighting: str = "vlb", proposal: str = "uniform", min_snr: float = 5.0, drop: float = 0.0
    ) -> None:
        refuse_weighting(weighting, proposal)
        self.weighting, self.proposal, self.min_snr, self.drop = weighting, proposal, min_snr, drop

    def __repr__(self) -> str:
        return f"DiffusionELBO(weighting={self.weighting!r}, proposal={self.proposal!r}, min_snr={self.min_snr}, drop={self.drop})"

    def of_step(self, chain: Any, data: Any, x: Any, noise: Any, step: Any, weight: Any) -> tuple[Any, dict[str, Any]]:
        """The loss of each row at the step 1..T and the noise that are given for it, times its weight, [B]; its terms."""
        t = step / chain.steps
        said = chain(chain.noised(x, t, noise), t)
        if self.weighting != "vlb":
            error = weighted_error(chain, x, noise, said, t, self.weighting, self.min_snr)
            return weight / chain.steps * error, {}
        where, first = namespace(x).where, step <= 1
        before = where(first, t / 2, (step - 1) / chain.steps)  # of the first step only the decoder is asked
        steps = where(first, 0.0, chain.step_kl(x, said, t, before)) * weight
        decoded = where(first, chain.decoded(said, 1 / chain.steps).log_prob(data), 0.0) * weight
        ends = chain.prior_kl(x)
        return ends + steps - decoded, {f"x_{chain.steps}": -ends, "x_t": -steps, "x": decoded}


def spread_steps(chances: Any, start: Any, ones: Any) -> tuple[Any, Any]:
    """A step 1..T for each row, drawn by its chance [T], and 1 / chance, [B]; `ones` is a one for each row.

    Rows lie evenly over all steps, moved by one random number `start` (Kingma et al., arXiv:2107.00630): each has its
    chance, and together they cover the chain.
    """
    xp = namespace(ones)
    places = (start + (xp.cumsum(ones, 0) - 1) / len(ones)) % 1
    index = xp.clip(xp.searchsorted(xp.cumsum(chances, 0), places), 0, len(chances) - 1)
    return (index + 1) * ones, 1 / chances[index]
