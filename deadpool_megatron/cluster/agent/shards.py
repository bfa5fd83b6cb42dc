"""The agent's side of the shards: its vault, the copies on the peer node, and bringing lost shards back."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.fetching import Attempts, Search
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.vault import (
    CONSTANT,
    EMPTY,
    PREFIX,
    Kind,
    NotHeld,
    Piece,
    RebuildFailed,
    Replicator,
    Scratch,
    Scrubber,
    SendPace,
    StaleEpoch,
    Stripes,
    Target,
    Vault,
    VaultError,
    VaultFull,
    VaultServer,
    Version,
    WordPlan,
    as_vault_error,
    clean_leftovers,
    constants_of,
    exchange,
    fetch,
    huge_bytes,
    is_constants,
    make_transport,
    numa_nodes,
    owner_of,
    rebuild,
    small_capacity,
)

_log = logging.getLogger(__name__)
_EXCHANGED = 1 << 20  # bytes there and back: more than what passes where large packets are lost
_Place = tuple[str, int] | Vault
_Held = dict[int, list[tuple[int, int]]]  # versions (epoch, generation), by rank or word


@dataclass(frozen=True, slots=True)
class RankCommitted:
    """A rank's version is complete in the own vault and wherever else it belongs."""

    rank: int
    epoch: int
    generation: int


@dataclass(frozen=True, slots=True)
class FetchDone:
    """A shard has arrived (``error`` empty, ``version`` set) or could not be had.

    ``tried``: the epoch in which what was asked for at ``source`` was written. ``own``: the fault is this node's.
    ``gone``: who had it has found that it has changed, and offers it no more.
    ``share``: it was to be rebuilt, and ``source`` gave a share: of this rank's part, or word's parity; -1: a copy.
    """

    rank: int
    epoch: int
    generation: int
    source: int
    version: tuple[int, int] | None
    error: str
    tried: int = -1
    own: bool = False
    share: int = -1
    gone: bool = False

    @classmethod
    def failed(cls, rank: int, epoch: int, version: Version, source: int, tried: int, err: VaultError) -> FetchDone:
        """It could not be had, because of ``err``."""
        return cls(rank, epoch, version.generation, source, None, str(err), tried, err.own, gone=err.gone)

    @classmethod
    def not_rebuilt(
        cls, rank: int, epoch: int, version: Version, parts: Sequence[Sequence[r.Share]], err: VaultError
    ) -> FetchDone:
        """It could not be rebuilt from ``parts``; the share that is to blame, if one is, tells whose fault it was."""
        first = parts[0][0]
        blamed = (err.node, err.holder) if isinstance(err, RebuildFailed) else (first.node, first.holder)
        shares = (share for part in parts for share in part)
        tried = next((share.version_epoch for share in shares if (share.node, share.holder) == blamed), -1)
        return replace(cls.failed(rank, epoch, version, blamed[0], tried, err), share=blamed[1])


@dataclass(frozen=True, slots=True)
class Damaged:
    """A copy (of a rank, or parity of a word) has changed in memory and is not used any more."""

    holder: int
    kind: Kind
    generation: int


@dataclass(frozen=True, slots=True)
class Looked:
    """What a check (of this number) has found outside of the workers: ``why`` this spare could not take over.

    ``link_s``: seconds of the slowest exchange with a partner.
    """

    number: int
    why: str
    link_s: float


ShardsEvent = RankCommitted | FetchDone | r.NoRoom | r.VaultMemory | Damaged | Looked


