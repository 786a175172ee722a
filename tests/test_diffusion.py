"""Diffusion as a probabilistic program: the chain, its bound in closed form, and Gaussians for which all is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

import probgen
from probgen import Program
from probgen.check.laws import law_fast_loss
from probgen.check.subject import Subject
from probgen.diffusion import (
    DDIM,
    CosineSchedule,
    GeometricSchedule,
    LearnedSchedule,
    LinearSchedule,
    RectifiedSchedule,
    SubVPSchedule,
)
from probgen.diffusion.denoiser import PREDICTIONS, target
from probgen.diffusion.samplers import first_time
from probgen.errors import ProbgenError
from probgen.pyro import ELBO, Denoiser, DenoisingScoreMatching, DiffusionELBO, FlowMatching
from probgen.pyro.distributions import DiscretizedGaussian
from probgen.pyro.flow_matching import matched_noise

SCHEDULES = [
    LinearSchedule(),
    CosineSchedule(),
    GeometricSchedule(),
    SubVPSchedule(),
    RectifiedSchedule(),
    LearnedSchedule(torch.tensor([-8.0, 7.0]), torch.linspace(-1, 1, 5)),
]
NAMES = [type(schedule).__name__ for schedule in SCHEDULES]


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# -- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_rates_are_the_derivatives(schedule):
    t = torch.linspace(0.03, 0.97, 20, requires_grad=True)
    for value, rate in ((schedule.alpha, schedule.alpha_rate), (schedule.sigma, schedule.sigma_rate)):
        total = value(t).sum()
        found = torch.autograd.grad(total, t)[0] if total.requires_grad else torch.zeros_like(t)
        assert torch.allclose(rate(t) + 0 * t, found, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_two_steps_are_one(schedule):
    """q(x_t | x) = ∫ q(x_t | x_s) q(x_s | x) dx_s, and from the data it is α_t, σ_t."""
    s, t = 0.31, 0.74
    start = 0.0 if float(schedule.sigma(0.0)) == 0 else 1e-3
    a, b = schedule.between(start, s)
    c, d = schedule.between(s, t)
    whole = schedule.between(start, t)
    assert np.allclose(float(a * c), float(whole[0])) and np.allclose(float((c * b) ** 2 + d**2), float(whole[1] ** 2))
    if start == 0.0:
        assert np.allclose([float(whole[0]), float(whole[1])], [float(schedule.alpha(t)), float(schedule.sigma(t))])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_time_of_inverts_the_ratio(schedule):
    times = np.linspace(0.05, 0.95, 7)
    assert np.allclose(schedule.time_of(schedule.noise_to_signal(times)), times, atol=1e-9)


def test_linear_is_the_limit_of_a_thousand_betas():
    betas = np.linspace(1e-4, 0.02, 1000)
    ours = LinearSchedule().alpha(np.arange(1, 1001) / 1000)
    assert np.abs(np.sqrt(np.cumprod(1 - betas)) - ours).max() < 0.003


def test_a_schedule_that_does_not_end_in_noise_is_refused():
    with pytest.raises(ProbgenError, match="does not end in noise: 58%"):
        LinearSchedule(beta_max=1.0).refuse_no_noise()
    for schedule in SCHEDULES:
        schedule.refuse_no_noise()


# -- what a network says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_all_predictions_are_one(schedule, predicts):
    """A network that knows x and ε, whatever it is asked for, is read as x, ε, their score and their velocity."""
    if predicts in ("noise", "score") and isinstance(schedule, RectifiedSchedule):
        pytest.skip("of pure noise these say nothing of the data: refused, see test_samplers.py")
    x, noise, t = torch.randn(6, 3), torch.randn(6, 3), torch.linspace(0.1, 0.9, 6)
    x_t = schedule.alpha(t)[:, None] * x + (schedule.sigma(t) + 0 * t)[:, None] * noise
    said = Denoiser(lambda x_t, t: target(schedule, predicts, x, noise, t), schedule, predicts, 10)(x_t, t)
    for found, true in (
        (said.data, x),
        (said.noise, noise),
        (said.score, target(schedule, "score", x, noise, t)),
        (said.velocity, target(schedule, "velocity", x, noise, t)),
    ):
        assert torch.allclose(found, true, atol=1e-9)


def test_the_posterior_is_bayes():
    """q(x_s | x_t, x) ∝ q(x_t | x_s) q(x_s | x), by the logarithm of both sides at several x_s."""
    for schedule in SCHEDULES:
        chain, s, t = Denoiser(None, schedule, "data", 10), 0.4, 0.6
        x, x_t, x_s = torch.tensor([[0.7]]), torch.tensor([[-0.3]]), torch.linspace(-2, 2, 9)[:, None]
        mean, variance = chain.posterior(x_t, x, t, s)
        left = dist.Normal(mean, torch.as_tensor(variance).sqrt()).log_prob(x_s)
        marginal = dist.Normal(schedule.alpha(s) * x, torch.as_tensor(schedule.sigma(s)))
        right = chain.forward(x_s, t, s).log_prob(x_t)[:, None] + marginal.log_prob(x_s)
        assert torch.allclose(left - left[:1], right - right[:1], atol=1e-9)


# -- Gaussian data, for which the best denoiser is known --------------------------------------------------------------

C, MEAN = 0.25, 0.6


def optimal(schedule, steps, predicts="noise"):
    """The chain of the best denoiser of N(m, C): with it every p(x_s | x_t) is the true reverse conditional."""

    def network(x_t, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x = MEAN + alpha * C / (alpha**2 * C + sigma**2) * (x_t - alpha * MEAN)
        return target(schedule, predicts, x, (x_t - alpha * x) / sigma, t)

    def variance(t, s):
        """β̃ and what the uncertainty of x adds."""
        fresh, sigma_t = schedule.fresh(s, t), schedule.sigma(t)
        unknown = C * sigma_t**2 / (schedule.alpha(t) ** 2 * C + sigma_t**2)
        return fresh * schedule.sigma(s) ** 2 + (schedule.alpha(s) * fresh) ** 2 * unknown

    return Denoiser(network, schedule, predicts, steps, variance)


def pair(chain):
    """Model and guide of a chain, as models/diffusion/ddpm.py has them."""
    T = chain.steps

    def model(x):
        with pyro.plate("data", len(x)):
            x_t = pyro.sample(f"x_{T}", chain.prior(x))
            for t in range(T, 1, -1):
                x_t = pyro.sample(f"x_{t - 1}", chain.reverse(x_t, t / T))
            pyro.sample("x", chain.decoder(x_t), obs=x)

    def guide(x):
        x_t = chain.embed(x)
        with pyro.plate("data", len(x)):
            for t in range(1, T + 1):
                x_t = pyro.sample(f"x_{t}", chain.forward(x_t, t / T))

    return model, guide


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])
def test_elbo_of_the_best_denoiser_is_entropy_and_one_kl(schedule, predicts):
    """E[−ELBO] = ½ log 2πeC + KL(q(x_T) ‖ p(x_T)), through the model, the guide and `ELBO` itself.

    The guide is then the posterior of the model but for its start, so that log p(x, z) − log q(z | x) is, draw by draw,
    log q(x) + log p(x_T) − log q(x_T): that is what the weights are compared with.
    """
    chain = optimal(schedule, 12, predicts)
    model, guide = pair(chain)
    x = MEAN + math.sqrt(C) * torch.randn(50, 1)
    torch.manual_seed(3)
    loss = ELBO(kl="sampled").loss(model, guide, x=x)
    torch.manual_seed(3)
    end = pyro.poutine.trace(guide).get_trace(x=x).nodes["x_12"]["value"]
    alpha, sigma = schedule.alpha(1.0), schedule.sigma(1.0)
    marginal = dist.Normal(alpha * MEAN, torch.tensor(alpha**2 * C + sigma**2).sqrt())
    true = dist.Normal(MEAN, C**0.5).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(end) - marginal.log_prob(end)
    assert abs(loss + float(true.sum())) < 1e-9 * 50


def chain_elbo(chain, x, order=40):
    """E_q of the bound of one row by Gauss–Hermite quadrature over x_t at every step: no chance in it."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    weights, loss = torch.tensor(weights / weights.sum()), DiffusionELBO()
    rows, noise, total = x.expand(order, 1), torch.tensor(nodes)[:, None], 0.0
    randn, torch.randn_like = torch.randn_like, lambda _: noise
    try:
        for i in range(1, chain.steps + 1):
            step = torch.full((order,), float(i))
            losses, terms = loss.at_step(chain, rows, rows, step, torch.ones(order))
            total = total + (weights * (losses + terms[f"x_{chain.steps}"])).sum()
        return total - terms[f"x_{chain.steps}"][0]
    finally:
        torch.randn_like = randn


