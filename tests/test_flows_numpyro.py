"""Flows on NumPyro: transforms, their distribution and the programs, against JAX's Jacobians, quadrature and the twins.

Gates on random draws have fixed seeds and a false-alarm rate below 1e-6 each.
"""

import functools
import itertools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.module import flax_module
from numpyro.distributions.transforms import AffineTransform, ExpTransform, PermuteTransform
from numpyro.handlers import seed, substitute, trace

import probgen
from probgen import ProbgenError, Program
from probgen.check.subject import Subject
from probgen.numpyro import ELBO
from probgen.numpyro.distributions import Flow
from probgen.numpyro.nn import ConvConditioner, DenseConditioner, MaskedConditioner
from probgen.numpyro.scope import precision_scope
from probgen.numpyro.trace import log_density
from probgen.numpyro.transforms import (
    ActNorm,
    ChannelCoupling,
    ChannelsFirst,
    CheckerboardCoupling,
    Compose,
    FirstRows,
    MultiScale,
    SplineAutoregressive,
    SplineCoupling,
    Squeeze,
    actnorm,
)
from probgen.numpyro.transforms.bijection import call_and_ladj, inverse_and_ladj
from probgen.numpyro.transforms.spline import bins, inverse_spline, spline

IMAGE = (4, 2, 6)


