"""What nodes report of a job that trains: for the event log, the status, and whatever is decided next. Pure."""

from __future__ import annotations

import statistics
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Answer, Effect, Effects, Send, Stop, emit
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.vault import Told

_COMMITS: Final = 3  # that may be missing: a generation is copied, sent and told of while the next ones are trained
_SECONDS: Final = 10.0  # of training that a loss would cost, below which it is nobody's concern
_RECENT: Final = 64


class Observations:
    """Of one job, through all its epochs.

    Attributes:
        snapshots: what they cost and are worth.
        refusals: by node, how much its vault has refused, by kind.
        state_hashes: at the end of the job, by rank and part.
    """

    def __init__(self, state: JobState) -> None:
        self._state = state
        self._stragglers = StragglerJudge()
        self._lag = LagJudge(state.job.snapshot_interval)
        self.snapshots = SnapshotAccount()
        self.refusals: dict[int, dict[str, int]] = {}
        self.state_hashes: dict[int, dict[str, str]] = {}

    def moved(self, ranks: list[int]) -> None:
        """A new epoch, in which these coordinates have new workers."""
        self.snapshots.forget()
        self._stragglers.forget(ranks)

    @property
    def lag(self) -> Lag | None:
        """How far protection is behind training; None while it keeps up."""
        return self._lag.lag

    # ---- training

    def iterated(self, record: r.Iteration, now: float) -> Answer[bool]:
        """An iteration of this epoch has ended; True when it is the first time that this one has."""
        head = self._state.progress
        first = head.iterated(record)
        yield emit(
            "iteration",
            **msgspec.structs.asdict(record)
            | {
                "losses": {k: float.fromhex(v) for k, v in record.losses.items()},
                "losses_hex": record.losses,
                "grad_norm": float.fromhex(record.grad_norm) if record.grad_norm is not None else None,
                "grad_norm_hex": record.grad_norm,
            },
            commit_s=self.snapshots.iterated(record, now),
            replicas=self._state.layout.width,
        )
        if first and self._lag.iterated(head.iteration - head.committed, head.held_back_by, now) and self.lag:
            yield emit(
                "behind",
                iteration=record.iteration,
                committed=head.committed,
                seconds=round(self.lag.seconds, 3),
                cause=self.lag.cause,
            )
        return first

    def committed(self, record: r.Committed, now: float, training: bool) -> Iterable[Effect]:
        """A node has committed a generation in this epoch. (Of a thousand nodes one changes what is to be told.)"""
        told, by_all = self._state.progress.node_committed(record)
        return self._all_are_told(told, by_all, now, training) if told is not None else ()

    def _all_are_told(self, told: Told, by_all: bool, now: float, training: bool) -> Effects:
        yield self._told(None, told)
        if by_all and told.kept is not None:
            seconds = self.snapshots.committed(told.kept.generation, now)
            if self._lag.committed(now):
                yield emit("caught_up", iteration=told.kept.generation)
            yield emit("committed", iteration=told.kept.generation, seconds=seconds)
            if self._state.protection.committed():
                yield emit("protected", survives=self._state.protection.degree, iteration=told.kept.generation)
            state = self._state
            yield from state.durability.committed(told.kept, state.members.active(), now, training)

    def catch_up(self, node: int | None) -> Effects:
        """A node (None: all) was away: what was told meanwhile it has not heard, and without it could skip for ever."""
        told = self._state.progress.told
        if told is not None:
            yield self._told(node, told)

    def _told(self, node: int | None, told: Told) -> Send:
        return Send(node, r.CommittedTo(self._state.members.epoch, told.kept, told.floor.generation))

    def did(self, record: r.SideEffect) -> Effects:
        """Something was done that must not be done again."""
        if self._state.progress.did(record) and record.act != "log":
            yield emit(record.act, iteration=record.iteration, rank=record.rank, node=record.node)

    def paced(self, record: r.Pace, now: float) -> Effects:
        """A node tells how fast its ranks are."""
        ratio = self._stragglers.report(record.node, record.forward_s, self._state.layout.stages, now)
        if ratio is not None:
            yield emit(
                "straggler",
                node=record.node,
                iteration=record.iteration,
                ratio=round(ratio, 2),
                advice=f"deadpool drain --node {record.node}",
            )

    def state_hash(self, record: r.StateHash) -> Effects:
        """What a rank ends with."""
        self.state_hashes[record.rank] = record.digests
        yield from ()

    # ---- vaults

    def no_room(self, record: r.NoRoom) -> Effects:
        """A node has no memory for what it is to keep."""
        if self._state.progress.committed < 0:  # nothing would ever be protected
            yield Stop(Exit.USAGE, f"node {record.node}: {record.message}")
        else:  # a spare that has come since, as a rule: the job trains, and falls back further when it loses a node
            yield emit("no_room", node=record.node, cause=record.message)

    def refused(self, record: r.Refusals) -> Effects:
        """A vault has turned away what nobody of this job, or of this epoch, may send."""
        self.refusals[record.node] = record.counts
        yield from ()

    def memory(self, record: r.VaultMemory) -> Effects:
        """What a vault has taken of its node's memory."""
        told = {"numa_nodes": record.numa_nodes, "transport": record.transport, "why": record.why}
        yield emit("memory", node=record.node, bytes=record.nbytes, huge_bytes=record.huge_bytes, **told)

    def damaged(self, record: r.DamagedCopy) -> Effects:
        """A copy does not have the checksums it had."""
        if record.epoch == self._state.members.epoch:
            self._state.protection.damaged(record.node)
        yield emit("damaged", node=record.node, kind=record.kind, holder=record.holder, iteration=record.generation)


