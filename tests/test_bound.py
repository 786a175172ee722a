"""The bound against quadrature, on a program with one latent number a row; the notebook "The bound, in pictures" draws it.

z_n ~ N(½, 1),  x_n | z_n ~ N(φ z_n², 1):  two humps, so that no Gaussian guide is the posterior.

The densities are written out here, apart from any program. Form one of the ELBO is integrated by Gauss-Hermite nodes of q,
the KL to the prior is in closed form, the evidence and the KL to the posterior are sums over a grid.
"""

import jax
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import logsumexp
from scipy.stats import norm

import probgen.numpyro
import probgen.pyro

READINGS = np.array([3.1, 0.4, 1.6])
Z = np.linspace(-14, 14, 1401)
DZ = Z[1] - Z[0]
GUIDES = [(0.5, 1.0), (1.57, 0.31), (-1.4, 0.36), (0.1, 0.6)]  # the prior, one hump, the other, the valley between
AXIS = np.geomspace(0.05, 8, 61)


def log_joint(z, x, phi):
    """log p(x_n, z | φ): z [Z], x [N]  ->  [N, Z]."""
    return norm.logpdf(z, 0.5) + norm.logpdf(np.asarray(x)[:, None], phi * z**2)


def evidence(x, phi):
    """log p(x_n | φ) [N], and the log posterior density on the grid [N, Z]."""
    joint = log_joint(Z, x, phi)
    log_p = logsumexp(joint, axis=-1) + np.log(DZ)
    return log_p, joint - log_p[:, None]


def kl(log_q, log_p):
    return (np.exp(log_q) * (log_q - log_p)).sum(-1) * DZ


def elbo(log_q, phi, x=READINGS):
    """Σ_n E_q[log p(x_n, z | φ) − log q_n(z)], for log q [N, Z]."""
    return -kl(log_q, log_joint(Z, x, phi)).sum()


def e_step(phi):
    return evidence(READINGS, phi)[1]


def m_step(log_q):
    """The top of the bound: φ = Σ x_n E z_n² / Σ E z_n⁴."""
    second, fourth = ((np.exp(log_q) * Z**power).sum(-1) * DZ for power in (2, 4))
    return (READINGS * second).sum() / fourth.sum()


def log_likelihood(phi):
    return evidence(READINGS, phi)[0].sum()


def iwae(m, s, x, K):
    """E log 1/K Σ_k w_k by one integral: E log Σ w = ∫ (e^{−t} − (E e^{−t w})^K) dt/t, with log t = sinh v."""
    log_p, posterior = evidence([x], 1.0)
    log_q, dv = norm.logpdf(Z, m, s), 0.01
    u = np.sinh(np.arange(-4.5, 9, dv))
    with np.errstate(over="ignore"):
        laplace = (np.exp(log_q) * np.exp(-np.exp(u[:, None] + posterior[0] - log_q))).sum(-1) * DZ
        integrand = np.exp(-np.exp(u)) - laplace**K
    return log_p[0] + (integrand * np.cosh(np.arcsinh(u))).sum() * dv - np.log(K)


@pytest.mark.parametrize("x", READINGS)
@pytest.mark.parametrize("m, s", GUIDES)
def test_the_three_forms_of_the_bound_are_one_number(m, s, x):
    log_q = norm.logpdf(Z, m, s)
    nodes, weights = hermegauss(40)  # exact here: without log q the integrand is a polynomial of degree 4
    z, weights = m + s * nodes, weights / weights.sum()
    joint_and_entropy = (weights * (log_joint(z, [x], 1.0)[0] - norm.logpdf(z, m, s))).sum()
    to_prior = -np.log(s) + (s**2 + (m - 0.5) ** 2 - 1) / 2
    reconstruction = (np.exp(log_q) * norm.logpdf(x, Z**2)).sum() * DZ
    log_p, posterior = evidence([x], 1.0)
    assert abs(joint_and_entropy - (reconstruction - to_prior)) < 1e-8
    assert abs(joint_and_entropy - (log_p[0] - kl(log_q, posterior[0]))) < 1e-8


def test_every_bound_lies_under_the_log_likelihood():
    curve = np.array([log_likelihood(phi) for phi in AXIS])
    guides = [np.tile(norm.logpdf(Z, m, s), (len(READINGS), 1)) for m, s in GUIDES] + [
        e_step(phi) for phi in AXIS[::10]
    ]
    for log_q in guides:
        gaps = curve - np.array([elbo(log_q, phi) for phi in AXIS])
        assert gaps.min() > -1e-10
        assert gaps.max() > 0.5  # and away from where it touches it is no equality


