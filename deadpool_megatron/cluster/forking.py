"""Workers that a fork server starts, which has imported torch and Megatron before: `evaluate.fork_server`.

::

    agent (`fork_worker`)                            fork server
    command, environment, its descriptors  ------->  forks; the child becomes the worker
                                           <-------  pid, and a pidfd
                                           <-------  exit code, once the child has ended
    ends: the connection ends              ------->  kills the child

The agent is not the parent, and for all else nothing differs: it learns the exit code, and its end is the worker's.
"""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Mapping, Sequence

import msgspec

__all__ = ["FORK_SERVER", "MAX_REQUEST", "ForkRequest", "Forked", "ForkedProcess", "fork_worker"]

# The server's UNIX socket, in the environment of a worker that it starts. Not DEADPOOL_...: no setting of the product.
FORK_SERVER = "WORKER_FORK_SERVER"
MAX_REQUEST = 1 << 18


class ForkRequest(msgspec.Struct):
    """What a worker is started with.

    Attributes:
        arguments: of ``python -m deadpool_megatron.worker``.
        descriptors: the variables that name its descriptors, in the order in which these come along after the log.
    """

    arguments: list[str]
    environment: dict[str, str]
    directory: str
    descriptors: list[str]


class Forked(msgspec.Struct):
    """The server's answer; a pidfd comes along."""

    pid: int


class ForkedProcess:
    """A worker's process as `workers.Process` wants it; its exit code comes over a connection."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self._connection = connection
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        if self._code is None and select.select([self._connection], [], [], 0)[0]:
            return self.wait()
        return self._code

    def wait(self) -> int:
        """Block until it has ended; the exit code. A server that is gone has taken its children along."""
        if self._code is None:
            packet = self._connection.recv(32)
            self._code = int(packet) if packet else -signal.SIGKILL
            self._connection.close()
        return self._code


def fork_worker(
    server: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
    log: int,
    descriptors: Mapping[str, int],
) -> tuple[ForkedProcess, int]:
    """Have ``server`` start a worker, in a session of its own.

    Args:
        log: the descriptor its output goes to.
        descriptors: what it inherits, by the environment variable that tells it the number.

    Returns:
        The process, and its pidfd, which the caller owns.

    Raises:
        OSError: the server does not answer.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(server)
    request = ForkRequest(list(arguments), dict(environment), directory, list(descriptors))
    packet = msgspec.json.encode(request)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REQUEST)
    socket.send_fds(connection, [packet], [log, *descriptors.values()])
    answer, pidfds, _, _ = socket.recv_fds(connection, MAX_REQUEST, 1)
    if not answer or not pidfds:
        raise ConnectionError(f"the fork server at {server} has ended")
    return ForkedProcess(msgspec.json.decode(answer, type=Forked).pid, connection), pidfds[0]