def bound(module, shape, key=0):
    """A flax module with weights that are none of those that it starts with, as `flax_module` returns it."""
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, *shape)))["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(key)
    numbers = (rng.normal(0, 1 / math.sqrt(math.prod(leaf.shape[:-1]) + 1), leaf.shape) for leaf in leaves)
    params = jax.tree.unflatten(tree, map(jnp.asarray, numbers))
    return functools.partial(lambda p, x: module.apply({"params": p}, x), params)


def network(kept, outputs, sides, key):
    return bound((ConvConditioner if sides else DenseConditioner)(outputs, 8), (kept, *sides), key)


def coupling(shape, flip=False, key=0):
    kept, changed = ChannelCoupling.sizes(shape[0], flip)
    return ChannelCoupling(network(kept, 2 * changed, shape[1:], key), shape, flip)


def spline_coupling(shape, flip=False, key=0):
    kept, changed = SplineCoupling.sizes(shape[0], flip)
    return SplineCoupling(network(kept, changed * 14, shape[1:], key), shape, flip, bound=3.0)


def autoregressive(size, passes=None, reverse=False, key=0):
    conditioner = MaskedConditioner(size, 14, (16, 16), passes, reverse)
    return SplineAutoregressive(bound(conditioner, (size,), key), (size,), passes)


def checkerboard(flip=False, shape=IMAGE, key=0):
    return CheckerboardCoupling(network(shape[0], 2 * shape[0], shape[1:], key), shape, flip)


def norm(shape, key=0):
    channels = (shape[0], *(1 for _ in shape[1:]))
    loc, log_scale = np.random.default_rng(key).normal(0, 0.5, (2, *channels))
    return ActNorm(shape, {"loc": jnp.asarray(loc), "log_scale": jnp.asarray(log_scale)})


def multiscale():
    first = Compose(Squeeze((1, 4, 8)), norm((4, None, None)), coupling((4, 2, 4)))
    second = Compose(checkerboard(shape=(2, 2, 4)), Squeeze((2, 2, 4)), spline_coupling((8, 1, 2), True))
    return Compose(ChannelsFirst((4, 8)), MultiScale((1, 4, 8), [first, second]))


TRANSFORMS = {
    "ActNorm": lambda: norm((3,)),
    "ActNorm, images": lambda: norm(IMAGE),
    "ChannelCoupling": lambda: coupling((5,)),
    "ChannelCoupling, flip": lambda: coupling((5,), True),
    "ChannelCoupling, images": lambda: coupling(IMAGE, True),
    "CheckerboardCoupling": lambda: checkerboard(),
    "CheckerboardCoupling, flip": lambda: checkerboard(True),
    "SplineCoupling": lambda: spline_coupling((5,)),
    "SplineCoupling, flip": lambda: spline_coupling((5,), True),
    "SplineCoupling, images": lambda: spline_coupling(IMAGE),
    "SplineAutoregressive": lambda: autoregressive(4),
    "SplineAutoregressive, reverse": lambda: autoregressive(4, reverse=True),
    "SplineAutoregressive, halves": lambda: autoregressive(5, passes=2),
    "SplineAutoregressive, one": lambda: autoregressive(1),
    "Squeeze": lambda: Squeeze(IMAGE),
    "ChannelsFirst": lambda: ChannelsFirst((2, 6, 4)),
    "ChannelsFirst, grey": lambda: ChannelsFirst((4, 6)),
    "Compose": lambda: Compose(
        norm((3,)), coupling((3,)), PermuteTransform(jnp.array([2, 0, 1])), coupling((3,), True)
    ),
    "MultiScale": multiscale,
}


def rows(transform, n=4, key=1):
    return jnp.asarray(np.random.default_rng(key).normal(0, 1.5, (n, *transform.shape)))


# -- transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_log_determinant_is_that_of_the_jacobian(make):
    """log |det| = slogdet ∂y/∂x for every row, there and back: ≤1e-8 in float64."""
    with precision_scope("64"):
        f = make()
        x = rows(f)
        flat = lambda v: f(v.reshape(f.shape)).ravel()  # noqa: E731

        @jax.jit
        def found(x):
            expected = jax.vmap(lambda row: jnp.linalg.slogdet(jax.jacobian(flat)(row.ravel()))[1])(x)
            y, ladj = call_and_ladj(f, x)
            back, inverse = inverse_and_ladj(f, y)
            return expected, ladj, inverse, x - back, f.log_abs_det_jacobian(x, y)

        expected, ladj, inverse, error, again = found(x)
    assert ladj.shape == (len(x),)
    np.testing.assert_allclose(ladj, expected, atol=1e-8)
    np.testing.assert_allclose(again, expected, atol=1e-8)
    np.testing.assert_allclose(inverse, -np.array(expected), atol=1e-8)
    np.testing.assert_allclose(error, 0.0, atol=1e-8)


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_round_trip_and_shapes(make):
    """x → y → x within 1e-5 of the largest x in float32; any number of axes in front; NumPyro's shapes."""
    f = make()
    x = rows(f, 6).astype(np.float32)
    y, back = jax.jit(lambda x: (f(x), f.inv(f(x))))(x)
    np.testing.assert_allclose(back, x, atol=1e-5 * (1 + np.abs(x).max()))
    assert y.shape == f.forward_shape(x.shape) == (6, *f.onto) and x.shape == f.inverse_shape(y.shape)
    assert (f.domain.event_dim, f.codomain.event_dim) == (len(f.shape), len(f.onto))
    for lead in ((), (2, 3)):
        y, ladj = jax.eval_shape(functools.partial(call_and_ladj, f), jnp.zeros((*lead, *f.shape)))
        x, inverse = jax.eval_shape(functools.partial(inverse_and_ladj, f), jnp.zeros((*lead, *f.onto)))
        assert (y.shape, x.shape, ladj.shape, inverse.shape) == ((*lead, *f.onto), (*lead, *f.shape), lead, lead)


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_is_a_pytree_of_its_weights(make):
    f = make()
    leaves, tree = jax.tree.flatten(f)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(tree, leaves)
    assert f == again
    assert bool(leaves) != isinstance(f, Squeeze | ChannelsFirst)
    assert not leaves or f != jax.tree.unflatten(tree, [leaf + leaf.dtype.type(1) for leaf in leaves])
    x = rows(f).astype(np.float32)
    np.testing.assert_allclose(jax.jit(lambda f, x: f(x))(f, x), jax.jit(lambda x: f(x))(x), rtol=1e-5, atol=1e-5)


def test_what_a_coupling_keeps_it_keeps():
    """Checkerboards: the kept squares pass unchanged, and nothing depends on the changed ones but themselves."""
    for flip in (False, True):
        f = checkerboard(flip)
        x = rows(f)
        kept = np.broadcast_to(f.mask, x.shape)
        assert kept.mean() == 0.5 and kept[0, 0, 0, 0] == (not flip)
        np.testing.assert_array_equal(np.array(f(x))[kept], np.array(x)[kept])
        other = jnp.where(kept, x, x + 1)
        np.testing.assert_array_equal(np.array(f(other))[kept], np.array(x)[kept])
    f = coupling((5,), flip=True)
    x = rows(f)
    np.testing.assert_array_equal(f(x)[:, 3:], x[:, 3:])
    assert (np.array(f(x))[:, :3] != np.array(x)[:, :3]).all()


@pytest.mark.parametrize(("passes", "reverse"), [(None, False), (None, True), (2, False), (3, True)])
def test_masks(passes, reverse):
    """∂θ_d/∂x_j is exactly zero where x_j does not come before x_d, and nowhere else."""
    size = 6
    conditioner = bound(MaskedConditioner(size, 2, (80, 80), passes, reverse), (size,))
    jacobian = np.abs(jax.jit(jax.jacobian(conditioner))(jnp.linspace(-1.0, 1.0, size))).max(1)
    group = np.arange(size) // math.ceil(size / (passes or size))
    group = group[::-1] if reverse else group
    np.testing.assert_array_equal(jacobian > 0, group[:, None] > group)


# -- splines --------------------------------------------------------------------------------------------------------

THETA = np.random.default_rng(0).normal(0, 4.0, (50, 1, 23))


def on_a_line(x, bound=5.0):
    """Splines of 50 random θ at x [n]: y and log dy/dx, and the inverse of y, [50, n] each."""
    at = bins(jnp.asarray(THETA, x.dtype), bound)
    y, log_slope = spline(x, at, bound)
    return y, log_slope, *inverse_spline(y, at, bound)


def test_splines_are_monotone_and_the_identity_outside():
    with precision_scope("64"):
        x = jnp.linspace(-7.0, 7.0, 4001)
        y, log_slope, back, inverse = jax.jit(on_a_line)(x)
    y, log_slope, outside = np.array(y), np.array(log_slope), np.abs(x) > 5
    assert (np.diff(y) > 0).all()
    np.testing.assert_array_equal(y[:, outside], np.broadcast_to(x, y.shape)[:, outside])
    assert (log_slope[:, outside] == 0).all() and (np.abs(y[:, ~outside]) <= 5).all()
    assert np.abs(y - np.array(x)).max() > 1  # none of them is the identity inside
    np.testing.assert_allclose(back, np.broadcast_to(x, y.shape), atol=1e-9)
    np.testing.assert_allclose(inverse, -log_slope, atol=1e-7)


def test_the_slope_of_a_spline_is_its_derivative():
    with precision_scope("64"):
        x = jnp.linspace(-5.5, 5.5, 999)
        slope = jax.jit(jax.vmap(jax.grad(lambda v: spline(v, bins(jnp.asarray(THETA[0, 0])))[0])))(x)
        y, log_slope = spline(x, bins(jnp.asarray(THETA[0])))
        inverse = jax.jit(jax.vmap(jax.grad(lambda v: inverse_spline(v, bins(jnp.asarray(THETA[0, 0])))[0])))(y)
    np.testing.assert_allclose(log_slope, np.log(slope), atol=1e-9)
    np.testing.assert_allclose(inverse, 1 / np.array(slope), rtol=1e-7)


def test_a_spline_of_zeros_is_the_identity_and_steep_ones_stay_finite():
    """θ = 0; and in float32 at knots, at the ends and beyond, of huge θ: values, slopes and their gradients."""
    x = jnp.array([-jnp.inf, -1e9, -5.0, -5 + 1e-6, -1.25, 0.0, 1e-9, 1.25, 5 - 1e-6, 5.0, 6.0, 1e9])
    y, log_slope = spline(x, bins(jnp.zeros((1, 23))))
    np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(log_slope, 0, atol=1e-5)
    assert np.isnan(spline(jnp.array([jnp.nan]), bins(jnp.zeros((1, 23))))[0]).all()  # a missing value is noticed

    def both(theta, x):
        at = bins(theta)
        return *spline(x, at), *inverse_spline(x, at)

    @jax.jit
    def all_of_it(theta, x):
        return *both(theta, x), *jax.grad(lambda *of: sum(part.sum() for part in both(*of)), (0, 1))(theta, x)

    for spread in (1.0, 1e3, 1e8):
        theta = jnp.asarray(np.random.default_rng(1).normal(0, spread, (50, 1, 23)), np.float32)
        *values, by_theta, by_x = all_of_it(theta, x)
        assert all(np.isfinite(value[..., 1:]).all() for value in values)  # −∞ stays −∞, and harms no gradient
        assert np.isfinite(by_theta).all() and np.isfinite(by_x).all()


def test_the_inverse_of_a_spline_does_not_cancel():
    """In float32 its log-slopes are those of float64 within 0.01 in 99.9% of steep splines; the usual root: 0.1."""
    theta, y = np.random.default_rng(0).normal(0, 10, (2000, 1, 23)), np.linspace(-4.99, 4.99, 61)
    invert = lambda theta, y: inverse_spline(y, bins(theta))[1]  # noqa: E731
    with precision_scope("64"):
        exact = np.array(jax.jit(invert)(jnp.asarray(theta), jnp.asarray(y)))
    found = jax.jit(invert)(jnp.asarray(theta, np.float32), jnp.asarray(y, np.float32))
    assert np.quantile(np.abs(found - exact), 0.999) < 0.01


@pytest.mark.parametrize("shape", [(3,), (5, 2, 3)], ids=["vectors", "images"])
def test_each_dimension_has_the_spline_that_is_told_for_it(shape):
    """A network's outputs are 3 K − 1 numbers for the first channel that is changed, then for the second, ..."""
    kept, changed = SplineCoupling.sizes(shape[0])
    said = np.random.default_rng(0).normal(0, 1, (changed, 14, *shape[1:])).astype(np.float32)
    f = SplineCoupling(lambda x: jnp.asarray(said.reshape(-1, *shape[1:])), shape)
    x = rows(f, 1)[0].astype(np.float32)
    y = f(x)
    for at in np.ndindex(changed, *shape[1:]):
        alone, _ = spline(x[kept:][at], bins(jnp.asarray(said[at[0], :, *at[1:]])))
        np.testing.assert_allclose(y[kept:][at], alone, rtol=1e-5, atol=1e-5)


# -- the distribution -----------------------------------------------------------------------------------------------

FLAT = {
    "affine": lambda: Compose(norm((2,)), coupling((2,), key=1), norm((2,), 2), coupling((2,), True, 3)),
    "spline coupling": lambda: Compose(spline_coupling((2,)), norm((2,), 1), spline_coupling((2,), True, 2)),
    "autoregressive": lambda: Compose(autoregressive(2), autoregressive(2, reverse=True, key=1)),
}


def normal():
    return dist.Normal(jnp.zeros(2), 1.0).to_event(1)


@pytest.mark.parametrize(("name", "far"), [("affine", 40.0), ("spline coupling", 14.0), ("autoregressive", 14.0)])
def test_a_density_integrates_to_one(name, far):
    """The trapezoid sum over 2-D space is 1 ± 1e-4, in float64."""
    with precision_scope("64"):
        fn = Flow(FLAT[name](), normal())
        side = jnp.linspace(-far, far, 1001)
        grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
        mass = float(jnp.exp(jax.jit(fn.log_prob)(grid)).sum() * (side[1] - side[0]) ** 2)
    assert abs(mass - 1) < 1e-4


@pytest.mark.parametrize("make", [*FLAT.values(), multiscale], ids=[*FLAT, "multiscale"])
def test_flow_is_the_transformed_distribution(make):
    """Densities and draws of NumPyro's own, with the same key; and a draw knows its density."""
    with precision_scope("64"):
        f = make()
        base = dist.Normal(jnp.zeros(f.onto), 1.0).to_event(1)
        ours, theirs = Flow(f, base), dist.TransformedDistribution(base, f.inv)
        assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape) == ((), f.shape)
        key = jax.random.key(0)
        draws, known = jax.jit(lambda key: ours.sample_with_intermediates(key, (5,)))(key)
        np.testing.assert_allclose(jax.jit(lambda k: theirs.sample(k, (5,)))(key), draws, atol=1e-9)
        densities = jax.jit(lambda x: (ours.log_prob(x), theirs.log_prob(x)))(draws)
    np.testing.assert_allclose(*densities, atol=1e-9)
    np.testing.assert_allclose(ours.log_prob(draws, known), densities[0], atol=1e-7)
    assert ours.support.event_dim == len(f.shape) and bool(ours.support(draws).all())


