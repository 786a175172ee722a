"""`evidence`: prior sampling and importance weights against closed forms, on both backends."""

import copy

import numpy as np
import pytest
from linear_gaussian import LinearGaussian
from scipy import stats
from test_verbs import BACKENDS, linear_gaussian, trained_on, words

from probgen import ProbgenError, Program
from probgen.data import load_data
from probgen.data.prepare import Preparation
from probgen.evaluate.evidence import evidence

K = (10, 100, 1000, 10_000)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


def table(backend, program, arrays, k=K, prepare=None, **options):
    trained, preparation, data = trained_on(backend, program, arrays, prepare=prepare)
    return evidence(trained, preparation, data.train, k=k, **options)


def values(column):
    return np.array([bound.value for bound in column])


def test_both_columns_approach_the_closed_form(backend):
    """20 rows; at the largest K within 5 errors (6e-7), and the gap of prior sampling shrinks with K."""
    twin = LinearGaussian(s=0.25, moved=0.05, wider=1.2)
    arrays = {"x": twin.generate(20, 1)[1]}
    found, exact = table(backend, linear_gaussian(backend, twin), arrays), twin.log_evidence(arrays)
    assert found.k == K and found.rows == 20 and found.exact is None
    for column in (found.prior, found.importance):
        assert abs(column[-1].value - exact.mean()) < 5 * column[-1].mc_se + 1e-3
        assert column[-1].se == pytest.approx(exact.std(ddof=1) / np.sqrt(20), rel=0.05)
        assert (np.diff([bound.ess for bound in column]) > 0).all()
    gap = exact.mean() - values(found.prior)
    assert (
        gap[0] > 1 and gap[0] > 10 * abs(gap[1:]).max() and abs(gap[-1]) < 0.05
    )  # 10 draws of a prior ten times too wide
    assert found.importance[0].value > found.prior[0].value + 1
    assert found.importance[-1].ess > 10 * found.prior[-1].ess
    text = str(found)
    assert "prior sampling" in text and "10,000" in text and "importance-weighted" in found._repr_html_()


@pytest.mark.parametrize("backend", ["pyro"])  # what is computed here, both backends share
def test_reported_errors_are_those_of_repetitions(backend):
    """30 seeds: the sd of their numbers over the reported error lies in 0.65..1.45 (3e-3 of seeds fall outside)."""
    twin = LinearGaussian(D=2, Z=1, s=0.1, moved=0.2)
    arrays = {"x": twin.generate(5, 1)[1]}
    trained, preparation, data = trained_on(backend, linear_gaussian(backend, twin), arrays)
    found = [evidence(trained, preparation, data.train, k=(2, 300), seed=seed) for seed in range(30)]
    exact = twin.log_evidence(arrays).mean()
    for name in ("prior", "importance"):
        numbers = np.array([getattr(one, name)[-1].value for one in found])
        errors = np.array([getattr(one, name)[-1].mc_se for one in found])
        assert 0.65 < numbers.std(ddof=1) / errors.mean() < 1.45
        few = np.array([getattr(one, name)[0].value for one in found])
        low = few.mean() - exact, few.std(ddof=1) / np.sqrt(30)  # a lower bound in the mean; the prior's, far below
        assert low[0] < 3 * low[1] and (name != "prior" or low[0] < -3 * low[1])


@pytest.mark.nightly_on("numpyro")
def test_the_posterior_as_guide_has_no_variance(backend):
    twin = LinearGaussian()
    arrays = {"x": twin.generate(7, 1)[1]}
    found = table(backend, linear_gaussian(backend, twin), arrays, k=(2, 10, 50))
    np.testing.assert_allclose(values(found.importance), twin.log_evidence(arrays).mean(), atol=1e-9)
    assert all(
        bound.mc_se < 1e-6 and bound.ess == pytest.approx(k) for bound, k in zip(found.importance, found.k, strict=True)
    )


def mixture(backend):
    """z ~ Cat(0.3, 0.7), x | z ~ N(±2, 1)."""
    ppl, dist, constant, _ = words(backend)

    def model(x):
        means = constant(np.array([-2.0, 2.0]))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Categorical(constant(np.array([0.3, 0.7]))), infer={"enumerate": "parallel"})
            ppl.sample("x", dist.Normal(means[z], 1.0), obs=x)

    return Program(model)


