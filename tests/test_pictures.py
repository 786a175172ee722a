"""Pictures show what they say: numbers, neighbours, quantiles and places are compared with their definitions."""

from __future__ import annotations

import dataclasses
from statistics import NormalDist

import numpy as np
import pytest
from linear_run import linear_run

from probgen import pictures
from probgen.errors import ProbgenError
from probgen.pictures import decoded, layout, material
from probgen.pictures.latents import principal
from probgen.pictures.samples import nearest_rows
from probgen.program import Plate, Site, Structure

ALL = [
    "curves", "terms", "data", "samples", "nearest", "reconstructions", "latents", "traversal", "manifold", "khat",
    "diagram",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_windows():
    with pictures.detached():
        yield


@pytest.fixture(scope="module")
def digits():
    return linear_run("digits", 2)


def waves(rows=300):
    rng, t = np.random.default_rng(0), np.linspace(0, 1, 24)
    x = np.sin(2 * np.pi * (t * rng.uniform(0.5, 3, (rows, 1)) + rng.uniform(0, 1, (rows, 1))))
    return {"x": x, "y": rng.normal(size=rows)}


def images(*shape, rows=120):
    return {"x": np.random.default_rng(0).integers(0, 256, (rows, *shape)).astype(np.uint8)}


SOURCES = {
    "digits": "digits",
    "plane": "two-moons",
    "vectors": waves(),
    "colour": images(16, 16, 3),
    "28x28": images(28, 28),
    "channels first": images(3, 9, 12),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_picture_is_drawn_for_every_sort_of_data(source):
    run = linear_run(SOURCES[source], 2)
    for name in ALL:
        ax = getattr(pictures, name)(run)
        ax.figure.canvas.draw()
        assert ax.get_title(loc="left"), name


def test_a_picture_is_drawn_on_the_axes_given(digits):
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert pictures.curves(digits, ax=ax) is ax


def test_curves_hold_the_metrics_numbers(digits):
    training, validation = pictures.curves(digits).get_lines()
    assert training.get_xydata() == pytest.approx(np.c_[digits.metrics["step"], digits.metrics["loss"]])
    seen = [(s, v) for s, v in zip(digits.metrics["step"], digits.metrics["valid_loss"], strict=True) if np.isfinite(v)]
    assert validation.get_xydata() == pytest.approx(np.array(seen))
    terms = {line.get_label(): line.get_ydata() for line in pictures.terms(digits).get_lines()}
    assert terms["x"] == pytest.approx(digits.metrics["term/x"])
    assert terms["z"] == pytest.approx(digits.metrics["term/z"])


def test_many_numbered_terms_are_one_line_their_sum(digits):
    metrics = {"step": [1, 2], **{f"term/z_{t}": [t, 2 * t] for t in range(1, 13)}, "term/x": [5, 6]}
    lines = {line.get_label(): line.get_ydata() for line in pictures.terms(changed(digits, metrics=metrics)).lines}
    assert lines["z (sum of 12)"] == pytest.approx([78, 156])
    assert lines["x"] == pytest.approx([5, 6])


def test_early_values_outside_the_frame_are_told(digits):
    metrics = {"step": list(range(100)), "loss": [9000.0] * 3 + [100.0 - 0.1 * i for i in range(97)]}
    ax = pictures.curves(changed(digits, metrics=metrics))
    assert ax.get_ylim()[1] < 120
    assert any("9000 in the first steps" in text.get_text() for text in ax.texts)


def test_the_nearest_training_image_is_the_nearest(digits):
    ax = pictures.nearest(digits, n=16)
    mosaic = np.ma.filled(ax.images[0].get_array(), np.nan)
    drawn = digits.sample(64)["x"][:16].reshape(16, -1)  # the first of the 64 that `samples` shows
    train = digits.data.train["x"].reshape(len(digits.data.train), -1).astype(float)
    brute = [min(range(len(train)), key=lambda j: np.sum((train[j] - x) ** 2)) for x in drawn]
    low, high = digits.spec["x"].range
    tiles = cut(mosaic, rows=4, columns=8, group=2)
    for i, j in enumerate(brute):
        band, column = divmod(i, 8)
        sample = np.clip((drawn[i].reshape(8, 8) - low) / (high - low), 0, 1)
        assert tiles[2 * band][column] == pytest.approx(sample)
        assert tiles[2 * band + 1][column] == pytest.approx((train[j].reshape(8, 8) - low) / (high - low))


def test_the_search_for_the_nearest_goes_through_every_block():
    rows = linear_run({"x": np.arange(9000.0)[:, None] * np.ones(3)}, 1).data.train
    found, searched = nearest_rows(rows, "x", np.array([[8500.2] * 3, [3.4] * 3]), 60_000)
    assert searched == 9000
    assert found[:, 0].tolist() == [8500, 3]


def test_reconstructions_stand_below_their_data(digits):
    rows = digits.data.test
    index = material.choose(rows, 16, 0)
    mosaic = np.ma.filled(pictures.reconstructions(digits, n=16).images[0].get_array(), np.nan)
    tiles = cut(mosaic, rows=4, columns=8, group=2)
    low, high = digits.spec["x"].range
    rebuilt = digits.trained.reconstruct({"x": rows[index]["x"]}, seed=0)["x"]
    for i in range(16):
        band, column = divmod(i, 8)
        assert tiles[2 * band][column] == pytest.approx((rows[index]["x"][i] - low) / (high - low))
        assert tiles[2 * band + 1][column] == pytest.approx(np.clip((rebuilt[i] - low) / (high - low), 0, 1))


def test_the_manifold_decodes_the_quantiles_at_their_places(digits):
    n = 5
    tiles = cut(np.ma.filled(pictures.manifold(digits, n=n).images[0].get_array(), np.nan), n, n)
    quantile = [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]
    low, high = digits.spec["x"].range
    for row in range(n):
        for column in range(n):
            z = np.array([[quantile[column], quantile[n - 1 - row]]])  # up the page is up in z
            mean = digits.trained.decode({"z": z}, 1, 0, None)["x"][0]
            assert tiles[row][column] == pytest.approx(np.clip((mean - low) / (high - low), 0, 1))


def test_a_traversal_moves_one_dimension_at_a_time(digits):
    tiles = cut(np.ma.filled(pictures.traversal(digits, steps=5).images[0].get_array(), np.nan), 2, 5)
    low, high = digits.spec["x"].range
    for dim in range(2):
        for step, offset in enumerate(np.linspace(-2.5, 2.5, 5)):
            z = np.eye(2)[dim][None] * offset
            mean = digits.trained.decode({"z": z}, 1, 0, None)["x"][0]
            assert tiles[dim][step] == pytest.approx(np.clip((mean - low) / (high - low), 0, 1))


def test_a_prior_that_is_not_standard_normal_is_followed(digits):
    class Wide(type(digits.trained)):
        def draw(self, n, seed, arrays, prior=False):
            return {name: 3 * v + 1 if name == "z" else v for name, v in super().draw(n, seed, arrays).items()}

    run = changed(digits, trained=Wide(digits.data.train["x"], 2))
    mean, sd = decoded.prior_scale(run, None, "z", 0)
    # 1000 draws: four standard errors are 0.38 for the mean and 0.27 for the sd, a false alarm in 4,000.
    assert mean == pytest.approx([1, 1], abs=0.38)
    assert sd == pytest.approx([3, 3], abs=0.27)
    centre, scale = decoded.prior_scale(digits, None, "z", 0)
    assert centre.tolist() == [0, 0]
    assert scale.tolist() == [1, 1]


def test_latents_are_posterior_means_coloured_by_label(digits):
    ax = pictures.latents(digits, draws=400)
    rows = digits.data.test
    index = material.choose(rows, 2000, 0)
    exact = digits.trained._encode(rows[index]["x"])
    labels = rows[index]["y"]
    for value, points in zip(range(10), ax.collections[1:], strict=True):
        # The mean of 400 draws lies within five standard errors (sd below 0.5) of the exact mean.
        assert np.asarray(points.get_offsets()) == pytest.approx(exact[labels == value], abs=5 * 0.5 / 20)
    assert [text.get_text() for text in ax.texts] == [str(value) for value in range(10)]


def test_more_than_two_dimensions_are_projected_and_the_title_says_so():
    run = linear_run("digits", 6)
    ax = pictures.latents(run, draws=1)
    assert "PCA of 6 dimensions to 2" in ax.get_title(loc="left")
    values = np.random.default_rng(0).normal(size=(500, 6)) * [5, 3, 1, 1, 1, 1]
    shown, share = principal(values)
    variances = np.sort(np.linalg.eigvalsh(np.cov(values.T)))[::-1]
    assert shown.var(0, ddof=1) == pytest.approx(variances[:2])
    assert share == pytest.approx(variances[:2].sum() / variances.sum())


def test_khat_counts_what_lies_above(digits):
    class Heavy(type(digits.trained)):
        def k_hat(self, log_weights):
            return np.where(np.arange(log_weights.shape[1]) % 4 == 0, 0.9, 0.3)

    run = changed(digits, trained=Heavy(digits.data.train["x"], 2))
    ax = pictures.khat(run, rows=100, k=10)
    assert sum(bar.get_height() for bar in ax.patches) == 100
    assert "25.0% above 0.7" in ax.get_title(loc="left")
    assert {line.get_xdata()[0] for line in ax.get_lines()} == {0.5, 0.7}


def test_points_outside_the_frame_are_counted():
    run = linear_run("two-moons", 2)
    x = np.full((1000, 2), 0.3)
    x[:50] = 40.0
    ax = pictures.samples(changed(run, sample=lambda n, seed=0: {"x": x}), n=1000)
    assert "5.0% outside the frame" in ax.get_title(loc="left")


def test_images_are_recognised_by_shape_and_range():
    spec = linear_run("digits", 2).spec["x"]

    def look(*shape, low=0.0, mean=0.2):
        entry = dataclasses.replace(spec, shape=shape, range=(low, 1.0), mean=np.full(shape, mean))
        return material.look({"x": entry}, "x")

    assert look(28, 28).kind == look(784).kind == look(1, 28, 28).kind == look(28, 28, 3).kind == "image"
    assert look(784, low=-1.0).kind == look(20, 3).kind == look(13).kind == "vector"
    assert look(2).kind == "plane"
    assert look().kind == "scalar"
    assert look(28, 28).ink and not look(28, 28, mean=0.7).ink and not look(28, 28, 3).ink


def test_channels_first_and_last_are_the_same_image():
    spec = linear_run(images(9, 12, 3), 2).spec
    last = np.random.default_rng(1).integers(0, 256, (4, 9, 12, 3))
    first = {"x": dataclasses.replace(spec["x"], shape=(3, 9, 12))}
    tiles = material.look(first, "x").tiles(np.moveaxis(last, -1, 1))
    assert tiles == pytest.approx(material.look(spec, "x").tiles(last))


def test_impossible_pictures_are_refused_in_one_sentence(digits):
    wide = linear_run("digits", 6)
    exact = changed(digits, structure=dataclasses.replace(digits.structure, model={"x": digits.structure.model["x"]}))
    for draw, words in (
        (lambda: pictures.manifold(wide), "two dimensions"),
        (lambda: pictures.latents(exact), "no continuous latent"),
        (lambda: pictures.reconstructions(exact), "no latents"),
        (lambda: pictures.khat(exact), "latent per datum"),
        (lambda: pictures.curves(changed(digits, metrics={})), "empty"),
        (lambda: pictures.terms(changed(digits, metrics={})), "no terms"),
        (lambda: pictures.latents(changed(digits, data=None)), "no data at hand"),
        (lambda: pictures.samples(digits, name="w"), "'x'"),
        (lambda: pictures.diagram(Structure({}, {})), "no sites"),
    ):
        with pytest.raises(ProbgenError, match=words) as caught:
            draw()
        assert "\n" not in str(caught.value)


def test_decoded_pictures_need_no_data(digits):
    alone = changed(digits, data=None)
    for name in ("traversal", "manifold"):
        with_data = getattr(pictures, name)(digits).images[0].get_array()
        assert np.ma.allequal(getattr(pictures, name)(alone).images[0].get_array(), with_data), name


def test_a_forest_shows_the_quantiles_of_global_latents(digits):
    sites = {"w": Site("w", "latent", "Normal", (3,), 1), "b": Site("b", "latent", "Normal", (), 0)}
    drawn = {"w": np.random.default_rng(0).normal([0, 5, -5], size=(400, 3)), "b": np.arange(400.0)}

    class Global(type(digits.trained)):
        def posterior(self, arrays, draws, seed):
            return drawn, None, None

    structure = Structure({**sites, "x": digits.structure.model["x"]}, sites)
    run = changed(digits, structure=structure, trained=Global(digits.data.train["x"], 2))
    ax = pictures.forest(run)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["w[0]", "w[1]", "w[2]", "b"]
    medians = [line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() == "o"]
    assert medians == pytest.approx([*np.median(drawn["w"], 0), 199.5])
    ends = [tuple(line.get_xdata()) for line in ax.get_lines() if len(line.get_xdata()) == 2][:8:2]
    assert ends[3] == pytest.approx((0.03 * 399, 0.97 * 399))
    with pytest.raises(ProbgenError, match="no continuous global latent"):
        pictures.forest(digits)


def test_data_without_a_test_set_are_shown_by_what_there_is():
    run = linear_run(waves(), 2)
    assert len(run.data.test) == 0
    assert len(material.rows_of(run)) == len(run.data.train)


DATA = Plate("data", 32, -1, data=True)
TOPICS = Plate("topics", 5, -1)


def site(name, role="latent", plates=(DATA,), parents=()):
    return Site(name, role, "Normal", (32,), 0, plates, parents=parents)


def test_a_plate_encloses_its_nodes_and_no_others():
    words = Plate("words", 40, -2)
    sites = [
        site("topic", plates=(TOPICS,)),
        site("weights", plates=()),
        site("theta", parents=("weights",)),
        site("w", "observed", plates=(DATA, words), parents=("theta", "topic")),
        site("loc", plates=(TOPICS,)),
        site("x", "observed", parents=("loc", "theta")),
    ]
    nodes = layout.collapsed({s.name: s for s in sites})
    depth = layout.layers(nodes)
    places, frames, _ = layout.arranged(nodes.values(), depth)
    assert {plate.name for plate, _ in frames} == {"topics", "data", "words"}
    for plate, (left, bottom, right, top) in frames:
        for name, (x, y) in places.items():
            within = left < x < right and bottom < y < top
            assert within == (plate in nodes[name].site.plates), (plate.name, name)
    for name, node in nodes.items():
        assert all(depth[parent] < depth[name] for parent in node.parents)
    assert len(set(places.values())) == len(places)


def test_a_long_chain_is_drawn_by_its_ends():
    chain = [site(f"z_{t}", parents=(f"z_{t - 1}",) if t > 1 else ()) for t in range(1, 51)]
    nodes = layout.collapsed({s.name: s for s in chain})
    assert list(nodes) == ["z_1", "z_2", "z_…", "z_50"]
    assert [nodes[n].parents for n in nodes] == [(), ("z_1",), ("z_2",), ("z_…",)]
    reverse = [site(f"z_{t}", parents=(f"z_{t + 1}",) if t < 50 else ()) for t in range(50, 0, -1)]
    nodes = layout.collapsed({s.name: s for s in reverse})
    assert [nodes[n].parents for n in ("z_50", "z_…", "z_2", "z_1")] == [(), ("z_50",), ("z_…",), ("z_2",)]
    pictures.diagram(Structure({s.name: s for s in reverse}, {}))


def test_names_with_dollars_and_brackets_are_only_text(digits):
    odd = site("$a_b<i>")
    ax = pictures.diagram(Structure({odd.name: odd}, {}))
    ax.figure.canvas.draw()
    assert any(r"\$a_b<i>" in text.get_text() for text in ax.texts)


def changed(run, **changes):
    return type(run)(**{**vars(run), **changes})


def cut(mosaic, rows, columns, group=1):
    """The tiles of a mosaic of 8x8 images: [rows][columns]."""
    gap = 1
    tops = [r * (8 + gap) + (r // group) * (2 * gap if group > 1 else 0) for r in range(rows)]
    return [[mosaic[t : t + 8, c * (8 + gap) : c * (8 + gap) + 8] for c in range(columns)] for t in tops]
