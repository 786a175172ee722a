"""Losses of densities that are known up to a constant: their gradient by the data is all that these look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probgen.energy.losses import Contrast, Denoising, Matching
from probgen.program import Player, Program
from probgen.pyro.energy import data_array, langevin, log_parts, scored
from probgen.pyro.flow_matching import denoising_player, matched_noise
from probgen.pyro.loss import Loss
from probgen.pyro.trace import rows_factor
from probgen.schedules import value_at


@dataclass(frozen=True)
class ScoreMatching(Matching, Loss):
    """½‖s‖² + tr ∇s, which up to a constant is half the expected ‖s − ∇ log p_data‖²; no constant of p enters.

    "exact" takes D derivatives of the score, "sliced" `slices` random directions in their place. Networks must be smooth:
    of a ReLU's score the second derivative says nothing.

    References:
        | Estimation of non-normalized statistical models by score matching (Hyvärinen, 2005), JMLR 6
        | Sliced score matching (Song et al., 2019), https://arxiv.org/abs/1905.07088
    """

    def objective(self, model: Callable[..., Any], guide: Callable[..., Any], **arrays: Tensor) -> Tensor:
        """Half the expected squared distance of the scores, up to a constant."""
        name = data_array(model, arrays)
        with torch.enable_grad():
            x = arrays[name].detach().requires_grad_()
            _, score = scored(model, arrays, x, name, keep=True)
            directions = self._directions(x)
            (products,) = torch.autograd.grad(
                score, x, directions, create_graph=True, is_grads_batched=True, materialize_grads=True
            )
            loss = self.of_rows(score, products, directions)
        return _as_asked(loss)

    def _directions(self, x: Tensor) -> Tensor:
        """Every axis, or random signs, [K, B, ...]."""
        if self.method == "exact":
            axes = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, *x.shape[1:])
            return axes.expand(-1, *x.shape)
        signs = torch.rand(self.slices, *x.shape, dtype=x.dtype, device=x.device) < 0.5
        return 2.0 * signs.to(x.dtype) - 1.0


@dataclass(frozen=True)
class DenoisingScoreMatching(Denoising, Loss):
    """½‖σ s(x + σ ε) + ε‖²: s becomes the score of the data with Gaussian noise of standard deviation `sigma` added.

    `sigma` is in the units of the prepared data, a number or a schedule of the step. Without it, all the noise levels of the
    program's denoiser are learned, at a random time for each row: E ‖σ_t s(x_t, t) + ε‖², with dimensions averaged.

    References:
        | A connection between score matching and denoising autoencoders (Vincent, 2011), Neural Computation 23
    """

    def players(self, program: Program) -> dict[str, Player]:
        """One: the program; without `sigma` all that its denoiser touches."""
        if self.sigma is not None:
            return super().players(program)
        return {"program": denoising_player(program, "DenoisingScoreMatching without `sigma`", matched_noise)}

    def at(self, step: Any) -> DenoisingScoreMatching:
        """With sigma as it is at `step`."""
        return replace(self, sigma=value_at(self.sigma, step))

    def objective(self, model: Callable[..., Any], guide: Callable[..., Any], **arrays: Tensor) -> Tensor:
        """The squared error of the score as a denoiser."""
        name = data_array(model, arrays)
        noise = torch.randn_like(arrays[name])
        with torch.enable_grad():
            x = (arrays[name] + self.sigma * noise).detach().requires_grad_()
            _, score = scored(model, arrays, x, name, keep=True)
            return _as_asked(self.of_rows(score, noise))


@dataclass(frozen=True)
class ContrastiveDivergence(Contrast, Loss):
    """log p(x⁻) − log p(x), where x⁻ comes after `steps` of Langevin's chain; no gradient goes through them.

    Its gradient is that of −log p as far as x⁻ is a draw of p; after few steps from the data it is a biased estimate
    (contrastive divergence). Unless they are `adjusted`, the steps are only right as h = `step_size` → 0, and run
    away where the energy is steep. `start` is "data", or "noise": a draw of the program without its factors. `penalty` is λ
    in λ (U(x)² + U(x⁻)²), U = −log of the factors, which keeps energies from growing apart. A loss holds no state, so chains
    are not carried from step to step (no persistent contrastive divergence). Terms: log p(x) and log p(x⁻).

    References:
        | Training products of experts by minimizing contrastive divergence (Hinton, 2002), Neural Computation 14
        | Implicit generation and modeling with energy-based models (Du & Mordatch, 2019), arXiv:1903.08689
    """

    def objective(self, model: Callable[..., Any], guide: Callable[..., Any], **arrays: Tensor) -> Any:
        """log p(x⁻) − log p(x), and its two parts."""
        name = data_array(model, arrays)
        start = arrays[name]
        if self.start == "noise":
            with torch.no_grad():
                start = poutine.trace(poutine.uncondition(model)).get_trace(**arrays).nodes[name]["value"]
        after = langevin(model, arrays, start, name, self.chain)
        here, there = log_parts(model, arrays), log_parts(model, {**arrays, name: after})
        terms = {name: sum(here).sum() * rows_factor(), f"{name}_chain": sum(there).sum() * rows_factor()}
        return self.of_rows(here, there).sum() * rows_factor(), terms


def _as_asked(loss: Tensor) -> Tensor:
    """The loss of rows for all N, with its graph only where gradients are on outside."""
    loss = loss.sum() * rows_factor()
    return loss if torch.is_grad_enabled() else loss.detach()