def test_the_exhaustive_loss_is_the_bound_in_closed_form():
    """Summed over every step, and integrated over x_t, DiffusionELBO is −∫∫ of the bound of the optimal chain."""
    schedule, x = CosineSchedule(), torch.tensor([[0.9]])
    chain = optimal(schedule, 7)
    alpha, sigma = schedule.alpha(1.0), schedule.sigma(1.0)
    marginal = alpha**2 * C + sigma**2
    # E_q(x_T | x)[log q(x_T) − log p(x_T)] − log q(x)
    mean, variance = alpha * 0.9, sigma**2
    gap = 0.5 * (mean**2 + variance) - 0.5 * (((mean - alpha * MEAN) ** 2 + variance) / marginal + math.log(marginal))
    true = gap - norm.logpdf(0.9, MEAN, C**0.5)
    assert abs(float(chain_elbo(chain, x)) - true) < 1e-9


class Rough(torch.nn.Module):
    """Any network: far from the best."""

    def __init__(self, outputs=1):
        super().__init__()
        self.inner, self.outputs = torch.nn.Linear(3, 2 * outputs), outputs

    def forward(self, x, t):
        out = torch.tanh(self.inner(torch.cat([x, t[:, None]], -1)))
        return out.reshape(len(x), 2, self.outputs) if self.outputs > 1 else out


