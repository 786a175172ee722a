"""The comparison: each number is that of its verb, what does not compare is refused or kept apart, nothing is −inf or NaN."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from rich.console import Console
from test_report import HOSTILE, VOID, Page

import probgen
from probgen import cli
from probgen.compare.likelihoods import measure_of
from probgen.compare.page import page
from probgen.compare.rows import Against, plain
from probgen.compare.table import APART, DASH, UNFINISHED, brief, table_of
from probgen.compare.terminal import printed
from probgen.data.prepare import Preparation
from probgen.errors import ProbgenError
from probgen.pyro import ELBO

ROWS, K, SAMPLES, SEED = 30, 30, 60, 3


@pytest.fixture(scope="module")
def digits():
    return probgen.load_data("digits")


def gaussian(prepare=None):
    """N(m, s²) of every number of x, whatever is done to them first."""

    def model(x):
        shape = x.shape[1:]
        m, s = (pyro.param(n, torch.full(shape, v)) for n, v in (("m", 0.1), ("s", 1.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, s.abs()).to_event(len(shape)), obs=x)

    return probgen.Program(model, by=ELBO(), prepare={} if prepare is None else {"x": prepare})


def implicit():
    """z ~ N(0, I), x = w z: draws, and no density."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(64), 1.0).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(64), 1.0).to_event(1))
            pyro.sample("x", dist.Delta((pyro.param("w", torch.ones(64)) * z).reshape(-1, 8, 8)).to_event(2), obs=x)

    def loss(model, guide, x, **arrays):
        return pyro.param("w", torch.ones(64)).square().sum()

    return probgen.Program(model, guide, by=loss)


def fitted(program, data, **options):
    return probgen.fit(program, data, **{"steps": 3, "progress": False, **options})


@pytest.fixture(scope="module")
def points():
    """Rows without labels, few and small."""
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    return probgen.load_data({"x": x}, split=(0.8, 0.1, 0.1))


@pytest.fixture(scope="module")
def runs(digits):
    """Bits, exact and with latents; dequantised, with a sum; as they are, without a density."""
    named = {name: fitted(probgen.load(name, digits), digits) for name in ("fvsbn", "vae", "gmm")}
    return {**named, "implicit": fitted(implicit(), digits)}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("compare") / "compare.html"


@pytest.fixture(scope="module")
def compared(runs, out):
    return probgen.compare(runs, rows=ROWS, k=K, samples=SAMPLES, seed=SEED, out=out)


def of(compared, label):
    return next(run for run in compared["runs"] if run["label"] == label)


# Truth


@pytest.mark.parametrize("label", ["fvsbn", "vae", "gmm"])
def test_likelihoods_are_those_of_evaluate(runs, compared, digits, label):
    found = runs[label].evaluate(digits.test.take(np.arange(ROWS)), k=K, seed=SEED)
    first, *others = of(compared, label)["estimates"]
    for name, kept in (("log_likelihood", "value"), ("bits_per_dim", "bits_per_dim")):
        assert first[kept] == pytest.approx(found[name], rel=1e-12)
        assert {"value": first["se"], "bits_per_dim": first["bits_per_dim_se"]}[kept] == pytest.approx(
            found[f"{name}_se"]
        )
    assert [e["value"] for e in others] == ([found["elbo"]] if label == "vae" else [])
    assert first["rows"] == ROWS == compared["protocol"]["rows"]


@pytest.mark.parametrize("label", ["fvsbn", "gmm", "implicit"])
def test_distances_are_those_of_quality(runs, compared, digits, label):
    train, drawn = digits.train[:], runs[label].sample(SAMPLES, seed=SEED)["x"].reshape(-1, 8, 8)
    found = probgen.quality(drawn, digits.test["x"], train["x"], train["y"], seed=SEED)
    assert of(compared, label)["quality"] == pytest.approx(found, rel=1e-6)
    assert compared["floors"][0]["quality"]["fd_classifier"] == pytest.approx(found["fd_classifier_floor"], rel=1e-6)


def test_real_rows_as_bits_have_a_floor_of_their_own(compared, digits):
    """What the best program that sees bits can reach: only pixels of 0 and 16."""
    assert [floor["label"] for floor in compared["floors"]] == ["training rows", "training rows as bits (threshold 8)"]
    train, test = digits.train[:], digits.test["x"]
    found = probgen.quality(np.where(train["x"] > 8, 16.0, 0.0), test, train["x"], train["y"], seed=SEED)
    kept = compared["floors"][1]["quality"]
    assert kept["fd_classifier"] > 2 * compared["floors"][0]["quality"]["fd_classifier"]
    assert abs(kept["sliced_wasserstein"] - found["sliced_wasserstein"]) < 0.3  # of other numbers of rows


