"""Whether what an agent says fits the job at all: ranks, slots, sizes and numbers against the plan. Pure.

A record that passed the decoder has the right fields of the right types; their values may still be nonsense. What is
refused here is counted and has no effect.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from deadpool_megatron.cluster import records as r
from deadpool_megatron.vault import MAX_GENERATION

MAX_SHARD_BYTES: Final = 1 << 46
_MOST_LOCALS: Final = 4096  # a node's slots and those it has rescued
_RANKS: Final = ("rank", "holder")
_MOST_COUNT: Final = MAX_GENERATION * 64
_COUNTS: Final = (  # -1: none
    *("source", "generation", "iteration", "iterations", "pid", "groups", "nbytes", "huge_bytes"),
)


@functools.cache
def _checks(kind: type) -> list[tuple[str, str]]:
    """Fields of a record's kind that are looked at, with what each is: an epoch, a rank, a slot, a count."""
    # (what an agent that comes back says of its own epoch is for the core to judge)
    known = frozenset(getattr(kind, "__struct_fields__", ())) - ({"epoch"} if kind is r.Join else frozenset())
    what = {"epoch": "epoch", **dict.fromkeys(_RANKS, "rank"), "local": "local", **dict.fromkeys(_COUNTS, "count")}
    return [(field, of) for field, of in what.items() if field in known]


def misfit(record: r.AgentRecord, world_size: int, epoch: int) -> str:
    """What is wrong with a record, in one line; empty when it fits.

    Args:
        epoch: the current one; nobody can speak of a later one.
    """
    kind = type(record)
    for field, what in _checks(kind):
        value = getattr(record, field)
        if what == "count":
            if not -1 <= value <= _MOST_COUNT:
                return f"{kind.__name__} with {field} {value}"
        elif what == "local":
            if not 0 <= value < _MOST_LOCALS:
                return f"{kind.__name__} of local worker {value}"
        elif value is None:
            continue
        elif what == "epoch" and not 0 <= value <= epoch:
            return f"{kind.__name__} of epoch {value}, and the job is in epoch {epoch}"
        elif what == "rank" and (value < 0 or (field == "rank" and value >= world_size)):
            return f"{kind.__name__} of {field} {value}, and the job has ranks 0 to {world_size - 1}"
    return _misfit_within(record, world_size, epoch)


def _misfit_within(record: r.AgentRecord, world_size: int, epoch: int) -> str:
    name = type(record).__name__
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
            stray = [rank for rank in [*record.ranks, *record.failed] if not 0 <= rank < world_size]
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
        last: Sequence[tuple[int, int]] = ()
        for versions in held.values():
            if versions == last:
                continue
            last = versions
            for written, generation in versions:
                if not (0 <= written <= epoch and 0 <= generation <= MAX_GENERATION):
                    return f"Offer of generation {generation} of epoch {written}, and the job is in epoch {epoch}"
    if any(g is not None and not 0 <= g <= MAX_GENERATION for g in record.live.values()):
        return "Offer of a live generation that cannot be"
    return ""
