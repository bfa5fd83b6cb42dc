"""Errors and stalls that may be a node's loss seen early, a stuck rank, or a communication that failed by itself. Pure.

A broken connection is no verdict: the lease decides whether a node is gone, and only an error that no loss explains by
then is one of the communication. It costs an epoch (at the start: another start), and no node, a few times.
"""

from __future__ import annotations

import math

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Declare, Effects, Lose, Send, Stop, emit
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.records.exits import Exit

SETTLE_S = 3.0
FRESH_S = 15.0
_HEEDED_S = 30.0  # who has been named is ended by then, or its node has left: else its agent has not heard of it
_BEYOND_LEASE_S = 1.0
_STATES = {"silent": "and it does not answer: stopped, or held by the kernel", "busy": "and it waits for nobody"}


class Suspicions:
    """What the ranks of the current epoch say of each other."""

    def __init__(self, state: JobState) -> None:
        self._state = state
        self._failures = 0
        self._error: tuple[float, str, Lose | Stop | None] | None = None
        """When it counts, its text, and what follows if it is one too many."""
        self._stalls = StallJudge(state.members.world_size)
        self._told: dict[int, r.Stalled] = {}
        self._ended: dict[tuple[int, int], str] = {}  # by node and local index, the worker's end that was asked for

    @property
    def due(self) -> float | None:
        """When `tick` has something to judge; None when there is nothing."""
        times = [t for t in (self._error[0] if self._error else None, self._stalls.due) if t is not None]
        return min(times, default=None)

    def peer_error(self, record: r.PeerError, now: float) -> Effects:
        """A rank of this epoch has lost a peer."""
        if self._error is None:
            yield emit("peer_error", node=record.node, rank=record.rank, cause=record.text)
            if self._state.phase is Phase.RUNNING:  # else the worker ends with its error: `unless_explained`
                self.unless_explained(record.text, None, now)

    def unless_explained(self, text: str, end: Lose | Stop | None, now: float) -> None:
        """An error of communication counts, unless a loss explains it; ``end``: what follows if it is one too many."""
        if self._error is None:
            self._error = now + self._state.job.deadlines.lease + _BEYOND_LEASE_S, text, end

    def stalled(self, record: r.Stalled, now: float) -> Effects:
        """A rank of this epoch makes no progress."""
        self._told[record.rank] = record
        self._stalls.report(record, now)
        yield from self.judge_stalls(now)

    def why_ended(self, node: int, local: int) -> str:
        """Of a worker that has ended: in words, if that was because it was stuck; else empty."""
        return self._ended.pop((node, local), "")

    def judge_errors(self, now: float) -> Effects:
        """Whether an error has been left unexplained for too long."""
        if self._error is not None and now >= self._error[0]:
            _, text, end = self._error
            self._error = None
            yield from self._failed(text, end)

    def judge_stalls(self, now: float) -> Effects:
        """Name the ranks that are stuck, if it is time to."""
        if self._stalls.due is None or now < self._stalls.due:
            return
        stuck, all_of_them = self._stalls.verdict(now)
        for rank in stuck:
            slot, told = self._state.members.assignment[rank], self._told[rank]
            cause = f"rank {rank} is stuck: no progress for {told.seconds:.1f} s, {_STATES[told.state]}"
            self._ended[slot.node, slot.local] = (
                f"{cause}; DeadPool has ended it, and what it did is in stacks-node{slot.node}-{slot.local}.txt "
                "beside its log"
            )
            yield emit("stuck", node=slot.node, rank=rank, seconds=told.seconds, cause=cause)
            yield Send(slot.node, r.EndStuck(self._state.members.epoch, rank))
        if all_of_them:
            yield from self._failed("every rank waits in a communication and none gets on", None)

    def _failed(self, text: str, end: Lose | Stop | None) -> Effects:
        self._failures += 1
        if self._failures > self._state.job.transient_retries:
            yield end or Stop(
                Exit.RECOVERY_FAILED,
                f"communication failed {self._failures} times with every node alive, the last time with: {text}",
            )
            return
        yield Declare(f"communication error with every node alive: {text}")

    def got_on(self) -> None:
        """An iteration has ended: errors far apart do not add up over the life of a job."""
        self._failures = 0

    def ended(self) -> None:
        """An epoch is over, whose ranks are judged by what they say in it; or training is, and who still waits for a
        peer waits for one that has left."""
        self._error = None
        self._stalls = StallJudge(self._state.members.world_size)


class StallJudge:
    """One epoch's account of ranks without progress.

    Who waits inside a communication waits for somebody else; the one that does not is stuck. What looks "busy" may wait
    on a device, so it is judged only when others had time to report: when more than half of all ranks are busy, it is
    the communication that is stuck. The same holds when every rank waits. Who is "silent" needs no such comparison, and
    is what the busy ones wait for, be it one rank or all of a node.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._reports: dict[int, tuple[r.Stall, float]] = {}
        self._judged: dict[int, float] = {}  # by rank that was named, when
        self.due: float | None = None

    def report(self, record: r.Stalled, now: float) -> None:
        """A rank makes no progress; repeated every few seconds while that is so."""
        self._reports[record.rank] = (record.state, now)
        if self._to_judge(record.rank, now) and record.state == "silent":
            self.due = now
        elif self._to_judge(record.rank, now) and self.due is None and record.state != "waiting":
            self.due = now + SETTLE_S
        elif len(self._fresh(now)) == self._world_size:
            self.due = now

    def verdict(self, now: float) -> tuple[list[int], bool]:
        """(ranks that are stuck and not yet named, whether the communication itself is stuck)."""
        self.due = None
        fresh = self._fresh(now)
        silent, busy = (sorted(n for n, state in fresh.items() if state == kind) for kind in ("silent", "busy"))
        guilty = silent or busy
        if len(guilty) > self._world_size // 2 or (not guilty and len(fresh) == self._world_size):
            return [], True
        named = [rank for rank in guilty if self._to_judge(rank, now)]
        self._judged |= dict.fromkeys(named, now)
        return named, False

    def _to_judge(self, rank: int, now: float) -> bool:
        return now >= self._judged.get(rank, -math.inf) + _HEEDED_S

    def _fresh(self, now: float) -> dict[int, r.Stall]:
        return {rank: state for rank, (state, at) in self._reports.items() if now - at < FRESH_S}