def test_costs_and_posteriors(runs, compared):
    assert of(compared, "gmm")["parameters"] == 4 + 4 * 64 + 4 * 64 * 64
    assert [run["posterior"] for run in compared["runs"]] == [None, "guide", "exact", "guide"]
    for label, run in runs.items():
        assert of(compared, label)["seconds_to_train"] == run.metrics["seconds"][-1]
        assert 0 < of(compared, label)["seconds_a_sample"] < 1


def test_a_sample_is_timed_without_what_the_first_call_takes(points, monkeypatch):
    run, calls = fitted(gaussian(), points), []
    draw, clock = run.sample, SimpleNamespace(now=0.0)

    def sample(n, seed=0, **options):
        calls.append(n)
        clock.now += 100.0 if len(calls) == 1 else 1.0
        return draw(n, seed=seed, **options)

    monkeypatch.setattr(run, "sample", sample)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    found = probgen.compare([run], rows=2, k=2, samples=10)["runs"][0]
    assert calls == [10, 10]
    assert found["seconds_a_sample"] == 1.0 / 10


def test_estimators_are_named(compared, points):
    named = {run["label"]: [e["estimator"] for e in run["estimates"]] for run in compared["runs"]}
    assert named == {
        "fvsbn": ["exact"], "vae": ["importance-weighted", "bound"], "gmm": ["exact"], "implicit": [],
    }  # fmt: skip
    flow = fitted(probgen.load("flow_matching", points, steps=1, hidden=8), points, steps=1)
    chain = fitted(probgen.load("ddpm", points, steps=3, hidden=8), points, steps=1)
    found = probgen.compare([flow, chain], rows=4, k=2, samples=10)["runs"]
    assert [[e["estimator"] for e in run["estimates"]] for run in found] == [
        ["ODE"], ["importance-weighted", "ODE", "bound"],
    ]  # fmt: skip


def test_modes_of_a_toy():
    ring = probgen.load_data("ring")
    run = fitted(gaussian(), ring)
    compared = probgen.compare([run], rows=20, k=2, samples=200, seed=SEED)
    found = compared["runs"][0]["modes"]
    assert found == pytest.approx(probgen_modes(run.sample(200, seed=SEED)["x"]))
    heads = [column.head for column in table_of(compared).columns]
    assert "modes" in heads and "FD (classifier)" not in heads
    assert any("have no labels" in sentence for sentence in table_of(compared).sentences)


def probgen_modes(samples):
    from probgen.evaluate.modes import mode_coverage

    return mode_coverage(samples, "ring")


def test_the_runs_own_numbers_are_neither_read_nor_replaced(points, tmp_path):
    run = fitted(gaussian(), points, out=tmp_path / "run")
    with run.folder.writer():
        run.folder.write_json("evaluation.json", {"log_likelihood": 77.0})
    found = probgen.compare([run], rows=5, k=2, samples=10)
    assert found["runs"][0]["estimates"][0]["value"] < 0
    assert run.folder.read_json("evaluation.json") == {"log_likelihood": 77.0}


# What a likelihood is of


def site(discrete, arrays=None):
    from probgen.program import Plate, Site, Structure

    x = Site("x", "observed", "Any", (2, 8, 8), 2, (Plate("data", 2, -1, True),), discrete=discrete)
    return Structure({"x": x}, {}, ("data",), False, {"x": "data", **(arrays or {})})


def measured(digits, prepare, discrete=False, arrays=None):
    preparation = Preparation.of({"x": prepare} if prepare else {}, digits)
    return measure_of(site(discrete, arrays), preparation, digits.spec)


def test_steps_that_can_be_undone_make_no_difference(digits):
    P = probgen
    alike = [
        (P.Dequantize(),), (P.Flatten(), P.Dequantize(), P.Standardize()), (P.Dequantize(), P.Scale(), P.Logit(0.05)),
    ]  # fmt: skip
    assert len({measured(digits, prepare)["name"] for prepare in alike}) == 1
    assert measured(digits, (P.Standardize(),))["name"] == measured(digits, ())["name"]


def test_what_loses_or_adds_something_does(digits):
    P = probgen
    different = [
        measured(digits, (), True), measured(digits, ()), measured(digits, (P.Dequantize(),)),
        measured(digits, (P.Binarize(),), True),
        measured(digits, (P.Binarize(7.9999999),), True), measured(digits, (P.Binarize(stochastic=True),), True),
        measured(digits, (P.Binarize(),)), measured(digits, (P.Binarize(),), True, {"y": "given"}),
    ]  # fmt: skip
    assert len({each["name"] for each in different}) == len(different)
    heads = [each["head"] for each in different]
    assert heads[:4] == ["log P(x)", "log p(x)", "log p(x + u)", "log P(bits of x)"]
    assert heads[-1] == "log P(bits of x | y)"


