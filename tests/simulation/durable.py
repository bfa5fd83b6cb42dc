"""The durable directory and what writes to it: production files, manifests, staging, lease; a drainer in virtual time.

Faults of the directory last for a while or for good: it is slow, full, cannot be read, has damaged files, or is another
job's.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import msgspec

from deadpool_megatron.cluster.agent.durable import NodeDurability
from deadpool_megatron.durable import (
    Answer,
    Cancel,
    Done,
    Drain,
    DrainerProcess,
    DurableError,
    Item,
    Layout,
    Seal,
    ShardFile,
    Stage,
    Staged,
    Take,
)
from deadpool_megatron.durable.drainer import constants_in
from deadpool_megatron.durable.files import prune, remove_attempt, seal, write_constants, write_shard
from deadpool_megatron.durable.format import MANIFEST, ConstantsFile, described, generation_of
from deadpool_megatron.durable.lease import Owner, _decode, _encode, check_owner
from deadpool_megatron.durable.orders import Unstage
from deadpool_megatron.durable.staging import Staging
from deadpool_megatron.durable.store import Store
from deadpool_megatron.vault import ChecksumMismatch, VaultError, Version, constants_of
from simulation.world import Process, World

if TYPE_CHECKING:
    from simulation.host import Host

__all__ = ["CONSTANTS_LAYOUT", "DIRECTORY", "LAYOUT", "OTHER_JOB", "Directory", "SimulatedDurability"]

DIRECTORY = "/durable"
_UNIQUE = 4096
OTHER_JOB = _encode(Owner("other", "elsewhere", "elsewhere", (), "", ""))
LAYOUT = Layout(_UNIQUE, "same", (Item("state", "U8", (_UNIQUE,), 0, _UNIQUE),))
CONSTANTS_LAYOUT = Layout(_UNIQUE, "never changes", (Item("frozen", "U8", (_UNIQUE,), 0, _UNIQUE),))


class _Writing:
    def __init__(self, directory: Directory, name: str) -> None:
        self._directory = directory
        self._name = name
        self._data: list[bytes] = []

    def write(self, data: memoryview | bytes) -> None:
        if self._directory.full:
            raise OSError(errno.ENOSPC, "No space left on device", self._name)
        self._data.append(bytes(data))

    def commit(self) -> None:
        self._directory.changes(self._name)
        self._directory.data[self._name] = b"".join(self._data)

    def abort(self) -> None:
        return


class Directory(Store):
    """Files in a dictionary.

    Attributes:
        full: nothing more can be written.
        unreadable: nothing can be read.
        slow: seconds that each operation takes, at most.
        beat_at: by job, when it renewed its ownership the last time.
    """

    def __init__(self, world: World, job: str, there: Directory | None = None) -> None:
        """``there``: the same directory as another job sees it."""
        self.root = DIRECTORY
        self.data: dict[str, bytes] = {} if there is None else there.data
        self.beat_at: dict[str, float] = {} if there is None else there.beat_at
        self._world = world
        self._job = job
        self.full = self.unreadable = False
        self.slow = 0.05

    @property
    def owner(self) -> Owner | None:
        """Whose it is."""
        newest = max(self.files(), default=None)
        return None if newest is None else _decode(self.data[newest])

    @property
    def taken(self) -> bool:
        """It is another job's."""
        owner = self.owner
        return owner is not None and owner.job != self._job

    def check(self) -> None:
        return

    def create(self, name: str) -> _Writing:
        return _Writing(self, name)

    def open(self, name: str) -> IO[bytes]:
        if self.unreadable:
            raise OSError(errno.EIO, "Input/output error", name)
        if name not in self.data:
            raise FileNotFoundError(errno.ENOENT, "No such file", name)
        return io.BytesIO(self.data[name])

    def size(self, name: str) -> int | None:
        return len(self.data[name]) if name in self.data else None

    def directories(self) -> list[str]:
        return sorted({name.split("/")[0] for name in self.data if "/" in name})

    def files(self) -> list[str]:
        return sorted(name for name in self.data if "/" not in name)

    def claim(self, name: str, data: bytes) -> bool:
        if name in self.data:
            return False
        self.data[name] = data
        self.beat_at[self._job] = self._world.now
        return True

    def overwrite(self, name: str, data: bytes) -> None:
        if name not in self.data:
            raise FileNotFoundError(errno.ENOENT, "No such file", name)
        self.data[name] = data
        self.beat_at[self._job] = self._world.now

    def changes(self, name: str) -> None:
        """A generation appears, or goes."""
        if name.endswith(MANIFEST) and self.taken:
            raise AssertionError(f"{name} is written or removed in another job's directory")

    def remove_file(self, name: str) -> None:
        self.changes(name)
        self.data.pop(name, None)

    def remove(self, directory: str) -> None:
        for name in [name for name in self.data if name.startswith(f"{directory}/")]:
            del self.data[name]


