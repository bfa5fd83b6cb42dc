"""Jobs as benches and tests have them: looked into, and hurt."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from deadpool_bench.harness.forking import FORK_SERVER, fork_module
from deadpool_megatron.jobs import job
from deadpool_megatron.observe import LOGS, read_events
from deadpool_megatron.vault import PREFIX, Arena

_ITERATION = re.compile(r" iteration +(\d+)/")
_SHM = "/dev/shm"  # where the launcher puts arenas unless it is told otherwise
_SPOILT = 64  # bytes of a copy that are overwritten
_POLL_S = 0.02
_LOOK_S = 0.5  # at the clock, while the end of a process is waited for


def fork_cli(
    arguments: Sequence[str], environment: Mapping[str, str], directory: Path | None = None, **streams: Any
) -> subprocess.Popen[Any]:
    """As `job.start_cli`; the command comes out of the fork server that the environment names, if it names one."""
    if server := environment.get(FORK_SERVER):
        return fork_module(server, job.CLI[2], arguments, environment, directory=directory, **streams)
    return job.start_cli(arguments, environment, directory, **streams)


def describe(process: psutil.Process) -> str:
    """Its id and the first words of its command."""
    try:
        return f"{process.pid} {' '.join(process.cmdline()[:5])}"
    except psutil.NoSuchProcess:
        return str(process.pid)


class Job(job.Job):
    """One `deadpool launch` in a process of its own."""

    start = staticmethod(fork_cli)

    # ---- what can be seen

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Events so far, oldest first."""
        return [e for e in read_events(self.run_dir) if name is None or e["event"] == name]

    def pids(self) -> dict[int, int]:
        """Process ids of the coordinates, by rank."""
        return {c["rank"]: c["pid"] for c in self.status()["coordinates"]}

    def node_pids(self, node: int) -> list[int]:
        """Process ids of a node's agent and all its workers."""
        status = self.status()
        pids = [n["agent_pid"] for n in status["nodes"] if n["node"] == node]
        pids += [c["pid"] for c in status["coordinates"] if c["node"] == node]
        pids += [pid for s in status["spares"] if s["node"] == node for pid in s["pids"]]
        return [pid for pid in pids if pid]

    def processes(self) -> list[psutil.Process]:
        """The launcher and everything started under it that lives, whoever its parent is now."""
        return self._descendants.living()

    def printed_iterations(self) -> list[int]:
        """Iterations Megatron has printed (from 1), of the log that has them (that of the last rank)."""
        out: list[int] = []
        for path in (self.run_dir / LOGS).glob("rank-*.log"):
            if not path.is_symlink():
                out += [int(n) for n in _ITERATION.findall(path.read_text(errors="replace"))]
        return out

    # ---- what can be done

    def join(self) -> subprocess.Popen[bytes]:
        """A node joins the job as a spare, in the background: its command, which ends with the node."""
        with open(self._out, "ab") as out:
            command = ["join", "--run-dir", str(self.run_dir)]
            return self.start(command, self._environment, stdout=out, stderr=subprocess.STDOUT)

    def kill_node(self, *nodes: int) -> float:
        """SIGKILL for the agents and all workers of nodes, as one blow; returns the wall-clock time of it."""
        return self.signal_nodes(signal.SIGKILL, *nodes)

    def signal_nodes(self, signum: signal.Signals, *nodes: int) -> float:
        """Send a signal to the agents and all workers of nodes, as one blow; returns the wall-clock time of it."""
        pids = [pid for node in nodes for pid in self.node_pids(node)]
        moment = time.time()
        for pid in pids:
            self.signal_process(pid, signum)
        return moment

    def spoil_copies(self, *ranks: int) -> int:
        """Overwrite bytes of every copy of these coordinates that another node keeps; returns how many there were."""
        spoilt = 0
        for rank in ranks:
            for path in Path(_SHM).glob(f"{PREFIX}{self.process.pid}-*-{rank}-peer"):
                arena = Arena.attach(str(path))
                for slot in arena.slots:
                    slot.unique[:_SPOILT] = bytes(255 - byte for byte in slot.unique[:_SPOILT])
                    spoilt += 1
                arena.close()
        return spoilt

    def signal_process(self, pid: int, signum: signal.Signals) -> None:
        """Send a signal to one process of the job."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)

    def wait(self, deadline_s: float = 3600.0) -> int:
        """The exit code of the job; `failed` when it does not end in time."""
        end = self.clock() + deadline_s
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(_LOOK_S)
            if self.clock() > end:
                self.failed(f"it does not end within {deadline_s:g} s")

    def until_gone(self, deadline_s: float) -> None:
        """Until no process of this job lives; `failed` when the deadline passes."""
        end = self.clock() + deadline_s
        while left := self._descendants.living():
            if self.clock() > end:
                self.failed(f"still alive after {deadline_s:g} s: {[describe(p) for p in left]}")
            time.sleep(_POLL_S)
