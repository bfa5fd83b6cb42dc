"""The run directory: ``status.json`` (rewritten atomically), ``events.jsonl`` (appended), ``logs/``, ``job.json``.

Only the coordinator writes status and events. ``job.json`` holds what `deadpool inject` and `deadpool status` need to
reach the job, the secret included, and is readable by its owner alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

__all__ = ["EVENTS", "JOB", "LOGS", "STATUS", "RunDirectory", "follow_events", "read_events"]

STATUS: Final = "status.json"
EVENTS: Final = "events.jsonl"
JOB: Final = "job.json"
LOGS: Final = "logs"


class RunDirectory:
    """Writer of a run directory. Made empty of an older run's files. Raises OSError when it cannot be made."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        (self.path / LOGS).mkdir(parents=True, exist_ok=True)
        for old in [*(self.path / LOGS).iterdir(), self.path / STATUS, self.path / EVENTS, self.path / JOB]:
            old.unlink(missing_ok=True)
        self._events = open(self.path / EVENTS, "a", buffering=1)  # noqa: SIM115 - open for the life of the run

    def event(self, event: str, **fields: Any) -> None:
        """Append one event with the wall-clock time ``t`` in unix seconds."""
        self._events.write(json.dumps({"t": time.time(), "event": event, **fields}) + "\n")

    def status(self, status: dict[str, Any]) -> None:
        """Replace ``status.json`` in one step: a reader sees the old or the new one, never a part."""
        self._replace(STATUS, status, 0o644)

    def job(self, job: dict[str, Any]) -> None:
        """Write ``job.json``, for the owner's eyes only."""
        self._replace(JOB, job, 0o600)

    def _replace(self, name: str, content: dict[str, Any], mode: int) -> None:
        temporary = self.path / f".{name}.{os.getpid()}"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as f:
            json.dump(content, f, indent=1)
            f.write("\n")
        os.replace(temporary, self.path / name)

    def close(self) -> None:
        """Close the event log."""
        self._events.close()


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """All events so far, oldest first; a last line that is still being written is left out."""
    try:
        text = (Path(run_dir) / EVENTS).read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def follow_events(run_dir: str | Path, alive: Any, poll_s: float = 0.05) -> Iterator[dict[str, Any]]:
    """Events as they are written, until ``alive()`` is false and no more are there. For displays."""
    path = Path(run_dir) / EVENTS
    rest = ""
    position = 0
    while True:
        last = not alive()
        if path.exists():
            with open(path) as f:
                f.seek(position)
                rest += f.read()
                position = f.tell()
            *lines, rest = rest.split("\n")
            for line in lines:
                yield json.loads(line)
        if last:
            return
        time.sleep(poll_s)