def test_transforms_of_numpyro_serve_too():
    """log x ~ N(0, 1) is the log-normal; f and f.inv; the base lends axes of its batch."""
    x = jnp.array([0.3, 1.0, 4.0])
    expected = dist.LogNormal(0.0, 1.0)
    ours = Flow(ExpTransform().inv, dist.Normal(0.0, 1.0))
    np.testing.assert_allclose(ours.log_prob(x), expected.log_prob(x), rtol=1e-6)
    assert ours.support is dist.constraints.positive
    f = coupling((2,))
    one, other = Flow(f.inv, normal()), dist.TransformedDistribution(normal(), f)
    y = jnp.ones((3, 2))
    np.testing.assert_allclose(one.log_prob(y), other.log_prob(y), rtol=1e-6)
    lent = Flow(f, dist.Normal(jnp.zeros((3, 2)), 1.0))
    assert (lent.batch_shape, lent.event_shape) == ((3,), (2,)) and lent.log_prob(y).shape == (3,)


def test_in_plates_and_through_jax():
    """Expanded, masked, as an argument of a compiled function, and in a guide, where a draw is not inverted."""
    f = FLAT["affine"]()
    fn = Flow(f, normal())
    x = fn.sample(jax.random.key(1), (4, 3))
    wide = fn.expand((4, 3))
    assert wide.batch_shape == (4, 3) and wide.sample(jax.random.key(0), (5,)).shape == (5, 4, 3, 2)
    np.testing.assert_allclose(wide.log_prob(x), fn.log_prob(x), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda fn, x: fn.log_prob(x))(fn, x), fn.log_prob(x), rtol=1e-5)
    assert fn.has_rsample and wide.has_rsample

    def guide():
        with numpyro.plate("a", 4, dim=-2), numpyro.plate("b", 3, dim=-1):
            numpyro.sample("z", Flow(f, normal()))

    site = trace(seed(guide, jax.random.key(0))).get_trace()["z"]
    assert site["intermediates"] and site["value"].shape == (4, 3, 2)
    np.testing.assert_allclose(log_density(site), fn.log_prob(site["value"]), rtol=1e-4, atol=1e-4)


