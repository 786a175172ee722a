"""Autoregressive distributions and causal networks on both backends: enumerated, differentiated, drawn, completed.

Gates on random draws have fixed seeds and a false-alarm rate below 1e-6 each.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import pyro
import pyro.distributions as tdist
import pytest
import torch
from numpyro.contrib.module import flax_module

import probgen
from probgen import Program
from probgen.causal import drawing_order, hidden_degrees, known_prefix, permutation
from probgen.check import judge
from probgen.check.laws import (
    law_bounds,
    law_density,
    law_gradients,
    law_runs,
    law_save_and_open,
    law_scaling,
    law_shapes,
)
from probgen.check.subject import Subject
from probgen.errors import ProbgenError
from probgen.numpyro import ELBO as NumPyroELBO
from probgen.numpyro.distributions import Autoregressive as NumPyroAutoregressive
from probgen.numpyro.nn import MADE as FlaxMADE
from probgen.program import backend_of
from probgen.pyro import ELBO
from probgen.pyro.distributions import Autoregressive
from probgen.pyro.nn import MADE

BITS = 12
POINTS = np.array(list(itertools.product((0.0, 1.0), repeat=BITS)), np.float32)
NETWORKS = {"regressions": (), "one layer": (30,), "fewer units than values": (5,), "two layers": (20, 30)}
BACKENDS = ("pyro", "numpyro")


class OnPyro:
    """A causal network and its distribution, arrays in and arrays out."""

    def __init__(self, weights, hidden, outputs=1, context=None, levels=None):
        self.module = MADE(BITS, outputs, hidden, 0 if context is None else len(context), levels)
        with torch.no_grad():
            for name, tensor in self.module.named_parameters():
                tensor.copy_(torch.from_numpy(weights(name, tensor.shape)))
        self.context = None if context is None else torch.from_numpy(context)

    def theta(self, x):
        return self.module(torch.from_numpy(x), self.context).detach().numpy()

    def jacobian(self, x):
        found = torch.autograd.functional.jacobian(lambda v: self.module(v, self.context), torch.from_numpy(x))
        return found.numpy()

    def distribution(self, shape, order=None, block=28, conditional=lambda t: tdist.Bernoulli(logits=t[..., 0])):
        return Autoregressive(self.module, conditional, shape, order=order, context=self.context, block=block)

    def log_prob(self, fn, x):
        return fn.log_prob(torch.from_numpy(x)).detach().numpy()

    def sample(self, fn, n, seed):
        torch.manual_seed(seed)
        return fn.sample((n,)).numpy()

    def complete(self, fn, x, seed):
        torch.manual_seed(seed)
        return fn.complete(torch.from_numpy(x)).numpy()


class OnNumPyro(OnPyro):
    """The twin, from the same weights."""

    def __init__(self, weights, hidden, outputs=1, context=None, levels=None):
        made = FlaxMADE(BITS, outputs, tuple(hidden), 0 if context is None else len(context), levels)
        more = () if context is None else (jnp.ones((1, len(context))),)
        shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), jnp.ones((1, BITS)), *more))["params"]
        self.params = {
            layer: {kind: flax_weight(weights, layer, kind, leaf.shape) for kind, leaf in leaves.items()}
            for layer, leaves in shapes.items()
        }
        self.module = functools.partial(lambda p, *a, **k: made.apply({"params": p}, *a, **k), self.params)
        self.context = None if context is None else jnp.asarray(context)

    def theta(self, x):
        return np.array(self.module(x, self.context))

    def jacobian(self, x):
        return np.array(jax.jacobian(lambda v: self.module(v, self.context))(jnp.asarray(x)))

    def distribution(self, shape, order=None, block=None, conditional=lambda t: jdist.Bernoulli(logits=t[..., 0])):
        return NumPyroAutoregressive(self.module, conditional, shape, order=order, context=self.context)

    def log_prob(self, fn, x):
        return np.array(fn.log_prob(jnp.asarray(x)))

    def sample(self, fn, n, seed):
        return np.array(jax.jit(lambda key: fn.sample(key, (n,)))(jax.random.key(seed)))

    def complete(self, fn, x, seed):
        return np.array(fn.complete(jax.random.key(seed), jnp.asarray(x)))


def torch_name(layer, kind):
    """A flax leaf's name in torch's words."""
    layer = layer.replace("layers_", "hidden.")
    return f"{layer}.{'bias' if kind == 'bias' else 'weight'}"


def flax_weight(weights, layer, kind, shape):
    return jnp.asarray(weights(torch_name(layer, kind), shape[::-1]).T)


def random_weights(name, shape):
    """Weights that depend on the parameter's name alone, so that both backends get the same."""
    return np.random.default_rng(sum(map(ord, name))).normal(0, 0.6, shape).astype(np.float32)


