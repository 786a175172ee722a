"""Reading data: every source, the split, laziness, and one sentence for every kind of bad input."""

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from probgen.data import ArraySpec, Rows, as_rows, load_data, split, tables
from probgen.errors import ProbgenError

X = np.random.default_rng(0).normal(size=(50, 3))
Y = np.arange(50) % 4


# ---------------------------------------------------------------------------------------------------- names


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data, theirs = load_data("digits"), load_digits()
    index = split(1797)
    for rows, part in zip((data.train, data.valid, data.test), index, strict=True):
        assert np.array_equal(rows["x"], theirs.images[part])
        assert np.array_equal(rows["y"], theirs.target[part])
    assert data.spec["x"].range == (0.0, 16.0) and data.spec["x"].shape == (8, 8)
    assert data.spec["y"].classes == 10
    assert np.allclose(data.spec["x"].mean, theirs.images[index[0]].mean(0))


def test_repr_says_sizes_and_arrays():
    text = repr(load_data("digits"))
    assert "1437 train, 180 valid, 180 test" in text and "x [8, 8]" in text and "10 classes" in text


# ---------------------------------------------------------------------------------------------------- split


@given(n=st.integers(1, 300), seed=st.integers(0, 5), valid=st.floats(0, 0.4), test=st.floats(0, 0.55))
@example(n=1, seed=0, valid=0.0, test=0.55)
def test_a_split_is_a_partition_and_a_function_of_the_seed(n, seed, valid, test):
    fractions = (1 - valid - test, valid, test)
    parts = split(n, fractions, seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    assert len(parts[0]) >= 1
    assert all(np.array_equal(a, b) for a, b in zip(parts, split(n, fractions, seed), strict=True))


def test_split_sizes_and_seeds():
    sizes = [len(part) for part in split(1000)]
    assert sizes == [800, 100, 100]
    assert not np.array_equal(split(1000)[1], split(1000, seed=1)[1])


def test_plain_arrays_all_train_and_split_when_asked():
    data = load_data({"x": X, "y": Y})
    assert (len(data.train), len(data.valid), len(data.test)) == (50, 0, 0)
    assert data.valid["x"].shape == (0, 3)
    data = load_data({"x": X, "y": Y}, split=(0.6, 0.2, 0.2))
    assert (len(data.train), len(data.valid), len(data.test)) == (30, 10, 10)
    together = np.concatenate([r["x"] for r in (data.train, data.valid, data.test)])
    assert np.array_equal(np.sort(together, axis=0), np.sort(X, axis=0))


def test_files_with_and_without_a_split(tmp_path):
    np.savez(tmp_path / "bare.npz", x=X, y=Y)
    assert len(load_data(tmp_path / "bare.npz").train) == 40
    np.savez(tmp_path / "full.npz", x_train=X[:30], x_valid=X[30:40], x_test=X[40:])
    full = load_data(str(tmp_path / "full.npz"))
    assert np.array_equal(full.train["x"], X[:30]) and np.array_equal(full.valid["x"], X[30:40]) and full.note == ""
    np.savez(tmp_path / "two.npz", x_train=X[:40], x_test=X[40:], y_train=Y[:40], y_test=Y[40:])
    two = load_data(tmp_path / "two.npz")
    assert (len(two.train), len(two.valid), len(two.test)) == (36, 4, 10)
    assert "valid is a tenth of train" in repr(two)
    assert np.array_equal(np.sort(np.concatenate([two.train["x"], two.valid["x"]]), axis=0), np.sort(X[:40], axis=0))
    for rows in (two.train, two.valid):  # labels stay with their rows
        found = [int(np.flatnonzero((row == X).all(1))[0]) for row in rows["x"]]
        assert np.array_equal(rows["y"], Y[found])


# -------------------------------------------------------------------------------------------------- sources


def test_npy_csv_parquet_and_a_folder_of_npy(tmp_path):
    np.save(tmp_path / "a.npy", X)
    assert np.array_equal(load_data(tmp_path / "a.npy", split=(1, 0, 0)).train["x"], X)
    header = "a,b,c,label"
    np.savetxt(tmp_path / "b.csv", np.c_[X, Y], delimiter=",", header=header, comments="", fmt="%.17g")
    pairs = [load_data(tmp_path / "b.csv", split=(1, 0, 0))]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"a": X[:, 0], "b": X[:, 1], "c": X[:, 2], "label": Y, "word": ["w"] * 50}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    with pytest.warns(UserWarning, match="left out what is not numeric: word"):
        pairs.append(load_data(tmp_path / "c.parquet", split=(1, 0, 0)))
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "x.npy", X)
    np.save(tmp_path / "d" / "y.npy", Y)
    pairs.append(load_data(tmp_path / "d", split=(1, 0, 0)))
    for data in pairs:
        assert np.array_equal(data.train["x"], X) and np.array_equal(data.train["y"], Y)
        assert data.train["y"].dtype == np.int64 and data.spec["y"].classes == 4


