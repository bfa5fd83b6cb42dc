"""The promise: what may be lost by the printed sentence comes back bit for bit, copied or rebuilt from k of k + m."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pytest

from deadpool_megatron.cluster.agent import fetching
from deadpool_megatron.cluster.agent import shards as agent_shards
from deadpool_megatron.cluster.agent.shards import Damaged, FetchDone, RankCommitted, Shards
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.agreement import NoCommonGeneration, agree
from deadpool_megatron.cluster.placement.duties import kept_for_others, targets
from deadpool_megatron.cluster.placement.groups import place, replace
from deadpool_megatron.cluster.placement.redundancy import Scheme, survives, words
from deadpool_megatron.cluster.records import Address, Offer, SlotAddress, Source
from deadpool_megatron.vault import (
    CONSTANT,
    ChecksumMismatch,
    ConstantsWriter,
    Slot,
    SlotWriter,
    Target,
    Version,
    constants_of,
    store_shard,
    transfer,
)
from deadpool_megatron.vault.coder import Coder
from deadpool_megatron.vault.wire import Deadlines
from waiting import until

SECRET = bytes(range(32))


@pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2), (3, 3), (10, 4)])
def test_any_k_shares_give_every_other_back(k: int, m: int) -> None:
    size = 1 << 12
    coder = Coder(k, m, size)
    random = np.random.default_rng(k)
    data = [random.integers(0, 256, size - 7 * share, dtype=np.uint8).tobytes() for share in range(k)]
    shares = dict(enumerate(memoryview(each) for each in data))
    for row in range(m):
        parity = np.zeros(size, np.uint8)
        for share in reversed(range(k)):  # in any order
            coder.add(parity, row, share, shares[share])
        shares[k + row] = memoryview(parity.tobytes())
    sets = list(combinations(range(k + m), k))
    for those in sets[:: max(1, len(sets) // 60)]:
        for wanted in set(range(k)) - set(those):
            back = coder.rebuild(wanted, {share: shares[share] for share in those})
            assert back[: len(data[wanted])] == data[wanted] and not any(back[len(data[wanted]) :])


class Job:
    """The vaults of a whole job in one process: real agents' shards, real sockets, the real placement and agreement."""

    def __init__(self, redundancy: str, active: int, slots: int = 1, nodes: int = 0) -> None:
        self.scheme = Scheme.parse(redundancy)
        self.shards = {
            node: Shards(f"p{os.getpid()}", node, SECRET, "127.0.0.1", scheme=self.scheme)
            for node in range(max(active, nodes))
        }
        self.assignment = placing.initial(active, slots)
        self.groups = place(range(active), self.scheme)
        # every rank another size, some parts one chunk longer than others, the last chunk never full
        self.unique = [(2 + rank % 3) * (1 << 20) + 4321 * (rank + 1) for rank in range(active * slots)]
        self.room = [1 << 16] * len(self.unique)
        self.words = words(self.groups, self.scheme, self.assignment)
        self.epoch = 0
        self.writers: dict[int, SlotWriter] = {}
        for rank in range(len(self.unique)):
            node = self.shards[self.assignment[rank].node]
            self.writers[rank] = SlotWriter(node.allocate(rank, self.unique[rank], 4096))

    def vaults(self) -> dict[int, Address]:
        return {node: Address("127.0.0.1", each.server.port) for node, each in self.shards.items()}

    def aim(self, nodes: list[int] | None = None) -> None:
        vaults = self.vaults()
        for node in placing.nodes_of(self.assignment) if nodes is None else nodes:
            shards = self.shards[node]
            shards.plan(*kept_for_others(node, self.groups, self.scheme, self.assignment, self.unique, self.room))
        for node in placing.nodes_of(self.assignment) if nodes is None else nodes:
            self.shards[node].set_targets(self.epoch, targets(node, self.groups, self.scheme, self.assignment, vaults))

    def content(self, rank: int, generation: int) -> np.ndarray:
        return np.random.default_rng(1000 * generation + rank).integers(0, 256, self.unique[rank], dtype=np.uint8)

    def write(self, generation: int) -> None:
        for rank, writer in self.writers.items():
            assert writer.open(self.epoch, generation, b"small state %d of %d" % (generation, rank)) is not None
            writer.buffer[:] = self.content(rank, generation)
            writer.complete()
            self.shards[self.assignment[rank].node].rang(rank)

    def committed(self, generation: int) -> None:
        """Wait until every rank is safe, then tell everybody."""
        for node in placing.nodes_of(self.assignment):
            missing = set(placing.ranks_of(self.assignment, node).values())
            while missing:
                event = self.shards[node].events.get()
                if isinstance(event, RankCommitted) and (event.epoch, event.generation) == (self.epoch, generation):
                    missing.discard(event.rank)
        for shards in self.shards.values():
            shards.set_kept(self.epoch, (self.epoch, generation), generation)

    def offers(self, lost: tuple[int, ...]) -> dict[int, Offer]:
        return {
            node: Offer(self.epoch, node, {}, *shards.holdings())
            for node, shards in self.shards.items()
            if node not in lost
        }

    def restored(self, rank: int, node: int, generation: int, lost: tuple[int, ...]) -> None:
        """The shard of ``rank`` is brought to ``node`` and is what it was."""
        agreed = agree(self.assignment_without(lost, node), self.offers(lost), words=self.words)
        assert agreed.generation == generation
        shards = self.shards[node]
        vaults = {n: Address("127.0.0.1", s.server.port) for n, s in self.shards.items() if n not in lost}
        keepers = targets(self.assignment[rank].node, self.groups, self.scheme, self.assignment, self.vaults())
        those = keepers.get(constants_of(rank), ())
        if self.scheme.mirror:
            source = agreed.sources[rank]
            shards.fetch(self.epoch, rank, generation, source, vaults[source.node], keepers=those)
        else:
            shards.rebuild(self.epoch, rank, generation, agreed.rebuilds[rank], vaults, those)
        event = shards.events.get()
        while not isinstance(event, FetchDone):
            event = shards.events.get()
        assert not event.error, event.error
        assert event.version is not None
        reader = SlotWriter(shards.path_of(rank))
        small, unique = reader.read(Version(*event.version))
        assert small == b"small state %d of %d" % (generation, rank)
        assert np.array_equal(np.frombuffer(unique, np.uint8), self.content(rank, generation))

    def assignment_without(self, lost: tuple[int, ...], spare: int) -> list[SlotAddress]:
        return [SlotAddress(spare, i) if s.node in lost else s for i, s in enumerate(self.assignment)]

    def close(self) -> None:
        for shards in self.shards.values():
            shards.close()


