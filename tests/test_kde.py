"""Parzen windows as a distribution, on both backends: its draws, its mean, and the rows that its loss looks at."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

import probgen

MODELS = ["kde", "kde_numpyro"]


@pytest.mark.parametrize("name", MODELS)
def test_draws_are_those_of_the_mixture_of_gaussians_and_the_mean_is_its_mean(name):
    """x ~ 1/N Σ_i N(x_i, h² I), unprepared: 4000 draws.

    Kolmogorov-Smirnov of three projections against the mixture's own distribution function, false alarm 1e-6 each;
    five moments at 5 standard errors, 6e-7 each.
    """
    x = np.random.default_rng(0).normal(size=(15, 2)) ** 3 @ np.array([[1.0, 0.5], [0.0, 0.7]]) + (3.0, -2.0)
    program = replace(probgen.load(name, {"x": x}), prepare={})
    run = probgen.fit(program, {"x": x}, steps=0, progress=False)
    h = float(run.params["bandwidth"])
    assert h == pytest.approx(15 ** (-1 / 6), rel=1e-5)
    draws = run.sample(4000, seed=0)["x"]
    for direction in ((1.0, 0.0), (0.0, 1.0), (0.6, -0.8)):
        places = x @ direction

        def cdf(t, places=places):
            return stats.norm(places, h).cdf(np.asarray(t)[:, None]).mean(1)

        assert stats.kstest(draws @ direction, cdf).pvalue > 1e-6
    away = draws - x.mean(0)
    products = np.concatenate([away, away**2, away.prod(1, keepdims=True)], 1)
    expected = [0, 0, *(x.var(0) + h**2), np.cov(x.T, bias=True)[0, 1]]
    assert (abs(products.mean(0) - expected) < 5 * products.std(0) / 4000**0.5).all()
    means = run.trained.reconstruct({"x": np.float32(x + 1.0)}, 0)["x"]  # the same for every row
    np.testing.assert_allclose(means, np.broadcast_to(x.mean(0), (15, 2)), rtol=1e-5)


def losses(name, x, h, draws):
    """The loss of centres x and a bandwidth h, for several seeds."""
    program = probgen.load(name, {"x": x})
    if name == "kde":
        import pyro
        import torch

        pyro.clear_param_store()
        pyro.param("centres", torch.tensor(x))
        pyro.param("bandwidth", torch.tensor(h, dtype=torch.float64))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            found = np.array([float(program.by(None, None, x=torch.tensor(x))) for _ in range(draws)])
        pyro.clear_param_store()
        return found
    import jax

    with jax.enable_x64(True):
        params = {"centres": jax.numpy.array(x), "bandwidth": jax.numpy.array(h)}
        keys = jax.random.split(jax.random.key(0), draws)
        return np.array(jax.jit(jax.vmap(lambda key: program.by(key, params, None, None, x=params["centres"])))(keys))


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_looks_at_rows_of_its_own_in_every_step_and_is_right_in_the_mean(name):
    """600 rows, of which the last are far out: 256 of them stand for all, without bias and with the variance of a
    sample without replacement. 200 seeds: the mean within 4.5 errors (7e-6), the sd within a fifth (4 errors, 6e-5).
    """
    N, draws, h = 600, 200, 0.7
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(300, 1)), rng.normal(scale=8.0, size=(300, 1))])
    kernels = stats.norm(x.T, h).logpdf(x)
    np.fill_diagonal(kernels, -np.inf)
    each = -(logsumexp(kernels, 1) - np.log(N - 1))
    sd = N * np.sqrt(each.var(ddof=1) / 256 * (1 - 256 / N))
    found = losses(name, x, h, draws)
    assert abs(found.mean() - each.sum()) < 4.5 * sd / draws**0.5
    assert found.std(ddof=1) == pytest.approx(sd, rel=0.2)
    assert abs(each[:256].sum() * N / 256 - each.sum()) > 10 * sd / draws**0.5  # the first rows alone would not do
