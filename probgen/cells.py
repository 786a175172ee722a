"""What a sample site is in one run of a program: its value, its density there, and the arguments of a Gaussian.

A backend's `Trained.cells(arrays, values, seed)` runs the unconditioned model once with `values` held and returns one
cell for each site; everything that is computed from them is written once, in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probgen.program import Site

GAUSSIAN = ("Normal", "MultivariateNormal", "LowRankMultivariateNormal")


@dataclass(frozen=True)
class Cell:
    """One site in one run, rows first where it is local.

    `value` is [R, *shape]. `log_prob` is the density of each independent block of a row, [R, *blocks]: of every entry
    where the entries are independent, so that `blocks` is then `shape`; None where the site is masked. `support` holds
    all the values that a discrete block can take, [K, *block]. Of a Gaussian, `mean` is [R, *shape], and `scale` is the
    standard deviation, [R, *shape], or the lower factor of the covariance, [R, *shape, D].
    """

    family: str
    value: np.ndarray
    log_prob: np.ndarray | None = None
    support: np.ndarray | None = None
    mean: np.ndarray | None = None
    scale: np.ndarray | None = None

    @property
    def gaussian(self) -> bool:
        """Whether the site is Gaussian, entry by entry or jointly."""
        return self.family in GAUSSIAN and self.scale is not None


def row_axis(site: Site) -> int | None:
    """The axis of a site's value that counts rows, from the right; None for a global site."""
    dims = [plate.dim for plate in site.plates if plate.data]
    return dims[0] - site.event_dim if dims else None


def row_shape(site: Site) -> tuple[int, ...]:
    """The shape of a local site's value in one row."""
    axis, shape = row_axis(site), list(site.shape)
    if axis is not None:
        del shape[axis]
    return tuple(shape)
