"""Adversarial losses: what two players minimise and where the game ends, on both backends, against closed forms.

A program here is written once, in the words that the two PPLs share. Statistical gates have fixed seeds and allow 4
standard errors: a right program fails one of them once in 16,000 seeds.
"""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import probgen
import probgen.numpyro
import probgen.pyro
from probgen import Cosine, Program
from probgen.adversarial import R1, R2, GradientPenalty, Objective, OrthogonalRegularization, WeightClip
from probgen.adversarial.objectives import OBJECTIVES
from probgen.data import as_rows
from probgen.data.feed import Feed
from probgen.data.prepare import Preparation
from probgen.errors import ProbgenError
from probgen.fit import Options
from probgen.numpyro.leaves import named
from probgen.numpyro.loss import as_result
from probgen.numpyro.scope import precision_scope
from probgen.numpyro.trace import as_jax, own_containers
from probgen.pyro.device import numbers, seed_step
from probgen.pyro.loss import with_terms

NAMES = ["pyro", "numpyro"]
both = pytest.mark.parametrize("name", NAMES)
nightly = pytest.mark.nightly

# -- both PPLs in the same words --------------------------------------------------------------------------------------

PYRO = types.SimpleNamespace(
    P=pyro, D=dist, xp=torch, lib=probgen.pyro, array=lambda a: torch.tensor(a, dtype=torch.get_default_dtype()),
    stack=lambda columns: torch.stack(columns, -1), cat=lambda parts: torch.cat(parts, -1),
)  # fmt: skip
NUMPYRO = types.SimpleNamespace(
    P=numpyro, D=ndist, xp=jnp, lib=probgen.numpyro, array=lambda a: jnp.asarray(a, jnp.result_type(float)),
    stack=lambda columns: jnp.stack(columns, -1), cat=lambda parts: jnp.concatenate(parts, -1),
)  # fmt: skip
PPL = {"pyro": PYRO, "numpyro": NUMPYRO}


def param(name, key, value):
    """A parameter that starts at an array."""
    return PPL[name].P.param(key, PPL[name].array(value))


def net(name, label, *sizes, seed=0):
    """A dense network with tanh between its layers, whose weights are parameters."""
    rng = np.random.default_rng([seed, *map(ord, label)])
    start = [rng.normal(size=(a, b)) / np.sqrt(a) for a, b in itertools.pairwise(sizes)]

    def run(*inputs):
        h = PPL[name].cat(inputs) if len(inputs) > 1 else inputs[0]
        for i, weight in enumerate(start):
            h = h @ param(name, f"{label}.W{i}", weight) + param(name, f"{label}.b{i}", 0.1 * rng_of(label, i, weight))
            h = PPL[name].xp.tanh(h) if i < len(start) - 1 else h
        return h

    return run


def rng_of(label, i, weight):
    return np.random.default_rng([i, *map(ord, label)]).normal(size=weight.shape[1])


def features(name, label, of, start):
    """A critic that is linear in features [B, K] of what it sees: Σ w_k φ_k."""
    return lambda *seen: of(*seen) @ param(name, label, np.asarray(start, float))


def fixed(name, by=None, draw=None, point=None, event=0):
    """x ~ draw() or a point mass at rows of `point` that need no training; x of the data is what is told from it."""
    D, P, array = PPL[name].D, PPL[name].P, PPL[name].array

    def model(x):
        with P.plate("data", len(x)):
            fn = draw() if draw is not None else D.Delta(array(point)[: len(x)], event_dim=event)
            P.sample("x", fn, obs=x)

    return Program(model, by=by)


def engine(name, program, arrays, batch_size=None, steps=10, **options):
    feed = Feed(as_rows(arrays), Preparation({}, {}), batch_size, options.get("seed", 0))
    options = Options(steps=steps, batch_size=batch_size, device="cpu", **{"precision": "64", **options})
    return PPL[name].lib.engine_of(program, None, feed, options)


def trained(name, program, arrays, steps, batch_size=None, **options):
    """Weights after so many steps, and what was logged."""
    e = engine(name, program, arrays, batch_size, steps, **options)
    state, metrics = e.advance(e.start(), 0, steps)
    return e.weights(state), metrics


def judged(name, program, arrays, player="critic", seed=0, params=None):
    """Loss and terms of a player on rows as they are, per row, eagerly; parameters at their start unless given."""
    chosen, rows = program.by.players(program)[player], len(next(iter(arrays.values())))
    if name == "pyro":
        pyro.clear_param_store()
        with numbers(torch.float64, torch.device("cpu")), torch.random.fork_rng():
            torch.manual_seed(seed)
            model, guide = probgen.pyro.trace.callables(program)
            given = {n: torch.tensor(a) for n, a in arrays.items()}
            loss, terms = with_terms(chosen.objective(model, guide, **given))
        pyro.clear_param_store()
    else:
        with precision_scope("64"):
            model, guide = probgen.numpyro.trace.callables(program)
            given = {n: jnp.asarray(a) for n, a in arrays.items()}
            found = as_result(chosen.objective(jax.random.key(seed), params or {}, model, guide, **given))
            loss, terms = found["loss"], found["terms"]
    return number(loss) / rows, {n: number(t) / rows for n, t in terms.items()}


def number(value):
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def slopes(name, program, arrays, player="critic", seed=0, **options):
    """Loss per row of a player at the start weights, and its gradient by every parameter, the other players' too: the
    loss's own, before an engine holds anything fixed.
    """
    e, t = engine(name, program, arrays, seed=seed, **options), 0
    if name == "pyro":
        with e._scope(), torch.random.fork_rng(), torch.enable_grad():
            seed_step(seed, 0, e.device)
            values = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in e._copies().items()}
            loss, _ = e._objective(player, values, e._tensors(e.feed.batch(0)), torch.tensor(t))
            leaves = {n: values[n] for n in e.leaves.params}
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        zero = {n: np.zeros(v.shape) for n, v in leaves.items()}
        return float(loss.detach()), {
            n: zero[n] if g is None else g.numpy() for n, g in zip(leaves, found, strict=True)
        }
    with e._scope():
        chosen, given = e.by.at(t).players(e.program)[player], as_jax(e.feed.batch(0))

        def loss(params, key):
            values = {**e.leaves.constrained(params), **own_containers(e.leaves.buffers)}
            return as_result(chosen.objective(key, values, e.model, e.guide, **given))["loss"] / e.rows

        value, found = jax.jit(jax.value_and_grad(loss))(e.leaves.params, jax.random.key(seed))
        return float(value), {n: np.asarray(g) for n, g in named(found, {}).items()}


# -- the objectives ---------------------------------------------------------------------------------------------------


def log_sigmoid(d):
    return -np.logaddexp(0, -d)


