"""The feed: an order that is a function of (seed, epoch), noise of (seed, step), and nothing of the chunks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probgen.data import load_data
from probgen.data.feed import Feed, evaluation_batches
from probgen.data.prepare import Binarize, Dequantize, Logit, Preparation, Scale
from probgen.errors import ProbgenError

DATA = load_data("digits")
FIXED = Preparation.of({"x": Binarize()}, DATA)
BITS = Preparation.of({"x": Binarize(stochastic=True)}, DATA)
CHAIN = Preparation.of({"x": (Dequantize(), Scale(), Logit())}, DATA)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 60),
    batch_size=st.one_of(st.none(), st.integers(1, 70)),
    seed=st.integers(0, 3),
    first=st.integers(0, 200),
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
def test_chunks_do_not_change_the_order(rows, batch_size, seed, first, cuts):
    data = load_data({"x": np.arange(rows)})
    empty = Preparation({}, {})
    last = first + sum(cuts) + 1
    whole = Feed(data.train, empty, batch_size, seed).indices(first, last)
    feed, start, parts = Feed(data.train, empty, batch_size, seed), first, []
    for length in [*cuts, 1]:
        if length:
            parts.append(feed.indices(start, start + length))
        start += length
    assert np.array_equal(whole, np.concatenate(parts)) and whole.dtype == np.int64
    assert whole.shape == (last - first, min(batch_size or rows, rows))


def test_an_epoch_visits_each_row_once_and_drops_the_short_last_batch():
    feed = Feed(DATA.train, FIXED, 100, seed=1)
    assert (feed.rows, feed.batch_size, feed.steps_per_epoch) == (1437, 100, 14)
    epochs = [feed.indices(14 * e, 14 * (e + 1)).ravel() for e in range(3)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == 1400
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(feed.indices(14, 28).ravel(), epochs[1])  # going back gives the same
    assert not np.array_equal(Feed(DATA.train, FIXED, 100, seed=2).indices(0, 14).ravel(), epochs[0])


def test_every_order_of_a_small_epoch_is_as_likely():
    feed = Feed(load_data({"x": np.arange(3)}).train, Preparation({}, {}), 1, seed=0)
    orders = feed.indices(0, 3 * 6000).reshape(6000, 3) @ [9, 3, 1]
    counts = np.unique(orders, return_counts=True)[1]
    # chi-square with 5 degrees of freedom above 30.9 has probability 1e-5, fixed seed
    assert len(counts) == 6 and ((counts - 1000) ** 2 / 1000).sum() < 30.9


@pytest.mark.parametrize("batch_size", [None, 1437, 5000])
def test_whole_batches_keep_the_datas_own_order(batch_size):
    feed = Feed(DATA.train, FIXED, batch_size, seed=0)
    assert np.array_equal(feed.indices(5, 7), np.stack([np.arange(1437)] * 2)) and feed.steps_per_epoch == 1


def test_resident_rows_are_the_prepared_ones():
    feed = Feed(DATA.train, FIXED, 64, seed=0)
    resident = feed.resident()
    assert np.array_equal(resident["x"], DATA.train["x"] > 8) and resident["x"].dtype == np.float32
    batches = feed.batches(3, 30)
    index = feed.indices(3, 30)
    assert np.array_equal(batches["x"], resident["x"][index]) and np.array_equal(batches["y"], DATA.train["y"][index])
    assert Feed(DATA.train, BITS, 64, seed=0).resident() is None


@pytest.mark.parametrize("preparation", [FIXED, BITS, CHAIN], ids=["fixed", "bits", "chain"])
def test_batches_do_not_depend_on_chunks(preparation):
    whole = Feed(DATA.train, preparation, 64, seed=4).batches(10, 40)
    feed = Feed(DATA.train, preparation, 64, seed=4)
    for name, array in whole.items():
        single = np.stack([feed.batch(step)[name] for step in range(10, 40)])
        assert single.tobytes() == array.tobytes() and single.dtype == array.dtype
    again = [feed.batches(a, b)["x"] for a, b in ((10, 17), (17, 18), (18, 40))]
    assert np.concatenate(again).tobytes() == whole["x"].tobytes()


def test_noise_is_a_function_of_seed_and_step():
    data = load_data({"x": np.full((64, 5), 8, np.uint8)}, split=None)
    preparation = Preparation.of({"x": Dequantize()}, data)
    feed = Feed(data.train, preparation, 32, seed=0)
    batches = [feed.batch(s)["x"] for s in range(4)] + [Feed(data.train, preparation, 32, seed=1).batch(0)["x"]]
    for i, one in enumerate(batches):
        assert all(not np.intersect1d(one, other).size for other in batches[:i])


class Slow:
    """A dataset that is read row by row."""

    def __len__(self):
        return len(DATA.train)

    def __getitem__(self, i):
        return {name: array[i] for name, array in arrays.items()}


arrays = {name: DATA.train[name] for name in DATA.train.names}


@pytest.mark.parametrize("preparation", [FIXED, BITS], ids=["fixed", "bits"])
def test_lazy_rows_give_the_same_batches(preparation):
    lazy = load_data(Slow())
    feed = Feed(lazy.train, preparation, 64, seed=0)
    assert feed.resident() is None
    truth = Feed(DATA.train, preparation, 64, seed=0).batches(20, 24)
    assert all(np.array_equal(array, truth[name]) for name, array in feed.batches(20, 24).items())


@pytest.mark.parametrize("preparation", [FIXED, BITS, CHAIN], ids=["fixed", "bits", "chain"])
def test_evaluation_covers_every_row_and_does_not_depend_on_the_batch_size(preparation):
    found = {}
    for size in (7, 64, 1000):
        parts = list(evaluation_batches(DATA.test, preparation, size, seed=3))
        index = np.concatenate([p[0] for p in parts])
        assert np.array_equal(index, np.arange(180)) and len(parts[-1][0]) == (180 % size or size)
        found[size] = (np.concatenate([p[1]["x"] for p in parts]), np.concatenate([p[2] for p in parts]))
        assert np.array_equal(np.concatenate([p[1]["y"] for p in parts]), DATA.test["y"])
    for x, log_jacobian in found.values():
        assert x.tobytes() == found[64][0].tobytes() and np.allclose(log_jacobian, found[64][1], rtol=1e-13)


def test_bad_sizes_are_refused():
    with pytest.raises(ProbgenError, match="`batch_size` is 0"):
        Feed(DATA.train, FIXED, 0)
    with pytest.raises(ProbgenError, match="no training rows"):
        Feed(load_data({"x": np.ones((3, 2))}).valid, FIXED, 4)
