"""Which noise a row of data is paired with, in flow matching on either backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.diffusion.denoiser import GaussianChain, target
from probgen.errors import ProbgenError

COUPLINGS = ("independent", "ot", "given")


@dataclass(frozen=True)
class Coupled:
    """What `FlowMatching` is told, and what it asks of its denoiser and its data."""

    coupling: str = "independent"

    def __post_init__(self) -> None:
        if self.coupling not in COUPLINGS:
            raise ProbgenError(f"FlowMatching: coupling={self.coupling!r} is none of {', '.join(COUPLINGS)}")

    def given(self, x: Any, arrays: Mapping[str, Any]) -> Any:
        """The array `z`, the noise of each row."""
        if "z" not in arrays or arrays["z"].shape != x.shape:
            raise ProbgenError(
                "FlowMatching(coupling='given') reads the noise of each row from the array 'z', of the shape of x: give "
                "data={'x': ..., 'z': ...}, as `probgen.reflow(run)` makes them"
            )
        return arrays["z"]

    def wanted(self, chain: GaussianChain, x: Any, noise: Any, t: Any) -> Any:
        """The velocity dα/dt x + dσ/dt z at time t of each row."""
        if chain.predicts != "velocity":
            raise ProbgenError(
                f"FlowMatching trains a velocity, and this program's network predicts {chain.predicts}: use "
                "DenoisingScoreMatching(), or predicts='velocity'"
            )
        return target(chain.schedule, "velocity", x, noise, t)


def assigned(cost: np.ndarray) -> np.ndarray:
    """The column of each row, [B], in the permutation of the least cost [B, B]."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(np.asarray(cost))[1]
