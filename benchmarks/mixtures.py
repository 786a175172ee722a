"""EM on a Gaussian mixture: seconds an iteration of probgen, scikit-learn and pomegranate.

Every contender starts from the same values and takes the same iterations. An iteration's time is the difference of a
long and a short fit over the difference of their iterations, so that imports, compiling and loading cancel, while
all that `probgen.fit` does beside EM (histories, curves, checks) counts.
"""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

SHORT, LONG = 5, 25  # iterations of the two fits

Fit = Callable[[int], Callable[[], float]]  # so many iterations, then what gives the mean log-likelihood


@dataclass(frozen=True)
class Mixture:
    """`rows` points of `components` Gaussians with full covariances in `dims` dimensions, and where EM starts."""

    rows: int = 100_000
    dims: int = 16
    components: int = 10
    seed: int = 0

    def data(self) -> np.ndarray:
        """x [N, D], float32: means of spread 3, covariances of condition about 10."""
        rng = np.random.default_rng(self.seed)
        means = 3 * rng.normal(size=(self.components, self.dims))
        factors = np.linalg.qr(rng.normal(size=(self.components, self.dims, self.dims)))[0]
        factors = factors * np.exp(rng.uniform(-1.1, 1.1, size=(self.components, 1, self.dims)))
        z = rng.integers(self.components, size=self.rows)
        noise = rng.normal(size=(self.rows, self.dims))
        x = np.empty((self.rows, self.dims), np.float32)
        for k in range(self.components):
            x[z == k] = means[k] + noise[z == k] @ factors[k].T
        return x

    def start(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Equal weights [K], K of the rows as means [K, D], the data's standard deviations as factors [K, D, D]."""
        rng = np.random.default_rng(self.seed + 1)
        means = x[rng.choice(len(x), self.components, replace=False)].astype(np.float32)
        scale = np.diag(x.std(0)).astype(np.float32)
        weights = np.full(self.components, 1 / self.components, np.float32)
        return weights, means, np.tile(scale, (self.components, 1, 1))


def iteration(
    contender: str, rows: int, dims: int, components: int, repeats: int = 3, long: int = LONG
) -> dict[str, Any]:
    """Seconds an iteration, each time; the mean log-likelihood after `long` of them; the process's peak memory, MiB."""
    problem = Mixture(rows, dims, components)
    x = problem.data()
    fit = _CONTENDERS[contender](x, problem.start(x))
    fit(SHORT)  # compiles
    each = []
    for _ in range(repeats):
        (brief, _), (full, score) = _timed(fit, SHORT), _timed(fit, long)
        each.append((full - brief) / (long - SHORT))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": each, "log_likelihood": score(), "peak": peak}


def _timed(fit: Fit, steps: int) -> tuple[float, Callable[[], float]]:
    began = time.perf_counter()
    score = fit(steps)
    return time.perf_counter() - began, score


def _probgen_pyro(x: np.ndarray, start: tuple) -> Fit:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.distributions import constraints

    from probgen.pyro import EM

    weights, means, factors = map(torch.from_numpy, start)

    def model(x: torch.Tensor) -> None:
        pi = pyro.param("weights", weights, constraint=constraints.simplex)
        mu = pyro.param("locations", means)
        L = pyro.param("scale_tril", factors, constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(pi), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=L[z]), obs=x)

    return _fitted(model, EM(init="program", tol=0.0), x)


def _probgen_numpyro(x: np.ndarray, start: tuple) -> Fit:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    from probgen.numpyro import EM

    weights, means, factors = map(jnp.asarray, start)

    def model(x: jnp.ndarray) -> None:
        pi = numpyro.param("weights", weights, constraint=constraints.simplex)
        mu = numpyro.param("locations", means)
        L = numpyro.param("scale_tril", factors, constraint=constraints.lower_cholesky)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Categorical(pi), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=L[z]), obs=x)

    return _fitted(model, EM(init="program", tol=0.0), x)


def _fitted(model: Callable[..., None], by: Any, x: np.ndarray) -> Fit:
    """`probgen.fit` for so many steps."""
    import probgen

    data = probgen.load_data({"x": x})

    def fit(steps: int) -> Callable[[], float]:
        run = probgen.fit(probgen.Program(model, by=by), data, steps=steps, progress=False)
        return lambda: run.evaluate({"x": x})["log_likelihood"]

    return fit


def _scikit_learn(x: np.ndarray, start: tuple) -> Fit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    warnings.simplefilter("ignore", ConvergenceWarning)
    weights, means, factors = start
    precisions = np.linalg.inv(factors @ factors.transpose(0, 2, 1))
    begin = {"weights_init": weights, "means_init": means, "precisions_init": precisions}

    def fit(steps: int) -> Callable[[], float]:
        mixture = GaussianMixture(len(weights), tol=0.0, reg_covar=0.0, max_iter=steps, init_params="random", **begin)
        mixture.fit(x)
        return lambda: float(mixture.score(x))

    return fit


def _pomegranate(x: np.ndarray, start: tuple) -> Fit:
    import torch
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    weights, means, factors = start
    rows = torch.from_numpy(x)

    def fit(steps: int) -> Callable[[], float]:
        normals = [
            Normal(m.copy(), (f @ f.T).copy(), covariance_type="full") for m, f in zip(means, factors, strict=True)
        ]
        mixture = GeneralMixtureModel(normals, priors=weights.copy(), max_iter=steps, tol=-np.inf)
        mixture.fit(rows)
        return lambda: float(mixture.log_probability(rows).mean())

    return fit


_CONTENDERS: dict[str, Callable[[np.ndarray, tuple], Fit]] = {
    "numpyro": _probgen_numpyro,
    "pyro": _probgen_pyro,
    "scikit-learn": _scikit_learn,
    "pomegranate": _pomegranate,
}
