"""The operators of EM in JAX: what `probgen.em.exponential`, `expectation` and `maximisation` are written with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probgen.numpyro.trace import as_jax


class Operators:
    """What EM computes with, in one precision: jax.numpy, and what it spells in its own way."""

    xp = jnp

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.eps, self.tiny = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny) * 1e6

    def array(self, value: Any) -> jax.Array:
        """Numbers in this precision."""
        return jnp.asarray(value, self.dtype)

    def raw(self, value: np.ndarray) -> jax.Array:
        """An array as the program takes it."""
        return as_jax({"": value})[""]

    def mask(self, value: np.ndarray) -> jax.Array:
        """Truth values."""
        return jnp.asarray(value)

    def cast(self, value: Any) -> jax.Array:
        """The same in this precision."""
        return jnp.asarray(value, self.dtype)

    floats = cast

    def scatter(self, values: jax.Array, index: np.ndarray, size: int) -> jax.Array:
        """Sums of the values of each index, [size, ...]."""
        return jnp.zeros((size, *values.shape[1:]), values.dtype).at[index].add(values)

    def put(self, vector: jax.Array, index: np.ndarray, values: jax.Array) -> jax.Array:
        """The vector with values at an index."""
        return vector.at[index].set(values)

    def tiled(self, array: jax.Array, times: int) -> jax.Array:
        """The rows, several times over."""
        return jnp.tile(array, (times, *[1] * (array.ndim - 1)))

    def inverse_tril(self, factor: jax.Array) -> jax.Array:
        """Inverses of lower triangular matrices."""
        eye = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
        return jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)

    def cholesky(self, matrix: jax.Array) -> jax.Array:
        """Lower factors; NaN where there is none."""
        return jnp.linalg.cholesky(matrix)

    def clipped(self, matrix: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
        """Matrices [G, D, D] with their eigenvalues at least `floor`, and which had smaller ones."""
        if not floor:
            return matrix, jnp.zeros(len(matrix), bool)
        factor = jnp.linalg.cholesky(matrix - floor * jnp.eye(matrix.shape[-1], dtype=matrix.dtype))
        low = jnp.isnan(factor).any((-2, -1))

        def lift(matrix: jax.Array) -> jax.Array:
            values, vectors = jnp.linalg.eigh(matrix)
            lifted = (vectors * jnp.maximum(values, floor)[:, None, :]) @ jnp.swapaxes(vectors, -1, -2)
            return jnp.where(low[:, None, None], lifted, matrix)

        return jax.lax.cond(low.any(), lift, lambda matrix: matrix, matrix), low

    def diagonal(self, matrix: jax.Array) -> jax.Array:
        """Diagonals."""
        return jnp.diagonal(matrix, axis1=-2, axis2=-1)

    def stored(self, features: jax.Array) -> jax.Array:
        """Features [C, M, c] in the order in which they are multiplied fastest: row by row."""
        return jnp.swapaxes(features, 1, 2)

    def read(self, block: jax.Array) -> jax.Array:
        """One block of them, [M, c]."""
        return block.T

    def product(self, weights: jax.Array, features: jax.Array) -> jax.Array:
        """[S, M] times [M, c], row by row: XLA drops the transposes that meet."""
        return (features.T @ weights.T).T

    def softmax(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """logsumexp over the first axis, and the shares; what is below e^−60 of the largest is none at all."""
        rows = logits.T
        largest = rows.max(1, keepdims=True)
        shares = jnp.exp(rows - largest)
        shares = jnp.where(shares > 1e-26, shares, 0.0)
        total = shares.sum(1, keepdims=True)
        return (largest + jnp.log(total))[:, 0], (shares / total).T

    def best(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The largest of the first axis, and where it is."""
        return logits.max(0), logits.argmax(0)

    def log_softmax(self, logits: jax.Array) -> jax.Array:
        """Over the last axis."""
        return jax.nn.log_softmax(logits, -1)

    def softplus(self, value: jax.Array) -> jax.Array:
        """log (1 + exp)."""
        return jax.nn.softplus(value)

    def gammaln(self, value: jax.Array) -> jax.Array:
        """log Γ."""
        return jax.scipy.special.gammaln(value)

    def accumulated(self, one: Callable[..., tuple[dict, Any]], blocks: Mapping[str, jax.Array]) -> tuple:
        """Sums over the blocks of what `one` returns first, and what it returns second, block by block."""
        if len(blocks["real"]) == 1:
            sums, kept = one({name: value[0] for name, value in blocks.items()})
            return sums, None if kept is None else kept[None]
        zero = jax.tree.map(
            lambda like: jnp.zeros(like.shape, like.dtype),
            jax.eval_shape(one, {name: value[0] for name, value in blocks.items()})[0],
        )

        def body(sums: dict, block: dict) -> tuple[dict, Any]:
            own, kept = one(block)
            return jax.tree.map(jnp.add, sums, own), kept

        return jax.lax.scan(body, zero, dict(blocks))
