"""`fit`: train a program on data. The one loop over chunks of steps, whatever the backend.

An engine advances a state by a chunk of steps; between chunks lie progress, validation, early stopping, checkpoints
and the `on_chunk` hook. Where chunks end depends only on the request, so a resumed run ends bit for bit like an
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from probgen import groups
from probgen.blame import blaming
from probgen.data import Data, load_data
from probgen.data.feed import Feed, evaluation_batches
from probgen.data.prepare import Preparation
from probgen.errors import ProbgenError
from probgen.fit.interrupts import Interrupts
from probgen.fit.progress import Progress
from probgen.fit.recipe import SILENT, Options, resolved
from probgen.folder import Folder
from probgen.nuts.draws import Draws
from probgen.program import Program, backend_of
from probgen.run import POSTERIOR, Run, described, loss_text, optimizer_text, write_description
from probgen.schedules import Schedule
from probgen.supports import refuse_outside

SAVE_EVERY = 15.0  # seconds between checkpoints
CHUNK = 100  # steps a chunk has at least, in whole epochs; long epochs are cut into pieces of five times that
VALIDATION_BATCH = 1024


def fit(
    program: Program,
    data: Any,
    *,
    by: Any = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = SILENT,
    lr: Any = SILENT,
    optimizer: Any = SILENT,
    schedule: Schedule | None = SILENT,
    clip: float | None = SILENT,
    ema: float | None = SILENT,
    patience: int | None = SILENT,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32",
    compile: bool | str = "auto",
    resume: bool = False,
    on_chunk: Callable[[Run, dict[str, Any]], Any] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Train `program` on `data` and return the `Run`.

    Where the caller is silent the program's `defaults` decide, then `batch_size=128`, `lr=1e-3`,
    `optimizer="adam"`, 100 epochs.

    Parameters
    ----------
    data
        What `load_data` takes. A valid split, if there is one, is used for `valid_loss` and early stopping.
    by
        A probgen loss, a stock ELBO of the PPL, or a loss function in its convention; default `program.by`.
    steps, epochs
        How long; at most one of the two.
    compile
        `True`, `False` or "auto": on CUDA, and on a CPU from 16,000 steps on, where compiling pays.
    resume
        Go on with the run that `out` holds; a finished one is returned as it is.
    on_chunk
        Called as `on_chunk(run, metrics)` after each chunk of steps.
    out
        The run's folder. Without it nothing is written (`run.save(path)` does it later).

    Raises
    ------
    ProbgenError
        In one sentence, on anything wrong with program, data or options.
    """
    data = load_data(data)
    if not isinstance(program, Program):
        raise ProbgenError(f"fit takes a Program, e.g. Program(model, guide), not {type(program).__name__}")
    asked = {
        "batch_size": batch_size, "lr": lr, "optimizer": optimizer, "schedule": schedule, "clip": clip, "ema": ema,
        "patience": patience,
    }  # fmt: skip
    asked = {name: value for name, value in asked.items() if value is not SILENT}
    asked |= {"seed": seed, "device": device, "precision": str(precision)}
    program = program if by is None else program.learned_by(by)
    if resume:
        return _resumed(program, data, out, steps, epochs, on_chunk, progress, asked.get("optimizer"))
    options = resolved(program, data, steps, epochs, asked, compile)
    fit = _Fit(program, data, options, on_chunk, progress, None if by is None else repr(by))
    return fit.run(None if out is None else Folder.create(out))  # made last: what is refused leaves no folder


def resume(path: str | Path, data: Any = None, on_chunk: Any = None, progress: bool = True) -> Run:
    """Go on with the run in a folder where it stopped; a finished one is returned as it is."""
    run = Run.open(path)
    return _resumed(
        run.program, load_data(data) if data is not None else run.data, path, None, None, on_chunk, progress
    )


def _resumed(
    program: Program,
    data: Data | None,
    out: Any,
    steps: int | None,
    epochs: float | None,
    on_chunk: Any,
    progress: bool,
    optimizer: Any = None,
) -> Run:
    if out is None:
        raise ProbgenError("resume=True needs the folder of the run: out=PATH")
    folder = Folder.open(out)
    run = Run.open(out, program=program)
    if data is None:
        raise ProbgenError(
            f"the data of {out} cannot be found again: say where they lie, `--data PATH` or resume(path, data)"
        )
    if data.fingerprint != run.config["data"]["fingerprint"]:
        raise ProbgenError(f"{out} was trained on other data ({run.config['data']['name']}): resume it with those")
    if loss_text(program) != run.config["by"]:
        raise ProbgenError(f"{out} was trained by {run.config['by']}: resume it by the same, not by {program.by!r}")
    kept = run.options
    own = {"optimizer": _optimizer(kept["optimizer"], optimizer, program.defaults.get("optimizer"))}
    options = run.read("options", lambda kept: Options(**{**kept, **own, "schedule": _schedule(kept["schedule"])}))
    if steps is not None or epochs is not None:
        options = replace(options, steps=resolved(program, data, steps, epochs, asdict(options), options.compile).steps)
    if run.finished and options.steps <= kept["steps"]:
        return run
    return _Fit(program, data, options, on_chunk, progress, run.config["by_given"]).run(folder, resume=True)


