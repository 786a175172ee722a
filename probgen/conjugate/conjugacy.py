"""Which local sites a program's priors are conjugate to, found by running it: nothing goes by name.

The global latents are set to values that are all different, the program is run with its local latents at every joint
state s, and each argument of a local site is looked for among those values. What is found makes its log density
linear in the statistics of the priors,

    log p(x_n, s | θ) = T(x_n)·G_s u(θ) + h(x_n)

and is then held against the program's own log density at other values: a site that does not pass is not conjugate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probgen.conjugate.linear_form import ONE, LinearForm, NumpyOperators
from probgen.conjugate.priors import Beta, Dirichlet, Hyper, Means, Normal, NormalGamma, NormalWishart, Prior
from probgen.errors import ProbgenError

PROBES = 3  # runs of the program that tell which argument is what; two would do but for chance
PRIORS = ("Dirichlet", "Beta", "Gamma", "Normal", "MultivariateNormal", "Wishart", "WishartCholesky")
READS: dict[str, dict[str, int]] = {  # the arguments a family is read by, and the axes of each that are one event
    "Dirichlet": {"concentration": 1},
    "Beta": {"concentration1": 0, "concentration0": 0},
    "Gamma": {"concentration": 0, "rate": 0},
    "Normal": {"loc": 0, "scale": 0},
    "MultivariateNormal": {"loc": 1, "precision_matrix": 2},
    "Wishart": {"concentration": 0, "scale_tril": 2},
    "WishartCholesky": {"concentration": 0, "scale_tril": 2},
    "Categorical": {"probs": 1},
    "Bernoulli": {"probs": 0},
    "Poisson": {"rate": 0},
    "Exponential": {"rate": 0},
}
TOLERANCE = 2e-4  # of float32 arguments that went through a Cholesky factor or a square root
CURE = "use ELBO() or NUTS()"


@dataclass(frozen=True)
class Seen:
    """A site as one run shows it, in float64.

    A global site: the arguments in full shape. A local one: every argument [S, R, ...] over joint states and rows,
    its log density [S, R], and its value [R, ...], or [S] where it is one of the latents that make up the state.
    """

    family: str
    arguments: Mapping[str, np.ndarray]
    value: np.ndarray
    log_prob: np.ndarray
    enumerated: bool = False


View = Mapping[str, Seen]


def family_name(distribution: Any) -> str:
    """The family of an unwrapped distribution, in both PPLs' spelling."""
    return type(distribution).__name__.removesuffix("Probs").removesuffix("Logits")


def arguments_of(distribution: Any) -> dict[str, Any]:
    """The arguments of an unwrapped distribution, as they are."""
    names = READS.get(family_name(distribution), {})
    other = {"concentration": "df"} if hasattr(distribution, "df") else {}  # torch's Wishart
    return {name: getattr(distribution, other.get(name, name)) for name in names}


def in_full(family: str, arguments: Mapping[str, Any], elements: tuple[int, ...], xp: Any = np) -> dict[str, Any]:
    """Arguments for each element of a site (an event of its unwrapped distribution), with the operators `xp`."""
    found = {}
    for name, value in arguments.items():
        value = xp.asarray(value)
        found[name] = xp.broadcast_to(value, (*elements, *value.shape[value.ndim - READS[family][name] :]))
    return found


@dataclass(frozen=True)
class Pool:
    """Elements of global latents of one kind: their values in each probe, and their coordinates in u."""

    values: list[np.ndarray]
    at: dict[str, np.ndarray]


def spread(number: int, probe: int) -> np.ndarray:
    """Numbers in (0, 1), all different, also from those of the other probes."""
    order = np.random.default_rng(probe).permutation(number)
    return (order + (probe + 1) / (PROBES + 1)) / number


def distinct(sites: Mapping[str, tuple[str, tuple[int, ...]]], probe: int) -> dict[str, np.ndarray]:
    """Values of the sites {name: (family, shape)} inside their supports, well conditioned and all different."""
    families: dict[str, list[str]] = {}
    for name, (family, _) in sites.items():
        families.setdefault(family, []).append(name)
    found = {}
    for family, names in families.items():
        sizes = [int(np.prod(sites[name][1])) for name in names]
        parts = np.split(spread(sum(sizes), probe), np.cumsum(sizes)[:-1])
        for name, part in zip(names, parts, strict=True):
            found[name] = _supported(family, part.reshape(sites[name][1]))
    return found