@pytest.mark.parametrize("variance", ["beta", "posterior", "learned"])
def test_diffusion_elbo_is_the_elbo_of_the_chain(variance):
    """In expectation, for a network of random weights: within 4 SE of each other (false alarm 6e-5)."""
    chain = Denoiser(Rough(2 if variance == "learned" else 1), LinearSchedule(), "v", 6, variance)
    x = torch.randn(1, 2).expand(20_000, 2)
    model, guide = pair(chain)
    with torch.no_grad():
        q = pyro.poutine.trace(guide).get_trace(x=x)
        p = pyro.poutine.trace(pyro.poutine.replay(model, trace=q)).get_trace(x=x)
        for trace in (p, q):
            trace.compute_log_prob()
        names = [f"x_{i}" for i in range(1, 7)]
        whole = -sum(p.nodes[n]["log_prob"] for n in [*names, "x"]) + sum(q.nodes[n]["log_prob"] for n in names)
        for proposal in ("uniform", "importance"):
            fast = DiffusionELBO(proposal=proposal).of_rows(chain, x)[0]
            error = math.sqrt(float(whole.var() + fast.var()) / len(x))  # strata make it smaller than this
            assert abs(float(whole.mean() - fast.mean())) < 4 * error


def test_steps_are_drawn_by_their_chances():
    """Over many draws the share of each step is its chance, and Σ 1/chance of the rows counts the steps."""
    from probgen.pyro.diffusion_elbo import drawn_steps

    chances = np.array([0.5, 0.1, 0.4])
    step, weight = drawn_steps(chances, torch.zeros(30_000))
    shares = torch.bincount(step.long(), minlength=4)[1:] / len(step)
    assert torch.allclose(shares, torch.tensor(chances), atol=1e-4)  # evenly spread rows: no chance but the start
    assert abs(float(weight.mean()) - 3) < 1e-3