@pytest.mark.parametrize("phi", [0.12, 0.5, 1.05, 4.0])
def test_an_e_step_makes_curve_and_bound_touch(phi):
    log_q, h = e_step(phi), 1e-4
    assert abs(elbo(log_q, phi) - log_likelihood(phi)) < 1e-10
    slopes = [(f(phi + h) - f(phi - h)) / (2 * h) for f in (log_likelihood, lambda p: elbo(log_q, p))]
    assert abs(slopes[0] - slopes[1]) < 1e-5  # with the same slope (Fisher's identity)
    assert elbo(log_q, 1.5 * phi) < log_likelihood(1.5 * phi) - 0.01


@pytest.mark.parametrize("start", [0.12, 5.0])
def test_an_m_step_never_decreases_the_log_likelihood(start):
    path = [start]
    for _ in range(200):
        log_q = e_step(path[-1])
        path.append(m_step(log_q))
        assert all(elbo(log_q, path[-1]) >= elbo(log_q, path[-1] * factor) for factor in (0.99, 1.01))  # it is the top
    heights = np.array([log_likelihood(phi) for phi in path])
    assert np.diff(heights).min() > -1e-10
    assert heights[0] < heights[-1] - 0.1
    assert all(heights[-1] >= log_likelihood(path[-1] * factor) for factor in (0.9, 1.1))  # and ends at a maximum


@pytest.mark.parametrize("m, s", GUIDES)
def test_the_importance_weighted_bound_climbs_to_the_evidence(m, s):
    bounds = [iwae(m, s, 3.1, K) for K in (1, 5, 50, 500)]
    log_p, posterior = evidence([3.1], 1.0)
    assert abs(bounds[0] - (log_p[0] - kl(norm.logpdf(Z, m, s), posterior[0]))) < 1e-6  # IWAE-1 is the ELBO
    assert np.all(np.diff(bounds) > 0) and bounds[-1] < log_p[0]


def pyro_estimates(by, m, s, x, calls, copies):
    """Estimates of the bound, each the mean over a plate of independent copies of the reading: [calls]."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.5, 1.0))
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, s))

    pyro.set_rng_seed(0)
    many = torch.full((copies,), x)
    return [-by.loss(model, guide, many) / copies for _ in range(calls)]


def numpyro_estimates(by, m, s, x, calls, copies):
    """The same by the other backend: [calls]."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", ndist.Normal(0.5, 1.0))
            numpyro.sample("x", ndist.Normal(z**2, 1.0), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", ndist.Normal(m, s))

    many = np.full(copies, x, dtype=np.float32)
    loss = jax.jit(lambda key: by.loss(key, {}, model, guide, x=many))
    return [-float(loss(key)) / copies for key in jax.random.split(jax.random.key(0), calls)]


PYRO, NUMPYRO = (probgen.pyro, pyro_estimates), (probgen.numpyro, numpyro_estimates)
CASES = [
    *(
        (PYRO, by, guide)
        for by in ("ELBO()", 'ELBO(kl="sampled")', "IWAE(1)", "IWAE(5)", "IWAE(50)")
        for guide in GUIDES[:2]
    ),
    *((NUMPYRO, by, GUIDES[1]) for by in ("ELBO()", "IWAE(5)")),  # few: each one compiles
]


@pytest.mark.parametrize("backend, by, guide", CASES, ids=lambda v: v[0].__name__ if v in (PYRO, NUMPYRO) else str(v))
def test_the_losses_estimate_the_bound(backend, by, guide):
    """Within 4.5 standard errors: false alarms by Student's t, 59 degrees of freedom: 3e-5 a case, 4e-4 for all 12."""
    (module, estimates), (m, s) = backend, guide
    x, calls = 3.1, 60
    losses = {
        "ELBO()": (module.ELBO(), 1),
        'ELBO(kl="sampled")': (module.ELBO(kl="sampled"), 1),
        **{f"IWAE({K})": (module.IWAE(K), K) for K in (1, 5, 50)},
    }
    loss, K = losses[by]
    found = np.array(estimates(loss, m, s, x, calls, copies=1000))
    exact, se = iwae(m, s, x, K), found.std(ddof=1) / np.sqrt(calls)
    assert se < 0.02
    assert abs(found.mean() - exact) < 4.5 * se
