"""The workers of one node: which process is in each slot, and which of them hold coordinates."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from deadpool_megatron.cluster.adoption import AdoptedProcess, Adoption
from deadpool_megatron.cluster.known import KnownJob
from deadpool_megatron.cluster.pinning import Pinning
from deadpool_megatron.cluster.settings import AgentSettings
from deadpool_megatron.cluster.workers import EPOCH, STACKS_FILE, Worker, end_group, start_worker

__all__ = ["Crew"]

_TERM_GRACE_S = 5.0


class Crew:
    """One worker process a slot, and in a rescue one in each extra slot. Used by the agent's thread only.

    Args:
        job: what this node knows of the job.
        poller: has the descriptors of every worker from its start until it is reaped.
        given_up: asked while workers that somebody else starts are waited for.

    Attributes:
        workers: by local index, the newest process of each slot, alive or not.

    Raises:
        OSError: another agent takes in the workers of this node.
    """

    def __init__(
        self, settings: AgentSettings, job: KnownJob, poller: zmq.Poller, given_up: Callable[[], bool]
    ) -> None:
        self._s = settings
        self._job = job
        self._poller = poller
        self._given_up = given_up
        self._log_dir = Path(settings.log_dir)
        self._adoption = Adoption(settings.adopt) if settings.adopt else None
        self._pinning = Pinning(settings.slots_per_node if settings.pin else 0)
        self.workers: dict[int, Worker] = {}

    # ---- the processes

    def start(self) -> None:
        """Start all workers, or take them in; a spare's are parked. Raises AdoptionError."""
        for local in range(self._s.slots_per_node):
            self._start(local, self._job.ranks.get(local))
        if self._adoption is not None:
            self._adoption.close()

    def _start(self, local: int, rank: int | None) -> None:
        env = dict(self._s.environment)
        env["LOCAL_RANK"] = str(local)
        env["LOCAL_WORLD_SIZE"] = str(self._s.slots_per_node)
        env["WORLD_SIZE"] = str(self._s.world_size)
        env["GROUP_RANK"] = str(self._s.node)
        env["GROUP_WORLD_SIZE"] = str(self._s.active_nodes)
        env["DEADPOOL_NODE"] = str(self._s.node)
        if self._job.rendezvous is not None:
            env["MASTER_ADDR"], env["MASTER_PORT"] = self._job.rendezvous.host, str(self._job.rendezvous.port)
        env[STACKS_FILE] = str(self.stacks_file(local))
        if rank is not None:
            env["RANK"] = str(rank)
            # A start that begins anew: workers of the one before may have left keys in the store.
            env[EPOCH] = env["TORCHELASTIC_RESTART_COUNT"] = str(self._job.epoch)
        if self._adoption is not None and local < self._s.slots_per_node:
            ours = {k: v for k, v in env.items() if os.environ.get(k) != v}
            worker = self._adoption.take(local, rank, ours, self._given_up)
        else:
            log = self._log_dir / f"rank-{rank}.log" if rank is not None else self._spare_log(local)
            with self._pinning.unpinned():
                worker = start_worker(self._s.command, env, local, rank, log)
        self.workers[local] = worker
        for fd in _descriptors(worker):
            self._poller.register(fd, zmq.POLLIN)

    def located(self, worker: Worker, numa: int) -> set[int]:
        """A worker has its device on NUMA node ``numa``; the processors that the agent is bound to now, or none."""
        alive = [each.pid for each in self.workers.values() if not each.exited]
        return self._pinning.cpus if self._pinning.located(worker.local, numa, alive) else set()

    def renew(self, local: int) -> None:
        """A fresh process in a slot, once the one that is there has ended (it is ended now).

        It is parked, or where the job has not begun to train begins at once as the coordinate that the slot has.
        """
        old = self.workers.get(local)
        if self._adoption is not None and local < self._s.slots_per_node:
            # Who has started it starts no other one: this node is drained, and its workers leave when it is let go.
            if old is not None:
                old.retired = True
            return
        if old is not None and not old.exited:
            old.retired = True
            end_group(old.pid, signal.SIGKILL)  # its end is seen by `reap`: device memory may take a while to go
            return
        if old is not None:
            del self.workers[local]  # it is closed even if no other one can be started
            old.close()
        self._start(local, self._job.ranks.get(local) if self._job.declared is None else None)

    def start_over(self) -> None:
        """The start begins anew: fresh processes wherever there is a coordinate, or was one."""
        for local, worker in list(self.workers.items()):
            if worker.rank is not None or local in self._job.ranks:
                self.renew(local)

    @property
    def renewing(self) -> bool:
        """Somebody has not ended yet whose place a fresh process takes."""
        return any(worker.retired for worker in self.workers.values())

    def reap(self, worker: Worker) -> int:
        """A worker has ended, by itself or as `renew` wants it; its exit code."""
        code = worker.process.wait()
        worker.exited, worker.exit_code = True, code
        end_group(worker.pid, signal.SIGKILL)  # its forked children hold its sockets open
        for fd in _descriptors(worker):
            self._poller.unregister(fd)
        return code

    def signal(self, signum: int) -> None:
        """To every worker that trains; 0 for none."""
        for worker in self.workers.values() if signum else ():
            if worker.rank is not None and not worker.exited:
                os.kill(worker.pid, signum)

    def end(self, at_once: bool, told: bool) -> None:
        """End all workers. Blocks until they have; ``at_once``: without time to leave.

        ``told``: workers that somebody else has started were told to leave, and leave with the job's exit code.
        """
        alive = [w for w in self.workers.values() if not w.exited]
        if not at_once:
            for worker in alive:
                if not (told and isinstance(worker.process, AdoptedProcess)):
                    end_group(worker.pid, signal.SIGTERM)
            end = time.monotonic() + _TERM_GRACE_S
            poller = zmq.Poller()
            for worker in alive:
                poller.register(worker.pidfd, zmq.POLLIN)
            while (left := end - time.monotonic()) > 0 and any(w.process.poll() is None for w in alive):
                poller.poll(min(100, int(left * 1000) + 1))
        for worker in alive:
            end_group(worker.pid, signal.SIGKILL)
            worker.process.wait()
        for worker in self.workers.values():
            worker.close()

    # ---- their coordinates

    def mine(self) -> dict[int, Worker]:
        """By rank, the workers of this node that hold a coordinate of the current assignment."""
        out: dict[int, Worker] = {}
        for local, rank in self._job.ranks.items():
            worker = self.workers.get(local)
            if worker is not None and not worker.exited and not worker.retired:
                out[rank] = worker
        return out

    def all_reached(self, step: str) -> bool:
        """Every coordinate here has a worker that has come to ``step`` in the current epoch."""
        return all(
            local in self.workers and self.workers[local].reached.get(step, -1) == self._job.epoch
            for local in self._job.ranks
        )

    def give_coordinates(self) -> list[Worker]:
        """Have parked workers hold the coordinates the assignment has for them; the workers that hold one now."""
        out: list[Worker] = []
        for local, rank in self._job.ranks.items():
            worker = self.workers.get(local)
            if worker is not None and worker.parked and worker.rank is None and not worker.retired:
                worker.rank = rank
                self._link_log(local, rank)
                out.append(worker)
        return out

    # ---- their files

    def stacks_file(self, local: int) -> Path:
        """Where a worker that is stuck shows the stacks of its threads."""
        return self._log_dir / f"stacks-node{self._s.node}-{local}.txt"

    def _spare_log(self, local: int) -> Path:
        return self._log_dir / f"spare-node{self._s.node}-{local}.log"

    def _link_log(self, local: int, rank: int) -> None:
        target = self._spare_log(local)
        if target.exists():  # an adopted worker writes where its launcher wants it
            link = self._log_dir / f"rank-{rank}.epoch-{self._job.epoch}.log"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)


def _descriptors(worker: Worker) -> tuple[int, int, int]:
    return worker.pidfd, worker.control.fileno(), worker.doorbell
