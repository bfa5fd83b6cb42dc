"""One job of the demo, and what can be seen of its processes from outside."""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from deadpool_megatron.demo.evidence import Hashes, ProcessIdentity
from deadpool_megatron.jobs.job import Job, JobError

_SILENCE_S = 240.0  # without any event; starting ten processes on one busy core takes most of it
_AGENT_S = 10.0


class DemoRun(Job):
    """A job that writes its state hashes at the end."""

    def __init__(self, run_dir: Path, launch: Sequence[str], script: Sequence[str]) -> None:
        self._hash_file = run_dir / "state-hash.json"
        self._hash_file.unlink(missing_ok=True)  # of an older demo; it would be taken for this one's
        super().__init__(run_dir, launch, [*script, "--deadpool-state-hash", str(self._hash_file)])

    def follow(self, silence_s: float = _SILENCE_S) -> Iterator[dict[str, Any]]:
        """Events as they come, until the job has ended. Raises JobError after a long silence or a failed job."""
        yield from super().follow(silence_s)
        code = self.process.wait()
        if code != 0:
            raise JobError(
                f"the job of {self.run_dir} ended with exit code {code}: {self.output.strip() or 'no message'}"
            )

    def agent_pid(self, node: int) -> int:
        """The process id of a node's agent, as soon as the status says it."""

        def find() -> int | None:
            return next((n["agent_pid"] for n in self.status()["nodes"] if n["node"] == node), None)

        return int(self.until(f"agent of node {node}", find, _AGENT_S))

    def hashes(self) -> Hashes:
        """The state hashes the job has written at its end, by rank and part."""
        try:
            content = json.loads(self._hash_file.read_text())
        except FileNotFoundError:
            return {}
        hashes: Hashes = content["coordinates"]
        return hashes


class DeathWatch:
    """Notes the wall-clock time at which a process ends, as the kernel tells it (pidfd)."""

    def __init__(self, pid: int) -> None:
        self.died: float | None = None
        self._fd = os.pidfd_open(pid)
        threading.Thread(target=self._wait, name="death-watch", daemon=True).start()

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.poll()
        self.died = time.time()
        os.close(self._fd)


def identities(coordinates: Iterable[dict[str, Any]]) -> dict[int, ProcessIdentity | None]:
    """The living processes of coordinates of ``status.json``, by rank; None for one that does not live."""
    out: dict[int, ProcessIdentity | None] = {}
    for c in coordinates:
        try:
            process = psutil.Process(c["pid"])
            alive = process.status() != psutil.STATUS_ZOMBIE
            out[c["rank"]] = ProcessIdentity(c["pid"], process.create_time()) if alive else None
        except psutil.NoSuchProcess:
            out[c["rank"]] = None
    return out