def test_a_header_of_numbers_and_a_word_is_a_header(tmp_path):
    (tmp_path / "a.csv").write_text("0,1,label\n1,2,0\n3,4,1\n")
    data = load_data(tmp_path / "a.csv", split=(1, 0, 0))
    assert np.array_equal(data.train["x"], [[1, 2], [3, 4]]) and np.array_equal(data.train["y"], [0, 1])


def test_lists_keep_the_dtype_they_declare(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 2, 3), dtype=np.uint8)
    nested = pa.array(pixels.tolist(), pa.list_(pa.list_(pa.uint8())))
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"pixels": nested, "label": np.arange(20) % 2}), tmp_path / "hub" / "train.parquet")
    feature = datasets.Features({"pixels": datasets.Array2D((2, 3), "uint8")})
    datasets.Dataset.from_dict({"pixels": pixels.tolist()}, features=feature).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for source in (tmp_path / "hub" / "train.parquet", f"hf:{tmp_path / 'hub'}", f"hf:{tmp_path / 'saved'}"):
        data = load_data(source, split=(1, 0, 0))
        assert data.train["x"].dtype == np.uint8 and np.array_equal(data.train["x"], pixels)


def test_csv_without_header_and_with_other_delimiters(tmp_path):
    for delimiter, name in ((",", "a.csv"), (";", "b.csv"), ("\t", "c.tsv")):
        np.savetxt(tmp_path / name, X, delimiter=delimiter, fmt="%.17g")
        assert np.array_equal(load_data(tmp_path / name, split=(1, 0, 0)).train["x"], X)


def _write_images(folder: Path, arrays) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        image.fromarray(array).save(folder / f"{i:03d}.png")


def test_image_folders(tmp_path):
    grey = np.random.default_rng(1).integers(0, 256, (12, 5, 4), dtype=np.uint8)
    colour = np.random.default_rng(1).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    _write_images(tmp_path / "grey", grey)
    assert np.array_equal(load_data(tmp_path / "grey", split=(1, 0, 0)).train["x"], grey)
    _write_images(tmp_path / "colour", colour)
    assert np.array_equal(load_data(tmp_path / "colour", split=(1, 0, 0)).train["x"], colour)
    _write_images(tmp_path / "labelled" / "cat", grey[:7])
    _write_images(tmp_path / "labelled" / "dog", grey[7:])
    data = load_data(tmp_path / "labelled", split=(1, 0, 0))
    assert np.array_equal(data.train["y"], [0] * 7 + [1] * 5) and data.spec["y"].classes == 2
    for part, these in (("train", grey[:8]), ("test", grey[8:])):
        _write_images(tmp_path / "split" / part, these)
    data = load_data(tmp_path / "split")
    assert (len(data.train), len(data.valid), len(data.test)) == (7, 1, 4)


def test_hugging_face_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = np.random.default_rng(1).integers(0, 256, (10, 4, 4), dtype=np.uint8)
    from PIL import Image

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))})
    pictures = {"image": [Image.fromarray(a) for a in images], "label": list(np.arange(10) % 3)}
    saved = datasets.Dataset.from_dict(pictures, features=features)
    datasets.DatasetDict({"train": saved.select(range(8)), "test": saved.select([8, 9])}).save_to_disk(tmp_path / "d")
    data = load_data(f"hf:{tmp_path / 'd'}")
    assert np.array_equal(data.test["x"], images[8:]) and np.array_equal(data.test["y"], [2, 0])
    assert data.spec["y"].classes == 3 and (len(data.train), len(data.valid)) == (7, 1)
    table = datasets.Dataset.from_dict({"a": X[:, 0], "b": X[:, 1], "y": Y, "note": ["n"] * 50})
    table.save_to_disk(tmp_path / "t")
    with pytest.warns(UserWarning, match="note"):
        data = load_data(f"hf:{tmp_path / 't'}", split=(1, 0, 0))
    assert np.array_equal(data.train["x"], X[:, :2]) and np.array_equal(data.train["y"], Y)
    with pytest.warns(UserWarning, match="note"):
        assert np.array_equal(load_data(table).train["x"], X[:, :2])


