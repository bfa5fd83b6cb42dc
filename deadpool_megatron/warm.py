"""The process behind `cluster.agent.warm_server`: it imports what workers import, and forks them.

A fork copies one thread and no context of a device. So what has imported something that starts threads or brings up a
device forks nothing, and says why.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Final

import msgspec

from deadpool_megatron.cluster import notices
from deadpool_megatron.cluster.agent.warm_server import MAX_PACKET, READY, ForkRequest
from deadpool_megatron.cluster.agent.workers import ORDERS_FD, PARENT_PID

_MOST_DESCRIPTORS: Final = 16
_TOLD_S: Final = 30.0  # a job that trains tells at once what its workers have imported
_LOOK_S: Final = 0.0005


def serve(orders: socket.socket, script: str) -> None:
    """Fork workers until the agent ends. Returns in a child only, which is the agent's own and is to be a worker.

    The child has the environment, the output and the descriptors that it was asked for with.
    """
    agent = int(os.environ[PARENT_PID])
    notices.ignored()
    before = dict(os.environ)
    try:
        _import_all(script)
        why_not = _why_not()
    except Exception as error:  # noqa: BLE001 - what a script imports may raise anything; workers then say it themselves
        why_not = f"importing what {script} imports: {type(error).__name__}: {error}"
    if why_not:
        orders.send(why_not.encode()[:1000])
        sys.exit(0)
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page with objects
    sys.stdout.flush()  # else each child would print once more what imports have printed
    sys.stderr.flush()
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    orders.send(READY)
    while True:
        packet, fds, _, _ = socket.recv_fds(orders, MAX_PACKET, _MOST_DESCRIPTORS)
        if not packet:
            sys.exit(0)
        here = os.getpid()
        middle = os.fork()
        if not middle:
            middle = os.getpid()
            if os.fork():
                os._exit(0)
            orders.close()
            request = msgspec.json.decode(packet, type=ForkRequest)
            _become(request, fds, {here, middle}, agent)
            for name, value in changed.items():  # by imports, which the child does not make again
                if request.environment.get(name) == before.get(name):
                    os.environ[name] = value
            return
        for fd in fds:
            os.close(fd)
        os.waitpid(middle, 0)


def _become(request: ForkRequest, fds: list[int], before: set[int], agent: int) -> None:
    """Make of this child what `workers.start_worker` would have started. It ends where the agent is not its parent, or
    does not wait for it any more."""
    os.setsid()
    while os.getppid() in before:  # until the one that has forked it has ended
        time.sleep(_LOOK_S)
    with socket.socket(fileno=fds[0]) as answer:
        if os.getppid() != agent:
            os._exit(1)
        try:
            answer.send(str(os.getpid()).encode())
            waits = answer.recv(32)
        except OSError:
            waits = b""
        if not waits:
            os._exit(1)
    for number in (1, 2):
        os.dup2(fds[1], number)
    os.close(fds[1])
    os.environ.clear()
    os.environ.update(request.environment)
    os.environ.update({name: str(fd) for name, fd in zip(request.descriptors, fds[2:], strict=True)})
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # from the system, as in a fresh process (the standard library does that itself)


def _import_all(script: str) -> None:
    """Our own packages, and of Megatron, torch and their kernels what the script and those that train have imported."""
    from torch.distributed import TCPStore

    import deadpool_megatron.comm
    import deadpool_megatron.config
    import deadpool_megatron.recovery  # noqa: F401
    from deadpool_megatron.hosts import host_of
    from deadpool_megatron.megatron import import_packages, import_what_trains

    import_packages(script)
    host_of(script).warm_up()
    with suppress(RuntimeError):  # the server is away: then children import the rest
        here = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        import_what_trains(TCPStore(*here, None, False, timeout=timedelta(seconds=_TOLD_S)))


def _why_not() -> str:
    """What stands against forking; empty where nothing does."""
    from deadpool_megatron import emulation

    if threads := len(os.listdir("/proc/self/task")) - 1:
        names = [each.name for each in threading.enumerate() if each is not threading.main_thread()]
        return f"what is imported has started {threads} threads ({', '.join(names) or 'none of them of Python'})"
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed since
            if (target := os.readlink(f"/proc/self/fd/{fd}")).startswith("/dev/nvidia"):
                return f"what is imported has brought up a device ({target} is open)"
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized() and not emulation.is_installed():
        return "what is imported has brought up a device"
    return ""


def take_orders() -> socket.socket | None:
    """The socket of orders, where this process is to be a warm server."""
    fd = os.environ.pop(ORDERS_FD, None)
    return None if fd is None else socket.socket(fileno=int(fd))
