"""Telling the arenas of living jobs from those a killed agent has left behind."""

from __future__ import annotations

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import Final

PREFIX: Final = "deadpool-"
MAGIC: Final = int.from_bytes(b"DEADPOL2", "little")  # (files of the first kind have no lock, and named a process)
PAGE: Final = 4096


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


def is_left(path: str | Path) -> bool:
    """Whether this is an arena whose agent is gone. Raises OSError.

    Its agent holds a lock on it, which ends with that process, wherever it runs: another container may share the
    directory, and what its process ids say is nothing to us.
    """
    with open(path, "rb") as file:
        head = memoryview(file.read(PAGE))
        if len(head) < PAGE or head.cast("Q")[0] != MAGIC:
            return False  # not an arena: arenas appear under their name only when whole
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that those who look do not meet each other
        except BlockingIOError:
            return False
        return True


def clean_leftovers(directory: str) -> list[str]:
    """Unlink the arenas in ``directory`` whose agent is gone; returns their names."""
    removed = []
    for path in Path(directory).glob(PREFIX + "*"):
        with suppress(FileNotFoundError, PermissionError):  # another agent was quicker, or another user's job
            if is_left(path):
                path.unlink()
                removed.append(path.name)
    return removed
