"""The examples run, in seconds, and their numbers are right."""

import re
import runpy
from pathlib import Path

import numpy as np
import numpyro
import pyro
import pytest
from scipy.stats import poisson

import probgen
from probgen.check import check

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / name))


def changed_lines(name, theirs):
    """How many import lines of the script name probgen, and whether the note beside tells the stock line."""
    lines = [line for line in (EXAMPLES / name).read_text().splitlines() if line.startswith("from probgen")]
    return len(lines), all(f"instead of: from {theirs} import SVI" in line for line in lines)


def test_svi_pyro_equals_the_stock_svi():
    assert changed_lines("svi_pyro.py", "pyro.infer") == (1, True)
    main = example("svi_pyro.py")["main"]
    ours = main(epochs=3, verbose=False)
    stock = main(pyro.infer.SVI, epochs=3, verbose=False)
    np.testing.assert_allclose(ours, stock, rtol=1e-4)
    assert ours[-1] < ours[0] - 5


def test_svi_numpyro_equals_the_stock_svi_and_takes_minibatches():
    assert changed_lines("svi_numpyro.py", "numpyro.infer") == (1, True)
    main = example("svi_numpyro.py")["main"]
    stock = main(numpyro.infer.SVI, steps=50)
    np.testing.assert_allclose(main(steps=50), stock, rtol=1e-5)
    batches = main(steps=500, batch_size=64)
    # A batch stands for all rows: its first losses are those of all rows, up to the noise of 64 rows (some 1 nat).
    assert abs(float(batches[:5].mean()) - float(stock[:5].mean())) < 5
    assert batches[-100:].mean() < batches[:10].mean() - 15


@pytest.fixture(scope="module")
def digits():
    return probgen.load_data("digits")


def test_own_model_obeys_the_laws(digits):
    verdicts = check(probgen.load(EXAMPLES / "own_model.py", digits), digits)
    assert [str(v) for v in verdicts if v.passed is False] == []


def test_own_model_beats_independent_pixels(digits, capsys):
    """With all loadings zero the model is independent Poisson pixels, whose likelihood is a closed form."""
    mean = np.maximum(digits.spec["x"].mean, 0.01)
    independent = poisson.logpmf(digits.test["x"], mean).sum((1, 2)).mean()
    runpy.run_path(str(EXAMPLES / "own_model.py"), run_name="__main__")
    numbers = {m[1]: float(m[2]) for m in re.finditer(r"^(\w+) +(-?[\d.]+)", capsys.readouterr().out, re.M)}
    assert independent + 30 < numbers["log_likelihood"] < 0
    bits = -numbers["log_likelihood"] / 64 / np.log(2)
    assert abs(numbers["bits_per_dim"] - bits) < 0.01
