"""Telling the arenas of living jobs from those a killed agent has left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

PREFIX: Final = "deadpool-"
MAGIC: Final = int.from_bytes(b"DEADPOOL", "little")
PAGE: Final = 4096
PID_WORD: Final = 8  # words of an arena's first page: the agent that owns it
START_WORD: Final = 9


def process_start(pid: int) -> int | None:
    """When the process started (clock ticks since boot, proc(5) field 22); None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rsplit(")", 1)[1].split()[19])


def process_alive(pid: int, start: int) -> bool:
    """Whether the process that started at ``start`` still lives (a reused process id does not count)."""
    return process_start(pid) == start


def clean_leftovers(directory: str, alive: Callable[[int, int], bool] = process_alive) -> list[str]:
    """Unlink the arenas in ``directory`` whose agent, by (process id, start time), is gone; returns their names."""
    removed = []
    for path in Path(directory).glob(PREFIX + "*"):
        try:
            with path.open("rb") as file:
                head = memoryview(file.read(PAGE))
            if len(head) < PAGE or head.cast("Q")[0] != MAGIC:
                continue  # not an arena: arenas appear under their name only when whole
            words = head.cast("Q")
            if not alive(words[PID_WORD], words[START_WORD]):
                path.unlink()
                removed.append(path.name)
        except (FileNotFoundError, PermissionError):
            continue  # another agent was quicker, or another user's job
    return removed
