"""Parzen windows: kernel density estimation (Rosenblatt 1956; Parzen 1962), bandwidth by cross-validation, in NumPyro.

    p(x) = 1/N Σ_i N(x | x_i, h² I)      centres x_1..x_N: the training rows, kept with the weights
    loss = −Σ_n log p_−n(x_n)            p_−n: the same without x_n and its equals, a mean over x_i ≠ x_n

With its own kernel in the sum a row would be likeliest at h = 0, so each row is left out of its own density (Habbema
et al. 1974; Duin 1976), with those equal to it, and h learned by gradient steps of this loss; another loss leaves it at
N^(−1/(D+4)), where it starts. All rows are in memory: batch_size=None. Whole numbers are dequantized, the centres once
and for all, the rows anew at each step.

The twin of `kde.py`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints
from numpyro.primitives import mutable

from probgen import Dequantize, Flatten, ProbgenError, Program, Standardize

ROWS = 256  # rows whose left-out density is looked at in a step, anew each time
AT_ONCE = 2**24  # kernels in memory, outside training


class Parzen(dist.Distribution):
    """1/N Σ_i N(x | x_i, h² I) of centres [N, D] and a bandwidth h."""

    arg_constraints = {"centres": constraints.real_matrix, "bandwidth": constraints.positive}  # noqa: RUF012
    reparametrized_params = ["centres", "bandwidth"]  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, centres: jax.Array, bandwidth: jax.Array, *, validate_args: bool | None = None) -> None:
        self.centres, self.bandwidth = centres, bandwidth
        super().__init__((), centres.shape[1:], validate_args=validate_args)

    @property
    def mean(self) -> jax.Array:
        return self.centres.mean(0)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        which, noise = jax.random.split(key)
        centres = self.centres[jax.random.randint(which, sample_shape, 0, len(self.centres))]
        return centres + self.bandwidth * jax.random.normal(noise, centres.shape)

    def log_prob(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        piece = max(1, AT_ONCE // len(self.centres))
        log_p = jax.lax.map(lambda row: logsumexp(self._log_kernels(row)[0]), rows, batch_size=piece)
        return log_p.reshape(x.shape[:-1]) - math.log(len(self.centres))

    def log_prob_left_out(self, x: jax.Array, n: jax.Array) -> jax.Array:
        """log p_−n of a row x [D], numbered n: it leaves out the centres that it equals, or else the n-th."""
        log_kernels, square = self._log_kernels(x)
        nth, equal = jnp.arange(len(self.centres)) == n % len(self.centres), square == 0
        others = ~jnp.where(equal.any(), equal, nth)
        return logsumexp(jnp.where(others, log_kernels, -jnp.inf)) - jnp.log(others.sum())

    def _log_kernels(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log N(x | x_i, h² I) and |x − x_i|² of a row, [N]; exactly 0 between equal rows."""
        square = ((x - self.centres) ** 2).sum(-1)
        log_scale = jnp.log(self.bandwidth) + math.log(2 * math.pi) / 2
        return -0.5 * square / self.bandwidth**2 - x.shape[-1] * log_scale, square


def leave_one_out(rng_key, params: dict, model, guide, x: jax.Array) -> jax.Array:
    """−Σ_n log p_−n(x_n), of as many rows as a step looks at, standing for all."""
    density = Parzen(params["centres"], params["bandwidth"])
    n = jax.random.permutation(rng_key, len(x))[:ROWS]
    return -jax.vmap(density.log_prob_left_out)(x[n], n).mean() * len(x)


def program(spec) -> Program:
    """A kernel density estimate of the rows of `x` as standardized vectors."""
    D = math.prod(spec["x"].shape)
    whole = (Dequantize(),) if "int" in spec["x"].dtype else ()  # whole numbers have no density

    def model(x: jax.Array) -> None:
        centres = mutable("centres", x)  # kept, not trained
        if len(centres) < 2:
            raise ProbgenError(
                "kde_numpyro: a row left out leaves no centre behind; give training rows of which two differ"
            )
        h = numpyro.param("bandwidth", len(x) ** (-1 / (D + 4)), constraint=constraints.positive)
        with numpyro.plate("data", len(x)):
            fn = Parzen(centres, jax.lax.stop_gradient(h))  # its own kernel in the sum would teach h = 0
            numpyro.sample("x", fn, obs=x)

    return Program(
        model,
        by=leave_one_out,
        prepare={"x": (Flatten(), *whole, Standardize())},
        defaults={"epochs": 100, "batch_size": None, "lr": 0.05},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
