"""A folder of files that is whole at every instant, has one writer, and says when a file was damaged.

A file is written beside (in `.tmp/`), flushed to the disk and renamed. `manifest.json` is renamed before and
after, with both hashes in between (see `probgen.folder.manifest`). A process that is killed, or a machine that loses
power, leaves the content before or the one after, and the next writer sweeps up the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from probgen.errors import ProbgenError
from probgen.folder import plain
from probgen.folder.lock import exclusive
from probgen.folder.manifest import NAME as MANIFEST
from probgen.folder.manifest import Manifest, check_name

_LOCK, _TEMPORARY = ".lock", ".tmp"
_READS_BESIDE_A_WRITER = 100

T = TypeVar("T")


class Damaged(ProbgenError):
    """A file is not what the manifest says."""


class Store:
    """Files under a manifest. Reading needs nothing; writing is done inside `with store.writer():`."""

    reserved: tuple[str, ...] = (MANIFEST, _LOCK, _TEMPORARY)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._writer_pid = 0  # a forked child inherits this object, not the right to write

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    # --- one writer ---

    @contextlib.contextmanager
    def writer(self) -> Iterator[Self]:
        """Be the only writer; what a killed writer left half done is swept up first. May be entered again."""
        if self._writer_pid == os.getpid():
            yield self
            return
        with exclusive(self.path / _LOCK, self.path):
            self._writer_pid = os.getpid()
            try:
                with self._disk(MANIFEST):
                    self._begin()
                yield self
            except BaseException:
                with contextlib.suppress(ProbgenError):  # the first error is the one to tell
                    self._close()
                raise
            else:
                self._close()
            finally:
                self._writer_pid = 0

    def _close(self) -> None:
        if self._writer_pid == os.getpid():
            with self._disk(MANIFEST):
                self._end()

    def _begin(self) -> None:
        self._clear_temporary()
        manifest = self._manifest()
        for name, hashes in manifest.files.items():
            if len(hashes) > 1:
                manifest.files[name] = (self._which(name, hashes),)
        self._settle(manifest)

    def _end(self) -> None:
        self._clear_temporary()

    def _settle(self, manifest: Manifest) -> None:
        """Forget the files that never came to be."""
        manifest.files = {name: hashes for name, hashes in manifest.files.items() if hashes != (None,)}
        self._write_manifest(manifest)

    def _which(self, name: str, hashes: tuple[str | None, ...]) -> str | None:
        path = self.path / name
        found = sha256(path) if path.is_file() else None
        if found not in hashes:
            raise self._damage(name)
        return found

    def _clear_temporary(self) -> None:
        path = self.path / _TEMPORARY
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)

    # --- writing ---

    @contextlib.contextmanager
    def _disk(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ProbgenError(
                f"cannot write {self.path / name}: {error.strerror or error}; what was saved "
                f"before is whole: make room, or make it writable, and go on"
            ) from error

    def _may_write(self, name: str) -> None:
        if self._writer_pid != os.getpid():
            raise RuntimeError(f"{name} is written inside `with folder.writer():`")

    def _temporary(self, name: str, write: Callable[[Path], Any]) -> Path:
        """What `write(path)` makes of a path beside the folder's files, flushed to the disk."""
        self._may_write(name)
        path = self.path / _TEMPORARY / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(path)
            flush(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _rename(self, temporary: Path, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(exist_ok=True)
        if target.parent.resolve() != self.path.resolve() / Path(name).parent:
            raise ProbgenError(f"{target.parent} leads out of the run folder: remove that link")
        os.replace(temporary, target)
        flush(target.parent)
        if target.parent != self.path:
            flush(self.path)

    def _write_manifest(self, manifest: Manifest) -> None:
        text = manifest.dumps().encode()
        path = self.path / MANIFEST
        if not path.is_file() or path.read_bytes() != text:
            self._rename(self._temporary(MANIFEST, lambda p: p.write_bytes(text)), MANIFEST)

    def write_with(self, name: str, write: Callable[[Path], Any]) -> None:
        """Let `write(path)` make the file `name`, whole or not at all; `path` has its ending."""
        if check_name(name, self.path).parts[0] in self.reserved:
            raise ProbgenError(f"{name!r} is a name that {self.path} keeps for itself: choose another")
        self._may_write(name)
        with self._disk(name):
            temporary = self._temporary(name, write)
            manifest = self._manifest()
            after = sha256(temporary)
            before = manifest.files.get(name, (None,))
            manifest.files[name] = before if after in before else (*before, after)
            self._write_manifest(manifest)
            self._rename(temporary, name)
            manifest.files[name] = (after,)
            self._write_manifest(manifest)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write the file `name`."""
        self.write_with(name, lambda path: path.write_bytes(content))

    def write_json(self, name: str, value: Any) -> None:
        """Write plain values and NumPy's; NaN and infinities become strings, which `read_json` undoes."""
        self.write_bytes(name, (plain.to_json(value, name, indent=2) + "\n").encode())

    # --- reading, always verified ---

    def __contains__(self, name: str) -> bool:
        return name in self._manifest().files and (self.path / name).is_file()

    def read_bytes(self, name: str) -> bytes:
        """The file `name`, its sha256 checked."""
        check_name(name, self.path)
        data = self._steadily(lambda manifest: self._read(name, manifest))
        if data is None:
            raise ProbgenError(f"{self.path} has no {name}")
        return data

    def read_text(self, name: str) -> str:
        """The file `name` as text."""
        try:
            return self.read_bytes(name).decode()
        except UnicodeDecodeError as error:
            raise ProbgenError(f"{self.path / name} is not text: restore it from a copy") from error

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote."""
        return self._parsed(self.read_bytes(name), name)

    def verified(self, name: str) -> Path:
        """The path of the file `name`, its sha256 checked, for readers that want a file (NetCDF)."""
        self.read_bytes(name)
        return self.path / name

    def verify(self) -> None:
        """Check every file against the manifest; raises for the first that is damaged or missing."""

        def check(manifest: Manifest) -> None:
            for name in manifest.files:
                self._read(name, manifest)

        self._steadily(check)

    def _read(self, name: str, manifest: Manifest) -> bytes | None:
        """The bytes of `name`; None when the manifest does not list it, or allows that it is missing."""
        hashes = manifest.files.get(name)
        if hashes is None:
            return None
        data = self._bytes(name)
        if (None if data is None else hashlib.sha256(data).hexdigest()) not in hashes:
            raise self._damage(name)
        return data

    def _bytes(self, name: str) -> bytes | None:
        path = self.path / name
        try:
            if path.exists() and not path.is_file():
                raise Damaged(f"{path} is not a regular file: restore it from a copy")
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ProbgenError(f"cannot read {path}: {error.strerror or error}") from error

    def _damage(self, name: str) -> Damaged:
        path = self.path / name
        what = "was damaged or changed (its sha256 is not the manifest's)" if path.exists() else "is missing"
        return Damaged(f"{path} {what}: restore it from a copy, or make it again")

    def _parsed(self, text: str | bytes, name: str) -> Any:
        try:
            return plain.from_json(text)
        except ValueError as error:
            raise ProbgenError(f"{self.path / name} is not JSON: restore it from a copy") from error

    def _manifest(self) -> Manifest:
        text = self._bytes(MANIFEST)
        if text is None:
            raise ProbgenError(f"{self.path / MANIFEST} is missing: restore it from a copy, or fit again")
        return Manifest.loads(text, self.path / MANIFEST)

    def _steadily(self, read: Callable[[Manifest], T]) -> T:
        """`read(manifest)`, again when a writer beside us changed the files in the middle of it."""
        manifest = self._manifest()
        for _ in range(_READS_BESIDE_A_WRITER):
            try:
                return read(manifest)
            except Damaged:
                now = self._manifest()
                if now == manifest:
                    raise
                manifest = now
        return read(manifest)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
