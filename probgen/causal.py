"""What may depend on what: the order in which an autoregressive model draws its values, and degrees of its units.

    p(x) = Π_d p(x_d | x_<d),   x_1..x_D the entries of a datum in the order in which they are drawn

A unit of degree m is known as soon as the first m values are: x_d has degree d, the parameters of p(x_d | x_<d) have
degree d − 1, and a unit may read units of its own degree or a lower one (Germain et al., MADE, arXiv:1502.03509).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from probgen.errors import ProbgenError, did_you_mean

ORDERS = ("raster", "planes", "random")


def drawing_order(shape: Sequence[int], order: str = "raster") -> np.ndarray:
    """The entries of a datum of `shape`, as flat positions [D], in the order in which they are drawn.

    "raster" goes row by row, and within a pixel of an image [H, W, 3] from R to G to B: p(R | ·) p(G | R, ·)
    p(B | R, G, ·). "planes" draws all of R, then all of G, then all of B. "random" is one permutation, always the same.

    Raises:
        ProbgenError: an order of another name.
    """
    positions = np.arange(math.prod(shape)).reshape(shape)
    if order == "raster":
        return positions.reshape(-1)
    if order == "planes":
        return (np.moveaxis(positions, -1, 0) if positions.ndim == 3 else positions).reshape(-1)
    if order == "random":
        return np.random.default_rng(0).permutation(positions.size)
    raise ProbgenError(f"no order {order!r}{did_you_mean(order, ORDERS)}")


def permutation(order: Sequence[int] | None, shape: Sequence[int]) -> np.ndarray:
    """An order as an array of flat positions, checked to name every entry of a datum of `shape` once."""
    size = math.prod(shape)
    found = np.arange(size) if order is None else np.asarray(order)
    if found.shape != (size,) or not np.array_equal(np.sort(found), np.arange(size)):
        raise ProbgenError(
            f"Autoregressive: the order must name each of the {size} entries of an event of shape {tuple(shape)} once, "
            f"as flat positions 0..{size - 1}"
        )
    return found


def hidden_degrees(size: int, units: int) -> np.ndarray:
    """Degrees of a layer of hidden units, spread evenly over 1..D − 1 and ascending, [units]."""
    if units < 1:
        raise ProbgenError(f"a hidden layer of {units} units computes nothing; give it at least 1, or leave it out")
    return 1 + np.arange(units) * max(size - 1, 1) // units


def known_prefix(known: np.ndarray) -> int:
    """How many values are known in every row, for a mask [..., D] in the order of drawing.

    Raises:
        ProbgenError: in some row a known value comes after an unknown one.
    """
    gaps = ~known[..., :-1] & known[..., 1:]
    if gaps.any():
        where = int(np.argwhere(gaps)[0][-1]) + 1
        raise ProbgenError(
            f"complete: value {where} in the order of drawing is known and the one before it is not; only the entries "
            "that follow a known prefix are drawn exactly, so hold the first ones or choose another order"
        )
    return int(known.sum(-1).min()) if known.size else 0


def refuse_misfit(size: int, context: int, event_shape: Sequence[int], given: int | None) -> None:
    """Refuse a network made for another number of entries, or for a context of another length."""
    entries = math.prod(event_shape)
    if size != entries:
        raise ProbgenError(
            f"Autoregressive: the network is made for {size} values and an event of shape {tuple(event_shape)} has "
            f"{entries}: build it with size={entries}"
        )
    if context != (given or 0):
        have = "none is given" if given is None else f"the one given has {given}"
        raise ProbgenError(
            f"Autoregressive: the network reads a context of {context} numbers, and {have}: build it with "
            f"context={given or 0}, or give it what it reads"
        )
