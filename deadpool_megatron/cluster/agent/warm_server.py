"""The warm server of a node: a process that has imported what its workers import, and forks fresh workers.

::

    agent                                     warm server (`deadpool_megatron.warm`)
    starts it once the node trains  ------->  imports what the script and the job's workers import
                                    <-------  ready, or why it cannot be
    environment, descriptors        ------->  forks twice; the child belongs to the agent from then on
    pidfd, control socket as of any worker    (the agent is the subreaper meanwhile: prctl(2))
                                    <-------  the child: its id
    go on                           ------->  the child becomes `deadpool_megatron.worker`

A worker that is started as ever imports torch and Megatron for seconds. Where a job begins anew with another number of
replicas, all of its processes do that at once, and it is most of what that costs. Whatever goes wrong here, the worker
is started as ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO, Final

import msgspec

from deadpool_megatron.cluster import notices
from deadpool_megatron.cluster.agent.workers import ORDERS_FD, PARENT_PID

READY: Final = b"ready"
MAX_PACKET: Final = 1 << 20
_ANSWER_S: Final = 2.0
_IMPORTS_S: Final = 600.0
_ENDS_S: Final = 5.0
_PR_SET_CHILD_SUBREAPER: Final = 36


class ForkRequest(msgspec.Struct):
    """What a worker is forked with. Along with it come the socket on which the child answers, its output, and its
    descriptors.

    Attributes:
        descriptors: the variables that name its descriptors, in their order.
    """

    environment: dict[str, str]
    descriptors: list[str]


class ForkedProcess:
    """A child that another process has forked. What a `Worker` needs of a process: the same as of a Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        return self._ask(os.WNOHANG)

    def wait(self) -> int:
        """Block until it has ended; the exit code."""
        code = self._ask(0)
        assert code is not None
        return code

    def _ask(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


class WarmServer:
    """That of one agent, which alone uses it, from one thread.

    Args:
        command: as of a worker.

    Attributes:
        begun: it was started; it is not started again.
        ready: it forks workers.
        why_not: why there is none any more; empty while there may be one.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None
        self._begun_at = 0.0
        self.begun = self.ready = False
        self.why_not = ""

    def begin(self, environment: Mapping[str, str], out: BinaryIO) -> None:
        """Start it. ``environment``: as of a worker that has no slot yet."""
        self.begun, self._begun_at = True, time.monotonic()
        try:
            self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._orders.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_PACKET)
            with theirs, notices.held():
                self._process = subprocess.Popen(
                    self._command,
                    env={**environment, PARENT_PID: str(os.getpid()), ORDERS_FD: str(theirs.fileno())},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except OSError as err:
            self._give_up(f"it could not be started: {err}")

    def look(self) -> bool:
        """Call often. Whether something has become of it since: it is ready, or there is a reason why it is not."""
        if self._orders is None or self.why_not:
            if self._process is not None:
                self._process.poll()
            return False
        try:
            packet = self._orders.recv(MAX_PACKET, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if self.ready or time.monotonic() < self._begun_at + _IMPORTS_S:
                return False
            self._give_up(f"its imports have taken longer than {_IMPORTS_S:g} s")
            return True
        except OSError:
            packet = b""
        if packet == READY:
            self.ready = True
        else:
            self._give_up(packet.decode(errors="replace") or "it has ended")
        return True

    def fork(
        self, environment: Mapping[str, str], descriptors: Mapping[str, int], out: BinaryIO
    ) -> ForkedProcess | None:
        """As `workers.start_process`. None where it cannot: then it is not ready any more."""
        if not self.ready or self._orders is None:
            return None
        request = msgspec.json.encode(ForkRequest(dict(environment), list(descriptors)))
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours, theirs, _subreaper():
                fds = [theirs.fileno(), out.fileno(), *descriptors.values()]
                socket.send_fds(self._orders, [request], fds, socket.MSG_DONTWAIT)
                theirs.close()
                # The child is this process's own when it answers. One whose answer nobody waits for any more ends.
                ours.settimeout(_ANSWER_S)
                if packet := ours.recv(32):
                    ours.send(b"go on")
                    return ForkedProcess(int(packet))
            self._give_up("it was asked for a worker, which ended at once")
        except OSError as err:
            self._give_up(f"it was asked for a worker: {err}")
        return None

    def close(self) -> None:
        """End it. Its children are the agent's."""
        self._end()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):  # on a file system that hangs
                self._process.wait(_ENDS_S)

    def _give_up(self, why: str) -> None:
        self.ready, self.why_not = False, why
        self._end()

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._orders is not None:
            self._orders.close()


@contextmanager
def _subreaper() -> Iterator[None]:
    """Meanwhile this process becomes the parent of descendants whose parent ends (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
