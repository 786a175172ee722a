r"""What a critic and a program minimise, as functions of the critic's logits d at real and at fake rows, [B] each.

.. math::
    \text{minimax:} \quad & V(G, D) = \operatorname{E} \log D(x) + \operatorname{E} \log(1 - D(G(z))), \qquad
    D = \operatorname{sigmoid}(d); \quad \text{the critic minimises } -V \text{, the program } V

    \text{non-saturating:} \quad & \text{the program minimises } -\operatorname{E} \log D(G(z))

    \text{least-squares:} \quad & \tfrac12 \operatorname{E}(d(x) - 1)^2 + \tfrac12 \operatorname{E} d(G(z))^2, \qquad
    \tfrac12 \operatorname{E}(d(G(z)) - 1)^2

    \text{hinge:} \quad & \operatorname{E} \max(0, 1 - d(x)) + \operatorname{E} \max(0, 1 + d(G(z))), \qquad
    -\operatorname{E} d(G(z))

    \text{wasserstein:} \quad & \operatorname{E} d(G(z)) - \operatorname{E} d(x), \qquad -\operatorname{E} d(G(z))

    \text{relativistic:} \quad & \operatorname{E} \operatorname{softplus}(d(G(z)) - d(x)), \qquad
    \operatorname{E} \operatorname{softplus}(d(x) - d(G(z)))

The program's side at real rows is the mirror image of that at fake ones. It counts where the program has a hand in the
real rows, by draws of its guide (ALI). Elsewhere it is a constant, and unless an objective is `paired` the critic is not asked
for it: the logged loss of the program then has d = 0 at real rows.

References:
    | Generative adversarial nets (Goodfellow et al., 2014), arXiv:1406.2661;   LSGAN (Mao et al., 2016), arXiv:1611.04076
    | Wasserstein GAN (Arjovsky et al., 2017), arXiv:1701.07875;   Geometric GAN (Lim & Ye, 2017), arXiv:1705.02894
    | The relativistic discriminator (Jolicoeur-Martineau, 2018), arXiv:1807.00734
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from probgen.arrays import namespace
from probgen.errors import ProbgenError, did_you_mean


@dataclass(frozen=True, repr=False)
class Objective:
    """Two losses of rows, [B], each a function `(real, fake)` of logits.

    `paired` says that the program's loss looks at the real logits even where these are none of its doing. An objective of
    one's own is an `Objective("name", critic, program)`.
    """

    name: str
    critic: Callable[[Any, Any], Any]
    program: Callable[[Any, Any], Any]
    paired: bool = False

    def __repr__(self) -> str:
        return repr(self.name)


def softplus(d: Any) -> Any:
    """log(1 + exp(d)), without overflow."""
    return namespace(d).logaddexp(d, d * 0)


def relu(d: Any) -> Any:
    """max(0, d)."""
    return namespace(d).where(d > 0, d, d * 0)


def _logistic(real: Any, fake: Any) -> Any:
    """−log D(real) − log(1 − D(fake))."""
    return softplus(-real) + softplus(fake)


OBJECTIVES = {
    found.name: found
    for found in (
        Objective("minimax", _logistic, lambda real, fake: -_logistic(real, fake)),
        Objective("non-saturating", _logistic, lambda real, fake: softplus(-fake) + softplus(real)),
        Objective(
            "least-squares",
            lambda real, fake: ((real - 1) ** 2 + fake**2) / 2,
            lambda real, fake: ((fake - 1) ** 2 + real**2) / 2,
        ),
        Objective("hinge", lambda real, fake: relu(1 - real) + relu(1 + fake), lambda real, fake: real - fake),
        Objective("wasserstein", lambda real, fake: fake - real, lambda real, fake: real - fake),
        Objective(
            "relativistic",
            lambda real, fake: softplus(fake - real),
            lambda real, fake: softplus(real - fake),
            paired=True,
        ),
    )
}


def objective_of(choice: Any) -> Objective:
    """The objective behind a name, or one of the user's own.

    Raises:
        ProbgenError: it is neither.
    """
    if isinstance(choice, Objective):
        return choice
    if isinstance(choice, str) and choice in OBJECTIVES:
        return OBJECTIVES[choice]
    raise ProbgenError(
        f"Adversarial: objective={choice!r} is none of {', '.join(OBJECTIVES)}{did_you_mean(str(choice), OBJECTIVES)}; one of "
        "your own is an Objective(name, critic, program)"
    )