BY_HAND = {
    "minimax": (
        lambda r, f: -log_sigmoid(r) - log_sigmoid(-f),
        lambda r, f: log_sigmoid(r) + log_sigmoid(-f),
    ),
    "non-saturating": (
        lambda r, f: -log_sigmoid(r) - log_sigmoid(-f),
        lambda r, f: -log_sigmoid(f) - log_sigmoid(-r),
    ),
    "least-squares": (
        lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2,
        lambda r, f: 0.5 * (f - 1) ** 2 + 0.5 * r**2,
    ),
    "hinge": (lambda r, f: np.maximum(0, 1 - r) + np.maximum(0, 1 + f), lambda r, f: r - f),
    "wasserstein": (lambda r, f: f - r, lambda r, f: r - f),
    "relativistic": (lambda r, f: -log_sigmoid(r - f), lambda r, f: -log_sigmoid(f - r)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_are_their_formulas_in_every_library(objective):
    """Of logits of any size; the critic's side of minimax is the cross-entropy of PyTorch, and V is minus that."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(2, 400)) * 4
    real[0], fake[0] = 800.0, 900.0  # exp would overflow
    assert set(BY_HAND) == set(OBJECTIVES)
    for ours, by_hand in zip(
        (OBJECTIVES[objective].critic, OBJECTIVES[objective].program), BY_HAND[objective], strict=True
    ):
        expected = by_hand(real, fake)
        np.testing.assert_allclose(ours(real, fake), expected, rtol=1e-12)
        np.testing.assert_allclose(ours(torch.tensor(real), torch.tensor(fake)).numpy(), expected, rtol=1e-12)
        with precision_scope("64"):
            np.testing.assert_allclose(ours(jnp.asarray(real), jnp.asarray(fake)), expected, rtol=1e-12)
    if objective in ("minimax", "non-saturating"):
        bce = nn.functional.binary_cross_entropy_with_logits
        r, f = torch.tensor(real), torch.tensor(fake)
        cross = bce(r, torch.ones_like(r), reduction="none") + bce(f, torch.zeros_like(f), reduction="none")
        np.testing.assert_allclose(OBJECTIVES[objective].critic(r, f), cross, rtol=1e-12)
    if objective == "minimax":
        np.testing.assert_allclose(OBJECTIVES[objective].program(r, f), -cross, rtol=1e-12)


def test_where_the_critic_is_sure_minimax_has_no_slope_and_non_saturating_has():
    """d/dd log(1 − σ(d)) = −σ(d) → 0 as d → −∞, and d/dd −log σ(d) = −σ(−d) → −1."""
    fake = np.array([-40.0, -3.0, 0.0, 2.0])
    expected = {"minimax": -1 / (1 + np.exp(-fake)), "non-saturating": -1 / (1 + np.exp(fake))}
    for objective, slope in expected.items():
        by_torch = torch.tensor(fake, requires_grad=True)
        OBJECTIVES[objective].program(torch.zeros(4, dtype=torch.float64), by_torch).sum().backward()
        with precision_scope("64"):
            by_jax = jax.grad(lambda f, o=objective: OBJECTIVES[o].program(jnp.zeros(4), f).sum())(jnp.asarray(fake))
        for found in (by_torch.grad.numpy(), by_jax):
            np.testing.assert_allclose(found, slope, rtol=1e-10)
        assert (abs(float(by_jax[0])) < 1e-15) == (objective == "minimax")


def jensen_shannon(p, q):
    m = (p + q) / 2
    return 0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()


@pytest.mark.parametrize("objective", ["minimax", "non-saturating", "least-squares"])
def test_against_the_optimal_critic_the_program_goes_to_the_data(objective):
    """On five values: minimax falls as 2 JSD − log 4 does, slope for slope, and every game ends at p_g = p_data."""
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(5))
    log_p, logits = torch.tensor(np.log(p)), torch.tensor(rng.normal(size=5), requires_grad=True)

    def loss():
        log_g = logits.log_softmax(0)
        ratio = (log_p - log_g).detach()
        d = ratio.sigmoid() if objective == "least-squares" else ratio  # the critic that minimises its own loss
        real, fake = torch.tensor(p), log_g.exp()
        return (fake * OBJECTIVES[objective].program(torch.zeros(5), d)).sum(), real @ OBJECTIVES[objective].critic(
            d, d * 0
        )

    if objective == "minimax":
        (gradient,) = torch.autograd.grad(loss()[0], logits)
        start, numeric = logits.detach().numpy(), []
        for i in range(5):
            ends = [start + 1e-5 * sign * np.eye(5)[i] for sign in (1, -1)]
            high, low = (2 * jensen_shannon(p, np.exp(e) / np.exp(e).sum()) for e in ends)
            numeric.append((high - low) / 2e-5)
        np.testing.assert_allclose(gradient, numeric, atol=1e-8)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        loss()[0].backward()
        optimizer.step()
    np.testing.assert_allclose(logits.detach().softmax(0), p, atol=1e-3)


# -- the critic's optimum ---------------------------------------------------------------------------------------------

QUANTILES = stats.norm.ppf((np.arange(1000) + 0.5) / 1000)


@pytest.mark.nightly_on("numpyro")
@both
@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_the_optimal_critic_is_the_density_ratio_and_its_value_the_divergence(name, scale):
    """p = N(0, 1), q = N(0.3, s²) or p itself; d = a + b x + c x² holds log p / q. D within 0.02 wherever p + q has
    mass; the value of the game 2 JSD − log 4 by quadrature within 4 standard errors (and 2e-3 of the grid of p).
    """
    D, steps, tail = PPL[name].D, 900, 400
    shift = 0.3 if scale != 1 else 0.0
    critic = features(name, "w", lambda x: PPL[name].stack([x * 0 + 1, x, x**2]), np.zeros(3))
    by = PPL[name].lib.Adversarial(critic, objective="minimax")
    program = fixed(name, by, draw=lambda: D.Normal(PPL[name].array(shift), scale))
    weights, metrics = trained(
        name, program, {"x": QUANTILES}, steps, lr=0.02, schedule=Cosine(1, 1e-6, steps - tail)
    )  # with a rate of nothing the tail is 400 independent estimates
    x = np.linspace(-4, 4, 4001)
    p, q = stats.norm(0, 1).pdf(x), stats.norm(shift, scale).pdf(x)
    d = np.stack([x * 0 + 1, x, x**2], -1) @ weights["w"]
    inner = np.abs(x) < 3
    np.testing.assert_allclose(1 / (1 + np.exp(-d))[inner], (p / (p + q))[inner], atol=0.02)
    x = np.linspace(-12, 12, 20001)
    p, q = stats.norm(0, 1).pdf(x), stats.norm(shift, scale).pdf(x)
    value = 2 * jensen_shannon(p + 1e-300, q + 1e-300) * (x[1] - x[0]) - np.log(4)
    estimates = -metrics["loss/critic"][-tail:]
    assert abs(estimates.mean() - value) < 4 * estimates.std() / np.sqrt(tail) + 2e-3
    assert scale == 1 or value + np.log(4) > 0.05  # the two cases are told apart
    np.testing.assert_allclose(metrics["loss/critic"][:1], np.log(4), rtol=1e-6)  # D = ½ at first


@pytest.mark.nightly_on("numpyro")
@both
def test_a_wasserstein_critic_says_how_far_two_uniforms_lie_apart(name):
    """U[0, 1] and U[θ, 1 + θ]: W1 = |θ|. Within |w| ≤ c a linear critic says c |θ|; with a gradient penalty it says
    |θ| (1 + |θ| / 2λ). At every distance the divergence of minimax is log 2, its critic's loss is zero.
    """
    x, lib, cases = (np.arange(64) + 0.5) / 64, PPL[name].lib, [(-1.5, 0.1), (4.0, 0.1), (4.0, 1.0)]
    critic = features(name, "w", lambda x: PPL[name].stack([x, x * 0 + 1]), [0.0, 0.0])

    def says(distance, objective, penalty, lr, steps):
        by = lib.Adversarial(critic, objective=objective, penalties=penalty)
        program = fixed(name, by, point=x + distance)
        log = trained(name, program, {"x": x}, steps, lr=lr, schedule=Cosine(1, 0.01, steps))[1]
        return log["term/critic_real"][-1] - log["term/critic_fake"][-1], log["loss/critic"][-1]

    clipped = [says(distance, "wasserstein", WeightClip(c), 0.3, 20)[0] for distance, c in cases]
    np.testing.assert_allclose(clipped, [abs(distance) * c for distance, c in cases], rtol=1e-9)
    found = says(-1.5, "wasserstein", GradientPenalty(10.0), 0.05, 250)[0]
    assert found == pytest.approx(1.5 * (1 + 1.5 / 20), rel=1e-3)
    assert says(4.0, "minimax", (), 1.0, 250)[1] < 0.05


@pytest.mark.nightly_on("numpyro")
@both
def test_a_wasserstein_critic_on_two_points(name):
    """Masses at (0, 0) and θ = (3, −4): a network of any shape is as steep as 1 where the penalty is heavy, and says 5."""
    by = PPL[name].lib.Adversarial(
        net(name, "critic", 2, 16, 1), objective="wasserstein", penalties=GradientPenalty(200.0)
    )
    program = fixed(name, by, point=np.tile([3.0, -4.0], (64, 1)), event=1)
    log = trained(name, program, {"x": np.zeros((64, 2))}, 400, lr=0.02, schedule=Cosine(1, 0.01, 400))[1]
    says = (log["term/critic_real"] - log["term/critic_fake"])[-20:].mean()
    assert says == pytest.approx(5.0, rel=0.05)


# -- penalties --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("rows", "shape"), [(1, (2, 3, 2)), (2, (3,)), (7, (2, 3, 2))], ids=str)
def test_the_penalties_of_a_linear_critic_are_those_of_its_weights(name, rows, shape):
    """d = w · x: λ (‖w‖ − 1)² and γ/2 ‖w‖² for any number of rows of any shape, wherever they are taken."""
    rng, lib = np.random.default_rng(0), PPL[name].lib
    w, x = rng.normal(size=int(np.prod(shape))), rng.normal(size=(rows, *shape))
    critic = features(name, "w", lambda x: x.reshape(len(x), -1), w)
    norm = np.linalg.norm(w)
    expected = {GradientPenalty(10.0): 10 * (norm - 1) ** 2, R1(3.0): 1.5 * norm**2, R2(0.4): 0.2 * norm**2}
    for penalties in [*([p] for p in expected if name == "pyro"), list(expected)]:
        by = lib.Adversarial(critic, objective="wasserstein", penalties=penalties)
        program = fixed(name, by, point=rng.normal(size=(rows, *shape)), event=len(shape))
        loss, terms = judged(name, program, {"x": x})
        total = sum(expected[p] for p in penalties)
        assert terms["critic_penalty"] == pytest.approx(total, rel=1e-10)
        assert loss == pytest.approx(total + terms["critic_fake"] - terms["critic_real"], rel=1e-10)


def half_square(x):
    """[B, 1] whose slope by x is x itself."""
    return (x.reshape(len(x), -1) ** 2).sum(-1)[:, None] / 2


@both
def test_r1_looks_at_real_rows_and_r2_at_fake_ones(name):
    """d = ½‖x‖²: γ/2 E‖x‖² of the data, and of the program's draws, which lie at (0, 3)."""
    x = np.random.default_rng(0).normal(size=(30, 2))
    for penalty, expected in ((R1(0.7), 0.35 * (x**2).sum(-1).mean()), (R2(0.7), 0.35 * 9)):
        by = PPL[name].lib.Adversarial(features(name, "w", half_square, [1.0]), penalties=penalty)
        program = fixed(name, by, point=np.tile([0.0, 3.0], (30, 1)), event=1)
        assert judged(name, program, {"x": x})[1]["critic_penalty"] == pytest.approx(expected, rel=1e-10)


@both
def test_the_slope_is_that_of_all_a_critic_sees(name):
    """d = a·x + b·z: the norm is that of (a, b) together. What is given as whole numbers has no slope."""
    P, D, array = PPL[name].P, PPL[name].D, PPL[name].array
    a, b = np.array([1.0, 2.0]), 2.0

    def model(x, y):
        with P.plate("data", len(x)):
            z = P.sample("z", D.Normal(array(0.0), 1.0))
            P.sample("x", D.Delta(z[:, None] * array([1.0, -1.0]), event_dim=1), obs=x)

    def guide(x):
        with P.plate("data", len(x)):
            P.sample("z", D.Normal(x[:, 0], 1.0))

    def critic(x, y, z):
        return x @ array(a) + b * z + y * param(name, "w", 5.0)

    by = PPL[name].lib.Adversarial(critic, ("x", "y", "z"), penalties=R1(2.0))
    arrays = {"x": np.random.default_rng(0).normal(size=(8, 2)), "y": np.arange(8) % 3}
    _, terms = judged(name, Program(model, guide, by=by), arrays)
    assert terms["critic_penalty"] == pytest.approx(9.0, rel=1e-10)


class Recorded(GradientPenalty):
    """Keeps ‖∇d‖² of the rows it is told of."""

    def of_rows(self, squared_norm):
        RECORD.append(np.asarray(squared_norm.detach() if isinstance(squared_norm, torch.Tensor) else squared_norm))
        return super().of_rows(squared_norm)


RECORD = []


@both
def test_a_row_between_lies_on_the_line_of_its_own_pair(name):
    """d = ½‖x‖², so ‖∇d‖² is ‖x̂‖²; pairs (i, 0) and (0, i): ε² + (1 − ε)² lies in [½, 1], which an ε for each element
    leaves for one row in three; ε is uniform (Kolmogorov–Smirnov at 1e-4) and another in every row.
    """
    rows = 500
    size = np.arange(1.0, rows + 1)[:, None]
    by = PPL[name].lib.Adversarial(features(name, "w", half_square, [1.0]), penalties=Recorded())
    program = fixed(name, by, point=size * [0.0, 1.0], event=1)
    RECORD.clear()
    judged(name, program, {"x": size * [1.0, 0.0]})
    (squared,) = RECORD
    place = squared / size[:, 0] ** 2  # ε² + (1 − ε)², if the pair is that of the row
    assert squared.shape == (rows,) and (place > 0.5 - 1e-9).all() and (place < 1 + 1e-9).all()
    from_half = np.sqrt(np.maximum(2 * place - 1, 0))  # |2 ε − 1|
    assert stats.kstest(from_half, "uniform").pvalue > 1e-4


def test_a_gradient_of_zero_has_a_finite_slope():
    """A critic that is flat: (0 − 1)², whose derivative by the critic is finite on both backends."""
    squared = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    value = GradientPenalty(2.0).of_rows(squared)
    value.sum().backward()
    assert value.tolist() == [2.0] * 3 and squared.grad.tolist() == [0.0] * 3
    slope = jax.grad(lambda s: GradientPenalty(2.0).of_rows(s).sum())(jnp.zeros(3))
    assert slope.tolist() == [0.0] * 3


def critic_module(kind, matrices, bias=0.0):
    """A critic tanh(x Aᵀ) Bᵀ + b of one of the libraries with these weights, [outputs, inputs] each."""
    if kind == "torch":
        layers = [nn.Linear(w.shape[1], w.shape[0]) for w in matrices]
        for layer, w in zip(layers, matrices, strict=True):
            layer.weight.data, layer.bias.data = torch.tensor(w, dtype=torch.float32), torch.full((len(w),), bias)
        return nn.Sequential(layers[0], nn.Tanh(), layers[1])
    if kind == "nnx":
        from flax import nnx

        layers = [nnx.Linear(w.shape[1], w.shape[0], rngs=nnx.Rngs(0)) for w in matrices]
        for layer, w in zip(layers, matrices, strict=True):
            layer.kernel[...], layer.bias[...] = jnp.asarray(w.T, jnp.float32), jnp.full(len(w), bias)
        return nnx.Sequential(layers[0], jnp.tanh, layers[1])
    if kind == "linen":
        import flax.linen as linen

        def dense(w):
            start = lambda value: lambda *_: jnp.asarray(value, jnp.float32)  # noqa: E731
            return linen.Dense(len(w), kernel_init=start(w.T), bias_init=start(np.full(len(w), bias)))

        return linen.Sequential([dense(matrices[0]), jnp.tanh, dense(matrices[1])])
    import equinox as eqx

    class Critic(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.Linear

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    layers = []
    for w in matrices:
        layer = eqx.nn.Linear(w.shape[1], w.shape[0], key=jax.random.key(0))
        weights = (jnp.asarray(w, jnp.float32), jnp.full(len(w), bias))
        layers.append(eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, weights))
    return Critic(*layers)


MATRICES = [np.random.default_rng(0).normal(size=(4, 2)), np.random.default_rng(1).normal(size=(1, 4))]


@pytest.mark.parametrize("kind", ["torch", "nnx", pytest.param("linen", marks=nightly), "equinox"])
def test_orthogonal_regularization_looks_at_rows_that_give_outputs(kind):
    """β Σ_W Σ_{i≠j} (w_i · w_j)² over the outputs i, j of each layer; rows at right angles cost nothing, columns do."""
    name = "pyro" if kind == "torch" else "numpyro"
    square = np.array([[1.0, 1.0, 0.0, 0.0], [2.0, -2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 3.0, -1.0]])
    crossed = np.array([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.0]])
    nothing = Objective("nothing", lambda real, fake: real * 0, lambda real, fake: fake * 0)
    for first, inputs in ((crossed, 2), (square, 4)):
        product = first @ first.T
        expected = 0.3 * ((product**2).sum() - (np.diag(product) ** 2).sum())
        assert (expected == 0) == (inputs == 4) and np.abs(
            first.T @ first - np.diag(np.diag(first.T @ first))
        ).sum() >= 2
        critic = critic_module(kind, [first, np.ones((1, 4))])
        by = PPL[name].lib.Adversarial(critic, objective=nothing, penalties=OrthogonalRegularization(0.3))
        loss, gradients = slopes(
            name, fixed(name, by, point=np.ones((6, inputs)), event=1), {"x": np.zeros((6, inputs))}
        )
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
        (slope,) = (g for g in gradients.values() if g.shape in (first.shape, first.T.shape))
        by_hand = 4 * 0.3 * (product - np.diag(np.diag(product))) @ first
        by_hand = by_hand.T if kind in ("nnx", "linen") else by_hand
        np.testing.assert_allclose(slope, by_hand, rtol=1e-5, atol=1e-6)


def drawn(name, by=None, hidden=8, noise=0.0, prior=1.0):
    """z ~ N(0, 1)², x = G(z), a point mass or with noise."""
    P, D, array = PPL[name].P, PPL[name].D, PPL[name].array
    generator = net(name, "generator", 2, hidden, 3)

    def model(x):
        with P.plate("data", len(x)):
            z = P.sample("z", D.Normal(array(np.zeros(2)), prior).to_event(1))
            mean = generator(z)
            P.sample("x", D.Normal(mean, noise).to_event(1) if noise else D.Delta(mean, event_dim=1), obs=x)

    return Program(model, by=by)


X = np.random.default_rng(5).normal(size=(40, 3)) + 1


@pytest.mark.nightly_on("numpyro")
@both
def test_clipped_weights_stay_within_their_bounds_and_the_programs_go_where_they_like(name):
    """After every step, and after every update in it: the last is the program's."""
    by = PPL[name].lib.Adversarial(
        net(name, "critic", 3, 8, 1), objective="wasserstein", penalties=WeightClip(0.05), critic_steps=2
    )
    e = engine(name, drawn(name, by), {"x": X}, 8, lr=0.05)
    start = e.weights(e.start())
    state = e.start()
    for step in range(4):
        state, _ = e.advance(state, step, step + 1)
        weights = e.weights(state)
        critic = np.concatenate([w.ravel() for n, w in weights.items() if n.startswith("critic")])
        assert np.abs(critic).max() <= 0.05 and (np.abs(critic) == 0.05).any()
    moved = {n: np.abs(w - start[n]).max() for n, w in weights.items() if n.startswith("generator")}
    assert max(np.abs(weights[n]).max() for n in moved) > 0.5 and all(0.01 < m <= 0.2001 for m in moved.values())


# -- two players ------------------------------------------------------------------------------------------------------

GAMES = ["gan", "conditional", "ali", "autoencoder", "elbo", "relativistic"]


def game(name, kind, critic_inputs=None, **options):
    """A program, its loss and arrays; every network's parameters start with its name."""
    lib, P, D, array = (getattr(PPL[name], part) for part in ("lib", "P", "D", "array"))
    encoder = net(name, "encoder", 3, 6, 2)

    def guide(x):
        with P.plate("data", len(x)):
            P.sample("z", D.Normal(encoder(x), 0.3).to_event(1))

    if kind == "conditional":
        generator = net(name, "generator", 4, 6, 3)

        def model(x, y):
            with P.plate("data", len(x)):
                z = P.sample("z", D.Normal(array(np.zeros(2)), 1.0).to_event(1))
                P.sample("x", D.Delta(generator(z, y), event_dim=1), obs=x)

        critic = net(name, "critic", 5, 6, 1)
        return Program(model, by=lib.Adversarial(critic, ("x", "y"), **options)), {"x": X, "y": X[:, :2] ** 2}
    sites = {"ali": ("x", "z"), "autoencoder": ("z",)}.get(kind, ("x",))
    inputs = critic_inputs or {"ali": 5, "autoencoder": 2}.get(kind, 3)
    if kind == "relativistic":
        options = {"objective": "relativistic", **options}
    by = lib.Adversarial(net(name, "critic", inputs, 6, 1), sites, **options)
    if kind in ("autoencoder", "elbo"):
        by = lib.ELBO(beta=0.0 if kind == "autoencoder" else 1.0, kl="sampled") + by
    program = drawn(name, by, noise=0.5 if kind in ("autoencoder", "elbo") else 0.0)
    return Program(program.model, guide if kind not in ("gan", "relativistic") else None, by=by), {"x": X}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) if n == "pyro" or k == "ali" else pytest.param(n, k, marks=nightly) for n in NAMES for k in GAMES],
)
def test_a_gradient_reaches_every_network_that_it_should_and_no_other(name, kind):
    """Of the critic's loss those of the critic alone, though the draws are the program's; of the program's loss every
    weight of generator and encoder.
    """
    program, arrays = game(name, kind)
    told = slopes(name, program, arrays)[1]
    for parameter, gradient in told.items():
        shifts = kind == "relativistic" and parameter == "critic.b1"  # moves both logits alike
        assert gradient.any() == (parameter.startswith("critic") and not shifts), parameter
    fooled = slopes(name, program, arrays, "program")[1]
    networks = {"critic", "generator"} | ({"encoder"} if kind in ("ali", "autoencoder", "elbo") else set())
    assert {n.split(".")[0] for n in fooled} == networks
    for parameter, gradient in fooled.items():
        if not parameter.startswith("critic"):
            assert gradient.any(), parameter