def test_no_number_stands_in_the_column_of_another(compared):
    table = table_of(compared)
    columns = [i for i, column in enumerate(table.columns) if column.part.startswith("log-likelihood")]
    assert [table.columns[i].head for i in columns] == ["log P(bits of x)", "log p(x + u)"]
    filled = [[i for i in columns if row[i][0].text != DASH] for row in table.rows]
    assert filled == [[columns[0]], [columns[0]], [columns[1]], []]
    apart = [table.footnotes[row[columns[1]][0].marks[0]] for row in table.rows[:2]]
    assert apart == [APART, APART]
    for name in ("the probability of the bits of x", "the density of x + u"):
        assert sum(name in sentence for sentence in table.sentences) == 1


# What is not defined


def test_what_is_not_defined_is_a_dash_that_says_why(compared):
    run, table = of(compared, "implicit"), table_of(compared)
    assert run["likelihood_of"] is None and run["estimates"] == []
    assert "implicit" in run["undefined"]["log_likelihood"]
    cells = [cell for cell in table.rows[3] if cell and cell[0].text == DASH]
    assert len(cells) == 2
    assert all("the program is implicit" in table.footnotes[cell[0].marks[0]] for cell in cells)


def test_what_is_not_to_be_trusted_is_marked(compared):
    changed = json.loads(json.dumps(compared))
    trust = {"k_hat_above_0.7": 0.5}
    changed["runs"] = [{**of(changed, "vae"), "finished": False, "trust": trust}, {**of(changed, "fvsbn"), "trust": {}}]
    told = list(table_of(changed).footnotes.values())
    assert sum("k-hat is above 0.7 for 50% of the rows" in sentence for sentence in told) == 1
    assert UNFINISHED in told


def test_samples_that_are_not_finite_are_not_measured(points, monkeypatch):
    good, bad = fitted(gaussian(), points), fitted(gaussian(), points)
    monkeypatch.setattr(bad, "sample", lambda n, seed=0, **_: {"x": np.full((n, 4), np.nan)})
    compared = probgen.compare({"good": good, "bad": bad}, rows=5, k=2, samples=10)
    table = table_of(compared)
    place = [column.key for column in table.columns].index("sliced_wasserstein")
    assert table.rows[0][place][0].text != DASH
    (dash,) = table.rows[1][place]
    assert dash.text == DASH and table.footnotes[dash.marks[0]] == "10 of 10 samples are not finite"


def test_the_mapping_survives_json(compared, out):
    assert json.loads(json.dumps(compared, allow_nan=False)) == compared
    assert json.loads(out.with_suffix(".json").read_text(encoding="utf-8")) == compared
    odd = {"a": [np.float32(0.5), -np.inf], "b": np.array([1.0, np.nan]), 3: np.int64(2)}
    assert json.dumps(plain(odd), allow_nan=False) == '{"a": [0.5, null], "b": [1.0, null], "3": 2}'
    said = compared["protocol"]
    assert {
        "k": K,
        "seed": SEED,
        "rows": ROWS,
        "samples": SAMPLES,
        "split": "test",
        "device": "cpu",
    }.items() <= said.items()
    assert said["threads"] and said["date"] and said["versions"]["probgen"] == probgen.__version__


# Refusals


def other(digits, **arrays):
    return {"x": digits.train["x"][:300], "y": digits.train["y"][:300], **arrays}


def test_runs_of_other_data_are_refused_by_what_differs(digits):
    x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    split = (0.8, 0.1, 0.1)
    one = fitted(gaussian(), probgen.load_data({"x": x}, split=split))

    def refused(arrays, match, split=split):
        with pytest.raises(ProbgenError, match=match):
            probgen.compare([one, fitted(gaussian(), probgen.load_data(arrays, split=split))])

    refused(
        {"x": x, "y": np.zeros(100, int)}, r"the data of 'program' hold 'x', those of 'program #2' 'x', 'y'; fit them"
    )
    refused({"x": x[:, :3]}, r"rows of shape \[4\] in the data of 'program'.* and \[3\] in those of 'program #2'")
    refused({"x": x}, r"80 train, 10 valid, 10 test rows.*60 train, 20 valid, 20 test rows", (0.6, 0.2, 0.2))
    refused(
        {"x": x[::-1].copy()},
        r"split in another way \(fingerprints \w{8} and \w{8}\); fit them on the same data and split",
    )


def test_programs_of_other_arrays_are_refused(digits):
    def labels(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Categorical(logits=pyro.param("l", torch.zeros(10))), obs=y)

    runs = {"x": fitted(gaussian(), digits), "y": fitted(probgen.Program(labels, by=ELBO()), digits)}
    with pytest.raises(ProbgenError, match=r"'x' draws 'x' and 'y' draws 'y', so their samples do not compare"):
        probgen.compare(runs)


