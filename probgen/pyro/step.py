"""One training step as a function of tensors: every player's loss, gradients, clipping, update and average.

    state, metrics ← step(state, t, lr, batches)

A player's parameters are one flat vector, so an update is a handful of kernels whatever the program. The function is
run as it is, or traced to one graph and compiled; both draw the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from probgen.play import IN_TURN, Extragradient, shared_play
from probgen.pyro import compile as compiler
from probgen.pyro.leaves import Leaves
from probgen.pyro.optim import Optimizer

State = dict[str, Tensor]
Batch = Mapping[str, Tensor]
Objective = Callable[[str, Mapping[str, Tensor], Batch, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Trainee:
    """What a step knows of a player: its parameters' names, its optimizer, how often it is updated, and within what bounds."""

    names: tuple[str, ...]
    optimizer: Optimizer
    updates: int = 1
    project: Callable[[Tensor], Tensor] | None = None


class Step:
    """`objective(player, values, batch, t)` gives a player's loss and terms with `values` in the program's places.

    A state maps names to tensors: `params/<player>` (flat), `slots/<player>/<i>`, `average/<player>` with `ema`,
    and `buffer/<name>`.
    """

    def __init__(
        self,
        leaves: Leaves,
        trainees: Mapping[str, Trainee],
        objective: Objective,
        clip: float | None = None,
        ema: float | None = None,
    ) -> None:
        self.leaves, self.trainees, self.objective, self.clip, self.ema = leaves, dict(trainees), objective, clip, ema
        each = self.trainees.values()
        self.play = shared_play([trainee.optimizer.play for trainee in each], [trainee.updates for trainee in each])

    @property
    def batches(self) -> int:
        """How many fresh batches one step takes: one for each update of each player."""
        return sum(trainee.updates for trainee in self.trainees.values())

    def start(self, values: Mapping[str, Tensor]) -> State:
        """The state before step 0."""
        state: State = {f"buffer/{name}": values[name].clone() for name in self.leaves.buffers}
        for player, trainee in self.trainees.items():
            params = flat(trainee.names, values)
            state[f"params/{player}"] = params
            state |= {f"slots/{player}/{i}": s for i, s in enumerate(trainee.optimizer.start(params))}
            if self.ema is not None:
                state[f"average/{player}"] = params.clone()
        return state

    def values(self, state: State, averaged: bool = False) -> dict[str, Tensor]:
        """Leaves and buffers by name, as views of a state; the averages in place of the parameters if asked."""
        values = {name: state[f"buffer/{name}"] for name in self.leaves.buffers}
        kind = "average" if averaged and self.ema is not None else "params"
        for player, trainee in self.trainees.items():
            values |= self.views(trainee.names, state[f"{kind}/{player}"])
        return values

    def views(self, names: Sequence[str], vector: Tensor) -> dict[str, Tensor]:
        """A flat vector as the named leaves."""
        shapes = [self.leaves.params[name].shape for name in names]
        pieces = vector.split([shape.numel() for shape in shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}

    def __call__(self, state: State, t: Tensor, lr: Tensor, batches: Sequence[Batch]) -> tuple[State, State]:
        """Every player's updates once, each on a fresh batch: the new state, and the metrics of the step."""
        at = None if self.play == IN_TURN else self._ahead(state, t, lr, batches)
        state, metrics, pending, norms = dict(state), {}, iter(batches), []
        for rate, (player, trainee) in zip(lr, self.trainees.items(), strict=True):
            for _ in range(trainee.updates):
                loss, terms, norm = self._update(state, player, t, rate, next(pending), at)
                norms.append(norm)
            metrics[f"loss/{player}"] = loss
            metrics |= {f"term/{site}": value for site, value in terms.items()}
        losses = {name: metrics[name] for name in metrics if name.startswith("loss/")}
        if len(losses) == 1:
            metrics = {"loss": metrics.pop(next(iter(losses))), **metrics}
        else:
            metrics["loss"] = sum(losses.values())
        metrics["grad_norm"] = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
        return state, metrics

    def _ahead(self, state: State, t: Tensor, lr: Tensor, batches: Sequence[Batch]) -> State:
        """Where all players at once take their gradients: here, or a step of all of them ahead."""
        at = dict(state)
        if self.play == Extragradient.name:
            for rate, player, batch in zip(lr, self.trainees, batches, strict=True):
                ahead = dict(state)
                self._update(ahead, player, t, rate, batch)
                at[f"params/{player}"] = ahead[f"params/{player}"]
        return at

    def _update(
        self, state: State, player: str, t: Tensor, lr: Tensor, batch: Batch, at: State | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """One update of one player, written into `state`, by its gradient there or `at` another place.

        Every other player's parameters are held fixed.
        """
        names, rule, project = (getattr(self.trainees[player], part) for part in ("names", "optimizer", "project"))
        loss, terms, grad, buffers = self.gradient(state if at is None else at, player, t, batch)
        norm = grad.square().sum().sqrt()
        if self.clip is not None:
            grad = grad * (self.clip / torch.clamp(norm, min=self.clip))
        slots = tuple(state[f"slots/{player}/{i}"] for i in range(rule.slots))
        params, slots = rule.update(state[f"params/{player}"], grad, slots, t + 1, lr)
        params = params if project is None else project(params)
        state[f"params/{player}"] = params
        state |= {f"slots/{player}/{i}": slot for i, slot in enumerate(slots)}
        state |= {f"buffer/{name}": value for name, value in buffers.items()}
        if self.ema is not None and names:
            state[f"average/{player}"] = torch.lerp(params, state[f"average/{player}"], self.ema)
        return loss, terms, norm

    def gradient(
        self, state: State, player: str, t: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """A player's loss, its terms, its flat gradient, and the buffers after the run."""
        names = self.trainees[player].names
        with torch.enable_grad():
            values = {name: value.detach() for name, value in self.values(state).items()}
            values |= {name: values[name].clone() for name in self.leaves.buffers}  # changed in place by the run
            for name in self.leaves.params:  # all of them: pyro.module warns of what needs no gradient
                values[name].requires_grad_()
            leaves = [values[name] for name in names]
            loss, terms = self.objective(player, values, batch, t)
            reached = leaves and loss.requires_grad
            grads = torch.autograd.grad(loss, leaves, allow_unused=True) if reached else [None] * len(leaves)
        found = {n: torch.zeros_like(x) if g is None else g for n, x, g in zip(names, leaves, grads, strict=True)}
        buffers = {name: values[name].detach() for name in self.leaves.buffers}
        vector = flat(names, found) if names else torch.zeros_like(state[f"params/{player}"])
        return loss.detach(), {site: term.detach() for site, term in terms.items()}, vector, buffers

    # -- as a graph -----------------------------------------------------------------------------------------------

    def graph(
        self, state: State, t: Tensor, lr: Tensor, batches: Sequence[Batch]
    ) -> tuple[GraphModule, list[Tensor], list[str]]:
        """The step traced on these inputs: an FX graph of tensors alone, its inputs, and its metrics' names.

        The inputs are the state's tensors, t, lr and each batch's arrays; the outputs the new state's and metrics.
        """
        names, arrays, metric_names = list(state), [list(batch) for batch in batches], []

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            given = iter(inputs)
            before = {name: next(given) for name in names}
            t, lr = next(given), next(given)
            after, metrics = self(before, t, lr, [{name: next(given) for name in batch} for batch in arrays])
            metric_names[:] = list(metrics)
            return (*[after[name] for name in names], *metrics.values())

        inputs = [*state.values(), t.clone(), lr.clone(), *[value for batch in batches for value in batch.values()]]
        return compiler.traced(step, inputs), inputs, metric_names

    def compiled(
        self, state: State, t: Tensor, lr: Tensor, batches: Sequence[Batch], in_place: bool = False
    ) -> Callable[[State, Tensor, Tensor, Sequence[Batch]], tuple[State, State]]:
        """The step, traced on these inputs and lowered to kernels: the same call as the step itself.

        With `in_place` the new state is written into the tensors of the old one.
        """
        graph, inputs, metric_names = self.graph(state, t, lr, batches)
        cuda, names, count = t.device.type == "cuda", list(state), len(state)
        if in_place and not cuda:
            compiler.written_back(graph, count)
        run = compiler.lowered(graph, inputs, cuda)

        def step(state: State, t: Tensor, lr: Tensor, batches: Sequence[Batch]) -> tuple[State, State]:
            outputs = run(*state.values(), t, lr, *[value for batch in batches for value in batch.values()])
            if in_place and not cuda:
                return state, dict(zip(metric_names, outputs, strict=True))
            if cuda:  # a replayed graph writes its outputs to the same place every time
                outputs = [value.clone() for value in outputs]
            after, metrics = (
                dict(zip(names, outputs, strict=False)),
                dict(zip(metric_names, outputs[count:], strict=True)),
            )
            if in_place:
                for name, value in after.items():
                    state[name].copy_(value)
            return state if in_place else after, metrics

        return step


def flat(names: Sequence[str], values: Mapping[str, Tensor]) -> Tensor:
    """The named tensors as one vector; an empty one where there are none."""
    return torch.cat([values[name].reshape(-1) for name in names]) if names else torch.zeros(0)
