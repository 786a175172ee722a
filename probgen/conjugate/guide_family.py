"""The guide of coordinate ascent: which of its parameters is which argument of q(θ), and how they are written.

The guide is the user's own, in the family of the prior; its parameters are found as the local sites' arguments are, by
running it at values that are all different. A parameter may hold an argument itself, its reciprocal or the root of
either; of a rate also the mean precision, and of a Wishart's rate matrix R a Cholesky factor of R, R⁻¹, νR⁻¹ or R/ν.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from probgen.conjugate.conjugacy import Globals, View, canonical, located
from probgen.conjugate.priors import Hyper
from probgen.errors import ProbgenError

Params = Mapping[str, np.ndarray]

Form = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # from the arguments of a site


def _forms(argument: str, positive: bool) -> Iterator[Form]:
    """What a parameter may hold of an argument: itself, or the mean of its precision; both in several spellings."""
    if argument == "rate_matrix":
        inverse = np.linalg.inv
        for of in (lambda R, nu: R, lambda R, nu: inverse(R), lambda R, nu: nu * inverse(R), lambda R, nu: R / nu):
            for shape in (np.asarray, np.linalg.cholesky):
                yield lambda h, of=of, shape=shape: shape(of(h["rate_matrix"], h["concentration"][..., None, None]))
        return
    yield lambda h: h[argument]
    if not positive:
        return
    for power in (-1, 0.5, -0.5):
        yield lambda h, power=power: h[argument] ** power
    for power in (1, -1) if argument == "rate" else ():
        yield lambda h, power=power: (h["concentration"] / h["rate"]) ** power


_EXAMPLES = {
    "Dirichlet": 'dist.Dirichlet(pyro.param("{0}_concentration", ..., constraint=constraints.positive))',
    "Beta": 'dist.Beta(pyro.param("{0}_a", ...), pyro.param("{0}_b", ...))',
    "Gamma": 'dist.Gamma(pyro.param("{0}_concentration", ...), pyro.param("{0}_rate", ...))',
    "Normal": 'dist.Normal(pyro.param("{0}_loc", ...), pyro.param("{0}_scale", ...))',
    "Normal of a precision": 'dist.Normal(pyro.param("{0}_loc", ...), (pyro.param("{0}_kappa", ...) * {1})**-0.5)',
    "MultivariateNormal": (
        'dist.MultivariateNormal(pyro.param("{0}_loc", ...), precision_matrix=pyro.param("{0}_kappa", ...) * Λ)'
    ),
    "Wishart": 'dist.Wishart(pyro.param("{0}_concentration", ...), scale_tril=pyro.param("{0}_scale_tril", ...))',
}


@dataclass(frozen=True)
class Slot:
    """An argument of a guide site, and the place of each of its elements (or matrices) in the parameters."""

    site: str
    argument: str
    form: Form
    place: np.ndarray


@dataclass(frozen=True)
class GuideFamily:
    """The link between the arguments of q(θ) and the guide's parameters (constrained values)."""

    slots: tuple[Slot, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def written(self, hyper: Hyper, params: Params) -> dict[str, np.ndarray]:
        """The parameters at which the guide is the q(θ) of these arguments; those it does not read stay."""
        numbers = np.concatenate([np.zeros(0), *(np.ravel(params[name]) for name in self.shapes)]).astype(float)
        filled = np.full(numbers.shape, np.nan)
        for slot in self.slots:
            target = slot.form(hyper[slot.site])
            _fill(filled, slot, np.broadcast_to(target, slot.place.shape))
        numbers = np.where(np.isnan(filled), numbers, filled)
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])[:-1]
        parts = np.split(numbers, ends)
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def _fill(filled: np.ndarray, slot: Slot, target: np.ndarray) -> None:
    """Write a target where it belongs; elements that share a parameter must agree."""
    place, target = slot.place.ravel(), target.ravel()
    filled[place] = target
    if not np.allclose(filled[place], target, rtol=1e-5, atol=1e-8):
        raise ProbgenError(
            f"the guide uses one number for several elements of `{slot.argument}` of {slot.site!r} that the optimum has "
            "apart: give its pyro.param the shape of the argument"
        )


def guide_family(found: Globals, views: list[View], params: list[Params]) -> GuideFamily:
    """The link, from runs of the guide at several values of the latents and of its parameters."""
    for name, seen in found.views[0].items():
        if name not in views[0] or views[0][name].family != seen.family:
            there = f"a {views[0][name].family}" if name in views[0] else "nothing"
            raise ProbgenError(
                f"the guide draws {name!r} from {there}, and EM(variational=True) fills in one of the prior's family: "
                f'write pyro.sample("{name}", {example(found, name)})'
            )
    shapes = {name: value.shape for name, value in params[0].items()}
    hypers = [canonical(view, probe, found) for view, probe in zip(views, found.probes, strict=True)]
    slots = [_slot(found, name, argument, hypers, params) for name, own in hypers[0].items() for argument in own]
    return GuideFamily(tuple(slots), shapes)


def example(found: Globals, name: str) -> str:
    """What to write for a site of the guide."""
    family = found.family(name)
    key = "Wishart" if family == "WishartCholesky" else family
    parent = found.parents.get(name, ("", None))[0]
    text = _EXAMPLES["Normal of a precision" if key == "Normal" and parent else key].format(name, parent)
    return text.replace("dist.Wishart(", f"dist.{family}(")


def _slot(found: Globals, site: str, argument: str, hypers: list[Hyper], params: list[Params]) -> Slot:
    own = [hyper[site] for hyper in hypers]
    at = _matrices_at if argument == "rate_matrix" else _numbers_at
    for form in _forms(argument, all((h[argument] > 0).all() for h in own)):
        place = at([form(h) for h in own], params)
        if (place >= 0).all():
            return Slot(site, argument, form, place)
    raise ProbgenError(
        f"`{argument}` of the guide's {site!r} is not a parameter of its own, so that it cannot be set: write "
        f'pyro.sample("{site}", {example(found, site)})'
    )


def _numbers_at(wanted: list[np.ndarray], params: list[Params]) -> np.ndarray:
    return located(wanted, [np.concatenate([np.zeros(0), *map(np.ravel, p.values())]).astype(float) for p in params])


def _matrices_at(wanted: list[np.ndarray], params: list[Params]) -> np.ndarray:
    """The place of every element of each matrix, found matrix by matrix: zeros are alike everywhere."""
    d, start = wanted[0].shape[-1], 0
    place = np.full(wanted[0].shape, -1)
    for name, value in params[0].items():
        if value.shape[-2:] == (d, d):
            among = [np.asarray(p[name], float).reshape(-1, d, d) for p in params]
            same = np.all([_close(w, a) for w, a in zip(wanted, among, strict=True)], axis=0)
            own = start + np.arange(value.size).reshape(-1, d, d)
            place = np.where(same.any(-1)[..., None, None], own[same.argmax(-1)], place)
        start += value.size
    return place


def _close(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Which matrix equals which, [..., J]."""
    return np.abs(wanted[..., None, :, :] - among).max((-1, -2)) < 1e-3 * (1 + np.abs(wanted).max((-1, -2)))[..., None]
