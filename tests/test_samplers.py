"""Samplers against data whose denoiser, probability flow and law at every time are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import probgen
from probgen.cli import main
from probgen.diffusion import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    CosineSchedule,
    DPMSolver,
    Euler,
    GeometricSchedule,
    Heun,
    LinearSchedule,
    NoiseSchedule,
    PredictorCorrector,
    RectifiedSchedule,
    StochasticHeun,
    SubVPSchedule,
)
from probgen.diffusion.denoiser import PREDICTIONS, target
from probgen.diffusion.samplers import SAMPLERS, Sampler, runs
from probgen.errors import ProbgenError
from probgen.pyro import Denoiser
from probgen.pyro.probability_flow import log_density
from probgen.pyro.samplers import sampled


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mixture(schedule, means, variances, weights, predicts="noise", steps=1000):
    """The exact denoiser of Σ_k w_k N(m_k, v_k I): means [K, D]."""
    means, variances, weights = (torch.as_tensor(v, dtype=torch.float64) for v in (means, variances, weights))

    def network(x_t, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        spread = alpha**2 * variances + sigma**2  # [B, K]
        far = x_t[:, None] - alpha[..., None] * means  # [B, K, D]
        log_p = weights.log() - 0.5 * x_t.shape[-1] * spread.log() - 0.5 * (far**2).sum(-1) / spread
        share = torch.softmax(log_p, -1)
        x = (share[..., None] * (means + (alpha * variances / spread)[..., None] * far)).sum(1)
        return target(schedule, predicts, x, (x_t - alpha * x) / sigma, t)

    return Denoiser(network, schedule, predicts, steps)


def gaussian(schedule, c, mean=0.0, predicts="noise", steps=1000):
    return mixture(schedule, [[mean]], [c], [1.0], predicts, steps)


# -- order -----------------------------------------------------------------------------------------------------------


def flowed(schedule, c, x, t):
    """Where the probability flow of N(0, C) takes x_1 at time t: in proportion to the standard deviation."""
    scale = [math.sqrt(schedule.alpha(at) ** 2 * c + schedule.sigma(at) ** 2) for at in (1.0, t)]
    return x * scale[1] / scale[0]


def errors(sampler_of, schedule, counts, c=0.25):
    """Of the state before the last step, at a time that is the same for all numbers of steps."""
    found = []
    for count in counts:
        sampler, chain = sampler_of(count), gaussian(schedule, c)
        table, x = sampler.numbers(chain), torch.tensor([[1.3]])
        true = flowed(schedule, c, x, float(table["t"][-1]))
        memory = sampler.start(x)
        for i in range(len(table["t"]) - 1):
            at = {name: torch.tensor(values[i]) for name, values in table.items()}
            x, memory = sampler.step(chain, x, at, [torch.zeros_like(x)] * sampler.noises, memory)
        found.append(abs(float(x - true)))
    return np.array(found)


class OnKarrasGrid(DDIM):
    """DDIM on the grid on which Euler's order shows: the grid of time has its last inner point elsewhere."""

    def times(self, chain):
        return Euler(self.steps).times(chain)


@pytest.mark.parametrize(
    ("name", "sampler_of", "order"),
    [
        ("DDIM", OnKarrasGrid, 1),
        ("Euler", Euler, 1),
        ("Heun", Heun, 2),
        ("StochasticHeun, churn 0", lambda n: StochasticHeun(n, churn=0.0), 2),
        ("DPM-Solver++(2M)", DPMSolver, 2),
    ],
)
def test_orders(name, sampler_of, order):
    """Errors fall with the step to the power of the order: log₂ of their ratio when steps are doubled."""
    for schedule in (LinearSchedule(), GeometricSchedule(0.02, 10.0)):
        found = errors(sampler_of, schedule, (161, 321, 641))
        measured = np.log2(found[:-1] / found[1:])
        print(f"{name:24} {type(schedule).__name__:18} order {measured[-1]:.3f}")
        assert abs(measured[-1] - order) < 0.08


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(), SubVPSchedule(), RectifiedSchedule()])
def test_ddim_is_exact_in_one_step_from_a_point_mass(schedule, predicts):
    """Where the data are one point, ε̂ is constant along the flow."""
    if predicts in ("noise", "score") and isinstance(schedule, RectifiedSchedule):
        with pytest.raises(ProbgenError, match="says nothing of the data at t = 1"):
            mixture(schedule, [[0.7, -2.0]], [0.0], [1.0], predicts)
        return
    chain = mixture(schedule, [[0.7, -2.0]], [0.0], [1.0], predicts)
    found = sampled(chain, DDIM(1), torch.randn(5, 2))
    assert torch.allclose(found, torch.tensor([[0.7, -2.0]]).expand(5, 2), atol=1e-7)