@dataclass(frozen=True, slots=True)
class Lag:
    """What a loss would cost now beside what it always costs.

    Args:
        iterations: ended since the committed generation began.
        seconds: since a generation was committed last.
        cause: what holds commits back, in words.
    """

    iterations: int
    seconds: float
    cause: str


class LagJudge:
    """Tells when commits fall behind, each time it is twice as much as before, and when they have caught up.

    Args:
        interval: iterations from one generation to the next.
    """

    def __init__(self, interval: int) -> None:
        self._limit = _COMMITS * interval + 2
        self._told = 0  # iterations behind when that was told last; 0: they are not
        self._committed: float | None = None
        self.lag: Lag | None = None

    def committed(self, now: float) -> bool:
        """A generation is committed; True when that ends a time of being behind."""
        behind, self.lag = self.lag is not None, None
        self._committed, self._told = now, 0
        return behind

    def iterated(self, iterations: int, cause: Callable[[], str], now: float) -> bool:
        """An iteration has ended, so many after the committed generation; True when a person should know of it."""
        if self._committed is None:
            self._committed = now
        seconds = now - self._committed
        if iterations <= self._limit or seconds < _SECONDS:
            return False
        self.lag = Lag(iterations, seconds, cause())
        if iterations < 2 * self._told:
            return False
        self._told = iterations
        return True


class StragglerJudge:
    """Finds nodes that are slower than those that do the same work: their peers of the same pipeline stage.

    A node is a straggler when the forward pass of one of its ranks takes ``factor`` times the lower median of the
    others of its stage in every report of ``lasting_s`` seconds: an alarm about a moment's load is false.
    """

    def __init__(self, factor: float = 1.5, lasting_s: float = 28.0) -> None:
        self._factor = factor
        self._lasting_s = lasting_s
        self._latest: dict[int, tuple[int, float]] = {}  # by rank, its stage and seconds
        self._sorted: dict[int, list[float]] = {}  # by stage
        self._slow_since: dict[int, float] = {}
        self.named: dict[int, float] = {}

    def report(
        self, node: int, forward_s: Mapping[int, float], stage_of: Mapping[int, int], now: float
    ) -> float | None:
        """A node's seconds a microbatch, by rank. Returns how many times slower it is when it becomes a straggler."""
        for rank, seconds in forward_s.items():
            self._take_out(rank)
            if (stage := stage_of.get(rank)) is not None and seconds > 0:
                self._latest[rank] = stage, seconds
                insort(self._sorted.setdefault(stage, []), seconds)
        ratio = max((self._ratio(rank) for rank in forward_s), default=1.0)
        if ratio < self._factor:
            self._slow_since.pop(node, None)
            self.named.pop(node, None)
            return None
        if now - self._slow_since.setdefault(node, now) < self._lasting_s or node in self.named:
            return None
        self.named[node] = ratio
        return ratio

    def forget(self, ranks: Iterable[int]) -> None:
        """These coordinates have moved."""
        for rank in ranks:
            self._take_out(rank)
        self._slow_since.clear()
        self.named.clear()

    def _take_out(self, rank: int) -> None:
        known = self._latest.pop(rank, None)
        if known is not None:
            of_stage = self._sorted[known[0]]
            del of_stage[bisect_left(of_stage, known[1])]

    def _ratio(self, rank: int) -> float:
        """How many times slower than the lower median of the others of its stage."""
        known = self._latest.get(rank)
        if known is None:
            return 1.0
        stage, seconds = known
        of_stage = self._sorted[stage]
        if len(of_stage) < 2:
            return 1.0
        middle = (len(of_stage) - 2) // 2
        return seconds / of_stage[middle if middle < bisect_left(of_stage, seconds) else middle + 1]


