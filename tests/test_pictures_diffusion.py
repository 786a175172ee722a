"""Pictures of diffusions show what they say: the chain's own draws, and KLs that are compared with their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import probgen
from probgen import pictures, report
from probgen.errors import ProbgenError
from probgen.pictures import material
from probgen.pictures.diffusion import step_costs
from probgen.pyro import DiffusionELBO

STEPS = 12


@pytest.fixture(autouse=True)
def _no_windows():
    with pictures.detached():
        yield


def trained(source, name="ddpm", updates=60, **options):
    data = probgen.load_data(source)
    return probgen.fit(probgen.load(name, data, **options), data, steps=updates, lr=3e-3, progress=False)


@pytest.fixture(scope="module")
def numbers():
    """0.3 of N(−2, 0.1²) and 0.7 of N(1, 0.1²)."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random(2000) < 0.3, -2.0, 1.0) + 0.1 * rng.normal(size=2000)
    return trained({"x": x[:, None].astype(np.float32)}, updates=300, hidden=32)


@pytest.fixture(scope="module")
def moons():
    return trained("two-moons", steps=STEPS)


@pytest.fixture(scope="module")
def digits():
    return trained("digits", steps=STEPS, hidden=32)


def rows(run):
    return run.data.train


def test_the_heat_map_is_the_law_of_the_noisy_data(numbers):
    """A column's density is that of α_t x + σ_t ε, x among the rows, by the sum over rows; the paths start at data."""
    ax = pictures.noising(numbers, numbers.data.train, paths=5)
    (image,) = ax.images
    density, (_, _, low, high) = np.asarray(image.get_array()), image.get_extent()
    edges = np.linspace(low, high, len(density) + 1)
    x = numbers.preparation.forward(numbers.data.train[:], np.random.default_rng(0))[0]["x"][:, 0]
    schedule = probgen.diffusion.CosineSchedule()
    for t in (3, 12, 20):
        alpha, sigma = schedule.alpha(t / 20), schedule.sigma(t / 20)
        below = 0.5 * (1 + np.vectorize(math.erf)((edges[:, None] - alpha * x) / sigma / math.sqrt(2))).mean(1)
        assert np.abs(np.cumsum(density[:, t]) * (edges[1] - edges[0]) + below[0] - below[1:]).max() < 0.02
    paths = np.array([line.get_ydata() for line in ax.lines])
    assert paths.shape == (5, 21)
    assert np.isin(paths[:, 0].astype(np.float32), x.astype(np.float32)).all()


def test_the_way_back_ends_in_the_programs_draws(numbers):
    ax = pictures.denoising(numbers, paths=4, seed=3)
    paths = np.array([line.get_ydata() for line in ax.lines])
    arrays = material.placeholders(numbers, None, 4000, 3)
    drawn = numbers.trained.draw(4000, seed=3, arrays=arrays)
    assert paths[:, 0] == pytest.approx(drawn["x"][:4, 0])
    assert paths[:, 20] == pytest.approx(drawn["x_20"][:4, 0])


def test_a_filmstrip_of_numbers_has_their_paths(numbers):
    assert len(pictures.filmstrip(numbers).lines) == 8


def test_a_filmstrip_holds_one_draw_a_row_from_noise_to_data(digits):
    ax = pictures.filmstrip(digits, n=3, frames=4, seed=5)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["$x_{12}$", "$x_{8}$", "$x_{4}$", "$x$"]
    mosaic = np.asarray(ax.images[0].get_array())
    drawn = digits.trained.draw(3, seed=5, arrays=material.placeholders(digits, None, 3, 5))
    for row in range(3):
        for column, values in enumerate(((drawn["x_12"][row] + 1) / 2, None, None, drawn["x"][row] / 16)):
            if values is not None:
                cell = mosaic[9 * row : 9 * row + 8, 9 * column : 9 * column + 8]
                assert cell == pytest.approx(np.clip(values, 0, 1), abs=1e-6)


def test_a_filmstrip_of_points_is_in_the_units_of_the_data(moons):
    ax = pictures.filmstrip(moons, n=50, frames=3, seed=2)
    first, _, last = ax.child_axes
    assert [a.get_title(loc="left") for a in ax.child_axes] == ["$x_{12}$", "$x_{6}$", "$x$"]
    drawn = moons.trained.draw(50, seed=2, arrays=material.placeholders(moons, None, 50, 2))
    for panel, site in ((first, "x_12"), (last, "x")):
        want = moons.preparation.inverse({"x": drawn[site]})["x"]
        assert np.asarray(panel.collections[0].get_offsets()) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("kind", ["numbers", "moons", "digits"])
def test_the_cost_of_each_step_is_its_kl(kind, request):
    """By the terms of the program's ELBO, and by DiffusionELBO's closed forms: within 5 SE of each (false alarm 2e-5)."""
    run = request.getfixturevalue(kind)
    costs, errors = step_costs(run, rows(run), 200, 0)
    steps = len(costs) - 1
    index = material.choose(rows(run), 200, 0)
    x = (
        torch.from_numpy(material.prepared(run, rows(run), index, 0)["x"])
        .float()
        .repeat(20, *[1] * (np.ndim(rows(run)[:1]["x"]) - 1))
    )
    with run.trained._quiet(1):
        chain = run.trained.denoiser({"x": x}, "test")
        for t in range(1, steps + 1):
            step = torch.full((len(x),), float(t))
            loss, terms = DiffusionELBO().at_step(chain, x, chain.embed(x), step, torch.ones(len(x)))
            cost = loss + terms[f"x_{steps}"]
            per_row = cost.reshape(20, -1).mean(0)
            error = math.hypot(float(per_row.std()) / math.sqrt(len(per_row)), errors[t - 1])
            assert abs(float(cost.mean()) - costs[t - 1]) < 5 * error
        assert abs(float(-terms[f"x_{steps}"].mean()) - costs[-1]) < 5 * errors[-1]


def test_the_bars_are_the_costs_and_the_title_adds_them_up(moons):
    ax = pictures.chain_terms(moons)
    costs, _ = step_costs(moons, None, 200, 0)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx(costs[1:-1])
    assert [bar.get_x() + 0.4 for bar in ax.patches] == pytest.approx(range(2, STEPS + 1))
    assert f"{costs.sum():.4g}" in ax.get_title(loc="left")


def test_what_is_no_diffusion_is_told():
    vae = trained("digits", "vae", updates=1)
    for name in ("noising", "denoising", "filmstrip", "chain_terms"):
        with pytest.raises(ProbgenError, match="no chain of noisy data"):
            getattr(pictures, name)(vae)
    bits = trained("digits", "binomial", updates=5, hidden=16)
    with pytest.raises(ProbgenError, match=r"of Gaussian noise, and this program has a BinomialDenoiser"):
        pictures.chain_terms(bits)
    assert pictures.filmstrip(bits, n=2).images
    langevin = probgen.load_data("two-moons")
    langevin = probgen.fit(probgen.load("ncsn", langevin), langevin, steps=1, progress=False)
    with pytest.raises(ProbgenError, match="where the guide is the noising chain of the denoiser"):
        pictures.chain_terms(langevin)
    with pytest.raises(ProbgenError, match="`entry` is 64; a datum has the entries 0 to 63"):
        pictures.noising(bits, entry=64)


@pytest.mark.nightly
def test_the_report_of_a_diffusion_shows_its_chain(moons):
    page = report.page(moons)
    assert "The chain" in page and "What each step costs" in page and "on their way out of noise" in page
    assert "Latent space" not in page and "Trust in the guide" in page
    assert "$x" not in page
