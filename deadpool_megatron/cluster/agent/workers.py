"""Worker processes of one node: how they are started, reached and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from deadpool_megatron.cluster import notices
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.pulse import PULSE_FD, PulsePage

CONTROL_FD = "DEADPOOL_CONTROL_FD"
DOORBELL_FD = "DEADPOOL_DOORBELL_FD"
ORDERS_FD = "DEADPOOL_ORDERS_FD"  # of a warm server (`warm_server`)
MUSTER_FD = "DEADPOOL_MUSTER_FD"  # memory that all workers of a node share
PARENT_PID = "DEADPOOL_AGENT_PID"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun has a worker write its error, as JSON
ADOPTED = "DEADPOOL_ADOPTED"  # set in a worker that its agent has not started
EPOCH = "DEADPOOL_EPOCH"  # in which a worker with a coordinate begins
BEGAN = "DEADPOOL_BEGAN"  # when the job of one that begins anew did, in seconds since 1970
REHEARSES = "DEADPOOL_REHEARSES"  # the coordinate that a worker without one sets up ahead of time
STANDBY = "DEADPOOL_STANDBY"  # set in a process that waits for a slot of its own node; how far it is set up
EMULATE = "DEADPOOL_EMULATE_CPU"  # workers have no devices
STACKS_FILE = "DEADPOOL_STACKS_FILE"
STACKS_SIGNAL = signal.SIGRTMIN + 5  # Megatron and its users may have handlers for the ones with names
_MAX_PACKET = 1 << 17


class Process(Protocol):
    """A worker's process: our child (a Popen), or adopted."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""

    def wait(self) -> int:
        """Block until it has ended; the exit code."""


@dataclass(slots=True)
class Worker:
    """One worker process as its agent sees it. ``rank`` is None while it is parked; ``numa``: node of its device.

    ``rehearses``: the coordinate that it sets up ahead of time, the only one it can take over; then it is parked.
    ``standby``: it was started beside the worker of its slot, to take its place.
    """

    local: int
    process: Process
    pidfd: int
    control: socket.socket
    doorbell: int
    rank: int | None
    page: PulsePage
    rehearses: int | None = None
    standby: bool = False
    parked: bool = False
    numa: int = -1
    in_loop: bool = False
    began: bool = False
    exited: bool = False
    retired: bool = False
    refused: int = 0
    arrived: r.Arrived | None = None
    registered: r.Registered | None = None
    failed: r.WorkerFailed | None = None
    broken: r.PeerError | r.FetchFailed | None = None
    exit_code: int | None = None
    reached: dict[str, int] = field(default_factory=dict)
    log: str = ""  # path; empty where its launcher has it
    formed: tuple[int, int] = (0, 0)  # groups re-formed in the last epoch, and all

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def waits(self, epoch: int) -> bool:
        """It has lost a peer, or has no state to go on from, in this epoch, and waits for the next one."""
        return self.broken is not None and self.broken.epoch == epoch

    def send(self, record: msgspec.Struct) -> None:
        """Send one record; a worker that is gone hears nothing, nor does one that has read nothing for very long: it
        stands still, and the agent must not."""
        with contextlib.suppress(OSError):
            self.control.send(r.encode(record), socket.MSG_DONTWAIT)

    def receive(self) -> list[r.WorkerRecord]:
        """All records that are waiting. What is none is counted in ``refused``."""
        out: list[r.WorkerRecord] = []
        while True:
            try:
                packet = self.control.recv(_MAX_PACKET, socket.MSG_DONTWAIT)
            except (BlockingIOError, ConnectionResetError):
                return out
            if not packet:
                return out
            try:
                out.append(r.decode_from_worker(packet))
            except r.RecordError:
                self.refused += 1

    def close(self) -> None:
        """Release the descriptors of a worker that has been reaped."""
        self.control.close()
        self.page.close()
        os.close(self.pidfd)
        os.close(self.doorbell)


def start_worker(
    command: Sequence[str],
    environment: Mapping[str, str],
    local: int,
    rank: int | None,
    log: Path,
    muster: int,
    fork: Callable[[Mapping[str, str], Mapping[str, int], BinaryIO], Process | None] | None = None,
) -> Worker:
    """Start a worker in a process group (and session) of its own, its output going to ``log``.

    ``fork`` makes its process where it can (`WarmServer.fork`). It inherits one end of a control socket, the doorbell,
    an eventfd it rings when its shard has grown, and the page of its progress; nobody else can reach them. And
    ``muster``, which it shares with the other workers of the node.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    page = PulsePage.create()
    env = dict(environment)
    env[PARENT_PID] = str(os.getpid())
    descriptors = {PULSE_FD: page.fd, CONTROL_FD: theirs.fileno(), DOORBELL_FD: doorbell, MUSTER_FD: muster}
    with output(log) as out:
        process = fork(env, descriptors, out) if fork is not None else None
        process = process or start_process(command, env, descriptors, out)
    theirs.close()
    return Worker(local, process, os.pidfd_open(process.pid), ours, doorbell, rank, page)


def start_process(
    command: Sequence[str], environment: Mapping[str, str], descriptors: Mapping[str, int], out: BinaryIO
) -> subprocess.Popen[bytes]:
    """Start a worker's process, which finds the number of each of ``descriptors`` in a variable of its environment."""
    with notices.held():
        return subprocess.Popen(
            command,
            env={**environment, **{name: str(fd) for name, fd in descriptors.items()}},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=tuple(descriptors.values()),
            start_new_session=True,
        )


def output(log: Path) -> BinaryIO:
    """Where a worker's output goes: on a disk that is full or read-only it is lost, and the worker starts."""
    try:
        return open(log, "ab", buffering=0)
    except OSError as err:
        print(f"deadpool: {log} cannot be written: {err.strerror}; what that worker prints is lost", file=sys.stderr)
        return open(os.devnull, "ab", buffering=0)


def end_group(pid: int, signum: signal.Signals) -> None:
    """Signal a worker's whole process group: a forked data loader worker would keep its sockets open."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)
