"""Flows on Pyro: transforms, the bridge to Zuko, and the programs, against autograd, closed forms and quadrature.

Gates on random draws have fixed seeds and a false-alarm rate below 1e-6 each.
"""

import copy
import math
import re
import subprocess
import sys
import types
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch.distributions import biject_to

import probgen
from probgen import ProbgenError, Program
from probgen.check.subject import Subject
from probgen.data.rows import ArraySpec
from probgen.pyro import ELBO
from probgen.pyro.distributions import Flow, Zuko, zuko_flows
from probgen.pyro.nn import ConvConditioner, DenseConditioner
from probgen.pyro.transforms import (
    ActNorm,
    Bijection,
    ChannelCoupling,
    ChannelsFirst,
    CheckerboardCoupling,
    Compose,
    ContinuousFlow,
    InvertibleConv1x1,
    MultiScale,
    Planar,
    PlanarLayer,
    Radial,
    RadialLayer,
    SplineCoupling,
    Squeeze,
)
from probgen.pyro.transforms.convolution import pivoted
from probgen.pyro.transforms.planar import solved

IMAGE = (3, 2, 4)


def seeded(module, spread=0.4, seed=0):
    """A transform whose parameters are none of those that it starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    for part in module.modules():
        if isinstance(part, ActNorm):
            part.waits_for_data = False
    return module


def coupling(shape, flip):
    kept, changed = ChannelCoupling.sizes(shape[0], flip)
    network = (DenseConditioner if len(shape) == 1 else ConvConditioner)(kept, 2 * changed, 8)
    return ChannelCoupling(network, shape, flip)


def spline_coupling(shape, flip):
    kept, changed = SplineCoupling.sizes(shape[0], flip)
    network = (DenseConditioner if len(shape) == 1 else ConvConditioner)(kept, 14 * changed, 8)
    return SplineCoupling(network, shape, flip, bound=3.0)


def multiscale():
    first = Compose(Squeeze((1, 4, 8)), ActNorm((4, 2, 4)), InvertibleConv1x1((4, 2, 4)), coupling((4, 2, 4), False))
    second = Compose(Squeeze((2, 2, 4)), coupling((8, 1, 2), True), ActNorm((8, None, None)))
    return Compose(ChannelsFirst((4, 8)), MultiScale((1, 4, 8), [first, second]))


class Swirl(torch.nn.Module):
    """A velocity that is not linear in x or t."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))


TRANSFORMS = {
    "actnorm of vectors": (lambda: ActNorm((3,)), (3,)),
    "actnorm of images": (lambda: ActNorm((3, None, None)), IMAGE),
    "1x1 conv of vectors": (lambda: InvertibleConv1x1((5,)), (5,)),
    "1x1 conv of images": (lambda: InvertibleConv1x1((3, None, None)), IMAGE),
    "1x1 conv of one channel": (lambda: InvertibleConv1x1((1, 2, 4)), (1, 2, 4)),
    "coupling of vectors": (lambda: coupling((5,), False), (5,)),
    "coupling, flipped": (lambda: coupling((5,), True), (5,)),
    "coupling of channels": (lambda: coupling(IMAGE, False), IMAGE),
    "coupling of channels, flipped": (lambda: coupling(IMAGE, True), IMAGE),
    "spline coupling": (lambda: spline_coupling((5,), False), (5,)),
    "spline coupling, flipped": (lambda: spline_coupling((5,), True), (5,)),
    "spline coupling of channels": (lambda: spline_coupling(IMAGE, True), IMAGE),
    "checkerboard": (lambda: CheckerboardCoupling(ConvConditioner(3, 6, 8), IMAGE), IMAGE),
    "checkerboard, flipped": (lambda: CheckerboardCoupling(ConvConditioner(3, 6, 8), IMAGE, flip=True), IMAGE),
    "squeeze": (lambda: Squeeze(IMAGE), IMAGE),
    "channels first": (lambda: ChannelsFirst((2, 4, 3)), (2, 4, 3)),
    "multi-scale": (multiscale, (4, 8)),
    "planar": (lambda: PlanarLayer(3), (3,)),
    "planar, many": (lambda: Compose(*[PlanarLayer(3) for _ in range(8)]), (3,)),
    "radial": (lambda: RadialLayer(3), (3,)),
    "continuous": (lambda: ContinuousFlow(Swirl(), 3, steps=40), (3,)),
    "Pyro's affine coupling": (
        lambda: Compose(dist.transforms.affine_coupling(4, hidden_dims=[8]), ActNorm((4,))),
        (4,),
    ),
}
EVERY = pytest.mark.parametrize(("make", "shape"), TRANSFORMS.values(), ids=TRANSFORMS)


