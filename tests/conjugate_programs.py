"""Conjugate programs, written once for both backends: a library is `Lib("pyro")` or `Lib("numpyro")`."""

import importlib

import numpy as np

from probgen import Program

MARK = {"enumerate": "parallel"}


class Lib:
    """What the two PPLs call the same."""

    def __init__(self, backend):
        self.name = backend
        ppl, self.dist = importlib.import_module(backend), importlib.import_module(f"{backend}.distributions")
        self.C = importlib.import_module(f"{backend}.distributions.constraints") if backend == "pyro" else None
        self.C = self.C or importlib.import_module("numpyro.distributions").constraints
        self.sample, self.param, self.plate = ppl.sample, ppl.param, ppl.plate
        self.by = importlib.import_module(f"probgen.{backend}")
        own = importlib.import_module("probgen.pyro.distributions") if backend == "pyro" else self.dist
        self.WishartCholesky = own.WishartCholesky
        self.xp = importlib.import_module("torch" if backend == "pyro" else "jax.numpy")

    def array(self, values):
        """Numbers in the precision in force."""
        make = self.xp.tensor if self.name == "pyro" else self.xp.array
        return make(np.asarray(values, float).tolist())

    def positive(self, name, values):
        """A positive parameter."""
        return self.param(name, self.array(values), constraint=self.C.positive)

    def program(self, model, guide, **options):
        """The program, learned by the library's ELBO unless told otherwise."""
        return Program(model, guide, by=self.by.ELBO(), **options)


def beta_bernoulli(lib):
    """p_d ~ Beta(2, 3), x_d ~ Bernoulli(p_d)."""
    d = lib.dist

    def model(x):
        p = lib.sample("p", d.Beta(lib.array([2, 1.5]), lib.array([3, 3])).to_event(1))
        with lib.plate("data", len(x)):
            lib.sample("x", d.Bernoulli(p).to_event(1), obs=x)

    def guide(x):
        lib.sample("p", d.Beta(lib.positive("yes", [1, 1]), lib.positive("no", [1, 1])).to_event(1))

    return lib.program(model, guide)


def gamma_poisson(lib, family="Poisson"):
    """λ ~ Gamma(2, 0.5), x ~ Poisson(λ) (or another family with this argument); the guide's rate is 1 / `scale`."""
    d = lib.dist

    def model(x):
        rate = lib.sample("rate", d.Gamma(lib.array(2), lib.array(0.5)))
        with lib.plate("data", len(x)):
            lib.sample("x", getattr(d, family)(rate), obs=x)

    def guide(x):
        lib.sample("rate", d.Gamma(lib.positive("shape", 1), 1 / lib.positive("scale", 1)))

    return lib.program(model, guide)


def dirichlet_categorical(lib):
    """π ~ Dirichlet(0.5, 1, 2), x ~ Categorical(π)."""
    d = lib.dist

    def model(x):
        pi = lib.sample("pi", d.Dirichlet(lib.array([0.5, 1, 2])))
        with lib.plate("data", len(x)):
            lib.sample("x", d.Categorical(pi), obs=x)

    def guide(x):
        lib.sample("pi", d.Dirichlet(lib.positive("counts", [1, 1, 1])))

    return lib.program(model, guide)


def normal_normal(lib, scale=0.7):
    """μ ~ N(1, 2²), x ~ N(μ, 0.7²)."""
    d = lib.dist

    def model(x):
        mu = lib.sample("mu", d.Normal(lib.array(1), lib.array(2)))
        with lib.plate("data", len(x)):
            lib.sample("x", d.Normal(mu, lib.array(scale)), obs=x)

    def guide(x):
        lib.sample("mu", d.Normal(lib.param("loc", lib.array(0)), lib.positive("scale", 1)))

    return lib.program(model, guide)


def normal_gamma(lib):
    """τ ~ Gamma(2, 1.5), μ | τ ~ N(0.5, 1/(0.3 τ)), x ~ N(μ, 1/τ)."""
    d = lib.dist

    def model(x):
        tau = lib.sample("tau", d.Gamma(lib.array(2), lib.array(1.5)))
        mu = lib.sample("mu", d.Normal(lib.array(0.5), (0.3 * tau) ** -0.5))
        with lib.plate("data", len(x)):
            lib.sample("x", d.Normal(mu, tau**-0.5), obs=x)

    def guide(x):
        tau = lib.sample("tau", d.Gamma(lib.positive("a", 1), lib.positive("b", 1)))
        lib.sample("mu", d.Normal(lib.param("m", lib.array(0)), (lib.positive("kappa", 1) * tau) ** -0.5))

    return lib.program(model, guide)


def matrix(lib, tril):
    """L Lᵀ of one factor or many."""
    return tril @ lib.xp.swapaxes(tril, -1, -2)


