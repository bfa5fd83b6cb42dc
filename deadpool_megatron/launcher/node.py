"""``python -m deadpool_megatron.launcher.node agent|coordinator``: the processes the launcher starts.

Their settings come as JSON on stdin and not as arguments or environment because the job's secret is among them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from deadpool_megatron.cluster.agent.process import AgentProcess
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.coordinator.coordinator import Coordinator, CoordinatorSettings
from deadpool_megatron.cluster.coordinator.enlistment import Enlistment
from deadpool_megatron.cluster.coordinator.saved_state import Memory, of_this_version
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.link.ports import once_free, patience_s
from deadpool_megatron.cluster.notices import INTERRUPT, PREEMPT, TERMINATE, WARNINGS
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.store import EMBEDDED, Deposed, Guard, StoreDamaged, StoreError, open_store
from deadpool_megatron.durable import DurableError, Lease, Unreadable, begin, go_on, this_process
from deadpool_megatron.launcher.processes import CoordinatorStart, DurableStart
from deadpool_megatron.output import never_fails
from deadpool_megatron.vault import VaultError


class _NotBegun(Exception):
    """The store has ceased to answer before the job began; the message is one line."""


def _coordinator(start: CoordinatorStart) -> int:
    lease: Lease | None = None
    if start.durable is not None:
        spec, lease = _durable(start.durable, _world_size(start), start.agent.job_id, start.resume)
        start = replace(start, job=replace(start.job, durable=spec))
    with contextlib.ExitStack() as at_the_end:
        if lease is not None:
            at_the_end.callback(lease.end)
        try:
            return _coordinate(start, lease)
        except Deposed:
            at_the_end.pop_all()  # the job goes on
            print("another node leads the job now", flush=True)
            return Exit.DEPOSED
        except _NotBegun as err:  # whoever leads then starts one
            _say(str(err))
            return Exit.DEPOSED


def _coordinate(start: CoordinatorStart, lease: Lease | None) -> int:
    # The rendezvous of process groups lives here, outside of all training processes; it listens on every address. A
    # coordinator that is started again listens where the first one did, so nobody has to be told. Who connects before
    # torch is imported waits in the socket's queue: the coordinator decides at once.
    try:
        listener = once_free(lambda: _listen(start.store_port), patience_s(start.resume))
    except OSError as err:
        print(f"deadpool: coordinator: cannot listen on port {start.store_port}: {err.strerror}", file=sys.stderr)
        return Exit.USAGE
    agent, config, store_port = start.agent, start.agent.config, listener.getsockname()[1]
    stores: list[Any] = []

    def open_store_of_groups() -> None:
        import torch.distributed as dist

        fd = listener.detach()
        stores.append(dist.TCPStore("127.0.0.1", store_port, None, True, wait_for_workers=False, master_listen_fd=fd))

    if start.resume:
        threading.Thread(target=open_store_of_groups, name="store", daemon=True).start()
    else:
        open_store_of_groups()
    url, name = start.store
    store = open_store(url, start.run_dir, name)
    joining = replace(agent, environment={**agent.environment, "MASTER_PORT": str(store_port)})
    try:
        coordinator = Coordinator(
            start.job,
            CoordinatorSettings(
                start.host,
                start.bind,
                start.port,
                agent.secret,
                start.run_dir,
                store_port,
                agent.job_id,
                str(Path(config.state_hash).absolute()) if config.state_hash else "",
                start.resume,
                url != EMBEDDED,
                msgspec.to_builtins(joining),
                config.drain_sources if config.deadpool else (),
                config.drain_poll,
            ),
            Enlistment(start.job, config.flags(), agent.job_id, store_port),
            store,
            Guard(*start.guard),
            lease=lease,
        )
    except zmq.ZMQError as err:
        where = f"{start.bind}:{start.port}"
        print(f"deadpool: coordinator: cannot listen on {where}: {err.strerror}; is a job there?", file=sys.stderr)
        return Exit.USAGE
    _in_use(start.run_dir)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A batch system may send its SIGTERM to every process of the job; what the launcher means it says with the others.
    preempts, ends = [PREEMPT, *WARNINGS], [TERMINATE]
    (preempts if config.on_preempt else ends).append(signal.SIGTERM)
    for signum in preempts:
        signal.signal(signum, lambda signum, frame: coordinator.preempt())
    for signum in ends:
        signal.signal(signum, lambda signum, frame: coordinator.interrupt(Exit.TERMINATED))
    signal.signal(INTERRUPT, lambda signum, frame: coordinator.interrupt())
    try:
        code, message = _serve(coordinator, store_port, url != EMBEDDED and not start.resume)
    except Deposed:
        if not (start.alone and (coordinator.orphaned or coordinator.interrupted)):
            raise
        code, message = coordinator.abandoned()  # nobody else leads, nor will
    print(message, flush=True)
    return code


def _in_use(directory: str) -> None:
    """While this process lives systemd-tmpfiles removes nothing in ``directory``, however old: it passes over what has
    a lock. Without it a run directory in /tmp loses files, of the store too, that have not changed for ten days.
    """
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(os.open(directory, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH | fcntl.LOCK_NB)


def _serve(coordinator: Coordinator, store_port: int, may_wait: bool = False) -> tuple[int, str]:
    """To the end of the job; the exit code and the message that goes with it.

    Raises _NotBegun where whoever started this process waits for the store (``may_wait``).

    An error of the coordinator's own is none: what it has decided is kept, and a process that is ended by a signal is
    started again and goes on from there.
    """
    listens = False

    def announce(port: int) -> None:
        nonlocal listens
        print(port, store_port, flush=True)
        listens = True

    try:
        return coordinator.run(announce)
    except Deposed:
        raise
    except Exception as err:
        if isinstance(err, StoreError) and may_wait and not listens:
            raise _NotBegun(str(err)) from None
        if listens and not coordinator.finished and not coordinator.interrupted:
            traceback.print_exc()
            os.kill(os.getpid(), signal.SIGKILL)
        raise


def _listen(port: int) -> socket.socket:
    """A socket on every address, IPv6 too where there is one, as torch's own."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=4096)


