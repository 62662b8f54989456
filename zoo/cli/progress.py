"""Progress bars of a run: one line a phase, on a terminal; a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 15.0
"""Seconds between two lines when the output is no terminal."""


class Bars:
    """Callable as ``progress(phase, done, total, values)``."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.console = Console()
        self.tasks: dict[str, Any] = {}
        self.last = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, phase: str, done: int, total: int, values: dict[str, Any]) -> None:
        note = ""
        if "loss" in values and values.get("seconds"):
            note = f"loss {values['loss']:.3f}  {values['samples'] / values['seconds']:.0f} samples/s"
        label = f"{self.title}: {phase}"
        if not self.console.is_terminal:
            if time.monotonic() - self.last > QUIET_SECONDS or done == total:
                self.last = time.monotonic()
                self.console.print(f"{label} {done}/{total} {note}", highlight=False, markup=False, soft_wrap=True)
            return
        if phase not in self.tasks:
            self.tasks[phase] = self.progress.add_task(label, total=total, note=note)
        self.progress.update(self.tasks[phase], completed=done, total=total, note=note)
