"""A node's shards: production `Shards`, `Vault`, `Keeper` and discipline; only bytes on their way are played here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import xxhash

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.fetching import Attempts, Search
from deadpool_megatron.cluster.agent.shards import FetchDone, Looked, Shards
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.vault import (
    CONSTANT,
    ChecksumMismatch,
    Kind,
    NotHeld,
    Piece,
    RebuildFailed,
    Scratch,
    StaleEpoch,
    Stripes,
    Target,
    Vault,
    VaultError,
    Version,
    WordPlan,
    constants_of,
)
from deadpool_megatron.vault.arena import Arena, Slot, _header
from deadpool_megatron.vault.coder import Coder
from deadpool_megatron.vault.errors import TransferFailed
from deadpool_megatron.vault.frames import Begin, Share
from deadpool_megatron.vault.intake import Intake
from deadpool_megatron.vault.keeper import Keeper
from deadpool_megatron.vault.leftovers import PAGE
from deadpool_megatron.vault.rebuild import decode_part, record_of
from deadpool_megatron.vault.sender import next_slot
from deadpool_megatron.vault.stripes import Filling, PartOf, cut, parts_of
from deadpool_megatron.vault.transfer import finish, own_copy, own_slot, read_doubted
from deadpool_megatron.vault.version import EMPTY, unpack

if TYPE_CHECKING:
    from simulation.host import Host

__all__ = ["CHUNK", "SimulatedShards"]

CHUNK = 4096
PARITY_CHUNK = 1024  # so that a part has several
_Parts = Sequence[Sequence[r.Share]]
_BACKOFF_S = (0.1, 2.0)
_CONNECT_S = 1.0


class _Server:
    """`VaultServer` without its sockets."""

    def __init__(self, vault: Vault, stripes: Stripes | None) -> None:
        self._vault = vault
        self.keeper = Keeper(vault, stripes)
        self.writers: dict[object, object] = {}  # by copy or part, who writes it here: the newest connection alone
        self.port = 1

    def set_epoch(self, epoch: int) -> None:
        self._vault.set_epoch(epoch)

    def set_plan(self, unique_bytes: Mapping[int, int | None]) -> None:
        self.keeper.plan = dict(unique_bytes)


@dataclass(frozen=True, slots=True)
class _Landing:
    """Where at a keeper a shard, or a part of one, goes: ``filling`` for a part."""

    keeper: Host
    what: object
    token: object
    into: Slot
    turn: int
    filling: Filling | None = None


@dataclass(eq=False, slots=True)
class _Sender:
    """`Sender` without its thread: one rank's shards to one target."""

    rank: int
    target: Target | None = None
    aim: int = 0
    busy: bool = False
    pause: float = _BACKOFF_S[0]
    done: dict[Slot, int] = field(default_factory=dict)
    wait: tuple[Slot, int, Callable[[], None]] | None = None  # for the rest of a slot


