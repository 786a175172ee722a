"""Tables of columns: `.csv`, `.parquet`, data frames. Numeric columns are x [N, D]; one named y or label is y [N]."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.extras import need

__all__ = ["from_columns", "is_label", "is_numeric", "need", "read_csv", "read_parquet", "warn_left_out"]


def from_columns(columns: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Arrays of named columns.

    A column named y or label is y. Columns of one number per row are stacked to x [N, D] in their order, unless some
    column holds an array per row (or is named x): then each keeps its name, and `image` is x.
    """
    numeric = {name: values for name, values in columns.items() if is_numeric(values)}
    warn_left_out([name for name in columns if name not in numeric], where)
    labels = [name for name in numeric if is_label(name)]
    features = [name for name in numeric if name not in labels[:1]]
    arrays = {}
    if any(numeric[name].ndim > 1 or name == "x" for name in features):
        first = next((name for name in features if numeric[name].ndim > 1), "x")
        rename = {} if "x" in features else {first: "x"}
        arrays |= {rename.get(name, name): numeric[name] for name in features}
    elif features:
        arrays["x"] = np.stack([numeric[name] for name in features], axis=1)
    if labels:
        arrays["y"] = numeric[labels[0]]
    if not arrays:
        raise ProbgenError(f"{where} has no numeric column: its columns become x, and one named y or label becomes y")
    return arrays


def is_numeric(values: np.ndarray) -> bool:
    """Whether a column holds real numbers."""
    return values.dtype.kind in "biuf"


def is_label(name: str) -> bool:
    """Whether a column's name says that it holds labels."""
    return name.lower() in ("y", "label")


def warn_left_out(names: Iterable[str], where: str, what: str = "numeric") -> None:
    """Say once what is not read: columns that are not numbers."""
    names = list(names)
    if names:
        warnings.warn(f"{where}: left out what is not {what}: {', '.join(names)}", stacklevel=2)


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """x and y of a file with one row a line, and perhaps a header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            lines = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ProbgenError(f"{path.name!r} is not a text table ({error}): save it as UTF-8 comma-separated") from error
    header = [str(i) for i in range(len(lines[0][1]))] if lines else []
    if lines and _is_header(*(row for _, row in lines[:2])):
        header = [cell.strip() for cell in lines.pop(0)[1]]
    if not lines:
        raise ProbgenError(f"{path.name!r} is empty: give it one line a row")
    for number, row in lines:
        if len(row) != len(header):
            raise ProbgenError(
                f"{path.name!r} has {len(row)} columns in line {number} and {len(header)} in the first: "
                "every line needs the same columns"
            )
    columns = {name: _column(i, name, lines, path) for i, name in enumerate(header)}
    if len(columns) != len(header):
        raise ProbgenError(f"{path.name!r} names a column twice in its first line: give every column its own name")
    return from_columns(columns, path.name)


def _column(i: int, name: str, lines: list[tuple[int, list[str]]], path: Path) -> np.ndarray:
    """Numbers; text when its first cell is text; a cell of text among numbers is an error."""
    cells = [row[i] for _, row in lines]
    if not _is_number(cells[0]) and cells[0].strip():
        return np.array(cells)
    try:
        values = np.array([float(cell) for cell in cells])
    except ValueError:
        number, cell = next((n, row[i]) for n, row in lines if not _is_number(row[i]))
        what = f"{cell!r}" if cell.strip() else "nothing"
        raise ProbgenError(
            f"{path.name!r} has {what} in column {name!r}, line {number}, where a number belongs: "
            "fill it or remove the line"
        ) from None
    whole = is_label(name) and np.isfinite(values).all() and (values == np.round(values)).all()
    return values.astype(np.int64) if whole else values


def _is_header(first: list[str], second: Sequence[str] = ()) -> bool:
    """Whether the first line names the columns: it has no numbers, or a word where the next line has a number."""
    words = [not _is_number(cell) for cell in first]
    return all(words) or any(word and _is_number(below) for word, below in zip(words, second, strict=False))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_parquet(path: Path) -> dict[str, np.ndarray]:
    """x and y of a parquet file; missing values become NaN, which the table refuses by row."""
    parquet = need("pyarrow.parquet", "parquet", f"{path.name!r}")
    import pyarrow

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ProbgenError(f"{path.name!r} is damaged or not a parquet file: write it again") from error
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type):
            columns[name] = _nested(column, name, path)
        else:
            columns[name] = column.to_numpy()
    return from_columns(columns, path.name)


def _nested(column: Any, name: str, path: Path) -> np.ndarray:
    """A column of (lists of) lists as one array, in the dtype it declares."""
    kind = column.type
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    try:
        return np.array(column.to_pylist()).astype(kind.to_pandas_dtype())
    except (ValueError, TypeError) as error:
        raise ProbgenError(
            f"column {name!r} of {path.name!r} holds lists of different lengths or of no numbers: make them equal"
        ) from error
