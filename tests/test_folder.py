"""The run folder: whole at every instant, one writer, every damage told in one sentence."""

import enum
import hashlib
import json
import math
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probgen.errors import ProbgenError
from probgen.folder import Folder, plain, store
from probgen.folder.manifest import Manifest, check_name

ROOT = Path(__file__).parent.parent
WEIGHTS = "weights.safetensors"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Processes die here, the machine does not; that `fsync` is called where it must be has its own test."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def weights_at(step, size=1000):
    return {"w": np.full(size, step, np.float32), "scale": np.float64(step) / 3, "key": np.array([1, step], np.uint32)}


def state_at(step, size=2000):
    return {"adam": np.arange(size) + step, "done": np.array([step % 2 == 0])}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.asarray(value).dtype
        assert found[name].shape == np.shape(value)
        np.testing.assert_array_equal(found[name], value)


def is_at(folder, step, size=1000):
    weights, state, info = folder.last_checkpoint()
    assert info["step"] == step
    same(weights, weights_at(step, size))
    same(state, state_at(step, 2 * size))
    same(folder.weights(), weights_at(step, size))


def make(path, steps=(1, 2)):
    folder = Folder.create(path)
    with folder.writer():
        folder.write_config({"program": "vae", "lr": 1e-5, "hidden": (3, 2), "note": "yes"})
        folder.copy_source("def model(x): ...\n")
        for step in steps:
            folder.append_metrics({"step": step, "loss": 1 / step})
            folder.checkpoint(weights_at(step), state_at(step), {"step": step, "best": math.inf})
        folder.write_json("evaluation.json", {"elbo": np.float32(-1.5), "k_hat": math.nan})
        folder.write_bytes("pictures/curves.png", b"png")
    return folder


def refused(call, *words):
    with pytest.raises(ProbgenError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400, text
    assert all(str(word) in text for word in words), (text, words)
    return text


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


def script(code, *arguments, **options):
    """A process of its own that knows `probgen` and this file's helpers."""
    places = [str(ROOT), str(ROOT / "tests")]
    head = f"import os, sys, time\nsys.path[:0] = {places}\nfrom test_folder import *\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def run_script(code, *arguments):
    process = script(code, *arguments)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


# --- what is written is what is read ---


def test_a_folder_gives_back_what_it_was_given(tmp_path):
    path = tmp_path / "deep" / "run"
    make(path)
    folder = Folder.open(path)
    folder.verify()
    assert folder.config == {"program": "vae", "lr": 1e-5, "hidden": [3, 2], "note": "yes"}
    assert folder.metrics() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    is_at(folder, 2)
    assert folder.last_checkpoint()[2] == {"step": 2, "best": math.inf}
    evaluation = folder.read_json("evaluation.json")
    assert evaluation["elbo"] == -1.5 and math.isnan(evaluation["k_hat"])
    json.loads((path / "evaluation.json").read_text(), parse_constant=pytest.fail)  # valid for every reader
    assert folder.verified("pictures/curves.png").read_bytes() == b"png"
    assert "model.py" in folder and "posterior.nc" not in folder
    refused(lambda: folder.read_bytes("posterior.nc"), path, "posterior.nc")
    assert sorted(p.name for p in path.iterdir()) == sorted(
        f".lock config.yaml evaluation.json manifest.json metrics.jsonl model.py pictures state {WEIGHTS}".split()
    )
    assert len(list((path / "state").iterdir())) == 1


def test_weights_have_no_volatile_bytes_and_the_folders_file_mode(tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert contents(first.path) == contents(second.path)
    assert stat.S_IMODE((first.path / WEIGHTS).stat().st_mode) == stat.S_IMODE(first.path.stat().st_mode) & 0o666


@pytest.mark.parametrize(
    "value",
    [
        np.array(v, t)
        for t in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
        for v in ([0, 1], 1)
    ]
    + [np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype=">f8"), np.array(math.nan), np.float32(2)],
    ids=lambda v: f"{v.dtype.str}{v.shape}",
)
def test_every_array_comes_back(tmp_path, value):
    folder = Folder.create(tmp_path)
    with folder.writer():
        folder.checkpoint({"v": value}, {}, {"step": 0})
    (found, _, _), native = folder.last_checkpoint(), np.asarray(value).dtype.newbyteorder("=")
    assert found["v"].dtype == native and found["v"].shape == value.shape and found["v"].flags.writeable
    np.testing.assert_array_equal(found["v"], value)


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([{}]), np.array(1.0, np.longdouble)])
def test_arrays_that_have_no_place_in_a_weights_file_are_named(tmp_path, value):
    folder = Folder.create(tmp_path)
    with folder.writer():
        refused(lambda: folder.checkpoint({"v": value}, {}, {"step": 0}), "'v'", value.dtype)
    assert folder.last_checkpoint() is None


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("aé:-#\n '1", max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(plain_values)
@settings(max_examples=300, deadline=None)
def test_plain_values_survive_json_and_yaml(value):
    spelled = {"NaN", "Infinity", "-Infinity"}
    assert repr(plain.from_yaml(plain.to_yaml({"v": value}, "f"), "f")) == repr({"v": value})
    if not any(word in repr(value) for word in spelled):
        assert repr(plain.from_json(plain.to_json(value, "f"))) == repr(value)


def test_enumerations_are_told_as_what_they_are():
    class Word(enum.StrEnum):
        AUTO = "auto"

    class Number(enum.IntEnum):
        TWO = 2

    value = {"device": Word.AUTO, "n": Number.TWO, "flag": np.bool_(True), "lr": np.float32(0.5), "shape": (1, 2)}
    expected = {"device": "auto", "n": 2, "flag": True, "lr": 0.5, "shape": [1, 2]}
    assert repr(plain.from_yaml(plain.to_yaml(value, "f"), "f")) == repr(expected)
    assert repr(plain.from_json(plain.to_json(value, "f"))) == repr(expected)


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {2}}, np.array([object()]), b"bytes", 1j])
def test_what_is_not_plain_is_refused(tmp_path, value):
    folder = Folder.create(tmp_path)
    with folder.writer():
        refused(lambda: folder.write_config({"option": value}), "config.yaml: option")
        refused(lambda: folder.write_json("a.json", {"option": value}), "a.json: option")
    assert set(contents(tmp_path)) == {".lock", "manifest.json"}