def normal_wishart(lib, nu=5.0, tril=((0.8, 0.0), (0.3, 0.6)), kappa=0.4, mean=(0.5, -1.0)):
    """Λ ~ Wishart(ν, S Sᵀ), μ | Λ ~ N(m, (κ Λ)⁻¹), x ~ N(μ, Λ⁻¹)."""
    d = lib.dist

    def model(x):
        precision = matrix(lib, lib.sample("tril", lib.WishartCholesky(lib.array(nu), scale_tril=lib.array(tril))))
        mu = lib.sample("mu", d.MultivariateNormal(lib.array(mean), precision_matrix=kappa * precision))
        with lib.plate("data", len(x)):
            lib.sample("x", d.MultivariateNormal(mu, precision_matrix=precision), obs=x)

    def guide(x):
        own = lib.param("S", lib.array(np.eye(2)), constraint=lib.C.lower_cholesky)
        nu = lib.param("nu", lib.array(4), constraint=lib.C.greater_than(1.0))
        precision = matrix(lib, lib.sample("tril", lib.WishartCholesky(nu, scale_tril=own)))
        m = lib.param("m", lib.array([0, 0]))
        lib.sample("mu", d.MultivariateNormal(m, precision_matrix=lib.positive("kappa", 1) * precision))

    return lib.program(model, guide)


def gaussian_mixture(lib, K=3, D=2, alpha=0.7, m0=0.3, kappa0=0.5, a0=1.5, b0=0.8):
    """A diagonal mixture with Dirichlet and Normal-Gamma priors, and a guide as scikit-learn has it: one κ, a per k."""
    d = lib.dist

    def model(x):
        pi = lib.sample("pi", d.Dirichlet(lib.array([alpha] * K)))
        tau = lib.sample("tau", d.Gamma(lib.array(np.full((K, D), a0)), lib.array(b0)).to_event(2))
        mu = lib.sample("mu", d.Normal(lib.array(np.full((K, D), m0)), (kappa0 * tau) ** -0.5).to_event(2))
        with lib.plate("data", len(x)):
            z = lib.sample("z", d.Categorical(pi), infer=MARK)
            lib.sample("x", d.Normal(mu[z], tau[z] ** -0.5).to_event(1), obs=x)

    def guide(x):
        ones = lib.array(np.ones((K, D)))
        lib.sample("pi", d.Dirichlet(lib.positive("alpha", [2] * K)))
        a, kappa = lib.positive("a", [2] * K)[:, None] * ones, lib.positive("kappa", [1] * K)[:, None]
        tau = lib.sample("tau", d.Gamma(a, lib.positive("b", np.ones((K, D)))).to_event(2))
        lib.sample("mu", d.Normal(lib.param("m", lib.array(np.zeros((K, D)))), (kappa * tau) ** -0.5).to_event(2))

    return lib.program(model, guide)


def wishart_mixture(lib, K=3, D=2, alpha=0.7, m0=0.3, kappa0=0.5, nu0=4.0, scale=0.9, tied=False):
    """A full (or tied) mixture with Dirichlet and Normal-Wishart priors, R₀ = I / scale²."""
    d, count = lib.dist, () if tied else (K,)

    def model(x):
        pi = lib.sample("pi", d.Dirichlet(lib.array([alpha] * K)))
        S = lib.array(np.broadcast_to(np.eye(D) * scale, (*count, D, D)))
        own = lib.WishartCholesky(lib.array(np.full(count, nu0)), scale_tril=S)
        precision = matrix(lib, lib.sample("tril", own.to_event(len(count))))
        loc = lib.array(np.full((K, D), m0))
        mu = lib.sample("mu", d.MultivariateNormal(loc, precision_matrix=kappa0 * precision).to_event(1))
        with lib.plate("data", len(x)):
            z = lib.sample("z", d.Categorical(pi), infer=MARK)
            each = precision if tied else precision[z]
            lib.sample("x", d.MultivariateNormal(mu[z], precision_matrix=each), obs=x)

    def guide(x):
        lib.sample("pi", d.Dirichlet(lib.positive("alpha", [2] * K)))
        nu = lib.param("nu", lib.array(np.full(count, D + 1.0)), constraint=lib.C.greater_than(D - 1.0))
        start = lib.array(np.broadcast_to(np.eye(D), (*count, D, D)))
        S = lib.param("S", start, constraint=lib.C.lower_cholesky)
        tril = lib.sample("tril", lib.WishartCholesky(nu, scale_tril=S).to_event(len(count)))
        kappa = lib.positive("kappa", [1] * K)[:, None, None]
        m = lib.param("m", lib.array(np.zeros((K, D))))
        lib.sample("mu", d.MultivariateNormal(m, precision_matrix=kappa * matrix(lib, tril)).to_event(1))

    return lib.program(model, guide)


def bernoulli_mixture(lib, K=2, D=3):
    """Two Bernoulli profiles with Beta priors; which one, by a fair coin that has no prior."""
    d = lib.dist

    def model(x):
        p = lib.sample("p", d.Beta(lib.array(np.full((K, D), 1.2)), lib.array(1.5)).to_event(2))
        with lib.plate("data", len(x)):
            z = lib.sample("z", d.Bernoulli(lib.array(0.5)), infer=MARK)
            which = z.long() if lib.name == "pyro" else z
            lib.sample("x", d.Bernoulli(p[which]).to_event(1), obs=x)

    def guide(x):
        yes, no = lib.positive("yes", np.ones((K, D))), lib.positive("no", np.ones((K, D)))
        lib.sample("p", d.Beta(yes, no).to_event(2))

    return lib.program(model, guide)
