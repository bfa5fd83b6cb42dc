"""What several records are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from deadpool_megatron.durable.format import Coordinate

Purpose = Literal["resume", "save", "drain"]
SideEffectKind = Literal["log", "evaluation", "save"]
Stall = Literal["waiting", "busy", "silent"]
Step = Literal["parked", "rehearsed", "ready", "formed", "restored", "resumed", "finished"]


class Record(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A message: told from the others by its name."""


class OfNode(Record, frozen=True):
    """What a node says of itself, or is asked for."""

    node: int


class OfEpoch(Record, frozen=True):
    """What counts in one epoch only."""

    epoch: int


class OfNodeInEpoch(OfEpoch, frozen=True):
    """What a node says in one epoch."""

    node: int


class OfRank(OfNode, frozen=True):
    """What a coordinate says of an iteration."""

    rank: int
    epoch: int
    iteration: int


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message. Those of which there is one for each rank are not looked at by the collector."""


class Address(Value, frozen=True, gc=False):
    """Where a node's vault listens."""

    host: str
    port: int


class SlotAddress(Value, frozen=True, gc=False):
    """A physical place a worker runs: (node, local index)."""

    node: int
    local: int


def few_nodes(called: Sequence[object], most: int = 8) -> str:
    """``node 1``, ``nodes 1, 2 and 7 more``: no more than ``most`` by number or name, the rest counted."""
    more = f" and {len(called) - most} more" if len(called) > most else ""
    return f"node{'s' if len(called) > 1 else ''} {', '.join(map(str, called[:most]))}{more}"


class Source(Value, frozen=True):
    """A node whose vault holds a shard, the epoch it was written in, and others that hold the very same version."""

    node: int
    version_epoch: int
    others: list[int] = msgspec.field(default_factory=list)


class Share(Value, frozen=True):
    """One share of a word (see `vault.rebuild.Piece`): ``holder`` is a rank, or for parity a word."""

    share: int
    holder: int
    node: int
    version_epoch: int


CoordinateInfo = Coordinate  # on the wire as in a manifest


FaultKind = Literal[
    "kill",
    "kill-worker",
    "kill-agent",
    "kill-coordinator",
    "stop",
    "stop-agent",
    "hang",
    "raise",
    "crash",
    "slow",
    "corrupt",
    "fail-check",
    "sign",
    "abort",
]


class Fault(Value, frozen=True):
    """A fault to be injected on a node.

    ==================  =========================================================================================
    kill                SIGKILL for the agent and all its workers: the node is gone
    kill-worker         SIGKILL for one worker
    kill-agent          SIGKILL for the agent alone
    kill-coordinator    SIGKILL for the coordinator (``node`` is not looked at)
    stop, stop-agent    SIGSTOP: the worker, or the agent and its workers, hang and never answer
    hang                the worker's training thread sleeps for ever in its own code
    raise               the training thread raises an error, as a bug in user code would
    crash               the worker dies of SIGSEGV
    slow                every microbatch of the worker takes ``seconds`` longer from now on
    corrupt             bytes of the worker's newest complete own copy are overwritten in the vault
    fail-check          from now on the worker, parked on a spare node, finds a wrong result when it is checked
    sign                the machine tells of ``sign``, as xid:149, as if its kernel log had it
    abort               nobody dies: the communicators are aborted and re-formed with the same assignment
    ==================  =========================================================================================

    With ``iteration`` None it fires at once, else in that iteration, at the ``tick``-th forward or backward pass begun
    within it (1 is the first forward) on local worker ``local``. With ``point`` it fires when the process passes that
    crash point (`cluster.points`) in that iteration or later.
    """

    kind: FaultKind
    node: int
    local: int = 0
    iteration: int | None = None
    tick: int = 1
    point: str = ""
    seconds: float = 0.0
    sign: str = ""
