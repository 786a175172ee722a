"""The hierarchical VAE against a chain of Gaussians that its networks are made to be, whose every term is known.

z_T ~ N(0, I),  z_t | z_{t+1} ~ N(a_t z_{t+1} + c_t, s_t²),  x | z_1 ~ N(W z_1 + b, s²),  with orthogonal columns in W

all diagonal, so that the posterior, drawn upwards, is one of the guides that the program has; and others are moved off it.
A network is linear: relu(y) − relu(−y) = y, and tanh(u y) − tanh(−u y) = 2 u y but for u³, with u = 10⁻⁶.
"""

import copy
import functools
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from scipy import stats

import probgen
import probgen.numpyro
import probgen.pyro
from probgen.check.subject import Subject
from probgen.data.prepare import Preparation
from probgen.errors import ProbgenError
from probgen.pictures.decoded import decode
from probgen.pictures.latents import latent_site
from probgen.sites import stack_numbered

NAMES, KL = ("hvae", "hvae_numpyro"), ("analytic", "sampled")
U = 1e-6
LOG_2PI = np.log(2 * np.pi)


class Chain:
    """Two independent chains of T normals under four data, and a guide `moved` off the posterior and `wider` at z_1."""

    D, Z, s = 4, 2, 0.6

    def __init__(self, depth, moved=0.0, wider=1.0, dead=()):
        rng = np.random.default_rng(depth)
        T, alive = depth, np.array([t not in dead for t in range(1, depth)], float)
        self.T = T
        self.a = rng.uniform(0.5, 0.9, (T - 1, self.Z)) * alive[:, None]  # of z_t, t = 1 .. T−1
        self.c, self.sd = rng.normal(size=(T - 1, self.Z)), rng.uniform(0.4, 0.8, (T - 1, self.Z))
        self.W, self.b = np.linalg.qr(rng.normal(size=(self.D, self.Z)))[0] * [1.5, 0.8], rng.normal(size=self.D)
        self.m, self.v = [np.zeros(self.Z)], [np.ones(self.Z)]  # of z_t under the model, from z_T down
        for a, c, sd in zip(self.a[::-1], self.c[::-1], self.sd[::-1], strict=True):
            self.m, self.v = [a * self.m[0] + c, *self.m], [a**2 * self.v[0] + sd**2, *self.v]
        self.G = [np.zeros((self.Z, self.D))] + [np.diag(self.a[t] * self.v[t + 1] / self.v[t]) for t in range(T - 1)]
        tau = 1 / (1 / self.v[0] + (self.W**2).sum(0) / self.s**2)
        self.G[0] = tau[:, None] * self.W.T / self.s**2
        self.h = [tau * (self.m[0] / self.v[0]) - self.G[0] @ self.b + moved]
        self.h += [self.m[t + 1] - self.G[t + 1] @ self.m[t] for t in range(T - 1)]
        self.tau = [np.sqrt(tau) * wider] + [self.sd[t] * np.sqrt(self.v[t + 1] / self.v[t]) for t in range(T - 1)]

    def draw(self, n, seed=0):
        rng = np.random.default_rng(seed)
        z = self.m[0] + np.sqrt(self.v[0]) * rng.normal(size=(n, self.Z))
        return z @ self.W.T + self.b + self.s * rng.normal(size=(n, self.D))

    def evidence(self, x):
        cov = (self.W * self.v[0]) @ self.W.T + self.s**2 * np.eye(self.D)
        return stats.multivariate_normal(self.W @ self.m[0] + self.b, cov).logpdf(x)

    def terms(self, x):
        """E_q of every site's log p − log q, [N], and what a KL site by site would be above it at z_t, t < T."""
        mu, S = x @ self.G[0].T + self.h[0], self.tau[0] ** 2
        off = ((x - self.b - mu @ self.W.T) ** 2).sum(-1) + (S * (self.W**2).sum(0)).sum()
        found = {"x": -off / (2 * self.s**2) - self.D * (np.log(self.s) + LOG_2PI / 2)}
        wrong = {}
        for t in range(self.T):
            entropy = (np.log(self.tau[t]) + 0.5).sum()
            if t == self.T - 1:
                found[f"z_{t + 1}"] = entropy - 0.5 * (mu**2 + S).sum(-1)
                break
            a, g, sd = self.a[t], np.diag(self.G[t + 1]), self.sd[t]
            up, over = mu * g + self.h[t + 1], g**2 * S + self.tau[t + 1] ** 2
            spread = (mu - a * up - self.c[t]) ** 2 + S - 2 * a * g * S + a**2 * over
            found[f"z_{t + 1}"] = entropy - (spread / (2 * sd**2) + np.log(sd)).sum(-1)
            wrong[f"z_{t + 1}"] = (a * g * S / sd**2).sum()
            mu, S = up, over
        return found, wrong

    def layers(self):
        """Each network's matrix, offset and log σ; None where it gives a mean alone."""
        found = {"decoder_1": (self.W, self.b, None)}
        for t in range(self.T):
            found[f"encoder_{t + 1}"] = (self.G[t], self.h[t], np.log(self.tau[t]))
            if t:
                found[f"decoder_{t + 1}"] = (np.diag(self.a[t - 1]), self.c[t - 1], np.log(self.sd[t - 1]))
        return found

    def weights(self, name):
        found = {"scale": np.log(self.s)}
        for layer, (A, offset, log_sd) in self.layers().items():
            narrow = np.eye(min(A.shape))
            inner, outer = (narrow, A) if layer == "decoder_1" else (A, narrow)
            unit, gain = (1, 1) if layer.endswith("_1") else (U, 2 * U)
            first, second = unit * np.concatenate([inner, -inner]), np.concatenate([outer, -outer], 1) / gain
            if log_sd is not None:
                second, offset = np.concatenate([second, 0 * second]), np.concatenate([offset, log_sd])
            found |= named(name, layer, [(first, np.zeros(len(first))), (second, offset)])
        return found

    def run(self, name):
        """The zoo's program with these weights, in double precision, and no change of units."""
        run, weights = copy.copy(start(name, self.T)), self.weights(name)
        assert {n: v.shape for n, v in run._weights.items()} == {n: np.shape(v) for n, v in weights.items()}
        run._weights = weights
        return run