def test_plain_values():
    torch, pd = pytest.importorskip("torch"), pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "c": X[:, 2], "y": Y})
    for source in (X, X.tolist(), torch.tensor(X), frame, (X, Y)):
        assert np.array_equal(load_data(source).train["x"], X)
    given = load_data({"x_train": X[:40], "x_test": X[40:]})
    assert (len(given.train), len(given.valid), len(given.test)) == (36, 4, 10)
    sets = load_data({"train": (X[:40], Y[:40]), "valid": (X[40:45], Y[40:45]), "test": (X[45:], Y[45:])})
    assert np.array_equal(sets.valid["y"], Y[40:45]) and len(sets.test) == 5


class Pairs:
    """A map-style dataset that takes one index, and remembers which."""

    def __init__(self):
        self.touched = []

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        assert isinstance(i, int)
        self.touched.append(i)
        return X[i], Y[i]


def test_map_style_datasets_by_item_and_by_batch():
    torch = pytest.importorskip("torch")

    class Dicts(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, i):
            return {"x": torch.tensor(X[i]), "y": int(Y[i])}

    tensors = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    for source in (Pairs(), Dicts(), tensors):
        data = load_data(source)
        order = np.array([7, 3, 3, 49])
        batch = data.train[order]
        assert np.array_equal(batch["x"], X[order]) and np.array_equal(batch["y"], Y[order])
        assert np.array_equal(data.train["x"], X) and data.spec["y"].classes == 4


def test_a_dataset_that_takes_indices_is_asked_once_for_a_batch():
    class Batches(Pairs):
        def __getitem__(self, i):
            self.touched.append(i)
            return {"x": X[i], "y": Y[i]}

    source = Batches()
    rows = load_data(source).train
    source.touched.clear()
    order = np.array([4, 40, 1])
    assert np.array_equal(rows[order]["y"], Y[order]) and len(source.touched) == 1
    assert np.array_equal(load_data(Pairs()).train[X[:, 0] > 1]["x"], X[X[:, 0] > 1])


def test_a_datasets_rows_are_read_only_when_asked_for():
    source = Pairs()
    rows = load_data(source, split=(0.8, 0.1, 0.1)).test
    source.touched.clear()
    where = split(50)[2]
    assert np.array_equal(rows[np.array([2, 0])]["x"], X[where[[2, 0]]])
    assert source.touched == [where[2], where[0]]


# --------------------------------------------------------------------------------------------- lazy, on disk


class Watched(np.memmap):
    """A mapped file that remembers how many rows were taken from it."""

    taken = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        Watched.taken += len(np.atleast_2d(found))
        return found


def test_only_the_rows_asked_for_are_read_from_a_mapped_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 1000)
    np.save(tmp_path / "big.npy", np.arange(40_000.0).reshape(10_000, 4))
    data = load_data(tmp_path / "big.npy")
    assert not data.train.in_memory and len(data.train) == 8000
    mapped = np.load(tmp_path / "big.npy", mmap_mode="r").view(Watched)
    rows = Rows(tables.Arrays({"x": mapped}, "big.npy")).take(np.arange(100, 9000))
    Watched.taken = 0
    batch = rows[np.array([5, 0, 8])]["x"]
    assert np.array_equal(batch[:, 0], [420.0, 400.0, 432.0]) and Watched.taken == 3


def test_a_small_mapped_file_is_read_at_once(tmp_path):
    np.save(tmp_path / "small.npy", X)
    assert load_data(tmp_path / "small.npy").train.in_memory


def test_nan_in_a_mapped_file_is_refused_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 100)
    bad = np.ones((400_000, 4))
    bad[399_999, 2] = np.nan
    bad[7, 0] = np.inf
    np.save(tmp_path / "bad.npy", bad)
    table = tables.Arrays({"x": np.load(tmp_path / "bad.npy", mmap_mode="r")}, "bad.npy")
    with pytest.raises(ProbgenError, match=r"1 row, the first is row 7\b"):
        Rows(table)[np.array([3, 7, 9])]
    assert Rows(table)[np.array([3, 9])]["x"].sum() == 8


