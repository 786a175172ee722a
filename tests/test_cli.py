"""The command line: what is typed reaches the verbs as values, and every mistake is one line with status 2."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pytest

from probgen import cli
from probgen.errors import ProbgenError
from probgen.parsing import called
from probgen.program import Structure
from probgen.schedules import Cosine, Linear

MODEL = '''
    """A Gaussian, for the tests of the command line."""
    from typing import Literal

    import pyro
    import pyro.distributions as dist

    from probgen.program import Program

    def program(spec, z_dim: int = 3, hidden: tuple[int, ...] = (8,), rate: float = 0.5, deep: bool = False,
                family: Literal["normal", "laplace"] = "normal", steps: int = 7, net: object = None) -> Program:
        """Build it.

        Args:
            z_dim: how many latents there are
        """

        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.param("m", 0.0 * x[0]), 1.0).to_event(1), obs=x)

        model.options = dict(z_dim=z_dim, hidden=hidden, rate=rate, deep=deep, family=family, steps=steps)
        return Program(model)
'''


class FakeRun:
    """Records what the commands ask of a run."""

    asked: ClassVar[dict] = {}
    path, name, metrics = Path("there"), "mine", MappingProxyType({})
    structure = Structure({}, {})

    def __init__(self, data=None):
        self.data = data

    @classmethod
    def open(cls, path):
        return cls(FakeRun.asked.get("data"))

    def evaluate(self, rows, k=1000, seed=0):
        FakeRun.asked |= {"evaluated": len(rows), "k": k, "evaluation_seed": seed}
        self.evaluation = {"log_likelihood": -1.25, "log_likelihood_se": 0.5, "notes": ["So it is."]}

    def sample(self, n, seed=0, given=None, prior=False, sampler=None):
        FakeRun.asked |= {"n": n, "given": given, "prior": prior}
        return {"x": np.zeros((n, 2), np.float32)}

    def report(self):
        return Path("there/report.html")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model file, a data file, and a `fit` and a `Run` that only take notes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(textwrap.dedent(MODEL))
    np.savez(tmp_path / "my.npz", x=np.random.default_rng(0).normal(size=(100, 2)))
    FakeRun.asked = {}

    def fit(program, data, **options):
        FakeRun.asked |= {"program": program, "data": data, "options": options}
        return FakeRun(data)

    monkeypatch.setitem(sys.modules, "probgen.fit", types.SimpleNamespace(fit=fit))
    monkeypatch.setitem(sys.modules, "probgen.run", types.SimpleNamespace(Run=FakeRun))
    return "mine.py"


def refused(capsys, *words):
    """The one line that `words` are refused with."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("probgen: ") and err.count("\n") == 1 and "Traceback" not in err and not out
    return err


def test_fit_hands_every_word_on_as_a_value(model, capsys):
    words = "--data my.npz --z-dim 5 --hidden 16,4 --rate 1 --deep --family=laplace --epochs 4 --lr 2e-3 --seed 9"
    words += " --batch_size null --compile false --precision 64 --schedule Cosine(1,0,50) --model.steps 2 --out o"
    assert cli.main(["fit", model, *words.split(), "--k", "20"]) == 0
    options = FakeRun.asked["options"]
    assert FakeRun.asked["program"].model.options == {
        "z_dim": 5, "hidden": (16, 4), "rate": 1.0, "deep": True, "family": "laplace", "steps": 2,
    }  # fmt: skip
    assert options == {
        "epochs": 4, "lr": 2e-3, "batch_size": None, "compile": False, "precision": "64", "seed": 9,
        "schedule": Cosine(1, 0, 50), "out": Path("o"),
    }  # fmt: skip
    assert FakeRun.asked["program"].origin.seed == 9
    assert FakeRun.asked["evaluated"] == 10 and FakeRun.asked["k"] == 20
    out = capsys.readouterr().out
    assert "−1.25 ± 0.50" in out and "So it is." in out and out.rstrip().endswith("there/report.html")


def test_fit_leaves_what_is_not_said_to_the_program_and_numbers_its_folders(model):
    Path("runs/mine-1").mkdir(parents=True)
    assert cli.main(["fit", model, "--data", "my.npz", "--no-report"]) == 0
    assert FakeRun.asked["options"] == {"out": Path("runs/mine-2"), "seed": 0}
    assert "evaluated" not in FakeRun.asked


def test_a_config_file_gives_options_and_the_command_line_wins(model, capsys):
    Path("c.yaml").write_text("data: my.npz\nz_dim: 4\nhidden: [3, 2]\nepochs: 2\n")
    assert cli.main(["fit", model, "--epochs", "3", "--config", "c.yaml"]) == 0
    assert FakeRun.asked["program"].model.options["hidden"] == (3, 2)
    assert FakeRun.asked["program"].model.options["z_dim"] == 4 and FakeRun.asked["options"]["epochs"] == 3


