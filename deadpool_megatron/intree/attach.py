"""In-tree use: a patched Megatron-LM script calls `attach`, and `--deadpool` works under any per-rank launcher.

::

    launcher (torchrun, srun, ...)          on each node
      |- rank process: attach -----------+  local rank 0 starts `deadpool agent --adopt`, detached
      |    execs itself into a worker    |    |- coordinator (node 0)
      |- rank process: attach -----------+--> |- agent: adopts the node's rank processes

A rank keeps its process id, so its launcher sees it live and end. Ranks are numbered node by node; those of the last
``--deadpool-spare-nodes`` nodes are the spares, so the launcher's WORLD_SIZE counts them.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deadpool_megatron.config import ConfigError, DeadpoolConfig, from_script_arguments

# torchrun's variable -> Slurm's of the same meaning, for `srun python pretrain_gpt.py`.
_VARIABLES = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
    "MASTER_ADDR": "",
    "MASTER_PORT": "",
}
# What a launcher tells a rank and the agent must not pass on as its own.
_A_RANKS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_ROLES = ("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank process is in its job. ``nodes`` counts spares; ``endpoint`` is where the coordinator listens."""

    node: int
    nodes: int
    local: int
    slots: int
    spare_nodes: int
    endpoint: str

    @property
    def socket_name(self) -> str:
        """Where the node's agent waits for its workers; a machine may run several nodes of several jobs."""
        return f"deadpool-{os.getuid()}-{self.endpoint}-{self.node}"


def place_of(environ: Mapping[str, str], config: DeadpoolConfig) -> Place:
    """This process's place as its launcher says it. Raises ConfigError with one clear line."""
    values: dict[str, str] = {}
    for name, slurm in _VARIABLES.items():
        value = environ.get(name) or environ.get(slurm)
        if not value:
            also = f" (or {slurm})" if slurm else ""
            raise ConfigError(
                f"--deadpool: {name}{also} is not set: start one process a rank with torchrun, srun or the like, or "
                "use deadpool launch or deadpool agent"
            )
        values[name] = value
    numbers: dict[str, int] = {}
    for name in (*_A_RANKS_OWN[:4], "MASTER_PORT"):
        try:
            numbers[name] = int(values[name])
        except ValueError:
            raise ConfigError(f"--deadpool: {name} is {values[name]!r}, not a whole number") from None
    rank, world, local, slots = (numbers[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if slots < 1 or world % slots:
        raise ConfigError(f"--deadpool: WORLD_SIZE {world} is not a multiple of LOCAL_WORLD_SIZE {slots}")
    if not 0 <= rank < world or rank % slots != local:
        raise ConfigError(
            f"--deadpool: RANK {rank} is not local rank {local} of a node of {slots}: number the ranks node by node"
        )
    endpoint = config.rendezvous or f"{values['MASTER_ADDR']}:{numbers['MASTER_PORT'] + 1}"
    return Place(rank // slots, world // slots, local, slots, config.spare_nodes, endpoint)


def agent_command(place: Place, config: DeadpoolConfig, script: str, arguments: Sequence[str]) -> list[str]:
    """The `deadpool agent` of this node."""
    options = {
        "--nnodes": place.nodes,
        "--spare-nodes": place.spare_nodes,
        "--nproc-per-node": place.slots,
        "--node-rank": place.node,
        "--rdzv-endpoint": place.endpoint,
        "--run-dir": config.run_dir,
        "--adopt": place.socket_name,
        "--tee": "none",
    }
    command = [sys.executable, "-m", "deadpool_megatron.cli", "agent"]
    command += [str(text) for pair in options.items() for text in pair]
    return [*command, *(["--emulate-cpu"] if os.environ.get("DEADPOOL_EMULATE_CPU") else []), script, *arguments]


def _start_detached(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Start a process that is not our child, in a session of its own; a pidfd of it.

    Not our child, since this process becomes a worker that neither knows nor reaps it.
    """
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:  # no threads yet: nothing of torch has been imported
        try:
            process = subprocess.Popen(
                list(command), env=dict(environ), stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
            )
            os.write(writing, str(process.pid).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(between, 0)
    pid = os.read(reading, 32)
    os.close(reading)
    return os.pidfd_open(int(pid))


def attach() -> None:
    """Become a worker of this node's agent if ``--deadpool`` is among the flags; the first thing a script does.

    Does not return then: the process execs `deadpool_megatron.worker`, which runs the script. Without ``--deadpool``,
    and in a process that is a worker already (`deadpool launch` on a patched tree), it returns at once. Where something
    is wrong it ends the process with one line and code 2.
    """
    if "DEADPOOL_MODE" in os.environ:
        return
    try:
        config = from_script_arguments(sys.argv[1:])
        if config.deadpool:
            _become_worker(config)
    except (ConfigError, OSError) as err:
        print(f"deadpool: {err}", file=sys.stderr)
        sys.exit(2)


def _become_worker(config: DeadpoolConfig) -> None:
    from deadpool_megatron.cluster.agent.adoption import present
    from deadpool_megatron.cluster.agent.pulse import PULSE_FD
    from deadpool_megatron.cluster.agent.workers import ADOPTED, CONTROL_FD, DOORBELL_FD, MUSTER_FD
    from deadpool_megatron.launcher.processes import SECRET_VARIABLES

    place = place_of(os.environ, config)
    script = str(Path(sys.argv[0]).absolute())
    agent: list[int] = []
    if place.local == 0:
        environ = {k: v for k, v in os.environ.items() if k not in (*_A_RANKS_OWN, *_ROLES)}
        agent.append(_start_detached(agent_command(place, config, script, sys.argv[1:]), environ))

    def never() -> str | None:
        ended = bool(agent) and bool(select.select(agent, [], [], 0)[0])
        return "the agent of this node could not start; the line above says why" if ended else None

    control, environ = present(place.socket_name, place.local, never)
    for name in ("RANK", *_ROLES, *SECRET_VARIABLES):
        os.environ.pop(name, None)
    os.environ.update(environ | {CONTROL_FD: str(control), ADOPTED: "1"})
    for descriptor in (control, *(int(environ[name]) for name in (DOORBELL_FD, PULSE_FD, MUSTER_FD))):
        os.set_inheritable(descriptor, True)
    for descriptor in agent:
        os.close(descriptor)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # so that the agent can end it together with the data loaders it forks
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *flags, "-m", "deadpool_megatron.worker", script, *sys.argv[1:]])
