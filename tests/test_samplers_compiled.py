"""Compiled steps of a sampler are its eager ones: the same numbers from a seed, with any weights, labels and levels."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import probgen
from probgen.diffusion import DDIM, Ancestral, DPMSolver, Heun, PredictorCorrector
from probgen.diffusion.samplers import SAMPLERS
from probgen.pyro import compile as compiler
from probgen.pyro import samplers
from probgen.pyro.leaves import leaves_of
from probgen.pyro.samplers import PAYS, Products
from probgen.pyro.trained import Trained

DATA = probgen.load_data({"x": np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)})


QUICK = (DDIM, DPMSolver, PredictorCorrector)  # with noise, with memory, and that asks at s too
SOME = [cls(steps=4) if cls in QUICK else pytest.param(cls(steps=4), marks=pytest.mark.nightly) for cls in SAMPLERS]


@pytest.fixture
def traced_only(monkeypatch):
    """Steps are traced to a graph, which is run as it is: what Inductor makes of one has tests of its own."""
    made = []

    def lowered(graph, inputs, cuda=False):
        made.append(graph)
        return graph

    monkeypatch.setattr(compiler, "lowered", lowered)
    return made


def trained(scale=0.3, data=DATA, shift=0, **options):
    """A program whose weights are other ones than those that it was made with."""
    program = probgen.load("ddpm", data, steps=4, hidden=8, layers=2, **options)
    batch = {name: data.train[name][:16] for name in data.spec}
    values = leaves_of(program, batch, torch.float32, 0).values()
    rng = np.random.default_rng(shift)
    found = {n: (v.detach() + scale * rng.normal(size=tuple(v.shape))).numpy() for n, v in values.items()}
    return Trained(program, found, batch, rows=64)


made_once = functools.cache(trained)


def fresh():
    """The usual program, nothing of which is compiled yet."""
    of = made_once()
    of._compiled.clear()
    return of


def drawn(of, sampler, compile, n=5, seed=0, **arrays):
    return of.sampled(sampler, {"x": np.zeros((n, 3), np.float32), **arrays}, seed, compile=compile)["x"]


def assert_same(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("sampler", SOME, ids=lambda s: type(s).__name__)
def test_a_graph_of_every_samplers_step_draws_what_it_draws(sampler, traced_only):
    of = fresh()
    graph, eager = drawn(of, sampler, True), drawn(of, sampler, False)
    assert np.abs(eager).max() > 0.1
    assert_same(graph, eager)
    assert len(traced_only) == 2  # one for all steps, and one for the last
    assert np.array_equal(graph, drawn(of, sampler, True)) and len(traced_only) == 2
    assert not np.allclose(graph, drawn(of, sampler, True, seed=1), atol=1e-3)


def test_learned_schedules_and_variances_are_inputs_too(traced_only):
    of = trained(schedule="learned", variance="learned", predicts="v")
    assert_same(drawn(of, Ancestral(5), True), drawn(of, Ancestral(5), False))


def test_other_weights_are_not_served_stale_ones(traced_only):
    """Neither by another program's steps nor by one graph that is handed other weights."""
    ones, others = trained(shift=1), trained(shift=2)
    first, second = (drawn(of, DDIM(4), True) for of in (ones, others))
    assert_same(first, drawn(ones, DDIM(4), False))
    assert_same(second, drawn(others, DDIM(4), False))
    assert np.abs(first - second).max() > 0.05
    ones.values = others.values
    assert_same(drawn(ones, DDIM(4), True), second)
    assert len(traced_only) == 4


def test_labels_are_inputs_and_shapes_have_graphs_of_their_own(traced_only):
    rng = np.random.default_rng(0)
    data = probgen.load_data({"x": rng.normal(size=(64, 3)).astype(np.float32), "y": rng.integers(0, 3, 64)})
    of, found = trained(data=data, conditional=True), []
    for label in (0, 2):
        y = np.full(5, label)
        found.append(drawn(of, DDIM(4, guidance=1.0), True, y=y))
        assert_same(found[-1], drawn(of, DDIM(4, guidance=1.0), False, y=y))
    assert np.abs(found[0] - found[1]).max() > 0.01 and len(traced_only) == 2
    unguided = drawn(of, DDIM(4), True, y=y)
    assert_same(unguided, drawn(of, DDIM(4), False, y=y))
    assert np.abs(unguided - found[1]).max() > 1e-3
    assert drawn(of, DDIM(4), True, n=7, y=np.zeros(7, int)).shape == (7, 3) and len(traced_only) == 6


