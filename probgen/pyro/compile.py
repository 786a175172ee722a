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
from torch.overrides import TorchFunctionMode


def traced(step: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    """The graph of `step`, a function of tensors alone; draws no number from the caller's generators."""
    with torch.random.fork_rng(), _readable(), pyro.validation_enabled(False), torch.no_grad(), _OneHot():
        graph = make_fx(step)(*inputs)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.bernoulli.default:  # Inductor would draw it from uniform numbers of its own
            node.target, node.args = torch.ops.aten.bernoulli.Tensor, (node.args[0], node.args[0])
        if node.target is torch.ops.aten.view.default:  # Inductor lays out convolutions anew, where no view may be left
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph


def written_back(graph: GraphModule, count: int) -> None:
    """Write the first `count` outputs into the first `count` inputs, and return the others alone."""
    places = [node for node in graph.graph.nodes if node.op == "placeholder"][:count]
    output = graph.graph.output_node()
    values = output.args[0]
    with graph.graph.inserting_before(output):
        for place, value in zip(places, values, strict=False):
            if value is not place:
                graph.graph.call_function(torch.ops.aten.copy_.default, (place, value))
    output.args = (tuple(values[count:]),)
    graph.recompile()


def lowered(graph: GraphModule, inputs: Sequence[Tensor], cuda: bool = False) -> Callable[..., Sequence[Tensor]]:
    """The graph compiled by Inductor, with eager's own random stream; on CUDA replayed as a CUDA graph."""
    config = {"fallback_random": True, "triton.cudagraphs": cuda}
    if (
        not cuda
    ):  # channels last, at which Inductor guesses, is slower on CPUs for a convolution and its gradient in one graph
        config["layout_optimization"] = False
    count = len(graph.graph.output_node().args[0])
    unused = _draws_kept(graph)
    with torch.random.fork_rng(), torch.no_grad():
        run = torch._inductor.compile(graph, list(inputs), options=config)
    return (lambda *args: run(*args)[:count]) if unused else run


def _draws_kept(graph: GraphModule) -> int:
    """Return the draws that nothing reads too: Inductor would drop them, and the stream would go on elsewhere."""
    seeded = torch.Tag.nondeterministic_seeded
    calls = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    unused = [node for node in calls if seeded in node.target.tags and not node.users]
    output = graph.graph.output_node()
    output.args = ((*output.args[0], *unused),)
    graph.recompile()
    return len(unused)


class _OneHot(TorchFunctionMode):
    """While tracing, `one_hot` with a stated number of classes does not look at its labels."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.one_hot:
            labels, classes = (*args, *kwargs.values())[:2] if len(args) + len(kwargs) > 1 else (args[0], -1)
            if classes > 0:
                return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).to(torch.int64)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """While tracing, stock ELBOs hold a detached tensor where they would read a float, and nothing checks values.

    Distributions made before the trace (a prior in a closure, a `PyroSample`) carry a validation of their own.
    """

    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    def silent(*_: Any, **__: Any) -> None:
        return None

    modules = (trace_elbo, trace_mean_field_elbo, tracegraph_elbo)
    replaced = [(m, "torch_item", detached) for m in modules] + [(m, "warn_if_nan", silent) for m in modules]
    replaced = [(m, name, new) for m, name, new in replaced if hasattr(m, name)]
    replaced.append((torch.distributions.Distribution, "_validate_sample", silent))
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, new in replaced:
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)
