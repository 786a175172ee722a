"""The NumPyro engine: minibatches, restoring, buffers, optimizers, refusals, diagnoses."""

import copy

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import torch
from flax import nnx
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.distributions import constraints
from numpyro.infer import RenyiELBO, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from numpyro_programs import engine, fitted, linear_gaussian, mean_field_gaussian, mixture, trained

from probgen.errors import ProbgenError
from probgen.numpyro import ELBO
from probgen.program import Program
from probgen.schedules import Cosine

X = np.random.default_rng(1).normal(size=(40, 5)) * 1.5
N = 200
V = np.random.default_rng(3).normal(1.0, 1.0, size=N)


def normal_mean(states_rows):
    def model(v):
        mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        plate = numpyro.plate("data", N, subsample_size=len(v)) if states_rows else numpyro.plate("data", len(v))
        with plate:
            numpyro.sample("v", dist.Normal(mean, 1.0), obs=v)

    def guide():
        loc = numpyro.param("loc", 0.0)
        scale = numpyro.param("scale", 0.5, constraint=constraints.positive)
        numpyro.sample("mean", dist.Normal(loc, scale))

    return Program(model, guide, by=ELBO())


@pytest.mark.parametrize("states_rows", [False, True])
@pytest.mark.parametrize("batch_size", [None, N // 10, N // 20])
def test_the_posterior_of_a_normal_mean_has_its_width(states_rows, batch_size):
    program = normal_mean(states_rows)
    e, state, _ = fitted(program, {"v": V}, 4000, batch_size, lr=0.05, schedule=Cosine(1, 0.003, 4000), ema=0.99)
    assert e.structure.states_rows == (states_rows and batch_size is not None)
    params = trained(program, {"v": V[: batch_size or N]}, e.weights(state)).params
    assert params["scale"] == pytest.approx(1 / np.sqrt(N + 0.01), rel=0.1)
    assert params["loc"] == pytest.approx(V.mean(), abs=0.5 / np.sqrt(N))


@pytest.mark.parametrize("batch_size", [None, N // 10, N // 20])
@pytest.mark.nightly_on("None")
def test_bayesian_regression_with_an_autoguide(batch_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 2)) @ [[1.0, 0.6], [0.0, 0.8]]
    y = x @ [1.0, -2.0] + 0.5 * rng.normal(size=N)

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 3.0).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    guide = AutoMultivariateNormal(model)
    program = Program(model, guide, by=Trace_ELBO())
    before = dict(vars(guide))
    e, state, _ = fitted(
        program, {"x": x, "y": y}, 4000, batch_size, lr=0.02, schedule=Cosine(1, 0.003, 4000), ema=0.995
    )
    assert vars(guide) == before and guide.prototype_trace is None  # fit leaves the user's guide as it was
    t = trained(program, {"x": x[:10], "y": y[:10]}, e.weights(state), rows=N)
    draws = t.posterior({"x": x[:10], "y": y[:10]}, 4000, 0)[0]["w"]
    truth = np.linalg.inv(x.T @ x / 0.25 + np.eye(2) / 9)
    assert draws.std(0) == pytest.approx(np.sqrt(np.diag(truth)), rel=0.1)
    assert np.corrcoef(draws.T)[0, 1] == pytest.approx(truth[0, 1] / np.sqrt(truth[0, 0] * truth[1, 1]), abs=0.1)


def test_restoring_goes_on_bit_for_bit():
    program, _ = mean_field_gaussian()
    options = {"batch_size": 8, "ema": 0.9, "clip": 1.0, "precision": "32", "schedule": Cosine(1, 0, 100)}
    e = engine(program, {"x": X}, **options)
    state, _ = e.advance(e.start(), 0, 23)
    kept = e.export(state)
    through, metrics = e.advance(state, 23, 60)
    again = engine(program, {"x": X}, **options)
    state, more = again.advance(again.restore({n: a.copy() for n, a in kept.items()}), 23, 30)
    state, rest = again.advance(state, 30, 60)
    for name, array in e.export(through).items():
        assert array.dtype == again.export(state)[name].dtype
        np.testing.assert_array_equal(array, again.export(state)[name], err_msg=name)
    np.testing.assert_array_equal(metrics["loss"], np.concatenate([more["loss"], rest["loss"]]))
    with pytest.raises(ProbgenError, match="does not fit"):
        again.restore({n: a for n, a in kept.items() if "weight" not in n})


def test_fed_batches_are_the_resident_ones_and_chunks_do_not_matter():
    program, _ = mean_field_gaussian()
    a, b = (engine(program, {"x": X}, 8) for _ in range(2))
    b._resident, b.__dict__["_capacity"] = None, 3
    one, m = a.advance(a.start(), 0, 11)
    two, n = b.advance(b.start(), 0, 11)
    np.testing.assert_array_equal(m["loss"], n["loss"])
    np.testing.assert_array_equal(a.weights(one)["weight"], b.weights(two)["weight"])


def test_start_weights_are_a_function_of_the_seed_and_fits_do_not_meet():
    def model(x):
        net = flax_module("net", linen.Dense(5), input_shape=(1, 2))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    def start(seed):
        e = engine(Program(model, guide), {"x": X}, seed=seed, precision="32")
        e.advance(e.start(), 0, 3)
        return e.weights(e.start())["net.kernel"]

    np.testing.assert_array_equal(start(0), start(0))
    assert (start(0) != start(1)).all()
    assert not jax.config.jax_enable_x64


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def batch_normed(module):
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z.sum(-1, keepdims=True), 1.0).expand_by([]).to_event(1), obs=x[:, :1])

    def guide(x):
        net = nnx_module("net", module)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    return Program(model, guide, by=ELBO())


