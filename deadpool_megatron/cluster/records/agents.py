"""What agents (and the command-line tools) tell the coordinator."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from deadpool_megatron.cluster.records.durability import DurableReport
from deadpool_megatron.cluster.records.values import (
    CoordinateInfo,
    Fault,
    OfNode,
    OfNodeInEpoch,
    OfRank,
    Record,
    SideEffectKind,
    Stall,
)


class Join(OfNode, frozen=True):
    """An agent is up, its vault listens and its workers are started.

    Told again whenever the connection to the coordinator comes back: ``epoch`` is the one the agent stands in and
    ``settled`` says that all its workers train in it, or wait parked. ``respawns``: the agent can start a worker again
    (not one that another launcher has started). ``kept``: (epoch, generation) of the newest commit it has been told of;
    a coordinator that starts again may not know it, while others have freed what was before it. ``iteration``: the
    newest of this epoch that a rank here has told; -1: none. ``name``: of the node, for people.
    """

    pid: int
    host: str
    vault_port: int
    worker_pids: list[int]
    domains: dict[str, str] = msgspec.field(default_factory=dict)
    epoch: int = 0
    settled: bool = True
    respawns: bool = True
    kept: tuple[int, int] | None = None
    iteration: int = -1
    name: str = ""


class WorkerReady(OfNode, frozen=True):
    """A worker has imported everything; on a spare node it is parked now."""

    local: int
    pid: int


class Rehearsed(OfNode, frozen=True):
    """The coordinates that a spare node has set up ahead of time. ``why``: one of them is not, or not any more.
    ``failed``: by rank, why it is not set up, and not begun again either."""

    ranks: list[int]
    why: str = ""
    failed: dict[int, str] = msgspec.field(default_factory=dict)


class Standbys(OfNode, frozen=True):
    """By local index, the processes that can take the place of a worker of the node. ``why``: one has ended."""

    pids: dict[int, int]
    why: str = ""


class SpareChecked(OfNode, frozen=True):
    """A spare node has looked whether it could take over: ``why`` it could not, in one line; empty: it could.

    ``seconds``: of the whole check; ``link_s``: of the slowest exchange with a partner's vault, there and back.
    """

    number: int
    why: str = ""
    seconds: float = 0.0
    link_s: float = 0.0


class Registered(OfNode, frozen=True):
    """A coordinate has built its model and is about to train."""

    local: int
    coordinate: CoordinateInfo
    unique_bytes: int
    small_bytes: int
    table_digest: str
    can_rescue: bool
    expected_bytes: int = 0
    epoch: int = 0
    repeatable: bool = True
    """Training the same generation once more gives the same bits."""
    restarts: bool = False
    """It may wait for other nodes where nothing frees it but its end: a recovery needs another process."""
    widths: list[int] = msgspec.field(default_factory=list)
    """Told by rank 0: smaller numbers of data-parallel replicas that the job can go on with."""
    iterations: int = 0
    """Likewise: those that the job trains in all; 0: not known."""


class WorkerExited(OfNode, frozen=True):
    """A worker process ended: ``code`` as from waitpid, negative for a signal. ``epoch``: that of its agent.

    ``log``: path of its log on its node; ``words``: the lines of it that say why, where it ended with an error.
    ``stands_by``: another process of the node takes its place at once, in the epoch that the node has not made its
    offer for yet or, where there is none, in the next one.
    """

    local: int
    rank: int | None
    pid: int
    code: int
    epoch: int = 0
    log: str = ""
    words: list[str] = msgspec.field(default_factory=list)
    stands_by: bool = False


class WorkerFailed(OfNode, frozen=True):
    """A worker ends because of an exception of its own (not of a lost peer).

    ``epoch``: the one it trained in. ``code``: with which the job ends at once; 0: as recoveries decide. ``kind``: the
    exception's type; ``place``: the line of code that raised it. ``communication``: a lost peer may have caused it.
    """

    local: int
    rank: int | None
    phase: Literal["setup", "training", "tail"]
    epoch: int
    iteration: int
    code: int
    kind: str
    place: str
    message: str
    traceback: str
    communication: bool = False


SPREAD_S: Final = 60.0
"""So long a sign explains what ends on other nodes. (NVIDIA looks back 30 s; a process takes its time to die.)"""


class MachineSign(OfNode, frozen=True):
    """The machine of a node tells of a fault: an Xid of the NVIDIA driver.

    ``device``: its PCI address, as the driver writes it; ``after``: the Xid that the driver says it follows; 0: none.
    """

    xid: int
    device: str = ""
    text: str = ""
    after: int = 0


class PeerError(OfNodeInEpoch, frozen=True):
    """A survivor saw a communication error: a hint that a peer is gone, never proof."""

    rank: int
    text: str


class Offer(OfNodeInEpoch, frozen=True):
    """All workers of a node have left their step; what the node can give, by rank.

    ``live`` are generations, ``own`` and ``peer`` versions (epoch, generation) complete in the node's vault; so are
    those of ``parity``, by word (see `cluster.placement.redundancy.Word`). ``arrived``: every coordinate here
    has a worker that can form its groups now; if not, a `NodeArrived` follows. ``live_epochs``: in which the live state
    was computed.
    """

    live: dict[int, int | None]
    own: dict[int, list[tuple[int, int]]]
    peer: dict[int, list[tuple[int, int]]]
    parity: dict[int, list[tuple[int, int]]] = msgspec.field(default_factory=dict)
    arrived: bool = True
    live_epochs: dict[int, int] = msgspec.field(default_factory=dict)


class NodeArrived(OfNodeInEpoch, frozen=True):
    """The workers that took over coordinates on this node can form their groups now."""


class Behind(OfNodeInEpoch, frozen=True):
    """The agent does not hold what a `Changed` was a change of: it needs the whole."""


class NodeReady(OfNodeInEpoch, frozen=True):
    """All workers of a node hold the agreed generation and wait for the groups of the epoch."""


class NodeFormed(OfNodeInEpoch, frozen=True):
    """All workers of a node have re-formed their groups."""

    groups: int
    """Of one rank."""
    changed: int = 0
    """Re-formed, not kept: summed over the node's ranks."""
    of: int = 0
    """All groups, summed over the node's ranks."""


