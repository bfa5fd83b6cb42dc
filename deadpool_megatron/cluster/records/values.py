"""What several records are made of."""

from __future__ import annotations

from typing import Literal

import msgspec

Purpose = Literal["resume", "save"]
Step = Literal["parked", "ready", "formed", "restored", "resumed", "finished"]


class Record(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A message: told from the others by its name."""


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message."""


class Address(Value, frozen=True):
    """Where a node's vault listens."""

    host: str
    port: int


class SlotAddress(Value, frozen=True):
    """A physical place a worker runs: (node, local index)."""

    node: int
    local: int


class Source(Value, frozen=True):
    """A node whose vault holds a shard, and the epoch it was written in."""

    node: int
    version_epoch: int


class Share(Value, frozen=True):
    """One share of a word (see `vault.rebuild.Piece`): ``holder`` is a rank, or for parity a word."""

    share: int
    holder: int
    node: int
    version_epoch: int


class CoordinateInfo(Value, frozen=True):
    """The parallel indices of one coordinate."""

    rank: int
    tp: int
    pp: int
    dp: int
    cp: int = 0
    ep: int = 0


class Fault(Value, frozen=True):
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
