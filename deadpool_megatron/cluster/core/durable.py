"""Which generation is durable, which is being drained, which to fall back to: the coordinator's bookkeeping, pure.

::

    commit of g, g due      DrainShards -> every agent        copies its shards out, writes them
    all ShardsDrained       SealGeneration -> one agent       writes the manifest: g is durable now
    GenerationSealed        event `durable`

One attempt at a time, each under a name of its own. What fails costs that attempt and nothing else: training goes on,
the user is told, and the durable generations there are stay. Who was told to write the manifest, and does not answer,
may have written it, and have removed older generations: that attempt is not removed, and counts first where memory
cannot answer.

Where the number of replicas changes, the generation that the job begins anew with stays in the nodes' memory::

    Roster(base)            all agents set aside what they hold of it
    all SetAside            ResumeAt: where each shard of it is; ranks read what they need
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Answer, Effects, Emit, Lose, Persist, Send, StartOver, emit
from deadpool_megatron.durable import ShardFile, directory_name
from deadpool_megatron.vault import Version

# A drain is spread over this part of the time there is until the next one.
_SHARE = 0.5
_LOAD_S = 600.0  # beyond `DurableSpec.deadline`, for a node to read its shards before training
_SAY_S = 60.0  # that the start waits for a directory; again after twice as long, and so on
_RECUT = "recut"  # marks one of another number of replicas
_MOST_NAMED = 8  # ranks, where they may be thousands
_NOBODY = -1  # in the place of the node that removes an attempt


@dataclass(frozen=True, slots=True)
class DurableSpec:
    """What the job does about durable generations.

    Args:
        directory: where they lie; for messages. Empty: there is none, and only the number of replicas may change.
        job: letters and digits that no other job has; part of the names.
        interval: generations from one drain to the next; 0: only when preempted.
        keep: how many durable generations stay.
        deadline: seconds an attempt may take; so may a node to read its shards before training, and ten minutes more.
        preempt_deadline: seconds the last drain may take when the job is preempted.
        complete: (generation, name) of those that are there at the start, newest first.
        resume: training begins with the newest of them.
        others: generations that are there too, and were not asked for; for messages.
        recut: likewise, where the newest is of another number of replicas: training begins with one of these instead.
    """

    directory: str
    job: str
    interval: int = 0
    keep: int = 2
    deadline: float = 1800.0
    preempt_deadline: float = 60.0
    complete: Sequence[tuple[int, str]] = ()
    resume: bool = False
    others: Sequence[int] = ()
    recut: Sequence[tuple[int, str]] = ()


@dataclass(slots=True)
class _Attempt:
    name: str
    version: Version
    started: float
    deadline: float
    waiting: set[int]
    shards: dict[int, ShardFile] = field(default_factory=dict)
    sealing: int | None = None  # the node that writes the manifest
    last: bool = False  # the job ends when this is over


@dataclass(slots=True)
class _Loading:
    name: str
    waiting: set[int]
    since: float | None = None  # not before `Durability.judge_loading` has seen it
    told_s: float = 0.0  # how long it had taken when the user was told


@dataclass(slots=True)
class _Memory:
    base: r.Base
    coordinates: list[r.CoordinateInfo]
    waiting: set[int] | None = None  # nodes that have not said what they hold of it; None: nobody was asked
    held: dict[int, r.SetAside] = field(default_factory=dict)
    again: bool = False  # a start with it has failed once

    def ask(self, nodes: Iterable[int]) -> None:
        """These are told to set it aside, as a start begins."""
        self.waiting, self.held = set(nodes), {}


class Durability:
    """Not thread-safe: one caller. Times are seconds of a monotonic clock.

    Args:
        spec: None: nothing becomes durable, and a start says nothing of where training begins.
    """

    def __init__(self, spec: DurableSpec | None) -> None:
        self._spec = spec
        self._complete: list[tuple[int, str]] = list(spec.complete) if spec is not None else []
        # Those that there were when the number of replicas became another one: a start alone goes on from them.
        self._recut: list[tuple[int, str]] = list(spec.recut) if spec is not None else []
        self._unsure: list[tuple[int, str]] = []  # newer ones that may be complete, newest first
        self._was_durable = bool(self._complete)  # at some time something was
        self.memory: _Memory | None = None
        """What a start with another number of replicas begins with, until something of that number is committed."""
        self._attempt: _Attempt | None = None
        self._attempts = 0
        self._first: tuple[float, int] | None = None  # when the first generation was committed, and which
        self._last = 0  # the generation of the last drain, whatever became of it
        self._retry = False
        self._kept: Version | None = None
        self._loading: _Loading | None = None
        self._begun = False
        self._epoch = 0
        self._resumes_at: r.ResumeAt | None = None  # as told
        self._preempted: float | None = None  # until when the job may stay
        self._taken = ""  # why nothing is drained any more: the directory is another job's
        self.leave: str | None = None
        self.last_is_over = False
        """The generation that the job ends with is durable, or could not be made so."""

    # ---- what there is

    @property
    def newest(self) -> int | None:
        """The newest durable generation; None when there is none."""
        return self._complete[0][0] if self._complete else None

    @property
    def newest_at_any_width(self) -> int | None:
        """Likewise, where that may be of another number of replicas."""
        return next((generation for generation, _ in [*self._complete, *self._recut]), None)

    @property
    def hint(self) -> str:
        """What to do with the durable generation when the job ends, as the end of a sentence; may be empty."""
        known = self._complete or self._unsure or self._recut
        if self._spec is None or not (known or (self._was_durable and self._loading is None)):
            return ""
        if self._unsure or not (self._complete or self._recut):  # there may be others than what was known, and failed
            return f"; what is durable in {self._spec.directory} a new job finds with --deadpool-resume auto"
        return (
            f"; generation {self.newest_at_any_width} is durable in {self._spec.directory}: start the job again with "
            "--deadpool-resume auto"
        )

    def fallback(self) -> tuple[int, str] | None:
        """The durable generation to go on from when memory cannot answer; none while a start from memory is newer."""
        return None if self.memory is not None else next(iter([*self._unsure, *self._complete]), None)

    @property
    def leaves(self) -> bool:
        """The machines are wanted soon."""
        return self._preempted is not None

    @property
    def base(self) -> tuple[int, str] | None:
        """What another number of replicas can begin with: the generation, and its name in the durable directory.

        What is in memory has no name, and comes first; then what may be durable, of which who reads it finds out. None
        where there is none, and where the job is to leave.
        """
        if self._preempted is not None:
            return None
        if self.memory is not None:
            return self.memory.base.generation, ""
        return next(iter([*self._unsure, *self._complete, *self._recut]), None)

    @property
    def only_recut(self) -> bool:
        """All there is to go back to is of another number of replicas: a new start alone goes on from there."""
        return self.memory is not None or (bool(self._recut) and not (self._unsure or self._complete))

    def keep_in_memory(
        self,
        version: Version,
        coordinates: Mapping[int, r.CoordinateInfo],
        epoch: int,
        assignment: Sequence[r.SlotAddress],
    ) -> Effects:
        """The next start begins with this, of these coordinates, which the nodes hold. ``version``: as of `Base`.

        A drain under way is over, and tried again at the first commit.
        """
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._retry = True
            yield from self._doubt(attempt)
            if attempt.sealing is None:
                yield Send(None, r.GiveUpDrain(attempt.name, assignment[0].node))
        base = r.Base(epoch, *version)
        self.memory = _Memory(base, [coordinates[rank] for rank in sorted(coordinates)])

    def begin_anew(self, resized: bool) -> None:
        """The start begins anew from `base`; ``resized``: with another number of ranks."""
        if resized:
            self._recut, self._complete, self._unsure = [*self._unsure, *self._complete, *self._recut], [], []
        elif self.memory is None:
            self._complete, self._unsure = [*self._unsure, *self._complete], []
        self._attempt, self._kept, self._first, self._resumes_at = None, None, None, None
        self._loading = None  # nobody answers for the start that is over
        self._retry = self._retry and self.memory is not None
        self.last_is_over = False

    def try_again(self) -> bool:
        """What is in memory is all there is, and a start with it has failed: once that may have been what passes."""
        memory = self.memory
        if memory is None or memory.again or self._complete or self._recut or self._unsure:
            return False
        memory.again = True
        return True

    def bad(self, name: str, why: str) -> Effects:
        """A durable generation, or (without a name) that in memory, could not be read: it does not count any more."""
        if self.memory is not None and not name:
            generation, self.memory = self.memory.base.generation, None
            yield emit(
                "base_lost",
                iteration=generation,
                message=f"generation {generation} cannot be read out of the nodes' memory any more: {why}",
            )
            return
        for generation, known in (*self._complete, *self._recut):
            if known == name:
                yield from self._failed(generation, f"durable generation {generation} cannot be used: {why}")
        for there in (self._complete, self._recut, self._unsure):
            there[:] = [one for one in there if one[1] != name]

    # ---- the start

    def start(self, active: Iterable[int], epoch: int) -> Effects:
        """All agents are there: bring the newest durable generation into the vaults, or say that there is none.

        Once for an epoch, which is 0 unless the start had to begin anew.
        """
        if self._spec is None or not self._spec.resume or (self._begun and epoch == self._epoch):
            return
        self._begun, self._epoch = True, epoch
        if self.memory is None:
            yield from self._load(active)

    def set_aside(self, record: r.SetAside) -> Answer[str]:
        """A node has said what it holds. Returns why the job cannot begin with that, or an empty string."""
        if self.memory is not None:
            self.memory.held[record.node] = record
        return (yield from self._answered({record.node}))

    def waits_for(self, node: int | None) -> bool:
        """It has not said what it holds of `memory`."""
        return self.memory is not None and node in (self.memory.waiting or ())

    def gone(self, nodes: Iterable[int]) -> Answer[str]:
        """These are out of the job. Returns as `set_aside`."""
        if self.memory is not None:
            for node in nodes:
                self.memory.held.pop(node, None)
        return (yield from self._answered(nodes))

    def _answered(self, nodes: Iterable[int]) -> Answer[str]:
        memory = self.memory
        if memory is None or memory.waiting is None:
            return ""
        memory.waiting -= set(nodes)
        if memory.waiting or self._resumes_at is not None:
            return ""
        holders: list[list[int]] = [[] for _ in memory.coordinates]
        constants: list[list[int]] = [[] for _ in memory.coordinates]
        for node, record in sorted(memory.held.items()):
            for known, ranks in ((holders, record.ranks), (constants, record.constants)):
                for rank in ranks:
                    if 0 <= rank < len(known):  # else it is nonsense
                        known[rank].append(node)
        generation, lacking = memory.base.generation, [rank for rank, held in enumerate(holders) if not held]
        if not lacking:
            self._resumes_at = r.ResumeAt(
                generation, memory=r.InMemory(memory.base, memory.coordinates, holders, constants)
            )
            yield Send(None, self._resumes_at)
            return ""
        several, more = len(lacking) > 1, len(lacking) - _MOST_NAMED
        named = ", ".join(map(str, lacking[:_MOST_NAMED])) + f" and {more} more" * (more > 0)
        why = f"nobody holds the shard{'s' * several} of rank{'s' * several} {named}"
        yield from self.bad("", why)
        return f"{why} of generation {generation}"

    def start_again(self, active: Iterable[int], epoch: int, node: int | None = None) -> Effects:
        """Agents (None: perhaps all) are back that may not have heard where training begins."""
        if not self._begun or epoch != self._epoch:
            yield from self.start(active, epoch)
        elif self._loading is not None:
            yield Send(node, r.LoadShards(self._loading.name, self._complete[0][0], self._epoch))
        elif self._resumes_at is not None:
            yield Send(node, self._resumes_at)

    def dump(self) -> list[tuple[int, str] | tuple[int, str, str]]:
        """What is durable, for a coordinator that starts again and may not be able to look."""
        return [*self._unsure, *self._complete, *((*each, _RECUT) for each in self._recut)]

    def restored(self, starting: bool, known: Iterable[Sequence[Any]]) -> None:
        """A coordinator takes the place of one that is gone: what was under way is not known any more.

        While the job is ``starting``, `start` says once more where it begins; later it has begun. ``known``: from
        `dump`; it counts where the directory could not be looked into, and while the job is starting: workers that
        begin now must begin where the others have, and the directory may have another one of that number.
        """
        if starting:
            self._complete, self._recut = [], []
        if self._spec is not None and not self._complete:
            for generation, name, *kind in known:
                if kind != [_RECUT]:
                    self._complete.append((generation, name))
                    self._was_durable = True
                elif (generation, name) not in self._recut:
                    self._recut.append((generation, name))
        self._begun = not starting
        self._last = self.newest or 0

    def dump_memory(self) -> list[Any] | None:
        """`memory`, as JSON types. Large."""
        if self.memory is None:
            return None
        coordinates = [[c.rank, c.tp, c.pp, c.dp, c.cp, c.ep] for c in self.memory.coordinates]
        return [list(msgspec.structs.astuple(self.memory.base)), coordinates]

    def load_memory(self, kept: list[Any] | None) -> None:
        """The opposite."""
        if kept is not None:
            base, coordinates = kept
            self.memory = _Memory(r.Base(*base), [r.CoordinateInfo(*each) for each in coordinates])

    def _load(self, active: Iterable[int]) -> Effects:
        if self._recut and not self._complete:
            generation, name = self._recut[0]
            self._last, self._resumes_at = generation, r.ResumeAt(generation, name)
            yield Send(None, self._resumes_at)
            yield self._resumed(generation, name)
        elif self._complete:
            generation, name = self._complete[0]
            self._loading = _Loading(name, set(active))
            yield Send(None, r.LoadShards(name, generation, self._epoch))
        else:
            self._loading, self._resumes_at = None, r.ResumeAt(-1)
            yield Send(None, self._resumes_at)

    def loaded(self, record: r.ShardsLoaded, active: Iterable[int]) -> Answer[str]:
        """A node has its shards, or not. Returns why the job cannot start, or an empty string."""
        if self._spec is None or self._loading is None:
            return ""
        if (record.name, record.epoch) != (self._loading.name, self._epoch):
            return ""
        name, waiting = self._loading.name, self._loading.waiting
        if record.error:
            generation = self._complete[0][0]
            yield from self.bad(name, record.error)
            if self._recut and not self._complete:  # what is in vaults by now must not be taken for a part of that
                yield StartOver(f"durable generation {generation} cannot be used")
                return ""
            if not self._complete:
                if self._spec.others:
                    return (
                        f"durable generation {generation} in {self._spec.directory} cannot be read ({record.error}); "
                        f"ask for another one that is there: {', '.join(map(str, self._spec.others))}"
                    )
                return (
                    f"no durable generation in {self._spec.directory} can be read ({generation}: {record.error}); "
                    "start with Megatron's last checkpoint (--load) and another --deadpool-durable-dir, or none"
                )
            yield from self._load(active)
            return ""
        waiting.discard(record.node)
        if not waiting:
            generation = self._complete[0][0]
            self._loading = None
            self._last, self._resumes_at = generation, r.ResumeAt(generation)
            yield Send(None, self._resumes_at)
            yield self._resumed(generation, name)
        return ""

    def _resumed(self, generation: int, name: str) -> Emit:
        assert self._spec is not None
        message = f"training goes on from durable generation {generation} in {self._spec.directory}"
        return emit("durable_resumed", iteration=generation, name=name, message=message)

    @property
    def loading_due(self) -> float | None:
        """When `judge_loading` has to be called at the latest."""
        if self._spec is None or self._loading is None:
            return None
        if (since := self._loading.since) is None:
            return -math.inf
        return since + min(self._load_s, 2 * self._loading.told_s or _SAY_S)

    @property
    def _load_s(self) -> float:
        return (self._spec.deadline if self._spec is not None else 0.0) + _LOAD_S

    def judge_loading(self, now: float) -> Effects:
        """Time has passed: tell who still reads, and lose who has done so for too long.

        What hangs on a node says nothing of the generation, so that stays what it is.
        """
        loading = self._loading
        if self._spec is None or loading is None:
            return
        if loading.since is None:
            loading.since = now
        due = self.loading_due
        if due is None or now < due:
            return
        nodes, waited = sorted(loading.waiting), now - loading.since
        what = f"durable generation {self._complete[0][0]} from {self._spec.directory}"
        if waited >= self._load_s:
            yield Lose(set(nodes), f"it has not read {what} within {self._load_s:g} s: does that directory hang there?")
            return
        loading.told_s = waited
        yield emit(
            "durable_loading",
            iteration=self._complete[0][0],
            nodes=nodes,
            seconds=round(waited, 3),
            message=f"{waited:.0f} s and no answer of {r.few_nodes(nodes)}, to read {what}; after {self._load_s:g} s a "
            "node is lost",
        )

    # ---- draining

    def committed(self, kept: Version, active: Sequence[int], now: float, training: bool = True) -> Effects:
        """The whole job has committed ``kept``; drain it when it is due.

        Not while ``training`` is False: vaults commit what a spare fetches before its worker has said what that is.
        """
        self._kept = kept
        spec = self._spec
        if self.memory is not None:
            self.memory = None
            yield Persist(("now", "layout"))
        if spec is None or not spec.directory:
            return
        if self._first is None:
            self._first = (now, kept.generation)
            if self._last == 0:
                self._last = kept.generation
        if self._taken or not training:
            return
        newest, attempt = self.newest, self._attempt
        if newest is not None and kept.generation <= newest:
            return
        if attempt is not None:
            return
        if self._preempted is not None:
            yield from self._begin(kept, active, now, 0.0)
        elif spec.interval and (self._retry or kept.generation // spec.interval > self._last // spec.interval):
            since, generation = self._first
            pace = (now - since) / max(1, kept.generation - generation)
            yield from self._begin(kept, active, now, _SHARE * spec.interval * max(0.0, pace))

    def _begin(
        self, version: Version, active: Sequence[int], now: float, seconds: float, last: bool = False
    ) -> Effects:
        assert self._spec is not None
        self._attempts += 1
        name = directory_name(version.generation, self._spec.job, self._attempts)
        deadline = now + self._spec.deadline
        self._attempt = _Attempt(name, version, now, deadline, set(active), last=last)
        self._last = version.generation
        self._retry = False
        yield Send(None, r.DrainShards(name, version.epoch, version.generation, seconds))
        yield emit("draining", iteration=version.generation, name=name, spread_s=round(seconds, 3))

    def drained(
        self,
        record: r.ShardsDrained,
        assignment: Sequence[r.SlotAddress],
        coordinates: Mapping[int, r.CoordinateInfo],
        epoch: int,
        writer: int,
    ) -> Effects:
        """A node's shards are written, or are not. ``writer``: the node that writes the manifest after the last."""
        attempt = self._attempt
        if attempt is None or attempt.name != record.name or attempt.sealing is not None or self._spec is None:
            return
        if record.error:
            yield from self._fail(f"node {record.node}: {record.error}", assignment)
            return
        attempt.waiting.discard(record.node)
        attempt.shards.update((shard.rank, shard) for shard in record.shards)
        if attempt.waiting:
            return
        missing = [rank for rank in range(len(assignment)) if rank not in attempt.shards or rank not in coordinates]
        if missing:
            yield from self._fail(f"nobody has written the shard of rank {missing[0]}", assignment)
            return
        attempt.sealing = writer
        keep = [name for _, name in (*self._complete, *self._recut)][: self._spec.keep - 1]
        yield Send(
            attempt.sealing,
            r.SealGeneration(
                attempt.name,
                epoch,
                attempt.version.generation,
                [coordinates[rank] for rank in range(len(assignment))],
                [attempt.shards[rank] for rank in range(len(assignment))],
                keep,
            ),
        )

    def sealed(self, record: r.GenerationSealed, assignment: Sequence[r.SlotAddress], now: float) -> Effects:
        """The manifest is written, or is not."""
        attempt = self._attempt
        if self._spec is None:
            return
        if attempt is None or attempt.name != record.name:
            yield from self._sure(record)
            return
        if record.error:
            if not record.unsure:
                attempt.sealing = None
            yield from self._fail(f"node {record.node}: {record.error}", assignment)
            return
        generation = attempt.version.generation
        self._is_durable((generation, attempt.name))
        self._unsure.clear()
        yield Persist()
        self._attempt, self.last_is_over = None, attempt.last
        fields: dict[str, Any] = {"problems": record.problems} if record.problems else {}
        if record.problems:
            fields["message"] = f"generation {generation} is durable, but {record.problems[0]}"
        yield emit(
            "durable",
            iteration=generation,
            name=attempt.name,
            bytes=sum(shard.nbytes for shard in attempt.shards.values()),
            seconds=round(now - attempt.started, 3),
            **fields,
        )
        if self._preempted is not None:
            yield from self._drained_last(attempt.started, assignment, now)

    def _fail(self, cause: str, assignment: Sequence[r.SlotAddress], retry: bool = False) -> Effects:
        attempt = self._attempt
        assert attempt is not None and self._spec is not None
        self._attempt = None
        self._retry = retry
        yield from self._doubt(attempt)
        remover = assignment[0].node if attempt.sealing is None else _NOBODY
        yield Send(None, r.GiveUpDrain(attempt.name, remover))
        self.last_is_over = attempt.last and not retry
        generation = attempt.version.generation
        newest = self.newest_at_any_width
        goes_on = "the job ends" if attempt.last else "training goes on"
        stays = "there is no durable generation yet" if newest is None else f"generation {newest} stays durable"
        yield from self._failed(
            generation,
            f"generation {generation} could not be drained to {self._spec.directory}: {cause}; {goes_on}, {stays}",
            name=attempt.name,
            cause=cause,
        )

    def _doubt(self, attempt: _Attempt | None) -> Effects:
        """An attempt is over: nobody knows whether it is complete if its manifest was to be written."""
        if attempt is not None and attempt.sealing is not None:
            self._unsure.insert(0, (attempt.version.generation, attempt.name))
            yield Persist()

    def _is_durable(self, newest: tuple[int, str]) -> None:
        """Who has sealed it has removed older ones."""
        assert self._spec is not None
        older = self._spec.keep - 1
        self._recut = self._recut[: max(0, older - len(self._complete))]
        self._complete = [newest, *self._complete[:older]]
        self._was_durable = True

    def _sure(self, record: r.GenerationSealed) -> Effects:
        """Who was to write a manifest that nobody waited for any more has answered."""
        assert self._spec is not None
        there = next((known for known in (self._unsure, self._recut) if record.name in dict(known).values()), None)
        begins = self._resumes_at is not None and self._resumes_at.recut == record.name  # and so ranks find out
        if there is None or record.unsure or (record.error and begins):
            return
        found = next(each for each in there if each[1] == record.name)
        place = there.index(found)
        if record.error:
            there.remove(found)
        elif there is self._recut:
            del there[place + self._spec.keep :]
        else:
            self._unsure = there[:place]
            self._is_durable(found)
        if not record.error:
            yield emit("durable", iteration=found[0], name=found[1])
        yield Persist()

    @property
    def sealing(self) -> bool:
        """A manifest is being written: soon a newer generation is durable, and older ones may go."""
        return self._attempt is not None and self._attempt.sealing is not None

    def sealed_last(self) -> None:
        """That is the last one; `last_is_over` says when."""
        assert self._attempt is not None
        self._attempt.last = True

    def _failed(self, generation: int, message: str, **fields: Any) -> Effects:
        yield emit("durable_failed", iteration=generation, message=message, **fields)

    def epoch_ended(self, lost: Iterable[int], assignment: Sequence[r.SlotAddress]) -> Effects:
        """A new epoch: a drain that a lost node had a part in is over, and tried again at the next commit.

        So is one whose shards are not all written yet: survivors may have to use their slots now.
        """
        self.last_is_over = False
        attempt = self._attempt
        if attempt is None or attempt.sealing not in (None, *lost):
            return
        yield from self._fail("the epoch ended before all of it was written", assignment, retry=True)

    def taken(self, why: str) -> Effects:
        """Another job owns the directory: nothing more is written there or removed, an attempt of ours included.

        That one may have become whole, and be what the other job began with.
        """
        if self._spec is None or self._taken:
            return
        self._taken = why
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self.last_is_over = attempt.last
            yield Send(None, r.GiveUpDrain(attempt.name, _NOBODY))
        yield emit("durable_taken", message=f"{why}; training goes on, and drains nothing more")
        if self._preempted is not None:
            self._leave_undrained()

    # ---- leaving

    def drain_last(self, generation: int, active: Sequence[int], now: float) -> Effects:
        """The job cannot go on: make the generation durable that is in the vaults. `last_is_over` says when it is.

        Called where `can_drain` and every node of ``active`` has its shards of it.
        """
        yield from self._doubt(self._attempt)
        self._attempt = None  # its shards are written: only its manifest may still come
        if generation == self.newest:
            self.last_is_over = True
        else:
            yield from self._begin(Version(-1, generation), active, now, 0.0, last=True)

    @property
    def can_drain(self) -> bool:
        """There is a durable directory, and it is this job's."""
        return self._spec is not None and bool(self._spec.directory) and not self._taken

    def preempt(self, assignment: Sequence[r.SlotAddress], now: float) -> Effects:
        """The job has to leave soon: drain the newest committed generation at once. `leave` says when, and what to say.

        A second call changes nothing.
        """
        if self._spec is None or self._preempted is not None:
            return
        self._preempted = now + self._spec.preempt_deadline
        if self._taken:
            self._leave_undrained()
            return
        attempt = self._attempt
        if attempt is not None and attempt.sealing is None:
            yield Send(None, r.GiveUpDrain(attempt.name, assignment[0].node))
            self._attempt = attempt = None
        if attempt is None and self._kept is not None:
            yield from self._drained_last(-math.inf, assignment, now)
        elif self.memory is None and self.only_recut and self._kept is None:
            self._leaves()  # else what is in memory is newer, and drained with the first commit

    def _drained_last(self, begun: float, assignment: Sequence[r.SlotAddress], now: float) -> Effects:
        """Leave, or drain what is newer than a drain that had ``begun`` before the order to leave came."""
        assert self._spec is not None and self._preempted is not None
        noticed = self._preempted - self._spec.preempt_deadline
        if begun < noticed and self._kept is not None and self._kept.generation != self.newest:
            yield from self._begin(self._kept, sorted({slot.node for slot in assignment}), now, 0.0)
            return
        self._leaves()

    def _leaves(self) -> None:
        assert self._spec is not None
        newest = self.newest_at_any_width
        self.leave = f"preempted: generation {newest} is durable in {self._spec.directory}, and the job has left"

    def _leave_undrained(self) -> None:
        self.leave = f"preempted: no newer generation could be made durable: {self._taken}"

    # ---- time

    def next_deadline(self) -> float | None:
        """When `tick` has to be called at the latest."""
        times = [self._attempt.deadline] if self._attempt is not None else []
        if self._preempted is not None and self.leave is None:
            times.append(self._preempted)
        return min(times, default=None)

    def tick(self, assignment: Sequence[r.SlotAddress], now: float) -> Effects:
        """Time has passed."""
        if self._spec is None:
            return
        if self._attempt is not None and now >= self._attempt.deadline:
            nodes, what = sorted(self._attempt.waiting), "shards"
            if self._attempt.sealing is not None:
                nodes, what = [self._attempt.sealing], "manifest"
            deadline = f"--deadpool-durable-deadline ({self._spec.deadline:g} s)"
            yield from self._fail(f"{r.few_nodes(nodes)} took longer than {deadline} to write the {what}", assignment)
        if self._preempted is not None and self.leave is None and now >= self._preempted:
            there = self.newest_at_any_width
            newest = "there is none" if there is None else f"the newest is generation {there}"
            self.leave = (
                f"preempted: draining took longer than --deadpool-preempt-deadline ({self._spec.preempt_deadline:g} s) "
                f"and no newer generation is durable in {self._spec.directory}; {newest}"
            )
