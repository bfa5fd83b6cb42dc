"""Faults that tests and `deadpool inject` have strike one node: armed for a point or an iteration, or at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.shards import Shards
from deadpool_megatron.cluster.agent.workers import Worker, end_group


class Faults:
    """The faults of one node, and how each strikes."""

    def __init__(
        self, node: int, crew: Crew, shards: Shards | None, tell: Callable[[r.MachineSign], None] | None = None
    ) -> None:
        """``tell``: what the machine is said to tell goes to the coordinator."""
        self._tell = tell
        self._node = node
        self._crew = crew
        self._shards = shards
        self._armed: list[r.Arm] = []  # in the workers

    def arm(self, record: r.Arm) -> None:
        """Arm a fault in this process or in the workers, or strike now when it names no moment."""
        fault = record.fault
        if fault.point:
            where = points.POINTS[fault.point][0]
            if where == "agent":
                points.arm(fault.point, -1, lambda: self._strike(fault))
                return
        if fault.point or fault.iteration is not None:
            self._armed.append(record)
            # The fault of a worker is not that of who takes its place: it would strike twice.
            own = fault.point.startswith("take-over.")
            beside = [each for each in self._crew.beside if own or not each.standby]
            for worker in (*self._crew.workers.values(), *beside):
                worker.send(record)
            return
        self._strike(fault)

    def send_bugs(self, worker: Worker) -> None:
        """Arm what strikes a worker that has started since as well: a bug is in every process that runs the code."""
        for armed in self._armed:
            if armed.fault.kind == "raise":
                worker.send(armed)

    def _strike(self, fault: r.Fault) -> None:
        """Do what the fault says, now; on the thread that passes the point."""
        workers = self._crew.workers
        worker = workers.get(fault.local)
        points.announce(fault.kind, f"node {self._node}", sys.stderr)
        match fault.kind:
            case "kill":
                for each in (*workers.values(), *self._crew.beside):
                    end_group(each.pid, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill-agent":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop-agent":
                for each in (*workers.values(), *self._crew.beside):
                    end_group(each.pid, signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGSTOP)
            case "kill-worker" if worker is not None:
                end_group(worker.pid, signal.SIGKILL)
            case "crash" if worker is not None:
                end_group(worker.pid, signal.SIGSEGV)
            case "stop" if worker is not None:
                end_group(worker.pid, signal.SIGSTOP)
            case "corrupt" if worker is not None and worker.rank is not None and self._shards is not None:
                self._shards.corrupt(worker.rank)
            case "sign" if self._tell is not None:
                self._tell(r.MachineSign(self._node, int(fault.sign.removeprefix("xid:")), text="injected"))
            case _:
                if worker is not None:
                    worker.send(r.Arm(fault))