@pytest.mark.nightly_on("numpyro")
@both
def test_in_a_sum_the_critic_learns_by_the_adversarial_part_alone(name):
    """ELBO + c · Adversarial: the critic's gradient is c times its own, the ELBO's for the program is there untouched."""
    program, arrays = game(name, "elbo")
    elbo, adversarial = PPL[name].lib.ELBO(kl="sampled"), program.by.parts[1][1]
    alone = slopes(name, program.learned_by(elbo), arrays, "program")[1]
    none = slopes(name, program.learned_by(elbo + 0.0 * adversarial), arrays, "program")[1]
    for parameter in alone:
        np.testing.assert_allclose(none[parameter], alone[parameter], rtol=1e-10, atol=1e-14)
    both_ = slopes(name, program, arrays, "program")[1]
    for parameter in alone:  # draws of the unconditioned program pass the encoder by
        more = np.abs(both_[parameter] - alone[parameter]).max() > 1e-3 * np.abs(alone[parameter]).max()
        assert more == parameter.startswith("generator"), parameter
    critic = [slopes(name, program.learned_by(elbo + c * adversarial), arrays)[1] for c in (1.0, 3.0)]
    for parameter, gradient in critic[0].items():
        np.testing.assert_allclose(critic[1][parameter], 3 * gradient, rtol=1e-10, atol=1e-14)
        assert gradient.any() == parameter.startswith("critic")