def made(make, dtype=torch.float64, spread=0.4):
    """A transform in a precision, drawn with a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return seeded(make().to(dtype), spread)


def rows(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def jacobian(f, x):
    """∂f/∂x of one event, as a square matrix."""
    found = torch.autograd.functional.jacobian(lambda v: f(v).reshape(-1), x)
    return found.reshape(x.numel(), x.numel())


# -- every transform ------------------------------------------------------------------------------------------------


@EVERY
def test_log_determinants_are_those_of_autograd(make, shape):
    """≤1e-8 in float64, forwards and backwards, for events alone and in batches of two axes."""
    f, x = made(make), rows(2, 3, *shape)
    y, ladj = f.call_and_ladj(x) if isinstance(f, Bijection) else (f(x), f.log_abs_det_jacobian(x, f(x)))
    back, minus = f.inverse_and_ladj(y)
    assert ladj.shape == minus.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            exact = torch.linalg.slogdet(jacobian(f, x[i, j]))[1]
            assert (ladj[i, j] - exact).abs() < 1e-8 and (minus[i, j] + exact).abs() < 1e-8
    torch.testing.assert_close(f.log_abs_det_jacobian(x, y), ladj, rtol=0, atol=1e-12)
    torch.testing.assert_close(f.inv.log_abs_det_jacobian(y, back), -ladj, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"])
@EVERY
def test_inverses_invert(make, shape, dtype, least):
    f, x = made(make, dtype, 0.2), rows(50, *shape, dtype=dtype)
    y = f(x)
    assert (f.inv(y) - x).abs().max() <= least * max(1, float(x.detach().abs().max()))
    assert (f(f.inv(y)) - y).abs().max() <= least * max(1, float(y.detach().abs().max()))


@EVERY
def test_shapes_are_said_as_they_are(make, shape):
    f = made(make)
    y = f(rows(7, *shape))
    assert f.forward_shape((7, *shape)) == y.shape and f.inverse_shape(y.shape) == (7, *shape)
    assert (f.domain.event_dim, f.codomain.event_dim) == (len(shape), y.dim() - 1)


class Way(torch.nn.Module):
    """One way of a transform as a function of its input and of its parameters."""

    def __init__(self, transform, way):
        super().__init__()
        self.transform, self.way = transform, way

    def forward(self, x):
        value, ladj = getattr(self.transform, self.way)(x)
        return value.flatten(1)[:, :3], ladj


@EVERY
def test_gradients_both_ways_are_those_of_finite_differences(make, shape):
    """To the input and to every parameter, of value and log-determinant; a planar flow's inverse is numerical."""
    f, x = made(make), rows(2, *shape)
    for way, value in (("call_and_ladj", x), ("inverse_and_ladj", f(x).detach())):
        module = Way(f, way)
        names, weights = [name for name, _ in module.named_parameters()], [p.detach() for p in module.parameters()]

        def run(value, *weights, module=module, names=names):
            return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (value,))

        inputs = [tensor.clone().requires_grad_() for tensor in (value, *weights)]
        assert torch.autograd.gradcheck(run, inputs, atol=1e-5, fast_mode=True)


# -- planar and radial ----------------------------------------------------------------------------------------------

numbers = st.floats(-30, 30)
vectors = st.lists(numbers, min_size=2, max_size=2)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(u=vectors, w=vectors, b=numbers, x=vectors)
def test_planar_flows_are_invertible_whatever_their_parameters(u, w, b, x):
    """û·w > −1, so that the map along w rises; x comes back, as far as the slope lets float64 tell."""
    u, w, b, x = (torch.tensor(v, dtype=torch.float64) for v in (u, w, b, x))
    f = Planar(u, w, b)
    assert float(f.m) > -1
    assert_inverts(f, x)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(center=vectors, raw=numbers, beta=numbers, x=vectors)
def test_radial_flows_are_invertible_whatever_their_parameters(center, raw, beta, x):
    center, raw, beta, x = (torch.tensor(v, dtype=torch.float64) for v in (center, raw, beta, x))
    f = Radial(center, raw, beta)
    assert float(f.beta) > -float(f.alpha)
    assert_inverts(f, x)


def assert_inverts(f, x):
    y, ladj = f.call_and_ladj(x)
    back, _ = f.inverse_and_ladj(y)
    assert torch.isfinite(y).all() and torch.isfinite(ladj)
    steepest = torch.linalg.svdvals(torch.linalg.inv(jacobian(f, x))).max()
    size = max(1.0, float(y.abs().max()), float(x.abs().max()))
    assert float((back - x).abs().max()) < 1e-12 * float(steepest) * size * 100


def test_a_radial_flow_comes_back_near_its_center_as_well_as_far_from_it():
    """Relative to the distance from the center, ≤1e-12 in float64: the quadratic is solved without cancelling."""
    away = rows(1, 2) * torch.logspace(-12, 6, 40).double()[:, None]
    for raw, beta in ((0.0, 0.0), (-30.0, 1e4), (30.0, -5.0), (-5.0, 30.0), (-5.0, -5.0)):
        f = Radial(torch.zeros(2).double(), *torch.tensor([raw, beta], dtype=torch.float64))
        assert ((f.inv(f(away)) - away).abs() <= 1e-12 * away.abs()).all()


