"""Coordinate-ascent variational Bayes against closed forms, quadrature, scikit-learn and the program itself."""

import numpy as np
import pytest
from conjugate_programs import (
    Lib,
    bernoulli_mixture,
    beta_bernoulli,
    dirichlet_categorical,
    gamma_poisson,
    gaussian_mixture,
    normal_gamma,
    normal_normal,
    normal_wishart,
    wishart_mixture,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

import probgen
from probgen import ProbgenError
from probgen.data import as_rows
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.fit.recipe import Options
from probgen.pyro import EM

BACKENDS = ("pyro", "numpyro")


def engine(lib, program, arrays, precision="64", **options):
    """The engine of EM(variational=True) on all rows."""
    feed = Feed(as_rows(arrays), Preparation({}, {}), None, 0)
    settings = Options(steps=10, batch_size=None, device="cpu", precision=precision)
    by = lib.by.EM(variational=True, **options)
    return by.engine(program, by, feed, settings)


def after(ascent, steps, state=None):
    """The state after some steps, and the losses on the way."""
    return ascent.advance(ascent.start() if state is None else state, 0, steps)


def learned(ascent, steps):
    """The guide's parameters and the bound of all data after some steps."""
    state, metrics = after(ascent, steps)
    params = {name: path[-1] for name, path in ascent.history(state).items()}
    return params, -metrics["loss"][-1] * ascent._feed.rows


def pulled(seed, n, *centres, scale=1.0):
    """Rows around centres, n each."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(c, scale, (n, len(np.atleast_1d(c)))) for c in centres])


# -- no local latents: the posterior and the evidence in closed form, after one step ------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_beta_bernoulli(backend):
    x = np.random.default_rng(0).integers(0, 2, (20, 2)).astype(float)
    params, bound = learned(engine(lib := Lib(backend), beta_bernoulli(lib), {"x": x}), 1)
    a, b, s = np.array([2, 1.5]), 3.0, x.sum(0)
    np.testing.assert_allclose(params["yes"], a + s, rtol=1e-9)
    np.testing.assert_allclose(params["no"], b + 20 - s, rtol=1e-9)
    evidence = (special.betaln(a + s, b + 20 - s) - special.betaln(a, b)).sum()
    np.testing.assert_allclose(bound, evidence, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_poisson(backend):
    """The guide's rate is written as one over a parameter, which is found by itself."""
    x = np.random.default_rng(1).poisson(3.0, 15)
    params, bound = learned(engine(lib := Lib(backend), gamma_poisson(lib), {"x": x}), 1)
    a, b = 2 + x.sum(), 0.5 + 15
    np.testing.assert_allclose([params["shape"], 1 / params["scale"]], [a, b], rtol=1e-9)
    evidence = special.gammaln(a) - a * np.log(b) - special.gammaln(2) + 2 * np.log(0.5) - special.gammaln(x + 1).sum()
    np.testing.assert_allclose(bound, evidence, atol=1e-6)


def test_gamma_exponential():
    x = np.random.default_rng(2).exponential(2.0, 15)
    params, bound = learned(engine(lib := Lib("pyro"), gamma_poisson(lib, "Exponential"), {"x": x}), 1)
    a, b = 2 + 15, 0.5 + x.sum()
    np.testing.assert_allclose([params["shape"], 1 / params["scale"]], [a, b], rtol=1e-9)
    evidence = special.gammaln(a) - a * np.log(b) - special.gammaln(2) + 2 * np.log(0.5)
    np.testing.assert_allclose(bound, evidence, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dirichlet_categorical(backend):
    x = np.random.default_rng(3).integers(0, 3, 25)
    params, bound = learned(engine(lib := Lib(backend), dirichlet_categorical(lib), {"x": x}), 1)
    alpha, counts = np.array([0.5, 1, 2]), np.bincount(x, minlength=3)
    np.testing.assert_allclose(params["counts"], alpha + counts, rtol=1e-9)

    def log_beta(a):
        return special.gammaln(a).sum() - special.gammaln(a.sum())

    np.testing.assert_allclose(bound, log_beta(alpha + counts) - log_beta(alpha), atol=1e-6)


def test_normal_of_known_variance():
    """The evidence is that of one Gaussian vector with covariance σ² I + s² 11ᵀ."""
    x = np.random.default_rng(4).normal(2, 0.7, 12)
    params, bound = learned(engine(lib := Lib("pyro"), normal_normal(lib), {"x": x}), 1)
    precision = 1 / 4 + 12 / 0.49
    np.testing.assert_allclose(params["loc"], (1 / 4 + x.sum() / 0.49) / precision, rtol=1e-7)
    np.testing.assert_allclose(params["scale"], precision**-0.5, rtol=1e-7)
    evidence = stats.multivariate_normal(np.ones(12), 0.49 * np.eye(12) + 4).logpdf(x)
    np.testing.assert_allclose(bound, evidence, atol=1e-6)


def normal_gamma_posterior(x, a=2.0, b=1.5, m=0.5, kappa=0.3):
    """One datum at a time; the evidence is the product of Student predictives."""
    evidence = 0.0
    for one in x:
        evidence += stats.t(2 * a, m, np.sqrt(b * (kappa + 1) / (a * kappa))).logpdf(one)
        a, b = a + 0.5, b + kappa * (one - m) ** 2 / (2 * (kappa + 1))
        m, kappa = (kappa * m + one) / (kappa + 1), kappa + 1
    return {"a": a, "b": b, "m": m, "kappa": kappa}, evidence


@pytest.mark.parametrize("backend", BACKENDS)
def test_normal_gamma(backend):
    x = np.random.default_rng(5).normal(3, 2, 18)
    params, bound = learned(engine(lib := Lib(backend), normal_gamma(lib), {"x": x}), 1)
    closed, evidence = normal_gamma_posterior(x)
    for name, value in closed.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-7)
    np.testing.assert_allclose(bound, evidence, atol=1e-6)


def normal_wishart_posterior(x, nu, S, kappa, m):
    """One datum at a time; the evidence is the product of multivariate Student predictives."""
    rate, evidence, d = np.linalg.inv(S @ S.T), 0.0, x.shape[1]
    for one in x:
        free = nu - d + 1
        evidence += stats.multivariate_t(m, rate * (kappa + 1) / (kappa * free), free).logpdf(one)
        rate = rate + kappa / (kappa + 1) * np.outer(one - m, one - m)
        m, kappa, nu = (kappa * m + one) / (kappa + 1), kappa + 1, nu + 1
    return {"nu": nu, "m": m, "kappa": kappa}, rate, evidence


@pytest.mark.parametrize("backend", BACKENDS)
def test_normal_wishart(backend):
    x = np.random.default_rng(6).normal(size=(15, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]]) + 2
    params, bound = learned(engine(lib := Lib(backend), normal_wishart(lib), {"x": x}), 1)
    S = np.array([[0.8, 0.0], [0.3, 0.6]])
    closed, rate, evidence = normal_wishart_posterior(x, 5.0, S, 0.4, np.array([0.5, -1.0]))
    for name, value in closed.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-7)
    np.testing.assert_allclose(params["S"] @ params["S"].T, np.linalg.inv(rate), rtol=1e-7)
    np.testing.assert_allclose(bound, evidence, atol=1e-6)