@pytest.mark.nightly_on("numpyro")
@both
@pytest.mark.parametrize("frozen", ["program", "critic"])
def test_a_player_without_a_rate_stays_where_it_is_and_the_other_goes_on(name, frozen):
    """Bit for bit; and the critic, which goes first, takes the same first step whatever the program does."""
    program, arrays = game(name, "ali", penalties=[GradientPenalty(1.0), R1(1.0)], critic_steps=2)
    first = {}
    for rate in (1e-300, 0.1):
        lr = {"program": 0.1, "critic": 0.1, frozen: rate}
        e = engine(name, program, arrays, 8, optimizer="sgd", lr=lr)
        start = e.weights(e.start())
        after = e.weights(e.advance(e.start(), 0, 1)[0])
        moved = {n.split(".")[0] for n in start if not np.array_equal(start[n], after[n])}
        networks = {"program": {"generator", "encoder"}, "critic": {"critic"}}
        still = networks[frozen] if rate < 0.1 else set()
        assert moved == {"generator", "encoder", "critic"} - still
        first[rate] = {n: w for n, w in after.items() if n.startswith("critic")}
    if frozen == "program":
        for parameter, value in first[0.1].items():
            np.testing.assert_array_equal(value, first[1e-300][parameter])


# -- the step as it runs ----------------------------------------------------------------------------------------------

ALL = [GradientPenalty(2.0), R1(1.0), R2(0.5), WeightClip(0.4)]


@pytest.mark.parametrize(
    "objective", [o if o in ("minimax", "relativistic") else pytest.param(o, marks=nightly) for o in OBJECTIVES]
)
def test_the_traced_step_is_the_eager_one(objective):
    """With every penalty, two rows judged at once, two updates of the critic, clipping and averages."""
    from test_pyro_graph import agree

    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    by = probgen.pyro.Adversarial(
        critic, objective=objective, penalties=[*ALL, OrthogonalRegularization(0.1)], critic_steps=2, pac=2
    )
    agree(types.SimpleNamespace(program=drawn("pyro", by), arrays={"x": X}, batch_size=8), by, "64")


@pytest.mark.parametrize("kind", ["elbo", *[pytest.param(k, marks=nightly) for k in GAMES[1:] if k != "elbo"]])
def test_the_traced_step_is_the_eager_one_in_every_game(kind):
    from test_pyro_graph import agree

    program, arrays = game("pyro", kind, penalties=ALL)
    agree(types.SimpleNamespace(program=program, arrays=arrays, batch_size=8), program.by, "64")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", GAMES)
def test_the_compiled_step_is_the_eager_one(kind):
    from test_pyro_graph import compiled_agrees

    program, arrays = game("pyro", kind, penalties=ALL, critic_steps=2)
    compiled_agrees(types.SimpleNamespace(program=program, arrays=arrays, batch_size=8), program.by)


def test_the_jitted_loop_takes_the_steps_of_one_that_is_written_by_hand():
    """A non-saturating GAN with R1, two updates of the critic a step, plain JAX throughout but for the draws of z."""
    critic, generator = net("numpyro", "critic", 3, 4, 1), net("numpyro", "generator", 2, 8, 3)
    by = probgen.numpyro.Adversarial(critic, penalties=R1(0.6), critic_steps=2)
    program = drawn("numpyro", by)
    e = engine("numpyro", program, {"x": X}, 8, optimizer="sgd", lr={"critic": 0.1, "program": 0.3}, ema=0.9)
    state, log = e.advance(e.start(), 0, 3)

    def run(network, weights, x):
        return numpyro.handlers.substitute(network, weights)(x)

    def d(weights, x):
        return run(critic, weights, x)[:, 0]

    def fake(weights, key):
        return run(generator, weights, jax.random.normal(jax.random.split(key)[1], (8, 2)))

    @jax.jit
    @jax.value_and_grad
    def told(weights, x, key):
        slope = jax.grad(lambda x: d(weights, x).sum())(x)
        d_fake = d(weights, fake(weights, jax.random.split(key, 4)[0]))
        losses = jax.nn.softplus(-d(weights, x)) + jax.nn.softplus(d_fake)
        return losses.mean() + 0.3 * (slope**2).sum(-1).mean()

    @jax.jit
    @jax.value_and_grad
    def fooled(weights, x, key):  # log 2 is what is said of real rows, in which this program has no hand
        return jax.nn.softplus(-d(weights, fake(weights, jax.random.split(key, 3)[0]))).mean() + jnp.log(2.0)

    with e._scope():
        weights = {n: jnp.asarray(w) for n, w in e.weights(e.start()).items()}
        average = dict(weights)
        for step in range(3):
            key = e._key(1, step)
            keys = [key, jax.random.fold_in(key, 1), jax.random.fold_in(key, 1000)]
            losses = {}
            for update, (player, loss, mine, rate) in enumerate(
                [("critic", told, "critic", 0.1)] * 2 + [("program", fooled, "generator", 0.3)]
            ):
                x = jnp.asarray(e.feed.batch(3 * step + update)["x"])
                losses[player], gradient = loss(weights, x, keys[update])
                weights = {n: w - rate * gradient[n] if n.startswith(mine) else w for n, w in weights.items()}
            average = {n: a + 0.1 * (weights[n] - a) for n, a in average.items()}
            for player, value in losses.items():
                np.testing.assert_allclose(log[f"loss/{player}"][step], value, rtol=1e-10)
    for parameter, value in e.weights(state).items():
        np.testing.assert_allclose(value, average[parameter], rtol=1e-9, atol=1e-12)


