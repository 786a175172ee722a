"""What `EM(...)` says: how it starts, when it ends, what it does with minibatches. See `probgen.em.engine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from probgen.conjugate.variational import CoordinateAscent
from probgen.em.engine import Engine
from probgen.errors import ProbgenError
from probgen.program import Program


class Settings:
    """Expectation-maximisation: one step is one E and one M over all rows.

    Parameters
    ----------
    init
        "k-means++" (rows spread out as centres, each row given to the nearest), "random" (any rows as centres), or
        "program": the parameters as they stand.
    restarts
        Short runs from as many seeds, of which the best goes on.
    tol
        Gain in mean log-likelihood (nats per datum) below which it has converged; 0: never.
    floor
        The least variance of a component, as a share of the data's.
    stepwise
        κ in (0.5, 1]: statistics of minibatches are averaged with the weight (t + 2)^−κ (Cappé & Moulines 2009).
    hard
        All responsibility to the best state: k-means as a limit. The loss is then that of the best states.
    variational
        Coordinate-ascent variational Bayes on a conjugate program: True, False, or None: where latents are global.

    A backend lends `host` and `runs`, which run its programs for EM and for coordinate ascent.

    Reference: Dempster, Laird & Rubin, JRSS B 39 (1977); Bishop, PRML, chapter 9.
    """

    host: ClassVar[Callable[..., Any]]
    runs: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        init: str = "k-means++",
        restarts: int = 1,
        tol: float = 1e-6,
        floor: float = 1e-6,
        stepwise: float | None = None,
        hard: bool = False,
        variational: bool | None = None,
    ) -> None:
        for name, ok, words in (
            ("init", init in ("k-means++", "random", "program"), '"k-means++", "random" or "program"'),
            ("restarts", _whole(restarts) and restarts >= 1, "a whole number, at least 1"),
            ("tol", _number(tol) and tol >= 0, "a number, 0 or more"),
            ("floor", _number(floor) and 0 <= floor < 1, "a number from 0 to below 1"),
            ("stepwise", stepwise is None or (_number(stepwise) and 0.5 < stepwise <= 1), "above 0.5, at most 1"),
            ("hard", isinstance(hard, bool), "True or False"),
            ("variational", variational is None or isinstance(variational, bool), "True, False or None"),
        ):
            if not ok:
                raise ProbgenError(f"EM: `{name}` is {locals()[name]!r}: it must be {words}")
        if restarts > 1 and init == "program":
            raise ProbgenError('EM: restarts begin at random places, and init="program" at one: give another `init`')
        self.init, self.restarts, self.tol, self.floor = init, restarts, tol, floor
        self.stepwise, self.hard, self.variational = stepwise, hard, variational
        self.defaults = {"epochs": 100} if stepwise is not None else {"batch_size": None, "epochs": 100}

    def engine(self, program: Program, by: Any, feed: Any, options: Any) -> Any:
        """What trains a program by this: one E and one M a step, or coordinate ascent on a Bayesian program."""
        if self.variational or (self.variational is None and program.guide is not None):
            runs = self.runs(program, feed, options)
            if self.variational or runs.structure.has_global_latents:
                return CoordinateAscent(runs, self, feed, options)
        return Engine(self.host(program, feed, options), self, feed, options)

    def __repr__(self) -> str:
        names = ("init", "restarts", "tol", "floor", "stepwise", "hard", "variational")
        return f"EM({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def players(self, program: Program) -> dict[str, Any]:
        """None: it is no loss to be added to others."""
        raise ProbgenError("EM is a way to learn of its own, not a loss that adds to others or runs in SVI: by=EM()")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
