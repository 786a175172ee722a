"""Trained programs in plain numpy with everything in closed form: what `sample`, `posterior`, `evaluate` are tested on.

LinearGaussian:  z ~ N(0, I), x | z, y ~ N(W z + b + c_y, s² I);  q(z | x) the exact posterior, or moved off it
NormalMean:      θ ~ N(0, τ²), x_n | θ ~ N(θ, s²);                 q(θ) the exact posterior, or moved off it
"""

import numpy as np
from scipy import stats
from scipy.special import logsumexp

from probgen.program import Plate, Site, Structure


def normal_log_prob(x, mean, scale):
    return -0.5 * ((x - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def pareto_k(log_weights):
    """Generalised Pareto shape of the largest 3 √K weights by probability-weighted moments (Hosking & Wallis); [B]."""
    tail = min(int(3 * np.sqrt(len(log_weights))), len(log_weights) // 5)
    with np.errstate(invalid="ignore"):
        w = np.sort(np.exp(log_weights - log_weights.max(axis=0)), axis=0)[-tail - 1 :]
    excess = w[1:] - w[0]
    p = (np.arange(1, tail + 1) - 0.35) / tail
    a0, a1 = excess.mean(axis=0), ((1 - p)[:, None] * excess).mean(axis=0)
    return 2 - a0 / (a0 - 2 * a1)


class LinearGaussian:
    rows = 1000

    def __init__(self, D=5, Z=2, s=0.7, moved=0.0, wider=1.0, classes=0, dead=0, seed=0, kind="latent"):
        rng = np.random.default_rng(seed)
        self.D, self.Z, self.s, self.classes = D, Z + dead, s, classes
        self.W = np.concatenate([rng.normal(size=(D, Z)), np.zeros((D, dead))], axis=1)
        self.b = rng.normal(size=D)
        self.c = rng.normal(size=(max(1, classes), D)) * 3 * (classes > 0)
        precision = np.eye(self.Z) + self.W.T @ self.W / s**2
        self.V = np.linalg.inv(precision)
        self.moved, self.wider, self.kind = moved, wider, kind
        self.L = np.linalg.cholesky(self.V) * wider
        self.calls = []

    @property
    def structure(self):
        plate = (Plate("data", 10, -1, True),)
        z = Site("z", "latent", "Normal", (10, self.Z), 1, plate)
        x = Site(
            "x",
            "observed",
            "Delta" if self.kind == "implicit" else "Normal",
            (10, self.D),
            1,
            plate,
            delta=self.kind == "implicit",
            parents=("z",),
        )
        f = {"f": Site("f", "factor", "Unit", (10,), 0, plate)} if self.kind == "unnormalised" else {}
        arrays = {"x": "data", "y": "given"} if self.classes else {"x": "data"}
        return Structure({"z": z, "x": x, **f}, {"z": z}, ("data",), False, arrays)

    def mean(self, arrays):
        return self.b + self.c[arrays["y"] if self.classes else 0]

    def log_evidence(self, arrays):
        """log N(x; b + c_y, W Wᵀ + s² I), [B]."""
        cov = self.W @ self.W.T + self.s**2 * np.eye(self.D)
        return np.atleast_1d(stats.multivariate_normal(np.zeros(self.D), cov).logpdf(arrays["x"] - self.mean(arrays)))

    def generate(self, n, seed, y=None):
        rng = np.random.default_rng(seed)
        arrays = {"y": y} if self.classes else {}
        z = rng.normal(size=(n, self.Z))
        return z, z @ self.W.T + self.mean(arrays) + self.s * rng.normal(size=(n, self.D))

    def draw(self, n, seed, arrays, prior=False):
        assert all(len(v) == n for v in arrays.values()) and set(arrays) == set(self.structure.arrays)
        self.calls.append(n)
        z, x = self.generate(n, seed, arrays.get("y"))
        return {"z": z, "x": x}

    def posterior_mean(self, arrays):
        return (arrays["x"] - self.mean(arrays)) @ self.W @ self.V / self.s**2

    def refuse_outside(self, arrays):
        """Every real number is in the support."""

    def posterior(self, arrays, draws, seed):
        self.calls.append(draws * len(arrays["x"]))
        noise = np.random.default_rng(seed).normal(size=(draws, len(arrays["x"]), self.Z))
        z = self.posterior_mean(arrays) + self.moved + noise @ self.L.T
        log_q = normal_log_prob(noise, 0, 1).sum(-1) - np.log(np.diag(self.L)).sum()
        terms = self._model_terms(arrays, z)
        return {"z": z}, terms["x"] + terms["z"], log_q

    def guided(self, arrays, draws, seed):
        return self.posterior(arrays, draws, seed)[0]

    def _model_terms(self, arrays, z):
        x = normal_log_prob(arrays["x"], z @ self.W.T + self.mean(arrays), self.s).sum(-1)
        return {"x": x, "z": normal_log_prob(z, 0, 1).sum(-1)}

    def log_weights(self, arrays, k, seed):
        _, log_p, log_q = self.posterior(arrays, k, seed)
        return log_p - log_q

    def terms(self, arrays, draws, seed):
        values, _, log_q = self.posterior(arrays, draws, seed)
        terms = self._model_terms(arrays, values["z"])
        return {"x": terms["x"], "z": terms["z"] - log_q}

    def reconstruct(self, arrays, seed):
        z = self.posterior(arrays, 1, seed)[0]["z"][0]
        return {"x": z @ self.W.T + self.mean(arrays)}

    def k_hat(self, log_weights):
        return pareto_k(log_weights)


class NormalMean:
    """Rows are scalars; `rows` of training data `x` fix the guide."""

    def __init__(self, x, tau=2.0, s=1.0, moved=0.0, wider=1.0):
        self.tau, self.s, self.rows, self.x = tau, s, len(x), x
        self.v = 1 / (1 / tau**2 + len(x) / s**2)
        self.m = self.v * x.sum() / s**2
        self.qm, self.qs = self.m + moved, np.sqrt(self.v) * wider

    @property
    def structure(self):
        theta = Site("theta", "latent", "Normal", (), 0)
        x = Site("x", "observed", "Normal", (10,), 0, (Plate("data", 10, -1, True),), parents=("theta",))
        return Structure({"theta": theta, "x": x}, {"theta": theta}, ("data",), False, {"x": "data"})

    def theta(self, draws, seed):
        return self.qm + self.qs * np.random.default_rng(seed).normal(size=draws)

    def log_weights(self, arrays, k, seed):
        return normal_log_prob(arrays["x"], self.theta(k, seed)[:, None], self.s)

    def refuse_outside(self, arrays):
        """Every real number is in the support."""

    def posterior(self, arrays, draws, seed):
        log_p = self.log_weights(arrays, draws, seed)
        return {"theta": self.theta(draws, seed)}, log_p, np.zeros_like(log_p)

    def guided(self, arrays, draws, seed):
        return self.posterior(arrays, draws, seed)[0]

    def terms(self, arrays, draws, seed):
        theta, x = self.theta(draws, seed), self.log_weights(arrays, draws, seed)
        ratio = normal_log_prob(theta, 0, self.tau) - normal_log_prob(theta, self.qm, self.qs)
        return {"theta": np.broadcast_to(ratio[:, None] / self.rows, x.shape), "x": x}

    def elbo(self, arrays, draws, seed):
        return sum(self.terms(arrays, draws, seed).values())

    def reconstruct(self, arrays, seed):
        return {"x": np.full(len(arrays["x"]), self.qm)}

    def draw(self, n, seed, arrays, prior=False):
        rng = np.random.default_rng(seed)
        theta = rng.normal() * self.tau if prior else self.theta(1, seed + 1)[0]
        return {"theta": np.asarray(theta), "x": theta + self.s * rng.normal(size=n)}

    def k_hat(self, log_weights):
        return pareto_k(log_weights)

    def log_predictive(self, x):
        return normal_log_prob(x, self.m, np.sqrt(self.v + self.s**2))

    def log_evidence(self):
        cov = self.s**2 * np.eye(self.rows) + self.tau**2
        return stats.multivariate_normal(np.zeros(self.rows), cov).logpdf(self.x)

    def exact_loo(self):
        """Σ_n log p(x_n | x_{-n})."""
        total = 0.0
        for n, x in enumerate(self.x):
            total += NormalMean(np.delete(self.x, n), self.tau, self.s).log_predictive(x)
        return total


def one_run(trained, arrays, k, seed):
    """log (1/K) Σ w of one set of draws, [B]."""
    return logsumexp(trained.log_weights(arrays, k, seed), axis=0) - np.log(k)
