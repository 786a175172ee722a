"""Losses as values: what they name, how they add and scale, and how the PPL's own take the same slot."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.infer import RenyiELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from probgen.adversarial.settings import refuse_one_name
from probgen.errors import ProbgenError
from probgen.program import Player, Program, Structure, arguments, shared
from probgen.schedules import value_at


class Loss:
    """What is optimised: it names its players, adds and scales, and never loops.

    `objective(model, guide, **arrays)` of a player returns nats for all N rows, or a pair (loss, {name: term}).
    """

    needs_guide = True  # every latent is drawn by the guide or summed out
    validates = True  # its value on held-out rows says how good the program is

    def players(self, program: Program) -> dict[str, Player]:
        """Who trains what; a loss with one player trains the program's model and guide."""
        parts = tuple(part for part in (program.model, program.guide) if part is not None)
        return {"program": Player(parts, self.objective)}

    def objective(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **arrays: Tensor) -> Any:
        """The loss on one batch; losses with players of their own override `players` instead."""
        raise ProbgenError(f"{type(self).__name__} has no objective for a single player: train it with probgen.fit")

    def check(self, structure: Structure) -> None:
        """Say in one sentence what the program lacks for this loss."""

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """A loss function of Pyro's own `SVI`, where it has one player."""
        players = self.players(Program(model, guide))
        if len(players) > 1:
            raise ProbgenError(f"a loss with the players {', '.join(players)} is trained with probgen.fit, not by SVI")
        return with_terms(self.objective(model, guide, *args, **kwargs))[0]

    def at(self, step: Any) -> Loss:
        """This loss with its schedules read at `step`, which may be a traced scalar."""
        return self

    def built(self, spec: Mapping[str, Any], seed: int = 0) -> Loss:
        """This loss with the networks that it builds of `spec`, what is known of the data."""
        return self

    def __add__(self, other: Any) -> Loss:
        return Sum(((1.0, self), (1.0, as_loss(other))))

    __radd__ = __add__

    def __mul__(self, factor: Any) -> Loss:
        return Sum(((factor, self),))

    __rmul__ = __mul__


class Sum(Loss):
    """Σ c_i · loss_i, in which equally named players are one; a coefficient may be a schedule."""

    def __init__(self, parts: tuple[tuple[Any, Loss], ...]) -> None:
        self.parts = tuple(
            (_product(c, d), inner)
            for c, loss in parts
            for d, inner in (loss.parts if isinstance(loss, Sum) else ((1.0, loss),))
        )
        refuse_one_name(loss for _, loss in self.parts)

    @property
    def needs_guide(self) -> bool:
        """Whether a part does."""
        return any(loss.needs_guide for _, loss in self.parts)

    @property
    def validates(self) -> bool:
        """Whether every part does: a sum is judged as a whole."""
        return all(loss.validates for _, loss in self.parts)

    def built(self, spec: Mapping[str, Any], seed: int = 0) -> Sum:
        """Every part with the networks that it builds of `spec`."""
        return Sum(tuple((c, loss.built(spec, seed)) for c, loss in self.parts))

    def __repr__(self) -> str:
        return " + ".join(f"{c!r} * {loss!r}" for c, loss in self.parts)

    def at(self, step: Any) -> Sum:
        """Every part, and its coefficient, at `step`."""
        return Sum(tuple((value_at(c, step), loss.at(step)) for c, loss in self.parts))

    def check(self, structure: Structure) -> None:
        """Each part's own check."""
        for _, loss in self.parts:
            loss.check(structure)

    def objective(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **arrays: Tensor) -> Any:
        """Σ c_i · objective_i, where there is one player."""
        players = self.players(Program(model, guide))
        if len(players) > 1:
            raise ProbgenError(f"a loss with the players {', '.join(players)} is trained with probgen.fit, not by SVI")
        return next(iter(players.values())).objective(model, guide, *args, **arrays)

    def players(self, program: Program) -> dict[str, Player]:
        """The players of all parts; those of one name share their parameters and add their objectives."""
        merged: dict[str, list[tuple[Any, Player]]] = {}
        for coefficient, loss in self.parts:
            for name, player in loss.players(program).items():
                merged.setdefault(name, []).append((coefficient, player))
        return {name: _merged(parts) for name, parts in merged.items()}


def _product(a: Any, b: Any) -> Any:
    if callable(a) or callable(b):
        return lambda step: value_at(a, step) * value_at(b, step)
    return a * b