def test_a_mixture_draws_its_component_and_says_the_exact_value(backend):
    """Two values of z, so that the estimate of a row has variance known in closed form; gates at 4.5 errors (7e-6)."""
    x = np.random.default_rng(0).normal(2, 1, 40)
    each = stats.norm.pdf(x, np.array([[-2.0], [2.0]]), 1)
    pi = np.array([[0.3], [0.7]])
    exact = np.log((pi * each).sum(0))
    found = table(backend, mixture(backend), {"x": x}, k=(100, 4000))
    assert found.exact.value == pytest.approx(exact.mean(), abs=1e-6) and found.importance is None
    assert found.exact.se == pytest.approx(exact.std(ddof=1) / np.sqrt(40))
    relative = (pi * (each / np.exp(exact) - 1) ** 2).sum(0)
    assert found.prior[-1].mc_se == pytest.approx(np.sqrt((relative / 4000).sum()) / 40, rel=0.05)
    assert abs(found.prior[-1].value - exact.mean()) < 4.5 * found.prior[-1].mc_se + relative.mean() / 8000
    assert "no guide" in str(found) and "exact log p(x)" in str(found)


def test_latents_shared_by_all_rows_give_the_evidence_of_all(backend):
    """θ ~ N(0, 2²), x_n ~ N(θ, 1) with q(θ) the posterior, and a component of each row summed out or drawn with it."""
    ppl, dist, constant, _ = words(backend)
    x = np.random.default_rng(1).normal(1.5, 1, 12)
    v = 1 / (1 / 4 + 12)

    def model(x):
        theta = ppl.sample("theta", dist.Normal(constant(np.array(0.0)), 2.0))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Bernoulli(constant(np.array(0.5))), infer={"enumerate": "parallel"})
            ppl.sample("x", dist.Normal(theta + 0.0 * z, 1.0), obs=x)

    def guide(x):
        ppl.sample("theta", dist.Normal(v * x.sum(), v**0.5))

    found = table(backend, Program(model, guide), {"x": x}, k=(10, 500))
    exact = stats.multivariate_normal(np.zeros(12), np.eye(12) + 4).logpdf(x)
    assert found.joint and found.rows == 12
    np.testing.assert_allclose(values(found.importance), exact, atol=1e-6)
    assert abs(found.prior[-1].value - exact) < 4.5 * found.prior[-1].mc_se + 1e-3
    assert found.prior[-1].mc_se < 0.2  # z is summed out: drawn, its 12 values would leave one draw of 500
    trained, preparation, data = trained_on(backend, Program(model, guide), {"x": x})
    with pytest.raises(ProbgenError, match="'theta' is shared by all 12 training rows"):
        evidence(trained, preparation, data.train.take(range(5)))


def test_a_component_that_other_latents_depend_on_is_drawn(backend):
    """y ~ Cat, z | y ~ N(μ_y, 1), x | z ~ N(z, 1): prior sampling draws (y, z), the guide z alone; both near log p(x)."""
    ppl, dist, constant, _ = words(backend)
    pi, mu = np.array([0.2, 0.8]), np.array([-1.0, 2.0])

    def model(x):
        with ppl.plate("data", len(x)):
            y = ppl.sample("y", dist.Categorical(constant(pi)), infer={"enumerate": "parallel"})
            z = ppl.sample("z", dist.Normal(constant(mu)[y], 1.0))
            ppl.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with ppl.plate("data", len(x)):
            ppl.sample("z", dist.Normal(x / 2 + 0.3, 1.0))

    x = np.random.default_rng(2).normal(1, 2, 15)
    exact = np.log((pi[:, None] * stats.norm.pdf(x, mu[:, None], 2**0.5)).sum(0)).mean()
    found = table(backend, Program(model, guide), {"x": x}, k=(100, 5000))
    for column in (found.prior, found.importance):
        assert abs(column[-1].value - exact) < 4.5 * column[-1].mc_se + 1e-3
        assert column[-1].mc_se < 0.02


