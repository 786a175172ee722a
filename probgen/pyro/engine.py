"""The Pyro engine: a program and a loss, made ready to train on a feed of batches.

Random numbers are a pure function of (seed, step) and the order of the data of (seed, epoch), so a run resumed from
a checkpoint ends bit for bit where an uninterrupted one does. Eager and compiled steps are one Python function.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from probgen.errors import ProbgenError
from probgen.program import Program, judged, rows_of
from probgen.pyro.device import generators_restored, numbers, resolve_device, resolve_precision, seed_step
from probgen.pyro.leaves import leaves_of, own_program, start_values
from probgen.pyro.loss import as_loss, with_terms
from probgen.pyro.optim import optimizer
from probgen.pyro.step import State, Step, Trainee
from probgen.pyro.support import refuse_out_of_support, refuse_rows
from probgen.pyro.trace import DataPlate, bound, callables, forked, is_sample, structure_of, tensors, whole_plates
from probgen.refusals import refuse_unguided
from probgen.schedules import value_at

ROWS = ""  # the name of the row numbers in a batch


class Engine:
    """Trains `program` by the loss `by` on the batches of `feed`; `options` are `probgen.Options`.

    Losses and terms are in nats per datum. A state is what `probgen.pyro.step.Step` says.
    """

    def __init__(self, program: Program, by: Any, feed: Any, options: Any) -> None:
        self.program, self.feed, self.options = own_program(program), feed, options
        self.device, (self.dtype, self.autocast) = resolve_device(options.device), resolve_precision(options.precision)
        program = self.program
        self.loss = as_loss(program.by if by is None else by)
        self._callables = callables(program)  # made once: losses remember what they saw of a pair
        self.leaves = self._collected()
        self.start_values = start_values(self.leaves, self.dtype, self.device)
        with self._scope():
            batch = self._tensors(feed.batch(0))
            with self.leaves.substituted(self._copies()):
                self.structure = structure_of(program, batch, feed.rows, options.seed)
                self._judged = refuse_out_of_support(*self._callables, batch, self._all_rows, options.seed)
            if self.loss.needs_guide:
                refuse_unguided(self.structure)
            self.loss.check(self.structure)
            self.divisor = self._divisor()
            self.step = Step(self.leaves, self._trainees(batch), self._objective, options.clip, options.ema)
            self._rates(0, 1)  # a player without a learning rate is told of before anything is written
            self._first_loss(batch)
        self._resident = self._all_rows()
        self._compiled: Callable[..., tuple[State, State]] | None = None
        self.compiled, self.note, self.validates = bool(options.compile), None, self.loss.validates

    # -- what is trained ------------------------------------------------------------------------------------------

    def _collected(self) -> Any:
        parts = [part for player in self.loss.players(self.program).values() for part in player.callables]
        return leaves_of(self.program, self.feed.batch(0), self.dtype, self.options.seed, tuple(parts))

    def _trainees(self, batch: Mapping[str, Tensor]) -> dict[str, Trainee]:
        """Each player with its optimizer and the names of the parameters that its callables touch."""
        players = self.loss.players(self.program)
        named = {name: self._touched(player.callables, batch) for name, player in players.items()}
        if len(players) == 1:
            named = dict.fromkeys(players, tuple(self.leaves.params))
        return {
            name: Trainee(
                named[name], optimizer(_of(self.options.optimizer, name, "optimizer")), player.updates, player.project
            )
            for name, player in players.items()
        }

    def _touched(self, parts: tuple[Callable[..., Any], ...], batch: Mapping[str, Tensor]) -> tuple[str, ...]:
        touched, values = set(), self._copies()
        for name in self.leaves.params:
            values[name].requires_grad_()  # pyro.module passes over what needs no gradient
        with self.leaves.substituted(values), forked(self.options.seed), torch.no_grad():
            for part in parts:
                with poutine.trace(param_only=True) as seen:
                    bound(part, like=self.program.model)(**batch)
                touched |= {self.leaves.aliases.get(name, name) for name in seen.trace.nodes}
        return tuple(name for name in self.leaves.params if name in touched)

    def _copies(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.start_values.items()}

    def _divisor(self) -> float:
        """What the loss of a batch is divided by to be per datum."""
        rows, batch, structure = self.feed.rows, self.feed.batch_size, self.structure
        if structure.data_plates or batch == rows:
            return float(rows)
        if structure.has_global_latents:
            raise ProbgenError(
                "the program has global latents and no plate as long as the batch, so minibatches cannot be scaled to "
                'all rows: put its data in pyro.plate("data", len(x)), or give batch_size=None'
            )
        return float(batch)

    # -- one step -------------------------------------------------------------------------------------------------

    def _objective(
        self, player: str, values: Mapping[str, Tensor], batch: Mapping[str, Tensor], t: Tensor, training: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A player's loss and terms per datum, with `values` in the program's places."""
        chosen, batch = self.loss.at(t).players(self.program)[player], gathered(batch)
        with self._running(values, rows_of(batch), training):
            loss, terms = with_terms(chosen.objective(*self._callables, **batch))
        loss = loss if isinstance(loss, Tensor) else torch.tensor(loss, dtype=self.dtype, device=self.device)
        return loss / self.divisor, {name: term / self.divisor for name, term in terms.items()}

    @contextlib.contextmanager
    def _running(self, values: Mapping[str, Tensor], batch: int, training: bool) -> Iterator[None]:
        """The program with `values` in its places, its data plate standing for all rows."""
        structure = self.structure
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.leaves.substituted(values, training))
            if structure.states_rows and not training:
                stack.enter_context(whole_plates(structure.data_plates, batch))
            if structure.data_plates and batch != self.feed.rows:
                stack.enter_context(DataPlate(structure.data_plates, self.feed.rows / batch))
            if self.autocast:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            yield

    def _first_loss(self, batch: Mapping[str, Tensor]) -> None:
        """The first loss, eagerly: losses look at the program here, and what is wrong is said before any tracing."""
        with forked(self.options.seed), torch.no_grad(), pyro.validation_enabled(False):
            for player in self.step.trainees:
                self._objective(player, self._copies(), batch, self._clock(0, 1)[0], training=False)

    # -- many steps -----------------------------------------------------------------------------------------------

    @property
    def batches_per_step(self) -> int:
        """How many batches of the feed one step takes."""
        return self.step.batches

    def start(self) -> State:
        """The state before step 0, a pure function of the seed."""
        return self.step.start(self.start_values)

    def advance(self, state: State, first: int, last: int) -> tuple[State, dict[str, np.ndarray]]:
        """Steps `first` to `last` − 1; the loss, gradient norm and terms of each, as arrays."""
        history: dict[str, list[Tensor]] = {}
        with self._scope(), torch.no_grad(), generators_restored(self.device), pyro.validation_enabled(False):
            rates, clock = self._rates(first, last).unbind(), self._clock(first, last).unbind()
            step = self._runner(state, clock[0], rates[0])
            state = {name: value.clone() for name, value in state.items()}  # a compiled step works in place
            for i, batches in enumerate(self._batches(first, last)):
                seed_step(self.options.seed, first + i, self.device)
                state, metrics = step(state, clock[i], rates[i], batches)
                for name, value in metrics.items():
                    history.setdefault(name, []).append(value)
            return state, {name: torch.stack(values).cpu().numpy() for name, values in history.items()}

    def _clock(self, first: int, last: int) -> Tensor:
        return torch.arange(first, last, dtype=self.dtype, device=self.device)

    def _rates(self, first: int, last: int) -> Tensor:
        """The learning rate of each step and player, [steps, players]."""
        schedule = self.options.schedule
        factors = [1.0 if schedule is None else float(value_at(schedule, step)) for step in range(first, last)]
        own = {name: trainee.optimizer.lr for name, trainee in self.step.trainees.items()}
        base = [float(_of(self.options.lr, name, "lr")) if lr is None else lr for name, lr in own.items()]
        return torch.tensor([[lr * factor for lr in base] for factor in factors], dtype=self.dtype, device=self.device)

    def _batches(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        each = self.step.batches
        if self._resident is None:
            for step in range(first, last):
                yield [self._tensors(self.feed.batch(step * each + j)) for j in range(each)]
            return
        if self.feed.batch_size == self.feed.rows:
            yield from ([self._resident] * each for _ in range(first, last))
            return
        rows = torch.from_numpy(self.feed.indices(first * each, last * each)).to(self.device).unbind()
        for i in range(0, len(rows), each):
            yield [self._drawn(own) for own in rows[i : i + each]]

    def _drawn(self, rows: Tensor) -> dict[str, Tensor]:
        """A batch. On a CPU the step gathers its rows itself; a replayed CUDA graph would copy all rows to do so."""
        batch = {**self._resident, ROWS: rows}
        return batch if self.device.type == "cpu" else gathered(batch)

    def _all_rows(self) -> dict[str, Tensor] | None:
        """Every prepared row on the device, where the feed can hold them all."""
        resident = self.feed.resident()
        return None if resident is None else self._tensors(resident)

    def _runner(self, state: State, t: Tensor, lr: Tensor) -> Callable[..., tuple[State, State]]:
        """The step as it runs: compiled when asked for and possible, else eager with the same random stream."""
        if not self.compiled:
            return self.step
        if self._compiled is None:
            try:
                self._compiled = self.step.compiled(state, t, lr, next(iter(self._batches(0, 1))), in_place=True)
            except Exception as error:  # whatever the tracer, Inductor or the program raises, eager still runs
                self.note = f"this step cannot be compiled ({_first_line(error)}), so it runs eagerly"
                warnings.warn(self.note, stacklevel=2)
                self.compiled = False
                return self.step
        return self._compiled

    # -- looking at it --------------------------------------------------------------------------------------------

    def loss_on(self, state: State, batches: Iterable[Mapping[str, np.ndarray]], seed: int = 0) -> float:
        """The program's loss, nats per datum, over prepared batches.

        In eval mode, with averaged weights if they are kept, and with schedules as they are at the last step, so
        that the numbers of one run compare.
        """
        total, rows, player = 0.0, 0, judged(self.step.trainees)
        with self._scope(), forked(seed), torch.no_grad(), pyro.validation_enabled(False):
            values = self.step.values(state, averaged=True)
            end = self._clock(self.options.steps, self.options.steps + 1)[0]
            for batch in batches:
                loss, _ = self._objective(player, values, self._tensors(batch), end, training=False)
                total += float(loss) * rows_of(batch)
                rows += rows_of(batch)
        return total / rows

    def refuse_outside(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse rows that lie outside the support of the site that observes them."""
        with self._scope():
            batch = self._tensors(arrays)
            if self._judged is not None:
                return refuse_rows(self._judged, batch)
            with self._running(self._copies(), rows_of(batch), training=False):
                refuse_out_of_support(*self._callables, batch, lambda: batch, self.options.seed)

    def weights(self, state: State) -> dict[str, np.ndarray]:
        """Unconstrained leaves and buffers by name; the averages, if any are kept."""
        return {name: _array(value) for name, value in self.step.values(state, averaged=True).items()}

    def export(self, state: State) -> dict[str, np.ndarray]:
        """All that is needed to go on bit for bit."""
        return {name: _array(value) for name, value in state.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> State:
        """The state that was exported."""
        start = self.start()
        for name, like in start.items():
            if name not in arrays or arrays[name].shape != tuple(like.shape):
                raise ProbgenError(
                    f"the checkpoint does not fit this program: {name!r} is missing or has another shape"
                )
        return {
            name: torch.from_numpy(np.array(arrays[name])).to(device=self.device, dtype=like.dtype)
            for name, like in start.items()
        }

    def diagnose(self, state: State, step: int) -> str:
        """One sentence that names the site and the parameter where a number stopped being finite at `step`."""
        with self._scope(), torch.no_grad(), generators_restored(self.device), pyro.validation_enabled(False):
            batch = gathered(next(self._batches(step, step + 1))[0])
            seed_step(self.options.seed, step, self.device)
            site, entering = self._broken_site(state, batch)
            seed_step(self.options.seed, step, self.device)
            parameter = self._broken_parameter(state, batch, self._clock(step, step + 1)[0])
        where = f"the site {site!r} has a log density that is not finite" if site else "the loss is not finite"
        if parameter:
            where += f", and the parameter {parameter!r} a value or gradient that is not"
        elif entering:
            where += f"; it depends on the parameter {entering}"
        return f"at step {step} {where}: a smaller lr, clip=, or a bounded scale is the usual cure"

    def _broken_site(self, state: State, batch: Mapping[str, Tensor]) -> tuple[str | None, str]:
        """The first site whose log density is not finite, and the parameters that enter it."""
        model, guide = self._callables
        values = {n: v.clone().requires_grad_(v.is_floating_point()) for n, v in self.step.values(state).items()}
        with torch.enable_grad(), self._running(values, rows_of(batch), training=True):
            q = poutine.trace(guide).get_trace(**batch)
            p = poutine.trace(poutine.replay(model, trace=q)).get_trace(**batch)
            for name, site in [*q.nodes.items(), *p.nodes.items()]:
                density = site["fn"].log_prob(site["value"]) if is_sample(site) else torch.zeros(())
                if not bool(torch.isfinite(density).all()):
                    return name, _entering(density, {name: values[name] for name in self.leaves.params})
        return None, ""

    def _broken_parameter(self, state: State, batch: Mapping[str, Tensor], t: Tensor) -> str | None:
        for name, value in self.step.values(state).items():
            if not bool(torch.isfinite(value).all()):
                return name
        for player, trainee in self.step.trainees.items():
            gradients = self.step.views(trainee.names, self.step.gradient(state, player, t, batch)[2])
            for name, gradient in gradients.items():
                if not bool(torch.isfinite(gradient).all()):
                    return name
        return None

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return tensors(arrays, self.dtype, self.device)

    def _scope(self) -> contextlib.AbstractContextManager[None]:
        return numbers(self.dtype, self.device)


def gathered(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The arrays of a batch that may hold row numbers beside all rows."""
    if ROWS not in batch:
        return batch
    return {name: array[batch[ROWS]] for name, array in batch.items() if name != ROWS}


def _of(value: Any, player: str, option: str) -> Any:
    """An option that may be a mapping by player."""
    if isinstance(value, Mapping):
        if player not in value:
            raise ProbgenError(
                f"`{option}` names no value for the player {player!r}, only {', '.join(map(repr, value))}"
            )
        return value[player]
    return value


def _entering(density: Tensor, params: Mapping[str, Tensor]) -> str:
    """The first parameters that a density depends on, in words."""
    if not density.requires_grad:
        return ""
    gradients = torch.autograd.grad(density.sum(), list(params.values()), allow_unused=True)
    names = [repr(name) for name, gradient in zip(params, gradients, strict=True) if gradient is not None]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().copy()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