class Shards:
    """Vault, server and replicator of one node. Its threads report through ``events``; ``wake_fd`` is an eventfd.

    Everything here but `allocate` and `holdings` returns at once.
    """

    def __init__(
        self,
        job_id: str,
        node: int,
        secret: bytes,
        host: str,
        directory: str = "/dev/shm",
        scheme: Scheme | None = None,
        scrub_rate: int = 0,
        send_bandwidth: float = 0.0,
        host_memory: int = 0,
        transport: str = "tcp",
    ) -> None:
        self.node = node
        self._secret = secret
        clean_leftovers(directory)
        self.vault = Vault(job_id, node, directory, limit_bytes=host_memory)
        parity = scheme is not None and not scheme.mirror
        self.stripes = Stripes(scheme.k, scheme.m, self.vault.chunk_bytes) if scheme is not None and parity else None
        name = f"{job_id}-{node}-{os.getpid()}-{os.urandom(4).hex()}"
        self._direct, self.transport = make_transport(transport, name)
        self.server = VaultServer(
            self.vault, secret, host, stripes=self.stripes, direct=self._direct, on_full=self._no_room,
            on_damaged=self._damaged,
        )  # fmt: skip
        self.server.start()
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()  # ShardsEvent, and what others tell
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._peers: dict[int, tuple[int, int]] = {}
        self._base: r.Base | None = None  # that was set aside last
        self._twice: set[int] = set()  # holders of which another node keeps what is aside
        self._replicator = Replicator(
            self.vault, secret, self._committed, pace=SendPace(send_bandwidth), direct=self._direct
        )
        self._scrubber = Scrubber(self.vault, scrub_rate, self._damaged) if scrub_rate else None
        self._restoring: set[int] = set()  # ranks whose constants are brought again
        self._told_sent: dict[int, tuple[int, float]] = {}
        self.durable_constants: Callable[[int, int], None] | None = None
        """Where no vault has them: brings those of (rank, epoch it was asked in) from the durable directory. Blocks."""

    def report(self, event: Any) -> None:
        """Put an event into the queue and wake who listens. Any thread."""
        self.events.put(event)
        os.eventfd_write(self.wake_fd, 1)

    def _committed(self, rank: int, epoch: int, generation: int) -> None:
        self.report(RankCommitted(rank, epoch, generation))

    def _no_room(self, why: str) -> None:
        """Before the first commit nothing is protected, so it is an error of the user's; later it's a copy less."""
        if self.vault.kept == EMPTY:
            self.report(r.NoRoom(self.node, why))

    def _damaged(self, holder: int, kind: Kind, version: Version) -> None:
        if kind != "peer" or not is_constants(holder):  # kept constants are sent anew in the next epoch
            self.report(Damaged(holder, kind, version.generation))

    def allocate(self, rank: int, unique_bytes: int, small_bytes: int, numa: int = -1) -> str:
        """The path of a rank's own arena, with room for the small state to grow. Raises VaultError in one clear line.

        An arena that a fetch has made already is used when it fits. ``numa``: NUMA node of who writes it, -1 for any.
        """
        info = self._with_room(partial(self.vault.allocate_own, rank, unique_bytes, small_capacity(small_bytes), numa))
        if info.small_capacity < small_bytes:
            raise VaultError(
                f"the small state of rank {rank} has {small_bytes} bytes, and the memory that was taken for its shard "
                f"room for {info.small_capacity}"
            )
        return info.path

    def set_targets(self, epoch: int, targets: Mapping[int, Sequence[Target]]) -> None:
        """Where each own rank's shards go."""
        self._replicator.set_targets(epoch, targets)

    def plan(
        self, peers: Mapping[int, tuple[int, int]], words: Mapping[int, WordPlan], constants: Collection[int]
    ) -> None:
        """What this node keeps for others from now on; the server refuses everything else.

        Args:
            peers: by rank, the bytes of its unique state and the room for its small state.
            words: by word, a row of parity.
            constants: holders of them; of what size their owners say.
        """
        self._peers = dict(peers)
        sizes: dict[int, int | None] = {rank: unique_bytes for rank, (unique_bytes, _) in peers.items()}
        self.server.set_plan(sizes | dict.fromkeys(constants))
        if self.stripes is not None:
            self.stripes.plan(dict(words))

    def reserve(self) -> None:
        """Take the memory for what is planned, in a thread. Comes as `VaultMemory`, a failure as `NoRoom`.

        Nothing comes when coordinates have become others meanwhile.
        """
        resized, size = self.vault.resized, self.vault.chunk_bytes
        words = self.stripes.plans if self.stripes is not None else {}
        steps: list[Callable[[], object]] = [partial(self.vault.allocate_peer, k, *v) for k, v in self._peers.items()]
        steps += [
            partial(self.vault.allocate_parity, word, plan.chunks(size) * size, plan.records_bytes(size))
            for word, plan in words.items()
        ]

        def work() -> None:
            try:
                for step in steps:
                    if self.vault.resized != resized:
                        return
                    self._with_room(step)
            except (VaultError, OSError) as err:
                if self.vault.resized == resized:
                    self.report(r.NoRoom(self.node, str(err)))
                return
            huge = huge_bytes(*(arena.path for arena in self.vault.arenas()))
            nodes, way = max(1, len(numa_nodes())), self.transport
            self.report(r.VaultMemory(self.node, self.vault.bytes_allocated, huge, nodes, way.name, way.why))

        threading.Thread(target=work, name="vault-reserve", daemon=True).start()

    def scratch(self, local: int) -> Scratch:
        """Memory for a worker to copy through. Raises OSError."""
        return Scratch(f"{self.vault.directory}/{PREFIX}{self.vault.job_id}-{self.node}-check-{local}")

    def check(self, number: int, memory_bytes: int, partners: Mapping[int, r.Address]) -> None:
        """Could this vault hold so many bytes, and does it reach others? In a thread; comes as `Looked`.

        A partner that is not reached may be at fault itself: half of them have to be.
        """

        def work() -> None:
            why, slowest, errors = "", 0.0, []
            try:
                why = self.vault.lacks(memory_bytes)
                for node, at in partners.items():
                    try:
                        seconds = exchange((at.host, at.port), self._secret, self.vault.epoch, _EXCHANGED)
                        slowest = max(slowest, seconds)
                    except VaultError as err:
                        errors.append(f"node {node}: {err}")
            except Exception as err:  # noqa: BLE001 - what nobody hears of is waited for until the deadline
                why = f"{type(err).__name__}: {err}"
            if 2 * len(errors) > len(partners):
                why = why or f"{len(errors)} of {len(partners)} partners not reached: {errors[0]}"
            self.report(Looked(number, why, slowest))

        threading.Thread(target=work, name="spare-check", daemon=True).start()

    def sent(self, rank: int) -> tuple[int, float]:
        """Bytes of a rank's shards sent since the last call, and the bytes a second while they were."""
        nbytes, seconds = self._replicator.pace.sent(rank)
        before, before_s = self._told_sent.get(rank, (0, 0.0))
        self._told_sent[rank] = (nbytes, seconds)
        return nbytes - before, (nbytes - before) / (seconds - before_s) if seconds > before_s else 0.0

    def set_kept(self, epoch: int, kept: tuple[int, int] | None, floor: int) -> None:
        """What the coordinator says of commits."""
        if kept is not None:
            self.vault.set_committed(*kept)
        self.vault.set_floor(epoch, floor)

    def keep_only(self, own: set[int], peer: set[int], parity: set[int]) -> None:
        """Free what this node neither runs nor keeps for others any more; call once newer copies are committed."""
        keep: dict[Kind, set[int]] = {"own": own, "peer": peer, "parity": parity}
        for arena in self.vault.arenas():
            if arena.info.rank not in keep[arena.info.kind]:
                self.vault.drop(arena.info.rank, arena.info.kind)
        self._replicator.keep_only(own)

    def set_aside(self, base: r.Base) -> None:
        """Keep what is here of ``base`` until `Vault.let_go`, out of the way of all else, which is dropped.

        Where it is complete, that is: what workers have left without checksums is none of it.
        """
        self.vault.set_aside(Version(base.epoch, base.generation), base.version_epoch)
        self._base, self._twice = base, set()

    def aside(self, base: r.Base) -> tuple[list[int], list[int]]:
        """The ranks whose shard of ``base`` is set aside here, and whose constants are."""
        held = sorted(self.vault.aside) if self._base == base else []
        constants = [owner_of(holder) for holder in held if is_constants(holder)]
        return [rank for rank in held if not is_constants(rank)], sorted(constants)

    def _with_room[T](self, make: Callable[[], T]) -> T:
        """Where there is no memory, one copy of what is aside has to do in the job. Blocks, and raises, as ``make``."""
        try:
            return make()
        except VaultFull:
            if not self.vault.thin_out(self._twice):
                raise
            return make()

    def places(self, at: r.ResumeAt, vaults: Mapping[int, r.Address]) -> r.InVaults:
        """What workers are told of a generation that is set aside. ``vaults``: by node, where its vault answers."""
        assert at.memory is not None and self._base is not None
        nodes = dict(enumerate(at.memory.holders))
        nodes |= {constants_of(rank): there for rank, there in enumerate(at.memory.constants) if there}
        # Each node asks first what it has itself, and else others than its neighbours do.
        order = lambda node: (node - self.node) % (max(vaults) + 1)  # noqa: E731
        places = {
            holder: [vaults[node] for node in sorted(there, key=order) if node in vaults]
            for holder, there in nodes.items()
        }
        self._twice = {holder for holder, there in nodes.items() if there[owner_of(holder) % len(there)] != self.node}
        base = at.memory.base
        return r.InVaults(self._secret, self.vault.epoch, base.epoch, base.generation, at.memory.coordinates, places)

    def rang(self, rank: int) -> None:
        """The worker of ``rank`` has written more of its shard, or of its constants."""
        for holder in (rank, constants_of(rank)):
            if self.vault.arena(holder, "own") is not None:
                self._replicator.notify(holder)

    def holdings(self) -> tuple[_Held, _Held, _Held]:
        """Versions complete here: own copies and copies kept for peers, by rank, and parity, by word.

        What a dead worker has left finished but not yet checksummed is checksummed first, so this may block for that.
        """
        for rank in list(self.vault.holdings().ranks):
            while self.vault.checksum(rank):
                pass
        by_kind: dict[Kind, _Held] = {"own": {}, "peer": {}, "parity": {}}
        for rank, held in self.vault.holdings().ranks.items():
            for one in held:
                by_kind[one.kind].setdefault(rank, []).append((one.epoch, one.generation))
        return by_kind["own"], by_kind["peer"], by_kind["parity"]

    def version_of(self, rank: int, generation: int) -> tuple[int, int] | None:
        """The version under which the own vault holds a generation of ``rank``; the committed one first."""
        versions = [
            (one.epoch, one.generation)
            for one in self.vault.holdings().ranks.get(rank, ())
            if one.kind == "own" and one.generation == generation
        ]
        kept = [v for v in versions if Version(*v).pack() == self.vault.kept]
        best = kept or versions
        return best[-1] if best else None

    def corrupt(self, rank: int) -> None:
        """A fault for tests: overwrite some bytes of the newest complete own copy, as failing memory would."""
        arena = self.vault.arena(rank, "own")
        if arena is not None:
            complete = [slot for slot in arena.slots if slot.complete]
            if complete:
                newest = max(complete, key=lambda slot: slot.begin)
                newest.unique[:64] = bytes(64 - i for i in range(64))

    def recheck(self, rank: int) -> None:
        """Read the own copies of ``rank``, in a thread: those that have changed in memory are held no more."""

        def work() -> None:
            arena = self.vault.arena(rank, "own")
            for slot in arena.slots if arena is not None else ():
                version = slot.version
                if version is not None and not slot.recheck():
                    self._damaged(rank, "own", version)

        threading.Thread(target=work, name=f"recheck-{rank}", daemon=True).start()

    def has(self, rank: int, version: tuple[int, int]) -> bool:
        """A copy of it is here, whosever it is."""
        try:
            self.vault.find(rank, Version(*version))
        except NotHeld:
            return False
        return True

    def path_of(self, rank: int) -> str:
        """The file of a rank's own arena; empty when there is none."""
        arena = self.vault.arena(rank, "own")
        return arena.info.path if arena is not None else ""

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
        """Bring a shard into the own vault; the outcome comes as a FetchDone. ``address`` None: it is here already.

        ``others`` hold the same version: all give a part at once, and if that fails the first one gives all of it.
        A connection that breaks says nothing of the copy: it is tried again, then the others one by one. Constants of
        the rank come from any of these or of the ``keepers``, if one has them; or from any of the ``vaults``.
        """
        version = Version(source.version_epoch, generation)

        def bring(places: Sequence[_Place], doubted: bool) -> None:
            fetch(
                self.vault, self._secret, places[0], rank, epoch, version, direct=self._direct,
                others=[place for place in places[1:] if not isinstance(place, Vault)], doubted=doubted,
            )  # fmt: skip

        def work() -> None:
            points.reach("fetch.before")
            places: list[_Place] = [(address.host, address.port) if address is not None else self.vault]
            places += [(other.host, other.port) for other in others]
            done = FetchDone(rank, epoch, generation, source.node, (version.epoch, generation), "", version.epoch)
            try:
                # Constants first: where a shard is, a later epoch does not look for them any more.
                self._fetch_constants(rank, epoch, [*places, *_places(keepers)], vaults or {})
                _patiently(places, bring)
            except Exception as err:  # noqa: BLE001 - what nobody hears of is waited for until the phase ends
                done = FetchDone.failed(rank, epoch, version, source.node, version.epoch, as_vault_error(err))
            points.reach("fetch.after")
            self.report(done)

        threading.Thread(target=work, name=f"fetch-{rank}", daemon=True).start()

    def rebuild(
        self,
        epoch: int,
        rank: int,
        generation: int,
        parts: Sequence[Sequence[r.Share]],
        vaults: Mapping[int, r.Address],
        keepers: Sequence[Target] = (),
    ) -> None:
        """Rebuild a shard that nobody holds whole, in the own vault; the outcome comes as a FetchDone.

        Constants of the rank come from who keeps them beside its parity, or from any of the ``keepers``; or from any of
        the ``vaults``.
        """
        # Under the newest of the versions its shares have: the bytes are the same in all of them.
        version = Version(max(share.version_epoch for part in parts for share in part), generation)

        def work() -> None:
            first = parts[0][0]
            done = FetchDone(rank, epoch, generation, first.node, (version.epoch, generation), "", first.version_epoch)
            try:
                if self.stripes is None:
                    raise VaultError("parity is not kept in this job")
                gone = next((s for part in parts for s in part if s.node not in vaults), None)
                if gone is not None:
                    raise RebuildFailed(f"node {gone.node} has no vault", gone.node, gone.holder)
                pieces = [[_piece(share, generation, vaults[share.node]) for share in part] for part in parts]
                coder = self.stripes.coder
                near = [vaults[share.node] for share in parts[0]]  # who has parity of it has them whole
                self._fetch_constants(rank, epoch, [*_places(near), *_places(keepers)], vaults)
                _patiently(
                    [pieces],
                    lambda those, doubted: rebuild(
                        self.vault, self._secret, rank, epoch, version, those[0], coder, doubted=doubted
                    ),
                )
            except Exception as err:  # noqa: BLE001 - as in `fetch`
                done = FetchDone.not_rebuilt(rank, epoch, version, parts, as_vault_error(err))
            self.report(done)

        threading.Thread(target=work, name=f"rebuild-{rank}", daemon=True).start()

    def restore_constants(
        self, epoch: int, rank: int, keepers: Sequence[Target], vaults: Mapping[int, r.Address]
    ) -> None:
        """Bring constants of an own rank, which have changed in memory; in a thread. Arguments as of `fetch`."""
        if rank in self._restoring:
            return
        self._restoring.add(rank)

        def work() -> None:
            try:
                self._fetch_constants(rank, epoch, [self.vault, *_places(keepers)], vaults)
            except VaultError as err:
                _log.warning("rank %d: its constants cannot be had again: %s", rank, err)
            finally:
                self._restoring.discard(rank)

        threading.Thread(target=work, name=f"constants-{rank}", daemon=True).start()

    def _fetch_constants(
        self, rank: int, epoch: int, places: Sequence[_Place], vaults: Mapping[int, r.Address]
    ) -> None:
        """Blocks. Where no vault and no durable directory gives them, the rank has none, or its worker has to have them
        from a replica.

        Raises VaultFull.
        """
        search = self._search(rank, places, vaults, _place, time.monotonic())
        while (pause := search.pause(time.monotonic())) is not None:
            time.sleep(pause)
            for place in list(search.left):
                try:
                    fetch(self.vault, self._secret, place, constants_of(rank), epoch, CONSTANT, direct=self._direct)
                    return
                except NotHeld:
                    search.lacks(place)
                except StaleEpoch:
                    return
                except VaultFull:
                    raise
                except VaultError as err:
                    _log.warning("rank %d: its constants cannot be had from %s: %s", rank, place, err)
                    search.widen()
        if self.durable_constants is not None:
            self.durable_constants(rank, epoch)

    def _search[Place](
        self,
        rank: int,
        places: Sequence[Place],
        vaults: Mapping[int, r.Address],
        place_of: Callable[[r.Address], Place],
        now: float,
    ) -> Search[Place]:
        """For constants: where memory for them is here, the rank has some, and all vaults are asked.

        A node that was to keep them may not have had them yet, and one that has left its coordinates still does.
        """
        search = Search(places, now, [place_of(vault) for node, vault in vaults.items() if node != self.node])
        if self.vault.arena(constants_of(rank), "own") is not None:
            search.widen()
        return search

    def close(self) -> None:
        """Stop all threads and free the memory."""
        if self._scrubber is not None:
            self._scrubber.stop()
        self._replicator.stop()
        self.server.stop()
        self.vault.close()


def _patiently[Place](places: Sequence[Place], ask: Callable[[Sequence[Place], bool], object]) -> None:
    """Ask these holders, over new connections, as `Attempts` says. Raises what the first one alone raised last."""
    attempts = Attempts(places, time.monotonic())
    while True:
        try:
            ask(attempts.asked, attempts.doubted)
            return
        except VaultError as err:
            pause = attempts.failed(err, time.monotonic())
            if pause is None:
                assert attempts.error is not None
                raise attempts.error from None
            if pause or err.changed:
                _log.warning("%s; trying again", err)
        time.sleep(pause)


def _place(of: r.Address | Target) -> _Place:
    return of.host, of.port


def _places(those: Iterable[r.Address | Target]) -> list[_Place]:
    return [_place(each) for each in those]


def _piece(share: r.Share, generation: int, at: r.Address) -> Piece:
    version = Version(share.version_epoch, generation)
    return Piece(share.share, share.holder, version, share.node, at.host, at.port)
