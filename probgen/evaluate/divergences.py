r"""How far apart two distributions are: by their probabilities, by the way from one to the other, by a classifier.

.. math::
    \text{TV}(p, q) = \tfrac12 \sum_i \lvert p_i - q_i \rvert, \qquad
    \text{KL}(p \,\Vert\, q) = \sum_i p_i \log \frac{p_i}{q_i}, \qquad
    \text{JS}(p, q) = \tfrac12 \text{KL}\bigl(p \,\Vert\, \tfrac{p+q}2\bigr) + \tfrac12 \text{KL}\bigl(q \,\Vert\, \tfrac{p+q}2\bigr)

    W_1(p, q) = \min_{\gamma \in \Gamma(p, q)} \sum_{ij} \gamma_{ij} \lvert x_i - y_j \rvert

The first three compare probabilities place by place: TV ≤ 1, JS ≤ log 2, and neither moves while the supports are
disjoint. W₁ knows how far apart the places are. TV, √JS and W₁ are metrics, KL and JS are none.

References:
    | Divergence measures based on the Shannon entropy (Lin, 1991), IEEE TIT 37
    | A new metric for probability distributions (Endres and Schindelin, 2003), IEEE TIT 49
    | Wasserstein GAN (Arjovsky et al., 2017), arXiv:1701.07875
    | Computational optimal transport (Peyré and Cuturi, 2019), arXiv:1803.00567
    | Revisiting classifier two-sample tests (Lopez-Paz and Oquab, 2017), arXiv:1610.06545
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.evaluate.finite import refuse_not_finite

SUMS_TO_ONE = 1e-5  # what a float32 softmax of many classes keeps
LARGE = 20_000  # entries of a plan from which POT's network simplex pays for its import


def total_variation(p: Any, q: Any, log: bool = False) -> float:
    """The largest difference in the probability of an event, ½ Σ |p − q|, in [0, 1].

    Args:
        p: probabilities of any shape that sum to one, or with `log` their logarithms, as `on_grid` gives them.
        q: the others, of the same shape.
        log: p and q are logarithms.
    """
    log_p, log_q = _pair(p, q, log, "total_variation")
    return float(0.5 * np.abs(np.exp(log_p) - np.exp(log_q)).sum())


def kl(p: Any, q: Any, log: bool = False) -> float:
    """KL(p ‖ q) = Σ p log(p / q) in nats; infinite where q is zero and p is not. Arguments as of `total_variation`."""
    return _kl(*_pair(p, q, log, "kl"))


def js(p: Any, q: Any, log: bool = False) -> float:
    """The Jensen–Shannon divergence in nats, from 0 to log 2; its root is a metric. Arguments as of `total_variation`."""
    log_p, log_q = _pair(p, q, log, "js")
    log_m = np.logaddexp(log_p, log_q) - np.log(2)
    return 0.5 * _kl(log_p, log_m) + 0.5 * _kl(log_q, log_m)


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    there = log_p > -np.inf  # 0 log 0 = 0
    return max(float(np.sum(np.exp(log_p[there]) * (log_p[there] - log_q[there]))), 0.0)  # below zero by rounding alone


def _pair(p: Any, q: Any, log: bool, caller: str) -> list[np.ndarray]:
    """The logarithms of both, refused unless each sums to one, and then made to sum to one exactly."""
    if np.shape(p) != np.shape(q):
        raise ProbgenError(
            f"{caller} compares probabilities of the same outcomes, and p has shape {np.shape(p)}, q {np.shape(q)}"
        )
    return [_log_probabilities(values, log, f"{caller}: {name}") for name, values in (("p", p), ("q", q))]


def _log_probabilities(values: Any, log: bool, name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not log and (values < 0).any():
        raise ProbgenError(
            f"{name} is no distribution: its smallest value is {values.min():.6g} (with log=True, logarithms)"
        )
    with np.errstate(divide="ignore"):
        logarithms = values if log else np.log(values)
    total = np.exp(logarithms).sum()
    if not abs(total - 1) <= SUMS_TO_ONE:  # false for NaN
        cure = "give their logarithms less log Σ" if log else "divide counts by their sum"
        raise ProbgenError(f"{name} is no distribution: its probabilities sum to {total:.6g}, not 1 ({cure})")
    return logarithms - np.log(total)


def on_grid(
    log_p: Callable[[np.ndarray], Any],
    bounds: Sequence[tuple[float, float]],
    points: int = 500,
    tol: float = 1e-4,
) -> np.ndarray:
    """The log probabilities of the cells of a box, from a log density in one or two dimensions: for `kl(..., log=True)`.

    A cell has the density at its middle times its volume. The midpoint sum over the box must be one within `tol`, which mass
    outside the box, or structure finer than a cell, would break; the rest is then shared out. For smooth densities that
    vanish at the edges the divergences are exact to rounding once a cell is narrower than the narrowest standard deviation,
    but for TV, whose kinks where p = q cost O(width²) of a cell; a jump inside a cell costs O(width).

    Args:
        log_p: of points [N, D], gives [N], in nats.
        bounds: (low, high) for each dimension.
        points: cells along each dimension.
        tol: how far from one the sum over the box may be.

    Returns:
        Log probabilities, of shape [points] or [points, points].

    Raises:
        ProbgenError: the sum is off by more than `tol`, or the box has more than two dimensions.
    """
    if len(bounds) not in (1, 2) or not all(low < high for low, high in bounds):
        raise ProbgenError(f"on_grid takes bounds [(low, high)] for one or two dimensions, and these are {bounds!r}")
    widths = [(high - low) / points for low, high in bounds]
    ticks = [low + width * (np.arange(points) + 0.5) for (low, _), width in zip(bounds, widths, strict=True)]
    middles = np.stack(np.meshgrid(*ticks, indexing="ij"), axis=-1).reshape(-1, len(bounds))
    cells = np.asarray(log_p(middles), np.float64).reshape(-1)
    if cells.size != len(middles):
        raise ProbgenError(f"log_p gives {cells.size} values for {len(middles)} points [N, {len(bounds)}], not [N]")
    cells = cells + np.log(widths).sum()
    mass = np.exp(cells).sum()
    if not abs(mass - 1) <= tol:
        raise ProbgenError(
            f"the density sums to {mass:.6g} over the box {bounds!r} with {points} points a side, not to 1 within {tol:g}: "
            "take a wider box or more points"
        )
    return (cells - np.log(mass)).reshape([points] * len(bounds))


def wasserstein1(x: Any, y: Any, weights_x: Any = None, weights_y: Any = None, plan: bool = False) -> Any:
    """W₁ of two weighted sets of points, exact, with the Euclidean distance as cost.

    A linear programme: an assignment where both sets have one size and no weights, sorting in one dimension, else HiGHS, or
    POT's network simplex where it is installed and the plan has more than 20,000 entries. Memory is that of the distances,
    N × M. In D dimensions it exceeds the W₁ of the laws behind the samples by O(N^(−1/D)): compare it with a floor.

    Args:
        x: points [N, D], or [N] on a line.
        y: points [M, D], or [M].
        weights_x: [N], none below zero, summing to one; all alike when left out.
        weights_y: [M], likewise.
        plan: return (cost, plan), with plan [N, M] ≥ 0 whose rows sum to `weights_x` and columns to `weights_y`.

    Raises:
        ProbgenError: points of different dimensions, or weights that are no distribution.
    """
    x, y = _points(x, "x"), _points(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ProbgenError(
            f"wasserstein1 compares points of one space, and x has {x.shape[1]} dimensions, y {y.shape[1]}"
        )
    a, b = _weights(weights_x, len(x), "weights_x"), _weights(weights_y, len(y), "weights_y")
    if x.shape[1] == 1 and not plan:
        from scipy.stats import wasserstein_distance

        return float(wasserstein_distance(x[:, 0], y[:, 0], a, b))
    from scipy.spatial.distance import cdist

    cost = cdist(x, y)
    if weights_x is None and weights_y is None and len(x) == len(y):
        moved = _assignment(cost)
    elif cost.size > LARGE and importlib.util.find_spec("ot"):
        import ot

        moved = ot.emd(a, b, cost, numItermax=10_000_000)
    else:
        moved = _programme(cost, a, b)[0]
    total = float((moved * cost).sum())
    return (total, moved) if plan else total


def _points(values: Any, name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
        raise ProbgenError(
            f"{name} of shape {np.shape(values)} is no set of finite points: give [N, D], or [N] on a line"
        )
    return values


def _weights(values: Any, n: int, name: str) -> np.ndarray:
    if values is None:
        return np.full(n, 1 / n)
    if np.shape(values) != (n,):
        raise ProbgenError(f"{name} has shape {np.shape(values)} for {n} points: one weight a point")
    return np.exp(_log_probabilities(values, False, name))


def _assignment(cost: np.ndarray) -> np.ndarray:
    """The plan [N, N] of equal weights: one of the vertices, which are the permutations / N (Birkhoff)."""
    from scipy.optimize import linear_sum_assignment

    moved = np.zeros_like(cost)
    moved[linear_sum_assignment(cost)] = 1 / len(cost)
    return moved


def _programme(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cheapest plan [N, M], and the dual variables u [N], v [M]: u_i + v_j ≤ cost_ij, equal where mass moves."""
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    n, m = cost.shape
    rows, columns = kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))
    found = linprog(cost.ravel(), A_eq=vstack([rows, columns]), b_eq=np.concatenate([a, b]), method="highs")
    if found.status != 0:
        raise ProbgenError(f"the transport from {n} to {m} points was not found: HiGHS says {found.message}")
    duals = found.eqlin.marginals
    return found.x.reshape(n, m), duals[:n], duals[n:]


