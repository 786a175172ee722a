"""Conjugate priors in exponential-family form, written once for prior and guide.

    p(θ) = exp(λ₀·u(θ) − A(λ₀)),    q(θ) = exp(λ·u(θ) − A(λ)),    E_q[u] = ∇A(λ)
    KL(q ‖ p) = (λ − λ₀)·E_q[u] − A(λ) + A(λ₀)

`u(θ)` of all global latents is one flat vector; a block knows where its own coordinates lie in it. Densities are up
to a factor h(θ) that prior and guide share. Everything here is small and in NumPy's float64, whatever the backend.

Reference: Bishop, Pattern Recognition and Machine Learning (2006), sections 2.3, 2.4 and 10.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Hyper = dict[str, dict[str, np.ndarray]]  # {site: {argument: array}}
Values = Mapping[str, np.ndarray]  # {site: θ}


class Block(Protocol):
    """Global latents whose prior is one conjugate family; all methods read or fill the flat vectors."""

    def natural(self, hyper: Hyper, out: np.ndarray) -> None:
        """λ of the arguments of the block's sites."""

    def arguments(self, natural: np.ndarray) -> Hyper:
        """The arguments of the block's sites at λ: the reverse of `natural`."""

    def statistics(self, values: Values, out: np.ndarray) -> None:
        """u(θ)."""

    def expectation(self, natural: np.ndarray, out: np.ndarray) -> None:
        """E_q[u] at λ."""

    def log_normaliser(self, natural: np.ndarray) -> float:
        """A(λ)."""


@dataclass(frozen=True)
class Dirichlet:
    """π ~ Dirichlet(α): u = log π, λ = α − 1. `log` is where the coordinates lie, [..., C]."""

    site: str
    log: np.ndarray

    def natural(self, hyper: Hyper, out: np.ndarray) -> None:
        """λ = α − 1."""
        out[self.log] = hyper[self.site]["concentration"] - 1

    def arguments(self, natural: np.ndarray) -> Hyper:
        """α."""
        return {self.site: {"concentration": natural[self.log] + 1}}

    def statistics(self, values: Values, out: np.ndarray) -> None:
        """log π."""
        out[self.log] = np.log(values[self.site])

    def expectation(self, natural: np.ndarray, out: np.ndarray) -> None:
        """ψ(α) − ψ(Σ α)."""
        out[self.log] = _expected_log_simplex(natural[self.log] + 1)

    def log_normaliser(self, natural: np.ndarray) -> float:
        """Σ log Γ(α) − log Γ(Σ α)."""
        return _log_beta(natural[self.log] + 1)


@dataclass(frozen=True)
class Beta:
    """p ~ Beta(a, b): u = (log p, log(1 − p)), λ = (a − 1, b − 1). `log` is [..., 2]."""

    site: str
    log: np.ndarray

    def natural(self, hyper: Hyper, out: np.ndarray) -> None:
        """λ = (a, b) − 1."""
        own = hyper[self.site]
        out[self.log] = np.stack([own["concentration1"], own["concentration0"]], -1) - 1

    def arguments(self, natural: np.ndarray) -> Hyper:
        """a and b."""
        both = natural[self.log] + 1
        return {self.site: {"concentration1": both[..., 0], "concentration0": both[..., 1]}}

    def statistics(self, values: Values, out: np.ndarray) -> None:
        """log p and log(1 − p)."""
        p = values[self.site]
        out[self.log] = np.stack([np.log(p), np.log1p(-p)], -1)

    def expectation(self, natural: np.ndarray, out: np.ndarray) -> None:
        """ψ(a) − ψ(a + b), ψ(b) − ψ(a + b)."""
        out[self.log] = _expected_log_simplex(natural[self.log] + 1)

    def log_normaliser(self, natural: np.ndarray) -> float:
        """log B(a, b)."""
        return _log_beta(natural[self.log] + 1)


@dataclass(frozen=True)
class Means:
    """Normal latents of one site: m and κ, the precision in units of their parent's; where they lie in u.

    `first` holds E[τ μ] (or Λμ, with an axis D more), `second` E[−τ μ²/2] (or −μᵀΛμ/2); `parent` says which
    precision, by its place in the block, each element has.
    """

    site: str
    first: np.ndarray
    second: np.ndarray
    parent: np.ndarray