def test_euler_is_ddim():
    """On the same grid the two are one method."""
    chain, x = gaussian(CosineSchedule(), 0.4, 0.3), torch.randn(4, 1)
    assert torch.allclose(sampled(chain, OnKarrasGrid(12), x), sampled(chain, Euler(12), x), atol=1e-10)


def test_ddim_with_eta_is_ancestral_sampling():
    """η = 1 is the reverse chain with its smaller variance: the same numbers from the same noise."""
    chain, x = gaussian(LinearSchedule(), 0.4, 0.3, steps=20), torch.randn(6, 1)
    chain.variance = "posterior"
    torch.manual_seed(1)
    one = sampled(chain, DDIM(20, eta=1.0), x)
    torch.manual_seed(1)
    assert torch.allclose(one, sampled(chain, Ancestral(20), x), atol=1e-10)


# -- laws ------------------------------------------------------------------------------------------------------------

ROWS = 10_000
EXACT_ENOUGH = [
    Ancestral(300),
    DDIM(200),
    DDIM(200, eta=1.0),
    Euler(200),
    Heun(40),
    StochasticHeun(60, inflation=1.0),
    DPMSolver(60),
    PredictorCorrector(150, snr=0.1),
    AnnealedLangevin(30, 60, 0.2),
]


@pytest.mark.parametrize("sampler", EXACT_ENOUGH, ids=lambda s: f"{type(s).__name__}{getattr(s, 'eta', '')}")
def test_moments_of_a_gaussian(sampler):
    """Mean and variance of N(1, ½): within 4 SE and the method's own bias, 2 % at these numbers of steps (false alarm 1e-3)."""
    chain = gaussian(CosineSchedule(), 0.5, 1.0)
    x = sampled(chain, sampler, torch.randn(ROWS, 1))
    assert abs(float(x.mean()) - 1) < 4 * math.sqrt(0.5 / ROWS) + 0.01
    assert abs(float(x.var()) / 0.5 - 1) < 4 * math.sqrt(2 / ROWS) + 0.02


@pytest.mark.parametrize("sampler", EXACT_ENOUGH, ids=lambda s: f"{type(s).__name__}{getattr(s, 'eta', '')}")
def test_weights_of_a_mixture(sampler):
    """0.3 of N(−2, 0.04) and 0.7 of N(1, 0.09): every sampler gets the share of each mode right (4 SE and 2 %)."""
    chain = mixture(CosineSchedule(), [[-2.0], [1.0]], [0.04, 0.09], [0.3, 0.7])
    rows = 5_000
    x = sampled(chain, sampler, torch.randn(rows, 1))
    assert abs(float((x < -0.5).double().mean()) - 0.3) < 4 * math.sqrt(0.21 / rows) + 0.02
    assert abs(float(x[x < -0.5].std()) - 0.2) < 0.03


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_sampler_does_not_see_what_the_network_predicts(predicts):
    """The same model told in five ways: the same samples from the same numbers."""
    schedule, x = CosineSchedule(), torch.randn(7, 1)
    want = sampled(gaussian(schedule, 0.5, 1.0, "noise"), Heun(10), x)
    assert torch.allclose(sampled(gaussian(schedule, 0.5, 1.0, predicts), Heun(10), x), want, atol=1e-8)


@pytest.mark.parametrize("sampler", [Euler(30), Heun(15), DPMSolver(20), DDIM(30), StochasticHeun(10, churn=0.0)])
def test_a_diffusion_read_as_a_score_model_and_back(sampler):
    """score = −ε / √(1 − ᾱ_t): a DDPM as a variance-exploding score network, and the reverse, sample alike.

    x_t = α_t y with y the variance-exploding state of the same ς: each network is asked at the time where the ratio of
    noise to signal is the same, and a sampler's path in y is then the same, on the same values of ς.
    """
    vp, ve = CosineSchedule(), GeometricSchedule(0.005, 80.0)
    ddpm = mixture(vp, [[-2.0], [1.0]], [0.04, 0.09], [0.3, 0.7])

    def score(y, t):
        ratio = ve.sigma(t)
        at = torch.as_tensor(vp.time_of(ratio.numpy()))
        said = ddpm(vp.alpha(at)[:, None] * y, at)
        return -said.noise / ratio[:, None]

    grid = ve.time_of(vp.noise_to_signal(np.linspace(0.95, 0.02, 12)))

    class Given(type(sampler)):
        def times(self, chain):
            times = grid if chain.schedule is ve else vp.time_of(ve.noise_to_signal(grid))
            return np.concatenate([times, [0.0]])

    given = Given(**{**vars(sampler), "steps": 12})
    y = torch.randn(9, 1) * float(ve.sigma(grid[0]))
    one = sampled(Denoiser(score, ve, "score"), given, y)
    other = sampled(ddpm, given, float(vp.alpha(vp.time_of(ve.sigma(grid[0])))) * y)
    # an NCSN ends at σ_min and not at 0: both then take x̂
    assert torch.allclose(one, other, atol=1e-6)


