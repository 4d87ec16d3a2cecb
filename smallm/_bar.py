"""A progress bar on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Report = Callable[[int, "int | None"], None]  # units done, units in all (None: unknown)


@contextlib.contextmanager
def bar(title: str, *, tokens: bool = False) -> Iterator[Report]:
    """Shows the bar while the block runs, which reports (bytes done, bytes in all or None), or
    tokens."""
    units: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if tokens:
        units = (MofNCompleteColumn(), TextColumn("tokens"))
    columns = (TextColumn("{task.description}"), BarColumn(), *units, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(escape(title), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
