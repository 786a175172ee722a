"""What Pyro programs learn and evaluate to, against closed forms: PCA, Gaussian evidence, conjugate posteriors, k-hat.

z ~ N(0, I), x | z ~ N(W z + b, s² I):   log p(x) = log N(x; b, W Wᵀ + s² I)
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs_pyro import CASES, normal_mean
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO, autoguide
from scipy import stats

import probgen
from probgen import Program
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.errors import ProbgenError
from probgen.fit import Options
from probgen.pyro import ELBO, IWAE, Engine, Trained
from probgen.pyro.trace import callables
from probgen.schedules import Cosine


def trained(program, arrays, precision="64", rows=None, **weights):
    """A program as it stands, with some of its parameters set."""
    count = len(next(iter(arrays.values())))
    run = probgen.fit(program, arrays, steps=0, precision=precision, batch_size=None, progress=False)
    values = {**{n: v.numpy() for n, v in run.trained.values.items()}, **weights}
    return Trained(program, values, run.trained.arrays, rows=rows or count, precision=precision)


# -- the linear-Gaussian VAE --------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
W, B, S = RNG.normal(size=(4, 2)), RNG.normal(size=4), 0.6
V = np.linalg.inv(np.eye(2) + W.T @ W / S**2)
X = (RNG.normal(size=(50, 2)) @ W.T + B + S * RNG.normal(size=(50, 4))).astype(np.float64)
EVIDENCE = stats.multivariate_normal(B, W @ W.T + S**2 * np.eye(4)).logpdf(X)


def linear_gaussian(widen=1.0, shift=0.0):
    """The program at its true parameters, with the exact posterior as guide, or one moved off it."""
    w, b, gain = (torch.tensor(a) for a in (W, B, V @ W.T / S**2))
    scale = torch.tensor(np.linalg.cholesky(V)) * widen

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.to(w) @ w.T + b, S).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = (x - b) @ gain.T + shift
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=scale))

    return Program(model, guide, by=ELBO())


def test_the_exact_posterior_has_the_evidence_at_every_draw():
    exact = trained(linear_gaussian(), {"x": X})
    weights = exact.log_weights({"x": X}, 7, seed=3)
    assert weights.shape == (7, 50) and np.abs(weights - EVIDENCE).max() < 1e-9
    assert np.abs(exact.elbo({"x": X}, 3, seed=1) - EVIDENCE).max() < 1e-9
    terms = exact.terms({"x": X}, 3, seed=2)
    assert np.abs(terms["x"] + terms["z"] - EVIDENCE).max() < 1e-9 and terms["z"].std() > 0.1
    values, log_p, log_q = exact.posterior({"x": X}, 5, seed=4)
    assert values["z"].shape == (5, 50, 2) and np.abs(log_p - log_q - EVIDENCE).max() < 1e-9
    joint, guide = exact.log_joint({"x": X}, {"z": values["z"][0]})
    assert np.abs(joint["z"] + joint["x"] - guide["z"] - EVIDENCE).max() < 1e-9
    with torch.random.fork_rng(), exact.running():
        for seed in range(3):
            torch.manual_seed(seed)
            loss = ELBO(kl="sampled").loss(exact.program.model, exact.program.guide, torch.tensor(X))
            assert loss == pytest.approx(-EVIDENCE.sum(), rel=1e-10)


def test_bounds_tighten_and_never_pass_the_evidence():
    """ELBO ≤ IWAE-5 ≤ IWAE-50 ≤ evidence, within 4 standard errors of 4,000 repeats: false alarm below 10⁻⁴."""
    off = trained(linear_gaussian(widen=1.3, shift=0.2), {"x": X[:4]})
    weights = off.log_weights({"x": X[:4]}, 200_000, seed=0).reshape(4000, 50, 4)
    truth = EVIDENCE[:4].sum()

    def bound(k):
        draws = (np.logaddexp.reduce(weights[:, :k], axis=1) - np.log(k)).sum(-1)
        return draws.mean(), draws.std() / len(draws) ** 0.5

    bounds = [bound(k) for k in (1, 5, 50)]
    for (low, low_se), (high, high_se) in zip(bounds, [*bounds[1:], (truth, 0.0)], strict=True):
        assert low <= high + 4 * np.hypot(low_se, high_se)
    assert bounds[0][0] < truth - 20 * bounds[0][1] and truth - bounds[2][0] < (truth - bounds[0][0]) / 10
    for k, loss in ((1, ELBO(kl="sampled")), (5, IWAE(5)), (50, IWAE(50))):  # the losses are these very bounds
        with torch.random.fork_rng(), off.running():
            torch.manual_seed(k)
            batch = torch.tensor(X[:4]).repeat(1, 1)
            draws = -np.array([loss.loss(off.program.model, off.program.guide, batch) for _ in range(200)])
        mean, error = bound(k)
        assert abs(draws.mean() - mean) < 4 * np.hypot(draws.std() / 200**0.5, error)


def test_the_maximum_is_probabilistic_pca():
    """Tipping & Bishop (1999): the maximum over W, b, s of the evidence is in the eigenvalues of the covariance."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 5)) + rng.normal(size=5) + 0.5 * rng.normal(size=(500, 5))
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    noise = eigenvalues[2:].mean()
    best = -0.5 * (5 * np.log(2 * np.pi) + np.log(eigenvalues[:2]).sum() + 3 * np.log(noise) + 5)
    torch.manual_seed(0)
    decoder, encoder = torch.nn.Linear(2, 5), torch.nn.Linear(5, 2)

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        tril = pyro.param("tril", 0.5 * torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(encoder(x), scale_tril=tril))

    run = probgen.fit(
        Program(model, guide, by=ELBO()), {"x": x}, steps=1500, batch_size=None, lr=0.03, schedule=Cosine(1, 0, 1500),
        precision="64", compile=False, progress=False,
    )  # fmt: skip
    weights = run.trained.log_weights({"x": x}, 50, seed=0)
    assert run.params["scale"] ** 2 == pytest.approx(noise, rel=0.02)
    elbo, error = weights.mean(), weights.mean(0).std() / 500**0.5
    assert elbo <= best + 4 * weights.mean(1).std()  # rows are those of the fit: only draws of z are random
    assert elbo == pytest.approx(best, abs=2e-3), (elbo, best, error)
    learned = run.params["decoder$$$weight"]
    covariance = learned @ learned.T + run.params["scale"] ** 2 * np.eye(5)
    evidence = stats.multivariate_normal(run.params["decoder$$$bias"], covariance).logpdf(x).mean()
    assert elbo - 4 * weights.mean(1).std() <= evidence <= best + 1e-9 and evidence == pytest.approx(best, abs=1e-3)