@pytest.mark.nightly_on("numpyro")
@both
def test_a_restored_state_goes_on_bit_for_bit(name):
    """Both optimizers, averages and the random numbers of penalties; SIGKILL itself is for the night."""
    program, arrays = game(name, "ali", penalties=ALL, critic_steps=2)
    options = dict(
        lr={"critic": 3e-3, "program": 1e-2}, optimizer={"critic": "rmsprop", "program": "adam"}, ema=0.9, clip=1.0
    )
    e = engine(name, program, arrays, 8, precision="32", **options)
    whole, log = e.advance(e.start(), 0, 12)
    part, head = e.advance(e.start(), 0, 5)
    kept = {n: a.copy() for n, a in e.export(part).items()}
    rest, tail = e.advance(e.restore(kept), 5, 12)
    for key, value in e.export(whole).items():
        assert value.tobytes() == e.export(rest)[key].tobytes(), key
    for metric in log:
        np.testing.assert_array_equal(log[metric], np.concatenate([head[metric], tail[metric]]))
    assert any("slots/critic" in n or "optimizer" in n for n in kept)


CHILD = """
import importlib, sys
sys.path.insert(0, {tests!r})
import probgen
importlib.import_module("probgen.fit").SAVE_EVERY = 0.0   # a checkpoint after every chunk
from test_adversarial import ALL, game
name, out, go_on = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"
program, arrays = game(name, "ali", penalties=ALL, critic_steps=2)
recipe = dict(steps={steps}, batch_size=8, ema=0.99, clip=5.0, seed=3, schedule=probgen.Cosine(1, 0.1, 1000),
    lr=dict(critic=3e-3, program=1e-2), optimizer=dict(critic="rmsprop", program="adam"))
print("ready", flush=True)
probgen.fit(program, arrays, out=out, resume=go_on, progress=False, **({{}} if go_on else recipe))
"""


@pytest.mark.nightly
@both
def test_killed_and_resumed_ends_bit_for_bit(name, tmp_path, monkeypatch):
    """SIGKILL at two random moments, both optimizers by player, averages, penalties: the folder of an uninterrupted run."""
    import random
    from pathlib import Path

    import test_resume

    code = CHILD.format(tests=str(Path(__file__).parent), steps={"pyro": 1500, "numpyro": 60_000}[name])
    monkeypatch.setattr(test_resume, "CHILD", code)
    child = test_resume.start(name, tmp_path / "whole", "fit")
    assert test_resume.wait(child) == 0
    program = game(name, "ali", penalties=ALL, critic_steps=2)[0]
    whole = probgen.Run.open(tmp_path / "whole", program=program)
    run, kills = test_resume.killed_run(name, tmp_path / "killed", random.Random(1), within=3.0)
    assert kills >= 1
    test_resume.assert_same(run, whole)


# -- packing ----------------------------------------------------------------------------------------------------------


@both
def test_packed_rows_lie_side_by_side_and_are_of_one_kind(name):
    """A critic of three rows at once sees three of the data, or three draws, in their order; vectors, images, numbers."""
    lib, seen = PPL[name].lib, []

    def critic(x):
        if name == "pyro" or not isinstance(x, jax.core.Tracer):
            seen.append(np.asarray(x))
        return x.reshape(len(x), -1).sum(-1) * param(name, "w", 1.0)

    for shape in ((2,), (2, 3, 3), ()):
        x = np.arange(9.0 * np.prod(shape, dtype=int)).reshape(9, *shape)
        by = lib.Adversarial(critic, objective="wasserstein", pac=3)
        program = fixed(name, by, point=-x - 1, event=len(shape))
        seen.clear()
        loss, terms = judged(name, program, {"x": x})
        for sent, rows in zip(seen, (x, -x - 1), strict=True):
            first = shape[0] if shape else 1
            assert sent.shape == (3, 3 * first, *shape[1:])
            for i, j in itertools.product(range(3), range(3)):
                np.testing.assert_array_equal(
                    sent[i, j * first : (j + 1) * first], rows[3 * i + j].reshape(first, *shape[1:])
                )
        assert terms["critic_real"] == pytest.approx(x.sum() / 3)  # a mean over packs
        assert loss == pytest.approx((-x - 1).sum() / 3 - x.sum() / 3)


@both
def test_packing_works_with_a_critic_of_every_make(name):
    """A network that is built for packed rows is registered with packed rows."""
    critic = critic_module("torch" if name == "pyro" else "nnx", [np.ones((4, 6)), np.ones((1, 4))])
    module = pyro.module if name == "pyro" else numpyro.contrib.module.nnx_module
    found = []
    for own in (critic, lambda x: module("critic", critic)(x)):
        program = drawn(name, PPL[name].lib.Adversarial(own, pac=2))
        found.append(slopes(name, program, {"x": X}, precision="32")[0])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.nightly_on("numpyro")
@both
def test_validation_rows_need_not_be_a_multiple(name):
    """A packed critic is looked at on whatever rows are there: 51 here, of which pac is no divisor."""
    program, _ = game(name, "elbo", critic_inputs=6, pac=2)
    rows = np.random.default_rng(0).normal(size=(51, 3))
    e = engine(name, program, {"x": rows}, 8)
    assert np.isfinite(e.loss_on(e.start(), [{"x": rows}]))


# -- mutual information -----------------------------------------------------------------------------------------------


def coded(name, p, code, logits, by=None):
    """c ~ Categorical(p), x = code[c], and a guide with logits[x] for c."""
    P, D, array = PPL[name].P, PPL[name].D, PPL[name].array

    def model(x):
        with P.plate("data", len(x)):
            c = P.sample("c", D.Categorical(array(p)))
            P.sample("x", D.Delta(array(code)[c]), obs=x)

    def guide(x):
        with P.plate("data", len(x)):
            P.sample("c", D.Categorical(logits=array(logits)[x.long() if name == "pyro" else x.astype(int)]))

    return Program(model, guide, by=by or PPL[name].lib.MutualInformation("c"))


@both
def test_the_information_of_a_code_is_bounded_by_its_entropy(name):
    """Never above log K, whatever the guide; log K where x says which c it was and the guide knows; and in between
    E[log q(c | x) − log p(c)] by enumeration, within 4 standard errors.
    """
    n, K, rng = 3000, 4, np.random.default_rng(0)
    x, uniform = np.zeros(n), np.full(K, 1 / K)
    for scale in (0.0, 1.0, 30.0):
        loss, terms = judged(name, coded(name, uniform, range(K), scale * rng.normal(size=(K, K))), {"x": x}, "program")
        assert -loss <= np.log(K) + 1e-12 and terms["information_c"] == pytest.approx(-loss)
    sure = -judged(name, coded(name, uniform, range(K), 60 * np.eye(K)), {"x": x}, "program")[0]
    assert sure == pytest.approx(np.log(K), rel=1e-12)
    p, code, logits = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 1, 1, 2]), rng.normal(size=(3, K))
    log_q = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    density = log_q[code, np.arange(K)] - np.log(p)
    mean, sd = p @ density, np.sqrt(p @ density**2 - (p @ density) ** 2)
    found = -judged(name, coded(name, p, code, logits), {"x": x}, "program")[0]
    assert abs(found - mean) < 4 * sd / np.sqrt(n)


def channel(name, g, s, m=None, sigma=None, held=False):
    """z ~ N(0, 1), x ~ N(g z, s²), and q(z | x) = N(m x, σ²), the posterior unless said."""
    P, D, array = PPL[name].P, PPL[name].D, PPL[name].array
    m, sigma = (g / (g**2 + s**2) if m is None else m), (s / np.hypot(g, s) if sigma is None else sigma)

    def model(x):
        gain = g if held else param(name, "gain", g)
        with P.plate("data", len(x)):
            z = P.sample("z", D.Normal(array(0.0), 1.0))
            P.sample("x", D.Normal(gain * z, s), obs=x)

    def guide(x):
        slope, log_width = param(name, "slope", m), param(name, "log_width", np.log(sigma))
        with P.plate("data", len(x)):
            P.sample("z", D.Normal(slope * x, PPL[name].xp.exp(log_width)))

    return Program(model, guide, by=PPL[name].lib.MutualInformation("z"))


