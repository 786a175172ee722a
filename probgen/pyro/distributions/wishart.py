"""The Cholesky factor of a Wishart matrix: the conjugate prior of a Gaussian's precision, without inverting it."""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

import probgen.pyro.distributions.lower_cholesky  # noqa: F401  (its support can be mapped to the real line)
from probgen.errors import ProbgenError


class WishartCholesky(TorchDistribution):
    r"""P with P Pᵀ ~ Wishart(ν, V), V = S Sᵀ: lower triangular [D, D], E[P Pᵀ] = ν V.

    By Bartlett P = S A, with A lower triangular, A_ii² ~ χ²(ν − i) for i = 0..D−1, A_ij ~ N(0, 1) below the diagonal,
    so that draws are differentiable in ν and S.

        log p(P) = (ν − D − 1) Σ log P_ii − ‖S⁻¹ P‖² / 2 − ν D log 2 / 2 − log Γ_D(ν / 2) − ν log |S|
                   + D log 2 + Σ_i (D − i) log P_ii,   the last two terms being log |∂ P Pᵀ / ∂ P|

    Parameters
    ----------
    concentration
        ν > D − 1, the degrees of freedom.
    scale_tril
        S [..., D, D], lower triangular.

    Reference: Bartlett, Proc. R. Soc. Edinburgh 53 (1933) 260; NumPyro's `WishartCholesky`.
    """

    arg_constraints = {"concentration": constraints.positive, "scale_tril": constraints.lower_cholesky}  # noqa: RUF012
    support = constraints.lower_cholesky
    has_rsample = True

    def __init__(self, concentration: Tensor | float, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        if scale_tril.dim() < 2 or scale_tril.shape[-1] != scale_tril.shape[-2]:
            raise ProbgenError(
                f"WishartCholesky: scale_tril must be square, [..., D, D], not of shape {tuple(scale_tril.shape)}"
            )
        concentration = torch.as_tensor(concentration, dtype=scale_tril.dtype, device=scale_tril.device)
        batch_shape = torch.broadcast_shapes(concentration.shape, scale_tril.shape[:-2])
        self.concentration = concentration.expand(batch_shape)
        self.scale_tril = scale_tril.expand(*batch_shape, -1, -1)
        super().__init__(batch_shape, scale_tril.shape[-2:], validate_args=validate_args)
        D = self.event_shape[-1]
        if self._validate_args and not bool((self.concentration > D - 1).all()):
            raise ProbgenError(
                f"WishartCholesky: concentration must be more than D - 1 = {D - 1} for matrices of {D} rows, not "
                f"{float(self.concentration.min()):.4g}"
            )

    def expand(self, batch_shape: tuple[int, ...], _instance: WishartCholesky | None = None) -> WishartCholesky:
        """The same distribution for a larger batch."""
        new = self._get_checked_instance(WishartCholesky, _instance)
        new.concentration = self.concentration.expand(batch_shape)
        new.scale_tril = self.scale_tril.expand(*batch_shape, -1, -1)
        super(WishartCholesky, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def _freedom(self) -> Tensor:
        """ν − i for i = 0..D−1: [..., D]."""
        D = self.event_shape[-1]
        return self.concentration.unsqueeze(-1) - torch.arange(D, device=self.scale_tril.device)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """S A by Bartlett's decomposition."""
        shape = self._extended_shape(sample_shape)
        below = torch.randn(shape, dtype=self.scale_tril.dtype, device=self.scale_tril.device).tril(-1)
        chi = (2 * torch._standard_gamma((self._freedom / 2).expand(shape[:-1]))).sqrt()
        return self.scale_tril @ (below + chi.diag_embed())

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of P, per matrix."""
        if self._validate_args:
            self._validate_sample(value)
        D, nu = self.event_shape[-1], self.concentration
        scaled = torch.linalg.solve_triangular(self.scale_tril, value, upper=False)
        log_diagonal = value.diagonal(dim1=-2, dim2=-1).log()
        return (
            (log_diagonal * (self._freedom - 1)).sum(-1)
            - scaled.square().sum((-1, -2)) / 2
            + D * (1 - nu / 2) * math.log(2)
            - torch.lgamma(self._freedom / 2).sum(-1)
            - D * (D - 1) / 4 * math.log(math.pi)
            - nu * self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        )

    @property
    def mean(self) -> Tensor:
        """E[P] = S diag(E[χ_{ν−i}])."""
        k = self._freedom
        chi = math.sqrt(2) * (torch.lgamma((k + 1) / 2) - torch.lgamma(k / 2)).exp()
        return self.scale_tril * chi.unsqueeze(-2)

    @property
    def variance(self) -> Tensor:
        """Var[P], element by element."""
        squares = torch.ones_like(self.scale_tril).tril(-1) + self._freedom.diag_embed()
        return self.scale_tril.square() @ squares - self.mean.square()
