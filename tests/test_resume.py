"""Killed anywhere, resumed: the run ends bit for bit like one that was never interrupted."""

import importlib
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import probgen

fit_module = importlib.import_module("probgen.fit")

MODELS = ["vae", "vae_numpyro"]
RECIPE = dict(
    epochs=60, batch_size=64, ema=0.99, schedule=probgen.Cosine(1, 0.1, 1000), clip=5.0, patience=1000, seed=3
)

CHILD = """
import importlib, sys
import probgen
importlib.import_module("probgen.fit").SAVE_EVERY = 0.0   # a checkpoint after every chunk
model, out, go_on = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"
data = probgen.load_data("digits")
program = probgen.load(model, data, z_dim=2, hidden=16)
print("ready", flush=True)
recipe = dict(epochs=60, batch_size=64, ema=0.99, schedule=probgen.Cosine(1, 0.1, 1000), clip=5.0, patience=1000, seed=3)
probgen.fit(program, data, out=out, resume=go_on, progress=False, **({} if go_on else recipe))
print("done", flush=True)
"""


@pytest.fixture(scope="module", params=MODELS)
def uninterrupted(request, tmp_path_factory):
    """The run that nothing happened to, made by the same process as the others."""
    path = tmp_path_factory.mktemp(request.param) / "run"
    started = time.monotonic()
    child = start(request.param, path, "fit")
    assert wait(child) == 0
    return request.param, probgen.Run.open(path), time.monotonic() - started


def start(model, path, what):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, model, str(path), what], stdout=subprocess.PIPE, text=True, env=environment
    )


def wait(child):
    child.communicate(timeout=240)
    return child.returncode


def killed_run(model, path, chance, sends=signal.SIGKILL, within=6.0):
    """Start, kill at a random time after it is ready, resume; as often as it takes to reach the end."""
    kills, what = 0, "fit"
    while True:
        child = start(model, path, what)
        assert child.stdout.readline() == "ready\n"
        if kills < 2:
            time.sleep(chance.uniform(0.0, within))
            child.send_signal(sends)
        code = wait(child)
        if code == 0:
            return probgen.Run.open(path), kills
        assert code == (-signal.SIGKILL if sends == signal.SIGKILL else 143), code
        kills += 1
        what = "resume" if (path / "config.yaml").exists() else "fit"


def assert_same(run, other):
    ours, theirs = run.folder.weights(), other.folder.weights()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    _, state, info = run.folder.last_checkpoint()
    _, other_state, other_info = other.folder.last_checkpoint()
    assert info["step"] == other_info["step"] and info["best"] == other_info["best"]
    assert all(state[name].tobytes() == other_state[name].tobytes() for name in state)
    for name in set(run.metrics) - {"seconds"}:  # no line is lost, none is doubled
        assert run.metrics[name] == other.metrics[name], name


@pytest.mark.nightly_on("vae_numpyro")
def test_two_kills_and_a_resume_end_bit_for_bit(uninterrupted, tmp_path):
    model, whole, seconds = uninterrupted
    run, kills = killed_run(model, tmp_path / "run", random.Random(1), within=max(0.5, seconds / 3))
    assert kills >= 1
    assert_same(run, whole)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_twenty_kills_end_bit_for_bit(uninterrupted, tmp_path):
    model, whole, seconds = uninterrupted
    total, chance = 0, random.Random(2)
    for i in range(20):
        run, kills = killed_run(model, tmp_path / f"run{i}", chance, within=max(0.5, seconds / 3))
        total += kills
        assert_same(run, whole)
    assert total >= 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.nightly_on("2")
def test_a_signal_leaves_a_checkpoint_at_the_step_it_came(tmp_path, number):
    child = start("vae", tmp_path / "run", "fit")
    assert child.stdout.readline() == "ready\n"
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)
    run = probgen.Run.open(tmp_path / "run")
    step = run.folder.last_checkpoint()[2]["step"]
    assert step >= run.step and not run.finished
    assert wait(start("vae", tmp_path / "run", "resume")) == 0
    assert probgen.Run.open(tmp_path / "run").finished


def test_a_finished_run_is_returned_unchanged(uninterrupted):
    _, run, _ = uninterrupted
    before = {path: path.read_bytes() for path in run.path.rglob("*.*") if path.is_file()}
    again = fit_module.resume(run.path)
    assert again.finished
    assert {path: path.read_bytes() for path in run.path.rglob("*.*") if path.is_file()} == before


def test_a_folder_that_holds_a_run_is_refused(uninterrupted):
    model, run, _ = uninterrupted
    data = probgen.load_data("digits")
    with pytest.raises(probgen.ProbgenError, match="resume"):
        probgen.fit(probgen.load(model, data, z_dim=2), data, steps=1, out=run.path)


def test_other_data_is_refused(uninterrupted):
    _, run, _ = uninterrupted
    with pytest.raises(probgen.ProbgenError, match="other data"):
        fit_module.resume(run.path, data={"x": np.ones((100, 8, 8))})


def test_a_second_writer_is_refused(tmp_path):
    child = start("vae", tmp_path / "run", "fit")
    assert child.stdout.readline() == "ready\n"
    while not (tmp_path / "run" / "config.yaml").exists():
        time.sleep(0.01)
    with pytest.raises(probgen.ProbgenError, match="writ"):
        fit_module.resume(tmp_path / "run")
    child.kill()
    child.wait()


def test_fitting_twice_starts_twice_from_the_same_weights():
    data = probgen.load_data("digits")
    program = probgen.load("vae", data, z_dim=2, hidden=8)
    first, second = (probgen.fit(program, data, steps=30, progress=False) for _ in range(2))
    for name in first.params:
        np.testing.assert_array_equal(first.params[name], second.params[name])
    np.testing.assert_array_equal(first.metrics["loss"], second.metrics["loss"])


def test_pieces_and_chunks_do_not_matter(tmp_path):
    """What an engine gives after 40 steps does not depend on how they were cut."""
    data = probgen.load_data("digits")
    for model in MODELS:
        program = probgen.load(model, data, z_dim=2, hidden=8)
        options = probgen.Options(steps=40, batch_size=64)
        backend = importlib.import_module("probgen.numpyro" if "numpyro" in model else "probgen.pyro")
        preparation = importlib.import_module("probgen.data.prepare").Preparation.of(program.prepare, data)
        feed = importlib.import_module("probgen.data.feed").Feed(data.train, preparation, 64, 0)
        engine = backend.engine_of(program, None, feed, options)
        whole, _ = engine.advance(engine.start(), 0, 40)
        state = engine.start()
        for first, last in ((0, 1), (1, 17), (17, 23), (23, 40)):
            state, _ = engine.advance(state, first, last)
        for name, value in engine.export(whole).items():
            np.testing.assert_array_equal(value, engine.export(state)[name])