def on(backend, hidden=(30,), **options):
    return (OnPyro if backend == "pyro" else OnNumPyro)(random_weights, hidden, **options)


CONTEXT = np.array([0.3, -1.0, 2.0], np.float32)


# -- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [None, CONTEXT], ids=["alone", "context"])
@pytest.mark.parametrize("hidden", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_depend_on_the_past_alone(backend, hidden, context):
    """∂θ_d / ∂x_j is exactly zero for j ≥ d, and is not for any j < d."""
    network = on(backend, hidden, outputs=2, context=context)
    jacobian = np.abs(network.jacobian(np.random.default_rng(0).normal(size=BITS).astype(np.float32))).max(1)
    assert (np.triu(jacobian) == 0).all()
    assert (jacobian[np.tril_indices(BITS, -1)] > 0).all()


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("hidden", NETWORKS.values(), ids=NETWORKS)
def test_a_network_bit_by_bit_is_the_network_in_one_pass(hidden, levels):
    x = np.random.default_rng(0).integers(0, 5, (7, BITS)).astype(np.float32)
    ours, theirs = (on(backend, hidden, outputs=3, context=CONTEXT, levels=levels) for backend in BACKENDS)
    whole = ours.theta(x)
    np.testing.assert_allclose(theirs.theta(x), whole, rtol=1e-5, atol=1e-4)
    known, parts = ours.module.start((7,), ours.context), []
    for i, n in ((0, 5), (5, 1), (6, 6)):
        theta, new = ours.module.ahead(known, n)(torch.from_numpy(x[:, i : i + n]))
        known = [torch.cat(pair, -1) for pair in zip(known, new, strict=True)]
        parts.append(theta.detach().numpy())
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-4)
    start, step, take = theirs.module(method="bit_by_bit")
    known, parts = start((7,), theirs.context), []
    for d in range(BITS):
        theta, known = step(known, d)
        known = take(known, d, x[:, d])
        parts.append(np.array(theta))
    np.testing.assert_allclose(np.stack(parts, 1), whole, rtol=1e-5, atol=1e-4)


# -- densities and draws --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "order"), zip(NETWORKS.values(), (None, "random") * 2, strict=True), ids=NETWORKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_density_sums_to_one_and_draws_follow_it(backend, hidden, order):
    """Σ p(x) over all 2^12 vectors is 1; χ² of draws against it, in cells of at least 20: false alarms 1e-6."""
    network = on(backend, hidden, context=CONTEXT)
    fn = network.distribution((3, 4), order=order and drawing_order((3, 4), order), block=5)
    p = np.exp(network.log_prob(fn, POINTS.reshape(-1, 3, 4)).astype(np.float64))
    assert abs(p.sum() - 1) < 1e-5
    draws = network.sample(fn, 20_000, seed=1).reshape(-1, BITS)
    assert_follow(draws, p)


