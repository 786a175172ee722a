"""The recipe of a fit: what its arguments and the program's own defaults resolve to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from probgen.data import Data
from probgen.errors import ProbgenError
from probgen.options import conforming, wanted
from probgen.program import Program, backend_of
from probgen.schedules import Schedule

COMPILE_PAYS_FROM = 16_000  # steps of a small program on a CPU: about 12 s of compiling, 0.8 ms saved a step


class _Silent:
    """The default of an argument that was not given: the program's own recipe decides."""

    def __repr__(self) -> str:
        return "<the program's default>"


SILENT: Any = _Silent()


@dataclass(frozen=True)
class Options:
    """How a program is trained; what `fit` resolves its arguments to and a run folder keeps.

    `steps` gradient steps on batches of `batch_size` rows (None: all); `lr` and `optimizer` may be mappings by
    player; `schedule` multiplies `lr` by step; `clip` is the largest gradient norm; `ema` the decay of averaged
    weights; `patience` the number of validations without improvement that end the run.
    """

    steps: int
    batch_size: int | None = 128
    lr: Any = 1e-3
    optimizer: Any = "adam"
    schedule: Schedule | None = None
    clip: float | None = None
    ema: float | None = None
    patience: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "32"
    compile: bool = False

    def __post_init__(self) -> None:
        for name, annotation in _KINDS.items():
            value = conforming(getattr(self, name), annotation)
            if value is Ellipsis:
                raise ProbgenError(f"`{name}` must be {wanted(annotation)}, not {getattr(self, name)!r}")
            object.__setattr__(self, name, value)
        for name, ok, words in (
            ("steps", self.steps >= 0, "0 or more"),
            ("seed", 0 <= self.seed < 2**63, "0 or more, and below 2**63"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1, or None for all rows"),
            ("clip", self.clip is None or self.clip > 0, "positive"),
            ("ema", self.ema is None or 0 <= self.ema < 1, "between 0 and 1"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1"),
            ("lr", _is_rate(self.lr), "a positive number, or a mapping of such by player"),
        ):
            if not ok:
                raise ProbgenError(f"`{name}` is {getattr(self, name)!r}: it must be {words}")
        if self.schedule is not None and not callable(self.schedule):
            raise ProbgenError(
                f"`schedule` must be a function of the step, e.g. Cosine(1, 0, 5000), not {self.schedule!r}"
            )


_KINDS = {
    "steps": int, "batch_size": int | None, "clip": float | None, "ema": float | None, "patience": int | None,
    "seed": int, "device": str, "precision": str, "compile": bool,
}  # fmt: skip


def _is_rate(lr: Any) -> bool:
    if isinstance(lr, Mapping):
        return bool(lr) and all(map(_is_rate, lr.values()))
    number = conforming(lr, float)
    return callable(lr) if number is Ellipsis else 0 < number < math.inf


def _own(program: Program) -> dict[str, Any]:
    """The program's defaults, and over them those of the way it is learned: EM takes all rows, NUTS counts draws."""
    own = dict(getattr(program.by, "defaults", {}))
    length = {"steps", "epochs"} if own.keys() & {"steps", "epochs"} else set()
    return {**{name: value for name, value in program.defaults.items() if name not in length}, **own}


def resolved(
    program: Program, data: Data, steps: int | None, epochs: float | None, asked: Mapping[str, Any], compile: bool | str
) -> Options:
    """The options of a fit: what the caller asked, else the program's defaults, else those of `Options`."""
    known = {field.name for field in fields(Options)} | {"epochs"}
    unknown = [name for name in program.defaults if name not in known]
    if unknown:
        raise ProbgenError(
            f"the program's defaults name {unknown[0]!r}, which is no option of fit: {', '.join(sorted(known))}"
        )
    recipe = {**_own(program), **asked}
    default_epochs, default_steps = recipe.pop("epochs", None), recipe.pop("steps", None)
    if steps is None and epochs is None:
        steps, epochs = default_steps, default_epochs if default_steps is None else None
    if steps is not None and epochs is not None:
        raise ProbgenError("give `steps` or `epochs`, not both")
    if steps is None:
        epochs = 100 if epochs is None else epochs
        if conforming(epochs, float) is Ellipsis or not 0 <= epochs < math.inf:
            raise ProbgenError(f"`epochs` is {epochs!r}: it must be a number, 0 or more")
        batch = recipe.get("batch_size", 128)
        rows = len(data.train)
        per_epoch = max(1, rows // min(batch or rows, rows)) if rows else 1
        steps = round(epochs * per_epoch)
    if compile not in (True, False, "auto"):
        raise ProbgenError(f'`compile` must be True, False or "auto", not {compile!r}')
    options = Options(steps=int(steps) if isinstance(steps, float) and steps.is_integer() else steps, **recipe)
    cuda = options.device.startswith("cuda") or (options.device == "auto" and backend_of(program).has_cuda())
    return replace(options, compile=(cuda or options.steps >= COMPILE_PAYS_FROM) if compile == "auto" else compile)
