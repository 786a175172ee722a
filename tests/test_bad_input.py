"""Bad input: each mistake is one line that names the file or argument and the cure; nothing is run, nothing written.

Every case goes through the real command line: exit status 2, one line `probgen: ...` on stderr, no traceback, the
folder as it was to the byte, and no file made by code that hid in the input. Arrays go through the Python API too.
"""

import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import probgen
from probgen import ProbgenError, cli
from probgen.folder import Folder
from probgen.folder.weights import load as load_weights
from probgen.folder.weights import save as save_weights

ROOT = Path(__file__).resolve().parent.parent
PPLS = ("pyro", "numpyro")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def pickled():
    return pickle.dumps(Evil())


def torch_saved():
    import torch

    file = io.BytesIO()
    torch.save({"net.weight": Evil()}, file)
    return file.getvalue()


# Programs of a user's own, the same text for both PPLs

HEAD = {
    "pyro": """
        import pyro as ppl
        import pyro.distributions as dist
        from pyro.infer import TraceMeanField_ELBO
        from pyro.infer.autoguide import AutoNormal
        from torch import ones, zeros
        """,
    "numpyro": """
        import numpyro as ppl
        import numpyro.distributions as dist
        from numpyro.infer import TraceMeanField_ELBO
        from numpyro.infer.autoguide import AutoNormal
        from jax.numpy import ones, zeros
        """,
}
PROGRAMS = {
    "bits": """
        def model(x):
            p = ppl.param("p", 0.5 * ones(3), constraint=dist.constraints.unit_interval)
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Bernoulli(p).to_event(1), obs=x)
        """,
    "labelled": """
        def model(x, y):
            m = ppl.param("m", zeros((3, 3)))
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Normal(m[y], 1.0).to_event(1), obs=x)
        """,
    "coded": """
        def model(x):
            w = ppl.param("w", ones(3))
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", dist.Normal(0.0, 1.0))
                ppl.sample("x", dist.Bernoulli(logits=z[..., None] * w).to_event(1), obs=x)

        def guide(x):
            s = ppl.param("s", ones(1), constraint=dist.constraints.positive)
            with ppl.plate("data", len(x)):
                ppl.sample("z", dist.Normal(x.sum(-1), s))
        """,
    "unguided": """
        def model(x):
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", dist.Normal(zeros(3), 1.0).to_event(1))
                ppl.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        """,
    "unmarked": """
        def model(x):
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", dist.Bernoulli(0.5))
                ppl.sample("x", dist.Normal(z[..., None] * ones(3), 1.0).to_event(1), obs=x)
        """,
    "local_autoguide": """
        def model(x):
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", dist.Normal(zeros(3), 1.0).to_event(1))
                ppl.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        guide = AutoNormal(model)
        """,
    "own_input": """
        def model(x):
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Normal(0.5 * x, ppl.param("s", ones(3))).to_event(1), obs=x)
        """,
    "against_the_model": """
        def model(x):
            with ppl.plate("data", len(x)):
                z_2 = ppl.sample("z_2", dist.Normal(zeros(3), 1.0).to_event(1))
                z_1 = ppl.sample("z_1", dist.Normal(z_2, 1.0).to_event(1))
                ppl.sample("x", dist.Normal(z_1, 1.0).to_event(1), obs=x)

        def guide(x):
            s = ppl.param("s", ones(3), constraint=dist.constraints.positive)
            with ppl.plate("data", len(x)):
                z_1 = ppl.sample("z_1", dist.Normal(x, s).to_event(1))
                ppl.sample("z_2", dist.Normal(z_1, s).to_event(1))

        by = TraceMeanField_ELBO()
        """,
    "shrinking": """
        def model(x):
            scale = ppl.param("scale", ones(3))
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Normal(0.0, scale).to_event(1), obs=x)
        """,
    "wrong_shape": """
        def model(x):
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Normal(ppl.param("m", zeros(5)), 1.0).to_event(1), obs=x)
        """,
    "matrix": """
        def model(x):
            w = ppl.param("w", ones((3, 3)))
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", dist.Normal(zeros(3), 1.0).to_event(1))
                ppl.sample("x", dist.Normal(z @ w, 1.0).to_event(1), obs=x)

        def guide(x):
            w = ppl.param("v", ones((3, 3)))
            with ppl.plate("data", len(x)):
                ppl.sample("z", dist.Normal(x @ w, 1.0).to_event(1))
        """,
    "wrong_default": """
        def model(x):
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Normal(ppl.param("m", zeros(3)), 1.0).to_event(1), obs=x)

        defaults = {"learning_rate": 0.1}
        """,
}
FILES = {
    "syntax.py": "def model(x:\n",
    "missing_import.py": "import nonexistent_package\n",
    "wrong_import.py": "from probgen.pyro import ELBOO\n",
    "no_model.py": "number = 3\n",
    "raises.py": "import torch\n\ndef program(spec):\n    return torch.zeros(2) @ torch.zeros(3)\n",
    "no_program.py": "def program(spec):\n    return 3\n",
    "not_text.py": "x = '\x00'\n",
    "tags.yaml": "lr: !!python/object/apply:os.system ['touch canary']\n",
    "class.yaml": "lr: {class_path: os.system, init_args: {command: touch canary}}\n",
    "typo.yaml": "epoch: 3\n",
    "no.yaml": ": :\n- {",
    "ragged.csv": "a,b,y\n1,2,0\n3,1\n",
    "words.csv": "a,b,y\n1,2,0\n3,one,1\n",
    "notes.txt": "hello\n",
}


def rows(n=40, columns=3, seed=0):
    return np.random.default_rng(seed).random((n, columns))


