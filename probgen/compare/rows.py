"""One run's part of a comparison: likelihood, samples against held-out rows, time, size; and the protocol of all."""

from __future__ import annotations

import datetime
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.blame import blaming
from probgen.compare.likelihoods import LIKELIHOOD, estimates, measure_of, why_none
from probgen.data import SPLITS, Data
from probgen.data.steps import Binarize
from probgen.data.toys import TOYS
from probgen.document import versions
from probgen.energy import Langevin
from probgen.energy.requirements import weighs_its_data
from probgen.errors import ProbgenError
from probgen.evaluate import data_dims, evaluate
from probgen.evaluate.modes import mode_coverage
from probgen.evaluate.probability_flow import EXACT_UP_TO, ROWS
from probgen.evaluate.quality import quality
from probgen.pictures import material
from probgen.summary import prepared_by

MOST = 10_000  # real rows of each set that are read for the distances
SPLIT = "test"


@dataclass(frozen=True)
class Against:
    """What runs are held against: `rows` for likelihoods, arrays `real` (test) and `other` (train) for samples."""

    array: str
    rows: Any
    test: Any
    real: np.ndarray
    other: np.ndarray
    labels: np.ndarray | None
    samples: int
    modes: str | None = None  # a toy whose modes are known

    @classmethod
    def of(cls, data: Data, array: str, rows: int | None, samples: int, seed: int) -> Against:
        """Of data with test rows."""
        first = data.test.take(np.arange(min(len(data.test), rows or len(data.test))))
        real = data.test[material.choose(data.test, MOST, seed)][array]
        other = data.train[material.choose(data.train, MOST, seed)]
        labels = other["y"] if "y" in data.spec and data.spec["y"].classes else None
        n = min(samples, len(real), len(other[array]))
        modes = data.source if data.source in TOYS and TOYS[data.source].centres is not None else None
        return cls(array, first, data.test, np.asarray(real), np.asarray(other[array]), labels, n, modes)