def _supported(family: str, unit: np.ndarray) -> np.ndarray:
    """Numbers in (0, 1), taken to the support of a family."""
    if family == "Dirichlet":
        return (1 + unit) / (1 + unit).sum(-1, keepdims=True)
    if family == "Beta":
        return 0.2 + 0.6 * unit
    if family == "Gamma":
        return 0.5 + unit
    if family in ("Wishart", "WishartCholesky"):
        d = unit.shape[-1]
        tril = np.tril(unit - 0.5, -1) / d + np.eye(d) * (0.75 + unit / 2)
        return tril if family == "WishartCholesky" else tril @ np.swapaxes(tril, -1, -2)
    return 2 * unit - 1


def located(wanted: Sequence[np.ndarray], among: Sequence[np.ndarray]) -> np.ndarray:
    """The place in the flat `among` that each element of `wanted` is equal to in all probes; −1 for none."""
    if not among[0].size:
        return np.full(wanted[0].shape, -1)
    order = np.argsort(among[0])
    after = np.clip(np.searchsorted(among[0][order], wanted[0]), 1, max(1, len(order) - 1))
    best = np.full(wanted[0].shape, -1)
    for place in (np.minimum(after, len(order) - 1), after - 1):
        index = order[place]
        same = np.all([np.abs(w - a[index]) < _slack(a) for w, a in zip(wanted, among, strict=True)], axis=0)
        best = np.where(same, index, best)
    return best


def _slack(values: np.ndarray) -> float:
    """How far from an element a number may be and still be it: a third of the smallest gap, at most the tolerance."""
    gaps = np.diff(np.sort(values))
    return min(TOLERANCE, *(gaps[gaps > 0] / 3)) * max(1.0, np.abs(values).max()) if (gaps > 0).any() else TOLERANCE


# -- the priors ---------------------------------------------------------------------------------------------------


@dataclass
class Globals:
    """The global latents while their blocks are found: coordinates are handed out one after the other."""

    probes: list[dict[str, np.ndarray]]
    views: list[View]
    blocks: list[Any] = field(default_factory=list)
    parents: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)  # {mean: (precision site, index)}
    size: int = 0

    def new(self, shape: tuple[int, ...]) -> np.ndarray:
        """Fresh coordinates."""
        start, self.size = self.size, self.size + int(np.prod(shape))
        return np.arange(start, self.size).reshape(shape)

    def family(self, name: str) -> str:
        """The family of a site's prior."""
        return self.views[0][name].family

    def of(self, *families: str) -> list[str]:
        """The sites of these families."""
        return [name for name in self.views[0] if self.family(name) in families]

    def values(self, names: Sequence[str]) -> list[np.ndarray]:
        """The values of sites in each probe, flat."""
        return [np.concatenate([np.zeros(0), *(probe[n].ravel() for n in names)]) for probe in self.probes]


def prior_of(probes: list[dict[str, np.ndarray]], views: list[View]) -> tuple[Prior, Globals]:
    """The conjugate prior of the global latents, from runs of the model at the values `probes`."""
    found = Globals(probes, views)
    for name in found.of("Dirichlet"):
        found.blocks.append(Dirichlet(name, found.new(views[0][name].value.shape)))
    for name in found.of("Beta"):
        found.blocks.append(Beta(name, found.new((*views[0][name].value.shape, 2))))
    for name in found.of("Normal", "MultivariateNormal"):
        _find_parent(found, name)
    for name in found.of("Gamma"):
        shape = views[0][name].value.shape
        found.blocks.append(NormalGamma(name, found.new(shape), found.new(shape), _means(found, name)))
    for name in found.of("Wishart", "WishartCholesky"):
        shape, cholesky = views[0][name].value.shape, found.family(name) == "WishartCholesky"
        log, minus = found.new(shape[:-2]), found.new(shape)
        found.blocks.append(NormalWishart(name, log, minus, cholesky, _means(found, name)))
    for name in found.of("Normal"):
        if name not in found.parents:
            shape = views[0][name].value.shape
            found.blocks.append(Normal(name, found.new(shape), found.new(shape)))
    hypers = [canonical(view, probe, found) for view, probe in zip(views, probes, strict=True)]
    _refuse_changing(hypers)
    prior = Prior(tuple(found.blocks), np.zeros(found.size))
    return Prior(prior.blocks, prior.of(hypers[0])), found


