r"""How players take their steps: in turn, or all from the same place.

.. math::
    \text{in turn:} \quad & w \leftarrow w - \eta\, g(w), \quad \text{each player from where the one before has come}

    \text{Simultaneous:} \quad & w \leftarrow w - \eta\, g(w), \quad \text{all players at once}

    \text{Extragradient:} \quad & w' = w - \eta\, g(w), \quad w \leftarrow w - \eta\, g(w'), \quad \text{all at once}

    \text{Optimistic:} \quad & w \leftarrow w - \eta\, (2 g_t - g_{t-1}), \quad \text{in turn}

with the direction of any optimizer in the place of the gradient g. `fit(..., optimizer=Extragradient("adam"))`, or by name,
"extragradient-adam". In the bilinear game min_x max_y xy simultaneous steps grow by √(1 + η²) and those of the extragradient
shrink by √(1 − η² + η⁴).

References:
    | A variational inequality perspective on GANs (Gidel et al., 2018), arXiv:1802.10551
    | Training GANs with optimism (Daskalakis et al., 2017), arXiv:1711.00141
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from probgen.errors import ProbgenError

IN_TURN = "in turn"


@dataclass(frozen=True)
class Extragradient:
    """Steps by the gradient where a step ahead of all players leads."""

    optimizer: Any = "adam"
    name: ClassVar[str] = "extragradient"


@dataclass(frozen=True)
class Simultaneous:
    """Steps of all players from the same place."""

    optimizer: Any = "adam"
    name: ClassVar[str] = "simultaneous"


@dataclass(frozen=True)
class Optimistic:
    """Steps twice along a direction and once back along the one before."""

    optimizer: Any = "adam"
    name: ClassVar[str] = "optimistic"


PLAYS = (Extragradient, Simultaneous, Optimistic)


def play_of(choice: Any) -> tuple[str, Any]:
    """The name of a play and the optimizer inside it; "in turn" and the choice itself where there is none."""
    name, inner = _parted(choice)
    if name != IN_TURN and _parted(inner)[0] != IN_TURN:
        raise ProbgenError(
            f"`optimizer`: {choice!r} is a way to play inside another: give {name} an optimizer, such as 'adam'"
        )
    return name, inner


def _parted(choice: Any) -> tuple[str, Any]:
    if isinstance(choice, PLAYS):
        return choice.name, choice.optimizer
    if isinstance(choice, str):
        name, dash, inner = choice.partition("-")
        if dash and name in {play.name for play in PLAYS}:
            return name, inner
    return IN_TURN, choice


def shared_play(plays: Iterable[str], updates: Iterable[int]) -> str:
    """The one play of all players.

    Raises:
        ProbgenError: some players step at once and others in turn, or one that steps at once does so several times.
    """
    names = {IN_TURN if play == Optimistic.name else play for play in plays}
    if len(names) > 1:
        raise ProbgenError(
            f"`optimizer`: the players step {' and '.join(sorted(names))}: give all of them one way to play"
        )
    name = names.pop()
    if name != IN_TURN and max(updates) > 1:
        raise ProbgenError(
            f"`optimizer`: in {name} steps all players move at once, and here one is updated {max(updates)} times a step: let "
            "critic_steps be 1"
        )
    return name
