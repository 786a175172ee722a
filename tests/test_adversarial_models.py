"""The adversarial files of the zoo: twins, what a label does, what a guide finds, and what is drawn after some steps."""

import functools

import numpy as np
import pytest
import torch

import probgen
from probgen import ProbgenError
from probgen.program import backend_of

ADAM = functools.partial(torch.optim.Adam, betas=(0.0, 0.99))


def fitted(name, source, steps, seed=0, **options):
    data = probgen.load_data(source)
    return probgen.fit(probgen.load(name, data, seed=seed, **options), data, steps=steps, seed=seed, progress=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gan", {"noise": 0.1, "layers": 3, "hidden": 16}),
        pytest.param("gan", {}, marks=pytest.mark.nightly),
        pytest.param("wgan_gp", {}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_twins_are_one_program(name, options):
    """G of the NumPyro file, with its kernels transposed, is that of the Pyro file: both decode z to the same x."""
    ours, theirs = (fitted(file, "digits", 2, **options) for file in (name, f"{name}_numpyro"))
    kernels = [n for n in theirs._weights if n.startswith("generator") and n.endswith("kernel")]
    kernels.sort(key=lambda n: int(n.split("_")[-1].split(".")[0]))
    linear = sorted(
        {n.rsplit(".", 1)[0] for n in ours._weights if n.startswith("generator")}, key=lambda n: int(n.split("$$$")[1])
    )
    weights = dict(ours._weights)
    for layer, kernel in zip(linear, kernels, strict=True):
        weights[f"{layer}.weight"] = np.ascontiguousarray(theirs._weights[kernel].T)
        weights[f"{layer}.bias"] = theirs._weights[kernel.replace("kernel", "bias")]
    arrays = {"x": np.zeros((5, 8, 8), np.float32)}
    twin = backend_of(ours.program).trained_of(ours.program, weights, arrays, rows=100)
    z = {"z": np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)}
    np.testing.assert_allclose(
        twin.decode(z, 5, 0, arrays)["x"], theirs.trained.decode(z, 5, 0, arrays)["x"], rtol=1e-5, atol=1e-6
    )


def test_twins_have_the_same_options_and_recipe():
    data = probgen.load_data("digits")
    for name in ("gan", "wgan_gp"):
        ours, theirs = (probgen.load(file, data) for file in (name, f"{name}_numpyro"))
        assert repr(ours.prepare) == repr(theirs.prepare)
        assert {k: v for k, v in ours.defaults.items() if k != "optimizer"} == {
            k: v for k, v in theirs.defaults.items() if k != "optimizer"
        }
        assert ours.by.penalties == theirs.by.penalties and ours.by.critic_steps == theirs.by.critic_steps


def test_a_gan_finds_the_modes_of_a_few_gaussians():
    """Six of eight wide Gaussians at least after 1,500 steps; before any none is found well, since z is one Gaussian."""
    found, before = (
        probgen.mode_coverage(fitted("gan", "eight-gaussians", steps, hidden=64).sample(2500)["x"], "eight-gaussians")
        for steps in (1500, 1)
    )
    assert found["modes"] >= 6 and found["high_quality"] > 0.4 > before["high_quality"]


def test_a_label_chooses_the_digit():
    """Draws with y = 0 are nearer to the mean zero than to the mean one, and the reverse: 95 of 100 each."""
    run = fitted("cgan", "digits", 600)
    rows = run.data.train[:]
    means = np.stack([rows["x"][rows["y"] == k].mean(0) for k in (0, 1)]).reshape(2, -1)
    for label in (0, 1):
        drawn = run.sample(100, given={"y": label})["x"].reshape(100, -1)
        nearest = ((drawn[:, None] - means) ** 2).sum(-1).argmin(1)
        assert (nearest == label).mean() > 0.95
    with pytest.raises(ProbgenError, match="y"):
        probgen.load("cgan", probgen.load_data("ring"))


def test_the_guide_of_a_game_gives_a_posterior_without_weights():
    """ALI's draws of z given x, in ArviZ groups: no log densities, since the data are a point mass given z."""
    run = fitted("ali", "digits", 5)
    tree = run.posterior(draws=3, rows=4)
    assert tree["posterior"]["z"].shape[:3] == (1, 3, 4) and "log_likelihood" not in tree.children
    assert not {"log_p", "log_q"} & {name for group in tree.children.values() for name in group.data_vars}
    some = fitted("infogan", "digits", 5).posterior(draws=3, rows=4)["posterior"]
    assert "c" in some and "z" not in some  # z has no guide
    with pytest.raises(ProbgenError, match="no guide that draws the latent 'z'"):
        fitted("gan", "ring", 2).posterior(draws=2)


def test_what_has_no_likelihood_says_so():
    """A point mass has none; with noise there is one, which without a guide is not estimated."""
    notes = fitted("gan", "ring", 2).evaluate(k=2)["notes"]
    assert "all its mass at one point" in notes[0]
    noisy = fitted("gan", "ring", 2, noise=0.1).evaluate(k=2)
    assert "no guide for it" in noisy["notes"][0] and "log_likelihood" not in noisy


@pytest.mark.parametrize("name", ["ali", "gan"])
def test_the_report_of_a_game_tells_how_it_went(name, tmp_path):
    run = fitted(name, "ring", 60)
    page = run.report(tmp_path / "report.html").read_text()
    assert "critic is right" in page and "of 8 modes" in page and "Trust in the guide" not in page


def test_signs_of_what_went_wrong():
    """A critic that always wins, one that is never better than chance, and gradients that grow."""
    from probgen.adversarial.health import signs

    steady = {"grad_norm": [1.0] * 40}
    assert "little to learn" in signs({"term/critic_accuracy": [0.7] * 30 + [1.0] * 10, **steady})[0]
    assert "alike" in signs({"term/critic_accuracy": [0.5] * 40, **steady})[0]
    growing = signs({"term/critic_accuracy": [0.7] * 40, "grad_norm": [1.0] * 30 + [100.0] * 10})
    assert len(growing) == 2 and "diverge" in growing[1]
    assert signs({"loss": [1.0], **steady}) == []


def test_every_game_is_resumed_in_another_process_by_its_own_optimizer(tmp_path):
    """Optimizers that are partials, and objectives of one's own, print the same text wherever they are made."""
    from probgen.run import optimizer_text

    for name, options in (("gan", {}), ("dcgan", {}), ("veegan", {"objective": "kl"}), ("gan_numpyro", {})):
        data = probgen.load_data("digits")
        texts = {
            (optimizer_text(program.defaults["optimizer"]), repr(program.by))
            for program in (probgen.load(name, data, **options) for _ in range(2))
        }
        assert len(texts) == 1 and " at 0x" not in str(texts)
    data = probgen.load_data("ring")
    straight = probgen.fit(probgen.load("gan", data), data, steps=30, progress=False)
    probgen.fit(probgen.load("gan", data), data, steps=12, progress=False, out=tmp_path / "run")
    resumed = probgen.fit(probgen.load("gan", data), data, steps=30, resume=True, progress=False, out=tmp_path / "run")
    assert all(np.array_equal(straight._weights[n], resumed._weights[n]) for n in straight._weights)


def test_ways_through_latent_space():
    """Spherical ways keep the length of their ends and start and end at them; linear ones are shorter between."""
    from probgen.pictures.interpolation import between

    a, b = np.random.default_rng(0).normal(size=(2, 6, 50))
    a, b = (5 * v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b))
    for t in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(np.linalg.norm(between(a, b, t), axis=-1), 5)
    np.testing.assert_allclose(between(a, b, 0.0), a)
    np.testing.assert_allclose(between(a, b, 1.0), b)
    assert (np.linalg.norm(between(a, b, 0.5, "linear"), axis=-1) < 4.5).all()
    np.testing.assert_allclose(between(a, a, 0.4), a)
    run = fitted("gan", "ring", 2)
    for picture in (probgen.pictures.interpolation, probgen.pictures.traversal):
        assert picture(run).lines
    with pytest.raises(ProbgenError, match="`path` is 'round'"):
        probgen.pictures.interpolation(run, path="round")
    with pytest.raises(ProbgenError, match="takes three, not 2"):
        probgen.pictures.arithmetic(run, points=([1, 0], [0, 1]))