def test_newtons_method_finds_the_root_for_every_slope():
    """Residual ≤1e-15 of its terms in float64 and 3e-7 in float32, from slopes of 1e-3 to 1e7 and roots of 1e-9 to 1e9."""
    m = torch.cat([torch.linspace(-0.999, 5, 300), torch.logspace(1, 7, 100)]).double()
    s = torch.cat([torch.zeros(1), torch.logspace(-9, 9, 200), -torch.logspace(-9, 9, 200)]).double()
    s, m = torch.meshgrid(s, m, indexing="ij")
    for dtype, least in ((torch.float64, 1e-15), (torch.float32, 3e-7)):
        s, m = s.to(dtype), m.to(dtype)
        a = solved(s, m)
        assert ((a + m * a.tanh() - s).abs() <= least * (s.abs() + m.abs())).all()


def test_derivatives_of_the_root_are_exact_to_second_order():
    s, m = rows(20).requires_grad_(), (rows(20, seed=2).exp() - 0.99).requires_grad_()
    assert torch.autograd.gradcheck(solved, (s, m)) and torch.autograd.gradgradcheck(solved, (s, m))


def test_amortised_planar_flows_are_those_of_each_row():
    u, w, b, x = rows(4, 3), rows(4, 3, seed=2), rows(4, seed=3), rows(5, 4, 3, seed=4)
    y, ladj = Planar(u, w, b).call_and_ladj(x)
    for i in range(4):
        alone, alone_ladj = Planar(u[i], w[i], b[i]).call_and_ladj(x[:, i])
        torch.testing.assert_close(y[:, i], alone)
        torch.testing.assert_close(ladj[:, i], alone_ladj)


def test_a_planar_flow_is_that_of_the_paper():
    """x + û tanh(w·x + b), û·w = m(w·u), and nothing of û beside u but along w (arXiv:1505.05770, appendix A)."""
    u, w, b, x = rows(3), rows(3, seed=2), rows(1, seed=3)[0], rows(5, 3, seed=4)
    f = Planar(u, w, b)
    torch.testing.assert_close(f(x), x + f.u * torch.tanh(x @ w + b)[:, None])
    torch.testing.assert_close(f.u @ w, 0.999 * torch.nn.functional.softplus(u @ w + math.log(math.e - 1)) - 0.999)
    across = torch.linalg.qr(torch.stack([w, u, rows(3, seed=5)], 1))[0][:, 1:]
    torch.testing.assert_close(across.T @ f.u, across.T @ u)


# -- ActNorm, 1×1 convolutions, layouts -----------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axes"), [((3,), (0, 1)), ((3, 4, 5), (0, 1, 3, 4))])
def test_actnorm_standardises_its_first_batch_and_no_other(shape, axes):
    f, x = ActNorm(shape).double(), 3 * rows(6, 7, *shape) + 5
    y = f(x)
    assert y.mean(axes).abs().max() < 1e-12 and (y.var(axes, correction=0) - 1).abs().max() < 1e-12
    torch.testing.assert_close(f(x + 1) - y, torch.exp(f.log_scale).expand_as(y).detach())
    assert {name for name, p in f.named_parameters() if p.requires_grad} == {"loc", "log_scale"}


def test_actnorm_only_centres_what_is_constant():
    y = ActNorm((2,))(torch.tensor([[3.0, 1.0], [3.0, 2.0]]))
    torch.testing.assert_close(y, torch.tensor([[0.0, -1.0], [0.0, 1.0]]))


def test_actnorm_that_is_loaded_or_copied_has_seen_its_data():
    f = ActNorm((2,))
    f(rows(9, 2).float())
    for other in (ActNorm((2,)), copy.deepcopy(f)):
        other.load_state_dict(f.state_dict())
        before = other.loc.detach().clone()
        other(rows(9, 2, seed=2).float() + 4)
        assert torch.equal(other.loc, before) and torch.equal(before, f.loc)


def test_actnorm_that_is_asked_for_draws_first_stays_the_identity():
    f = ActNorm((2,))
    z = rows(9, 2).float()
    assert torch.equal(f.inv(z), z) and torch.equal(f(z + 1), z + 1)


@pytest.mark.parametrize("channels", [1, 2, 5, 12])
def test_a_1x1_convolution_is_its_matrix(channels):
    """Equal to the dense product, to `conv2d`, and its log-determinant to the dense matrix's; it starts as a rotation."""
    with torch.random.fork_rng():
        torch.manual_seed(channels)
        f = InvertibleConv1x1((channels, 3, 4)).double()
        torch.manual_seed(channels)
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
    torch.testing.assert_close(f.weight().detach(), rotation, rtol=0, atol=0.05)
    seeded(f)
    weight, x = f.weight().detach(), rows(2, channels, 3, 4)
    y, ladj = f.call_and_ladj(x)
    torch.testing.assert_close(y, torch.einsum("ij,njhw->nihw", weight, x))
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight[:, :, None, None]))
    torch.testing.assert_close(ladj, (12 * torch.linalg.slogdet(weight)[1]).expand(2))


def test_pivoting_brings_every_matrix_to_factors_within_one():
    matrix = rows(9, 9).numpy()
    lower, pivots, upper, taken, columns = pivoted(matrix)
    np.testing.assert_allclose(matrix[taken][:, columns], lower * pivots @ upper, atol=1e-12)
    assert max(np.abs(lower).max(), np.abs(upper).max()) <= 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e3, 1e3), min_size=16, max_size=16))