def test_the_first_bad_row_is_told_however_many_there_are(monkeypatch):
    monkeypatch.setattr(tables, "_CHUNK_BYTES", 100)
    bad = X.copy()
    bad[[11, 12, 30, 44]] = np.nan
    with pytest.raises(ProbgenError, match=r"4 rows, the first is row 11\b"):
        load_data(bad)


# ------------------------------------------------------------------------------------------- rows and specs


def test_foreign_byte_order_width_and_read_only_arrays_become_plain(tmp_path, monkeypatch):
    locked = X.copy()
    locked.flags.writeable = False
    np.save(tmp_path / "big.npy", X.astype(">f8"))
    assert load_data(locked).train["x"].flags.writeable
    sources = [X.astype(">f8"), X.astype(np.longdouble), locked, tmp_path / "big.npy"]
    for limit in (tables.IN_MEMORY_BYTES, 10):
        monkeypatch.setattr(tables, "IN_MEMORY_BYTES", limit)
        for source in sources:
            data = load_data(source, split=(1, 0, 0))
            x = data.train["x"]
            assert x.dtype == np.float64 and x.dtype.isnative and x.flags.writeable and np.array_equal(x, X)
            assert data.spec["x"].dtype == "float64"


def test_rows_index_like_arrays():
    rows = load_data({"x": X, "y": Y}).train
    assert len(rows) == 50 and rows.names == ("x", "y") and "y" in rows and "z" not in rows
    assert np.array_equal(rows[5:9]["x"], X[5:9]) and np.array_equal(rows[-1]["x"], X[-1])
    assert np.array_equal(rows[Y == 2]["x"], X[Y == 2]) and rows[np.array([], int)]["x"].shape == (0, 3)
    assert np.array_equal(rows.take(slice(3, 9)).take([1, 0])["y"], Y[[4, 3]])
    with pytest.raises(ProbgenError, match=r"no array 'w'.*x, y"):
        rows["w"]


def test_as_rows():
    data = load_data({"x": X, "y": Y}, split=(0.8, 0.1, 0.1))
    assert as_rows(data) is data.test and as_rows(data.train) is data.train
    assert np.array_equal(as_rows(X)["x"], X) and np.array_equal(as_rows({"y": Y})["y"], Y)
    only = {"obs": load_data({"obs": X}).spec["obs"]}
    assert np.array_equal(as_rows(X, only)["obs"], X)
    with pytest.raises(ProbgenError, match=r"shape \[2\].*made for \[3\]"):
        as_rows(X[:, :2], data.spec)
    with pytest.raises(ProbgenError, match="no test rows"):
        as_rows(load_data(X))


def test_labels_count_classes_over_all_splits_and_minus_one_is_missing():
    data = load_data({"y_train": np.array([0, -1, 1, 0]), "y_valid": np.array([2]), "y_test": np.array([5])})
    assert data.spec["y"].classes == 6 and data.spec["y"].range == (-1.0, 1.0)
    assert load_data({"n": np.array([0, 99_999])}).spec["n"].classes is None
    assert load_data({"b": np.array([True, False])}).spec["b"].classes is None


@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=6), st.sampled_from(["float32", "float64"]))
def test_a_spec_survives_json(values, dtype):
    spec = load_data({"x": np.array(values, dtype).reshape(-1, 1)}).spec["x"]
    again = ArraySpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and again.mean.tobytes() == spec.mean.tobytes()


def test_fingerprint_is_of_the_values():
    base = load_data({"x": X, "y": Y}).fingerprint
    assert base == load_data({"x": X.copy(), "y": Y.copy()}).fingerprint and re.fullmatch("[0-9a-f]{64}", base)
    other = X.copy()
    other[31, 2] += 1e-12
    changed = [{"x": other, "y": Y}, {"x": X}, {"x": X.astype(np.float32), "y": Y}, {"z": X, "y": Y}]
    assert base not in {load_data(d).fingerprint for d in changed}
    assert base != load_data({"x": X, "y": Y}, split=(0.8, 0.1, 0.1)).fingerprint


# ------------------------------------------------------------------------------------------------ bad input

NAN = X.copy()
NAN[[4, 9, 30], 1] = [np.nan, np.inf, -np.inf]
RAGGED = [[1.0, 2.0], [3.0]]


