r"""What keeps a critic smooth: terms of its loss, of which any number add up.

.. math::
    \text{GradientPenalty(}\lambda\text{):} \quad & \lambda \operatorname{E} (\|\nabla d(\hat x)\| - 1)^2, \qquad
    \hat x = \varepsilon x + (1 - \varepsilon) G(z), \quad \varepsilon \sim U(0, 1) \text{ for each row}

    \text{R1(}\gamma\text{):} \quad & \tfrac{\gamma}{2} \operatorname{E} \|\nabla d(x)\|^2 \qquad
    \text{R2(}\gamma\text{):} \quad \tfrac{\gamma}{2} \operatorname{E} \|\nabla d(G(z))\|^2

    \text{OrthogonalRegularization(}\beta\text{):} \quad & \beta \sum_W \|W W^\top \circ (1 - I)\|_F^2

`WeightClip(c)` is no term: it puts every weight of the critic back into [−c, c] after each of its updates. Norms are those
of the gradient of one row by all the arrays that the critic sees of it.

References:
    | Wasserstein GAN (Arjovsky et al., 2017), arXiv:1701.07875
    | Improved training of Wasserstein GANs (Gulrajani et al., 2017), arXiv:1704.00028
    | Which training methods for GANs do actually converge? (Mescheder et al., 2018), arXiv:1801.04406
    | Large scale GAN training (Brock et al., 2018), arXiv:1809.11096
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from probgen.arrays import namespace
from probgen.energy.settings import refuse_not_positive
from probgen.schedules import refuse_other


class Weighted:
    """A penalty whose weight is a number, or a schedule of the step."""

    weight: Any

    def __post_init__(self) -> None:
        if callable(self.weight):
            refuse_other(type(self).__name__, weight=self.weight)
        else:
            refuse_not_positive(type(self).__name__, weight=self.weight)

    def at(self, step: Any) -> Any:
        """With the weight as it is at `step`, which may be a traced scalar."""
        if not callable(self.weight):
            return self
        found = copy.copy(self)
        object.__setattr__(found, "weight", self.weight(step))
        return found


@dataclass(frozen=True)
class GradientPenalty(Weighted):
    """λ (‖∇d‖ − 1)² between real and fake rows."""

    weight: Any = 10.0
    where: ClassVar[str] = "between"

    def of_rows(self, squared_norm: Any) -> Any:
        """The penalty of rows, [B], from ‖∇d‖² [B]; a norm of zero has the slope zero."""
        xp = namespace(squared_norm)
        some = squared_norm > 0
        norm = xp.where(some, xp.sqrt(xp.where(some, squared_norm, squared_norm * 0 + 1)), squared_norm * 0)
        return self.weight * (norm - 1) ** 2


@dataclass(frozen=True)
class R1(Weighted):
    """γ/2 ‖∇d‖² at real rows."""

    weight: Any = 1.0
    where: ClassVar[str] = "real"

    def of_rows(self, squared_norm: Any) -> Any:
        """The penalty of rows, [B], from ‖∇d‖² [B]."""
        return self.weight / 2 * squared_norm


@dataclass(frozen=True)
class R2(R1):
    """γ/2 ‖∇d‖² at fake rows."""

    where: ClassVar[str] = "fake"


@dataclass(frozen=True)
class OrthogonalRegularization(Weighted):
    """β ‖W Wᵀ ∘ (1 − I)‖² of every weight with two axes or more, the first against all others."""

    weight: Any = 1e-4

    def of_matrix(self, matrix: Any) -> Any:
        """The penalty of one matrix [outputs, inputs]."""
        product = matrix @ matrix.T
        return self.weight * ((product**2).sum() - (namespace(product).diagonal(product) ** 2).sum())


@dataclass(frozen=True)
class WeightClip:
    """Weights within [−c, c] after each update of the critic."""

    bound: float = 0.01

    def __post_init__(self) -> None:
        refuse_not_positive("WeightClip", bound=self.bound)

    def project(self, weights: Any) -> Any:
        """The nearest weights within the bounds."""
        return weights.clip(-self.bound, self.bound)


GRADIENTS = (GradientPenalty, R1)
PENALTIES = (*GRADIENTS, OrthogonalRegularization, WeightClip)