def test_plain_langevin_gets_the_weights_wrong_and_annealed_nearly_right():
    """0.8 and 0.2 at ±(5, 5): the published toy finds 0.511 and 0.784 for 0.8; 1,280 chains, error 0.014.

    Plain Langevin starts from a uniform square and keeps what it finds, for the score knows nothing of the weights of modes
    that are far apart. Ten levels of noise from 20 to 1, and 100 steps at each.
    """
    rows = 1280
    noise = GeometricSchedule(1.0, 20.0)
    chain = mixture(noise, [[5.0, 5.0], [-5.0, -5.0]], [1.0, 1.0], [0.8, 0.2])
    start = 16 * torch.rand(rows, 2) - 8
    annealed = sampled(chain, AnnealedLangevin(10, 100, 0.1, denoise=False), start)
    plain = mixture(GeometricSchedule(0.01, 0.010001), [[5.0, 5.0], [-5.0, -5.0]], [1.0, 1.0], [0.8, 0.2])
    x = start
    for _ in range(1000):
        x = x + 0.05 * plain(x, 0.0).score + math.sqrt(0.1) * torch.randn_like(x)
    shares = [float((found.sum(-1) > 0).double().mean()) for found in (x, annealed)]
    assert abs(shares[0] - 0.511) < 4 * 0.014 and abs(shares[1] - 0.784) < 4 * 0.014 and shares[1] - shares[0] > 0.15


# -- the interface ----------------------------------------------------------------------------------------------------


class Counted:
    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.inner(x, t)


@pytest.mark.parametrize("sampler", [cls(steps=6) for cls in SAMPLERS], ids=lambda s: type(s).__name__)
def test_runs_of_the_network_are_counted(sampler):
    chain = gaussian(CosineSchedule(), 0.5)
    chain.network = counted = Counted(chain.network)
    sampled(chain, sampler, torch.randn(3, 1))
    assert counted.calls == runs(sampler, chain)


def test_run_sample_and_the_command_line(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    data = probgen.load_data("two-moons")
    run = probgen.fit(probgen.load("ddpm", data, steps=5), data, steps=60, progress=False, out=tmp_path / "run")
    by_sampler = run.sample(30, sampler=DDIM(5))
    assert by_sampler["x"].shape == (30, 2) and set(by_sampler) == {"x"}
    assert np.array_equal(by_sampler["x"], run.sample(30, sampler=DDIM(5))["x"])
    assert not np.array_equal(by_sampler["x"], run.sample(30, seed=1, sampler=DDIM(5))["x"])
    assert main(["sample", str(tmp_path / "run"), "-n", "30", "--sampler", "ddim", "--steps", "5"]) == 0
    assert np.array_equal(np.load(tmp_path / "run" / "samples.npz")["x"], by_sampler["x"])
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--sampler", "dimm"]) != 0
    assert "did you mean 'ddim'" in capsys.readouterr().err
    vae = probgen.fit(probgen.load("vae", data), data, steps=1, progress=False)
    with pytest.raises(ProbgenError, match="DDIM needs a denoiser, and this program has none"):
        vae.sample(3, sampler=DDIM())


def test_a_grid_of_ratios_without_end_is_refused():
    chain = gaussian(RectifiedSchedule(), 0.5, predicts="velocity")
    for sampler in (Euler(5), Heun(5), DPMSolver(5)):
        with pytest.raises(ProbgenError, match=r"take DDIM, whose grid is of times"):
            sampled(chain, sampler, torch.randn(3, 1))
    x = torch.randn(5, 1)
    steps = [x]
    for t in (1.0, 0.75, 0.5, 0.25):  # along straight lines DDIM is Euler's method in t
        steps.append(steps[-1] - 0.25 * chain(steps[-1], t).velocity)
    assert torch.allclose(sampled(chain, DDIM(4), x), steps[-1], atol=1e-9)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_bad_settings_are_told(cls):
    with pytest.raises(ProbgenError, match=f"{cls.__name__}: `steps` is 0; it is a whole number, at least 1"):
        cls(steps=0)
    assert issubclass(cls, Sampler)


def test_guidance_of_a_gaussian_by_class():
    """Two classes at ±1: with guidance w the posterior mean of the label is (1 + w) times as far from the middle."""
    schedule = CosineSchedule()
    parts = [gaussian(schedule, 0.25, m).network for m in (-1.0, 1.0, 0.0)]

    def network(x, t, y):
        return torch.stack([part(x, t) for part in parts])[y, torch.arange(len(x))]

    chain = Denoiser(network, schedule, labels=torch.ones(4, dtype=torch.int64), classes=2)
    x = torch.randn(4, 1)
    found, (one, none) = chain.guided(1.5)(x, 0.4).noise, (chain(x, 0.4).noise, parts[2](x, torch.full((4,), 0.4)))
    assert torch.allclose(found, 2.5 * one - 1.5 * none)
    assert not torch.allclose(sampled(chain, DDIM(8), x), sampled(chain, DDIM(8, guidance=1.5), x))


# -- the density of the probability flow -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", [LinearSchedule(beta_max=40.0), CosineSchedule(end=0.99995), GeometricSchedule(0.001, 3000.0)], ids=str
)
def test_ode_log_likelihood_of_a_mixture_is_exact(schedule):
    """log p of a mixture in two dimensions along the flow, from schedules that leave next to nothing at t = 1: ≤ 1e-3."""
    means, scales = [[-2.0, 0.0], [1.0, 1.0]], torch.tensor([[0.2], [0.3]]).expand(2, 2)
    chain = mixture(schedule, means, [0.04, 0.09], [0.3, 0.7], steps=100_000)
    x = torch.tensor(means).repeat(3, 1) + scales.repeat(3, 1) * torch.randn(6, 2)
    parts = torch.distributions.Independent(torch.distributions.Normal(torch.tensor(means), scales), 1)
    true = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.tensor([0.3, 0.7])), parts)
    assert (log_density(chain, x, steps=120) - true.log_prob(x)).abs().max() < 1e-3


