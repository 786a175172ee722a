"""Expectation-maximisation (Dempster, Laird & Rubin 1977) on any program whose latents can be enumerated.

    E:  r_ns = p(s | x_n, θ)          over all joint states s of the marked latents
    M:  θ ← argmax_θ Q(θ) = Σ_n Σ_s r_ns log p(x_n, s | θ)

A step is one E and one M over all rows. The log-likelihood never falls. Which parameters have a closed form is read
off the program (`probgen.em.links`); the others take gradient steps that never lower Q (generalised EM).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from probgen.em.expectation import seen
from probgen.em.exponential import family_of
from probgen.em.iteration import Iteration
from probgen.em.seeding import RESTART, SHORT, centres, nearest, refuse_few_rows, standardised
from probgen.em.states import States
from probgen.errors import ProbgenError
from probgen.program import rows_of

if TYPE_CHECKING:
    from probgen.em.settings import Settings

VANISHES = {True: 1e-8, False: 1e-5}  # nats per datum that Q may still gain along a gradient said to vanish
CONDITION = 1e-3  # nats per row that single precision may lose in x² before double takes over
DEAD = 1e-3  # rows' worth of responsibility under which a state counts as dead

SAMPLE = 10_000  # rows that stepwise EM starts from
UNVANISHED = "the gradient of Q does not vanish after its closed form"
SCALARS = ("step", "total", "gain", "rate", "double")

State = dict[str, Any]


class Engine:
    """Learns a program by EM; `host` runs it and computes (`probgen.pyro.em.Host`, `probgen.numpyro.em.Host`).

    A state holds the leaves, the log-likelihood before the last step, and the parameters after every step; stepwise,
    after every epoch. What prepares rows at random does so once, or the likelihood would move with the noise.
    """

    batches_per_step = 1

    def __init__(self, host: Any, by: Settings, feed: Any, options: Any) -> None:
        self.host, self.by, self.feed, self.options = host, by, feed, options
        self.structure, self.device, self.compiled = host.structure, host.device, host.compiled
        self.chunk = 1 if by.stepwise is None else None  # a row of the curves for every step over all rows
        if by.stepwise is None and feed.batch_size < feed.rows:
            raise ProbgenError(
                f"EM takes all {feed.rows} rows in a step: give batch_size=None, or EM(stepwise=0.7) for minibatches"
            )
        self.arrays = feed.batch(0) if by.stepwise is None else _some(feed)
        self.rows = rows_of(self.arrays)
        self._said: list[str] = []
        self._parts: dict[Any, Iteration] = {}
        self._kept: dict[Any, Any] = {}
        with host.scope(False):
            self.states = States(host, self.arrays, "EM")
            if self.by.init != "program":
                refuse_few_rows(next(iter(self.states.values), ""), self.states.size, self.rows)
            self.wiring = self.states.wiring()
            names = (*self.states.data, *[n for n in self.states.general if self.structure.model[n].role == "observed"])
            self.observed = host.values(self.arrays, self._held(), names)
            tables = self.states.table
            self.sites = [seen(n, self.states.families[n], self.observed[n], tables[n]) for n in self.states.data]
        self._refuse_stepwise()
        self._refuse_flat()
        self._started: State | None = None

    # -- what it says ---------------------------------------------------------------------------------------------

    @property
    def note(self) -> str:
        """What is in closed form and what is not, and what was said on the way."""
        return ". ".join([str(self.wiring), *self._said])

    def table(self) -> list[tuple[str, str, str]]:
        """A row for each parameter: its name, the argument that it feeds, how it is learned."""
        return self.wiring.lines()

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.append(sentence)
            warnings.warn(sentence, stacklevel=2)

    def _refuse_stepwise(self) -> None:
        if self.by.stepwise is not None and self.states.general:
            raise ProbgenError(
                f"EM(stepwise=...) averages sufficient statistics, and the site {self.states.general[0]!r} has none: use "
                "EM(), or ELBO() for minibatches"
            )

    def _refuse_flat(self) -> None:
        """Constant columns: a variance of zero, held at a floor where there is one."""
        for site in self.sites:
            flat = site.spread <= 1e-12 * np.maximum(site.centre**2, np.finfo(np.float32).tiny)
            scaled = [
                link
                for link in self.wiring.closed
                if link.site == site.name and site.family.located and link.argument != "loc"
            ]
            if not flat.any() or not scaled:
                continue
            column = int(np.flatnonzero(flat.reshape(-1))[0])
            if flat.all():
                raise ProbgenError(
                    f"all rows of {site.name!r} are equal, so no variance fits them: give data that vary, or a model "
                    "whose scale is fixed"
                )
            if not self.by.floor:
                raise ProbgenError(
                    f"the column {column} of {site.name!r} is constant, so no variance fits it: leave it out, or give EM "
                    "a floor above 0"
                )
            site.spread[flat] = site.spread[~flat].mean()
            self._say(f"the column {column} of {site.name!r} is constant: its variance is held at the floor")

    # -- the state ------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The state before step 0, a pure function of the seed: the best of the restarts."""
        if self._started is None:
            found = [self._short(restart) for restart in range(self.by.restarts)]
            totals = [self._total(state, self.arrays) for state in found] if len(found) > 1 else [0.0]
            self._started = found[int(np.argmax(totals))]
        return self._started

    def _short(self, restart: int) -> State:
        state = self._seeded(self.options.seed + RESTART * restart)
        for _ in range(SHORT if self.by.restarts > 1 else 0):
            state = self._moved(state, self.arrays)
        return {**state, "step": 0, "total": -np.inf, "gain": np.inf, "history": (state["params"],)}

    def _seeded(self, seed: int) -> State:
        """Parameters from rows given to centres, or as the program has them."""
        state: State = {
            "leaves": dict(self.host.start), "step": 0, "total": -np.inf, "gain": np.inf, "rate": 1e-2,
            "double": self.options.precision == "64", "stats": None, "history": (), "steps": (),
        }  # fmt: skip
        if self.by.init != "program" and self.states.size > 1:
            points = standardised(list(self.observed.values()))
            chosen = centres(points, self.states.size, self.by.init, seed)
            distinct = len(np.unique(chosen, axis=0))
            if distinct < len(chosen):
                self._say(
                    f"the data have too few distinct rows for {len(chosen)} states: {len(chosen) - distinct} of them start "
                    "where another does"
                )
            state = self._moved(state, self.arrays, nearest(points, chosen))
        elif self.by.stepwise is not None:
            state = {**state, "stats": self._moved(state, self.arrays)["stats"]}
        with self.host.scope(state["double"]):
            return {**state, "params": self._work(state).params(state["leaves"])}

    # -- a step ---------------------------------------------------------------------------------------------------

    def advance(self, state: State, first: int, last: int) -> tuple[State, dict[str, np.ndarray]]:
        """Steps `first` to `last` − 1; the loss of each is taken at the parameters before it."""
        losses = []
        for step in range(first, last):
            arrays = self.arrays if self.by.stepwise is None else self.feed.batch(step)
            before = state["total"]
            state = self._moved(state, arrays)
            state |= {"gain": state["total"] - before, "step": step + 1}
            if self.by.stepwise is None or (step + 1) % self.feed.steps_per_epoch == 0:
                state["history"] = (*state["history"], state["params"])
            losses.append(-state["total"])
        return state, {"loss": np.array(losses)}

    def _moved(self, state: State, arrays: Mapping[str, np.ndarray], labels: np.ndarray | None = None) -> State:
        """One E and one M; with `labels` the rows belong to one state each, and there is only an M."""
        step = state["step"]
        with self.host.scope(state["double"]):
            work, blocks = self._work(state), self._blocks(state, arrays)
            average = self._average(state) if labels is None else None
            if labels is None:
                found = work.step(state["leaves"], blocks, average)
            else:
                found = work.first(state["leaves"], work.expectation.labelled(labels, blocks))
            rows = rows_of(arrays)
            total = state["total"] if labels is not None else float(found["total"]) / rows
            if step & (step + 1) == 0 and not np.isnan(total):
                wrong = self._unvanished(work, found, state)
                if wrong:
                    return self._moved({**state, "steps": tuple(sorted({*state["steps"], *wrong}))}, arrays, labels)
            leaves, params, rate = work.climbed(found, blocks, state["rate"])
            self._tell(found, rows)
            double = state["double"] or self._needs_double(found)
            stats = found["stats"] if average is not None else found["stats"] / rows
            return {
                **state, "leaves": leaves, "total": total, "rate": rate, "double": double,
                "stats": stats if self.by.stepwise is not None else None, "params": params,
            }  # fmt: skip

    def _average(self, state: State) -> tuple[Any, Any] | None:
        """Stepwise EM's running statistics, and the weight of the batch."""
        if state["stats"] is None:
            return None
        rho = (state["step"] + 2.0) ** -self.by.stepwise
        return self.host.ops(state["double"]).cast(state["stats"]), self.host.ops(state["double"]).array(rho)

    def _work(self, state: State) -> Iteration:
        """The arithmetic at the state's precision, with gradient steps where closed forms have failed."""
        key = (state["double"], state["steps"])
        if key not in self._parts:
            wiring = self.wiring
            for name in state["steps"]:
                wiring = wiring.without(name, UNVANISHED)
            self._parts[key] = Iteration(self.host, self.states, self.sites, wiring, self.by, state["double"])
        return self._parts[key]

    def _blocks(self, state: State, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Rows as the E-step takes them; those of all the data, and of validation, are made once."""
        kept = self._kept.get((id(arrays), state["double"]))
        if kept is not None:
            return kept[1]
        work, whole = self._work(state), arrays is self.arrays
        values = self.observed if whole else self.host.values(arrays, self._held(), self.states.data)
        args = {s: {n: work.ops.array(v) for n, v in own.items()} for s, own in self.states.table.items()}
        again = whole or self.by.stepwise is None
        blocks = work.expectation.blocks(values, arrays, args, again)
        if again:
            self._kept[id(arrays), state["double"]] = (arrays, blocks)  # the arrays too, so that their id stays theirs
        return blocks

    def _held(self) -> dict[str, np.ndarray]:
        """The latents in the first state, for one row."""
        return {name: values[:1] for name, values in self.states.values.items()}

    # -- what is looked at after it -------------------------------------------------------------------------------

    def _unvanished(self, work: Iteration, found: Mapping[str, Any], state: State) -> tuple[str, ...]:
        """The parameters along which Q still rises after their closed form, said once."""
        gains = work.gains(found)
        wrong = tuple(name for name, gain in gains.items() if not gain <= VANISHES[state["double"]])
        for name in wrong:
            self._say(
                f"the gradient of Q in the parameter {name!r} does not vanish after its closed form (Q could gain "
                f"{gains[name]:.1e} nats per datum), so it takes gradient steps"
            )
            self.wiring = self.wiring.without(name, UNVANISHED)
        return wrong

    def _tell(self, found: Mapping[str, Any], rows: int) -> None:
        """Say of states that have died, and of variances that fell to the floor."""
        counts = self.host.numpy(found["stats"])[:, -1]
        dead = np.flatnonzero(counts * rows / max(counts.sum(), 1e-300) < DEAD)
        if len(dead) and self.states.size > 1:
            self._say(
                f"{self.states.listed(dead)} {'has' if len(dead) == 1 else 'have'} died: no row belongs there any more, so "
                "the parameters stay where they are; ask for fewer components, or for more restarts"
            )
        for link in self.wiring.closed:
            name = f"{link.site}.{link.argument}"
            if name not in found["held"] or link.argument == "loc" or link.site not in self.states.data:
                continue
            if not family_of(self.states.families[link.site]).located:
                continue
            held = np.flatnonzero(self.host.numpy(found["held"][name]).any(1))
            if len(held):
                where = f" in {self.states.listed(held)}" if self.states.size > 1 else ""
                self._say(
                    f"the variance of {link.site!r}{where} fell below the floor, {self.by.floor:g} of the data's, and is "
                    "held there"
                )

    def _needs_double(self, found: Mapping[str, Any]) -> bool:
        if float(found["condition"]) <= CONDITION:
            return False
        self._say("components are so narrow beside the spread of the data that EM goes on in double precision")
        return True

    # -- the engine's protocol ------------------------------------------------------------------------------------

    def converged(self, state: State) -> bool:
        """Whether the last step gained less than `tol`."""
        return self.by.stepwise is None and abs(state["gain"]) < self.by.tol

    def loss_on(self, state: State, batches: Iterable[Mapping[str, np.ndarray]], seed: int = 0) -> float:
        """Minus the mean log-likelihood of prepared batches, nats per datum."""
        totals = [(self._total(state, batch), rows_of(batch)) for batch in batches]
        return -sum(total * rows for total, rows in totals) / sum(rows for _, rows in totals)

    def _total(self, state: State, arrays: Mapping[str, np.ndarray]) -> float:
        with self.host.scope(state["double"]):
            work = self._work(state)
            return float(work.total(state["leaves"], self._blocks(state, arrays))) / rows_of(arrays)

    def refuse_outside(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse rows that lie outside the support of the site that observes them."""
        with self.host.scope(False):
            self.host.refuse_outside(arrays)

    def weights(self, state: State) -> dict[str, np.ndarray]:
        """Unconstrained leaves and buffers by name."""
        return {name: self.host.numpy(value) for name, value in {**state["leaves"], **self.host.buffers}.items()}

    def history(self, state: State) -> dict[str, np.ndarray]:
        """Parameters before the first step and after each (stepwise: each epoch), [steps + 1, ...]."""
        rows, dtype = state["history"], {n: self.host.numpy(leaf).dtype for n, leaf in self.host.start.items()}
        return {name: np.stack([self.host.numpy(row[name]) for row in rows]).astype(dtype[name]) for name in rows[0]}

    def export(self, state: State) -> dict[str, np.ndarray]:
        """All that is needed to go on bit for bit."""
        arrays = {f"leaf/{name}": self.host.numpy(leaf) for name, leaf in state["leaves"].items()}
        arrays |= {f"history/{name}": values for name, values in self.history(state).items()}
        arrays |= {f"steps/{name}": np.ones(()) for name in state["steps"]}
        arrays |= {name: np.asarray(state[name], np.float64) for name in SCALARS}
        return arrays if state["stats"] is None else {**arrays, "stats": self.host.numpy(state["stats"])}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> State:
        """The state that was exported."""
        for name, like in self.host.start.items():
            if f"leaf/{name}" not in arrays or arrays[f"leaf/{name}"].shape != tuple(like.shape):
                raise ProbgenError(
                    f"the checkpoint does not fit this program: {name!r} is missing or has another shape"
                )
        scalars = {name: arrays[name].item() for name in SCALARS}
        state: State = {**scalars, "step": int(scalars["step"]), "double": bool(scalars["double"])}
        with self.host.scope(state["double"]):
            kept = {n.removeprefix("history/"): a for n, a in arrays.items() if n.startswith("history/")}
            state["leaves"] = {name: self.host.leaf(name, arrays[f"leaf/{name}"]) for name in self.host.start}
            rows = range(len(next(iter(kept.values()))))
            state["history"] = tuple({n: self.host.kept(values[row]) for n, values in kept.items()} for row in rows)
            state["params"] = state["history"][-1]
            state["stats"] = self.host.kept(arrays["stats"]) if "stats" in arrays else None
            state["steps"] = tuple(n.removeprefix("steps/") for n in arrays if n.startswith("steps/"))
        for name in state["steps"]:
            self.wiring = self.wiring.without(name, UNVANISHED)
        return state

    def diagnose(self, state: State, step: int) -> str:
        """One sentence that names the state where a number stopped being finite."""
        for name, leaf in state["leaves"].items():
            if not np.isfinite(self.host.numpy(leaf)).all():
                return (
                    f"at step {step} the parameter {name!r} is not finite: a component has collapsed, so give EM a floor "
                    "above 0 or ask for fewer components"
                )
        return f"at step {step} the log-likelihood is not finite: give EM a floor above 0 or ask for fewer components"


def _some(feed: Any) -> dict[str, np.ndarray]:
    """Several batches as one, to start stepwise EM from."""
    count = min(feed.steps_per_epoch, max(1, SAMPLE // feed.batch_size))
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in feed.batches(0, count).items()}
