"""What losses and samplers need of a program, and how it is said that it is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probgen.errors import ProbgenError
from probgen.program import Program


def denoiser_of(program: Program, needs: str) -> Callable[..., Any]:
    """The program's denoiser: a function that registers its network and returns a `Denoiser`.

    Raises:
        ProbgenError: it has none; `needs` is named as what wants one.
    """
    if program.denoiser is None:
        raise ProbgenError(
            f"{needs} needs a denoiser, and this program has none: give Program(model, guide, denoiser=...) a function that "
            "registers the network and returns a Denoiser, as models/diffusion/ddpm.py does"
        )
    return program.denoiser


def refuse_not_gaussian(chain: Any, kind: type, needs: str) -> None:
    """Refuse a chain of other noise than the Gaussian `kind`, which `needs` steps through."""
    if not isinstance(chain, kind):
        raise ProbgenError(
            f"{needs} takes steps through Gaussian noise, and this program has a {type(chain).__name__}: leave the sampler out, "
            "so that the program itself is run"
        )