class _Drainer(DrainerProcess):
    """One node's drainer: as `durable.drainer`, an order at a time, in virtual time."""

    def __init__(self, host: Host, on_answer: Callable[[Answer], None]) -> None:
        self._host = host
        self._answer = on_answer
        self._process: Process | None = None  # type: ignore[assignment]
        self._knows: dict[int, Stage] = {}
        self._given: dict[tuple[str, bool], Drain | Seal] = {}
        self._orders: list[Any] = []
        self._busy = False
        self._cancelled: set[str] = set()
        self._staging: dict[int, Staging] = {}
        self._kept: dict[str, ConstantsFile] = {}
        self._ranks = 0

    # ---- the agent's side

    def tell(self, order: Stage) -> None:
        if self._knows.get(order.rank) != order:
            self._knows[order.rank] = order
            self._ensure()
            self._put(order)

    def forget(self, rank: int) -> None:
        if self._knows.pop(rank, None) is not None and self._process is not None:
            self._put(Unstage(rank))

    def give(self, order: Drain | Seal) -> None:
        name = order.name if isinstance(order, Drain) else order.manifest.name
        self._given[name, isinstance(order, Seal)] = order
        self._ensure()
        self._put(order)

    def cancel(self, order: Cancel) -> None:
        if self._process is not None:
            self._cancelled.add(order.name)
            self._put(order)

    def close(self) -> None:
        if self._process is not None:
            self._process.die()

    def kill(self) -> None:
        self.die()

    def die(self) -> None:
        """Its process is killed; the agent answers for it."""
        if self._process is None:
            return
        self._process.die()
        self._process = None
        self._orders.clear()
        self._staging.clear()
        self._kept.clear()
        self._busy = False
        given, self._given = list(self._given), {}
        for name, sealed in given:
            self._answer(Staged(name))
            self._answer(Done(name, sealed, (), "the drainer of this node ended (-9)", unsure=sealed))

    def _ensure(self) -> None:
        if self._process is None:
            self._process = Process(self._host.world, f"drainer of n{self._host.node}")
            self._orders.extend(self._knows.values())
            self._host.drainers.append(self._process)

    def _put(self, order: Any) -> None:
        if order not in self._orders or isinstance(order, Cancel):
            self._orders.append(order)
        self._next()

    # ---- the process

    def _later(self, call: Callable[..., None], *args: Any) -> None:
        process, host = self._process, self._host
        assert process is not None
        process.later(host.cluster.draws.uniform(0.001, host.cluster.directory.slow), call, *args)

    def _next(self) -> None:
        if not self._busy and self._orders:
            self._busy = True
            self._later(self._carry_out, self._orders.pop(0))

    def _end(self, answer: Done | None = None) -> None:
        self._busy = False
        if answer is not None:
            self._given.pop((answer.name, answer.sealed), None)
            self._answer(answer)
        self._next()

    def _carry_out(self, order: Any) -> None:
        store = self._host.cluster.directory
        if isinstance(order, Stage | Drain) and order.ranks != self._ranks:  # as `durable.drainer`
            self._ranks = order.ranks
            self._staging.clear()
            self._kept.clear()
        try:
            match order:
                case Stage():
                    self._staging[order.rank] = Staging(order.rank, order.nbytes)
                case Unstage():
                    self._staging.pop(order.rank, None)
                case Drain():
                    self._drain(order)
                    return
                case Cancel():
                    self._cancelled.discard(order.name)
                    if order.remove:
                        check_owner(store, order.job)
                        remove_attempt(store, order.name)
                case Seal():
                    self._seal(order)
                    return
        except (OSError, VaultError, DurableError):
            pass
        self._end()

    def _drain(self, order: Drain) -> None:
        store, error, unusable = self._host.cluster.directory, "", -1
        try:
            for take in order.shards:
                unusable = take.rank
                if order.name in self._cancelled:
                    raise DurableError(f"{order.name} is not wanted")
                arena = self._host.shards.vault.arena(take.rank, "own")
                if arena is None:
                    raise VaultError(f"no memory of rank {take.rank} is here")
                if take.rank not in self._staging:
                    self._staging[take.rank] = Staging(take.rank, arena.info.unique_bytes)
                self._staging[take.rank].copy(arena, Version(take.epoch, take.generation))
            unusable = -1
            check_owner(store, order.job)
        except (OSError, VaultError, DurableError) as err:
            error = str(err)
        self._answer(Staged(order.name))
        if error:
            unusable = unusable if "in memory" in error or "any more" in error else -1
            self._end(Done(order.name, False, (), error, unusable=unusable))
        else:
            self._later(self._write, order, 0, [])

    def _write(self, order: Drain, index: int, shards: list[ShardFile]) -> None:
        store, generation = self._host.cluster.directory, generation_of(order.name)
        if index == len(order.shards):
            self._end(Done(order.name, False, tuple(shards)))
            return
        try:
            if order.name in self._cancelled:
                raise DurableError(f"{order.name} is not wanted any more")
            assert generation is not None
            take = order.shards[index]
            staging = self._staging[take.rank]
            small, layout = described(staging.small, f"rank {take.rank}'s copy")
            shard = write_shard(store, order.name, staging.rank, generation, layout, staging.unique, small)
            constants = self._constants(store, take)
            shards.append(msgspec.structs.replace(shard, constants=constants))
        except ChecksumMismatch as err:
            self._end(Done(order.name, False, (), str(err), unusable=constants_of(take.rank)))
            return
        except (OSError, VaultError, DurableError) as err:
            self._end(Done(order.name, False, (), str(err)))
            return
        self._later(self._write, order, index + 1, shards)

    def _constants(self, store: Directory, take: Take) -> ConstantsFile | None:
        """As `durable.drainer`."""
        if not take.constants:
            return None
        holder = constants_of(take.rank)
        known = self._kept.get(take.constants)
        if known is None or store.size(known.path) != known.nbytes:
            arena = self._host.shards.vault.arena(holder, "own")
            if arena is None:
                raise DurableError(f"the memory of rank {take.rank}'s constants is gone")
            slot = constants_in(arena, take.rank)
            stored = bytes(slot.small[: slot.small_bytes])
            _, layout = described(stored, f"rank {take.rank}'s copy")
            known = self._kept[take.constants] = write_constants(store, layout, slot.unique)
        return known

    def _seal(self, order: Seal) -> None:
        store, name = self._host.cluster.directory, order.manifest.name
        try:
            check_owner(store, order.job)
            seal(store, order.manifest)
        except (OSError, DurableError) as err:
            self._end(Done(name, True, (), str(err)))
            return
        self._end(Done(name, True, problems=tuple(prune(store, name, order.keep))))


class SimulatedDurability(NodeDurability):
    """Of one node: threads and processes in virtual time."""

    def __init__(self, host: Host, *args: Any) -> None:
        self._host = host
        host.durability = self
        super().__init__(*args)

    def _make_drainer(self) -> _Drainer:
        return _Drainer(self._host, self._tell)

    def _store(self) -> Store:
        return self._host.cluster.directory

    def _now(self) -> float:
        return self._host.world.now

    def _publish(self, data: bytes) -> str:
        files = self._host.cluster.files
        files[name := f"{len(files)}"] = data
        return name

    def _in_background(self, name: str, work: Callable[[], float | None]) -> None:
        host = self._host

        def run() -> None:
            if (pause := work()) is not None:
                host.process.later(pause, run)

        host.process.later(host.cluster.draws.uniform(0.001, host.cluster.directory.slow), run)

    def kill_drainer(self) -> None:
        """SIGKILL."""
        drainer = self._drainer
        assert isinstance(drainer, _Drainer)
        drainer.die()