def assert_follow(draws, p, cells=20):
    """χ² goodness of fit of bit vectors [n, D] to probabilities [2^D]; rare vectors are counted together."""
    index = (draws @ (2 ** np.arange(draws.shape[1])[::-1])).astype(int)
    seen, expected = np.bincount(index, minlength=len(p)).astype(float), p / p.sum() * len(draws)
    order = np.argsort(expected)[::-1]
    group = np.floor(np.cumsum(expected[order]) / cells).astype(int)
    seen, expected = (np.bincount(group, weights=w[order]) for w in (seen, expected))
    keep = expected > 5
    statistic, freedom = ((seen - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum() - 1
    # Wilson & Hilferty: (χ²/k)^⅓ is nearly normal; 4.75 standard deviations are one false alarm in a million.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.75, f"χ² = {statistic:.0f} of {freedom}"


def test_the_test_of_draws_can_fail():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(2**BITS))
    assert_follow(POINTS[rng.choice(2**BITS, 20_000, p=p)], p)
    with pytest.raises(AssertionError):
        assert_follow(POINTS[rng.choice(2**BITS, 20_000, p=0.9 * p + 0.1 * rng.dirichlet(np.ones(2**BITS)))], p)


def test_blocks_of_any_length_give_the_sequential_draw():
    """A fixed point of draws with the same random numbers is the draw entry by entry, to the bit."""
    network = on("pyro", (20, 30))
    uniforms = torch.rand(500, BITS, generator=torch.Generator().manual_seed(0))

    class Fixed(tdist.Bernoulli):
        """Bits by comparison with given random numbers."""

        def sample(self, sample_shape=()):
            return (uniforms[:, Fixed.first : Fixed.first + self.logits.shape[-1]] < self.probs).float()

    sequential = torch.zeros(500, BITS)
    for d in range(BITS):
        p = torch.sigmoid(network.module(sequential)[:, d, 0])
        sequential[:, d] = (uniforms[:, d] < p).float()
    for block in (1, 4, BITS):
        fn = network.distribution((BITS,), block=block, conditional=lambda t: Fixed(logits=t[..., 0]))
        fn = fn.expand((500,))
        parts, known = [], fn.network.start((500,))
        for Fixed.first in range(0, BITS, block):
            part, new = fn._settled(fn.network.ahead(known, block), block, known[0], None)
            known = [torch.cat(pair, -1) for pair in zip(known, new, strict=True)]
            parts.append(part)
        assert torch.equal(torch.cat(parts, -1), sequential)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_conditionals_have_the_moments_of_the_chain(backend):
    """Levels and real numbers: mean and covariance of 20,000 draws against those of an independent chain.

    Six standard errors for each of 90 moments: false alarms below 1e-6.
    """
    dist = tdist if backend == "pyro" else jdist
    network = on(backend, (), outputs=2)
    fn = network.distribution((BITS,), conditional=lambda t: dist.Normal(t[..., 0] / 4, 0.5 + 0 * t[..., 1]), block=5)
    draws = network.sample(fn, 20_000, seed=2).astype(np.float64)
    weight = np.tril(random_weights("direct.weight", (2 * BITS, BITS))[::2], -1) / 4
    chain = np.linalg.inv(np.eye(BITS) - weight)  # x = A x + c + ε
    mean, cov = chain @ random_weights("direct.bias", (2 * BITS,))[::2] / 4, 0.25 * chain @ chain.T
    error = np.sqrt(np.outer(np.diag(cov), np.diag(cov)) + cov**2) / math.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - mean) < 6 * np.sqrt(np.diag(cov) / len(draws))).all()
    assert (np.abs(np.cov(draws.T) - cov) < 6 * error).all()
    network = on(backend, (10,), outputs=3, levels=3)
    fn = network.distribution((BITS,), conditional=lambda t: dist.Categorical(logits=t))
    levels = network.sample(fn, 5000, seed=3)
    assert set(np.unique(levels)) == {0, 1, 2}
    first, second = (network.theta(np.zeros((1, BITS), np.float32))[0, 0], None)
    p = np.exp(first) / np.exp(first).sum()
    assert (np.abs(np.bincount(levels[:, 0]) / 5000 - p) < 6 * np.sqrt(p * (1 - p) / 5000)).all()
    second = network.theta(np.eye(1, BITS, dtype=np.float32) * 2)[0, 1]  # given x_1 = 2
    p, given = np.exp(second) / np.exp(second).sum(), levels[levels[:, 0] == 2, 1]
    assert (np.abs(np.bincount(given, minlength=3) / len(given) - p) < 6 * np.sqrt(p * (1 - p) / len(given))).all()


