"""A distribution over vectors and images as a product of conditionals, each on what was drawn before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import Distribution, TorchDistribution, constraints
from torch import Tensor

from probgen.causal import known_prefix, permutation, refuse_misfit
from probgen.errors import ProbgenError
from probgen.pyro.nn.snapshot import snapshot


class Autoregressive(TorchDistribution):
    """p(x | context) = Π_d p(x_d | x_<d, context), with x_1..x_D the entries of x in a given order.

    A log density is one pass of the network. A draw goes through the entries in blocks: within a block it repeats
    x ← draw(θ(x)) with the same random numbers until nothing changes, which is the sequential draw exactly after at
    most as many passes as the block has entries, and mostly after a few (Song et al., arXiv:2002.03629).

    Parameters
    ----------
    network
        A causal network such as `probgen.pyro.nn.MADE`: x [*, D] in the order of drawing → θ [*, D, P].
    conditional
        θ [*, P] → the distribution of single entries, [*]: `lambda theta: Bernoulli(logits=theta[..., 0])`.
    event_shape
        The shape of x; D is the number of its entries.
    order
        Flat positions in the order of drawing (`probgen.causal.drawing_order`); row by row if left out.
    context
        What the network reads beside x, [*batch_shape, C].
    block
        Entries drawn together. A family whose draws use up a varying amount of random numbers (Gamma, Poisson) needs
        `block=1`.
    """

    arg_constraints: ClassVar = {}
    has_rsample = False

    def __init__(
        self,
        network: Callable[..., Tensor],
        conditional: Callable[[Tensor], Distribution],
        event_shape: Sequence[int],
        *,
        order: Sequence[int] | None = None,
        context: Tensor | None = None,
        block: int = 56,
        validate_args: bool | None = None,
    ) -> None:
        self.network, self.conditional, self.context, self.block = snapshot(network), conditional, context, block
        self.size = math.prod(event_shape)
        refuse_misfit(network.size, network.context, event_shape, None if context is None else context.shape[-1])
        self.order = torch.from_numpy(permutation(order, event_shape))
        batch_shape = torch.Size(()) if context is None else context.shape[:-1]
        super().__init__(batch_shape, torch.Size(event_shape), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Autoregressive:
        """The same distribution with more of a batch."""
        new = self._get_checked_instance(Autoregressive, _instance)
        new.__dict__.update(self.__dict__)
        if self.context is not None:
            new.context = self.context.expand(*batch_shape, -1)
        new._batch_shape = torch.Size(batch_shape)
        return new

    @property
    def support(self) -> constraints.Constraint:
        """That of the conditionals, for every entry."""
        theta = torch.zeros(self.network.outputs)
        return constraints.independent(self.conditional(theta).support, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Σ_d log p(x_d | x_<d), [*batch_shape]; one pass of the network."""
        if self._validate_args:
            self._validate_sample(value)
        x = self._in_order(value)
        lead = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        return self.conditional(self.network(x, self.context)).log_prob(x).sum(-1).expand(lead)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws [*sample_shape, *batch_shape, *event_shape]."""
        return self._drawn(torch.Size((*sample_shape, *self.batch_shape)), None)

    def complete(self, value: Tensor) -> Tensor:
        """`value` with its NaNs drawn given the rest, exactly; in every row the known entries come first in the order.

        Raises:
            ProbgenError: a known entry after an unknown one, another shape, or a known value outside the support.
        """
        if value.shape[value.dim() - len(self.event_shape) :] != self.event_shape:
            raise ProbgenError(
                f"complete: the values have the shape {list(value.shape)}, and an event has {list(self.event_shape)}"
            )
        held = self._in_order(value)
        known = ~held.isnan()
        base = self.support.base_constraint
        if not bool(base.check(held[known]).all()):
            raise ProbgenError(f"complete: a known value lies outside the support {base}")
        lead = torch.broadcast_shapes(held.shape[:-1], self.batch_shape)
        return self._drawn(lead, held.expand(*lead, -1), known_prefix(known.cpu().numpy()))

    # -- drawing --------------------------------------------------------------------------------------------------

    def _drawn(self, lead: torch.Size, held: Tensor | None, first: int = 0) -> Tensor:
        """Draws [*lead, *event_shape] with what `held` [*lead, D] knows kept; the first so many entries are all known."""
        parts = []
        with torch.no_grad(), pyro.validation_enabled(False):  # tentative values may have any parameters
            known = self.network.start(lead, self.context)
            if first:
                parts.append(held[..., :first])
                known = _longer(known, self.network.ahead(known, first)(parts[0])[1])
            for i in range(first, self.size, self.block):
                n = min(self.block, self.size - i)
                part, new = self._settled(self.network.ahead(known, n), n, known[0], _columns(held, i, n))
                parts.append(part)
                known = _longer(known, new)
        x = torch.cat([part.to(parts[-1].dtype) for part in parts], -1)
        return x[..., torch.argsort(self.order).to(x.device)].reshape(*lead, *self.event_shape)

    def _settled(self, look: Callable[[Tensor], Any], n: int, like: Tensor, held: Tensor | None) -> tuple[Tensor, Any]:
        """The next n values, the fixed point of x ← draw(θ(x)) with the same random numbers, and the units they settle.

        After k passes the first k values are final, since each depends on those before it alone.
        """
        generator = _generator(like.device)
        random, x = generator.get_state(), like.new_zeros((*like.shape[:-1], n))
        for _ in range(n + 1):
            generator.set_state(random)
            theta, new = look(x.nan_to_num())
            fn = self.conditional(theta)
            value = fn.rsample() if fn.has_rsample else fn.sample()
            if held is not None:
                value = torch.where(held.isnan(), value.to(held.dtype), held)
            before, x = x, value.to(like.dtype)
            if torch.equal(before, x):
                break
        return value, new

    def _in_order(self, value: Tensor) -> Tensor:
        """value [*, *event_shape] → [*, D] in the order of drawing, in floats."""
        flat = value.reshape(*value.shape[: value.dim() - len(self.event_shape)], self.size)
        flat = flat if flat.is_floating_point() else flat.to(torch.get_default_dtype())
        return flat[..., self.order.to(flat.device)]


def _longer(known: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pair, -1) for pair in zip(known, new, strict=True)]


def _columns(held: Tensor | None, first: int, n: int) -> Tensor | None:
    return None if held is None else held[..., first : first + n]


def _generator(device: torch.device) -> torch.Generator:
    """The generator that draws on a device."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
