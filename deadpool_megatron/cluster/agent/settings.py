"""What one agent has to know before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["AgentSettings"]


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What one agent has to know. ``environment`` is the workers' (without ranks).

    ``tells_end``: print why the job ended, since no launcher beside the agent does. ``adopt``: name of the socket at
    which workers that somebody else has started come to this agent; empty where it starts them itself. ``store``: what
    `open_store` takes, where the coordinator may move to another node; else empty. ``pin``: the agent binds itself to
    processors that its workers do not need.
    """

    job_id: str
    node: int
    slots_per_node: int
    active_nodes: int
    host: str
    coordinator: str
    secret: bytes
    lease: float
    log_dir: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    deadpool: bool = True
    hang_factor: float = 10.0
    hang_floor: float = 20.0
    hang_outside: float = 600.0
    shm_directory: str = "/dev/shm"
    tells_end: bool = False
    adopt: str = ""
    redundancy: str = "1"
    send_bandwidth: float = 0.0
    transport: str = "tcp"
    host_memory: int = 0
    metrics_port: int = 0
    scrub_rate: int = 0
    durable_dir: str = ""
    on_preempt: bool = False
    exit_signal: int = 0  # what workers in plain mode get when the machines are wanted soon; 0: nothing
    store: Sequence[str] = ()
    pin: bool = False

    @property
    def world_size(self) -> int:
        """Number of coordinates."""
        return self.active_nodes * self.slots_per_node
