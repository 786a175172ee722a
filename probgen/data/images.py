"""A folder of images of one size: x [N, H, W] (grey) or [N, H, W, C], and y where folders name classes.

folder/*.png                      one set, no labels
folder/<class>/*.png              one set, y = number of the class in alphabetical order
folder/train, valid, test/...     a split, each laid out as above
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from probgen.data.tables import Fetched, Table
from probgen.errors import ProbgenError
from probgen.extras import need

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_SPLITS = ("train", "valid", "test")


def folder(path: Path) -> dict[str, Table]:
    """The table of a folder of images, or one for each of its splits."""
    if (path / "train").is_dir():
        present = [split for split in _SPLITS if (path / split).is_dir()]
        classes = _classes(path / "train")
        return {split: _table(path / split, classes) for split in present}
    return {"all": _table(path, _classes(path))}


def _classes(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and any(_images(p)))


def _images(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _table(path: Path, classes: list[str]) -> Table:
    files = _images(path)
    if not files:
        raise ProbgenError(f"there are no images in the folder {str(path)!r}: images end in {', '.join(SUFFIXES)}")
    labels = None
    if classes:
        names = [file.relative_to(path).parts[0] for file in files]
        stray = [file.name for file, name in zip(files, names, strict=True) if name not in classes]
        if stray:
            raise ProbgenError(
                f"{stray[0]!r} in {str(path)!r} lies outside the class folders {', '.join(classes)}: "
                "put every image in one of them, or all in one folder"
            )
        labels = np.array([classes.index(name) for name in names])
    mode = _common_mode(files)

    def fetch(indices: np.ndarray) -> dict[str, Any]:
        arrays = {"x": np.stack([_decoded(files[i], mode) for i in indices])}
        return arrays if labels is None else arrays | {"y": labels[indices]}

    return Fetched(fetch, len(files), str(path), fixed=True, classes={"y": len(classes)} if classes else None).settled()


def _common_mode(files: list[Path]) -> str:
    """The mode that all images are read in; reads headers only, and refuses images of different sizes."""
    modes, size = set(), None
    for file in files:
        with _opened(file) as image:
            modes.add(image.mode)
            size = size or image.size
            if image.size != size:
                raise ProbgenError(
                    f"{file.name!r} is {image.size[0]}x{image.size[1]} pixels and {files[0].name!r} "
                    f"{size[0]}x{size[1]}: bring all images in {str(files[0].parent)!r} to one size"
                )
    if modes <= {"1", "L"}:
        return "L"
    kept = {"RGB", "RGBA", "I;16", "I", "F"}
    return modes.pop() if len(modes) == 1 and modes <= kept else "RGB"


def _decoded(file: Path, mode: str) -> np.ndarray:
    with _opened(file) as image:
        try:
            return np.asarray(image if image.mode == mode else image.convert(mode))
        except (OSError, SyntaxError, ValueError) as error:
            raise ProbgenError(f"the image {str(file)!r} is damaged ({error}): replace or remove it") from error


def _opened(file: Path) -> Any:
    pillow = need("PIL.Image", "images", "a folder of images")
    try:
        return pillow.open(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise ProbgenError(f"{str(file)!r} is not an image that can be read: replace or remove it") from error