def described(label: str, run: Any, against: Against, k: int, seed: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """All numbers of one run, and its draws where there are any; under `measures` what its likelihood is of."""
    undefined: dict[str, str] = {}
    likelihood = _likelihood(run, against, k, seed, undefined)
    distances, drawn = _samples(run, against, seed, undefined)
    seconds = [s for s in run.metrics.get("seconds", ()) if s is not None and math.isfinite(s)]
    if not seconds:
        undefined["seconds_to_train"] = "how long the fit took was not kept with the run"
    return {
        "label": label,
        **_origin(run),
        **likelihood,
        **distances,
        "seconds_to_train": seconds[-1] if seconds else None,
        "parameters": int(sum(np.size(value) for value in run.params.values())),
        "posterior": _posterior(run),
        "undefined": undefined,
    }, drawn


def _origin(run: Any) -> dict[str, Any]:
    """What the run is and how it came about."""
    config = run.config
    return {
        "name": run.name,
        "path": None if run.path is None else str(run.path),
        "command": run.command,
        "options": {name: plain(value) for name, value in config["program"]["options"].items()},
        "by": config["by"],
        "backend": config["backend"],
        "kind": run.structure.kind,
        "prepare": prepared_by(run.preparation.to_json()),
        "steps": run.step,
        "finished": run.finished,
        "trained_on": {
            "device": config["device"],
            "compiled": config["compiled"],
            "versions": dict(config["versions"]),
        },
    }


def _likelihood(run: Any, against: Against, k: int, seed: int, undefined: dict[str, str]) -> dict[str, Any]:
    nothing = {"likelihood_of": None, "estimates": [], "trust": {}, "notes": [], "measures": []}
    try:
        with blaming(run.program, {name: spec.shape for name, spec in run.spec.items()}):
            numbers = evaluate(run.trained, run.preparation, against.rows, run.spec, k=k, seed=seed, split=SPLIT)
    except ProbgenError as error:
        undefined[LIKELIHOOD] = str(error)
        return nothing
    dims = data_dims(run.trained, run.preparation, run.spec)
    ode_rows = ROWS["exact" if dims <= EXACT_UP_TO else "hutchinson"]
    found = plain(estimates(numbers, run.trained, dims, len(against.rows), ode_rows))
    if LIKELIHOOD not in numbers:
        undefined[LIKELIHOOD] = why_none(numbers)
    if not found:
        return nothing
    measure = measure_of(run.structure, run.preparation, run.spec)
    said = [str(note) for note in numbers["notes"] if not str(note).startswith(("reconstruction", "active_units"))]
    said = [note for note in said if note != undefined.get(LIKELIHOOD)]
    kept = {name: plain(numbers[name]) for name in ("k_hat", "k_hat_above_0.7", "ess") if name in numbers}
    return {"likelihood_of": measure["name"], "estimates": found, "trust": kept, "notes": said, "measures": [measure]}


def _samples(
    run: Any, against: Against, seed: int, undefined: dict[str, str]
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Distances of draws, and the time of one: that of the second of two equal calls, so that no compiling is in it."""
    nothing = {"seconds_a_sample": None, "quality": None, "modes": None, "sampler": None}
    if against.labels is None:
        undefined["fd_classifier"] = "the data have no labels `y` to train a classifier on"
    if against.modes is None:
        undefined["modes"] = "the data are no toy whose modes are known"
    try:
        draw = lambda: material.drawn_data(run, against.samples, against.array, against.test, seed)  # noqa: E731
        draw()
        began = time.perf_counter()
        drawn = draw()
        seconds = (time.perf_counter() - began) / against.samples
    except ProbgenError as error:
        return nothing, _without(undefined, str(error), "seconds_a_sample")
    sampler = repr(Langevin()) if weighs_its_data(run.structure) else "the program itself"
    found = {**nothing, "seconds_a_sample": seconds, "sampler": sampler}
    wrong = int(np.sum(~np.isfinite(drawn).reshape(len(drawn), -1).all(axis=1)))
    if wrong:
        return found, _without(undefined, f"{wrong} of {len(drawn)} samples are not finite")
    if against.modes is not None:
        found["modes"] = plain(mode_coverage(drawn.reshape(len(drawn), -1), against.modes))
    try:
        found["quality"] = plain(_distances(drawn, against, seed))
    except ProbgenError as error:
        _without(undefined, str(error))
    return found, drawn


def _without(undefined: dict[str, str], why: str, *names: str) -> None:
    """Say why there are no draws to measure, where nothing is said yet."""
    for name in ("fd_classifier", "sliced_wasserstein", "modes", *names):
        undefined.setdefault(name, why)


def _distances(drawn: np.ndarray, against: Against, seed: int) -> dict[str, float]:
    return quality(drawn, against.real, against.other, against.labels, seed=seed, rows=against.samples)


def floors(runs: Iterable[Any], against: Against, seed: int) -> list[dict[str, Any]]:
    """The distances of real rows to the test rows: as they are, and as each `Binarize` leaves them."""
    kept: dict[str, Any] = {"training rows": None}
    for run in runs:
        chain = run.preparation.steps.get(against.array, ())
        bits = [step for step in chain if isinstance(step, Binarize)]
        if bits:
            how = f"threshold {bits[0].threshold:.4g}" if not bits[0].stochastic else "drawn by their brightness"
            kept.setdefault(f"training rows as bits ({how})", run.preparation)
    found = []
    for label, preparation in kept.items():
        rows = against.other
        if preparation is not None:
            seen = preparation.forward({against.array: rows}, np.random.default_rng(seed))[0]
            rows = preparation.inverse(seen)[against.array]
        try:
            distances = _distances(rows, against, seed)
        except ProbgenError:  # the runs' own lines say why
            continue
        found.append(
            {"label": label, "quality": plain({n: v for n, v in distances.items() if not n.endswith("_floor")})}
        )
    return found


def _posterior(run: Any) -> str | None:
    """What gives draws of the latents of a row: its guide, an exact sum, or draws of NUTS; None where nothing does."""
    structure = run.structure
    if getattr(run.trained, "draws", None) is not None:
        return "draws"
    if structure.sampled:
        return "guide"
    return "exact" if structure.enumerated else None


def protocol(data: Data, against: Against, k: int, seed: int) -> dict[str, Any]:
    """How all runs were measured."""
    torch = sys.modules.get("torch")
    sizes = {split: len(getattr(data, split)) for split in SPLITS}
    return {
        "data": {"name": data.name, "source": data.source, "fingerprint": data.fingerprint, "rows": sizes},
        "protocol": {
            "split": SPLIT,
            "rows": len(against.rows),
            "k": k,
            "seed": seed,
            "array": against.array,
            "samples": against.samples,
            "device": "cpu",
            "threads": os.environ.get("OMP_NUM_THREADS") if torch is None else torch.get_num_threads(),
            "cores": os.cpu_count(),
            "versions": {"python": platform.python_version(), **versions()},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    }


def plain(value: Any) -> Any:
    """The same in values that JSON has: what is not finite is None."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else str(value)
