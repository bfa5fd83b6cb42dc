"""The typed records that agents, coordinator and workers exchange.

Every record is a frozen msgspec struct with a tag; unknown tags, unknown fields and malformed values are refused when
decoded, and nothing is ever unpickled. `VERSION` leads every packet, so that two releases never misread each other.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "Address",
    "AgentRecord",
    "Agree",
    "AllFinished",
    "ArenaGranted",
    "ArenaRefused",
    "ArenaRequest",
    "Arm",
    "Arrived",
    "Committed",
    "CommittedTo",
    "CoordinateInfo",
    "CoordinatorRecord",
    "Declare",
    "Fault",
    "FetchFailed",
    "Finished",
    "Form",
    "Generation",
    "Inject",
    "InjectReply",
    "Iteration",
    "Join",
    "NodeFormed",
    "NodeReady",
    "NodeRestored",
    "NodeResumed",
    "Offer",
    "PeerError",
    "Purpose",
    "RecordError",
    "Registered",
    "Roster",
    "Saved",
    "ShardReady",
    "SlotAddress",
    "Source",
    "StateHash",
    "Step",
    "Stop",
    "TakeOver",
    "WorkerExited",
    "WorkerFailed",
    "WorkerReady",
    "WorkerRecord",
    "WorkerStep",
    "WorkerTold",
    "decode_from_agent",
    "decode_from_coordinator",
    "decode_from_worker",
    "decode_to_worker",
    "encode",
]

VERSION = b"\x01"
Purpose = Literal["resume", "save"]
Step = Literal["parked", "ready", "formed", "restored", "resumed", "finished"]


class RecordError(ValueError):
    """Bytes that are not a record of this protocol version."""


class _Record(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Address(_Value, frozen=True):
    """Where a node's vault listens."""

    host: str
    port: int


class SlotAddress(_Value, frozen=True):
    """A physical place a worker runs: (node, local index)."""

    node: int
    local: int


class Source(_Value, frozen=True):
    """A node whose vault holds a shard, and the epoch it was written in."""

    node: int
    version_epoch: int


class CoordinateInfo(_Value, frozen=True):
    """The parallel indices of one coordinate."""

    rank: int
    tp: int
    pp: int
    dp: int
    cp: int = 0
    ep: int = 0


class Fault(_Value, frozen=True):
    """A fault to be injected on a node.

    With ``iteration`` None it fires at once. ``tick`` counts the forward and backward passes begun within the
    iteration (1 is the first forward) on local worker ``local``. "abort" ends the epoch with every node alive: the
    communicators are aborted and re-formed with the same assignment.
    """

    kind: Literal["kill", "kill-worker", "abort"]
    node: int
    local: int = 0
    iteration: int | None = None
    tick: int = 1


# ---- agent -> coordinator


class Join(_Record, frozen=True):
    """An agent is up, its vault listens and its workers are started."""

    node: int
    pid: int
    host: str
    vault_port: int
    worker_pids: list[int]


class WorkerReady(_Record, frozen=True):
    """A worker has imported everything; on a spare node it is parked now."""

    node: int
    local: int
    pid: int


class Registered(_Record, frozen=True):
    """A coordinate has built its model and is about to train."""

    node: int
    local: int
    coordinate: CoordinateInfo
    unique_bytes: int
    small_bytes: int
    table_digest: str
    strategy: str
    can_rescue: bool


class WorkerExited(_Record, frozen=True):
    """A worker process ended: ``code`` as from waitpid, negative for a signal."""

    node: int
    local: int
    rank: int | None
    pid: int
    code: int


class WorkerFailed(_Record, frozen=True):
    """A worker ends because of an exception of its own (not of a lost peer)."""

    node: int
    local: int
    rank: int | None
    phase: Literal["setup", "training", "tail"]
    iteration: int
    user_error: bool
    message: str
    traceback: str


class PeerError(_Record, frozen=True):
    """A survivor saw a communication error: a hint that a peer is gone, never proof."""

    epoch: int
    node: int
    rank: int
    text: str


