"""One `deadpool launch` of the demo in a subprocess, and what can be seen of it from outside."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from deadpool_megatron.demo.evidence import Hashes, ProcessIdentity
from deadpool_megatron.observe import EVENTS, STATUS, follow_events

__all__ = ["DeathWatch", "DemoError", "DemoRun", "identities"]

_SILENCE_S = 240.0  # without any event; starting ten processes on one busy core takes most of it
_END_S = 40.0
_POLL_S = 0.02


class DemoError(RuntimeError):
    """A run did not do what the demo is about; the message is one line (and what the launcher said)."""


class DemoRun:
    """A job. A context manager: whatever happens, the launcher it started is ended, and with it all its processes."""

    def __init__(self, run_dir: Path, command: Sequence[str]) -> None:
        self.run_dir = run_dir
        self.hash_file = run_dir / "state-hash.json"
        self._output = run_dir / "launcher.log"
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (EVENTS, STATUS, self.hash_file.name):  # of an older demo; they would be taken for this one's
            (run_dir / name).unlink(missing_ok=True)
        with open(self._output, "wb") as out:
            # A session of its own: Ctrl-C reaches only the demo, which then ends the launcher in order.
            self._process = subprocess.Popen(
                [*command, "--deadpool-state-hash", str(self.hash_file)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> DemoRun:
        return self

    def __exit__(self, *args: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def follow(self) -> Iterator[dict[str, Any]]:
        """Events as they come, until the job has ended. Raises DemoError after a long silence or a failed job."""
        heard = [time.monotonic()]

        def alive() -> bool:
            if time.monotonic() - heard[0] > _SILENCE_S:
                raise DemoError(f"no event within {_SILENCE_S:g} s; see {self.run_dir}")
            return self._process.poll() is None

        for event in follow_events(self.run_dir, alive, _POLL_S):
            heard[0] = time.monotonic()
            yield event
        if self._process.returncode != 0:
            said = self._output.read_text(errors="replace").strip()
            code = self._process.returncode
            raise DemoError(f"the job of {self.run_dir} ended with exit code {code}: {said or 'no message'}")

    def status(self) -> dict[str, Any] | None:
        """The content of ``status.json``; None before it is there."""
        try:
            status: dict[str, Any] = json.loads((self.run_dir / STATUS).read_text())
        except FileNotFoundError:
            return None
        return status

    def agent_pid(self, node: int, deadline_s: float = 10.0) -> int:
        """The process id of a node's agent, as soon as the status says it."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            status = self.status()
            pids = [n["agent_pid"] for n in status["nodes"] if n["node"] == node] if status else []
            if pids and pids[0]:
                return int(pids[0])
            time.sleep(_POLL_S)
        raise DemoError(f"node {node} has no agent; see {self.run_dir}")

    def inject(self, node: int, iteration: int, tick: int) -> list[str]:
        """Arm the kill with `deadpool inject`; returns the command. Raises DemoError when it is refused."""
        command = ["inject", "--run-dir", str(self.run_dir), "--node", str(node), "--fault", "kill"]
        command += ["--at-iteration", str(iteration), "--at-tick", str(tick)]
        done = subprocess.run(
            [sys.executable, "-m", "deadpool_megatron.cli", *command], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DemoError(f"the kill was refused: {done.stderr.strip()}")
        return ["deadpool", *command]

    def hashes(self) -> Hashes:
        """The state hashes the job has written at its end, by rank and part."""
        try:
            content = json.loads(self.hash_file.read_text())
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