def test_draws_carry_gradients():
    """∂ E[x²] / ∂ log_scale of an ActNorm: x = z exp(−log_scale) + loc, so −2 E[z²] exp(−2 log_scale)."""

    def second_moment(log_scale):
        f = ActNorm((2,), {"loc": jnp.zeros(2), "log_scale": log_scale})
        return (Flow(f, normal()).rsample(jax.random.key(0), (1000,)) ** 2).sum(-1).mean()

    log_scale = jnp.array([0.3, -0.2])
    z = normal().sample(jax.random.key(0), (1000,))
    expected = -2 * (z**2).mean(0) * jnp.exp(-2 * log_scale)
    np.testing.assert_allclose(jax.grad(second_moment)(log_scale), expected, rtol=1e-4)
    discrete = Flow(AffineTransform(0.0, 2.0), dist.Poisson(3.0))
    assert not discrete.has_rsample


# -- ActNorm's start ------------------------------------------------------------------------------------------------


def curved(x):
    """A flow of two ActNorms around a layer that undoes what the first has done."""
    rows = FirstRows(x)
    first = rows.through(actnorm("first", (2,), rows))
    between = rows.through(coupling((2,), key=4))
    return [first, between, rows.through(actnorm("second", (2,), rows))]


def test_actnorm_starts_from_what_reaches_it():
    """Every channel has mean 0 and variance 1 behind it on the first batch; a constant one is centred."""
    x = jnp.asarray(np.random.default_rng(0).normal(5.0, 3.0, (200, 2)), np.float32)

    def model(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", Flow(Compose(*curved(x)), normal()), obs=x)

    start = jax.jit(
        lambda x: {n: s["value"] for n, s in trace(seed(model, 0)).get_trace(x).items() if s["type"] == "param"}
    )
    numbers = start(x)
    assert set(numbers) == {"first", "second"}
    h = x
    with seed(rng_seed=0), substitute(data=numbers):
        for part in curved(x):
            h = part(h)
            if isinstance(part, ActNorm):
                np.testing.assert_allclose(h.mean(0), 0, atol=1e-4)
                np.testing.assert_allclose(h.std(0), 1, atol=1e-4)
    image = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (50, 3, 4, 4)), np.float32).at[:, 1].set(7.0)
    y = ActNorm((3, 4, 4), ActNorm.start((3, 4, 4), image))(image)
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 2, 3)), [1, 0, 1], atol=1e-4)


