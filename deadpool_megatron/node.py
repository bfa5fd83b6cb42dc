"""``python -m deadpool_megatron.node agent|coordinator``: the processes the launcher starts.

Their settings come as JSON on stdin and not as arguments or environment because the job's secret is among them.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import msgspec
import zmq

from deadpool_megatron.cluster import (
    Agent,
    AgentSettings,
    Coordinator,
    CoordinatorSettings,
    Deadlines,
    Enlistment,
    Exit,
    JobSpec,
)

__all__ = ["main"]


def _coordinator(settings: dict[str, Any]) -> int:
    import torch.distributed as dist

    job = settings["job"]
    domains = {int(node): labels for node, labels in job["domains"].items()}  # JSON knows text keys only
    spec = JobSpec(**{**job, "deadlines": Deadlines(**job["deadlines"]), "domains": domains})
    # The rendezvous of process groups lives here, outside of all training processes; it listens on every address.
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    try:
        coordinator = Coordinator(
            spec,
            CoordinatorSettings(
                settings["host"],
                settings["bind"],
                settings["port"],
                bytes.fromhex(settings["secret"]),
                settings["run_dir"],
                settings["state_hash"],
            ),
            Enlistment(spec, settings["flags"], settings["job_id"], store.port),
        )
    except zmq.ZMQError as err:
        where = f"{settings['bind']}:{settings['port']}"
        print(f"deadpool: coordinator: cannot listen on {where}: {err.strerror}; is a job there?", file=sys.stderr)
        return Exit.USAGE
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: coordinator.interrupt())
    code, message = coordinator.run(lambda port: print(port, store.port, flush=True))
    print(message, flush=True)
    return code


def _agent(settings: dict[str, Any]) -> int:
    settings["secret"] = bytes.fromhex(settings["secret"])
    return Agent(AgentSettings(**settings)).run()


def main() -> int:
    """Entry point; returns the exit code."""
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, Any])
    role = sys.argv[1]
    try:
        return _coordinator(settings) if role == "coordinator" else _agent(settings)
    except OSError as err:  # the process boundary: a directory or address the user named cannot be used
        print(f"deadpool: {role}: {err}", file=sys.stderr)
        return Exit.USAGE


if __name__ == "__main__":
    sys.exit(main())