def _means(found: Globals, precision: str) -> tuple[Means, ...]:
    """The Normal latents whose precision is a multiple of that of a site."""
    means = []
    for name, (parent, index) in found.parents.items():
        if parent == precision:
            shape = found.views[0][name].value.shape
            means.append(Means(name, found.new(shape), found.new(index.shape), index))
    return tuple(means)


def _find_parent(found: Globals, name: str) -> None:
    """Which precision a Normal latent's own is a multiple of, element by element; none where it is fixed."""
    matrices = found.family(name) == "MultivariateNormal"
    own = [_precision(view[name]) for view in found.views]
    if not matrices and all(_same(own[0], other) for other in own[1:]):
        return
    for site in found.of("Wishart", "WishartCholesky") if matrices else found.of("Gamma"):
        index = _multiples(own, [_elements(found.family(site), probe[site]) for probe in found.probes], matrices)
        if (index >= 0).all():
            found.parents[name] = (site, index)
            return
    of_what = "a matrix κΛ with Λ of a Wishart site" if matrices else "a fixed number, or κτ with τ of a Gamma site"
    raise ProbgenError(
        f"the precision of the prior of {name!r} is not {of_what}, so it is not conjugate: write it so, or {CURE}"
    )


def _elements(family: str, value: np.ndarray) -> np.ndarray:
    """The precisions of a site, one after the other: numbers, or matrices [J, D, D]."""
    if family == "Gamma":
        return value.ravel()
    flat = value.reshape(-1, *value.shape[-2:])
    return flat @ np.swapaxes(flat, -1, -2) if family == "WishartCholesky" else flat


def _multiples(own: list[np.ndarray], among: list[np.ndarray], matrices: bool) -> np.ndarray:
    """For each precision, which of those `among` it is a multiple κ of, with one κ in all probes; −1 for none."""
    kappas = [_ratio(p, a, matrices) for p, a in zip(own, among, strict=True)]  # [..., J]
    fits = np.all([np.isfinite(k) & (np.abs(k - kappas[0]) < TOLERANCE * np.abs(k)) for k in kappas], axis=0)
    return np.where(fits.any(-1), fits.argmax(-1), -1)


def _ratio(own: np.ndarray, among: np.ndarray, matrices: bool) -> np.ndarray:
    if not matrices:
        return own[..., None] / among
    own, kappa = own[..., None, :, :], np.zeros((*own.shape[:-2], len(among)))
    if own.shape[-1] != among.shape[-1]:
        return np.full(kappa.shape, np.nan)
    kappa = np.trace(own @ np.linalg.inv(among), axis1=-2, axis2=-1) / among.shape[-1]
    error = np.abs(own - kappa[..., None, None] * among).max((-1, -2))
    return np.where(error < 5 * TOLERANCE * np.abs(own).max((-1, -2)), kappa, np.nan)


def _precision(seen: Seen) -> np.ndarray:
    """Of a Normal site: 1/σ², or the matrix."""
    if "precision_matrix" in seen.arguments:
        return seen.arguments["precision_matrix"]
    return seen.arguments["scale"] ** -2.0


def canonical(view: View, probe: Mapping[str, np.ndarray], found: Globals) -> Hyper:
    """The arguments of the global sites as the blocks name them: precisions in units of their parents', rates."""
    hyper: Hyper = {}
    for name, seen in view.items():
        own = dict(seen.arguments)
        if seen.family in ("Normal", "MultivariateNormal"):
            kappa = _precision(seen)
            if name in found.parents:
                site, index = found.parents[name]
                among = _elements(found.family(site), probe[site])
                ratios = _ratio(kappa, among, seen.family == "MultivariateNormal")
                kappa = np.take_along_axis(ratios, index[..., None], -1)[..., 0]
            own = {"loc": own["loc"], "precision": kappa}
        elif seen.family in ("Wishart", "WishartCholesky"):
            inverse = np.linalg.inv(own["scale_tril"])
            own = {"concentration": own["concentration"], "rate_matrix": np.swapaxes(inverse, -1, -2) @ inverse}
        hyper[name] = own
    return hyper


def _refuse_changing(hypers: list[Hyper]) -> None:
    for name, own in hypers[0].items():
        for argument, value in own.items():
            if not all(_same(value, other[name][argument]) for other in hypers[1:]):
                raise ProbgenError(
                    f"`{argument}` of the prior of {name!r} depends on another latent, so it is not conjugate: fix it, "
                    f"or {CURE}"
                )


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(np.abs(a - b) <= 5 * TOLERANCE * (np.abs(a) + np.abs(a).max())))