def test_weighted_errors_have_their_floors():
    """With the best denoiser of N(m, C): ‖ε − ε̂‖² = α²C / (α²C + σ²) a dimension, and the others by their weights."""
    schedule, rows = CosineSchedule(), 200_000
    chain, x = optimal(schedule, 10), MEAN + math.sqrt(C) * torch.randn(rows, 1)
    step = torch.full((rows,), 6.0)
    alpha, sigma = schedule.alpha(0.6), schedule.sigma(0.6)
    floor, snr = alpha**2 * C / (alpha**2 * C + sigma**2), alpha**2 / sigma**2
    for weighting, factor in (("simple", 1.0), ("snr", 1.0), ("min-snr", min(snr, 0.1) / snr)):
        loss = DiffusionELBO(weighting, min_snr=0.1)
        found = loss.at_step(chain, x, x, step, torch.full((rows,), 10.0))[0]
        assert abs(float(found.mean()) / factor - floor) < 4 * float(found.std()) / factor / math.sqrt(rows)


# -- variances of the reverse chain -----------------------------------------------------------------------------------


def variance_of_samples(chain, c, last_noise):
    """Of x after the whole reverse chain, by the recursion of its (linear) steps."""
    T, value = chain.steps, 1.0
    for i in range(T, 0, -1):
        t, s = i / T, (i - 1) / T
        ends = torch.tensor([[0.0], [1.0]])
        means = chain.posterior(ends, chain(ends, t).data, t, s)[0]
        slope = float(means[1] - means[0])
        noise = float(torch.as_tensor(chain.reverse_variance(chain(ends, t), t, s)).reshape(-1)[0])
        value = slope**2 * value + (noise if i > 1 or last_noise else 0.0)
    return value