@dataclass(frozen=True)
class Normal:
    """μ ~ N(m, 1/κ), observed with known precisions: u = (μ, −μ²/2), λ = (κ m, κ)."""

    site: str
    first: np.ndarray
    second: np.ndarray

    def natural(self, hyper: Hyper, out: np.ndarray) -> None:
        """λ = (κ m, κ)."""
        own = hyper[self.site]
        out[self.first], out[self.second] = own["precision"] * own["loc"], own["precision"]

    def arguments(self, natural: np.ndarray) -> Hyper:
        """m and κ."""
        return {self.site: {"loc": natural[self.first] / natural[self.second], "precision": natural[self.second]}}

    def statistics(self, values: Values, out: np.ndarray) -> None:
        """μ and −μ²/2."""
        mu = values[self.site]
        out[self.first], out[self.second] = mu, -(mu**2) / 2

    def expectation(self, natural: np.ndarray, out: np.ndarray) -> None:
        """m and −(m² + 1/κ)/2."""
        own = self.arguments(natural)[self.site]
        out[self.first], out[self.second] = own["loc"], -(own["loc"] ** 2 + 1 / own["precision"]) / 2

    def log_normaliser(self, natural: np.ndarray) -> float:
        """Σ κ m²/2 − log(κ)/2 + log(2π)/2."""
        kappa = natural[self.second]
        return float((natural[self.first] ** 2 / kappa - np.log(kappa) + np.log(2 * np.pi)).sum() / 2)


@dataclass(frozen=True)
class NormalGamma:
    """τ ~ Gamma(a, b) and any number of μ | τ ~ N(m, 1/(κ τ)), each with the τ it names; none: a plain Gamma.

    u = (log τ, −τ, τμ, −τμ²/2),    λ = (a − 1 + n/2, b + Σ κ m²/2, κ m, κ),    n the number of means of τ.
    """

    site: str
    log: np.ndarray
    minus: np.ndarray
    means: tuple[Means, ...] = ()

    def _counts(self) -> np.ndarray:
        """How many means each τ has."""
        return self._pooled([np.ones(mean.parent.shape) for mean in self.means])

    def _pooled(self, terms: list[np.ndarray]) -> np.ndarray:
        """Σ over the means of each τ."""
        total = np.zeros(self.log.size)
        for mean, term in zip(self.means, terms, strict=True):
            np.add.at(total, mean.parent.ravel(), term.ravel())
        return total.reshape(self.log.shape)

    def natural(self, hyper: Hyper, out: np.ndarray) -> None:
        """λ of (a, b), m and κ."""
        own = [hyper[mean.site] for mean in self.means]
        squares = self._pooled([h["precision"] * h["loc"] ** 2 / 2 for h in own])
        out[self.log] = hyper[self.site]["concentration"] - 1 + self._counts() / 2
        out[self.minus] = hyper[self.site]["rate"] + squares
        for mean, h in zip(self.means, own, strict=True):
            out[mean.first], out[mean.second] = h["precision"] * h["loc"], h["precision"]

    def arguments(self, natural: np.ndarray) -> Hyper:
        """(a, b), m and κ."""
        squares = self._pooled([natural[m.first] ** 2 / natural[m.second] / 2 for m in self.means])
        gamma = {
            "concentration": natural[self.log] + 1 - self._counts() / 2,
            "rate": natural[self.minus] - squares,
        }
        return {self.site: gamma} | {
            m.site: {"loc": natural[m.first] / natural[m.second], "precision": natural[m.second]} for m in self.means
        }

    def statistics(self, values: Values, out: np.ndarray) -> None:
        """u(τ, μ)."""
        tau = values[self.site]
        out[self.log], out[self.minus] = np.log(tau), -tau
        for mean in self.means:
            mu, own = values[mean.site], tau.ravel()[mean.parent]
            out[mean.first], out[mean.second] = own * mu, -own * mu**2 / 2

    def expectation(self, natural: np.ndarray, out: np.ndarray) -> None:
        """ψ(a) − log b, −a/b, m a/b, −(m² a/b + 1/κ)/2."""
        from scipy.special import digamma

        hyper = self.arguments(natural)
        a, b = hyper[self.site]["concentration"], hyper[self.site]["rate"]
        out[self.log], out[self.minus] = digamma(a) - np.log(b), -a / b
        for mean in self.means:
            m, kappa, tau = hyper[mean.site]["loc"], hyper[mean.site]["precision"], (a / b).ravel()[mean.parent]
            out[mean.first], out[mean.second] = m * tau, -(m**2 * tau + 1 / kappa) / 2

    def log_normaliser(self, natural: np.ndarray) -> float:
        """Σ log Γ(a) − a log b + Σ (log 2π − log κ)/2."""
        from scipy.special import gammaln

        hyper = self.arguments(natural)
        a, b = hyper[self.site]["concentration"], hyper[self.site]["rate"]
        means = sum(np.log(2 * np.pi / natural[m.second]).sum() / 2 for m in self.means)
        return float((gammaln(a) - a * np.log(b)).sum() + means)


