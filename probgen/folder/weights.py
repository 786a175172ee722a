"""Named arrays in a safetensors file: data that cannot hold code (https://github.com/huggingface/safetensors)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from probgen.errors import ProbgenError

_DTYPES = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_DTYPES |= {"float16", "float32", "float64", "complex64", "bool"}


def save(arrays: Mapping[str, np.ndarray], path: Path, note: str | None = None) -> None:
    """Write arrays of any shape (0-d too), with `note`, a text, in the header; equal arrays give equal bytes.

    Raises OSError when the disk does not take them.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    ready = {name: _contiguous(name, value) for name, value in arrays.items()}
    try:
        save_file(ready, path, metadata=None if note is None else {"note": note})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read


def _contiguous(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value, order="C")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.name not in _DTYPES:
        raise ProbgenError(f"the array {name!r} has dtype {array.dtype}, which a weights file cannot hold")
    return array


def load(data: bytes, path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """The arrays, writable, and the note in the bytes of the file `path`; anything else is refused."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    try:
        arrays = {name: np.require(value, requirements="W") for name, value in parse(data).items()}
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        what = "is empty" if not data else f"is not a whole safetensors file ({str(error)[:120]})"
        raise ProbgenError(f"{path} {what}: restore it from a copy, or fit again") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return arrays, header.get("__metadata__", {}).get("note")


def match(arrays: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray], path: Path) -> None:
    """Refuse `arrays`, read from `path`, unless they have the names and shapes of `like`."""
    cure = "it belongs to another program or other options"
    for name in sorted(arrays.keys() ^ like.keys()):
        word = "has an unknown array" if name in arrays else "lacks the array"
        raise ProbgenError(f"{path} {word} {name!r}: {cure}")
    for name, value in like.items():
        found, wanted = np.shape(arrays[name]), np.shape(value)
        if found != wanted:
            raise ProbgenError(f"{path}: {name!r} has shape {found} where the program has {wanted}: {cure}")