def test_batchnorm_statistics_evolve_in_training_and_rest_in_evaluation():
    module = Normalised(nnx.Rngs(0))
    program, x = batch_normed(module), X + 3
    e, state, _ = fitted(program, {"x": x}, 200, lr=1e-12, precision="32")
    weights = e.weights(state)
    hidden = x @ np.asarray(module.linear.kernel[...]) + np.asarray(module.linear.bias[...])
    np.testing.assert_allclose(weights["net.state.norm.mean"], hidden.mean(0), rtol=1e-4)
    np.testing.assert_allclose(weights["net.state.norm.var"], hidden.var(0), rtol=1e-3)
    np.testing.assert_array_equal(module.norm.mean[...], np.zeros(4))  # the user's module is as it was
    assert module.norm.use_running_average is False and module.dropout.deterministic is False
    # in evaluation a row's posterior does not depend on the rows beside it
    t = trained(program, {"x": x}, weights, precision="32")
    together = t.log_joint({"x": x}, {"z": np.zeros((40, 4))}, 0)[1]["z"]
    alone = t.log_joint({"x": x[:1]}, {"z": np.zeros((1, 4))}, 0)[1]["z"]
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4)
    assert e.loss_on(state, [{"x": x}], 0) == e.loss_on(state, [{"x": x}], 0)
    with pytest.raises(ProbgenError, match="RenyiELBO does not carry the buffers of 'net'"):
        e = engine(program, {"x": x}, by=RenyiELBO(), precision="32")
        e.advance(e.start(), 0, 1)
    stock, state, _ = fitted(program, {"x": x}, 200, lr=1e-12, precision="32", by=Trace_ELBO())
    np.testing.assert_allclose(stock.weights(state)["net.state.norm.mean"], hidden.mean(0), rtol=1e-4)


def test_linen_batchnorm_is_carried_too():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False, momentum=0.9)(x)

    def model(x):
        net = flax_module("net", Net(), input_shape=(3, 5), mutable=["batch_stats"])
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(net(x) * 0, 1.0).to_event(1), obs=x)

    with pytest.raises(ProbgenError, match="read as input to its own site"):
        engine(Program(lambda x: model_reading(x)), {"x": X})

    def guide(x):
        net = flax_module("net", Net(), input_shape=(3, 5), mutable=["batch_stats"])
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(net(x)[:, 0], 1.0))

    def plain(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z[:, None] * jnp.ones(5), 1.0).to_event(1), obs=x)

    e, state, _ = fitted(Program(plain, guide), {"x": X + 2}, 200, lr=1e-12, precision="32")
    np.testing.assert_allclose(e.weights(state)["net.batch_stats.BatchNorm_0.mean"], (X + 2).mean(0), rtol=1e-4)


