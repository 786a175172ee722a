"""Diffusion on NumPyro: what the core's formulas are in JAX, held to torch, to closed forms and to the twin program."""

from __future__ import annotations

import math
import os
import re

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # most of the time is compiling

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import torch
from numpyro import handlers
from numpyro.contrib.module import flax_module

import probgen
import probgen.numpyro
import probgen.pyro
from probgen.arrays import namespace
from probgen.check.subject import Subject
from probgen.diffusion import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    CosineSchedule,
    DPMSolver,
    Euler,
    GeometricSchedule,
    Heun,
    LearnedSchedule,
    LinearSchedule,
    PredictorCorrector,
    RectifiedSchedule,
    StochasticHeun,
    SubVPSchedule,
)
from probgen.diffusion.denoiser import PREDICTIONS, target
from probgen.errors import ProbgenError
from probgen.numpyro import ELBO, Denoiser, DenoisingScoreMatching, DiffusionELBO, FlowMatching
from probgen.numpyro.diffusion_elbo import drawn_steps
from probgen.numpyro.distributions import DiscretizedGaussian
from probgen.numpyro.flow_matching import assignment
from probgen.numpyro.nn import DenoisingMLP, UNet
from probgen.numpyro.probability_flow import log_density
from probgen.numpyro.samplers import sampled
from probgen.numpyro.trace import DataPlate
from probgen.pyro import probability_flow as in_torch_flow
from probgen.pyro import samplers as in_torch_samplers
from probgen.pyro.distributions import DiscretizedGaussian as InTorch
from probgen.pyro.nn import DenoisingMLP as MLPInTorch
from probgen.pyro.nn import UNet as UNetInTorch
from probgen.zoo import options_of

KEY = jax.random.key(0)
SCHEDULES = {
    "linear": LinearSchedule(),
    "cosine": CosineSchedule(),
    "geometric": GeometricSchedule(),
    "sub-VP": SubVPSchedule(),
    "rectified": RectifiedSchedule(),
    "learned": None,
}


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


def schedule_in(name, array):
    """A schedule whose parameters, if it has any, are of a library."""
    return SCHEDULES[name] or LearnedSchedule(array(np.array([-8.0, 7.0])), array(np.linspace(-1, 1, 5)))


