r"""Distances between samples and data: what likelihoods do not say. All but MMD² and KID are above zero between
real and real too; these two are zero there in the mean, and may be below.

.. math::
    \text{sliced Wasserstein:}\ \operatorname{E}_{\theta} W_1(\theta^\top x, \theta^\top y), \qquad
    \text{MMD}^2 = \operatorname{E} k(x, x') + \operatorname{E} k(y, y') - 2 \operatorname{E} k(x, y)

    \text{FD} = |\mu_a - \mu_b|^2 + \operatorname{tr}\bigl(C_a + C_b - 2 (C_a C_b)^{1/2}\bigr)

of the features of a classifier. Each is given with its floor, the same distance between two sets of real rows of the same sizes.

References:
    | Sliced Wasserstein (Rabin et al., 2012);   A kernel two-sample test (Gretton et al., 2012), JMLR 13
    | GANs trained by a two time-scale update rule (Heusel et al., 2017), arXiv:1706.08500
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.evaluate.finite import refuse_not_finite

DIRECTIONS = 500
WIDTHS = (0.5, 1.0, 2.0)  # of the kernel, in units of the median distance


def quality(
    samples: Any, real: Any, other: Any, labels: Any = None, seed: int = 0, rows: int = 2000
) -> dict[str, float]:
    """How far `samples` are from `real` rows, and as `<name>_floor` how far `other` real rows are.

    `sliced_wasserstein` (W₁, in data units), `mmd2` (unbiased; Gaussian kernels of three widths about the median distance)
    and, with the `labels` of `other`, what the features of a small classifier trained on `other` tell: `fd_classifier`, their
    Fréchet distance, and `kid_classifier`, of which smaller is better, and `precision`, `recall`, `density` and `coverage`,
    of which the floor is good. The first two are no FID and no KID, and compare only with numbers of the same classifier.
    All sets are cut to one size, `rows` at most.

    Raises:
        ProbgenError: sets of other shapes, or of fewer than ten rows.
    """
    sets = [np.asarray(s, np.float64).reshape(len(s), -1) for s in (samples, real, other)]
    n = min(rows, *map(len, sets))
    if len({s.shape[1] for s in sets}) > 1 or n < 10:
        shapes = ", ".join(str(np.shape(s)) for s in (samples, real, other))
        raise ProbgenError(f"quality compares sets of ten rows or more of one shape, and these have {shapes}")
    for name, rows_ in zip(("samples", "real", "other"), sets, strict=True):
        refuse_not_finite(rows_, name)
    if labels is not None and (len(labels) != len(sets[2]) or np.unique(labels, return_counts=True)[1].min() < 10):
        raise ProbgenError(
            f"quality: {len(labels)} `labels` of {len(sets[2])} rows of `other`: give one for each row, and ten rows or more of "
            "each class"
        )
    drawn, true, again = (s[np.random.default_rng(seed).permutation(len(s))[:n]] for s in sets)
    width = _median_distance(true)
    found = {}
    for name, rows_ in (("", drawn), ("_floor", again)):
        found[f"sliced_wasserstein{name}"] = sliced_wasserstein(rows_, true, seed=seed)
        found[f"mmd2{name}"] = mmd2(rows_, true, width)
    if labels is not None:
        features = classifier_features(sets[2], np.asarray(labels), seed)
        for name, rows_ in (("", drawn), ("_floor", again)):
            seen = _of_features(features(rows_), features(true), seed)
            found |= {f"{key}{name}": value for key, value in seen.items()}
    return found


def _of_features(drawn: np.ndarray, true: np.ndarray, seed: int) -> dict[str, float]:
    from probgen.evaluate.images import kid, precision_recall_density_coverage

    distances = {"fd_classifier": frechet(drawn, true), "kid_classifier": kid(drawn, true, subsets=20, seed=seed)[0]}
    return distances | precision_recall_density_coverage(true, drawn)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """The mean W₁ of projections onto random directions; sets of one size, [N, D] each."""
    theta = np.random.default_rng(seed).normal(size=(a.shape[1], directions))
    theta /= np.linalg.norm(theta, axis=0)
    return float(np.abs(np.sort(a @ theta, axis=0) - np.sort(b @ theta, axis=0)).mean())


def mmd2(a: np.ndarray, b: np.ndarray, width: float) -> float:
    """The unbiased squared maximum mean discrepancy, by a mean of Gaussian kernels; it may be below zero."""
    from sklearn.metrics.pairwise import rbf_kernel

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.mean([rbf_kernel(x, y, gamma=0.5 / (factor * width) ** 2) for factor in WIDTHS], axis=0)

    within = sum((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)) for x in (a, b) for k in [kernel(x, x)])
    return float(within - 2 * kernel(a, b).mean())


def _median_distance(rows: np.ndarray) -> float:
    from scipy.spatial.distance import pdist

    return float(np.median(pdist(rows[:500]))) or 1.0


def classifier_features(x: np.ndarray, y: np.ndarray, seed: int = 0) -> Any:
    """What the hidden layer, 64 ReLU units, of a classifier of `x` [N, D] by `y` says of rows.

    All values are scaled alike: each by its own spread, a pixel that is nearly always black would count most of all.
    """
    from sklearn.neural_network import MLPClassifier

    center, scale = x.mean(), x.std() or 1.0
    network = MLPClassifier((64,), max_iter=300, random_state=seed, early_stopping=True).fit((x - center) / scale, y)
    weights, bias = network.coefs_[0], network.intercepts_[0]
    return lambda rows: np.maximum((rows - center) / scale @ weights + bias, 0)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Wasserstein distance of the Gaussians with the moments of two sets, [N, D] each."""
    means, covariances = [s.mean(0) for s in (a, b)], [np.cov(s, rowvar=False) for s in (a, b)]
    product = np.linalg.eigvals(covariances[0] @ covariances[1])  # none below zero, but for rounding
    cross = np.sqrt(np.maximum(product.real, 0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross)
