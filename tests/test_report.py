"""The report is one whole page: nothing from elsewhere, nothing unescaped, every number as it was measured."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from linear_run import linear_run

from probgen import report
from probgen.errors import ProbgenError
from probgen.folder import Folder
from probgen.summary import duration, numbers, protocol, summary_html, summary_table, with_error

PREPARE = {
    "steps": {"x": [{"step": "Binarize", "threshold": 8.0, "stochastic": False}]},
    "prepared": {"x": {"mean": [0.1]}},
}
EVALUATION = {
    "log_likelihood": -131.38123,
    "log_likelihood_se": 0.912,
    "log_likelihood_mc_se": 0.021,
    "elbo": -133.92,
    "elbo_se": 0.91,
    "bits_per_dim": 2.9613,
    "bits_per_dim_se": 0.0211,
    "k_hat": 0.412,
    "k_hat_above_0.7": 0.038,
    "term/z": -8.13,
    "term/z_se": 0.06,
    "active_units": 2,
    "protocol": {
        "prepare": PREPARE,
        "split": "test",
        "rows": 180,
        "k": 1000,
        "seed": 0,
        "estimator": "the mean of weights",
    },
    "notes": ["reconstruction_error is not defined: <no mean>"],
}
HOSTILE = '<script>alert("1")</script> & $x_'
VOID = {"meta", "br", "path", "use", "image", "rect", "circle", "line", "polyline", "link", "img"}


def run(**changes):
    return linear_run("digits", changes.pop("z_dim", 2), **{"evaluation": EVALUATION, **changes})


@pytest.fixture(scope="module")
def page():
    return report.page(run())


class Page(HTMLParser):
    """Tags are closed in order; attributes and text are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing(page):
    parsed = Page(page)
    assert not {"script", "link", "iframe", "img", "object"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in ("href", "src", "xlink:href", "srcset"):
            assert value.startswith(("#", "data:image/png;base64,")), value[:60]
    assert "http" not in page
    assert "url(" not in re.sub(r"url\(#", "", page)


def test_every_identifier_is_unique_and_every_reference_finds_its_own(page):
    parsed = Page(page)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:url\(|href=")#([^")]+)', page)
    assert references
    assert set(references) <= set(ids)


def test_both_modes_are_styled_and_no_picture_has_fixed_ink(page):
    assert "prefers-color-scheme: dark" in page
    assert "#20242c" not in page.split("</style>", 1)[1]
    assert 'name="viewport"' in page


def test_numbers_protocol_and_what_is_undefined_are_there(page):
    text = " ".join(Page(page).text)
    for words in ("−131.38 ± 0.91", "−133.92 ± 0.91", "2.961 ± 0.021", "3.8%", "180 test rows", "k = 1,000"):
        assert words in text
    assert "reconstruction_error is not defined: <no mean>" in text
    assert "0.021 of the error is from drawing latents" in text
    assert "probgen fit linear --data digits --z_dim 2" in text


def test_pictures_that_cannot_be_drawn_say_why():
    text = " ".join(Page(report.page(run(evaluation=None, metrics={}))).text)
    assert "This run was not evaluated yet" in text
    assert "its metrics are empty" in text


def test_without_data_it_shows_what_needs_none_and_says_so_once():
    text = " ".join(Page(report.page(run(data=None))).text)
    assert text.count("no data at hand") == 1
    for words in ("Loss by step", "Plate diagram", "Each dimension of z", "Means of the data over the quantiles"):
        assert words in text


def test_text_of_the_user_is_only_text():
    def model(x): ...

    model.__doc__ = HOSTILE
    program = SimpleNamespace(
        model=model, guide=None, origin=SimpleNamespace(path=f"{HOSTILE}.py", options={"a": HOSTILE})
    )
    evaluation = {**EVALUATION, f"term/{HOSTILE}": 1.0, "notes": [HOSTILE], "protocol": {"split": HOSTILE, "rows": 3}}
    hostile = run(
        name=HOSTILE, program=program, evaluation=evaluation, options={HOSTILE: HOSTILE}, command=f"fit '{HOSTILE}'"
    )
    hostile.metrics[f"term/{HOSTILE}"] = hostile.metrics["loss"]
    page = report.page(hostile)
    assert "<script" not in page
    assert "script" not in Page(page).tags
    text = "".join(Page(page).text)
    assert text.count('<script>alert("1")</script>') >= 8
    assert "<script" not in summary_html(hostile)


