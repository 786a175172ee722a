"""Trained NumPyro programs against closed forms: weights, posteriors, means, enumerated latents, k-hat."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import markov
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoNormal
from numpyro_programs import fitted, linear_gaussian, losses, mean_field_gaussian, mixture, trained, two_layers
from scipy import stats
from scipy.special import logsumexp

from probgen.numpyro import ELBO, Trained
from probgen.program import Program

X = np.random.default_rng(1).normal(size=(40, 5)) * 1.5
X1 = np.random.default_rng(2).normal(size=50) * 1.5


@pytest.mark.parametrize("make, x", [(linear_gaussian, X), (two_layers, X1)])
def test_every_draw_of_an_exact_posterior_weighs_the_evidence(make, x):
    program, evidence = make()
    t, truth = trained(program, {"x": x}), evidence(x)
    np.testing.assert_allclose(t.log_weights({"x": x}, 30, 0), np.tile(truth, (30, 1)), rtol=0, atol=1e-9)
    np.testing.assert_allclose(t.elbo({"x": x}, 5, 1), np.tile(truth, (5, 1)), rtol=0, atol=1e-9)
    values, log_p, log_q = t.posterior({"x": x}, 6, 2)
    np.testing.assert_allclose(log_p - log_q, np.tile(truth, (6, 1)), rtol=0, atol=1e-9)
    p, q = t.log_joint({"x": x}, {n: v[0] for n, v in values.items()}, 0)
    np.testing.assert_allclose(sum(p.values()) - sum(q.values()), truth, rtol=0, atol=1e-9)
    np.testing.assert_allclose(sum(p.values()), log_p[0], atol=1e-9)
    assert all(v.shape[:2] == (6, len(x)) for v in values.values())


def test_importance_weights_converge_to_the_evidence_in_any_chunks():
    program, evidence = linear_gaussian(shift=0.2, wide=1.3)
    t = trained(program, {"x": X})
    weights = t.log_weights({"x": X}, 5000, 0)
    error = np.exp(weights - evidence(X)).std(0) / np.sqrt(5000)
    gap = np.exp(logsumexp(weights, axis=0) - np.log(5000) - evidence(X)) - 1
    assert (abs(gap) < 5 * error).all()  # false alarms: 40 x 6e-7
    small = trained(program, {"x": X})
    small._chunk = lambda rows: 64
    np.testing.assert_allclose(small.log_weights({"x": X}, 150, 0), weights[:150], rtol=1e-12)
    assert t.log_weights({"x": X[:3]}, 7, 0).shape == (7, 3)


@pytest.mark.nightly
def test_terms_add_up_to_the_elbo_with_global_latents_shared_out():
    x = X1 + 1

    def model(x):
        mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    v = 1 / (1 / 4 + len(x))
    guide = lambda: numpyro.sample("mean", dist.Normal(v * x.sum(), v**0.5))  # noqa: E731
    t = trained(Program(model, guide), {"x": x})
    n = len(x)
    evidence = stats.multivariate_normal(np.zeros(n), np.eye(n) + 4.0).logpdf(x)
    np.testing.assert_allclose(t.elbo({"x": x}, 4, 0).sum(1), evidence, atol=1e-9)  # exact: every draw is the evidence
    assert t.structure.has_global_latents and t.terms({"x": x}, 2, 0)["mean"].shape == (2, n)
    values, log_p, log_q = t.posterior({"x": x}, 2000, 0)
    assert values["mean"].shape == (2000,) and (log_q == 0).all()
    np.testing.assert_allclose(log_p, stats.norm(values["mean"][:, None], 1).logpdf(x), atol=1e-9)
    # sampling takes the global latent from the guide, or, with `prior`, from the model
    draws = np.array([[t.draw(1, s, {"x": x[:1]}, prior)["mean"] for s in range(300)] for prior in (False, True)])
    assert draws[0].std() == pytest.approx(v**0.5, rel=0.25) and draws[1].std() == pytest.approx(2.0, rel=0.25)
    assert draws[0].mean() == pytest.approx(v * x.sum(), abs=0.05)


def test_draws_follow_the_model():
    program, _ = linear_gaussian()
    t = trained(program, {"x": X})
    x = t.draw(40000, 0, {"x": np.zeros((40000, 5))})["x"]
    rng = np.random.default_rng(0)
    W, b = rng.normal(size=(5, 2)), rng.normal(size=5)
    np.testing.assert_allclose(x.mean(0), b, atol=0.06)
    np.testing.assert_allclose(np.cov(x.T), W @ W.T + 0.49 * np.eye(5), atol=0.12)
    z = np.random.default_rng(5).normal(size=(7, 2))
    np.testing.assert_allclose(t.decode({"z": z}, 7, 0, {"x": X[:7]})["x"], z @ W.T + b, atol=1e-10)
    rebuilt = t.reconstruct({"x": X}, 0)["x"]
    assert ((rebuilt - X) ** 2).mean() < ((b - X) ** 2).mean()


def test_enumerated_mixture():
    program, log_joint = mixture()
    t, joint = trained(program, {"x": X1}), log_joint(X1)
    truth = logsumexp(joint, axis=1)
    np.testing.assert_allclose(t.log_weights({"x": X1}, 3, 0), np.tile(truth, (3, 1)), atol=1e-12)
    np.testing.assert_allclose(t.elbo({"x": X1}, 2, 0), np.tile(truth, (2, 1)), atol=1e-12)
    assert t.structure.kind == "exact"
    values, log_p, _ = t.posterior({"x": X1}, 4000, 0)
    np.testing.assert_allclose(log_p[0], truth, atol=1e-12)
    share = np.stack([(values["y"] == k).mean(0) for k in range(3)], 1)
    np.testing.assert_allclose(share, np.exp(joint - truth[:, None]), atol=0.045)  # 5.6 SE: false alarms 3e-6
    # one row alone, and the joint at a given class
    np.testing.assert_allclose(t.log_weights({"x": X1[:1]}, 2, 0), truth[:1] * np.ones((2, 1)), atol=1e-12)
    p, _ = t.log_joint({"x": X1}, {"y": np.full(50, 2)}, 0)
    np.testing.assert_allclose(p["x"] + p["y"], joint[:, 2], atol=1e-12)


@pytest.mark.nightly
def test_a_mixture_with_global_latents_and_an_autoguide():
    def model(x):
        with numpyro.plate("components", 2):
            mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
        with numpyro.plate("data", len(x)):
            y = numpyro.sample("y", dist.Categorical(jnp.array([0.4, 0.6])), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(mean[y], 1.0), obs=x)

    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(-3, 1, 80), rng.normal(2, 1, 120)])
    from numpyro import handlers

    guide = AutoNormal(
        handlers.block(model, hide=["y"]),
        init_loc_fn=numpyro.infer.init_to_value(values={"mean": jnp.array([-1.0, 1.0])}),
    )
    e, state, _ = fitted(Program(model, guide, by=ELBO()), {"x": x}, 1500, 50, lr=0.02)
    t = trained(Program(model, guide), {"x": x[:20]}, e.weights(state), rows=len(x))
    values, log_p, _ = t.posterior({"x": x[:20]}, 500, 0)
    np.testing.assert_allclose(values["mean"].mean(0), [-3, 2], atol=0.3)
    m = values["mean"]
    by_hand = logsumexp(np.log([0.4, 0.6]) + stats.norm(m[:, None], 1).logpdf(x[:20, None]), axis=-1)
    np.testing.assert_allclose(log_p, by_hand, atol=1e-9)
    assert values["y"].shape == (500, 20)


TRANSITION = np.array([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.25, 0.25, 0.5]])
MEANS, START = np.array([-2.0, 0.5, 3.0]), np.array([0.5, 0.3, 0.2])


def forward(x):
    """log p(x) of sequences [B, T] by the forward algorithm."""
    alpha = np.log(START) + stats.norm(MEANS, 1).logpdf(x[:, 0, None])
    for t in range(1, x.shape[1]):
        alpha = logsumexp(alpha[:, :, None] + np.log(TRANSITION), axis=1) + stats.norm(MEANS, 1).logpdf(x[:, t, None])
    return logsumexp(alpha, axis=1)


def hmm_markov(x):
    with numpyro.plate("sequences", len(x), dim=-1):
        state = None
        for t in markov(range(x.shape[1])):
            probs = jnp.asarray(START) if t == 0 else jnp.asarray(TRANSITION)[state]
            state = numpyro.sample(f"z_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            numpyro.sample(f"x_{t}", dist.Normal(jnp.asarray(MEANS)[state], 1.0), obs=x[:, t])


def hmm_scan(x):
    def step(state, value):
        with numpyro.plate("sequences", x.shape[0], dim=-1):
            probs = jnp.asarray(TRANSITION)[state]
            state = numpyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(jnp.asarray(MEANS)[state], 1.0), obs=value)
        return state, None

    with numpyro.plate("sequences", x.shape[0], dim=-1):
        first = numpyro.sample("z_first", dist.Categorical(jnp.asarray(START)), infer={"enumerate": "parallel"})
        numpyro.sample("x_first", dist.Normal(jnp.asarray(MEANS)[first], 1.0), obs=x[:, 0])
    scan(step, first, x[:, 1:].T)


@pytest.mark.parametrize("model", [hmm_markov, hmm_scan])
def test_an_enumerated_hmm_is_the_forward_algorithm(model):
    x = np.random.default_rng(4).normal(0.5, 2.0, size=(6, 7))
    program, truth = Program(model, by=ELBO()), forward(x)
    np.testing.assert_allclose(-losses(ELBO(), program, {"x": x}), truth.mean(), rtol=1e-12)
    t = trained(program, {"x": x})
    np.testing.assert_allclose(t.log_weights({"x": x}, 2, 0), np.tile(truth, (2, 1)), rtol=1e-12)
    assert t.structure.kind == "exact" and t.structure.data_plates == ("sequences",)


def test_the_states_of_an_hmm_are_drawn_from_their_conditional():
    x = np.random.default_rng(4).normal(0.5, 2.0, size=(4, 4))
    t = trained(Program(hmm_markov, by=ELBO()), {"x": x})
    values = t.posterior({"x": x}, 4000, 0)[0]
    paths = np.array(np.meshgrid(*[range(3)] * 4, indexing="ij")).reshape(4, -1)
    log_p = np.log(START)[paths[0]] + sum(np.log(TRANSITION)[paths[i], paths[i + 1]] for i in range(3))
    log_p = log_p + sum(stats.norm(MEANS[paths[i]], 1).logpdf(x[:, i, None]) for i in range(4))
    posterior = np.exp(log_p - logsumexp(log_p, axis=1, keepdims=True))
    for i in range(4):
        expected = np.stack([posterior[:, paths[i] == k].sum(1) for k in range(3)], 1)
        share = np.stack([(values[f"z_{i}"] == k).mean(0) for k in range(3)], 1)
        np.testing.assert_allclose(share, expected, atol=0.045)  # 5.6 SE


@pytest.mark.nightly
def test_rows_come_first_where_scan_puts_time_first():
    # z_t | z_{t-1} ~ N(0.9 z, 0.5), x_t ~ N(z_t, 1): sequences [B, T], the data plate to the right of time
    def model(x):
        def step(z, value):
            with numpyro.plate("data", x.shape[0], dim=-1):
                z = numpyro.sample("z", dist.Normal(0.9 * z, 0.5))
                numpyro.sample("x", dist.Normal(z, 1.0), obs=value)
            return z, None

        scan(step, jnp.zeros(x.shape[0]), x.T)

    def guide(x):
        def step(carry, value):
            with numpyro.plate("data", x.shape[0], dim=-1):
                numpyro.sample("z", dist.Normal(0.3 * value, 0.8))
            return carry, None

        scan(step, 0.0, x.T)

    x = np.random.default_rng(0).normal(size=(9, 4))
    t = trained(Program(model, guide), {"x": x})
    cov = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            cov[i, j] = 0.25 * sum(0.9 ** (i - k + j - k) for k in range(min(i, j) + 1))
    truth = stats.multivariate_normal(np.zeros(4), cov + np.eye(4)).logpdf(x)
    ratios = np.exp(t.log_weights({"x": x}, 20000, 0) - truth)
    assert (abs(ratios.mean(0) - 1) < 5 * ratios.std(0) / np.sqrt(20000)).all()  # false alarms: 9 x 6e-7
    values = t.posterior({"x": x}, 3, 0)[0]
    assert values["z"].shape == (3, 9, 4)
    _, q = t.log_joint({"x": x}, {"z": values["z"][0]}, 0)
    log_q = stats.norm(0.3 * x, 0.8).logpdf(values["z"][0]).sum(1)
    np.testing.assert_allclose(q["z"], log_q, rtol=1e-9)
    np.testing.assert_allclose(t.decode({"z": values["z"][0]}, 9, 0, {"x": x})["x"], values["z"][0])
    assert t.draw(5, 0, {"x": x[:5]})["x"].shape == (5, 4)


@pytest.mark.nightly
def test_a_semi_supervised_vae_with_missing_labels():
    # y ~ Cat(3), z ~ N(0, I), x | y, z; the label −1 is missing; the guide enumerates y there
    W = np.random.default_rng(0).normal(size=(3, 4))

    def model(x, y):
        with numpyro.plate("data", len(x)):
            there = y >= 0
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            with numpyro.handlers.mask(mask=~there):
                hidden = numpyro.sample("y_missing", dist.Categorical(jnp.ones(3) / 3), infer={"enumerate": "parallel"})
            with numpyro.handlers.mask(mask=there):
                numpyro.sample("y", dist.Categorical(jnp.ones(3) / 3), obs=jnp.where(there, y, 0))
            label = jnp.where(there, y, hidden)
            mean = jnp.asarray(W)[label] + z[..., None]
            numpyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x, y):
        logits = numpyro.param("logits", jnp.asarray(W.T * 0.3))
        with numpyro.plate("data", len(x)):
            with numpyro.handlers.mask(mask=y < 0):
                hidden = numpyro.sample(
                    "y_missing", dist.Categorical(logits=x @ logits), infer={"enumerate": "parallel"}
                )
            label = jnp.where(y >= 0, y, hidden)
            residual = x - jnp.asarray(W)[label]
            numpyro.sample("z", dist.Normal(residual.sum(-1) / 5, 0.2**0.5))  # the exact q(z | x, y)

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 4)), np.where(rng.random(30) < 0.5, -1, rng.integers(0, 3, 30))
    cov = np.eye(4) + 1
    given = np.stack([stats.multivariate_normal(np.zeros(4), cov).logpdf(x - W[k]) for k in range(3)], 1)
    truth = np.where(y < 0, logsumexp(given, axis=1), given[np.arange(30), y]) - np.log(3)
    t = trained(Program(model, guide, by=ELBO()), {"x": x, "y": y})
    np.testing.assert_allclose(t.log_weights({"x": x, "y": y}, 3, 0), np.tile(truth, (3, 1)), atol=1e-9)
    q = np.exp(x @ (W.T * 0.3) - logsumexp(x @ (W.T * 0.3), axis=1, keepdims=True))
    elbo = np.where(y < 0, (q * (given - np.log(3) - np.log(q))).sum(1), truth)
    np.testing.assert_allclose(t.elbo({"x": x, "y": y}, 3, 0), np.tile(elbo, (3, 1)), atol=1e-9)
    np.testing.assert_allclose(
        -losses(ELBO(kl="sampled"), Program(model, guide), {"x": x, "y": y}), elbo.mean(), atol=1e-9
    )
    _, _, metrics = fitted(Program(model, guide, by=ELBO()), {"x": x, "y": y}, 200, lr=0.05)
    assert -truth.mean() - 1e-9 <= metrics["loss"][-20:].mean() < -elbo.mean() - 1e-3


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8])
def test_k_hat_of_known_tails(k):
    # ratios w = u^{-k}, u uniform: a Pareto tail of shape k
    program, _ = linear_gaussian()
    t = trained(program, {"x": X[:2]})
    u = np.random.default_rng(0).random((20000, 50))
    found = t.k_hat(-k * np.log(u))
    assert found.shape == (50,)
    assert abs(found.mean() - k) < 0.05  # 50 repeats, SE about 0.008


def test_k_hat_of_a_gaussian_proposal():
    # p = N(0, 1), q = N(0, 1/s²): log w is exponential-tailed with k = 1 − 1/s²
    program, _ = linear_gaussian()
    t, s = trained(program, {"x": X[:2]}), 1.3
    z = np.random.default_rng(1).normal(size=(20000, 50)) / s
    found = t.k_hat(stats.norm(0, 1).logpdf(z) - stats.norm(0, 1 / s).logpdf(z))
    assert abs(found.mean() - (1 - 1 / s**2)) < 0.1  # the tail is Pareto only up to a slowly varying factor


def test_trained_callables_are_numpyro_programs():
    program, _ = mean_field_gaussian()
    t = trained(program, {"x": X}, precision="32")
    draws = Predictive(t.model, guide=t.guide, num_samples=11)(jax.random.key(0), jnp.asarray(X))
    assert draws["x"].shape == (11, 40, 5) or draws["z"].shape == (11, 40, 2)
    assert numpyro.infer.log_likelihood(t.model, {"z": jnp.zeros((3, 40, 2))}, jnp.asarray(X))["x"].shape == (3, 40)
    assert set(t.params) == {"weight", "scale"} and t.params["scale"] == pytest.approx(0.8)
    relations = numpyro.infer.inspect.get_model_relations(t.model, (jnp.asarray(X),))
    assert relations["sample_sample"]["x"] == ["z"]
    with pytest.raises(Exception, match="missing"):
        Trained(program, {"scale": np.ones(2)}, {"x": X}, rows=40)
