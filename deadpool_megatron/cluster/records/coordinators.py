"""What the coordinator tells the agents."""

from __future__ import annotations

import msgspec

from deadpool_megatron.cluster.records.durability import Base, DurableOrder
from deadpool_megatron.cluster.records.values import (
    Address,
    Fault,
    OfEpoch,
    OfNode,
    Purpose,
    Record,
    Share,
    SideEffectKind,
    SlotAddress,
    Source,
)


class Roster(OfEpoch, frozen=True):
    """The job is complete: the assignment by rank (left out of the first one, of epoch 0) and the vault addresses.

    ``anew``: a node was lost before there was anything to go on from, so workers that have a coordinate, or had one,
    end, and those of the assignment begin the script from its first line. ``began``: when the job did, in seconds since
    1970; 0: unknown. ``base``: what they begin with, if that is to stay in memory for them.
    """

    assignment: list[SlotAddress]
    vaults: dict[int, Address]
    version: int = 0
    anew: bool = False
    began: float = 0.0
    base: Base | None = None


class Placement(OfEpoch, frozen=True):
    """Every coordinate has built its model: the protection groups of nodes (see `cluster.placement.redundancy`), and by
    rank the bytes of unique state and the room for small state of its shard."""

    groups: list[list[int]]
    unique_bytes: list[int]
    small_capacity: list[int]
    version: int = 0


class Departed(Record, frozen=True):
    """These nodes are out of the job without a new epoch: spares that were lost, and nodes that were drained."""

    nodes: list[int]


class Declare(OfEpoch, frozen=True):
    """Epoch ``epoch`` begins; every communicator of an older one is dead."""

    purpose: Purpose
    reason: str
    lost_nodes: list[int]
    replaced: list[int]
    assignment: list[SlotAddress]
    vaults: dict[int, Address]
    groups: list[list[int]]
    unique_bytes: list[int] = msgspec.field(default_factory=list)
    small_capacity: list[int] = msgspec.field(default_factory=list)
    rendezvous: Address | None = None
    """Where the store of this epoch's process groups listens; None: where it did."""
    version: int = 0
    """Of the tables (see `cluster.records.tables`)."""


class Changed(OfEpoch, frozen=True):
    """`Declare` for who holds the tables of version ``base``: what is different in those of ``version``.

    ``moved`` and ``vaults`` by rank and node, ``gone`` nodes without a vault now, ``groups`` by index.
    """

    purpose: Purpose
    reason: str
    lost_nodes: list[int]
    replaced: list[int]
    base: int
    version: int
    moved: dict[int, SlotAddress]
    vaults: dict[int, Address]
    gone: list[int]
    groups: dict[int, list[int]]
    rendezvous: Address | None = None


class Agree(OfEpoch, frozen=True):
    """The generation to go on from and, by rank that does not hold it, where its shard comes from.

    ``rebuilds``: by rank of which no whole copy is left, for each part of its shard the shares to rebuild it from.
    ``durable`` names the durable generation that every rank is read from, when no vaults hold one.
    ``done`` has, by act, the last iteration it was done for: what is repeated is not done a second time.
    ``held``: every shard of it is in some vault, so it may be kept in the place of what was committed last.
    """

    generation: int
    sources: dict[int, Source]
    done: dict[SideEffectKind, int]
    rebuilds: dict[int, list[list[Share]]] = msgspec.field(default_factory=dict)
    durable: str = ""
    held: bool = True


class Form(OfEpoch, frozen=True):
    """Every rank has arrived: form the groups of this epoch, while state is brought and restored."""


class CommittedTo(OfEpoch, frozen=True):
    """What the vaults keep: the newest version the whole job has committed, and the floor of the current epoch.

    ``kept`` is (epoch, generation), None before the first commit; nothing below generation ``floor`` but ``kept``
    will ever be committed in this epoch (see `vault.discipline`).
    """

    kept: tuple[int, int] | None
    floor: int


class AllFinished(OfEpoch, frozen=True):
    """Every coordinate has finished training; what follows in the script may run."""


class Stop(Record, frozen=True):
    """The job ends: workers are terminated, then the agent leaves with ``code``."""

    code: int
    message: str


class Arm(Record, frozen=True):
    """A fault for this node."""

    fault: Fault


class Respawn(Record, frozen=True):
    """Start the parked worker of this slot again."""

    local: int


class Rehearse(Record, frozen=True):
    """A spare node is to set up these coordinates ahead of time, by local index, and no others."""

    ranks: dict[int, list[int]]


class CheckSpare(Record, frozen=True):
    """A parked spare node is to look whether it could take over now; the answer is a `SpareChecked` of that number.

    ``memory_bytes``: that its vault would have to hold. ``partners``: nodes whose vaults it exchanges some bytes with.
    """

    number: int
    memory_bytes: int
    partners: list[int]


class Hold(OfEpoch, frozen=True):
    """Every worker waits at the start of ``iteration`` for the next epoch: a planned move."""

    iteration: int


class ExitNotice(Record, frozen=True):
    """The machines are wanted soon: what Megatron does on its exit signal is to be done now."""


class EndStuck(OfEpoch, frozen=True):
    """A worker is stuck: keep its stack traces, then end it."""

    rank: int


class KeepStacks(OfEpoch, frozen=True):
    """The others wait for workers of this node: keep their stack traces, and ``end`` them, so that new ones begin."""

    end: bool


class InjectReply(Record, frozen=True):
    """What became of an `Inject` or a `Drain`: ``error`` is empty when it was accepted.

    ``later``: the reason may pass by itself, so it is worth asking again.
    """

    error: str
    later: bool = False


class Enlisted(OfNode, frozen=True):
    """The answer to `Enlist`: the node's number, the job's name, the port of the rendezvous store.

    ``error`` is empty, or says in one line why there is no place for this agent.
    """

    job_id: str
    store_port: int
    error: str


class SpareAdded(Record, frozen=True):
    """The answer to `AddSpare`: the number the new node has, or why it cannot come.

    ``later``: it can in a while.
    """

    error: str
    node: int
    later: bool = False


MembershipOrder = Roster | Placement | Departed
RecoveryOrder = Declare | Changed | Agree | Form | CommittedTo
JobOrder = AllFinished | Stop | Arm
NodeOrder = Respawn | Rehearse | CheckSpare | Hold | ExitNotice | EndStuck | KeepStacks
CommandReply = InjectReply | Enlisted
CoordinatorRecord = MembershipOrder | RecoveryOrder | JobOrder | CommandReply | DurableOrder | NodeOrder | SpareAdded