def draws(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# -- the core in JAX -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs(name):
    """α, σ, their derivatives, λ and the steps between two times, traced: ≤ 1e-12 of torch's."""
    s, t = np.linspace(0.01, 0.8, 9), np.linspace(0.1, 1.0, 9)

    def values(schedule, s, t):
        at_t = [getattr(schedule, f)(t) + 0 * t for f in ("alpha", "sigma", "alpha_rate", "sigma_rate", "log_snr")]
        return [*at_t, schedule.fresh(s, t), *schedule.between(s, t)]

    ours = jax.jit(lambda s, t: values(schedule_in(name, jnp.asarray), s, t))(s, t)
    theirs = values(schedule_in(name, torch.tensor), torch.tensor(s), torch.tensor(t))
    np.testing.assert_allclose(np.stack(ours), torch.stack(theirs).numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_predictions_are_one(predicts):
    """A network that knows x and ε, whatever it is asked for, is read as x, ε, their score and their velocity."""
    names = [
        n for n in SCHEDULES if n != "rectified" or predicts not in ("noise", "score")
    ]  # of pure noise these say nothing

    def said(schedule, x, noise, t):
        chain = Denoiser(lambda x_t, t: target(schedule, predicts, x, noise, t), schedule, predicts, 10)
        found = chain(chain.noised(x, t, noise), t)
        others = [target(schedule, other, x, noise, t) for other in ("score", "velocity")]
        return (found.data, found.noise, found.score, found.velocity), (x, noise, *others)

    given = draws(6, 3), draws(6, 3, seed=1), np.linspace(0.1, 0.9, 6)
    for name, (found, true) in jax.jit(lambda *g: {n: said(schedule_in(n, jnp.asarray), *g) for n in names})(
        *given
    ).items():
        np.testing.assert_allclose(np.stack(found), np.stack(true), atol=1e-9, err_msg=name)


def rough(outputs=1):
    """Any network, far from the best, for both libraries."""
    weight = draws(3, 2 * outputs, seed=3)

    def network(x, t):
        xp = namespace(x)
        out = xp.tanh((xp.stack([x[:, 0], x[:, 1], t], -1)) @ xp.asarray(weight))
        return out.reshape(len(x), 2, outputs) if outputs > 1 else out

    return network


def both(variance="beta", levels=None, schedule="linear", predicts="v", steps=6):
    """The same chain in JAX and in torch."""
    network = rough(2 if variance == "learned" else 1)
    return [
        cls(network, schedule_in(schedule, array), predicts, steps, variance, levels)
        for cls, array in ((Denoiser, jnp.asarray), (probgen.pyro.Denoiser, torch.tensor))
    ]


@pytest.mark.parametrize(
    ("variance", "schedule", "levels"),
    [("beta", "linear", None), ("posterior", "learned", None), ("learned", "cosine", 9), ("beta", "sub-VP", None)],
)
def test_the_chains_are_torchs(variance, schedule, levels):
    """Prior, noising step, reverse step and p(x | x_1): the same log densities at the same places."""
    ours, theirs = both(variance, levels, schedule)
    x, other = np.round(np.abs(4 * draws(5, 2))).clip(0, 8), draws(5, 2, seed=1)

    def densities(chain, a, b, c):
        fns = (chain.prior(a), chain.forward(b, 0.5), chain.forward(b, 0.5, 0.0), chain.reverse(b, 0.5))
        assert all(fn.event_shape == (2,) for fn in fns)
        return [*(fn.log_prob(c) for fn in fns), chain.decoder(b).log_prob(a)]

    given = x, other, draws(5, 2, seed=2)
    found = jax.jit(lambda *given: densities(ours, *given))(*given)
    np.testing.assert_allclose(found, torch.stack(densities(theirs, *map(torch.tensor, given))), rtol=1e-9)


def test_restored_and_embedded_are_inverse():
    chain = Denoiser(None, CosineSchedule(), levels=17)
    x = jnp.arange(17.0)
    np.testing.assert_array_equal(chain.restored(chain.embed(x) + 0.02), x)
    np.testing.assert_array_equal(chain.restored(jnp.array([-3.0, 3.0])), [0.0, 16.0])


# -- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["beta", "learned"])
def test_the_loss_of_a_step_is_torchs(variance):
    """At the same rows, steps and noise, term by term."""
    ours, theirs = both(variance, 9 if variance == "learned" else None)
    data = np.round(np.abs(4 * draws(12, 2))).clip(0, 8)
    noise, step, weight = draws(12, 2, seed=1), np.arange(12.0) % 6 + 1, np.linspace(1, 3, 12)

    def found(loss, chain, data, *given):
        weighted = {w: loss(w, min_snr=0.3) for w in ("vlb", "simple", "snr", "min-snr")}
        return {w: by.of_step(chain, data, chain.embed(data), *given) for w, by in weighted.items()}

    a = jax.jit(lambda *given: found(DiffusionELBO, ours, *given))(data, noise, step, weight)
    b = found(probgen.pyro.DiffusionELBO, theirs, *map(torch.tensor, (data, noise, step, weight)))
    for weighting, (losses, terms) in a.items():
        np.testing.assert_allclose(losses, b[weighting][0], rtol=1e-9, err_msg=weighting)
        assert terms.keys() == b[weighting][1].keys() and len(terms) == 3 * (weighting == "vlb")
        for name, term in terms.items():
            np.testing.assert_allclose(term, b[weighting][1][name], rtol=1e-9, atol=1e-12)


def pair(chain):
    """Model and guide of a chain, as models/diffusion/ddpm_numpyro.py has them."""
    T = chain.steps

    def model(x):
        with numpyro.plate("data", len(x)):
            x_t = numpyro.sample(f"x_{T}", chain.prior(x))
            for t in range(T, 1, -1):
                x_t = numpyro.sample(f"x_{t - 1}", chain.reverse(x_t, t / T))
            numpyro.sample("x", chain.decoder(x_t), obs=x)

    def guide(x):
        x_t = chain.embed(x)
        with numpyro.plate("data", len(x)):
            for t in range(1, T + 1):
                x_t = numpyro.sample(f"x_{t}", chain.forward(x_t, t / T))

    return model, guide


def test_diffusion_elbo_is_the_elbo_of_the_chain():
    """In expectation, through model and guide and `ELBO`: within 4 SE of each other (false alarm 6e-5)."""
    chain, rows = both("learned")[0], 400
    x = jnp.broadcast_to(draws(1, 2), (rows, 2))
    keys = jax.random.split(KEY, 60)
    whole = jax.jit(jax.vmap(lambda key: ELBO().loss(key, {}, *pair(chain), x=x) / rows))(keys)
    for proposal in ("uniform", "importance"):
        loss = DiffusionELBO(proposal=proposal)
        fast = jax.jit(jax.vmap(lambda key, loss=loss: loss.of_rows(chain, x, key)[0].mean()))(keys)
        error = math.sqrt((whole.var() + fast.var()) / len(keys))
        assert error < 0.1 and abs(float(whole.mean() - fast.mean())) < 4 * error


def test_elbo_of_the_best_denoiser_is_entropy_and_one_kl():
    """E[−ELBO] = ½ log 2πeC + KL(q(x_T) ‖ p(x_T)), draw by draw, through the model, the guide and `ELBO` itself."""
    schedule, c, mean = LinearSchedule(), 0.25, 0.6

    def network(x_t, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return mean + alpha * c / (alpha**2 * c + sigma**2) * (x_t - alpha * mean)

    def variance(t, s):
        fresh, sigma_t = schedule.fresh(s, t), schedule.sigma(t)
        unknown = c * sigma_t**2 / (schedule.alpha(t) ** 2 * c + sigma_t**2)
        return fresh * schedule.sigma(s) ** 2 + (schedule.alpha(s) * fresh) ** 2 * unknown

    model, guide = pair(Denoiser(network, schedule, "data", 12, variance))
    x = mean + math.sqrt(c) * draws(50, 1)
    loss = jax.jit(lambda x: ELBO(kl="sampled").loss(KEY, {}, model, guide, x=x))(x)
    seeded = handlers.seed(guide, jax.random.split(KEY)[1])
    drawn = jax.jit(lambda x: handlers.trace(seeded).get_trace(x=x)["x_12"]["value"])(x)
    alpha, sigma = schedule.alpha(1.0), schedule.sigma(1.0)
    marginal = dist.Normal(alpha * mean, math.sqrt(alpha**2 * c + sigma**2))
    true = dist.Normal(mean, c**0.5).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(drawn) - marginal.log_prob(drawn)
    assert abs(float(loss + true.sum())) < 1e-9 * 50


def test_steps_are_drawn_by_their_chances():
    """Rows lie evenly: each step has its share of them, but for one row, and Σ 1 / chance counts the steps."""
    chances = np.array([0.5, 0.1, 0.4])
    step, weight = drawn_steps(chances, jnp.zeros(30_000), KEY)
    shares = np.bincount(np.asarray(step, int), minlength=4)[1:] / len(step)
    assert np.allclose(shares, chances, atol=1e-4) and abs(float(weight.mean()) - 3) < 1e-3
    others = jax.vmap(lambda key: drawn_steps(np.full(4, 0.25), jnp.zeros(4), key)[0])(jax.random.split(KEY, 8))
    assert len(set(others[:, 0].tolist())) > 1


@pytest.mark.parametrize("states", [False, True])
def test_a_minibatch_stands_for_all_rows(states):
    """The engine's loss is per datum whatever the batch, also of a program whose plate says N itself."""
    x = draws(64, 2).astype(np.float32)

    def denoiser(x):
        return Denoiser(lambda x_t, t: numpyro.param("w", jnp.zeros(())) * x_t, CosineSchedule(), "noise", 4)

    def model(x):
        with numpyro.plate("data", 64 if states else len(x), subsample_size=len(x) if states else None):
            numpyro.sample("x_1", denoiser(x).prior(x))
            numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)

    def guide(x):
        with numpyro.plate("data", 64 if states else len(x), subsample_size=len(x) if states else None):
            numpyro.sample("x_1", denoiser(x).forward(x, 1.0, 0.0))

    program = probgen.Program(model, guide, by=DiffusionELBO("simple"), denoiser=denoiser)
    run = probgen.fit(program, {"x": x}, steps=200, batch_size=8, lr=1e-9, progress=False)
    assert abs(run.metrics["loss"][-1] - 1) < 0.3  # the mean of ε² over 100 steps or more: 4 SE are 0.14
    assert probgen.numpyro.trace.rows_factor(DataPlate(model, (), 64), 8) == 8


# -- whole numbers ---------------------------------------------------------------------------------------------------


def test_discretized_gaussian_is_torchs():
    """log P(k), mean and variance; masses sum to one; and draws by their shares (4 SE, false alarm 1e-2 over all bins)."""
    loc, scale, k = np.array([-1.3, -0.2, 0.99]), np.array([[1e-3], [0.4], [30.0]]), np.arange(17.0)[:, None, None]
    ours, theirs = DiscretizedGaussian(loc, scale, 17), InTorch(torch.tensor(loc), torch.tensor(scale), 17)
    told = jax.jit(lambda fn, k: (fn.log_prob(k), fn.mean, fn.variance, fn.sample(KEY, (20_000,))))  # it is a pytree
    log_mass, mean, variance, drawn = told(ours, k)
    np.testing.assert_allclose(log_mass, theirs.log_prob(torch.tensor(k)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(jax.nn.logsumexp(log_mass, 0), 0, atol=1e-12)
    np.testing.assert_allclose(mean, theirs.mean, rtol=1e-9)
    np.testing.assert_allclose(variance, theirs.variance, atol=1e-9)
    shares, mass = np.stack([(drawn == i).mean(0) for i in range(17)]), np.exp(log_mass)
    assert (np.abs(shares - mass) < 4 * np.sqrt(mass / 20_000) + 1e-9).all()


def test_discretized_gaussian_has_gradients_far_away():
    given = jnp.array([255.0, 0.0])
    grad = jax.jit(jax.grad(lambda m: DiscretizedGaussian(m, 0.5, 256).log_prob(given).sum()))
    found = grad(jnp.array([-40.0, 40.0]))
    assert jnp.isfinite(found).all() and (jnp.abs(found) > 1).all()


# -- samplers --------------------------------------------------------------------------------------------------------


def mixture(schedule, means, variances, weights, predicts="noise", steps=1000, of=Denoiser):
    """The exact denoiser of Σ_k w_k N(m_k, v_k I), means [K, D], on either library's arrays."""
    means, variances, weights = (np.asarray(v, np.float64) for v in (means, variances, weights))

    def network(x_t, t):
        xp = namespace(x_t)
        m, v, w = (xp.asarray(a) for a in (means, variances, weights))
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        spread = alpha**2 * v + sigma**2  # [B, K]
        far = x_t[:, None] - alpha[..., None] * m  # [B, K, D]
        share = xp.exp(xp.log(w) - 0.5 * x_t.shape[-1] * xp.log(spread) - 0.5 * (far**2).sum(-1) / spread)
        share = share / share.sum(-1)[:, None]
        x = (share[..., None] * (m + (alpha * v / spread)[..., None] * far)).sum(1)
        return target(schedule, predicts, x, (x_t - alpha * x) / sigma, t)

    return of(network, schedule, predicts, steps)


MODES = ([[-2.0, 0.0], [1.0, 1.0]], [0.04, 0.09], [0.3, 0.7])


@pytest.mark.parametrize(
    ("sampler", "predicts"),
    [
        (DDIM(7), "noise"),
        (DDIM(1), "v"),
        (Euler(7), "v"),
        (Heun(5), "data"),
        (DPMSolver(6), "score"),
        (StochasticHeun(5, churn=0.0), "velocity"),
    ],
    ids=str,
)
def test_samplers_without_noise_are_torchs(sampler, predicts):
    """The same numbers from the same start: ≤ 1e-9."""
    schedule, x = CosineSchedule(), draws(4, 2)
    ours = sampled(mixture(schedule, *MODES, predicts), sampler, jnp.asarray(x), KEY)
    chain = mixture(schedule, *MODES, predicts, of=probgen.pyro.Denoiser)
    np.testing.assert_allclose(ours, in_torch_samplers.sampled(chain, sampler, torch.tensor(x)), atol=1e-9)


@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(300),
        pytest.param(DDIM(200, eta=1.0), marks=pytest.mark.nightly),
        StochasticHeun(60, inflation=1.0),
        PredictorCorrector(150, snr=0.1),
        AnnealedLangevin(30, 60, 0.2),
    ],
    ids=lambda s: type(s).__name__,
)
def test_moments_of_a_gaussian(sampler):
    """Mean and variance of N(1, ½): within 4 SE and the method's own bias, 2 % at these numbers of steps (false alarm 1e-3)."""
    rows, chain = 4_000, mixture(CosineSchedule(), [[1.0]], [0.5], [1.0])
    x = sampled(chain, sampler, jax.random.normal(KEY, (rows, 1)), jax.random.key(1))
    assert abs(float(x.mean()) - 1) < 4 * math.sqrt(0.5 / rows) + 0.01
    assert abs(float(x.var()) / 0.5 - 1) < 4 * math.sqrt(2 / rows) + 0.02


def test_guidance_strengthens_a_label():
    """The same numbers as torch's, and others than without."""
    schedule = CosineSchedule()
    parts = [mixture(schedule, [[m]], [0.25], [1.0]).network for m in (-1.0, 1.0, 0.0)]

    def network(x, t, y):
        xp = namespace(x)
        return xp.stack([part(x, t) for part in parts])[y, xp.arange(len(x))]

    x, found = draws(4, 1), []
    for w in (0.0, 1.5):
        chain = Denoiser(network, schedule, labels=jnp.ones(4, int), classes=2)
        found.append(sampled(chain, DDIM(6, guidance=w), jnp.asarray(x), KEY))
    chain = probgen.pyro.Denoiser(network, schedule, labels=torch.ones(4, dtype=torch.int64), classes=2)
    theirs = in_torch_samplers.sampled(chain, DDIM(6, guidance=1.5), torch.tensor(x))
    np.testing.assert_allclose(found[1], theirs, atol=1e-9)
    assert np.abs(found[1] - found[0]).max() > 0.01
    dropped = Denoiser(network, schedule, labels=jnp.ones(4, int), classes=2).dropped(jnp.array([True, False] * 2))
    np.testing.assert_array_equal(dropped.labels, [2, 1, 2, 1])


# -- the density of the probability flow -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [CosineSchedule(end=0.99995), pytest.param(GeometricSchedule(0.001, 3000.0), marks=pytest.mark.nightly)],
    ids=str,
)
def test_ode_log_likelihood_of_a_mixture_is_exact(schedule):
    """log p of a mixture in two dimensions, from schedules that leave next to nothing at t = 1: ≤ 1e-3; torch's ≤ 1e-8."""
    x = np.repeat(MODES[0], 3, 0) + 0.25 * draws(6, 2)
    far = x[:, None] - np.array(MODES[0])
    parts = np.log(MODES[2]) - (far**2).sum(-1) / (2 * np.array(MODES[1])) - np.log(2 * np.pi * np.array(MODES[1]))
    ours = log_density(mixture(schedule, *MODES, steps=100_000), jnp.asarray(x), steps=120)
    assert np.abs(ours - np.logaddexp(*parts.T)).max() < 1e-3
    if isinstance(schedule, CosineSchedule):
        chains = (mixture(schedule, *MODES), mixture(schedule, *MODES, of=probgen.pyro.Denoiser))
        a = log_density(chains[0], jnp.asarray(x), 0.3, steps=8)
        np.testing.assert_allclose(a, in_torch_flow.log_density(chains[1], torch.tensor(x), 0.3, steps=8), rtol=1e-8)


def test_hutchinson_is_unbiased():
    """In expectation over the signs it is the exact trace: within 4 SE of 4,000 draws (false alarm 6e-5)."""
    chain = mixture(CosineSchedule(), [[-1.0, 0.5, 0.0], [1.0, 0.0, 0.3]], [0.1, 0.2], [0.4, 0.6])
    x = jnp.array([[0.2, 0.4, -0.1]])
    exact = float(log_density(chain, x, steps=20)[0])
    found = log_density(chain, jnp.broadcast_to(x, (4000, 3)), steps=20, trace="hutchinson", rng_key=KEY)
    assert found.std() > 0.01 and abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(4000)


# -- networks and the twin -------------------------------------------------------------------------------------------

WORDS = {"weight": "kernel", "bias": "bias"}


def converted(weights):
    """Torch's weights under flax's names, in its layout."""
    found = {}
    for name, value in weights.items():
        module, *path = name.replace("$$$", ".").split(".")
        if path[-1] == "frequencies":
            continue
        if module == "network":
            kind = WORDS[path[-1]]
            if "label" in path:
                kind = "embedding"
            elif re.search("norm", ".".join(path)):
                kind = {"kernel": "scale"}.get(kind, kind)
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T if kind == "kernel" else value
            path = [re.sub(r"\.(\d+)", r"_\1", ".".join(path[:-1])), kind]
        found[".".join([module, *path])] = np.array(value, order="C")
    return found


def perturbed(weights, seed=0):
    """Weights that are none of those that a network starts with: its last layer says something."""
    rng = np.random.default_rng(seed)
    moved = {n: v + 0.1 * rng.normal(size=v.shape) for n, v in weights.items()}
    return {n: (v if "frequencies" in n else moved[n]).astype(v.dtype) for n, v in weights.items()}


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (DenoisingMLP, MLPInTorch, {"shape": (3,), "hidden": 16, "layers": 2}),
        (DenoisingMLP, MLPInTorch, {"shape": (2, 3), "hidden": 10, "layers": 3, "classes": 4, "outputs": 2}),
        (UNet, UNetInTorch, {"shape": (8, 4), "hidden": 8, "levels": 2, "classes": 3, "outputs": 2}),
        pytest.param(UNet, UNetInTorch, {"shape": (4, 4, 3), "hidden": 4, "levels": 3}, marks=pytest.mark.nightly),
    ],
    ids=["mlp", "mlp-classes", "unet-classes", "unet-colours"],
)
def test_networks_are_torchs(ours, theirs, options):
    """With converted weights the same answers, with a label and without: ≤ 1e-9; and zero at the start."""
    rows, shape = 3, options["shape"]
    there = theirs(**options)
    weights = perturbed({f"network$$${n}": v.detach().numpy() for n, v in there.state_dict().items()})
    there.load_state_dict({n.removeprefix("network$$$"): torch.tensor(v) for n, v in weights.items()})
    net, x, t = ours(**options), draws(rows, *shape), np.linspace(0, 1, rows)
    start = jax.jit(net.init)(KEY, x, t)
    tree = jax.tree_util.tree_flatten_with_path(start["params"])
    names = ["network." + ".".join(part.key for part in path) for path, _ in tree[0]]
    flat = converted(weights)
    assert set(names) == set(flat)
    assert not np.any(start["params"]["last"]["kernel"])
    params = jax.tree.unflatten(tree[1], [flat[name] for name in names])
    for y in (None, np.arange(rows)) if "classes" in options else (None,):
        a = jax.jit(net.apply)({"params": params}, x, t, y)
        b = there(torch.tensor(x), torch.tensor(t), None if y is None else torch.tensor(y))
        assert np.std(a) > 0.01
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-6)  # frequencies are of single precision


