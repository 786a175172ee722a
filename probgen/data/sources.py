"""Where data comes from: a name, a file, a folder, a Hugging Face dataset, or values already at hand.

`read(source)` gives the tables it finds, keyed "all" (one set) or "train", "valid", "test". No pickle is ever read.
"""

from __future__ import annotations

import gzip
import importlib.util
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probgen.data import images, tabular, toys
from probgen.data.tables import Arrays, Fetched, Table, as_array, map_style
from probgen.errors import ProbgenError, did_you_mean

_SPLITS = ("train", "valid", "test")
_SUFFIXES = (".npz", ".npy", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Found:
    """What a source holds: its tables, its name, and whether it came from a name or a file."""

    tables: Mapping[str, Table]
    name: str
    from_file: bool = True
    log_prob: Callable[[np.ndarray], np.ndarray] | None = None


def read(source: Any) -> Found:
    """The tables of any source that `load_data` takes."""
    if isinstance(source, str | Path):
        return _read_text(str(source))
    if isinstance(source, Mapping) and source and set(source) <= set(_SPLITS):
        tables = {split: plain(value) for split, value in source.items()}
        return Found(_with_train(tables, "the mapping"), "data", from_file=False)
    if isinstance(source, Mapping):
        return Found(by_split(source, "the data"), "data", from_file=False)
    return Found({"all": plain(source)}, "data", from_file=False)


def plain(source: Any, only: str = "x") -> Table:
    """A table over values at hand; a single array is named `only`."""
    if isinstance(source, str | Path):
        raise ProbgenError(f"{str(source)!r} is a name or a path: read it with `probgen.load_data` first")
    if hasattr(source, "read") and hasattr(source, "shapes"):
        return source
    if hasattr(source, "features") and hasattr(source, "with_format"):
        return _hugging_face_table(source, "the dataset")
    if hasattr(source, "columns") and hasattr(source, "to_numpy"):
        columns = {str(name): source[name].to_numpy() for name in source.columns}
        return Arrays(tabular.from_columns(columns, "the data frame"), "the data frame")
    if isinstance(source, Mapping):
        return Arrays(source, "the data")
    if isinstance(source, np.ndarray) or hasattr(source, "__array__") or _is_numbers(source):
        return Arrays({only: source}, "the data")
    if isinstance(source, tuple) and len(source) == 2:
        return Arrays(dict(zip(("x", "y"), source, strict=True)), "the data")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return map_style(source, f"the {type(source).__name__}")
    raise ProbgenError(
        f"cannot read data from a {type(source).__name__}: give a name, a path, an array, a mapping of arrays, or an "
        "object with `len` and `[i]`"
    )


def by_split(arrays: Mapping[str, Any], where: str) -> dict[str, Table]:
    """Tables of arrays named `x_train`, `x_valid`, `x_test`, ..., or one table of bare names."""
    named = {name: str(name).rpartition("_") for name in arrays}
    suffixed = {name: (base, end) for name, (base, _, end) in named.items() if base and end in _SPLITS}
    if not suffixed:
        return {"all": Arrays(arrays, where)}
    bare = [name for name in arrays if name not in suffixed]
    if bare:
        raise ProbgenError(
            f"{where} holds {bare[0]!r} beside {next(iter(suffixed))!r}: name every array `NAME_train`, "
            "`NAME_valid` or `NAME_test`, or none"
        )
    sets: dict[str, dict[str, Any]] = {}
    for name, (base, end) in suffixed.items():
        sets.setdefault(end, {})[base] = arrays[name]
    return _with_train({end: Arrays(values, _part(end, where)) for end, values in sets.items()}, where)


def _part(split: str, where: str) -> str:
    return where if split == "train" else f"{where} ({split})"


def _with_train(tables: dict[str, Table], where: str) -> dict[str, Table]:
    if "train" not in tables:
        raise ProbgenError(f"{where} has no training rows, only {', '.join(tables)}: add `x_train`")
    return tables


def _is_numbers(source: Any) -> bool:
    """Whether a list (of lists) is numbers alone, so that it is one array."""
    if not isinstance(source, list) or not source:
        return isinstance(source, list)
    return isinstance(source[0], int | float | bool) or (isinstance(source[0], list) and _is_numbers(source[0]))


def _read_text(source: str) -> Found:
    if source == "digits":
        return Found({"all": Arrays(_digits(), "digits", {"y": 10})}, source)
    if source in toys.TOYS:
        toy = toys.TOYS[source]
        return Found({"all": Arrays({"x": toy.sample(toys.ROWS, seed=0)}, source)}, source, log_prob=toy.log_prob)
    if source.startswith("hf:"):
        return _hugging_face(source.removeprefix("hf:"))
    return _read_path(Path(source).expanduser(), source)


def _digits() -> dict[str, np.ndarray]:
    """The 1,797 handwritten 8x8 digits (0..16) in scikit-learn's own file.

    Read from that file, since `import sklearn.datasets` alone takes most of a second.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ProbgenError("`digits` lies in scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return {"x": table[:, :-1].reshape(-1, 8, 8), "y": table[:, -1].astype(np.int64)}


def _read_path(path: Path, source: str) -> Found:
    if not path.exists():
        raise ProbgenError(_not_found(path, source))
    name = path.stem if path.is_file() else path.name
    if path.is_dir():
        mapped = sorted(path.glob("*.npy"))
        if mapped:
            return Found(by_split({file.stem: _npy(file) for file in mapped}, str(path)), name)
        return Found(images.folder(path), name)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return Found(by_split(_npz(path), path.name), name)
    if suffix == ".npy":
        return Found({"all": Arrays({"x": _npy(path)}, path.name)}, name)
    if suffix in (".csv", ".tsv"):
        return Found({"all": Arrays(tabular.read_csv(path), path.name)}, name)
    if suffix == ".parquet":
        return Found({"all": Arrays(tabular.read_parquet(path), path.name)}, name)
    raise ProbgenError(
        f"cannot read {path.name!r}: its ending is {suffix or 'missing'}, and data is read from "
        f"{', '.join(_SUFFIXES)}, a folder of images, or `hf:NAME`"
    )


def _not_found(path: Path, source: str) -> str:
    names = ("digits", *toys.TOYS)
    if not path.suffix and len(path.parts) == 1:
        return f"there is no data named {source!r} and no such file{did_you_mean(source, names)}"
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, beside)
    return f"there is no file or folder {source!r}{hint if 'mean' in hint else ': check the path'}"


_DAMAGE = (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if isinstance(file, np.ndarray):
                return {"x": file}
            arrays = {name: file[name] for name in file.files}
    except _DAMAGE as error:
        raise ProbgenError(_damage(path, error, "np.savez")) from error
    other = [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]
    if other:  # another kind of zip, such as what torch.save writes
        raise ProbgenError(f"{path.name!r} holds {other[0]!r}, which is no array: save plain arrays with `np.savez`")
    return arrays


def _npy(path: Path) -> np.ndarray:
    """Mapped, not read; `Arrays` reads it when it is small."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGE as error:
        raise ProbgenError(_damage(path, error, "np.save")) from error


def _damage(path: Path, error: Exception, writer: str) -> str:
    if "pickle" in str(error) or "Python objects" in str(error):
        return f"{path.name!r} holds Python objects, which are never read: save plain number arrays with `{writer}`"
    return f"{path.name!r} is damaged or cut short ({_brief(error)}): write it again with `{writer}`"


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text[:100]}..." if len(text) > 100 else text or type(error).__name__