def test_a_1x1_convolution_cannot_become_singular(raw):
    """For any raw parameters the pivots lie in e^±3, and float32 still inverts it: condition ≤ 1e4 for 4 channels."""
    f = InvertibleConv1x1((4,))
    with torch.no_grad():
        f.raw.copy_(torch.tensor(raw).view(4, 4))
    assert np.linalg.cond(f.double().weight().detach().numpy()) < 3e4
    x = rows(20, 4).float()
    assert (f.float().inv(f(x)) - x).abs().max() < 0.02


def test_a_1x1_convolution_takes_no_memory_by_channels_squared():
    """No tensor of a pass is larger than the images or the one matrix, at C = 32."""
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.untyped_storage().nbytes() // t.element_size() for t in [out] if isinstance(t, torch.Tensor))
            return out

    f, x = InvertibleConv1x1((32, 4, 4)), torch.randn(8, 32, 4, 4)
    with Sizes(), torch.no_grad():
        f.inverse_and_ladj(f.call_and_ladj(x)[0])
    assert max(sizes) <= x.numel()


def test_a_squeeze_makes_channels_of_blocks():
    x = torch.arange(16.0).view(1, 4, 4)
    assert Squeeze((1, 4, 4))(x)[:, 0, 1].tolist() == [2.0, 3.0, 6.0, 7.0]


def test_channels_are_put_first_and_back():
    x = rows(5, 2, 4, 3)
    assert torch.equal(ChannelsFirst((2, 4, 3))(x), x.permute(0, 3, 1, 2))
    assert ChannelsFirst((2, 4))(x[..., 0]).shape == (5, 1, 2, 4)


def test_multi_scale_gives_out_half_of_the_channels_at_each_level():
    """With levels that only squeeze and shift, z holds first the half of level 1, then all of level 2."""
    shift = seeded(ActNorm((8, 1, 2)))
    f = MultiScale((1, 4, 8), [Squeeze((1, 4, 8)), Compose(Squeeze((2, 2, 4)), shift)])
    x = rows(3, 1, 4, 8).float()
    done, rest = Squeeze((1, 4, 8))(x).chunk(2, 1)
    expected = torch.cat([done.flatten(1), shift(Squeeze((2, 2, 4))(rest)).flatten(1)], 1)
    assert torch.equal(f(x), expected)


def test_a_coupling_changes_its_half_alone():
    x = rows(4, 5).float()
    for flip in (False, True):
        y = made(lambda flip=flip: coupling((5,), flip), torch.float32)(x)
        assert torch.equal(
            (y == x).all(0), torch.tensor([True, True, True, False, False]).logical_xor(torch.tensor(flip))
        )
    board = made(lambda: CheckerboardCoupling(ConvConditioner(1, 2, 4), (1, 2, 3)), torch.float32)
    image = rows(4, 1, 2, 3).float()
    assert (board(image) == image)[0, 0].tolist() == [[True, False, True], [False, True, False]]


def test_the_scale_of_a_coupling_is_bounded():
    f = made(lambda: coupling((4,), False), spread=100.0)
    assert f.call_and_ladj(rows(50, 4))[1].abs().max() <= 2 * 2 + 1e-12


def test_the_inverse_of_a_spline_is_zukos_and_does_not_cancel():
    """Values of Zuko's own inverse, slopes of its forward pass, outside the identity; gradients stay finite in float32."""
    from probgen.pyro.transforms.spline_layers import inverse_and_slope

    theta, y = 3 * rows(200, 23), torch.linspace(-6, 6, 49).double()
    spline = SplineCoupling(None, (2,))._spline(*theta[:, None].split((8, 8, 7), -1))
    x, log_slope = inverse_and_slope(spline, y.expand(200, 49))
    torch.testing.assert_close(x, spline.inv(y.expand(200, 49)), rtol=0, atol=1e-8)
    torch.testing.assert_close(log_slope, -spline.call_and_ladj(x)[1], rtol=0, atol=1e-6)
    assert torch.equal(x[:, (y.abs() > 5)], y[y.abs() > 5].expand(200, -1)) and x.diff(dim=1).min() > 0
    steep = (100 * theta).float().requires_grad_()
    parts = inverse_and_slope(
        SplineCoupling(None, (2,))._spline(*steep[:, None].split((8, 8, 7), -1)), y.float().expand(200, 49)
    )
    assert all(part.isfinite().all() for part in (*parts, *torch.autograd.grad(sum(p.sum() for p in parts), steep)))


# -- continuous flows -----------------------------------------------------------------------------------------------


def linear_field(matrix):
    return lambda x, t: x @ matrix.T


def test_a_linear_field_is_the_matrix_exponential():
    """y = e^A x and log |det| = tr A; the error of equal steps falls with their fourth power."""
    matrix, x = rows(3, 3), rows(5, 3, seed=2)
    exact = x @ torch.linalg.matrix_exp(matrix).T
    errors = [float((ContinuousFlow(linear_field(matrix), 3, steps=n)(x) - exact).abs().max()) for n in (8, 16, 32)]
    assert all(13 < a / b < 20 for a, b in pairwise(errors))
    ladj = ContinuousFlow(linear_field(matrix), 3).call_and_ladj(x)[1]
    torch.testing.assert_close(ladj, matrix.trace().expand(5))