def with_value(value, row=7):
    x = rows()
    x[row, 1] = value
    return x


def split(**changed):
    return {f"x_{s}": rows(20, seed=i) for i, s in enumerate(("train", "valid", "test"))} | changed


def bits(n=20, value=None, seed=0):
    x = (rows(n, seed=seed) > 0.5).astype(float)
    if value is not None:
        x[-1, -1] = value
    return x


NPZ = {
    "good": split(),
    "bits": {"x_train": bits(40), "x_valid": bits(10, seed=1), "x_test": bits(10, seed=2)},
    "bits_test_1.5": {"x_train": bits(40), "x_valid": bits(10, seed=1), "x_test": bits(10, 1.5, seed=2)},
    "bits_valid_1.5": {"x_train": bits(40), "x_valid": bits(10, 1.5, seed=1), "x_test": bits(10, seed=2)},
    "bits_train_1.5": {"x_train": bits(400, 1.5), "x_valid": bits(10, seed=1), "x_test": bits(10, seed=2)},
    "narrow": {"x_train": 0.01 * rows(40), "x_valid": 0.01 * rows(8), "x_test": 0.01 * rows(8)},
    "nan": {"x": with_value(np.nan)},
    "inf": {"x": with_value(-np.inf)},
    "nan_test": split(x_test=with_value(np.nan)),
    "text": {"x": np.array([["a", "b"], ["c", "d"]])},
    "complex": {"x": rows().astype(complex)},
    "dates": {"x": np.array(["2026-01-01", "2026-01-02"], "datetime64[D]")},
    "scalar": {"x": np.float64(3.0)},
    "empty": {"x": np.empty((0, 3))},
    "no_columns": {"x": np.empty((10, 0))},
    "labels": {"x": rows(40), "y": np.zeros(39, int)},
    "only_y": {"y": np.arange(30) % 3},
    "other_name": {"features": rows(40), "y": np.arange(40) % 3},
    "no_train": {"x_test": rows(40)},
    "half_split": split(y_train=np.zeros(20, int)),
    "other_shapes": split(x_test=rows(20, columns=4)),
    "images": {"x": np.random.default_rng(0).random((40, 8, 8))},
    "wide": {"x": rows(40, columns=4)},
    "constant": {"x": np.ones((40, 3))},
    "far_labels": {"x": rows(40), "y": np.arange(40)},
}