# -- mixtures ------------------------------------------------------------------------------------------------------


def sklearn_path(x, responsibilities, covariance, steps, **priors):
    """scikit-learn's variational mixture from given responsibilities: an M-step, then steps of E and M."""
    from sklearn.mixture import BayesianGaussianMixture

    peer = BayesianGaussianMixture(
        n_components=responsibilities.shape[1],
        covariance_type=covariance,
        weight_concentration_prior_type="dirichlet_distribution",
        reg_covar=0.0,
        **priors,
    )
    peer._check_parameters(x)
    peer._initialize(x, responsibilities)
    for _ in range(steps):
        peer._m_step(x, peer._e_step(x)[1])
    return peer


def compared(lib, program, x, responsibilities, steps):
    """The guide's parameters after as many steps from the same responsibilities."""
    ascent = engine(lib, program, {"x": x})
    state, _ = after(ascent, steps, ascent._at(ascent.updated(responsibilities), {}))
    return {name: path[-1] for name, path in ascent.history(state).items()}


def soft(n, states, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(states), n)


PRIORS = {"weight_concentration_prior": 0.7, "mean_precision_prior": 0.5}


def test_full_mixture_equals_scikit_learn():
    x, r = pulled(0, 40, (-3, 0), (0, 2), (3, -1)), soft(120, 3)
    theirs = sklearn_path(
        x,
        r,
        "full",
        30,
        mean_prior=[0.3, 0.3],
        degrees_of_freedom_prior=4.0,
        covariance_prior=np.eye(2) / 0.81,
        **PRIORS,
    )
    params = compared(lib := Lib("pyro"), wishart_mixture(lib), x, r, 30)
    inverse = np.linalg.inv(params["nu"][:, None, None] * params["S"] @ np.swapaxes(params["S"], 1, 2))
    for mine, their in (
        (params["alpha"], theirs.weight_concentration_), (params["kappa"], theirs.mean_precision_),
        (params["m"], theirs.means_), (params["nu"], theirs.degrees_of_freedom_), (inverse, theirs.covariances_),
    ):  # fmt: skip
        np.testing.assert_allclose(mine, their, atol=1e-6)


