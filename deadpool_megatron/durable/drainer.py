"""``python -m deadpool_megatron.durable.drainer``: the process that writes to the durable directory, one a node.

A process of its own, at low priority: a disk that hangs, a driver that eats memory or an interpreter lock cannot hold
up the agent, whose heartbeat decides over the node. It ends with its agent. One thread reads orders, one carries them
out; a `Cancel` and a `Drain` without pacing take effect in the middle of what is under way.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from deadpool_megatron.vault import CONSTANT, Arena, ChecksumMismatch, NotHeld, Slot, Version, constants_of

from .errors import Cancelled, DurableError
from .files import prune, remove_attempt, seal, write_constants, write_shard
from .format import ConstantsFile, ShardFile, described, generation_of
from .lease import check_owner
from .orders import DEAF_TO, Answer, Cancel, Done, Drain, Order, Seal, Stage, Staged, Take, Unstage
from .staging import Staging
from .store import Store, open_store

_PR_SET_PDEATHSIG = 1
_NICE = 10


class _Pace:
    """Sleeps so that ``total`` bytes take about ``seconds``; 0 seconds: as fast as it goes.

    A slow disk never makes it wait longer: what was late already is not waited for again.

    Args:
        keep_waiting: looked at between sleeps of a tenth of a second; False ends the wait at once.
    """

    def __init__(self, total: int, seconds: float, keep_waiting: Callable[[], bool]) -> None:
        self._total = max(1, total)
        self._seconds = seconds
        self._keep_waiting = keep_waiting
        self._start = time.monotonic()
        self._done = 0

    def moved(self, nbytes: int) -> None:
        """``nbytes`` more are written: wait until it is time for the next ones."""
        self._done += nbytes
        due = self._start + self._seconds * min(1.0, self._done / self._total)
        while self._keep_waiting():
            left = due - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.1))


class _Drainer:
    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._staging: dict[int, Staging] = {}
        self._unstaged: dict[int, str] = {}
        self._cancelled: set[str] = set()
        self._kept: dict[str, ConstantsFile] = {}  # by arena, what the store was seen to have
        self._ranks = 0  # that the job has

    # ---- the thread that reads

    def read(self, lines: BinaryIO) -> None:
        decoder: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)
        for line in lines:
            order = decoder.decode(line)
            if isinstance(order, Cancel):
                self._cancelled.add(order.name)
            self._orders.put(order)
        self._orders.put(None)

    # ---- the thread that works

    def work(self) -> None:
        """Whatever goes wrong, drivers of stores included, is an answer: a drain that is not answered is waited for."""
        while (order := self._orders.get()) is not None:
            if isinstance(order, Stage | Drain):
                self._of(order.ranks)
            match order:
                case Stage():
                    self._stage(order)
                case Unstage():
                    self._unstage(order.rank)
                case Drain():
                    self._drain(order)
                case Seal():
                    self._seal(order)
                case Cancel():
                    self._cancelled.discard(order.name)
                    if order.remove:
                        with contextlib.suppress(Exception):  # what is left has no manifest
                            store = open_store(order.directory)
                            _check(store, order.job)
                            remove_attempt(store, order.name)

    def _of(self, ranks: int) -> None:
        """The job has so many ranks now: what is known of those of another number is of no use."""
        if ranks != self._ranks:
            self._ranks = ranks
            for known in (self._staging, self._unstaged, self._kept):
                known.clear()

    def _tell(self, answer: Answer) -> None:
        self._out.write(msgspec.json.encode(answer) + b"\n")
        self._out.flush()

    def _stage(self, order: Stage) -> None:
        have = self._staging.get(order.rank)
        if have is None or have.capacity < order.nbytes:
            del have
            self._unstage(order.rank)
            try:
                self._staging[order.rank] = Staging(order.rank, order.nbytes)
            except Exception as err:  # noqa: BLE001 - see `work`
                self._unstaged[order.rank] = _one_line(err)

    def _unstage(self, rank: int) -> None:
        self._staging.pop(rank, None)
        self._unstaged.pop(rank, None)

    def _drain(self, order: Drain) -> None:
        error, unusable = "", -1
        shards: list[ShardFile] = []
        ready: list[Staging] = []
        try:
            try:  # memory first: the slots stay until `Staged`, and the directory may hang
                for each in order.shards:
                    if order.name in self._cancelled:
                        raise Cancelled(f"{order.name} is not wanted any more")
                    ready.append(self._take(each))
            except (ChecksumMismatch, NotHeld):
                unusable = order.shards[len(ready)].rank
                raise
            finally:
                self._tell(Staged(order.name))
            store = open_store(order.directory)
            _check(store, order.job)
            total = sum(len(staging.unique) + len(staging.small) for staging in ready)
            pace = _Pace(total, order.seconds, lambda: order.name not in self._cancelled and self._orders.empty())

            def moved(nbytes: int) -> None:
                if order.name in self._cancelled:
                    raise Cancelled(f"{order.name} is not wanted any more")
                pace.moved(nbytes)

            generation = generation_of(order.name)
            if generation is None:
                raise DurableError(f"{order.name} is no name of a generation")
            for take, staging in zip(order.shards, ready, strict=True):
                small, layout = described(staging.small, f"rank {take.rank}'s copy")
                shard = write_shard(
                    store,
                    order.name,
                    staging.rank,
                    generation,
                    layout,
                    staging.unique,
                    small,
                    moved,
                    staging.verify,
                )
                try:
                    constants = self._constants(store, take, moved)
                except ChecksumMismatch:
                    unusable = constants_of(take.rank)
                    raise
                shards.append(msgspec.structs.replace(shard, constants=constants))
        except Exception as err:  # noqa: BLE001 - see `work`
            error = _one_line(err)
        self._tell(Done(order.name, False, tuple(shards), error, unusable=unusable))

    def _take(self, take: Take) -> Staging:
        if take.rank in self._unstaged:
            raise DurableError(self._unstaged[take.rank])
        if take.rank not in self._staging:  # of another node
            with contextlib.closing(Arena.attach(take.path)) as arena:
                self._staging[take.rank] = Staging(take.rank, arena.info.unique_bytes)
        staging = self._staging[take.rank]
        staging.take(take.path, Version(take.epoch, take.generation))
        return staging

    def _constants(self, store: Store, take: Take, moved: Callable[[int], None]) -> ConstantsFile | None:
        """Written once: what never changes need not be staged, nor looked at again. Raises ChecksumMismatch."""
        if not take.constants:
            return None
        known = self._kept.get(take.constants)
        if known is None or store.size(known.path) != known.nbytes:
            arena = Arena.attach(take.constants)
            try:
                slot = constants_in(arena, take.rank)
                stored = bytes(slot.small[: slot.small_bytes])
                _, layout = described(stored, f"rank {take.rank}'s copy")
                known = self._kept[take.constants] = write_constants(store, layout, slot.unique, moved)
            finally:
                arena.close()
        return known

    def _seal(self, order: Seal) -> None:
        name = order.manifest.name
        try:
            store = open_store(order.directory)
            _check(store, order.job)
            seal(store, order.manifest)
        except (OSError, DurableError) as err:
            self._tell(Done(name, True, (), _one_line(err)))
            return
        except Exception as err:  # noqa: BLE001 - see `work`
            self._tell(Done(name, True, (), _one_line(err), unsure=True))
            return
        try:
            problems = prune(store, name, order.keep)
        except Exception as err:  # noqa: BLE001 - see `work`
            problems = [f"old generations in {store.root} could not be removed: {err}"]
        self._tell(Done(name, True, problems=tuple(problems)))


def constants_in(arena: Arena, rank: int) -> Slot:
    """What never changes of a rank, read and found whole. Raises DurableError, ChecksumMismatch."""
    slot = arena.find(CONSTANT)
    if slot is None and arena.slots[0].damaged:
        raise ChecksumMismatch(f"what never changes of rank {rank} has changed in memory")
    if slot is None:
        raise DurableError(f"the constants of rank {rank} are not in its vault yet")
    try:
        slot.verify()
    except ChecksumMismatch as err:
        raise ChecksumMismatch(f"what never changes of rank {rank} has changed in memory: {err}") from None
    return slot


def _check(store: Store, job: str) -> None:
    store.check()
    if job:
        check_owner(store, job)


def _one_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


def main() -> int:
    """Entry point; ends when stdin does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for signum in DEAF_TO:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF_TO)
    os.nice(_NICE)
    # The first to go when memory runs out: training and vaults matter more.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a driver prints does not get between the answers
    drainer = _Drainer(out)
    worker = threading.Thread(target=drainer.work, name="drain", daemon=True)
    worker.start()
    drainer.read(sys.stdin.buffer)
    worker.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