# -- completion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_completion_is_exact(backend):
    """The rest of a vector given any prefix in the order follows the enumerated conditional: false alarms 1e-6."""
    network, order = on(backend, (30,)), drawing_order((BITS,), "random")
    fn = network.distribution((BITS,), order=order, block=5)
    given = np.full(BITS, np.nan, np.float32)
    given[order[:3]] = (1, 0, 1)
    drawn = network.complete(fn, np.tile(given, (20_000, 1)), seed=4)
    assert (drawn[:, order[:3]] == (1, 0, 1)).all()
    p = np.exp(network.log_prob(fn, POINTS).astype(np.float64)) * (POINTS[:, order[:3]] == (1, 0, 1)).all(1)
    rest = np.sort(order[3:])
    index = (POINTS[:, rest] @ (2 ** np.arange(BITS - 3)[::-1])).astype(int)
    assert_follow(drawn[:, rest], np.bincount(index, weights=p))


@pytest.mark.parametrize("backend", BACKENDS)
def test_completion_takes_prefixes_of_several_lengths_and_refuses_gaps(backend):
    network = on(backend)
    fn = network.distribution((3, 4))
    rows = np.array(POINTS[[77, 1234, 4000, 5]]).reshape(4, 12)
    for row, known in zip(rows, (0, 3, 11, 12), strict=True):
        row[known:] = np.nan
    drawn = network.complete(fn, rows.reshape(4, 3, 4), seed=0).reshape(4, 12)
    np.testing.assert_array_equal(drawn[~np.isnan(rows)], rows[~np.isnan(rows)])
    assert not np.isnan(drawn).any()
    gap = np.full((3, 4), np.nan, np.float32)
    gap[0, 1] = 1
    with pytest.raises(ProbgenError, match="value 1 in the order of drawing is known and the one before it is not"):
        network.complete(fn, gap, seed=0)
    with pytest.raises(ProbgenError, match="outside the support"):
        network.complete(fn, np.full((3, 4), 2.0, np.float32), seed=0)
    with pytest.raises(ProbgenError, match=r"\[4, 3\], and an event has \[3, 4\]"):
        network.complete(fn, np.zeros((4, 3), np.float32), seed=0)


# -- orders and bad input -------------------------------------------------------------------------------------------


def test_orders_of_an_image():
    """Pixel by pixel, R before G before B; or plane by plane."""
    assert drawing_order((2, 2, 3)).tolist() == list(range(12))
    assert drawing_order((2, 2, 3), "planes").tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert drawing_order((2, 3), "planes").tolist() == list(range(6))
    assert sorted(drawing_order((4, 4), "random")) == list(range(16))
    assert (drawing_order((4, 4), "random") == drawing_order((4, 4), "random")).all()
    assert hidden_degrees(5, 8).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert known_prefix(np.array([[1, 1, 0], [1, 0, 0]], bool)) == 1


def test_bad_input_is_named_in_one_sentence():
    with pytest.raises(ProbgenError, match="no order 'rastr'; did you mean 'raster'"):
        drawing_order((2, 2), "rastr")
    with pytest.raises(ProbgenError, match="must name each of the 4 entries"):
        permutation([0, 1, 2, 2], (2, 2))
    with pytest.raises(ProbgenError, match="made for 12 values and an event of shape"):
        Autoregressive(MADE(12), tdist.Bernoulli, (3, 3))
    with pytest.raises(ProbgenError, match="reads a context of 2 numbers, and none is given"):
        Autoregressive(MADE(12, context=2), tdist.Bernoulli, (3, 4))
    with pytest.raises(ProbgenError, match="the one given has 3"):
        on("numpyro").distribution((3, 4))
        NumPyroAutoregressive(on("numpyro").module, jdist.Bernoulli, (3, 4), context=jnp.ones(3))
    with pytest.raises(ProbgenError, match="hidden layer of 0 units"):
        MADE(12, hidden=(0,))
    with pytest.raises(ProbgenError, match="must be at least 1"):
        MADE(0)
    with pytest.raises(ProbgenError, match="'categorical' needs whole numbers"):
        probgen.load("made", probgen.load_data("two-moons"), likelihood="categorical")


