"""Exponential families on plain array operators: what EM needs of a distribution, written once for both backends.

    log p(x | θ) = Σ_m η_m(θ) f_m(x) − A(θ) + log h(x)

so that the densities of N data in S states are one matrix product, and Σ_n r_ns f(x_n) is all that a maximum of the
likelihood needs of the data.

Shapes: S states, E independent elements of a datum (pixels, columns, inner plates), N rows. Values are [*event, E, N],
arguments [S, E, *event], features [M, E, N], natural parameters [S, M, E] with a constant [S, E], statistics
[S, M, E] with the counts n [S]. `ops` are a backend's operators (`ops.xp` is torch or jax.numpy). Values of a location
family come centred: `centre`, [E, *event], is subtracted from them, for float32 cancels in x².
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np


class Normal:
    """f = (x², x), η = (−1/2σ², μ/σ²); closed form: μ the mean, σ² the second moment about it."""

    reads, closed, located, event_dim = ("loc", "scale"), ("loc", "scale"), True, 0
    ranks: ClassVar[dict[str, int]] = {}  # axes of an argument that are one event

    def values(self, x: np.ndarray) -> np.ndarray:
        """The scale on which the family is a Normal."""
        return x

    def base(self, x: np.ndarray, args: dict[str, np.ndarray]) -> float:
        """Σ log h(x)."""
        return -0.5 * math.log(2 * math.pi) * x.size

    def features(self, ops: Any, x: Any, args: dict[str, Any]) -> Any:
        """(x², x)."""
        return ops.xp.stack([x * x, x])

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """(−1/2σ², μ/σ²) and the constant."""
        loc, precision = args["loc"] - centre, args["scale"] ** -2
        constant = -0.5 * loc**2 * precision - ops.xp.log(args["scale"])
        return ops.xp.stack([-0.5 * precision, loc * precision], 1), constant

    def precision(self, ops: Any, args: dict[str, Any]) -> Any:
        """One over the variance of each column, [S, E]."""
        return args["scale"] ** -2

    def moment(self, ops: Any, target: str, stats: Any, n: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """Numerator and denominator [S, E] of the mean, or of the variance about `args["loc"]`."""
        second, first = stats[:, 0], stats[:, 1]
        if target == "loc":
            return first + n * centre, n
        loc = args["loc"] - centre
        return second - 2 * loc * first + loc**2 * n, n

    def value(self, ops: Any, target: str, ratio: Any) -> Any:
        """The argument from its moment."""
        return ratio if target == "loc" else ops.xp.sqrt(ratio)

    def bounds(self, target: str, spread: np.ndarray, floor: float, eps: float) -> tuple[Any, Any]:
        """Between which the moment is kept: a variance above `floor` of the data's."""
        return (None, None) if target == "loc" else (floor * spread, None)


class LogNormal(Normal):
    """A Normal of log x."""

    def values(self, x: np.ndarray) -> np.ndarray:
        """log x."""
        return np.log(x)

    def base(self, x: np.ndarray, args: dict[str, np.ndarray]) -> float:
        """The Normal's, and the Jacobian −log x."""
        return super().base(x, args) - float(np.log(x, dtype=np.float64).sum())