@pytest.mark.parametrize(
    "text",
    [
        "z_dim: !!python/object/apply:os.system ['touch canary']",
        "net: {class_path: os.system, init_args: {command: touch canary}}",
        "z_dim: {class_path: os.system}",
        "zdim: 4",
        ": : :\n- {",
    ],
)
def test_a_hostile_or_wrong_config_file_is_refused(model, capsys, text):
    Path("c.yaml").write_text(text)
    refused(capsys, "fit", model, "--data", "my.npz", "--config", "c.yaml")
    assert not Path("canary").exists() and not FakeRun.asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fitt mine.py", "did you mean 'fit'"),
        ("fit", "wants a MODEL first"),
        ("fit --data my.npz", "wants a MODEL first"),
        ("fit mine.py", "say which data with --data"),
        ("fit mine.py --data my.npz --zdim 3", "no option --zdim; did you mean '--z_dim'"),
        ("fit mine.py --data my.npz --epoch 3", "did you mean '--epochs'"),
        ("fit mine.py --data my.npz --z_dim two", "--z_dim must be a whole number, not 'two'"),
        ("fit mine.py --data my.npz --family gamma", "--family must be one of 'normal', 'laplace', not 'gamma'"),
        ("fit mine.py --data my.npz --hidden a,b", "--hidden must be a tuple"),
        ("fit mine.py --data my.npz --epochs", "--epochs wants a whole number"),
        ("fit mine.py --data my.npz extra", "does not know what to do with 'extra'"),
        ("fit mine.py --data my.npz --net os.system", "no option --net"),
        ("fit mine.py --data my.npz --by nothing", "there is no loss 'nothing'"),
        ("fit mine.py --data my.npz --schedule Cosin(1,0,5)", "did you mean 'cosine'"),
        ("fit mine.py --data my.npz --config nowhere.yaml", "nowhere.yaml"),
        ("fit nowhere.py --data my.npz", "no model file nowhere.py"),
        ("fit mine.py --data nowhere.npz", "nowhere.npz"),
        ("sample there --given y:3", "--given must be like 'y=3'"),
        ("sample there -n many", "--number must be a whole number, not 'many'"),
        ("evaluate there --split tset", "--split must be one of"),
        ("evaluate there", "say where they lie, with --data"),
    ],
)
def test_a_mistake_is_one_line_with_its_cure(model, capsys, words, said):
    assert said in refused(capsys, *words.split())
    assert "options" not in FakeRun.asked and not Path("runs").exists()


def test_help_tells_the_options_of_the_model_with_defaults_and_purpose(model, capsys):
    assert cli.main(["fit", model, "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "how many latents there are (default: 3)" in told and "--family normal|laplace" in told
    assert "--epochs" in told and "--by" in told and "--net" not in told
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        assert cli.COMMANDS[command].summary[1:] in " ".join(capsys.readouterr().out.split())
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0


def test_sample_and_evaluate_write_what_they_say(model, capsys):
    assert cli.main(["evaluate", "there", "--data", "my.npz", "--split", "train", "--k", "7"]) == 0
    assert FakeRun.asked["evaluated"] == 80 and FakeRun.asked["k"] == 7
    assert cli.main(["sample", "there", "-n", "3", "--given", "y=3, w=[1, 2]", "--out", "s.npz"]) == 0
    assert FakeRun.asked["given"] == {"y": 3, "w": [1, 2]} and np.load("s.npz")["x"].shape == (3, 2)
    assert "s.npz" in capsys.readouterr().out


def test_interrupts_have_their_exit_status(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "list", cli.Command("", "", interrupted))
    assert cli.main(["list"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_sigterm_ends_with_143(tmp_path):
    (tmp_path / "slow.py").write_text("import time, pathlib\npathlib.Path('up').touch()\ntime.sleep(60)\n")
    words = [sys.executable, "-m", "probgen.cli", "fit", "slow.py", "--data", "ring"]
    root = str(Path(__file__).resolve().parent.parent)
    process = subprocess.Popen(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.PIPE)
    for _ in range(600):
        if (tmp_path / "up").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert b"Traceback" not in process.stderr.read()


def test_help_imports_no_backend():
    code = "import sys; from probgen.cli import main; main(['--help']); main(['list']); heavy = {'torch', 'jax', "
    code += "'pyro', 'numpyro', 'matplotlib', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Bound:
    """A loss of the tests."""

    def __init__(self, num_particles: int = 5, beta=1.0):
        self.num_particles, self.beta = num_particles, beta


def test_a_loss_is_named_in_words_that_are_parsed_and_never_run():
    names = {"IWAE": Bound, "Linear": Linear}
    assert called("iwae", names, "loss").num_particles == 5
    made = called("IWAE(num_particles=50, beta=Linear(0, 1, steps=10))", names, "loss")
    assert made.num_particles == 50 and made.beta == Linear(0, 1, 10)
    for text, said in [
        ("iwa", "did you mean 'iwae'"),
        ("IWAE(particles=3)", "it takes Bound(num_particles"),
        ("IWAE(", "does not parse"),
        ("__import__('os').system('true')", "neither a name nor a plain value"),
        ("IWAE(beta=open('x'))", "there is no loss 'open'"),
        ("(lambda: 3)()", "neither a name nor a plain value"),
    ]:
        with pytest.raises(ProbgenError) as caught:
            called(text, names, "loss")
        assert said in str(caught.value), text