# -- in programs ----------------------------------------------------------------------------------------------------


def test_batches_plates_and_draws_agree():
    """With a context for each row, expanded or not, densities are those row by row."""
    network = MADE(BITS, hidden=(8,), context=2)
    context = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    fn = Autoregressive(network, lambda t: tdist.Bernoulli(logits=t[..., 0]), (3, 4), context=context)
    x = fn.sample((6,))
    assert fn.batch_shape == (5,) and x.shape == (6, 5, 3, 4)
    rows = [
        Autoregressive(network, fn.conditional, (3, 4), context=c).log_prob(v)
        for c, v in zip(context, x.unbind(1), strict=True)
    ]
    torch.testing.assert_close(fn.log_prob(x), torch.stack(rows, 1))
    torch.testing.assert_close(fn.expand((6, 5)).log_prob(x), fn.log_prob(x))
    assert fn.expand((6, 5)).sample().shape == x.shape
    assert not fn.has_rsample and not fn.has_enumerate_support
    assert bool(fn.support.check(x).all()) and not bool(fn.support.check(x + 0.5).any())


def decoder_and_prior(backend):
    """A VAE whose decoder p(x | z) and whose prior p(z) are both autoregressive; the guide is an ordinary one."""
    if backend == "pyro":
        prior, decoder = MADE(2, outputs=2, hidden=(8,)), MADE(BITS, hidden=(16,), context=2)
        encoder = torch.nn.Linear(BITS, 4)

        def model(x):
            pyro.module("prior", prior), pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                p_z = Autoregressive(prior, lambda t: tdist.Normal(t[..., 0], (0.1 * t[..., 1]).exp()), (2,))
                z = pyro.sample("z", p_z)
                bits = Autoregressive(decoder, lambda t: tdist.Bernoulli(logits=t[..., 0]), (BITS,), context=z)
                pyro.sample("x", bits, obs=x)

        def guide(x):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                mean, log_scale = encoder(x).chunk(2, -1)
                pyro.sample("z", tdist.Normal(mean, log_scale.exp()).to_event(1))

        return Program(model, guide, by=ELBO(), defaults={"batch_size": 32})

    def twin_model(x):
        prior = flax_module("prior", FlaxMADE(2, outputs=2, hidden=(8,)), input_shape=(1, 2))
        made = FlaxMADE(BITS, hidden=(16,), context=2)
        decoder = flax_module("decoder", made, jnp.ones((1, BITS)), jnp.ones((1, 2)))
        with numpyro.plate("data", len(x)):
            p_z = NumPyroAutoregressive(prior, lambda t: jdist.Normal(t[..., 0], jnp.exp(0.1 * t[..., 1])), (2,))
            z = numpyro.sample("z", p_z)
            bits = NumPyroAutoregressive(decoder, lambda t: jdist.Bernoulli(logits=t[..., 0]), (BITS,), context=z)
            numpyro.sample("x", bits, obs=x)

    def twin_guide(x):
        from flax import linen

        encoder = flax_module("encoder", linen.Dense(4), input_shape=(1, BITS))
        with numpyro.plate("data", len(x)):
            mean, log_scale = jnp.split(encoder(x), 2, -1)
            numpyro.sample("z", jdist.Normal(mean, jnp.exp(log_scale)).to_event(1))

    return Program(twin_model, twin_guide, by=NumPyroELBO(), defaults={"batch_size": 32})


BIT_ROWS = {"x": (np.random.default_rng(5).random((100, BITS)) < np.linspace(0.1, 0.9, BITS)).astype(np.uint8)}


