"""The loop of a sampler in torch, and its step compiled.

One step is compiled, never the loop: the weights, the batch and what the schedule says of a step are inputs of its graph, so
that one graph serves all steps but the last, and any weights. Whether it pays is a rule about numbers of multiplications,
not a clock, so that a seed gives the same numbers every time.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from probgen.diffusion.samplers import Sampler
from probgen.pyro import compile as compiler
from probgen.pyro.denoiser import Denoiser

# Multiplications from which compiling pays. On one core a small U-Net takes a minute for as many, of which compiled steps save
# half, and they are ready after 10 to 60 s; a GPU is taken to be a hundred times as fast.
PAYS = {"cpu": 5e11, "cuda": 5e13}
Names = Sequence[str]
Memory = tuple[Tensor, ...]
ChainOf = Callable[[Sequence[Tensor]], contextlib.AbstractContextManager[Denoiser]]


class Steps:
    """`step` and `last` of a sampler as functions of tensors: a row of its table holds what a step is told, by `names`."""

    def __init__(self, sampler: Sampler, chain: Denoiser, names: Names) -> None:
        self.sampler, self.chain, self.names = sampler, chain.guided(sampler.guidance), names

    def step(self, x: Tensor, row: Tensor, noise: Sequence[Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """From x_t to x_s, and what the next step is handed."""
        return self.sampler.step(self.chain, x, self._told(row), noise, memory)

    def last(self, x: Tensor, row: Tensor, noise: Sequence[Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """To the data."""
        return self.sampler.last(self.chain, x, self._told(row), noise, memory), ()

    def _told(self, row: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, row.unbind(), strict=True))


class CompiledSteps:
    """Steps as graphs, each compiled when it is first run; what cannot be compiled runs eagerly and says so once.

    Parameters
    ----------
    sampler
        Whose steps they are.
    chain_of
        A context in which the chain has the tensors that it is given, weights and batch, in their places.
    """

    def __init__(self, sampler: Sampler, chain_of: ChainOf) -> None:
        self.sampler, self.chain_of = sampler, chain_of
        self.note: str | None = None
        self._made: dict[str, Callable[..., Sequence[Tensor]]] = {}

    def on(self, names: Names, held: Sequence[Tensor]) -> CompiledSteps:
        """The same graphs on these tensors."""
        self.names, self.held = names, held
        return self

    def step(self, *state: Any) -> tuple[Tensor, Memory]:
        """From x_t to x_s, and what the next step is handed."""
        return self._run("step", *state)

    def last(self, *state: Any) -> tuple[Tensor, Memory]:
        """To the data."""
        return self._run("last", *state)

    def _run(
        self, which: str, x: Tensor, row: Tensor, noise: Sequence[Tensor], memory: Memory
    ) -> tuple[Tensor, Memory]:
        inputs = [*self.held, x, row, *noise, *memory]
        if which not in self._made:
            self._made[which] = self._compiled(which, inputs)
        x, *memory = self._made[which](*inputs)
        return x, tuple(memory)

    def _compiled(self, which: str, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        function, cuda = self._function(which), inputs[-1].device.type == "cuda"
        try:
            run = compiler.lowered(compiler.traced(function, inputs), inputs, cuda)
        except Exception as error:  # whatever the tracer, Inductor or the network raises, eager still runs
            if self.note is None:
                name = type(self.sampler).__name__
                self.note = f"a step of {name} cannot be compiled ({_first_line(error)}), so it runs eagerly"
                warnings.warn(self.note, stacklevel=2)
            return function
        # a replayed graph writes its outputs to the same place every time
        return (lambda *inputs: [value.clone() for value in run(*inputs)]) if cuda else run

    def _function(self, which: str) -> Callable[..., tuple[Tensor, ...]]:
        count, names, noises = len(self.held), tuple(self.names), self.sampler.noises

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            given = iter(inputs)
            with self.chain_of(list(islice(given, count))) as chain:
                x, row, noise = next(given), next(given), list(islice(given, noises))
                x, memory = getattr(Steps(self.sampler, chain, names), which)(x, row, noise, tuple(given))
            return x, *memory

        return function


class Products(TorchDispatchMode):
    """How many multiplications the matrix products and convolutions take that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found, aten = func(*args, **(kwargs or {})), torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default):
            self.count += found.numel() * args[0].shape[-1]
        elif func in (aten.addmm.default, aten.baddbmm.default):
            self.count += found.numel() * args[1].shape[-1]
        elif func is aten.convolution.default:
            spread = args[0] if args[6] else found  # a transposed one multiplies every input
            self.count += spread.numel() * args[1][0].numel()
        return found


def sampled(
    chain: Denoiser,
    sampler: Sampler,
    start: Tensor,
    compiled: Callable[[Names], CompiledSteps] | None = None,
    compile: bool | None = None,
) -> Tensor:
    """From x_1 = `start` to data as the chain sees them, [B, *shape], with torch's random numbers.

    Parameters
    ----------
    compiled
        Of the names of the table, the steps as they are to be compiled; without it they run eagerly.
    compile
        Whether they are; None: after the first step, if what is left to multiply is as much as `PAYS` says.
    """
    table = sampler.numbers(chain)
    names, columns = list(table), torch.as_tensor(np.stack(list(table.values()), 1), dtype=start.dtype)
    *rows, end = columns.to(start.device).unbind()
    steps: Steps | CompiledSteps = Steps(sampler, chain, names)
    if compiled is not None and compile:
        steps = compiled(names)
    x, memory = start, sampler.start(start)
    for i, row in enumerate(rows):
        noise = [torch.randn_like(x) for _ in range(sampler.noises)]
        if i or compiled is None or compile is not None:
            x, memory = steps.step(x, row, noise, memory)
            continue
        with Products() as seen:
            x, memory = steps.step(x, row, noise, memory)
        if seen.count * len(rows) >= PAYS.get(start.device.type, math.inf):
            steps = compiled(names)
    return steps.last(x, end, [torch.randn_like(x) for _ in range(sampler.noises)], memory)[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