def make_data():
    for name, arrays in NPZ.items():
        np.savez(f"{name}.npz", **arrays)
    np.savez("objects.npz", x=np.array([Evil(), None], dtype=object))
    np.save("objects.npy", np.array([Evil(), None], dtype=object), allow_pickle=True)
    whole = Path("good.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[200] ^= 16
    Path("flipped.npz").write_bytes(flipped)
    np.save("whole.npy", rows())
    Path("cut.npy").write_bytes(Path("whole.npy").read_bytes()[:300])
    for name in ("zero.npz", "zero.npy", "zero.csv", "zero.parquet"):
        Path(name).touch()
    Path("pickle.npz").write_bytes(pickled())
    Path("pickle.npy").write_bytes(pickled())
    Path("torch.npz").write_bytes(torch_saved())
    Path("pickle.parquet").write_bytes(pickled())
    Path("empty_folder").mkdir()
    Path("a_file").write_text("a file")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder with every input file, and finished and unfinished runs of both backends."""
    folder, before = tmp_path_factory.mktemp("stock"), Path.cwd()
    os.chdir(folder)
    try:
        make_data()
        for name, text in FILES.items():
            Path(name).write_text(text)
        for ppl in PPLS:
            for name, text in PROGRAMS.items():
                Path(f"{name}_{ppl}.py").write_text(textwrap.dedent(HEAD[ppl]) + textwrap.dedent(text))
        tiny = ["--steps", "2", "--no-report", "--out"]
        small = ["--z_dim", "2", "--hidden", "4"]
        assert cli.main(["fit", "vae", "--data", "good.npz", *small, *tiny, "vae"]) == 0
        assert cli.main(["fit", "vae", "--data", "good.npz", "--z_dim", "3", "--hidden", "4", *tiny, "other"]) == 0
        assert cli.main(["fit", "coded_pyro.py", "--data", "bits.npz", *tiny, "coded"]) == 0
        for ppl in PPLS:
            assert cli.main(["fit", f"bits_{ppl}.py", "--data", "bits.npz", *tiny, f"bits_{ppl}"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(stock, monkeypatch):
    monkeypatch.chdir(stock)
    return stock


@pytest.fixture
def copied(stock, monkeypatch, tmp_path):
    """The runs and data in a folder of the test's own."""
    for name in ("vae", "bits_pyro", "bits_numpyro", "other"):
        shutil.copytree(stock / name, tmp_path / name)
    for name in ("bits_pyro.py", "bits_numpyro.py", "good.npz", "bits.npz", "wide.npz"):
        shutil.copy(stock / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    """Every name below a folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else "folder"
        for path in sorted(Path(folder).rglob("*"))
        if "__pycache__" not in path.parts
    }


def refused(capsys, words, *said):
    """Run a command that must be refused, and give the line it is refused with."""
    words = shlex.split(words) if isinstance(words, str) else list(words)
    before = tree(".")
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = cli.main(words)
    (out, err), after = capsys.readouterr(), tree(".")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    for name in sorted(changed - before.keys(), reverse=True):  # what should not be there must not mislead other tests
        Path(name).rmdir() if Path(name).is_dir() else Path(name).unlink()
    assert status == 2, (status, out, err)
    assert err.startswith("probgen: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in out + err
    assert not changed, changed
    for word in said:
        assert re.search(word, err), f"{word!r} is not in: {err}"
    return err


# Data


DATA = [
    ("nan.npz", "'x'.*nan.npz.*NaN.*row 7.*(remove|fill)"),
    ("inf.npz", "'x'.*inf.npz.*infinite.*7.*(remove|fill)"),
    ("nan_test.npz", "'x'.*nan_test.npz.*test.*row 7"),
    ("text.npz", "'x'.*text.npz.*dtype.*convert"),
    ("complex.npz", "'x'.*complex.npz.*complex128.*convert"),
    ("dates.npz", "'x'.*dates.npz.*datetime.*convert"),
    ("scalar.npz", "'x'.*scalar.npz.*first axis must be the rows"),
    ("empty.npz", "'x'.*empty.npz.*empty.*at least one row"),
    ("no_columns.npz", "'x'.*no_columns.npz.*empty"),
    ("labels.npz", "'y' has 39 rows and 'x' has 40.*labels.npz"),
    ("no_train.npz", "no_train.npz.*x_train"),
    ("half_split.npz", "half_split.npz.*'y_valid'"),
    ("other_shapes.npz", "other_shapes.npz.*one shape"),
    ("only_y.npz", "array 'x'.*the data has 'y'.*rename"),
    ("other_name.npz", "array 'x'.*the data has 'features', 'y'.*rename"),
    ("objects.npz", "objects.npz.*Python objects.*np.savez"),
    ("objects.npy", "objects.npy.*Python objects.*np.save"),
    ("cut.npz", "cut.npz.*damaged or cut short.*write it again"),
    ("flipped.npz", "flipped.npz.*damaged.*write it again"),
    ("cut.npy", "cut.npy.*damaged or cut short.*write it again"),
    ("zero.npz", "zero.npz.*(damaged|empty)"),
    ("zero.npy", "zero.npy.*(damaged|empty)"),
    ("zero.csv", "zero.csv.*(damaged|empty|no rows)"),
    ("zero.parquet", "zero.parquet.*damaged"),
    ("pickle.npz", "pickle.npz.*Python objects"),
    ("pickle.npy", "pickle.npy.*Python objects"),
    ("torch.npz", "torch.npz.*no array.*np.savez"),
    ("pickle.parquet", "pickle.parquet.*damaged or not a parquet"),
    ("ragged.csv", "ragged.csv.*line 3"),
    ("words.csv", "words.csv.*'one'.*line 3"),
    ("notes.txt", "notes.txt.*ending"),
    ("empty_folder", "empty_folder"),
    ("goood.npz", "goood.npz.*did you mean 'good.npz'"),
    ("digit", "no data named 'digit'.*did you mean 'digits'"),
    ("two-moon", "did you mean 'two-moons'"),
    ("../nowhere/x.npz", "nowhere/x.npz.*check the path"),
    ("hf:", "hf:"),
]


@pytest.mark.parametrize(("source", "said"), DATA, ids=[source for source, _ in DATA])
def test_bad_data_files(here, capsys, source, said):
    refused(capsys, ["fit", "vae", "--data", source, "--steps", "2", "--out", "new"], said)


@pytest.mark.parametrize("command", ["show", "check"])
def test_bad_data_files_by_show_and_check(here, capsys, command):
    refused(capsys, [command, "vae", "--data", "nan.npz"], "nan.npz.*NaN")
    refused(capsys, [command, "vae", "--data", "cut.npz"], "cut.npz.*damaged")


@pytest.mark.parametrize("name", [n for n in NPZ if n in dict((s.removesuffix(".npz"), 0) for s, _ in DATA)])
def test_bad_arrays_in_python(name):
    with pytest.raises(ProbgenError) as caught:
        data = probgen.load_data(NPZ[name])
        probgen.load("vae", data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({}, "no arrays"),
        ({"x": None}, "'x'"),
        ({"x": [[1, 2], [3]]}, "'x'.*same shape"),
        ({"x": np.ma.masked_array(rows(), rows() > 0.5)}, "mask"),
        ({"x": np.array([1, "a", None], object)}, "'x'.*dtype object"),
        (3, "int"),
        ([], "empty"),
        (["a", "b"], "dtype"),
        (object(), "object"),
        ({"train": {"x": rows()}, "test": {"y": rows()}}, "lacks the array 'x_test'"),
        ({"test": {"x": rows()}}, "x_train"),
    ],
    ids=["nothing", "none", "ragged", "masked", "objects", "number", "list", "words", "object", "unlike", "test_only"],
)
def test_other_bad_values_in_python(source, said):
    with pytest.raises(ProbgenError, match=said) as caught:
        probgen.load_data(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ppl", PPLS)
def test_values_outside_the_support(here, capsys, ppl):
    fit = ["fit", f"bits_{ppl}.py", "--steps", "2", "--out", "new", "--data"]
    for name in ("bits_train_1.5", "bits_valid_1.5", "good"):
        said = "'x'.*(holds|has).*support.*'x'.*(prepare|likelihood)"
        line = refused(capsys, [*fit, f"{name}.npz"], said)
        assert name == "good" or "1.5" in line


@pytest.mark.parametrize("ppl", PPLS)
def test_values_outside_the_support_in_held_out_rows(here, capsys, ppl):
    said = "bits_test_1.5.npz.*'x' holds 1.5.*support.*'x'"
    refused(capsys, f"evaluate bits_{ppl} --data bits_test_1.5.npz", said)
    if ppl == "pyro":
        refused(capsys, "posterior coded --data bits_test_1.5.npz", said)


def test_values_outside_the_support_in_python(here):
    run = probgen.Run.open("bits_pyro", program=probgen.load("bits_pyro.py"))
    with pytest.raises(ProbgenError, match=r"1\.5.*support"):
        run.evaluate({"x": bits(10, 1.5)})
    with pytest.raises(ProbgenError, match="NaN"):
        run.evaluate({"x": bits(10, np.nan)})
    with pytest.raises(ProbgenError, match="shape"):
        run.evaluate({"x": rows(10, 5)})
    with pytest.raises(ProbgenError, match="shape"):
        run.evaluate(rows(10)[:, 0])
    with pytest.raises(ProbgenError, match=r"needs the array 'x'.*'y'"):
        run.evaluate({"y": bits(10)})


# What is typed


TYPED = [
    ("fitt vae", "no command 'fitt'.*did you mean 'fit'"),
    ("fit", "wants a MODEL"),
    ("fit vae", "--data"),
    ("fit vaee --data good.npz", "no model 'vaee'.*did you mean 'vae'"),
    ("fit vae_pyro --data good.npz", "did you mean 'vae"),
    ("fit nowhere.py --data good.npz", "no model file nowhere.py"),
    ("fit bits_pyro --data good.npz", "bits_pyro.py"),
    ("fit ../../etc/passwd --data good.npz", "not a Python file"),
    ("fit vae --data good.npz --epoch 3", "no option --epoch.*did you mean '--epochs'"),
    ("fit vae --data good.npz --zdim 3", "no option --zdim.*did you mean '--z_dim'"),
    ("fit vae --data good.npz --learning_rate 3", "no option --learning_rate"),
    ("fit vae --data good.npz --z_dim two", "--z_dim must be a whole number, not 'two'"),
    ("fit vae --data good.npz --z_dim -2", "z_dim|vae.py"),
    ("fit vae --data good.npz --likelihood bernouli", "--likelihood must be one of.*not 'bernouli'"),
    ("fit vae --data good.npz --epochs many", "--epochs must be a whole number, not 'many'"),
    ("fit vae --data good.npz --epochs 1.5", "--epochs must be a whole number"),
    ("fit vae --data good.npz --epochs -1", "`epochs` is -1.*0 or more"),
    ("fit vae --data good.npz --steps -5", "`steps` is -5"),
    ("fit vae --data good.npz --steps 5 --epochs 2", "`steps` or `epochs`, not both"),
    ("fit vae --data good.npz --lr -1", "`lr` is -1"),
    ("fit vae --data good.npz --lr 0", "`lr` is 0"),
    ("fit vae --data good.npz --lr .nan", "`lr` is nan.*positive"),
    ("fit vae --data good.npz --lr fast", "--lr must be a number"),
    ("fit vae --data good.npz --lr '{a: 1}'", "player 'program'.*'a'"),
    ("fit vae --data good.npz --lr '{program: fast}'", "`lr`.*number"),
    ("fit vae --data good.npz --batch_size 0", "`batch_size` is 0: it must be at least 1"),
    ("fit vae --data good.npz --batch_size half", "--batch_size must be"),
    ("fit vae --data good.npz --ema 2", "`ema` is 2.*between 0 and 1"),
    ("fit vae --data good.npz --clip 0", "`clip` is 0"),
    ("fit vae --data good.npz --clip .nan", "`clip` is nan"),
    ("fit vae --data good.npz --patience 0", "`patience` is 0"),
    ("fit vae --data good.npz --seed one", "--seed must be a whole number"),
    ("fit vae --data good.npz --seed -1", "`?seed`? is -1.*0 or more"),
    ("fit vae --data good.npz --optimizer adm", "optimizer 'adm'.*did you mean 'adam'"),
    ("fit vae_numpyro --data good.npz --optimizer adm", "optimizer.*'adm'.*did you mean 'adam'"),
    ("fit vae --data good.npz --optimizer '{name: adam}'", "player 'program'.*'name'"),
    ("fit vae --data good.npz --device gpu", "device.*'gpu'"),
    ("fit vae --data good.npz --device cuda:99", "device 'cuda:99' is not on this machine.*cpu"),
    ("fit vae_numpyro --data good.npz --device cuda:99", "'?cuda(:99)?'?.*cpu"),
    ("fit vae_numpyro --data good.npz --device gpuu", "device.*'gpuu'"),
    ("fit vae --data good.npz --precision 16", "--precision must be one of '32', '64', 'bf16-mixed'"),
    ("fit vae_numpyro --data good.npz --precision bf16-mixed", "bf16-mixed"),
    ("fit vae --data good.npz --compile maybe", "--compile must be"),
    ("fit vae --data good.npz --by iwa", "no loss 'iwa'.*did you mean 'iwae'"),
    ("fit vae --data good.npz --by IWAE(particles=3)", "IWAE.*particles.*num_particles"),
    ("fit vae --data good.npz --by IWAE(num_particles=0)", "num_particles"),
    ("fit vae --data good.npz --by \"IWAE(num_particles='many')\"", "num_particles"),
    ("fit vae --data good.npz --by \"ELBO(beta='x')\"", "beta.*'x'"),
    ("fit vae_numpyro --data good.npz --by \"ELBO(beta='x')\"", "beta.*'x'"),
    ("fit vae --data good.npz --by IWAE(", "'IWAE\\(' does not parse"),
    (
        "fit vae --data good.npz --by \"__import__('os').system('touch canary')\"",
        "loss.*neither a name nor a plain value",
    ),
    ("fit vae --data good.npz --by \"open('canary', 'w')\"", "no loss 'open'"),
    ("fit vae --data good.npz --schedule Cosin(1,0,5)", "no schedule 'Cosin'.*did you mean 'cosine'"),
    ("fit vae --data good.npz --schedule Cosine(1,0)", "Cosine.*missing.*steps"),
    ("fit vae --data good.npz --schedule Cosine(1,0,-5)", "steps"),
    ("fit vae --data good.npz --schedule \"Cosine('a', 0, 5)\"", "Cosine.*'a'"),
    ("fit vae --data good.npz --schedule 0.5", "schedule.*function of the step"),
    ("fit vae --data good.npz --schedule \"__import__('os').system('touch canary')\"", "schedule"),
    ("fit vae --data good.npz extra", "'extra'"),
    ("fit vae --data good.npz --epochs", "--epochs wants"),
    ("fit vae --data good.npz --config nowhere.yaml", "nowhere.yaml"),
    ("fit vae --data good.npz --config tags.yaml", "tags.yaml"),
    ("fit vae --data good.npz --config class.yaml", "`lr`|--lr"),
    ("fit vae --data good.npz --config typo.yaml", "typo.yaml.*epoch"),
    ("fit vae --data good.npz --config no.yaml", "no.yaml"),
    ("fit vae --data good.npz --steps 2 --k 1", "`k` is 1.*at least 2"),
    ("fit vae --data good.npz --steps 2 --out a_file", "a_file is a file.*choose another"),
    ("fit vae --data good.npz --steps 2 --out a_file/below", "a_file/below.*choose another"),
    ("fit vae --data good.npz --steps 2 --out vae", "vae holds a run.*resume it"),
    ("fit vae --data images.npz --steps 2 --out new --network conv --hidden 1", "vae.py, line|hidden"),
    ("resume nowhere", "no run folder nowhere"),
    ("resume empty_folder", "empty_folder holds no run"),
    ("resume a_file", "a_file"),
    ("resume vae --data wide.npz", "other data"),
    ("resume vae --data nan.npz", "nan.npz.*NaN"),
    ("sample nowhere", "no run folder nowhere"),
    ("sample vae -n 0", "`?n`? is 0.*at least one"),
    ("sample vae -n many", "must be a whole number"),
    ("sample vae --given y=3", "'y'"),
    ("sample vae --given y:3", "--given must be like"),
    ("sample vae --given \"x=__import__('os').system('touch canary')\"", "--given must be like"),
    ("sample vae --out samples.txt", "--out.*npz"),
    ("sample vae --out nowhere/samples.npz", "nowhere"),
    ("sample vae --seed -1", "seed.*-1"),
    ("evaluate vae --split tset", "--split must be one of"),
    ("evaluate vae --k 0", "`k` is 0"),
    ("evaluate vae --k 1", "`k` is 1"),
    ("evaluate vae --data wide.npz", "wide.npz.*shape"),
    ("evaluate vae --data only_y.npz", "'x'"),
    ("evaluate vae --data nan.npz", "nan.npz.*NaN"),
    ("evaluate bits_pyro --data wide.npz", "wide.npz.*shape"),
    ("evaluate empty_folder", "empty_folder holds no run"),
    ("posterior vae --draws 0", "draws"),
    ("posterior vae --rows 0", "rows"),
    ("posterior vae --data other_name.npz", "'x'"),
    ("posterior nowhere", "no run folder nowhere"),
    ("report empty_folder", "empty_folder holds no run"),
    ("report vae --pictures", "no option --pictures"),
    ("show vae --data good.npz --dot nowhere/x.dot", "nowhere/x.dot"),
    ("show vae", "--data"),
    ("show vae --data good.npz --epochs 3", "no option --epochs"),
    ("show bits_pyro --data good.npz", "bits_pyro.py"),
    ("check vae --data good.npz --compil", "did you mean '--compile'"),
    ("check nowhere.py --data good.npz", "no model file nowhere.py"),
    ("list all", "'all'"),
]


@pytest.mark.parametrize(("words", "said"), TYPED, ids=[words for words, _ in TYPED])
def test_what_is_typed_wrong(here, capsys, words, said):
    refused(capsys, words, said)


def test_a_place_that_cannot_be_written(here, capsys, tmp_path):
    if os.geteuid() == 0:
        place = "/proc/probgen"  # root may write anywhere else
    else:
        place = str(tmp_path / "locked")
        os.mkdir(place, 0o555)
        place += "/new"
    refused(capsys, ["fit", "vae", "--data", "good.npz", "--steps", "2", "--out", place], re.escape(place))


# Programs


WRONG_FILES = [
    ("syntax.py", "syntax.py, line 1"),
    ("missing_import.py", "missing_import.py needs `nonexistent_package`.*install"),
    ("wrong_import.py", "wrong_import.py.*line 1.*ELBOO"),
    ("no_model.py", "no_model.py holds no model.*define"),
    ("raises.py", "raises.py, line 4"),
    ("no_program.py", "no_program.py.*must return a probgen.Program"),
    ("not_text.py", "not_text.py"),
]


@pytest.mark.parametrize(("name", "said"), WRONG_FILES, ids=[name for name, _ in WRONG_FILES])
@pytest.mark.parametrize("command", ["fit", "show", "check"])
def test_model_files_that_do_not_load(here, capsys, command, name, said):
    refused(capsys, [command, name, "--data", "good.npz"], said)


WRONG_PROGRAMS = [
    ("unguided", "good", "latent 'z' has neither a guide nor enumeration: draw it in the guide"),
    ("unmarked", "good", "latent 'z' has neither a guide nor enumeration: mark it infer=.*enumerate"),
    ("local_autoguide", "good", "AutoNormal.*local latent '.*'.*batch_size=None"),
    ("own_input", "good", "'x' is read as input to its own site 'x'.*one distribution"),
    ("against_the_model", "good", "TraceMeanField_ELBO.*'z_1'.*ELBO\\(\\)"),
    ("labelled", "good", "'y'.*the data has 'x'.*rename"),
    ("labelled", "far_labels", "labelled_\\w+.py, line \\d+"),
    ("wrong_shape", "good", "site 'x' have the shape \\[8, 3\\], and its distribution draws \\[8, 5\\].*likelihood"),
    ("shrinking", "wide", "site 'x' have the shape \\[8, 4\\], and its distribution draws \\[8, 3\\]"),
    ("shrinking", "images", "site 'x' have the shape \\[8, 8, 8\\], and its distribution draws \\[8, 3\\]"),
    ("matrix", "wide", "matrix_\\w+.py, line \\d+: .*rows of the data: x \\[4\\]"),
    ("wrong_default", "good", "'learning_rate'.*no option of fit"),
]


@pytest.mark.parametrize("ppl", PPLS)
@pytest.mark.parametrize(("name", "data", "said"), WRONG_PROGRAMS, ids=[f"{n}-{d}" for n, d, _ in WRONG_PROGRAMS])
def test_programs_that_cannot_be_trained(here, capsys, ppl, name, data, said):
    if (ppl, data) == ("numpyro", "far_labels"):
        pytest.skip("JAX clips an index that is too large")
    fit = ["fit", f"{name}_{ppl}.py", "--data", f"{data}.npz", "--steps", "2", "--batch_size", "8", "--out", "new"]
    refused(capsys, fit, said)


# Runs that were damaged, forged or made by another program


def forge(folder, name, content):
    """Put other content in place of a file, and its hash into the manifest: what only an attacker or an editor does."""
    folder = Path(folder)
    before = (folder / name).read_bytes() if (folder / name).exists() else b""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    old, new = sha256(before).hexdigest(), sha256(content).hexdigest()
    manifest["files"][name] = new
    manifest["checkpoints"] = {new if sha == old else sha: state for sha, state in manifest["checkpoints"].items()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def in_config(folder, pattern, replacement):
    text = (Path(folder) / "config.yaml").read_text()
    changed = re.sub(pattern, lambda _: replacement, text, count=1, flags=re.MULTILINE)
    assert changed != text, f"{pattern!r} is not in {text}"
    forge(folder, "config.yaml", changed.encode())


def in_manifest(folder, change):
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, at=-5):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def huge_header():
    return (2**62).to_bytes(8, "little") + b"{}" * 8


def reshaped(path, name=None):
    """The same weights, one of them in another shape."""
    arrays, note = load_weights(path.read_bytes(), path)
    name = name or next(n for n in sorted(arrays) if arrays[n].ndim)
    arrays[name] = np.zeros(7, np.float32)
    target = path.parent / "x.tmp"
    save_weights(arrays, target, note)
    content = target.read_bytes()
    target.unlink()
    return content


def state_of(folder):
    return next((Path(folder) / "state").glob("*.safetensors"))


def state_name(folder):
    return f"state/{state_of(folder).name}"


W, C, M = "weights.safetensors", "config.yaml", "manifest.json"
NEEDS_WEIGHTS, ALL = (
    ("sample", "evaluate", "posterior", "report"),
    ("sample", "evaluate", "posterior", "report", "resume"),
)


@dataclass
class Damage:
    """What is done to a run, the commands that must refuse it, and what they say."""

    name: str
    do: object
    said: str
    commands: tuple = ALL


DAMAGED = [
    Damage("weights cut", lambda f: cut(f / W, 100), f"{W} was damaged.*restore", NEEDS_WEIGHTS),
    Damage("weights empty", lambda f: cut(f / W, 0), f"{W} was damaged.*restore", NEEDS_WEIGHTS),
    Damage("weights flipped", lambda f: flip(f / W), f"{W} was damaged.*restore"),
    Damage("weights missing", lambda f: (f / W).unlink(), f"{W} is missing.*restore"),
    Damage("weights a folder", lambda f: [(f / W).unlink(), (f / W).mkdir()], f"{W} is not a regular file"),
    Damage("weights a pickle", lambda f: (f / W).write_bytes(pickled()), f"{W} was damaged.*restore"),
    Damage("weights torch.save", lambda f: (f / W).write_bytes(torch_saved()), f"{W} was damaged.*restore"),
    Damage("forged weights cut", lambda f: forge(f, W, (f / W).read_bytes()[:-9]), f"{W} is not a whole safetensors"),
    Damage("forged weights empty", lambda f: forge(f, W, b""), f"{W} is empty"),
    Damage("forged weights header", lambda f: forge(f, W, huge_header()), f"{W} is not a whole safetensors"),
    Damage("forged weights pickle", lambda f: forge(f, W, pickled()), f"{W} is not a whole safetensors"),
    Damage("forged weights torch", lambda f: forge(f, W, torch_saved()), f"{W} is not a whole safetensors"),
    Damage("forged weights shape", lambda f: forge(f, W, reshaped(f / W)), "shape.*other options", NEEDS_WEIGHTS),
    Damage("state cut", lambda f: cut(state_of(f), 60), "state/.*was damaged.*restore", ("resume",)),
    Damage("state missing", lambda f: state_of(f).unlink(), "state/.*is missing.*restore", ("resume",)),
    Damage("forged state pickle", lambda f: forge(f, state_name(f), pickled()), "state/.*not a whole", ("resume",)),
    Damage("forged state torch", lambda f: forge(f, state_name(f), torch_saved()), "state/.*not a whole", ("resume",)),
    Damage("example pickle", lambda f: (f / "example.safetensors").write_bytes(pickled()), "example.*damaged"),
    Damage(
        "forged example pickle",
        lambda f: forge(f, "example.safetensors", pickled()),
        "example.*not a whole safetensors",
    ),
    Damage("forged example torch", lambda f: forge(f, "example.safetensors", torch_saved()), "example.*not a whole"),
    Damage("example missing", lambda f: (f / "example.safetensors").unlink(), "example.safetensors is missing"),
    Damage("source missing", lambda f: (f / "model.py").unlink(), "model.py is missing.*restore"),
    Damage("config cut", lambda f: cut(f / C, 50), f"{C} was damaged.*restore"),
    Damage(
        "config edited", lambda f: (f / C).write_text((f / C).read_text() + "\nx: 1\n"), f"{C} was damaged or changed"
    ),
    Damage("config missing", lambda f: (f / C).unlink(), "holds no run"),
    Damage("newer config", lambda f: in_config(f, "^format: 1", "format: 2"), "format 2.*newer probgen"),
    Damage("no format", lambda f: in_config(f, "^format: 1", "format: one"), "format 'one'"),
    Damage("hostile tag", lambda f: forge(f, C, b"format: !!python/object/apply:os.system ['touch canary']\n"), C),
    Damage("class_path", lambda f: in_config(f, "^note: .*", "note: {class_path: os.system}"), f"{C}.*class_path"),
    Damage("empty config", lambda f: forge(f, C, b""), f"{C} must hold a mapping"),
    Damage("config bytes", lambda f: forge(f, C, b"\xff\xfe\x00"), f"{C} is not text"),
    Damage("config of nothing", lambda f: forge(f, C, b"format: 1\n"), f"{C}.*'?name'?.*restore"),
    Damage("config lacks options", lambda f: in_config(f, "^options:\n(  .*\n)+", ""), f"{C}.*'?options'?.*restore"),
    Damage("config of wrong types", lambda f: in_config(f, "^options:\n(  .*\n)+", "options: 3\n"), f"{C}.*options"),
    Damage("spec damaged", lambda f: in_config(f, "^  x:\n", "  x: 3\n  w:\n"), f"{C}.*spec"),
    Damage("steps of text", lambda f: in_config(f, "^  steps: 2", "  steps: many"), f"{C}.*steps", ("resume",)),
    Damage("precision", lambda f: in_config(f, "^  precision: '32'", "  precision: '13'"), "precision.*'13'"),
    Damage(
        "code in by",
        lambda f: in_config(f, "^by: .*", "by: __import__('os').system('touch canary')"),
        "loss",
        NEEDS_WEIGHTS,
    ),
    Damage(
        "code in schedule",
        lambda f: in_config(f, "^  schedule: .*", "  schedule: __import__('os').system('touch canary')"),
        "schedule",
        ("resume",),
    ),
    Damage(
        "unknown option",
        lambda f: in_config(f, "^  steps: 2", "  steps: 2\n  turbo: 3"),
        f"{C}.*`options`",
        ("resume",),
    ),
    Damage("manifest missing", lambda f: (f / M).unlink(), f"{M} is missing.*restore"),
    Damage("manifest cut", lambda f: cut(f / M, 80), f"{M} is damaged.*restore"),
    Damage("manifest empty", lambda f: cut(f / M, 0), f"{M} is damaged.*restore"),
    Damage("manifest a list", lambda f: (f / M).write_text("[1, 2]"), f"{M} is damaged"),
    Damage("manifest pickle", lambda f: (f / M).write_bytes(pickled()), f"{M} is damaged"),
    Damage("newer manifest", lambda f: in_manifest(f, lambda m: m.update(format=2)), "newer probgen.*upgrade"),
    Damage(
        "path out of the manifest",
        lambda f: in_manifest(f, lambda m: m["files"].update({"../../x": "0" * 64})),
        f"{M} names a file outside the run folder.*'../../x'",
    ),
    Damage(
        "state out of the folder",
        lambda f: in_manifest(f, lambda m: m.update(checkpoints=dict.fromkeys(m["checkpoints"], "/etc/passwd"))),
        f"{M} names a file outside",
    ),
    Damage("metrics damaged", lambda f: (f / "metrics.jsonl").write_text("{\n{}\n"), "metrics.jsonl was damaged"),
    Damage(
        "forged metrics", lambda f: forge(f, "metrics.jsonl", b'x\n{"step": 2}\n'), "metrics.jsonl is damaged in line 1"
    ),
    Damage(
        "source changed", lambda f: (f / "model.py").write_text("import os\nos.system('touch canary')\n"), "model.py"
    ),
]
SOURCED = {
    "source changed",
    "source missing",
    "code in by",
}  # the zoo's own file is run where it is the same: these want a user's


@pytest.mark.parametrize("damage", DAMAGED, ids=[damage.name for damage in DAMAGED])
def test_damaged_runs(copied, capsys, damage):
    folder = copied / ("bits_pyro" if damage.name in SOURCED else "vae")
    damage.do(folder)
    for command in damage.commands:
        refused(capsys, [command, folder.name], damage.said)


@pytest.mark.parametrize("ppl", PPLS)
def test_damage_to_runs_of_both_backends(copied, capsys, ppl):
    folder = copied / f"bits_{ppl}"
    content = (folder / W).read_bytes()
    for bad, said in [(reshaped(folder / W), "'p'.*shape.*other options"), (torch_saved(), f"{W} is not a whole")]:
        forge(folder, W, bad)
        refused(capsys, ["sample", folder.name], said)
        forge(folder, W, content)
    state = state_name(folder)
    forge(folder, state, reshaped(folder / state))
    in_config(folder, "^  steps: 2", "  steps: 4")  # else there is nothing to go on with
    in_state(folder, finished=False)
    refused(capsys, ["resume", folder.name], "checkpoint does not fit.*shape")


def in_state(folder, **changed):
    """Change what the checkpoint says of the run."""
    name = state_name(folder)
    arrays, note = load_weights((folder / name).read_bytes(), folder / name)
    save_weights(arrays, folder / "x.tmp", json.dumps(json.loads(note) | changed))
    forge(folder, name, (folder / "x.tmp").read_bytes())
    (folder / "x.tmp").unlink()


def test_weights_of_another_program(copied, capsys):
    forge(copied / "vae", W, (copied / "other" / W).read_bytes())
    refused(capsys, "sample vae", "'.*' have shape.*other options")
    forge(copied / "vae", W, (copied / "bits_pyro" / W).read_bytes())
    refused(capsys, "sample vae", "hold no '.*another program")


def test_a_run_opened_with_another_program(copied):
    other = probgen.load("vae", probgen.load_data("good.npz"), z_dim=5, hidden=4)
    with pytest.raises(ProbgenError, match="other options"):
        probgen.Run.open("vae", program=other).sample(2)


def test_data_that_have_moved(copied, capsys):
    in_config(copied / "vae", "^  source: .*", "  source: /nowhere/good.npz")
    for command in ("evaluate", "posterior", "resume"):
        refused(capsys, [command, "vae"], "--data")


def test_a_second_writer_is_refused(copied, capsys):
    folder = Folder.open("vae")
    with folder.writer():
        for command in ("evaluate --k 2", "sample", "posterior --draws 2", "report"):
            first, *options = command.split()
            refused(capsys, [first, "vae", *options], "vae is being written by this process.*wait")
    in_config(copied / "vae", "^  steps: 2", "  steps: 4")
    in_state(copied / "vae", finished=False)
    with folder.writer():
        refused(capsys, "resume vae", "vae is being written by this process.*wait")


# NaN while training


@pytest.mark.parametrize(
    ("model", "data", "options", "site", "parameter"),
    [
        ("vae", "good.npz", "--lr 1e30 --hidden 4 --z_dim 2", "site 'z'", "parameter '(en|de)coder"),
        ("shrinking_pyro.py", "narrow.npz", "--lr 0.3 --optimizer sgd", "site 'x'", "parameter 'scale'"),
        ("shrinking_numpyro.py", "narrow.npz", "--lr 0.3 --optimizer sgd", "site 'x'", "parameter 'scale'"),
    ],
)
def test_a_nan_stops_the_training_and_keeps_the_last_good_checkpoint(
    stock, tmp_path, monkeypatch, capsys, model, data, options, site, parameter
):
    for name in (model, data):
        if (stock / name).is_file():
            shutil.copy(stock / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    words = f"fit {model} --data {data} --steps 60 --batch_size 10 --out new {options}"
    assert cli.main(words.split()) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("probgen: ")]
    assert len(lines) == 1 and "Traceback" not in err and err.endswith(lines[0] + "\n")
    assert re.search(site, lines[0]) and re.search(parameter, lines[0]) and re.search(r"step \d+", lines[0]), lines[0]
    step = int(re.search(r"step (\d+)", lines[0])[1])
    run = probgen.Run.open("new")
    assert not run.finished and run.folder.last_checkpoint()[2]["step"] <= step
    assert all(np.isfinite(value).all() for value in run.params.values())
    assert np.isfinite(run.sample(2)["x"]).all()
    assert str(run.folder.last_checkpoint()[2]["step"]) in lines[0]


# In a process of its own


def alone(words):
    """A command in a process of its own, warnings and all."""
    return subprocess.run(
        [sys.executable, "-m", "probgen.cli", *words.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_warning_is_a_line_of_its_own_without_code(copied):
    forge(copied / "bits_pyro", W, pickled())
    done = alone("sample bits_pyro")
    note, error = done.stderr.splitlines()
    assert done.returncode == 2 and error.startswith("probgen: bits_pyro/weights.safetensors is not a whole")
    assert note == "note: building the program from bits_pyro/model.py, the copy kept with the run"


@pytest.mark.parametrize(
    "words", ["fit vae --data nan.npz", "fit vaee --data good.npz", "sample empty_folder", "fit vae --data torch.npz"]
)
def test_in_a_process_of_its_own(here, words):
    before = tree(".")
    done = alone(words)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("probgen: ") and done.stderr.count("\n") == 1
    assert tree(".") == before


@pytest.mark.parametrize("name", ["kde", "kde_numpyro"])
def test_a_parameter_as_long_as_the_batch_is_refused_before_training(name):
    x = np.random.default_rng(0).normal(size=(50, 3))
    program = probgen.load(name, {"x": x})
    with pytest.raises(
        ProbgenError, match=r"'centres' has a value for each of the 10 rows of a batch.*batch_size=None"
    ):
        probgen.fit(program, {"x": x}, batch_size=10, steps=3, progress=False)


def test_the_end_of_a_fit_that_converges_is_said(capsys):
    x = np.random.default_rng(0).normal(size=(200, 2)) + np.array([[8.0, 0.0]]) * (np.arange(200)[:, None] % 2)
    run = probgen.fit(probgen.load("gmm", {"x": x}, components=2), {"x": x}, epochs=100)
    steps = run.metrics["step"][-1]
    assert steps < 100 and f"converged after {steps} of 100 steps" in capsys.readouterr().err
