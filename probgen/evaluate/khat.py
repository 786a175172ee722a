r"""Pareto :math:`\hat k` of the importance weights, per datum, summed up for a set.

:math:`\hat k < 0.5` is good, up to 0.7 usable; above it the estimate leans on a few draws. The fit itself is the
PPL's own (generalised Pareto, the largest :math:`3 \sqrt K` weights).

References:
    | Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018), https://arxiv.org/abs/1802.02538
"""

from __future__ import annotations

import numpy as np

HIGH = 0.7
FEWEST = 25  # importance samples; fewer leave less than five in the tail


def equal_weights(log_weights: np.ndarray) -> np.ndarray:
    """Which data of log-weights [K, B] have all weights equal to rounding: the guide is the posterior there."""
    high, low = log_weights.max(axis=0), log_weights.min(axis=0)
    with np.errstate(invalid="ignore"):  # −inf − (−inf): a datum without density is not one of equal weights
        return high - low <= 1e-5 * np.maximum(1.0, np.abs(high))


def summarise_k_hat(k_hat: np.ndarray, equal: int) -> tuple[dict[str, float], list[str]]:
    """Median, share above 0.7, and what is to be said; a row whose tail could not be fitted is left out."""
    fitted = k_hat[np.isfinite(k_hat)]
    notes = []
    if len(fitted) < len(k_hat):
        notes.append(f"k_hat could not be fitted for {len(k_hat) - len(fitted)} of {len(k_hat)} rows")
    if equal:
        notes.append(f"k_hat is counted as 0 for {equal} of {len(k_hat)} rows whose weights are all equal")
    if not len(fitted):
        return {}, notes
    return {"k_hat": float(np.median(fitted)), "k_hat_above_0.7": float((fitted > HIGH).mean())}, notes