def test_steps_are_compiled_where_it_pays(traced_only, monkeypatch):
    of = fresh()
    by_default = drawn(of, DDIM(4), None)
    assert not traced_only and np.array_equal(by_default, drawn(of, DDIM(4), False))
    with Products() as seen:
        drawn(of, DDIM(1), False)
    monkeypatch.setitem(PAYS, "cpu", 3 * seen.count + 1)  # of the steps but the last
    drawn(of, DDIM(4), None)
    assert not traced_only
    monkeypatch.setitem(PAYS, "cpu", 3 * seen.count)
    assert_same(drawn(of, DDIM(4), None), by_default)
    assert len(traced_only) == 2
    assert np.array_equal(drawn(of, DDIM(4), None), drawn(of, DDIM(4), None))


def test_multiplications_are_counted():
    layers = torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.ConvTranspose2d(3, 2, 2, stride=2), torch.nn.Linear(7, 5)
    with torch.no_grad(), Products() as seen:
        layers[1](layers[0](torch.zeros(4, 2, 6, 6)))
        layers[2](torch.zeros(4, 7)) @ torch.zeros(5, 6)
        torch.zeros(2, 3, 4) @ torch.zeros(2, 4, 5)
    assert seen.count == 4 * 36 * 3 * 2 * 9 + 4 * 36 * 3 * 2 * 4 + 4 * 7 * 5 + 4 * 5 * 6 + 2 * 3 * 4 * 5


def test_what_cannot_be_compiled_runs_eagerly_and_says_so_once():
    @dataclass(frozen=True)
    class Looking(DDIM):
        def step(self, chain, x, at, noise, memory):
            assert float(x.sum()) is not None  # a number, which no graph has
            return super().step(chain, x, at, noise, memory)

        def last(self, chain, x, at, noise, memory):
            return super().last(chain, x, at, noise, memory) * float(x.sum() * 0 + 1)

    of = fresh()
    with pytest.warns(UserWarning, match="a step of Looking cannot be compiled .*so it runs eagerly") as said:
        found = drawn(of, Looking(3), True)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(drawn(of, Looking(3), True), found)
    assert np.array_equal(found, drawn(of, DDIM(3), False))


@pytest.mark.nightly
@pytest.mark.parametrize("sampler", [cls(steps=4) for cls in SAMPLERS], ids=lambda s: type(s).__name__)
def test_compiled_steps_draw_what_eager_ones_draw(sampler):
    of = fresh()
    found = drawn(of, sampler, True)
    assert_same(found, drawn(of, sampler, False))
    assert np.array_equal(found, drawn(of, sampler, True))


@pytest.mark.nightly
@pytest.mark.parametrize("sampler", [DDIM(4, eta=1.0), Heun(3), DPMSolver(4)], ids=lambda s: type(s).__name__)
def test_compiled_steps_of_a_u_net_draw_what_eager_ones_draw(sampler):
    images = probgen.load_data({"x": np.random.default_rng(0).normal(size=(64, 8, 8)).astype(np.float32)})
    of, rows = trained(0.05, images, network="conv"), {"x": np.zeros((6, 8, 8), np.float32)}
    a, b = (of.sampled(sampler, rows, 0, compile=compile)["x"] for compile in (True, False))
    assert_same(a, b)


def test_run_sample_is_by_the_same_steps(traced_only, monkeypatch):
    run = probgen.fit(probgen.load("ddpm", DATA, steps=4, hidden=8), DATA, steps=20, compile=False, progress=False)
    eager = run.sample(6, sampler=DDIM(5))["x"]
    monkeypatch.setitem(samplers.PAYS, "cpu", 0)
    compiled = run.sample(6, sampler=DDIM(5))["x"]
    assert len(traced_only) == 2
    assert_same(compiled, eager)
