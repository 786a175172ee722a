"""The drop-in `SVI`: NumPyro's own numbers, and minibatches and schedules on top."""

import pathlib
import runpy

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import numpyro.infer
import optax
import pytest
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro_programs import engine, trained

from probgen.errors import ProbgenError
from probgen.numpyro import ELBO, IWAE, SVI
from probgen.program import Program
from probgen.schedules import Linear

N = 100
V = np.random.default_rng(3).normal(1.0, 1.0, size=N).astype(np.float32)


def model(v, sd=1.0):
    mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
    with numpyro.plate("data", len(v)):
        numpyro.sample("v", dist.Normal(mean, sd), obs=v)


def guide(v, sd=1.0):
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("scale", 0.5, constraint=constraints.positive)
    numpyro.sample("mean", dist.Normal(loc, scale))


def test_the_same_numbers_as_numpyros_own():
    key = jax.random.key(0)
    for loss in (Trace_ELBO(), ELBO(kl="sampled")):
        own, stock = (
            SVI(model, guide, optax.adam(0.1), loss),
            numpyro.infer.SVI(model, guide, optax.adam(0.1), Trace_ELBO()),
        )
        a, b = own.init(key, V), stock.init(key, V)
        for _ in range(5):
            (a, mine), (b, theirs) = own.update(a, V), stock.update(b, V)
            assert mine == pytest.approx(float(theirs), rel=1e-5)
        assert own.evaluate(a, V) == pytest.approx(float(stock.evaluate(b, V)), rel=1e-5)
        ran, theirs = own.run(key, 50, V), stock.run(key, 50, V, progress_bar=False)
        np.testing.assert_allclose(ran.losses, theirs.losses, rtol=1e-4)
        assert ran.params["loc"] == pytest.approx(float(theirs.params["loc"]), rel=1e-3)
        assert own.get_params(ran.state)["loc"] == ran.params["loc"]


def test_minibatches_stand_for_all_rows_in_an_order_of_epochs():
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(0.05, 4000)), ELBO())
    result = svi.run(jax.random.key(0), 4000, V, batch_size=10)
    assert result.losses.shape == (4000,)
    assert result.params["scale"] == pytest.approx(1 / np.sqrt(N + 0.01), rel=0.15)
    again = svi.run(jax.random.key(0), 4000, V, batch_size=10)
    np.testing.assert_array_equal(result.losses, again.losses)

    # every row once an epoch: at lr = 0 the mean of an epoch's losses is the loss on all rows
    def exact(v):
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal(numpyro.param("m", 0.5), 1.0), obs=v)

    losses = SVI(exact, lambda v: None, optax.sgd(0.0), ELBO()).run(jax.random.key(1), 20, V, batch_size=10).losses
    whole = -dist.Normal(0.5, 1.0).log_prob(V).sum()
    np.testing.assert_allclose(losses.reshape(2, 10).mean(1), [whole, whole], rtol=1e-5)
    assert losses.std() > 0


def test_an_autoguide_and_keyword_arguments():
    svi = SVI(model, AutoNormal(model), optax.adam(0.05), ELBO())
    result = svi.run(jax.random.key(0), 1000, V, batch_size=20, sd=2.0)
    assert result.params["mean_auto_loc"] == pytest.approx(V.mean(), abs=0.15)


def test_an_autoguide_over_a_local_latent_is_refused_under_minibatches():
    def local(v):
        with numpyro.plate("data", len(v)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("v", dist.Normal(z, 1.0), obs=v)

    svi = SVI(local, AutoNormal(local), optax.adam(0.05), ELBO())
    with pytest.raises(ProbgenError, match="one value per row for a latent inside the plate 'data'"):
        svi.run(jax.random.key(0), 10, V, batch_size=20)


def test_losses_of_probgen_run_in_stock_svi_and_schedules_in_ours():
    stock = numpyro.infer.SVI(model, guide, optax.adam(0.05), IWAE(5) + 0.1 * ELBO())
    assert np.isfinite(stock.run(jax.random.key(0), 20, V, progress_bar=False).losses).all()
    # the same draw at every step: the loss is linear in beta, which is read off the optimizer's step
    svi = SVI(model, guide, optax.sgd(0.0), ELBO(beta=Linear(0.0, 1.0, 4)))
    start = svi.init(jax.random.key(0), V)
    at = lambda step: start._replace(optim_state=(jnp.asarray(step), start.optim_state[1]))  # noqa: E731
    found = np.array([jax.jit(svi.evaluate)(at(step), V) for step in range(6)])
    kl = found[5] - found[0]
    assert kl > 1
    np.testing.assert_allclose(found, found[0] + kl * np.array([0, 0.25, 0.5, 0.75, 1, 1]), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(svi.update)(at(2), V)[1], jax.jit(svi.update)(at(2), V)[1])


def test_equinox_modules_train():
    net = eqx.nn.MLP(1, 1, 8, 1, key=jax.random.key(0))
    before = jax.tree.map(lambda a: a, eqx.filter(net, eqx.is_array))
    x = np.linspace(-2, 2, 80)[:, None]

    def program(x, y):
        f = eqx_module("net", net)
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(jax.vmap(f)(x)[:, 0], 0.1), obs=y)

    y = np.sin(2 * x[:, 0])
    e = engine(Program(program), {"x": x, "y": y}, 20, lr=0.01, precision="32")
    state, metrics = e.advance(e.start(), 0, 1500)
    assert metrics["loss"][-1] < 0 < metrics["loss"][0]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, eqx.filter(net, eqx.is_array)))
    assert e.structure.arrays == {"x": "given", "y": "data"}
    t = trained(Program(program), {"x": x, "y": y}, e.weights(state), precision="32")
    np.testing.assert_allclose(t.decode({}, 80, 0, {"x": x, "y": y})["y"], y, atol=0.25)


@pytest.mark.nightly
def test_the_example_runs(monkeypatch, capsys):
    path = pathlib.Path(__file__).parents[1] / "examples" / "svi_numpyro.py"
    source = path.read_text()
    assert source.count("probgen") == 2  # the docstring says which line is changed
    runpy.run_path(str(path), run_name="__main__")
    first, last = (float(w) for w in capsys.readouterr().out.removesuffix(" nats\n").split(": ")[1].split(" → "))
    assert last < 0.6 * first
    assert jnp.zeros(1).dtype == jnp.float32
