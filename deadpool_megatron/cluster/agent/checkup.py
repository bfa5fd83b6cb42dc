"""A parked spare node looks whether it could take over: its workers, its memory, its links.

::

    CheckSpare -> each parked worker: Check .. Checked, and what it has copied is compared
               -> a thread: room in the vault, an exchange with partners' vaults .. Looked
                                                            all there: SpareChecked -> coordinator

Nothing waits for any of it: a worker that never answers is the coordinator's to notice.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.shards import Looked, Shards
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.vault import Scratch


class Checkup:
    """The newest check of one node."""

    def __init__(self, job: KnownJob, crew: Crew, shards: Shards, send: Callable[[r.AgentRecord], None]) -> None:
        self._job = job
        self._crew = crew
        self._shards = shards
        self._send = send
        self._number = -1
        self._begun = 0.0
        self._open: dict[int, Scratch] = {}  # by local index, of workers that have not answered
        self._looked: Looked | None = None
        self._why = ""

    def begin(self, order: r.CheckSpare) -> None:
        """Check this node, if it is a spare whose workers are parked; one that is not is not asked for an answer."""
        self.stop()
        workers = self._crew.workers
        if self._job.ranks or not all(each.parked and not each.exited for each in workers.values()):
            return
        self._number, self._begun, self._looked, self._why = order.number, time.monotonic(), None, ""
        try:
            for local in workers:
                self._open[local] = self._shards.scratch(local)
        except OSError as err:
            self._why = f"no memory for a check: {err.strerror}"
            self._close()
        for local, scratch in self._open.items():
            workers[local].send(r.Check(order.number, scratch.path))
        vaults = self._job.vaults
        partners = {node: vaults[node] for node in order.partners if node in vaults}
        self._shards.check(order.number, order.memory_bytes, partners)

    def answered(self, worker: Worker, record: r.Checked) -> None:
        """A worker has computed and copied."""
        if record.number != self._number or (scratch := self._open.pop(worker.local, None)) is None:
            return
        why = record.why or ("" if scratch.copied else "what it has copied is not what was there")
        scratch.close()
        if why:
            self._why = self._why or f"worker {worker.local}: {why}"
        self._tell()

    def looked(self, event: Looked) -> None:
        """The thread is through."""
        if event.number == self._number:
            self._looked = event
            self._tell()

    def stop(self) -> None:
        """What is under way counts no more."""
        self._number = -1
        self._close()

    def _close(self) -> None:
        for scratch in self._open.values():
            scratch.close()
        self._open.clear()

    def _tell(self) -> None:
        if self._looked is None or self._open:
            return
        why, seconds = self._why or self._looked.why, time.monotonic() - self._begun
        self._send(r.SpareChecked(self._job.node, self._number, why, seconds, self._looked.link_s))
        self._number = -1