@pytest.mark.nightly_on("numpyro")
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_decoder_and_as_prior_of_a_vae(backend):
    subject = Subject(decoder_and_prior(backend), BIT_ROWS)
    assert subject.structure.kind == "latent"
    laws = (law_runs, law_gradients, law_scaling, law_bounds, law_save_and_open)
    for law in laws if backend == "pyro" else (law_shapes, law_bounds):  # each law compiles anew there
        verdict = judge(law, subject)
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize(("name", "backend"), [("fvsbn", "pyro"), ("made", "pyro"), ("made", "numpyro")])
def test_model_files_sum_to_one_after_training(name, backend):
    """Σ p(x) over 2^12 bits with trained weights, through `fit`; likelihoods are those of the trained network."""
    program = probgen.load(name if backend == "pyro" else f"{name}_numpyro", BIT_ROWS, order="random")
    run = probgen.fit(program, BIT_ROWS, steps=30, lr=0.1, progress=False)
    subject = Subject(program, BIT_ROWS)
    subject.trained = run.trained
    assert abs(float(judge(law_density, subject).sentence.split()[-1]) - 1) < 1e-3
    if backend == "pyro":  # a density is computed after the program has run, and still with the trained weights
        x = torch.from_numpy(BIT_ROWS["x"]).float()
        order = drawing_order((BITS,), "random")
        fn = Autoregressive(run.modules["network"], lambda t: tdist.Bernoulli(logits=t[..., 0]), (BITS,), order=order)
        expected = fn.log_prob(x).detach().numpy()
        by_hand = pyro.poutine.trace(run.model).get_trace(x).log_prob_sum().item()
        np.testing.assert_allclose(run.trained.log_weights({"x": x.numpy()}, 1, 0)[0], expected, rtol=1e-4)
        np.testing.assert_allclose(by_hand, expected.sum(), rtol=1e-4)


COLOURS = {"x": np.random.default_rng(6).integers(0, 5, (64, 2, 3, 3)).astype(np.uint8)}
TWINS = [
    pytest.param("fvsbn", {"likelihood": "gaussian", "order": "random"}, BIT_ROWS, id="fvsbn"),
    pytest.param("made", {"hidden": 7, "layers": 2}, BIT_ROWS, id="made-bits"),
    pytest.param("made", {"hidden": 20, "likelihood": "categorical", "order": "planes"}, COLOURS, id="made-colours"),
]


@pytest.mark.parametrize(("name", "options", "data"), TWINS)
def test_twins_are_one_program(name, options, data):
    """Pyro and NumPyro give each row the same log density with the same weights: ≤1e-5 relative."""
    programs = [probgen.load(file, data, **options) for file in (name, f"{name}_numpyro")]
    subjects = [Subject(program, data) for program in programs]
    theirs = subjects[1].weights
    weights = dict(subjects[0].weights)
    for key, value in theirs.items():
        _, layer, kind = key.split(".")
        weights[f"network$$${torch_name(layer, kind)}"] = np.ascontiguousarray(value.T)
    twin = backend_of(programs[0]).trained_of(programs[0], weights, subjects[0].arrays, rows=len(data["x"]))
    ours, others = (t.log_weights(subjects[0].arrays, 1, 0) for t in (twin, subjects[1].trained))
    np.testing.assert_allclose(ours, others, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["fvsbn", "fvsbn_numpyro"])
def test_a_run_completes_what_is_begun(name):
    """The lower half of an image given the upper one follows the enumerated conditional: false alarms 1e-6."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (400, 3, 4)) * 5
    x[:, 2] = np.where(rng.random((400, 4)) < 0.9, x[:, 0], x[:, 1])  # the last row repeats the first
    run = probgen.fit(probgen.load(name, {"x": x}), {"x": x}, epochs=30, lr=0.03, progress=False)
    begun = np.full((3, 4), np.nan)
    begun[:2] = [[5, 0, 5, 5], [0, 0, 5, 0]]
    drawn = run.sample(20_000, given={"x": begun})["x"]
    assert (drawn[:, :2] == begun[:2]).all()
    points = POINTS.reshape(-1, 3, 4) * 5
    p = np.exp(run.log_likelihood({"x": points})["log_likelihood"].values) * (points[:, :2] == begun[:2]).all((1, 2))
    bits = (2 ** np.arange(4)[::-1]).astype(int)
    assert_follow(drawn[:, 2] / 5, np.bincount((points[:, 2] / 5 @ bits).astype(int), weights=p))
    begun[0, 0] = np.nan
    with pytest.raises(ProbgenError, match="only the entries that follow a known prefix"):
        run.sample(2, given={"x": begun})
