"""A worker as a script: what `Session`, `rejoin` and the trainer do, each rank at its own pace."""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.durable import DirectorySource, DurableError, Layout, read_manifest, trailer_of
from deadpool_megatron.recovery import EpochClosed, Redo
from deadpool_megatron.recovery.redo import Calls
from deadpool_megatron.vault import (
    CONSTANT,
    ChecksumMismatch,
    ConstantsWriter,
    NotHeld,
    SlotWriter,
    VaultError,
    Version,
    constants_of,
)
from simulation.durable import CONSTANTS_LAYOUT, LAYOUT
from simulation.world import Pipe, Process

if TYPE_CHECKING:
    from simulation.host import Host

__all__ = ["UNIQUE_BYTES", "Broken", "Rank"]

UNIQUE_BYTES = 4096
_OWN_ERROR_S = 0.5  # as that of the hooks
_PATIENCE_S = 10.0  # as that of `OtherWidth`
_TRIES = 3  # as that of `Frozen`
_TRAILER, _CONSTANTS_TRAILER = trailer_of(LAYOUT), trailer_of(CONSTANTS_LAYOUT)
_STATE = struct.Struct("<qQ")  # generation, value


def state(generation: int, value: int) -> bytes:
    """All of the small state of a shard; its unique state is that again and again."""
    return _STATE.pack(generation, value)


