"""Optimizers as functions on one flat vector of parameters, so that a whole step, update included, is one graph.

An optimizer is a name ("adam"), a class or partial of `torch.optim`, or one of `pyro.optim`; each is read as one of
the update rules below with its own options. The learning rate is an input of the graph, never frozen in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from probgen.errors import ProbgenError, did_you_mean
from probgen.play import IN_TURN, Optimistic, play_of

Slots = tuple[Tensor, ...]


@dataclass(frozen=True)
class Optimizer:
    """An update rule with its options: `update(p, g, slots, t, lr) -> (p, slots)`, t counted from 1."""

    name: str
    slots: int
    rule: Callable[..., tuple[Tensor, Slots]]
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    play: str = IN_TURN

    def start(self, params: Tensor) -> Slots:
        """The optimizer's own state before the first step: zeros."""
        return tuple(torch.zeros_like(params) for _ in range(self.slots))

    def update(self, p: Tensor, g: Tensor, slots: Slots, t: Tensor, lr: Tensor) -> tuple[Tensor, Slots]:
        """One step of minimisation."""
        return self.rule(p, g, slots, t, lr, **self.options)


def _adam(p: Tensor, g: Tensor, slots: Slots, t: Tensor, lr: Tensor, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):  # noqa: ANN001
    """Kingma & Ba, arXiv:1412.6980."""
    g = g + weight_decay * p if weight_decay else g
    m = torch.lerp(g, slots[0], betas[0])
    v = torch.lerp(g * g, slots[1], betas[1])
    return p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps), (m, v)


def _adamw(p: Tensor, g: Tensor, slots: Slots, t: Tensor, lr: Tensor, *, weight_decay=1e-2, **options):  # noqa: ANN001
    """Loshchilov & Hutter, arXiv:1711.05101."""
    return _adam(p * (1 - lr * weight_decay), g, slots, t, lr, **options)


def _sgd(p: Tensor, g: Tensor, slots: Slots, t: Tensor, lr: Tensor, *, momentum=0.0, nesterov=False, weight_decay=0.0):  # noqa: ANN001
    g = g + weight_decay * p if weight_decay else g
    velocity = momentum * slots[0] + g
    return p - lr * (g + momentum * velocity if nesterov else velocity), (velocity,)


def _adagrad(p: Tensor, g: Tensor, slots: Slots, t: Tensor, lr: Tensor, *, eps=1e-10):  # noqa: ANN001
    total = slots[0] + g * g
    return p - lr * g / (total.sqrt() + eps), (total,)


def _rmsprop(p: Tensor, g: Tensor, slots: Slots, t: Tensor, lr: Tensor, *, alpha=0.99, eps=1e-8):  # noqa: ANN001
    square = torch.lerp(g * g, slots[0], alpha)
    return p - lr * g / (square.sqrt() + eps), (square,)


def _clippedadam(
    p: Tensor, g: Tensor, slots: Slots, t: Tensor, lr: Tensor, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,  # noqa: ANN001
    clip_norm=10.0, lrd=1.0,  # noqa: ANN001
):  # fmt: skip
    """Pyro's: gradients clipped by value, the learning rate decaying by a factor a step."""
    g = g.clamp(-clip_norm, clip_norm)
    g = g + weight_decay * p if weight_decay else g
    m = torch.lerp(g, slots[0], betas[0])
    v = torch.lerp(g * g, slots[1], betas[1])
    rate = lr * lrd**t * (1 - betas[1] ** t).sqrt() / (1 - betas[0] ** t)
    return p - rate * m / (v.sqrt() + eps), (m, v)


