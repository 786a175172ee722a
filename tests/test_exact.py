"""The truth about every exact program, found by glob: what its density sums to, its draws, its map and what it depends on.

Weights are none of those that a program starts with. What a law asks of a program chooses it: its kind, a site that is a
map of its base or a product of conditionals, data of one or two numbers or of 12 bits. Gates on random draws have fixed
seeds and a false-alarm rate below 1e-6 each.
"""

import contextlib
import functools
import itertools
import math

import numpy as np
import pytest

import probgen
from probgen import ProbgenError
from probgen.check.subject import Subject

FILES = {model.name: model for model in probgen.list_models()}
# Sizes that keep quadrature and Jacobians cheap; a name stands for its NumPyro twin too.
SMALL = {
    "realnvp": {"couplings": 4, "hidden": 16},
    "glow": {"steps": 3, "hidden": 16},
    "planar": {"flow_length": 6},
    "spline": {"transforms": 2, "hidden": 16},
    "maf": {"transforms": 3, "hidden": 16},
    "cnf": {"hidden": 8, "steps": 4, "trace": "exact"},
    "flow_matching": {"hidden": 8, "layers": 1, "steps": 4, "trace": "exact"},
    "made": {"hidden": 16},
}
VARIANTS = {
    "planar, radial": {"kind": "radial"},
    "spline, couplings": {"transforms": 4, "coupling": True},
    "gmm, tied": {"covariance": "tied"},
    "gmm, spherical": {"covariance": "spherical"},
}
VARIANTS |= {f"{name}_numpyro, couplings": case for name, case in (("spline", VARIANTS["spline, couplings"]),)}
SPREAD = {"glow": 0.1, "realnvp": 0.15, "spline": 0.15}  # of the noise on the weights; 0.3 elsewhere
CASES = [*FILES, *VARIANTS]
BITS = 12
POINTS = np.array(list(itertools.product((0, 1), repeat=BITS)), np.uint8)


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


DATA = {
    "line": {"x": rows(64, 1)},
    "plane": {"x": rows(64, 2) @ [[1.0, 0.6], [0.0, 0.8]]},
    "bits": {"x": (np.random.default_rng(5).random((100, BITS)) < np.linspace(0.1, 0.9, BITS)).astype(np.uint8)},
    "image": {"x": rows(64, 4, 4)},
    "colours": {"x": rows(64, 2, 2, 3)},
}


def base(case):
    """The name of a file without its backend and variant."""
    return case.split(",")[0].removesuffix("_numpyro")


@functools.cache
def subject_of(case, source, **options):
    """The program on its data, or why the laws do not ask about it."""
    name, data = case.split(",")[0], probgen.load_data(DATA[source])
    options = {**SMALL.get(base(case), {}), **VARIANTS.get(case, {}), **options}
    try:
        subject = Subject(probgen.load(name, data, **options), data)
        structure = subject.structure
    except ProbgenError as refused:
        return f"{refused}"
    if structure.kind != "exact" or structure.has_global_latents:
        return f"the program is {structure.kind}"
    return subject


def exact(case, source, **options):
    subject = subject_of(case, source, **options)
    if isinstance(subject, str):
        pytest.skip(subject)
    return subject


@functools.cache
def weights_of(case, source, **options):
    """Weights that are none of those that the program starts with; what is not trained stays."""
    subject, rng, spread = exact(case, source, **options), np.random.default_rng(1), SPREAD.get(base(case), 0.3)
    spread = spread / 3 if source == "image" else spread  # many layers on many numbers: the maps stay well conditioned
    weights, trained = dict(subject.weights), set(subject.trained.params)
    for key in sorted(trained & set(weights)):
        weights[key] = (weights[key] + spread * rng.normal(size=weights[key].shape)).astype(weights[key].dtype)
    return weights


@functools.cache
def trained_in(precision, case, source, **options):
    """The program with those weights."""
    subject = exact(case, source, **options)
    weights, rows = weights_of(case, source, **options), len(subject.data.train)
    return subject.backend.trained_of(subject.program, weights, subject.arrays, rows=rows, precision=precision, seed=0)


def nightly_twins(*kept):
    """Every case; a NumPyro file, which spends its time in compiling, by night unless it is kept."""
    night = [case for case in CASES if "_numpyro" in case and case not in kept]
    return [pytest.param(case, marks=[pytest.mark.nightly] if case in night else []) for case in CASES]


