"""Processes that a fork server starts, which has imported torch and Megatron before.

::

    parent (`fork_module`)                           fork server
    module, environment, its descriptors  -------->  forks; the child runs the module
                                          <--------  pid
                                          <--------  exit code, once the child has ended
    waits: the connection ends            -------->  reaps the child
    ends: the connection ends             -------->  signals the child as its parent wants

The parent's process is not the parent of the child, and for all else nothing differs. `install` has a process of the
product start its own there; ``python -m deadpool_bench.harness.forking`` is the `deadpool` command with that done.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any, BinaryIO

import msgspec

from deadpool_megatron.cluster.agent import workers
from deadpool_megatron.config import DeadpoolConfig
from deadpool_megatron.launcher import processes

# The server's UNIX socket, in the environment of what it starts. Not DEADPOOL_...: no setting of the product.
FORK_SERVER = "WORKER_FORK_SERVER"
MAX_REQUEST = 1 << 18


class ForkRequest(msgspec.Struct):
    """What a child is started with.

    Attributes:
        module: to be run, or a file that ends with ``.py``.
        arguments: of ``python -m module``.
        descriptors: the variables that name its descriptors, in the order in which these come along after stdin, stdout
            and stderr.
        parent: the process that it takes for its parent.
        death_signal: what it gets when its parent ends; 0: nothing.
    """

    module: str
    arguments: list[str]
    environment: dict[str, str]
    directory: str
    descriptors: list[str]
    parent: int
    death_signal: int


class Forked(msgspec.Struct):
    """The server's answer."""

    pid: int


class ForkedProcess(subprocess.Popen[bytes]):
    """A process that is not a child; its exit code comes over a connection.

    It must be kept as long as the process is to live: the connection ends with it.
    """

    def __init__(
        self, args: Sequence[str], pid: int, connection: socket.socket, ours: Sequence[IO[bytes] | None]
    ) -> None:
        self.args = args
        self.pid = pid
        self.returncode = None
        self.stdin, self.stdout, self.stderr = ours
        self._connection = connection

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As of Popen. A server that is gone has taken its children along."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            packet = self._connection.recv(32)
            self.returncode = int(packet) if packet else -signal.SIGKILL
            self._connection.close()
        return self.returncode


def fork_module(
    server: str,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: int | IO[Any] = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    directory: str | os.PathLike[str] | None = None,
    descriptors: Mapping[str, int] | None = None,
    death_signal: int = 0,
) -> ForkedProcess:
    """Have ``server`` run ``python -m module``, or a file, in a session of its own. Other arguments: as of Popen.

    Args:
        descriptors: what it inherits, by the environment variable that tells it the number.
        death_signal: what it gets when this process ends; 0: nothing.

    Raises:
        OSError: the server does not answer.
    """
    descriptors = descriptors or {}
    with contextlib.ExitStack() as stack:
        ours: list[IO[bytes] | None] = []
        theirs: list[int] = []
        for number, stream in enumerate((stdin, stdout, stderr)):
            if stream == subprocess.PIPE:
                ends = os.pipe()
                ours.append(os.fdopen(ends[number == 0], "rb" if number else "wb"))
                theirs.append(ends[number != 0])
                stack.callback(os.close, theirs[-1])
                continue
            ours.append(None)
            if stream == subprocess.DEVNULL:
                theirs.append(os.open(os.devnull, os.O_RDWR))
                stack.callback(os.close, theirs[-1])
            elif stream == subprocess.STDOUT:
                theirs.append(theirs[1])
            else:
                theirs.append(number if stream is None else stream if isinstance(stream, int) else stream.fileno())
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REQUEST)
        connection.connect(server)
        request = ForkRequest(
            module,
            list(arguments),
            dict(environment),
            os.fspath(directory or os.getcwd()),
            list(descriptors),
            os.getpid(),
            death_signal,
        )
        socket.send_fds(connection, [msgspec.json.encode(request)], [*theirs, *descriptors.values()])
    answer = connection.recv(MAX_REQUEST)
    if not answer:
        raise ConnectionError(f"the fork server at {server} has ended")
    return ForkedProcess([module, *arguments], msgspec.json.decode(answer, type=Forked).pid, connection, ours)


def _start_node(role: str, signum: int, **extra: Any) -> ForkedProcess:
    """As `processes.start_node`."""
    server, module = os.environ[FORK_SERVER], processes.NODE_MODULE
    return fork_module(server, module, [role], os.environ, stdin=subprocess.PIPE, death_signal=signum, **extra)


def _start_worker(
    command: Sequence[str], environment: Mapping[str, str], descriptors: Mapping[str, int], out: BinaryIO
) -> ForkedProcess:
    """As `workers.start_process`; ``command`` is ``python -m module``."""
    return fork_module(
        environment[FORK_SERVER],
        command[2],
        command[3:],
        environment,
        stdout=out,
        stderr=subprocess.STDOUT,
        descriptors=descriptors,
        death_signal=signal.SIGKILL,
    )


def install() -> None:
    """Where the environment names a fork server, nodes and workers that this process starts come out of it."""
    if FORK_SERVER in os.environ:
        processes.start_node = _start_node
        workers.start_process = _start_worker
        # All have their imports already, and a child of this server's child would not be the agent's.
        DeadpoolConfig.wants_warm_server = property(lambda self: False)  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    install()
    from deadpool_megatron.cli import main

    sys.exit(main())
