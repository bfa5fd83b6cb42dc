"""Errors and stalls that may be a node's loss seen early, a stuck rank, or a communication that failed by itself. Pure.

A broken connection is no verdict: the lease decides whether a node is gone, and only an error that no loss explains by
then is one of the communication. It costs an epoch, and no node.
"""

from __future__ import annotations

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Declare, Effects, Send, Stop, emit
from deadpool_megatron.cluster.core.facts import Facts
from deadpool_megatron.cluster.core.stalls import StallJudge
from deadpool_megatron.cluster.records.exits import Exit

BEYOND_LEASE_S = 1.0


class Suspicions:
    """What the ranks of the current epoch say of each other."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._failures = 0
        self._error: tuple[float, str] | None = None  # when it counts, and its text
        self._stalls = StallJudge(facts.job.world_size)
        self._texts: dict[int, str] = {}

    @property
    def due(self) -> float | None:
        """When `tick` has something to judge; None when there is nothing."""
        times = [t for t in (self._error[0] if self._error else None, self._stalls.due) if t is not None]
        return min(times, default=None)

    def peer_error(self, record: r.PeerError, now: float, training: bool) -> Effects:
        """A rank of this epoch has lost a peer; ``training``: there is a generation to go back to."""
        if self._error is not None:
            return
        yield emit("peer_error", node=record.node, rank=record.rank, cause=record.text)
        if training:  # else the worker ends with its error, and that ends the job
            self._error = (now + self._facts.job.deadlines.lease + BEYOND_LEASE_S, record.text)

    def stalled(self, record: r.Stalled, now: float) -> Effects:
        """A rank of this epoch makes no progress."""
        self._texts[record.rank] = f"no progress for {record.seconds:.1f} s ({record.state})"
        self._stalls.report(record, now)
        yield from self.judge_stalls(now)

    def judge_errors(self, now: float) -> Effects:
        """Whether an error has been left unexplained for too long."""
        if self._error is not None and now >= self._error[0]:
            text = self._error[1]
            self._error = None
            yield from self._failed(text)

    def judge_stalls(self, now: float) -> Effects:
        """Name the ranks that are stuck, if it is time to."""
        if self._stalls.due is None or now < self._stalls.due:
            return
        stuck, all_of_them = self._stalls.verdict(now)
        for rank in stuck:
            node = self._facts.members.assignment[rank].node
            yield emit("stuck", node=node, rank=rank, cause=f"rank {rank} is stuck: {self._texts[rank]}")
            yield Send(node, r.EndStuck(self._facts.members.epoch, rank))
        if all_of_them:
            yield from self._failed("every rank waits in a communication and none gets on")

    def _failed(self, text: str) -> Effects:
        self._failures += 1
        if self._failures > self._facts.job.transient_retries:
            yield Stop(
                Exit.RECOVERY_FAILED,
                f"communication failed {self._failures} times with every node alive, the last time with: {text}",
            )
            return
        yield Declare(f"communication error with every node alive: {text}")

    def got_on(self) -> None:
        """An iteration has ended: errors far apart do not add up over the life of a job."""
        self._failures = 0

    def explained(self) -> None:
        """A new epoch: its ranks are judged by what they say in it."""
        self.ended()
        self._stalls = StallJudge(self._facts.job.world_size)

    def ended(self) -> None:
        """Training is over: who still waits for a peer waits for one that has left."""
        self._error = None
