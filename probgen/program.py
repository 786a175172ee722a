"""A program is a model, a guide where the model has latents, and what it is learned by.

    p(x, z) = model,    q(z | x) = guide,    by = ELBO() | IWAE(k) | EM() | ... | any loss of the PPL's own

Nothing here knows a backend: the loss carries it, and one function, `backend_of`, finds it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from probgen.errors import ProbgenError


@dataclass(frozen=True)
class Origin:
    """Where a program came from: what a run folder keeps so that it can be built again."""

    name: str
    path: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Program:
    """A deep generative model as a probabilistic program, with the way it is learned.

    `model` and `guide` are plain Pyro or NumPyro callables; they are called by keyword with those of the batch's
    arrays that they name. `by` is a probgen loss, or any ELBO or loss function of the PPL's own. `prepare` maps an
    array's name to the step, or steps, done to its raw values before the program sees them; samples are taken back
    and their log-Jacobian is in every likelihood. `defaults` is the recipe used where the caller of `fit` is silent
    (`lr`, `optimizer`, `batch_size`, `epochs`, ...).
    """

    model: Callable[..., Any]
    guide: Callable[..., Any] | None = None
    by: Any = None
    prepare: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    denoiser: Any = None
    origin: Origin = field(default=Origin("program"), repr=False, compare=False)

    def __post_init__(self) -> None:
        for role, value in (("model", self.model), ("guide", self.guide)):
            if value is not None and not callable(value):
                raise ProbgenError(
                    f"Program: `{role}` must be a function or a module that can be called, not {type(value).__name__}"
                )
        steps = {k: tuple(v) if isinstance(v, Sequence) else (v,) for k, v in dict(self.prepare).items()}
        object.__setattr__(self, "prepare", types.MappingProxyType(steps))
        object.__setattr__(self, "defaults", types.MappingProxyType(dict(self.defaults)))

    def learned_by(self, by: Any) -> Program:
        """The same program, learned another way."""
        return replace(self, by=by)


@dataclass(frozen=True)
class Player:
    """One side of a loss: what it trains, and what it minimises.

    Its parameters are those that `callables` touch when run once; in `objective` every other player's are held
    fixed. `objective(model, guide, **arrays)` returns a scalar in nats for all N rows, or a pair of that scalar
    and a mapping of named terms to be logged. One step updates each player `updates` times, every time on a fresh
    batch; `project` maps its unconstrained parameters, elementwise, to allowed ones after each update.
    """

    callables: tuple[Callable[..., Any], ...]
    objective: Callable[..., Any]
    updates: int = 1
    project: Callable[[Any], Any] | None = None


def shared(players: Sequence[Player]) -> tuple[int, Callable[[Any], Any] | None]:
    """Updates and projection of the one player that several of a name are merged into."""
    projections = [player.project for player in players if player.project is not None]

    def project(weights: Any) -> Any:
        for one in projections:
            weights = one(weights)
        return weights

    return max(player.updates for player in players), project if projections else None


def judged(players: Mapping[str, Any]) -> str:
    """The player whose loss says how good the program is: "program" where there is one, else the first."""
    return "program" if "program" in players else next(iter(players))


@dataclass(frozen=True)
class Plate:
    """A plate of a program, as one trace shows it; `data` marks the one as long as the batch."""

    name: str
    size: int
    dim: int | None
    data: bool = False


@dataclass(frozen=True)
class Site:
    """A sample site, as one trace shows it.

    `role` is "latent", "observed", "factor" or "deterministic"; `shape` is the value's shape with the batch in
    front (for a batch of the stated size), of which the last `event_dim` axes are one event; `parents` are the
    sites its distribution depends on directly, and `values` the number of values of a latent marked for enumeration.
    """

    name: str
    role: str
    family: str
    shape: tuple[int, ...]
    event_dim: int
    plates: tuple[Plate, ...] = ()
    support: str = "real"
    discrete: bool = False
    enumerated: bool = False
    values: int = 0
    reparametrised: bool = True
    delta: bool = False
    parents: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        """Whether it lies inside the data plate: one value per datum."""
        return any(plate.data for plate in self.plates)


@dataclass(frozen=True)
class Structure:
    """What one trace tells of a program: its sites in the order they are drawn, and its data plates.

    `model` and `guide` map names to sites. `data_plates` are the names of the plates as long as the batch.
    `states_rows` holds when a plate states N itself, so that nothing is left to scale. `rows_arrays` says of each
    array the program names whether it is "data" (an unconditioned draw does not depend on its values) or "given".
    """

    model: Mapping[str, Site]
    guide: Mapping[str, Site]
    data_plates: tuple[str, ...] = ()
    states_rows: bool = False
    arrays: Mapping[str, str] = field(default_factory=dict)

    @property
    def latents(self) -> dict[str, Site]:
        """The model's latent sites."""
        return {n: s for n, s in self.model.items() if s.role == "latent"}

    @property
    def observed(self) -> dict[str, Site]:
        """The model's data sites."""
        return {n: s for n, s in self.model.items() if s.role == "observed"}

    @property
    def enumerated(self) -> dict[str, Site]:
        """The latents summed out by enumeration in the model."""
        return {n: s for n, s in self.latents.items() if s.enumerated and n not in self.guide}

    @property
    def sampled(self) -> dict[str, Site]:
        """The latents the guide draws."""
        return {n: s for n, s in self.latents.items() if n in self.guide}

    @property
    def unguided(self) -> dict[str, Site]:
        """The latents that nothing accounts for: neither drawn by the guide nor summed out."""
        return {n: s for n, s in self.latents.items() if n not in self.guide and not s.enumerated}

    @property
    def has_global_latents(self) -> bool:
        """Whether some latent lies outside the data plate."""
        return any(not site.local for site in self.latents.values())

    @property
    def kind(self) -> str:
        """ "exact" (no unenumerated latents), "latent", "implicit" (a point-mass data site), "unnormalised"."""
        if any(site.role == "factor" for site in self.model.values()):
            return "unnormalised"
        if any(site.delta for site in self.observed.values()):
            return "implicit"
        return "latent" if any(n not in self.enumerated for n in self.latents) else "exact"

    @property
    def weighed(self) -> bool:
        """Whether draws of the guide have weights: the data a density given them, and no latent is left without a guide."""
        return self.kind != "implicit" and not self.unguided

    def analytic_kl(self) -> tuple[str, ...]:
        """The guide's sites whose KL may be taken in closed form.

        KL(q(z_s | ·) ‖ p(z_s | ·)) replaces log q − log p at site s without bias only if p's distribution there
        depends on nothing that the guide draws at or after s, as it does where the guide runs against the model, and
        on no latent that is summed out.
        """
        order = {name: i for i, name in enumerate(self.guide)}
        exact = []
        for name in self.sampled:
            parents = self.model[name].parents
            open_ended = [p for p in parents if order.get(p, -1) >= order[name] or p in self.enumerated]
            if not open_ended and not self.model[name].enumerated and not self.guide[name].enumerated:
                exact.append(name)
        return tuple(exact)


