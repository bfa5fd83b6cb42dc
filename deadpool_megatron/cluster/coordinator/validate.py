"""Whether what an agent says fits the job at all: ranks, slots, sizes and numbers against the plan. Pure.

A record that passed the decoder has the right fields of the right types; their values may still be nonsense. What is
refused here is counted and has no effect.
"""

from __future__ import annotations

import functools
from typing import Final

from deadpool_megatron.cluster import records as r
from deadpool_megatron.vault import MAX_GENERATION

MAX_SHARD_BYTES: Final = 1 << 46
_MOST_LOCALS: Final = 4096  # a node's slots and those it has rescued
_RANKS: Final = ("rank", "holder")
_COUNTS: Final = ("source", "generation", "iteration", "pid", "groups", "nbytes", "huge_bytes")  # -1: none


@functools.cache
def _fields(kind: type) -> list[tuple[str, ...]]:
    """Of a record's kind, those fields that are an epoch to be checked, a rank, a slot, a count."""
    # (what an agent that comes back says of its own epoch is for the core to judge)
    known = frozenset(getattr(kind, "__struct_fields__", ())) - ({"epoch"} if kind is r.Join else frozenset())
    return [tuple(f for f in each if f in known) for each in (("epoch",), _RANKS, ("local",), _COUNTS)]


def misfit(record: r.AgentRecord, world_size: int, epoch: int) -> str:
    """What is wrong with a record, in one line; empty when it fits.

    Args:
        epoch: the current one; nobody can speak of a later one.
    """
    name = type(record).__name__
    epochs, ranks, locals_, counts = _fields(type(record))
    for field in epochs:
        told = getattr(record, field)
        if told is not None and not 0 <= told <= epoch:
            return f"{name} of epoch {told}, and the job is in epoch {epoch}"
    for field in ranks:
        rank = getattr(record, field)
        if rank is not None and (rank < 0 or (field == "rank" and rank >= world_size)):
            return f"{name} of {field} {rank}, and the job has ranks 0 to {world_size - 1}"
    for field in locals_:
        if not 0 <= (local := getattr(record, field)) < _MOST_LOCALS:
            return f"{name} of local worker {local}"
    for field in counts:
        number = getattr(record, field)
        if not -1 <= number <= MAX_GENERATION * 64:
            return f"{name} with {field} {number}"
    match record:
        case r.Registered():
            return _registered(record, world_size)
        case r.Join():
            bad = not 0 <= record.vault_port < 65536 or len(record.worker_pids) > _MOST_LOCALS
            return f"{name} with port {record.vault_port} and {len(record.worker_pids)} workers" if bad else ""
        case r.MachineSign():
            return "" if 0 < record.xid < 1024 and 0 <= record.after < 1024 else f"{name} with Xid {record.xid}"
        case r.Offer():
            return _offer(record, world_size, epoch)
        case r.Rehearsed():
            stray = [rank for rank in record.ranks if not 0 <= rank < world_size]
            return f"{name} of rank {stray[0]}, and the job has ranks 0 to {world_size - 1}" if stray else ""
        case r.Standbys():
            wrong = [local for local in record.pids if not 0 <= local < _MOST_LOCALS]
            return f"{name} of local worker {wrong[0]}" if wrong else ""
    return ""


def _registered(record: r.Registered, world_size: int) -> str:
    c = record.coordinate
    if not 0 <= c.rank < world_size or not all(0 <= i < world_size for i in (c.tp, c.pp, c.dp, c.cp, c.ep)):
        return f"Registered with coordinate {c}, and the job has ranks 0 to {world_size - 1}"
    if not (0 <= record.unique_bytes <= MAX_SHARD_BYTES and 0 <= record.small_bytes <= MAX_SHARD_BYTES):
        return f"Registered with a shard of {record.unique_bytes} + {record.small_bytes} bytes"
    return ""


def _offer(record: r.Offer, world_size: int, epoch: int) -> str:
    stray = [rank for held in (record.live, record.own, record.peer) for rank in held if not 0 <= rank < world_size]
    if stray:
        return f"Offer of rank {stray[0]}, and the job has ranks 0 to {world_size - 1}"
    for held in (record.own, record.peer, record.parity):
        for versions in held.values():
            for written, generation in versions:
                if not (0 <= written <= epoch and 0 <= generation <= MAX_GENERATION):
                    return f"Offer of generation {generation} of epoch {written}, and the job is in epoch {epoch}"
    if any(g is not None and not 0 <= g <= MAX_GENERATION for g in record.live.values()):
        return "Offer of a live generation that cannot be"
    return ""