class _Replicator:
    """`Replicator` without its threads: chooses by `next_slot`, and tells when a version is at all targets."""

    def __init__(self, host: Host, vault: Vault, told: Callable[[int, int, int], None]) -> None:
        self._host = host
        self._vault = vault
        self._told = told
        self._senders: dict[int, list[_Sender]] = {}
        self._epoch = 0
        self._rung: set[int] = set()

    def set_targets(self, epoch: int, targets: Mapping[int, Sequence[Target]]) -> None:
        self._epoch = epoch
        for rank in sorted({*self._senders, *targets}):
            wanted = targets.get(rank, ())
            senders = self._senders.setdefault(rank, [])
            while len(senders) < len(wanted):
                senders.append(_Sender(rank))
            for index, sender in enumerate(senders):
                sender.target = wanted[index] if index < len(wanted) else None
                sender.aim += 1
                sender.done, sender.busy, sender.wait, sender.pause = {}, False, None, _BACKOFF_S[0]
            arena = self._vault.arena(rank, "own")
            for slot in arena.slots if arena is not None else ():
                slot.peer_turn = 0
        for rank in targets:
            self.notify(rank)

    def keep_only(self, ranks: Collection[int]) -> None:
        for rank in {*self._senders} - {*ranks}:
            for sender in self._senders.pop(rank):
                sender.target = None
                sender.aim += 1

    def notify(self, rank: int) -> None:
        if rank not in self._rung:
            self._rung.add(rank)
            self._host.later(0.0005, 0.01, self._sum, rank)

    def _sum(self, rank: int) -> None:
        self._rung.discard(rank)
        self._vault.checksum(rank)
        for sender in self._senders.get(rank, ()):
            self._wake(sender)

    def _wake(self, sender: _Sender) -> None:
        if sender.wait is not None:
            slot, turn, go_on = sender.wait
            if slot.turn != turn:
                sender.wait, sender.busy = None, False  # opened again: given up
            elif slot.own_turn == turn:
                sender.wait = None
                go_on()
                return
            else:
                return
        if sender.busy or sender.target is None:
            return
        arena = self._vault.arena(sender.rank, "own")
        slot = next_slot(arena, sender.done) if arena is not None else None
        if arena is None or slot is None or slot.small_bytes == EMPTY:
            return
        sender.busy = True
        self._host.later(0.001, 0.02, self._offer, sender, sender.aim, arena, slot, slot.turn)

    def _again(self, sender: _Sender, aim: int) -> None:
        if sender.aim == aim:
            sender.busy = False
            self._wake(sender)

    def _failed(self, sender: _Sender, slot: Slot, err: VaultError) -> None:
        if isinstance(err, ChecksumMismatch):
            slot.recheck()
        self._host.world.say(f"n{self._host.node}", f"rank {sender.rank} not sent: {err}")
        pause, sender.pause = sender.pause, min(2 * sender.pause, _BACKOFF_S[1])
        self._host.process.later(pause, self._again, sender, sender.aim)

    def _offer(self, sender: _Sender, aim: int, arena: Arena, slot: Slot, turn: int) -> None:
        if sender.aim != aim or sender.target is None:
            return
        version, small_bytes = unpack(slot.begin), slot.small_bytes
        if slot.turn != turn or version is None or small_bytes == EMPTY:
            self._again(sender, aim)
            return
        host, vault, info = self._host, self._vault, arena.info
        keeper = host.cluster.at(sender.target.host)
        try:
            host.reach(keeper)
            server, part, token = keeper.shards.server, sender.target.part, object()
            if part is None:
                begin = Begin(
                    self._epoch, sender.rank, *version, info.unique_bytes, info.small_capacity, small_bytes,
                    arena.chunk_bytes, vault.kept, vault.floor,
                )  # fmt: skip
                server.keeper.check(begin)
                into = server.keeper.open(begin)
                where = None if into is None else _Landing(keeper, sender.rank, token, into, into.turn)
            else:
                share = Share(
                    self._epoch, part.word, part.part, sender.rank, *version, info.unique_bytes, small_bytes,
                    arena.chunk_bytes, vault.kept, vault.floor,
                )  # fmt: skip
                filling = server.keeper.open_share(share, server.keeper.check_share(share))
                where = None
                if filling is not None:
                    what = (part.word, part.part, sender.rank)
                    where = _Landing(keeper, what, token, filling.slot, filling.slot.turn, filling)
        except VaultError as err:
            self._failed(sender, slot, err)
            return
        if where is None:
            self._stored(sender, aim, slot, turn, version)
            return
        server.writers[where.what] = token
        epoch = self._epoch

        def go_on() -> None:
            host.later(0.002, 0.05, self._arrive, sender, aim, epoch, slot, turn, version, where)

        if slot.own_turn == turn:
            go_on()
        else:
            sender.wait = (slot, turn, go_on)

    def _arrive(
        self, sender: _Sender, aim: int, epoch: int, slot: Slot, turn: int, version: Version, where: _Landing
    ) -> None:
        keeper, into = where.keeper, where.into
        if sender.aim != aim:
            return
        if slot.turn != turn:
            self._again(sender, aim)
            return
        try:
            self._host.reach(keeper)
            server = keeper.shards.server
            server.keeper.check_epoch(epoch, f"shard of rank {sender.rank}")
            if server.writers.get(where.what) is not where.token or into.turn != where.turn:
                raise TransferFailed("another connection has taken over")
            self._host.cluster.oracle.kept(keeper, sender.rank, version, epoch)
            if where.filling is not None:
                self._add(slot, sender, where.filling)
            else:
                _copy_bytes(slot, into)
                into.verify(slot.small_bytes)
                into.mark_complete()
                into.seal()
        except VaultError as err:
            self._failed(sender, slot, err)
            return
        self._stored(sender, aim, slot, turn, version)

    def _add(self, slot: Slot, sender: _Sender, filling: Filling) -> None:
        """A part, entry by entry, from where the keeper stands; a connection that breaks leaves what is in."""
        part = sender.target.part if sender.target is not None else None
        assert part is not None
        first = cut(slot.chunks, part.part, part.parts).start
        for entry in range(filling.done(part.part), filling.entries(part.part)):
            data = slot.chunk(first + entry - 1) if entry else slot.small[: slot.small_bytes]
            filling.add(part.part, entry, data, slot.sums[first + entry if entry else 0])
            if self._host.cluster.network.breaks():
                raise TransferFailed("connection reset")
        filling.complete(part.part)

    def _stored(self, sender: _Sender, aim: int, slot: Slot, turn: int, version: Version) -> None:
        if slot.own_turn != turn and slot.turn == turn:
            sender.wait = (slot, turn, lambda: self._stored(sender, aim, slot, turn, version))
            return
        if sender.aim == aim and slot.turn == turn:
            sender.done[slot], sender.pause = turn, _BACKOFF_S[0]
            aimed = [each for each in self._senders[sender.rank] if each.target is not None]
            if slot.peer_turn != turn and all(each.done.get(slot) == turn for each in aimed):
                slot.peer_turn = turn
                self._told(sender.rank, *version)
        self._again(sender, aim)


