"""A worker has ended and its node lives: who takes its place, or why the job ends with it. Pure."""

from __future__ import annotations

from typing import Any

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.blame import Blame, how_it_ended
from deadpool_megatron.cluster.core.effects import Answer, Declare, Effects, Lose, Send, Stop, emit
from deadpool_megatron.cluster.core.facts import Facts
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.members import NodeState
from deadpool_megatron.cluster.core.recoveries import Recoveries
from deadpool_megatron.cluster.core.suspicions import BEYOND_LEASE_S
from deadpool_megatron.cluster.records.exits import Exit

_BESIDE_TRAINING = (Phase.STARTING, Phase.FINISHING)


class WorkerEnds:
    """Of one job, through all its epochs."""

    def __init__(self, facts: Facts, recoveries: Recoveries) -> None:
        self._facts = facts
        self._recoveries = recoveries
        self._blame = Blame(facts.job.worker_deaths)
        self._left: set[tuple[int, int]] = set()
        self._tries = 0
        self._known: set[tuple[int, int, int]] = set()  # an agent that was away tells of the same process again
        self._unexplained: tuple[float, int, str] | None = None  # when it ends the job, with which code, and text

    @property
    def due(self) -> float | None:
        """When an error at the start ends the job; None when there is none."""
        return self._unexplained[0] if self._unexplained is not None else None

    def judge(self, now: float) -> Effects:
        """Whether an error at the start is left that no loss has explained: the start is tried again, a few times."""
        if self._unexplained is None or now < self._unexplained[0]:
            return
        _, code, message = self._unexplained
        self._unexplained = None
        self._tries += 1
        if self._tries > self._facts.job.transient_retries:
            yield Stop(code, message)
        else:
            yield Declare(f"communication error with every node alive: {message}")

    def new_epoch(self) -> None:
        """A loss has explained the errors there were; whoever had left is in the job again."""
        self._left.clear()
        self._unexplained = None

    def all_left(self) -> bool:
        """Every worker of a node that is in the job has left in order."""
        members = self._facts.members
        return {(s.node, s.local) for s in members.assignment if not members.gone(s.node)} <= self._left

    def exited(self, record: r.WorkerExited, phase: Phase, now: float) -> Answer[bool]:
        """A worker process has ended; True when it was the last one, and all have left in order.

        Args:
            phase: of the job, that it trains while it recovers.
        """
        state = self._facts.members.nodes[record.node]
        who, how = how_it_ended(record)
        process = record.node, record.local, record.pid
        if process in self._known:
            return False
        self._known.add(process)
        over = phase is Phase.FINISHING and self._facts.job.deadpool
        if (record.code == 0 and phase in _BESIDE_TRAINING) or (record.code < 0 and over):
            if record.code:  # everything is saved, and nobody waits for it
                yield emit("detected", node=record.node, cause=f"{who} ended ({how}) at its end", ranks=[])
            self._left.add((record.node, record.local))
            return self.all_left()
        if state.role == "spare" and self._facts.job.deadpool:
            if record.rank is not None:
                return False  # its agent has yet to hear that the coordinate is another's, and then renews the process
            yield from self._spare_exited(state, record.local, how)
        elif not self._facts.job.deadpool or (phase in _BESIDE_TRAINING and record.code > 0):
            code = record.code if 0 < record.code < 126 else Exit.FAILED
            message = self._blame.fatal(record, phase, self._facts.job.deadpool)
            if phase is not Phase.STARTING or not self._blame.by_a_peer(record):
                yield Stop(code, message)
            elif self._unexplained is None:
                self._unexplained = now + self._facts.job.deadlines.lease + BEYOND_LEASE_S, code, message
        elif state.role == "active":
            yield from self._refill(state, record, f"{who} ended ({how})")
        return False

    def _spare_exited(self, state: NodeState, local: int, how: str) -> Effects:
        state.parked.discard(local)
        if self._blame.died(state):
            yield Lose({state.node}, f"{state.deaths} of its workers ended, the last with {how}")
            return
        yield emit("detected", node=state.node, cause=f"spare worker {local} ended ({how})", ranks=[])
        yield Send(state.node, r.Respawn(local))

    def _refill(self, state: NodeState, record: r.WorkerExited, cause: str) -> Effects:
        """A worker died, its node is healthy: a spare takes over, or a new process in the same slot."""
        here = r.SlotAddress(record.node, record.local)
        assignment = self._facts.members.assignment
        # (a fresh process may end before it has taken over the coordinate of its slot)
        rank = assignment.index(here) if record.rank is None and here in assignment else record.rank
        if rank is None or assignment[rank] != here:
            return  # it has been replaced already
        to_blame = self._blame.died(state)
        iteration = self._facts.headway.iteration
        if self._blame.crashed_again(record, self._facts.members.epoch, iteration):
            again = f"after iteration {iteration} again, so no spare is spent on it; see its log"
            yield Stop(Exit.REPEATED_ERROR, f"{cause} {again}")
            return
        if to_blame:
            again = f"{state.deaths} of its workers ended, the last one: " if state.deaths > 1 else ""
            yield Lose({state.node}, again + cause)
            return
        yield emit("detected", node=record.node, rank=rank, cause=cause, ranks=[rank])
        self._recoveries.vacant.add((record.node, record.local))
        yield Declare(cause)

    def failed(self, record: r.WorkerFailed, phase: Phase) -> Effects:
        """A worker tells the error that it will end with."""
        who = self._blame.failed(record)
        yield emit(
            "worker_error", node=record.node, rank=record.rank, iteration=record.iteration, message=record.message
        )
        if record.code:
            yield Stop(record.code, record.message)
        elif self._facts.job.deadpool and phase is Phase.RUNNING and self._blame.failed_again(record):
            yield Stop(
                Exit.REPEATED_ERROR,
                f"{who} raised the same error at iteration {record.iteration} again, so no spare is spent on it: "
                f"{record.message}\n{record.traceback}",
            )

    def dump(self) -> dict[str, Any]:
        """The errors, and the processes whose end has been counted, for a coordinator that starts again."""
        return {"errors": self._blame.dump(), "ended": sorted(self._known)}

    def load(self, kept: dict[str, Any]) -> None:
        """The opposite."""
        self._blame.load(kept["errors"])
        self._known = {(node, local, pid) for node, local, pid in kept["ended"]}