def test_what_cannot_be_compared_is_refused(digits, runs, tmp_path):
    def refused(match, *args, **options):
        with pytest.raises(ProbgenError, match=match):
            probgen.compare(*args, **options)

    vae = runs["vae"]
    refused("there are no runs", [])
    refused("takes runs, and 'runs/vae' is none: open it first", "runs/vae")
    refused("take at least 1 row, 2 importance samples", [vae], k=1)
    refused("take at least 1 row", [vae], rows=0)
    refused("name a file that ends in .html", [vae], out=tmp_path / "page.txt")
    refused("name a file that ends in .html", [vae], out=tmp_path / "nowhere" / "page.html")
    refused("the data given are not these", [vae], "ring")
    refused("has no test rows", [fitted(gaussian(), np.zeros((20, 2), np.float32))])
    lost = fitted(gaussian(), np.zeros((20, 2), np.float32))
    lost._data = None
    refused("cannot be found again: say where they lie", [lost])


def test_labels_are_names_and_never_twice_the_same(points):
    vae = fitted(probgen.load("vae", points), points)
    compared = probgen.compare([vae, vae], rows=2, k=2, samples=10)
    assert [run["label"] for run in compared["runs"]] == ["vae", "vae #2"]
    with_options = json.loads(json.dumps(compared))
    with_options["runs"][1]["options"]["z_dim"] = 2
    assert [row[0][0].below for row in table_of(with_options).rows] == [("z_dim=16", "ELBO"), ("z_dim=2", "ELBO")]


# Page, terminal and command line


def test_the_page_is_whole_and_says_everything(out, compared):
    html = out.read_text(encoding="utf-8")
    parsed = Page(html)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids)) and "http" not in html
    assert not {"script", "link", "iframe", "img", "object"} & (set(parsed.tags) - VOID)
    text = " ".join(parsed.text)
    for words in (
        APART,
        "log P(bits of x)",
        "importance-weighted",
        "training rows as bits",
        "k = 30",
        "fingerprint",
        DASH,
    ):
        assert words in text
    assert parsed.tags.count("figure") == 1 + len(compared["runs"])
    assert "nan" not in text.lower().split() and "inf" not in text.lower().split()


def test_text_of_the_user_is_only_text(digits, tmp_path):
    run = fitted(gaussian(), digits)
    path = tmp_path / "page.html"
    compared = probgen.compare({HOSTILE: run}, rows=5, k=2, samples=10, out=path)
    hostile = {
        **compared["runs"][0],
        "notes": [HOSTILE],
        "command": HOSTILE,
        "undefined": {"modes": HOSTILE},
        "path": HOSTILE,
    }
    compared |= {"runs": [hostile], "data": {**compared["data"], "name": HOSTILE}}
    against = Against.of(digits, "x", 5, 10, 0)
    for html in (path.read_text(encoding="utf-8"), page(compared, {HOSTILE: run}, {HOSTILE: None}, against)):
        assert "<script" not in html
        assert "script" not in Page(html).tags
        assert '<script>alert("1")</script>' in "".join(Page(html).text)


def test_it_is_told_in_the_terminal(compared):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(printed(compared))
    text = console.export_text()
    for words in ("log P(bits of x)", "log p(x + u)", "training rows", "exact", "(a) a likelihood of something else"):
        assert words in text


def test_the_command_line(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("fvsbn", "vae"):
        fitted(probgen.load(name, digits), digits, out=tmp_path / name)
    fitted(probgen.load("vae", probgen.load_data("ring")), probgen.load_data("ring"), out=tmp_path / "ring")
    capsys.readouterr()
    assert cli.main(["compare", "fvsbn", "vae", "--k", "5", "--rows", "7", "--samples", "20", "--seed", "2"]) == 0
    told = capsys.readouterr().out
    assert "7 test rows, 20 samples, k = 5, seed 2" in told and told.endswith("compare.html\n")
    kept = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert [run["label"] for run in kept["runs"]] == ["fvsbn", "vae"] and (tmp_path / "compare.html").is_file()
    assert cli.main(["compare", "vae", "ring"]) == 2
    assert "fit them on the same data and split" in capsys.readouterr().err
    assert cli.main(["compare"]) == 2 and cli.main(["compare", "vae", "--out", "page.txt"]) == 2
    assert "ends in .html" in capsys.readouterr().err


def test_times_are_told_in_a_readers_unit():
    assert [brief(s) for s in (2.5e-6, 1.23e-4, 0.0061, 0.45, 12.34)] == [
        "2.5 µs",
        "123 µs",
        "6.1 ms",
        "450 ms",
        "12.3 s",
    ]
