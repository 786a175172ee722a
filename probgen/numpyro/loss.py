"""What a NumPyro program is learned by: values that add and scale, and say what each of their players minimises.

    ELBO() + 0.1 * mine,        loss.at(step).players(program) -> {name: Player}

A player's `objective(rng_key, params, model, guide, **arrays)` follows NumPyro's own convention: `params` maps names
to constrained parameters (and buffers), `model` and `guide` take the arrays of the batch by keyword, and the data
plate already stands for all N rows. It returns a loss in nats for all N rows; or a pair of that and named terms; or
NumPyro's mapping with "loss", "mutable_state" and, if there are any, "terms".
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer import TraceMeanField_ELBO

from probgen.adversarial.settings import refuse_one_name
from probgen.errors import ProbgenError
from probgen.program import Player, Program, Structure, arguments, shared
from probgen.schedules import Schedule, value_at

Result = dict[str, Any]


class Loss:
    """What is optimised: it names its players, adds and scales, and never loops.

    A loss of one's own overrides `objective`, or `players` where it has several.
    """

    needs_guide = True  # every latent is drawn by the guide or summed out
    validates = True  # its value on held-out rows says how good the program is

    def objective(self, rng_key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> Any:
        """The loss of a single player on one batch."""
        raise ProbgenError(f"{type(self).__name__} has no objective for a single player: train it with probgen.fit")

    def players(self, program: Program) -> dict[str, Player]:
        """Who trains what; a loss with one player trains the program's model and guide."""
        fns = tuple(fn for fn in (program.model, program.guide) if fn is not None)
        return {"program": Player(fns, self.objective)}

    def check(self, structure: Structure) -> None:
        """Say in one sentence what the program lacks for this loss."""

    def loss_with_mutable_state(
        self, rng_key: jax.Array, param_map: dict, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Result:
        """NumPyro's own protocol, for its stock `SVI`; several players have no place there."""
        players = self.players(Program(model, guide))
        if len(players) > 1:
            raise ProbgenError(f"a loss with the players {', '.join(players)} is trained with probgen.fit, not by SVI")
        return as_result(self.objective(rng_key, param_map, model, guide, *args, **kwargs))

    def loss(self, rng_key: jax.Array, param_map: dict, model: Callable, guide: Callable, *args: Any, **kw: Any) -> Any:
        """The loss alone."""
        return self.loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kw)["loss"]

    def at(self, step: Any) -> Loss:
        """This loss with its schedules read at a step, which may be traced."""
        return self

    def built(self, spec: Mapping[str, Any], seed: int = 0) -> Loss:
        """This loss with the networks that it builds of `spec`, what is known of the data."""
        return self

    def __add__(self, other: Any) -> Sum:
        return Sum(((1.0, self), (1.0, as_loss(other))))

    __radd__ = __add__

    def __mul__(self, factor: float | Schedule) -> Sum:
        return Sum(((factor, self),))

    __rmul__ = __mul__


class Sum(Loss):
    """Σ c_i · loss_i, in which equally named players are one; a coefficient may be a schedule."""

    can_infer_discrete = True

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
        """Every part, and its coefficient, at a step."""
        return Sum(tuple((value_at(c, step), loss.at(step)) for c, loss in self.parts))

    def check(self, structure: Structure) -> None:
        """Each part's own check."""
        for _, loss in self.parts:
            loss.check(structure)

    def players(self, program: Program) -> dict[str, Player]:
        """The players of all parts; those of one name share their parameters and add their objectives."""
        merged: dict[str, list[tuple[Any, int, Player]]] = {}
        for place, (factor, loss) in enumerate(self.parts):
            for name, player in loss.players(program).items():
                merged.setdefault(name, []).append((factor, place, player))
        return {name: _merged(parts) for name, parts in merged.items()}

    def loss_with_mutable_state(
        self, rng_key: jax.Array, param_map: dict, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Result:
        """NumPyro's own protocol, for its stock `SVI`; parts with several players have no place there."""
        return _weighted(
            [(c, i, functools.partial(_in_stock_svi, loss, args)) for i, (c, loss) in enumerate(self.parts)],
            rng_key,
            param_map,
            model,
            guide,
            kwargs,
        )

    def loss(self, rng_key: jax.Array, param_map: dict, model: Callable, guide: Callable, *args: Any, **kw: Any) -> Any:
        """The loss alone."""
        return self.loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kw)["loss"]


def _product(a: Any, b: Any) -> Any:
    if callable(a) or callable(b):
        return lambda step: value_at(a, step) * value_at(b, step)
    return a * b


def _in_stock_svi(loss: Any, args: tuple, key: jax.Array, params: dict, *pair: Callable, **kwargs: Any) -> Any:
    by = getattr(loss, "by", loss)
    for method in ("loss_with_mutable_state", "loss"):
        if hasattr(by, method):
            return getattr(by, method)(key, params, *pair, *args, **kwargs)
    if not isinstance(by, Loss) and callable(by):
        return by(key, params, *pair, *args, **kwargs)
    raise ProbgenError(f"{type(by).__name__} does not run in numpyro.infer.SVI: train it with probgen.fit")


def _merged(parts: list[tuple[float, int, Player]]) -> Player:
    def objective(key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> Result:
        members = [(weight, place, player.objective) for weight, place, player in parts]
        return _weighted(members, key, params, model, guide, arrays)

    fns = tuple(dict.fromkeys(fn for _, _, player in parts for fn in player.callables))
    return Player(fns, objective, *shared([player for _, _, player in parts]))


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

    def check(self, structure: Structure) -> None:
        """A mean-field ELBO is biased where the guide runs against the model, and is refused there."""
        if not isinstance(self.by, TraceMeanField_ELBO):
            return
        exact = structure.analytic_kl()
        biased = [n for n in structure.sampled if n not in exact and not structure.guide[n].delta]
        if biased:
            raise ProbgenError(
                f"TraceMeanField_ELBO takes the KL at {biased[0]!r} in closed form, but the model's distribution there "
                "depends on what the guide draws at or after it, so the bound would be wrong: use Trace_ELBO() or "
                "probgen.numpyro.ELBO()"
            )

    def objective(self, key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> Result:
        """The stock loss, with the modules' new state where it carries one."""
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
        if not hasattr(by, "loss"):  # a plain function gets the arrays that it names
            arrays = arguments(functools.partial(by, key, params, model, guide), arrays)
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

    def check(self, structure: Structure) -> None:
        """Its own check, where it has one."""
        if hasattr(self.by, "check"):
            self.by.check(structure)


def as_loss(by: Any) -> Loss:
    """Any `by` as a loss: probgen's own, an ELBO of NumPyro's, or a plain function."""
    if isinstance(by, Loss):
        return by
    if by is None:
        from probgen.numpyro.elbo import ELBO

        return ELBO()
    if hasattr(by, "players"):
        return Custom(by)
    if hasattr(by, "loss") or (callable(by) and not inspect.isclass(by)):
        return Stock(by)
    raise ProbgenError(
        f"by={by!r} is not a loss for a NumPyro program: give probgen.numpyro.ELBO(), an ELBO of numpyro.infer, or a "
        "function loss(rng_key, params, model, guide, *args)"
    )
