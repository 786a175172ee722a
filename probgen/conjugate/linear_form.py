"""The log density of local sites as one linear form in the statistics u(θ) of the priors.

    log p(x_n, s | θ) = T(x_n)·G_s u(θ) + h(x_n)           T [N, F], G_s [F, M], s one of S joint states

E-step:  log r_ns ∝ T(x_n)·w_s,  w_s = G_s E_q[u]          M-step:  λ = λ₀ + Σ_s G_sᵀ S_s,  S_s = Σ_n r_ns T(x_n)

T are the features of the sites' exponential families (`probgen.em.exponential`), column 0 a one. Both passes over the data
are matrix products with it, on data less their mean: float32 cancels otherwise. G is kept as its entries (state, column, coordinate, coefficient).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from probgen.em.exponential import family_of

ONE = -1  # the coordinate of u that is 1: coefficients that depend on no latent


@dataclass(frozen=True)
class Columns:
    """The columns of T that one observed site has: the features of its exponential family, [M, E] of them.

    E is the number of independent elements of a datum; a vector of D entries is one element. `shift` is what the data
    are centred by, [E, *event].
    """

    site: str
    family: str
    first: int
    features: int
    shift: np.ndarray
    classes: int = 0

    @property
    def grid(self) -> np.ndarray:
        """The places of the columns, [M, E]."""
        return self.first + np.arange(self.features * len(self.shift)).reshape(self.features, len(self.shift))

    @property
    def arguments(self) -> dict[str, np.ndarray]:
        """What the family asks of its arguments to make features: the number of classes."""
        return {"logits": np.zeros(self.classes)}

    def of(self, ops: Any, x: Any) -> Any:
        """T of the rows x [N, ...], as [M · E, N], with the operators of a backend."""
        x = x.reshape(len(x), *self.shift.shape)
        if self.shift.any():
            x = x - ops.array(self.shift)
        x = ops.xp.moveaxis(ops.xp.moveaxis(x, 0, -1), 0, -2)  # [*event, E, N]
        made = family_of(self.family).features(ops, x, self.arguments)
        return made.reshape(self.features * len(self.shift), -1)

    def shifted_weights(self, w: np.ndarray) -> None:
        """Weights of T(x), in place, to those of T(x − c)."""
        if self.family == "Normal":
            (square, x), c = self.grid, self.shift
            w[:, 0] += w[:, x] @ c + w[:, square] @ c**2
            w[:, x] += 2 * w[:, square] * c
        elif self.family == "MultivariateNormal":
            x, c, (i, j) = self.linear, self.shift[0], np.triu_indices(self.shift.shape[1])
            pairs = w[:, self.grid[: len(i), 0]]
            w[:, 0] += w[:, x] @ c + pairs @ (c[i] * c[j])
            for s in range(len(w)):
                np.add.at(w[s], x[i], pairs[s] * c[j])
                np.add.at(w[s], x[j], pairs[s] * c[i])

    def restored_statistics(self, s: np.ndarray) -> None:
        """Sums of T(x − c), in place, to those of T(x): the transpose of `shifted_weights`."""
        n = s[:, :1]
        if self.family == "Normal":
            (square, x), c = self.grid, self.shift
            s[:, square] += 2 * s[:, x] * c + n * c**2
            s[:, x] += n * c
        elif self.family == "MultivariateNormal":
            x, c, (i, j) = self.linear, self.shift[0], np.triu_indices(self.shift.shape[1])
            s[:, self.grid[: len(i), 0]] += s[:, x[i]] * c[j] + s[:, x[j]] * c[i] + n * c[i] * c[j]
            s[:, x] += n * c

    @property
    def linear(self) -> np.ndarray:
        """The columns of the vector x itself, [D]."""
        return self.grid[-self.shift.shape[1] :, 0]


@dataclass
class LinearForm:
    """T, G and h of the local sites of a program with S joint states and M statistics."""

    states: int
    size: int
    sites: list[Columns] = field(default_factory=list)
    entries: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    width: int = 1

    # -- building it ----------------------------------------------------------------------------------------------

    def columns(self, site: str, family: str, features: int, *shape: int, classes: int = 0) -> np.ndarray:
        """New columns for a site of elements and events of this shape; their places, [M, E]."""
        self.sites.append(Columns(site, family, self.width, features, np.zeros(shape), classes))
        self.width += features * shape[0]
        return self.sites[-1].grid

    def add(self, column: Any, coordinate: np.ndarray, coefficient: Any) -> None:
        """Entries of G: the leading axis of `coordinate` is the state, the others go with `column`."""
        state = np.arange(self.states).reshape(-1, *[1] * (coordinate.ndim - 1))
        parts = np.broadcast_arrays(state, column, coordinate, np.asarray(coefficient, float))
        self.entries.append(tuple(part.ravel() for part in parts))

    def join(self, other: LinearForm) -> None:
        """Add the sites of another form of the same program."""
        offset = self.width - 1
        self.sites += [replace(columns, first=columns.first + offset) for columns in other.sites]
        self.entries += [(s, np.where(c > 0, c + offset, 0), m, g) for s, c, m, g in other.entries]
        self.width += other.width - 1

    def centred(self, values: Mapping[str, np.ndarray]) -> LinearForm:
        """The same form, computed on data less their means where the family is one of location."""

        def centre(columns: Columns) -> Columns:
            if not family_of(columns.family).located:
                return columns
            return replace(columns, shift=np.mean(values[columns.site], 0, float).reshape(columns.shift.shape))

        return replace(self, sites=[centre(columns) for columns in self.sites])

    # -- what it is for -------------------------------------------------------------------------------------------

    def _all(self) -> tuple[np.ndarray, ...]:
        return tuple(np.concatenate(parts) for parts in zip(*self.entries, strict=True))

    def weights(self, statistics: np.ndarray) -> np.ndarray:
        """w = G u, [S, F], for the columns as `matrix` computes them."""
        state, column, coordinate, coefficient = self._all()
        w = np.zeros((self.states, self.width))
        np.add.at(w, (state, column), coefficient * np.append(statistics, 1.0)[coordinate])
        for columns in self.sites:
            columns.shifted_weights(w)
        return w

    def natural(self, sums: np.ndarray) -> np.ndarray:
        """Σ_s G_sᵀ S_s, [M], of S = Σ_n r_ns T(x_n), [S, F], as `matrix` computes T."""
        sums = np.array(sums, float)
        for columns in self.sites:
            columns.restored_statistics(sums)
        state, column, coordinate, coefficient = self._all()
        out = np.zeros(self.size + 1)
        np.add.at(out, coordinate, coefficient * sums[state, column])
        return out[:-1]

    def matrix(self, ops: Any, values: Mapping[str, Any], rows: int) -> Any:
        """Tᵀ of the rows, [F, N]."""
        ones = ops.array(np.ones((1, rows)))
        return ops.xp.concatenate([ones, *(columns.of(ops, values[columns.site]) for columns in self.sites)])

    def base(self, values: Mapping[str, np.ndarray]) -> float:
        """Σ_n h(x_n)."""
        return float(sum(family_of(c.family).base(values[c.site], c.arguments) for c in self.sites))


@dataclass(frozen=True)
class NumpyOperators:
    """The operators that features are made with, in NumPy's float64."""

    xp: Any = np

    def array(self, values: Any) -> np.ndarray:
        """As float64."""
        return np.asarray(values, float)

    floats = array


def responsibilities(xp: Any, logits: Any) -> tuple[Any, Any]:
    """log Σ_s exp of the logits [S, N], [N], and r, [S, N]."""
    top = xp.amax(logits, 0)
    unnormalised = xp.exp(logits - top)
    total = unnormalised.sum(0)
    return top + xp.log(total), unnormalised / total