@pytest.mark.parametrize("covariance", ["diag", "spherical"])
def test_diagonal_and_spherical_mixtures_equal_scikit_learn_on_a_line(covariance):
    """In more dimensions its E-step takes a Wishart's E log|Λ| for D independent gammas, so it is not the optimum."""
    x, r = pulled(1, 40, -4.0, 0.0, 3.0), soft(120, 3)
    prior = np.array([1.6]) if covariance == "diag" else 1.6
    options = {"mean_prior": [0.3], "degrees_of_freedom_prior": 3.0, "covariance_prior": prior}
    theirs = sklearn_path(x, r, covariance, 30, **options, **PRIORS)
    params = compared(lib := Lib("pyro"), gaussian_mixture(lib, D=1), x, r, 30)
    variance = (params["b"][:, 0] / params["a"]).reshape(theirs.covariances_.shape)
    for mine, their in (
        (params["alpha"], theirs.weight_concentration_), (params["kappa"], theirs.mean_precision_),
        (params["m"], theirs.means_), (2 * params["a"], theirs.degrees_of_freedom_), (variance, theirs.covariances_),
    ):  # fmt: skip
        np.testing.assert_allclose(mine, their, atol=1e-6)


def test_a_diagonal_update_equals_scikit_learns():
    x, r = pulled(2, 40, (-3, 0), (0, 2), (3, -1)), soft(120, 3)
    options = {"mean_prior": [0.3, 0.3], "degrees_of_freedom_prior": 3.0, "covariance_prior": np.array([1.6, 1.6])}
    theirs = sklearn_path(x, r, "diag", 0, **options, **PRIORS)
    params = compared(lib := Lib("pyro"), gaussian_mixture(lib), x, r, 0)
    np.testing.assert_allclose(params["m"], theirs.means_, atol=1e-6)
    np.testing.assert_allclose(2 * params["a"], theirs.degrees_of_freedom_, atol=1e-6)
    np.testing.assert_allclose(params["b"] / params["a"][:, None], theirs.covariances_, atol=1e-6)


def test_a_tied_update_is_the_posterior_given_the_assignments():
    """scikit-learn divides a tied update by K, which is no optimum; here: hard labels, rows less their known means.

    With κ₀ → 0 the marginal posterior of Λ given labels is Wishart(ν₀ + N, (R₀ + within-scatter)⁻¹), N rows with K
    free means: the joint one has ν₀ + N and the same rate.
    """
    x = pulled(3, 30, (-3, 0), (0, 2), (3, -1))
    labels = np.repeat(np.arange(3), 30)
    program = wishart_mixture(lib := Lib("pyro"), kappa0=1e-9, tied=True)
    params = compared(lib, program, x, np.eye(3)[labels], 0)
    within = sum(
        (x[labels == k] - x[labels == k].mean(0)).T @ (x[labels == k] - x[labels == k].mean(0)) for k in range(3)
    )
    np.testing.assert_allclose(params["nu"], 4 + 90, rtol=1e-9)
    np.testing.assert_allclose(params["S"] @ params["S"].T, np.linalg.inv(np.eye(2) / 0.81 + within), rtol=1e-5)


