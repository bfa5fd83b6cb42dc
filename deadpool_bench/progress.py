"""Lines of progress, and below them, where stderr is a terminal, how much is done and how long the rest takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft

_A_STEP_MAY_LAST_S = 3600.0  # rich forgets what is older when it works out the time that is left
_running: list[tuple[Progress, TaskID]] = []


@contextmanager
def progress(what: str, steps: int, console: Console | None = None) -> Iterator[None]:
    """A bench of so many steps is under way; `step` counts them. Nothing is drawn where stderr is no terminal."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    bar = Progress(
        TextColumn("{task.description}"),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeLeft()),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file is not drawn over
        speed_estimate_period=_A_STEP_MAY_LAST_S,
    )
    with bar:
        _running.append((bar, bar.add_task(what, total=steps)))
        try:
            yield
        finally:
            _running.pop()


def step(count: int = 1) -> None:
    """So many steps of the bench that is under way are done."""
    for bar, task in _running[-1:]:
        bar.advance(task, count)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
