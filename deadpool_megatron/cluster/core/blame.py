"""Whose fault the end of a worker is: its node's, its own code's, or nobody's that another process could not make good.

An error that comes back at the same iteration after a recovery is a bug or bad data: no spare is spent on it. Pure.
"""

from __future__ import annotations

from typing import Any

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.members import NodeState
from deadpool_megatron.cluster.records.exits import Exit

# A worker that dies of these does so by its own doing; SIGKILL (out of memory, an operator) and SIGTERM are not.
_CRASHES = frozenset({4, 6, 7, 8, 11})
_MEANINGS = {  # upstream's rerun state machine: every rank leaves with one of these on purpose
    16: "Megatron's rerun state machine ends the job: resume from its checkpoint to tell what was wrong with a result",
    17: "Megatron's rerun state machine ends the job: a result was wrong (NaN, Inf or a spike), and not by chance",
}
_LEAVES = "builtins.SystemExit"
_LINES = 8  # of a traceback
_WHEN = {Phase.STARTING: "before training began", Phase.FINISHING: "after training had finished"}


def how_it_ended(record: r.WorkerExited) -> tuple[str, str]:
    """Who has ended, and how, in words."""
    how = f"signal {-record.code}" if record.code < 0 else f"exit code {record.code}"
    return _who(record.rank, record.local), how


def _who(rank: int | None, local: int) -> str:
    return f"rank {rank}" if rank is not None else f"spare worker {local}"


class Blame:
    """Remembers errors, and knows how often the workers of a healthy node may die.

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