# -- the local sites ----------------------------------------------------------------------------------------------


class Links:
    """Where in u each argument of the local sites lies."""

    def __init__(self, prior: Prior, found: Globals) -> None:
        self.found, blocks = found, prior.blocks
        self.simplex = self._pool([b for b in blocks if isinstance(b, Dirichlet)], log="log")
        self.beta = self._beta([b for b in blocks if isinstance(b, Beta)])
        gammas = [b for b in blocks if isinstance(b, NormalGamma)]
        self.gamma = self._pool(gammas, log="log", minus="minus")
        self.free = self._pool([b for b in blocks if isinstance(b, Normal)], first="first", second="second")
        self.means = self._means(gammas)
        self.wisharts = [b for b in blocks if isinstance(b, NormalWishart)]

    def _pool(self, blocks: list[Any], **at: str) -> Pool:
        none = np.zeros(0, int)
        return Pool(
            self.found.values([b.site for b in blocks]),
            {name: np.concatenate([none, *(getattr(b, of).ravel() for b in blocks)]) for name, of in at.items()},
        )

    def _beta(self, blocks: list[Beta]) -> Pool:
        none = np.zeros(0, int)
        both = [np.concatenate([none, *(b.log[..., i].ravel() for b in blocks)]) for i in (0, 1)]
        return Pool(self.found.values([b.site for b in blocks]), {"yes": both[0], "no": both[1]})

    def _means(self, gammas: list[NormalGamma]) -> Pool:
        """The means that have a Gamma precision, `parent` its place in the pool of these."""
        none, sites, parts, start = np.zeros(0, int), [], {"first": [], "second": [], "parent": []}, 0
        for block in gammas:
            for mean in block.means:
                sites.append(mean.site)
                parts["first"].append(mean.first.ravel())
                parts["second"].append(mean.second.ravel())
                parts["parent"].append(start + mean.parent.ravel())
            start += block.log.size
        return Pool(self.found.values(sites), {name: np.concatenate([none, *p]) for name, p in parts.items()})


def linear_form(prior: Prior, found: Globals, views: list[View]) -> LinearForm:
    """The features T and the coefficients G of all local sites, checked against the program's own log density."""
    links, form = (
        Links(prior, found),
        LinearForm(states=next(iter(views[0].values())).log_prob.shape[0], size=found.size),
    )
    for name, seen in views[0].items():
        if seen.family not in _LOCAL:
            raise ProbgenError(
                f"{name!r} is a {seen.family}, to which no prior here is conjugate (there are "
                f"{', '.join(_LOCAL)}): {CURE}"
            )
        arguments = [_without_rows(name, view[name]) for view in views]
        part = LinearForm(form.states, form.size)
        try:
            _LOCAL[seen.family](part, name, seen, arguments, links)
        except _NotLinked as problem:
            raise ProbgenError(f"the program is not conjugate at {name!r}: {problem}; change it, or {CURE}") from None
        for view, probe in zip(views, found.probes, strict=True):
            _hold_against(part, name, view[name], prior.statistics(probe))
        form.join(part)
    return form


def _hold_against(part: LinearForm, name: str, seen: Seen, statistics: np.ndarray) -> None:
    """The linear form of one site equals the program's own log density."""
    states, rows = seen.log_prob.shape
    logits = np.empty((states, rows))
    weights = part.weights(statistics)
    for n in range(rows):
        values = {} if seen.enumerated else {name: seen.value[n : n + 1]}
        logits[:, n] = (weights @ part.matrix(NumpyOperators(), values, 1))[:, 0] + part.base(values)
    error = np.abs(logits - seen.log_prob)
    if not np.all(error < 50 * TOLERANCE * (1 + np.abs(seen.log_prob))):
        raise ProbgenError(
            f"the log density of {name!r} is not the plain one of its {seen.family} (a mask, a scale or another "
            f"weight is on it), so it is not conjugate: {CURE}"
        )


class _NotLinked(Exception):
    """An argument of a local site is neither a conjugate latent nor fixed."""


def _without_rows(name: str, seen: Seen) -> dict[str, np.ndarray]:
    """The arguments of a local site, [S, ...]: the same for every row."""
    for argument, value in seen.arguments.items():
        if not _same(value, np.broadcast_to(value[:, :1], value.shape)):
            raise ProbgenError(
                f"`{argument}` of {name!r} differs from row to row (a regression on other arrays), which has no "
                f"conjugate update here: {CURE}"
            )
    return {argument: value[:, 0] for argument, value in seen.arguments.items()}


