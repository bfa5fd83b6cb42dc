"""A worker has ended and its node lives: whose fault it is, who takes its place, or why the job ends with it. Pure."""

from __future__ import annotations

from typing import Any

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import (
    Answer,
    Declare,
    DeclareSoon,
    Effects,
    Lose,
    Persist,
    Send,
    StartOver,
    Stop,
    emit,
)
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.members import NodeState
from deadpool_megatron.cluster.core.recoveries import Recoveries
from deadpool_megatron.cluster.core.signs import Blamed, Role, Signs, role_of
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.core.suspicions import Suspicions
from deadpool_megatron.cluster.records.exits import Exit, of_script

_LINES = 8  # of a traceback; its log has all
_BESIDE_TRAINING = (Phase.STARTING, Phase.FINISHING)
# A worker that dies of these does so by its own doing; SIGKILL (out of memory, an operator) and SIGTERM are not.
_CRASHES = frozenset({4, 6, 7, 8, 11})
_MEANINGS = {  # upstream's rerun state machine: every rank leaves with one of these on purpose
    16: "Megatron's rerun state machine ends the job: resume from its checkpoint to tell what was wrong with a result",
    17: "Megatron's rerun state machine ends the job: a result was wrong (NaN, Inf or a spike), and not by chance",
}
_LEAVES = "builtins.SystemExit"
_WHEN = {Phase.STARTING: "before training began", Phase.FINISHING: "after training had finished"}


