"""The traced step is the eager step, on every program and every loss: same random stream, same numbers."""

import warnings

import numpy as np
import pyro
import pytest
import torch
from programs_pyro import CASES
from programs_pyro import network as net
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

import probgen
from probgen.data import load_data
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.fit import Options
from probgen.program import Player
from probgen.pyro import ELBO, IWAE, Engine, Loss
from probgen.pyro.device import seed_step
from probgen.pyro.engine import gathered
from probgen.schedules import Linear


def plain(model, guide, *args):
    """A loss function in Pyro's own convention."""
    return Trace_ELBO().differentiable_loss(model, guide, *args)


def keyword(model, guide, **arrays):
    return Trace_ELBO().differentiable_loss(model, guide, **arrays)


CRITIC = net(6, 4, 1)


class TwoPlayers(Loss):
    """A critic that tells data from draws, and a program that fools it: players with parameters of their own."""

    def __init__(self, updates=1):
        self.updates = updates

    def players(self, program):
        return {
            "program": Player((program.model, program.guide), self.fool),
            "critic": Player((self.critic,), self.tell, self.updates),
        }

    @staticmethod
    def critic(x):
        return pyro.module("critic", CRITIC)(x)

    def draws(self, model, x):
        trace = poutine.trace(poutine.uncondition(model)).get_trace(x=x)
        return trace.nodes["x"]["fn"].base_dist.probs

    def fool(self, model, guide, x):
        return torch.nn.functional.softplus(-self.critic(self.draws(model, x))).sum()

    def tell(self, model, guide, x):
        fake = self.critic(self.draws(model, x))
        return torch.nn.functional.softplus(-self.critic(x)).sum() + torch.nn.functional.softplus(fake).sum()


LOSSES = {
    "ELBO": ("vae_modules", ELBO()),
    "ELBO-2-sampled": ("vae_modules", ELBO(2, kl="sampled")),
    "ELBO-warmup-free-bits": ("vae_modules", ELBO(beta=Linear(0.0, 1.0, 10), free_bits=0.1)),
    "IWAE-3": ("vae_modules", IWAE(3)),
    "Renyi-half": ("vae_modules", IWAE(3, alpha=0.5)),
    "IWAE-global": ("plate_states_rows", IWAE(3)),
    "IWAE-enumerated": ("gmm_tutorial", IWAE(2)),
    "Trace": ("vae_modules", Trace_ELBO()),
    "Trace-vectorized": ("vae_modules", Trace_ELBO(num_particles=4, vectorize_particles=True)),
    "TraceMeanField": ("vae_modules", TraceMeanField_ELBO()),
    "TraceEnum": ("gmm", TraceEnum_ELBO(max_plate_nesting=1)),
    "TraceEnum-guide": ("semi_supervised_mask", TraceEnum_ELBO(max_plate_nesting=1)),
    "TraceGraph": ("discrete_guide", TraceGraph_ELBO()),
    "RenyiELBO": ("vae_modules", RenyiELBO(alpha=0.5, num_particles=3)),
    "function-args": ("vae_modules", plain),
    "function-args-two-arrays": ("conditional_vae", plain),
    "function-kwargs": ("vae_modules", keyword),
    "sum": ("vae_modules", ELBO() + 0.1 * IWAE(2)),
    "sum-with-function-scheduled": ("vae_modules", ELBO() + (lambda step: 0.1 * step) * (ELBO() + plain)),
    "two-players": ("vae_modules", TwoPlayers(2)),
    "two-players-beside-elbo": ("vae_modules", ELBO() + 0.5 * TwoPlayers()),
}


def engine(case, by=None, precision="64", **options):
    data = load_data(case.arrays)
    preparation = Preparation.of(case.program.prepare, data)
    feed = Feed(data.train, preparation, case.batch_size, 0)
    return Engine(case.program, by, feed, Options(steps=20, batch_size=case.batch_size, precision=precision, **options))


def stepped(engine, graph=False, steps=3, first=0):
    """State and metrics after some steps, eager or through the graph traced at step 0."""
    state, run = engine.start(), engine.step
    with engine._scope(), torch.no_grad():
        rates, clock = engine._rates(first, first + steps), engine._clock(first, first + steps)
        if graph:
            traced, _, names = engine.step.graph(state, clock[0], rates[0], next(iter(engine._batches(0, 1))))

            def run(state, t, lr, batches):
                out = traced(*state.values(), t, lr, *[v for batch in batches for v in batch.values()])
                return dict(zip(state, out, strict=False)), dict(zip(names, out[len(state) :], strict=True))

        history = []
        for i, batches in enumerate(engine._batches(first, first + steps)):
            seed_step(0, first + i, engine.device)
            state, metrics = run(state, clock[i], rates[i], batches)
            history.append(metrics)
    return state, history