def centred(schedule, c, steps, variance):
    def network(x_t, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return sigma * x_t / (alpha**2 * c + sigma**2)

    return Denoiser(network, schedule, "noise", steps, variance)


class Betas(LinearSchedule):
    """The thousand betas of Ho et al., as they are."""

    def log_alpha(self, t):
        table = torch.tensor(np.concatenate([[0], 0.5 * np.log(1 - np.linspace(1e-4, 0.02, 1000)).cumsum()]))
        found = table[torch.as_tensor(t * 1000).round().long()]
        return found if isinstance(t, torch.Tensor) else float(found)


def test_variances_of_the_reverse_chain():
    """β_t is exact for C = 1 and β̃_t for a point mass; between them Ho's thousand steps give .25085 and .24613 for ¼."""
    for schedule in (LinearSchedule(), CosineSchedule()):
        assert abs(variance_of_samples(centred(schedule, 1.0, 30, "beta"), 1.0, True) - 1) < 1e-12
        assert abs(variance_of_samples(centred(schedule, 0.0, 30, "posterior"), 0.0, False)) < 1e-12
    ho = Betas()
    assert abs(variance_of_samples(centred(ho, 0.25, 1000, "beta"), 0.25, True) - 0.25085) < 1e-5
    assert abs(variance_of_samples(centred(ho, 0.25, 1000, "posterior"), 0.25, False) - 0.24613) < 1e-5


def mean_kl_to_gaussian(beta):
    """Of p(x | x_t) to the Gaussian of its moments, averaged over x_t: x is ½ N(−1, 0.04) + ½ N(1, 0.04)."""
    schedule = LinearSchedule()
    t = float(schedule.time_of(np.sqrt(beta / (1 - beta))))
    x, x_t = torch.linspace(-2.5, 2.5, 3001)[:, None], torch.linspace(-4, 4, 401)
    log_x = torch.logsumexp(torch.stack([dist.Normal(m, 0.2).log_prob(x[:, 0]) for m in (-1.0, 1.0)]), 0) - math.log(2)
    forward = Denoiser(None, schedule).forward(x, t, 0.0)
    joint = torch.stack([forward.log_prob(value.expand(1)) + log_x for value in x_t])  # [x_t, x]
    width = float(x[1, 0] - x[0, 0])
    marginal = joint.logsumexp(1) + math.log(width)
    density = (joint - marginal[:, None]).exp()
    mean = (density * x[:, 0]).sum(1) * width
    variance = (density * (x[:, 0] - mean[:, None]) ** 2).sum(1) * width
    gaussian = dist.Normal(mean[:, None], variance.sqrt()[:, None]).log_prob(x[:, 0])
    kl = (density * (joint - marginal[:, None] - gaussian)).sum(1) * width
    return float((kl * marginal.exp()).sum() * (x_t[1] - x_t[0]))


def test_the_reverse_step_becomes_gaussian():
    """As β falls p(x | x_t) of two modes loses what no Gaussian has: 0.931 nats at β = 0.9, 0.193, and 0.0027 at 0.05."""
    for beta, nats in ((0.9, 0.931), (0.2, 0.193), (0.05, 0.0027)):
        assert abs(mean_kl_to_gaussian(beta) - nats) < 5e-4


# -- whole numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0, 30.0])
def test_discretized_gaussian_sums_to_one(scale):
    fn = DiscretizedGaussian(torch.tensor([-1.3, -0.2, 0.99]), torch.tensor(scale), 17)
    log_mass = fn.log_prob(torch.arange(17.0)[:, None])
    assert torch.allclose(log_mass.logsumexp(0), torch.zeros(3), atol=1e-12)


def test_discretized_gaussian_is_a_rounded_gaussian():
    """Masses by quadrature of the density over each bin, and draws by their shares (4 SE, false alarm 1e-3 over all bins)."""
    loc, scale, levels = 0.3, 0.4, 9
    fn = DiscretizedGaussian(torch.tensor(loc), torch.tensor(scale), levels)
    edges = [-np.inf, *(np.arange(levels - 1) + 0.5) * 2 / (levels - 1) - 1, np.inf]
    mass = [quad(norm(loc, scale).pdf, a, b)[0] for a, b in pairwise(edges)]
    found = fn.log_prob(torch.arange(float(levels))).exp().numpy()
    assert np.allclose(found, mass, atol=1e-8)
    shares = np.bincount(fn.sample((50_000,)).long().numpy(), minlength=levels) / 50_000
    assert (np.abs(shares - mass) < 4 * np.sqrt(np.array(mass) / 50_000) + 1e-9).all()
    assert abs(float(fn.mean) - np.dot(np.arange(levels), mass)) < 1e-8


def test_discretized_gaussian_has_gradients_far_away():
    loc = torch.tensor([-40.0, 40.0], requires_grad=True)
    log_prob = DiscretizedGaussian(loc, torch.tensor(0.5), 256).log_prob(torch.tensor([255.0, 0.0]))
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all() and torch.isfinite(loc.grad).all() and (loc.grad.abs() > 1).all()


# -- the program ------------------------------------------------------------------------------------------------------


def test_bad_input_is_told():
    data = probgen.load_data("two-moons")
    for options, said in (({"steps": 0}, "a chain of steps=0 has no latents"),):
        with pytest.raises(ProbgenError, match=said):
            probgen.fit(probgen.load("ddpm", data, **options), data, steps=1, progress=False)
    with pytest.raises(ProbgenError, match="did you mean 'noise'"):
        Denoiser(None, CosineSchedule(), "nois", 10)
    with pytest.raises(ProbgenError, match=r"time has the shape \(3,\)"):
        Denoiser(lambda x, t: x, CosineSchedule())(torch.zeros(5, 2), torch.zeros(3))
    with pytest.raises(ProbgenError, match=r"guidance=2\.0 strengthens the label"):
        Denoiser(lambda x, t: x, CosineSchedule()).guided(2.0)
    with pytest.raises(ProbgenError, match="DiffusionELBO needs a denoiser"):
        probgen.fit(probgen.load("vae", data).learned_by(DiffusionELBO()), data, steps=1, progress=False)


def test_program_without_its_denoiser_is_told():
    with pytest.raises(ProbgenError, match="did you mean 'min-snr'"):
        DiffusionELBO("minsnr")
    assert Program(lambda x: None).denoiser is None


# -- other losses on the same object ------------------------------------------------------------------------------------


def test_matched_noise_reaches_its_floor():
    """With the best denoiser the loss is ∫ α²C / (α²C + σ²) dt: by quadrature, within 4 SE, and never below by more."""
    schedule = LinearSchedule()
    chain, x = optimal(schedule, 10), MEAN + math.sqrt(C) * torch.randn(200_000, 1)
    found = matched_noise(chain, x, {})
    ratio = lambda t: schedule.alpha(t) ** 2 * C / (schedule.alpha(t) ** 2 * C + schedule.sigma(t) ** 2)  # noqa: E731
    floor = quad(ratio, first_time(chain), 1)[0] / (1 - first_time(chain))
    assert abs(float(found.mean()) - floor) < 4 * float(found.std()) / math.sqrt(len(x))


def optimal_velocity(c):
    """The best u(x_t, t) of data N(0, C)."""
    schedule = RectifiedSchedule()

    def network(x_t, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x = alpha * c / (alpha**2 * c + sigma**2) * x_t
        return (x_t - alpha * x) / sigma - x

    return Denoiser(network, schedule, "velocity")


def test_flow_matching_reaches_its_floor():
    """C / (t² + (1 − t)² C) a dimension at time t, here averaged over t; never beaten (4 SE, false alarm 3e-5)."""
    c, rows = 0.3, 200_000
    x = math.sqrt(c) * torch.randn(rows, 1)
    program = Program(lambda x: None, denoiser=lambda x: optimal_velocity(c))
    loss = FlowMatching().players(program)["program"].objective(None, None, x=x) / rows
    floor = quad(lambda t: c / (t**2 + (1 - t) ** 2 * c), 0, 1)[0]
    assert abs(float(loss) - floor) < 4 * 1.6 / math.sqrt(rows)


def test_transport_between_gaussians_has_the_energy_of_bures():
    """E ‖z − x‖² of pairs from N(m, C) to N(0, I) tends to |m|² + Σ (√c − 1)², the Bures–Wasserstein distance squared.

    Within 15 % at 1,000 rows, and far below that of independent pairs; the law of the noise stays what it is.
    """
    scale, mean = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.0])
    x, noise = mean + scale * torch.randn(1000, 2), torch.randn(1000, 2)
    bures = float((mean**2).sum() + ((scale - 1) ** 2).sum())
    paired = FlowMatching("ot").paired(x, {})  # with noise of its own
    energy = float((paired - x).square().sum(-1).mean())
    assert abs(energy / bures - 1) < 0.15 and float((noise - x).square().sum(-1).mean()) > 2.5 * bures
    assert abs(float(paired.var()) - 1) < 0.13


