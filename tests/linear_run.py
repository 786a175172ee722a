"""A run whose program is a linear-Gaussian VAE in numpy with its exact posterior: pictures of it can be checked."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from probgen.data import load_data
from probgen.program import Plate, Site, Structure

PLATE = (Plate("data", 32, -1, data=True),)


class LinearTrained:
    """z ~ N(0, I), x = mean + weight z + sd * noise, with q(z | x) the posterior of probabilistic PCA."""

    def __init__(self, x, z_dim):
        self.arrays = {"x": np.asarray(x[:2], dtype=float)}
        self.shape = x.shape[1:]
        flat = np.asarray(x, dtype=float).reshape(len(x), -1)
        self.mean = flat.mean(0)
        _, singular, right = np.linalg.svd(flat - self.mean, full_matrices=False)
        variances = singular**2 / len(flat)
        z_dim = min(z_dim, len(variances))
        self.sd = float(np.sqrt(max(variances[z_dim:].mean() if z_dim < len(variances) else 0.01, 1e-3)))
        self.weight = right[:z_dim].T * np.sqrt(np.maximum(variances[:z_dim] - self.sd**2, 1e-3))
        precision = self.weight.T @ self.weight / self.sd**2 + np.eye(z_dim)
        self.covariance = np.linalg.inv(precision)
        self.encoder = self.covariance @ self.weight.T / self.sd**2

    def draw(self, n, seed, arrays, prior=False):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(n, self.weight.shape[1]))
        noise = rng.normal(size=(n, len(self.mean))) * self.sd
        return {"z": z, "x": (self._mean(z).reshape(n, -1) + noise).reshape(n, *self.shape)}

    def decode(self, latents, n, seed, arrays):
        return {"x": self._mean(latents["z"])}

    def refuse_outside(self, arrays):
        """Every real number is in the support."""

    def posterior(self, arrays, draws, seed):
        mean = self._encode(arrays["x"])
        noise = np.random.default_rng(seed).normal(size=(draws, *mean.shape))
        return {"z": mean + noise @ np.linalg.cholesky(self.covariance).T}, None, None

    def guided(self, arrays, draws, seed):
        return self.posterior(arrays, draws, seed)[0]

    def reconstruct(self, arrays, seed):
        return {"x": self._mean(self.posterior(arrays, 1, seed)[0]["z"][0])}

    def log_weights(self, arrays, k, seed):
        return np.random.default_rng(seed).normal(size=(k, len(arrays["x"])))

    def k_hat(self, log_weights):
        return np.abs(log_weights).mean(0) / 2

    def _encode(self, x):
        return (np.asarray(x, dtype=float).reshape(len(x), -1) - self.mean) @ self.encoder.T

    def _mean(self, z):
        return (self.mean + z @ self.weight.T).reshape(len(z), *self.shape)


class Unchanged:
    """A preparation that leaves data as they are."""

    random = False

    def spec(self, spec):
        return spec

    def forward(self, arrays, rng):
        return {name: np.asarray(value, dtype=float) for name, value in arrays.items()}, 0.0

    def inverse(self, arrays):
        return arrays

    def to_json(self):
        return {"steps": {}}


def linear_run(source="digits", z_dim=2, **changes):
    """A finished run on `source`, as pictures and the report read it."""
    data = load_data(source)
    trained = LinearTrained(data.train["x"], z_dim)
    z_dim = trained.weight.shape[1]
    event = tuple(data.spec["x"].shape)
    z = Site("z", "latent", "Normal", (32, z_dim), 1, PLATE)
    x = Site("x", "observed", "Normal", (32, *event), len(event), PLATE, parents=("z",))
    steps = np.arange(50, 5001, 50)
    loss = 60 + 160 * np.exp(-steps / 300) + np.random.default_rng(0).normal(size=len(steps)) * 0.8
    run = SimpleNamespace(
        program=SimpleNamespace(model=lambda x=None: None, guide=lambda x: None, prepare={}, defaults={}),
        name="linear",
        data=data,
        spec=data.spec,
        structure=Structure({"z": z, "x": x}, {"z": z}, ("data",), False, {"x": "data"}),
        trained=trained,
        preparation=Unchanged(),
        metrics={
            "step": steps.tolist(),
            "epoch": (steps / 50).tolist(),
            "loss": loss.tolist(),
            "valid_loss": [v + 2 if i % 5 == 4 else float("nan") for i, v in enumerate(loss)],
            "lr": [1e-3] * len(steps),
            "grad_norm": np.full(len(steps), 3.0).tolist(),
            "seconds": (steps / 1000).tolist(),
            "term/x": (-loss + 8).tolist(),
            "term/z": [-8.0] * len(steps),
        },
        evaluation=None,
        options={"steps": 5000, "batch_size": 32, "lr": 1e-3, "optimizer": "adam", "seed": 0},
        command="probgen fit linear --data digits --z_dim 2",
        path=None,
        folder=None,
    )
    run.sample = lambda n, seed=0, given=None, prior=False: trained.draw(n, seed, None)
    for name, value in changes.items():
        setattr(run, name, value)
    return run