class NodeRestored(OfNodeInEpoch, frozen=True):
    """All workers of a node have the complete state of the agreed generation, 16-bit parameters included."""


class NodeResumed(OfNodeInEpoch, frozen=True):
    """All workers of a node run again."""

    iteration: int


# A recovery's, in order, and how they are called wherever they are shown.
STEPS: Final[dict[type, str]] = {
    Offer: "aborted",
    NodeReady: "prepared",
    NodeFormed: "reformed",
    NodeRestored: "restored",
    NodeResumed: "resumed",
}


class Committed(OfNodeInEpoch, frozen=True):
    """Every coordinate of the node has committed this generation (own vault and peer vault complete).

    ``apart``: they have not, and cannot: one has committed this generation, which another one has skipped.
    """

    generation: int
    apart: bool = False


class Covered(OfNodeInEpoch, frozen=True):
    """The shards of a node's coordinates of the generation that is kept are complete wherever they belong."""

    generation: int


class NoRoom(OfNode, frozen=True):
    """The memory that the placement wants on this node is not there; one line for the user."""

    message: str


class Refusals(OfNode, frozen=True):
    """How much the node's vault and agent have refused so far, by reason."""

    counts: dict[str, int]


class VaultMemory(OfNode, frozen=True):
    """All memory of the node's vault is taken: its bytes, and how many of them are in huge pages.

    ``numa_nodes``: of the machine; with one there is nothing to choose. ``transport``: tcp or nixl, ``why`` for people.
    """

    nbytes: int
    huge_bytes: int
    numa_nodes: int = 1
    transport: str = "tcp"
    why: str = ""


class DamagedCopy(OfNodeInEpoch, frozen=True):
    """A copy in the node's vault has changed in memory. ``holder`` is a rank, or for parity a word."""

    holder: int
    kind: Literal["own", "peer", "parity"]
    generation: int


class Iteration(OfRank, frozen=True):
    """The coordinate that knows the loss has finished an iteration.

    ``losses`` are hexadecimal floats (exact); ``blocked_s`` is the time this rank's training thread spent in
    DeadPool in this iteration, ``seconds`` the whole iteration. The rest is
    `snapshot.SnapshotStats` of this rank; what its agent has sent to the peer since the record before, and the bytes a
    second while it was sending, the agent adds.
    """

    losses: dict[str, str]
    grad_norm: str | None
    seconds: float
    blocked_s: float
    copied_bytes: int
    skipped_generations: int
    stall_s: float = 0.0
    device_stall_s: float = 0.0
    copied_s: float = 0.0
    copy_bandwidth: float = 0.0
    sent_bytes: int = 0
    send_bandwidth: float = 0.0


