"""``python -m deadpool_megatron.launcher.node agent|coordinator``: the processes the launcher starts.

Their settings come as JSON on stdin and not as arguments or environment because the job's secret is among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
from typing import Any

import msgspec
import zmq

from deadpool_megatron.cluster.agent.process import AgentProcess
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.coordinator.coordinator import Coordinator, CoordinatorSettings
from deadpool_megatron.cluster.coordinator.enlistment import Enlistment
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.core.job import Deadlines, JobSpec
from deadpool_megatron.cluster.link.ports import once_free, patience_s
from deadpool_megatron.cluster.notices import INTERRUPT, PREEMPT, WARNINGS
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.store import EMBEDDED, Deposed, Guard, open_store
from deadpool_megatron.durable import DurableError, Lease, begin, go_on, this_process
from deadpool_megatron.output import never_fails
from deadpool_megatron.vault import VaultError

__all__ = ["main"]


def _coordinator(settings: dict[str, Any]) -> int:
    job = settings["job"]
    durable, lease = job.pop("durable", None), None
    domains = {int(node): labels for node, labels in job["domains"].items()}  # JSON knows text keys only
    spec = JobSpec(**{**job, "deadlines": Deadlines(**job["deadlines"]), "domains": domains})
    if durable is not None:
        durable, lease = _durable(durable, spec.world_size, settings["job_id"], settings["resume"])
        spec = dataclasses.replace(spec, durable=durable)
    with contextlib.ExitStack() as at_the_end:
        if lease is not None:
            at_the_end.callback(lease.end)
        try:
            return _coordinate(settings, spec, lease)
        except Deposed:
            at_the_end.pop_all()  # the job goes on
            print("another node leads the job now", flush=True)
            return Exit.DEPOSED


def _coordinate(settings: dict[str, Any], spec: JobSpec, lease: Lease | None) -> int:
    agent = settings["agent"]
    # The rendezvous of process groups lives here, outside of all training processes; it listens on every address. A
    # coordinator that is started again listens where the first one did, so nobody has to be told. Who connects before
    # torch is imported waits in the socket's queue: the coordinator decides at once.
    try:
        listener = once_free(lambda: _listen(settings["store_port"]), patience_s(settings["resume"]))
    except OSError as err:
        print(f"deadpool: coordinator: cannot listen on port {settings['store_port']}: {err.strerror}", file=sys.stderr)
        return Exit.USAGE
    settings["store_port"] = listener.getsockname()[1]
    stores: list[Any] = []

    def open_store_of_groups() -> None:
        import torch.distributed as dist

        port, fd = settings["store_port"], listener.detach()
        stores.append(dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=fd))

    if settings["resume"]:
        threading.Thread(target=open_store_of_groups, name="store", daemon=True).start()
    else:
        open_store_of_groups()
    url, name = settings["store"]
    store = open_store(url, settings["run_dir"], name)
    try:
        coordinator = Coordinator(
            spec,
            CoordinatorSettings(
                settings["host"],
                settings["bind"],
                settings["port"],
                bytes.fromhex(settings["secret"]),
                settings["run_dir"],
                settings["store_port"],
                settings["job_id"],
                settings["state_hash"],
                settings["resume"],
                url != EMBEDDED,
                {**agent, "environment": {**agent["environment"], "MASTER_PORT": str(settings["store_port"])}},
            ),
            Enlistment(spec, settings["flags"], settings["job_id"], settings["store_port"]),
            store,
            Guard(*settings["guard"]),
            lease=lease,
        )
    except zmq.ZMQError as err:
        where = f"{settings['bind']}:{settings['port']}"
        print(f"deadpool: coordinator: cannot listen on {where}: {err.strerror}; is a job there?", file=sys.stderr)
        return Exit.USAGE
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A batch system may send its SIGTERM to every process of the job; what the launcher means it says with the others.
    on_term = coordinator.preempt if settings["on_preempt"] else coordinator.interrupt
    signal.signal(signal.SIGTERM, lambda signum, frame: on_term())
    for notice in (PREEMPT, *WARNINGS):
        signal.signal(notice, lambda signum, frame: coordinator.preempt())
    signal.signal(INTERRUPT, lambda signum, frame: coordinator.interrupt())
    code, message = coordinator.run(lambda port: print(port, settings["store_port"], flush=True))
    print(message, flush=True)
    return code


def _listen(port: int) -> socket.socket:
    """A socket on every address, IPv6 too where there is one, as torch's own."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=4096)


def _durable(settings: dict[str, Any], world_size: int, job_id: str, again: bool) -> tuple[DurableSpec, Lease | None]:
    """Make the durable directory this job's and look into it once, before anybody waits for this process.

    ``again``: this coordinator takes the place of one that is gone. Raises DurableError, OSError.
    """
    names = ("resume", "newer_than", "writes", "launcher")
    resume, newer_than, writes, launcher = (settings.pop(name) for name in names)
    url, owner = settings["directory"], this_process(job_id, launcher) if writes else None
    if again:
        settings["job"] += f"r{os.getpid()}"  # its attempts are others than those of the one before
        usable, lease = go_on(url, owner, world_size, _say)
    else:
        usable, lease = begin(url, owner, resume, world_size, newer_than, _say)
    return DurableSpec(**settings, complete=usable, resume=resume != "none"), lease


def _say(line: str) -> None:
    print(f"deadpool: {line}", file=sys.stderr, flush=True)


def _agent(settings: dict[str, Any]) -> int:
    settings["secret"] = bytes.fromhex(settings["secret"])
    try:
        agent = AgentProcess(AgentSettings(**settings))
    except VaultError as err:  # what the user asked for cannot be had here
        print(f"deadpool: node {settings['node']}: {err}", file=sys.stderr)
        return Exit.USAGE
    return agent.run()


def main() -> int:
    """Entry point; returns the exit code."""
    never_fails()
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, Any])
    role = sys.argv[1]
    try:
        return _coordinator(settings) if role == "coordinator" else _agent(settings)
    except DurableError as err:
        print(f"deadpool: {err}", file=sys.stderr)
        return Exit.USAGE
    except OSError as err:  # the process boundary: a directory or address the user named cannot be used
        print(f"deadpool: {role}: {err}", file=sys.stderr)
        return Exit.USAGE


if __name__ == "__main__":
    sys.exit(main())
