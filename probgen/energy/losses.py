r"""Losses of densities that are known up to a constant, as far as both backends share them.

.. math::
    \text{score matching:} \quad \operatorname{E}_x\big[\tfrac12 \|s(x)\|^2 + \operatorname{tr} \nabla s(x)\big], \qquad
    s(x) = \nabla_x \log p_\theta(x)

    \text{sliced:} \quad \operatorname{tr} \nabla s(x) = \operatorname{E}_v[v^\top \nabla s(x)\, v], \quad v \in \{-1, 1\}^D

    \text{denoising:} \quad \operatorname{E}_{x, \varepsilon}\big[\tfrac12 \|\sigma s(x + \sigma \varepsilon)
    + \varepsilon\|^2\big], \qquad \varepsilon \sim N(0, I)

    \text{contrastive divergence:} \quad \operatorname{E}_x[\log p_\theta(x^-) - \log p_\theta(x)], \qquad
    x^- \text{ after some Langevin steps}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from probgen.arrays import rows_sum
from probgen.energy.langevin import Langevin
from probgen.energy.requirements import refuse_unscored
from probgen.energy.settings import refuse_no_bool, refuse_not_positive, refuse_not_whole
from probgen.errors import ProbgenError
from probgen.program import Structure
from probgen.schedules import refuse_other


class Scored:
    """A loss that differentiates log p(x) by the data."""

    def check(self, structure: Structure) -> None:
        """One continuous data site, and no latents."""
        refuse_unscored(structure, type(self).__name__)


@dataclass(frozen=True)
class Matching(Scored):
    """What `ScoreMatching` is told, and its loss of rows."""

    method: str = "exact"
    slices: int = 1

    def __post_init__(self) -> None:
        if self.method not in ("exact", "sliced"):
            raise ProbgenError(f'ScoreMatching: `method` is "exact" or "sliced", not {self.method!r}')
        refuse_not_whole("ScoreMatching", 1, slices=self.slices)

    def of_rows(self, score: Any, products: Any, directions: Any) -> Any:
        """½‖s‖² + tr ∇s of rows, [B], from ∇s v [K, B, ...] for K directions v: all axes, or slices."""
        trace = rows_sum((products * directions).sum(0))
        return rows_sum(score**2) / 2 + (trace if self.method == "exact" else trace / self.slices)


@dataclass(frozen=True)
class Denoising(Scored):
    """What `DenoisingScoreMatching` is told, and its loss of rows."""

    sigma: Any = None

    def __post_init__(self) -> None:
        if callable(self.sigma):
            refuse_other("DenoisingScoreMatching", sigma=self.sigma)
        elif isinstance(self.sigma, int | float | str):
            refuse_not_positive("DenoisingScoreMatching", sigma=self.sigma)

    def check(self, structure: Structure) -> None:
        """At one noise level: one continuous data site, and no latents."""
        if self.sigma is not None:
            super().check(structure)

    def of_rows(self, score: Any, noise: Any) -> Any:
        """½‖σ s + ε‖² of rows, [B], where `score` is that of x + σ ε."""
        return rows_sum((self.sigma * score + noise) ** 2) / 2


@dataclass(frozen=True)
class Contrast(Scored):
    """What `ContrastiveDivergence` is told, and its loss of rows."""

    steps: int = 10
    step_size: float = 0.1
    start: str = "data"
    penalty: float = 0.0
    adjusted: bool = True

    def __post_init__(self) -> None:
        refuse_not_whole("ContrastiveDivergence", 1, steps=self.steps)
        refuse_not_positive("ContrastiveDivergence", step_size=self.step_size)
        refuse_not_positive("ContrastiveDivergence", "zero or more", penalty=self.penalty)
        refuse_no_bool("ContrastiveDivergence", adjusted=self.adjusted)
        if self.start not in ("data", "noise"):
            raise ProbgenError(f'ContrastiveDivergence: `start` is "data" or "noise", not {self.start!r}')

    @property
    def chain(self) -> Langevin:
        """Where x⁻ comes from."""
        return Langevin(self.steps, self.step_size, self.adjusted, adapts=False)

    def check(self, structure: Structure) -> None:
        """One continuous data site, no latents; and a factor where energies are penalised."""
        super().check(structure)
        if self.penalty and structure.kind != "unnormalised":
            raise ProbgenError("ContrastiveDivergence: `penalty` is on the factors of a program, and this one has none")

    def of_rows(self, data: tuple[Any, Any], after: tuple[Any, Any]) -> Any:
        """The loss of rows, [B], from log p without the factors and that of the factors, at x and at x⁻."""
        loss = sum(after) - sum(data)
        return loss + self.penalty * (data[1] ** 2 + after[1] ** 2) if self.penalty else loss