def c2st(x: Any, y: Any, seed: int = 0, folds: int = 5) -> tuple[float, float]:
    """How often a classifier tells rows of `x` from rows of `y` that it was not trained on: 0.5 when the two are alike.

    The cross-validated accuracy of a network with 64 ReLU units, on sets cut to one size N; no classifier exceeds
    ½ + ½ TV, and one that sees nothing proves nothing. The error is that of counting 2N answers, √(a (1 − a) / 2N). It leaves
    out that other rows would have trained other networks; of alike sets, (a − ½) / error has a standard deviation near 1.

    Args:
        x: rows [N, ...].
        y: rows [M, ...] of the same shape.
        seed: of the rows kept, the folds and the network.
        folds: parts, each of which is once left out of training.

    Returns:
        The accuracy and its standard error.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    sets = [np.asarray(s, np.float64).reshape(len(s), -1) for s in (x, y)]
    n = min(map(len, sets))
    if sets[0].shape[1] != sets[1].shape[1] or n < 10 * folds:
        shapes = f"{np.shape(x)} and {np.shape(y)}"
        raise ProbgenError(
            f"c2st compares sets of rows of one shape, {10 * folds} rows or more, and these have {shapes}"
        )
    for name, s in zip("xy", sets, strict=True):
        refuse_not_finite(s, name)
    rows = np.concatenate([s[np.random.default_rng(seed).permutation(len(s))[:n]] for s in sets])
    rows = (rows - rows.mean(0)) / np.maximum(rows.std(0), 1e-12)
    options = {"alpha": 1e-2, "learning_rate_init": 1e-2, "early_stopping": True, "n_iter_no_change": 30}
    network = MLPClassifier((64,), random_state=seed, **options)
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    accuracy = float(cross_val_score(network, rows, np.repeat([0, 1], n), cv=parts).mean())
    return accuracy, float(np.sqrt(accuracy * (1 - accuracy) / (2 * n)))