def test_rows_are_mapped_once_and_only_where_asked():
    """With the parameters there, no layer runs to start them."""
    runs = []

    def layer(x):
        runs.append(1)
        return x

    rows_ = FirstRows(jnp.arange(6.0).reshape(3, 2))
    with seed(rng_seed=0), substitute(data={"n": {"loc": jnp.zeros(2), "log_scale": jnp.zeros(2)}}):
        rows_.through(layer)
        actnorm("n", (2,), rows_)
        assert not runs
        actnorm("m", (2,), rows_)
        rows_.through(layer)
        actnorm("o", (2,), rows_)
        actnorm("p", (2,), rows_)
    assert len(runs) == 2


def test_realnvp_starts_standardised():
    """Through the engine's own start, with networks at zero: the first batch is mapped to mean 0 and variance 1."""
    x = np.random.default_rng(0).normal((3.0, -1.0), (2.0, 0.5), (500, 2)).astype(np.float32)
    subject = Subject(probgen.load("realnvp_numpyro", {"x": x}, couplings=2), {"x": x})
    batch, weights = subject.arrays["x"], subject.weights
    assert len(batch) < 100 and np.abs(batch.mean(0)).max() > 0.01  # a batch's moments are not those of all rows
    np.testing.assert_allclose(weights["norm_0.loc"], batch.mean(0), atol=1e-5)
    np.testing.assert_allclose(weights["norm_0.log_scale"], -np.log(batch.std(0)), atol=1e-5)
    for name in ("loc", "log_scale"):  # the layers before have done it already
        np.testing.assert_allclose(weights[f"norm_1.{name}"], 0, atol=1e-5)