@pytest.mark.parametrize("make", [gaussian_mixture, wishart_mixture])
def test_both_backends_take_the_same_steps(make):
    x = pulled(4, 25, (-3, 0), (0, 2), (3, -1))
    (one, bound), (two, same) = (learned(engine(lib := Lib(b), make(lib), {"x": x}), 6) for b in BACKENDS)
    np.testing.assert_allclose(bound, same, rtol=1e-9)
    for name, value in one.items():
        np.testing.assert_allclose(value, two[name], rtol=1e-6, atol=1e-9)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(*[st.floats(-50, 50, allow_nan=False)] * 2), min_size=3, max_size=25),
    seed=st.integers(0, 99),
)
def test_the_bound_never_decreases(rows, seed):
    """Also with duplicated points, constant columns and fewer clusters than components, from random assignments."""
    lib = Lib("pyro")
    ascent = engine(lib, (gaussian_mixture if seed % 2 else wishart_mixture)(lib), {"x": np.array(rows)})
    state = ascent._at(ascent.updated(soft(len(rows), 3, seed)), {})
    _, metrics = after(ascent, 25, state)
    losses = np.concatenate([[-state["bound"]], metrics["loss"]])
    assert (np.diff(losses) <= 1e-9 * (1 + np.abs(losses[1:]))).all()


def test_a_mixture_of_bernoullis_with_a_fixed_coin():
    """Everything that is not a conjugate latent may be fixed; the bound lies under the evidence by enumeration."""
    lib = Lib("pyro")
    x = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0]], float)
    _, bound = learned(engine(lib, bernoulli_mixture(lib), {"x": x}, init="random"), 40)
    terms = []
    for code in range(2**5):
        z = (code >> np.arange(5)) & 1
        total = -5 * np.log(2)
        for k in (0, 1):
            s, n = x[z == k].sum(0), (z == k).sum()
            total += (special.betaln(1.2 + s, 1.5 + n - s) - special.betaln(1.2, 1.5)).sum()
        terms.append(total)
    evidence = special.logsumexp(terms)
    assert evidence - 2.5 < bound < evidence


# -- the bound and the program ------------------------------------------------------------------------------------


def draws_of(run, data, draws):
    """log p(θ) − log q(θ) [draws], and log p(z = k, x_n | θ) [draws, K, N], by the trained program itself."""
    import torch
    from pyro import poutine

    x = torch.tensor(data)
    ratios, joints = [], []
    for i in range(draws):
        torch.manual_seed(i)
        q = poutine.trace(run.guide).get_trace(x)
        theta = {n: s["value"] for n, s in q.nodes.items() if s["type"] == "sample"}
        joint = []
        for k in range(3):
            fixed = {**theta, "z": torch.full((len(x),), k)}
            p = poutine.trace(poutine.condition(run.model, data=fixed)).get_trace(x)
            p.compute_log_prob()
            joint.append((p.nodes["z"]["log_prob"] + p.nodes["x"]["log_prob"]).detach().numpy())
        q.compute_log_prob()
        ratios.append(sum(float(p.nodes[n]["log_prob_sum"] - q.nodes[n]["log_prob_sum"]) for n in theta))
        joints.append(joint)
    return np.array(ratios), np.array(joints)


@pytest.fixture(scope="module")
def mixture_run():
    """A full mixture learned by coordinate ascent, in float64."""
    lib = Lib("pyro")
    x = pulled(5, 15, (-2, 0), (0, 2), (2, -1))
    by = lib.by.EM(variational=True)
    return probgen.fit(wishart_mixture(lib), {"x": x}, by=by, precision="64", progress=False), x


