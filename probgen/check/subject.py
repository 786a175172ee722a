"""What a law looks at: a program on its data, run for the first time; and what it answers."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import numpy as np

from probgen.program import Program, Structure, backend_of

_BATCH = 32


@dataclass(frozen=True)
class Verdict:
    """What a law says: it holds, it is broken, or (`None`) it does not apply; one sentence says why."""

    law: str
    passed: bool | None
    sentence: str

    def __str__(self) -> str:
        mark = {True: "✓", False: "✗", None: "–"}[self.passed]
        return f"{mark} {self.law}: {self.sentence}"


class Subject:
    """A program and its data. Everything is built when a law first asks for it, from weights as they start."""

    def __init__(self, program: Program, data: Any, seed: int = 0) -> None:
        from probgen.data import load_data

        self.program, self.seed = program, seed
        self.data = data if hasattr(data, "train") else load_data(data)
        self.backend = backend_of(program)
        self._engines: dict[tuple[str, bool, str], Any] = {}

    @functools.cached_property
    def preparation(self) -> Any:
        """The program's `prepare`, fitted on the training rows."""
        from probgen.data.prepare import Preparation

        return Preparation.of(self.program.prepare, self.data)

    @functools.cached_property
    def batch_size(self) -> int | None:
        """A small batch, or all rows where the program, or the way it is learned, asks for whole arrays."""
        asked = {**self.program.defaults, **getattr(self.by, "defaults", {})}.get("batch_size", _BATCH)
        return None if asked is None else min(asked, _BATCH)

    def feed(self, batch_size: int | None) -> Any:
        """Training batches of `batch_size` rows."""
        from probgen.data.feed import Feed

        return Feed(self.data.train, self.preparation, batch_size, self.seed)

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """One prepared batch."""
        return self.feed(self.batch_size).batch(0)

    @functools.cached_property
    def structure(self) -> Structure:
        """What one trace tells."""
        return self.backend.inspect(self.program, self.arrays, rows=len(self.data.train), seed=self.seed)

    def engine(self, by: Any = None, compile: bool = False, precision: str = "32") -> Any:
        """An engine for the program's own loss, or for another; made once, since an engine keeps no state."""
        by = by or self.by
        key = (repr(by), compile, precision)
        if key not in self._engines:
            self._engines[key] = self._engine(by, compile, precision)
        return self._engines[key]

    def _engine(self, by: Any, compile: bool, precision: str) -> Any:
        options = types.SimpleNamespace(
            steps=3, batch_size=self.batch_size, lr=1e-3, optimizer="adam", schedule=None, clip=None, ema=None,
            patience=None, seed=self.seed, device="cpu", precision=precision, compile=compile,
        )  # fmt: skip
        return self.backend.engine_of(self.program, by, self.feed(self.batch_size), options)

    @property
    def by(self) -> Any:
        """What the program is learned by; the ELBO where it does not say."""
        return self.program.by if self.program.by is not None else self.backend.ELBO()

    @functools.cached_property
    def trained(self) -> Any:
        """The program with the weights that it starts with."""
        return self.with_weights(self.weights)

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The weights that the program starts with."""
        engine = self.engine()
        return engine.weights(engine.start())

    def with_weights(self, weights: dict[str, np.ndarray], program: Program | None = None) -> Any:
        """The program, or a fresh copy of it, with given weights."""
        rows = len(self.data.train)
        return self.backend.trained_of(program or self.program, weights, self.arrays, rows=rows, seed=self.seed)
