"""A distribution through a bijection: data on one side, a base whose density is known on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform
from torch.distributions.transforms import _InverseTransform

from probgen.flow_shapes import refuse_misfit
from probgen.pyro.nn.snapshot import snapshot
from probgen.pyro.transforms.bijection import call_and_ladj, inverse_and_ladj


class Flow(TorchDistribution):
    """x with f(x) ~ base:   log p(x) = log p_base(f(x)) + log |det ∂f/∂x|.

    One pass gives value and log-determinant, where Pyro's `TransformedDistribution` makes two or keeps caches. A draw
    remembers its own density, so that a guide need not invert what it has just drawn. For a flow that is written from
    the base to the data give `f.inv`.

    Parameters
    ----------
    transform
        f, from data to base: one of `probgen.pyro.transforms`, of Pyro's or of torch's.
    base
        The distribution of f(x); what it lacks in event axes is made of its batch.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, transform: Transform, base: Distribution, validate_args: bool | None = None) -> None:
        wanted = transform.codomain.event_dim
        refuse_misfit(type(transform).__name__, wanted, base.batch_shape, base.event_shape)
        missing = wanted - len(base.event_shape)
        self.base_dist = torch.distributions.Independent(base, missing) if missing else base
        self.transform, self._drawn = held(transform), None
        shape = self.transform.inverse_shape(self.base_dist.event_shape)
        super().__init__(self.base_dist.batch_shape, torch.Size(shape), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients: if the base's do."""
        return self.base_dist.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """Where f is defined."""
        return self.transform.domain

    def outside(self, value: Tensor) -> Tensor | None:
        """An entry of f(x) that lies outside the support of the base, where no density is; None if there is none."""
        support = self.base_dist.support
        if getattr(support, "base_constraint", support) is constraints.real:
            return None
        z = call_and_ladj(self.transform, value)[0]
        away = z[~support.check(z)]
        return (
            away.flatten()[~getattr(support, "base_constraint", support).check(away).flatten()][0]
            if len(away)
            else None
        )

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Flow:
        """The same distribution with more of a batch."""
        new = self._get_checked_instance(Flow, _instance)
        new.base_dist, new.transform, new._drawn = self.base_dist.expand(batch_shape), self.transform, None
        super(Flow, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log p_base(f(x)) + log |det ∂f/∂x|, [*batch_shape]."""
        if self._validate_args:
            self._validate_sample(value)
        known = remembered(self._drawn, value)
        if known is not None:
            return known
        z, ladj = call_and_ladj(self.transform, value)
        return self.base_dist.log_prob(z) + ladj

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws f⁻¹(z) with z from the base, [*sample_shape, *batch_shape, *event_shape]."""
        return self._of(self.base_dist.rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self._of(self.base_dist.sample(torch.Size(sample_shape)))

    def _of(self, z: Tensor) -> Tensor:
        x, ladj = inverse_and_ladj(self.transform, z)
        self._drawn = x, self.base_dist.log_prob(z) - ladj
        return x


def held(transform: Transform) -> Transform:
    """A transform as it stands: a density is computed after its program has run, when its weights may be others'."""
    if isinstance(transform, _InverseTransform):
        return _InverseTransform(held(transform.inv))
    if isinstance(transform, ComposeTransform):
        return ComposeTransform([held(part) for part in transform.parts])
    return snapshot(transform) if isinstance(transform, nn.Module) else transform


def remembered(drawn: tuple[Tensor, Tensor] | None, value: Tensor) -> Tensor | None:
    """The density of a value that is the last draw itself, if it carries the gradients that are asked for."""
    if drawn is None or drawn[0] is not value or (torch.is_grad_enabled() and not drawn[1].requires_grad):
        return None
    return drawn[1]