def _merged(parts: list[tuple[Any, Player]]) -> Player:
    def objective(
        model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **arrays: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = 0.0, {}
        for coefficient, player in parts:
            loss, own = with_terms(player.objective(model, guide, *args, **arrays))
            total = total + coefficient * loss
            terms |= own
        return total, terms

    seen: dict[int, Any] = {id(c): c for _, player in parts for c in player.callables}
    return Player(tuple(seen.values()), objective, *shared([player for _, player in parts]))


def with_terms(value: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """An objective's answer as a pair of the loss and its named terms."""
    return value if isinstance(value, tuple) else (value, {})


class Function(Loss):
    """A plain function `loss(model, guide, *args)` in Pyro's own convention.

    It gets the arrays that it names, all of them through `**kwargs`, or through `*args` alone those of the model in
    the model's order.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", "loss")
        self._own = functools.partial(function, None, None)  # its signature is that of the arrays alone
        self._kinds = {p.kind for p in inspect.signature(self._own).parameters.values()}

    def __repr__(self) -> str:
        return self.__name__

    def objective(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **arrays: Tensor) -> Any:
        """The function's value."""
        if not args and self._kinds == {inspect.Parameter.VAR_POSITIONAL}:
            args, arrays = tuple(arguments(inspect.unwrap(model), arrays).values()), {}
        elif not args and inspect.Parameter.VAR_KEYWORD not in self._kinds:
            arrays = arguments(self._own, arrays)
        return self.function(model, guide, *args, **arrays)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself."""
        return self.function(*args, **kwargs)


class Stock(Loss):
    """A loss of `pyro.infer`, by its `differentiable_loss`."""

    def __init__(self, elbo: pyro.infer.ELBO) -> None:
        self.elbo = elbo

    def __repr__(self) -> str:
        return f"{type(self.elbo).__name__}()"

    def check(self, structure: Structure) -> None:
        """A mean-field ELBO is biased where the guide runs against the model, and is refused there.

        So it is where an autoguide draws a latent unconstrained: Pyro's KL from a `Delta` drops the log-Jacobian.
        """
        if not isinstance(self.elbo, TraceMeanField_ELBO):
            return
        name = type(self.elbo).__name__
        for site in structure.sampled:
            if site not in structure.analytic_kl():
                raise ProbgenError(
                    f"{name} takes the KL at {site!r} in closed form, but the model's distribution there depends on "
                    "what the guide draws at or after it, so the bound would be wrong: use probgen.pyro.ELBO()"
                )
        transformed = any(n not in structure.model for n in structure.guide)
        for site in structure.sampled if transformed else ():
            if structure.guide[site].delta and "Real()" not in structure.model[site].support:
                raise ProbgenError(
                    f"{name} leaves out the log-Jacobian of the autoguide's transform at {site!r}, so the bound would "
                    "be wrong: use probgen.pyro.ELBO()"
                )

    def objective(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **arrays: Tensor) -> Any:
        """The stock loss as a differentiable scalar."""
        return self.elbo.differentiable_loss(model, guide, *args, **arrays)


class StockGradients(Stock):
    """`TraceGraph_ELBO`: it only offers `loss_and_grads`, so its gradients are read off a backward pass."""

    def objective(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **arrays: Tensor) -> Any:
        """The surrogate whose gradients `loss_and_grads` leaves behind, with the loss as its value."""
        surrogates: list[Tensor] = []
        backward = torch.Tensor.backward

        def keep(tensor: Tensor, *_: Any, **__: Any) -> None:
            surrogates.append(tensor)

        torch.Tensor.backward = keep
        try:
            loss = TraceGraph_ELBO.loss_and_grads(self.elbo, model, guide, *args, **arrays)
        finally:
            torch.Tensor.backward = backward
        return loss + sum(surrogate - surrogate.detach() for surrogate in surrogates)


def as_loss(by: Any) -> Loss:
    """Whatever stands in the slot `by`, as a probgen loss."""
    from probgen.pyro.elbo import ELBO, IWAE

    if isinstance(by, Loss):
        return by
    if by is None:
        return ELBO()
    if isinstance(by, RenyiELBO):  # its `loss_and_grads` reads numbers; the same bound, which a graph can hold
        return IWAE(by.num_particles, alpha=by.alpha)
    if isinstance(by, TraceEnum_ELBO):
        return ELBO(by.num_particles, kl="sampled")
    if isinstance(by, TraceGraph_ELBO):
        return StockGradients(by)
    if isinstance(by, pyro.infer.ELBO) and hasattr(by, "differentiable_loss"):
        return Stock(by)
    if isinstance(by, pyro.infer.ELBO):
        raise ProbgenError(
            f"{type(by).__name__} has no differentiable loss: it makes its own backward passes; train it with "
            "pyro.infer.SVI, or use probgen.pyro.ELBO()"
        )
    if callable(by):
        return Function(by)
    raise ProbgenError(f"`by` must be a loss, a pyro.infer ELBO or a function loss(model, guide, *args), not {by!r}")


def scheduled(loss: Any, step: Any, *names: str) -> Any:
    """A copy of a loss whose named fields are read at `step`."""
    if not any(callable(getattr(loss, name)) for name in names):
        return loss
    resolved = copy.copy(loss)
    for name in names:
        setattr(resolved, name, value_at(getattr(loss, name), step))
    return resolved
