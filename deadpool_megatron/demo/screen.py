"""The display of one run while it trains: redrawn in place on a terminal, a line per event elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from deadpool_megatron.demo.evidence import Step, steps_of
from deadpool_megatron.observe.narrative import ranks_text
from deadpool_megatron.observe.recoveries import PHASES
from deadpool_megatron.observe.tables import grid_table

_STARTING = "starting: every process imports torch and Megatron"
_SIGN_OF_LIFE_S = 10.0  # off a terminal, until the first iteration


class Screen:
    """A context manager around one run; `take` shows what each event brought.

    Args:
        iterations: of the whole run.
        reference: the undisturbed run's iterations, to show each loss beside it.
    """

    def __init__(
        self, console: Console, title: str, iterations: int, reference: Mapping[int, Step] | None = None
    ) -> None:
        self._console = console
        self._reference = reference or {}
        self._progress = Progress(
            SpinnerColumn(), BarColumn(30), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
        )
        self._task = self._progress.add_task(_STARTING, total=iterations)
        self._grid: RenderableType | None = None
        self._notes: list[Text] = []
        self._committed: int | None = None
        self._seconds = self._blocked = 0.0
        self._moved: set[int] = set()
        self._lost: set[int] = set()
        self._live = Live(self._frame(), console=console, refresh_per_second=8) if console.is_terminal else None
        self._going = threading.Event()  # the first iteration is done, or the run has ended
        console.rule(f"[bold]{title}") if console.is_terminal else console.print(f"== {title}", markup=False)

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        else:
            self._console.print(_STARTING)
            threading.Thread(target=self._say_how_long, name="demo-starting", daemon=True).start()
        return self

    def _say_how_long(self) -> None:
        start = time.monotonic()
        while not self._going.wait(_SIGN_OF_LIFE_S):
            self._console.print(f"{time.monotonic() - start:.0f} s, no iteration yet")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._going.set()
        self._progress.stop_task(self._task)
        if self._live is not None:
            self._live.update(self._frame())
            self._live.stop()
        elif kind is None and self._grid is not None:
            self._console.print(self._grid)

    @property
    def blocked_share(self) -> float:
        """Time that training spent in DeadPool, as a share of all iterations after the first."""
        return self._blocked / self._seconds if self._seconds else 0.0

    def note(self, text: str, style: str = "") -> None:
        self._notes.append(Text(text, style))
        if self._live is None:
            self._console.print(Text(text))
        else:
            self._live.update(self._frame())

    def take(self, event: Mapping[str, Any], status: Mapping[str, Any] | None) -> None:
        """Show what an event and the newest status say."""
        name = event["event"]
        if name == "started":
            spares = event["spares"]
            self.note(f"{event['nodes']} nodes, {spares} of them spare; {event['world_size']} coordinates", "dim")
        elif name == "parked":
            self.note(f"node {event['node']} is parked as a warm spare", "cyan")
        elif name == "training":
            self._describe("training")
        elif name == "committed":
            self._committed = event["iteration"]
        elif name == "iteration":
            self._iteration(event)
        elif name == "detected":
            self._lost.add(event["node"])
            self.note(f"node {event['node']} is dead: coordinates {ranks_text(event['ranks'])} are lost", "bold red")
        elif name == "declared":
            self._moved |= set(event["replaced"])
        elif name == "resumed":
            self.note(f"recovered: epoch {event['epoch']}, going on from iteration {event['iteration']}", "bold green")
        if name in PHASES:
            self._describe(f"recovery: {name}" if name != "resumed" else f"redoing iteration {event['iteration']}")
        if status is not None:
            self._grid = grid_table(self._console, status, self._lost, self._moved)
        if self._live is not None:
            self._live.update(self._frame())

    def _iteration(self, event: Mapping[str, Any]) -> None:
        self._going.set()
        (step,) = steps_of([event])
        if step.iteration > 0:
            self._seconds += step.seconds
            self._blocked += step.blocked_s
        committed = "none" if self._committed is None else self._committed
        same = ""
        if step.iteration in self._reference:
            same = ", as undisturbed" if step.exact == self._reference[step.iteration].exact else ", NOT as undisturbed"
        text = f"iteration {step.iteration}, loss {step.loss}{same}, committed {committed}, "
        text += f"blocked {self.blocked_share:.2%}"
        self._describe(text, step.iteration + 1)
        if self._live is None:
            self._console.print(Text(text))

    def _describe(self, text: str, completed: int | None = None) -> None:
        self._progress.update(self._task, description=text, completed=completed)

    def _frame(self) -> RenderableType:
        grid = [self._grid] if self._grid is not None else []
        return Group(*grid, *self._notes, self._progress)