class WorkerEnds:
    """Of one job, through all its epochs."""

    def __init__(self, state: JobState, recoveries: Recoveries, suspicions: Suspicions) -> None:
        self._signs = Signs(state.members, state.protection)
        self._state = state
        self._recoveries = recoveries
        self._suspicions = suspicions
        self._blame = Blame(state.job.worker_deaths, state.job.transient_retries)
        self._left: set[tuple[int, int]] = set()
        # Nodes that were told to end workers which hung in a recovery, since the last iteration: in which epoch last,
        # with the slots renewed since; and in which one first.
        self._ending: dict[int, tuple[int, set[int]]] = {}
        self._late: dict[int, int] = {}
        # by node and local index, of the last process that has ended: an agent that was away tells of it again
        self._known: dict[tuple[int, int], int] = {}

    def new_epoch(self) -> None:
        """Whoever had left is in the job again."""
        self._left.clear()

    def all_left(self) -> bool:
        """Every worker of a node that is in the job has left in order."""
        members = self._state.members
        return {(s.node, s.local) for s in members.assignment if not members.gone(s.node)} <= self._left

    def exited(self, record: r.WorkerExited, now: float) -> Answer[list[int]]:
        """A worker process has ended. The job ends well with the last one, when all have left in order.

        The ranks that get new workers in the epoch that is under way.
        """
        deadpool, phase = self._state.job.deadpool, self._state.phase
        node = self._state.members.nodes[record.node]
        who, how = how_it_ended(record)
        if self._known.get((record.node, record.local)) == record.pid:
            if node.role == "spare" and record.rank is None and record.local not in node.parked:
                yield Send(node.node, r.Respawn(record.local))  # which may have been lost with a connection
            return []
        self._known[record.node, record.local] = record.pid
        over = phase is Phase.FINISHING and deadpool
        if (record.code == 0 and phase in _BESIDE_TRAINING) or (record.code < 0 and over):
            if record.code:  # everything is saved, and nobody waits for it
                yield emit(
                    "detected", node=record.node, cause=f"{who} ended ({how}) at its end", ranks=[], local=record.local
                )
            self._left.add((record.node, record.local))
            if self.all_left():
                yield Stop(Exit.OK, "")
        elif node.role == "spare" and deadpool:
            if record.rank is None:  # else its agent renews it as soon as it hears that the coordinate is another's
                yield from self._spare_exited(node, record.local, how)
        elif not deadpool or (phase in _BESIDE_TRAINING and record.code > 0):
            where = self._state.members.called(record.node)
            why = self._blame.fatal(record, phase, deadpool, where)
            theirs = deadpool and self._is_newcomers(record.node)
            end = Lose({record.node}, why) if theirs else Stop(of_script(record.code), why)
            if phase is Phase.STARTING and self._blame.by_a_peer(record):
                self._suspicions.unless_explained(why, end, now)
            elif phase is Phase.STARTING and not theirs and self._state.durability.try_again():
                yield StartOver(why.split("\n")[0])
            else:
                yield end
        elif self._recoveries.drains:
            yield emit("detected", node=record.node, cause=f"{who} ended ({how})", ranks=[], local=record.local)
        elif node.role == "active":
            stuck = self._suspicions.why_ended(record.node, record.local)
            if self._was_late(record):
                stuck = f"{who} hung in a recovery; DeadPool has ended it, and what it did is in "
                stuck += f"stacks-node{record.node}-{record.local}.txt beside its log"
            error = self._blame.why(record)
            ended = f"{who} ended ({how}){': ' * bool(error)}{error}"
            return (yield from self._refill(node, record, stuck or ended))
        return []

    def _is_newcomers(self, node: int) -> bool:
        """Only this node has not done before what the job begins with now: the fault may be its own, and without it the
        job begins as the one that it was."""
        state = self._state
        return state.phase is Phase.STARTING and state.members.newcomer(node)

    def _died(self, node: NodeState, kind: str, cause: str, epoch: int | None = None) -> bool:
        """True when that was once too often."""
        members = self._state.members
        members.failed(node.node, kind, cause, epoch)
        return self._blame.too_often(node, members.unix_s)

    def _spare_exited(self, node: NodeState, local: int, how: str) -> Effects:
        node.parked.discard(local)
        cause = f"spare worker {local} ended ({how})"
        if self._died(node, "worker", cause):
            times = node.record.deaths(self._state.members.unix_s)
            yield Lose({node.node}, f"its workers ended {times} times, the last with {how}")
            return
        yield emit("detected", node=node.node, cause=cause, ranks=[], local=local)
        yield Persist()
        yield Send(node.node, r.Respawn(local))

    def _refill(self, node: NodeState, record: r.WorkerExited, cause: str) -> Answer[list[int]]:
        """A worker died, its node is healthy: another process of the node, which stands by, or a spare takes over, or a
        new process in the same slot."""
        here = r.SlotAddress(record.node, record.local)
        assignment = self._state.members.assignment
        # (a fresh process may end before it has taken over the coordinate of its slot)
        rank = assignment.index(here) if record.rank is None and here in assignment else record.rank
        if rank is None or assignment[rank] != here:
            return []  # it has been replaced already
        joins = record.stands_by and self._recoveries.takes_in(node.node)
        verdict = self._signs.judge(record, self._blame.by_a_peer(record))
        follows = verdict.blamed is Blamed.FOLLOWS
        nobodys = self._blame.anothers(record) or follows
        if self._was_late(record):  # a communication that nothing ends, perhaps: the first time that is no node's fault
            epoch, _ = self._ending[node.node]
            nobodys = self._late.setdefault(node.node, epoch) == epoch or nobodys
        # (those of one node that end at once count once, whoever hears of the next epoch first)
        epoch = min(record.epoch, self._state.members.epoch - 1) if joins else record.epoch
        to_blame = not node.respawns if nobodys else self._died(node, "worker", cause, epoch)
        iteration = self._state.progress.iteration
        again = self._blame.crashed_again(record, self._state.members.epoch, iteration)
        if again and not follows and not self._signs.tells(node.node):
            where = f"after iteration {iteration} again, so no spare is spent on it; see its log"
            yield Stop(Exit.REPEATED_ERROR, f"{cause} {where}")
            return []
        leaves = verdict.blamed is Blamed.CAUSE and self._leaves(node)
        if to_blame and not leaves:
            deaths = node.record.deaths(self._state.members.unix_s)
            often = f"its workers ended {deaths} times, the last time: " if deaths > 1 else ""
            yield Lose({node.node}, often + cause)
            return []
        if verdict.why:
            cause += f", after {verdict.why}"
        stood_by = record.stands_by and not leaves
        more = {"stood_by": True} if stood_by else {}
        yield emit("detected", node=record.node, rank=rank, local=record.local, cause=cause, ranks=[rank], **more)
        slot = (record.node, record.local)
        self._recoveries.vacant.add(slot)
        if follows or verdict.blamed is Blamed.LINK or stood_by:
            self._recoveries.in_place.add(slot)
        else:
            self._recoveries.in_place.discard(slot)
        if record.code > 0:
            self._recoveries.not_saved(cause)
        if joins and not leaves:
            yield Persist()
            return [rank]
        yield DeclareSoon(f"node {node.node} is at fault: {cause}" if leaves else cause)
        return []

    def sign(self, record: r.MachineSign) -> Effects:
        """A machine tells of a fault. Of a node that has lost a worker already it is the cause, and replaced."""
        yield from self._signs.took(record)
        node, vacant = self._state.members.nodes[record.node], {n for n, _ in self._recoveries.vacant}
        if role_of(record) is Role.CAUSE and node.node in vacant and self._leaves(node):
            yield DeclareSoon(f"node {node.node} is at fault: Xid {record.xid}")

    def _leaves(self, node: NodeState) -> bool:
        """A node at fault gives its shards, then leaves the job, if a spare is there for it."""
        members = self._state.members
        spares = [*members.ready_spares(), *members.cold_spares()]
        if self._state.phase is not Phase.RUNNING or self._state.progress.fresh:
            return False  # nobody has shards of its yet
        if not spares or node.role != "active" or self._recoveries.ends or not node.respawns:
            return False
        node.role = "leaving"
        return True

    def ends_late(self, nodes: set[int]) -> None:
        """These nodes are told to end workers that the others wait for."""
        self._ending |= {node: (self._state.members.epoch, set()) for node in nodes}

    def _was_late(self, record: r.WorkerExited) -> bool:
        """It was ended because the others waited for it. (The first of them to end begins another epoch.)"""
        epoch, renewed = self._ending.get(record.node, (0, None))
        return record.code < 0 and renewed is not None and record.epoch >= epoch and record.local not in renewed

    def begun(self, record: r.WorkerReady) -> None:
        """A process has begun: the number of one that has ended may come again."""
        self._blame.begun(record)
        if record.node in self._ending:
            self._ending[record.node][1].add(record.local)
        if self._known.get((record.node, record.local)) == record.pid:
            del self._known[record.node, record.local]

    def failed(self, record: r.WorkerFailed) -> Effects:
        """A worker tells the error that it will end with."""
        who = self._blame.failed(record)
        yield emit(
            "worker_error", node=record.node, rank=record.rank, iteration=record.iteration, message=record.message
        )
        state = self._state
        if state.phase is Phase.STARTING and record.epoch != state.members.epoch and record.rank is not None:
            return  # of a start that is over
        if record.code and self._is_newcomers(record.node):
            yield Lose({record.node}, record.message)
        elif record.code:
            yield Stop(record.code, record.message)
        elif not self._state.job.deadpool or self._state.phase is not Phase.RUNNING or self._recoveries.drains:
            return
        elif self._blame.failed_again(record) and not self._signs.tells(record.node):
            if self._recoveries.ends and record.epoch < self._state.members.epoch:
                return  # of a try to save that is over, and another one has begun
            if self._recoveries.not_saved(f"{who} raised the same error again: {record.message}", by_all=True):
                yield Declare(f"{who} could not save its part of the checkpoint")
                return
            yield Stop(
                Exit.REPEATED_ERROR,
                f"{who} raised the same error at iteration {record.iteration} again, so no spare is spent on it: "
                f"{record.message}\n" + "\n".join(record.traceback.rstrip().splitlines()[-_LINES:]),
            )

    def got_on(self, iteration: int) -> None:
        """This iteration has ended for the first time."""
        self._blame.passed(iteration)
        self._late.clear()
        self._ending.clear()

    def changed(self, node: int, why: str) -> bool:
        """The memory of a node has changed what it held: as a worker's end. True when it is one too many."""
        return self._died(self._state.members.nodes[node], "memory", why)

    def dump(self) -> dict[str, Any]:
        """The errors, whose end has been counted, and who has left, for a coordinator that starts again."""
        ended = sorted((*slot, pid) for slot, pid in self._known.items())
        late = sorted(self._late.items()), [(n, e, sorted(slots)) for n, (e, slots) in sorted(self._ending.items())]
        return {"errors": self._blame.dump(), "ended": ended, "left": sorted(self._left), "late": late}

    def load(self, kept: dict[str, Any]) -> None:
        """The opposite."""
        self._blame.load(kept["errors"])
        self._known = {(node, local): pid for node, local, pid in kept["ended"]}
        self._left = {(node, local) for node, local in kept["left"]}
        late, ending = kept["late"]
        self._late = dict(late)
        self._ending = {node: (epoch, set(slots)) for node, epoch, slots in ending}


