"""A `Run`: what `fit` returns, and what a run folder opens as.

    run.sample(64)["x"]     run.posterior(data.test)     run.evaluate(data.test)     run.report()
    run.model, run.guide, run.params, run.modules        # trained PPL callables

Numbers, curves and settings are read without running code; the first verb that needs the program builds it.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from probgen import zoo
from probgen.blame import blaming
from probgen.data import as_rows, load_data
from probgen.data.prepare import Preparation
from probgen.data.rows import ArraySpec, Specs
from probgen.errors import ProbgenError
from probgen.folder import CONFIG, SOURCE, Folder
from probgen.folder.weights import load as load_arrays
from probgen.folder.weights import save as save_arrays
from probgen.nuts.draws import Draws
from probgen.program import Origin, Program, Structure, backend_of, needed

if TYPE_CHECKING:
    from probgen.data import Data

FORMAT = 1
EXAMPLE, EVALUATION, POSTERIOR = "example.safetensors", "evaluation.json", "posterior.nc"
HISTORY = "history/"  # before the names of the parameters that an engine exports for every step
_REPEATED = (
    "steps", "batch_size", "lr", "optimizer", "schedule", "clip", "ema", "patience", "seed", "precision", "device", "compile",
)  # fmt: skip
_PARTS = {
    "name": (), "program": ("name", "path", "options", "seed"), "by": (), "by_given": (), "spec": (), "prepare": (),
    "data": ("name", "source", "fingerprint", "rows"), "options": _REPEATED,
}  # fmt: skip
_PACKAGES = ("probgen", "numpy", "torch", "pyro-ppl", "jax", "numpyro")

T = TypeVar("T")


def described(
    program: Program, data: Data, preparation: Preparation, options: Any, engine: Any, by_given: str | None
) -> dict[str, Any]:
    """The plain values that `config.yaml` keeps: all that names this run and would repeat it."""
    origin = program.origin
    return {
        "format": FORMAT,
        "name": origin.name,
        "program": {"name": origin.name, "path": origin.path, "options": dict(origin.options), "seed": origin.seed},
        "by": loss_text(program),
        "by_given": by_given,
        "backend": backend_of(program).__name__,
        "data": {
            "name": data.name,
            "source": data.source,
            "fingerprint": data.fingerprint,
            "rows": {split: len(getattr(data, split)) for split in ("train", "valid", "test")},
        },
        "spec": {name: {**spec.to_json(), "mean": None} for name, spec in data.spec.items()},
        "prepare": preparation.to_json(),
        "options": {**_plain_options(options)},
        "device": engine.device if isinstance(engine.device, str) else str(engine.device),
        "compiled": bool(engine.compiled),
        "note": engine.note,
        "versions": _versions(),
    }


def loss_text(program: Program) -> str | None:
    """A probgen loss as the text that makes it again; None for losses of the PPL and functions."""
    return repr(program.by) if hasattr(program.by, "players") else None


def _plain_options(options: Any) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in asdict(options)}
    schedule = values["schedule"]
    optimizer = optimizer_text(values["optimizer"])
    return {**values, "schedule": None if schedule is None else repr(schedule), "optimizer": optimizer}


def optimizer_text(value: Any) -> Any:
    """An optimizer as a file can hold it: names as they are, by player or for all; other values by what they print.

    Addresses are left out, so that the same optimizer has the same text in every process.
    """
    if isinstance(value, Mapping):
        return {player: optimizer_text(own) for player, own in value.items()}
    return value if value is None or isinstance(value, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Run:
    """A trained program: its numbers and curves, its trained callables, and the verbs on them.

    Made by `probgen.fit` and `Run.open`. `data` is the `Data` it was trained on, where it can be found again.
    """

    def __init__(
        self,
        program: Program | None,
        config: Mapping[str, Any],
        weights: Mapping[str, np.ndarray] | None,
        example: Mapping[str, np.ndarray] | None,
        rows: list[dict[str, Any]],
        *,
        data: Data | None = None,
        folder: Folder | None = None,
        structure: Structure | None = None,
        history: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._program, self._weights, self._example, self._rows = program, weights, example, rows
        self._data, self._structure, self._history = data, structure, history
        self.config, self.folder = dict(config), folder
        self._evaluation: dict[str, Any] | None = None
        if data is not None:
            self.spec = data.spec

    @classmethod
    def open(cls, path: str | Path, program: Program | None = None) -> Run:
        """The run in a folder. `program` is needed for one that was written in a notebook."""
        folder = Folder.open(path)
        config = folder.config
        if config.get("format") != FORMAT:
            raise ProbgenError(
                f"{path} has format {config.get('format')!r} where this probgen reads {FORMAT}: install a newer probgen"
            )
        run = cls(program, config, None, None, folder.metrics(), folder=folder)
        for part, keys in _PARTS.items():
            run.read(part, lambda value, keys=keys: [value[key] for key in keys])
        return run

    def read(self, part: str, make: Callable[[Any], T]) -> T:
        """What `make` makes of a part of `config.yaml`; raises ProbgenError where that is not what `fit` wrote."""
        where = "the configuration" if self.path is None else self.path / CONFIG
        try:
            return make(self.config[part])
        except ProbgenError as error:
            raise ProbgenError(f"{where}: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ProbgenError(
                f"{where} is not what a fit writes: `{part}` is missing or has another form; restore it from a copy, "
                "or fit again"
            ) from error

    # -- what it is -----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The program's name."""
        return self.config["name"]

    @property
    def path(self) -> Path | None:
        """The run's folder, if it has one."""
        return None if self.folder is None else self.folder.path

    @property
    def options(self) -> dict[str, Any]:
        """How it was trained."""
        return self.config["options"]

    @property
    def step(self) -> int:
        """The last step of the curves."""
        return int(self._rows[-1]["step"]) if self._rows else 0

    @property
    def finished(self) -> bool:
        """Whether it ran to its last step, or was stopped early by `patience`."""
        if self.folder is None:
            return True
        checkpoint = self.folder.last_checkpoint()
        return checkpoint is not None and bool(checkpoint[2]["finished"])

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The curves: `step`, `loss`, `valid_loss`, `lr`, `grad_norm`, `term/<site>`, ... as lists."""
        names = dict.fromkeys(name for row in self._rows for name in row)
        return {name: [row.get(name, float("nan")) for row in self._rows] for name in names}

    @property
    def history(self) -> dict[str, np.ndarray]:
        """Parameters before the first step and after each, [steps + 1, ...], by name; empty unless learned by EM."""
        if self._history is None and self.folder is not None:
            checkpoint = self.folder.last_checkpoint()
            state = {} if checkpoint is None else checkpoint[1]
            prefix = f"state/{HISTORY}"
            self._history = {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
        return dict(self._history or {})

    @cached_property
    def draws(self) -> Draws | None:
        """What NUTS drew, chain by chain; None where the program was learned another way."""
        if not str(self.config["by"]).startswith("NUTS("):
            return None
        return Draws.of(self.folder.weights() if self._weights is None else self._weights)

    @cached_property
    def agreed_draws(self) -> tuple[Draws | None, list[str]]:
        """`draws` with the components of a mixture renumbered so that they agree, and sentences that say so."""
        from probgen.components.relabel import agreed

        return (None, []) if self.draws is None else agreed(self.trained, self.draws)

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The numbers of the last `evaluate`, with their protocol."""
        if self._evaluation is None and self.folder is not None and EVALUATION in self.folder:
            self._evaluation = self.folder.read_json(EVALUATION)
        return self._evaluation

    @cached_property
    def spec(self) -> dict[str, ArraySpec]:
        """What the data's arrays look like."""
        means = {n.removeprefix("mean/"): a for n, a in self._beside.items() if n.startswith("mean/")}
        specs = self.read("spec", lambda kept: {name: ArraySpec.from_json(spec) for name, spec in kept.items()})
        return Specs({name: replace(spec, mean=means.get(name)) for name, spec in specs.items()})

    @cached_property
    def _beside(self) -> dict[str, np.ndarray]:
        """What lies in the folder beside the weights: an example batch and the means of the data."""
        if self.folder is None:
            return {}
        return load_arrays(self.folder.read_bytes(EXAMPLE), self.folder.path / EXAMPLE)[0]

    @cached_property
    def preparation(self) -> Preparation:
        """What was done to the raw values, with its constants."""
        return self.read("prepare", Preparation.from_json)

    @property
    def data(self) -> Data | None:
        """The data it was trained on: as given to `fit`, or read again by name when the run was opened."""
        return self._data if self._data is not None else self._read_again

    @cached_property
    def _read_again(self) -> Data | None:
        kept = self.config["data"]
        try:
            found = None if kept["source"] is None else load_data(kept["source"])
        except ProbgenError:  # moved or gone: the verbs that need data say so
            return None
        return found if found is not None and found.fingerprint == kept["fingerprint"] else None

    @property
    def command(self) -> str:
        """The command that repeats it."""
        program, data = self.config["program"], self.config["data"]
        model = program["name"] if program["path"] is None or _in_zoo(program) else program["path"]
        options = {**program["options"], "by": self.config["by_given"]}
        options |= {name: self.options[name] for name in _REPEATED if self.options[name] is not None}
        if re.search(r"[<(]", str(options.get("optimizer"))):
            del options["optimizer"]  # a value that no command line can say: the program's own
        words = ["probgen", "fit", str(model), "--data", data["source"] or data["name"]]
        for name, value in options.items():
            words += (
                [] if value is None else [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
            )
        return shlex.join(words)

    def __repr__(self) -> str:
        loss = f", loss {self._rows[-1]['loss']:.4f}" if self._rows else ""
        where = f", {self.path}" if self.path else ""
        return f"Run({self.name!r}, step {self.step}{loss}{where})"

    def _repr_html_(self) -> str:
        from probgen.summary import summary_html

        return summary_html(self)

    # -- the program, trained -------------------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """The program: as given, or built again from the zoo's file or the copy in the folder."""
        if self._program is None:
            self._program = _rebuilt(self.folder, self.config, self.spec)
        return self._program

    @cached_property
    def trained(self) -> Any:
        """The trained program as the verbs see it."""
        weights, example = self._weights, self._example
        if weights is None:
            weights = self.folder.weights()
        if example is None:
            example = {n.removeprefix("example/"): a for n, a in self._beside.items() if n.startswith("example/")}
        with self._told():
            return backend_of(self.program).trained_of(
                self.program,
                weights,
                example,
                rows=self.config["data"]["rows"]["train"],
                device="cpu",
                precision=self.options["precision"],
                seed=self.options["seed"],
            )

    @property
    def structure(self) -> Structure:
        """Sites, plates and parents."""
        return self._structure if self._structure is not None else self.trained.structure

    @property
    def model(self) -> Any:
        """The trained model, a callable of the PPL."""
        return self.trained.model

    @property
    def guide(self) -> Any:
        """The trained guide, a callable of the PPL."""
        return self.trained.guide

    @property
    def params(self) -> dict[str, np.ndarray]:
        """Parameters by name, constrained as the program sees them."""
        return self.trained.params

    @property
    def modules(self) -> dict[str, Any]:
        """The program's networks, trained."""
        return self.trained.modules

    # -- verbs ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int = 1,
        seed: int = 0,
        given: Mapping[str, Any] | None = None,
        prior: bool = False,
        sampler: Any = None,
    ) -> dict[str, np.ndarray]:
        """`n` draws of every site of the model, data sites in the data's own units; by a `sampler` of the data alone."""
        from probgen.sample import sample

        with self._told():
            return sample(
                self.trained, self.preparation, self.spec, n, seed=seed, given=given, prior=prior, sampler=sampler
            )

    def posterior(
        self, data: Any = None, draws: int = 100, rows: int = 1000, seed: int = 0, predictive: bool = False
    ) -> Any:
        """Draws of the latents given rows of data, as ArviZ groups; kept as `posterior.nc` if there is a folder.

        Of NUTS at most `draws` of every chain; the file, which holds all of them, is then replaced by no smaller part.
        With `predictive`, data drawn at each draw of the latents.
        """
        from probgen.posterior import posterior

        with self._told():
            tree = posterior(
                self.trained, self.preparation, self._rows_of(data), draws=draws, max_rows=rows, seed=seed,
                predictive=predictive, spec=self.spec,
            )  # fmt: skip
        kept = getattr(self.trained, "draws", None)
        if self.folder is not None and (kept is None or tree["posterior"].sizes["draw"] == kept.length):
            with self.folder.writer():
                self.folder.write_with(POSTERIOR, lambda path: tree.to_netcdf(path))
        return tree

    def assignments(self, data: Any = None, draws: int = 100, seed: int = 0) -> Any:
        """p(z_n = k | x_n) of every enumerated latent of a row, as an xarray Dataset."""
        from probgen.components.assignments import assignments

        with self._told():
            return assignments(self.trained, self.preparation, self._rows_of(data), draws=draws, seed=seed)

    def evaluate(self, data: Any = None, k: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Likelihood, its errors and diagnostics on held-out rows; kept as `evaluation.json` if there is a folder."""
        from probgen.evaluate import evaluate

        rows = self._rows_of(data)
        with self._told():
            numbers = evaluate(self.trained, self.preparation, rows, self.spec, k=k, seed=seed, split=self._split(rows))
        self._evaluation = numbers
        if self.folder is not None:
            with self.folder.writer():
                self.folder.write_json(EVALUATION, numbers)
        return numbers

    def log_likelihood(self, data: Any = None, k: int = 1000, seed: int = 0) -> Any:
        """log p(x_n) of each row as an xarray Dataset: exact where it is known, else by `k` importance weights."""
        from probgen.evaluate import log_likelihood

        with self._told():
            return log_likelihood(self.trained, self.preparation, self._rows_of(data), self.spec, k, seed)

    def evidence(
        self, data: Any = None, k: Sequence[int] = (10, 100, 1000, 10_000, 100_000), rows: int = 100, seed: int = 0
    ) -> Any:
        """log p(x) by prior sampling beside importance weights, for growing numbers of draws; of at most `rows` rows."""
        from probgen.evaluate.evidence import evidence

        together = data is None and self.data is not None and self.structure.has_global_latents
        chosen = self._rows_of(self.data.train if together else data)
        if not self.structure.has_global_latents:
            chosen = chosen.take(np.arange(min(rows, len(chosen))))
        with self._told():
            return evidence(self.trained, self.preparation, chosen, k=k, seed=seed)

    def calibration(self, data: Any = None, **options: Any) -> Any:
        """Simulation-based calibration: whether the posteriors hold the truth as often as they say."""
        from probgen.calibration import calibration

        with self._told():
            return calibration(self, data, **options)

    def probability(self, event: Callable[[Mapping[str, np.ndarray]], Any], n: int = 100_000, **options: Any) -> Any:
        """P(event), or P(event | known entries) with `given`, as an `Estimate`; a score makes rare events reachable."""
        from probgen.sample.probability import probability

        with self._told():
            return probability(self.trained, self.preparation, self.spec, event, n, **options)

    def expectation(self, function: Callable[[Mapping[str, np.ndarray]], Any], n: int = 100_000, **options: Any) -> Any:
        """The mean of a function of the draws, as an `Estimate`; `seed`, `given` and `prior` are those of `sample`."""
        from probgen.sample.probability import expectation

        with self._told():
            return expectation(self.trained, self.preparation, self.spec, function, n, **options)

    def report(self, path: str | Path | None = None) -> Path:
        """Write `report.html`, one file that shows the run, and return its path."""
        from probgen.report import write

        return write(self, path)

    def save(self, path: str | Path) -> Path:
        """Write the run to a new folder, from which `Run.open` reads it."""
        folder = Folder.create(path)
        with folder.writer():
            write_description(folder, self.program, self.config, self._example_arrays(), self.spec)
            for row in self._rows:
                folder.append_metrics(row)
            weights = self._weights if self._weights is not None else self.folder.weights()
            info = {"step": self.step, "row_step": self.step, "best": {}, "seconds": 0.0, "finished": True}
            folder.checkpoint(weights, {}, info)
            if self.evaluation is not None:
                folder.write_json(EVALUATION, self.evaluation)
        self.folder = self.folder or folder
        return folder.path

    def _example_arrays(self) -> Mapping[str, np.ndarray]:
        return self._example if self._example is not None else self.trained.arrays

    def _rows_of(self, data: Any) -> Any:
        data = self.data if data is None else data
        if data is None:
            raise ProbgenError("the data of this run cannot be found again: give them, e.g. run.evaluate(data.test)")
        rows = as_rows(data, like=self.spec)
        missing = [name for name in needed(self.program.model, self.structure.arrays) if name not in rows]
        if missing:
            raise ProbgenError(
                f"the program needs the array {missing[0]!r}, and {rows.where} has {', '.join(map(repr, rows.names))}: "
                "name the arrays as those that the run was fitted on"
            )
        return rows

    def _told(self) -> AbstractContextManager[None]:
        """Inside, what the program's own code raises is told in one sentence."""
        return blaming(self.program, {name: spec.shape for name, spec in self.spec.items()})

    def _split(self, rows: Any) -> str | None:
        splits = () if self.data is None else ("train", "valid", "test")
        return next((split for split in splits if getattr(self.data, split) is rows), None)


def write_description(
    folder: Folder,
    program: Program,
    config: Mapping[str, Any],
    example: Mapping[str, np.ndarray],
    spec: Mapping[str, Any],
) -> None:
    """What a folder says of a run beside its weights: config, source, and a batch that shows the shapes."""
    folder.write_config(config)
    path = program.origin.path
    if path is not None and Path(path).is_file():
        folder.copy_source(Path(path))
    arrays = {f"example/{name}": np.asarray(value) for name, value in example.items()}
    arrays |= {f"mean/{name}": s.mean for name, s in spec.items() if s.mean is not None}
    folder.write_with(EXAMPLE, lambda file: save_arrays(arrays, file))


def _in_zoo(program: Mapping[str, Any]) -> bool:
    return any(str(model.path) == program["path"] for model in zoo.list_models())


def _rebuilt(folder: Folder, config: Mapping[str, Any], spec: Mapping[str, ArraySpec]) -> Program:
    """The program of a folder: the zoo's file if it is the same, else the copy that was kept, saying so."""
    kept = config["program"]
    zoo_paths = {model.name: model.path for model in zoo.list_models()}
    path = zoo_paths.get(kept["name"])
    if path is None or not folder.source_matches(path):
        if kept["path"] is None:
            raise ProbgenError(
                f"{folder.path} keeps no program (it was written in a notebook): Run.open(path, program=program)"
            )
        path = folder.verified(SOURCE)
        warnings.warn(f"building the program from {path}, the copy kept with the run", stacklevel=3)
    program = zoo.build(path, spec, kept["seed"], kept["options"])
    program = _named(program, kept)
    return _learned_by(program, config["by"])


def _named(program: Program, kept: Mapping[str, Any]) -> Program:
    return replace(program, origin=Origin(kept["name"], kept["path"], dict(kept["options"]), kept["seed"]))


def _learned_by(program: Program, by: str | None) -> Program:
    """The program with the loss that its config names, if it is not the file's own."""
    if by is None or by == repr(program.by):
        return program
    from probgen.parsing import called
    from probgen.schedules import Cosine, Linear, Steps

    backend = backend_of(program)
    losses = {name: value for name, value in vars(backend).items() if hasattr(value, "players")}
    return program.learned_by(called(by, {**losses, "Linear": Linear, "Cosine": Cosine, "Steps": Steps}, "loss"))