# -- a hierarchical one whose guide runs against the model --------------------------------------------------------


def hierarchical():
    """z2 ~ N(0, 1), z1 ~ N(z2, 1), x ~ N(z1, 1); q(z1 | x) q(z2 | z1) is the exact posterior, drawn bottom up."""

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
            pyro.sample("z2", dist.Normal(z1 / 2, 0.5**0.5))

    return Program(model, guide, by=ELBO())


def test_a_guide_against_the_model():
    x = np.tile([0.56, -0.56], 150)
    evidence = stats.norm(0, 3**0.5).logpdf(x)
    exact = trained(hierarchical(), {"x": x})
    assert exact.structure.analytic_kl() == ("z2",)  # p(z2) depends on nothing; p(z1 | z2) on a later draw
    assert np.abs(exact.log_weights({"x": x}, 9, seed=0) - evidence).max() < 1e-9
    model, guide, data = exact.program.model, exact.program.guide, torch.tensor(x)
    with torch.random.fork_rng(), exact.running():
        torch.manual_seed(0)
        sampled = [-ELBO(kl="sampled").loss(model, guide, data) / 300 for _ in range(5)]
        mixed = np.array([-ELBO().loss(model, guide, data) / 300 for _ in range(100)])
        stock = np.array([-TraceMeanField_ELBO().loss(model, guide, data) / 300 for _ in range(100)])
    assert sampled == pytest.approx([evidence.mean()] * 5, rel=1e-10)
    assert abs(mixed.mean() - evidence.mean()) < 4.5 * mixed.std() / 10
    # site by site, the KL at z1 meets a z2 that is drawn after it: 1/3 nat is lost, though the guide is exact
    assert evidence.mean() == pytest.approx(-1.52, abs=0.001)
    assert stock.mean() == pytest.approx(-1.52 - 1 / 3, abs=0.02)
    with pytest.raises(ProbgenError, match="TraceMeanField_ELBO takes the KL at 'z1' in closed form, but the model's"):
        probgen.fit(hierarchical(), {"x": x}, by=TraceMeanField_ELBO(), steps=1, progress=False)


