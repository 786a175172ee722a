"""Vectors ↔ lower Cholesky factors, one to one: what HMC and autoguides need of a site on such factors.

PyTorch has `transform_to(constraints.lower_cholesky)`, which ignores half of its input, and no `biject_to`.
Importing this module registers one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints


class VectorToLowerCholesky(Transform):
    r"""x [..., D (D + 1) / 2] → L [..., D, D], lower triangular: log L_ii are the last D entries of x.

    The entries below the diagonal are the first ones of x, row by row, as in NumPyro. log |det ∂L/∂x| = Σ_i log L_ii.
    """

    domain = constraints.independent(constraints.real, 1)
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorToLowerCholesky)

    def __hash__(self) -> int:
        return hash(type(self))

    def _call(self, x: Tensor) -> Tensor:
        D = _side(x.shape[-1])
        rows, columns = torch.tril_indices(D, D, -1, device=x.device)
        place = torch.zeros(D, D, dtype=torch.long, device=x.device)
        place[rows, columns] = torch.arange(len(rows), device=x.device)
        return x[..., place].tril(-1) + x[..., len(rows) :].exp().diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], -1, device=y.device)
        return torch.cat([y[..., rows, columns], y.diagonal(dim1=-2, dim2=-1).log()], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ_i log L_ii."""
        return x[..., -y.shape[-1] :].sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """[..., D (D + 1) / 2] → [..., D, D]."""
        return torch.Size((*shape[:-1], _side(shape[-1]), _side(shape[-1])))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """[..., D, D] → [..., D (D + 1) / 2]."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def _side(length: int) -> int:
    """D of D (D + 1) / 2."""
    return (math.isqrt(8 * length + 1) - 1) // 2


@biject_to.register(constraints.lower_cholesky)
def _vector_to_lower_cholesky(constraint: constraints.Constraint) -> Transform:
    return VectorToLowerCholesky()
