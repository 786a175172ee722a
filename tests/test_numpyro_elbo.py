"""NumPyro's bounds against closed forms, and against NumPyro's own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro_programs import engine, linear_gaussian, losses, mean_field_gaussian, mixture, trained, two_layers
from scipy.special import logsumexp

from probgen.errors import ProbgenError
from probgen.numpyro import ELBO, IWAE, Loss
from probgen.numpyro.loss import as_loss
from probgen.program import Player, Program
from probgen.schedules import Linear

X = np.random.default_rng(1).normal(size=(40, 5)) * 1.5
X1 = np.random.default_rng(2).normal(size=50) * 1.5


@pytest.mark.parametrize("by", [ELBO(kl="sampled"), IWAE(1), IWAE(7), Trace_ELBO(), RenyiELBO(num_particles=3)])
@pytest.mark.parametrize("make, x", [(linear_gaussian, X), (two_layers, X1)])
def test_where_the_guide_is_the_posterior_every_draw_is_the_evidence(by, make, x):
    program, evidence = make()
    np.testing.assert_allclose(-losses(by, program, {"x": x}, 10), evidence(x).mean(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("by", [ELBO(kl="sampled"), IWAE(3), RenyiELBO(num_particles=3)])
def test_a_minibatch_stands_for_all_rows(by):
    program, evidence = two_layers()
    e = engine(program, {"x": X1}, 8, by=by)
    _, metrics = e.advance(e.start(), 0, 6)
    np.testing.assert_allclose(-metrics["loss"], evidence(X1)[e.feed.indices(0, 6)].mean(1), rtol=0, atol=1e-9)


def test_analytic_kl_is_used_where_exact_and_nowhere_else():
    program, evidence = two_layers()
    assert engine(program, {"x": X1}).structure.analytic_kl() == ("z_2",)  # z_1 is drawn before its parent z_2
    bound = -losses(ELBO(), program, {"x": X1}, 1000)
    assert abs(bound.mean() - evidence(X1).mean()) < 4 * bound.std() / np.sqrt(1000)  # false alarms: 6e-5
    program, evidence = mean_field_gaussian()
    exact, sampled = (losses(ELBO(kl=kl), program, {"x": X}, 800) for kl in ("analytic", "sampled"))
    se = np.hypot(exact.std(), sampled.std()) / np.sqrt(800)
    assert abs(exact.mean() - sampled.mean()) < 4 * se  # false alarms: 6e-5
    assert abs(exact - sampled).max() > 1e-3
    np.testing.assert_allclose(exact, losses(TraceMeanField_ELBO(), program, {"x": X}, 800), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Failed to verify mean field")
def test_a_mean_field_elbo_is_refused_where_it_is_biased():
    program, evidence = two_layers()
    with pytest.raises(ProbgenError, match=r"TraceMeanField_ELBO.*z_1"):
        engine(program, {"x": X1}, by=TraceMeanField_ELBO())
    # the number it would give: site-by-site KLs are off by far more than their noise
    biased = losses(TraceMeanField_ELBO(), program, {"x": X1}, 20).mean()
    assert abs(-biased - evidence(X1).mean()) > 0.1


def test_bounds_are_ordered():
    program, evidence = mean_field_gaussian()
    bounds = [-losses(by, program, {"x": X}, 400) for by in (ELBO(), IWAE(1), IWAE(5), IWAE(50))]
    truth = evidence(X).mean()
    means, errors = np.array([b.mean() for b in bounds]), np.array([b.std() / 20 for b in bounds])
    assert abs(means[0] - means[1]) < 4 * np.hypot(*errors[:2])
    assert means[1] < means[2] < means[3]
    assert (means <= truth + 4 * errors).all()
    assert means[3] > means[1] + 0.1


@pytest.mark.parametrize(
    "stock, own",
    [
        (Trace_ELBO(), ELBO(kl="sampled")),
        (Trace_ELBO(num_particles=4), ELBO(4, kl="sampled")),
        (TraceMeanField_ELBO(), ELBO()),
        (TraceGraph_ELBO(), ELBO(kl="sampled")),
    ],
)
def test_the_same_losses_as_numpyros_own(stock, own):
    program, _ = mean_field_gaussian()
    a, b = (losses(by, program, {"x": X}, 5) for by in (stock, own))
    np.testing.assert_allclose(a, b, rtol=1e-12)


def test_an_enumerated_mixture_is_its_marginal_likelihood():
    program, log_joint = mixture()
    truth = logsumexp(log_joint(X1), axis=1)
    for by in (ELBO(), IWAE(1), IWAE(3), TraceEnum_ELBO()):
        np.testing.assert_allclose(-losses(by, program, {"x": X1}), truth.mean(), atol=1e-12)
    for by in (ELBO(), TraceEnum_ELBO()):
        e = engine(program, {"x": X1}, 10, by=by, lr=1e-12)
        _, metrics = e.advance(e.start(), 0, 5)
        np.testing.assert_allclose(-metrics["loss"], truth[e.feed.indices(0, 5)].mean(1), atol=1e-10)


def test_enumeration_in_the_guide_is_an_exact_expectation():
    # y ~ Bernoulli, z | y ~ N, x | z, y ~ N; the guide enumerates y and draws z given y
    def model(x):
        with numpyro.plate("data", len(x)):
            y = numpyro.sample("y", dist.Bernoulli(0.3))
            z = numpyro.sample("z", dist.Normal(y * 2.0, 0.7))
            numpyro.sample("x", dist.Normal(z - y, 0.5), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            y = numpyro.sample("y", dist.Bernoulli(logits=x), infer={"enumerate": "parallel"})
            numpyro.sample("z", dist.Normal(0.6 * x + y, 0.5 + 0.1 * y))

    program = Program(model, guide, by=ELBO())
    own, stock = (losses(by, program, {"x": X1}, 3000) for by in (ELBO(kl="sampled"), TraceEnum_ELBO()))
    assert abs(own.mean() - stock.mean()) < 4 * np.hypot(own.std(), stock.std()) / np.sqrt(3000)  # false alarms: 6e-5
    sampled = Program(model, lambda x: guide_without_marks(x), by=ELBO())

    def guide_without_marks(x):
        with numpyro.plate("data", len(x)):
            y = numpyro.sample("y", dist.Bernoulli(logits=x))
            numpyro.sample("z", dist.Normal(0.6 * x + y, 0.5 + 0.1 * y))

    drawn = losses(ELBO(kl="sampled"), sampled, {"x": X1}, 3000)
    assert abs(own.mean() - drawn.mean()) < 4 * np.hypot(own.std(), drawn.std()) / np.sqrt(3000)
    # importance weights that sum y out: log mean weight → log p(x), by quadrature over z
    z = np.linspace(-8, 10, 4001)
    log_p = [
        logsumexp(
            [
                np.log(p) + dist.Normal(y * 2.0, 0.7).log_prob(z) + dist.Normal(z - y, 0.5).log_prob(x)
                for y, p in ((0, 0.7), (1, 0.3))
            ]
        )
        + np.log(z[1] - z[0])
        for x in X1[:6]
    ]
    weights = trained(program, {"x": X1[:6]}).log_weights({"x": X1[:6]}, 20000, 0)
    estimate = logsumexp(weights, axis=0) - np.log(20000)
    np.testing.assert_allclose(estimate, log_p, atol=0.03)


def test_score_function_gradients_are_unbiased():
    # b ~ Bernoulli(1/2), x | b ~ N(b, 1), q(b) = Bernoulli(σ(φ)): the gradient in φ is known
    def model(x):
        with numpyro.plate("data", len(x)):
            b = numpyro.sample("b", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        phi = numpyro.param("phi", jnp.array(0.4))
        with numpyro.plate("data", len(x)):
            numpyro.sample("b", dist.Bernoulli(logits=phi))

    x = jnp.array([1.3, -0.4, 0.9])
    q = jax.nn.sigmoid(0.4)

    def exact(q):
        bound = lambda b: jnp.log(0.5) + dist.Normal(b, 1.0).log_prob(x)  # noqa: E731
        return -(q * (bound(1.0) - jnp.log(q)) + (1 - q) * (bound(0.0) - jnp.log1p(-q))).sum()

    truth = jax.grad(exact)(q) * q * (1 - q)
    loss = lambda phi, key: ELBO(kl="sampled").loss(key, {"phi": phi}, model, guide, x)  # noqa: E731
    grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(0.4, jax.random.split(jax.random.key(0), 20000))
    assert abs(grads.mean() - truth) < 4 * grads.std() / np.sqrt(20000)  # false alarms: 6e-5
    bound = lambda phi, key: IWAE(3).loss(key, {"phi": phi}, model, guide, x)  # noqa: E731
    keys = jax.random.split(jax.random.key(1), 40000)
    grads = jax.jit(jax.vmap(jax.grad(bound), in_axes=(None, 0)))(0.4, keys)
    values = jax.jit(jax.vmap(bound, in_axes=(None, 0)))
    numeric = (values(0.45, keys) - values(0.35, keys)) / 0.1
    assert abs(grads.mean() - numeric.mean()) < 4 * np.hypot(grads.std(), numeric.std()) / 200


def test_beta_and_free_bits():
    program, _ = mean_field_gaussian()
    e = engine(program, {"x": X}, by=ELBO(beta=Linear(0.0, 2.0, 4)), lr=1e-12)
    _, metrics = e.advance(e.start(), 0, 6)
    beta = np.array([0, 0.5, 1, 1.5, 2, 2])
    np.testing.assert_allclose(metrics["loss"], -metrics["term/x"] - beta * metrics["term/z"], rtol=1e-12)
    kl, plain = -metrics["term/z"][0], losses(ELBO(), program, {"x": X}, 2)
    for free, more in ((kl * 2, kl), (kl / 2, 0.0)):
        np.testing.assert_allclose(losses(ELBO(free_bits=float(free)), program, {"x": X}, 2), plain + more, rtol=1e-9)


def test_losses_add_and_scale():
    program, _ = mean_field_gaussian()

    def weight_decay(rng_key, params, model, guide, **arrays):
        return (params["weight"] ** 2).sum()

    def mine(rng_key, params, model, guide, **arrays):
        return Trace_ELBO().loss(rng_key, params, model, guide, **arrays)

    sampled = losses(ELBO(kl="sampled"), program, {"x": X}, 3)
    np.testing.assert_allclose(losses(mine, program, {"x": X}, 3), sampled, rtol=1e-12)
    total = losses(ELBO(kl="sampled") + weight_decay, program, {"x": X}, 3)
    np.testing.assert_allclose(total, sampled + 10 * 0.1**2 / len(X), rtol=1e-10)
    twice = losses(0.5 * (ELBO(kl="sampled") * 2) + 0 * as_loss(weight_decay), program, {"x": X}, 3)
    np.testing.assert_allclose(twice, sampled, rtol=1e-12)
    warm = Linear(0.0, 1.0, 2) * ELBO(kl="sampled")
    for step, factor in ((0, 0.0), (1, 0.5), (5, 1.0)):
        np.testing.assert_allclose(losses(warm.at(step), program, {"x": X}, 3), factor * sampled, rtol=1e-12)


def test_players_are_updated_in_turn_and_detach_each_other():
    def model(x):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def critic(x):
        return numpyro.param("height", 1.0)

    class Two(Loss):
        def players(self, program):
            first = lambda key, params, model, guide, **a: len(X1) * params["mean"] * params["height"]  # noqa: E731
            second = lambda key, params, model, guide, **a: -len(X1) * params["mean"] * params["height"]  # noqa: E731
            return {"generator": Player((program.model,), first), "critic": Player((critic,), second, updates=2)}

    e = engine(Program(model, by=Two()), {"x": X1}, 10, lr={"generator": 0.1, "critic": 0.01}, optimizer="sgd")
    assert e.batches_per_step == 3
    state, _ = e.advance(e.start(), 0, 1)
    weights = e.weights(state)
    # sgd on the gradient per datum: mean −= 0.1 · height; then twice height += 0.01 · mean
    np.testing.assert_allclose([weights["mean"], weights["height"]], [-0.1, 1 - 2 * 0.01 * 0.1])


def test_refusals():
    program, _ = linear_gaussian()
    with pytest.raises(ProbgenError, match="num_particles"):
        ELBO(0)
    with pytest.raises(ProbgenError, match="neither a guide nor enumeration"):
        engine(Program(program.model, by=ELBO()), {"x": X})
    with pytest.raises(ProbgenError, match="does not say"):
        ELBO(beta=Linear(0, 1, 10)).loss(jax.random.key(0), {}, program.model, program.guide, X)
    with pytest.raises(ProbgenError, match="is not a loss"):
        engine(program, {"x": X}, by=3)