def test_raw_units_and_given_arrays(backend):
    from probgen.data.steps import Standardize

    twin = LinearGaussian(classes=2, D=2, Z=1, s=1.0)
    y = np.arange(30) % 2
    arrays = {"x": twin.generate(30, 1, y)[1], "y": y}
    step = {"x": (Standardize(mean=np.zeros(2), std=np.full(2, 0.1)),)}
    program = linear_gaussian(backend, twin, labelled=True)
    found = table(backend, program, {"x": arrays["x"] * 0.1, "y": y}, k=(500,), prepare=step)
    exact = twin.log_evidence(arrays).mean() + 2 * np.log(10)
    assert found.importance[0].value == pytest.approx(exact, abs=1e-5)
    assert abs(found.prior[0].value - exact) < 5 * found.prior[0].mc_se + 0.01


def test_pieces_of_bounded_memory(backend, monkeypatch):
    """Whatever the pieces, the table is about the same, and each piece as small as it was to be."""
    from probgen.evaluate import evidence as module

    twin = LinearGaussian(D=2, Z=1, s=1.0, moved=0.2)
    arrays = {"x": twin.generate(10, 1)[1]}
    trained, preparation, data = trained_on(backend, linear_gaussian(backend, twin), arrays)
    monkeypatch.setattr(module, "particles", lambda structure: 70)
    sizes, own = [], type(trained).log_weights
    monkeypatch.setattr(type(trained), "log_weights", lambda self, *args: sizes.append(args[1]) or own(self, *args))
    found = evidence(trained, preparation, data.train, k=(10, 25, 100))
    assert set(sizes) == {7} and sum(sizes) == 2 * 105
    assert abs(found.importance[-1].value - twin.log_evidence(arrays).mean()) < 5 * found.importance[-1].mc_se + 1e-3


def test_refused():
    twin = LinearGaussian(kind="implicit")
    x = twin.generate(20, 1)[1]
    from probgen.data import load_data
    from probgen.data.prepare import Preparation

    data = load_data({"x": x})
    preparation = Preparation.of({}, data)
    with pytest.raises(ProbgenError, match="not defined here, for the program is implicit"):
        evidence(twin, preparation, data.train)
    with pytest.raises(ProbgenError, match="each 2 or more"):
        evidence(LinearGaussian(), preparation, data.train, k=(1, 10))
    with pytest.raises(ProbgenError, match="no rows"):
        evidence(LinearGaussian(), preparation, data.test)


@pytest.mark.nightly_on("numpyro")
def test_of_a_run_and_the_command_line(backend, tmp_path, capsys, monkeypatch):
    import probgen
    from probgen.cli import main

    name = {"pyro": "gmm", "numpyro": "gmm_numpyro"}[backend]
    monkeypatch.chdir(tmp_path)
    data = probgen.load_data({"x": np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)})
    run = probgen.fit(probgen.load(name, data, components=2), data, steps=2, progress=False, out="run")
    found = run.evidence(data.train, k=(10, 100), rows=25)
    assert found.rows == 25 and found.exact is not None
    assert main(["evaluate", "run", "--evidence", "--split", "train"]) == 2  # a mapping of arrays is not found again
    np.savez("x.npz", x_train=data.train["x"], x_test=data.train["x"][:20])
    assert main(["evaluate", "run", "--evidence", "--data", "x.npz", "--k", "50"]) == 0
    said = capsys.readouterr().out
    assert "prior sampling" in said and "exact log p(x)" in said
    with pytest.raises(ProbgenError, match="its likelihood is exact: evaluate gives it"):
        flat = {"pyro": "made", "numpyro": "made_numpyro"}[backend]
        bits = {"x": np.random.default_rng(0).integers(0, 2, (20, 4)).astype(np.uint8)}
        probgen.fit(probgen.load(flat, bits), bits, steps=1, progress=False).evidence(bits)


# -- what is said beside the numbers ------------------------------------------------------------------------------------


