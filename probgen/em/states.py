"""The joint states of a program's enumerated latents, and what the program says in each of them.

Every row in every state is one row of a long batch, S·B of them with the states in front: latents are held at their
values and the program runs as it is. Where the arguments of a site do not depend on the row, one row is enough, and
the run is a table of S lines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probgen.em.exponential import family_of
from probgen.em.links import Wiring, fillings, wired
from probgen.errors import ProbgenError
from probgen.program import Structure, rows_of

MOST = 10_000  # joint states
LISTED = 5  # states, or latents, that a sentence names
LATENT_FAMILIES = ("Bernoulli", "Categorical", "OneHotCategorical")


def refuse_latents(structure: Structure, by: str) -> None:
    """Say in one sentence why EM cannot sum out the latents of a program."""
    for name, site in structure.latents.items():
        if not site.local:
            raise ProbgenError(
                f"the latent {name!r} lies outside the data plate, and {by} has no E-step for it: leave out its prior (a "
                "zoo mixture: bayesian=False), or learn it by EM(variational=True), ELBO() or NUTS()"
            )
        if not site.discrete:
            raise ProbgenError(
                f"the latent {name!r} is continuous ({site.family}), and {by} sums out discrete ones only: use ELBO()"
            )
        if not site.enumerated:
            raise ProbgenError(
                f"{by} sums out the latent {name!r} ({site.family}) only where it is marked: give it "
                "infer={'enumerate': 'parallel'}, or use ELBO() with a guide that draws it"
            )
        inner = [plate.name for plate in site.plates if not plate.data and plate.size > 1]
        if inner:
            raise ProbgenError(
                f"the latent {name!r} has a value of its own for each element of the plate {inner[0]!r}, too many to "
                f"enumerate jointly: {by} takes latents that lie in the data plate alone, so use ELBO()"
            )
    for name, site in structure.model.items():
        if site.role == "factor":
            raise ProbgenError(f"{by} needs a normalised program, and the site {name!r} is a factor: use ELBO()")
        if site.role == "observed" and not site.local:
            raise ProbgenError(
                f"the data site {name!r} lies in no plate as long as the batch, so its rows are not independent for {by}: "
                'put it in plate("data", len(x))'
            )


def refuse_many(sizes: Mapping[str, int], by: str) -> None:
    """Refuse latents with more joint states than can be summed out row by row."""
    size = math.prod(sizes.values())
    if size > MOST:
        names = ", ".join(map(repr, list(sizes)[:LISTED])) + (", …" if len(sizes) > LISTED else "")
        raise ProbgenError(
            f"enumerating {names} makes {size:,} joint states, more than the {MOST:,} that {by} sums out: use ELBO() with a "
            "guide that draws them"
        )


class States:
    """S joint states, and which sites have a table over them.

    `host` runs the program: see `probgen.pyro.em.Host`. `families` maps each site with a table to its distribution's
    name, `data` and `latents` are those sites, `general` the sites that only a run on the rows themselves scores.
    """

    def __init__(self, host: Any, arrays: Mapping[str, np.ndarray], by: str) -> None:
        self.host, self.structure = host, host.structure
        refuse_latents(self.structure, by)
        self.probe = _various(arrays)
        names = [name for name, site in self.structure.latents.items() if site.enumerated]
        supports = {name: host.support(name) for name in names}
        refuse_many({name: len(support) for name, support in supports.items()}, by)
        self.size = int(np.prod([len(support) for support in supports.values()])) if supports else 1
        places = list(itertools.product(*[range(len(support)) for support in supports.values()]))
        self.values = {
            name: support[[place[i] for place in places]] for i, (name, support) in enumerate(supports.items())
        }
        self._divide(host)

    def listed(self, states: Sequence[int]) -> str:
        """States in words: "the states z = 3 and z = 4", the first few of many."""
        words = [
            ", ".join(f"{name} = {np.asarray(values[state]).tolist()}" for name, values in self.values.items())
            for state in states[:LISTED]
        ]
        more = f" and {len(states) - LISTED:,} others" if len(states) > LISTED else ""
        return ("the state " if len(states) == 1 else "the states ") + " and ".join(words) + more

    # -- which sites have a table ---------------------------------------------------------------------------------

    def _divide(self, host: Any) -> None:
        sites = {n: s for n, s in self.structure.model.items() if s.role in ("observed", "latent")}
        known: dict[str, str] = {}
        wanted: dict[str, tuple[str, ...]] = {}
        for name, site in sites.items():
            family = family_of(site.family)
            if family is None or host.masked(name) or (site.role == "latent" and site.family not in LATENT_FAMILIES):
                continue
            known[name] = site.family
            wanted[name] = tuple(dict.fromkeys((*family.reads, *family.closed)))
        self._run = host.quick(lambda leaves, arrays: self._everything(leaves, arrays, wanted, tuple(sites)))
        tables = [self._look(host.start, rows)[1] for rows in self.probe]
        self.families = {name: kind for name, kind in known.items() if _rowless(*(t[name] for t in tables))}
        self._drop_uneven_trials(tables[0])
        self.data = tuple(n for n in self.families if sites[n].role == "observed")
        self.latents = tuple(n for n in self.families if sites[n].role == "latent")
        self.general = tuple(n for n in sites if n not in self.families)
        self.one_row = {name: array[:1] for name, array in self.probe[0].items()}
        self.table = {site: {n: value[:, 0] for n, value in tables[0][site].items()} for site in self.families}

    def _drop_uneven_trials(self, table: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        for name in [n for n, kind in self.families.items() if kind.startswith("Binomial")]:
            trials = table[name]["total_count"]
            if (trials != trials[:1]).any():
                del self.families[name]

    def _everything(
        self, leaves: Mapping[str, Any], arrays: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]], sites: Any
    ) -> tuple[Any, Any, Any]:
        """Constrained parameters, arguments [S·B, E, *event] and densities [S·B] of one run on tiled rows."""
        held = self._held(rows_of(arrays) // self.size)
        densities = self.host.densities(leaves, arrays, held, sites)
        return self.host.constrained(leaves), self.host.arguments(leaves, arrays, held, wanted), densities

    def _look(self, leaves: Mapping[str, Any], rows: Mapping[str, np.ndarray]) -> tuple[Any, Any, Any]:
        """The same as numpy's, arguments [S, B, E, *event], for a few rows."""
        tiled = {name: np.concatenate([array] * self.size) for name, array in rows.items()}
        params, args, densities = self._run(leaves, self.host.arrays(tiled))
        as_table = lambda a: a.reshape(self.size, -1, *a.shape[1:])  # noqa: E731
        return (
            {name: host_numpy(self.host, value) for name, value in params.items()},
            {s: {n: as_table(host_numpy(self.host, v)) for n, v in own.items()} for s, own in args.items()},
            {name: host_numpy(self.host, value) for name, value in densities.items()},
        )

    def _held(self, rows: int) -> dict[str, np.ndarray]:
        """Every latent's value in every state, for so many rows."""
        return {name: np.repeat(values, rows, 0) for name, values in self.values.items()}

    # -- what the program says ------------------------------------------------------------------------------------

    def arguments(self, ops: Any, leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The table: for each site the arguments [S, E, *event] that its natural parameters are made from."""
        wanted = {name: family_of(kind).reads for name, kind in self.families.items()}
        if not wanted:
            return {}
        tiled = self.host.arrays({name: np.concatenate([array] * self.size) for name, array in self.one_row.items()})
        found = self.host.arguments(leaves, tiled, self._held(1), wanted)
        return {site: {name: ops.cast(value) for name, value in own.items()} for site, own in found.items()}

    def log_joint(self, ops: Any, leaves: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
        """Σ log p of the general sites, [S, B], for B rows."""
        rows = rows_of(arrays)
        tiled = {name: ops.tiled(array, self.size) for name, array in arrays.items()}
        found = self.host.densities(leaves, tiled, self._held(rows), self.general)
        return ops.cast(sum(found.values())).reshape(self.size, rows)

    def wiring(self) -> Wiring:
        """Which parameter feeds which argument."""
        first, second = fillings({name: np.shape(value) for name, value in self.host.start.items()})

        def look(filled: Mapping[str, np.ndarray]) -> tuple[Any, Any, Any]:
            leaves = {name: self.host.leaf(name, value) for name, value in filled.items()}
            params, args, densities = self._look(leaves, self.probe[0])
            own = {site: {n: v[:, 0] for n, v in args[site].items()} for site in self.families}
            return params, own, {name: densities[name] for name in self.general}

        (params, args, others), (params_2, args_2, _) = look(first), look(second)
        return wired(
            self.families,
            (params, params_2),
            (args, args_2),
            lambda name: look({**first, name: second[name]})[1:],
            others,
        )


def host_numpy(host: Any, value: Any) -> np.ndarray:
    """A backend's array as numpy's, in double precision."""
    return np.asarray(host.numpy(value), np.float64)


def _various(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two handfuls of rows that differ as far as the data let them: the ends of each array, and others."""
    rows = len(next(iter(arrays.values())))
    ends = []
    for array in arrays.values():
        if len(array) == rows:
            sums = np.asarray(array[:10_000], np.float64).reshape(min(rows, 10_000), -1).sum(1)
            ends += [int(sums.argmin()), int(sums.argmax())]
    first = list(dict.fromkeys([*ends, 0]))
    second = [(place + 1 + rows // 2) % rows for place in first]
    return tuple({name: np.asarray(array)[place] for name, array in arrays.items()} for place in (first, second))


def _rowless(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether arguments [S, B, ...] are the same for all rows, and for other rows."""
    return all(
        np.array_equal(np.broadcast_to(value[:, :1], value.shape), value, equal_nan=True)
        and np.array_equal(value, other[name], equal_nan=True)
        for name, value in one.items()
    )