def test_equal_steps_agree_with_torchdiffeq():
    pytest.importorskip("torchdiffeq")
    field, x = seeded(Swirl().double()), rows(5, 3)
    ours, theirs = (ContinuousFlow(field, 3, steps=64, method=m, tolerance=1e-9) for m in ("rk4", "dopri5"))
    for a, b in zip(ours.call_and_ladj(x), theirs.call_and_ladj(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_hutchinsons_estimate_is_unbiased():
    """Its mean over 4,000 rows alike within 6 standard errors of the exact trace: false alarms 2e-9."""
    field, x = seeded(Swirl().double(), 1.0), rows(1, 3).expand(4000, 3)
    exact = ContinuousFlow(field, 3, steps=4).call_and_ladj(x[:1])[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = ContinuousFlow(field, 3, steps=4, trace="hutchinson").call_and_ladj(x)[1]
    assert drawn.std() > 0.01
    assert abs(float(drawn.mean() - exact)) < 6 * float(drawn.std()) / math.sqrt(4000)


# -- the distribution -----------------------------------------------------------------------------------------------


def normal(size, batch=()):
    return dist.Normal(torch.zeros(*batch, size), 1.0).to_event(1)


def test_a_flow_is_pyros_transformed_distribution():
    f, x = made(lambda: coupling((4,), False), torch.float32), rows(6, 4).float()
    ours, theirs = Flow(f, normal(4)), dist.TransformedDistribution(normal(4), [f.inv])
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.manual_seed(0)
    drawn = ours.rsample((6,))
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, theirs.rsample((6,)))
    affine = torch.distributions.AffineTransform(2.0, 3.0)
    torch.testing.assert_close(Flow(affine.inv, dist.Normal(0.0, 1.0)).log_prob(x), dist.Normal(2.0, 3.0).log_prob(x))
    stack = torch.distributions.ComposeTransform([affine, torch.distributions.ExpTransform()])
    torch.testing.assert_close(
        Flow(stack.inv, dist.Normal(0.0, 1.0)).log_prob(x.exp()), dist.LogNormal(2.0, 3.0).log_prob(x.exp())
    )


def test_a_draw_remembers_its_density_with_its_gradients():
    f = made(lambda: Compose(*[PlanarLayer(3) for _ in range(4)]))
    fn = Flow(f.inv, normal(3)).expand((5,))
    x = fn.rsample()
    kept, anew = fn.log_prob(x), fn.log_prob(x.clone())
    torch.testing.assert_close(kept, anew, rtol=0, atol=1e-6)
    for a, b in zip(
        *(torch.autograd.grad(v.sum(), list(f.parameters()), retain_graph=True) for v in (kept, anew)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    x = fn.sample()
    assert not x.requires_grad and fn.log_prob(x).requires_grad


def test_a_flow_keeps_the_weights_it_was_made_with():
    f = made(lambda: coupling((4,), False), torch.float32)
    x, fn = rows(3, 4).float(), Flow(f, normal(4))
    before = fn.log_prob(x)
    for part in f.modules():
        for name in part._parameters:
            part._parameters[name] = torch.zeros_like(part._parameters[name])
    assert torch.equal(fn.log_prob(x), before) and not torch.equal(Flow(f, normal(4)).log_prob(x), before)


@pytest.mark.parametrize("name", ["flow", "zuko"])
def test_flows_stand_in_plates(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = seeded(zuko_flows().NSF(3) if name == "zuko" else PlanarLayer(3))

    def model():
        with pyro.plate("b", 5, dim=-2), pyro.plate("a", 4, dim=-1):
            return pyro.sample("x", Zuko(flow) if name == "zuko" else Flow(flow, normal(3)))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["value"].shape == (5, 4, 3) and site["log_prob"].shape == (5, 4)
    assert site["fn"].batch_shape == (5, 4) and site["fn"].event_shape == (3,)
    assert site["fn"].support.event_dim == 1 and bool(site["fn"].support.check(site["value"]).all())
    assert torch.unique(site["value"][..., 0]).numel() == 20


# -- the bridge to Zuko ---------------------------------------------------------------------------------------------


def zuko_flow(name, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return seeded(getattr(zuko_flows(), name)(3, **options), 0.2)


@pytest.mark.parametrize("name", ["NSF", "MAF", "GF", "BPF", "NCSF"])
def test_the_bridge_is_zuko(name):
    flow, context = zuko_flow(name, context=2), rows(6, 2).float()
    x = rows(7, 6, 3).float().clamp(-3, 3)
    torch.testing.assert_close(Zuko(flow, context).log_prob(x), flow(context).log_prob(x))
    assert Zuko(flow, context).batch_shape == (6,) and Zuko(flow, context).expand((7, 6)).batch_shape == (7, 6)
    torch.manual_seed(0)
    drawn = Zuko(flow, context).sample((2,))
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, flow(context).sample((2,)))


def test_the_gradient_to_the_context_is_zukos():
    flow, x = zuko_flow("NSF", context=2), rows(6, 3).float()
    grads = []
    for make in (Zuko, lambda flow, c: flow(c)):
        context = rows(6, 2, seed=3).float().requires_grad_()
        grads.append(torch.autograd.grad(make(flow, context).log_prob(x).sum(), [context, *flow.parameters()]))
    assert grads[0][0].abs().min() > 0
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_support_is_that_of_the_flow():
    """So that autoguides and NUTS know where the site lives: a circular flow on [−π, π], the others everywhere."""
    for name in ("NSF", "MAF", "GF", "RealNVP"):
        assert str(Zuko(zuko_flow(name)).support) == "IndependentConstraint(Real(), 1)"
    circular = Zuko(zuko_flow("NCSF")).support
    assert circular.check(torch.tensor([[3.0, -3.0, 0.0], [4.0, 0.0, 0.0]])).tolist() == [True, False]
    assert circular.check(biject_to(circular)(10 * rows(20, 3).float())).all()
    zuko_flows()
    import zuko

    mixture = zuko.mixtures.GMM(3)
    assert Zuko(mixture).support.event_dim == 1 and not Zuko(mixture).has_rsample


def test_zuko_leaves_validation_as_it_was():
    """Importing Zuko alone switches it off for every distribution."""
    code = """
import torch, pyro
from probgen.pyro.distributions import zuko_flows
zuko_flows()
assert torch.distributions.Distribution._validate_args
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# -- programs -------------------------------------------------------------------------------------------------------

PROGRAMS = {
    "realnvp": {"couplings": 4, "hidden": 16},
    "glow": {"steps": 3, "hidden": 16},
    "spline": {"transforms": 2, "hidden": 16},
    "spline, couplings": {"transforms": 4, "hidden": 16, "coupling": True},
}
PLANE = ArraySpec((2,), "float64", (-3.0, 3.0))


def plane_program(name):
    spec = {"x": PLANE}
    return probgen.load(name.split(",")[0], types.SimpleNamespace(spec=spec), **PROGRAMS[name])


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def cells(n):
    """Midpoints of all of the plane, x = 3 u / (1 − u²) along each axis, and the logarithm of the area of each."""
    u = (torch.arange(n) + 0.5) / n * 2 - 1
    axis, width = 3 * u / (1 - u**2), (3 * (1 + u**2) / (1 - u**2) ** 2 * 2 / n).log()
    return torch.cartesian_prod(axis, axis), (width[:, None] + width).flatten()


@pytest.mark.parametrize("name", ["realnvp", "glow", "spline, couplings"])
def test_a_coupling_flow_reaches_the_entropy_of_a_normal(name):
    """KL(N(m, C) ‖ flow) < 0.01 nat, so that −log p of the data is ½ log det(2πe C) within 0.01 (paired, ±0.001)."""
    cov, mean = torch.tensor([[2.0, 1.2], [1.2, 1.0]]), torch.tensor([1.0, -2.0])
    normal = torch.distributions.MultivariateNormal(mean, cov)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train, test = normal.sample((20_000,)), normal.sample((20_000,))
    data = probgen.load_data({"x": train.numpy()})
    run = probgen.fit(plane_program(name), data, steps=500, batch_size=256, lr=5e-3, ema=0.98, progress=False)
    log_q = run.evaluate({"x": test.numpy()})["log_likelihood"]
    assert abs(float(normal.log_prob(test).mean()) - log_q) < 0.01
    assert abs(float(normal.entropy() - 0.5 * torch.logdet(2 * math.pi * math.e * cov))) < 1e-5


@pytest.mark.parametrize(("name", "shape"), [("realnvp", (4,)), ("glow", (4,)), ("realnvp", (4, 4)), ("glow", (4, 4))])
def test_every_entry_of_z_reads_every_entry_of_x(name, shape):
    """No entry is left out by masks or halves that are always the same."""
    options = {"couplings": 4} if name == "realnvp" else {"steps": 4}
    program = probgen.load(name, spec_of(shape, "float32", -3.0), hidden=16, **options)
    flow = seeded(
        poutine.trace(program.model).get_trace(torch.zeros(1, *shape)).nodes["x"]["fn"].transform, 0.1
    ).double()
    size = math.prod(shape)
    reads = torch.stack([jacobian(flow, x).reshape(size, size).abs() for x in rows(4, *shape)]).amax(0)
    assert (reads > 0).float().mean() == 1


def test_fit_starts_actnorm_from_the_first_batch_and_a_run_reopens(tmp_path):
    """Each layer of Glow standardises the first batch, in the weights of a run, and a reopened run gives its numbers."""
    data = probgen.load_data({"x": (rows(300, 2) * torch.tensor([3.0, 0.2]) + 7).numpy()})
    program = probgen.load("glow", data, steps=2, hidden=8)
    run = probgen.fit(program, data, steps=1, batch_size=None, lr=1e-12, progress=False, out=tmp_path / "run")
    flow, x = run.modules["flow"], torch.from_numpy(data.train["x"])
    x = ((x - x.mean(0)) / x.std(0, correction=0)).float()
    for part in flow.parts:
        x = part(x)
        if isinstance(part, ActNorm):
            assert x.mean(0).abs().max() < 1e-5 and (x.std(0, correction=0) - 1).abs().max() < 1e-5
    opened = probgen.Run.open(tmp_path / "run")
    rows_ = {"x": data.train["x"][:20] + 1}
    assert opened.evaluate(rows_)["log_likelihood"] == run.evaluate(rows_)["log_likelihood"]
    np.testing.assert_array_equal(opened.sample(5)["x"], run.sample(5)["x"])


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_each_fit_of_a_program_starts_actnorm_from_its_own_first_batch(name):
    """A fit leaves the program's modules as they were, so that the next one on other data starts as if it were the first."""
    first, second = ({"x": (rows(200, 2, seed=s) * (1 + 4 * s) - 9 * s).numpy()} for s in (0, 1))
    first, second = probgen.load_data(first), probgen.load_data(second)

    def start(program, data):
        run = probgen.fit(replace(program, prepare={}), data, steps=1, lr=1e-12, progress=False)
        return run.params["flow$$$parts.0.loc"], run

    program = probgen.load(name, first, **PROGRAMS[name])
    flow = next(c.cell_contents for c in program.model.__closure__ if isinstance(c.cell_contents, Compose))
    before = copy.deepcopy(flow.state_dict())
    start(program, first)
    loc, run = start(program, second)
    assert np.abs(loc + 9).max() < 2  # the data lie there
    np.testing.assert_array_equal(loc, start(probgen.load(name, first, **PROGRAMS[name]), second)[0])
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())
    assert flow.parts[0].waits_for_data and not run.modules["flow"].parts[0].waits_for_data
    x = second.train["x"]
    found = run.log_likelihood({"x": x})["log_likelihood"].values
    shifted = run.log_likelihood({"x": x[:50]})["log_likelihood"].values  # no density takes a start of its own
    np.testing.assert_allclose(found[:50], shifted, rtol=1e-5)


def test_an_actnorm_that_has_seen_data_is_trained_on_from_there():
    data = probgen.load_data({"x": rows(200, 2).numpy()})
    program = probgen.load("realnvp", data, couplings=2, hidden=8)
    flow = next(c.cell_contents for c in program.model.__closure__ if isinstance(c.cell_contents, Compose))
    flow(rows(100, 2).float() + 50)
    run = probgen.fit(program, data, steps=1, lr=1e-12, progress=False)
    np.testing.assert_allclose(run.params["flow$$$parts.0.loc"], flow.parts[0].loc.detach(), rtol=1e-6)


def test_a_program_of_pyros_own_flows_is_trained_and_evaluated():
    """`Flow` around Pyro's transforms, whose caches would keep what old weights gave."""
    flow = Compose(
        *[dist.transforms.affine_coupling(2, hidden_dims=[16]), dist.transforms.affine_autoregressive(2, [16])]
    )

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Flow(flow, normal(2)), obs=x)

    data = probgen.load_data({"x": rows(256, 2).numpy() * 2 + 1})
    run = probgen.fit(Program(model, by=ELBO()), data, steps=300, batch_size=None, lr=1e-2, progress=False)
    found = run.evaluate(data.train)["log_likelihood"]
    assert abs(found + math.log(2 * math.pi * math.e * 4)) < 0.15  # the entropy of the normal that the rows are from
    x = torch.from_numpy(data.train["x"]).float()
    assert abs(found - float(Flow(run.modules["flow"], normal(2)).log_prob(x).mean())) < 1e-5


@pytest.mark.parametrize("name", ["glow", "spline"])
def test_a_run_holds_the_modules_of_its_program_alone(name):
    """Not the snapshots of them that a distribution keeps for itself."""
    data = probgen.load_data({"x": rows(64, 2).numpy()})
    run = probgen.fit(plane_program(name), data, steps=2, progress=False)
    assert list(run.modules) == ["flow"] and all(key.startswith("flow$$$") for key in run.params)


def test_a_flow_guide_without_flows_is_the_plain_vae():
    """The same weights and the same numbers at K = 0."""
    data = probgen.load_data("two-moons")
    found = []
    for name, options in (("vae", {}), ("vae_flow", {"flow_length": 0})):
        subject = Subject(probgen.load(name, data, z_dim=2, hidden=16, **options), data)
        found.append(subject.trained.log_weights(subject.arrays, 3, 0))
    np.testing.assert_array_equal(*found)


def test_a_planar_guide_is_a_density_of_its_latents(doubles):
    """∫ q(z | x) dz = 1 ± 1e-4 for an amortised flow of length 3, at three rows."""
    program = probgen.load("vae_flow", types.SimpleNamespace(spec={"x": PLANE}), z_dim=2, hidden=8, flow_length=3)
    points, area = cells(400)
    x = 3 * rows(3, 2)
    fn = poutine.trace(program.guide).get_trace(x).nodes["z"]["fn"]
    with torch.no_grad():
        mass = (fn.log_prob(points[:, None]) + area[:, None]).exp().sum(0)
    assert fn.batch_shape == (3,) and (mass - 1).abs().max() < 1e-4


# -- bad input ------------------------------------------------------------------------------------------------------


def spec_of(shape, dtype="uint8", low=0.0, high=16.0):
    return types.SimpleNamespace(spec={"x": ArraySpec(shape, dtype, (low, high))})


REFUSED = {
    "one dimension, realnvp": (
        lambda: probgen.load("realnvp", spec_of((1,), "float32")),
        "at least 2 .* here there is 1",
    ),
    "one dimension, glow": (lambda: probgen.load("glow", spec_of((1,), "float32")), "use a spline"),
    "odd sides": (lambda: probgen.load("glow", spec_of((7, 7))), "one of 7 × 7 is odd: take fewer levels"),
    "too many levels": (lambda: probgen.load("realnvp", spec_of((4, 4)), levels=3), "one of 1 × 1 is odd"),
    "no image": (lambda: probgen.load("glow", spec_of((4,)), network="conv"), r"the shape \[4\]"),
    "odd channels": (lambda: MultiScale((3, 2, 2), [ActNorm((3, 2, 2)), ActNorm((3, 2, 2))]), "there are 3"),
    "one position": (lambda: CheckerboardCoupling(None, (3, 1, 1)), "couple its channels"),
    "another shape": (lambda: ActNorm((3, None, None))(rows(5, 4, 2, 2)), r"\[3, \*, \*\], .* here are \[4, 2, 2\]"),
    "another shape, back": (lambda: Squeeze((1, 2, 2)).inv(rows(5, 1, 2, 2)), r"\[4, 1, 1\]"),
    "parts that do not fit": (lambda: Compose(ActNorm((2,)), Squeeze((1, 2, 2))), "ActNorm gives events of 1 axes"),
    "no parts": (lambda: Compose(), "one or more transforms"),
    "no levels": (lambda: MultiScale((1, 2, 2), []), "at least one level"),
    "a base without axes": (lambda: Flow(ActNorm((2,)), dist.Normal(0.0, 1.0)), "to_event"),
    "a base with too many": (lambda: Flow(ActNorm((2,)), normal(2, (3,)).to_event(1)), "events of 1 axes"),
    "one dimension, spline": (
        lambda: probgen.load("spline", spec_of((1,), "float32"), coupling=True),
        "coupling=False",
    ),
    "no numbers of a spline": (
        lambda: SplineCoupling(torch.nn.Linear(2, 22), (3,))(rows(5, 3).float()),
        "gives 22 for",
    ),
    "no flow of Zuko's": (lambda: Zuko(ActNorm((2,))), r"not ActNorm: for a transform use Flow"),
    "no steps": (lambda: ContinuousFlow(Swirl(), 3, steps=0), "1 step or more"),
}


@pytest.mark.parametrize(("make", "sentence"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_told_in_one_sentence(make, sentence):
    with pytest.raises(ProbgenError, match=sentence) as told:
        make()
    assert not re.search(r"\n|\. [A-Z]", str(told.value).replace("e.g. ", ""))


def test_data_outside_a_circular_flow_is_refused():
    flow = zuko_flows().NCSF(2, hidden_features=(8,))

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Zuko(flow), obs=x)

    angles = rows(50, 2).numpy().clip(-3, 3)
    probgen.fit(Program(model, by=ELBO()), probgen.load_data({"x": angles}), steps=2, progress=False)
    with pytest.raises(ProbgenError, match=r"the array 'x' holds .*, outside the support"):
        probgen.fit(Program(model, by=ELBO()), probgen.load_data({"x": angles + 3}), steps=2, progress=False)


@pytest.mark.parametrize("spread", [1.0, 0.3], ids=["fit", "evaluate"])
def test_data_outside_the_support_of_a_base_are_named(spread):
    """A Uniform base has no density where a flow maps some rows to."""
    flow = PlanarLayer(2)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Flow(flow, dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1)), obs=x)

    x = rows(50, 2).numpy().clip(-3, 3) * spread / 1.5
    with pytest.raises(
        ProbgenError, match=r"has a row that the flow of the site 'x' maps to .*, outside .* its base: take"
    ):
        run = probgen.fit(Program(model, by=ELBO()), probgen.load_data({"x": x}), steps=1, progress=False)
        run.evaluate({"x": 10 * x})
    if spread < 1:
        assert np.isfinite(run.metrics["loss"]).all()


def test_a_missing_zuko_is_named_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ProbgenError, match=r"pip install 'probgen\[flows\]'"):
        probgen.load("spline", spec_of((2,), "float32"))


def test_a_flow_of_pyros_own_transforms_is_trained_and_evaluated_with_the_weights_of_the_time():
    """Their caches are keyed by the value alone: with all rows in every batch nothing would ever be computed anew."""
    x = np.random.default_rng(0).normal(size=(256, 2)) * 2 + 1
    flow = dist.transforms.affine_autoregressive(2, [16])

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, [flow.inv]), obs=x)

    run = probgen.fit(probgen.Program(model, by=ELBO()), {"x": x}, steps=300, lr=0.01, batch_size=None, progress=False)
    # The maximum of the likelihood of a Gaussian is its entropy at the sample's own covariance.
    floor = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * np.cov(x.T, bias=True))[1]
    assert floor - 0.05 < run.metrics["loss"][-1] < floor + 0.02
    assert -run.evaluate({"x": x})["log_likelihood"] == pytest.approx(run.metrics["loss"][-1], abs=0.02)