def test_the_closed_form_is_the_programs_own_bound(mixture_run):
    """E_q[Σ_nk r_nk (log p(k, x_n | θ) − log r_nk) + log p(θ) − log q(θ)] by 400 draws of the guide, at the optimal r.

    Within 4.5 standard errors, which fails by chance once in 150,000 seeds; and the program's own ELBO, with z summed
    out at every θ, is not below it.
    """
    run, x = mixture_run
    loss = run.metrics["loss"][-1] * len(x)
    ratios, joints = draws_of(run, x, 400)
    lib = Lib("pyro")
    ascent = engine(lib, wishart_mixture(lib), {"x": x})
    natural = ascent._prior.of(_hyper(run.params))
    expected = ascent._prior.expectation(natural)
    logits = ascent._form.weights(expected) @ ascent._form.matrix(ascent._runs.ops, _tensors(x), len(x)).numpy()
    r = special.softmax(logits, 0)
    per_draw = (r * (joints - np.log(r))).sum((1, 2)) + ratios
    error = per_draw.std() / np.sqrt(len(per_draw))
    assert abs(per_draw.mean() + loss) < 4.5 * error and error < 1.0
    summed = special.logsumexp(joints, 1).sum(-1) + ratios
    assert (summed >= per_draw - 1e-9).all()
    elbo = run.evaluate(run.data.train, k=100)["elbo"] * len(x)
    assert elbo > -loss - 4.5 * error


def _tensors(x):
    import torch

    return {"x": torch.tensor(x)}


def _hyper(params):
    S = params["S"]
    return {
        "pi": {"concentration": params["alpha"]},
        "tril": {"concentration": params["nu"], "rate_matrix": np.linalg.inv(S @ np.swapaxes(S, 1, 2))},
        "mu": {"loc": params["m"], "precision": params["kappa"]},
    }


def test_the_bound_lies_under_the_evidence_by_enumeration():
    """Four data, three components: the evidence is a sum over 3⁴ assignments, each in closed form."""
    lib, x = Lib("pyro"), np.array([[-1.0], [-0.5], [1.0], [2.5]])
    _, bound = learned(engine(lib, gaussian_mixture(lib, D=1), {"x": x}, init="random"), 60)
    terms = []
    for code in range(3**4):
        z = code // 3 ** np.arange(4) % 3
        counts = np.bincount(z, minlength=3)
        total = (
            special.gammaln(2.1) - special.gammaln(6.1) + (special.gammaln(0.7 + counts) - special.gammaln(0.7)).sum()
        )
        terms.append(total + sum(normal_gamma_posterior(x[z == k, 0], 1.5, 0.8, 0.3, 0.5)[1] for k in range(3)))
    evidence = special.logsumexp(terms)
    assert evidence - 3 < bound < evidence


def test_three_forms_of_the_elbo_by_quadrature():
    """μ ~ N(1, 4), x_n ~ N(μ, 0.49): at any Gaussian q the three forms agree, and at the optimum they are log p(x)."""
    lib, x = Lib("pyro"), np.array([1.3, 2.2, 0.4, 1.9])
    ascent = engine(lib, normal_normal(lib), {"x": x})
    prior, post = (
        stats.norm(1, 2),
        stats.norm((1 / 4 + x.sum() / 0.49) / (1 / 4 + 4 / 0.49), (1 / 4 + 4 / 0.49) ** -0.5),
    )
    evidence = stats.multivariate_normal(np.ones(4), 0.49 * np.eye(4) + 4).logpdf(x)
    mu = np.linspace(-8, 10, 20001)
    likelihood = stats.norm(mu[:, None], 0.7).logpdf(x).sum(1)
    for loc, scale in ((0.5, 0.9), (post.mean(), post.std())):
        q = stats.norm(loc, scale)

        def average(values, q=q):
            return np.trapezoid(q.pdf(mu) * values, mu)

        joint = average(likelihood + prior.logpdf(mu) - q.logpdf(mu))
        reconstruction = average(likelihood) - average(q.logpdf(mu) - prior.logpdf(mu))
        gap = evidence - average(q.logpdf(mu) - post.logpdf(mu))
        np.testing.assert_allclose([joint, reconstruction], gap, atol=1e-9)
        natural = ascent._prior.of({"mu": {"loc": np.array(loc), "precision": np.array(scale**-2.0)}})
        log_z, _ = ascent._expected(ascent._values, natural)
        np.testing.assert_allclose(log_z - ascent._prior.kl(natural), joint, atol=1e-8)


