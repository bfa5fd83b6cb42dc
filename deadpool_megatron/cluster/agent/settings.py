"""What one agent has to know before it starts: the job's one configuration, and what is this node's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deadpool_megatron.config import DeadpoolConfig


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Of one agent. It comes as JSON (msgspec) on the agent's stdin.

    Args:
        host: the node's own address, for its vault.
        coordinator: HOST:PORT.
        command: what runs a worker; ``environment`` is the workers', without ranks.
        store: what `open_store` takes, where the coordinator may move to another node; else empty.
        adopt: name of the socket at which workers that somebody else has started come to this agent; empty where it
            starts them itself.
        tells_end: print why the job ended, since no launcher beside the agent does.
        metrics_port: 0 for none.
        exit_signal: what workers in plain mode get when the machines are wanted soon; 0 for nothing.
        pin: the agent binds itself to processors that its workers do not need.
        kernel_log: where the machine's Xids are read; empty: nowhere.
    """

    config: DeadpoolConfig
    job_id: str
    node: int
    slots_per_node: int
    active_nodes: int
    host: str
    coordinator: str
    secret: bytes
    log_dir: str = ""
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    shm_directory: str = "/dev/shm"
    store: Sequence[str] = ()
    adopt: str = ""
    tells_end: bool = False
    metrics_port: int = 0
    exit_signal: int = 0
    pin: bool = False
    kernel_log: str = ""

    @property
    def world_size(self) -> int:
        """Number of coordinates."""
        return self.active_nodes * self.slots_per_node

    @property
    def durable_dir(self) -> str:
        """Where this job's generations become durable; empty for nowhere."""
        return self.config.durable_dir if self.config.deadpool else ""
