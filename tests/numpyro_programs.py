"""NumPyro programs whose answers are known in closed form, and what it takes to train one in a test."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from scipy import stats

from probgen.data import as_rows
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.fit import Options
from probgen.numpyro import ELBO, Engine, Trained
from probgen.numpyro.leaves import collect, named, to_numpy
from probgen.numpyro.loss import as_loss, as_result
from probgen.numpyro.scope import precision_scope
from probgen.numpyro.trace import as_jax, callables
from probgen.program import Program


def feed(arrays, batch_size=None, seed=0):
    return Feed(as_rows(arrays), Preparation({}, {}), batch_size, seed)


def engine(program, arrays, batch_size=None, by=None, **options):
    options = {"steps": 10, "batch_size": batch_size, "device": "cpu", "precision": "64", **options}
    return Engine(program, by, feed(arrays, batch_size, options.get("seed", 0)), Options(**options))


def trained(program, arrays, weights=None, rows=None, precision="64"):
    if weights is None:
        with precision_scope(precision):
            leaves = collect(program, arrays, 0)
            weights = {name: to_numpy(leaf) for name, leaf in named(leaves.params, leaves.buffers).items()}
    return Trained(program, weights, arrays, rows=rows or len(next(iter(arrays.values()))), precision=precision)


LEAVES = {}  # of every program seen, which is kept so that its id stays its own


def losses(by, program, arrays, number=1, seed=0):
    """Losses per datum of one batch under `number` keys, at the start weights."""
    with precision_scope("64"):
        arrays, loss = as_jax(arrays), as_loss(by)
        leaves = LEAVES.setdefault(id(program), (program, collect(program, arrays, 0)))[1]
        model, guide = callables(program)
        params = {**leaves.constrained(leaves.params), **leaves.buffers}
        one = lambda key: as_result(loss.players(program)["program"].objective(key, params, model, guide, **arrays))  # noqa: E731
        found = jax.jit(jax.vmap(lambda key: one(key)["loss"]))(jax.random.split(jax.random.key(seed), number))
        return np.asarray(found) / len(next(iter(arrays.values())))


def fitted(program, arrays, steps, batch_size=None, **options):
    e = engine(program, arrays, batch_size, steps=steps, **options)
    state, metrics = e.advance(e.start(), 0, steps)
    return e, state, metrics


def linear_gaussian(D=5, Z=2, s=0.7, shift=0.0, wide=1.0, seed=0):
    """z ~ N(0, I), x | z ~ N(Wz + b, s²); the guide is the exact posterior, moved by `shift` and `wide` times as wide.

    Returns the program and log p(x) of rows.
    """
    rng = np.random.default_rng(seed)
    W, b = rng.normal(size=(D, Z)), rng.normal(size=D)
    V = np.linalg.inv(np.eye(Z) + W.T @ W / s**2)
    L = np.linalg.cholesky(V) * wide

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(Z), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z @ W.T + b, s).to_event(1), obs=x)

    def guide(x):
        moved = numpyro.param("moved", jnp.full(Z, shift))
        with numpyro.plate("data", len(x)):
            mean = (x - b) @ W @ V / s**2 + moved
            numpyro.sample("z", dist.MultivariateNormal(mean, scale_tril=L))

    def evidence(x):
        return np.atleast_1d(stats.multivariate_normal(b, W @ W.T + s**2 * np.eye(D)).logpdf(x))

    return Program(model, guide, by=ELBO()), evidence


def mean_field_gaussian(D=5, Z=2, s=0.7, seed=0):
    """The same model with a learned diagonal guide that is not the posterior."""
    program, evidence = linear_gaussian(D, Z, s, seed=seed)

    def guide(x):
        weight = numpyro.param("weight", 0.1 * jnp.ones((D, Z)))
        scale = numpyro.param("scale", 0.8 * jnp.ones(Z), constraint=constraints.positive)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(x @ weight, scale).to_event(1))

    return Program(program.model, guide, by=ELBO()), evidence


def two_layers(a=0.8, s1=0.6, w=1.2, sx=0.5):
    """z_2 ~ N(0, 1), z_1 | z_2 ~ N(a z_2, s1²), x | z_1 ~ N(w z_1, sx²); the guide runs bottom-up and is exact."""
    v1 = a**2 + s1**2
    v1_x = 1 / (1 / v1 + w**2 / sx**2)
    v2_1 = 1 / (1 + a**2 / s1**2)

    def model(x):
        with numpyro.plate("data", len(x)):
            z_2 = numpyro.sample("z_2", dist.Normal(0.0, 1.0))
            z_1 = numpyro.sample("z_1", dist.Normal(a * z_2, s1))
            numpyro.sample("x", dist.Normal(w * z_1, sx), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            z_1 = numpyro.sample("z_1", dist.Normal(v1_x * w * x / sx**2, v1_x**0.5))
            numpyro.sample("z_2", dist.Normal(v2_1 * a * z_1 / s1**2, v2_1**0.5))

    return Program(model, guide, by=ELBO()), lambda x: stats.norm(0, np.sqrt(w**2 * v1 + sx**2)).logpdf(x)


def mixture(K=3, learned=True):
    """y ~ Categorical(π), x | y ~ N(m_y, s_y): the component is enumerated."""
    weights, means, scales = np.array([0.2, 0.5, 0.3]), np.array([-2.0, 0.0, 3.0]), np.array([0.5, 1.0, 0.7])

    def model(x):
        pi = numpyro.param("pi", jnp.asarray(weights), constraint=constraints.simplex) if learned else weights
        mean = numpyro.param("mean", jnp.asarray(means)) if learned else means
        with numpyro.plate("data", len(x)):
            y = numpyro.sample("y", dist.Categorical(pi), infer={"enumerate": "parallel"})
            numpyro.sample(
                "x", dist.Normal(jnp.asarray(mean)[y], scales[y] if not learned else jnp.asarray(scales)[y]), obs=x
            )

    def log_joint(x):
        return np.log(weights) + stats.norm(means, scales).logpdf(np.asarray(x)[:, None])

    return Program(model, by=ELBO()), log_joint
