r"""Reconstruction error :math:`\tfrac1D \lVert x - \operatorname{E}[x \mid z] \rVert^2`, :math:`z \sim q(z \mid x)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.evaluate.batch import Batch, mean_and_error
from probgen.sites import arrays_of, stack_numbered

PLACE = 4


class Reconstruction:
    """Mean squared error per datum between the data and the mean of its distribution at one draw of the guide.

    Both sides are in the data's own units, the data as the program saw it: binarised pixels where `prepare` says so.
    With more than one data site, one number a site: `reconstruction_error/<site>`.
    """

    def __init__(self, trained: Any, preparation: Any, spec: Mapping[str, Any]) -> None:
        self.trained, self.preparation = trained, preparation
        self.arrays = arrays_of(trained.structure, preparation.spec(spec))
        self.rows: dict[str, list[np.ndarray]] = {}
        self.reason = "no data site has a mean of its array's shape"

    def add(self, batch: Batch) -> None:
        """Take one more batch in."""
        [(_, seed)] = batch.draws(1, len(batch), PLACE)
        try:
            rebuilt = stack_numbered(self.trained.reconstruct(batch.arrays, seed), 1)
        except ProbgenError as error:  # a data site whose distribution has no mean
            self.reason = str(error)
            return
        for site, array in self.arrays.items():
            there = batch.arrays[array]
            if site in rebuilt and np.size(rebuilt[site]) == np.size(there):
                error = self._raw(array, there) - self._raw(array, np.reshape(rebuilt[site], np.shape(there)))
                self.rows.setdefault(site, []).append((error**2).reshape(len(batch), -1).mean(axis=1))

    def result(self) -> tuple[dict[str, float], list[str]]:
        """Numbers, and what is to be said about them."""
        rows = {site: np.concatenate(parts) for site, parts in self.rows.items()}
        numbers: dict[str, float] = {}
        for site, error in rows.items():
            if np.isfinite(error).all():
                name = "reconstruction_error" if len(rows) == 1 else f"reconstruction_error/{site}"
                numbers |= mean_and_error(name, error)
        return numbers, [] if numbers else [f"reconstruction_error is not defined: {self.reason}"]

    def _raw(self, array: str, values: np.ndarray) -> np.ndarray:
        return np.asarray(self.preparation.inverse({array: values})[array], dtype=np.float64)