@both
def test_the_information_of_a_gaussian_channel(name):
    """With the posterior for a guide it is ½ log(1 + g² / s²), and its slope by g, through the draws of x, is
    g / (g² + s²); the density of information has the variance g² / (g² + s²). 4 standard errors.
    """
    g, s, n = 1.5, 0.8, 20_000
    truth, rho = 0.5 * np.log1p(g**2 / s**2), g / np.hypot(g, s)
    losses, gains = zip(
        *[slopes(name, channel(name, g, s), {"x": np.zeros(n)}, "program", seed=i) for i in range(3)], strict=True
    )
    assert abs(-np.mean(losses) - truth) < 4 * rho / np.sqrt(3 * n)
    slope = -np.mean([gain["gain"] for gain in gains])
    # d/dg of ½ log(g² + s²) − (z − m x)² / 2σ² is m (z − m x) z / σ², whose variance is 2 m² / g² · (1 + 1 / 2ρ²) at most
    assert slope == pytest.approx(g / (g**2 + s**2), abs=4 * 1.5 / np.sqrt(3 * n))
    for gain in gains:
        assert abs(gain["slope"]) < 0.2 and abs(gain["log_width"]) < 0.1  # the posterior is the optimum of the guide


@pytest.mark.nightly_on("numpyro")
@both
def test_a_guide_learns_the_information(name):
    """From elsewhere to within 0.01 of it, by the engine, on minibatches; the gain is held."""
    g, s, steps = 1.5, 0.8, 500
    program = channel(name, g, s, m=0.0, sigma=1.0, held=True)
    _, log = trained(name, program, {"x": np.zeros(4000)}, steps, 2000, lr=0.05, schedule=Cosine(1, 0.01, steps))
    found = log["term/information_z"][-100:].mean()
    assert found == pytest.approx(0.5 * np.log1p(g**2 / s**2), abs=0.01 + 4 / np.sqrt(100 * 2000))


# -- ALI --------------------------------------------------------------------------------------------------------------


@pytest.mark.nightly_on("numpyro")
@both
def test_the_guide_of_ali_inverts_a_linear_program(name):
    """z ~ N(0, 1), x ~ N(a z, s²): against a critic that is quadratic in (x, z) q(z | x) becomes the posterior, whose mean
    is a / (a² + s²) x, 0.8 of a⁻¹ x here, though no density of the program is ever computed. Within 5 %.
    """
    a, s, steps = 2.0, 1.0, 600
    P, D, xp, array = (getattr(PPL[name], part) for part in ("P", "D", "xp", "array"))

    def model(x):
        with P.plate("data", len(x)):
            z = P.sample("z", D.Normal(array(0.0), 1.0))
            P.sample("x", D.Normal(a * z, s), obs=x)

    def guide(x):
        slope, log_width = param(name, "slope", 0.1), param(name, "log_width", -0.5)
        with P.plate("data", len(x)):
            P.sample("z", D.Normal(slope * x, xp.exp(log_width)))

    critic = features(name, "w", lambda x, z: PPL[name].stack([x**2, x * z, z**2]), np.zeros(3))
    by = PPL[name].lib.Adversarial(critic, ("x", "z"), critic_steps=2)
    x = stats.norm(0, np.hypot(a, s)).ppf((np.arange(500) + 0.5) / 500)
    lr = {"critic": 0.05, "program": 0.01}
    options = dict(lr=lr, schedule=Cosine(1, 0.02, steps), ema=0.98)
    weights, _ = trained(name, Program(model, guide, by=by), {"x": x}, steps, **options)
    assert weights["slope"] == pytest.approx(a / (a**2 + s**2), rel=0.05)
    assert np.exp(weights["log_width"]) == pytest.approx(s / np.hypot(a, s), rel=0.1)


# -- distances --------------------------------------------------------------------------------------------------------


@both
def test_l1_is_the_summed_distance_of_draws(name):
    """Per row: from the data of the same site; from another array, for which a cycle F then G starts at a, goes through
    draws of the site b, not its data, and comes back; from another site. A minibatch stands for all rows.
    """
    P, D, lib = (getattr(PPL[name], part) for part in ("P", "D", "lib"))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12, 2, 3))

    def model(a, b):
        f = param(name, "f", 2.0)
        with P.plate("data", len(a)):
            there = P.sample("b", D.Delta(f * a, event_dim=2), obs=b)
            P.sample("back", D.Delta(0.25 * there + 1, event_dim=2))

    def distance(u, v):
        return np.abs(u - v).sum((1, 2)).mean()

    back = 0.5 * a + 1
    for loss, expected, slope in (
        (lib.L1("b"), distance(2 * a, b), (np.sign(2 * a - b) * a).sum((1, 2)).mean()),
        (lib.L1("b", to="a"), distance(2 * a, a), None),
        (lib.L1("back", to="a"), distance(back, a), (np.sign(back - a) * a / 4).sum((1, 2)).mean()),
        (lib.L1("back", to="b"), distance(back, b), None),
        (3.0 * lib.L1("back", to="b"), 3 * distance(back, b), None),
    ):
        program = Program(model, by=loss)
        assert judged(name, program, {"a": a, "b": b}, "program")[0] == pytest.approx(expected, rel=1e-12)
        if slope is not None:
            assert slopes(name, program, {"a": a, "b": b}, "program")[1]["f"] == pytest.approx(slope, rel=1e-10)
    e = engine(name, Program(model, by=lib.L1("b")), {"a": a, "b": b}, 4, lr=1e-12)
    losses = e.advance(e.start(), 0, 3)[1]["loss"]
    for i, loss in enumerate(losses):
        batch = e.feed.batch(i)
        assert loss == pytest.approx(distance(2 * batch["a"], batch["b"]), rel=1e-9)


@pytest.mark.nightly_on("numpyro")
@both
def test_l1_beside_an_adversary(name):
    """pix2pix: the program's loss is the sum, the critic's is its own."""
    program, arrays = game(name, "conditional")
    own, both_ = program.by, program.by + 5.0 * PPL[name].lib.L1("x")
    told = [slopes(name, program.learned_by(by), arrays)[0] for by in (own, both_)]
    assert told[0] == told[1]
    fooled = [slopes(name, program.learned_by(by), arrays, "program")[1] for by in (own, both_)]
    assert all(np.abs(fooled[0][n] - fooled[1][n]).max() > 1e-3 for n in fooled[0] if n.startswith("generator"))
    assert all(np.allclose(fooled[0][n], fooled[1][n]) for n in fooled[0] if n.startswith("critic"))


# -- critics of every make --------------------------------------------------------------------------------------------


def by_params(name):
    """The critic of `MATRICES` as plain parameters."""

    def critic(x):
        h = PPL[name].xp.tanh(x @ param(name, "A", MATRICES[0].T) + param(name, "a", np.full(4, 0.5)))
        return h @ param(name, "B", MATRICES[1].T) + param(name, "b", np.full(1, 0.5))

    return critic


def made(name, make):
    if make == "parameters":
        return by_params(name)
    kind, _, how = make.partition(" ")
    critic = critic_module(kind, MATRICES, bias=0.5)
    if how == "function":
        if kind == "torch":
            return lambda x: pyro.module("named", critic)(x)
        if kind == "nnx":
            return lambda x: numpyro.contrib.module.nnx_module("named", critic)(x)
        if kind == "linen":
            return lambda x: numpyro.contrib.module.flax_module("named", critic, x)(x)
        return lambda x: jax.vmap(numpyro.contrib.module.eqx_module("named", critic))(x)
    if how == "spec":
        return lambda spec: critic if spec["x"].shape == (2,) else None
    return critic


MAKES = {
    "pyro": ["parameters", "torch", "torch function", "torch spec"],
    "numpyro": [
        "parameters",
        "nnx",
        "nnx function",
        "linen",
        "linen function",
        "equinox",
        "equinox function",
        "nnx spec",
    ],
}


@pytest.mark.nightly_on("numpyro")
@both
def test_a_critic_of_any_make_is_the_same_player(name):
    """Modules, functions of what is seen, functions of `spec`: the same loss, and the same gradients, sorted by size."""
    data, found = probgen.load_data(X[:, :2].astype("f4")), {}
    for make in MAKES[name]:
        by = PPL[name].lib.Adversarial(made(name, make), penalties=GradientPenalty(1.0)).built(data.spec)
        program = fixed(name, by, point=X[:, 1:], event=1)
        loss, gradients = slopes(name, program, {"x": X[:, :2]}, precision="32")
        flat = np.sort(np.concatenate([g.ravel() for g in gradients.values()]))
        found[make] = np.array([loss, *flat])
        assert len(flat) == 4 * 2 + 4 + 4 + 1, make
    for make, numbers_ in found.items():
        np.testing.assert_allclose(numbers_, found["parameters"], rtol=1e-4, atol=1e-5, err_msg=make)


