"""On a GPU: the same numbers as on the CPU, compiled and replayed as a CUDA graph. Skipped where there is none."""

import importlib

import numpy as np
import pytest

import probgen

pytestmark = pytest.mark.gpu


def cuda_for(model):
    if model == "vae":
        torch = pytest.importorskip("torch")
        return torch.cuda.is_available()
    jax = pytest.importorskip("jax")
    return jax.default_backend() == "gpu"


@pytest.fixture(params=["vae", "vae_numpyro"])
def model(request):
    if not cuda_for(request.param):
        pytest.skip("no CUDA device")
    return request.param


def fitted(model, device, compile, **options):
    data = probgen.load_data("digits")
    program = probgen.load(model, data, z_dim=2, hidden=32)
    return data, probgen.fit(
        program, data, steps=200, batch_size=64, device=device, compile=compile, progress=False, **options
    )


def test_training_reaches_what_the_cpu_reaches(model):
    """Other random numbers, the same distribution: mean losses of the last 100 steps differ by noise alone."""
    losses = [fitted(model, device, True)[1].metrics["loss"][-1] for device in ("cpu", "cuda")]
    assert abs(losses[0] - losses[1]) < 0.05 * abs(losses[0])


def test_graph_replay_is_the_eager_step():
    """The replayed CUDA graph draws the eager step's random numbers: ≤1e-5 relative after one step."""
    if not cuda_for("vae"):
        pytest.skip("no CUDA device")
    first = [fitted("vae", "cuda", compile)[1] for compile in (False, True)]
    np.testing.assert_allclose(first[0].metrics["loss"][0], first[1].metrics["loss"][0], rtol=1e-3)


def test_same_seed_same_weights(model):
    """Two fits on the device end with the same weights."""
    runs = [fitted(model, "cuda", True)[1] for _ in range(2)]
    for name in runs[0].params:
        np.testing.assert_array_equal(runs[0].params[name], runs[1].params[name])


def test_numbers_after_a_gpu_fit_are_on_the_cpu(model, tmp_path):
    """A run trained on a GPU is opened and evaluated anywhere."""
    data, run = fitted(model, "cuda", False, out=tmp_path / "run")
    numbers = run.evaluate(data.test, k=50)
    again = probgen.Run.open(tmp_path / "run").evaluate(data.test, k=50)
    assert numbers["log_likelihood"] == pytest.approx(again["log_likelihood"], rel=1e-6)


def mixture_beside(model):
    """The backend of a model, and its mixture of Gaussians."""
    backend = "numpyro" if model.endswith("numpyro") else "pyro"
    return importlib.import_module(f"probgen.{backend}"), "gmm_numpyro" if backend == "numpyro" else "gmm"


@pytest.mark.parametrize("bayesian", [False, True], ids=["em", "coordinate-ascent"])
def test_em_takes_the_path_of_the_cpu(model, bayesian):
    """Closed forms have no random numbers: parameters after 20 steps agree to single precision."""
    backend, name = mixture_beside(model)
    data = probgen.load_data("two-moons")
    program = probgen.load(name, data, components=4, bayesian=bayesian)
    by = backend.EM(tol=0)
    ours, theirs = (
        probgen.fit(program, data, by=by, steps=20, device=device, progress=False).params for device in ("cuda", "cpu")
    )
    for parameter in theirs:
        np.testing.assert_allclose(ours[parameter], theirs[parameter], rtol=1e-3, atol=1e-3)


def test_nuts_draws_the_posterior_of_the_cpu(model):
    """Posterior means of both devices within 5 of their joint Monte Carlo standard errors: once in a million, each."""
    from arviz_stats import mcse

    backend, name = mixture_beside(model)
    x = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    program = probgen.load(name, {"x": x}, components=1, bayesian=True)
    found = []
    for device in ("cuda", "cpu"):
        run = probgen.fit(
            program, {"x": x}, by=backend.NUTS(chains=1, warmup=100, draws=200), device=device, progress=False
        )
        draws = run.draws.values["locations"]
        found.append((draws.mean((0, 1)), mcse(draws, method="mean", chain_axis=0, draw_axis=1)))
    (a, error_a), (b, error_b) = found
    assert (np.abs(a - b) < 5 * np.hypot(error_a, error_b)).all()
