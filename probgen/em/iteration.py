"""One step of EM at one precision: E-step, closed forms in order, and the pieces for what has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from probgen.em.expectation import DataSite, Expectation
from probgen.em.links import Wiring
from probgen.em.maximisation import ClosedForm, ascent
from probgen.em.states import States

Leaves = Mapping[str, Any]


class Iteration:
    """The arithmetic of a step, compiled where the backend compiles.

    `step(leaves, blocks, average)` and `assigned(leaves, blocks, labels)` return a mapping: "leaves" after the closed
    forms, "stats" [S, M + 1], "kept" responsibilities where general sites need them, "total" log-likelihood before,
    "held" cells whose moments stay at a bound, "condition": what a density may have lost to rounding, in nats.
    """

    def __init__(self, host: Any, states: States, sites: list[DataSite], wiring: Wiring, by: Any, double: bool) -> None:
        self.host, self.states, self.wiring = host, states, wiring
        self.ops = host.ops(double)
        latents = {name: (states.families[name], _columned(states.values[name])) for name in states.latents}
        self.expectation = Expectation(self.ops, sites, latents, states.general, states.size, by.hard)
        known = {site.name: site for site in sites}
        self.forms = [self._form(link, known.get(link.site), by.floor) for link in wiring.closed]
        self.closed = tuple(dict.fromkeys(name for link in wiring.closed for name in link.parameters))
        self.step, self.first = host.jit(self._step), host.quick(self._assigned)
        self.total = host.jit(self._total)
        self.value, self.slope = host.jit(self._per_datum), host.jit(host.value_and_grad(self._per_datum))
        self.bends, self.params = host.quick(self._bends), host.quick(host.constrained)

    def _form(self, link: Any, site: DataSite | None, floor: float) -> ClosedForm:
        centre = 0.0 if site is None else self.expectation.centres[site.name]
        spread = np.zeros(()) if site is None else site.spread
        return ClosedForm(
            self.ops, link, self.states.families[link.site], self.wiring.vector, centre, spread, floor
        )  # fmt: skip

    # -- E and M --------------------------------------------------------------------------------------------------

    def _step(self, leaves: Leaves, blocks: Mapping[str, Any], average: tuple[Any, Any] | None) -> dict[str, Any]:
        args = self.states.arguments(self.ops, leaves)
        sums, kept = self._expected(leaves, args, blocks)
        stats = sums["stats"]
        if average is not None:
            before, rho = average
            stats = (1 - rho) * before + rho * stats / blocks["real"].sum()
        return {**self._maximised(leaves, args, stats), "total": sums["total"], "kept": kept}

    def _total(self, leaves: Leaves, blocks: Mapping[str, Any]) -> Any:
        return self._expected(leaves, self.states.arguments(self.ops, leaves), blocks)[0]["total"]

    def _expected(self, leaves: Leaves, args: Mapping[str, Any], blocks: Mapping[str, Any]) -> tuple[Any, Any]:
        weights = self.expectation.weights(args)
        return self.expectation.step(
            weights, blocks, args, lambda arrays: self.states.log_joint(self.ops, leaves, arrays)
        )

    def _assigned(self, leaves: Leaves, blocks: Mapping[str, Any]) -> dict[str, Any]:
        args = self.states.arguments(self.ops, leaves)
        self.expectation.weights(args)
        stats, kept = self.expectation.assigned(blocks, args)
        return {**self._maximised(leaves, args, stats), "kept": kept}

    def _maximised(self, leaves: Leaves, args: Mapping[str, Any], stats: Any) -> dict[str, Any]:
        """Every closed form, locations first, and what they give written back into the leaves."""
        params, parts, held = self.host.constrained(leaves), self.expectation.parts(stats, args), {}
        args, n = dict(args), stats[:, -1:]
        flat = self.ops.xp.concatenate([self.ops.cast(value).reshape(-1) for value in params.values()])
        for form in self.forms:
            link = form.link
            flat, args[link.site], held[f"{link.site}.{link.argument}"] = form.update(
                flat, args[link.site], parts[link.site], n
            )
        places = self.wiring.vector.places()
        new = {
            name: self.host.unconstrained(name, flat[places[name]].reshape(params[name].shape)) for name in self.closed
        }
        leaves, condition = {**leaves, **new}, self.expectation.condition(args)
        return {
            "leaves": leaves, "params": self.host.constrained(leaves), "stats": stats, "held": held, "condition": condition,
        }  # fmt: skip

    # -- Q --------------------------------------------------------------------------------------------------------

    def _per_datum(self, own: Leaves, others: Leaves, stats: Any, kept: Any, blocks: Mapping[str, Any] | None) -> Any:
        """Q in nats per datum, at fixed responsibilities."""
        leaves = {**others, **own}
        value = self.expectation.bound(self.expectation.weights(self.states.arguments(self.ops, leaves)), stats)
        if kept is not None:

            def one(block: Mapping[str, Any]) -> tuple[dict[str, Any], None]:
                arrays = {n.removeprefix("arrays/"): a for n, a in block.items() if n.startswith("arrays/")}
                return {"q": (block["kept"] * self.states.log_joint(self.ops, leaves, arrays)).sum()}, None

            value = value + self.ops.accumulated(one, {**blocks, "kept": kept})[0]["q"]
        return value / stats[:, -1].sum()

    def gains(self, found: Mapping[str, Any]) -> dict[str, float]:
        """What Q could still gain along its gradient in each closed-form parameter, in nats per datum.

        Zero where a closed form is the maximum; a moment held at a bound is passed over.
        """
        free = [link for link in self.wiring.closed if not bool(found["held"][f"{link.site}.{link.argument}"].any())]
        names = [name for link in free for name in link.parameters]
        slopes = self.bends({name: found["leaves"][name] for name in self.closed}, found["leaves"], found["stats"])
        pairs = {name: tuple(map(float, slopes[name])) for name in names}
        return {name: a**2 / (2 * abs(b)) if b else (0.0 if a == 0 else np.inf) for name, (a, b) in pairs.items()}

    def _bends(self, own: Leaves, leaves: Leaves, stats: Any) -> dict[str, tuple[Any, Any]]:
        def of(name: str) -> Any:
            return self.host.bend(lambda leaf: self._per_datum({name: leaf}, leaves, stats, None, None))

        return {name: of(name)(leaf) for name, leaf in own.items()}

    def climbed(self, found: Mapping[str, Any], blocks: Mapping[str, Any], rate: float) -> tuple[Leaves, Leaves, float]:
        """Leaves and parameters after gradient steps for what has no closed form, and the last step length."""
        names = [name for name in self.wiring.steps if name not in self.closed]
        if not names:
            return found["leaves"], found["params"], rate
        others = {name: leaf for name, leaf in found["leaves"].items() if name not in names}
        rest = (others, found["stats"], found["kept"], blocks if found["kept"] is not None else None)
        own, rate = ascent(
            lambda leaves: self.value(leaves, *rest),
            lambda leaves: self.slope(leaves, *rest),
            {name: found["leaves"][name] for name in names},
            rate,
        )
        leaves = {**others, **own}
        return leaves, self.params(leaves), rate


def _columned(values: np.ndarray) -> np.ndarray:
    """A latent's values in the joint states [S, *event] as [*event, 1, S]."""
    return np.moveaxis(values, 0, -1)[..., None, :]
