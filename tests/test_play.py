"""How players take their steps, in the bilinear game min_x max_y xy, where each play has a closed form."""

import numpy as np
import pytest

import probgen
from probgen import Extragradient, Optimistic, ProbgenError, Program, Simultaneous
from probgen.play import play_of
from probgen.program import Player

ETA, STEPS = 0.1, 20
X = {"x": np.zeros((4, 1), np.float32)}


def pyro_game():
    import pyro
    import pyro.distributions as dist
    import torch

    from probgen.pyro import Loss

    def model(x):
        a = pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a, 1.0).expand([1]).to_event(1), obs=x)

    def critic(x):
        return pyro.param("b", torch.tensor(1.0))

    class Bilinear(Loss):
        needs_guide = validates = False

        def __init__(self, updates=1):
            self.updates = updates

        def players(self, program):
            def product(x):
                return len(x) * pyro.param("a") * pyro.param("b")

            return {
                "program": Player((program.model,), lambda model, guide, x: product(x)),
                "critic": Player((critic,), lambda model, guide, x: -product(x), self.updates),
            }

    return model, Bilinear


def numpyro_game():
    import numpyro
    import numpyro.distributions as dist

    from probgen.numpyro import Loss

    def model(x):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(a, 1.0).expand([1]).to_event(1), obs=x)

    def critic(x):
        return numpyro.param("b", 1.0)

    class Bilinear(Loss):
        needs_guide = validates = False

        def __init__(self, updates=1):
            self.updates = updates

        def players(self, program):
            def objective(sign):
                return lambda key, params, model, guide, x: sign * len(x) * params["a"] * params["b"]

            return {
                "program": Player((program.model,), objective(1.0)),
                "critic": Player((critic,), objective(-1.0), self.updates),
            }

    return model, Bilinear


GAMES = {"pyro": pyro_game, "numpyro": numpyro_game}


def place(backend, optimizer, steps=STEPS, **options):
    """(a, b) after some steps from (1, 1)."""
    model, bilinear = GAMES[backend]()
    run = probgen.fit(
        Program(model, by=bilinear(**options)), X, steps=steps, lr=ETA, optimizer=optimizer, batch_size=None,
        precision="64", progress=False,
    )  # fmt: skip
    return np.array([float(run._weights["a"]), float(run._weights["b"])])


@pytest.mark.parametrize("backend", GAMES)
def test_simultaneous_steps_spiral_out_and_the_extragradient_in(backend):
    """‖(a, b)‖ changes by √(1 + η²) and by √(1 − η² + η⁴) a step, and turns by the angle of 1 ± iη and 1 − η² ± iη."""
    for optimizer, factor in (
        (Simultaneous("sgd"), 1 + 1j * ETA),
        ("simultaneous-sgd", 1 + 1j * ETA),
        (Extragradient("sgd"), 1 - ETA**2 + 1j * ETA),
        ("extragradient-sgd", 1 - ETA**2 + 1j * ETA),
    ):
        expected = (1 + 1j) * factor**STEPS  # a + ib: d(a + ib) = η (−b + ia)
        np.testing.assert_allclose(place(backend, optimizer), [expected.real, expected.imag], rtol=1e-12)


@pytest.mark.parametrize("backend", GAMES)
def test_steps_in_turn_keep_their_distance(backend):
    """Alternating steps keep a² + b² − η ab as it is."""
    a, b = place(backend, "sgd")
    np.testing.assert_allclose(a * a + b * b - ETA * a * b, 2 - ETA, rtol=1e-12)


@pytest.mark.parametrize("backend", GAMES)
def test_optimistic_steps_follow_their_recursion_and_converge(backend):
    """a ← a − η(2 b_t − b_{t−1}), then b likewise with the new a; the first step is a plain one."""
    a, b, before = 1.0, 1.0, None
    for _ in range(STEPS):
        g = b
        a -= ETA * (g if before is None else 2 * g - before[0])
        h = -a
        b -= ETA * (h if before is None else 2 * h - before[1])
        before = (g, h)
    np.testing.assert_allclose(place(backend, Optimistic("sgd")), [a, b], rtol=1e-12)
    assert np.hypot(*place(backend, "optimistic-sgd", steps=2000)) < 1e-3


@pytest.mark.parametrize("backend", GAMES)
def test_plays_that_cannot_be_are_refused(backend):
    with pytest.raises(ProbgenError, match="all players move at once, and here one is updated 2 times"):
        place(backend, Extragradient("sgd"), updates=2)
    with pytest.raises(ProbgenError, match="give all of them one way to play"):
        place(backend, {"program": "sgd", "critic": "simultaneous-sgd"})
    with pytest.raises(ProbgenError, match="sdg"):
        place(backend, "extragradient-sdg")


def test_compiled_plays_are_the_eager_ones():
    """The traced step of an extragradient is the step itself."""
    from probgen.data import load_data
    from probgen.data.feed import Feed
    from probgen.data.prepare import Preparation
    from probgen.fit import Options
    from probgen.pyro import Engine

    model, bilinear = pyro_game()
    data = load_data(X)
    program = Program(model, by=bilinear())
    feed = Feed(data.train, Preparation.of(program.prepare, data), None, 0)
    engine = Engine(program, program.by, feed, Options(steps=3, lr=ETA, optimizer="extragradient-adam", ema=0.9))
    state = engine.start()
    rates, clock = engine._rates(0, 1)[0], engine._clock(0, 1)[0]
    batches = next(iter(engine._batches(0, 1)))
    graph, inputs, names = engine.step.graph(state, clock, rates, batches)
    after, metrics = engine.step(state, clock, rates, batches)
    for ours, theirs in zip(graph(*inputs), (*after.values(), *metrics.values()), strict=True):
        np.testing.assert_allclose(ours.detach(), theirs.detach(), rtol=1e-6)
    assert names == list(metrics)


@pytest.mark.parametrize(
    "choice", [Extragradient(Optimistic()), "extragradient-optimistic-adam", "optimistic-extragradient-sgd"]
)
def test_a_play_inside_a_play_is_refused(choice):
    with pytest.raises(ProbgenError, match="is a way to play inside another"):
        play_of(choice)
