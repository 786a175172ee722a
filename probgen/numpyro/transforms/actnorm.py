"""An affine map of every channel, which starts by standardising the first rows it sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpyro
from numpyro.distributions.transforms import Transform

from probgen.flow_shapes import Shape
from probgen.numpyro.transforms.bijection import Bijection, event_sum


class ActNorm(Bijection):
    """y = (x − loc) exp(log_scale), one pair of numbers for each channel  (Kingma & Dhariwal, arXiv:1807.03039).

    Parameters
    ----------
    shape
        Of an event; its first axis are the channels: `(2,)` for vectors, `(3, 8, 8)` or `(3, None, None)` for images.
    numbers
        "loc" and "log_scale", [C] or [C, 1, 1]; `actnorm` declares them in a program, and starts them from data.
    """

    traced = ("loc", "log_scale")

    def __init__(self, shape: Shape, numbers: Mapping[str, jax.Array]) -> None:
        super().__init__(shape)
        self.loc, self.log_scale = numbers["loc"], numbers["log_scale"]

    @staticmethod
    def start(shape: Shape, x: jax.Array) -> dict[str, jax.Array]:
        """The numbers with which each channel of y has mean 0 and variance 1 on a batch x [*, *shape].

        A channel that is constant is only centred.
        """
        each = jnp.moveaxis(x, x.ndim - len(shape), 0).reshape(shape[0], -1)
        mean, std = each.mean(1), each.std(1)
        std = jnp.where(std > 1e-6 * jnp.maximum(jnp.abs(mean), 1.0), std, 1.0)
        channels = (shape[0], *(1 for _ in shape[1:]))
        return {"loc": mean.reshape(channels), "log_scale": -jnp.log(std).reshape(channels)}

    def forth(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x − loc) exp(log_scale)."""
        return (x - self.loc) * jnp.exp(self.log_scale), self._ladj(x)

    def back(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Loc + y exp(−log_scale)."""
        return y * jnp.exp(-self.log_scale) + self.loc, -self._ladj(y)

    def _ladj(self, x: jax.Array) -> jax.Array:
        """Every position of a channel counts its log-scale."""
        first = x.ndim - len(self.shape)
        positions = math.prod(x.shape[first + 1 :])
        return jnp.broadcast_to(event_sum(self.log_scale, self.shape) * positions, x.shape[:first])


class FirstRows:
    """What the rows of a batch have become in a flow that is being written; computed only where a layer starts from it.

        rows = FirstRows(x)
        f_1 = rows.through(actnorm("f_1", (2,), rows))       # its parameters start from x
        f_2 = rows.through(ChannelCoupling(network, (2,)))
        f_3 = rows.through(actnorm("f_3", (2,), rows))       # and these from f_2(f_1(x))

    Each layer maps the rows once, and none does when the parameters are there already.
    """

    def __init__(self, x: jax.Array) -> None:
        self._x, self._ahead = x, []

    def through(self, part: Transform | Callable) -> Transform | Callable:
        """Let the rows pass a next layer, which is returned."""
        self._ahead.append(part)
        return part

    def now(self) -> jax.Array:
        """The rows as the layers so far map them."""
        for part in self._ahead:
            self._x = part(self._x)
        self._ahead.clear()
        return jax.lax.stop_gradient(self._x)


def actnorm(name: str, shape: Shape, rows: FirstRows) -> ActNorm:
    """An ActNorm whose numbers are the parameter `name` of the program, and start from the rows as they are by now."""
    return ActNorm(shape, numpyro.param(name, lambda _: ActNorm.start(shape, rows.now())))
