"""Small programs whose conditionals are known in closed form, once in Pyro and once in NumPyro.

`programs(backend)` returns functions that make a trained program of plain arrays, in float64.
"""

from types import SimpleNamespace

import numpy as np

K, D = 3, 4
rng = np.random.default_rng(7)
PI = np.array([0.2, 0.5, 0.3])
MU = rng.normal(size=(K, D)) * 2
TRIL = np.tril(rng.normal(size=(K, D, D)) * 0.4) + np.eye(D) * (0.6 + rng.random((K, D, 1)))
SD = 0.5 + rng.random((K, D))
W = rng.normal(size=(K, D, 2))
B = rng.normal(size=D)
BITS = rng.uniform(0.1, 0.9, size=(K, 5))
RATES = rng.uniform(1.0, 9.0, size=(K, 3))


def programs(backend):
    """The programs of one backend by name: each a function of its options that returns a trained program."""
    from probgen.program import Program

    if backend == "pyro":
        import pyro as ppl
        import pyro.distributions as dist
        import torch

        from probgen.pyro import ELBO
        from probgen.pyro.trained import Trained

        def const(a):
            return torch.as_tensor(np.asarray(a), dtype=torch.float64)

        def mul(w, z):
            return (w @ z[..., None])[..., 0]

        def where(z):
            return z.long()

        exp, tanh, zeros = torch.exp, torch.tanh, lambda *shape: torch.zeros(*shape, dtype=torch.float64)
        eye = lambda n: torch.eye(n, dtype=torch.float64)  # noqa: E731
        param = ppl.param
    else:
        import jax.numpy as jnp
        import numpyro as ppl
        import numpyro.distributions as dist

        from probgen.numpyro import ELBO
        from probgen.numpyro.trained import Trained

        const = np.asarray

        def mul(w, z):
            return (w @ z[..., None])[..., 0]

        def where(z):
            return z

        exp, tanh, zeros = jnp.exp, jnp.tanh, lambda *shape: np.zeros(shape)
        const = lambda a: jnp.asarray(np.asarray(a))  # noqa: E731
        eye = np.eye
        param = ppl.param
    marked = {"enumerate": "parallel"}

    def trained(model, guide=None, weights=None, **arrays):
        return Trained(Program(model, guide, by=ELBO()), weights or {}, arrays, rows=20, precision="64")

    def state():
        return ppl.sample("z", dist.Categorical(const(PI)), infer=marked)

    def gmm(covariance):
        def x_given(z):
            mu = const(MU)[z]
            if covariance == "diagonal":
                return dist.Normal(mu, const(SD)[z]).to_event(1)
            if covariance == "tied":
                return dist.MultivariateNormal(mu, scale_tril=const(TRIL[0]))
            return dist.MultivariateNormal(mu, scale_tril=const(TRIL)[z])

        def model(x):
            with ppl.plate("data", len(x)):
                ppl.sample("x", x_given(state()), obs=x)

        return trained(model, x=MU[np.arange(20) % K] + 0.1)

    def factor_analysis(W, sd):
        """z ~ N(0, I), x ~ N(W z + b, diag sd²)."""

        def model(x):
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", dist.Normal(zeros(W.shape[1]), 1.0).to_event(1))
                ppl.sample("x", dist.Normal(mul(const(W), z) + const(B), const(sd)).to_event(1), obs=x)

        def guide(x):
            with ppl.plate("data", len(x)):
                ppl.sample("z", dist.Normal(zeros(W.shape[1]), 1.0).to_event(1))

        return trained(model, guide, x=np.random.default_rng(0).normal(size=(20, D)))

    def mixture_of_factor_analysers():
        def model(x):
            with ppl.plate("data", len(x)):
                s = ppl.sample("s", dist.Categorical(const(PI)), infer=marked)
                z = ppl.sample("z", dist.MultivariateNormal(zeros(2), eye(2)))
                ppl.sample("x", dist.Normal(mul(const(W)[s], z) + const(MU)[s], const(SD)[s]).to_event(1), obs=x)

        def guide(x):
            with ppl.plate("data", len(x)):
                ppl.sample("z", dist.MultivariateNormal(zeros(2), eye(2)))

        return trained(model, guide, x=np.random.default_rng(0).normal(size=(20, D)))

    def chain(T=4):
        """z_1 ~ N(0, 1), z_t ~ N(0.8 z_{t−1} + 0.3, 0.6²), x_t ~ N(1.5 z_t, 0.5²)."""

        def draw_z(x):
            z, zs = None, []
            for t in range(1, T + 1):
                z = ppl.sample(
                    f"z_{t}", dist.Normal(0.0 * x[:, 0] if z is None else 0.8 * z + 0.3, 1.0 if z is None else 0.6)
                )
                zs.append(z)
            return zs

        def model(x):
            with ppl.plate("data", len(x)):
                for t, z in enumerate(draw_z(x)):
                    ppl.sample(f"x_{t + 1}", dist.Normal(1.5 * z, 0.5), obs=x[:, t])

        def guide(x):
            with ppl.plate("data", len(x)):
                draw_z(x)

        return trained(model, guide, x=np.random.default_rng(0).normal(size=(20, T)))

    def bernoulli_mixture():
        def model(x):
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Bernoulli(const(BITS)[state()]).to_event(1), obs=x)

        return trained(model, x=(np.random.default_rng(0).random((20, 5)) < 0.5).astype(np.float64))

    def poisson_mixture():
        def model(x):
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Poisson(const(RATES)[state()]).to_event(1), obs=x)

        return trained(model, x=np.random.default_rng(0).poisson(4, size=(20, 3)))

    def labelled():
        """A class y that is data, x given y: either can be known."""

        def model(x, y):
            with ppl.plate("data", len(x)):
                y = ppl.sample("y", dist.Categorical(const(PI)), obs=y)
                x = ppl.sample("x", dist.Normal(const(MU)[where(y)], const(SD)[where(y)]).to_event(1), obs=x)
            ppl.deterministic("total", x.sum(-1))

        return trained(model, x=np.random.default_rng(0).normal(size=(20, D)), y=np.arange(20) % K)

    def conditional():
        """x given an array c: a mixture whose means move with it."""

        def model(x, c):
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Normal(const(MU)[state()] + c[:, None], 1.0).to_event(1), obs=x)

        return trained(model, x=np.random.default_rng(0).normal(size=(20, D)), c=np.linspace(-1, 1, 20))

    def vae(kind):
        def model(x):
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", dist.Normal(zeros(2), 1.0).to_event(1))
                h = mul(const(W[0]), z)
                if kind == "tanh":
                    x_given = dist.Normal(tanh(h), 0.5)
                elif kind == "scale":
                    x_given = dist.Normal(h, exp(0.1 * h))
                else:
                    x_given = dist.Bernoulli(logits=h)
                ppl.sample("x", x_given.to_event(1), obs=x)

        def guide(x):
            with ppl.plate("data", len(x)):
                ppl.sample("z", dist.Normal(zeros(2), 1.0).to_event(1))

        return trained(model, guide, x=(np.random.default_rng(0).random((20, D)) < 0.5).astype(np.float64))

    def robust():
        """A Gamma latent: neither enumerable nor Gaussian."""

        def model(x):
            with ppl.plate("data", len(x)):
                tau = ppl.sample("tau", dist.Gamma(const(2.0), const(2.0)))
                ppl.sample("x", dist.Normal(zeros(D), tau[..., None] ** -0.5).to_event(1), obs=x)

        def guide(x):
            with ppl.plate("data", len(x)):
                ppl.sample("tau", dist.Gamma(const(2.0), const(2.0)))

        return trained(model, guide, x=np.random.default_rng(0).normal(size=(20, D)))

    def common_mean():
        """θ ~ N(0, 2²) shared by all data, x_n ~ N(θ, I₂), with the exact posterior of the data as guide."""
        x = np.random.default_rng(3).normal(size=(2, 2)) + 1.0
        v = 1 / (1 / 4 + x.size)
        centre = float(v * x.sum())

        def model(x):
            theta = ppl.sample("theta", dist.Normal(const(0.0), 2.0))
            with ppl.plate("data", len(x)):
                ppl.sample("x", dist.Normal(theta + zeros(2), 1.0).to_event(1), obs=x)

        def guide(x):
            ppl.sample("theta", dist.Normal(const(centre), v**0.5))

        return SimpleNamespace(trained=trained(model, guide, x=x), mean=centre, variance=v)

    return SimpleNamespace(**{name: value for name, value in locals().items() if callable(value)})
