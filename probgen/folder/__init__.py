"""A run on disk: a folder that can be resumed, shared, and trusted.

    config.yaml  model.py  weights.safetensors  state/  metrics.jsonl
    evaluation.json  posterior.nc  pictures/  report.html  manifest.json

How its files stay whole is told in `probgen.folder.store`; here is what they hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.folder import plain
from probgen.folder.manifest import Manifest
from probgen.folder.store import Damaged, Store, sha256
from probgen.folder.weights import load, match, save

CONFIG, SOURCE, WEIGHTS, METRICS, STATE = (
    "config.yaml",
    "model.py",
    "weights.safetensors",
    "metrics.jsonl",
    "state",
)

Arrays = Mapping[str, np.ndarray]
Checkpoint = tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]


class Folder(Store):
    """A run folder. Reading needs nothing; writing is done inside `with folder.writer():`."""

    reserved = (*Store.reserved, WEIGHTS, METRICS, STATE)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._fresh = False
        self._rows: Any = None  # metrics.jsonl, open while rows are appended

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Folder:
        """A folder for a new run; an existing one is taken over unless it holds a run."""
        folder = cls(path)
        folder._fresh = True
        folder._refuse_a_run()
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ProbgenError(f"{folder.path} is a file or lies below one: choose another folder") from None
        except OSError as error:
            raise ProbgenError(f"cannot make the folder {folder.path}: {error.strerror or error}") from error
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Folder:
        """The folder of a run that was written before."""
        folder = cls(path)
        if not folder.path.is_dir():
            raise ProbgenError(f"there is no run folder {folder.path}")
        if not (folder.path / CONFIG).is_file():
            raise ProbgenError(f"{folder.path} holds no run: it has no {CONFIG}")
        folder._manifest()
        return folder

    def _refuse_a_run(self) -> None:
        if os.path.lexists(self.path / CONFIG):
            raise ProbgenError(f"{self.path} holds a run already: resume it, or choose another folder")

    def _begin(self) -> None:
        if self._fresh:
            self._refuse_a_run()  # somebody else may have come since `create`
            self._clear_temporary()
            self._write_manifest(Manifest())  # files that lie here without a config are no run's
            (self.path / METRICS).unlink(missing_ok=True)
            self._fresh = False
        super()._begin()

    def _end(self) -> None:
        self._close_metrics()
        manifest = self._manifest()
        if METRICS not in manifest.files and (self.path / METRICS).is_file():
            manifest.files[METRICS] = (sha256(self.path / METRICS),)
            self._write_manifest(manifest)
        super()._end()

    # --- the program ---

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`: with it the folder holds a run."""
        self.write_bytes(CONFIG, plain.to_yaml(config, CONFIG).encode())

    @property
    def config(self) -> dict[str, Any]:
        """The mapping in `config.yaml`."""
        return plain.from_yaml(self.read_text(CONFIG), str(self.path / CONFIG))

    def copy_source(self, source: str | Path) -> None:
        """Keep a program's source as `model.py`; `source` is a file, or the text (which has a line end)."""
        text = isinstance(source, str) and "\n" in source
        try:
            content = source.encode() if text else Path(source).read_bytes()
        except OSError as error:
            raise ProbgenError(f"cannot read the program {source}: {error.strerror or error}") from error
        self.write_bytes(SOURCE, content)

    def source_matches(self, path: str | os.PathLike[str]) -> bool:
        """Whether the file at `path` has the very text that was kept as `model.py`."""
        return Path(path).is_file() and self._manifest().files.get(SOURCE) == (sha256(Path(path)),)

    # --- checkpoints ---

    def checkpoint(self, weights: Arrays, state: Arrays, info: Mapping[str, Any]) -> None:
        """Save the weights and all that is needed to go on from `info["step"]`.

        The renaming of `weights.safetensors` commits: until then the checkpoint before is the current one.
        """
        note = plain.to_json(info, "the checkpoint's info")
        self._may_write(WEIGHTS)
        with self._disk(WEIGHTS):
            new_state = self._temporary(f"{STATE}/new", lambda path: save(state, path, note))
            new_weights = self._temporary(WEIGHTS, lambda path: save(weights, path))
            if self._rows is not None:
                os.fsync(self._rows.fileno())  # the rows up to this step must be there once it counts
            state_sha, sha = sha256(new_state), sha256(new_weights)
            state_name = f"{STATE}/{int(info['step']):08d}-{state_sha[:8]}.safetensors"
            self._rename(new_state, state_name)
            manifest = self._manifest()
            manifest.files[state_name] = (state_sha,)
            manifest.files[WEIGHTS] = (*manifest.files.get(WEIGHTS, (None,)), sha)
            manifest.checkpoints[sha] = state_name
            self._write_manifest(manifest)
            self._rename(new_weights, WEIGHTS)
            manifest.files[WEIGHTS] = (sha,)
            self._settle(manifest)

    def _settle(self, manifest: Manifest) -> None:
        """Keep the current checkpoint alone, and remove the states of all others."""
        current = manifest.files.get(WEIGHTS, (None,))[0]
        manifest.checkpoints = {sha: name for sha, name in manifest.checkpoints.items() if sha == current}
        kept = set(manifest.checkpoints.values())
        for name in [n for n in manifest.files if n.startswith(f"{STATE}/") and n not in kept]:
            del manifest.files[name]
        super()._settle(manifest)
        for path in (self.path / STATE).glob("*-????????.safetensors"):
            if f"{STATE}/{path.name}" not in kept:
                with contextlib.suppress(OSError):  # the checkpoint is safe; the next writer tries again
                    path.unlink()

    def last_checkpoint(self) -> Checkpoint | None:
        """(weights, state, info) to go on from, or None before the first checkpoint."""

        def read(manifest: Manifest) -> Checkpoint | None:
            data = self._read(WEIGHTS, manifest)
            if data is None:
                return None
            name = manifest.checkpoints.get(hashlib.sha256(data).hexdigest())
            state_data = name and self._read(name, manifest)
            if not state_data:
                raise ProbgenError(f"{self.path} has weights but no state to resume from: fit again")
            arrays, _ = load(data, self.path / WEIGHTS)
            state, note = load(state_data, self.path / name)
            return arrays, state, self._parsed(note or "", name)

        return self._steadily(read)

    def weights(self, like: Arrays | None = None) -> dict[str, np.ndarray]:
        """The weights, their sha256 checked, and their names and shapes too when `like` is given."""
        arrays, _ = load(self.read_bytes(WEIGHTS), self.path / WEIGHTS)
        if like is not None:
            match(arrays, like, self.path / WEIGHTS)
        return arrays

    def verify(self) -> None:
        """Check every file against the manifest; raises for the first that is damaged or missing."""
        super().verify()
        self.metrics()
        self.last_checkpoint()

    # --- curves ---

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`, which a reader sees at once; a row has its `step`."""
        self._may_write(METRICS)
        line = (plain.to_json(row, METRICS) + "\n").encode()
        with self._disk(METRICS):
            if self._rows is None:
                self._rows = self._open_metrics()
            size = os.fstat(self._rows.fileno()).st_size
            try:
                while line:
                    line = line[self._rows.write(line) :]
            except OSError:
                os.ftruncate(self._rows.fileno(), size)
                raise

    def _open_metrics(self) -> Any:
        self._unlist_metrics()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(self.path / METRICS, flags, 0o666), "wb", buffering=0)

    def _close_metrics(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _unlist_metrics(self) -> None:
        """A growing file has no hash; it gets one when the writer is done."""
        manifest = self._manifest()
        if manifest.files.pop(METRICS, None) is not None:
            self._write_manifest(manifest)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; a last line that a killed process left half written is not one."""
        return [row for row, _ in self._steadily(self._metric_lines)]

    def _metric_lines(self, manifest: Manifest) -> list[tuple[dict[str, Any], bytes]]:
        data = self._read(METRICS, manifest) if METRICS in manifest.files else self._bytes(METRICS)
        lines = (data or b"").split(b"\n")[:-1]  # what follows the last line end is half a line
        rows = [_row(line) for line in lines]
        while rows and rows[-1] is None:  # a power cut can leave a block of zeros at the end
            rows.pop()
        if None in rows:
            where = f"{self.path / METRICS} is damaged in line {rows.index(None) + 1}"
            raise Damaged(f"{where}: restore it from a copy, or fit again")
        return [(row, line) for row, line in zip(rows, lines, strict=False) if row is not None]

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again, and half a last line."""
        self._may_write(METRICS)
        lines = self._metric_lines(self._manifest())
        kept = b"".join(line + b"\n" for row, line in lines if row["step"] <= step)
        if kept == (self._bytes(METRICS) or b""):
            return
        self._close_metrics()
        with self._disk(METRICS):
            self._unlist_metrics()
            self._rename(self._temporary(METRICS, lambda path: path.write_bytes(kept)), METRICS)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = plain.from_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