@pytest.fixture
def jobs() -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(*args: object, **kwargs: object) -> Job:
        made.append(Job(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for job in made:
        job.close()


@pytest.mark.parametrize(
    ("redundancy", "active"), [("1", 4), ("1", 5), ("2", 6), ("2+1", 3), ("2+2", 4), ("3+2", 6), ("2+1", 7)]
)
def test_exactly_the_losses_that_are_said_to_be_survivable_are(
    jobs: Callable[..., Job], redundancy: str, active: int
) -> None:
    """Every set of up to m + 1 nodes, against the real vaults; one of each size is really rebuilt."""
    job = jobs(redundancy, active, nodes=active + 1)
    job.aim()
    job.write(3)
    job.committed(3)
    m = job.scheme.m
    for size in range(1, m + 2):
        rebuilt = False
        for lost in combinations(range(active), size):
            after = job.assignment_without(lost, active)
            if survives(lost, job.groups, job.scheme):
                agreed = agree(after, job.offers(lost), words=job.words)
                assert agreed.generation == 3
                assert set(agreed.sources if job.scheme.mirror else agreed.rebuilds) == set(lost)
                for parts in agreed.rebuilds.values():
                    assert all(len({s.node for s in part}) == job.scheme.k for part in parts)
                    assert not {share.node for part in parts for share in part} & set(lost)
                if not rebuilt:
                    rebuilt = True
                    for rank in lost:
                        job.restored(rank, active, 3, lost)
                    for rank in lost:
                        job.shards[active].vault.drop(rank)
            else:
                with pytest.raises(NoCommonGeneration) as beyond:
                    agree(after, job.offers(lost), words=job.words)
                assert beyond.value.missing and set(beyond.value.missing) <= set(lost)
        assert rebuilt == any(survives(lost, job.groups, job.scheme) for lost in combinations(range(active), size))
        assert rebuilt or size > m


def test_after_a_swap_the_spare_and_its_parity_are_whole_again_and_the_next_node_may_go(
    jobs: Callable[..., Job],
) -> None:
    job = jobs("2+1", 3, nodes=5)
    job.aim()
    for generation in (1, 2):
        job.write(generation)
        job.committed(generation)
    job.restored(1, 3, 2, lost=(1,))
    job.shards[1].close()
    gone = job.shards.pop(1)
    job.epoch = 1
    for shards in job.shards.values():
        shards.server.set_epoch(1)
    before = {word.ids for word in job.words}
    job.groups = replace(job.groups, {1: 3}, job.scheme)
    job.assignment = placing.replace_nodes(job.assignment, {1: 3})
    job.words = words(job.groups, job.scheme, job.assignment)
    assert {word.ids for word in job.words} == before, "nobody else's parity is made anew"
    job.aim()
    # the spare offers the kept version, and the parity that went with node 1 is made again on it
    seen: set[int] = set()
    for node in placing.nodes_of(job.assignment):
        while True:
            event = job.shards[node].events.get()
            if isinstance(event, RankCommitted) and (event.epoch, event.generation) == (0, 2):
                seen.add(event.rank)
                break
    assert seen == {0, 1, 2}
    for next_lost in (0, 2, 3):
        rank = next(r for r, slot in enumerate(job.assignment) if slot.node == next_lost)
        job.restored(rank, 4, 2, lost=(next_lost,))
        job.shards[4].vault.drop(rank)
    # and training goes on in the new epoch
    job.writers[1] = SlotWriter(job.shards[3].path_of(1))
    job.write(3)
    job.committed(3)
    assert gone is not None


def test_a_shard_that_was_changed_in_memory_is_never_built_into_another(jobs: Callable[..., Job]) -> None:
    job = jobs("2+1", 3, nodes=4)
    job.aim()
    job.write(1)
    job.committed(1)
    agreed = agree(job.assignment_without((0,), 3), job.offers((0,)), words=job.words)
    share = agreed.rebuilds[0][0][0]
    arena = job.shards[share.node].vault.arena(share.holder, "own")
    assert arena is not None
    slot = arena.find(Version(0, 1))
    assert slot is not None
    slot.unique[(slot.chunks * share.share // 2) * slot.chunk_bytes + 5] ^= 1
    vaults = {n: Address("127.0.0.1", s.server.port) for n, s in job.shards.items()}
    job.shards[3].rebuild(0, 0, 1, agreed.rebuilds[0], vaults)
    event = job.shards[3].events.get()
    assert isinstance(event, FetchDone) and event.version is None
    assert event.source == share.node and event.gone and "has changed in memory at its holder" in event.error
    assert job.shards[share.node].events.get() == Damaged(share.holder, "own", 1)
    assert not job.shards[3].vault.holdings().ranks.get(0)


def test_a_share_that_is_refused_does_not_keep_its_node_from_giving_another(jobs: Callable[..., Job]) -> None:
    job = jobs("2+2", 4, nodes=5)
    job.aim()
    job.write(1)
    job.committed(1)
    where = job.assignment_without((0,), 4)
    parts = agree(where, job.offers((0,)), words=job.words).rebuilds[0]
    bad = parts[0][0]
    for share in range(2):
        refused = {(0, each.node, 1, each.version_epoch, each.holder) for each in (bad, parts[1][0])[: share + 1]}
        again = agree(where, job.offers((0,)), frozenset(refused), job.words).rebuilds[0]
        given = {(each.node, each.holder) for part in again for each in part}
        assert not given & {(node, holder) for _, node, _, _, holder in refused}
        assert bad.node in {node for node, _ in given}, "it has shares of other words"


def test_a_copy_that_has_changed_in_memory_makes_way_for_the_one_that_is_rebuilt(jobs: Callable[..., Job]) -> None:
    job = jobs("2+1", 3, nodes=4)
    job.aim()
    job.write(1)
    job.committed(1)
    agreed = agree(job.assignment_without((0,), 3), job.offers((0,)), words=job.words)
    own = job.shards[0].vault.find(0, Version(0, 1), ("own",))[1]
    own.unique[5] ^= 1
    job.shards[0].rebuild(0, 0, 1, agreed.rebuilds[0], job.vaults())
    while not isinstance(event := job.shards[0].events.get(), FetchDone):
        pass
    assert event.version == (0, 1)
    assert job.shards[0].holdings()[0][0] == [(0, 1)], "it is there once, and the other slot is free"


def test_parity_is_complete_only_when_every_part_is_in_and_a_sender_goes_on_where_it_was(
    jobs: Callable[..., Job],
) -> None:
    job = jobs("2+1", 3)
    job.aim()
    for rank in (0, 1):  # not rank 2
        writer = job.writers[rank]
        writer.open(0, 1, b"small state 1 of %d" % rank)
        writer.buffer[:] = job.content(rank, 1)
        writer.complete()
        job.shards[rank].rang(rank)
    for rank in (0, 1):
        job.shards[rank].events.get()  # its parts are in
    complete = {node: sum(map(len, shards.holdings()[2].values())) for node, shards in job.shards.items()}
    assert sum(complete.values()) == 1  # of three words one has both its parts
    job.aim()  # everything is cut off and offered again
    writer = job.writers[2]
    writer.open(0, 1, b"small state 1 of 2")
    writer.buffer[:] = job.content(2, 1)
    writer.complete()
    job.shards[2].rang(2)
    job.committed(1)
    job2 = {node: sum(map(len, shards.holdings()[2].values())) for node, shards in job.shards.items()}
    assert set(job2.values()) == {1}
    assert set(agree(job.assignment_without((1,), 3), job.offers((1,)), words=job.words).rebuilds) == {1}


# ---- what never changes


def _write_constants(job: Job, rank: int, nbytes: int) -> bytes:
    node = job.shards[job.assignment[rank].node]
    writer = ConstantsWriter(node.allocate(constants_of(rank), nbytes, 0))
    content = np.random.default_rng(rank).integers(0, 256, nbytes, dtype=np.uint8).tobytes()
    assert writer.begin() is not None
    writer.buffer[:] = np.frombuffer(content, np.uint8)
    writer.complete()
    node.rang(rank)
    return content


def _at_keepers(job: Job, rank: int) -> None:
    events = job.shards[job.assignment[rank].node].events
    while not (isinstance(event := events.get(), RankCommitted) and event.rank == constants_of(rank)):
        pass


@pytest.mark.parametrize(("redundancy", "active"), [("1", 2), ("2", 3), ("2+1", 3), ("4+2", 6)])
def test_what_never_changes_is_written_once_and_comes_back_with_the_shard(
    redundancy: str, active: int, jobs: Callable[..., Job]
) -> None:
    job = jobs(redundancy, active, nodes=active + 1)
    job.aim()
    content = _write_constants(job, 1, 3 * (1 << 20) + 77)
    _at_keepers(job, 1)
    for generation in range(1, 4):  # more than an arena has slots
        job.write(generation)
        job.committed(generation)
    job.restored(1, active, 3, (1,))
    spare = job.shards[active]
    back = ConstantsWriter(spare.path_of(constants_of(1)))
    assert back.begin() is None and bytes(back.read(CONSTANT)[1]) == content
    assert all(1 in held or not held for held in (spare.holdings()[0],)), "they are no generation of anybody"
    assert not spare.path_of(constants_of(0)), "and a rank without any has none"


def test_a_keeper_that_has_lost_what_never_changes_gets_it_again_in_the_next_epoch(jobs: Callable[..., Job]) -> None:
    job = jobs("1", 2)
    job.aim()
    content = _write_constants(job, 0, 1 << 20)
    _at_keepers(job, 0)
    kept = job.shards[1].vault
    _, slot = kept.find(constants_of(0), CONSTANT, ("peer",))
    slot.unique[5] ^= 1
    slot.give_up(slot.turn)  # as the scrubber does
    with pytest.raises(ChecksumMismatch):
        kept.find(constants_of(0), CONSTANT)
    job.epoch = 1
    for shards in job.shards.values():
        shards.server.set_epoch(1)
    job.aim()
    _at_keepers(job, 0)
    assert bytes(kept.find(constants_of(0), CONSTANT)[1].unique) == content


def test_own_constants_that_have_changed_in_memory_are_had_from_a_keeper(jobs: Callable[..., Job]) -> None:
    job = jobs("1", 2)
    job.aim()
    content = _write_constants(job, 0, 1 << 20)
    _at_keepers(job, 0)
    owner, at = job.shards[0], job.shards[1].server
    slot = owner.vault.find(constants_of(0), CONSTANT, ("own",))[1]
    slot.unique[5] ^= 1
    owner.recheck(constants_of(0))
    while not isinstance(event := owner.events.get(), Damaged):
        pass
    assert event == Damaged(constants_of(0), "own", CONSTANT.generation)
    owner.restore_constants(job.epoch, 0, [Target("127.0.0.1", at.port)], {})
    until(lambda: slot.complete)
    assert bytes(slot.unique) == content


def test_memory_of_what_never_changes_is_freed_where_it_belongs_no_more(jobs: Callable[..., Job]) -> None:
    job = jobs("1", 2)
    job.aim()
    _write_constants(job, 0, 1 << 20)
    _at_keepers(job, 0)
    owner, keeper = job.shards[0], job.shards[1]
    owner.keep_only({0, constants_of(0)}, {1, constants_of(1)}, set())
    keeper.keep_only({1, constants_of(1)}, {0, constants_of(0)}, set())
    assert owner.path_of(constants_of(0)) and keeper.vault.arena(constants_of(0), "peer") is not None
    keeper.keep_only({1, constants_of(1)}, set(), set())
    assert keeper.vault.arena(constants_of(0), "peer") is None


def test_a_copy_that_has_changed_at_its_owner_does_not_keep_newer_ones_from_being_committed(
    jobs: Callable[..., Job],
) -> None:
    job = jobs("1", 2)
    job.aim()
    job.write(1)
    job.committed(1)
    own = job.shards[0].vault.find(0, Version(0, 1), ("own",))[1]
    kept = job.shards[1].vault.find(0, Version(0, 1), ("peer",))[1]
    for slot in (own, kept):
        slot.unique[5] ^= 1
    kept.give_up(kept.turn)  # its scrubber was there first: the owner sends it again
    job.epoch = 1
    for shards in job.shards.values():
        shards.server.set_epoch(1)
    job.aim()
    job.write(2)
    job.committed(2)
    assert own.damaged or own.version == Version(1, 2)  # what is given up may be written anew at once
    shards = job.shards[0]
    newest = shards.vault.find(0, Version(1, 2), ("own",))[1]
    newest.unique[7] ^= 1
    shards.recheck(0)
    while not isinstance(event := shards.events.get(), Damaged):
        pass
    assert event == Damaged(0, "own", 2) and newest.damaged


# ---- a shard that does not come at the first try


class Breaking:
    """Stands before a vault: the first connections are reset, later ones go through."""

    def __init__(self, port: int, breaks: int) -> None:
        self._port, self.left = port, breaks
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.left:
                self.left -= 1
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._port))
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 20):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


def _committed_pair(jobs: Callable[..., Job], redundancy: str = "1", active: int = 2) -> Job:
    job = jobs(redundancy, active, nodes=active + 1)
    job.aim()
    job.write(1)
    job.committed(1)
    return job


def _fetched(job: Job, node: int) -> FetchDone:
    while not isinstance(event := job.shards[node].events.get(), FetchDone):
        pass
    return event


def test_a_connection_that_breaks_is_tried_again_and_blames_nobody(jobs: Callable[..., Job]) -> None:
    job = _committed_pair(jobs)
    way = Breaking(job.shards[1].server.port, 5)
    job.shards[2].fetch(0, 0, 1, Source(1, 0), way.address)
    done = _fetched(job, 2)
    way.close()
    assert done.version == (0, 1) and not done.error and way.left == 0


def test_a_share_whose_connection_breaks_is_asked_for_again(jobs: Callable[..., Job]) -> None:
    job = _committed_pair(jobs, "2+1", 3)
    agreed = agree(job.assignment_without((0,), 3), job.offers((0,)), words=job.words)
    ways = {n: Breaking(s.server.port, 3) for n, s in job.shards.items() if n}
    job.shards[3].rebuild(0, 0, 1, agreed.rebuilds[0], {n: way.address for n, way in ways.items()})
    done = _fetched(job, 3)
    for way in ways.values():
        way.close()
    assert done.version == (0, 1) and not done.error


def test_a_whole_copy_that_is_refused_does_not_keep_its_node_from_giving_shares(jobs: Callable[..., Job]) -> None:
    """Found by the simulation: a shard that had been rebuilt changed in memory, and its generation was given up."""
    job = _committed_pair(jobs, "2+1", 3)
    places, offers = job.assignment_without((0,), 3), job.offers((0,))
    parts = agree(places, offers, words=job.words).rebuilds[0]
    for share in parts[0]:
        whole = frozenset({(0, share.node, 1, 0, -1)})
        assert list(agree(places, offers, whole, job.words).rebuilds) == [0]
        with pytest.raises(NoCommonGeneration):
            agree(places, offers, frozenset({(0, share.node, 1, 0, share.holder)}), job.words)


def test_another_copy_is_taken_where_the_first_cannot_be_reached(
    jobs: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_PATIENCE_S", 0.0)
    job = _committed_pair(jobs, "2", 3)
    way = Breaking(job.shards[1].server.port, 1 << 30)
    others = [Address("127.0.0.1", job.shards[2].server.port)]
    job.shards[3].fetch(0, 0, 1, Source(1, 0, [2]), way.address, others)
    assert _fetched(job, 3).version == (0, 1)
    job.shards[3].vault.drop(0)
    job.shards[3].fetch(0, 0, 1, Source(1, 0), way.address)
    done = _fetched(job, 3)
    way.close()
    assert done.error and not done.own and (done.source, done.tried) == (1, 0)


def test_a_node_without_room_says_that_the_fault_is_its_own(jobs: Callable[..., Job]) -> None:
    job = _committed_pair(jobs)
    job.shards[2].vault.limit_bytes = 1
    job.shards[2].fetch(0, 0, 1, Source(1, 0), Address("127.0.0.1", job.shards[1].server.port))
    done = _fetched(job, 2)
    assert done.own and "--deadpool-host-memory" in done.error


def _asked_for(job: Job, node: int, generation: int) -> None:
    """Rank 0's node is lost: its shard is to come to ``node``."""
    agreed = agree(job.assignment_without((0,), node), job.offers((0,)), words=job.words)
    vaults = {n: at for n, at in job.vaults().items() if n}
    if job.scheme.mirror:
        job.shards[node].fetch(0, 0, generation, agreed.sources[0], vaults[agreed.sources[0].node])
    else:
        job.shards[node].rebuild(0, 0, generation, agreed.rebuilds[0], vaults)


@pytest.mark.parametrize(("redundancy", "active"), [("1", 2), ("2+1", 3)])
def test_a_part_that_fails_for_whatever_reason_is_never_taken_for_whole(
    redundancy: str, active: int, jobs: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older generation lies in the slot, with checksums that fit: nobody could tell it from a part that has come."""
    job = _committed_pair(jobs, redundancy, active)
    spare, kept = job.shards[active], job.content(0, 1)
    for generation in (0, 2):

        def fill(open_slot: Callable[[int, int], Slot], check: Callable[[], None]) -> int:
            open_slot(job.unique[0], job.room[0]).unique[:] = (255 - kept).tobytes()
            return 0

        store_shard(spare.vault, 0, 0, Version(0, generation), fill)
    module = sys.modules["deadpool_megatron.vault." + ("transfer" if job.scheme.mirror else "rebuild")]
    connect, failing = module.connect, [3]

    def without_descriptors(*args: object) -> object:
        if failing[0] and threading.current_thread().name in ("vault-fetch", "vault-rebuild"):
            failing[0] -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return connect(*args)

    monkeypatch.setattr(module, "connect", without_descriptors)
    _asked_for(job, active, 1)
    assert _fetched(job, active).version == (0, 1) and not failing[0]
    assert bytes(SlotWriter(spare.path_of(0)).read(Version(0, 1))[1]) == kept.tobytes()
    monkeypatch.setattr(fetching, "_PATIENCE_S", 0.0)
    spare.vault.drop(0)
    failing[0] = 1 << 30
    _asked_for(job, active, 1)
    done = _fetched(job, active)
    assert done.own and "Too many open files" in done.error


@pytest.mark.timeout(30)
@pytest.mark.parametrize("way", ["fetch", "rebuild"])
def test_an_error_that_nobody_has_thought_of_is_told_and_blames_no_source(
    way: str, jobs: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    job = _committed_pair(jobs, *(("1", 2) if way == "fetch" else ("2+1", 3)))
    monkeypatch.setattr(agent_shards, way, fails)
    _asked_for(job, len(job.shards) - 1, 1)
    done = _fetched(job, len(job.shards) - 1)
    assert done.own and "can't start new thread" in done.error


@pytest.mark.timeout(60)
def test_commits_go_on_when_descriptors_were_short_for_a_moment(
    jobs: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At who sends, and at who keeps: neither's thread ends."""
    module = sys.modules["deadpool_megatron.vault.sender"]
    connect, failing = module.connect, [4]

    def without_descriptors(*args: object) -> object:
        failing[0] -= 1
        if failing[0] >= 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return connect(*args)

    job = jobs("1", 2)
    accepting, port = job.shards[1].server._accepting, job.shards[1].server.port
    with socket.socket() as client, _no_descriptor_left():
        client.connect(("127.0.0.1", port))
        until(lambda: "cannot take a connection" in caplog.text or not accepting.is_alive())
    monkeypatch.setattr(module, "connect", without_descriptors)
    job.aim()
    job.write(1)
    job.committed(1)
    assert failing[0] < 0


@contextlib.contextmanager
def _no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_transfer_of_an_older_epoch_that_does_not_end_is_no_fault_of_the_source(
    jobs: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(transfer, "Deadlines", lambda: Deadlines(idle=0.05))
    job = _committed_pair(jobs)
    spare = job.shards[2]
    older = spare.vault.intakes.begin(0, "rank 0", 0, 0.0)  # it clears memory, or a disk holds it
    _asked_for(job, 2, 1)
    done = _fetched(job, 2)
    assert done.own and "does not end" in done.error and older.is_cut


@pytest.mark.parametrize(("redundancy", "active"), [("1", 2), ("2+1", 3)])
def test_what_never_changes_comes_before_the_shard_and_from_who_keeps_it_now(
    redundancy: str, active: int, jobs: Callable[..., Job]
) -> None:
    """In the next epoch nobody would look for it where the shard is already, nor at keepers of another placement."""
    job = jobs(redundancy, active, nodes=active + 1)
    job.aim()
    content = _write_constants(job, 1, (1 << 20) + 77)
    _at_keepers(job, 1)
    job.write(1)
    job.committed(1)
    agreed = agree(job.assignment_without((1,), active), job.offers((1,)), words=job.words)
    spare, vaults = job.shards[active], {n: at for n, at in job.vaults().items() if n != 1}
    spare.vault.limit_bytes = 3 << 20  # for the one, and not for the other
    if job.scheme.mirror:
        spare.fetch(0, 1, 1, agreed.sources[1], vaults[agreed.sources[1].node])
    else:
        spare.rebuild(0, 1, 1, agreed.rebuilds[1], vaults)
    assert _fetched(job, active).own
    assert bytes(ConstantsWriter(spare.path_of(constants_of(1))).read(CONSTANT)[1]) == content
