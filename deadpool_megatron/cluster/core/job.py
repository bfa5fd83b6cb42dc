"""What a job is, and where it can stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from deadpool_megatron.cluster.core.durable import DurableSpec


class Phase(Enum):
    """Where the job stands."""

    STARTING = "starting"
    RUNNING = "training"
    ARRIVING = "aborting"
    PREPARING = "restoring"
    FORMING = "re-forming"
    RESTORING = "gathering parameters"
    WAITING = "waiting for a spare"
    FINISHING = "finishing"
    ENDED = "ended"


_GATHER_S = (0.003, 0.02)
_GATHER_S_A_NODE = 2e-5  # about what a packet and its answer cost
RECOVERING = frozenset({Phase.ARRIVING, Phase.PREPARING, Phase.FORMING, Phase.RESTORING, Phase.WAITING})


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Every deadline of the protocol, in seconds; detect < abort <= give up."""

    lease: float
    abort: float
    build: float
    form: float
    join: float = 120.0


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What the job is as it starts. ``nodes`` counts all nodes, spares included.

    ``worker_deaths``: workers a healthy node may lose in 24 hours before it counts as bad itself. ``on_preempt``: when
    the machines are wanted soon, the newest generation is made durable and the job leaves. ``snapshot_interval``:
    iterations from one generation to the next. ``wait_for_spare_s``: how long a job without spares waits for one before
    it ends. ``rehearsals``: of how many nodes each spare sets up the coordinates ahead of time. ``spare_check_s``: from
    one check of a parked spare to the next; 0: none. ``when_out_of_spares``: "save", "shrink" or "wait". ``gather_s``:
    workers that end within so many seconds of one another are one epoch.
    """

    nodes: int
    spare_nodes: int
    slots_per_node: int
    deadpool: bool
    deadlines: Deadlines
    transient_retries: int = 3
    redundancy: str = "1"
    domains: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    durable: DurableSpec | None = None
    worker_deaths: int = 3
    on_preempt: bool = False
    snapshot_interval: int = 1
    wait_for_spare_s: float = 0.0
    rehearsals: int = 0
    when_out_of_spares: str = "save"
    spare_check_s: float = 0.0
    gather_s: float = 0.0

    @property
    def active_nodes(self) -> int:
        """Nodes that train at first; fewer may, later on."""
        return self.nodes - self.spare_nodes

    @property
    def world_size(self) -> int:
        """Number of coordinates at first; never more."""
        return self.active_nodes * self.slots_per_node


def gather_s(nodes: int) -> float:
    """For how long the news of many nodes are gathered, in seconds: some at a time cost less than one by one."""
    return min(max(_GATHER_S[0], _GATHER_S_A_NODE * nodes), _GATHER_S[1])