def test_svi_lies_under_the_closed_form_and_importance_weights_tighten_it():
    """The program's own ELBO and IWAE at a guide that is off, against the closed-form evidence, within 4.5 SE."""
    import pyro
    import torch

    from probgen.pyro import ELBO, IWAE
    from probgen.pyro.leaves import private_store

    lib, x = Lib("pyro"), np.random.default_rng(6).normal(3, 2, 12)
    program, arrays = normal_gamma(lib), {"x": torch.tensor(x, dtype=torch.float32)}
    _, evidence = normal_gamma_posterior(x)

    def bound(loss, repeats):
        found = [-float(loss.differentiable_loss(program.model, program.guide, **arrays)) for _ in range(repeats)]
        return np.mean(found), np.std(found) / np.sqrt(repeats)

    with torch.random.fork_rng(), private_store(), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(0)
        pyro.param("m", torch.tensor(x.mean() + 0.3, dtype=torch.float32))
        for name, value in (("a", 6.0), ("b", 20.0), ("kappa", 6.0)):
            pyro.param(name, torch.tensor(value), constraint=lib.C.positive)
        elbo, error = bound(ELBO(), 600)
        means, errors = zip(*[bound(IWAE(k), repeats) for k, repeats in ((1, 200), (5, 80), (50, 40))], strict=True)
    assert elbo + 4.5 * error < evidence
    assert means[0] + 4.5 * errors[0] < means[1] < means[2] < evidence + 4.5 * errors[2]


# -- the run ------------------------------------------------------------------------------------------------------


