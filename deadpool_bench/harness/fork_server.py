"""``python -m deadpool_bench.harness.fork_server SOCKET [SCRIPT]``: processes under test without their imports.

To import torch and Megatron costs a process more than all it does in a short job. This process imports them once, warms
what is slow the first time, and forks all processes of emulated jobs from then on; `forking` is the other side. Without
a script it has torch and our packages alone, and no emulation. It ends with the process that started it, and its
children with it.

What needs other modules than this process has (a checkout of Megatron, other versions, no emulation) or another network
or control group must be started as ever.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from deadpool_bench.harness import forking
from deadpool_bench.harness.forking import MAX_REQUEST, Forked, ForkRequest
from deadpool_bench.paths import importing
from deadpool_megatron.cluster import notices
from deadpool_megatron.emulation import environment as emulated
from deadpool_megatron.jobs.descendants import VARIABLE, WORD_LENGTH

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class ForkServer:
    """A fork server of the calling process. Blocks until it is warm, about ten seconds of a processor.

    Args:
        address: path of its socket, at most 107 characters.
        environment: as the children will find it, in what modules read when they are imported.
        script: what most workers of emulated jobs will run; what it imports is imported. None: no emulated jobs.

    Raises:
        RuntimeError: it has ended; the message has its last words.
    """

    def __init__(self, address: Path, environment: Mapping[str, str], script: Path | None = None) -> None:
        self.address = address
        log = address.with_suffix(".log")
        arguments = [address] if script is None else [address, script]
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deadpool_bench.harness.fork_server", *map(str, arguments)],
                env=importing(environment) | {VARIABLE: "-" * WORD_LENGTH, "PYTHONUNBUFFERED": "1"},
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


@contextlib.contextmanager
def forked(script: Path) -> Iterator[None]:
    """All jobs that this process starts meanwhile, emulated ones that run ``script``, come out of a fork server."""
    with tempfile.TemporaryDirectory(prefix="deadpool-fork-") as directory:
        server = ForkServer(Path(directory) / "socket", os.environ | emulated(), script)
        os.environ[forking.FORK_SERVER] = str(server.address)
        try:
            yield
        finally:
            del os.environ[forking.FORK_SERVER]
            server.end()


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


class _Child:
    """A process, and the connection of the one that wanted it."""

    def __init__(self, pid: int, connection: socket.socket, death_signal: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.connection = connection
        self.death_signal = death_signal
        self.ended = self.alone = False  # it is over; its parent has ended, or has waited for it


class _Children:
    """All children that live."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._living: set[_Child] = set()

    def serve(self) -> tuple[ForkRequest, list[int]]:
        """Fork for ever. Returns in a child only: what it was started with, and its descriptors."""
        while True:
            for key, _ in self._selector.select():
                child: _Child | None = key.data
                if child is None:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.fd == child.pidfd:
                    self._ended(child)
                else:
                    self._left_alone(child)

    def _accept(self) -> tuple[ForkRequest, list[int]] | None:
        connection, _ = self._listener.accept()
        packet, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST, 16)
        if not packet:
            connection.close()
            return None
        request = msgspec.json.decode(packet, type=ForkRequest)
        begun, begins = os.pipe()
        pid = os.fork()
        if not pid:
            os.setsid()
            os.close(begun)
            os.close(begins)
            connection.close()
            self._forget()
            return request, fds
        os.close(begins)
        os.read(begun, 1)  # until it has a process group, which its parent may want to end at once
        os.close(begun)
        for fd in fds:
            os.close(fd)
        child = _Child(pid, connection, request.death_signal)
        self._living.add(child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        self._selector.register(connection, selectors.EVENT_READ, child)
        with contextlib.suppress(OSError):  # its parent has ended: that is seen at the connection
            connection.send(msgspec.json.encode(Forked(pid)))
        return None

    def _ended(self, child: _Child) -> None:
        self._selector.unregister(child.pidfd)
        child.ended = True
        end = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
        assert end is not None
        code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        with contextlib.suppress(OSError):  # its parent has ended before
            child.connection.send(str(code).encode())
        self._reap(child)

    def _left_alone(self, child: _Child) -> None:
        self._selector.unregister(child.connection)
        child.alone = True
        if child.death_signal and not child.ended:
            signal.pidfd_send_signal(child.pidfd, child.death_signal)
        self._reap(child)

    def _reap(self, child: _Child) -> None:
        """Its id is its own, as a child's is, until its parent has waited for it."""
        if child.ended and child.alone:
            os.waitpid(child.pid, 0)
            self._living.remove(child)
            child.connection.close()
            os.close(child.pidfd)

    def _forget(self) -> None:
        """In a child: it must hold nothing of its siblings' open."""
        self._selector.close()
        self._listener.close()
        for child in self._living:
            child.connection.close()
            os.close(child.pidfd)


def _import_torch() -> None:
    import torch

    import deadpool_megatron.comm  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not survive a fork


def _import_all(script: str) -> None:
    from deadpool_megatron import emulation

    emulation.install()
    import deadpool_megatron.cluster.agent.process  # with what agents and coordinators run
    import deadpool_megatron.cluster.coordinator.coordinator
    import deadpool_megatron.comm
    import deadpool_megatron.commands.control
    import deadpool_megatron.launcher
    import deadpool_megatron.planning
    import deadpool_megatron.recovery  # noqa: F401
    from deadpool_megatron.hosts import host_of
    from deadpool_megatron.megatron import warm_up

    os.environ["LOCAL_RANK"] = "0"  # of the device that it brings up; each child has its own
    warm_up(script, host_of(script))


def _leave_operators() -> None:
    """Children end without taking back each of torch's operators; the kernel frees their memory."""
    import torch

    for finalizer, what in weakref.finalize._registry.items():  # type: ignore[attr-defined]
        if what.func is torch.library._del_library:
            finalizer.atexit = False


def _run(module: str) -> NoReturn:
    """Run a module, or a file, and end as Python ends, but without taking down what was imported: with torch that is
    half a second of a processor. What raises ends the slow way."""
    status: object = 0
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    if not (status is None or isinstance(status, int)):
        sys.exit(str(status))
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((status or 0) & 0xFF)


def _become(request: ForkRequest, descriptors: Sequence[int], word: _EnvironmentWord) -> None:
    """Make this child what Popen would have made."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Above all numbers that will be written over.
    descriptors = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in descriptors]
    for number in range(3):
        os.dup2(descriptors[number], number)
        os.close(descriptors[number])
    os.chdir(request.directory)
    word.become(request.environment.get(VARIABLE, ""))
    os.environ.clear()
    os.environ.update(request.environment)
    os.environ.update({name: str(fd) for name, fd in zip(request.descriptors, descriptors[3:], strict=True)})
    sys.argv[1:] = request.arguments
    _take_for_parent(request.parent)
    forking.install()


def _take_for_parent(pid: int) -> None:
    """`os.getppid` gives this process, here; what this process forks has this one for its parent."""
    real = os.getppid
    os.getppid = lambda: pid
    os.register_at_fork(after_in_child=lambda: setattr(os, "getppid", real))


def main() -> str:
    """Serve, to the end. Returns in children only: the module, or the file, that this one is to run."""
    address, *script = sys.argv[1:]
    parent = os.getppid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    notices.ignored()
    word = _EnvironmentWord()
    if script:
        _import_all(*script)
    else:
        _import_torch()
    _leave_operators()
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page with objects
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    unnamed = f"{address}.new"
    listener.bind(unnamed)
    listener.listen(128)
    os.rename(unnamed, address)  # it is there when it can be connected to
    request, descriptors = _Children(listener).serve()
    _become(request, descriptors, word)
    return request.module


if __name__ == "__main__":
    _run(main())