def test_a_report_is_the_same_when_it_is_made_again(page):
    assert report.page(run()) == page


def test_equations_are_typeset():
    assert report._typeset("p(x, z_1) = p(z_1) p(x | z_1)").startswith("<i>p</i>(<i>x</i>, <i>z</i><sub>1</sub>)")
    assert report._typeset("a < b_2") == "<i>a</i> &lt; <i>b</i><sub>2</sub>"


def test_it_is_written_to_a_path_whole_or_not_at_all(tmp_path):
    finished = run()
    path = report.write(finished, tmp_path / "r.html")
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert report.write(finished, tmp_path) == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "report.html"]
    with pytest.raises(ProbgenError, match="cannot write the report"):
        report.write(finished, tmp_path / "nowhere" / "r.html")
    with pytest.raises(ProbgenError, match="give a path"):
        report.write(finished)


def test_it_is_written_into_the_run_folder_with_its_pictures(tmp_path):
    folder = Folder.create(tmp_path / "run")
    with folder.writer():
        folder.write_config({"name": "linear"})
    path = report.write(run(folder=folder, path=folder.path))
    assert path == folder.path / "report.html"
    assert folder.read_text("report.html").startswith("<!doctype html>")
    for name in ("curves", "samples", "nearest", "latents", "manifold", "diagram"):
        assert folder.read_bytes(f"pictures/{name}.png").startswith(b"\x89PNG")
    folder.verify()


def test_a_value_is_told_to_the_second_digit_of_its_error():
    assert with_error(-89.7312, 0.3149) == "−89.73 ± 0.31"
    assert with_error(1234.6, 32.0) == "1235 ± 32"
    assert with_error(0.00123, 0.000456) == "0.00123 ± 0.00046"
    assert with_error(-0.12346, None) == "−0.1235"
    assert with_error(12, None) == "12"
    assert with_error(1e-9, None) == "1e−09"
    assert with_error(float("nan"), 0.1) == "nan"


def test_the_table_leads_with_the_likelihood_and_leaves_out_what_is_undefined():
    found = numbers(EVALUATION)
    assert [n.name for n in found][:3] == ["log_likelihood", "elbo", "bits_per_dim"]
    assert {n.name for n in found} == {n for n in EVALUATION if not n.endswith("_se")} - {"protocol", "notes"}
    assert found[0].error == 0.912
    assert found[0].monte_carlo == 0.021
    assert numbers(None) == []
    assert (
        protocol(EVALUATION)
        == "180 test rows; the mean of weights; k = 1,000; seed 0; x prepared by Binarize(threshold=8)"
    )


def test_a_long_chain_is_one_line_and_a_short_one_is_not():
    terms = {f"term/x_{t}": 0.5 * t for t in range(1, 13)}
    units = {f"active_units/x_{t}": 64 - t for t in range(1, 13)}
    short = {f"term/z_{t}": 1.0 for t in range(1, 9)}
    evaluation = {"elbo": -3.0, "elbo_se": 0.1, "term/x": -40.0, **terms, **units, **short, "active_units": 690}
    found = {n.label: n for n in numbers(evaluation)}
    assert found["terms of x_1 … x_12"].value == pytest.approx(39.0)
    assert found["active units of x_1 … x_12"].text == "52 to 63"
    assert found["term of x"].value == -40.0
    assert sum(n.name.startswith("term/z_") for n in found.values()) == 8
    assert len(found) == 5 + 8
    page = report.page(run(evaluation=evaluation))
    assert page.count("terms of x_1 … x_12") == 1
    assert "term of x_3" not in page


def test_the_summary_says_the_same_in_terminal_and_notebook():
    from rich.console import Console

    finished = run()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary_table(finished))
    text, html = console.export_text(), summary_html(finished)
    for words in ("−131.38 ± 0.91", "2.961 ± 0.021", "180 test rows", "latent program", "5,000 steps"):
        assert words in text
        assert words in html
    Page(html)
    fresh = run(evaluation=None)
    last = with_error(fresh.metrics["loss"][-1], None)
    assert last in summary_html(fresh)


def test_durations_are_told_in_a_readers_unit():
    assert [duration(s) for s in (0.25, 12.34, 240, 9000)] == ["250 ms", "12.3 s", "4.0 min", "2.5 h"]