def agree(case, by, precision):
    tolerance = {"64": 1e-12, "32": 1e-5}[precision]
    options = dict(clip=1.0, ema=0.9)
    eager = stepped(engine(case, by, precision, **options))
    graph = stepped(engine(case, by, precision, **options), graph=True)
    assert set(eager[0]) == set(graph[0])
    for a, b in zip([eager[0], *eager[1]], [graph[0], *graph[1]], strict=True):
        for name in a:
            scale = max(1.0, a[name].abs().max().item() if a[name].numel() else 1.0)
            assert torch.allclose(a[name].double(), b[name].double(), rtol=0, atol=tolerance * scale), name


FEW = ["vae_batchnorm", "vae_dropout", "regression_auto_normal", "gmm_tutorial", "state_space"]


@pytest.mark.parametrize("name", CASES)
def test_every_program(name):
    agree(CASES[name](), None, "64")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.nightly) for n in CASES])
def test_every_program_in_single_precision(name):
    agree(CASES[name](), None, "32")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name):
    program, by = LOSSES[name]
    agree(CASES[program](), by, "64")


@pytest.mark.parametrize("name", [n if "IWAE" in n else pytest.param(n, marks=pytest.mark.nightly) for n in LOSSES])
def test_every_loss_in_single_precision(name):
    program, by = LOSSES[name]
    agree(CASES[program](), by, "32")


def compiled_agrees(case, by=None, steps=5):
    """Inductor reorders sums: rounding, carried through a few steps of SGD."""
    options = dict(optimizer="sgd", lr=1e-2, steps=steps, batch_size=case.batch_size, progress=False, precision="64")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a step that falls back to eager says so
        warnings.filterwarnings("ignore", message=".*online_softmax.*|.*torch.jit.*|.*TF32.*")
        compiled = probgen.fit(case.program, case.arrays, by=by, compile=True, **options)
    eager = probgen.fit(case.program, case.arrays, by=by, compile=False, **options)
    assert compiled.config["compiled"] and not eager.config["compiled"]
    for name, value in eager.params.items():
        assert np.allclose(compiled.params[name], value, rtol=1e-9, atol=1e-10), name
    assert np.allclose(compiled.metrics["loss"], eager.metrics["loss"], rtol=1e-9)


@pytest.mark.parametrize("name", ["vae_batchnorm", "gmm"])
def test_compiled(name):
    compiled_agrees(CASES[name]())


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_every_program_compiled(name):
    compiled_agrees(CASES[name]())


@pytest.mark.nightly
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_compiled(name):
    program, by = LOSSES[name]
    compiled_agrees(CASES[program](), by)


def test_a_program_that_reads_a_number_runs_eagerly_and_says_so():
    case = CASES["global_params"]()

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", pyro.distributions.Normal(loc if x.sum().item() > -1e9 else 0.0, 1.0), obs=x)

    with pytest.warns(UserWarning, match="cannot be compiled .* so it runs eagerly"):
        run = probgen.fit(
            probgen.Program(model, by=ELBO()), case.arrays, steps=3, batch_size=8, compile=True, progress=False
        )
    eager = probgen.fit(
        probgen.Program(model, by=ELBO()), case.arrays, steps=3, batch_size=8, compile=False, progress=False
    )
    assert "eagerly" in run.config["note"] and np.array_equal(run.params["loc"], eager.params["loc"])


@pytest.mark.parametrize("frozen", ["program", "critic"])
def test_a_players_gradient_never_reaches_the_other(frozen):
    """With a rate that rounds to zero a player stays where it is bit for bit, whatever the other's loss does."""
    lr = {"program": 0.1, "critic": 0.1, frozen: 1e-300}
    fitted = engine(CASES["vae_modules"](), TwoPlayers(), optimizer="sgd", lr=lr)
    names = {player: trainee.names for player, trainee in fitted.step.trainees.items()}
    assert {n.split("$")[0] for n in names["critic"]} == {"critic"}
    assert {n.split("$")[0] for n in names["program"]} == {"encoder", "decoder"}
    start, (end, history) = fitted.start(), stepped(fitted)
    moved = {player: not torch.equal(start[f"params/{player}"], end[f"params/{player}"]) for player in names}
    assert moved == {player: player != frozen for player in names}
    assert {"loss/program", "loss/critic"} <= set(history[0])


def test_a_step_updates_every_player_on_fresh_batches():
    fitted = engine(CASES["vae_modules"](), TwoPlayers(updates=2))
    assert fitted.batches_per_step == 3
    batches = [gathered(batch) for batch in next(iter(fitted._batches(0, 1)))]
    assert len(batches) == 3 and not torch.equal(batches[0]["x"], batches[1]["x"])
