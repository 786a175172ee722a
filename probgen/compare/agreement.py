"""What runs must have in common to stand in one table, and in one sentence what they do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from probgen.data import SPLITS, Data, load_data
from probgen.errors import ProbgenError
from probgen.pictures.material import shown_array


def labelled(runs: Iterable[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Runs by label: the keys of a mapping, else their names, with their folders or a number where these are equal."""
    pairs = list(runs.items()) if isinstance(runs, Mapping) else [(None, run) for run in _listed(runs)]
    if not pairs:
        raise ProbgenError("compare: there are no runs; give some, e.g. compare([vae, made])")
    for _, run in pairs:
        if not hasattr(run, "preparation"):
            raise ProbgenError(f"compare takes runs, and {run!r} is none: open it first, Run.open(path)")
    names = [str(run.name if label is None else label) for label, run in pairs]
    found: dict[str, Any] = {}
    for name, (_, run) in zip(names, pairs, strict=True):
        label = name
        if names.count(name) > 1 and run.path is not None and run.path.name != name:
            label = f"{name} ({run.path.name})"
        number = 1
        while label in found:
            number += 1
            label = f"{name} #{number}"
        found[label] = run
    return found


def _listed(runs: Any) -> list[Any]:
    if isinstance(runs, str) or not isinstance(runs, Iterable):
        return [runs]
    return list(runs)


def agreed_data(runs: Mapping[str, Any], data: Any = None) -> Data:
    """The data that every run was trained on, split alike; `data` where no run finds them again."""
    (first, one), *others = runs.items()
    for label, run in others:
        if _fingerprint(run) != _fingerprint(one):
            raise ProbgenError(
                f"compare: {_difference(first, one, label, run)}; fit them on the same data and split, or compare them apart"
            )
    found = load_data(data) if data is not None else next((r.data for r in runs.values() if r.data is not None), None)
    if found is None:
        raise ProbgenError("compare: the data of these runs cannot be found again: say where they lie, with `data`")
    if found.fingerprint != _fingerprint(one):
        raise ProbgenError(
            f"compare: the runs were trained on {_words(one)}, and the data given are not these: give those data"
        )
    if not len(found.test):
        raise ProbgenError(
            f"compare: {found.name} has no test rows, so nothing is held out: fit on data with a test split, "
            "e.g. load_data(x, split=(0.8, 0.1, 0.1))"
        )
    return found


def _fingerprint(run: Any) -> str:
    return run.config["data"]["fingerprint"]


def _difference(first: str, one: Any, second: str, other: Any) -> str:
    """How the data of two runs differ, the plainest difference first."""
    shapes = [{n: tuple(s.shape) for n, s in run.spec.items()} for run in (one, other)]
    if set(shapes[0]) != set(shapes[1]):
        arrays = [", ".join(map(repr, sorted(each))) for each in shapes]
        return f"the data of {first!r} hold {arrays[0]}, those of {second!r} {arrays[1]}"
    for name in shapes[0]:
        if shapes[0][name] != shapes[1][name]:
            here, there = (list(each[name]) for each in shapes)
            return f"{name!r} has rows of shape {here} in the data of {first!r} ({one.config['data']['name']}) and {there} in those of {second!r} ({other.config['data']['name']})"
    if one.config["data"]["name"] != other.config["data"]["name"] or _rows(one) != _rows(other):
        return f"{first!r} was trained on {_words(one)} and {second!r} on {_words(other)}"
    return (
        f"{first!r} and {second!r} were trained on {_words(one)} each, but of other values or split in another way "
        f"(fingerprints {_fingerprint(one)[:8]} and {_fingerprint(other)[:8]})"
    )


def _rows(run: Any) -> list[int]:
    return [run.config["data"]["rows"][split] for split in SPLITS]


def _words(run: Any) -> str:
    counts = ", ".join(f"{n:,} {split}" for n, split in zip(_rows(run), SPLITS, strict=True))
    return f"{run.config['data']['name']} ({counts} rows)"


def agreed_array(runs: Mapping[str, Any]) -> str:
    """The data array that every run draws, in which samples are compared."""
    (first, one), *others = runs.items()
    name = shown_array(one)
    for label, run in others:
        if shown_array(run) != name:
            raise ProbgenError(
                f"compare: {first!r} draws {name!r} and {label!r} draws {shown_array(run)!r}, so their samples do not compare: "
                "compare programs of the same array"
            )
    return name