@pytest.mark.parametrize("kind", ["torch", "linen", pytest.param("nnx", marks=nightly)])
def test_a_critic_keeps_the_statistics_of_all_rows_it_sees(kind):
    """Its BatchNorm moves a tenth of the way to each batch: real rows, fake ones, and those in the program's turn."""
    name = "pyro" if kind == "torch" else "numpyro"
    if kind == "torch":
        critic = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    elif kind == "linen":
        import flax.linen as linen

        critic = linen.Sequential([linen.BatchNorm(use_running_average=False, momentum=0.9), linen.Dense(1)])
    else:
        from flax import nnx

        rngs = nnx.Rngs(0)
        critic = nnx.Sequential(nnx.BatchNorm(2, momentum=0.9, rngs=rngs), nnx.Linear(2, 1, rngs=rngs))
    program = fixed(name, PPL[name].lib.Adversarial(critic), point=np.full((40, 2), 3.0), event=1)
    e = engine(name, program, {"x": X[:, :2]}, steps=1, precision="32")
    at = e.weights(e.start()), e.weights(e.advance(e.start(), 0, 1)[0])
    before, after = ([value for key, value in weights.items() if "mean" in key] for weights in at)
    mean = before[0]  # NumPyro's starts from the batch by which its shape was found
    for seen in (X[:40, :2].mean(0), 3.0, 3.0):
        mean = 0.9 * mean + 0.1 * seen
    np.testing.assert_allclose(after[0], mean, rtol=1e-4)


@pytest.mark.nightly_on("numpyro")
@both
def test_fit_builds_a_critic_of_what_is_known_of_the_data(name):
    """`spec` has the array's shape; the weights are a function of the seed, and the program's own stay as they were."""

    def critic(spec):
        (D,) = spec["x"].shape
        if name == "pyro":
            return nn.Linear(D, 1)
        from flax import nnx

        return nnx.Linear(D, 1, rngs=nnx.Rngs(0))

    program = fixed(name, PPL[name].lib.Adversarial(critic, penalties=R1(1.0)), point=np.zeros((40, 3)), event=1)
    runs = [probgen.fit(program, X, steps=n, batch_size=8, compile=False, progress=False) for n in (0, 2, 2)]
    weights = [{n: w for n, w in run._weights.items() if n.startswith("critic")} for run in runs]
    assert sorted(w.size for w in weights[0].values()) == [1, 3]
    assert all(not np.array_equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert all(np.array_equal(weights[2][n], weights[1][n]) for n in weights[0])


# -- spectral normalisation -------------------------------------------------------------------------------------------


def spectral(D=3):
    torch.manual_seed(1)
    norm = torch.nn.utils.parametrizations.spectral_norm
    layers = [nn.Linear(D, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)]
    for layer in layers[::2]:
        layer.weight.data *= 5
    return nn.Sequential(*[norm(layer) if isinstance(layer, nn.Linear) else layer for layer in layers])


def test_a_spectrally_normalised_critic_is_one_whose_weights_have_norm_one():
    """The buffers of the power iteration move in training; σ_max of the weight in use, 2 or more at first, is 1 within 2 %."""
    by = probgen.pyro.Adversarial(spectral(), objective="hinge", critic_steps=2)
    e = engine("pyro", drawn("pyro", by), {"x": X}, 8, lr=0.002)
    start = e.start()
    buffers = [n for n in start if n.startswith("buffer/") and n.rpartition(".")[2] in ("_u", "_v")]
    assert len(buffers) == 4
    state, _ = e.advance(start, 0, 40)
    assert all(not torch.equal(start[n], state[n]) for n in buffers if start[n].numel() > 1)
    values = e.step.values(state)
    for layer in ("0", "2"):
        original = values[next(n for n in values if f"{layer}.parametrizations.weight.original" in n)]
        u, v = (values[next(n for n in values if f"{layer}.parametrizations.weight.0.{b}" in n)] for b in ("_u", "_v"))
        used = original / (u @ original @ v)
        assert torch.linalg.svdvals(original)[0] > 1.5 and torch.linalg.svdvals(used)[0] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("penalties", [[], pytest.param(ALL[:1], marks=nightly)], ids=str)
def test_the_traced_step_of_a_spectrally_normalised_critic_is_the_eager_one(penalties):
    from test_pyro_graph import agree

    by = probgen.pyro.Adversarial(spectral(), objective="hinge", penalties=penalties, critic_steps=2)
    agree(types.SimpleNamespace(program=drawn("pyro", by), arrays={"x": X}, batch_size=8), by, "64")


@pytest.mark.nightly
def test_spectral_normalisation_in_nnx():
    """`nnx.SpectralNorm` inside a module: u and σ are carried, and σ is that of the kernel."""
    from flax import nnx

    class Critic(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.SpectralNorm(self.layer, n_steps=1, rngs=rngs)
            self.last = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.norm(x, update_stats=True)))

    by = probgen.numpyro.Adversarial(Critic(nnx.Rngs(0)), penalties=R1(0.1))
    e = engine("numpyro", drawn("numpyro", by), {"x": X}, 8, lr=0.002, precision="32")
    start = e.weights(e.start())
    weights = e.weights(e.advance(e.start(), 0, 60)[0])
    (u,) = (n for n in weights if "norm" in n and "'u'" in n)
    assert not np.array_equal(start[u], weights[u])
    kernel = next(w for w in weights.values() if w.shape == (3, 8))
    (sigma,) = (w for n, w in weights.items() if "'sigma'" in n)
    assert float(sigma) == pytest.approx(np.linalg.svd(kernel)[1][0], rel=0.02)


@pytest.mark.parametrize("penalties", [[], ALL[:1], ALL[1:2]], ids=str)
def test_half_precision_holds_what_a_critic_says(penalties):
    """Under bfloat16 autocast draws and data have two precisions; losses and terms are logged in one."""
    critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    generator = nn.Linear(2, 3)

    def model(x):
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z), event_dim=1), obs=x)

    program = Program(model, by=probgen.pyro.Adversarial(critic, penalties=penalties))
    options = dict(steps=3, batch_size=8, compile=False, progress=False)
    half, full = (probgen.fit(program, X, precision=p, **options).metrics["loss"] for p in ("bf16-mixed", "32"))
    np.testing.assert_allclose(half, full, rtol=0.03)


# -- what is refused --------------------------------------------------------------------------------------------------

critic_of_x = lambda x: x.sum(-1)  # noqa: E731

ARGUMENTS = {
    "objective": (lambda m: m.Adversarial(critic_of_x, objective="minmax"), "did you mean 'minimax'"),
    "critic": (lambda m: m.Adversarial(3), "`critic` is 3"),
    "penalty": (lambda m: m.Adversarial(critic_of_x, penalties=[3.0]), "3.0 is no penalty"),
    "steps": (lambda m: m.Adversarial(critic_of_x, critic_steps=0), "`critic_steps` is 0"),
    "pac": (lambda m: m.Adversarial(critic_of_x, pac=1.5), "`pac` is 1.5"),
    "sites": (lambda m: m.Adversarial(critic_of_x, ()), "name what the critic sees"),
    "sites twice": (lambda m: m.Adversarial(critic_of_x, ("x", "x")), "each once"),
    "no list": (lambda m: m.Adversarial(critic_of_x, 1), "`sites` is 1"),
    "no penalties": (lambda m: m.Adversarial(critic_of_x, penalties=None), "`penalties` is None"),
    "a class": (lambda m: m.Adversarial(dict), "`critic` is <class 'dict'>"),
    "objectives": (lambda m: m.Adversarial(critic_of_x, objective=["hinge"]), "objective=['hinge'] is none of"),
    "name": (lambda m: m.Adversarial(critic_of_x, name="program"), "other than 'program'"),
    "two names": (
        lambda m: m.Adversarial(critic_of_x) + 2 * m.Adversarial(critic_of_x),
        "two critics are named 'critic'",
    ),
    "weight": (lambda m: GradientPenalty(0.0), "`weight` is 0.0"),
    "R1": (lambda m: R1(-1.0), "R1: `weight` is -1.0"),
    "R2": (lambda m: R2(float("nan")), "R2: `weight` is nan"),
    "bound": (lambda m: WeightClip(0), "`bound` is 0"),
    "orthogonal": (lambda m: OrthogonalRegularization("a"), "`weight` is 'a'"),
}


@both
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_are_refused(name, case):
    make, said = ARGUMENTS[case]
    with pytest.raises(ProbgenError) as error:
        make(PPL[name].lib)
    assert said in str(error.value) and str(error.value).count(". ") == 0


