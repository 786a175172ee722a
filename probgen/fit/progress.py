"""The progress of a fit: a live bar in a terminal or a notebook, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

LINE_EVERY = 10.0  # seconds
BAR = 30  # characters


class Progress:
    """`show(step, loss, valid_loss)` between pieces of work, inside `with Progress(...)`."""

    def __init__(self, name: str, steps: int, enabled: bool = True) -> None:
        self.name, self.steps, self.enabled = name, steps, enabled
        self._bar: Any = None
        self._task: Any = None
        self._cell: Any = None
        self._lined, self._said = -LINE_EVERY, ""

    def __enter__(self) -> Self:
        if not self.enabled:
            return self
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        if console.is_jupyter:  # one line of the cell, written anew: rich's own bar needs ipywidgets
            from IPython.display import display

            self._cell = display({"text/plain": self._drawn(0, "")}, raw=True, display_id=True)
        elif console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[valid]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task(self.name, total=self.steps, loss="…", valid="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, loss: float, valid_loss: float | None = None) -> None:
        """The step reached, the loss there and the last validation loss, in nats per datum."""
        valid = "" if valid_loss is None else f"valid {valid_loss:.4f}"
        said = self._said = f"loss {loss:.4f}  {valid}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", valid=valid)
        elif self._cell is not None:
            self._cell.update({"text/plain": self._drawn(step, said)}, raw=True)
        elif self.enabled and (time.monotonic() - self._lined > LINE_EVERY or step == self.steps):
            self._lined = time.monotonic()
            print(f"{self.name}  step {step}/{self.steps}  {said}", file=sys.stderr, flush=True)

    def ended(self, step: int, why: str) -> None:
        """The fit stops before the last of its steps, and why."""
        told = f"{why} after {step} of {self.steps} steps"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=step, description=f"[bold]{self.name}[/bold]  {told}")
        elif self._cell is not None:
            self._cell.update({"text/plain": f"{self.name}  {told}  {self._said}"}, raw=True)
        elif self.enabled:
            print(f"{self.name}  {told}  {self._said}", file=sys.stderr, flush=True)

    def _drawn(self, step: int, said: str) -> str:
        """The bar as a line of text."""
        done = BAR * step // max(1, self.steps)
        return f"{self.name} {'━' * done}{'─' * (BAR - done)} {step}/{self.steps}  {said}".rstrip()
