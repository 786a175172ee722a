"""Zuko's flows as Pyro distributions."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Distribution

from probgen.errors import ProbgenError
from probgen.pyro.distributions.flow import remembered
from probgen.pyro.nn.snapshot import snapshot
from probgen.pyro.quiet_zuko import zuko_module


def zuko_flows() -> types.ModuleType:
    """`zuko.flows`, or the name of the extra that brings it; validation stays as it was."""
    return zuko_module("zuko.flows")


class Zuko(TorchDistribution):
    """p(x | context) of a Zuko flow, or of any other of its lazy distributions.

    Its densities and draws are Zuko's, with gradients to the parameters and to the context. Register the parameters
    with `pyro.module("flow", flow)`. A draw remembers its own density, as in `Flow`.

    Parameters
    ----------
    flow
        `zuko.flows.NSF(2)`, or another `zuko.lazy.LazyDistribution`.
    context
        What the flow is conditioned on, [*batch_shape, C].
    """

    arg_constraints: ClassVar = {}

    def __init__(self, flow: Any, context: Tensor | None = None, validate_args: bool | None = None) -> None:
        if not isinstance(flow, zuko_module("zuko.lazy").LazyDistribution):
            raise ProbgenError(
                f"Zuko takes a flow of Zuko's, such as zuko.flows.NSF(2), and not {type(flow).__name__}: for a transform "
                "use Flow(transform, base)"
            )
        self.fn: Distribution = snapshot(flow)(context)
        self._like = next(flow.parameters(), torch.zeros(()))
        self._drawn = None
        super().__init__(self.fn.batch_shape, self.fn.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients."""
        return self.fn.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """Where the first of the flow's transforms is defined; all of space where there is none, as for mixtures."""
        transform = getattr(self.fn, "transform", None)
        if transform is None:
            return constraints.independent(constraints.real, len(self.event_shape))
        first = next(iter(getattr(transform, "transforms", [transform])))
        if hasattr(first, "passes"):  # a masked network's univariate transforms are made for each x
            with torch.no_grad():
                first = first.meta(self._like.new_zeros(self.event_shape))
        return first.domain

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Zuko:
        """The same distribution with more of a batch."""
        new = self._get_checked_instance(Zuko, _instance)
        new.fn, new._like, new._drawn = self.fn.expand(torch.Size(batch_shape)), self._like, None
        super(Zuko, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x | context), [*batch_shape]."""
        if self._validate_args:
            self._validate_sample(value)
        known = remembered(self._drawn, value)
        return self.fn.log_prob(value) if known is None else known

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws [*sample_shape, *batch_shape, *event_shape]."""
        if not hasattr(self.fn, "rsample_and_log_prob"):
            return self.fn.rsample(torch.Size(sample_shape))
        self._drawn = self.fn.rsample_and_log_prob(torch.Size(sample_shape))
        return self._drawn[0]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self.fn.sample(torch.Size(sample_shape))  # without its density, which takes Zuko a pass more