def test_each_fit_starts_actnorm_from_its_own_first_batch():
    """A second fit of one program, on other data, starts as the first fit of a fresh one does."""
    rng, starts = np.random.default_rng(0), []
    first, second = {"x": rng.normal(5.0, 1.0, (200, 2))}, {"x": rng.normal(-9.0, 3.0, (200, 2))}
    for before in ((first, second), (second,)):
        program = replace(probgen.load("realnvp_numpyro", first, couplings=2, hidden=8), prepare={})
        for data in before:
            run = probgen.fit(program, data, steps=1, lr=1e-12, progress=False)
        starts.append(run.params["norm_0.loc"])
    assert np.abs(starts[0] + 9).max() < 1
    np.testing.assert_array_equal(*starts)


# -- twins ----------------------------------------------------------------------------------------------------------


def realnvp_names(options):
    """Flax's layers under torch's names: (ours, theirs), one pair for each ActNorm and each network."""
    if "levels" not in options:
        k = range(options["couplings"])
        return [(f"norm_{i}", f"parts.{2 * i}") for i in k], [
            (f"coupling_{i}", f"parts.{2 * i + 1}.network") for i in k
        ]
    norms, networks, number = [], [], options["couplings"]
    for level, i in itertools.product(range(options["levels"]), range(number)):
        name, at = f"level_{level}", f"parts.1.levels.{level}.parts"
        norms += [(f"{name}_board_norm_{i}", f"{at}.{2 * i}"), (f"{name}_norm_{i}", f"{at}.{2 * (number + i) + 1}")]
        networks += [(f"{name}_board_{i}", f"{at}.{2 * i + 1}.network")]
        networks += [(f"{name}_coupling_{i}", f"{at}.{2 * (number + i) + 2}.network")]
    return norms, networks


def as_flax(kernel):
    """A weight of torch's in flax's layout: dense [out, in], convolution [out, in, h, w]."""
    return np.ascontiguousarray(kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T)


