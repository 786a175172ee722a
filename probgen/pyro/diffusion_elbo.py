"""The bound of a diffusion from one random step of its chain, and the weighted errors trained in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probgen.diffusion.objective import proposal_of, refuse_weighting, weighted_error
from probgen.diffusion.requirements import denoiser_of
from probgen.program import Player, Program
from probgen.pyro.denoiser import Denoiser
from probgen.pyro.loss import Loss
from probgen.pyro.trace import bound, rows_factor


class DiffusionELBO(Loss):
    """Minus the ELBO of a chain x_T → … → x_1 → x, of which each row takes one random step, in closed form.

        −ELBO = L_T + Σ_i L_{i−1} + L_0 = L_T + E_{i ~ p}[ L_{i−1} / p_i ]          (Ho et al., arXiv:2006.11239, eq. 5)

    An unbiased estimate of what `ELBO()` makes of the whole chain, for the cost of one run of the network. The program
    has a `denoiser`: a function that registers the network and returns a `Denoiser`. Terms: `x_T` is −L_T, `x_t` the
    sum of the KLs, `x` is −L_0. The other weightings are no bounds, but errors averaged over i and dimensions.

    Parameters
    ----------
    weighting
        "vlb", the bound; "simple": ‖·‖² of what the network predicts; "snr": ‖ε − ε̂‖²; "min-snr": min(SNR, γ) ‖x − x̂‖².
    proposal
        "uniform", or "importance": steps in proportion to what they would cost Gaussian data.
    min_snr
        γ of "min-snr" (arXiv:2303.09556).
    drop
        Share of the rows that a conditional network sees without their label, for guidance (arXiv:2207.12598).
    """

    def __init__(
        self, weighting: str = "vlb", proposal: str = "uniform", min_snr: float = 5.0, drop: float = 0.0
    ) -> None:
        refuse_weighting(weighting, proposal)
        self.weighting, self.proposal, self.min_snr, self.drop = weighting, proposal, min_snr, drop

    def __repr__(self) -> str:
        return f"DiffusionELBO(weighting={self.weighting!r}, proposal={self.proposal!r}, min_snr={self.min_snr}, drop={self.drop})"

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
        noise, t = chain.noise_like(x), step / chain.steps
        said = chain(chain.noised(x, t, noise), t)
        if self.weighting != "vlb":
            error = weighted_error(chain, x, noise, said, t, self.weighting, self.min_snr)
            return weight / chain.steps * error, {}
        first = step <= 1
        before = torch.where(first, t / 2, (step - 1) / chain.steps)  # of the first step only the decoder is asked
        steps = torch.where(first, 0.0, chain.step_kl(x, said, t, before)) * weight
        decoded = torch.where(first, chain.decoded(said, 1 / chain.steps).log_prob(data), 0.0) * weight
        ends = chain.prior_kl(x)
        return ends + steps - decoded, {f"x_{chain.steps}": -ends, "x_t": -steps, "x": decoded}


def drawn_steps(chances: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """A step 1..T for each row, drawn by its chance, and 1 / chance, [B].

    Rows lie evenly over all steps, moved by one random number (Kingma et al., arXiv:2107.00630): each has its chance,
    and together they cover the chain.
    """
    chances = torch.as_tensor(chances, dtype=like.dtype, device=like.device)
    rows = torch.arange(len(like), dtype=like.dtype, device=like.device)
    places = (torch.rand((), dtype=like.dtype, device=like.device) + rows / len(like)) % 1
    index = torch.searchsorted(chances.cumsum(0), places).clamp(max=len(chances) - 1)
    return (index + 1).to(like.dtype), 1 / chances[index]