def _copy_bytes(source: Slot, into: Slot) -> None:
    small = source.small_bytes
    into.small[:small] = source.small[:small]
    into.unique[:] = source.unique
    into.sums[:] = source.sums


@cache
def _coder(k: int, m: int) -> Coder:
    return Coder(k, m, PARITY_CHUNK)


class _Stripes(Stripes):
    """With one coder for all runs: it takes a while to make."""

    def __init__(self, k: int, m: int) -> None:
        super().__init__(1, 1, 256)
        self.coder = _coder(k, m)


class _Stream:
    """A share on its way, as `rebuild` reads it: from the holder's slot, which may be opened again meanwhile."""

    def __init__(self, piece: Piece, slot: Slot, reach: Callable[[], None], k: int) -> None:
        self.piece, self.slot, self.turn, self._reach = piece, slot, slot.turn, reach
        parity = piece.share >= k
        self._left = list(range(slot.chunks) if parity else cut(slot.chunks, piece.share, k))
        self.records: list[PartOf] = []
        if parity:
            small = slot.small[: slot.small_bytes]
            if xxhash.xxh3_64_intdigest(small) != slot.sums[0]:
                raise ChecksumMismatch("the records of a share arrived changed")
            self.records = parts_of(bytes(small))

    def next(self, size: int) -> memoryview:
        self._reach()
        if self.slot.turn != self.turn:
            raise NotHeld(f"{self.piece.version} was overwritten at its holder while it was sent")
        if not self._left:
            return memoryview(b"")
        index = self._left.pop(0)
        chunk = self.slot.chunk(index)
        if xxhash.xxh3_64_intdigest(chunk) != self.slot.sums[1 + index]:
            raise ChecksumMismatch(f"chunk {index} of a share of node {self.piece.node} arrived changed")
        return chunk


def _in_process(path: str, rank: int, kind: Kind, unique_bytes: int, small_capacity: int, chunk_bytes: int) -> Arena:
    """An arena in memory of this process: no file, and nothing to attach to."""
    memory = bytearray(Arena.size(rank, kind, unique_bytes, small_capacity, chunk_bytes))
    memory[:PAGE] = _header(rank, kind, unique_bytes, small_capacity, chunk_bytes, len(memory)).tobytes()
    return Arena(path, memory)


class _Scratch(Scratch):
    """Without memory: a worker says what it has found."""

    copied = True

    def __init__(self) -> None:
        self.path = ""

    def close(self) -> None:
        return