def _linked(wanted: list[np.ndarray], pool: Pool, argument: str, prior: str) -> tuple[np.ndarray, np.ndarray]:
    """The place of each element in the pool, −1 where it is fixed, and its value; an error where it is neither."""
    place = located(wanted, pool.values)
    fixed = np.all([np.abs(w - wanted[0]) <= TOLERANCE * (1 + np.abs(wanted[0])) for w in wanted], axis=0)
    if not ((place >= 0) | fixed).all():
        raise _NotLinked(f"its `{argument}` is neither fixed nor a latent with a {prior} prior")
    return np.where(fixed, -1, place), wanted[0]


def _entry(
    form: LinearForm, column: Any, place: np.ndarray, coordinates: np.ndarray, fixed: np.ndarray, times: Any = 1.0
) -> None:
    """times · u at `place` of the coordinates, or times · the number that stands there."""
    padded = np.append(coordinates, ONE)
    times = np.broadcast_to(times, place.shape)
    form.add(column, padded[place], np.where(place >= 0, times, times * fixed))


def _flat(values: list[dict[str, np.ndarray]], argument: str) -> list[np.ndarray]:
    """An argument in every probe, [S, d]."""
    return [v[argument].reshape(len(v[argument]), -1) for v in values]


def _categorical(form: LinearForm, name: str, seen: Seen, arguments: list[dict], links: Links) -> None:
    """log p(x = c) = log π_c: at a state's own value, or one column a class."""
    probs = [a["probs"].reshape(len(a["probs"]), -1, a["probs"].shape[-1]) for a in arguments]
    place, value = _linked(probs, links.simplex, "probs", "Dirichlet")
    logs = np.log(np.maximum(value, np.finfo(float).tiny))
    if seen.enumerated:
        states = np.arange(form.states), 0, seen.value.astype(int)
        _entry(form, 0, place[states], links.simplex.at["log"], logs[states])
    else:
        e, c = value.shape[1:]
        columns = form.columns(name, "Categorical", c, e, classes=c)
        _entry(form, columns.T, place, links.simplex.at["log"], logs)


def _bernoulli(form: LinearForm, name: str, seen: Seen, arguments: list[dict], links: Links) -> None:
    """log p(x) = x log p + (1 − x) log(1 − p)."""
    place, p = _linked(_flat(arguments, "probs"), links.beta, "probs", "Beta")
    yes, no = links.beta.at["yes"], links.beta.at["no"]
    if seen.enumerated:
        on, place, p = seen.value > 0.5, place[:, 0], p[:, 0]
        coordinate = np.where(on, np.append(yes, ONE)[place], np.append(no, ONE)[place])
        form.add(0, coordinate, np.where(place >= 0, 1.0, np.where(on, np.log(p), np.log1p(-p))))
        return
    (x,) = form.columns(name, "Bernoulli", 1, p.shape[1])
    _entry(form, 0, place, no, np.log1p(-p))
    _entry(form, x, place, yes, np.log(p))
    _entry(form, x, place, no, np.log1p(-p), -1.0)


def _poisson(form: LinearForm, name: str, seen: Seen, arguments: list[dict], links: Links) -> None:
    """log p(x) = x log λ − λ − log x!."""
    place, rate = _linked(_flat(arguments, "rate"), links.gamma, "rate", "Gamma")
    (x,) = form.columns(name, "Poisson", 1, rate.shape[1])
    _entry(form, x, place, links.gamma.at["log"], np.log(rate))
    _entry(form, 0, place, links.gamma.at["minus"], -rate)


def _exponential(form: LinearForm, name: str, seen: Seen, arguments: list[dict], links: Links) -> None:
    """log p(x) = log λ − λ x."""
    place, rate = _linked(_flat(arguments, "rate"), links.gamma, "rate", "Gamma")
    _entry(form, 0, place, links.gamma.at["log"], np.log(rate))
    (x,) = form.columns(name, "Exponential", 1, rate.shape[1])
    _entry(form, x, place, links.gamma.at["minus"], -rate)


