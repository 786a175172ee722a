r"""Mode coverage: how many of the modes that a law is known to have a sampler finds, and in what shares.

A sample belongs to the mode nearest to it, and is of high quality no further from it than `within` standard deviations.
A mode is captured when a sample of high quality belongs to it. With the shares :math:`\hat q_k` of all samples,

.. math::
    \text{KL}(\hat q \,\Vert\, p) = \sum_k \hat q_k \log \frac{\hat q_k}{p_k}, \qquad
    \operatorname E\, \text{KL}(\hat q \,\Vert\, p) \approx \frac{K - 1}{2N} \ \text{for a perfect sampler},

a reverse KL, biased upwards as shares are plugged in. `<name>_floor` is what a perfect sampler gets on average.

References:
    | VEEGAN (Srivastava et al., 2017), arXiv:1705.07761;   PacGAN (Lin et al., 2018), arXiv:1712.04086
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.errors import ProbgenError, did_you_mean
from probgen.evaluate.finite import refuse_not_finite


def mode_coverage(
    samples: Any, centers: Any, std: float | None = None, within: float = 3.0, weights: Any = None, true: Any = None
) -> dict[str, float]:
    """The modes that samples find, by the protocol of VEEGAN and PacGAN: 2,500 samples, and the mean of several runs.

    A share of high quality above its floor tells of modes that are too narrow. The floor holds for modes that lie more than
    2 · `within` standard deviations apart; of `eight-gaussians`, at 6.1, a perfect sampler has 0.990 and not 0.989.

    Args:
        samples: rows [N, D].
        centers: the modes [K, D], or the name of a toy of Gaussians: `"ring"`, `"grid"`, `"eight-gaussians"`.
        std: the standard deviation of a mode along each dimension; a toy knows its own.
        within: how far a sample of high quality may be from its mode, in standard deviations.
        weights: the true probabilities [K] of the modes, all alike when left out.
        true: true samples [M, D], independent; `samples` are compared with one half, and for the floor so is the other.

    Returns:
        `modes` captured `of` K; `high_quality`, a share of the samples, with its binomial `high_quality_se`, and
        `high_quality_floor`, χ²_D(within²); `reverse_kl` of all samples, in nats, and `reverse_kl_floor`, (K − 1) / 2N;
        with `true` also `w1`, W₁ of equally many samples, and `w1_floor`.

    Raises:
        ProbgenError: an unknown toy, points of other dimensions, or samples that are not finite.
    """
    from scipy.spatial import KDTree
    from scipy.stats import chi2

    centers, std = _known(centers, std)
    samples = _rows(samples, centers.shape[1], "samples")
    distance, nearest = KDTree(centers).query(samples)
    good = distance <= within * std
    share = float(good.mean())
    found = {
        "modes": len(np.unique(nearest[good])),
        "of": len(centers),
        "high_quality": share,
        "high_quality_se": float(np.sqrt(share * (1 - share) / len(samples))),
        "high_quality_floor": float(chi2.cdf(within**2, centers.shape[1])),
        **_shares(np.bincount(nearest, minlength=len(centers)), weights),
    }
    if true is not None:
        found |= _transport(samples, _rows(true, centers.shape[1], "true"))
    return found


def class_coverage(labels: Any, classes: int, weights: Any = None) -> dict[str, float]:
    """The classes that a classifier finds among samples: of stacked digits, the codes 100 a + 10 b + c of 1,000 classes.

    The protocol takes 26,000 samples of stacked MNIST. A classifier errs, and its errors count as modes: give its coverage of
    real rows beside it.

    Args:
        labels: predicted classes [N], integers from 0 to `classes` − 1.
        classes: how many there are.
        weights: the true probabilities [classes], all alike when left out.

    Returns:
        `modes` found `of` all; `reverse_kl` in nats, and `reverse_kl_floor`, (K − 1) / 2N.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ProbgenError(f"labels are integers [N], and these are {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ProbgenError(
            f"labels run from {labels.min()} to {labels.max()}, and {classes} classes from 0 to {classes - 1}"
        )
    counts = np.bincount(labels, minlength=classes)
    return {"modes": int((counts > 0).sum()), "of": classes, **_shares(counts, weights)}


def _shares(counts: np.ndarray, weights: Any) -> dict[str, float]:
    from probgen.evaluate.divergences import kl

    weights = np.full(len(counts), 1 / len(counts)) if weights is None else weights
    floor = (len(counts) - 1) / (2 * counts.sum())
    return {"reverse_kl": kl(counts / counts.sum(), weights), "reverse_kl_floor": float(floor)}


def _transport(samples: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """W₁ depends on how many points there are: samples and floor are compared with the same points, equally many."""
    from probgen.evaluate.divergences import wasserstein1

    n = min(len(samples), len(true) // 2)
    return {"w1": wasserstein1(samples[:n], true[:n]), "w1_floor": wasserstein1(true[-n:], true[:n])}


def _known(centers: Any, std: float | None) -> tuple[np.ndarray, float]:
    if isinstance(centers, str):
        from probgen.data.toys import TOYS

        gaussians = {name: toy for name, toy in TOYS.items() if toy.centres is not None}
        if centers not in gaussians:
            raise ProbgenError(f"{centers!r} is no toy of Gaussians{did_you_mean(centers, gaussians)}")
        toy = gaussians[centers]
        return toy.centres, toy.sigma if std is None else std
    centers = np.asarray(centers, np.float64)
    if centers.ndim != 2 or std is None or not std > 0:
        raise ProbgenError(f"modes are centers [K, D], here {centers.shape}, and their std, here {std}: give both")
    return centers, std


def _rows(values: Any, dimensions: int, name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] != dimensions or len(values) < 2:
        raise ProbgenError(f"{name} has shape {values.shape}, and the modes want two rows or more, [N, {dimensions}]")
    refuse_not_finite(values, name)
    return values