def test_an_autoguides_jacobian():
    """s ~ Gamma(3, 2), q(log s) normal: Pyro's KL from a Delta drops dlog s/ds, ours is right, and theirs refused."""

    def model(x):
        s = pyro.sample("s", dist.Gamma(3.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    x = np.array([0.5, -1.2, 0.9])
    s = np.linspace(1e-4, 30, 400_001)
    joint = stats.gamma(3, scale=0.5).pdf(s) * np.prod([stats.norm(0, s).pdf(v) for v in x], axis=0)
    evidence = np.log(np.trapezoid(joint, s))
    for guide in (autoguide.AutoNormal, autoguide.AutoMultivariateNormal):
        program = Program(model, guide(model), by=ELBO())
        run = probgen.fit(program, {"x": x}, steps=300, lr=0.05, precision="64", compile=False, progress=False)
        draws = run.trained.elbo({"x": x}, 300, seed=0).sum(-1)
        assert evidence - 0.15 < draws.mean() < evidence + 4 * draws.std() / 300**0.5
        with run.trained.running(), torch.random.fork_rng():
            loss = np.mean([-ELBO().loss(program.model, program.guide, torch.tensor(x)) for _ in range(100)])
            stock = np.mean(
                [-TraceMeanField_ELBO().loss(program.model, program.guide, torch.tensor(x)) for _ in range(100)]
            )
        assert loss == pytest.approx(draws.mean(), abs=6 * draws.std() / 100**0.5 + 1e-9)
        assert abs(stock - evidence) > 0.05
        with pytest.raises(ProbgenError, match="leaves out the log-Jacobian"):
            probgen.fit(program, {"x": x}, by=TraceMeanField_ELBO(), steps=1, progress=False)


# -- minibatches --------------------------------------------------------------------------------------------------

N = 200
PLATES = {
    "len(x)": lambda x: pyro.plate("data", len(x)),
    "states N": lambda x: pyro.plate("data", N, subsample_size=len(x)),
}


def mean_problem(plate):
    x = np.random.default_rng(3).normal(1.5, 1, N)
    return normal_mean(PLATES[plate], start=0.1), {"x": x}


def regression_problem(plate):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(N, 2))

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with PLATES[plate](x):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)

    guide = autoguide.AutoMultivariateNormal(model, init_scale=0.05)
    return Program(model, guide, by=ELBO()), {"x": x, "y": x @ [1.0, -0.5] + 0.5 * rng.normal(size=N)}


def trained_widths(problem, plate, batch, steps, by=None):
    program, arrays = problem(plate)
    schedule = Cosine(1, 0.0, steps)
    run = probgen.fit(
        program, arrays, by=by, batch_size=batch, steps=steps, lr=0.02, schedule=schedule, compile=False, progress=False
    )
    return run, arrays