def named(name, network, layers):
    """Weights [out, in] and offsets of the two layers of a network, under the names of the backend."""
    found = {}
    for i, (weight, bias) in zip((0, 2), layers, strict=True):
        if name == "hvae":
            found |= {f"{network}$$${i}.weight": weight, f"{network}$$${i}.bias": bias}
        else:
            found |= {f"{network}.layers_{i}.kernel": weight.T, f"{network}.layers_{i}.bias": bias}
    return found


@functools.cache
def start(name, depth):
    """A run of no steps, whose program all chains of this depth share, so that it is compiled once."""
    x = {"x": Chain(depth).draw(10)}
    program = replace(probgen.load(name, x, z_dim=Chain.Z, hidden=2 * Chain.Z, depth=depth), prepare={})
    return probgen.fit(program, x, steps=0, precision="64", progress=False)


@functools.cache
def flax_bounds(depth):
    """(keys, weights, x) → minus the loss and its terms at each key, with either KL."""
    program = start("hvae_numpyro", depth).program

    def both(key, values, x):
        found = {}
        for kl in KL:
            loss = probgen.numpyro.ELBO(kl=kl)
            result = loss.loss_with_mutable_state(key, values, program.model, program.guide, x=x)
            found[kl] = {"loss": -result["loss"], **result["terms"]}
        return found

    return jax.jit(jax.vmap(both, (0, None, None)))


def bounds(run, x, draws):
    """Minus the loss in nats for all rows, and its terms, at each of the draws, by the kind of the KL."""
    trained, program = run.trained, run.program
    if program.by.__module__.startswith("probgen.numpyro"):
        with trained._scope():
            keys = jax.random.split(jax.random.key(0), draws)
            return jax.tree.map(np.asarray, flax_bounds(len(run.structure.latents))(keys, trained._values, x))
    found, x = {}, torch.as_tensor(x)
    with torch.random.fork_rng(), torch.no_grad(), trained.running():
        for kl in KL:
            torch.manual_seed(0)
            loss = probgen.pyro.ELBO(kl=kl)
            pairs = [loss.loss_and_terms(trained.program.model, trained.program.guide, x=x) for _ in range(draws)]
            each = [{"loss": -total, **terms} for total, terms in pairs]
            found[kl] = {n: np.array([float(e[n]) for e in each]) for n in each[0]}
    return found