@pytest.mark.nightly_on("numpyro")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_learned_answers_the_verbs(backend, tmp_path):
    lib = Lib(backend)
    x = pulled(7, 30, (-3, 0), (0, 2), (3, -1)).astype(np.float32)
    by = lib.by.EM(variational=True, tol=1e-5)
    program = gaussian_mixture(lib)
    run = probgen.fit(program, {"x_train": x, "x_valid": x[::3]}, by=by, out=tmp_path / "run", progress=False)
    assert np.isfinite(run.metrics["valid_loss"]).all() and len(run.metrics["loss"]) < 100  # it converged
    drawn = run.sample(400)["x"]
    assert np.abs(drawn.mean(0) - x.mean(0)).max() < 4.5 * x.std(0).max() / 20 + 0.1  # 4.5 SE, and the prior's pull
    posterior = run.posterior(x[:6], draws=50)
    assert posterior["posterior"]["mu"].shape == (1, 50, 3, 2)
    rows = run.evaluate(x, k=50)
    assert rows["elbo"] > -run.metrics["loss"][-1] - 4.5 * rows["elbo_se"]
    again = probgen.Run.open(tmp_path / "run", program=program.learned_by(by))
    np.testing.assert_array_equal(again.params["m"], run.params["m"])
    assert again.history["m"].shape[0] == len(run.metrics["loss"]) + 1
    np.testing.assert_allclose(again.history["m"][-1], run.params["m"], rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_bit_for_bit():
    lib, x = Lib("pyro"), pulled(8, 20, (-3, 0), (0, 2), (3, -1))
    ascent = engine(lib, gaussian_mixture(lib), {"x": x})
    whole, _ = after(ascent, 6)
    half, _ = after(ascent, 3)
    other = engine(lib, gaussian_mixture(lib), {"x": x})
    rest, _ = other.advance(other.restore(ascent.export(half)), 3, 6)
    for name, value in ascent.export(whole).items():
        np.testing.assert_array_equal(other.export(rest)[name], value)
    np.testing.assert_allclose(ascent.loss_on(whole, [{"x": x}]), -whole["bound"], rtol=1e-12)


def test_starts():
    """The best of several restarts; and the guide as it stands."""
    lib, x = Lib("pyro"), pulled(9, 20, (-3, 0), (0, 2), (3, -1))
    bounds = [
        after(engine(lib, gaussian_mixture(lib), {"x": x}, init="random", restarts=n), 0)[0]["bound"] for n in (1, 4)
    ]
    assert bounds[1] > bounds[0]
    state = engine(lib, gaussian_mixture(lib), {"x": x}, init="program").start()
    np.testing.assert_allclose(state["history"]["alpha"][0], 2)
    np.testing.assert_allclose(state["history"]["kappa"][0], 1)


def test_far_from_the_origin_single_precision_loses_nothing():
    """The data are centred before they are squared."""
    lib, x = Lib("pyro"), pulled(10, 40, (-3, 0), (0, 2), (3, -1)) + 3000
    bounds = [learned(engine(lib, wishart_mixture(lib, m0=3000.0), {"x": x}, precision=p), 15)[1] for p in ("32", "64")]
    np.testing.assert_allclose(*bounds, rtol=2e-4)


# -- what is refused ----------------------------------------------------------------------------------------------


def refused(program, x, match, backend="pyro", **options):
    lib = Lib(backend)
    with pytest.raises(ProbgenError, match=match) as error:
        engine(lib, program(lib), {"x": x}, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prior_that_is_not_conjugate_is_named(backend):
    def program(lib):
        def model(x):
            rate = lib.sample("rate", lib.dist.LogNormal(lib.array(0), lib.array(1)))
            with lib.plate("data", len(x)):
                lib.sample("x", lib.dist.Poisson(rate), obs=x)

        return lib.program(
            model, lambda x: lib.sample("rate", lib.dist.Gamma(lib.positive("a", 1), lib.positive("b", 1)))
        )

    refused(program, np.arange(5), "prior of 'rate' is a LogNormal.*NUTS", backend)


def variant(likelihood, prior=None, guide=None):
    """A program with τ ~ Gamma, μ ~ N(0, 1), and the site x that is given."""

    def program(lib):
        def model(x):
            tau = lib.sample("tau", lib.dist.Gamma(lib.array(2), lib.array(1)))
            mu = lib.sample("mu", (prior or (lambda lib, tau: lib.dist.Normal(lib.array(0), lib.array(1))))(lib, tau))
            with lib.plate("data", len(x)):
                lib.sample("x", likelihood(lib, mu, tau, x), obs=x)

        def own(x):
            tau = lib.sample("tau", lib.dist.Gamma(lib.positive("a", 1), lib.positive("b", 1)))
            lib.sample("mu", lib.dist.Normal(lib.param("m", lib.array(0)), (lib.positive("kappa", 1) * tau) ** -0.5))

        return lib.program(model, guide(lib) if guide else own)

    return program


def given_tau(lib, tau):
    return lib.dist.Normal(lib.array(0), (2 * tau) ** -0.5)


def plain(lib, mu, tau, x):
    return lib.dist.Normal(mu, tau**-0.5)


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (variant(plain), "not conjugate at 'x': its `loc`.*precision is a multiple"),
        (variant(lambda lib, mu, tau, x: lib.dist.Normal(mu, tau), given_tau), "its `scale` is neither fixed"),
        (variant(lambda lib, mu, tau, x: lib.dist.Normal(2 * mu, tau**-0.5), given_tau), "not conjugate at 'x'"),
        (variant(lambda lib, mu, tau, x: lib.dist.Cauchy(mu, tau**-0.5), given_tau), "'x' is a Cauchy"),
        (variant(lambda lib, mu, tau, x: plain(lib, mu, tau, x).mask(False), given_tau), "a mask, a scale"),
        (variant(plain, lambda lib, tau: lib.dist.Normal(tau, (2 * tau) ** -0.5)), "`loc` of the prior of 'mu' depends"),
        (variant(plain, lambda lib, tau: lib.dist.Normal(lib.array(0), tau**-0.7)), "precision of the prior of 'mu'"),
        (variant(plain, given_tau, lambda lib: None), "guide draws 'tau' from nothing.*dist.Gamma"),
        (
            variant(plain, given_tau, lambda lib: lambda x: (
                lib.sample("tau", lib.dist.LogNormal(lib.param("a", lib.array(0)), lib.positive("b", 1))),
                lib.sample("mu", lib.dist.Normal(lib.param("m", lib.array(0)), lib.positive("s", 1))),
            )),
            "guide draws 'tau' from a LogNormal",
        ),
        (
            variant(plain, given_tau, lambda lib: lambda x: (
                lib.sample("tau", lib.dist.Gamma(lib.positive("a", 1), lib.positive("b", 1))),
                lib.sample("mu", lib.dist.Normal(lib.param("m", lib.array(0)), lib.positive("s", 1))),
            )),
            "guide's 'mu'.*kappa.*tau",
        ),
        (
            variant(plain, given_tau, lambda lib: lambda x: lib.sample("mu", lib.dist.Normal(
                lib.param("m", lib.array(0)), lib.sample("tau", lib.dist.Gamma(lib.array(2), lib.positive("b", 1))) ** -0.5
            ))),
            "of the guide's 'tau' is not a parameter",
        ),
    ],
)  # fmt: skip
def test_what_is_not_conjugate_is_refused_in_a_sentence(program, match):
    refused(program, np.random.default_rng(0).normal(size=12), match)


