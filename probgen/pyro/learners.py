"""Who trains a program, and who answers for it afterwards: the engine of its loss, or what EM and NUTS bring."""

from __future__ import annotations

from typing import Any

from probgen.program import Program
from probgen.pyro.engine import Engine
from probgen.pyro.loss import as_loss
from probgen.pyro.trained import Trained


def engine_of(program: Program, by: Any, feed: Any, options: Any) -> Any:
    """What trains `program` by `by` on the batches of `feed`: the loss's own engine where it has one."""
    by = as_loss(program.by if by is None else by)
    return getattr(by, "engine", Engine)(program, by, feed, options)


def trained_of(program: Program, *args: Any, **options: Any) -> Any:
    """The program with its weights, as the verbs see it; a way to learn may bring its own view of them."""
    return getattr(program.by, "trained", Trained)(program, *args, **options)