def _hugging_face(name: str) -> Found:
    datasets = tabular.need("datasets", "datasets", f"`hf:{name}`")
    path = Path(name).expanduser()
    saved = [path / "dataset_dict.json", path / "state.json"]
    try:
        loaded = datasets.load_from_disk(str(path)) if any(p.exists() for p in saved) else datasets.load_dataset(name)
    except Exception as error:  # its own errors, the network's and those of every file format it reads
        raise ProbgenError(
            f"`hf:{name}` could not be read ({_brief(error)}): check the name or the folder, and the network"
        ) from error
    label = path.name
    if not isinstance(loaded, Mapping):
        return Found({"all": _hugging_face_table(loaded, f"hf:{name}")}, label)
    known = {"validation": "valid", "val": "valid", "dev": "valid"}
    sets = {known.get(split, split): part for split, part in loaded.items()}
    tabular.warn_left_out(
        [split for split in sets if split not in _SPLITS], f"hf:{name}", "a train, valid or test split"
    )
    tables = {s: _hugging_face_table(sets[s], _part(s, f"hf:{name}")) for s in _SPLITS if s in sets}
    return Found({"all": tables["train"]} if list(tables) == ["train"] else _with_train(tables, f"hf:{name}"), label)


def _hugging_face_table(dataset: Any, where: str) -> Table:
    """Columns by their own names; `image` is x and `label` is y; text is left out."""
    if not len(dataset):
        raise ProbgenError(f"{where} is empty: give it at least one row")
    first = _columns(dataset.with_format(None)[[0]], dataset.features, where)
    kept = [name for name, values in first.items() if tabular.is_numeric(values)]
    tabular.warn_left_out([name for name in dataset.column_names if name not in kept], where)
    narrowed = dataset.with_format(None).select_columns(kept)
    counts = {name: getattr(dataset.features[name], "num_classes", None) for name in kept}
    labels = [count for name, count in counts.items() if count and tabular.is_label(name)]
    classes = {"y": labels[0]} if labels else {}

    def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
        return tabular.from_columns(_columns(narrowed[indices.tolist()], dataset.features, where), where)

    return Fetched(fetch, len(dataset), where, fixed=True, classes=classes).settled()


def _columns(batch: Mapping[str, list], features: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Lists of numbers, lists or images as arrays; what is not numbers becomes text, to be left out."""
    columns = {}
    for name, values in batch.items():
        if isinstance(values[0], str | bytes | dict | type(None)) or np.asarray(values[0]).dtype.kind not in "biuf":
            columns[name] = np.array(["text"])
            continue
        plain = isinstance(values[0], int | float | list)
        array = as_array(values if plain else [np.asarray(value) for value in values], name, where)
        columns[name] = array.astype(_number_dtype(features[name]) or array.dtype, copy=False)
    return columns


def _number_dtype(feature: Any) -> np.dtype | None:
    """The numpy dtype that a dataset declares for a column (of lists), None for an image."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    try:
        found = np.dtype(getattr(feature, "dtype", "O"))
    except TypeError:
        return None
    return found if found.kind in "biuf" else None
