"""Where EM starts: k-means++ against its exact probabilities, nearest centres against a loop, columns of unit variance."""

import itertools

import numpy as np
import pytest
from scipy import stats

from probgen.em import seeding
from probgen.em.seeding import centres, nearest, standardised

POINTS = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0], [5.0, 1.0], [4.0, -3.0]])


def probabilities(points, number):
    """{rows in the order they are chosen: probability} of greedy k-means++, by enumeration of all its candidates.

    The first is any row. Each further one is, of several candidates drawn with probability ∝ D²(x), the squared
    distance to the nearest centre so far, the one that leaves the least Σ D²; the first of equals.
    """
    square = ((points[:, None] - points) ** 2).sum(-1)
    paths = {(i,): 1 / len(points) for i in range(len(points))}
    for _ in range(1, number):
        longer = {}
        for path, p in paths.items():
            D2 = square[list(path)].min(0)
            after = np.minimum(D2[:, None], square).sum(0)
            for drawn in itertools.product(range(len(points)), repeat=2 + int(np.log(number))):
                best = min(drawn, key=lambda j: after[j])
                longer[(*path, best)] = longer.get((*path, best), 0) + p * np.prod(D2[list(drawn)] / D2.sum())
        paths = {path: p for path, p in longer.items() if p > 0}
    return paths


@pytest.mark.parametrize("number", [2, 3])
def test_centres_are_drawn_by_their_squared_distance(number):
    """3000 seeds against the exact probabilities: χ² with a false alarm of 1e-5."""
    exact, draws = probabilities(POINTS, number), 3000
    assert sum(exact.values()) == pytest.approx(1)
    row = {tuple(point): i for i, point in enumerate(POINTS)}
    found = dict.fromkeys(exact, 0)
    for seed in range(draws):
        found[tuple(row[tuple(centre)] for centre in centres(POINTS, number, "k-means++", seed))] += 1
    likely = [path for path, p in exact.items() if p * draws >= 10]
    rest = [path for path in exact if path not in likely]
    groups = [[path] for path in likely] + ([rest] if sum(exact[path] for path in rest) * draws >= 10 else [])
    count, expected = (np.array([sum(of[path] for path in g) for g in groups]) for of in (found, exact))
    assert expected.sum() > 0.98
    chi2 = ((count - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi2 < stats.chi2(len(groups) - 1).isf(1e-5)


def test_as_many_centres_as_distinct_rows_are_all_of_them_and_more_are_found_among_equal_ones():
    """A row that is a centre has D² = 0, so it is never drawn again while another is left."""
    rows = np.repeat(POINTS, 4, 0)
    for seed in range(20):
        assert len(np.unique(centres(rows, 5, "k-means++", seed), axis=0)) == 5
    more = centres(rows, 8, "k-means++", 0)
    assert more.shape == (8, 2) and len(np.unique(more, axis=0)) == 5
    assert len(np.unique(centres(POINTS, 5, "random", 0), axis=0)) == 5


def test_nearest_is_the_nearest_centre(monkeypatch):
    """Against a loop over rows and centres, in pieces of seven rows."""
    rng = np.random.default_rng(0)
    points, middles = rng.normal(size=(100, 3)), rng.normal(size=(6, 3))
    expected = [min(range(6), key=lambda k: float(((x - middles[k]) ** 2).sum())) for x in points]
    np.testing.assert_array_equal(nearest(points, middles), expected)
    monkeypatch.setattr(seeding, "PIECE", 7)
    np.testing.assert_array_equal(nearest(points, middles), expected)


def test_columns_of_several_sites_have_unit_variance_and_constant_ones_are_zero():
    rng = np.random.default_rng(0)
    images, counts = 1e3 * rng.normal(size=(50, 2, 3)) + 1e4, rng.poisson(3.0, 50)
    images[:, 1, 2] = 7.3
    found = standardised([images, counts])
    columns = np.concatenate([images.reshape(50, 6), counts[:, None]], 1)
    assert found.shape == (50, 7)
    np.testing.assert_allclose(np.delete(found, 5, 1), stats.zscore(np.delete(columns, 5, 1), 0), atol=1e-4)
    assert (found[:, 5] == 0).all()