class Arcs(LinearGaussian):
    """z ~ U(0, 1) and x | z ~ U(z − w, z + w): a draw of the prior has a positive density or none, p = |overlap| / 2w."""

    def __init__(self, w):
        super().__init__(D=1, Z=1)
        self.w = w

    def under_prior(self, names):
        """Draws of z ~ U(0, 1), and weights of those alone."""
        prior = copy.copy(self)
        prior.log_weights = lambda arrays, k, seed: self.at(arrays, np.random.default_rng(seed).random((k, 1)))
        return prior

    def at(self, arrays, z):
        """log U(x | z − w, z + w), [k, B]."""
        with np.errstate(divide="ignore"):
            return np.log((np.abs(arrays["x"][:, 0] - z) < self.w) / (2 * self.w))

    def log_weights(self, arrays, k, seed):
        """With the exact posterior as guide: all weights are p(x), also where the prior hardly reaches."""
        return np.log(np.tile(np.maximum(self.overlap(arrays["x"][:, 0]), 1e-12) / (2 * self.w), (k, 1)))

    def overlap(self, x):
        """The length of (x − w, x + w) that lies in (0, 1)."""
        return np.clip(np.minimum(1, x + self.w) - np.maximum(0, x - self.w), 0, None)


def said(trained, x, k, seed=0):
    arrays = {"x": np.asarray(x, float)[:, None]}
    data = load_data(arrays)
    return evidence(trained, Preparation.of({}, data), data.train, k=k, seed=seed)


def test_that_no_estimate_can_be_had_is_said():
    """A row that no z of the prior can have made: a dash for its column and a sentence, and numbers where there are some."""
    inside = said(Arcs(0.2), [0.3, 0.5, 0.6], (20, 400))
    assert np.isfinite(values(inside.prior)).all() and not any("—" in note for note in inside.notes)
    assert abs(inside.prior[-1].value) < 4.5 * inside.prior[-1].mc_se  # p(x) = 1; false alarm 7e-6
    outside = said(Arcs(0.2), [0.3, 0.5, 1.3], (20, 400))
    assert (values(outside.prior) == -np.inf).all() and np.isfinite(values(outside.importance)).all()
    assert "—: for some rows no draw has a positive density, so that there is no estimate" in outside.lines
    assert [row[1:3] for row in outside.cells()[1:]] == [["—", "—"]] * 2
    assert "—" not in "".join(row[3] for row in outside.cells()[1:])


@pytest.mark.parametrize(
    ("w", "k", "few"), [(0.2, 400, False), (0.2, 12, True), (0.01, 200, True), (0.01, 2000, False)]
)
def test_that_few_draws_count_is_said(w, k, few):
    """Of k draws about 2 w k have a weight, all the same: fewer than ten for each row, or far more, but for a probability
    of 8e-3 by the binomial.
    """
    found = said(Arcs(w), [0.3, 0.5, 0.6], (k,))
    assert (found.prior[-1].ess < 10) == few
    note = f"prior sampling: fewer than 10 of {k:,} draws count"
    assert any(line.startswith(note) for line in found.lines) == few


def test_the_effective_sample_size_is_the_median_over_the_data():
    """Rows at the edge of what the prior reaches have half the draws of others: not the largest, nor the mean (a third
    more). Counts are binomial, of sd 4.5%; the gate is at 4 of these (6e-5).
    """
    x = [-0.15, -0.01, 0.0, 0.0, 0.4, 0.5, 0.6]
    overlap = np.sort(Arcs(0.2).overlap(np.array(x)))
    found = said(Arcs(0.2), x, (10, 2000)).prior[-1]
    assert np.median(overlap) == pytest.approx(0.2) and overlap[-1] == pytest.approx(0.4)
    assert found.ess == pytest.approx(0.2 * 2000, rel=4 * np.sqrt(0.8 / 400))
    assert said(Arcs(0.2), [*x, 5.0], (10, 2000)).prior[-1].ess == pytest.approx(400, rel=0.2)  # one that none reaches


def test_a_program_with_a_factor_is_refused():
    twin = LinearGaussian(kind="unnormalised")
    with pytest.raises(ProbgenError, match="the program has a factor, so its density is known only up to a constant"):
        said(twin, [0.0, 1.0], (10,))