@dataclass(frozen=True)
class NormalWishart:
    """Λ ~ Wishart(ν, R⁻¹) and any number of μ | Λ ~ N(m, (κ Λ)⁻¹), each with the Λ it names.

    u = (log|Λ|, −Λ/2, Λμ, −μᵀΛμ/2),    λ = ((ν − D − 1 + n)/2, R + Σ κ m mᵀ, κ m, κ);  `log` is [J], `minus` [J, D, D].
    The site's value is Λ, or where `cholesky` its factor L, whose Jacobian prior and guide share.
    """

    site: str
    log: np.ndarray
    minus: np.ndarray
    cholesky: bool
    means: tuple[Means, ...] = ()

    @property
    def _dim(self) -> int:
        return self.minus.shape[-1]

    def _counts(self) -> np.ndarray:
        total = np.zeros(self.log.size)
        for mean in self.means:
            np.add.at(total, mean.parent.ravel(), 1.0)
        return total.reshape(self.log.shape)

    def _squares(self, firsts: list[np.ndarray], kappas: list[np.ndarray]) -> np.ndarray:
        """Σ κ m mᵀ over the means of each Λ, from κ m and κ."""
        d = self._dim
        total = np.zeros((self.log.size, d, d))
        for mean, first, kappa in zip(self.means, firsts, kappas, strict=True):
            outer = first[..., :, None] * first[..., None, :] / kappa[..., None, None]
            np.add.at(total, mean.parent.ravel(), outer.reshape(-1, d, d))
        return total.reshape(self.minus.shape)

    def natural(self, hyper: Hyper, out: np.ndarray) -> None:
        """λ of (ν, R), m and κ."""
        own = [hyper[mean.site] for mean in self.means]
        firsts = [h["precision"][..., None] * h["loc"] for h in own]
        nu, rate = hyper[self.site]["concentration"], hyper[self.site]["rate_matrix"]
        out[self.log] = (nu - self._dim - 1 + self._counts()) / 2
        out[self.minus] = rate + self._squares(firsts, [h["precision"] for h in own])
        for mean, h, first in zip(self.means, own, firsts, strict=True):
            out[mean.first], out[mean.second] = first, h["precision"]

    def arguments(self, natural: np.ndarray) -> Hyper:
        """(ν, R), m and κ."""
        squares = self._squares([natural[m.first] for m in self.means], [natural[m.second] for m in self.means])
        rate = natural[self.minus] - squares
        wishart = {
            "concentration": 2 * natural[self.log] + self._dim + 1 - self._counts(),
            "rate_matrix": (rate + np.swapaxes(rate, -1, -2)) / 2,
        }
        return {self.site: wishart} | {
            m.site: {"loc": natural[m.first] / natural[m.second][..., None], "precision": natural[m.second]}
            for m in self.means
        }

    def precision(self, value: np.ndarray) -> np.ndarray:
        """Λ of the site's value."""
        return value @ np.swapaxes(value, -1, -2) if self.cholesky else value

    def statistics(self, values: Values, out: np.ndarray) -> None:
        """u(Λ, μ)."""
        precision = self.precision(values[self.site])
        out[self.log], out[self.minus] = np.linalg.slogdet(precision)[1], -precision / 2
        flat = precision.reshape(-1, self._dim, self._dim)
        for mean in self.means:
            mu = values[mean.site]
            first = (flat[mean.parent] @ mu[..., None])[..., 0]
            out[mean.first], out[mean.second] = first, -(first * mu).sum(-1) / 2

    def expectation(self, natural: np.ndarray, out: np.ndarray) -> None:
        """ψ_D(ν/2) + D log 2 − log|R|, −νR⁻¹/2, νR⁻¹m, −(ν mᵀR⁻¹m + D/κ)/2."""
        from scipy.special import digamma

        hyper, d = self.arguments(natural), self._dim
        nu, rate = hyper[self.site]["concentration"], hyper[self.site]["rate_matrix"]
        precision = nu[..., None, None] * np.linalg.inv(rate)
        out[self.log] = digamma((nu[..., None] - np.arange(d)) / 2).sum(-1) + d * np.log(2) - np.linalg.slogdet(rate)[1]
        out[self.minus] = -precision / 2
        flat = precision.reshape(-1, d, d)
        for mean in self.means:
            m, kappa = hyper[mean.site]["loc"], hyper[mean.site]["precision"]
            first = (flat[mean.parent] @ m[..., None])[..., 0]
            out[mean.first], out[mean.second] = first, -((first * m).sum(-1) + d / kappa) / 2

    def log_normaliser(self, natural: np.ndarray) -> float:
        """Σ (νD log 2 − ν log|R|)/2 + log Γ_D(ν/2) + Σ D (log 2π − log κ)/2."""
        from scipy.special import gammaln

        hyper, d = self.arguments(natural), self._dim
        nu, rate = hyper[self.site]["concentration"], hyper[self.site]["rate_matrix"]
        log_gamma = gammaln((nu[..., None] - np.arange(d)) / 2).sum(-1) + d * (d - 1) / 4 * np.log(np.pi)
        wishart = nu * (d * np.log(2) - np.linalg.slogdet(rate)[1]) / 2 + log_gamma
        means = sum(d * np.log(2 * np.pi / natural[m.second]).sum() / 2 for m in self.means)
        return float(wishart.sum() + means)


