"""Losses at a random time of [0, 1]: what a network says of x_t = α_t x + σ_t z, against what it ought to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probgen.arrays import rows_mean
from probgen.diffusion.coupling import Coupled, assigned
from probgen.diffusion.denoiser import Prediction
from probgen.diffusion.requirements import denoiser_of
from probgen.diffusion.samplers import first_time
from probgen.program import Player, Program
from probgen.pyro.denoiser import Denoiser
from probgen.pyro.loss import Loss
from probgen.pyro.trace import bound, rows_factor


@dataclass(frozen=True)
class FlowMatching(Coupled, Loss):
    """E ‖u(x_t, t) − (dα/dt x + dσ/dt z)‖², t ~ U(0, 1): a velocity that carries the data to noise and back.

    Another way to learn the same continuous flow: u is what the program's flow integrates, and no solver runs. z is
    paired with x by `coupling`: "independent"; "ot", the optimal transport between the rows of the batch and as many draws
    of noise, found on the host, which straightens the paths; or "given", the array `z` of the data (rectified flows: the
    noise from which a first flow has drawn x). With dimensions averaged.

    Parameters
    ----------
    coupling
        Of data and noise.

    References:
        | Flow matching (Lipman et al., 2022), arXiv:2210.02747;   Rectified flow (Liu et al., 2022), arXiv:2209.03003
        | Minibatch optimal transport (Tong et al., 2023), arXiv:2302.00482
    """

    def players(self, program: Program) -> dict[str, Player]:
        """One: the program, whose weights are all that its denoiser touches."""

        def of_rows(chain: Denoiser, x: Tensor, arrays: dict[str, Tensor]) -> Tensor:
            noise = self.paired(x, arrays)
            t, said = noisy(chain, x, noise, 0.0)
            return rows_mean((said.output - self.wanted(chain, x, noise, t)) ** 2)

        return {"program": denoising_player(program, "FlowMatching", of_rows)}

    def paired(self, x: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """z of each row."""
        if self.coupling == "given":
            return self.given(x, arrays)
        noise = torch.randn_like(x)
        if self.coupling == "ot":
            noise = noise[assignment(torch.cdist(x.flatten(1), noise.flatten(1)).square())]
        return noise


@torch.library.custom_op("probgen::assignment", mutates_args=())
def assignment(cost: Tensor) -> Tensor:
    """The column of each row, [B], in the permutation of the least cost [B, B]; one node of a traced step."""
    return torch.from_numpy(assigned(cost.detach().cpu().numpy())).to(cost.device)


@assignment.register_fake
def _(cost: Tensor) -> Tensor:
    return cost.new_empty(len(cost), dtype=torch.int64)


def noisy(chain: Denoiser, x: Tensor, noise: Tensor, first: float) -> tuple[Tensor, Prediction]:
    """A time for each row, [B], evenly spread over [first, 1] and moved by one random number; and what is said of x_t."""
    rows = torch.arange(len(x), dtype=x.dtype, device=x.device)
    t = first + (1 - first) * ((torch.rand((), dtype=x.dtype, device=x.device) + rows / len(x)) % 1)
    return t, chain(chain.noised(x, t, noise), t)


def matched_noise(chain: Denoiser, x: Tensor, arrays: dict[str, Tensor]) -> Tensor:
    """σ_t² ‖s(x_t, t) − ∇ log q(x_t | x)‖² = ‖ε − ε̂‖² with dimensions averaged, [B], at a random time for each row."""
    noise = torch.randn_like(x)
    _, said = noisy(chain, x, noise, first_time(chain))
    return rows_mean((noise - said.noise) ** 2)


def denoising_player(program: Program, loss: str, of_rows: Callable[..., Tensor]) -> Player:
    """The one player of a loss that asks the denoiser at times of its own; `of_rows(chain, x, arrays)` gives [B]."""
    denoiser = bound(denoiser_of(program, loss), like=program.model)

    def objective(model: Callable[..., Any], guide: Callable[..., Any], **arrays: Tensor) -> Tensor:
        chain = denoiser(**arrays)
        return of_rows(chain, chain.embed(arrays[chain.site]), arrays).sum() * rows_factor()

    return Player((program.model, program.denoiser), objective)