@pytest.mark.nightly_on("numpyro")
@pytest.mark.parametrize("twin", ["", "_numpyro"], ids=["pyro", "numpyro"])
def test_flows_and_autoregressive_programs_are_exact_and_so_are_three_mixtures(twin):
    """Else the laws below would pass over them."""
    named = [n for n, model in FILES.items() if model.family in ("flows", "autoregressive")]
    named = [n for n in named if n.endswith("_numpyro") == bool(twin)]
    for name in (*named, f"gmm{twin}", f"kde{twin}"):
        assert not isinstance(subject_of(name, "plane"), str), subject_of(name, "plane")
    assert not isinstance(subject_of(f"bernoulli_mixture{twin}", "bits"), str)


# -- densities and draws --------------------------------------------------------------------------------------------


def cells(n, dims):
    """Midpoints of all of space, x = 3 u / (1 − u²) along each axis, and the logarithm of the volume of each."""
    u = (np.arange(n) + 0.5) / n * 2 - 1
    axis, width = 3 * u / (1 - u**2), np.log(3 * (1 + u**2) / (1 - u**2) ** 2 * 2 / n)
    points = np.stack(np.meshgrid(*[axis] * dims, indexing="ij"), -1).reshape(-1, dims)
    return points, sum(np.meshgrid(*[width] * dims, indexing="ij")).reshape(-1)


SIDE, FINE = 24, 20