def _durable(start: DurableStart, world_size: int, job_id: str, again: bool) -> tuple[DurableSpec, Lease | None]:
    """Make the durable directory this job's and look into it once, before anybody waits for this process.

    ``again``: this coordinator takes the place of one that is gone. Raises DurableError, OSError.
    """
    spec, owner = start.spec, this_process(job_id, start.launcher) if start.writes else None
    if again:
        # Its attempts are others than those of any one before, in whatever container with its own process ids.
        spec = replace(spec, job=f"{spec.job}r{secrets.token_hex(4)}")
        found, lease = go_on(spec.directory, owner, start.resume, world_size, start.newer_than, _say)
    else:
        found, lease = begin(spec.directory, owner, start.resume, world_size, start.newer_than, _say)
    resume = start.resume != "none" or start.shrinks
    return replace(spec, complete=found.usable, resume=resume, others=found.others, recut=found.recut), lease


def _world_size(start: CoordinatorStart) -> int:
    """Ranks of the job now: fewer than at first where a coordinator goes on with one that has fewer replicas."""
    url, name = start.store
    kept = Memory(open_store(url, start.run_dir, name), Guard(*start.guard)).read() if start.resume else None
    with of_this_version():
        return start.job.world_size if kept is None else int(kept["members"]["world_size"])


def _say(line: str) -> None:
    print(f"deadpool: {line}", file=sys.stderr, flush=True)


def _agent(settings: AgentSettings) -> int:
    try:
        agent = AgentProcess(settings)
    except VaultError as err:  # what the user asked for cannot be had here
        print(f"deadpool: node {settings.node}: {err}", file=sys.stderr)
        return Exit.USAGE
    try:
        return agent.run()
    except OSError:
        if not agent.serves:
            raise
        traceback.print_exc()  # a node that is lost: the others go on without it
        return Exit.FAILED


def main() -> int:
    never_fails(stands_still=False)  # the loop of a node, or of the job, has to go on
    role, settings = sys.argv[1], sys.stdin.buffer.read()
    try:
        if role == "coordinator":
            return _coordinator(msgspec.json.decode(settings, type=CoordinatorStart))
        return _agent(msgspec.json.decode(settings, type=AgentSettings))
    except DurableError as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.GENERATION_LOST if isinstance(err, Unreadable) else Exit.USAGE
    except OSError as err:  # the process boundary: a directory or address the user named cannot be used
        print(f"deadpool: {role}: {err}", file=sys.stderr)
        return Exit.RECOVERY_FAILED if isinstance(err, StoreDamaged) else Exit.USAGE  # which no other one can mend


if __name__ == "__main__":
    sys.exit(main())