class MultivariateNormal:
    """f = (x_i x_j for i ≤ j, x), η = (−½Λ, Λμ); closed form: mean and covariance, however it is parametrised."""

    reads, located, event_dim = ("loc", "scale_tril"), True, 1
    closed = ("loc", "scale_tril", "covariance_matrix", "precision_matrix")
    ranks: ClassVar[dict[str, int]] = {"loc": 1, "scale_tril": 2, "covariance_matrix": 2, "precision_matrix": 2}

    def values(self, x: np.ndarray) -> np.ndarray:
        """As they are."""
        return x

    def base(self, x: np.ndarray, args: dict[str, np.ndarray]) -> float:
        """Σ log h(x)."""
        return -0.5 * math.log(2 * math.pi) * x.size

    def features(self, ops: Any, x: Any, args: dict[str, Any]) -> Any:
        """The upper half of x xᵀ, and x."""
        rows, columns = np.triu_indices(x.shape[0])
        return ops.xp.concatenate([x[rows] * x[columns], x])

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """(−½Λ folded onto its upper half, Λμ) and the constant."""
        xp, loc, factor = ops.xp, args["loc"] - centre, args["scale_tril"]
        rows, columns = np.triu_indices(loc.shape[-1])
        inverse = ops.inverse_tril(factor)
        precision = xp.einsum("seki,sekj->seij", inverse, inverse)
        linear = xp.einsum("seij,sej->sei", precision, loc)
        folded = precision[..., rows, columns] * ops.array(np.where(rows == columns, -0.5, -1.0))
        constant = -0.5 * (loc * linear).sum(-1) - xp.log(ops.diagonal(factor)).sum(-1)
        return xp.swapaxes(xp.concatenate([folded, linear], -1), 1, 2), constant

    def precision(self, ops: Any, args: dict[str, Any]) -> Any:
        """The precision's diagonal, [S, E, D]."""
        return (ops.inverse_tril(args["scale_tril"]) ** 2).sum(-2)

    def moment(self, ops: Any, target: str, stats: Any, n: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """Numerator and denominator of the mean [S, E, D], or of the covariance about `args["loc"]` [S, E, D, D]."""
        xp, size = ops.xp, centre.shape[-1]
        first = xp.swapaxes(stats[:, -size:], 1, 2)
        n = n[..., None]
        if target == "loc":
            return first + n * centre, n
        place = np.zeros((size, size), int)
        place[np.triu_indices(size)] = np.arange(size * (size + 1) // 2)
        place = np.maximum(place, place.T)
        second = xp.swapaxes(stats, 1, 2)[..., place]
        loc = args["loc"] - centre
        crossed = loc[..., :, None] * first[..., None, :]
        crossed = crossed + xp.swapaxes(crossed, -1, -2)
        outer = loc[..., :, None] * loc[..., None, :]
        return second - crossed + n[..., None] * outer, n[..., None]

    def value(self, ops: Any, target: str, ratio: Any) -> Any:
        """The mean, or the diagonal of a scale argument from variances."""
        if target == "scale_tril":
            return ops.xp.sqrt(ratio)
        return 1 / ratio if target == "precision_matrix" else ratio

    def matrix(self, ops: Any, target: str, covariance: Any) -> Any:
        """A scale argument from covariances [G, D, D]."""
        if target == "covariance_matrix":
            return covariance
        factor = ops.cholesky(covariance)
        if target == "scale_tril":
            return factor
        inverse = ops.inverse_tril(factor)
        return ops.xp.swapaxes(inverse, -1, -2) @ inverse

    def bounds(self, target: str, spread: np.ndarray, floor: float, eps: float) -> tuple[Any, Any]:
        """Between which variances are kept."""
        return (None, None) if target == "loc" else (floor * spread[..., None] * np.eye(spread.shape[-1]), None)


class _Mean:
    """One statistic, the value itself; the closed form is a function of its mean."""

    located, event_dim, closed = False, 0, ()
    ranks: ClassVar[dict[str, int]] = {}
    values = Normal.values

    def features(self, ops: Any, x: Any, args: dict[str, Any]) -> Any:
        """(x,)."""
        return x[None]

    def moment(self, ops: Any, target: str, stats: Any, n: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """Σ r x and Σ r."""
        return stats[:, 0], n

    def base(self, x: np.ndarray, args: dict[str, np.ndarray]) -> float:
        """Σ log h(x)."""
        return 0.0


class Bernoulli(_Mean):
    """η = logit p."""

    reads, closed = ("logits",), ("probs", "logits")

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """logit p and log (1 − p)."""
        return args["logits"][:, None], -ops.softplus(args["logits"])

    def value(self, ops: Any, target: str, ratio: Any) -> Any:
        """p, or its logit."""
        return ratio if target == "probs" else ops.xp.log(ratio) - ops.xp.log(1 - ratio)

    def bounds(self, target: str, spread: np.ndarray, floor: float, eps: float) -> tuple[Any, Any]:
        """Off zero and one, where logits are infinite."""
        return eps, 1 - eps


class Binomial(Bernoulli):
    """η = logit p, of a number of trials that is the same in all states."""

    reads = ("total_count", "logits")

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """logit p and n log (1 − p)."""
        return args["logits"][:, None], -args["total_count"] * ops.softplus(args["logits"])

    def moment(self, ops: Any, target: str, stats: Any, n: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """Successes and trials."""
        return stats[:, 0], n * args["total_count"]

    def base(self, x: np.ndarray, args: dict[str, np.ndarray]) -> float:
        """Σ log of the binomial coefficients; NaN where the number of trials differs between states."""
        from scipy.special import gammaln

        trials = np.asarray(args["total_count"], np.float64)
        if (trials != trials[:1]).any():
            return float("nan")
        trials, x = trials[0, :, None], np.asarray(x, np.float64)
        return float((gammaln(trials + 1) - gammaln(x + 1) - gammaln(trials - x + 1)).sum())


class Poisson(_Mean):
    """η = log λ."""

    reads, closed = ("rate",), ("rate",)

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """log λ and −λ."""
        return ops.xp.log(args["rate"])[:, None], -args["rate"]

    def base(self, x: np.ndarray, args: dict[str, np.ndarray]) -> float:
        """−Σ log x!."""
        from scipy.special import gammaln

        return -float(gammaln(np.asarray(x, np.float64) + 1).sum())

    def value(self, ops: Any, target: str, ratio: Any) -> Any:
        """λ."""
        return ratio

    def bounds(self, target: str, spread: np.ndarray, floor: float, eps: float) -> tuple[Any, Any]:
        """Off zero."""
        return eps, None


class Exponential(_Mean):
    """η = −λ."""

    reads, closed = ("rate",), ("rate",)

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """−λ and log λ."""
        return -args["rate"][:, None], ops.xp.log(args["rate"])

    def value(self, ops: Any, target: str, ratio: Any) -> Any:
        """One over the mean."""
        return 1 / ratio

    def bounds(self, target: str, spread: np.ndarray, floor: float, eps: float) -> tuple[Any, Any]:
        """A mean off zero, as far as a variance of `floor` of the data's."""
        return floor**0.5 * spread**0.5 + eps**2, None


class Geometric(_Mean):
    """Failures before the first success: η = log (1 − p)."""

    reads, closed = ("logits",), ("probs", "logits")

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """log (1 − p) and log p."""
        return -ops.softplus(args["logits"])[:, None], -ops.softplus(-args["logits"])

    def value(self, ops: Any, target: str, ratio: Any) -> Any:
        """p = 1 / (1 + mean), or its logit."""
        return 1 / (1 + ratio) if target == "probs" else -ops.xp.log(ratio)

    def bounds(self, target: str, spread: np.ndarray, floor: float, eps: float) -> tuple[Any, Any]:
        """Off zero."""
        return eps, None


class Gamma(_Mean):
    """f = (log x, x), η = (α − 1, −β): its maximum has no closed form."""

    reads = ("concentration", "rate")

    def features(self, ops: Any, x: Any, args: dict[str, Any]) -> Any:
        """(log x, x)."""
        return ops.xp.stack([ops.xp.log(x), x])

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """(α − 1, −β) and α log β − log Γ(α)."""
        alpha, beta = args["concentration"], args["rate"]
        return ops.xp.stack([alpha - 1, -beta], 1), alpha * ops.xp.log(beta) - ops.gammaln(alpha)


class Beta(_Mean):
    """f = (log x, log (1 − x)), η = (α − 1, β − 1): its maximum has no closed form."""

    reads = ("concentration1", "concentration0")

    def features(self, ops: Any, x: Any, args: dict[str, Any]) -> Any:
        """(log x, log (1 − x))."""
        return ops.xp.stack([ops.xp.log(x), ops.xp.log1p(-x)])

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """(α − 1, β − 1) and −log B(α, β)."""
        a, b = args["concentration1"], args["concentration0"]
        return ops.xp.stack([a - 1, b - 1], 1), ops.gammaln(a + b) - ops.gammaln(a) - ops.gammaln(b)


class Categorical:
    """f = the indicator of each value, η = log p; closed form: the shares."""

    reads, closed, located, event_dim = ("logits",), ("probs",), False, 0
    ranks: ClassVar[dict[str, int]] = {"logits": 1, "probs": 1}
    values = Normal.values
    base = _Mean.base

    def features(self, ops: Any, x: Any, args: dict[str, Any]) -> Any:
        """Indicators [C, E, N]."""
        return ops.floats(x[None] == ops.xp.arange(args["logits"].shape[-1])[:, None, None])

    def natural(self, ops: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """log p, normalised."""
        logits = args["logits"]
        return ops.xp.swapaxes(ops.log_softmax(logits), 1, 2), 0 * logits[..., 0]

    def moment(self, ops: Any, target: str, stats: Any, n: Any, args: dict[str, Any], centre: Any) -> tuple[Any, Any]:
        """Counts of each value [S, E, C], and of all."""
        counts = ops.xp.swapaxes(stats, 1, 2)
        return counts, n[..., None]

    def value(self, ops: Any, target: str, ratio: Any) -> Any:
        """The shares."""
        return ratio

    def bounds(self, target: str, spread: np.ndarray, floor: float, eps: float) -> tuple[Any, Any]:
        """Off zero, where a leaf would be infinite."""
        return eps, None


class OneHotCategorical(Categorical):
    """A Categorical whose values are the indicators themselves."""

    event_dim = 1

    def features(self, ops: Any, x: Any, args: dict[str, Any]) -> Any:
        """x [C, E, N]."""
        return x


FAMILIES: dict[str, Any] = {
    kind.__name__: kind()
    for kind in (
        Normal, LogNormal, MultivariateNormal, Bernoulli, Binomial, Poisson, Exponential, Geometric, Gamma, Beta,
        Categorical, OneHotCategorical,
    )
}  # fmt: skip


def family_of(distribution: str) -> Any:
    """The family of a distribution's class name, in either PPL's spelling, or None."""
    return FAMILIES.get(distribution.removesuffix("Logits").removesuffix("Probs"))