def _schedule(text: str | None) -> Schedule | None:
    """A schedule from the text a config keeps of it."""
    if text is None:
        return None
    from probgen import schedules
    from probgen.parsing import called

    return called(text, {name: getattr(schedules, name) for name in ("Linear", "Cosine", "Steps")}, "schedule")


def _optimizer(text: Any, *candidates: Any) -> Any:
    """The optimizer that a config keeps the text of: the one given or the program's own, if it prints the same."""
    found = [value for value in candidates if value is not None and optimizer_text(value) == text]
    return found[0] if found else text


class _Fit:
    """One fit: what is needed between two chunks."""

    def __init__(
        self, program: Program, data: Data, options: Options, on_chunk: Any, progress: bool, by_given: str | None
    ) -> None:
        if hasattr(program.by, "built"):  # a loss may build networks of its own for the data
            program = program.learned_by(program.by.built(data.spec, options.seed))
        self.program, self.data, self.options, self.on_chunk, self.by_given = program, data, options, on_chunk, by_given
        self.folder: Folder | None = None
        self.preparation = Preparation.of(program.prepare, data)
        self.feed = Feed(data.train, self.preparation, options.batch_size, options.seed)
        with self._told():
            self.engine = backend_of(program).engine_of(program, program.by, self.feed, options)
        self.per_epoch = max(1, self.feed.steps_per_epoch // getattr(self.engine, "batches_per_step", 1))
        with self._told():
            self.validation = self._validation()
            self._refuse_patience()
            self._refuse_batch_long()
        self.progress = Progress(program.origin.name, options.steps, progress)
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"loss": None, "since": 0, "stopped": False}
        self.best_weights: dict[str, np.ndarray] | None = None
        self.seconds, self.saved_at = 0.0, time.monotonic()

    def _told(self) -> contextlib.AbstractContextManager[None]:
        """Inside, what the program's own code raises is told in one sentence."""
        return blaming(self.program, self.data.train.shapes())

    def _validation(self) -> list[dict[str, np.ndarray]]:
        rows = self.data.valid
        if not len(rows) or not getattr(self.engine, "validates", True):
            return []
        size = min(VALIDATION_BATCH, len(rows), max(self.feed.batch_size, VALIDATION_BATCH))
        batches = [arrays for _, arrays, _ in evaluation_batches(rows, self.preparation, size, self.options.seed)]
        where = rows.where if "(valid)" in rows.where else f"{rows.where} (valid)"
        for arrays in batches:
            refuse_outside(self.engine, arrays, where)
        return batches

    def _refuse_patience(self) -> None:
        if self.options.patience is not None and not self.validation:
            why = (
                "the data have no rows for validation"
                if getattr(self.engine, "validates", True)
                else "this loss has none"
            )
            raise ProbgenError(f"`patience` waits for a better validation loss, and {why}: leave it out")

    def _refuse_batch_long(self) -> None:
        """A parameter with a value for each row of a batch fits no other batch, nor the run when it is reopened."""
        size = self.feed.batch_size
        if size == self.feed.rows:
            return
        weights = self.engine.weights(self.engine.start())
        long = [name for name, value in weights.items() if value.shape[:1] == (size,)]
        if not long:
            return
        try:
            backend_of(self.program).trained_of(self.program, weights, self._example(), rows=self.feed.rows)
        except ProbgenError as error:
            wrong = [name for name in long if repr(name) in str(error)]
            if wrong:
                raise ProbgenError(
                    f"the parameter {wrong[0]!r} has a value for each of the {size} rows of a batch, which no other batch "
                    "fits: give batch_size=None, so that the program gets all rows"
                ) from error

    def run(self, folder: Folder | None, resume: bool = False) -> Run:
        """Train from the start, or from the folder's last checkpoint, to the last step."""
        self.folder = folder
        if folder is None:
            return self._train(self.engine.start(), 0, {})
        with folder.writer():
            state, step, partial = self._begin(resume)
            return self._train(state, step, partial)

    def _begin(self, resume: bool) -> tuple[Any, int, dict[str, list[float]]]:
        if not resume:
            self._describe()
            return self.engine.start(), 0, {}
        found = self.folder.last_checkpoint()
        if found is None:
            self.folder.truncate_metrics(0)
            return self.engine.start(), 0, {}
        _, arrays, info = found
        state, partial = self._restored(arrays)
        self.folder.truncate_metrics(info["row_step"])
        self.rows, self.best, self.seconds = self.folder.metrics(), info["best"], info["seconds"]
        best = {name.removeprefix("best/"): a for name, a in arrays.items() if name.startswith("best/")}
        self.best_weights = best or None
        self._describe()  # the number of steps may have grown
        return state, info["step"], partial

    def _restored(self, arrays: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, list[float]]]:
        """The engine's state in a checkpoint, and the metrics of the steps since its last row."""
        partial = {n.removeprefix("partial/"): list(a) for n, a in arrays.items() if n.startswith("partial/")}
        state = {n.removeprefix("state/"): a for n, a in arrays.items() if n.startswith("state/")}
        return self.engine.restore(state), partial

    def _describe(self) -> None:
        """What the folder says of the run before its first step."""
        write_description(self.folder, self.program, self._config(), self._example(), self.data.spec)

    def _example(self) -> dict[str, np.ndarray]:
        """A prepared batch that shows a reopened run the program's shapes."""
        batch = self.feed.batch(0)
        return batch if self.feed.batch_size == self.feed.rows else {name: value[:2] for name, value in batch.items()}

    def _config(self) -> dict[str, Any]:
        return described(self.program, self.data, self.preparation, self.options, self.engine, self.by_given)

    # -- the loop -------------------------------------------------------------------------------------------------

    def _train(self, state: Any, step: int, partial: dict[str, list[float]]) -> Run:
        with self.progress, Interrupts() as interrupts:
            for end in self._ends(step):
                state, step, stopped = self._chunk(state, step, end, partial, interrupts)
                if stopped:
                    self._save(state, step, partial)
                    interrupts.leave(self.folder)
                self._row(state, step, partial)
                partial = {}
                converged = self._converged(state)
                self.best["stopped"] |= converged
                last = step == self.options.steps or self.best["stopped"]
                if last and step < self.options.steps:
                    self.progress.ended(step, "converged" if converged else "no better validation loss")
                if last or time.monotonic() - self.saved_at > SAVE_EVERY:
                    self._save(state, step, partial)
                if self.on_chunk is not None:
                    self.on_chunk(self._as_run(state), self.rows[-1])
                if last:
                    break
            else:
                self._save(state, step, partial)
        return self._as_run(state)

    def _ends(self, step: int) -> Iterator[int]:
        """Where chunks end: whole epochs of at least CHUNK steps, or even pieces of a long epoch.

        An engine may have a length of its own: EM keeps a row of every step.
        """
        epoch, total, own = self.per_epoch, self.options.steps, getattr(self.engine, "chunk", None)
        if self.best["stopped"]:
            return
        while step < total:
            if own is not None:
                end = (step // own + 1) * own
            elif epoch <= 5 * CHUNK:
                length = epoch * -(-CHUNK // epoch)
                end = (step // length + 1) * length
            else:
                start = step // epoch * epoch
                end = min(start + ((step - start) // (5 * CHUNK) + 1) * 5 * CHUNK, start + epoch)
            step = min(end, total)
            yield step

    def _chunk(
        self, state: Any, step: int, end: int, partial: dict[str, list[float]], interrupts: Interrupts
    ) -> tuple[Any, int, bool]:
        """Advance to `end`, in pieces of about half a second so that the bar moves and a signal is heard."""
        piece = 10 if step == 0 else end - step
        while step < end:
            last, began = min(step + piece, end), time.monotonic()
            before = state
            with self._told():
                state, metrics = self.engine.advance(state, step, last)
            self._refuse_nan(before, step, metrics)
            for name, values in metrics.items():
                partial.setdefault(name, []).extend(float(v) for v in values)
            took = max(time.monotonic() - began, 1e-6)
            self.seconds += took
            piece = max(1, int((last - step) * 0.5 / took))
            step = last
            if step < end:  # at the end of a chunk its row is shown
                valid = self.rows[-1].get("valid_loss") if self.rows else None
                self.progress.show(step, float(metrics["loss"][-1]), valid)
            if interrupts.asked:
                return state, step, True
        return state, step, False

    def _refuse_nan(self, before: Any, first: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Stop at the first step whose loss is not finite or whose gradient is NaN; `before` is the state at `first`."""
        finite = np.isfinite(metrics["loss"])
        sound = finite & ~np.isnan(metrics.get("grad_norm", 0.0))
        if sound.all():
            return
        step = first + int(np.argmin(sound))
        if step > first:
            before, _ = self.engine.advance(before, first, step)
        said = self.engine.diagnose(before, step)
        good = step if finite[step - first] else step - 1  # the last state whose loss is known to be finite
        raise ProbgenError(f"training stopped: {said}{self._keep(good)}")

    def _keep(self, good: int) -> str:
        """Save the state of the step `good`, gone to from the last checkpoint, and say so."""
        if self.folder is None:
            return ""
        if good < 0:
            return "; it never was, so there is no checkpoint"
        found = self.folder.last_checkpoint()
        step, (state, partial) = (0, (self.engine.start(), {})) if found is None else (
            found[2]["step"], self._restored(found[1])
        )  # fmt: skip
        if good > step:
            state, metrics = self.engine.advance(state, step, good)
            partial = {name: [*partial.get(name, ()), *map(float, values)] for name, values in metrics.items()}
        if good > step or found is None:
            self.rows = [row for row in self.rows if row["step"] <= good]
            since = good - (self.rows[-1]["step"] if self.rows else 0)
            self._save(state, good, {name: values[len(values) - since :] for name, values in partial.items()})
        return f"; the last good checkpoint, of step {max(good, step)}, is in {self.folder.path}"

    def _row(self, state: Any, step: int, partial: dict[str, list[float]]) -> None:
        """One line of the curves: means over the chunk (sums of what counts), and the validation loss after it."""
        row: dict[str, Any] = {"step": step, "epoch": step / self.per_epoch}
        counts = getattr(self.engine, "counts", ())
        row |= {name: float(np.sum(v) if name in counts else np.mean(v)) for name, v in partial.items()}
        if "grad_norm" in row:  # what takes no gradient steps has no learning rate
            row["lr"] = self._lr(step - 1)
        if self.validation:
            with self._told():
                row["valid_loss"] = self.engine.loss_on(state, self.validation, self.options.seed)
            self._judge(state, row["valid_loss"])
        row["seconds"] = round(self.seconds, 3)
        self.rows.append(row)
        if self.folder is not None:
            self.folder.append_metrics(row)
        self.progress.show(step, row["loss"], row.get("valid_loss"))

    def _converged(self, state: Any) -> bool:
        """Whether the engine says that further steps change nothing."""
        return bool(getattr(self.engine, "converged", lambda state: False)(state))

    def _lr(self, step: int) -> Any:
        factor = 1.0 if self.options.schedule is None else float(self.options.schedule(step))
        lr = self.options.lr
        return {player: value * factor for player, value in lr.items()} if isinstance(lr, Mapping) else lr * factor

    def _judge(self, state: Any, loss: float) -> None:
        if self.options.patience is None:
            return
        if self.best["loss"] is None or loss < self.best["loss"]:
            self.best |= {"loss": loss, "since": 0}
            self.best_weights = self.engine.weights(state)
        else:
            self.best["since"] += 1
            self.best["stopped"] = self.best["since"] >= self.options.patience

    def _weights(self, state: Any) -> dict[str, np.ndarray]:
        return self.engine.weights(state) if self.best_weights is None else self.best_weights

    def _save(self, state: Any, step: int, partial: dict[str, list[float]]) -> None:
        if self.folder is None:
            return
        arrays = {f"state/{name}": value for name, value in self.engine.export(state).items()}
        arrays |= {f"partial/{name}": np.asarray(values, dtype=np.float64) for name, values in partial.items()}
        arrays |= {f"best/{name}": value for name, value in (self.best_weights or {}).items()}
        info = {
            "step": step,
            "row_step": self.rows[-1]["step"] if self.rows else 0,
            "best": self.best,
            "seconds": self.seconds,
            "finished": step >= self.options.steps or self.best["stopped"],
        }
        weights = self._weights(state)
        self.folder.checkpoint(weights, arrays, info)
        draws = Draws.of(weights)
        if draws is not None:
            kept = groups.chains(self.engine.structure, draws)
            self.folder.write_with(POSTERIOR, lambda path: kept.to_netcdf(path))
        self.saved_at = time.monotonic()

    def _as_run(self, state: Any) -> Run:
        return Run(
            self.program,
            self._config(),
            self._weights(state),
            self._example(),
            list(self.rows),
            data=self.data,
            folder=self.folder,
            history=getattr(self.engine, "history", lambda state: {})(state),
        )