def realnvp_converted(weights, options):
    """Torch's weights under flax's names."""
    norms, networks = realnvp_names(options)
    found = {}
    for ours, theirs in norms:
        found |= {f"{ours}.{n}": weights[f"flow$$${theirs}.{n}"] for n in ("loc", "log_scale")}
    for (ours, theirs), i in itertools.product(networks, range(3)):
        layer, kind = f"flow$$${theirs}.layers.{2 * i}", "Conv" if "levels" in options else "Dense"
        found[f"{ours}.{kind}_{i}.kernel"] = as_flax(weights[f"{layer}.weight"])
        found[f"{ours}.{kind}_{i}.bias"] = weights[f"{layer}.bias"]
    return found


def spline_converted(weights, options):
    """Zuko's weights, or those of the couplings, under flax's names."""
    found, dense = {}, options.get("coupling")
    pattern = r"parts\.(\d+)\.network\.layers\.(\d+)" if dense else r"transform\.transforms\.(\d+)\.hyper\.(\d+)"
    for name, value in weights.items():
        if match := re.fullmatch(rf"flow\$\$\${pattern}\.(weight|bias)", name):
            k, i, kind = match.groups()
            layer = int(i) // 2
            name = f"layers_{layer}" if layer < options["layers"] else "out"
            name = f"coupling_{k}.Dense_{layer}" if dense else f"spline_{k}.{name}"
            found[f"{name}.{'bias' if kind == 'bias' else 'kernel'}"] = as_flax(value)
    return found


TWINS = {
    "realnvp, vectors": ("realnvp", "two-moons", {"couplings": 3, "hidden": 16}),
    "realnvp, images": ("realnvp", "digits", {"couplings": 2, "hidden": 8, "levels": 2}),
    "spline": ("spline", "two-moons", {"layers": 2, "hidden": 16}),
    "spline, couplings": ("spline", "digits", {"layers": 1, "hidden": 16, "transforms": 3, "coupling": True}),
    "spline, images": ("spline", "digits", {"layers": 2, "hidden": 100, "transforms": 2}),
}


@pytest.mark.parametrize(
    ("name", "source", "options"),
    [
        pytest.param(*case, id=key, marks=[pytest.mark.nightly] if key == "spline, images" else [])
        for key, case in TWINS.items()
    ],
)
def test_twins_are_one_program(name, source, options):
    """Pyro and NumPyro agree on the log density of every row, with the same random weights: ≤1e-5 relative."""
    if name == "spline":
        pytest.importorskip("zuko")
    convert = {"realnvp": realnvp_converted, "spline": spline_converted}[name]
    data = probgen.load_data(source)
    ours, theirs = (Subject(probgen.load(file, data, **options), data) for file in (name, f"{name}_numpyro"))
    rng = np.random.default_rng(0)
    weights = {n: value if "base" in n else perturbed(value, rng) for n, value in ours.weights.items()}
    converted = convert(weights, options)
    assert converted.keys() == theirs.weights.keys()
    arrays = ours.arrays
    a = ours.with_weights(weights).log_weights(arrays, 1, 0)
    b = theirs.with_weights(converted).log_weights(arrays, 1, 0)
    assert np.std(a) > 0.1 and a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-5)


def perturbed(value, rng):
    """A weight that is none of those that it starts with; what is no weight stays."""
    return value + (0.1 * rng.normal(size=value.shape)).astype(value.dtype) if value.dtype.kind == "f" else value


# -- programs -------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["coupling", "model file"])
def test_a_coupling_spline_reaches_the_entropy(kind):
    """Fitted to N(m, C): the loss on fresh rows is the entropy, ½ log det(2πeC), within 0.01; paired with the truth."""
    mean, covariance = np.array([1.0, -2.0]), np.array([[1.0, 0.8], [0.8, 1.5]])
    x = np.random.default_rng(0).multivariate_normal(mean, covariance, 60_000).astype(np.float32)
    data = {"x": x[:50_000]}
    options = {"steps": 3000, "batch_size": 512, "lr": 2e-3, "progress": False}
    program = (
        probgen.load("spline_numpyro", data, coupling=True, hidden=32) if kind == "model file" else small_coupling()
    )
    run = probgen.fit(program, data, **options)
    found = run.evaluate({"x": x[50_000:]})["log_likelihood"]
    truth = dist.MultivariateNormal(jnp.asarray(mean), jnp.asarray(covariance)).log_prob(x[50_000:])
    assert abs(found - float(truth.mean())) < 0.01