@functools.cache
def masses(case, source):
    """The integral of the density over each of 24 (line) or 24 × 24 (plane) cells."""
    trained = trained_in("64", case, source)
    dims = {"line": 1, "plane": 2}[source]
    fine = FINE if dims == 2 else FINE * 20
    points, volume = cells(SIDE * fine, dims)
    parts = np.split(points, max(1, len(points) // 57_600))
    log_p = np.concatenate([trained.log_weights({"x": part}, 1, 0)[0] for part in parts])
    return np.exp(log_p + volume).reshape(*[SIDE, fine] * dims).sum(tuple(range(1, 2 * dims, 2))).reshape(-1)


def real(case, source):
    subject = exact(case, source)
    if subject.structure.observed["x"].discrete:
        pytest.skip("it is no density of real numbers")
    return trained_in("64", case, source), subject


@pytest.mark.parametrize("source", ["plane", "line"])
@pytest.mark.parametrize("case", nightly_twins("realnvp_numpyro"))
def test_densities_integrate_to_one(case, source):
    """±1e-4 over the line and the plane, in float64."""
    real(case, source)
    assert abs(masses(case, source).sum() - 1) < 1e-4


@pytest.mark.parametrize("source", ["plane", "line"])
@pytest.mark.parametrize("case", nightly_twins("realnvp_numpyro"))
def test_draws_follow_the_density(case, source):
    """χ² of 20,000 draws in 24 cells an axis against the integral of the density over each; 10% too wide is told."""
    trained, subject = real(case, source)
    draws = drawn(trained, subject).astype(np.float64)
    assert chi_square(counted(draws), masses(case, source)) < 4.75
    assert (
        chi_square(counted(draws * 1.1), masses(case, source)) > 4.75
    )  # and it would tell draws that are 10% too wide


def drawn(trained, subject, n=20_000):
    x = subject.arrays["x"]
    return trained.draw(n, 0, {"x": np.resize(x, (n, *x.shape[1:]))})["x"]


def counted(draws):
    """How many draws [n, D] lie in each cell."""
    u = draws / (1.5 + np.sqrt(2.25 + draws**2))  # of x = 3 u / (1 − u²)
    index = np.clip(((u + 1) / 2 * SIDE).astype(int), 0, SIDE - 1)
    return np.bincount(np.ravel_multi_index(tuple(index.T), (SIDE,) * index.shape[1]), minlength=SIDE ** index.shape[1])


def chi_square(seen, p):
    """How many standard deviations the χ² statistic of counts lies above its mean; rare cells are counted together."""
    expected = p / p.sum() * seen.sum()
    order = np.argsort(expected)[::-1]
    group = np.floor(np.cumsum(expected[order]) / 20).astype(int)
    seen, expected = (np.bincount(group, weights=w[order]) for w in (seen.astype(float), expected))
    keep = expected > 5
    statistic, freedom = ((seen - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum() - 1
    # Wilson & Hilferty: (χ²/k)^⅓ is nearly normal; 4.75 standard deviations are one false alarm in a million.
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("case", nightly_twins("made_numpyro"))
def test_probabilities_of_bits_sum_to_one_and_draws_follow_them(case):
    """Over all 2^12 vectors ±1e-8 in float64; χ² of 20,000 draws."""
    subject = exact(case, "bits")
    if not subject.structure.observed["x"].discrete:
        pytest.skip("it is no density of bits")
    trained = trained_in("64", case, "bits")
    p = np.exp(trained.log_weights({"x": POINTS.astype(np.float64)}, 1, 0)[0])
    assert p.shape == (2**BITS,) and abs(p.sum() - 1) < 1e-8
    draws = drawn(trained, subject).reshape(-1, BITS)
    index = (draws @ (2 ** np.arange(BITS)[::-1])).astype(int)
    assert chi_square(np.bincount(index, minlength=len(p)), p) < 4.75
    assert chi_square(np.bincount(index ^ 1, minlength=len(p)), p) > 4.75  # the last bit turned over


# -- maps -----------------------------------------------------------------------------------------------------------


class OnPyro:
    """The distribution of x, as functions of arrays [D] or [B, D]."""

    def __init__(self, trained, x, precision):
        import torch
        from pyro import poutine

        dtype = {"64": torch.float64, "32": torch.float32}[precision]
        self.torch, self.x = torch, torch.from_numpy(x).to(dtype)
        self.fn = poutine.trace(trained.model).get_trace(x=self.x).nodes["x"]["fn"]
        while not hasattr(self.fn, "transform") and not hasattr(self.fn, "network"):
            inner = getattr(self.fn, "fn", None)
            if inner is None:
                break
            self.fn = inner
        self.base = getattr(self.fn, "base_dist", getattr(self.fn, "base", None))

    def there(self, x):
        from probgen.pyro.transforms.bijection import call_and_ladj

        return call_and_ladj(self.fn.transform, x)

    def back(self, z):
        from probgen.pyro.transforms.bijection import inverse_and_ladj

        return inverse_and_ladj(self.fn.transform, z)

    def slogdets(self, x, size):
        """log |det ∂f/∂x| of every row: rows do not meet, so that each entry of f is one pass for all of them."""
        x = x.clone().requires_grad_()
        z = self.there(x)[0].reshape(len(x), -1)
        each = [
            self.torch.autograd.grad(z[:, d].sum(), x, retain_graph=True)[0].reshape(len(x), -1) for d in range(size)
        ]
        return self.torch.linalg.slogdet(self.torch.stack(each, 1))[1].numpy()

    def reads(self, x):
        """|∂θ/∂x| [D, D] of an autoregressive distribution, in the order of the entries of x."""
        order = self.fn.order
        jacobian = self.torch.autograd.functional.jacobian(self.fn.network, self.torch.from_numpy(x).double()[order])
        found = np.zeros((len(order),) * 2)
        found[np.ix_(order, order)] = jacobian.abs().amax(1)
        return found


class OnNumPyro:
    """The twin."""

    def __init__(self, trained, x, precision):
        import jax
        import jax.numpy as jnp
        from numpyro.handlers import seed, trace

        self.jax, self.jnp = jax, jnp
        self.x = jnp.asarray(x.astype(f"float{precision}"))
        self.fn = trace(seed(trained.model, jax.random.key(0))).get_trace(x=self.x)["x"]["fn"]
        while not hasattr(self.fn, "transform") and not hasattr(self.fn, "network") and hasattr(self.fn, "base_dist"):
            self.fn = self.fn.base_dist
        self.base = getattr(self.fn, "base_dist", None)

    def there(self, x):
        from probgen.numpyro.transforms.bijection import call_and_ladj

        return self.jax.jit(functools.partial(call_and_ladj, self.fn.transform))(x)

    def back(self, z):
        from probgen.numpyro.transforms.bijection import inverse_and_ladj

        return self.jax.jit(functools.partial(inverse_and_ladj, self.fn.transform))(z)

    def slogdets(self, x, size):
        from probgen.numpyro.transforms.bijection import call_and_ladj

        def one(row):
            found = self.jax.jacobian(lambda v: call_and_ladj(self.fn.transform, v)[0].reshape(-1))(row)
            return self.jnp.linalg.slogdet(found.reshape(size, size))[1]

        return np.array(self.jax.jit(self.jax.vmap(one))(x))

    def reads(self, x):
        order = np.array(self.fn.order)
        jacobian = self.jax.jit(self.jax.jacobian(lambda v: self.fn.network(v)))(self.jnp.asarray(x)[order])
        found = np.zeros((len(order),) * 2)
        found[np.ix_(order, order)] = np.abs(jacobian).max(1)
        return found


@contextlib.contextmanager
def looked_at(case, source, precision, n=4, **options):
    """The distribution of x on n rows."""
    x = np.asarray(exact(case, source, **options).arrays["x"], np.float64)[:n]
    if "_numpyro" not in case:
        yield OnPyro(trained_in(precision, case, source, **options), x, precision)
        return
    from probgen.numpyro.scope import precision_scope

    with precision_scope(precision):
        yield OnNumPyro(trained_in(precision, case, source, **options), x, precision)


# The trace is integrated by itself, and equals the log-determinant in the limit.
FINER = {"cnf": {"steps": 30}, "flow_matching": {"steps": 100}}


def slow(case, source):
    """What is left to the night; every transform by itself is looked at by day."""
    return base(case) in FINER or ("_numpyro" in case and (case, source) != ("realnvp_numpyro", "plane"))


PAIRS = [
    pytest.param(case, source, marks=[pytest.mark.nightly] if slow(case, source) else [])
    for case in CASES
    for source in ("plane", "image")
]
MAPS = pytest.mark.parametrize(("case", "source"), PAIRS)


@MAPS
def test_log_densities_are_those_of_the_base_and_autograds_slogdet(case, source):
    """log p(x) = log p_base(f(x)) + log |det ∂f/∂x| at every row, with the Jacobian of autograd: ≤1e-8 in float64."""
    with looked_at(case, source, "64", **FINER.get(base(case), {})) as found:
        if not hasattr(found.fn, "transform"):
            pytest.skip("it is no map of a base")
        z, ladj = found.there(found.x)
        slogdet = found.slogdets(found.x, math.prod(found.x.shape[1:]))
        np.testing.assert_allclose(np.asarray(_numpy(ladj)), slogdet, rtol=0, atol=1e-8)
        np.testing.assert_allclose(-np.asarray(_numpy(found.back(z)[1])), slogdet, rtol=0, atol=1e-8)
        density, known = _numpy(found.fn.log_prob(found.x)), _numpy(found.base.log_prob(z))
        np.testing.assert_allclose(density - known, slogdet, rtol=0, atol=1e-8)


@MAPS
def test_maps_come_back_in_float32(case, source):
    """x → f(x) → x within 1e-5 of the largest entry."""
    with looked_at(case, source, "32", n=32, **FINER.get(base(case), {})) as found:
        if not hasattr(found.fn, "transform"):
            pytest.skip("it is no map of a base")
        z, _ = found.there(found.x)
        back = _numpy(found.back(z)[0])
        assert back.dtype == np.float32 and np.abs(_numpy(z) - _numpy(found.x).reshape(z.shape)).max() > 0.01
        assert np.abs(back - _numpy(found.x)).max() <= 1e-5 * max(1.0, float(np.abs(_numpy(found.x)).max()))


def _numpy(value):
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


# -- what may depend on what ----------------------------------------------------------------------------------------

ORDERS = {
    "raster": range(12),  # flat positions of [2, 2, 3]: R, G and B of a pixel, then the next pixel
    "planes": [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11],  # all of R, then of G, then of B
}


@pytest.mark.parametrize(
    ("case", "order"),
    [
        pytest.param(
            case,
            order,
            marks=[pytest.mark.nightly] if "_numpyro" in case and (case, order) != ("made_numpyro", "raster") else [],
        )
        for case in FILES
        if FILES[case].family == "autoregressive"
        for order in ("raster", "planes", "random")
    ],
)
def test_autoregressive_programs_read_the_past_alone(case, order):
    """∂θ_d / ∂x_j is exactly 0 unless x_j is drawn before x_d, and for no such j: p(R | ·) p(G | R, ·) p(B | R, G, ·)."""
    options = {"order": order, **({"hidden": 40} if base(case) == "made" else {})}
    with looked_at(case, "colours", "64", **options) as found:
        reads = found.reads(_numpy(found.x)[0].reshape(-1))
    drawn = np.argsort(ORDERS.get(order, np.array(found.fn.order)))  # when each position is drawn
    np.testing.assert_array_equal(reads > 0, drawn[:, None] > drawn)
    if order == "raster":
        red, green, blue = 3, 4, 5  # of the second pixel
        assert reads[green, red] > 0 and reads[blue, red] > 0 and reads[blue, green] > 0
        assert reads[red, green] == reads[red, blue] == reads[green, blue] == 0
        assert (reads[red, :3] > 0).all() and (reads[:3, red] == 0).all()


@pytest.mark.parametrize("case", [name for name in FILES if FILES[name].family == "flows" and "_numpyro" not in name])
def test_masked_layers_of_zukos_read_the_past_alone(case):
    """∂z_d / ∂x_j of each layer of Zuko's is exactly 0 where x_j comes after x_d in its order."""
    import torch

    with looked_at(case, "image", "64") as found:
        layers = [part for part in getattr(found.fn.transform, "transforms", ()) if hasattr(part, "passes")]
        if not layers:
            pytest.skip("no layer of it is masked")
        x = found.x[:4].reshape(4, -1)
        for k, layer in enumerate(layers):
            reads = sum(torch.autograd.functional.jacobian(layer, row).abs() for row in x).numpy()
            past = np.tril(np.ones(reads.shape, bool)) if k % 2 == 0 else np.triu(np.ones(reads.shape, bool))
            assert (reads[~past] == 0).all() and (reads[past] > 0).mean() > 0.8