def _normal(form: LinearForm, name: str, seen: Seen, arguments: list[dict], links: Links) -> None:
    """log p(x) = log(τ)/2 − τ x²/2 + τμ x − τμ²/2 − log(2π)/2."""
    scales = [s**-2.0 for s in _flat(arguments, "scale")]
    t, tau = _linked(scales, links.gamma, "scale", "Gamma (as τ^-1/2)")
    locs = _flat(arguments, "loc")
    free, means = located(locs, links.free.values), located(locs, links.means.values)
    fixed = np.all([np.abs(w - locs[0]) <= TOLERANCE * (1 + np.abs(locs[0])) for w in locs], axis=0)
    square, x = form.columns(name, "Normal", 2, tau.shape[1])
    _entry(form, 0, t, links.gamma.at["log"], np.log(tau), 0.5)
    _entry(form, square, t, links.gamma.at["minus"], -tau, 0.5)
    if fixed.all():  # −τ (x²/2 − m x + m²/2)
        _entry(form, x, t, links.gamma.at["minus"], -tau, -locs[0])
        _entry(form, 0, t, links.gamma.at["minus"], -tau, locs[0] ** 2 / 2)
    elif (free >= 0).all() and (t < 0).all():
        form.add(x, links.free.at["first"][free], tau)
        form.add(0, links.free.at["second"][free], tau)
    elif (means >= 0).all() and (links.means.at["parent"][means] == t).all():
        form.add(x, links.means.at["first"][means], 1.0)
        form.add(0, links.means.at["second"][means], 1.0)
    else:
        raise _NotLinked(
            "its `loc` is not fixed, nor a latent with a Normal prior whose precision is a multiple of the site's own "
            "(μ | τ ~ Normal(m, (κ τ)^-1/2), or a fixed `scale` at both)"
        )


def _multivariate_normal(form: LinearForm, name: str, seen: Seen, arguments: list[dict], links: Links) -> None:
    """log p(x) = log|Λ|/2 − xᵀΛx/2 + xᵀΛμ − μᵀΛμ/2 − D log(2π)/2."""
    if arguments[0]["loc"].ndim != 2:
        raise _NotLinked("it has further axes beside the rows, and one vector a row is known here")
    for block in links.wisharts:
        precisions = [_elements(links.found.family(block.site), probe[block.site]) for probe in links.found.probes]
        own = [a["precision_matrix"] for a in arguments]
        j = _multiples(own, precisions, matrices=True)
        if (j < 0).any() or not np.allclose(_ratio(own[0], precisions[0], True)[np.arange(len(j)), j], 1, atol=1e-3):
            continue
        for mean in block.means:
            d = mean.first.shape[-1]
            values = [probe[mean.site].reshape(-1, d) for probe in links.found.probes]
            i = _vectors([a["loc"] for a in arguments], values)
            if (i >= 0).all() and (mean.parent.ravel()[i] == j).all():
                upper = np.triu_indices(d)
                columns = form.columns(name, "MultivariateNormal", len(upper[0]) + d, 1, d)[:, 0]
                pairs, x = columns[:-d], columns[-d:]
                matrix = block.minus.reshape(-1, d, d)[j]
                off = np.where(upper[0] == upper[1], 0.0, 1.0)
                form.add(0, block.log.ravel()[j], 0.5)
                form.add(0, mean.second.ravel()[i], 1.0)
                form.add(x, mean.first.reshape(-1, d)[i], 1.0)
                form.add(pairs, matrix[:, upper[0], upper[1]], 1.0)
                form.add(pairs, matrix[:, upper[1], upper[0]], off)
                return
    raise _NotLinked(
        "it is not a MultivariateNormal(μ, precision Λ) with Λ of a Wishart site and μ | Λ ~ "
        "MultivariateNormal(m, precision κΛ)"
    )


def _vectors(wanted: list[np.ndarray], among: list[np.ndarray]) -> np.ndarray:
    """Which row of `among` each row of `wanted` is, in all probes; −1 for none."""
    if wanted[0].shape[-1] != among[0].shape[-1]:
        return np.full(len(wanted[0]), -1)
    same = np.all([np.abs(w[:, None] - a).max(-1) < TOLERANCE for w, a in zip(wanted, among, strict=True)], axis=0)
    return np.where(same.any(-1), same.argmax(-1), -1)


_LOCAL: dict[str, Callable[..., None]] = {
    "Categorical": _categorical,
    "Bernoulli": _bernoulli,
    "Poisson": _poisson,
    "Exponential": _exponential,
    "Normal": _normal,
    "MultivariateNormal": _multivariate_normal,
}
