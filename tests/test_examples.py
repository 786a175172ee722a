"""The examples run, in seconds, and their numbers are right."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pyro
import pytest
from numpyro.infer import Trace_ELBO
from scipy.stats import poisson
from sklearn.datasets import load_digits

import probgen
from probgen.check import check

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / name))


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_one_import_line_is_changed(backend):
    lines = (EXAMPLES / f"svi_{backend}.py").read_text().splitlines()
    ours = [line for line in lines if line.startswith(("import probgen", "from probgen"))]
    assert [line.partition("  #")[0] for line in ours] == [f"from probgen.{backend} import SVI"]


def test_svi_pyro_equals_the_stock_svi():
    main = example("svi_pyro.py")["main"]
    ours = main(epochs=3, verbose=False)
    stock = main(pyro.infer.SVI, epochs=3, verbose=False)
    np.testing.assert_allclose(ours, stock, rtol=1e-4)
    assert ours[-1] < ours[0] - 5


@pytest.mark.nightly
def test_svi_numpyro_equals_the_stock_svi_and_its_batches_stand_for_all_rows():
    script = example("svi_numpyro.py")
    x = jnp.asarray(load_digits().data > 8, dtype=float)

    def losses(svi_class, **options):
        svi = svi_class(script["model"], script["guide"], optax.adam(1e-3), Trace_ELBO())
        return np.asarray(svi.run(jax.random.key(0), 30, x, progress_bar=False, **options).losses) / len(x)

    stock = losses(numpyro.infer.SVI)
    np.testing.assert_allclose(losses(script["SVI"]), stock, rtol=1e-5)
    # Unscaled, a batch of 128 would give a fourteenth of it. Its noise is some 0.5 nats, ten times less than the gate.
    assert abs(losses(script["SVI"], batch_size=128)[:5].mean() - stock[:5].mean()) < 5


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


@pytest.mark.nightly
def test_the_energies_have_their_normalisers_and_flows_come_closer_with_their_length():
    """log Z as published to three digits (U2's in closed form); KL(q_K || p) against quadrature of the guide's own density."""
    energies = example("energies.py")
    found = {name: energies["log_evidence"](energy) for name, energy in energies["ENERGIES"].items()}
    np.testing.assert_allclose(list(found.values()), [1.8775, 2.0824, 2.6420, 2.6850], atol=1e-3)
    assert found["U2"] == pytest.approx(np.log(8 * 0.4 * np.sqrt(2 * np.pi)), abs=1e-6)
    short, long = (energies["gap"](energies["wave"], length, 400, 0)[0] for length in (1, 8))
    assert 0 < long < short - 0.1
