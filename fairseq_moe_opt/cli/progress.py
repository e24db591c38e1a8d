"""What a person at a terminal sees while a command works; nothing at all where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_MAX_WARNINGS = 10


class _LinesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} lines/s")


@contextmanager
def line_progress(total: int | None, *, is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of lines just done; a bar on standard error if that is a terminal."""
    if not (is_shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    columns = (
        TextColumn("lines"),
        BarColumn(),
        MofNCompleteColumn(),
        _LinesPerSecond(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("lines", total=total)
        yield lambda lines: progress.advance(task, lines)


@contextmanager
def status(message: str, *, is_shown: bool = True) -> Iterator[None]:
    """``message`` with a spinner on standard error while the block runs, if that is a terminal."""
    if not (is_shown and sys.stderr.isatty()):
        yield
        return
    with Console(stderr=True).status(message):
        yield


class Warnings:
    """Warnings on standard error, one line each; after the tenth only their number, at the end."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._count = 0

    def add(self, message: str) -> None:
        """Say ``message``, or count it."""
        self._count += 1
        if self._count <= _MAX_WARNINGS:
            self._write(f"warning: {message}")

    def finish(self) -> None:
        """Say how many were only counted."""
        if self._count > _MAX_WARNINGS:
            self._write(f"warning: {self._count - _MAX_WARNINGS} more like these")