class Blame:
    """Whose fault the end of a worker is: its node's, its own code's, or nobody's, which another process makes good.

    Remembers errors, and knows how often the workers of a healthy node may die. An error that comes back at the same
    iteration after a recovery is a bug or bad data: no spare is spent on it.

    Args:
        worker_deaths: workers a node may lose in 24 hours before it counts as bad itself.
        retries: epochs in a row whose workers may end with errors of communication before that counts as their death.
    """

    def __init__(self, worker_deaths: int, retries: int) -> None:
        self._worker_deaths = worker_deaths
        self._retries = retries
        self._broken: set[int] = set()  # epochs, since an iteration ended last, whose workers ended so
        # by iteration, kind, and place or rank: the epoch it was first seen in
        self._errors: dict[tuple[int, str, str], int] = {}
        self._last: dict[tuple[int, int], r.WorkerFailed] = {}  # by node and local index

    def too_often(self, node: NodeState, unix_s: float) -> bool:
        """One more worker of a node has died: the node is to blame, or has nobody to make it good."""
        return node.record.deaths(unix_s) > self._worker_deaths or not node.respawns

    def crashed_again(self, record: r.WorkerExited, epoch: int, iteration: int) -> bool:
        """It died of its own doing, and did so after the same iteration before."""
        crash = f"signal {-record.code}"
        return -record.code in _CRASHES and self._repeats(epoch, iteration, crash, f"rank {record.rank}")

    def failed(self, record: r.WorkerFailed) -> str:
        """A worker tells its error; who that is."""
        self._last[record.node, record.local] = record
        return _who(record.rank, record.local)

    def failed_again(self, record: r.WorkerFailed) -> bool:
        """Before the last recovery such an error was raised at this iteration, here in the code or by this rank.

        Its text says nothing: it may have a process id or a host name in it. What several ranks raise at once is one
        error: the recovery that makes it good is still to come. All who lose a peer raise the same, whatever became of
        it, so such an error is nobody's own as long as it is forgiven (`anothers`).
        """
        if record.communication and len(self._broken | {record.epoch}) <= self._retries:
            return False
        places = (record.place, f"rank {record.rank}")
        return any([self._repeats(record.epoch, record.iteration, record.kind, place) for place in places])

    def passed(self, iteration: int) -> None:
        """The job has come through it: what was raised before it, at the start of a process perhaps, was no bug."""
        self._broken.clear()
        self._errors = {error: epoch for error, epoch in self._errors.items() if error[0] >= iteration}

    def begun(self, record: r.WorkerReady) -> None:
        """Another process is in the slot: what the one before told is not its error."""
        self._last.pop((record.node, record.local), None)

    def by_a_peer(self, record: r.WorkerExited) -> bool:
        """It ended with an error that the loss of a peer may have caused."""
        last = self._last.get((record.node, record.local))
        return record.code > 0 and last is not None and last.communication

    def anothers(self, record: r.WorkerExited) -> bool:
        """It ended for the loss of another, which counts there.

        Nobody has declared that loss in time, or a neighbour was lost. A communication that fails epoch after epoch
        with no iteration between them is its node's in the end: the job goes on without that node, or ends.
        """
        if self.by_a_peer(record):
            self._broken.add(record.epoch)
            return len(self._broken) <= self._retries
        return record.code == Exit.NEIGHBOUR_LOST

    def why(self, record: r.WorkerExited) -> str:
        """The error that it has ended with, in a line; empty where there is none on record."""
        last = self._last.get((record.node, record.local))
        if record.code > 0 and last is not None and last.kind != _LEAVES:
            return last.message
        return record.words[-1].strip() if record.code > 0 and record.words else ""

    def fatal(self, record: r.WorkerExited, phase: Phase, deadpool: bool, node: str) -> str:
        """Why the job ends with the end of this worker, which nothing makes good; ``node``: what its node is called.

        One line, and where they are known the last ones of its traceback, and where its log is.
        """
        who, how = how_it_ended(record)
        last = self._last.get((record.node, record.local))
        if last is not None and last.kind == _LEAVES:  # its words are those of who called sys.exit
            last = None
        words = list(record.words)
        if last is not None and not words:
            words = last.traceback.splitlines()[-_LINES:]
        more = "".join(f"\n    {line}" for line in words) if len(words) > 1 else ""
        more += f"\n    its log: {record.log}" if record.log else ""
        if last is not None:
            return f"{who} on {node}: {last.message}{more}"
        if record.code in _MEANINGS and deadpool and phase is Phase.FINISHING:
            return f"{_MEANINGS[record.code]} ({how} of {who} on {node}; see its log)"
        when = f" {_WHEN[phase]}" if deadpool and phase in _WHEN else ""
        text = f"{who} on {node} failed{when} ({how})"
        if not words:
            return f"{text}; see its log{more}"
        return f"{text}: {words[-1].strip()}{more}"

    def _repeats(self, epoch: int, iteration: int, kind: str, place: str) -> bool:
        return self._errors.setdefault((iteration, kind, place), epoch) < epoch

    def dump(self) -> list[Any]:
        """The errors, for a coordinator that starts again, as JSON types."""
        return sorted([*error, epoch] for error, epoch in self._errors.items())

    def load(self, errors: list[Any]) -> None:
        """The opposite."""
        self._errors = {(iteration, kind, place): epoch for iteration, kind, place, epoch in errors}


def how_it_ended(record: r.WorkerExited) -> tuple[str, str]:
    """Who has ended, and how, in words."""
    how = f"signal {-record.code}" if record.code < 0 else f"exit code {record.code}"
    return _who(record.rank, record.local), how


def _who(rank: int | None, local: int) -> str:
    return f"rank {rank}" if rank is not None else f"spare worker {local}"