def bits(name):
    """Bits x given a latent z, and a guide."""
    P, D, array = PPL[name].P, PPL[name].D, PPL[name].array

    def model(x):
        with P.plate("data", len(x)):
            z = P.sample("z", D.Normal(array(np.zeros(3)), 1.0).to_event(1))
            P.sample("x", D.Bernoulli(logits=z).to_event(1), obs=x)

    def guide(x):
        with P.plate("data", len(x)):
            P.sample("z", D.Normal(x, 1.0).to_event(1))

    return model, guide


REFUSED = {
    "no site": (lambda lib, c: lib.Adversarial(c, ("q",)), "gan", "no site or array 'q'"),
    "no guide": (lambda lib, c: lib.Adversarial(c, ("z",)), "gan", "the latent 'z', which has no real draws"),
    "bits": (lambda lib, c: lib.Adversarial(c), "bits", "the draws of 'x' (Bernoulli) are not reparametrised"),
    "information of bits": (lambda lib, c: lib.MutualInformation("z"), "bits", "reparametrised"),
    "information": (lambda lib, c: lib.MutualInformation("q"), "gan", "'q' is no latent that model and guide both draw"),
    "information without a guide": (lambda lib, c: lib.MutualInformation("z"), "gan", "'z' is no latent that model and"),
    "shape": (lambda lib, c: lib.Adversarial(lambda x: x), "gan", "the critic returns (8, 3) for 8 rows"),
    "one number": (lambda lib, c: lib.Adversarial(lambda x: x.sum()), "gan", "the critic returns () for 8 rows"),
    "pac": (lambda lib, c: lib.Adversarial(c, pac=3), "gan", "pac=3 rows are judged at once, and a batch has 8"),
    "clips": (
        lambda lib, c: lib.Adversarial(c, penalties=[WeightClip(0.1), WeightClip(0.2)]), "gan", "two WeightClips",
    ),
    "elbo": (lambda lib, c: lib.ELBO(), "gan", "the latent 'z' has neither a guide nor enumeration"),
    "l1": (lambda lib, c: lib.L1("q"), "gan", "L1: 'q' is no site of the model"),
    "l1 of bits": (lambda lib, c: lib.L1("x"), "bits", "L1: 'x' is no site of the model with a reparametrised draw"),
    "l1 to": (lambda lib, c: lib.L1("x", to="q"), "gan", "L1: there is no array or site 'q'"),
}  # fmt: skip


@both
@pytest.mark.parametrize("case", REFUSED)
def test_programs_that_are_refused(name, case):
    make, kind, said = REFUSED[case]

    def critic(*seen):
        return sum(x.reshape(len(x), -1).sum(-1) for x in seen) * param(name, "w", 1.0)

    model, guide = bits(name) if kind == "bits" else (drawn(name).model, None)
    arrays = {"x": (X > 1).astype(float) if kind == "bits" else X}
    with pytest.raises(ProbgenError) as error:
        engine(name, Program(model, guide, by=make(PPL[name].lib, critic)), arrays, 8)
    assert said in str(error.value) and str(error.value).count(". ") == 0


OTHER = {
    "the array alone": (lambda lib, c: lib.Adversarial(c, ("images",)), "the program draws none of 'images'"),
    "the site alone": (lambda lib, c: lib.Adversarial(c), "no array bears the name of the site 'x'"),
    "information": (lambda lib, c: lib.MutualInformation("z"), "no array bears the name of the site 'x'"),
}


@both
@pytest.mark.parametrize("case", OTHER)
def test_an_array_of_another_name_than_its_site_is_refused(name, case):
    """Real rows that are the fake ones, no real rows, and a guide that would be shown data for draws."""
    P, D, array = PPL[name].P, PPL[name].D, PPL[name].array

    def model(images):
        with P.plate("data", len(images)):
            z = P.sample("z", D.Normal(array(np.zeros(3)), 1.0).to_event(1))
            P.sample("x", D.Delta(z * param(name, "g", 1.0), event_dim=1), obs=images)

    def guide(images):
        with P.plate("data", len(images)):
            P.sample("z", D.Normal(images * param(name, "q", 1.0), 1.0).to_event(1))

    def critic(seen):
        return seen.sum(-1) * param(name, "w", 1.0)

    make, said = OTHER[case]
    with pytest.raises(ProbgenError, match=said):
        engine(name, Program(model, guide, by=make(PPL[name].lib, critic)), {"images": X}, 8)


@both
def test_pac_counts_rows_and_not_the_plates_beside_them(name):
    P, D, array = PPL[name].P, PPL[name].D, PPL[name].array

    def model(x):
        with P.plate("data", len(x), dim=-1):
            with P.plate("beside", 3, dim=-2):
                P.sample("z", D.Normal(array(0.0), 1.0))
            P.sample("x", D.Normal(array(np.zeros(3)), param(name, "s", 1.0)).to_event(1), obs=x)

    def critic(x):
        return x.sum(-1) * param(name, "w", 1.0)

    engine(name, Program(model, by=PPL[name].lib.Adversarial(critic, pac=2)), {"x": X}, 8)


def test_a_critic_may_be_flat_in_what_it_sees():
    """A label that is compared only has no gradient, and counts as zero in the slope."""
    by = probgen.pyro.Adversarial(lambda x, y: x.sum(-1) * param("pyro", "w", 2.0) + (y > 0), penalties=R1(1.0))
    seen = torch.ones(4, 3), torch.ones(4)
    pyro.clear_param_store()
    assert by._slope("real", seen, seen).tolist() == [12.0] * 4


def test_patience_without_a_validation_loss_is_refused():
    with pytest.raises(ProbgenError, match="`patience` waits for a better validation loss, and this loss has none"):
        probgen.fit(probgen.load("gan", "ring"), "ring", steps=1, patience=3, progress=False)


@both
def test_orthogonal_regularization_of_a_function_is_refused(name):
    by = PPL[name].lib.Adversarial(net(name, "critic", 3, 1), penalties=OrthogonalRegularization(0.1))
    with pytest.raises(ProbgenError, match="looks at the weights of a module; give `critic` as one"):
        e = engine(name, drawn(name, by), {"x": X}, 8)
        e.advance(e.start(), 0, 1)


@pytest.mark.nightly_on("numpyro")
@both
@pytest.mark.parametrize("which", ["alone", "sum"])
def test_two_players_are_refused_by_the_ppls_own_svi(name, which):
    by = game(name, "elbo")[0].by
    by = by.parts[1][1] if which == "alone" else by
    program = game(name, "elbo")[0]
    pyro.clear_param_store()
    with pytest.raises(ProbgenError, match=r"probgen\.fit") as error:
        if name == "pyro":
            x = torch.tensor(X, dtype=torch.float32)
            pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({}), by).step(x)
        else:
            svi = numpyro.infer.SVI(program.model, program.guide, numpyro.optim.Adam(1e-3), by)
            svi.update(svi.init(jax.random.key(0), x=jnp.asarray(X)), x=jnp.asarray(X))
    assert str(error.value).count(". ") == 0
    pyro.clear_param_store()


@pytest.mark.nightly_on("numpyro")
@both
@pytest.mark.parametrize("which", ["information", "distance"])
def test_one_player_runs_in_the_ppls_own_svi(name, which):
    """As every loss of one player does: the same number as by the engine's player."""
    lib = PPL[name].lib
    by = lib.MutualInformation("z") if which == "information" else lib.L1("x")
    program, x = channel(name, 1.5, 0.8).learned_by(by), np.zeros(4000)
    pyro.clear_param_store()
    if name == "pyro":
        torch.manual_seed(0)
        loss = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({}), by).step(x=torch.tensor(x).float())
    else:
        svi = numpyro.infer.SVI(program.model, program.guide, numpyro.optim.Adam(1e-3), by)
        loss = svi.update(svi.init(jax.random.key(0), x=jnp.asarray(x)), x=jnp.asarray(x))[1]
    pyro.clear_param_store()
    rho, wide = 1.5 / np.hypot(1.5, 0.8), np.hypot(1.5, 0.8)
    expected, sd = (
        (-0.5 * np.log1p(1.5**2 / 0.8**2), rho) if which == "information" else (wide * np.sqrt(2 / np.pi), wide)
    )
    assert abs(float(loss) / 4000 - expected) < 4 * sd / np.sqrt(4000)


@pytest.mark.nightly_on("numpyro")
@both
def test_a_gan_samples_and_says_that_the_rest_is_not_defined(name):
    run = probgen.fit(drawn(name, game(name, "gan")[0].by), X, steps=2, batch_size=8, compile=False, progress=False)
    assert run.sample(5)["x"].shape == (5, 3)
    found = run.evaluate(X[:5])
    assert "log_likelihood" not in found and "elbo" not in found
    assert "log_likelihood, elbo and bits_per_dim are not defined: the program is implicit" in found["notes"][0]
    with pytest.raises(ProbgenError, match="no guide that draws the latent 'z'"):
        run.posterior(X[:5])
