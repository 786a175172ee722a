"""Monotone rational-quadratic splines (Durkan et al., arXiv:1906.04032), with their inverse in closed form.

K bins between the knots (x_k, y_k), k = 0..K, on [−B, B]; derivatives d_k at the knots; the identity outside, d = 1 at
both ends. In a bin, with s = (y_{k+1} − y_k) / (x_{k+1} − x_k) and z = (x − x_k) / (x_{k+1} − x_k):

    y = y_k + (y_{k+1} − y_k) (s z² + d_k z (1 − z)) / n,     n = s + (d_k + d_{k+1} − 2 s) z (1 − z)
    dy/dx = s² (d_{k+1} z² + 2 s z (1 − z) + d_k (1 − z)²) / n²
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probgen.errors import ProbgenError


class Bins(NamedTuple):
    """Bins, [*, K] each: their lower left corners, widths and heights, and the derivatives at both of their knots."""

    left: jax.Array
    low: jax.Array
    width: jax.Array
    height: jax.Array
    before: jax.Array
    after: jax.Array


def bins(theta: jax.Array, bound: float = 5.0, slope: float = 1e-3) -> Bins:
    """θ [*, 3 K − 1] of real numbers → bins; θ = 0 is the identity.

    K widths and K heights are softmaxes, K − 1 derivatives exponentials, all of θ pressed softly into a range in which
    no derivative at a knot and no ratio of two widths or heights is smaller than `slope`, as Zuko has it.

    Raises:
        ProbgenError: a number of θ that makes no spline.
    """
    number = (theta.shape[-1] + 1) // 3
    if number < 1 or theta.shape[-1] != 3 * number - 1:
        raise ProbgenError(
            f"a spline of K bins takes 3 K − 1 numbers, and the network gives {theta.shape[-1]} for each dimension: let it "
            "give e.g. 23 for 8 bins"
        )
    most = -math.log(slope)
    widths, heights, inner = jnp.split(theta, [number, 2 * number], -1)
    width, height = (2 * bound * jax.nn.softmax(_pressed(raw, most / 2)) for raw in (widths, heights))
    one = jnp.ones_like(inner[..., :1]) if number > 1 else jnp.ones_like(widths[..., :1])
    knots = jnp.concatenate([one, jnp.exp(_pressed(inner, most)), one], -1)
    return Bins(_starts(width, bound), _starts(height, bound), width, height, knots[..., :-1], knots[..., 1:])


def spline(x: jax.Array, at: Bins, bound: float = 5.0) -> tuple[jax.Array, jax.Array]:
    """x [*] → y and log dy/dx [*]."""
    inside = (x >= -bound) & (x < bound)
    within = jnp.where(inside, x, 0.0)
    one = _chosen(within, at.left, at)
    z = jnp.clip((within - one.left) / one.width, 0.0, 1.0)  # rounding may put it just outside
    steep = one.height / one.width
    weight = steep + (one.before + one.after - 2 * steep) * z * (1 - z)
    y = one.low + one.height * (steep * z * z + one.before * z * (1 - z)) / weight
    return jnp.where(inside, y, x), jnp.where(inside, _log_slope(z, steep, weight, one), 0.0)


def inverse_spline(y: jax.Array, at: Bins, bound: float = 5.0) -> tuple[jax.Array, jax.Array]:
    """y [*] → x and log dx/dy [*]: the root z in [0, 1] of a z² + b z + c = 0, where a > 0 if b < 0, and c ≤ 0."""
    inside = (y >= -bound) & (y < bound)
    within = jnp.where(inside, y, 0.0)
    one = _chosen(within, at.low, at)
    steep, up = one.height / one.width, within - one.low
    bend = one.before + one.after - 2 * steep
    a, b, c = one.height * (steep - one.before) + up * bend, one.height * one.before - up * bend, -steep * up
    root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, jnp.finfo(y.dtype).tiny))
    z = jnp.where(b < 0, (root - b) / jnp.where(b < 0, 2 * a, 1.0), -2 * c / (jnp.abs(b) + root))  # without cancelling
    z = jnp.clip(z, 0.0, 1.0)
    x = one.left + z * one.width
    log_slope = _log_slope(z, steep, steep + bend * z * (1 - z), one)
    return jnp.where(inside, x, y), jnp.where(inside, -log_slope, 0.0)


def _log_slope(z: jax.Array, steep: jax.Array, weight: jax.Array, one: Bins) -> jax.Array:
    rise = one.after * z * z + 2 * steep * z * (1 - z) + one.before * (1 - z) * (1 - z)
    return jnp.log(rise) + 2 * (jnp.log(steep) - jnp.log(weight))


def _chosen(value: jax.Array, starts: jax.Array, at: Bins) -> Bins:
    """The bin that a value lies in, [*]. Sums over a mask: a gather's gradient would be a scatter."""
    past = value[..., None] >= starts
    past = past.at[..., 0].set(True)
    here = past & ~jnp.concatenate([past[..., 1:], jnp.zeros_like(past[..., :1])], -1)
    return Bins(*(jnp.where(here, numbers, 0.0).sum(-1) for numbers in at))


def _starts(lengths: jax.Array, bound: float) -> jax.Array:
    """Where pieces that fill [−bound, bound] begin."""
    return jnp.concatenate([jnp.zeros_like(lengths[..., :1]), jnp.cumsum(lengths[..., :-1], -1)], -1) - bound


def _pressed(raw: jax.Array, most: float) -> jax.Array:
    """Real numbers → (−most, most), near 0 unchanged."""
    return raw / (1 + jnp.abs(raw) / most)
