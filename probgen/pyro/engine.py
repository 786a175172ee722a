"""The Pyro engine: (program, loss) to a whole training step, one graph when compiled.

    params, buffers, slots, average ← step(params, buffers, slots, average, t, lr, batches)

Every player's parameters are one flat vector, so an update is a handful of kernels whatever the program. Eager and
compiled steps are the same Python function; random numbers are a pure function of (seed, step), the order of the data
of (seed, epoch), so that a run resumed from a checkpoint ends bit for bit where an uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from probgen.errors import ProbgenError
from probgen.program import Player, Program, rows_of
from probgen.pyro import compile as compiler
from probgen.pyro.leaves import collect, start_values
from probgen.pyro.loss import as_loss, with_terms
from probgen.pyro.optim import optimizer
from probgen.pyro.trace import DataPlate, bound, callables, forked, is_sample, structure_of, tensors
from probgen.schedules import value_at

State = dict[str, Tensor]


class Engine:
    """A program and a loss, made ready to train on a feed of batches.

    A state is a mapping of names to tensors: `params/<player>` (flat), `slots/<player>/<i>`, `average/<player>`,
    `buffer/<name>`. Losses and terms are in nats per datum.
    """

    def __init__(self, program: Program, by: Any, feed: Any, options: Any) -> None:
        self.program, self.feed, self.options = program, feed, options
        self.device, self.dtype, self.autocast = resolve_device(options.device), *resolve_precision(options.precision)
        self.loss = as_loss(program.by if by is None else by)
        self.note: str | None = None
        first = feed.batch(0)
        with forked(options.seed):  # as the user's modules stand: on their own device, in their own precision
            native = tensors(first, torch.get_default_dtype(), "cpu")
            self.leaves = collect(lambda: self._touch(native), self._parts())
        self.start_values = start_values(self.leaves, self.dtype, self.device)
        with self._scope():
            batch = self._tensors(first)
            with self.leaves.substituted(self._copies()):
                self.structure = structure_of(program, batch, feed.rows, options.seed)
            self.loss.check(self.structure)
            self.divisor = self._divisor()
            self.players = self._named_players(batch)
            self.optimizers = {name: optimizer(_of(options.optimizer, name)) for name in self.players}
            self._refuse_out_of_support()
            self.terms: tuple[str, ...] = ()
            self._first_loss(batch)
        self._resident = self._on_device()
        self._compiled: Callable[..., Sequence[Tensor]] | None = None
        self.compiled = bool(options.compile)

    # -- what is trained ------------------------------------------------------------------------------------------

    def _parts(self) -> tuple[Any, ...]:
        parts = [part for player in self.loss.players(self.program).values() for part in player.callables]
        return (self.program.model, self.program.guide, *parts)

    def _touch(self, batch: Mapping[str, Tensor]) -> None:
        """Run everything that has parameters once, so that they exist and are seen."""
        model, guide = callables(self.program)
        with pyro.validation_enabled(False):
            trace = poutine.trace(guide).get_trace(**batch)
            poutine.replay(model, trace=trace)(**batch)
            for part in self._parts()[2:]:
                if part is not self.program.model and part is not self.program.guide:
                    bound(part)(**batch)

    def _named_players(self, batch: Mapping[str, Tensor]) -> dict[str, tuple[tuple[str, ...], Player]]:
        """Each player with the names of the parameters that its callables touch."""
        players = self.loss.players(self.program)
        if len(players) == 1:
            name, player = next(iter(players.items()))
            return {name: (tuple(self.leaves.params), player)}
        named: dict[str, tuple[tuple[str, ...], Player]] = {}
        with self.leaves.substituted(self._copies()), forked(self.options.seed), torch.no_grad():
            for name, player in players.items():
                touched: set[str] = set()
                for part in player.callables:
                    with poutine.trace(param_only=True) as seen:
                        bound(part, like=self.program.model)(**batch)
                    touched |= set(seen.trace.nodes)
                named[name] = (tuple(n for n in self.leaves.params if n in touched), player)
        return named

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

    def _refuse_out_of_support(self) -> None:
        """Every row of an array that is observed as it is must lie in its site's support."""
        model, guide = callables(self.program)
        with self.leaves.substituted(self._copies()), forked(self.options.seed), torch.no_grad():
            batch = self._tensors(self.feed.batch(0))
            with pyro.validation_enabled(False):
                q = poutine.trace(guide).get_trace(**batch)
                p = poutine.trace(poutine.replay(model, trace=q)).get_trace(**batch)
        resident = self.feed.resident()
        for name, site in p.nodes.items():
            if not is_sample(site) or not site["is_observed"] or site["infer"].get("_deterministic"):
                continue
            source = next((a for a, value in batch.items() if value is site["value"]), None)
            values = (
                site["value"]
                if source is None or resident is None
                else self._tensors({source: resident[source]})[source]
            )
            _refuse_outside(name, source, site["fn"], values)

    # -- one step -------------------------------------------------------------------------------------------------

    def _values(self, state: State) -> dict[str, Tensor]:
        """Leaves and buffers by name, as views of a state."""
        values = {name: state[f"buffer/{name}"] for name in self.leaves.buffers}
        for player, (names, _) in self.players.items():
            values |= self._split(names, state[f"params/{player}"])
        return values

    def _split(self, names: Sequence[str], flat: Tensor) -> dict[str, Tensor]:
        shapes = [self.leaves.params[name].shape for name in names]
        pieces = flat.split([shape.numel() for shape in shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}

    def _flat(self, names: Sequence[str], values: Mapping[str, Tensor]) -> Tensor:
        if not names:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        return torch.cat([values[name].reshape(-1) for name in names])

    def _objective(
        self, player: Player, values: Mapping[str, Tensor], batch: Mapping[str, Tensor], training: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A player's loss and terms per datum, with `values` in the program's places."""
        with self._running(values, rows_of(batch), training):
            model, guide = self._callables
            loss, terms = with_terms(player.objective(model, guide, **batch))
        loss = loss if isinstance(loss, Tensor) else torch.tensor(loss, dtype=self.dtype, device=self.device)
        return loss / self.divisor, {name: term / self.divisor for name, term in terms.items()}

    @property
    def _callables(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if not hasattr(self, "_bound"):  # made once: losses remember what they saw of a pair by its identity
            self._bound = callables(self.program)
        return self._bound

    @contextlib.contextmanager
    def _running(self, values: Mapping[str, Tensor], batch: int, training: bool) -> Iterator[None]:
        structure = self.structure
        scaled = bool(structure.data_plates) and not structure.states_rows and batch != self.feed.rows
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.leaves.substituted(values, training))
            if scaled:
                stack.enter_context(DataPlate(structure.data_plates, self.feed.rows / batch))
            if self.autocast:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            yield

    def _step(
        self, state: State, t: Tensor, lr: Tensor, batches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[State, State]:
        """Every player's updates once, each on a fresh batch. Returns the new state and the metrics of the step."""
        state, metrics, pending = dict(state), {}, list(batches)
        norms = []
        for name in self.players:
            for _ in range(self.players[name][1].updates):
                loss, terms, norm = self._update(state, name, t, lr, pending.pop(0))
                norms.append(norm)
            metrics |= {"loss" if len(self.players) == 1 else f"loss/{name}": loss}
            metrics |= {f"term/{site}": value for site, value in terms.items()}
        if len(self.players) > 1:
            metrics["loss"] = sum(metrics[f"loss/{name}"] for name in self.players)
        metrics["grad_norm"] = torch.stack(norms).square().sum().sqrt() if len(norms) > 1 else norms[0]
        return state, metrics

    def _update(self, state: State, name: str, t: Tensor, lr: Tensor, batch: Mapping[str, Tensor]) -> tuple:
        names, _ = self.players[name]
        with torch.enable_grad():
            values = {
                n: v.detach().clone() if n in self.leaves.buffers else v.detach()
                for n, v in self._values(state).items()
            }
            for n in names:
                values[n] = values[n].requires_grad_()
            player = self.loss.at(t).players(self.program)[name]
            loss, terms = self._objective(player, values, batch)
            grads = torch.autograd.grad(loss, [values[n] for n in names], allow_unused=True) if names else ()
        grad = self._flat(
            names, {n: torch.zeros_like(values[n]) if g is None else g for n, g in zip(names, grads, strict=True)}
        )
        norm = grad.square().sum().sqrt()
        if self.options.clip is not None:
            grad = grad * (self.options.clip / torch.clamp(norm, min=self.options.clip))
        rule, slots = self.optimizers[name], self._slots(state, name)
        rate = lr[list(self.players).index(name)]
        params, slots = rule.update(state[f"params/{name}"], grad, slots, t + 1, rate)
        state[f"params/{name}"] = params
        state |= {f"slots/{name}/{i}": slot for i, slot in enumerate(slots)}
        state |= {f"buffer/{n}": values[n].detach() for n in self.leaves.buffers}
        if self.options.ema is not None:
            state[f"average/{name}"] = torch.lerp(params, state[f"average/{name}"], self.options.ema)
        return loss.detach(), {site: term.detach() for site, term in terms.items()}, norm

    def _slots(self, state: State, name: str) -> tuple[Tensor, ...]:
        return tuple(state[f"slots/{name}/{i}"] for i in range(self.optimizers[name].slots))

    @property
    def batches_per_step(self) -> int:
        """How many fresh batches one step takes: one for each update of each player."""
        return sum(player.updates for _, player in self.players.values())

    # -- many steps -----------------------------------------------------------------------------------------------

    def start(self) -> State:
        """The state before step 0, a pure function of the seed."""
        state: State = {f"buffer/{name}": self.start_values[name].clone() for name in self.leaves.buffers}
        for name, (names, _) in self.players.items():
            params = self._flat(names, self.start_values)
            state[f"params/{name}"] = params
            state |= {f"slots/{name}/{i}": s for i, s in enumerate(self.optimizers[name].start(params))}
            if self.options.ema is not None:
                state[f"average/{name}"] = params.clone()
        return state

    def advance(self, state: State, first: int, last: int) -> tuple[State, dict[str, np.ndarray]]:
        """Steps `first` to `last` − 1; the loss, gradient norm and terms of each, as arrays."""
        history: dict[str, list[Tensor]] = {}
        with self._scope(), torch.no_grad(), _generators_restored(self.device), pyro.validation_enabled(False):
            rates = self._rates(first, last)
            clock = torch.arange(first, last, dtype=self.dtype, device=self.device)
            run = self._runner(state, clock, rates)
            for i, batches in enumerate(self._batches(first, last)):
                seed_step(self.options.seed, first + i, self.device)
                state, metrics = run(state, clock[i], rates[i], batches)
                for name, value in metrics.items():
                    history.setdefault(name, []).append(value)
            return state, {name: torch.stack(values).cpu().numpy() for name, values in history.items()}

    def _rates(self, first: int, last: int) -> Tensor:
        schedule = self.options.schedule
        factors = [1.0 if schedule is None else float(value_at(schedule, step)) for step in range(first, last)]
        base = [float(_of(self.options.lr, name)) for name in self.players]
        base = [rule.lr if rule.lr is not None else lr for lr, rule in zip(base, self.optimizers.values(), strict=True)]
        return torch.tensor([[lr * f for lr in base] for f in factors], dtype=self.dtype, device=self.device)

    def _batches(self, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        each = self.batches_per_step
        if self._resident is not None:
            rows = torch.from_numpy(self.feed.indices(first * each, last * each)).to(self.device)
            for i in range(last - first):
                yield [{n: a[rows[i * each + j]] for n, a in self._resident.items()} for j in range(each)]
            return
        for step in range(first, last):
            yield [self._tensors(self.feed.batch(step * each + j)) for j in range(each)]

    def _on_device(self) -> dict[str, Tensor] | None:
        resident = self.feed.resident()
        return None if resident is None else self._tensors(resident)

    def _runner(self, state: State, clock: Tensor, rates: Tensor) -> Callable[..., tuple[State, State]]:
        """The step as it runs: compiled when asked for and possible, else eager with the same random stream."""
        if not self.compiled:
            return self._step
        if self._compiled is None:
            batches = next(iter(self._batches(0, 1)))
            try:
                self._compiled = self._compile(state, clock[0], rates[0], batches)
            except Exception as error:  # whatever Dynamo, Inductor or the program raises, eager still runs
                self.note = f"this step cannot be compiled ({_first_line(error)}), so it runs eagerly"
                warnings.warn(self.note, stacklevel=2)
                self.compiled = False
                return self._step
        return self._compiled

    def graph(self, state: State, t: Tensor, lr: Tensor, batches: Sequence[Mapping[str, Tensor]]) -> tuple:
        """The traced step: an FX graph of tensors, its inputs, and the names of state and metrics it returns."""
        names, arrays = list(state), [list(batch) for batch in batches]
        metric_names: list[str] = []

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            values = iter(inputs)
            state_in = {name: next(values) for name in names}
            t_in, lr_in = next(values), next(values)
            batches_in = [{name: next(values) for name in batch} for batch in arrays]
            state_out, metrics = self._step(state_in, t_in, lr_in, batches_in)
            metric_names[:] = list(metrics)
            return (*[state_out[name] for name in names], *metrics.values())

        inputs = [*state.values(), t, lr, *[value for batch in batches for value in batch.values()]]
        return compiler.traced(step, inputs), inputs, names, metric_names

    def _compile(self, state: State, t: Tensor, lr: Tensor, batches: Sequence[Mapping[str, Tensor]]) -> Callable:
        graph, inputs, names, metric_names = self.graph(state, t.clone(), lr.clone(), batches)
        run = compiler.lowered(graph, inputs, self.device.type == "cuda")
        count = len(names)

        def step(state: State, t: Tensor, lr: Tensor, batches: Sequence[Mapping[str, Tensor]]) -> tuple[State, State]:
            outputs = run(*state.values(), t, lr, *[value for batch in batches for value in batch.values()])
            if self.device.type == "cuda":  # a replayed graph writes its outputs in the same place every time
                outputs = [value.clone() for value in outputs]
            return dict(zip(names, outputs[:count], strict=True)), dict(zip(metric_names, outputs[count:], strict=True))

        return step

    # -- looking at it --------------------------------------------------------------------------------------------

    def loss_on(self, state: State, batches: Iterable[Mapping[str, np.ndarray]], seed: int = 0) -> float:
        """The loss in nats per datum over prepared batches, in eval mode, with averaged weights if there are any."""
        total, rows = 0.0, 0
        player = next(iter(self.loss.at(torch.zeros((), dtype=self.dtype)).players(self.program).values()))
        with self._scope(), forked(seed), torch.no_grad(), pyro.validation_enabled(False):
            values = self._values(self._averaged(state))
            for batch in batches:
                loss, _ = self._objective(player, values, self._tensors(batch), training=False)
                total += float(loss) * rows_of(batch)
                rows += rows_of(batch)
        return total / rows

    def _averaged(self, state: State) -> State:
        if self.options.ema is None:
            return state
        return {**state, **{f"params/{name}": state[f"average/{name}"] for name in self.players}}

    def weights(self, state: State) -> dict[str, np.ndarray]:
        """Unconstrained leaves and buffers by name; the averages, if any are kept."""
        return {name: _array(value) for name, value in self._values(self._averaged(state)).items()}

    def export(self, state: State) -> dict[str, np.ndarray]:
        """All that is needed to go on bit for bit."""
        return {name: _array(value) for name, value in state.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> State:
        """The state that was exported."""
        start = self.start()
        missing = [name for name in start if name not in arrays or arrays[name].shape != tuple(start[name].shape)]
        if missing:
            raise ProbgenError(
                f"the checkpoint does not fit this program: {missing[0]!r} is missing or has another shape"
            )
        return {
            name: torch.from_numpy(np.array(arrays[name])).to(device=self.device, dtype=like.dtype)
            for name, like in start.items()
        }

    def diagnose(self, state: State, step: int) -> str:
        """One sentence that names the site, and the parameter, where a number stopped being finite at `step`."""
        with self._scope(), torch.no_grad(), _generators_restored(self.device), pyro.validation_enabled(False):
            for now in range(step + 1 - 1, step + 1):
                seed_step(self.options.seed, now, self.device)
            batch = next(iter(self._batches(step, step + 1)))[0]
            values = {n: v.detach() for n, v in self._values(state).items()}
            broken = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
            site = self._first_broken_site(values, batch)
            if not broken:
                broken = self._broken_gradients(values, batch)
        where = f"the site {site!r} has a log density that is not finite" if site else "the loss is not finite"
        which = f"; the parameter {broken[0]!r} is the first one affected" if broken else ""
        return f"at step {step} {where}{which}: a smaller lr, or clip=, or a bounded scale is the usual cure"

    def _first_broken_site(self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> str | None:
        model, guide = self._callables
        with self._running({n: v.clone() for n, v in values.items()}, rows_of(batch), training=True):
            q = poutine.trace(guide).get_trace(**batch)
            p = poutine.trace(poutine.replay(model, trace=q)).get_trace(**batch)
            for trace in (q, p):
                for name, site in trace.nodes.items():
                    if is_sample(site) and not bool(torch.isfinite(site["fn"].log_prob(site["value"])).all()):
                        return name
        return None

    def _broken_gradients(self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> list[str]:
        player = next(iter(self.loss.players(self.program).values()))
        with torch.enable_grad():
            leaves = {
                n: v.clone().requires_grad_() if n in self.leaves.params else v.clone() for n, v in values.items()
            }
            loss, _ = self._objective(player, leaves, batch)
            names = list(self.leaves.params)
            grads = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True)
        return [n for n, g in zip(names, grads, strict=True) if g is not None and not bool(torch.isfinite(g).all())]

    # -- scopes ---------------------------------------------------------------------------------------------------

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return tensors(arrays, self.dtype, self.device)

    @contextlib.contextmanager
    def _scope(self) -> Iterator[None]:
        with numbers(self.dtype, self.device):
            yield

    def _first_loss(self, batch: Mapping[str, Tensor]) -> None:
        """The first loss, eagerly: losses look at the program here, and what is wrong is said before any tracing."""
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        values = self._copies()
        with forked(self.options.seed), torch.no_grad(), pyro.validation_enabled(False):
            for player in self.loss.at(zero).players(self.program).values():
                self._objective(player, values, batch, training=False)


def resolve_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one; a device that is not there is refused."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ProbgenError(f'device must be "auto", "cpu", "cuda" or "cuda:1", not {device!r}') from error
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ProbgenError(f"device {device!r} is not on this machine: use device='cpu' or 'auto'")
    return found


def resolve_precision(precision: str) -> tuple[torch.dtype, bool]:
    """The dtype of the leaves, and whether the program runs under bfloat16 autocast."""
    known = {"32": (torch.float32, False), "64": (torch.float64, False), "bf16-mixed": (torch.float32, True)}
    if str(precision) not in known:
        raise ProbgenError(f'precision must be "32", "64" or "bf16-mixed", not {precision!r}')
    return known[str(precision)]


@contextlib.contextmanager
def numbers(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """The default dtype, and off the CPU the default device, that a program's own constants are made with."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if device.type == "cpu":
            yield
        else:
            with torch.device(device):
                yield
    finally:
        torch.set_default_dtype(before)


def seed_step(seed: int, step: int, device: torch.device) -> None:
    """Random numbers as a pure function of (seed, step): a 64-bit mix of both seeds the generator."""
    mixed = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xBF58476D1CE4E5B9) & 0x7FFFFFFFFFFFFFFF
    torch.default_generator.manual_seed(mixed)  # 1 µs, where torch.manual_seed takes 74
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)


@contextlib.contextmanager
def _generators_restored(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _refuse_outside(site: str, array: str | None, fn: Any, values: Tensor) -> None:
    try:
        inside = fn.support.check(values)
    except (NotImplementedError, AttributeError, ValueError, RuntimeError):
        return  # a distribution that does not say where it lives
    if not bool(inside.all()):
        outside = values[~inside] if inside.shape == values.shape else values[~inside.reshape(len(values), -1).all(-1)]
        example = outside.reshape(-1)[0].item()
        where = f"the array {array!r}" if array else f"the data of site {site!r}"
        raise ProbgenError(
            f"{where} holds {example:g}, outside the support {fn.support} of the site {site!r}: change the likelihood, "
            "or prepare the data (Binarize, Scale, ...)"
        )


def _of(value: Any, player: str) -> Any:
    """An option that may be a mapping by player."""
    if isinstance(value, Mapping):
        if player not in value:
            raise ProbgenError(f"no value for the player {player!r} among {', '.join(map(repr, value))}")
        return value[player]
    return value


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().copy()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