def whole(state: bytes) -> bytes:
    """The unique state."""
    return state * (UNIQUE_BYTES // _STATE.size)


def constants(rank: int) -> bytes:
    """What never changes of a rank."""
    return whole(_STATE.pack(-rank, 1 << 60))


class Broken(Exception):
    """A peer's connection has ended."""


class Dies(Exception):
    """An error of its own ends this worker; ``code``: the job too, with that."""

    def __init__(self, why: str, code: int = 0) -> None:
        super().__init__(why)
        self.code = code


class Leaves(BaseException):
    """All is done: as SystemExit."""


Script = Generator[tuple[float, Callable[[], bool] | None], bool, Any]


class Rank:
    """One worker process. ``rank`` None: parked."""

    def __init__(self, host: Host, worker: Worker) -> None:
        self.host = host
        self.worker = worker
        self.world = host.world
        self.process = Process(host.world, f"pid {worker.pid}")
        self.told = Pipe(host.world, 0.0001, 0.005)
        self._said = Pipe(host.world, 0.0001, 0.005)
        self.rank = worker.rank
        self.pace = host.world.chance.uniform(0.7, 1.4)
        self.joined = host.known.epoch if worker.rank is not None else 0
        self.declared: r.Declare | None = None
        self.declared_epoch = self.joined
        self._stands_by = False
        self._generation: r.Generation | None = None
        self._formed = -1
        self._all_finished = -1
        self._arena: r.ArenaGranted | r.ArenaRefused | None = None
        self._taken: r.TakeOver | None = None
        self._hold: r.Hold | None = None
        self._waits = False  # in a communication
        self._told_to_wait = 0.0
        self.groups = self.joined  # the epoch whose groups it has or forms
        self.writer: SlotWriter | None = None
        self.live: int | None = None
        self._small_generation = -1
        self.value = 0
        self.constants = False  # it has those that training began with
        self._constants_writer: ConstantsWriter | None = None
        self._tries = 0
        self._first = (-1, -1)
        self._resumed = self.joined
        self.finished = False
        self._script: Script | None = None
        self._until: Callable[[], bool] | None = None
        self._token = 0
        self._thinking = False

    # ---- the script's engine

    def start(self) -> None:
        """The process begins."""
        self._script = self._life()
        self.process.later(0.0, self._advance, 0, True)

    def _advance(self, token: int, value: bool, error: BaseException | None = None) -> None:
        if token != self._token or self._script is None:
            return
        self._token += 1
        self._until = None
        try:
            while True:
                if error is not None:
                    seconds, until = self._script.throw(error)
                else:
                    seconds, until = self._script.send(value if self._thinking else None)  # type: ignore[arg-type]
                self._thinking, error = True, None
                if until is not None:
                    try:
                        if until():
                            value = True
                            continue
                    except (EpochClosed, Broken) as err:
                        error = err
                        continue
                self._until = until
                if seconds < 1e9:
                    self.process.later(seconds, self._advance, self._token, False)
                return
        except StopIteration:
            self._script = None
            self.die(0)
        except (Dies, VaultError, Broken, EpochClosed) as err:
            self._script = None
            kind, by_peer, code = type(err).__name__, isinstance(err, Broken), getattr(err, "code", 0)
            code = code if isinstance(code, int) else 0
            why = str(err)
            self.say(r.WorkerFailed(0, 0, None, "training", self.joined, -1, code, kind, why, why, "", by_peer))
            self.die(1)

    def poke(self) -> None:
        """Something has changed that it may wait for."""
        if self._until is None:
            return
        try:
            if self._until():
                self._advance(self._token, True)
        except (EpochClosed, Broken) as err:
            self._advance(self._token, False, err)

    def _pause(self, low: float, high: float) -> Script:
        yield self.world.delay(low, high) * self.pace, None

    def _wait(self, until: Callable[[], bool], seconds: float = 1e12) -> Script:
        return (yield seconds, until)

    # ---- what it says and hears

    def say(self, record: Any) -> None:
        """To its agent."""
        host = self.host
        if self.world.trace is not None:
            self.world.say(f"rank {self.rank} (n{host.node})", record)
        self._said.send(host.process, self._arrive, record)

    def _arrive(self, record: Any) -> None:
        self.host.agent.from_worker(self.worker, record)

    def step(self, step: r.Step, epoch: int, number: int = 0, changed: int = 0) -> None:
        """A step of the protocol."""
        self.say(r.WorkerStep(step, epoch, number, changed))

    def hear(self, packet: bytes) -> None:
        """The watcher thread: as `Session._take`."""
        record = r.decode_to_worker(packet)
        if self.world.trace is not None:
            self.world.say(f"-> rank {self.rank} (n{self.host.node}, {self.worker.pid})", record)
        match record:
            case r.Where():
                self.say(r.Whereabouts(record.query, self._waits))
                return
            case r.Check():
                self.process.later(self.world.delay(0.005, 0.5), self._self_check, record)
                return
            case r.Declare() if record.epoch > self.declared_epoch:
                self.declared_epoch, self.declared = record.epoch, record
                if self._stands_by and self.rank is not None:
                    self.say(r.Arrived(record.epoch, self.rank, None))
            case r.Generation():
                self._generation = record
            case r.Form():
                self._formed = record.epoch
            case r.KeepWaiting():
                self._told_to_wait = self.world.now
            case r.TakeOver():
                self._taken = record
            case r.AllFinished():
                self._all_finished = record.epoch
            case r.ArenaGranted() | r.ArenaRefused():
                self._arena = record
            case r.Hold():
                self._hold = record
        self.poke()

    def _self_check(self, order: r.Check) -> None:
        self.say(r.Checked(order.number, "a wrong result" * self.host.bad))

    def die(self, code: int, silently: bool = False) -> None:
        """The process ends. ``silently``: its machine is gone, so its peers' connections just stay quiet."""
        if not self.process.alive:
            return
        self.process.die()
        self.worker.process.code = code  # type: ignore[attr-defined]
        stands_by = self.worker.standby and any(each is self.worker for each in self.host.crew.beside)
        if code and not self.worker.retired and not stands_by and self.host.alive:
            self.host.cluster.oracle.dies(self.host.node)
        self.world.say(f"rank {self.rank} (n{self.host.node})", f"pid {self.worker.pid} ends with {code}")
        if not silently and self.rank is not None and not (code == 0 and self.finished):
            self.host.cluster.meetings.broken(self)
        worker = self.worker
        self._said.send(self.host.process, self.host.ended, worker)

    # ---- its life

    def _life(self) -> Script:
        rejoining = self.rank is None
        if self.rank is None:
            rehearses = self.worker.rehearses
            yield from self._pause(0.2, 1.5)
            self.step("parked" if rehearses is None else "rehearsed", 0)
            yield from self._wait(lambda: self._taken is not None)
            assert self._taken is not None and rehearses in (None, self._taken.rank)
            self.rank = self._taken.rank
            rejoining = not self._taken.environment
        if not rejoining and self._taken is not None:
            self.joined = self.groups = self._resumed = self._taken.epoch
            self.declared_epoch = max(self.declared_epoch, self.joined)
        if rejoining:
            if rehearses is None:
                yield from self._pause(0.05, 0.3)
            if self.world.chance.random() < 0.7:
                self._stands_by = True
                self.say(r.Arrived(self.declared_epoch, self.rank, None))
            if rehearses is None:
                yield from self._pause(0.1, 0.8)
            while True:  # its data begin where the job stands
                agreed = yield from self._agreed()
                readable = yield from self._is_readable(agreed)
                if readable:
                    break
        else:
            yield from self._pause(0.3, 1.2)
            yield from self._meet("start", -1, 0)
        durable = self.host.cluster.job.durable is not None
        if durable:
            self.say(r.Described(self.rank, 0, 1, b"{}"))
            if not rejoining:
                yield from self._wait(lambda: self._supersede(self.joined) or self._is_agreed(self.joined))
        yield from self._request_arena()
        if not rejoining and self._generation is not None and (self._generation.recut or self._generation.memory):
            yield from self._cut_anew(self._generation)
        elif not rejoining and self._generation is not None and self._generation.generation >= 0:
            yield from self._restore(self._generation)
            if self._generation.constants and (err := self._take_constants()) is not None:
                yield from self._refuse(self._generation, str(err))
        epoch = max(self.joined, self._taken.epoch if self._taken is not None else 0)
        self.say(
            r.Registered(
                0,
                0,
                self.host.cluster.place(self.rank, epoch),
                UNIQUE_BYTES,
                len(self._stored(0, 0)),
                f"groups of {self.host.cluster.oracle.ranks(epoch)}",
                self.host.cluster.can_rescue,
                restarts=self.host.cluster.restarts,
                widths=self.host.cluster.widths if self.rank == 0 else [],
            )
        )
        if not rejoining:
            self.constants = True
            if self._small_generation < 0:
                self.value = self.host.cluster.oracle.value(self.rank, 0, self.joined)
            try:
                yield from self._first_generation()
            except EpochClosed:
                rejoining = True
        redo = Redo(self._train, self._recover)  # type: ignore[arg-type] - scripts in the place of functions
        try:
            yield from self._carry_out(redo.training(rejoining))
            yield from self._carry_out(redo.doing(self._save))
            yield from self._carry_out(redo.doing(self._all_through))
        except Leaves:
            return
        self.finished = True
        yield from self._pause(0.1, 0.5)

    # ---- what the hooks do with `Redo`

    def _carry_out(self, calls: Calls) -> Script:
        """As `recovery.redo._do`."""
        try:
            call = next(calls)
            while True:
                try:
                    result = yield from call()
                except (EpochClosed, Broken, Dies, VaultError, Leaves) as err:
                    call = calls.send((None, err))
                else:
                    call = calls.send((result, None))
        except StopIteration:
            return

    def _train(self) -> Script:
        while self._small_generation < self.host.cluster.iterations:
            yield from self._iteration(self._small_generation)

    def _recover(self, error: BaseException | None) -> Script:
        purpose = yield from self._rejoin(error)
        return self._save_and_leave if purpose == "save" else None

    def _save_and_leave(self) -> Script:
        """As `Hooks._save_and_leave`."""
        failing = self.host.cluster.saving_fails
        yield from self._pause(0.2, 1.0)
        if failing == "error":
            raise Dies("no space left on device")
        if failing:
            yield from self._wait(lambda: self._supersede(self.joined))
        self.say(r.ShardReady(self.joined, self._small_generation, "dir"))
        yield from self._wait(lambda: self._supersede(self.joined), self.host.cluster.job.deadlines.build)
        raise Leaves

    def _save(self) -> Script:
        """Megatron's last checkpoint: each rank writes its part, then rank 0 says that all of it is there."""
        cluster, iterations = self.host.cluster, self.host.cluster.iterations
        if self._generation is not None and iterations <= self._generation.done.get("save", -1):
            return
        assert self.rank is not None
        self._check()
        yield from self._pause(0.05, 0.6)
        if cluster.full_for_a_moment:
            cluster.full_for_a_moment = False
            raise Dies("no space left for a moment")
        cluster.oracle.writes(self)
        yield from self._meet("parts", iterations, 0)
        if self.rank == 0:
            yield from self._pause(0.005, 0.05)
            cluster.oracle.tracks(self)
        yield from self._meet("tracker", iterations, 0)
        self._check()
        if self.rank == cluster.oracle.ranks(self.joined) - 1:
            self.say(r.SideEffect(0, self.rank, self.joined, iterations, "save"))

    def _all_through(self) -> Script:
        self.host.cluster.oracle.finished(self)
        self.step("finished", self.joined, self._small_generation)
        self.host.cluster.oracle.through(self)
        yield from self._wait(lambda: self._supersede(self.joined) or self._all_finished >= self.joined)

    def _agreed(self) -> Script:
        yield from self._wait(lambda: self._generation is not None and self._generation.epoch == self.declared_epoch)
        return self._generation

    def _is_readable(self, agreed: r.Generation) -> Script:
        """As `Hooks._build_iterators`: the small state of the agreed generation is read."""
        arena = self.host.shards.vault.arena(self.rank, "own") if self.rank is not None else None
        slot = arena.find(Version(agreed.version_epoch, agreed.generation)) if arena is not None else None
        try:
            if slot is None:
                raise VaultError("not held")
            slot.verify()
            return True
        except VaultError as err:
            self.say(r.Unreadable(agreed.epoch, agreed.generation, agreed.version_epoch, str(err)))
            yield from self._await_newer(agreed.epoch, "the recovery was given up")
        return False

    @property
    def _patience(self) -> float:
        deadlines = self.host.cluster.job.deadlines
        return deadlines.lease + 5.0 + deadlines.form

    def _supersede(self, epoch: int) -> bool:
        if self.declared_epoch > epoch:
            raise EpochClosed
        return False

    def _request_arena(self) -> Script:
        assert self.rank is not None
        self.writer = SlotWriter((yield from self._memory(self.rank, len(self._stored(0, 0)), LAYOUT)))
        if self.host.cluster.constants:
            self._constants_writer = ConstantsWriter(
                (yield from self._memory(constants_of(self.rank), len(_CONSTANTS_TRAILER), CONSTANTS_LAYOUT))
            )

    def _stored(self, generation: int, value: int) -> bytes:
        """The small state as copies have it."""
        return _STATE.pack(generation, value) + (_TRAILER if self.host.cluster.job.durable is not None else b"")

    def _memory(self, holder: int, small_bytes: int, layout: Layout) -> Script:
        self._arena = None
        self.say(r.ArenaRequest(holder, UNIQUE_BYTES, small_bytes, layout=layout.digest))
        if not (yield from self._wait(lambda: self._arena is not None, 120.0)):
            raise Dies("no memory")
        if isinstance(self._arena, r.ArenaRefused):
            raise Dies(self._arena.message)
        arena = self.host.shards.vault.arena(holder, "own")
        if arena is None:
            raise Dies("its memory was dropped")
        return arena

    def _keep_constants(self) -> None:
        """As `Frozen.keep`."""
        writer = self._constants_writer
        if writer is not None and self.rank is not None and writer.begin(_CONSTANTS_TRAILER) is not None:
            writer.buffer[:] = np.frombuffer(constants(self.rank), np.uint8)
            writer.complete()
            self._ring()

    def _take_constants(self) -> VaultError | None:
        """As `Frozen.take`, where the seed does not give them."""
        if self._constants_writer is None or self.constants:
            return None
        assert self.rank is not None
        try:
            _, there = self._constants_writer.read(CONSTANT)
        except VaultError as err:
            return err
        assert bytes(there) == constants(self.rank), "wrong constants"
        self.constants = True
        return None

    def _first_generation(self) -> Script:
        assert self.writer is not None
        begin = max(0, self._small_generation)
        self._first, self._small_generation, self.live = (self.joined, begin), begin, begin
        if self.writer.arena.find(Version(*self._first)) is None:  # a durable one is there already
            self._open(begin)
            self._complete()
        self._keep_constants()
        end = self.world.now + self.host.cluster.job.deadlines.abort
        while self.writer.kept is None and self.world.now < end:
            self._check()
            yield 0.05, None

    # ---- training

    def _check(self) -> None:
        if self.declared_epoch > self.joined:
            raise EpochClosed

    def _open(self, generation: int) -> None:
        assert self.writer is not None
        if self.writer.open(self.joined, generation, self._stored(generation, self.value)) is not None:
            self._ring()

    def _complete(self) -> None:
        assert self.writer is not None
        if self.writer.slot is not None:
            unique = whole(_STATE.pack(self._small_generation, self.value))
            self.writer.buffer[:] = np.frombuffer(unique, np.uint8)
            self.writer.complete()
            self._ring()

    def _ring(self) -> None:
        self._said.send(self.host.process, self.host.agent.rang, self.worker)

    def _iteration(self, iteration: int) -> Script:
        assert self.rank is not None
        page, cluster = self.worker.page, self.host.cluster
        self._check()
        page.enter(iteration)
        self.live = iteration
        cluster.oracle.begins(self, iteration)
        hold = self._hold
        if hold is not None and hold.epoch == self.joined and iteration >= hold.iteration:
            yield from self._hold_still(hold, iteration)
        if self._first != (self.joined, iteration):
            self._open(iteration)
        if self._resumed != self.joined:
            self._resumed = self.joined
            self.step("resumed", self.joined, iteration)
        begun = self.world.now
        yield from self._pause(0.05, 0.12)
        page.beat()
        self._check()
        copied_early = self.world.chance.random() < 0.5
        if copied_early:
            self._complete()
        yield from self._pause(0.02, 0.1)
        page.beat()
        self._check()
        total = yield from self._meet("gradients", iteration, self.value)
        self._complete()
        self._check()
        self.live = None
        cluster.oracle.steps(self, iteration)
        yield from self._pause(0.001, 0.05)
        self.value = cluster.oracle.after(self.value, total)
        yield from self._meet("parameters", iteration, 0)
        page.leave()
        self._small_generation = iteration + 1
        if self.rank == cluster.oracle.ranks(self.joined) - 1:
            seconds = self.world.now - begun
            self.say(r.Iteration(0, self.rank, self.joined, iteration, {"lm loss": "0x1p-1"}, None, seconds, 0.0, 0, 0))
        yield from self._pause(0.0005, 0.03)

    def _hold_still(self, hold: r.Hold, iteration: int) -> Script:
        missed = iteration != hold.iteration
        if not missed:
            if self._first != (self.joined, iteration):
                self._open(iteration)
                self._first = (self.joined, iteration)
            self._complete()
        self.say(r.Held(self.joined, iteration, missed))
        yield from self._wait(lambda: self._supersede(self.joined))

    def _meet(self, what: str, iteration: int, value: int) -> Script:
        """A collective of all ranks of the epoch; the sum of their values."""
        epoch = self.groups
        meeting = self.host.cluster.meetings.enter(self, epoch, what, iteration, value)
        self._waits = True
        try:
            yield from self._wait(lambda: self._supersede(epoch) or meeting.over(self))
        finally:
            self._waits = False
        return meeting.total

    # ---- the way back, as `recovery.protocol.rejoin`

    def _rejoin(self, error: BaseException | None) -> Script:
        assert self.rank is not None
        deadlines = self.host.cluster.job.deadlines
        if isinstance(error, Broken) and self.declared_epoch <= self.joined:
            self.say(r.PeerError(self.joined, 0, self.rank, "connection closed by peer"))
        patience = _OWN_ERROR_S if isinstance(error, Dies) else deadlines.build if error is None else self._patience
        if not (yield from self._declared_after(self.joined, patience)):
            raise error or Dies("nothing was declared")
        while True:
            epoch = self.declared_epoch
            try:
                return (yield from self._take_part(epoch))
            except EpochClosed:
                continue
            except Broken:
                if self.declared_epoch <= epoch:
                    self.say(r.PeerError(epoch, 0, self.rank, "no groups"))
                    yield from self._await_newer(epoch, "no groups")

    def _await_newer(self, epoch: int, why: str) -> Script:
        if not (yield from self._declared_after(epoch, self._patience)):
            raise Dies(why)

    def _declared_after(self, epoch: int, patience: float) -> Script:
        """As `Session.wait_newer`."""
        begun = self.world.now
        while (left := max(begun, self._told_to_wait) + patience - self.world.now) > 0:
            if (yield from self._wait(lambda: self.declared_epoch > epoch, left)):
                return True
        return False

    def _take_part(self, epoch: int) -> Script:
        assert self.rank is not None and self.declared is not None
        purpose = self.declared.purpose
        yield from self._pause(0.005, 0.1)
        if self.writer is not None:
            self.writer.abandon()
        self.worker.page.leave()
        self._stands_by = False
        self.say(r.Arrived(epoch, self.rank, self.live))
        yield from self._wait(lambda: self._supersede(epoch) or self._is_agreed(epoch))
        assert self._generation is not None
        yield from self._restore(self._generation)
        self.step("ready", epoch)
        yield from self._wait(lambda: self._formed == epoch or self._supersede(epoch))
        self.groups = epoch
        yield from self._pause(0.005, 0.1)
        yield from self._meet("form", 0, 0)
        self.step("formed", epoch, 4, 4)
        yield from self._meet("synchronize", 0, 0)
        if (err := self._take_constants()) is not None:  # and there is no replica
            self._tries += 1
            if self._tries <= _TRIES:
                raise Broken
            self.host.cluster.oracle.without_constants(self)
            raise Dies(f"no vault has the constants of rank {self.rank}: {err}", Exit.UNEQUAL)
        self._keep_constants()
        self.joined = epoch
        self.step("restored", epoch)
        yield from self._meet("prove", 0, 0)
        if self.rank == 0:
            self.say(r.Compared(0, 0, self.declared_epoch, self._small_generation, 0.001, [], True))
        return purpose

    def _is_agreed(self, epoch: int) -> bool:
        return self._generation is not None and self._generation.epoch == epoch

    def _refuse(self, agreed: r.Generation, why: str) -> Script:
        """As `Session.refuse`."""
        self.say(r.Unreadable(agreed.epoch, agreed.generation, agreed.version_epoch, why))
        yield from self._await_newer(agreed.epoch, "unreadable")
        raise EpochClosed

    def _cut_anew(self, agreed: r.Generation) -> Script:
        """As `OtherWidth`: out of the shards of all ranks that there were."""
        cluster, until = self.host.cluster, self.world.now + _PATIENCE_S
        assert self.rank is not None
        while True:
            yield from self._pause(0.005, 0.1)
            try:
                smalls = self._in_memory(agreed.memory) if agreed.memory else self._in_directory(agreed.recut)
                states = [_STATE.unpack(small[: _STATE.size]) for small in smalls]
                break
            except (DurableError, OSError) as err:
                if isinstance(err, DurableError) or self.world.now > until:
                    yield from self._refuse(agreed, str(err))
                yield 0.5, None
            except VaultError as err:
                if not (err.broken or isinstance(err, ChecksumMismatch)) or self.world.now > until:
                    yield from self._refuse(agreed, str(err))
                yield 0.5, None
        assert all(generation == agreed.generation for generation, _ in states), "wrong shards"
        self.value = cluster.oracle.recut([value for _, value in states], self.rank, cluster.oracle.ranks(self.joined))
        self.live = self._small_generation = agreed.generation
        cluster.oracle.restored(self, agreed.generation)

    def _in_directory(self, name: str) -> list[bytes]:
        """The small states of all ranks of a durable generation."""
        directory = self.host.cluster.directory
        source = DirectorySource(directory, read_manifest(directory, name))
        return [source.small(coordinate.rank) for coordinate in source.coordinates]

    def _in_memory(self, file: str) -> list[bytes]:
        """The same, of one in the nodes' memory."""
        told = msgspec.msgpack.decode(self.host.cluster.files[file], type=r.InVaults)
        version = Version(told.base_epoch, told.generation)
        smalls = []
        for coordinate in told.coordinates:
            why: VaultError = NotHeld(f"nobody holds rank {coordinate.rank}")
            for place in told.holders[coordinate.rank]:
                giver = self.host.cluster.at(place.host)
                try:
                    if giver is not self.host:
                        self.host.reach(giver)
                    giver.shards.server.keeper.check_epoch(told.epoch, "a base")
                    _, slot = giver.shards.vault.find(coordinate.rank, version)
                    slot.verify()
                    if self.host.cluster.network.garbles():
                        raise ChecksumMismatch("what was read has arrived changed")
                except VaultError as err:
                    why = err if isinstance(why, NotHeld) else why
                else:
                    smalls.append(bytes(slot.small[: slot.small_bytes]))
                    break
            else:
                raise why
        return smalls

    def _restore(self, agreed: r.Generation) -> Script:
        generation = agreed.generation
        if not (self.live == generation and self._small_generation == generation):
            yield from self._pause(0.005, 0.05)
            assert self.writer is not None
            try:
                small, unique = self.writer.read(Version(agreed.version_epoch, generation))
            except VaultError as err:
                yield from self._refuse(agreed, str(err))
            there = _STATE.unpack(small[: _STATE.size])
            assert bytes(unique) == whole(_STATE.pack(*there)) and there[0] == generation, "wrong bytes"
            self.value = there[1]
        self.live = self._small_generation = generation
        self._hold = None if self._hold is not None and self._hold.epoch < agreed.epoch else self._hold
        self.host.cluster.oracle.restored(self, generation)
