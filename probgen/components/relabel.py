"""`relabel`: the components of a mixture bear the same number in every draw of its posterior.

    σ_s = argmin_σ Σ_n Σ_k p_s(n, σ(k)) log [p_s(n, σ(k)) / p̄(n, k)],   p_s(n, k) = p(z_n = k | x_n, θ_s)

Where components are exchangeable the posterior has K! equal parts, chains wander between them, and means over draws
say nothing. Stephens' algorithm renumbers each draw so that its assignments agree with their average p̄ over draws, and
takes the average anew, until nothing changes. It starts at the draw of the highest posterior density. Where NUTS drew,
the numbers are those of its likeliest draw, so that whatever is asked of a run bears the same.

References:
    | Dealing with label switching in mixture models (Stephens, 2000), https://doi.org/10.1111/1467-9868.00265
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.chunks import spread
from probgen.components import component_axes, renumbered, sites_of, state_sites
from probgen.errors import ProbgenError
from probgen.groups import RESERVED

if TYPE_CHECKING:
    from xarray import DataTree

    from probgen.nuts.draws import Draws

ROUNDS = 50
LEAST = 1e-6  # of a probability in a logarithm: one datum alone does not decide
MOST_ROWS = 2000  # rows whose assignments decide the numbering


def relabel(tree: DataTree, run: Any) -> DataTree:
    """The posterior of a run with components renumbered, draw by draw, so that they agree; chains are one in this.

    `tree` is what `run.posterior` returns. Every enumerated latent of a row is looked at: which axes of which latents
    hold something for each of its states is found by running the program. Those are renumbered together with the
    draws of the states. Where components are not exchangeable, by their prior or because they are parameters, the
    draws stay as they are. `attrs` of the group `posterior` and of its variables say what was done; R-hat and
    effective sample sizes of the result are of the renumbered draws.

    Raises:
        ProbgenError: the program has no enumerated latent of a row.
    """
    trained = run.trained
    names = state_sites(trained.structure)
    if not names:
        raise ProbgenError(
            "relabel: this program has no enumerated latent per datum, so no components that could change places"
        )
    tree = tree.copy()
    dataset = tree["posterior"].to_dataset()
    missing = [name for name in names if _free(name) not in dataset]
    if missing:
        raise ProbgenError(
            f"relabel: {missing[0]!r} is one of a series of enumerated latents, and only single ones are renumbered: give "
            "its sites names that do not end in a number"
        )
    sizes = (dataset.sizes["chain"], dataset.sizes["draw"])
    values = {_site(key): v.values.reshape(-1, *v.shape[2:]) for key, v in dataset.data_vars.items()}
    values, done = agreeing(trained, _arrays(tree, run), values)
    for name, renumbering in done.items():
        dataset = dataset.assign_attrs({f"relabelled_{name}": renumbering.sentence})
        for key in renumbering.moved:
            old = dataset[_free(key)]
            new = values[key].reshape(*sizes, *old.shape[2:]).astype(old.dtype)
            dataset[_free(key)] = old.copy(data=new).assign_attrs(relabelled_by=name)
    tree["posterior"].dataset = dataset
    return tree


@dataclass(frozen=True)
class Renumbering:
    """What was done for one enumerated latent: a sentence, the latents that were renumbered, the order [S, K]."""

    sentence: str
    moved: tuple[str, ...] = ()
    order: np.ndarray | None = None


def agreeing(
    trained: Any, arrays: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Renumbering]]:
    """Draws [S, ...] of the latents with their components renumbered so that they agree, and what was done.

    `arrays` are the rows they were drawn for; draws of enumerated latents are renumbered where they are among them.
    """
    values, done, enumerated = dict(values), {}, trained.structure.enumerated
    for name in state_sites(trained.structure):
        others = {n: v for n, v in values.items() if n not in enumerated}
        found = orders(trained, arrays, others, name) if others else None
        if found is None:
            done[name] = Renumbering(f"the components of {name} are not exchangeable: nothing was renumbered")
            continue
        axes, order = found
        values |= renumbered(others, axes, order)
        moved = (*axes, *((name,) if name in values else ()))
        if name in values:
            states = np.asarray(values[name])
            flat = states.reshape(len(order), -1).astype(np.int64)
            values[name] = np.take_along_axis(np.argsort(order, 1), flat, 1).reshape(states.shape)
        count = int((order != np.arange(order.shape[1])).any(1).sum())
        said = f"components of {name} renumbered in {count} of {len(order)} draws (Stephens 2000): {', '.join(moved)}"
        done[name] = Renumbering(said, moved, order)
    return values, done


def agreed(trained: Any, draws: Draws) -> tuple[Draws, list[str]]:
    """What NUTS drew for the rows it was run on, components renumbered over all chains; and sentences that say so."""
    if not state_sites(trained.structure):
        return draws, []
    values, done = agreeing(trained, trained.arrays, draws.flat())
    shape = (draws.chains, draws.length)
    back = {name: values[name].reshape(*shape, *value.shape[2:]) for name, value in draws.values.items()}
    return replace(draws, values=back), [f"{r.sentence}; R-hat and ESS are theirs" for r in done.values() if r.moved]


def agreement(assignments: np.ndarray, pivot: int = 0) -> np.ndarray:
    """The order of the components in each draw, [S, K]: component k of draw s is what was its component order[s, k].

    `assignments` are p_s(n, k), [S, N, K]; the first average is that of the draw `pivot`.
    """
    from scipy.optimize import linear_sum_assignment

    draws, _, states = assignments.shape
    average, order = assignments[pivot], np.broadcast_to(np.arange(states), (draws, states))
    for _ in range(ROUNDS):
        # The entropy of p_s does not depend on its order, so that the cross-entropy alone is the cost.
        costs = -np.einsum("snj,nk->sjk", assignments, np.log(np.maximum(average, LEAST)), optimize=True)
        found = np.empty((draws, states), np.int64)
        for s, cost in enumerate(costs):
            old, new = linear_sum_assignment(cost)
            found[s, new] = old
        if np.array_equal(found, order):
            break
        order = found
        average = np.take_along_axis(assignments, order[:, None], 2).mean(0)
    return order


def probabilities(tables: np.ndarray) -> np.ndarray:
    """p(z_n = k | x_n, θ_s) of log p(x_n, z_n = k | θ_s), [S, N, K]."""
    tables = tables.astype(np.float64)
    return np.exp(tables - np.logaddexp.reduce(tables, axis=-1, keepdims=True))


def orders(
    trained: Any, arrays: Mapping[str, np.ndarray], variables: Mapping[str, np.ndarray], name: str
) -> tuple[dict[str, tuple[int, ...]], np.ndarray] | None:
    """The axes of the components of `name`, and their order in each draw [S, K]; None if they keep their places."""
    axes = component_axes(trained, arrays, variables, name)
    if axes is None:
        return None
    rows = spread(len(next(iter(arrays.values()))), MOST_ROWS)
    local = {n for n, s in trained.structure.latents.items() if s.local}
    values = {n: v[:, rows] if n in local else v for n, v in sites_of(trained.structure, variables).items()}
    if local.isdisjoint(values):
        values = {n: np.concatenate([v, *_reference(trained, n)]) for n, v in values.items()}
    tables, prior = trained.log_states({n: np.asarray(a)[rows] for n, a in arrays.items()}, values, [name])
    draws = len(next(iter(variables.values())))
    density = np.logaddexp.reduce(tables[name].astype(np.float64), axis=-1).sum(1) + prior
    assigned = probabilities(tables[name])
    order = agreement(assigned[:draws], int(np.argmax(density[:draws])))
    if len(assigned) > draws:
        average = np.take_along_axis(assigned[:draws], order[:, None], 2).mean(0)
        order = order[:, agreement(np.stack([assigned[draws], average]))[1]]
    return axes, order


def _reference(trained: Any, site: str) -> list[np.ndarray]:
    """The likeliest of all the draws of NUTS, [1, ...]: whichever draws are looked at, their components bear its numbers."""
    draws = getattr(trained, "draws", None)
    if draws is None:
        return []
    return [draws.flat()[site][[int(np.argmax(draws.stats["lp"]))]]]


def _arrays(tree: DataTree, run: Any) -> dict[str, np.ndarray]:
    """The rows of the tree as the program sees them."""
    raw = {}
    for group in ("constant_data", "observed_data"):
        if group in tree.children:
            held = tree[group].to_dataset()
            raw |= {_site(n): held[n].values for n in held.variables if held[n].dims[:1] == ("data",) and n != "data"}
    posterior = tree["posterior"].to_dataset()
    raw |= {
        _site(n): c.values for n, c in posterior.coords.items() if c.dims == ("data",) and n != "data" and n not in raw
    }
    wanted = {name: raw[name] for name in run.trained.structure.arrays if name in raw}
    missing = [name for name in run.trained.structure.arrays if name not in wanted]
    if missing:
        raise ProbgenError(
            f"relabel: the posterior holds no rows of {missing[0]!r}, so assignments cannot be computed: give the tree "
            "as run.posterior returned it"
        )
    return run.preparation.forward(wanted, np.random.default_rng(0))[0]


def _site(key: Any) -> str:
    """A site's own name; one that is the name of a dimension bears a low line in the tree."""
    return str(key)[:-1] if str(key).removesuffix("_") in RESERVED else str(key)


def _free(name: str) -> str:
    return f"{name}_" if name in RESERVED else name
