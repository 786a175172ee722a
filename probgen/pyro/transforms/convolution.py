"""A linear map of the channels that can always be inverted: the 1×1 convolution of Glow."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from probgen.flow_shapes import Shape
from probgen.pyro.transforms.bijection import Bijection


class InvertibleConv1x1(Bijection):
    """y = W x over the C channels of every position, W kept in its LU factors  (Kingma & Dhariwal, arXiv:1807.03039).

        W = P L D U Q,   log |det ∂y/∂x| = positions · Σ_c log |D_cc|

    P, Q and the signs of D are fixed. L and U are unit triangular with entries in (−1, 1), and |log |D_cc|| < bound:
    pivoting brings every invertible matrix to this form, and none that training can reach is singular. W starts as a
    random rotation. One W, [C, C], serves all positions; the way back is two triangular solves.

    Parameters
    ----------
    shape
        Of an event; its first axis are the channels.
    bound
        Of the logarithms of the pivots.
    """

    def __init__(self, shape: Shape, bound: float = 3.0) -> None:
        super().__init__(shape)
        self.bound = bound
        rotation = torch.linalg.qr(torch.randn(shape[0], shape[0], dtype=torch.float64))[0]
        lower, pivots, upper, rows, columns = pivoted(rotation.numpy())
        inner = np.arctanh(np.clip(np.tril(lower, -1) + np.triu(upper, 1), -0.99, 0.99))
        diagonal = bound * np.arctanh(np.clip(np.log(np.abs(pivots)) / bound, -0.99, 0.99))
        floats = torch.get_default_dtype()
        self.raw = nn.Parameter(torch.from_numpy(inner + np.diag(diagonal)).to(floats))
        self.register_buffer("signs", torch.from_numpy(np.sign(pivots)).to(floats))
        self.register_buffer("rows", torch.from_numpy(np.argsort(rows)))
        self.register_buffer("columns", torch.from_numpy(np.argsort(columns)))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """L, log |D| and U."""
        inner, eye = self.raw.tanh(), torch.eye(len(self.raw), dtype=self.raw.dtype, device=self.raw.device)
        return inner.tril(-1) + eye, self.bound * (self.raw.diagonal() / self.bound).tanh(), inner.triu(1) + eye

    def weight(self) -> Tensor:
        """W [C, C]."""
        lower, log_pivots, upper = self.factors()
        return ((lower * (self.signs * log_pivots.exp())) @ upper)[self.rows][:, self.columns]

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W x."""
        weight = self.weight()
        if len(self.shape) == 1:
            return x @ weight.T, self._ladj(x)
        positions = x.flatten(x.dim() - len(self.shape) + 1)
        return (weight @ positions).reshape(x.shape), self._ladj(x)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """W⁻¹ y, by substitution."""
        lower, log_pivots, upper = self.factors()
        each = y.movedim(y.dim() - len(self.shape), 0)  # all positions as columns of one matrix: [C, *]
        columns = each.flatten(1) if each.dim() > 1 else each.unsqueeze(1)
        columns = columns[torch.argsort(self.rows)]
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        columns = columns * (self.signs * (-log_pivots).exp()).unsqueeze(1)
        columns = torch.linalg.solve_triangular(upper, columns, upper=True, unitriangular=True)
        x = columns[self.columns].reshape(each.shape).movedim(0, y.dim() - len(self.shape))
        return x, -self._ladj(y)

    def _ladj(self, x: Tensor) -> Tensor:
        """Every position counts Σ log |D|."""
        first = x.dim() - len(self.shape)
        return (self.factors()[1].sum() * x.shape[first + 1 :].numel()).expand(x.shape[:first])


def pivoted(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """L, D, U and permutations with A[rows][:, columns] = L D U, where no entry of L or U is above 1 in size.

    Gaussian elimination with complete pivoting: the largest entry that is left becomes the next pivot.
    """
    a, n = matrix.astype(np.float64).copy(), len(matrix)
    rows, columns = np.arange(n), np.arange(n)
    for k in range(n):
        i, j = np.unravel_index(np.abs(a[k:, k:]).argmax(), (n - k, n - k))
        for order, at, axis in ((rows, k + i, 0), (columns, k + j, 1)):
            swap = np.arange(n)
            swap[[k, at]] = at, k
            order[:] = order[swap]
            a = a.take(swap, axis)
        a[k + 1 :, k] /= a[k, k]
        a[k + 1 :, k + 1 :] -= np.outer(a[k + 1 :, k], a[k, k + 1 :])
    pivots = np.diagonal(a).copy()
    return np.tril(a, -1) + np.eye(n), pivots, np.triu(a / pivots[:, None], 1) + np.eye(n), rows, columns
