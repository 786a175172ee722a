"""The manifest of a run folder: the sha256 of each file, and which state belongs to which weights.

A file on its way from one content to the next has both hashes here, so that it is whole whichever side of its
renaming the machine stopped on. The renaming of the weights is what makes a checkpoint the current one:

    checkpoints = {sha256 of weights.safetensors: state file}
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from probgen.errors import ProbgenError

NAME = "manifest.json"
FORMAT = 1
Hashes = tuple[str | None, ...]  # those a file may have; None: it may be missing


@dataclass
class Manifest:
    """What the files of a run folder must hash to."""

    files: dict[str, Hashes] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)

    def dumps(self) -> str:
        """JSON, the same for the same content."""
        files = {name: hashes[0] if len(hashes) == 1 else list(hashes) for name, hashes in self.files.items()}
        body = {"format": FORMAT, "files": dict(sorted(files.items())), "checkpoints": self.checkpoints}
        return json.dumps(body, indent=2) + "\n"

    @classmethod
    def loads(cls, text: bytes, path: Path) -> Manifest:
        """Read and check the manifest whose file is `path`."""
        try:
            body = json.loads(text)
            version = body["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged(path) from error
        if isinstance(version, int) and version > FORMAT:
            raise ProbgenError(
                f"{path.parent} is from a newer probgen (format {version}, not {FORMAT}): upgrade probgen"
            )
        if version != FORMAT or isinstance(version, bool):
            raise _damaged(path)
        return cls._checked(body, path)

    @classmethod
    def _checked(cls, body: dict[str, Any], path: Path) -> Manifest:
        files, checkpoints = body.get("files"), body.get("checkpoints")
        if not isinstance(files, dict) or not isinstance(checkpoints, dict):
            raise _damaged(path)
        hashes = {n: tuple(h) if isinstance(h, list) else (h,) for n, h in files.items()}
        for name in (*hashes, *checkpoints.values()):
            check_name(name, path)
        every = [*checkpoints, *(sha for one in hashes.values() for sha in one if sha is not None)]
        listed = all(name in hashes for name in checkpoints.values())
        if not listed or not all(hashes.values()) or not all(map(_is_hash, every)):
            raise _damaged(path)
        return cls(hashes, checkpoints)


def check_name(name: Any, where: Path) -> PurePosixPath:
    """A file's name in a run folder; `../x`, `/x` and their kind are refused, naming `where` they stood."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or re.search(r"[\\:\0]", part) for part in parts):
        raise ProbgenError(f"{where} names a file outside the run folder ({name!r}): do not trust it")
    return PurePosixPath(name)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _damaged(path: Path) -> ProbgenError:
    return ProbgenError(f"{path} is damaged: restore it from a copy, or fit again into another folder")