class FetchFailed(OfNodeInEpoch, frozen=True):
    """The shard of a lost coordinate could not be had from the source that was named.

    ``version_epoch``: the version's; -1 where any version of the generation may be meant. ``own``: the fault is the
    node's, which has no memory for it; the source may be good. ``gone``: whoever had the copy has given it up since it
    was offered. ``share``: what the source gave was to rebuild it, and says nothing of a whole copy there: the rank
    whose part it is, or the word whose parity; -1: a whole copy.
    """

    rank: int
    source: int
    generation: int
    why: str
    version_epoch: int = -1
    own: bool = False
    gone: bool = False
    share: int = -1


class Finished(OfNodeInEpoch, frozen=True):
    """All workers of a node have finished training."""


class StateHash(OfNode, frozen=True):
    """SHA-256 digests of one coordinate's state at the end, by part."""

    rank: int
    digests: dict[str, str]


class Saved(OfNodeInEpoch, frozen=True):
    """All workers of a node have written Megatron's checkpoint of the agreed generation."""

    iteration: int
    directory: str


class Stalled(OfNodeInEpoch, frozen=True):
    """A worker has made no progress for ``seconds``, far longer than its own pace explains.

    ``state``: "waiting" inside a communication, for somebody else; "busy" in code of its own; "silent" when not even
    its watcher thread answers (stopped, or stuck in a call that holds the interpreter).
    """

    rank: int
    iteration: int
    seconds: float
    state: Stall


class Pace(OfNode, frozen=True):
    """Seconds a microbatch's forward pass took of late, mean by rank of the node."""

    iteration: int
    forward_s: dict[int, float]


class NodeHeld(OfNodeInEpoch, frozen=True):
    """All workers of a node wait at the start of ``iteration`` with its generation in the own vault.

    ``missed``: at least one was past it already.
    """

    iteration: int
    missed: bool


class SideEffect(OfRank, frozen=True):
    """What is to be done once for an iteration has been done: a line of the log, an evaluation, a checkpoint."""

    act: SideEffectKind


class Unlike(Record, frozen=True):
    """A part of the state that some ranks have otherwise than most (all that were compared, where none has most)."""

    part: str
    ranks: list[int]


class Compared(OfRank, frozen=True):
    """All ranks have compared what they must hold alike, after a recovery or because it was time to.

    ``unlike``: what differed; ``equal``: nothing does any more. Rank 0 tells, and every rank that was unlike others.
    """

    seconds: float
    unlike: list[Unlike]
    equal: bool


class Inject(Record, frozen=True):
    """`deadpool inject` asks the coordinator for a fault."""

    fault: Fault


class Enlist(Record, frozen=True):
    """`deadpool agent` asks for a place in the job, before its agent joins. ``token`` names this request.

    ``node`` is None where the coordinator shall choose. The rest must be what the coordinator was started with.
    """

    token: str
    host: str
    node: int | None
    nodes: int
    spare_nodes: int
    slots_per_node: int
    flags: list[str]


class Drain(OfNode, frozen=True):
    """`deadpool drain` asks that a node's coordinates move to a spare at the next step boundary.

    ``cancel``: they are to stay, where that was asked before.
    """

    cancel: bool = False


class AddSpare(Record, frozen=True):
    """`deadpool join` asks for a number for a node that comes as a new spare."""

    host: str


WorkerNews = (
    WorkerReady
    | Rehearsed
    | Standbys
    | SpareChecked
    | Registered
    | WorkerExited
    | WorkerFailed
    | MachineSign
    | PeerError
)
RecoveryNews = Offer | Behind | NodeArrived | NodeReady | NodeFormed | NodeRestored | NodeResumed
VaultNews = Committed | Covered | DamagedCopy | NoRoom | Refusals | VaultMemory
TrainingNews = Iteration | FetchFailed | Finished | StateHash | Saved
CommandRequest = Inject | Enlist | Drain | AddSpare
Observation = Stalled | Pace | NodeHeld | SideEffect | Compared
AgentRecord = Join | WorkerNews | RecoveryNews | VaultNews | TrainingNews | DurableReport | CommandRequest | Observation
