"""The bound of a diffusion from one random step of its chain, and the weighted errors trained in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probgen.diffusion.objective import ChainBound, proposal_of, spread_steps
from probgen.diffusion.requirements import denoiser_of
from probgen.program import Player, Program
from probgen.pyro.denoiser import Denoiser
from probgen.pyro.loss import Loss
from probgen.pyro.trace import bound, rows_factor


class DiffusionELBO(ChainBound, Loss):  # noqa: D101
    __doc__ = ChainBound.__doc__

    def players(self, program: Program) -> dict[str, Player]:
        """One: the program, whose weights are all that its denoiser touches."""
        denoiser = bound(denoiser_of(program, "DiffusionELBO"), like=program.model)

        def objective(model: Callable[..., Any], guide: Callable[..., Any], **arrays: Tensor) -> Any:
            chain = denoiser(**arrays)
            losses, terms = self.of_rows(chain, arrays[chain.site])
            scale = rows_factor()
            return losses.sum() * scale, {name: term.detach().sum() * scale for name, term in terms.items()}

        return {"program": Player((program.model, program.denoiser), objective)}

    def of_rows(self, chain: Denoiser, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each row at a random step, [B], and its terms."""
        chances = proposal_of(chain, self.proposal)
        x = chain.embed(data)
        if self.drop and chain.labels is not None:
            chain = chain.dropped(torch.rand_like(x.flatten(1)[:, 0]) < self.drop)
        step, weight = drawn_steps(chances, x)
        return self.at_step(chain, data, x, step, weight)

    def at_step(
        self, chain: Denoiser, data: Tensor, x: Tensor, step: Tensor, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each row, [B], at the step 1..T that is given for it, times its weight."""
        return self.of_step(chain, data, x, chain.noise_like(x), step, weight)


def drawn_steps(chances: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """A step 1..T for each row, drawn by its chance, and 1 / chance, [B]."""
    chances = torch.as_tensor(chances, dtype=like.dtype, device=like.device)
    ones = torch.ones(len(like), dtype=like.dtype, device=like.device)
    return spread_steps(chances, torch.rand((), dtype=like.dtype, device=like.device), ones)
