"""Parzen windows: kernel density estimation (Rosenblatt 1956; Parzen 1962), bandwidth by cross-validation.

    p(x) = 1/N Σ_i N(x | x_i, h² I)      centres x_1..x_N: the training rows, kept with the weights
    loss = −Σ_n log p_−n(x_n)            p_−n: the same without x_n and its equals, a mean over x_i ≠ x_n

With its own kernel in the sum a row would be likeliest at h = 0, so each row is left out of its own density (Habbema
et al. 1974; Duin 1976), with those equal to it, and h learned by gradient steps of this loss; another loss leaves it at
N^(−1/(D+4)), where it starts. All rows are in memory: batch_size=None. Whole numbers are dequantized, the centres once
and for all, the rows anew at each step.
"""

from __future__ import annotations

import math

import pyro
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from probgen import Dequantize, Flatten, ProbgenError, Program, Standardize

ROWS = 256  # rows whose left-out density is looked at in a step, anew each time
AT_ONCE = 2**24  # kernels in memory, outside training


class Parzen(TorchDistribution):
    """1/N Σ_i N(x | x_i, h² I) of centres [N, D] and a bandwidth h."""

    arg_constraints = {  # noqa: RUF012
        "centres": constraints.independent(constraints.real, 2),
        "bandwidth": constraints.positive,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, centres: Tensor, bandwidth: Tensor, batch_shape: tuple[int, ...] = ()) -> None:
        self.centres, self.bandwidth = centres, bandwidth
        super().__init__(torch.Size(batch_shape), centres.shape[1:])

    def expand(self, batch_shape: tuple[int, ...], _instance: Parzen | None = None) -> Parzen:
        return Parzen(self.centres, self.bandwidth, batch_shape)

    @property
    def mean(self) -> Tensor:
        return self.centres.mean(0).expand(self.shape())

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self.shape(sample_shape)
        centres = self.centres[torch.randint(len(self.centres), shape[:-1], device=self.centres.device)]
        return centres + self.bandwidth * torch.randn(shape, dtype=centres.dtype, device=centres.device)

    def log_prob(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        pieces = rows.split(max(1, AT_ONCE // len(self.centres)))
        log_p = torch.cat([self._log_kernels(piece)[0].logsumexp(1) for piece in pieces])
        return log_p.reshape(x.shape[:-1]) - math.log(len(self.centres))

    def log_prob_left_out(self, x: Tensor, n: Tensor) -> Tensor:
        """log p_−n of rows x [B, D], numbered n [B]: a row leaves out the centres that it equals, or else the n-th."""
        log_kernels, distance = self._log_kernels(x)
        nth = torch.arange(len(self.centres), device=x.device) == (n % len(self.centres)).unsqueeze(1)
        equal = distance == 0
        others = ~torch.where(equal.any(1, keepdim=True), equal, nth)
        return log_kernels.where(others, -math.inf).logsumexp(1) - others.sum(1).log()

    def _log_kernels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log N(x | x_i, h² I) and |x − x_i|, [B, N]; exactly 0 between equal rows."""
        distance = torch.cdist(x, self.centres, compute_mode="donot_use_mm_for_euclid_dist")
        log_scale = self.bandwidth.log() + math.log(2 * math.pi) / 2
        return -0.5 * (distance / self.bandwidth) ** 2 - x.shape[-1] * log_scale, distance


def leave_one_out(model, guide, x: Tensor) -> Tensor:
    """−Σ_n log p_−n(x_n), of as many rows as a step looks at, standing for all."""
    density = Parzen(pyro.param("centres"), pyro.param("bandwidth"))
    n = torch.rand(len(x), device=x.device).topk(min(ROWS, len(x))).indices  # Inductor fails on a slice of randperm
    return -density.log_prob_left_out(x[n], n).mean() * len(x)


def program(spec) -> Program:
    """A kernel density estimate of the rows of `x` as standardized vectors."""
    D = math.prod(spec["x"].shape)
    whole = (Dequantize(),) if "int" in spec["x"].dtype else ()  # whole numbers have no density

    def model(x: Tensor) -> None:
        centres = pyro.param("centres", lambda: _centres(x)).requires_grad_(False)  # kept, not trained
        h = pyro.param("bandwidth", lambda: torch.tensor(len(x) ** (-1 / (D + 4))), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Parzen(centres, h.detach()), obs=x)  # its own kernel in the sum would teach h = 0

    return Program(
        model,
        by=leave_one_out,
        prepare={"x": (Flatten(), *whole, Standardize())},
        defaults={"epochs": 100, "batch_size": None, "lr": 0.05},
    )


def _centres(x: Tensor) -> Tensor:
    if len(x) < 2 or bool((x == x[0]).all()):
        raise ProbgenError("kde: a row left out leaves no centre behind; give training rows of which two differ")
    return x.detach().clone()


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