def arguments(fn: Callable[..., Any], arrays: Mapping[str, Any], like: Callable[..., Any] | None = None) -> dict:
    """The arrays that `fn` is called with, by keyword.

    Those it names; with `*args` or `**kwargs` alone (an autoguide) those that `like` names; a single array binds
    to a single required parameter whatever its name. A required array that is missing is an error.
    """
    named, required, open_ended = _signature(_inspectable(fn))
    if open_ended and not named and like is not None:
        return arguments(like, arrays)
    if open_ended and not named:
        return dict(arrays)
    chosen = {name: arrays[name] for name in named if name in arrays}
    missing = [name for name in required if name not in arrays]
    if missing and len(required) == 1 and len(arrays) == 1:
        return {required[0]: next(iter(arrays.values()))}
    if missing:
        wanted = ", ".join(repr(name) for name in missing)
        there = ", ".join(repr(name) for name in arrays) or "none"
        raise ProbgenError(
            f"`{_name(fn)}` needs the array {wanted}, and the data has {there}: rename the parameter or the array"
        )
    return chosen


def needed(fn: Callable[..., Any], names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Which of the arrays `names`, those it was run with, `fn` cannot be run without."""
    _, required, _ = _signature(_inspectable(fn))
    named = [name for name in names if name in required]
    return named or (list(names) if len(required) == 1 == len(names) else [])


def _inspectable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What carries the signature a user wrote: the `forward` of a module, the method behind a `__call__`."""
    return fn.forward if hasattr(fn, "forward") and not inspect.isfunction(fn) else fn


@functools.lru_cache(maxsize=512)
def _signature(fn: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Names, required names, and whether it takes anything (`*args` / `**kwargs`)."""
    parameters = inspect.signature(fn).parameters.values()
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return tuple(p.name for p in plain), tuple(p.name for p in plain if p.default is p.empty), open_ended


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


_BACKENDS = {
    "pyro": "probgen.pyro",
    "torch": "probgen.pyro",
    "numpyro": "probgen.numpyro",
    "jax": "probgen.numpyro",
}


def backend_of(program: Program, by: Any = None) -> types.ModuleType:
    """The one function that finds the engine behind a loss, stock PPL losses and plain functions included.

    The loss says it by the module it comes from; a plain function, or a program without a loss, by the PPL that
    its own module imports. Returns `probgen.pyro` or `probgen.numpyro`; a missing extra is named.
    """
    for value in (by, program.by, program.model, program.guide):
        found = _backend_name(value)
        if found:
            return load_backend(found)
    raise ProbgenError(
        "cannot tell whether this program is Pyro or NumPyro: say what it is learned by, e.g. "
        "`by=probgen.pyro.ELBO()` or `by=probgen.numpyro.ELBO()`"
    )


def load_backend(module: str) -> types.ModuleType:
    """Import `probgen.pyro` or `probgen.numpyro`, or name the extra that is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = module.removeprefix("probgen.")
        raise ProbgenError(
            f"this program needs `{error.name}`, which is not installed: pip install 'probgen[{extra}]'"
        ) from error


def _backend_name(value: Any) -> str | None:
    if value is None:
        return None
    for cls in type(value).__mro__:
        found = _owner(cls.__module__)
        if found:
            return found
    if isinstance(value, functools.partial):
        return _backend_name(value.func)
    owner = _owner(getattr(value, "__module__", "") or "")
    if owner:
        return owner
    function = inspect.unwrap(getattr(value, "__func__", value))
    if inspect.isfunction(function):
        seen = {_owner(_module_name(g)) for g in _globals_used(function)} - {None}
        if len(seen) == 1:
            return seen.pop()
    return None


def _globals_used(function: types.FunctionType) -> list[Any]:
    """The values of the global names and closure cells in a function and in those defined inside it."""
    values, codes = [], [function.__code__]
    while codes:
        code = codes.pop()
        values += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a name that its function has not bound yet
            continue
    return values


def _module_name(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    return getattr(value, "__module__", None) or type(value).__module__ or ""


def _owner(module: str) -> str | None:
    head, _, rest = module.partition(".")
    if head == "probgen":
        head = rest.partition(".")[0]
        return _BACKENDS.get(head) if head in ("pyro", "numpyro") else None
    if head in ("flax", "equinox", "optax"):
        return "probgen.numpyro"
    return _BACKENDS.get(head)


def rows_of(arrays: Mapping[str, Any]) -> int:
    """How many rows a batch has."""
    return int(np.shape(next(iter(arrays.values())))[0])