def test_langevin_as_a_program_is_score_matching():
    """KL(q ‖ p) of each step of ncsn.py is h/8 · ‖ε_θ − (x_i − x) / σ‖², at the guide's own draws: the bound is the loss."""
    data = probgen.load_data({"x": np.random.default_rng(0).normal(size=(64, 2))})
    program = probgen.load("ncsn", data, levels=3, repeats=2, step_size=0.3)
    x = torch.tensor(data.train["x"][:20])
    with torch.no_grad():
        for p in program.denoiser().network.parameters():
            p.normal_(0, 0.3)
            p.data = p.data.double()
        program.denoiser().network.double()
        loss = ELBO()
        torch.manual_seed(5)
        terms = loss.terms(program.model, program.guide, x=x)
        torch.manual_seed(5)
        nodes = pyro.poutine.trace(program.guide).get_trace(x=x).nodes
    chain, schedule = program.denoiser(), GeometricSchedule(0.05, 5.0)
    for i in range(6, 1, -1):
        x_i, t = nodes[f"x_{i}"]["value"], ((i - 1) // 2) / 2
        true = 0.3 / 8 * ((chain(x_i, t).noise - (x_i - x) / schedule.sigma(t)) ** 2).sum()
        assert torch.allclose(-terms[f"x_{i - 1}"], true)


@pytest.mark.parametrize("sde", ["vp", "subvp", "ve"])
def test_every_equation_has_its_bound(sde):
    """DiffusionELBO of score_sde.py equals ELBO() on its chain, for a network of random weights (4 SE, false alarm 6e-5)."""
    schedule = {"vp": LinearSchedule(), "subvp": SubVPSchedule(), "ve": GeometricSchedule(0.01, 5.0)}[sde]
    chain, x = Denoiser(Rough(), schedule, "noise", 5), torch.randn(1, 2).expand(20_000, 2)
    model, guide = pair(chain)
    with torch.no_grad():
        whole = -torch.stack([torch.as_tensor(v) for v in chain_weights(model, guide, x)]).sum(0)
        fast = DiffusionELBO().of_rows(chain, x)[0]
    error = math.sqrt(float(whole.var() + fast.var()) / len(x))
    assert abs(float(whole.mean() - fast.mean())) < 4 * error


def chain_weights(model, guide, x):
    """log p(x, z) − log q(z | x) of each row."""
    q = pyro.poutine.trace(guide).get_trace(x=x)
    p = pyro.poutine.trace(pyro.poutine.replay(model, trace=q)).get_trace(x=x)
    for trace in (p, q):
        trace.compute_log_prob()
    for name, site in p.nodes.items():
        if site["type"] == "sample" and "log_prob" in site and site["log_prob"].shape == (len(x),):
            yield site["log_prob"] - (q.nodes[name]["log_prob"] if name in q.nodes else 0.0)


def test_flow_matching_needs_a_velocity_and_its_noise():
    data = probgen.load_data("two-moons")
    with pytest.raises(ProbgenError, match="trains a velocity, and this program's network predicts noise"):
        probgen.fit(probgen.load("ddpm", data).learned_by(FlowMatching()), data, steps=1, progress=False)
    with pytest.raises(ProbgenError, match="reads the noise of each row from the array 'z'"):
        probgen.fit(probgen.load("flow_matching", data, coupling="given"), data, steps=1, progress=False)
    with pytest.raises(ProbgenError, match="needs a denoiser, and this program has none"):
        probgen.fit(probgen.load("realnvp", data).learned_by(DenoisingScoreMatching()), data, steps=1, progress=False)


def test_the_law_of_the_fast_loss_catches_another_chain():
    """`probgen check` compares one random step with the whole chain: a model that decodes in another way is told."""
    torch.set_default_dtype(torch.float32)
    data = probgen.load_data("two-moons")
    program = probgen.load("ddpm", data, steps=4, hidden=16)

    def model(x):
        chain = program.denoiser()
        with pyro.plate("data", len(x)):
            x_t = pyro.sample("x_4", chain.prior(x))
            for t in (4, 3, 2):
                x_t = pyro.sample(f"x_{t - 1}", chain.reverse(x_t, t / 4))
            pyro.sample("x", dist.Normal(x_t, 0.1).to_event(1), obs=x)

    assert law_fast_loss(Subject(program, data)).passed
    verdict = law_fast_loss(Subject(replace(program, model=model), data))
    assert verdict.passed is False and "chain.decoder" in verdict.sentence
    assert law_fast_loss(Subject(probgen.load("vae", data), data)).passed is None


@pytest.mark.parametrize("by", [DiffusionELBO("simple"), DenoisingScoreMatching()], ids=["noise", "score"])
def test_trained_losses_reach_and_never_beat_their_floors(by):
    """A small network on N(0, ¼), standardised, ever new rows: within 3 % above α² / (α² + σ²), and 4 SE is all below."""
    torch.set_default_dtype(torch.float32)
    rows = np.random.default_rng(0).normal(size=(100_000, 1)).astype(np.float32)
    data = probgen.load_data({"x": rows / 2})
    program = probgen.load("score_sde", data, steps=50, hidden=32).learned_by(by)
    run = probgen.fit(
        program, data, steps=700, batch_size=1024, lr=3e-3, schedule=probgen.Cosine(1, 0, 700), progress=False
    )
    noise = LinearSchedule()
    ratio = lambda t: noise.alpha(t) ** 2 / (noise.alpha(t) ** 2 + noise.sigma(t) ** 2)  # noqa: E731
    steps = np.arange(1, 51) / 50
    floor = np.mean(ratio(steps)) if isinstance(by, DiffusionELBO) else quad(ratio, 1e-3, 1)[0] / 0.999
    found = np.mean(run.metrics["loss"][-2:])  # chunks of some hundred batches: an error of 0.0015
    assert floor - 0.006 < found < 1.03 * floor


def test_labels_are_given_though_an_untrained_network_ignores_them():
    """A network whose last layer starts at zero reads no label yet: what is said of the run is what was learned."""
    torch.set_default_dtype(torch.float32)
    data = probgen.load_data("digits")
    run = probgen.fit(probgen.load("ddpm", data, steps=3, hidden=8, conditional=True), data, steps=3, progress=False)
    assert run.structure.arrays["y"] == "given"
    assert run.sample(2, given={"y": 3}, sampler=DDIM(3, guidance=1.0))["x"].shape == (2, 8, 8)
    with pytest.raises(ProbgenError, match="is conditioned on 'y'"):
        run.sample(2)


def two_bumps():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(-2, 0.3, (2000, 1)), rng.normal(2, 0.3, (2000, 1))]).astype(np.float32)