def test_an_image_that_cannot_be_halved_is_refused():
    with pytest.raises(ProbgenError, match=r"UNet: images \[6, 6\] cannot be halved 2 times"):
        jax.eval_shape(UNet((6, 6)).init, KEY, jnp.zeros((1, 6, 6)), jnp.zeros(1))


TWINS = {
    "vectors": ("two-moons", {"steps": 3, "hidden": 8, "variance": "posterior"}),
    "learned, conditional": (
        "digits",
        {"steps": 2, "hidden": 8, "conditional": True, "schedule": "learned", "variance": "learned", "predicts": "v"},
    ),
    "images": ("digits", {"steps": 2, "hidden": 8, "layers": 2, "network": "conv"}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "vectors" else [pytest.mark.nightly]) for case in TWINS]
)
def test_twins_are_one_program(case):
    """Pyro and NumPyro agree on every log density at given latents, with the same random weights: ≤ 1e-5 relative."""
    torch.set_default_dtype(torch.float32)
    source, options = TWINS[case]
    data = probgen.load_data(source)
    with jax.enable_x64(False):
        ours, theirs = (Subject(probgen.load(file, data, **options), data) for file in ("ddpm", "ddpm_numpyro"))
        weights = perturbed(ours.weights)
        assert converted(weights).keys() == theirs.weights.keys()
        arrays, rng = {n: a[:7] for n, a in ours.arrays.items()}, np.random.default_rng(1)
        shape, T = arrays["x"].shape, options["steps"]
        latents = {f"x_{t}": rng.normal(size=shape).astype(np.float32) for t in range(1, T + 1)}
        a, b = (
            subject.with_weights(w).log_joint(arrays, latents, 0)
            for subject, w in ((ours, weights), (theirs, converted(weights)))
        )
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys() and len(one) >= T
        for site in one:
            np.testing.assert_allclose(one[site], other[site], rtol=1e-5, atol=1e-4, err_msg=site)


