"""What a NumPyro program is learned by: values that add and scale, and say what each of their players minimises.

    ELBO() + 0.1 * mine,        loss.at(step).players(program) -> {name: Player}

A player's `objective(rng_key, params, model, guide, **arrays)` follows NumPyro's own convention: `params` maps names
to constrained parameters (and buffers), `model` and `guide` take the arrays of the batch by keyword, and the data
plate already stands for all N rows. It returns a loss in nats for all N rows; or a pair of that and named terms; or
NumPyro's mapping with "loss", "mutable_state" and, if there are any, "terms".
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer import TraceMeanField_ELBO

from probgen.errors import ProbgenError
from probgen.program import Player, Program, Structure

Result = dict[str, Any]


class Loss:
    """The smallest base: arithmetic, and the defaults of the protocol."""

    def players(self, program: Program) -> dict[str, Player]:
        """Who is trained, and what each minimises."""
        raise ProbgenError(f"{type(self).__name__} names no players: give it a method `players(program)`")

    def at(self, step: Any) -> Loss:
        """The loss with its schedules read at a step, which may be traced."""
        return self

    def check(self, program: Program, structure: Structure) -> None:
        """Refuse, in one sentence, a program that this loss cannot learn."""

    def __add__(self, other: Any) -> Sum:
        return Sum(((1.0, self), (1.0, as_loss(other))))

    def __radd__(self, other: Any) -> Loss:
        return self if isinstance(other, int) and other == 0 else as_loss(other) + self

    def __mul__(self, weight: float) -> Sum:
        return Sum(((weight, self),))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Sum(Loss):
    """Σ weight · loss; players of the same name become one."""

    parts: tuple[tuple[float, Loss], ...]

    def __add__(self, other: Any) -> Sum:
        other = as_loss(other)
        return Sum(self.parts + (other.parts if isinstance(other, Sum) else ((1.0, other),)))

    def __mul__(self, weight: float) -> Sum:
        return Sum(tuple((weight * own, loss) for own, loss in self.parts))

    __rmul__ = __mul__

    def at(self, step: Any) -> Sum:
        """Every part at the step."""
        return Sum(tuple((weight, loss.at(step)) for weight, loss in self.parts))

    def check(self, program: Program, structure: Structure) -> None:
        """Check every part."""
        for _, loss in self.parts:
            loss.check(program, structure)

    def players(self, program: Program) -> dict[str, Player]:
        """The parts' players, those of one name merged."""
        named: dict[str, list[tuple[float, int, Player]]] = {}
        for place, (weight, loss) in enumerate(self.parts):
            for name, player in loss.players(program).items():
                named.setdefault(name, []).append((weight, place, player))
        return {name: _merged(parts) for name, parts in named.items()}

    def loss_with_mutable_state(
        self, rng_key: jax.Array, param_map: dict, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Result:
        """NumPyro's own protocol, for its stock `SVI`."""
        call = _positional(args)
        return _weighted(
            [(w, i, lambda *a, loss=loss, **k: call(loss, *a, **k)) for i, (w, loss) in enumerate(self.parts)],
            rng_key,
            param_map,
            model,
            guide,
            kwargs,
        )

    def loss(self, rng_key: jax.Array, param_map: dict, model: Callable, guide: Callable, *args: Any, **kw: Any) -> Any:
        """The loss alone."""
        return self.loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kw)["loss"]

    @property
    def can_infer_discrete(self) -> bool:
        """Whether every part enumerates discrete latents."""
        return all(getattr(loss, "can_infer_discrete", False) for _, loss in self.parts)


def _positional(args: tuple) -> Callable[..., Result]:
    def call(loss: Any, key: jax.Array, params: dict, model: Callable, guide: Callable, **kwargs: Any) -> Result:
        if not hasattr(loss, "loss_with_mutable_state"):
            raise ProbgenError(f"{type(loss).__name__} has several players: use probgen.fit, not numpyro.infer.SVI")
        return loss.loss_with_mutable_state(key, params, model, guide, *args, **kwargs)

    return call


