"""Coordinate-ascent variational Bayes on a conjugate program: q(θ) Π_n q(z_n) with both factors exact in turn.

E   r_ns ∝ exp E_q[log p(z_n = s, x_n | θ)]        the local latents are summed out, so they are not in the guide
M   q(θ) ∝ p(θ) exp Σ_ns r_ns log p(s, x_n | θ)    in the prior's family: its parameters are the prior's plus sums

    ELBO = Σ_n log Σ_s exp E_q[log p(s, x_n | θ)] − KL(q(θ) ‖ p(θ)),  after an E-step; it never decreases

References: Attias, A variational Bayesian framework for graphical models (2000); Bishop (2006), section 10.2.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from probgen.conjugate.conjugacy import PRIORS, PROBES, View, canonical, distinct, linear_form, prior_of, spread
from probgen.conjugate.guide_family import guide_family
from probgen.conjugate.linear_form import responsibilities
from probgen.em.seeding import RESTART, SHORT, centres, nearest, refuse_few_rows, standardised
from probgen.errors import ProbgenError
from probgen.program import Structure, rows_of

ROWS_AT_ONCE = 8192  # rows of T that are held at once
ROWS_LOOKED_AT = 8

State = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


class Runs(Protocol):
    """What a backend lends: a program that can be run at given values, and array operators.

    `fitted` names the parameters of the model itself.
    """

    structure: Structure
    fitted: list[str]
    device: Any
    ops: Any

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Precision, device and mode, for a block of array operators."""

    def numpy(self, value: Any) -> np.ndarray:
        """A backend's array as NumPy's."""

    def model_at(self, values: Arrays, arrays: Arrays) -> tuple[View, View]:
        """Global and local sites of the model at values of the global latents, in every joint state."""

    def guide_at(self, values: Arrays, weights: Arrays) -> View:
        """The guide's sites at values of the latents and of its weights."""

    def start(self) -> dict[str, np.ndarray]:
        """The unconstrained leaves and buffers before training."""

    def constrained(self, weights: Arrays) -> dict[str, np.ndarray]:
        """The guide's parameters as it sees them, of weights."""

    def unconstrained(self, params: Arrays) -> dict[str, np.ndarray]:
        """The reverse."""

    def observed(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The values of the observed sites, rows first."""

    def refuse_outside(self, arrays: Arrays) -> None:
        """Refuse rows outside the support of their site."""


class CoordinateAscent:
    """The engine of `EM()` on a Bayesian program: one step is the M-step and the E-step that follows it.

    A state holds λ, the sums S of the last E-step, the ELBO per datum at λ and what the last step gained of it.
    """

    chunk, batches_per_step, compiled = 1, 1, False

    def __init__(self, runs: Runs, by: Any, feed: Any, options: Any) -> None:
        self._runs, self._by, self._feed, self._options = runs, by, feed, options
        self.structure, self.device = runs.structure, runs.device
        if by.stepwise is not None or by.hard or feed.batch_size != feed.rows:
            raise ProbgenError(
                "EM(variational=True) takes all rows at every step, with soft assignments: leave out `stepwise` and `hard`, "
                "and give batch_size=None"
            )
        arrays = feed.batch(0)
        refuse_structure(self.structure)
        if runs.fitted:
            raise ProbgenError(
                f"the model has the parameter {runs.fitted[0]!r}, and EM(variational=True) updates only q(θ): give it a "
                "conjugate prior, fix it, or use ELBO()"
            )
        self._recognise(arrays)
        self._values = runs.observed(arrays)
        self._form = self._form.centred(self._values)
        self._started: State | None = None

    @property
    def note(self) -> str:
        """Which factors q(θ) has."""
        families = ", ".join(f"{name} ({self._found.family(name)})" for name in self._found.views[0])
        return f"coordinate-ascent variational Bayes: every factor of q(θ) has its exact update: {families}"

    # -- what the program is --------------------------------------------------------------------------------------

    def _recognise(self, arrays: Arrays) -> None:
        """The prior, the linear form of the local sites and the guide's parameters, from a few runs of the program."""
        sites = {n: (s.family, s.shape) for n, s in self.structure.latents.items() if not s.local}
        probes = [distinct(sites, probe) for probe in range(PROBES)]
        few = arrays if self.structure.states_rows else {name: a[:ROWS_LOOKED_AT] for name, a in arrays.items()}
        views = [self._runs.model_at(probe, few) for probe in probes]
        self._prior, self._found = prior_of(probes, [own for own, _ in views])
        self._form = linear_form(self._prior, self._found, [local for _, local in views])
        start = self._runs.start()
        moved = [_moved(start, probe) for probe in range(PROBES)]
        seen = [self._runs.guide_at(probe, weights) for probe, weights in zip(probes, moved, strict=True)]
        self._guide = guide_family(self._found, seen, [self._runs.constrained(weights) for weights in moved])

    # -- one step -------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The state before step 0, a pure function of the seed: the best of the restarts."""
        if self._started is None:
            found = [self._short(self._options.seed + RESTART * i) for i in range(self._by.restarts)]
            best = max(found, key=lambda state: state["bound"])
            self._started = best | {"history": {name: path[-1:] for name, path in best["history"].items()}}
        return self._started

    def _short(self, seed: int) -> State:
        """A first q(θ), and where there are several to choose from, a few steps from it."""
        state = self._at(self._first(seed), {})
        for _ in range(SHORT if self._by.restarts > 1 else 0):
            state = self._at(self._natural(state["sums"]), {})
        return state

    def _first(self, seed: int) -> np.ndarray:
        """λ of the guide as it stands, or after an M-step in which each row belongs to the state it lies nearest to."""
        if self._by.init == "program":
            view = self._runs.guide_at(self._found.probes[0], self._runs.start())
            return self._prior.of(canonical(view, self._found.probes[0], self._found))
        labels = np.zeros(self._feed.rows, int)
        if self._form.states > 1:
            points = standardised(list(self._values.values()))
            refuse_few_rows(next(iter(self.structure.enumerated)), self._form.states, self._feed.rows)
            labels = nearest(points, centres(points, self._form.states, self._by.init, seed))
        return self.updated(np.eye(self._form.states)[labels])

    def updated(self, responsibilities: np.ndarray) -> np.ndarray:
        """λ of the M-step at given responsibilities, [N, S]."""
        array = self._runs.ops.array
        return self._natural(self._summed(self._values, lambda rows, _: (0.0, array(responsibilities[rows].T)))[1])

    def _natural(self, sums: np.ndarray) -> np.ndarray:
        """λ = λ₀ + Σ_s G_sᵀ S_s."""
        return self._prior.natural + self._form.natural(sums)

    def _at(self, natural: np.ndarray, history: Mapping[str, np.ndarray]) -> State:
        """The state at λ: its E-step, its ELBO per datum, and the parameters so far."""
        log_z, sums = self._expected(self._values, natural)
        bound = (log_z - self._prior.kl(natural)) / self._feed.rows
        state = {"natural": natural, "sums": sums, "bound": bound, "gain": np.inf}
        params = self._guide.written(self._prior.arguments(natural), self._params_at_start)
        path = {n: np.concatenate([*([history[n]] if history else []), value[None]]) for n, value in params.items()}
        return state | {"history": path}

    @functools.cached_property
    def _params_at_start(self) -> dict[str, np.ndarray]:
        return self._runs.constrained(self._runs.start())

    def _expected(self, values: Arrays, natural: np.ndarray) -> tuple[float, np.ndarray]:
        """The E-step at λ: Σ_n log Σ_s exp E_q[log p(s, x_n | θ)], and S."""
        ops, weights = self._runs.ops, self._form.weights(self._prior.expectation(natural))

        def e_step(_: slice, features: Any) -> tuple[float, Any]:
            log_z, r = responsibilities(ops.xp, ops.array(weights) @ features)
            return float(np.asarray(self._runs.numpy(log_z), np.float64).sum()), r

        log_z, sums = self._summed(values, e_step)
        return log_z + self._form.base(values), sums

    def _summed(self, values: Arrays, step: Callable[[slice, Any], tuple[float, Any]]) -> tuple[float, np.ndarray]:
        """Σ over chunks of rows of a number, and of S = r Tᵀ, in float64; r is [S, n]."""
        ops, total, sums = self._runs.ops, 0.0, np.zeros((self._form.states, self._form.width))
        rows = rows_of(values)
        with self._runs.scope():
            for first in range(0, rows, ROWS_AT_ONCE):
                chunk = slice(first, min(first + ROWS_AT_ONCE, rows))
                own = {name: ops.array(value[chunk]) for name, value in values.items()}
                features = self._form.matrix(ops, own, chunk.stop - first)
                number, r = step(chunk, features)
                total, sums = total + number, sums + np.asarray(self._runs.numpy(r @ features.T), np.float64)
        return total, sums

    # -- the engine protocol --------------------------------------------------------------------------------------

    def advance(self, state: State, first: int, last: int) -> tuple[State, dict[str, np.ndarray]]:
        """Steps `first` to `last` − 1; the loss of each is −ELBO per datum at the q(θ) that it ends in."""
        losses = []
        for _ in range(first, last):
            before = state["bound"]
            state = self._at(self._natural(state["sums"]), state["history"])
            state["gain"] = state["bound"] - before
            losses.append(-state["bound"])
        return state, {"loss": np.array(losses)}

    def converged(self, state: State) -> bool:
        """Whether the last step gained less than `tol` nats per datum."""
        return self._by.tol > 0 and state["gain"] < self._by.tol

    def loss_on(self, state: State, batches: Iterable[Arrays], seed: int = 0) -> float:
        """−ELBO per datum of other rows at this q(θ): their own bound, and 1/N of the KL."""
        total, rows = 0.0, 0
        for arrays in batches:
            total += self._expected(self._runs.observed(arrays), state["natural"])[0]
            rows += rows_of(arrays)
        return self._prior.kl(state["natural"]) / self._feed.rows - total / rows

    def weights(self, state: State) -> dict[str, np.ndarray]:
        """The guide's unconstrained leaves at this q(θ), and what else the program carries."""
        params = {name: path[-1] for name, path in state["history"].items()}
        return self._runs.start() | self._runs.unconstrained(params)

    def history(self, state: State) -> dict[str, np.ndarray]:
        """The guide's parameters after every step, [steps + 1, ...]."""
        return dict(state["history"])

    def export(self, state: State) -> dict[str, np.ndarray]:
        """All that is needed to go on."""
        numbers = {name: np.asarray(value) for name, value in state.items() if name != "history"}
        return numbers | {f"history/{name}": path for name, path in state["history"].items()}

    def restore(self, arrays: Arrays) -> State:
        """The state that was exported."""
        if np.shape(arrays.get("natural")) != self._prior.natural.shape:
            raise ProbgenError("the checkpoint does not fit this program: its q(θ) has other parameters")
        state = {name: arrays[name] for name in ("natural", "sums")}
        state |= {name: float(arrays[name]) for name in ("bound", "gain")}
        history = {n.removeprefix("history/"): a for n, a in arrays.items() if n.startswith("history/")}
        return state | {"history": history}

    def diagnose(self, state: State, step: int) -> str:
        """What is wrong where the ELBO stopped being finite."""
        return (
            f"at step {step} the ELBO is not finite: a value of the data is too large, prepare them with Standardize()"
        )

    def refuse_outside(self, arrays: Arrays) -> None:
        """Refuse rows outside the support of their site."""
        self._runs.refuse_outside(arrays)


def _moved(start: Arrays, probe: int) -> dict[str, np.ndarray]:
    """The weights, every float of them moved to a place of its own in (−1, 1)."""
    sizes = {name: a.size for name, a in start.items() if np.issubdtype(a.dtype, np.floating)}
    parts = np.split(2 * spread(sum(sizes.values()), probe) - 1, np.cumsum(list(sizes.values())))[:-1]
    moved = {n: p.reshape(start[n].shape).astype(start[n].dtype) for n, p in zip(sizes, parts, strict=True)}
    return {**start, **moved}


def refuse_structure(structure: Structure) -> None:
    """Refuse what coordinate ascent has no place for, before the program is looked at more closely."""
    known = {name: site for name, site in structure.latents.items() if not site.local}
    if not known:
        raise ProbgenError(
            "EM(variational=True) learns the posterior of global latents, and the program has none: give its parameters "
            "conjugate priors, or use EM()"
        )
    for name, site in known.items():
        if site.family not in PRIORS:
            raise ProbgenError(
                f"the prior of {name!r} is a {site.family}, which is conjugate to nothing: give it a Dirichlet, Beta, Gamma, "
                "Normal, MultivariateNormal or Wishart prior, or use ELBO() or NUTS()"
            )
    for name, site in structure.latents.items():
        if site.local and not (site.enumerated and site.discrete):
            raise ProbgenError(
                f"the local latent {name!r} is not enumerated, and coordinate ascent sums local latents out: mark it "
                'infer={"enumerate": "parallel"} if it is discrete, or use ELBO() or NUTS()'
            )
        if site.local and name in structure.guide:
            raise ProbgenError(
                f"the guide draws the local latent {name!r}, which coordinate ascent sums out: leave it to the model, "
                'with infer={"enumerate": "parallel"}'
            )
    for name, site in structure.observed.items():
        if not site.local:
            raise ProbgenError(f'{name!r} lies outside the data plate: put it in plate("data", len({name}))')