def test_twins_have_the_same_options_preparation_and_recipe():
    ours, theirs = (options_of(file)[1] for file in ("ddpm", "ddpm_numpyro"))
    assert ours == theirs
    for source in ("two-moons", {"x": np.arange(32).reshape(16, 2) % 4}):
        one, two = (probgen.load(file, probgen.load_data(source)) for file in ("ddpm", "ddpm_numpyro"))
        assert (one.prepare, one.defaults, repr(one.by)) == (two.prepare, two.defaults, repr(two.by))


# -- the program -----------------------------------------------------------------------------------------------------


def test_a_run_is_learned_and_samples_by_a_sampler():
    data = probgen.load_data("two-moons")
    run = probgen.fit(probgen.load("ddpm_numpyro", data, steps=3, hidden=32), data, steps=300, progress=False)
    assert run.metrics["loss"][-1] < 0.9 * run.metrics["loss"][0]
    drawn = run.sample(30, sampler=DDIM(5))
    assert drawn["x"].shape == (30, 2) and set(drawn) == {"x"}
    assert np.array_equal(drawn["x"], run.sample(30, sampler=DDIM(5))["x"])
    assert not np.array_equal(drawn["x"], run.sample(30, seed=1, sampler=DDIM(5))["x"])
    with pytest.raises(ProbgenError, match=r"guidance=1\.0 strengthens the label"):
        run.sample(3, sampler=DDIM(5, guidance=1.0))


