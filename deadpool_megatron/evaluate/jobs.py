"""Jobs under measurement: started through the `deadpool` command, watched through their run directory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deadpool_megatron.observe import LOGS, STATUS, read_events

__all__ = ["Job", "JobError"]

_ITERATION = re.compile(r" iteration +(\d+)/")


class JobError(RuntimeError):
    """A job under measurement did not do what it should; the message is one line."""


class Job:
    """One `deadpool launch` in a subprocess. A context manager: whatever happens, the job is ended."""

    def __init__(self, run_dir: Path, launch: Sequence[str], script: Sequence[str]) -> None:
        self.run_dir = run_dir
        self._log = open(f"{run_dir}.out", "ab")  # noqa: SIM115 - closed with the job
        self._process = subprocess.Popen(
            [
                *[sys.executable, "-m", "deadpool_megatron.cli", "launch", "--run-dir", str(run_dir), "--tee", "none"],
                *launch,
                *script,
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *args: object) -> None:
        self.end()

    def end(self) -> None:
        """Interrupt the job and wait until it has ended."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        self._log.close()

    def wait(self) -> int:
        """The exit code."""
        return self._process.wait()

    def until(self, what: str, find: Callable[[], Any], deadline_s: float) -> Any:
        """Poll ``find`` until it gives something. Raises JobError when the job ends or the deadline passes."""
        end = time.monotonic() + deadline_s
        while True:
            found = find()
            if found:
                return found
            if self._process.poll() is not None:
                code = self._process.returncode
                raise JobError(f"the job of {self.run_dir} ended ({code}) before {what}; see its logs")
            if time.monotonic() > end:
                raise JobError(f"the job of {self.run_dir}: no {what} within {deadline_s:g} s; see its logs")
            time.sleep(0.02)

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """Events so far."""
        return [e for e in read_events(self.run_dir) if event is None or e["event"] == event]

    def status(self) -> dict[str, Any]:
        """The status now."""
        status: dict[str, Any] = json.loads((self.run_dir / STATUS).read_text())
        return status

    def kill_node(self, node: int) -> float:
        """SIGKILL for a node's agent and all its workers, as one blow; returns the wall-clock time of it."""
        status = self.status()
        pids = [n["agent_pid"] for n in status["nodes"] if n["node"] == node]
        pids += [c["pid"] for c in status["coordinates"] if c["node"] == node]
        moment = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return moment

    def printed_iterations(self) -> list[int]:
        """Iterations Megatron has printed, of the log that has them (that of the last rank)."""
        out: list[int] = []
        for path in (self.run_dir / LOGS).glob("rank-*.log"):
            if not path.is_symlink():
                out += [int(n) for n in _ITERATION.findall(path.read_text(errors="replace"))]
        return out

    def has_printed(self, iteration: int) -> bool:
        """Megatron has printed the line of ``iteration``."""
        return iteration in self.printed_iterations()
