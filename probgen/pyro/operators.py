"""The operators of EM in torch: what `probgen.em.exponential`, `expectation` and `maximisation` are written with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probgen.pyro.trace import tensors


class Operators:
    """What EM computes with, in one precision: torch, and what it spells in its own way."""

    xp = torch

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.eps, self.tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny * 1e6

    def array(self, value: Any) -> Tensor:
        """Numbers in this precision, on the device."""
        return torch.as_tensor(np.asarray(value), device=self.device).to(self.dtype)

    def raw(self, value: np.ndarray) -> Tensor:
        """An array as the program takes it."""
        return tensors({"": value}, torch.get_default_dtype(), self.device)[""]

    def mask(self, value: np.ndarray) -> Tensor:
        """Truth values on the device."""
        return torch.as_tensor(value, device=self.device)

    def cast(self, value: Tensor) -> Tensor:
        """The same in this precision."""
        return value.to(self.dtype)

    floats = cast

    def scatter(self, values: Tensor, index: np.ndarray, size: int) -> Tensor:
        """Sums of the values of each index, [size, ...]."""
        out = torch.zeros(size, *values.shape[1:], dtype=values.dtype, device=values.device)
        return out.index_add(0, torch.as_tensor(index, device=values.device), values)

    def put(self, vector: Tensor, index: np.ndarray, values: Tensor) -> Tensor:
        """The vector with values at an index."""
        return vector.index_put((torch.as_tensor(index, device=vector.device),), values)

    def tiled(self, array: Tensor, times: int) -> Tensor:
        """The rows, several times over."""
        return array.repeat(times, *[1] * (array.dim() - 1))

    def inverse_tril(self, factor: Tensor) -> Tensor:
        """Inverses of lower triangular matrices."""
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)

    def cholesky(self, matrix: Tensor) -> Tensor:
        """Lower factors; NaN where there is none."""
        factor, info = torch.linalg.cholesky_ex(matrix)
        return torch.where(info[..., None, None] > 0, torch.nan, factor)

    def clipped(self, matrix: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Matrices [G, D, D] with their eigenvalues at least `floor`, and which had smaller ones."""
        eye = floor * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        low = torch.linalg.cholesky_ex(matrix - eye).info > 0
        if not floor or not bool(low.any()):
            return matrix, low & bool(floor)
        values, vectors = torch.linalg.eigh(matrix[low])
        matrix = matrix.clone()
        matrix[low] = (vectors * values.clamp_min(floor)[:, None, :]) @ vectors.mT
        return matrix, low

    def diagonal(self, matrix: Tensor) -> Tensor:
        """Diagonals."""
        return matrix.diagonal(dim1=-2, dim2=-1)

    def stored(self, features: Tensor) -> Tensor:
        """Features [C, M, c] in the order in which they are multiplied fastest."""
        return features

    read = stored

    def product(self, weights: Tensor, features: Tensor) -> Tensor:
        """[S, M] times [M, c]."""
        return weights @ features

    def softmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logsumexp over the first axis, and the shares; what is below e^−60 of the largest is none at all.

        Denormal numbers would make the products that follow ten times slower.
        """
        largest = logits.max(0).values
        shares = torch.nn.functional.threshold_((logits - largest).clamp_(min=-60.0).exp_(), 1e-26, 0.0)
        total = shares.sum(0)
        return largest + total.log(), shares.div_(total)

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of the first axis, and where it is."""
        found = logits.max(0)
        return found.values, found.indices

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Over the last axis."""
        return torch.log_softmax(logits, -1)

    def softplus(self, value: Tensor) -> Tensor:
        """log (1 + exp)."""
        return torch.nn.functional.softplus(value)

    def gammaln(self, value: Tensor) -> Tensor:
        """log Γ."""
        return torch.lgamma(value)

    def accumulated(
        self, one: Callable[[Mapping[str, Tensor]], tuple[dict, Any]], blocks: Mapping[str, Tensor]
    ) -> tuple:
        """Sums over the blocks of what `one` returns first, and what it returns second, block by block."""
        sums: dict[str, Tensor] = {}
        kept = []
        for c in range(len(blocks["real"])):
            own, rows = one({name: value[c] for name, value in blocks.items()})
            sums = {name: sums[name] + value if sums else value for name, value in own.items()}
            kept.append(rows)
        return sums, None if kept[0] is None else torch.stack(kept)