def _merged(parts: list[tuple[float, int, Player]]) -> Player:
    def objective(key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> Result:
        members = [(weight, place, player.objective) for weight, place, player in parts]
        return _weighted(members, key, params, model, guide, arrays)

    fns = tuple(dict.fromkeys(fn for _, _, player in parts for fn in player.callables))
    return Player(fns, objective, max(player.updates for _, _, player in parts))


def _weighted(
    members: list[tuple[float, int, Callable]],
    key: jax.Array,
    params: dict,
    model: Callable,
    guide: Callable,
    arrays: dict,
) -> Result:
    """Σ weight · objective; the first part draws with the key as it is, so that one part alone is itself."""
    loss, terms, state = jnp.zeros(()), {}, {}
    for weight, place, objective in members:
        own_key = key if place == 0 else jax.random.fold_in(key, place)
        result = as_result(objective(own_key, {**params, **state}, model, guide, **arrays))
        loss += weight * result["loss"]
        for name, term in result["terms"].items():
            terms[name] = terms.get(name, 0.0) + weight * term
        state |= result["mutable_state"] or {}
    return {"loss": loss, "terms": terms, "mutable_state": state or None}


def as_result(value: Any) -> Result:
    """What an objective returned, in its full form."""
    if isinstance(value, Mapping):
        return {"terms": {}, "mutable_state": None, **value}
    loss, terms = value if isinstance(value, tuple) else (value, {})
    return {"loss": loss, "terms": terms, "mutable_state": None}


@dataclass(frozen=True)
class Stock(Loss):
    """A loss of NumPyro's own, or a plain function `loss(rng_key, params, model, guide, *args)`."""

    by: Any

    def players(self, program: Program) -> dict[str, Player]:
        """One player: the model and its guide."""
        return {"program": Player((program.model, program.guide), self._objective)}

    def check(self, program: Program, structure: Structure) -> None:
        """Refuse a mean-field ELBO where its site-by-site KLs are biased."""
        if not isinstance(self.by, TraceMeanField_ELBO):
            return
        exact = structure.analytic_kl()
        biased = [n for n in structure.sampled if n not in exact and not structure.guide[n].delta]
        if biased:
            raise ProbgenError(
                f"TraceMeanField_ELBO is biased on this program: the model's distribution of {biased[0]!r} depends on what "
                "the guide draws after it; use Trace_ELBO() or probgen.numpyro.ELBO()"
            )

    def _objective(self, key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> Result:
        by = copy.copy(self.by)  # TraceEnum_ELBO writes what it guesses into itself
        buffers = [name for name in params if name.endswith("$state")]
        if buffers and hasattr(by, "loss_with_mutable_state"):
            try:
                return as_result(by.loss_with_mutable_state(key, params, model, guide, **arrays))
            except NotImplementedError as error:
                raise ProbgenError(
                    f"{type(by).__name__} does not carry the buffers of {buffers[0].removesuffix('$state')!r} (BatchNorm): "
                    "use Trace_ELBO() or probgen.numpyro.ELBO()"
                ) from error
        value = (by.loss if hasattr(by, "loss") else by)(key, params, model, guide, **arrays)
        return as_result(
            jax.tree.reduce(jnp.add, value) if isinstance(value, Mapping) and "loss" not in value else value
        )


@dataclass(frozen=True)
class Custom(Loss):
    """Anything that names its players, with or without the rest of the protocol."""

    by: Any

    def players(self, program: Program) -> dict[str, Player]:
        """Its own players."""
        return self.by.players(program)

    def at(self, step: Any) -> Custom:
        """At the step, where it knows about steps."""
        return Custom(self.by.at(step)) if hasattr(self.by, "at") else self

    def check(self, program: Program, structure: Structure) -> None:
        """Its own check, where it has one."""
        if hasattr(self.by, "check"):
            self.by.check(program, structure)


def as_loss(by: Any) -> Loss:
    """Any `by` as a loss: probgen's own, an ELBO of NumPyro's, or a plain function."""
    if isinstance(by, Loss):
        return by
    if hasattr(by, "players"):
        return Custom(by)
    if hasattr(by, "loss") or (callable(by) and not inspect.isclass(by)):
        return Stock(by)
    raise ProbgenError(
        f"by={by!r} is not a loss for a NumPyro program: give probgen.numpyro.ELBO(), an ELBO of numpyro.infer, or a "
        "function loss(rng_key, params, model, guide, *args)"
    )