@pytest.mark.nightly
def test_readouts_of_one_trained_model():
    """On data of which all is known: bound ≤ importance weights ≤ log p, and the flow's bound beside them, in one table."""
    rng = np.random.default_rng(0)
    data = probgen.load_data({"x": (2 + 0.5 * rng.normal(size=(4000, 1))).astype(np.float32)})
    run = probgen.fit(probgen.load("ddpm_numpyro", data, steps=20, hidden=32), data, steps=1500, progress=False)
    new = (2 + 0.5 * rng.normal(size=(500, 1))).astype(np.float32)
    found, true = run.evaluate({"x": new}, k=100), -0.5 * math.log(2 * math.pi * math.e * 0.25)
    assert found["elbo"] < found["log_likelihood"] < true + 4 * found["log_likelihood_se"]
    assert true - 0.25 < found["ode_log_likelihood"] < true + 4 * found["ode_log_likelihood_se"]
    assert any("exact trace" in note for note in found["notes"])


def test_bad_input_is_told():
    data = probgen.load_data("two-moons")
    with pytest.raises(ProbgenError, match="a chain of steps=0 has no latents"):
        probgen.fit(probgen.load("ddpm_numpyro", data, steps=0), data, steps=1, progress=False)
    learned = Denoiser(None, schedule_in("learned", jnp.asarray))
    with pytest.raises(ProbgenError, match="a learned one says that to no compiled step"):
        DiffusionELBO(proposal="importance").of_rows(learned, jnp.zeros((2, 1)), KEY)
    with pytest.raises(ProbgenError, match="did you mean 'min-snr'"):
        DiffusionELBO("minsnr")
    vae = probgen.load("vae_numpyro", data)
    with pytest.raises(ProbgenError, match="DiffusionELBO needs a denoiser"):
        probgen.fit(vae.learned_by(DiffusionELBO()), data, steps=1, progress=False)
    run = probgen.fit(vae, data, steps=1, progress=False)
    with pytest.raises(ProbgenError, match="DDIM needs a denoiser, and this program has none"):
        run.sample(3, sampler=DDIM())


