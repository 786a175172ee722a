"""From a Pyro step to one compiled graph: traced below the effect handlers, lowered with Inductor.

The program runs once under `make_fx` with its leaves, buffers, optimizer state and data as inputs. What the stock
losses read as Python numbers while they build a loss is kept as a detached tensor during the trace only; a program's
own `.item()` still raises, and the engine then runs eagerly and says so once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import trace_elbo, trace_mean_field_elbo, tracegraph_elbo
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def traced(step: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    """The graph of `step`, a function of tensors alone; draws no number from the caller's generators."""
    with torch.random.fork_rng(), _readable_losses(), pyro.validation_enabled(False), torch.no_grad():
        graph = make_fx(step)(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def lowered(graph: GraphModule, inputs: Sequence[Tensor], cuda: bool = False) -> Callable[..., Sequence[Tensor]]:
    """The graph compiled by Inductor, with eager's own random stream; on CUDA replayed as a CUDA graph."""
    config = {"fallback_random": True, "triton.cudagraphs": cuda}
    with torch.random.fork_rng(), torch.no_grad():
        return torch._inductor.compile(graph, list(inputs), options=config)


@contextlib.contextmanager
def _readable_losses() -> Iterator[None]:
    """While tracing, stock ELBOs hold a detached tensor where they would read a float, and skip NaN warnings."""

    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    def silent(*_: Any, **__: Any) -> None:
        return None

    modules = (trace_elbo, trace_mean_field_elbo, tracegraph_elbo)
    saved = [(m, name, getattr(m, name)) for m in modules for name in ("torch_item", "warn_if_nan") if hasattr(m, name)]
    try:
        for module, name, _ in saved:
            setattr(module, name, detached if name == "torch_item" else silent)
        yield
    finally:
        for module, name, original in saved:
            setattr(module, name, original)
