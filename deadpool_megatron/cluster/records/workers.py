"""What a worker and its agent tell each other."""

from __future__ import annotations

import msgspec

from deadpool_megatron.cluster.records.agents import (
    Compared,
    Iteration,
    PeerError,
    Registered,
    SideEffect,
    StateHash,
    WorkerFailed,
)
from deadpool_megatron.cluster.records.coordinators import AllFinished, Arm, Declare, ExitNotice, Form, Hold, Stop
from deadpool_megatron.cluster.records.durability import Described
from deadpool_megatron.cluster.records.values import (
    Address,
    CoordinateInfo,
    OfEpoch,
    Record,
    SideEffectKind,
    Step,
    Value,
)


class WorkerStep(Record, frozen=True):
    """A worker reached a step of the protocol. ``numa``: the NUMA node of its device, where it may
    take over a coordinate from then on ("parked", "rehearsed"); -1 for any."""

    step: Step
    epoch: int
    number: int = 0
    changed: int = 0
    """With "formed": how many of the rank's `number` groups were re-formed, not kept."""
    numa: int = -1


class ArenaRequest(Record, frozen=True):
    """A worker asks for the memory of its shard in the vault, on the NUMA node of its device (-1: any).

    ``layout``: the digest of what it consists of.
    """

    rank: int
    unique_bytes: int
    small_bytes: int
    numa: int = -1
    layout: str = ""


class Arrived(OfEpoch, frozen=True):
    """A worker's training thread has left its step. ``live`` is the generation its live state is, None when torn.

    ``live_epoch``: in which that state was computed.
    """

    rank: int
    live: int | None
    live_epoch: int = 0


class ShardReady(OfEpoch, frozen=True):
    """A worker has saved the checkpoint of the agreed generation."""

    iteration: int
    directory: str


class Checked(Record, frozen=True):
    """The answer to `Check`: ``why`` this process could not train, in one line; empty: it could."""

    number: int
    why: str = ""


class Leaving(Record, frozen=True):
    """The last word of a worker that its agent has not started, and so cannot wait for: its exit code."""

    code: int


class Held(OfEpoch, frozen=True):
    """A worker waits at the start of ``iteration``, its generation in the vault; ``missed``: it was past it."""

    iteration: int
    missed: bool


class Whereabouts(Record, frozen=True):
    """The answer to `Where`, by the watcher thread: is the training thread inside a communication?"""

    query: int
    waiting: bool


class Unreadable(OfEpoch, frozen=True):
    """The copy of the agreed generation in the own vault could not be used; of a durable one that is of another number
    of replicas (``version_epoch`` -1) what the rank was to read of it."""

    generation: int
    version_epoch: int
    why: str


WorkerState = WorkerStep | ArenaRequest | Arrived | ShardReady | Checked | Leaving
WorkerReport = Registered | WorkerFailed | PeerError | Iteration | StateHash
WorkerAnswer = Described | Held | Whereabouts | SideEffect | Compared | Unreadable
WorkerRecord = WorkerState | WorkerReport | WorkerAnswer


class ArenaGranted(Record, frozen=True):
    """The arena file of a rank."""

    rank: int
    path: str


class ArenaRefused(Record, frozen=True):
    """The vault has no room, in one line."""

    message: str


class TakeOver(OfEpoch, frozen=True):
    """A parked worker becomes a coordinate, of ``world_size``; 0: of as many as its environment says.

    ``environment``: the job begins anew with it, and this is what a fresh worker would find in its environment of the
    coordinate and the start; empty: it joins those that train.
    """

    rank: int
    world_size: int = 0
    environment: dict[str, str] = msgspec.field(default_factory=dict)


class Generation(OfEpoch, frozen=True):
    """The agreed generation is in the arena at ``path`` as version (``version_epoch``, ``generation``).

    ``version_epoch`` is -1 when this rank's vault does not hold it (its live state does). ``constants``: a durable
    generation's constants are in the own vault as well. ``live``: a live state of this generation is it too. ``note``:
    one line for the user, or none. ``recut``: as of `ResumeAt`; ``path`` is empty then. ``memory``: a file that says
    where that generation is in memory (`megatron.in_memory`).
    """

    generation: int
    version_epoch: int
    path: str
    done: dict[SideEffectKind, int]
    constants: bool = False
    live: bool = True
    note: str = ""
    recut: str = ""
    memory: str = ""


class InVaults(Value, frozen=True):
    """What the file ``memory`` of a `Generation` says, as msgpack: where its shards are.

    ``epoch``: of who asks. ``base_epoch``, ``generation``: under which version vaults have it set aside. ``holders``:
    by rank, and holder of its constants (`vault.constants_of`), the vaults that have them.
    """

    secret: bytes
    epoch: int
    base_epoch: int
    generation: int
    coordinates: list[CoordinateInfo]
    holders: dict[int, list[Address]]


class Where(Record, frozen=True):
    """Where is your training thread? To be answered at once by the watcher thread."""

    query: int


class Check(Record, frozen=True):
    """A parked worker is to compute a little, and to copy the first half of a `vault.Scratch` over its device into the
    second one."""

    number: int
    path: str


class KeepWaiting(Record, frozen=True):
    """The coordinator is away, so nobody can declare an epoch: who waits for one has not waited in vain."""


FromCoordinator = Hold | Declare | Form | AllFinished | ExitNotice | Stop | Arm
WorkerTold = Where | KeepWaiting | Check | ArenaGranted | ArenaRefused | TakeOver | Generation | FromCoordinator
