"""What a job is, where it can stand, and what the coordinator's decisions are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from deadpool_megatron.cluster.core.durable import DurableSpec

__all__ = ["RECOVERING", "Action", "Deadlines", "Emit", "Finish", "JobSpec", "Keep", "Out", "Phase", "Send", "Voice"]


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

    ``worker_deaths``: workers a healthy node may lose before it counts as bad itself. ``on_preempt``: when the machines
    are wanted soon, the newest generation is made durable and the job leaves. ``snapshot_interval``: iterations from
    one generation to the next. ``wait_for_spare_s``: how long a job without spares waits for one before it ends.
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

    @property
    def active_nodes(self) -> int:
        """Nodes that train at first."""
        return self.nodes - self.spare_nodes

    @property
    def world_size(self) -> int:
        """Number of coordinates."""
        return self.active_nodes * self.slots_per_node


@dataclass(frozen=True, slots=True)
class Send:
    """Send a record to one node, or to all that are in the job when ``node`` is None."""

    node: int | None
    record: msgspec.Struct


@dataclass(frozen=True, slots=True)
class Emit:
    """Write an event."""

    event: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Keep:
    """Put these parts of the state where a coordinator that starts again finds them, before anything is sent."""

    parts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over."""

    code: int
    message: str


Action = Send | Emit | Keep | Finish


@dataclass(frozen=True, slots=True)
class Voice:
    """How the parts of the coordinator's decisions say what is to be done, in order.

    ``send``: a record to a node, or to all that are in the job (None). ``emit``: an event. ``keep``: parts of the state
    (none named: what changes in a job's life), before anything is sent. ``declare``: a new epoch begins.
    ``start_over``: the job begins anew. ``lose``: these nodes are out of the job, for a cause. ``stop``: the job ends.
    """

    send: Callable[[int | None, msgspec.Struct], None]
    emit: Callable[..., None]
    keep: Callable[..., None]
    declare: Callable[[str], None]
    start_over: Callable[[str], None]
    lose: Callable[[set[int], str], None]
    stop: Callable[[int, str], None]


class Out:
    """Collects the actions of one step."""

    def __init__(self) -> None:
        self._actions: list[Action] = []

    def add(self, action: Action) -> None:
        """One more."""
        self._actions.append(action)

    def send(self, node: int | None, record: msgspec.Struct) -> None:
        """To one node, or to all."""
        self._actions.append(Send(node, record))

    def take(self) -> list[Action]:
        """What was collected since the last call."""
        actions, self._actions = self._actions, []
        return actions
