"""Errors of a program's own code, told in one sentence with the file and the line.

A program is foreign code: it may raise anything when it is run. What passed through its file is the program's, and is
told as bad input is; anything else is a defect of probgen and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
from collections.abc import Iterator
from typing import Any

from probgen.errors import ProbgenError
from probgen.program import Program


@contextlib.contextmanager
def blaming(program: Program, shapes: dict[str, tuple[int, ...]] | None = None) -> Iterator[None]:
    """Inside, an error raised below the program's own code becomes a `ProbgenError` that says where.

    `shapes`, those of a row of each array, are told too: most such errors come from them.
    """
    try:
        yield
    except ProbgenError as error:
        sentence = str(error).partition("\nTrace Shapes:")[0].rstrip()  # which Pyro adds to what its models raise
        if sentence == str(error):
            raise
        raise ProbgenError(sentence) from error
    except Exception as error:
        where = _place(_files(program), error)
        if where is None:
            raise
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        rows = ", ".join(f"{name} {list(shape)}" for name, shape in (shapes or {}).items())
        given = f" (rows of the data: {rows})" if rows else ""
        raise ProbgenError(f"{where}: {type(error).__name__}: {said}{given}") from error


def _files(program: Program) -> set[str]:
    """The files in which the program's model, guide and loss are written."""
    files = {program.origin.path, *map(_file, (program.model, program.guide, program.by))}
    return {file for file in files if file}


def _file(part: Any) -> str | None:
    while isinstance(part, functools.partial):
        part = part.func
    part = getattr(part, "__func__", part)
    if not hasattr(part, "__code__"):
        part = getattr(type(part), "forward", None) or (type(part).__call__ if callable(part) else None)
    code = getattr(inspect.unwrap(part), "__code__", None) if callable(part) else None
    file = getattr(code, "co_filename", None)
    return None if file is None or _foreign(file) else file


def _foreign(file: str) -> bool:
    """Whether a file is a package's (an autoguide, a stock ELBO), not the user's."""
    return "site-packages" in file or "dist-packages" in file or file.startswith(_HERE)


_HERE = __file__.rpartition("blame.py")[0]


def _place(files: set[str], error: BaseException) -> str | None:
    """The last line of the program that the error passed through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None
