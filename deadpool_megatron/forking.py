"""Processes that a fork server starts, which has imported torch and Megatron before.

::

    parent (`fork_module`)                           fork server
    module, environment, its descriptors  -------->  forks; the child runs the module
                                          <--------  pid, and a pidfd
                                          <--------  exit code, once the child has ended
    ends: the connection ends             -------->  signals the child as its parent wants

The parent's process is not the parent of the child, and for all else nothing differs. Used where `FORK_SERVER` is in
the environment: by tests, which have the server, for everything a job under test consists of.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, Any

import msgspec

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
        death_signal: what it gets when its parent ends; 0: nothing.
    """

    module: str
    arguments: list[str]
    environment: dict[str, str]
    directory: str
    descriptors: list[str]
    death_signal: int


class Forked(msgspec.Struct):
    """The server's answer; a pidfd comes along."""

    pid: int


class ForkedProcess:
    """What is used of a `subprocess.Popen`, for a process that is not a child; its exit code comes over a connection.

    It must be kept as long as the process is to live: the connection ends with it.
    """

    def __init__(self, pid: int, pidfd: int, connection: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self._pidfd = pidfd
        self._connection = connection

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Block until it has ended; the exit code. A server that is gone has taken its children along.

        Raises:
            subprocess.TimeoutExpired: it lives after ``timeout`` seconds.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            packet = self._connection.recv(32)
            self.returncode = int(packet) if packet else -signal.SIGKILL
            self._connection.close()
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[Any] | ForkedProcess


def open_pidfd(process: Process) -> int:
    """A pidfd of a process that nobody has waited for, though it may have ended; the caller's to close."""
    # The fork server reaps its children at once, so by then the id can be nobody's.
    return os.dup(process._pidfd) if isinstance(process, ForkedProcess) else os.pidfd_open(process.pid)


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
            death_signal,
        )
        socket.send_fds(connection, [msgspec.json.encode(request)], [*theirs, *descriptors.values()])
    answer, pidfds, _, _ = socket.recv_fds(connection, MAX_REQUEST, 1)
    if not answer or not pidfds:
        raise ConnectionError(f"the fork server at {server} has ended")
    process = ForkedProcess(msgspec.json.decode(answer, type=Forked).pid, pidfds[0], connection)
    process.stdin, process.stdout = ours[:2]
    return process
