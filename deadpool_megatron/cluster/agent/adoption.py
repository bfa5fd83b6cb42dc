"""Workers that somebody else has started: the ranks of a patched Megatron-LM under torchrun, srun or any launcher.

::

    rank process (`intree.attach`)               agent of its node
    connect, "I am local rank i"  ------------>  accept; who it is says the kernel (SO_PEERCRED)
                                  <------------  its environment, and the doorbell (SCM_RIGHTS)
    becomes `deadpool_megatron.worker`           the connection is the worker's control socket from here on

The agent is not the parent: it sees the end of such a worker through a pidfd, and its exit code is what the worker said
last (`records.Leaving`); one that said nothing was killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping

from deadpool_megatron.cluster.agent.pulse import PULSE_FD, PulsePage
from deadpool_megatron.cluster.agent.workers import DOORBELL_FD, MUSTER_FD, PARENT_PID, Worker

COME_S = 300.0
_LOOK_S = 0.2
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_MAX_PACKET = 1 << 16


class AdoptionError(OSError):
    """A worker and its agent did not find each other; the message is one line."""


class AdoptedProcess:
    """What a `Worker` needs of a process that is not a child: the same as of a Popen."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.said: int | None = None
        self._pidfd = pidfd

    def poll(self) -> int | None:
        """The exit code, None while it lives."""
        return self._code() if select.select([self._pidfd], [], [], 0)[0] else None

    def wait(self) -> int:
        """Block until it has ended; the exit code."""
        select.select([self._pidfd], [], [])
        return self._code()

    def _code(self) -> int:
        return -signal.SIGKILL if self.said is None else self.said


def _peer(connection: socket.socket) -> tuple[int, int]:
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


class Adoption:
    """The agent's side.

    Args:
        name: of the socket, in the abstract namespace: nothing is left behind when the agent dies.

    Raises:
        OSError: another agent has this name.
    """

    def __init__(self, name: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + name)
        self._listener.listen(128)
        self._come: dict[int, tuple[socket.socket, int]] = {}

    def take(
        self,
        local: int,
        rank: int | None,
        environment: Mapping[str, str],
        muster: int,
        given_up: Callable[[], bool],
    ) -> Worker:
        """The worker of one slot. Blocks until it has come, at most `COME_S` seconds.

        Args:
            environment: what it is to find in its environment besides what its launcher gave it.
            muster: descriptor of the memory that all workers of the node share.

        Raises:
            AdoptionError: it did not come.
        """
        end = time.monotonic() + COME_S
        while local not in self._come:
            if given_up() or time.monotonic() > end:
                raise AdoptionError(f"local rank {local} has not come to its agent within {COME_S:g} s")
            if select.select([self._listener], [], [], _LOOK_S)[0]:
                self._accept()
        connection, pid = self._come.pop(local)
        doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            pidfd = os.pidfd_open(pid)
            page = PulsePage.create()
            told = dict(environment) | {PARENT_PID: str(os.getpid())}
            socket.send_fds(connection, [json.dumps(told).encode()], [doorbell, page.fd, muster])
        except OSError as err:
            raise AdoptionError(f"local rank {local} (process {pid}) ended before it was adopted: {err}") from None
        return Worker(local, AdoptedProcess(pid, pidfd), pidfd, connection, doorbell, rank, page)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        pid, uid = _peer(connection)
        if uid != os.getuid():
            connection.close()
            return
        connection.settimeout(_LOOK_S)
        try:
            local = int(connection.recv(32))
        except (OSError, ValueError):
            connection.close()
            return
        connection.settimeout(None)
        self._come[local] = (connection, pid)

    def close(self) -> None:
        """Take in nobody else."""
        self._listener.close()


def present(name: str, local: int, alive: Callable[[], str | None]) -> tuple[int, dict[str, str]]:
    """The worker's side: come to the agent of this node, waiting for it up to `COME_S` seconds.

    Args:
        alive: tells why the agent will never be there, None while it may.

    Returns:
        The control socket's descriptor (not inheritable yet) and the environment the agent wants, `DOORBELL_FD`,
        `PULSE_FD` and `MUSTER_FD` in it.

    Raises:
        AdoptionError: no agent, or one of another user.
    """
    end = time.monotonic() + COME_S
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect("\0" + name)
            break
        except ConnectionRefusedError:
            connection.close()  # not there yet; that cannot be waited for
        if why := alive():
            raise AdoptionError(why)
        if time.monotonic() > end:
            raise AdoptionError(f"no agent of this node has come up within {COME_S:g} s; see what local rank 0 says")
        time.sleep(_LOOK_S)
    _, uid = _peer(connection)
    if uid != os.getuid():
        raise AdoptionError(f"another user (uid {uid}) listens in the place of this node's agent")
    connection.send(str(local).encode())
    packet, descriptors, _, _ = socket.recv_fds(connection, _MAX_PACKET, 3)
    if not packet or len(descriptors) != 3:
        raise AdoptionError("the agent of this node ended before the job began; see what local rank 0 says")
    environment: dict[str, str] = json.loads(packet)
    environment |= dict(zip((DOORBELL_FD, PULSE_FD, MUSTER_FD), map(str, descriptors), strict=True))
    return connection.detach(), environment
