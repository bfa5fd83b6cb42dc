"""The processes of one node's workers: how they are started with what they need, stopped, looked at, and ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import zmq

from deadpool_megatron.cluster.agent.adoption import AdoptedProcess, Adoption
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.pinning import Pinning
from deadpool_megatron.cluster.agent.pulse import shared_page
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.warm_server import WarmServer
from deadpool_megatron.cluster.agent.workers import (
    BEGAN,
    EMULATE,
    EPOCH,
    ERROR_FILE,
    REHEARSES,
    STACKS_FILE,
    STACKS_SIGNAL,
    STANDBY,
    Worker,
    end_group,
    output,
    start_worker,
)
from deadpool_megatron.output import Aside

_TERM_GRACE_S = 5.0
_MOST_FILES = 100
_PATIENCE_S = 1.0
_READ: Final = 1 << 14  # bytes of the end of a log
_LINES: Final = 8
_COLUMNS: Final = 500
_USAGE: Final = re.compile(r"^\S+: error: ")  # argparse's line; above it is the usage, hundreds of lines in Megatron
_TRACEBACK: Final = "Traceback (most recent call last):"


class WorkerProcesses:
    """What `Crew` decides over. Used by the agent's thread only.

    Args:
        job: what this node knows of the job.
        poller: has the descriptors of every worker from its start until it is reaped.
        given_up: asked while workers that somebody else starts are waited for.

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
        self._files = Aside("files of workers", _MOST_FILES, _PATIENCE_S)  # on a file system that may hang
        self._adoption = Adoption(settings.adopt) if settings.adopt else None
        self._muster = shared_page("muster")
        self._pinning = Pinning(settings.slots_per_node if settings.pin else 0)
        wanted = settings.config.wants_warm_server and not settings.adopt
        self._warm = WarmServer(settings.command) if wanted else None

    @property
    def share_devices(self) -> bool:
        """Those of one slot take memory from one another, which is theirs until they have ended."""
        return EMULATE not in self._s.environment

    def adopted(self, local: int) -> bool:
        """Somebody else starts the worker of this slot, and starts it once."""
        return self._adoption is not None and local < self._s.slots_per_node

    def start(self, local: int, rank: int | None, rehearses: int | None = None, standby: bool = False) -> Worker:
        """Start the worker of a slot, or take it in; or one that rehearses, or stands by. Raises AdoptionError."""
        env = {**self._s.environment, **self.of_job(rank)}
        env["LOCAL_RANK"] = str(local)
        env[STACKS_FILE] = str(self.stacks_file(local))
        if rehearses is not None:
            env[REHEARSES] = str(rehearses)
        if standby:
            env[STANDBY] = self._s.config.standby_workers
        if self._adoption is not None and self.adopted(local):
            ours = {k: v for k, v in env.items() if os.environ.get(k) != v}
            worker = self._adoption.take(local, rank, ours, self._muster, self._given_up)
        else:
            place = f"node{self._s.node}-{local}" + (f"-rank-{rehearses}" if rehearses is not None else "")
            kind = "standby" if standby else "spare"
            env[ERROR_FILE] = str(self._log_dir / f"error-{'standby-' * standby}{place}.json")
            log = self._log_dir / (f"rank-{rank}.log" if rank is not None else f"{kind}-{place}.log")
            with self._pinning.unpinned():
                fork = self._warm.fork if self._warm is not None else None
                worker = start_worker(self._s.command, env, local, rank, log, self._muster, fork)
            worker.log, worker.rehearses, worker.standby = str(log), rehearses, standby
        for fd in _descriptors(worker):
            self._poller.register(fd, zmq.POLLIN)
        return worker

    def of_job(self, rank: int | None) -> dict[str, str]:
        """What a worker started now finds in its environment of the job, and of its coordinate if it has one."""
        env = {
            "LOCAL_WORLD_SIZE": str(self._s.slots_per_node),
            "WORLD_SIZE": str(self._job.world_size),
            "GROUP_RANK": str(self._s.node),
            "GROUP_WORLD_SIZE": str(self._job.active_nodes),
            "DEADPOOL_NODE": str(self._s.node),
        }
        if self._job.rendezvous is not None:
            env["MASTER_ADDR"], env["MASTER_PORT"] = self._job.rendezvous.host, str(self._job.rendezvous.port)
        if rank is not None:
            env["RANK"] = str(rank)
            env[EPOCH] = str(self._job.epoch)  # not 0 when the start begins anew
            if self._job.epoch:
                env[BEGAN] = str(self._job.began)
        return env

    def keep_warm(self, calm: bool) -> bool:
        """Have a process ready that has made the imports of workers. Call often.

        ``calm``: it may begin. True unless it makes them now, or is still to be begun.
        """
        warm = self._warm
        if warm is None:
            return True
        if calm and not warm.begun:
            with output(self._log_dir / f"warm-node{self._s.node}.log") as out, self._pinning.unpinned():
                warm.begin({**self._s.environment, **self.of_job(None)}, out)
        warm.look()
        return warm.ready or bool(warm.why_not)

    @property
    def warm_server(self) -> tuple[bool, str]:
        """Whether it is ready, and why there is none any more."""
        return (self._warm.ready, self._warm.why_not) if self._warm is not None else (False, "")

    def close(self) -> None:
        """End what is beside the workers."""
        if self._warm is not None:
            self._warm.close()

    def all_started(self) -> None:
        """No worker that somebody else starts is still to come."""
        if self._adoption is not None:
            self._adoption.close()

    def located(self, worker: Worker, numa: int, alive: Iterable[Worker]) -> set[int]:
        """A worker has its device on NUMA node ``numa``; the processors that the agent is bound to now, or none."""
        pids = [each.pid for each in alive]
        return self._pinning.cpus if self._pinning.located(worker.local, numa, pids) else set()

    def kill(self, worker: Worker) -> None:
        """End a worker at once. Its end is seen by `reap`: device memory may take a while to go."""
        end_group(worker.pid, signal.SIGKILL)

    def reap(self, worker: Worker) -> int:
        """The exit code of a worker that has ended."""
        code = worker.process.wait()
        end_group(worker.pid, signal.SIGKILL)  # its forked children hold its sockets open
        for fd in _descriptors(worker):
            self._poller.unregister(fd)
        return code

    def is_stopped(self, worker: Worker) -> bool:
        """It is stopped by a signal (state T of proc(5))."""
        try:
            stat = Path(f"/proc/{worker.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def keep_stacks(self, worker: Worker) -> None:
        """Write down what a stuck worker is doing: what /proc has of it, then, by itself, the stacks of its threads.

        A stopped worker is let run for that: its epoch is over for it, so nothing it does can count any more.
        """
        text, file = "", self.stacks_file(worker.local)
        for name in ("status", "wchan", "syscall"):
            with contextlib.suppress(OSError):
                path = Path(f"/proc/{worker.pid}/{name}")
                text += f"--- {path}\n{path.read_text().rstrip()}\n"
        text += "--- Python stacks, innermost call first\n"

        def keep() -> None:
            with contextlib.suppress(OSError), open(file, "a") as f:  # a full disk is no reason to keep a stuck worker
                f.write(text)

        self._files.do(keep)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, STACKS_SIGNAL)
            os.kill(worker.pid, signal.SIGCONT)

    def last_words(self, worker: Worker) -> list[str]:
        """What its log ends with; nothing where there is none, or it cannot be read soon."""
        words: list[str] = []
        if worker.log:
            self._files.do(lambda: words.extend(last_words(worker.log)))
        return list(words)

    def signal(self, worker: Worker, signum: int) -> None:
        """To a worker that lives."""
        os.kill(worker.pid, signum)

    def end(self, workers: Iterable[Worker], at_once: bool, told: bool) -> None:
        """End these workers. Blocks until they have; ``at_once``: without time to leave.

        ``told``: workers that somebody else has started were told to leave, and leave with the job's exit code.
        """
        alive = [w for w in workers if not w.exited]
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

    # ---- their files

    def stacks_file(self, local: int) -> Path:
        """Where a worker that is stuck shows the stacks of its threads."""
        return self._log_dir / f"stacks-node{self._s.node}-{local}.txt"

    def link_log(self, worker: Worker, rank: int) -> None:
        """A parked worker has a coordinate now: its log is found under that too."""
        target = Path(worker.log)
        link = self._log_dir / f"rank-{rank}.epoch-{self._job.epoch}.log"

        def make() -> None:
            with contextlib.suppress(OSError):  # a full or read-only disk ends no take-over
                if worker.log and target.exists():  # an adopted one writes where its launcher wants it
                    link.unlink(missing_ok=True)
                    link.symlink_to(target.name)

        self._files.do(make)


def _descriptors(worker: Worker) -> tuple[int, int, int]:
    return worker.pidfd, worker.control.fileno(), worker.doorbell


def last_words(log: str) -> list[str]:
    """What a worker has left behind when it ended with an error: the end of its log, for who does not look there.

    The lines that say why, last one last: an error of argparse, or the end of the last traceback, or of the log.
    """
    try:
        with open(Path(log), "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - _READ))
            text = f.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip()[:_COLUMNS] for line in text.splitlines() if line.strip()]
    for line in lines[-_LINES:]:
        if _USAGE.match(line):
            return [line]
    begins = [i for i, line in enumerate(lines) if line.endswith(_TRACEBACK)]
    if begins:  # what is printed at exit comes after it
        inside = lines[begins[-1] + 1 :]
        end = next((i for i, line in enumerate(inside) if not line.startswith((" ", "\t"))), len(inside) - 1)
        return inside[max(0, end + 1 - _LINES) : end + 1]
    return lines[-_LINES:]
