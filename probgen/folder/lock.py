"""One writer a folder: an exclusive lock that the kernel drops when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from probgen.errors import ProbgenError

_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_held: set[int] = set()


@contextlib.contextmanager
def exclusive(path: Path, what: Path) -> Iterator[None]:
    """Hold the lock file `path`, which guards `what`, or refuse in one sentence when somebody else holds it.

    The lock is `flock`'s, on an open file: it ends with the process however that dies, so a file left behind
    never blocks, and a second writer is refused from this process as from another.
    """
    fd = _open(path, what)
    try:
        _acquire(fd, what)
    except BaseException:
        os.close(fd)
        raise
    _held.add(fd)
    _sign(fd, b"%d\n" % os.getpid())
    try:
        yield
    finally:
        if fd in _held:  # not so in a forked child that unwinds this far
            _held.discard(fd)
            _sign(fd, b"")
            os.close(fd)


def _open(path: Path, what: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ProbgenError(
            f"cannot write into {what}: {error.strerror or error}; make the folder writable or choose another"
        ) from error


def _acquire(fd: int, what: Path) -> None:
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ProbgenError(
            f"{what} is being written by {_holder(fd)}: wait until it ends, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise ProbgenError(f"cannot lock {what}: {error.strerror or error}; choose another") from error
        warnings.warn(f"the file system of {what} has no locks: make sure that nothing else writes there", stacklevel=6)


def _sign(fd: int, text: bytes) -> None:
    """Say who holds the lock: a courtesy to whoever is refused, so that a full disk does not matter."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, text, 0)


def _holder(fd: int) -> str:
    pid = os.pread(fd, 20, 0).strip().decode("ascii", "replace")
    if pid == str(os.getpid()):
        return "this process already"
    return f"another process (pid {pid})" if pid.isdigit() else "another process"


def _forget_in_child() -> None:
    """A forked child (a data loader's worker) must not keep the lock alive when its parent is killed."""
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
