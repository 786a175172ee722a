"""Flows in continuous time: an ordinary differential equation carries data to the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.func import jvp, vmap

from probgen.errors import ProbgenError
from probgen.extras import need
from probgen.pyro.transforms.bijection import Bijection

Field = Callable[[Tensor, Tensor], Tensor]


class ContinuousFlow(Bijection):
    """y = x(1) with dx/dt = v(x(t), t) and x(0) = x;   log |det ∂y/∂x| = ∫ tr ∂v/∂x dt   (arXiv:1806.07366, 1810.01367).

    The way back is the same equation with time reversed. The trace is exact, D derivatives along the axes, or
    Hutchinson's estimate, one derivative along random signs ε for each call: E[εᵀ ∂v/∂x ε] = tr ∂v/∂x.

    Parameters
    ----------
    field
        v: x [*, D] and t [] → [*, D].
    size
        D.
    steps
        Of the classical Runge–Kutta method, whose error falls with their fourth power and which can be compiled.
    method
        "rk4", or a method of torchdiffeq's with steps of its own choice, such as "dopri5", which runs eagerly.
    tolerance
        Of the error of such a method, absolute and relative.
    """

    integrates = True  # its density is a solver's

    def __init__(
        self,
        field: Field,
        size: int,
        steps: int = 16,
        trace: Literal["exact", "hutchinson"] = "exact",
        method: str = "rk4",
        tolerance: float = 1e-6,
    ) -> None:
        super().__init__((size,))
        if steps < 1 or trace not in ("exact", "hutchinson"):
            raise ProbgenError(
                f"ContinuousFlow(steps={steps}, trace={trace!r}): take 1 step or more, and trace='exact' or 'hutchinson'"
            )
        self.field, self.steps, self.trace, self.method, self.tolerance = field, steps, trace, method, tolerance

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From t = 0 to t = 1."""
        return self._solved(x, 0.0, 1.0)

    def back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """From t = 1 to t = 0."""
        return self._solved(y, 1.0, 0.0)

    def _solved(self, x: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()  # derivatives along directions want no expanded axes
        signs = torch.randn_like(x).sign() if self.trace == "hutchinson" else None

        def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self._slope(state[0], t, signs)

        state = x, x.new_zeros(x.shape[:-1])
        if self.method == "rk4":
            return runge_kutta(slope, state, start, end, self.steps)
        odeint = need("torchdiffeq", "flows", f"ContinuousFlow(method={self.method!r})").odeint
        times = x.new_tensor([start, end])
        try:
            y, ladj = odeint(slope, state, times, method=self.method, atol=self.tolerance, rtol=self.tolerance)
        except AssertionError as error:
            raise ProbgenError(
                f"the solver {self.method!r} gives up ({error}): a row is not finite, or the field has become too steep "
                "for its steps: lower the learning rate, or take method='rk4'"
            ) from error
        return y[-1], ladj[-1]

    def _slope(self, x: Tensor, t: Tensor, signs: Tensor | None) -> tuple[Tensor, Tensor]:
        """v [*, D] and its divergence [*]."""

        def along(direction: Tensor) -> tuple[Tensor, Tensor]:
            return jvp(lambda x: self.field(x, t), (x,), (direction,))

        if signs is not None:
            v, change = along(signs)
            return v, (change * signs).sum(-1)
        axes = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        v, change = vmap(lambda axis: along(axis.expand_as(x)), out_dims=(None, 0))(axes)
        return v, torch.einsum("d...d->...", change)


def runge_kutta(slope: Callable, state: tuple[Tensor, ...], start: float, end: float, steps: int) -> tuple[Tensor, ...]:
    """The state at `end` by the classical method of fourth order, in equal steps that look at no number."""
    h = (end - start) / steps

    def moved(state: tuple[Tensor, ...], rate: tuple[Tensor, ...], by: float) -> tuple[Tensor, ...]:
        return tuple(s + by * r for s, r in zip(state, rate, strict=True))

    for i in range(steps):
        t = state[0].new_full((), start + i * h)
        k1 = slope(t, state)
        k2 = slope(t + h / 2, moved(state, k1, h / 2))
        k3 = slope(t + h / 2, moved(state, k2, h / 2))
        k4 = slope(t + h, moved(state, k3, h))
        for rate, weight in ((k1, 1), (k2, 2), (k3, 2), (k4, 1)):
            state = moved(state, rate, h * weight / 6)
    return state
