"""`SVI`: Pyro's own, with the whole step compiled. A script gains it by one import line:

from probgen.pyro import SVI
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from probgen.pyro.leaves import collect
from probgen.pyro.loss import as_loss, with_terms
from probgen.pyro.optim import optimizer, stock_optimizer, stock_slots
from probgen.pyro.step import Step, Trainee


class SVI(pyro.infer.SVI):
    """`pyro.infer.SVI` whose `step` runs loss, gradients and optimizer as one compiled graph.

    Parameter store, modules, random stream and losses are the stock ones, to rounding. The first step is Pyro's own
    (it makes the parameters), the second compiles, and so does each new shape of the arguments. `optim` is one of
    `pyro.optim`, a `torch.optim` class or partial, or a torch optimizer (with one group of options). What cannot be
    compiled runs as Pyro's own step does, which is said once. `compile=False` is Pyro's SVI.
    """

    def __init__(
        self, model: Callable, guide: Callable, optim: Any, loss: Any, compile: bool = True, **options: Any
    ) -> None:
        self._optim, self._loss, self._compile = optim, as_loss(loss), compile
        super().__init__(model, guide, stock_optimizer(optim), loss, **options)
        self._compiled: dict[tuple, Callable[..., Any]] = {}
        self._step: Step | None = None
        self._rate: Tensor | None = None
        self._t = 0

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One gradient step on these arguments; returns the loss."""
        self._t += 1
        if not self._compile or self._t == 1:
            return super().step(*args, **kwargs)
        key = tuple(_kind(value) for value in (*args, *sorted(kwargs.items())))
        inputs = {i: value for i, value in (*enumerate(args), *kwargs.items()) if isinstance(value, Tensor)}
        clock = torch.tensor(float(self._t - 1))
        if key not in self._compiled:
            try:
                self._compiled[key] = self._compile_for(args, kwargs, inputs, clock)
            except Exception as error:  # whatever the tracer, Inductor or the program raises, Pyro's own step runs
                warnings.warn(f"this step cannot be compiled ({error}), so it runs as Pyro's own", stacklevel=2)
                self._compile = False
                return super().step(*args, **kwargs)
        with torch.no_grad():
            _, metrics = self._compiled[key](self._state, clock, self._lr(), [inputs])
        return metrics["loss"].item()

    def _compile_for(self, args: tuple, kwargs: dict[str, Any], inputs: dict, clock: Tensor) -> Callable[..., Any]:
        if self._step is None:
            with torch.random.fork_rng(), torch.no_grad():
                run = functools.partial(self.loss, self.model, self.guide, *args, **kwargs)
                self._leaves = collect(run, (self.model, self.guide), private=False)
            trainee = Trainee(tuple(self._leaves.params), optimizer(self._optim))
            self._step = Step(self._leaves, {"program": trainee}, self._objective)
            self._state = self._step.start(self._leaves.values())
            slots = stock_slots(self.optim, trainee.optimizer, self._leaves.params.values())
            self._state |= {f"slots/program/{i}": slot for i, slot in enumerate(slots)}
            for name, view in self._step.values(self._state).items():
                self._leaves.values()[name].data = view
        self._arguments = args, kwargs  # those that are no tensors are part of the graph
        # In place: the store and the modules hold views of the state.
        return self._step.compiled(self._state, clock, self._lr(), [inputs], in_place=True)

    def _objective(self, _: str, values: dict[str, Tensor], batch: dict[Any, Tensor], t: Tensor) -> tuple:
        args, kwargs = self._arguments
        args = [batch.get(i, value) for i, value in enumerate(args)]
        kwargs = {name: batch.get(name, value) for name, value in kwargs.items()}
        with self._leaves.substituted(values, training=None):
            return with_terms(self._loss.at(t).objective(self.model, self.guide, *args, **kwargs))

    def _lr(self) -> Tensor:
        """The learning rate, [1]; that of a torch optimizer is read anew, since its scheduler may change it."""
        if self._rate is None or isinstance(self._optim, torch.optim.Optimizer):
            lr = optimizer(self._optim).lr
            self._rate = torch.tensor([1e-3 if lr is None else lr])
        return self._rate


def _kind(value: Any) -> Any:
    """What a compiled step depends on of an argument: shape and dtype of a tensor, the value of anything else."""
    if isinstance(value, tuple):
        return tuple(_kind(part) for part in value)
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else repr(value)
