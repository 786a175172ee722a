"""Calibration: exact posteriors have uniform ranks, on both backends; narrowed, widened and moved ones are caught.

Every gate uses fixed seeds. A calibrated site fails with a probability of 1 % (band) + 0.01 % (KS) over the seeds.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from linear_gaussian import LinearGaussian
from linear_run import Unchanged
from scipy import stats

import probgen
from probgen import cli, pictures
from probgen.calibration import uniformity
from probgen.calibration.uniformity import Calibration, in_words
from probgen.data import load_data
from probgen.errors import ProbgenError
from probgen.program import Program

W = np.array([[1.0, 0.9], [0.8, 1.1], [0.2, -0.3]], np.float32)
SD = 0.7
PRECISION = np.eye(2) + W.T @ W / SD**2
V = np.linalg.inv(PRECISION)
ENCODER = (V @ W.T / SD**2).astype(np.float32)
EXACT = np.linalg.cholesky(V).astype(np.float32)
MEAN_FIELD = np.diag(1 / np.sqrt(np.diag(PRECISION))).astype(np.float32)  # the best diagonal Gaussian
ROWS = (np.random.default_rng(0).normal(size=(64, 2)) @ W.T).astype(np.float32)
X = np.random.default_rng(1).normal(1.0, 1.0, size=12).astype(np.float32)


def linear_pyro(tril=EXACT, moved=0.0):
    import pyro
    import pyro.distributions as dist
    import torch

    from probgen.pyro import ELBO

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ torch.tensor(W.T), SD).to_event(1), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.full((2,), moved))
        with pyro.plate("data", len(x)):
            mean = x @ torch.tensor(ENCODER.T) + shift
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=torch.tensor(tril)))

    return Program(model, guide, by=ELBO())


def linear_numpyro(tril=EXACT, moved=0.0):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from probgen.numpyro import ELBO

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z @ W.T, SD).to_event(1), obs=x)

    def guide(x):
        shift = numpyro.param("shift", jnp.full((2,), moved))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.MultivariateNormal(x @ ENCODER.T + shift, scale_tril=jnp.array(tril)))

    return Program(model, guide, by=ELBO())


LINEAR = {"pyro": linear_pyro, "numpyro": linear_numpyro}


def calibrated(program, data=ROWS, **options):
    """A run of the program as it is written, calibrated."""
    run = probgen.fit(program, {"x": data}, steps=0, progress=False)
    return run.calibration(**options)


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.nightly_on("numpyro")
def test_an_exact_guide_is_calibrated_and_its_negative_controls_are_not(backend):
    program = LINEAR[backend]
    exact = calibrated(program())
    assert exact.passed and exact.ks_pvalue["z"] > 1e-4 and exact.inside_band["z"], str(exact)
    assert exact.ranks["z"].shape == (1000, 2) and exact.ranks["z"].min() >= 0 and exact.ranks["z"].max() <= 199
    narrow = calibrated(program(0.7 * EXACT))
    assert not narrow.passed and "too narrow" in narrow.verdicts["z"], str(narrow)
    moved = calibrated(program(moved=0.3 * float(np.sqrt(V.diagonal().max()))))
    assert not moved.passed and "biased up" in moved.verdicts["z"], str(moved)


@pytest.mark.parametrize("backend", LINEAR)
def test_mean_field_on_a_correlated_posterior_is_shown_as_too_narrow(backend):
    """Its variances are 1 / Λ_ii instead of (Λ⁻¹)_ii: the true posterior is sqrt(Λ_ii V_ii) times as wide."""
    found = calibrated(LINEAR[backend](MEAN_FIELD))
    assert not found.passed and "too narrow (under-dispersed" in found.verdicts["z"], str(found)
    assert "how latents depend on one another" in found.verdicts["z"]
    for i, u in enumerate(found.components["z"].values()):
        middle = np.mean((u > 0.4) & (u < 0.6))
        assert np.mean(u < 0.1) > 1.5 * middle / 2 and np.mean(u > 0.9) > 1.5 * middle / 2  # the ranks are U-shaped
        width = uniformity.shape(u)[1]
        assert width == pytest.approx(np.sqrt(PRECISION[i, i] * V[i, i]), rel=0.12)


@pytest.mark.parametrize(
    ("wider", "moved", "words"),
    [(0.6, 0.0, "too narrow"), (1.5, 0.0, "too wide"), (1.0, 0.4, "biased up"), (1.0, -0.4, "biased down")],
)
def test_the_shape_of_the_ranks_is_told_in_words(wider, moved, words):
    found = probgen.calibration(numpy_run(wider=wider, moved=moved * 0.4))
    assert not found.passed and words in found.verdicts["z"], str(found)
    others = {"too narrow", "too wide", "biased up", "biased down"} - {words}
    assert not [word for word in others if word in found.verdicts["z"]]


def test_a_posterior_far_from_the_truth_is_biased_and_not_too_wide():
    words, _ = in_words(np.full(500, 0.999) + np.linspace(0, 0.0009, 500))
    assert words.startswith("biased down") and "wide" not in words


def numpy_run(**options):
    """A run of a linear-Gaussian program in plain numpy."""
    trained = LinearGaussian(**options)
    data = load_data({"x": trained.generate(100, 1)[1]})
    program = SimpleNamespace(by=None)
    return SimpleNamespace(trained=trained, data=data, spec=data.spec, preparation=Unchanged(), program=program)


def test_arrays_that_the_program_is_given_come_from_the_data():
    trained = LinearGaussian(classes=3)
    y = np.arange(90) % 3
    data = load_data({"x": trained.generate(90, 1, y)[1], "y": y})
    kept = SimpleNamespace(forward=lambda arrays, rng: (arrays, 0.0), spec=lambda spec: spec)
    run = SimpleNamespace(
        trained=trained, data=data, spec=data.spec, preparation=kept, program=SimpleNamespace(by=None)
    )
    assert probgen.calibration(run).passed


# -- discrete latents -------------------------------------------------------------------------------------------------

MEANS, SHARES = np.array([-1.0, 0.5, 1.5]), np.array([0.5, 0.3, 0.2])


def discrete(backend, sharp=1.0):
    """Three components; the guide draws z from its exact conditional, to the power `sharp`."""
    if backend == "pyro":
        import pyro as ppl
        import pyro.distributions as dist
        import torch as xp

        means, shares = xp.tensor(MEANS, dtype=xp.float32), xp.tensor(SHARES, dtype=xp.float32)
        from probgen.pyro import ELBO
    else:
        import jax.numpy as xp
        import numpyro as ppl
        import numpyro.distributions as dist

        means, shares = xp.array(MEANS), xp.array(SHARES)
        from probgen.numpyro import ELBO

    def model(x):
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Categorical(shares))
            ppl.sample("x", dist.Normal(means[z], 0.6), obs=x)

    def guide(x):
        logits = xp.log(shares) - 0.5 * ((x[:, None] - means) / 0.6) ** 2
        with ppl.plate("data", len(x)):
            ppl.sample("z", dist.Categorical(logits=sharp * logits), infer={"enumerate": "parallel"})

    return Program(model, guide, by=ELBO())


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
@pytest.mark.nightly_on("numpyro")
def test_a_discrete_latent_with_its_exact_conditional_is_calibrated(backend):
    """Ties are broken at random, so that the ranks of three values are uniform all the same."""
    data = np.random.default_rng(0).normal(size=50).astype(np.float32)
    found = calibrated(discrete(backend), data)
    assert found.passed and len(np.unique(found.ranks["z"])) > 150, str(found)
    assert not calibrated(discrete(backend, 0.0), data).passed


# -- global latents ---------------------------------------------------------------------------------------------------


def normal_mean(backend, narrow=1.0):
    """θ ~ N(0, 2²), x_n ~ N(θ, 1); the guide computes the exact posterior from its data."""
    if backend == "pyro":
        import pyro as ppl
        import pyro.distributions as dist

        from probgen.pyro import ELBO
    else:
        import numpyro as ppl
        import numpyro.distributions as dist

        from probgen.numpyro import ELBO

    def model(x):
        theta = ppl.sample("theta", dist.Normal(0.0, 2.0))
        with ppl.plate("data", len(x)):
            ppl.sample("x", dist.Normal(theta, 1.0), obs=x)

    def guide(x):
        v = 1 / (1 / 4 + len(x))
        ppl.sample("theta", dist.Normal(v * x.sum(), narrow * v**0.5))

    return Program(model, guide, by=ELBO(), defaults={"batch_size": None, "steps": 0})


@pytest.mark.nightly
def test_a_global_latent_is_calibrated_by_fitting_anew_to_every_simulated_data_set(capsys):
    found = probgen.calibration(normal_mean("pyro"), {"x": X}, simulations=60, draws=49)
    assert found.passed and found.ranks["theta"].shape == (60,), str(found)
    assert "fitted anew" in found.said and "12 rows" in found.said
    told = capsys.readouterr().err
    assert "59 more fits of" in told and "in all" in told
    narrow = probgen.calibration(normal_mean("pyro", 0.5), {"x": X}, simulations=60, draws=49, progress=False)
    assert not narrow.passed and "too narrow" in narrow.verdicts["theta"], str(narrow)


@pytest.mark.nightly
def test_a_global_latent_on_numpyro():
    """With another data set's truths, or another posterior's draws, ranks would be 0 or 19 in most simulations."""
    exact = probgen.calibration(normal_mean("numpyro"), {"x": X[:5]}, simulations=20, draws=19, progress=False)
    assert exact.passed and np.mean((exact.ranks["theta"] > 4) & (exact.ranks["theta"] < 15)) > 0.2, str(exact)


@pytest.mark.nightly
def test_exchangeable_components_are_put_in_order_in_truths_and_draws_alike():
    """The data say nothing, so the posterior is the prior; the guide draws one of its 3! equal parts, sorted."""
    import pyro
    import pyro.distributions as dist
    import torch

    from probgen.pyro import ELBO

    def model(x):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        where = pyro.sample("where", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(share), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(0.03 * where[z], 3.0), obs=x)

    def guide(x):
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("where", dist.Delta(torch.randn(3).sort(descending=True)[0], event_dim=1))

    program = Program(model, guide, by=ELBO(), defaults={"batch_size": None, "steps": 0})
    run = probgen.fit(program, {"x": X[:3]}, progress=False)
    options = {"simulations": 60, "draws": 19, "progress": False}
    found = run.calibration(**options)
    assert found.passed, str(found)
    means = {k: found.normalised["where"][:, k].mean() for k in range(3)}
    assert all(abs(m - 0.5) < 4 / np.sqrt(12 * 60) for m in means.values())  # unsorted they would be 1/6, 1/2, 5/6


# -- the band ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("simulations", "level"), [(1000, 0.99), (60, 0.99), (200, 0.9)])
def test_the_band_holds_the_ecdf_of_uniform_numbers_as_often_as_it_says(simulations, level):
    """4,000 replications: the share inside may be four standard errors off, one false alarm in 16,000 seeds."""
    rng = np.random.default_rng(0)
    within = np.mean([uniformity.inside(rng.random(simulations), level) for _ in range(4000)])
    assert abs(within - level) < 4 * np.sqrt(level * (1 - level) / 4000)


def test_the_band_of_one_point_is_a_binomial_interval():
    assert uniformity._coverage(50, np.array([0.3]), np.array([10]), np.array([20])) == pytest.approx(
        stats.binom(50, 0.3).cdf(20) - stats.binom(50, 0.3).cdf(9)
    )


def test_ranks_count_draws_below_and_toss_for_ties():
    truth, draws = np.array([1.0, 5.0]), np.array([[0.0, 5.0], [2.0, 5.0], [0.5, 9.0]])
    found = np.array([uniformity.ranks(truth, draws, np.random.default_rng(i)) for i in range(600)])
    assert set(found[:, 0]) == {2}
    shares = np.bincount(found[:, 1], minlength=4) / 600  # two ties, none below: 0, 1 or 2
    assert shares[3] == 0 and np.abs(shares[:3] - 1 / 3).max() < 0.09  # 4.5 standard errors


def test_many_numbers_in_one_site_are_held_together():
    """60 calibrated sites of 20 numbers: 1 % of them may leave their bands, so fewer than 6 do (p = 4e-5)."""
    rng = np.random.default_rng(0)
    results = [Calibration({"z": rng.integers(0, 100, (100, 20))}, 99, {"seed": i}) for i in range(60)]
    assert sum(not r.passed for r in results) < 6


# -- what is typed ----------------------------------------------------------------------------------------------------


def test_the_result_reads_as_a_table():
    text = str(probgen.calibration(numpy_run(), simulations=200))
    assert "KS p" in text and "calibrated, as far as 200 simulations can tell" in text and "199 draws each" in text


def test_the_picture_has_a_panel_for_each_number_with_its_band():
    found = probgen.calibration(numpy_run(wider=0.6), simulations=300)
    with pictures.detached():
        ax = pictures.calibration(found)
        ax.figure.canvas.draw()
    panels = ax.child_axes
    assert [panel.get_title(loc="left") for panel in panels] == ["z[0]", "z[1]"] and "300" in ax.get_title(loc="left")
    drawn = panels[0].get_lines()[-1].get_ydata()
    at = panels[0].get_lines()[-1].get_xdata()
    u = found.components["z"]["z[0]"]
    np.testing.assert_allclose(drawn, [(u <= a).mean() - a for a in at], atol=1e-9)
    assert drawn[40] > 0 > drawn[360]  # too narrow: up on the left, down on the right


@pytest.mark.parametrize(
    ("options", "words"),
    [({"simulations": 5}, "below 20"), ({"draws": 3}, "too coarse")],
)
def test_too_few_are_refused(options, words):
    with pytest.raises(ProbgenError, match=words):
        probgen.calibration(numpy_run(), **options)


def test_programs_without_simulated_truths_are_refused():
    with pytest.raises(ProbgenError, match="factor"):
        probgen.calibration(numpy_run(kind="unnormalised"))
    with pytest.raises(ProbgenError, match="needs data"):
        probgen.calibration(linear_pyro())


MODEL = """
import pyro, torch
import pyro.distributions as dist
from probgen.program import Program
from probgen.calibration.uniformity import Calibration, in_words

def program(spec, narrow: float = 1.0) -> Program:
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, narrow * 0.5**0.5))

    return Program(model, guide, defaults={"steps": 2, "lr": 1e-5})
"""


def test_check_fits_and_calibrates_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODEL)
    np.savez(tmp_path / "d.npz", x_train=X, x_test=X)
    words = ["check", "mine.py", "--data", "d.npz", "--calibration", "--simulations", "200"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "fitted by its own recipe" in out and "✓ calibration of z: calibrated, as far as 200" in out
    assert cli.main([*words, "--narrow", "0.5"]) == 1
    out = capsys.readouterr().out
    assert "✗ calibration of z: the posterior of z is too narrow" in out and "train it longer" in out
    assert cli.main(["check", "mine.py", "--data", "d.npz", "--simulations", "200"]) == 2