@dataclass(frozen=True)
class Prior:
    """All global latents: their blocks, and λ₀ of the program's prior, [M]."""

    blocks: tuple[Block, ...]
    natural: np.ndarray

    def of(self, hyper: Hyper) -> np.ndarray:
        """λ of the arguments of every site."""
        out = np.empty_like(self.natural)
        for block in self.blocks:
            block.natural(hyper, out)
        return out

    def arguments(self, natural: np.ndarray) -> Hyper:
        """The arguments of every site at λ."""
        return {site: own for block in self.blocks for site, own in block.arguments(natural).items()}

    def statistics(self, values: Values) -> np.ndarray:
        """u(θ)."""
        out = np.empty_like(self.natural)
        for block in self.blocks:
            block.statistics(values, out)
        return out

    def expectation(self, natural: np.ndarray) -> np.ndarray:
        """E_q[u] at λ."""
        out = np.empty_like(self.natural)
        for block in self.blocks:
            block.expectation(natural, out)
        return out

    def log_normaliser(self, natural: np.ndarray) -> float:
        """A(λ)."""
        return sum(block.log_normaliser(natural) for block in self.blocks)

    def kl(self, natural: np.ndarray) -> float:
        """KL(q ‖ p) in nats, at λ."""
        gap = float((natural - self.natural) @ self.expectation(natural))
        return gap - self.log_normaliser(natural) + self.log_normaliser(self.natural)


def _expected_log_simplex(alpha: np.ndarray) -> np.ndarray:
    from scipy.special import digamma

    return digamma(alpha) - digamma(alpha.sum(-1, keepdims=True))


def _log_beta(alpha: np.ndarray) -> float:
    from scipy.special import gammaln

    return float((gammaln(alpha).sum(-1) - gammaln(alpha.sum(-1))).sum())