class Boom:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"x": NAN}, r"'x' in the data has NaN or infinite values in 3 rows, the first is row 4: remove"),
        (NAN, "3 rows, the first is row 4"),
        ({"x": X, "y": Y[:45]}, "'y' has 45 rows and 'x' has 50"),
        ({"x": np.array(["a", "b"])}, "'x' in the data has dtype <U1: convert"),
        ({"x": np.array([1, None], object)}, "dtype object"),
        ({"x": X.astype(complex)}, "dtype complex128"),
        ({"x": np.float64(3.0)}, "'x' in the data is a single number"),
        ({"x": np.empty((0, 3))}, r"'x' in the data is empty \(shape \[0, 3\]\)"),
        ({"x": np.empty((5, 0))}, "is empty"),
        ({"x": np.ma.masked_array(X, X > 0)}, "masked values"),
        ({}, "holds no arrays"),
        ([], "empty"),
        (RAGGED, "every row of the same shape"),
        ({"x_train": X, "x": X}, "'x' beside 'x_train'"),
        ({"x_test": X}, "no training rows"),
        ({"x_train": X, "x_test": X, "y_test": Y}, "lacks the array 'y_train'"),
        ({"x_train": X, "y_train": Y, "x_test": X}, "lacks the array 'y_test'"),
        ({"x_train": X, "x_test": X[:, :2]}, r"'x_test' in the data has rows of shape \[2\] and 'x_train' of \[3\]"),
        (3.5, "cannot read data from a float"),
        ("digit", "did you mean 'digits'"),
        ("two-moon", "did you mean 'two-moons'"),
        ("zzz", "there are: .*swiss-roll"),
        ("no/such/file.npz", "no file or folder 'no/such/file.npz'"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(source, says):
    with pytest.raises(ProbgenError, match=says) as caught:
        load_data(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.2, 0.1), (0, 0.5, 0.5), (1.2, -0.1, -0.1), 0.8, ("a", 0, 0)])
def test_bad_splits_are_refused(fractions):
    with pytest.raises(ProbgenError, match="fractions of train, valid and test"):
        load_data(X, split=fractions)


def test_a_split_of_what_is_split_is_refused():
    with pytest.raises(ProbgenError, match="split already"):
        load_data({"x_train": X, "x_test": X}, split=(0.8, 0.1, 0.1))


