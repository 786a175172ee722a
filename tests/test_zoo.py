"""Model files: found, run under forked generators, refused in one sentence."""

import random
import textwrap

import numpy as np
import pytest
import torch

from probgen import zoo
from probgen.errors import ProbgenError
from probgen.program import Program

SPEC = {"x": "anything"}
PROGRAM = """
    '''A small model.'''
    from typing import Literal

    import pyro
    import pyro.distributions as dist
    from torch import nn

    from probgen.program import Program

    LAYER = nn.Linear(3, 3)

    def program(spec, z_dim: int = 2, rate: float = 0.5, hidden: tuple[int, ...] = (4,),
                family: Literal["normal", "laplace"] = "normal", scale: float | None = None) -> Program:
        layer = nn.Linear(z_dim, 3)

        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(layer.bias, 1.0).to_event(1), obs=x)

        model.layer, model.top, model.options = layer, LAYER, (z_dim, rate, hidden, family, scale)
        return Program(model)
"""
PAIR = """
    import pyro
    import pyro.distributions as dist

    def model(x):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        pass

    defaults = {"lr": 0.01}
"""


def write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def build(path, **options):
    return zoo.build(path, SPEC, options.pop("seed", 0), options)


def test_a_path_gives_its_program_with_the_options_it_was_given(tmp_path):
    program = build(write(tmp_path, PROGRAM), z_dim=5, rate=1, hidden=[8, 8], family="laplace")
    assert program.model.options == (5, 1.0, (8, 8), "laplace", None)
    assert program.model.layer.in_features == 5
    assert program.origin.name == "mine" and program.origin.path == str(tmp_path / "mine.py")
    assert program.origin.options["hidden"] == (8, 8) and program.origin.options["scale"] is None


def test_a_plain_pair_is_a_program(tmp_path):
    program = zoo.load(write(tmp_path, PAIR))
    assert isinstance(program, Program) and program.guide.__name__ == "guide"
    assert dict(program.defaults) == {"lr": 0.01}


def test_weights_come_from_the_seed_alone_and_no_generator_moves(tmp_path):
    path = write(tmp_path, PROGRAM)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    first = build(path, seed=3)
    found = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    assert found[2] == expected[2]

    second, other = build(path, seed=3), build(path, seed=4)
    for part in ("layer", "top"):  # made inside `program`, and at the top of the file
        weight = [getattr(p.model, part).weight for p in (first, second, other)]
        assert weight[0] is not weight[1] and torch.equal(weight[0], weight[1])
        assert not torch.equal(weight[0], weight[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zdim": 3}, ["no option `zdim`", "did you mean 'z_dim'?"]),
        ({"z_dim": "two"}, ["`z_dim` must be a whole number, not 'two'"]),
        ({"z_dim": 2.5}, ["`z_dim` must be a whole number, not 2.5"]),
        ({"z_dim": True}, ["`z_dim` must be a whole number, not True"]),
        ({"hidden": (4, "a")}, ["`hidden` must be a tuple such as (64, 64)"]),
        ({"family": "student"}, ["`family` must be one of 'normal', 'laplace', not 'student'"]),
        ({"scale": "big"}, ["`scale` must be a number or none"]),
    ],
)
def test_bad_options_are_refused_in_one_sentence(tmp_path, options, words):
    with pytest.raises(ProbgenError) as caught:
        build(write(tmp_path, PROGRAM), **options)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nmodel = (\n", ["mine.py, line 2", "never closed"]),
        ("x = 1\ny = 1 / 0\n", ["mine.py, line 2", "ZeroDivisionError"]),
        ("import not_there_at_all\n", ["needs `not_there_at_all`", "not installed"]),
        ("x = 1\n", ["mine.py holds no model"]),
        ("def program(spec):\n    return 3\n", ["must return a probgen.Program, not int"]),
        ("def program(spec):\n    a = {}\n    return a['z']\n", ["mine.py, line 3", "KeyError"]),
        ("import sys\nsys.exit(1)\n", ["mine.py, line 2", "SystemExit"]),
    ],
)
def test_a_file_that_does_not_run_is_told_by_file_and_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ProbgenError) as caught:
        build(path)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_file_may_import_what_lies_beside_it(tmp_path):
    write(tmp_path, "WIDTH = 7\n", "my_layers.py")
    write(tmp_path, "from my_layers import WIDTH\ndef model(x): return WIDTH\n")
    assert zoo.load(tmp_path / "mine.py").model(None) == 7


def test_a_program_that_needs_data_says_so(tmp_path):
    with pytest.raises(ProbgenError, match=r"load\('mine', data\)"):
        zoo.load(write(tmp_path, PROGRAM))


def test_unknown_names_are_answered_with_the_nearest(tmp_path, monkeypatch):
    with pytest.raises(ProbgenError, match="no model file"):
        zoo.find("nowhere/file.py")
    with pytest.raises(ProbgenError, match="not a Python file"):
        zoo.find("nowhere/file")
    (tmp_path / "zoo" / "flows").mkdir(parents=True)
    write(tmp_path / "zoo" / "flows", "'''Glow.\n\nMore.'''\nraise ValueError\n", "glow.py")
    monkeypatch.setattr(zoo, "_folder", lambda: tmp_path / "zoo")
    with pytest.raises(ProbgenError, match="did you mean 'glow'"):
        zoo.find("glw")
    assert [(m.name, m.family, m.summary) for m in zoo.list_models()] == [("glow", "flows", "Glow.")]
    write(tmp_path, "", "own.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProbgenError, match=r"by its path, own\.py"):
        zoo.find("own")