class Offer(_Record, frozen=True):
    """All workers of a node have left their step; what the node can give, by rank.

    ``live`` are generations, ``own`` and ``peer`` versions (epoch, generation) complete in the node's vault.
    """

    epoch: int
    node: int
    live: dict[int, int | None]
    own: dict[int, list[tuple[int, int]]]
    peer: dict[int, list[tuple[int, int]]]


class NodeReady(_Record, frozen=True):
    """All workers of a node hold the agreed generation and wait to form the groups of the epoch."""

    epoch: int
    node: int


class NodeFormed(_Record, frozen=True):
    """All workers of a node have re-formed their groups."""

    epoch: int
    node: int
    groups: int


class NodeRestored(_Record, frozen=True):
    """All workers of a node have the complete state of the agreed generation, 16-bit parameters included."""

    epoch: int
    node: int


class NodeResumed(_Record, frozen=True):
    """All workers of a node run again."""

    epoch: int
    node: int
    iteration: int


class Committed(_Record, frozen=True):
    """Every coordinate of the node has committed this generation (own vault and peer vault complete)."""

    epoch: int
    node: int
    generation: int


class Iteration(_Record, frozen=True):
    """The coordinate that knows the loss has finished an iteration.

    ``losses`` are hexadecimal floats (exact); ``blocked_s`` is the time this rank's training thread spent in
    DeadPool in this iteration, ``seconds`` the whole iteration.
    """

    node: int
    rank: int
    epoch: int
    iteration: int
    losses: dict[str, str]
    grad_norm: str | None
    seconds: float
    blocked_s: float
    copied_bytes: int
    skipped_generations: int


class FetchFailed(_Record, frozen=True):
    """The shard of a lost coordinate could not be had from the source that was named."""

    epoch: int
    node: int
    rank: int
    source: int
    generation: int
    why: str


class Finished(_Record, frozen=True):
    """All workers of a node have finished training."""

    epoch: int
    node: int


class StateHash(_Record, frozen=True):
    """SHA-256 digests of one coordinate's state at the end, by part."""

    node: int
    rank: int
    digests: dict[str, str]


class Saved(_Record, frozen=True):
    """All workers of a node have written Megatron's checkpoint of the agreed generation."""

    epoch: int
    node: int
    iteration: int
    directory: str


class Inject(_Record, frozen=True):
    """`deadpool inject` asks the coordinator for a fault."""

    fault: Fault


AgentRecord = (
    Join
    | WorkerReady
    | Registered
    | WorkerExited
    | WorkerFailed
    | PeerError
    | Offer
    | NodeReady
    | NodeFormed
    | NodeRestored
    | NodeResumed
    | Committed
    | Iteration
    | FetchFailed
    | Finished
    | StateHash
    | Saved
    | Inject
)


# ---- coordinator -> agent


class Roster(_Record, frozen=True):
    """The job is complete: the assignment by rank, the vault addresses and the peer of every node."""

    epoch: int
    assignment: list[SlotAddress]
    vaults: dict[int, Address]
    peers: dict[int, int]


class Declare(_Record, frozen=True):
    """Epoch ``epoch`` begins; every communicator of an older one is dead."""

    epoch: int
    purpose: Purpose
    reason: str
    lost_nodes: list[int]
    replaced: list[int]
    assignment: list[SlotAddress]
    vaults: dict[int, Address]
    peers: dict[int, int]


class Agree(_Record, frozen=True):
    """The generation to go on from and, by rank that does not hold it, where its shard comes from."""

    epoch: int
    generation: int
    sources: dict[int, Source]


class Form(_Record, frozen=True):
    """Every rank is ready: form the groups of this epoch."""

    epoch: int


class CommittedTo(_Record, frozen=True):
    """What the vaults keep: the newest version the whole job has committed, and the floor of the current epoch.

    ``kept`` is (epoch, generation), None before the first commit; nothing below generation ``floor`` but ``kept``
    will ever be committed in this epoch (see `vault.discipline`).
    """

    epoch: int
    kept: tuple[int, int] | None
    floor: int


class AllFinished(_Record, frozen=True):
    """Every coordinate has finished training; what follows in the script may run."""

    epoch: int


class Stop(_Record, frozen=True):
    """The job ends: workers are terminated, then the agent leaves with ``code``."""

    code: int
    message: str


class Arm(_Record, frozen=True):
    """A fault for this node."""

    fault: Fault