@pytest.mark.parametrize(("name", "depth"), [("hvae", 1), ("hvae", 3), ("hvae_numpyro", 3)])
def test_with_the_posterior_as_guide_every_draw_gives_the_evidence(name, depth):
    chain = Chain(depth)
    x = chain.draw(100)
    run, exact = chain.run(name), chain.evidence(x)
    found = bounds(run, x, 200)["sampled"]
    assert np.abs(found["loss"] - exact.sum()).max() < 1e-9 * abs(exact.sum())
    assert all(found[f"z_{t}"].std() > 1 for t in range(1, depth + 1))  # of draws that differ
    if name == "hvae":
        assert np.abs(run.trained.log_weights({"x": x}, 5, seed=1) - exact).max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_terms_layer_by_layer(name):
    """Within 5 standard errors of 200 draws (false alarm below 10⁻⁵ in all), with a guide that is off."""
    chain = Chain(3, moved=0.3, wider=1.3)
    x = chain.draw(100)
    run, (exact, wrong) = chain.run(name), chain.terms(x)
    assert run.structure.analytic_kl() == ("z_3",)
    assert sum(exact.values()).sum() < chain.evidence(x).sum() - 10
    found = bounds(run, x, 200)
    for kl in KL:
        for site, term in {**exact, "loss": sum(exact.values())}.items():
            values = found[kl][site]
            gate = 5 * values.std() / 200**0.5
            assert abs(values.mean() - term.sum()) < gate, (kl, site)
            assert site not in wrong or len(x) * wrong[site] > 5 * gate  # a KL site by site would be seen
    assert found["analytic"]["z_3"].std() < 0.7 * found["sampled"]["z_3"].std()  # given z_2: less noise


def test_bounds_tighten_and_never_pass_the_evidence():
    """ELBO ≤ IWAE-5 ≤ IWAE-50 ≤ log p(x), within 5 standard errors of 2,000 repeats: false alarm below 10⁻⁵."""
    chain = Chain(3, moved=0.3, wider=1.3)
    x = chain.draw(4)
    run, truth = chain.run("hvae"), chain.evidence(x).sum()
    weights = run.trained.log_weights({"x": x}, 100_000, seed=0).reshape(2000, 50, 4)

    def bound(k):
        draws = (np.logaddexp.reduce(weights[:, :k], axis=1) - np.log(k)).sum(-1)
        return draws.mean(), draws.std() / len(draws) ** 0.5

    found = [bound(k) for k in (1, 5, 50)]
    assert abs(found[0][0] - sum(chain.terms(x)[0].values()).sum()) < 5 * found[0][1]
    for (low, low_se), (high, high_se) in zip(found, [*found[1:], (truth, 0.0)], strict=True):
        assert low <= high + 5 * np.hypot(low_se, high_se)
    assert found[0][0] < truth - 20 * found[0][1]
    assert truth - found[2][0] < (truth - found[0][0]) / 5


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_single_latent_is_the_plain_vae(likelihood):
    """The same weights, moved to other names, give the same bound and the same gap at the same draws."""
    data, sizes = probgen.load_data("digits"), {"z_dim": 3, "hidden": 20, "likelihood": likelihood}
    plain = Subject(probgen.load("vae", data, seed=3, **sizes), data)
    weights = {}
    for old, value in plain.weights.items():
        module, layer, kind = re.fullmatch(r"(\w+?)(?:\$\$\$(\d)\.(\w+))?", old).groups()
        if layer is not None:
            layer = int(layer) - (module == "encoder")  # the encoder of the VAE flattens x first
        weights[old if layer is None else f"{module}_1$$${layer}.{kind}"] = value
    single = Subject(probgen.load("hvae", data, seed=4, depth=1, **sizes), data)
    assert weights.keys() == single.weights.keys()
    one, two = plain.trained, single.with_weights(weights)
    for verb in ("elbo", "log_weights"):
        np.testing.assert_array_equal(*(getattr(t, verb)(plain.arrays, 3, 0) for t in (one, two)))
    assert not np.array_equal(single.trained.elbo(plain.arrays, 3, 0), one.elbo(plain.arrays, 3, 0))