# 40 draws at once take the noise of a batch in log s, 4.5 a draw at B = N/20, to 0.7 a step: 3 % of s after the decay.
DRAWS = Trace_ELBO(num_particles=40, vectorize_particles=True)
BATCHES = [(N, 600), (N // 10, 800), (N // 20, 1000)]


@pytest.mark.parametrize("batch, steps", BATCHES)
def test_width_of_a_normal_mean(batch, steps):
    run, arrays = trained_widths(mean_problem, "len(x)", batch, steps, DRAWS)
    sd = (1 / (N + 0.01)) ** 0.5
    assert run.params["scale"] == pytest.approx(sd, rel=0.1)
    assert run.params["loc"] == pytest.approx(arrays["x"].sum() / (N + 0.01), abs=0.5 * sd)


@pytest.mark.parametrize("batch, steps", BATCHES)
def test_width_of_bayesian_regression(batch, steps):
    run, arrays = trained_widths(regression_problem, "len(x)", batch, steps, DRAWS)
    covariance = np.linalg.inv(np.eye(2) + arrays["x"].T @ arrays["x"] / 0.25)
    params = run.params
    tril = params["AutoMultivariateNormal.scale"][:, None] * params["AutoMultivariateNormal.scale_tril"]
    assert np.sqrt(np.diag(tril @ tril.T)) == pytest.approx(np.sqrt(np.diag(covariance)), rel=0.1)


@pytest.mark.parametrize("batch", [N, N // 10, N // 20])
@pytest.mark.parametrize("problem", [mean_problem, regression_problem])
def test_a_plate_that_states_n_trains_to_the_same_weights(problem, batch):
    """So its widths are those of the tests above."""
    plain, stated = (trained_widths(problem, plate, batch, 60)[0] for plate in PLATES)
    for name, value in plain.params.items():
        assert stated.params[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert stated.structure.states_rows and not plain.structure.states_rows


# -- k-hat and likelihoods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_k_hat_of_a_known_tail(k):
    """w = u^(−k) is Pareto with shape k: the mean over 50 repeats of 20,000 draws is within 0.05."""
    exact = trained(linear_gaussian(), {"x": X[:3]}, precision="32")
    weights = -k * np.log(np.random.default_rng(int(100 * k)).uniform(size=(20_000, 50)))
    assert exact.k_hat(weights).mean() == pytest.approx(k, abs=0.05)
    assert exact.k_hat(weights - 500.0) == pytest.approx(exact.k_hat(weights), abs=1e-6)


def test_k_hat_has_a_sign_and_constant_weights_have_none():
    exact = trained(linear_gaussian(), {"x": X[:3]}, precision="32")
    bounded = np.log(np.random.default_rng(0).uniform(size=(5000, 20)))  # uniform weights: shape −1
    assert exact.k_hat(bounded).mean() == pytest.approx(-1, abs=0.15)
    assert (exact.k_hat(np.full((5000, 2), -3.0)) == 0).all()


def test_mixture_likelihood_is_exact_per_datum():
    case = CASES["gmm"]()
    x = case.arrays["x"].astype(np.float64)
    gmm = trained(case.program, {"x": x})
    loc = np.array([[-1.0, 0.0], [1.0, 0.5], [3.0, 4.0]])
    densities = np.stack([stats.multivariate_normal(m, np.eye(2)).pdf(x) / 3 for m in loc])
    assert gmm.log_weights({"x": x}, 4, seed=0) == pytest.approx(np.broadcast_to(np.log(densities.sum(0)), (4, 24)))
    draws = gmm.posterior({"x": x}, 2000, seed=0)[0]["z"]
    shares = np.stack([(draws == j).mean(0) for j in range(3)])
    assert np.abs(shares - densities / densities.sum(0)).max() < 5 * 0.5 / 2000**0.5


def test_global_latents_beside_enumerated_ones():
    """The ELBO per datum sums to the loss: local terms with assignments summed out, global ones a share of 1/N."""
    case = CASES["gmm_tutorial"]()
    mixture = trained(case.program, case.arrays)
    x = case.arrays["x"]
    per_datum = mixture.elbo({"x": x}, 150, seed=0).sum(-1)
    assert set(mixture.terms({"x": x}, 1, seed=0)) == {"weights", "scale", "locs", "obs"}
    with mixture.running(), torch.random.fork_rng():
        loss = np.array(
            [-ELBO().loss(case.program.model, case.program.guide, torch.tensor(x).double()) for _ in range(150)]
        )
    assert abs(loss.mean() - per_datum.mean()) < 4.5 * np.hypot(loss.std(), per_datum.std()) / 150**0.5


def test_labels_summed_in_the_guide_or_drawn():
    """Enumeration in the guide is for training; the likelihood draws labels, and its mean weight is the ELBO."""
    case = CASES["semi_supervised_mask"]()
    program = trained(case.program, case.arrays)
    weights = program.log_weights(case.arrays, 3000, seed=0)
    engine_loss = ELBO()
    with program.running(), torch.random.fork_rng():
        batch = {
            n: torch.tensor(v).double() if v.dtype.kind == "f" else torch.tensor(v) for n, v in case.arrays.items()
        }
        loss = np.array([-engine_loss.loss(*callables(case.program), **batch) for _ in range(100)])
    error = np.hypot(loss.std() / 100**0.5, weights.sum(1).std() / 3000**0.5)
    assert abs(loss.mean() - weights.sum(1).mean()) < 4.5 * error


def test_a_masked_row_has_density_one():
    case = CASES["masked_site"]()
    masked = trained(case.program, case.arrays)
    terms = masked.terms(case.arrays, 2, seed=0)
    assert (terms["x"][:, case.arrays["observed"] == 0] == 0).all() and (
        terms["x"][:, case.arrays["observed"] == 1] < 0
    ).all()


@pytest.mark.parametrize("name", ["plate_states_rows", "self_subsampling"])
def test_any_number_of_rows_whatever_a_plate_says(name):
    """A plate that states N, or subsamples, holds the rows at hand when likelihoods are asked for."""
    case = CASES[name]()
    mean = trained(case.program, case.arrays, loc=np.array(2.0), scale=np.array(np.log(1e-6)))
    x = np.linspace(-1, 5, 60)
    assert mean.log_weights({"x": x}, 2, seed=0) == pytest.approx(
        np.broadcast_to(stats.norm(2, 1).logpdf(x), (2, 60)), abs=1e-4
    )
    assert mean.draw(1, 0, {"x": x[:1]})["x"].shape == (1,)


def test_the_validation_loss_of_a_program_that_subsamples():
    """It is that of all validation rows, per datum, as for the plain plate."""
    x = 2 + np.random.default_rng(0).normal(size=120)
    plain = normal_mean(lambda x: pyro.plate("data", len(x)))

    def loss_on(program, seed):
        data = probgen.load_data({"x": x})
        feed = Feed(data.train, Preparation.of({}, data), None, 0)
        engine = Engine(program, ELBO(), feed, Options(steps=1, batch_size=None))
        return engine.loss_on(engine.start(), [{"x": x[:40].astype(np.float32)}], seed)

    assert loss_on(CASES["self_subsampling"]().program, 1) == pytest.approx(loss_on(plain, 1), rel=1e-5)
