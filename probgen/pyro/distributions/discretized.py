"""Whole numbers that are a Gaussian's value, rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

from probgen.diffusion.levels import log_mass, nearest


class DiscretizedGaussian(TorchDistribution):
    """P(k) = Φ((e_{k+1} − μ) / σ) − Φ((e_k − μ) / σ) for k = 0..L−1, which lie evenly in −1..1   (arXiv:2006.11239, eq. 13).

    The bins meet half way between the numbers, and the outermost are open.

    Parameters
    ----------
    loc, scale
        μ and σ, in −1..1.
    levels
        L, how many numbers there are: 256 for bytes.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """0..L−1."""
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiscretizedGaussian:
        """The same with more of a batch."""
        new = self._get_checked_instance(DiscretizedGaussian, _instance)
        new.loc, new.scale, new.levels = self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels
        super(DiscretizedGaussian, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(k)."""
        if self._validate_args:
            self._validate_sample(value)
        return log_mass(value, self.loc, self.scale, self.levels, torch.special.log_ndtr)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws k, as floats."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            drawn = torch.normal(self.loc.expand(shape), self.scale.expand(shape))
            return nearest(drawn, self.levels)

    @property
    def mean(self) -> Tensor:
        """Σ_k k P(k)."""
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        """Σ_k k² P(k) − mean²."""
        return self._moment(2) - self._moment(1) ** 2

    def _moment(self, power: int) -> Tensor:
        """Level by level, as images with an axis of levels would be large."""
        return sum(k**power * self.log_prob(torch.full_like(self.loc, k)).exp() for k in range(1, self.levels))