def test_the_divergence_of_a_gaussian_flow():
    """Of N(0, C) the integral of the trace is ½ log (C + ς_max²) / (C + ς_min²) a dimension: here by both traces.

    A linear field has the same trace along every sign, so that Hutchinson's estimate has no error at all.
    """
    schedule, c = GeometricSchedule(0.01, 20.0), 0.3
    chain, x = gaussian(schedule, c, steps=1_000_000), torch.tensor([[0.4]])
    low, high = schedule.noise_to_signal(np.array([1e-6, 1.0]))
    scale = math.sqrt((c + high**2) / (c + low**2))
    end = torch.distributions.Normal(0.0, math.sqrt(1 + high**2))
    true = end.log_prob(x * scale).sum() + math.log(scale)
    for trace in ("exact", "hutchinson"):
        assert abs(float(log_density(chain, x, steps=100, trace=trace) - true)) < 1e-6


def test_hutchinson_is_unbiased():
    """In expectation over the signs it is the exact trace: within 4 SE of 4,000 draws (false alarm 6e-5)."""
    chain = mixture(CosineSchedule(), [[-1.0, 0.5, 0.0], [1.0, 0.0, 0.3]], [0.1, 0.2], [0.4, 0.6])
    x = torch.tensor([[0.2, 0.4, -0.1]])
    exact = float(log_density(chain, x, steps=20))
    found = log_density(chain, x.expand(4000, 3), steps=20, trace="hutchinson")
    assert found.std() > 0.01 and abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(4000)


def test_readouts_of_one_trained_model():
    """On data of which all is known: bound ≤ importance weights ≤ log p, and the flow's bound beside them, in one table."""
    torch.set_default_dtype(torch.float32)
    rng = np.random.default_rng(0)
    data = probgen.load_data({"x": (2 + 0.5 * rng.normal(size=(4000, 1))).astype(np.float32)})
    program = probgen.load("ddpm", data, steps=20, hidden=32, predicts="v")
    run = probgen.fit(program, data, steps=400, lr=5e-3, ema=0.98, progress=False)
    new = (2 + 0.5 * rng.normal(size=(200, 1))).astype(np.float32)
    found, true = run.evaluate({"x": new}, k=50), -0.5 * math.log(2 * math.pi * math.e * 0.25)
    assert found["elbo"] < found["log_likelihood"]
    for name in ("elbo", "log_likelihood", "ode_log_likelihood"):
        assert true - 0.1 - 4 * found[f"{name}_se"] < found[name] < true + 4 * found[f"{name}_se"]
    assert any("exact trace" in note for note in found["notes"])


def test_what_a_schedule_or_sampler_of_ones_own_lacks_is_named():
    class Mine(NoiseSchedule):
        def alpha(self, t):
            return 1 - t

    with pytest.raises(TypeError, match="Mine must define `sigma`"):
        Mine().log_snr(0.5)
    with pytest.raises(TypeError, match="Sampler must define `step`"):
        Sampler().step(None, None, {}, [], ())