def test_reflow_pairs_are_draws_and_what_the_flow_makes_of_them():
    """z is f(x) of every draw, so that its inverse gives the draw back; data that are prepared at random have no such z."""
    torch.set_default_dtype(torch.float32)
    data = {"x": two_bumps()}
    run = probgen.fit(probgen.load("flow_matching", data, hidden=16, layers=1), data, steps=20, lr=1e-2, progress=False)
    pairs = probgen.reflow(run, 50, seed=1)
    prepared, _ = run.preparation.forward({"x": pairs["x"]}, None)
    flow = pyro.poutine.trace(run.trained.model).get_trace(x=torch.from_numpy(prepared["x"])).nodes["x"]["fn"]
    again = flow.transform.inv(torch.from_numpy(pairs["z"])).detach().numpy()
    np.testing.assert_allclose(again, prepared["x"], atol=2e-3)
    assert np.abs(pairs["z"] - prepared["x"]).mean() > 0.01
    digits = probgen.load_data("digits")
    run = probgen.fit(probgen.load("flow_matching", digits, hidden=8, layers=1), digits, steps=1, progress=False)
    with pytest.raises(ProbgenError, match="prepared at random"):
        probgen.reflow(run, 2)


@pytest.mark.nightly
def test_a_flow_on_the_pairs_of_another_is_straighter():
    """After learning from the pairs, two steps along the velocity lose less than before, by a factor of two."""
    torch.set_default_dtype(torch.float32)
    x = two_bumps()
    recipe = {"steps": 600, "batch_size": 512, "lr": 3e-3, "schedule": probgen.Cosine(1, 0, 600), "progress": False}
    sizes = {"hidden": 32, "layers": 2, "steps": 20}
    first = probgen.fit(probgen.load("flow_matching", {"x": x}, **sizes), {"x": x}, **recipe)
    pairs = probgen.reflow(first, 2000, seed=1)
    assert abs(np.corrcoef(pairs["z"][:, 0], pairs["x"][:, 0])[0, 1]) > 0.8  # in one dimension f is monotone
    second = probgen.fit(probgen.load("flow_matching", pairs, coupling="given", **sizes), pairs, **recipe)
    lost = []
    for run in (first, second):
        few, many = (run.sample(2000, seed=2, sampler=DDIM(steps))["x"] for steps in (2, 60))
        lost.append(np.abs(few - many).mean())
    assert lost[1] < lost[0] / 2