# What torch's optimizers call the state that each rule keeps in its slots.
_STOCK_SLOTS = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "clippedadam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "adagrad": ("sum",),
    "rmsprop": ("square_avg",),
}
_RULES = {
    "clippedadam": Optimizer("clippedadam", 2, _clippedadam),
    "adam": Optimizer("adam", 2, _adam),
    "adamw": Optimizer("adamw", 2, _adamw),
    "sgd": Optimizer("sgd", 1, _sgd),
    "adagrad": Optimizer("adagrad", 1, _adagrad),
    "rmsprop": Optimizer("rmsprop", 1, _rmsprop),
}
# Options of torch's constructors that change nothing here, at their defaults or at all.
_IGNORED = {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


def optimizer(choice: Any) -> Optimizer:
    """The update rule behind a name, a torch optimizer (class or partial) or a `pyro.optim` one.

    Raises `ProbgenError` for a rule or an option that has no counterpart here.
    """
    if isinstance(choice, Optimizer):
        return choice
    play, inner = play_of(choice)
    if play != IN_TURN:
        found = optimizer(inner)
        return replace(_optimistic(found) if play == Optimistic.name else found, play=play)
    name, options = _read(choice)
    if name not in _RULES:
        raise ProbgenError(f"no optimizer {name!r}{did_you_mean(name, _RULES)}")
    options = {key: value for key, value in options.items() if key not in _IGNORED}
    lr = options.pop("lr", None)
    known = _options(_RULES[name].rule) | (_options(_adam) if name == "adamw" else set())
    unknown = [key for key, value in options.items() if key not in known and value]
    if unknown:
        raise ProbgenError(f"{name} takes no option {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    kept = {key: value for key, value in options.items() if key in known}
    return Optimizer(name, _RULES[name].slots, _RULES[name].rule, kept, lr)


def _optimistic(inner: Optimizer) -> Optimizer:
    """Twice the step of a rule, less the one before, which is one more slot."""

    def rule(p: Tensor, g: Tensor, slots: Slots, t: Tensor, lr: Tensor) -> tuple[Tensor, Slots]:
        after, own = inner.update(p, g, slots[:-1], t, lr)
        step = after - p
        before = torch.where(t == 1, step, slots[-1])
        return after + step - before, (*own, step)

    return Optimizer(f"optimistic-{inner.name}", inner.slots + 1, rule, {}, inner.lr)


def _options(rule: Callable[..., Any]) -> set[str]:
    return set(rule.__kwdefaults__ or ())


def _read(choice: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(choice, str):
        return choice.lower(), {}
    if isinstance(choice, functools.partial):
        name, options = _read(choice.func)
        return name, {**options, **choice.keywords}
    constructor = getattr(choice, "pt_optim_constructor", None)  # pyro.optim
    if constructor is not None and isinstance(choice.pt_optim_args, dict):
        return constructor.__name__.lower(), dict(choice.pt_optim_args)
    if isinstance(choice, type) and issubclass(choice, torch.optim.Optimizer):
        return choice.__name__.lower(), {}
    if isinstance(choice, torch.optim.Optimizer) and len(choice.param_groups) == 1:
        group = {key: value for key, value in choice.param_groups[0].items() if key not in ("params", "initial_lr")}
        return type(choice).__name__.lower(), group
    raise ProbgenError(
        f"optimizer must be one of {', '.join(_RULES)}, a torch.optim class or a partial of one, not {choice!r}"
    )


def stock_optimizer(choice: Any) -> PyroOptim:
    """The same choice as an optimizer of `pyro.optim`, which keeps one torch optimizer for each parameter."""
    if isinstance(choice, PyroOptim):
        return choice
    if isinstance(choice, torch.optim.Optimizer):
        _, options = _read(choice)
        return PyroOptim(type(choice), options)
    if isinstance(choice, functools.partial):
        return PyroOptim(choice.func, dict(choice.keywords))
    if isinstance(choice, type):
        return PyroOptim(choice, {})
    raise ProbgenError(
        f"SVI takes an optimizer of pyro.optim, or a torch.optim class, partial or optimizer, not {choice!r}"
    )


def stock_slots(stock: PyroOptim, rule: Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    """What Pyro's optimizers have gathered for these parameters so far, as flat slots of `rule`."""
    states = [(p, stock.optim_objs[p].state.get(p, {}) if p in stock.optim_objs else {}) for p in params]
    return [torch.cat([_gathered(state, key, p).reshape(-1) for p, state in states]) for key in _STOCK_SLOTS[rule.name]]


def _gathered(state: Mapping[str, Any], key: str, like: Tensor) -> Tensor:
    value = state.get(key)
    return torch.zeros_like(like) if value is None else value.detach().clone()