class InjectReply(_Record, frozen=True):
    """What became of an `Inject`: ``error`` is empty when it was accepted."""

    error: str


CoordinatorRecord = Roster | Declare | Agree | Form | CommittedTo | AllFinished | Stop | Arm | InjectReply


# ---- worker -> agent


class WorkerStep(_Record, frozen=True):
    """A worker reached a step of the protocol."""

    step: Step
    epoch: int
    number: int = 0


class ArenaRequest(_Record, frozen=True):
    """A worker asks for the memory of its shard in the vault."""

    rank: int
    unique_bytes: int
    small_bytes: int


class Arrived(_Record, frozen=True):
    """A worker's training thread has left its step. ``live`` is the generation its live state is, None when torn."""

    epoch: int
    rank: int
    live: int | None


class ShardReady(_Record, frozen=True):
    """A worker has saved the checkpoint of the agreed generation."""

    epoch: int
    iteration: int
    directory: str


WorkerRecord = (
    WorkerStep
    | ArenaRequest
    | Arrived
    | ShardReady
    | Registered
    | WorkerFailed
    | PeerError
    | Iteration
    | StateHash
)


# ---- agent -> worker


class ArenaGranted(_Record, frozen=True):
    """The arena file of a rank."""

    rank: int
    path: str


class ArenaRefused(_Record, frozen=True):
    """The vault has no room, in one line."""

    message: str


class TakeOver(_Record, frozen=True):
    """A parked worker becomes a coordinate."""

    epoch: int
    rank: int


class Generation(_Record, frozen=True):
    """The agreed generation is in the arena at ``path`` as version (``version_epoch``, ``generation``).

    ``version_epoch`` is -1 when this rank's vault does not hold it (its live state does).
    """

    epoch: int
    generation: int
    version_epoch: int
    path: str


WorkerTold = ArenaGranted | ArenaRefused | TakeOver | Generation | Declare | Form | AllFinished | Stop | Arm

_encoder = msgspec.msgpack.Encoder()
_from_agent: msgspec.msgpack.Decoder[AgentRecord] = msgspec.msgpack.Decoder(AgentRecord)
_from_coordinator: msgspec.msgpack.Decoder[CoordinatorRecord] = msgspec.msgpack.Decoder(CoordinatorRecord)
_from_worker: msgspec.msgpack.Decoder[WorkerRecord] = msgspec.msgpack.Decoder(WorkerRecord)
_to_worker: msgspec.msgpack.Decoder[WorkerTold] = msgspec.msgpack.Decoder(WorkerTold)


def encode(record: msgspec.Struct) -> bytes:
    """One packet: the protocol version, then the record as msgpack."""
    return VERSION + _encoder.encode(record)


def _body(packet: bytes, sender: str) -> bytes:
    if packet[:1] != VERSION:
        raise RecordError(f"packet from {sender} is of protocol version {packet[:1].hex() or '?'}, not {VERSION.hex()}")
    return packet[1:]


def decode_from_agent(packet: bytes) -> AgentRecord:
    """Decode what an agent (or `deadpool inject`) sent. Raises RecordError."""
    try:
        return _from_agent.decode(_body(packet, "agent"))
    except msgspec.MsgspecError as err:
        raise RecordError(f"malformed record from agent: {err}") from None


def decode_from_coordinator(packet: bytes) -> CoordinatorRecord:
    """Decode what the coordinator sent. Raises RecordError."""
    try:
        return _from_coordinator.decode(_body(packet, "coordinator"))
    except msgspec.MsgspecError as err:
        raise RecordError(f"malformed record from coordinator: {err}") from None


def decode_from_worker(packet: bytes) -> WorkerRecord:
    """Decode what a worker sent. Raises RecordError."""
    try:
        return _from_worker.decode(_body(packet, "worker"))
    except msgspec.MsgspecError as err:
        raise RecordError(f"malformed record from worker: {err}") from None


def decode_to_worker(packet: bytes) -> WorkerTold:
    """Decode what the agent told this worker. Raises RecordError."""
    try:
        return _to_worker.decode(_body(packet, "agent"))
    except msgspec.MsgspecError as err:
        raise RecordError(f"malformed record from agent: {err}") from None