def small_coupling():
    """`SplineCoupling` in turn, of standardised vectors [2]."""

    def model(x):
        parts = []
        for k in range(3):
            told = flax_module(f"spline_{k}", DenseConditioner(23, 32), input_shape=(1, 1))
            parts.append(SplineCoupling(told, (2,), flip=k % 2 == 1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", Flow(Compose(*parts), normal()), obs=x)

    return Program(model, by=ELBO(), prepare={"x": probgen.Standardize()})


# -- bad input ------------------------------------------------------------------------------------------------------

SENTENCES = {
    "odd": (lambda: Squeeze((1, 5, 4)), "Squeeze halves the sides of an image, and one of 5 × 4 is odd"),
    "one dimension": (lambda: ChannelCoupling(None, (1,)), "a coupling needs at least 2 channels or dimensions"),
    "one for splines": (lambda: SplineCoupling(None, (1, 4, 4)), "a coupling needs at least 2 channels or dimensions"),
    "one position": (lambda: CheckerboardCoupling(None, (3, 1, 1)), "a checkerboard needs at least 2 positions"),
    "odd channels": (lambda: MultiScale((3, 2, 2), [norm((3, 2, 2))] * 2), "let each level begin with a Squeeze"),
    "no levels": (lambda: MultiScale((3, 2, 2), []), "MultiScale needs at least one level"),
    "vectors": (lambda: ChannelsFirst((4,)), "ChannelsFirst takes images"),
    "nothing": (lambda: Compose(), "Compose takes one or more transforms"),
    "no transform": (lambda: Compose(jnp.tanh), "Compose takes one or more transforms"),
    "axes": (lambda: Compose(norm((2,)), Squeeze((1, 2, 2))), "put a transform of the shape between them"),
    "event": (
        lambda: norm((3,))(jnp.zeros((2, 4))),
        r"ActNorm takes events of shape \[3\], and the last axes here are \[4\]",
    ),
    "open event": (lambda: norm((3, None, None))(jnp.zeros((2, 4, 4))), r"events of shape \[3, \*, \*\]"),
    "event back": (lambda: norm((3,)).inv(jnp.zeros(2)), r"ActNorm takes events of shape \[3\]"),
    "numbers": (lambda: bins(jnp.zeros(22)), "takes 3 K − 1 numbers, and the network gives 22"),
    "base": (lambda: Flow(coupling((2,)), dist.Normal(0.0, 1.0)), "Flow: ChannelCoupling gives events of 1 axes"),
    "deep base": (
        lambda: Flow(ExpTransform(), dist.Normal(jnp.zeros(2), 1.0).to_event(1)),
        "Flow: ExpTransform gives events of 0 axes",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_bad_input_is_named_in_one_sentence(call, sentence):
    with pytest.raises(ProbgenError, match=sentence) as told:
        call()
    assert "\n" not in str(told.value)


def test_programs_name_bad_images():
    images = {"x": np.zeros((8, 6, 5), np.uint8)}
    with pytest.raises(ProbgenError, match="of 6 × 5 is odd"):
        probgen.fit(probgen.load("realnvp_numpyro", images), images, steps=1, progress=False)
    line = {"x": np.random.default_rng(0).normal(size=(20, 1))}
    with pytest.raises(ProbgenError, match="at least 2 channels or dimensions"):
        probgen.fit(probgen.load("realnvp_numpyro", line), line, steps=1, progress=False)


def test_data_outside_the_support_of_a_base_are_named():
    """A Uniform base has no density where a flow maps some rows to."""

    def model(x):
        flow = Compose(actnorm("norm", (2,), FirstRows(x)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", Flow(flow, dist.Uniform(-jnp.ones(2), jnp.ones(2)).to_event(1)), obs=x)

    x = {"x": np.random.default_rng(0).normal(size=(50, 2))}
    with pytest.raises(ProbgenError, match=r"the flow of the site 'x' maps to .*, outside .* its base: take"):
        probgen.fit(Program(model, by=ELBO()), x, steps=1, progress=False)
