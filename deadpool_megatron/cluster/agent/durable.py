"""The agent's side of the durable tier: what its workers told of themselves, its drainer, and shards read back.

Everything returns at once; a thread reads shards, a process of its own writes them. Their news come through the queue
of `Shards`, like the vault's.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.shards import Damaged, FetchDone, Shards
from deadpool_megatron.durable import (
    FORMAT,
    Answer,
    Cancel,
    Done,
    Drain,
    DrainerProcess,
    DurableError,
    Manifest,
    NoRoom,
    Seal,
    Stage,
    Staged,
    Store,
    Take,
    Unreachable,
    differing,
    load_constants,
    load_shards,
    not_fit,
    open_store,
    settings_note,
)
from deadpool_megatron.vault import CONSTANT, Version, constants_of, is_constants, small_capacity


@dataclass(frozen=True, slots=True)
class Loaded:
    """Before training: all shards of this node were read (``error`` empty), or could not be."""

    name: str
    error: str
    epoch: int


DurableNews = Staged | Done | Loaded

_log = logging.getLogger(__name__)
_PATIENCE_S = 20.0  # with a directory that cannot be read; below what a recovery has for it
_PAUSE_S = 1.0
_COPY_S, _COPY_RATE = 60.0, 0.5e9  # a drainer that needs longer to copy shards out hangs: seconds, bytes a second
_ANSWER_S = 60.0  # and one that has not given up by then what it was told to
_WHY = "does the file system of the durable directory answer there?"


class NodeDurability:
    """One node's part in the durable tier. Used by the agent's loop alone.

    Args:
        directory: the durable directory, empty where there is none; ``job``: whose it must be.
        send: sends a record to the coordinator.
        drains: the job writes generations; else it only reads.
        ranks: how many the job has.
    """

    def __init__(
        self,
        node: int,
        directory: str,
        job: str,
        shards: Shards,
        send: Callable[[r.AgentRecord], None],
        drains: bool = True,
        ranks: Callable[[], int] = lambda: 0,
    ) -> None:
        self._ranks = ranks
        self._node = node
        self._job = job
        self._directory = directory
        self._shards = shards
        self._send = send
        self._drains = drains and bool(directory)
        self._drainer = self._make_drainer()
        self._parts: dict[int, list[bytes]] = {}
        self._jobs: dict[int, dict[str, Any]] = {}
        self._granted: set[int] = set()  # ranks whose memory is here
        self._pinned = ""
        self._due: dict[str, float] = {}  # by drain that is not done: when it has to be copied or let go of
        self._late: set[str] = set()  # drains for which it was ended, and is not gone yet
        self._takes: dict[int, Take] = {}  # of the newest drain
        self._takes_epoch = 0
        self._resume: r.ResumeAt | None = None
        self._places = ""  # the file that says where its shards are in memory
        self._places_fd = -1
        self._epoch = 0  # of the versions that were loaded before training
        self._manifest: Manifest | None = None  # of what was loaded before training
        self._loaded: dict[int, str] = {}  # by rank, and holder of constants, digest of its layout
        self._asked: tuple[str, int] | None = None  # name and epoch of what is, or was, read before training
        self._answer: r.ShardsLoaded | None = None
        if directory:
            shards.durable_constants = self._bring_constants

    def _tell(self, news: DurableNews | Answer) -> None:
        self._shards.report(news)

    # ---- a process, a thread, and the directory

    def _make_drainer(self) -> DrainerProcess:
        return DrainerProcess(self._tell)

    def _store(self) -> Store:
        return open_store(self._directory)

    def _now(self) -> float:
        return time.monotonic()

    def _in_background(self, name: str, work: Callable[[], float | None]) -> None:
        """``work`` blocks, and returns in how many seconds it is to be called again; None: it is through."""

        def run() -> None:
            while (pause := work()) is not None:
                time.sleep(pause)

        threading.Thread(target=run, name=name, daemon=True).start()

    def _read(
        self,
        name: str,
        epoch: int,
        versions: dict[int, Version],
        loaded: Callable[[int, Manifest, str], None],
        ended: Callable[[str, bool], None],
    ) -> None:
        """Bring a durable generation into the vault. ``ended`` is told why not, empty when all is there, and whether
        the fault is this node's.

        A directory that fails is tried again for a while: what cannot be read once is not lost.
        """
        until = self._now() + _PATIENCE_S

        def work() -> float | None:
            error, own = "", False
            try:
                load_shards(self._shards.vault, self._store(), name, epoch, versions, small_capacity, loaded)
            except Unreachable as err:
                if self._now() < until and epoch == self._shards.vault.epoch:
                    return _PAUSE_S
                error = str(err)
            except DurableError as err:
                error, own = str(err), isinstance(err, NoRoom)
            except Exception as err:  # noqa: BLE001 - what nobody hears of is waited for until the phase ends
                error, own = f"{type(err).__name__}: {err}", True
            ended(error, own)
            return None

        self._in_background("durable-read", work)

    def _bring_constants(self, rank: int, epoch: int) -> None:
        try:
            load_constants(self._shards.vault, self._store(), rank, epoch, small_capacity)
        except DurableError as err:
            _log.info("rank %d: its constants cannot be had from the durable directory: %s", rank, err)

    # ---- from workers

    def described(self, record: r.Described, rank: int) -> None:
        """One part of what the worker of ``rank`` tells of its job; parts come in order."""
        parts = self._parts.setdefault(rank, [])
        if record.part == 0:
            parts.clear()
        parts.append(record.data)
        if len(parts) < record.parts:
            return
        self._jobs[rank] = msgspec.json.decode(b"".join(self._parts.pop(rank)))

    def refusal(self, rank: int, layout: str) -> str:
        """Why the shard a worker asks memory for is not the one that was loaded for it; empty when it is.

        Args:
            layout: the digest of what it consists of.
        """
        if self._loaded.get(rank, layout) == layout:
            return ""
        if is_constants(rank):
            return self._not_fit("it has other frozen parameters")
        return self._not_fit(f"rank {rank}'s shard in it consists of other tensors")

    def granted(self, rank: int, nbytes: int) -> None:
        """The arena of ``rank`` is there: so is, from now on, the memory of ``nbytes`` that draining it takes."""
        if self._drains and not is_constants(rank):  # those stay, so they are written from where they are
            self._granted.add(rank)
            self._drainer.tell(Stage(rank, nbytes, self._ranks()))

    def keep_only(self, ranks: set[int]) -> None:
        """The memory of all others has been freed: so is that of the drainer."""
        for rank in self._granted - ranks:
            self._drainer.forget(rank)
        self._granted &= ranks

    def _not_fit(self, why: str) -> str:
        generation = self._manifest.generation if self._manifest is not None else -1
        return not_fit(generation, self._directory, why)

    # ---- the start of training

    def load(self, record: r.LoadShards, ranks: Iterable[int]) -> None:
        """Bring this node's shards into its vault. Answers with a `Loaded`.

        Told again while that is under way it changes nothing: a second read would cut the first one off.
        """
        epoch, asked = record.epoch, (record.name, record.epoch)
        if asked == self._asked and (self._answer is None or not self._answer.error):
            if self._answer is not None:
                self._send(self._answer)  # which was not heard, perhaps
            return
        self._asked, self._answer = asked, None
        versions = {rank: Version(epoch, record.generation) for rank in ranks}

        def loaded(rank: int, manifest: Manifest, layout: str) -> None:
            self._manifest = manifest
            self._loaded[rank] = layout

        def ended(error: str, own: bool) -> None:
            self._tell(Loaded(record.name, error, epoch))

        self._loaded.clear()
        self._epoch = epoch
        self._read(record.name, epoch, versions, loaded, ended)

    def resume_at(self, record: r.ResumeAt, vaults: Mapping[int, r.Address]) -> None:
        """Training begins with this generation. ``vaults``: by node, where its vault answers."""
        if record == self._resume:
            return  # workers may be about to read what they were told
        self._resume = record
        if record.generation < 0 or record.recut or record.memory is not None:
            self._loaded.clear()
            self._manifest = None
        if record.memory is not None:
            self._places = self._publish(msgspec.msgpack.encode(self._shards.places(record, vaults)))

    def _publish(self, data: bytes) -> str:
        """A file for the workers, with the job's secret in it: one that ends with this process."""
        self._close_places()
        self._places_fd = os.memfd_create("deadpool-places", os.MFD_CLOEXEC)
        os.pwrite(self._places_fd, data, 0)
        return f"/proc/{os.getpid()}/fd/{self._places_fd}"

    def _close_places(self) -> None:
        if self._places_fd >= 0:
            os.close(self._places_fd)
        self._places, self._places_fd = "", -1

    def start_over(self) -> None:
        """The start begins anew: other workers tell what job it is, and the coordinator where to resume."""
        self._resume = self._manifest = None
        self._close_places()
        self._loaded.clear()
        self._jobs.clear()
        self.keep_only(set())

    def begin(self, rank: int, epoch: int) -> r.Generation | str | None:
        """What a worker is to begin with; a text when it must not; None while that is not known.

        Known once the coordinator has said where to resume and the worker has told what job it is.
        """
        if self._resume is None or rank not in self._jobs:
            return None
        generation = self._resume.generation
        if generation < 0:
            return r.Generation(epoch, -1, -1, "", {})
        if self._resume.recut or self._resume.memory is not None:
            return r.Generation(epoch, generation, -1, "", {}, recut=self._resume.recut, memory=self._places)
        note = ""
        if self._manifest is not None:
            for name, (there, here) in differing(self._manifest, self._jobs[rank], "model").items():
                return self._not_fit(f"{name} is {there} in it and {here} here")
            note = settings_note(self._manifest, self._jobs[rank])
        with_constants = constants_of(rank) in self._loaded
        path = self._shards.path_of(rank)
        return r.Generation(epoch, generation, self._epoch, path, {}, with_constants, note=note)

    # ---- draining

    def drain(self, record: r.DrainShards, ranks: Iterable[int]) -> None:
        """Write this node's shards of a committed version. Their slots stay until they are copied out, or `look` finds
        that the drainer hangs. While it cannot be ended nothing more is kept for it.
        """
        if self._late:
            self._send(r.ShardsDrained(self._node, record.name, [], f"its drainer hangs and cannot be ended: {_WHY}"))
            return

        def epoch(rank: int) -> int:
            version = self._shards.version_of(rank, record.generation) if record.version_epoch < 0 else None
            return version[0] if version is not None else record.version_epoch

        path_of = self._shards.path_of
        takes = tuple(
            Take(rank, path_of(rank), epoch(rank), record.generation, path_of(constants_of(rank)))
            for rank in sorted(ranks)
        )
        self._takes, self._takes_epoch = {take.rank: take for take in takes}, self._shards.vault.epoch
        self._pinned = record.name
        nbytes = sum(arena.info.unique_bytes for arena in self._shards.vault.arenas() if arena.info.kind == "own")
        self._due[record.name] = self._now() + _COPY_S + nbytes / _COPY_RATE
        self._shards.vault.pin()
        self._drainer.give(Drain(self._directory, record.name, record.seconds, takes, self._job, self._ranks()))

    def look(self) -> None:
        """Call often. A drainer that hangs, in a directory that does or in its driver, costs commits a minute and not
        more: it is ended, and the next drain has another one."""
        late = {name for name, until in self._due.items() if self._now() >= until} - self._late
        if not late:
            return
        self._late |= late
        self._drainer.kill()
        if self._pinned in late:
            name = self._pinned
            self._release(name)
            self._send(r.ShardsDrained(self._node, name, [], f"its drainer hung and was ended: {_WHY}"))

    def seal(self, record: r.SealGeneration) -> None:
        """Write the manifest."""
        job = next(iter(self._jobs.values()), {})
        manifest = Manifest(
            FORMAT,
            record.generation,
            record.epoch,
            record.name,
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            len(record.shards),
            tuple(record.coordinates),
            tuple(record.shards),
            job,
        )
        self._drainer.give(Seal(self._directory, manifest, tuple(record.keep), self._job))

    def give_up(self, record: r.GiveUpDrain) -> None:
        """An attempt is over."""
        self._release(record.name)
        if record.name in self._due:
            self._due[record.name] = min(self._due[record.name], self._now() + _ANSWER_S)
        self._drainer.cancel(Cancel(self._directory, record.name, record.remover == self._node, self._job))

    def _release(self, name: str) -> None:
        if name == self._pinned:
            self._pinned = ""
            self._shards.vault.unpin()

    def handle(self, news: DurableNews) -> None:
        """The drainer, or the thread that loads, is through with something."""
        match news:
            case Staged():
                if news.name == self._pinned:
                    self._due[news.name] = math.inf
                self._release(news.name)
            case Done(sealed=False):
                self._due.pop(news.name, None)
                self._late.discard(news.name)
                if (take := self._takes.get(news.unusable)) is not None:
                    self._give_up_copy(take, news.error)
                elif is_constants(news.unusable):
                    self._shards.report(Damaged(news.unusable, "own", CONSTANT.generation))
                self._send(r.ShardsDrained(self._node, news.name, list(news.shards), news.error))
            case Done():
                self._send(r.GenerationSealed(self._node, news.name, news.error, list(news.problems), news.unsure))
            case Loaded():
                answer = r.ShardsLoaded(self._node, news.name, news.error, news.epoch)
                if (news.name, news.epoch) == self._asked:
                    self._answer = answer
                self._send(answer)

    def _give_up_copy(self, take: Take, why: str) -> None:
        """A copy could not be drained since it is not what it was: if it was the last drain, others are looked for."""
        epoch, node = self._shards.vault.epoch, self._node
        if epoch != self._takes_epoch:
            return
        self._send(r.FetchFailed(epoch, node, take.rank, node, take.generation, why, take.epoch))
        self._shards.recheck(take.rank)

    # ---- falling back

    def fetch(self, record: r.Agree, ranks: Mapping[int, int]) -> None:
        """Memory cannot answer: read the shards of ``ranks`` (local index to rank). Each answers with a `FetchDone`."""
        versions = {rank: Version(record.epoch, record.generation) for rank in ranks.values()}
        left = set(versions)
        if not left:
            return  # a spare

        def loaded(rank: int, manifest: Manifest, layout: str) -> None:
            if is_constants(rank):
                return
            left.discard(rank)
            version = (record.epoch, record.generation)
            self._shards.report(FetchDone(rank, record.epoch, record.generation, -1, version, ""))

        def ended(error: str, own: bool) -> None:
            if error:
                rank = min(left)
                self._shards.report(FetchDone(rank, record.epoch, record.generation, -1, None, error, own=own))

        self._read(record.durable, record.epoch, versions, loaded, ended)

    def close(self) -> None:
        """End the drainer."""
        self._drainer.close()
        self._close_places()