class SimulatedShards(Shards):
    """Of one node. What production does in threads happens in virtual time, everything else as it is there."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.node = host.node
        scheme = Scheme.parse(host.cluster.job.redundancy)
        chunk_bytes = CHUNK if scheme.mirror else PARITY_CHUNK
        self.vault = Vault("sim", host.node, "/sim", chunk_bytes, create=_in_process)
        self.stripes = None if scheme.mirror else _Stripes(scheme.k, scheme.m)
        self.server = _Server(self.vault, self.stripes)  # type: ignore[assignment]
        self._peers = {}
        self._secret, self._base = b"", None
        self._replicator = _Replicator(host, self.vault, self._committed)  # type: ignore[assignment]
        self._told_sent = {}
        self.durable_constants = None

    def report(self, event: Any) -> None:
        self._host.news.send(self._host.process, self._host.agent.happened, event)

    def sent(self, rank: int) -> tuple[int, float]:
        return 0, 0.0

    def plan(
        self, peers: Mapping[int, tuple[int, int]], words: Mapping[int, WordPlan], constants: Collection[int]
    ) -> None:
        super().plan(peers, words, constants)
        self._host.cluster.oracle.planned(self._host)

    def reserve(self) -> None:
        for rank, (unique_bytes, capacity) in self._peers.items():
            self.vault.allocate_peer(rank, unique_bytes, capacity)
        for word, plan in self.stripes.plans.items() if self.stripes is not None else ():
            size = self.vault.chunk_bytes
            self.vault.allocate_parity(word, plan.chunks(size) * size, plan.records_bytes(size))

    def recheck(self, rank: int) -> None:
        self._host.later(0.001, 0.01, self._recheck, rank)

    def _recheck(self, rank: int) -> None:
        arena = self.vault.arena(rank, "own")
        for slot in arena.slots if arena is not None else ():
            version = slot.version
            if version is not None and not slot.recheck():
                self._damaged(rank, "own", version)

    def scratch(self, local: int) -> Scratch:
        return _Scratch()

    def check(self, number: int, memory_bytes: int, partners: Mapping[int, r.Address]) -> None:
        self._host.later(0.01, 1.0, self._check, number, partners)

    def _check(self, number: int, partners: Mapping[int, r.Address]) -> None:
        missed = 0
        for at in partners.values():
            try:
                self._host.reach(self._host.cluster.at(at.host))
            except TransferFailed:
                missed += 1
        why = "partners are not reached" if 2 * missed > len(partners) else ""
        self.report(Looked(number, why, 0.001))

    def close(self) -> None:
        self.vault.close()

    # ---- fetches, as `Shards.fetch` and `transfer.fetch`

    def fetch(
        self,
        epoch: int,
        rank: int,
        generation: int,
        source: r.Source,
        address: r.Address | None,
        others: Sequence[r.Address] = (),
        keepers: Sequence[Target] = (),
        vaults: Mapping[int, r.Address] | None = None,
    ) -> None:
        places = [address.host if address is not None else "", *(other.host for other in others)]
        version = Version(source.version_epoch, generation)
        attempts = Attempts(places, self._host.world.now)
        done = FetchDone(rank, epoch, generation, source.node, tuple(version), "", version.epoch)
        near = [*places, *(each.host for each in keepers)]
        self._constants_first(epoch, rank, near, vaults or {}, self._ask, attempts, done, version)

    def _ask(self, attempts: Attempts[str], done: FetchDone, version: Version) -> None:
        rank, host = done.rank, self._host
        try:
            if done.epoch < self.vault.epoch:
                raise StaleEpoch("the epoch of the fetch is over")
            intake = self.vault.intakes.begin(rank, f"rank {rank}", done.epoch, 0.0)
        except VaultError as err:
            self._failed(attempts, done, version, err)
            return
        try:
            intake.add(intake.left.set)  # one that is cut off leaves at once
            if own_copy(self.vault, rank, version) is not None:
                intake.left.set()
                self.report(done)
                return
            givers = [host.cluster.at(place) if place else host for place in attempts.asked]
            found = []
            for giver in givers:
                host.reach(giver)
                giver.shards.server.keeper.check_epoch(done.epoch, f"fetch of rank {rank}")
                found.append(
                    giver.shards.vault.find(rank, version, ("own", "peer") if giver is not host else ("peer", "own"))
                )
                if attempts.doubted and giver is not host:
                    read_doubted(*found[-1], giver.shards._damaged)
            arena, slot = found[0]
            if self.vault.arena(rank, "own") is None:
                host.cluster.check_room(host, rank)
            into = own_slot(intake, self.vault, rank, version, arena.info.unique_bytes, arena.info.small_capacity)
        except VaultError as err:
            intake.left.set()
            self._failed(attempts, done, version, err)
            return
        host.later(0.01, 0.4, self._brought, attempts, done, version, slot, slot.turn, into, givers, intake)

    def _brought(
        self,
        attempts: Attempts[str],
        done: FetchDone,
        version: Version,
        slot: Slot,
        turn: int,
        into: Slot,
        givers: list[Host],
        intake: Intake,
    ) -> None:
        try:
            intake.check()
            for giver in givers:
                self._host.reach(giver)
            if slot.turn != turn:
                raise NotHeld(f"{version} was overwritten at its holder while it was sent")
            small = slot.small_bytes
            _copy_bytes(slot, into)
            into.verify(small)
            if not attempts.doubted and self._host.cluster.network.garbles():
                raise ChecksumMismatch("what was read has arrived changed")
            finish(into, small)
            intake.left.set()
        except VaultError as err:
            intake.left.set()
            self._failed(attempts, done, version, err)
            return
        self.report(done)

    # ---- constants, as `Shards._fetch_constants`

    def restore_constants(
        self, epoch: int, rank: int, keepers: Sequence[Target], vaults: Mapping[int, r.Address]
    ) -> None:
        self._constants_first(epoch, rank, ["", *(each.host for each in keepers)], vaults, lambda: None)

    def _constants_first(
        self,
        epoch: int,
        rank: int,
        places: Sequence[str],
        vaults: Mapping[int, r.Address],
        then: Callable[..., None],
        *args: Any,
    ) -> None:
        if self._host.cluster.constants:
            search = self._search(rank, places, vaults, lambda vault: vault.host, self._host.world.now)
            self._look(search, epoch, rank, partial(then, *args))
        else:
            self._host.later(0.001, 0.01, then, *args)

    def _look(self, search: Search[str], epoch: int, rank: int, then: Callable[[], None]) -> None:
        pause = search.pause(self._host.world.now)
        if pause is None:
            if self.durable_constants is not None:
                self.durable_constants(rank, epoch)
            then()
        else:
            wait = pause + self._host.world.delay(0.001, 0.02)
            self._host.process.later(wait, self._look_at, search, epoch, rank, then)

    def _look_at(self, search: Search[str], epoch: int, rank: int, then: Callable[[], None]) -> None:
        for place in list(search.left):
            try:
                self._bring(self._host.cluster.at(place) if place else self._host, constants_of(rank), epoch)
            except NotHeld:
                search.lacks(place)
            except StaleEpoch:
                return
            except VaultError as err:
                self._host.world.say(f"n{self._host.node}", f"constants of rank {rank}: {err}")
                search.widen()
            else:
                then()
                return
        self._look(search, epoch, rank, then)

    def _bring(self, giver: Host, holder: int, epoch: int) -> None:
        if epoch < self.vault.epoch:
            raise StaleEpoch("the epoch of the fetch is over")
        with self.vault.intakes.begin(holder, f"holder {holder}", epoch, 0.0) as intake:
            if own_copy(self.vault, holder, CONSTANT) is not None:
                return
            self._host.reach(giver)
            giver.shards.server.keeper.check_epoch(epoch, "constants")
            arena, slot = giver.shards.vault.find(holder, CONSTANT)
            into = own_slot(intake, self.vault, holder, CONSTANT, arena.info.unique_bytes, arena.info.small_capacity)
            _copy_bytes(slot, into)
            into.verify(slot.small_bytes)
            finish(into, slot.small_bytes)

    # ---- parity, as `Shards.rebuild` and `vault.rebuild`

    def rebuild(
        self,
        epoch: int,
        rank: int,
        generation: int,
        parts: Sequence[Sequence[r.Share]],
        vaults: Mapping[int, r.Address],
        keepers: Sequence[Target] = (),
    ) -> None:
        version = Version(max(share.version_epoch for part in parts for share in part), generation)
        done = FetchDone(rank, epoch, generation, parts[0][0].node, tuple(version), "", parts[0][0].version_epoch)
        assert self.stripes is not None
        near = [vaults[share.node].host for share in parts[0]]
        attempts = Attempts([parts], self._host.world.now)
        near += [each.host for each in keepers]
        self._constants_first(epoch, rank, near, vaults, self._ask_shares, attempts, parts, done, version)

    def _ask_shares(self, attempts: Attempts[_Parts], parts: _Parts, done: FetchDone, version: Version) -> None:
        rank, host = done.rank, self._host
        try:
            if done.epoch < self.vault.epoch:
                raise StaleEpoch("the epoch of the rebuild is over")
            intake = self.vault.intakes.begin(rank, f"rank {rank}", done.epoch, 0.0)
        except VaultError as err:
            self._not_rebuilt(attempts, parts, done, version, err)
            return
        try:
            intake.add(intake.left.set)
            if own_copy(self.vault, rank, version) is not None:
                intake.left.set()
                self.report(done)
                return
            streams = [[self._open(done, share, attempts.doubted) for share in part] for part in parts]
            mine = record_of(streams[0], rank)
            if self.vault.arena(rank, "own") is None:
                host.cluster.check_room(host, rank)
            into = own_slot(intake, self.vault, rank, version, mine.unique_bytes, mine.small_capacity)
        except VaultError as err:
            intake.left.set()
            self._not_rebuilt(attempts, parts, done, version, err)
            return
        host.later(0.01, 0.4, self._decode, attempts, parts, done, version, streams, into, intake)

    def _open(self, done: FetchDone, share: r.Share, doubted: bool) -> _Stream:
        host, k = self._host, self.stripes.coder.k if self.stripes is not None else 0
        version = Version(share.version_epoch, done.generation)
        piece = Piece(share.share, share.holder, version, share.node, f"n{share.node}", 1)
        try:
            giver = host.cluster.at(piece.host)
            host.reach(giver)
            giver.shards.server.keeper.check_epoch(done.epoch, f"fetch of rank {done.rank}")
            kinds: tuple[Kind, ...] = ("parity",) if share.share >= k else ("own", "peer")
            arena, slot = giver.shards.vault.find(share.holder, version, kinds)
            if doubted:
                read_doubted(arena, slot, giver.shards._damaged)
            return _Stream(piece, slot, partial(host.reach, giver), k)
        except VaultError as err:
            why = f"share {share.share} of node {share.node}: {err}"
            raise RebuildFailed(why, share.node, share.holder, err) from None

    def _decode(
        self,
        attempts: Attempts[_Parts],
        parts: _Parts,
        done: FetchDone,
        version: Version,
        streams: list[list[_Stream]],
        into: Slot,
        intake: Intake,
    ) -> None:
        assert self.stripes is not None
        try:
            intake.check()
            if not attempts.doubted and self._host.cluster.network.garbles():
                first = parts[0][0]
                raise RebuildFailed("garbled", first.node, first.holder, ChecksumMismatch("a share arrived changed"))
            mine = record_of(streams[0], done.rank)
            into.small[: len(mine.small)] = mine.small
            into.sums[0] = xxhash.xxh3_64_intdigest(mine.small)
            for part, those in enumerate(streams):
                decode_part(self.stripes.coder, done.rank, into, part, those, intake.check)
            finish(into, len(mine.small))
            intake.left.set()
        except VaultError as err:
            intake.left.set()
            self._not_rebuilt(attempts, parts, done, version, err)
            return
        self.report(done)

    def _not_rebuilt(
        self, attempts: Attempts[_Parts], parts: _Parts, done: FetchDone, version: Version, err: VaultError
    ) -> None:
        pause = attempts.failed(err, self._host.world.now)
        self._host.world.say(f"n{self._host.node}", f"rank {done.rank} was not rebuilt: {err}; again in {pause}")
        if pause is None:
            assert attempts.error is not None
            self.report(FetchDone.not_rebuilt(done.rank, done.epoch, version, parts, attempts.error))
            return
        slow = _CONNECT_S if err.broken and "answer" in str(err) else 0.0
        self._host.process.later(pause + slow, self._ask_shares, attempts, parts, done, version)

    def _failed(self, attempts: Attempts[str], done: FetchDone, version: Version, err: VaultError) -> None:
        pause = attempts.failed(err, self._host.world.now)
        self._host.world.say(f"n{self._host.node}", f"fetch of rank {done.rank} failed: {err}; again in {pause}")
        if pause is None:
            assert attempts.error is not None
            self.report(FetchDone.failed(done.rank, done.epoch, version, done.source, version.epoch, attempts.error))
            return
        slow = _CONNECT_S if err.broken and "answer" in str(err) else 0.0
        self._host.process.later(pause + slow, self._ask, attempts, done, version)