def test_warm_up():
    """β is 0 at the first step and 1 from `warmup` on; the loss is its terms with that weight on all the latents'."""
    x = {"x": Chain(3).draw(30)}
    programs = [probgen.load(name, x, z_dim=2, hidden=4, depth=3, warmup=4) for name in NAMES]
    for name, program in zip(NAMES, programs, strict=True):
        assert [program.by.at(step).beta for step in (0, 1, 4, 100)] == [0, 0.25, 1, 1]
        assert probgen.load(name, x).by.beta == 1.0
    engine = Subject(programs[0], x).engine(precision="64")
    _, metrics = engine.advance(engine.start(), 0, 6)
    latents = sum(metrics[f"term/z_{t}"] for t in (1, 2, 3))
    beta = np.array([0, 0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(metrics["loss"], -metrics["term/x"] - beta * latents, rtol=1e-10)
    assert np.abs(latents).min() > 0.1


def test_twins_are_one_program():
    """Pyro and NumPyro agree on every log density at given latents, with the same random weights: ≤1e-5 relative.

    With the other likelihood, both are held to the chain above.
    """
    data, rng, options = probgen.load_data("digits"), np.random.default_rng(0), {"depth": 4, "z_dim": 3, "hidden": 30}
    ours, theirs = (probgen.load(name, data, warmup=5, **options) for name in NAMES)
    assert ours.defaults == theirs.defaults and ours.prepare == theirs.prepare
    assert repr(ours.by.beta) == repr(theirs.by.beta)
    arrays, _ = Preparation.of(ours.prepare, data).forward(data.train[np.arange(7)], np.random.default_rng(0))
    ours, theirs = Subject(ours, data), Subject(theirs, data)
    weights = {n: v + 0.05 * rng.normal(size=v.shape).astype(v.dtype) for n, v in ours.weights.items()}
    converted = {}
    for network in {n.split("$$$")[0] for n in weights}:
        layers = [(weights[f"{network}$$${i}.weight"], weights[f"{network}$$${i}.bias"]) for i in (0, 2)]
        converted |= named(NAMES[1], network, layers)
    ours, theirs = ours.with_weights(weights), theirs.with_weights(converted)
    latents = {f"z_{t}": rng.normal(size=(7, 3)).astype(np.float32) for t in (1, 2, 3, 4)}
    for a, b in zip(ours.log_joint(arrays, latents, 0), theirs.log_joint(arrays, latents, 0), strict=True):
        assert a.keys() == b.keys() and a.keys() >= latents.keys()
        for site in a:
            np.testing.assert_allclose(a[site], b[site], rtol=1e-5, atol=1e-4, err_msg=site)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_chain_is_refused(name):
    x = {"x": Chain(1).draw(10)}
    for options, said in (
        ({"depth": 0}, "depth=0 with z_dim=16 leaves no latent; ask for at least 1 of each"),
        ({"z_dim": 0}, "depth=2 with z_dim=0 leaves no latent"),
        ({"warmup": -1}, "warmup=-1 is no number of steps; ask for 0"),
    ):
        with pytest.raises(ProbgenError, match=f"{name}: {said}"):
            probgen.load(name, x, **options)


def test_what_is_said_of_each_layer():
    """Terms and active units of every layer, of a chain that is cut under z_2: what lies above is the prior itself."""
    chain = Chain(3, dead=(1,))
    x = chain.draw(300)
    run = chain.run("hvae")
    found, exact = run.evaluate({"x": x}, k=50), chain.terms(x)[0]
    assert [found[f"active_units/z_{t}"] for t in (1, 2, 3)] == [2, 0, 0]
    for site, term in exact.items():
        # 20 draws a row, a row's draws apart by less than 3 nats: 5 standard errors are below 0.2
        assert found[f"term/{site}"] == pytest.approx(term.mean(), abs=0.2), site
    assert found["term/z_2"] + found["term/z_3"] == pytest.approx(0, abs=1e-9)
    assert found["elbo"] == pytest.approx(chain.evidence(x).mean(), abs=1e-9)


def test_outside_the_program_it_is_one_variable():
    """z_1, ..., z_T are `z` [n, T, z_dim]; the mean of each is right within 5 standard errors (false alarm 10⁻⁵)."""
    chain = Chain(3)
    run = chain.run("hvae")
    z = run.sample(4000)["z"]
    assert z.shape == (4000, 3, 2)
    assert (np.abs(z.mean(0) - chain.m) < 5 * np.sqrt(np.array(chain.v) / 4000)).all()
    assert list(stack_numbered(run.trained.posterior(run.trained.arrays, 1, 0)[0], 2)) == ["z"]


def test_pictures_show_the_lowest_layer_and_average_over_what_lies_below_another():
    """E[x | z_2] is linear here; 64 draws of z_1 leave an eighth of its spread, and 5 of these are the gate (10⁻⁵)."""
    chain = Chain(3)
    run = chain.run("hvae")
    assert latent_site(run) == "z_1"
    points = np.random.default_rng(0).normal(size=(30, 2))
    exact = (points * chain.a[0] + chain.c[0]) @ chain.W.T + chain.b
    spread = np.sqrt((chain.W**2 * chain.sd[0] ** 2).sum(1))
    gaps = decode(run, None, "z_2", points, "x", 0) - exact
    assert (np.abs(gaps) < 5 * spread / 8).all()
    np.testing.assert_allclose(decode(run, None, "z_1", points, "x", 0), points @ chain.W.T + chain.b, atol=1e-9)