@dataclass(slots=True)
class SnapshotAccount:
    """What the snapshots of a running job cost and are worth, from the coordinator's point of view.

    A failure at a moment x of an iteration (0 to 1) costs x iterations if the generation opened with it is committed by
    then, else one interval more. With c for the time to commit in iterations and a generation every K iterations, the
    expected loss is K / 2 + c iterations.

    Feed it with what happens, in any order; times are seconds of one monotonic clock.
    """

    planned_bytes: int = 0
    expected_bytes: int = 0
    _began: dict[int, float] = field(default_factory=dict)
    _committed: dict[int, float] = field(default_factory=dict)
    _commit_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _iteration_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _interval: int = 1
    _last_generation: int | None = None
    _last: r.Iteration | None = None

    def registered(self, record: r.Registered) -> None:
        """A coordinate has planned its shard; once each."""
        self.planned_bytes += record.unique_bytes
        self.expected_bytes += record.expected_bytes

    def iterated(self, record: r.Iteration, now: float) -> float | None:
        """An iteration has ended; returns the seconds its generation took to be committed, None if it is not yet."""
        self._last = record
        self._iteration_s.append(record.seconds)
        self._began[record.iteration] = now - record.seconds
        return self._settle(record.iteration)

    def committed(self, generation: int, now: float) -> float | None:
        """A generation is committed; returns the seconds since it opened, None while that is not known."""
        if self._last_generation is not None and generation > self._last_generation:
            self._interval = generation - self._last_generation
        self._last_generation = generation
        self._committed[generation] = now
        return self._settle(generation)

    def forget(self) -> None:
        """A new epoch: what was under way is void."""
        self._began.clear()
        self._committed.clear()
        self._last_generation = None

    def _settle(self, generation: int) -> float | None:
        began, done = self._began.get(generation), self._committed.get(generation)
        for known in (self._began, self._committed):
            for old in [g for g in known if g < generation - _RECENT]:
                del known[old]
        if began is None or done is None:
            return None
        seconds = max(0.0, done - began)
        self._commit_s.append(seconds)
        return seconds

    def summary(self) -> dict[str, Any]:
        """For ``status.json``. Medians over the last iterations; None for what is not known yet."""
        last = self._last
        iteration_s = statistics.median(self._iteration_s) if self._iteration_s else None
        commit_s = statistics.median(self._commit_s) if self._commit_s else None
        share = commit_s / iteration_s if commit_s is not None and iteration_s else None
        lost = self._interval / 2 + share if share is not None else None
        return {
            "planned_bytes": self.planned_bytes,
            "expected_bytes": self.expected_bytes,
            "iteration_s": iteration_s,
            "commit_s": commit_s,
            "commit_share": share,
            "expected_lost_iterations": lost,
            "expected_lost_s": lost * iteration_s if lost is not None and iteration_s else None,
            "copied_bytes": last.copied_bytes if last else None,
            "sent_bytes": last.sent_bytes if last else None,
            "copy_bandwidth": last.copy_bandwidth if last else None,
            "send_bandwidth": last.send_bandwidth if last else None,
            "blocked_s": last.blocked_s if last else None,
            "stall_s": last.stall_s if last else None,
            "device_stall_s": last.device_stall_s if last else None,
            "skipped_generations": last.skipped_generations if last else None,
        }
