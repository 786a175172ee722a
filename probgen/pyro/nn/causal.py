"""Causal networks: a sequence x_1..x_D in, the parameters of every p(x_d | x_<d) out, in one pass or bit by bit.

Beside the call a causal network has `start` and `ahead`, with which a draw computes each unit once:

    known = network.start(batch_shape, context)
    look = network.ahead(known, n)                  # the next n positions
    theta, new = look(x)                            # x [*, n] → θ [*, n, P], and the units that these values settle
    known = [torch.cat(pair, -1) for pair in zip(known, new)]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probgen.causal import hidden_degrees
from probgen.errors import ProbgenError

Look = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


class Masked(nn.Linear):
    """A linear layer in which a unit reads only units whose degree is not above its own."""

    def __init__(self, reads: np.ndarray, units: np.ndarray, bias: bool = True) -> None:
        super().__init__(len(reads), len(units), bias)
        self.register_buffer("mask", torch.from_numpy(units[:, None] >= reads))

    def forward(self, x: Tensor) -> Tensor:
        """x [*, reads] → [*, units]."""
        return F.linear(x, self.weight * self.mask, self.bias)

    def piece(self, units: slice, reads: slice) -> Tensor:
        """The weights of some of the units on some of what they read."""
        return self.weight[units, reads] * self.mask[units, reads]


class MADE(nn.Module):
    """Masked autoencoder (Germain et al., arXiv:1502.03509) with direct connections from the inputs to the outputs.

        h_l = ReLU((W_l ⊙ M_l) h_{l−1} + b_l),   θ = (V ⊙ M) h_L + (A ⊙ T) x + c,   T strictly lower-triangular

    x [*, D] → θ [*, D, P], where θ_d depends on x_1..x_{d−1} and on the context alone. Without hidden layers, and that
    is the default, these are D logistic (or linear) regressions, each on the values before its own: the fully visible
    sigmoid belief network (Neal, 1992; Frey, 1998). Direct weights start near zero.

    Parameters
    ----------
    size
        D, the length of the sequence.
    outputs
        P, the parameters of one conditional.
    hidden
        Units of each hidden layer.
    context
        Length of a further input that every unit may read.
    levels
        Values 0..levels − 1 are read as numbers in −1..1; without it they are read as they are.
    """

    def __init__(
        self, size: int, outputs: int = 1, hidden: Sequence[int] = (), context: int = 0, levels: int | None = None
    ) -> None:
        super().__init__()
        if size < 1 or outputs < 1:
            raise ProbgenError(f"MADE(size={size}, outputs={outputs}) computes nothing; both must be at least 1")
        self.size, self.outputs, self.context, self.levels = size, outputs, context, levels
        inputs = np.concatenate([np.zeros(context, int), np.arange(1, size + 1)])
        results = np.repeat(np.arange(size), outputs)
        self.degrees = [inputs, *(hidden_degrees(size, units) for units in hidden)]
        self.hidden = nn.ModuleList(Masked(reads, units) for reads, units in pairwise(self.degrees))
        self.direct = Masked(inputs, results)
        nn.init.normal_(self.direct.weight, std=1e-3)  # many small random weights on few rows would never be unlearned
        self.out = Masked(self.degrees[-1], results, bias=False) if hidden else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [*, D], context [*, C] → θ [*, D, P]."""
        h = inputs = self._inputs(self.scaled(x), context)
        for layer in self.hidden:
            h = F.relu(layer(h))
        theta = self.direct(inputs) if self.out is None else self.direct(inputs) + self.out(h)
        return theta.unflatten(-1, (self.size, self.outputs))

    def scaled(self, x: Tensor) -> Tensor:
        """The values as the units read them."""
        return x if self.levels is None else x * (2 / (self.levels - 1)) - 1

    def _inputs(self, x: Tensor, context: Tensor | None) -> Tensor:
        if context is None:
            return x
        lead = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
        return torch.cat([context.expand(*lead, -1), x.expand(*lead, -1)], -1)

    # -- bit by bit -----------------------------------------------------------------------------------------------

    def start(self, batch_shape: Sequence[int], context: Tensor | None = None) -> list[Tensor]:
        """The units known before the first value, by layer: the context, and no hidden ones."""
        none = self.direct.weight.new_empty((*batch_shape, 0))
        return [self._inputs(none, context), *[none for _ in self.hidden]]

    def ahead(self, known: list[Tensor], n: int) -> Look:
        """A function of the next n values: all that the known units say of these positions is computed here, once."""
        first = known[0].shape[-1] - self.context
        settled = [slice(k.shape[-1], int(np.sum(m <= first + n))) for k, m in zip(known, self.degrees, strict=True)]
        rows = slice(first * self.outputs, (first + n) * self.outputs)

        def said(layer: Masked, units: slice, source: int) -> tuple[Tensor, Tensor]:
            """What the known units of a layer give to others, and the weights on those that are to be settled."""
            before = slice(0, known[source].shape[-1])
            return F.linear(known[source], layer.piece(units, before)), layer.piece(units, settled[source]).T

        layers = []
        for i, layer in enumerate(self.hidden):
            base, weight = said(layer, settled[i + 1], i)
            layers.append((base + layer.bias[settled[i + 1]], weight))
        base, direct = said(self.direct, rows, 0)
        base = base + self.direct.bias[rows]
        if self.out is not None:
            more, out = said(self.out, rows, len(self.hidden))
            base = base + more

        def look(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            new = [self.scaled(x)]
            for given, weight in layers:
                new.append(F.relu(given + new[-1] @ weight))
            theta = base + new[0] @ direct
            if self.out is not None:
                theta = theta + new[-1] @ out
            return theta.unflatten(-1, (n, self.outputs)), new

        return look