def model_reading(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(x * 0.5, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad", "rmsprop"])
def test_optimizers_by_name_are_pytorchs(name):
    def model(v):
        w = numpyro.param("w", jnp.array([0.5, -1.0, 2.0]))
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Normal((w**2).sum(), 3.0), obs=v)

    e, state, metrics = fitted(Program(model), {"v": V}, 20, lr=0.03, optimizer=name, clip=0.5)
    w = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    theirs = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop"}[name]
    optimizer, v = getattr(torch.optim, theirs)([w], lr=0.03), torch.tensor(V)
    for _ in range(20):
        optimizer.zero_grad()
        (-torch.distributions.Normal((w**2).sum(), 3.0).log_prob(v).mean()).backward()
        torch.nn.utils.clip_grad_norm_([w], 0.5)
        optimizer.step()
    np.testing.assert_allclose(e.weights(state)["w"], w.detach(), rtol=1e-5)
    assert metrics["grad_norm"][0] > 0.5


def test_an_optax_optimizer_brings_its_own_rate():
    program, _ = mean_field_gaussian()
    _, _, own = fitted(program, {"x": X}, 20, optimizer=optax.adam(0.01), lr=123.0)
    _, _, named = fitted(program, {"x": X}, 20, optimizer="adam", lr=0.01)
    np.testing.assert_allclose(own["loss"], named["loss"], rtol=1e-9)
    with pytest.raises(ProbgenError, match="did you mean 'adam'"):
        engine(program, {"x": X}, optimizer="adm")


def test_nan_is_diagnosed():
    def model(x):
        shift = numpyro.param("shift", 0.0)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(5), 1.0).to_event(1))
            scale = jnp.sqrt(1.0 - shift)  # NaN once shift is above 1
            numpyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.5 * x, 1.0).to_event(1))

    e = engine(Program(model, guide), {"x": X}, lr=0.3, optimizer=optax.sgd(-0.3), clip=1.0)
    start = e.start()
    _, metrics = e.advance(start, 0, 10)
    step = int(np.flatnonzero(~np.isfinite(metrics["loss"]))[0])
    said = e.diagnose(start, step)
    assert said.startswith(f"step {step}: ") and "'x'" in said and "shift" in said, said


def test_refusals():
    def subsampling(v):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(v), subsample_size=5) as rows:
            numpyro.sample("v", dist.Normal(mean, 1.0), obs=v[rows])

    guide = normal_mean(False).guide
    with pytest.raises(ProbgenError, match="batch_size=None"):
        engine(Program(subsampling, guide), {"v": V}, 20)
    e, _, metrics = fitted(Program(subsampling, guide), {"v": V}, 5)
    assert np.isfinite(metrics["loss"]).all() and e.structure.data_plates == ()

    program, _ = linear_gaussian()
    auto = Program(program.model, AutoNormal(program.model))
    with pytest.raises(ProbgenError, match="AutoNormal keeps one value per row for the local latent 'z'"):
        engine(auto, {"x": X}, 8)
    fitted(auto, {"x": X}, 3)  # the whole data at once is fine

    def unplated(v):
        numpyro.sample("v", dist.Normal(numpyro.param("m", 0.0), 1.0), obs=v)

    def coins(v):
        with numpyro.plate("data", len(v)):
            numpyro.sample("v", dist.Bernoulli(numpyro.param("p", 0.5)), obs=v)

    bits = (V > 1) * 1.0
    fitted(Program(coins), {"v": bits}, 3, 20)
    bits[-1] = 1.5
    with pytest.raises(ProbgenError, match=r"the array 'v' holds 1.5, outside the support Boolean\(\) of the site 'v'"):
        engine(Program(coins), {"v": bits}, 20)

    with pytest.raises(ProbgenError, match="no plate as long as the batch"):
        engine(Program(unplated), {"v": V}, 20)
    fitted(Program(unplated), {"v": V}, 3)
    with pytest.raises(ProbgenError, match="bf16-mixed"):
        engine(program, {"x": X}, precision="bf16-mixed")
    with pytest.raises(ProbgenError, match="needs the array 'y'"):
        engine(Program(lambda x, y: None), {"x": X})
    with pytest.raises(ProbgenError, match="device='cuda:7'"):
        engine(program, {"x": X}, device="cuda:7")


def test_autodelta_finds_the_mode():
    program = Program(normal_mean(False).model, AutoDelta(normal_mean(False).model))
    e, state, _ = fitted(program, {"v": V}, 500, 20, lr=0.05, schedule=Cosine(1, 0, 500))
    assert e.weights(state)["mean_auto_loc"] == pytest.approx(V.sum() / (N + 0.01), abs=0.02)


def test_plates_that_only_look_like_the_data():
    # five components and a batch of five: only the plate that follows the batch stands for all rows
    def model(x):
        with numpyro.plate("components", 5):
            loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(loc.mean(), 1.0).expand([1]).to_event(1), obs=x[:, :1])

    e = engine(Program(model, AutoNormal(model)), {"x": X}, 5)
    assert e.structure.data_plates == ("data",)
    assert not e.structure.model["loc"].local and e.structure.model["x"].local
    assert copy.copy(e.structure.arrays) == {"x": "data"}


def test_an_enumerated_mixture_learns():
    program, _ = mixture()
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(-2, 0.5, 100), rng.normal(0.5, 1, 300), rng.normal(3, 0.7, 100)])
    e, state, metrics = fitted(program, {"x": x}, 300, 50, lr=0.01)
    assert metrics["loss"][-50:].mean() < metrics["loss"][:50].mean()
    pi = trained(program, {"x": x}, e.weights(state)).params["pi"]
    np.testing.assert_allclose(pi, [0.2, 0.6, 0.2], atol=0.05)