def test_a_regression_is_refused():
    lib = Lib("pyro")

    def model(x, y):
        w = lib.sample("w", lib.dist.Normal(lib.array(0), lib.array(1)))
        with lib.plate("data", len(x)):
            lib.sample("y", lib.dist.Normal(w * x, lib.array(1)), obs=y)

    def guide(x, y):
        lib.sample("w", lib.dist.Normal(lib.param("m", lib.array(0)), lib.positive("s", 1)))

    x = np.random.default_rng(0).normal(size=12)
    with pytest.raises(ProbgenError, match="differs from row to row"):
        engine(lib, lib.program(model, guide), {"x": x, "y": 2 * x})


def test_options_that_make_no_sense_are_refused():
    lib, x = Lib("pyro"), pulled(0, 5, (-3, 0), (0, 2))
    with pytest.raises(ProbgenError, match="all rows at every step"):
        engine(lib, gaussian_mixture(lib), {"x": x}, hard=True)
    with pytest.raises(ProbgenError, match="only 2 rows"):
        engine(lib, gaussian_mixture(lib), {"x": x[:2]}).start()
    with pytest.raises(ProbgenError, match="conjugate priors, or use EM"):
        engine(lib, lib.program(lambda x: _points(lib, x), None), {"x": x})


def _points(lib, x):
    with lib.plate("data", len(x)):
        lib.sample("x", lib.dist.Normal(lib.param("m", lib.array([0, 0])), lib.array(1)).to_event(1), obs=x)


def test_a_parameter_of_the_model_is_refused():
    lib = Lib("pyro")

    def model(x):
        p = lib.sample("p", lib.dist.Beta(lib.positive("a0", 1), lib.array(1)))
        with lib.plate("data", len(x)):
            lib.sample("x", lib.dist.Bernoulli(p), obs=x)

    def guide(x):
        lib.sample("p", lib.dist.Beta(lib.positive("a", 1), lib.positive("b", 1)))

    with pytest.raises(ProbgenError, match="the model has the parameter 'a0'"):
        engine(lib, lib.program(model, guide), {"x": np.array([0.0, 1.0, 1.0])})


def test_whole_numbers_are_dequantized_once_and_learned():
    x = np.random.default_rng(0).poisson([3.0, 20.0], size=(200, 2)) + 30 * (np.arange(200)[:, None] % 2)
    gmm = probgen.load("gmm", {"x": x}, components=2, bayesian=True)
    run = probgen.fit(gmm, {"x": x}, by=EM(), progress=False)
    shares = run.params["weights_concentration"] / run.params["weights_concentration"].sum()
    np.testing.assert_allclose(shares, 0.5, atol=0.02)


def test_a_tolerance_of_zero_never_stops_it():
    x = np.random.default_rng(0).normal(size=(60, 2)) + 8 * (np.arange(60)[:, None] % 2)
    gmm = probgen.load("gmm", {"x": x}, components=2, bayesian=True)
    run = probgen.fit(gmm, {"x": x}, by=EM(tol=0.0), steps=40, progress=False)
    assert run.metrics["step"][-1] == 40