def _bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be read, each with what is said of it."""
    np.savez(folder / "whole.npz", x=X)
    whole = (folder / "whole.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-200])
    (folder / "empty.npz").write_bytes(b"")
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0xFF
    (folder / "flipped.npz").write_bytes(flipped)
    np.savez(folder / "object.npz", x=np.array([{"a": 1}], object))
    (folder / "evil.npz").write_bytes(pickle.dumps(Boom(folder / "canary")))
    np.save(folder / "object.npy", np.array([Boom(folder / "canary")], object), allow_pickle=True)
    np.save(folder / "whole.npy", X)
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[:-100])
    (folder / "empty.npy").write_bytes(b"")
    with zipfile.ZipFile(folder / "text.npz", "w") as archive:
        archive.writestr("x.txt", "hello")
    np.savez(folder / "nan.npz", x_train=NAN, x_test=X)
    (folder / "ragged.csv").write_text("a,b\n1,2\n3,4\n5\n")
    (folder / "hole.csv").write_text("a,b\n1,2\n3,\n")
    (folder / "word.csv").write_text("a,b\n1,2\n3,n/a\n")
    (folder / "nan.csv").write_text("a,b\n1,2\n3,nan\n")
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("a,b\n")
    (folder / "twice.csv").write_text("a,a\n1,2\n")
    (folder / "binary.csv").write_bytes(bytes([0xFF, 0xFE, 0x80, 0x81]))
    (folder / "bad.parquet").write_bytes(b"PAR1 no")
    (folder / "weights.pkl").write_bytes(pickle.dumps(Boom(folder / "canary")))
    (folder / "none").mkdir()
    return {
        "cut.npz": "'cut.npz' is damaged or cut short",
        "empty.npz": "'empty.npz' is damaged or cut short",
        "flipped.npz": "'flipped.npz' is damaged or cut short",
        "object.npz": "'object.npz' holds Python objects, which are never read",
        "evil.npz": "'evil.npz' holds Python objects, which are never read",
        "object.npy": "'object.npy' holds Python objects, which are never read",
        "cut.npy": "'cut.npy' is damaged or cut short",
        "empty.npy": "'empty.npy' is damaged or cut short",
        "text.npz": "text.npz",
        "nan.npz": "'x' in nan.npz has NaN or infinite values in 3 rows, the first is row 4",
        "ragged.csv": "'ragged.csv' has 1 columns in line 4 and 2 in the first",
        "hole.csv": "'hole.csv' has nothing in column 'b', line 3",
        "word.csv": "'word.csv' has 'n/a' in column 'b', line 3",
        "nan.csv": "'x' in nan.csv has NaN or infinite values in 1 row, the first is row 1",
        "empty.csv": "'empty.csv' is empty",
        "header.csv": "'header.csv' is empty",
        "twice.csv": "names a column twice",
        "binary.csv": "'binary.csv' is not a text table",
        "bad.parquet": "'bad.parquet' is damaged",
        "weights.pkl": "its ending is .pkl, and data is read from .npz, .npy",
        "none": "no images in the folder",
        "wole.npz": "did you mean 'whole.npz'",
    }


def test_bad_files_are_refused_in_one_sentence_and_run_nothing(tmp_path):
    for name, says in _bad_files(tmp_path).items():
        with pytest.raises(ProbgenError, match=re.escape(says)) as caught:
            load_data(tmp_path / name)
        assert "\n" not in str(caught.value), name
    assert not (tmp_path / "canary").exists()


def test_a_labelled_column_of_words_is_left_out_with_a_warning(tmp_path):
    (tmp_path / "iris.csv").write_text("length,species\n1.5,setosa\n2.5,virginica\n")
    with pytest.warns(UserWarning, match=r"iris\.csv: left out what is not numeric: species"):
        data = load_data(tmp_path / "iris.csv", split=(1, 0, 0))
    assert np.array_equal(data.train["x"], [[1.5], [2.5]])


def test_bad_images_are_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    _write_images(tmp_path / "sizes", [np.zeros((5, 4), np.uint8), np.zeros((4, 4), np.uint8)])
    with pytest.raises(ProbgenError, match=r"'001.png' is 4x4 pixels and '000.png' 4x5"):
        load_data(tmp_path / "sizes")
    _write_images(tmp_path / "cut", [np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)])
    whole = (tmp_path / "cut" / "000.png").read_bytes()
    (tmp_path / "cut" / "000.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProbgenError, match=r"000\.png' is damaged"):
        load_data(tmp_path / "cut")
    (tmp_path / "cut" / "000.png").write_bytes(b"not an image")
    with pytest.raises(ProbgenError, match="is not an image that can be read"):
        load_data(tmp_path / "cut")
    _write_images(tmp_path / "stray" / "cat", [np.zeros((4, 4), np.uint8)])
    image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "stray" / "lost.png")
    with pytest.raises(ProbgenError, match=r"'lost\.png'.*outside the class folders cat"):
        load_data(tmp_path / "stray")


def test_bad_datasets_are_refused():
    class Ragged(Pairs):
        def __getitem__(self, i):
            return np.ones(3 if i < 20 else 2)

    class Triples(Pairs):
        def __getitem__(self, i):
            return 1.0, 2.0, 3.0

    class Holes(Pairs):
        def __getitem__(self, i):
            return np.full(2, np.nan if i == 33 else 1.0)

    class Empty(Pairs):
        def __len__(self):
            return 0

    for source, says in (
        (Ragged(), "shape"),
        (Triples(), "tuple of 3"),
        (Holes(), "the first is row 33"),
        (Empty(), "the Empty is empty"),
        (pytest.importorskip("scipy.sparse").csr_matrix(X), "does not say how many rows"),
    ):
        with pytest.raises(ProbgenError, match=says):
            load_data(source)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    import sys

    for module, name, extra in (("datasets", "hf:someone/mnist", "datasets"), ("pyarrow", "t.parquet", "parquet")):
        (tmp_path / "t.parquet").write_bytes(b"")
        for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ProbgenError, match=re.escape(f"probgen[{extra}]")):
            load_data(name if ":" in name else tmp_path / name)
        monkeypatch.undo()


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 1500))
def test_an_npz_cut_anywhere_never_gives_a_traceback(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    np.savez(folder / "a.npz", x=X)
    whole = (folder / "a.npz").read_bytes()
    (folder / "a.npz").write_bytes(whole[: min(cut, len(whole) - 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ProbgenError, match=r"a\.npz"):
            load_data(folder / "a.npz")