@pytest.mark.parametrize("name", ["score", "flow"])
@pytest.mark.nightly_on("flow")
def test_losses_at_a_random_time_reach_their_floors(name):
    """On N(0, 1), ever new rows: α² / (α² + σ²) of ‖ε − ε̂‖², 1 / (t² + (1 − t)²) of a velocity; within 3 %, and 4 SE below."""
    from scipy.integrate import quad

    rows = np.random.default_rng(0).normal(size=(100_000, 1)).astype(np.float32)
    data, noise = probgen.load_data({"x": rows}), LinearSchedule()
    by = {"score": DenoisingScoreMatching(), "flow": FlowMatching()}[name]
    net = DenoisingMLP((1,), 32, 2, fastest=10.0)

    def denoiser():
        told = flax_module("network", net, jnp.zeros((1, 1)), jnp.zeros(1))
        if name == "flow":
            return Denoiser(told, RectifiedSchedule(), "velocity", 5)
        return Denoiser(told, noise, "noise", 5)

    def model(x):
        chain = denoiser()
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(chain(x, 0.5).data * 0, 1.0).to_event(1), obs=x)

    program = probgen.Program(model, by=by, denoiser=denoiser)
    run = probgen.fit(
        program, data, steps=700, batch_size=1024, lr=3e-3, schedule=probgen.Cosine(1, 0, 700), progress=False
    )
    if name == "flow":
        floor = quad(lambda t: 1 / (t**2 + (1 - t) ** 2), 0, 1)[0]
    else:
        floor = (
            quad(lambda t: float(noise.alpha(t) ** 2 / (noise.alpha(t) ** 2 + noise.sigma(t) ** 2)), 1e-3, 1)[0] / 0.999
        )
    found = np.mean(run.metrics["loss"][-2:])
    assert floor * 0.99 < found < 1.03 * floor


def test_couplings_are_torchs():
    """The optimal transport between rows and noise is SciPy's, and a given noise is the array `z` or refused."""
    from scipy.optimize import linear_sum_assignment

    x, z = draws(12, 3), draws(12, 3, seed=1)
    cost = ((x[:, None] - z[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(jax.jit(assignment)(jnp.asarray(x), jnp.asarray(z)), linear_sum_assignment(cost)[1])
    given = FlowMatching("given")
    assert given.paired(jnp.asarray(x), {"z": jnp.asarray(z)}, KEY) is not None
    with pytest.raises(ProbgenError, match="reads the noise of each row from the array 'z'"):
        given.paired(jnp.asarray(x), {}, KEY)
    with pytest.raises(ProbgenError, match="coupling='optimal' is none of"):
        FlowMatching("optimal")
