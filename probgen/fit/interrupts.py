"""Ctrl-C and SIGTERM while a program trains: noted at once, obeyed after the step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, NoReturn, Self


class Interrupts:
    """Within `with Interrupts() as interrupts`, a first signal sets `asked`; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number

    def leave(self, folder: Any) -> NoReturn:
        """Stop the way the signal asks: KeyboardInterrupt (exit 130), or SystemExit(143)."""
        where = f"stopped; `probgen resume {folder.path}` goes on from here" if folder is not None else "stopped"
        if self.asked == signal.SIGTERM:
            print(where, flush=True)
            raise SystemExit(143)
        raise KeyboardInterrupt(where)