def test_source(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("x = 1\n")
    folder = Folder.create(tmp_path / "run")
    with folder.writer():
        refused(lambda: folder.copy_source(tmp_path / "none.py"), "none.py")
        assert not folder.source_matches(mine)
        folder.copy_source(mine)
        assert folder.source_matches(mine)
        folder.copy_source("x = 2\n")
    assert folder.read_text("model.py") == "x = 2\n"
    assert not folder.source_matches(mine) and not folder.source_matches(tmp_path / "none.py")


# --- whose folder it is ---


def test_a_folder_that_holds_a_run_is_refused_and_any_other_taken_over(tmp_path):
    run = make(tmp_path / "run").path
    before = contents(run)
    refused(lambda: Folder.create(run), run, "resume")
    assert contents(run) == before
    (run / "config.yaml").unlink()
    (run / "notes.txt").write_text("mine")
    folder = Folder.create(run)
    with folder.writer():  # what an earlier run left is not this one's
        assert folder.last_checkpoint() is None and folder.metrics() == [] and "evaluation.json" not in folder
        folder.write_config({})
        folder.checkpoint(weights_at(7), state_at(7), {"step": 7})
    folder.verify()
    is_at(folder, 7)
    assert (run / "notes.txt").read_text() == "mine"


def test_a_run_that_began_after_create_is_not_overwritten(tmp_path):
    late = Folder.create(tmp_path)
    make(tmp_path)
    before = contents(tmp_path)
    refused(lambda: late.writer().__enter__(), tmp_path, "resume")
    assert contents(tmp_path) == before


def test_paths_that_hold_no_run(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(lambda: Folder.create(tmp_path / "file"), "is a file")
    refused(lambda: Folder.create(tmp_path / "file" / "run"), "is a file or lies below one")
    refused(lambda: Folder.open(tmp_path / "none"), "no run folder", tmp_path / "none")
    refused(lambda: Folder.open(tmp_path / "file"), "no run folder")
    refused(lambda: Folder.open(tmp_path), "holds no run", "config.yaml")
    (tmp_path / "config.yaml").write_text("a: 1\n")
    refused(lambda: Folder.open(tmp_path), "manifest.json is missing")
    assert sorted(contents(tmp_path)) == ["config.yaml", "file"]


def test_writing_needs_to_be_the_writer(tmp_path):
    folder = make(tmp_path)
    before = contents(tmp_path)
    for write in (
        lambda: folder.write_json("a.json", 1),
        lambda: folder.append_metrics({"step": 3}),
        lambda: folder.truncate_metrics(0),
        lambda: folder.checkpoint(weights_at(3), state_at(3), {"step": 3}),
    ):
        with pytest.raises(RuntimeError, match="writer"):
            write()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", "a//b", "..\\x", "C:x", "a\0b", "./x"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    folder = make(tmp_path / "run")
    with folder.writer():
        refused(lambda: folder.write_bytes(name, b"x"), "outside")
    refused(lambda: folder.read_bytes(name), "outside")
    manifest = json.loads((folder.path / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    (folder.path / "manifest.json").write_text(json.dumps(manifest))
    refused(lambda: Folder.open(folder.path), "manifest.json", "outside")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["manifest.json", WEIGHTS, "state/x", "metrics.jsonl", ".lock", ".tmp/x"])
def test_the_folders_own_names_are_kept(tmp_path, name):
    folder = make(tmp_path)
    with folder.writer():
        refused(lambda: folder.write_bytes(name, b"x"), name)
    folder.verify()


def test_links_are_not_followed_out_of_the_folder(tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "precious").write_text("keep")
    folder = make(run, steps=())
    (run / "state").symlink_to(outside)
    (run / ".tmp").symlink_to(outside)
    (run / "report.html").symlink_to(outside / "precious")
    with folder.writer():
        refused(lambda: folder.checkpoint(weights_at(1), state_at(1), {"step": 1}), "state", "link")
        folder.write_bytes("report.html", b"new")
        (run / "metrics.jsonl").symlink_to(outside / "precious")
        refused(lambda: folder.append_metrics({"step": 1}), "cannot write", "metrics.jsonl")
        (run / "metrics.jsonl").unlink()
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(outside / "precious")
    refused(lambda: folder.writer().__enter__(), "cannot write into", run)
    assert contents(outside) == {"precious": b"keep"}


# --- one writer ---


def test_a_second_writer_is_refused_in_this_process(tmp_path):
    folder = make(tmp_path)
    with folder.writer():
        with folder.writer():  # the same writer
            folder.write_json("a.json", 0)
        refused(lambda: Folder.open(tmp_path).writer().__enter__(), tmp_path, "this process already")
        folder.write_json("a.json", 1)  # which goes on
        Folder.open(tmp_path).verify()  # and readers are free
    before = contents(tmp_path)
    assert before[".lock"] == b""
    with Folder.open(tmp_path).writer():
        pass
    assert contents(tmp_path) == before  # to have looked changes nothing


def test_of_two_racing_writers_one_proceeds(tmp_path):
    make(tmp_path)
    code = """
        folder = Folder.open(sys.argv[1])
        print("ready", flush=True)
        for line in sys.stdin:
            try:
                with folder.writer():
                    print("won", flush=True)
                    sys.stdin.readline()
            except ProbgenError as error:
                print(error, flush=True)
                sys.stdin.readline()
            print("out", flush=True)
    """
    racers = [script(code, tmp_path) for _ in range(2)]

    def tell(process):
        process.stdin.write("\n")
        process.stdin.flush()

    try:
        assert [r.stdout.readline() for r in racers] == ["ready\n"] * 2
        for round_ in range(50):
            for racer in racers[:: 1 - 2 * (round_ % 2)]:
                tell(racer)
            answers = sorted((r.stdout.readline().strip() for r in racers), key=len)
            assert answers[0] == "won" and "is being written by another process" in answers[1], answers
            for racer in racers:
                tell(racer)
            assert [r.stdout.readline() for r in racers] == ["out\n"] * 2
    finally:
        for racer in racers:
            racer.communicate(timeout=30)


def test_the_lock_of_a_killed_writer_is_free_even_while_its_forked_child_lives(tmp_path):
    make(tmp_path)
    process = script(
        """
        with Folder.open(sys.argv[1]).writer() as folder:
            child = os.fork()
            if child == 0:
                try:
                    folder.write_json("a.json", 1)
                except RuntimeError as error:  # the right to write is the parent's
                    print(os.getpid(), error, flush=True)
                    time.sleep(60)
                os._exit(0)
            time.sleep(60)
        """,
        tmp_path,
    )
    child, _, told = process.stdout.readline().partition(" ")
    child = int(child)
    assert "writer" in told
    try:
        refused(lambda: Folder.open(tmp_path).writer().__enter__(), f"another process (pid {process.pid})")
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        with Folder.open(tmp_path).writer() as folder:
            folder.verify()
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import errno
    import fcntl

    def no_locks(fd, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    folder = make(tmp_path)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="has no locks"), folder.writer():
        folder.write_json("a.json", 1)
    folder.verify()


# --- a crash at any instant ---

# Every call that changes the disk is counted; the N-th one kills the process (or fails, as on a full disk), a write
# after half its bytes.
CRASH = """
    import errno
    from probgen import folder as folder_module
    path, mode = sys.argv[1:]
    calls = 0

    def counted(function, half=None):
        def call(*args, **options):
            global calls
            calls += 1
            if calls != limit:
                return function(*args, **options)
            if half:
                half(*args, **options)
            if mode == "kill":
                os._exit(9)
            raise OSError(errno.ENOSPC, "No space left on device")
        return call

    def half_of(write, path_at):
        def call(*args):
            write(*args)
            os.truncate(args[path_at], os.path.getsize(args[path_at]) // 2)
        return call

    write_bytes, save = Path.write_bytes, folder_module.save
    Path.write_bytes = counted(write_bytes, half_of(write_bytes, 0))
    folder_module.save = counted(save, half_of(save, 1))
    os.fsync = lambda fd: None  # a process dies here, not the machine
    for name in ("replace", "fsync", "ftruncate", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    limit = 0
    last = 0
    while True:
        last += 1
        os.mkdir(f"{path}/{last}")
        run = f"{path}/{last}/run"
        make(run, steps=(1,))
        pid = os.fork()
        if pid == 0:
            calls, limit = 0, last
            try:
                with Folder.open(run).writer() as folder:
                    folder.truncate_metrics(0)
                    folder.append_metrics({"step": 1, "loss": 1.0})
                    folder.append_metrics({"step": 2, "loss": 0.5})
                    folder.checkpoint(weights_at(2), state_at(2), {"step": 2})
                    folder.write_json("evaluation.json", {"elbo": -2.0})
                    folder.write_bytes("report.html", b"<html>")
            except ProbgenError as error:
                assert "No space left" in str(error) and mode == "full", error
                os._exit(3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(last, status, flush=True)
        if status == 0 and last > 70:
            break
"""


@pytest.mark.parametrize("mode", ["kill", "full"])
def test_a_stop_at_every_single_disk_operation_leaves_the_old_or_the_new(tmp_path, mode):
    lines = [tuple(map(int, line.split())) for line in run_script(CRASH, tmp_path, mode).splitlines()]
    statuses = [status for _, status in lines]
    assert set(statuses) <= {0, 9 if mode == "kill" else 3}
    assert statuses.count(9 if mode == "kill" else 3) >= 30  # the crashes were really inside
    steps = set()
    for number, _ in lines:
        folder = Folder.open(tmp_path / str(number) / "run")
        folder.verify()
        step = folder.last_checkpoint()[2]["step"]
        steps.add(step)
        is_at(folder, step)
        assert folder.read_json("evaluation.json")["elbo"] in (-1.5, -2.0)
        with folder.writer():
            folder.truncate_metrics(step)
        is_at(folder, step)
        if step == 2:  # the rows up to a checkpoint are there, once
            assert [row["step"] for row in folder.metrics()] == [1, 2]
        folder.verify()
        manifest = json.loads((folder.path / "manifest.json").read_text())
        assert all(isinstance(sha, str) for sha in manifest["files"].values())  # all is settled
        left = {p.name for p in folder.path.rglob("*") if p.is_file()}
        known = {".lock", "config.yaml", "evaluation.json", "manifest.json", "metrics.jsonl", "model.py", WEIGHTS}
        assert {n for n in left - known if not n.startswith("0000000")} <= {"curves.png", "report.html"}
        assert len(list((folder.path / "state").iterdir())) == 1 and not (folder.path / ".tmp").exists()
    assert steps == {1, 2}


def test_files_reach_the_disk_before_their_names_and_names_before_the_next(tmp_path, monkeypatch):
    """What a power cut may take is what was not flushed: the order of flushes is the promise."""
    folder = make(tmp_path, steps=(1,))
    log, fsync, replace = [], os.fsync, os.replace

    def logged_fsync(fd):
        log.append(("flush", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def logged_replace(source, target):
        log.append(("rename", str(source), str(target)))
        replace(source, target)

    with folder.writer():
        folder.append_metrics({"step": 2})
        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "replace", logged_replace)
        folder.checkpoint(weights_at(2), state_at(2), {"step": 2})
        folder.write_bytes("pictures/a.png", b"new")
    renames = [i for i, entry in enumerate(log) if entry[0] == "rename"]
    assert len(renames) == 8  # state, manifest, weights, manifest; manifest, picture, manifest; the curves' hash
    for here, after in zip(renames, [*renames[1:], len(log)], strict=True):
        _, source, target = log[here]
        assert ("flush", source) in log[:here]
        assert ("flush", str(Path(target).parent)) in log[here:after]
    commit = next(i for i in renames if log[i][2].endswith(WEIGHTS))
    assert ("flush", str(tmp_path / "metrics.jsonl")) in log[:commit]


WORKER = """
    path, size = sys.argv[1], int(sys.argv[2])
    if os.path.exists(path + "/config.yaml"):
        folder = Folder.open(path)
    else:
        folder = Folder.create(path)
    with folder.writer():
        if "config.yaml" not in folder:
            folder.write_config({"size": size})
        found = folder.last_checkpoint()
        step = found[2]["step"] if found else 0
        folder.truncate_metrics(step)
        print("ready", flush=True)
        while True:
            step += 1
            folder.append_metrics({"step": step, "loss": 1 / step})
            if step % 2 == 0:
                folder.checkpoint(weights_at(step, size), state_at(step, 2 * size), {"step": step})
                folder.write_json("evaluation.json", {"step": step})
                print("saved", flush=True)
"""


def killed_at_random(path, kills, seed):
    rng, size, last = random.Random(seed), 20_000, 0
    for _ in range(kills):
        worker = script(WORKER, path, size)
        assert worker.stdout.readline() == "ready\n"
        if rng.random() < 0.7:
            assert worker.stdout.readline() == "saved\n"
        time.sleep(rng.uniform(0, 0.15))
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        folder = Folder.open(path)
        folder.verify()
        found = folder.last_checkpoint()
        step = found[2]["step"] if found else 0
        if step:
            is_at(folder, step, size)
            assert "evaluation.json" not in folder or folder.read_json("evaluation.json")["step"] <= step
        assert step >= last and [row["step"] for row in folder.metrics()][:step] == list(range(1, step + 1))
        last = step
    with Folder.open(path).writer() as folder:
        folder.truncate_metrics(last)
    assert [row["step"] for row in folder.metrics()] == list(range(1, last + 1))
    assert not (folder.path / ".tmp").exists() and len(list((folder.path / "state").iterdir())) == 1
    assert last > kills


def test_sigkill_at_random_times(tmp_path):
    killed_at_random(tmp_path / "run", kills=15, seed=0)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_sigkill_at_random_times_often(tmp_path):
    killed_at_random(tmp_path / "run", kills=200, seed=time.time_ns())


def test_a_reader_beside_a_writer_sees_whole_checkpoints(tmp_path):
    worker = script(WORKER, tmp_path / "run", 1000)
    try:
        assert worker.stdout.readline() == "ready\n"
        seen = set()
        while len(seen) < 40:
            folder = Folder.open(tmp_path / "run")
            folder.verify()
            found = folder.last_checkpoint()
            if found:
                same(found[0], weights_at(found[2]["step"]))
                same(found[1], state_at(found[2]["step"]))
                seen.add(found[2]["step"])
            folder.metrics()
    finally:
        worker.kill()
        worker.communicate()


def test_a_file_that_outgrows_its_limit_leaves_the_checkpoint_before(tmp_path):
    make(tmp_path / "run", steps=(1,))
    out = run_script(
        """
        import resource
        folder = Folder.open(sys.argv[1])
        refusals = []
        for limit in [0, 1, 40, 200, 700, 900, 1000, 2000, 4000, 4200, 8000, 16000, 16100]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                with folder.writer():
                    for step in range(2, 40):
                        folder.append_metrics({"step": step, "loss": 0.123456789})
                    folder.checkpoint(weights_at(2), state_at(2), {"step": 2})
            except ProbgenError as error:
                refusals.append(str(error))
            with open(os.devnull):
                folder.verify()
            is_at(folder, 1)
        assert len(refusals) == 13 and all("File too large" in r and "\\n" not in r for r in refusals), refusals
        print(sorted({r.split(":")[0].split("/")[-1] for r in refusals}))
        """,
        tmp_path / "run",
    )
    assert WEIGHTS in out and "metrics.jsonl" in out
    with Folder.open(tmp_path / "run").writer() as folder:
        folder.truncate_metrics(1)
        folder.checkpoint(weights_at(2), state_at(2), {"step": 2})
    folder.verify()
    is_at(folder, 2)
    assert not (folder.path / ".tmp").exists()


def test_a_folder_that_cannot_be_written_is_said():
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        os.chmod(place, 0o755)
        path = make(Path(place) / "run").path
        before = contents(path)
        os.chmod(path, 0o555)
        os.chmod(path / ".lock", 0o444)
        run_script(
            """
            folder = Folder.open(sys.argv[1])
            is_at(folder, 2)  # what is imported on the way is imported by a user who may
            if os.geteuid() == 0:
                os.seteuid(65534)
            folder.verify()
            is_at(folder, 2)
            refused(lambda: folder.writer().__enter__(), sys.argv[1], "Permission denied")
            refused(lambda: Folder.create(sys.argv[1] + "/new"), "cannot make the folder", "Permission denied")
            """,
            path,
        )
        os.chmod(path, 0o755)
        assert contents(path) == before


def test_a_picture_that_fails_leaves_the_one_before(tmp_path):
    folder = make(tmp_path)

    def half(path):
        assert path.suffix == ".png"
        path.write_bytes(b"half")
        raise KeyError("no such colour")

    with folder.writer():
        with pytest.raises(KeyError):
            folder.write_with("pictures/curves.png", half)
        assert folder.read_bytes("pictures/curves.png") == b"png"
        assert list((tmp_path / ".tmp" / "pictures").iterdir()) == []  # a full disk has its room back at once
    assert not (tmp_path / ".tmp").exists()


# --- damage is found and named ---


def flipped(data):
    middle = len(data) * 2 // 3
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "flipped": flipped,
    "truncated": lambda data: data[:-1],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\n",
    "missing": None,
}
READERS = {
    "config.yaml": lambda folder: folder.config,
    "model.py": lambda folder: folder.read_text("model.py"),
    WEIGHTS: Folder.weights,
    "state": Folder.last_checkpoint,
    "metrics.jsonl": Folder.metrics,
    "evaluation.json": lambda folder: folder.read_json("evaluation.json"),
    "pictures/curves.png": lambda folder: folder.verified("pictures/curves.png"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_damage_is_named(tmp_path, name, damage):
    folder = make(tmp_path)
    path = next((tmp_path / "state").iterdir()) if name == "state" else tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = contents(tmp_path)
    word = "missing" if damage == "missing" else "sha256"
    refused(lambda: READERS[name](folder), path, word)
    refused(folder.verify, path, word)
    if name == WEIGHTS:
        refused(folder.last_checkpoint, path, word)
    assert contents(tmp_path) == before


def test_a_folder_or_pipe_in_place_of_weights(tmp_path):
    folder = make(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).mkdir()
    refused(folder.weights, WEIGHTS, "not a regular file")
    (tmp_path / WEIGHTS).rmdir()
    os.mkfifo(tmp_path / WEIGHTS)  # opening it would wait for ever
    refused(folder.weights, WEIGHTS, "not a regular file")


def test_any_flipped_bit_of_the_manifest_is_refused_or_harmless(tmp_path):
    folder = make(tmp_path)
    path, rng = tmp_path / "manifest.json", random.Random(0)
    good = path.read_bytes()
    found = 0
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << rng.randrange(8)]) + good[position + 1 :])
        try:
            Folder.open(tmp_path).verify()
            is_at(Folder.open(tmp_path), 2)
        except ProbgenError as error:
            assert "\n" not in str(error)
            found += 1
    assert found > len(good) * 0.8  # what is left are the spaces between the words
    for length in range(0, len(good) - 1, 7):
        path.write_bytes(good[:length])
        refused(lambda: Folder.open(tmp_path), path)
    path.write_bytes(good)
    folder.verify()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 2}', ["newer", "format 2", "upgrade"]),
        ('{"format": 0, "files": {}, "checkpoints": {}}', ["damaged"]),
        ('{"format": true, "files": {}, "checkpoints": {}}', ["damaged"]),
        ('{"format": 1}', ["damaged"]),
        ("[]", ["damaged"]),
        ("null", ["damaged"]),
        ("[" * 100_000, ["damaged"]),
        ('{"format": 1, "files": {"a": "xyz"}, "checkpoints": {}}', ["damaged"]),
        ('{"format": 1, "files": {"a": [["b"]]}, "checkpoints": {}}', ["damaged"]),
        ('{"format": 1, "files": {"a": []}, "checkpoints": {}}', ["damaged"]),
        ('{"format": 1, "files": {}, "checkpoints": {"%s": "state/x"}}' % ("0" * 64), ["damaged"]),
        ('{"format": 1, "files": {}, "checkpoints": {"%s": 3}}' % ("0" * 64), ["outside"]),
    ],
)
def test_manifests_of_another_kind(tmp_path, text, words):
    folder = make(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    refused(lambda: Folder.open(tmp_path), tmp_path, *words)
    refused(lambda: folder.writer().__enter__(), tmp_path, *words)


def forge(folder, name, content):
    """Content of the sender's choice, with a manifest to match."""
    manifest = Manifest.loads((folder.path / "manifest.json").read_bytes(), folder.path / "manifest.json")
    (old,) = manifest.files[name]
    new = hashlib.sha256(content).hexdigest()
    manifest.files[name] = (new,)
    if old in manifest.checkpoints:
        manifest.checkpoints = {new: manifest.checkpoints[old]}
    (folder.path / name).write_bytes(content)
    (folder.path / "manifest.json").write_text(manifest.dumps())


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def evil_files(canary):
    import io
    import zipfile

    pickled = pickle.dumps(Evil(canary))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:  # the layout of torch.save
        archive.writestr("archive/data.pkl", pickled)
    npy = io.BytesIO()
    np.save(npy, np.array([Evil(canary)], object), allow_pickle=True)
    return {"pickle": pickled, "torch.save": zipped.getvalue(), "npy": npy.getvalue()}


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "npy"])
@pytest.mark.parametrize("forged", [False, True])
def test_a_pickle_in_place_of_weights_does_not_run(tmp_path, kind, forged):
    canary = tmp_path / "canary"
    folder = make(tmp_path / "run")
    content = evil_files(canary)[kind]
    state = str(next((folder.path / "state").iterdir()).relative_to(folder.path))
    for name in (WEIGHTS, state):
        (folder.path / name).write_bytes(content)
        if forged:
            forge(folder, name, content)
        refused(folder.last_checkpoint, folder.path / name)
        refused(folder.verify, folder.path / name)
        if name == WEIGHTS:
            refused(folder.weights, folder.path / name)
        folder = make(tmp_path / "again") if name == WEIGHTS else folder
    assert not canary.exists()
    if kind == "pickle":
        pickle.loads(content)  # the negative control: it would have
        assert canary.exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"\x08", "safetensors"),
        (b"\xff" * 64, "safetensors"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "safetensors"),
        (header(w={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + b"\0" * 7, "safetensors"),
        (header(w={"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}) + b"\0" * 8, "safetensors"),
        (header(w={"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 8]}) + b"\0" * 8, "safetensors"),
        (header(w={"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}) + b"\0" * 8, "safetensors"),
        (header(w={"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}) + b"\0" * 8, "BF16"),
        (header(w={"dtype": "OBJ", "shape": [4], "data_offsets": [0, 8]}) + b"\0" * 8, "safetensors"),
        (
            header(
                a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            )
            + b"\0" * 12,
            "safetensors",
        ),
    ],
)
def test_weights_files_that_lie_under_a_forged_manifest(tmp_path, content, word):
    folder = make(tmp_path)
    forge(folder, WEIGHTS, content)
    refused(folder.weights, tmp_path / WEIGHTS, word)
    refused(folder.last_checkpoint, tmp_path / WEIGHTS, word)


def test_weights_of_another_program_are_named(tmp_path):
    folder = make(tmp_path)
    like = weights_at(0)
    same(folder.weights(like=like), weights_at(2))
    refused(lambda: folder.weights(like=like | {"more": 1.0}), tmp_path / WEIGHTS, "lacks the array 'more'")
    refused(lambda: folder.weights(like={"w": like["w"]}), tmp_path / WEIGHTS, "unknown array 'key'")
    refused(lambda: folder.weights(like=like | {"w": np.zeros(3)}), "'w' has shape (1000,)", "(3,)")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: !!python/object/apply:os.system ['touch CANARY']", "python/object/apply"),
        ("a: !!python/name:os.system", "python/name"),
        ("!!python/object/new:os.system ['touch CANARY']", "python/object/new"),
        ("a: !!python/module:os", "python/module"),
        ("model:\n  class_path: os.system\n  init_args: {command: touch CANARY}", "class_path"),
        ("a: [{class_path: os.system}]", "class_path"),
        ("a: &a [1]\nb: *a", "alias"),
        ("a: 2026-01-01", "date"),
        ("1: 2", "1"),
        ("- 1", "mapping"),
        ("", "mapping"),
        ("a: [1", "plain YAML"),
        ("a: " + "[" * 5000, "plain YAML"),
        ("a: \x01", "plain YAML"),
        ("a: !!int x", "plain YAML"),
    ],
)
def test_a_hostile_config_is_refused(tmp_path, monkeypatch, text, word):
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / "run")
    (folder.path / "config.yaml").write_text(text)
    refused(lambda: folder.config, "config.yaml", "sha256")
    forge(folder, "config.yaml", text.encode())
    refused(lambda: folder.config, "config.yaml", word)
    assert not (tmp_path / "CANARY").exists()


def test_bytes_that_are_no_text(tmp_path):
    folder = make(tmp_path)
    forge(folder, "config.yaml", b"a: \xff")
    refused(lambda: folder.config, "config.yaml", "not text")
    forge(folder, "evaluation.json", b"\xff")
    refused(lambda: folder.read_json("evaluation.json"), "evaluation.json", "not JSON")


# --- curves ---


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    folder = make(tmp_path, steps=())
    with folder.writer():
        for step in range(1, 6):
            folder.append_metrics({"step": step, "loss": math.nan if step == 3 else np.float32(step)})
            assert len(Folder.open(tmp_path).metrics()) == step  # a reader sees it at once
        folder.truncate_metrics(4)
    folder.verify()
    with folder.writer():
        folder.append_metrics({"step": 5, "loss": 0.0})
        folder.verify()
    rows = folder.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[-1]["loss"] == 0.0
    assert math.isnan(rows[2]["loss"])
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    folder.verify()


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1}', b"\0" * 64, b"\0\0\n\0\n", b"\n"])
def test_half_a_last_line_is_dropped(tmp_path, tail):
    folder = make(tmp_path)
    with folder.writer():
        folder.append_metrics({"step": 3})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["files"]["metrics.jsonl"]  # as a killed writer leaves it
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3]
    with folder.writer():
        folder.truncate_metrics(2)
        folder.append_metrics({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    folder = make(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["files"]["metrics.jsonl"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    refused(folder.metrics, "metrics.jsonl", "line 2")
    with folder.writer():
        refused(lambda: folder.truncate_metrics(3), "metrics.jsonl", "line 2")


def test_the_first_error_is_the_one_told(tmp_path):
    import shutil

    folder = make(tmp_path / "run")
    with pytest.raises(KeyError, match="mine"), folder.writer():
        shutil.rmtree(tmp_path / "run")
        raise KeyError("mine")


def test_check_name_and_store_say_where(tmp_path):
    assert str(check_name("pictures/a.png", tmp_path)) == "pictures/a.png"
    assert "Store(" in repr(store.Store(tmp_path))
