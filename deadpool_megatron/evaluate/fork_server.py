"""``python -m deadpool_megatron.evaluate.fork_server SOCKET``: workers of emulated jobs without their imports.

To import torch and Megatron costs a process more than all it does in a short job. This process imports them once, warms
what is slow the first time, and forks workers from then on (`cluster.forking` is the other side). It ends with the
process that started it, and its children with it.

A worker that needs other modules than this process has (a checkout of Megatron, other versions, no emulation) or
another network or control group must be started as ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from deadpool_megatron.cluster.forking import MAX_REQUEST, Forked, ForkRequest
from deadpool_megatron.evaluate.descendants import VARIABLE, WORD_LENGTH

__all__ = ["ForkServer", "main"]

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class ForkServer:
    """A fork server of the calling process. Blocks until it is warm, about ten seconds of a processor.

    Args:
        address: path of its socket, at most 107 characters.
        script: what most workers will run; what it imports is imported.
        environment: as the workers will find it, in what modules read when they are imported.

    Raises:
        RuntimeError: it has ended; the message has its last words.
    """

    def __init__(self, address: Path, script: Path, environment: Mapping[str, str]) -> None:
        self.address = address
        log = address.with_suffix(".log")
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deadpool_megatron.evaluate.fork_server", str(address), str(script)],
                env=dict(environment) | {VARIABLE: "-" * WORD_LENGTH, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not address.exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"the fork server ended ({self.process.returncode}):\n{log.read_text()[-2000:]}")
            time.sleep(0.05)

    def end(self) -> None:
        """End it and all workers that it has started."""
        self.process.kill()
        self.process.wait()


class _EnvironmentWord:
    """The value that /proc/PID/environ shows for `VARIABLE`: what a process started with, overwritten in place."""

    def __init__(self) -> None:
        environ = ctypes.POINTER(ctypes.c_void_p).in_dll(_LIBC, "environ")
        prefix = f"{VARIABLE}=".encode()
        self._address = 0
        for i in range(1 << 16):
            if not environ[i]:
                break
            if ctypes.string_at(environ[i]).startswith(prefix):
                self._address = environ[i] + len(prefix)

    def become(self, word: str) -> None:
        """Show another word of the same length."""
        if self._address and len(word) == WORD_LENGTH:
            ctypes.memmove(self._address, word.encode(), WORD_LENGTH)


class _Children:
    """Connections of agents, and the children forked for them."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._pids: dict[int, tuple[int, socket.socket]] = {}  # by pidfd

    def serve(self) -> tuple[ForkRequest, list[int]]:
        """Fork workers for ever. Returns in the child only: what it was started with, and its descriptors."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    packet, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST, 8)
                    if not packet:
                        connection.close()
                        continue
                    request = msgspec.json.decode(packet, type=ForkRequest)
                    pid = os.fork()
                    if not pid:
                        connection.close()
                        self._forget()
                        return request, fds
                    for fd in fds:
                        os.close(fd)
                    self._born(pid, connection)
                elif key.data is None:
                    self._ended(key.fd)
                elif self._pids.get(key.data, (0, None))[1] is key.fileobj:  # else its worker has ended a moment ago
                    signal.pidfd_send_signal(key.data, signal.SIGKILL)  # its agent has ended
                    self._selector.unregister(key.fileobj)

    def _born(self, pid: int, connection: socket.socket) -> None:
        pidfd = os.pidfd_open(pid)
        self._pids[pidfd] = pid, connection
        self._selector.register(pidfd, selectors.EVENT_READ)
        self._selector.register(connection, selectors.EVENT_READ, pidfd)
        with contextlib.suppress(OSError):  # the agent has ended: that is seen at the connection
            socket.send_fds(connection, [msgspec.json.encode(Forked(pid))], [pidfd])

    def _ended(self, pidfd: int) -> None:
        pid, connection = self._pids.pop(pidfd)
        self._selector.unregister(pidfd)
        if connection in self._selector.get_map():
            self._selector.unregister(connection)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # the agent has ended before
            connection.send(str(code).encode())
        connection.close()
        os.close(pidfd)

    def _forget(self) -> None:
        """In a child: it must hold nothing of its siblings' open."""
        self._selector.close()
        self._listener.close()
        for pidfd, (_, connection) in self._pids.items():
            connection.close()
            os.close(pidfd)


def _import_all(script: str) -> None:
    from deadpool_megatron import emulation

    emulation.install()
    import deadpool_megatron.comm
    import deadpool_megatron.recovery
    import deadpool_megatron.worker  # noqa: F401
    from deadpool_megatron.megatron import warm_up

    os.environ["LOCAL_RANK"] = "0"  # of the device that it brings up; each child has its own
    warm_up(script)
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page with objects


def _become(request: ForkRequest, descriptors: Sequence[int], word: _EnvironmentWord) -> None:
    """Make this child what an agent's Popen would have made."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    log, *inherited = descriptors
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.chdir(request.directory)
    word.become(request.environment.get(VARIABLE, ""))
    os.environ.clear()
    os.environ.update(request.environment)
    os.environ.update({name: str(fd) for name, fd in zip(request.descriptors, inherited, strict=True)})
    from deadpool_megatron import worker

    sys.modules["__main__"] = worker  # what multiprocessing imports in the processes that a worker starts
    sys.argv = [str(worker.__file__), *request.arguments]


def main() -> None:
    """Entry point."""
    address, script = sys.argv[1:]
    parent = os.getppid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    word = _EnvironmentWord()
    _import_all(script)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    unnamed = f"{address}.new"
    listener.bind(unnamed)
    listener.listen(128)
    os.rename(unnamed, address)  # it is there when it can be connected to
    request, descriptors = _Children(listener).serve()
    _become(request, descriptors, word)


if __name__ == "__main__":
    main()
    from deadpool_megatron.worker import run

    run()
