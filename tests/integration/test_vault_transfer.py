"""The promise: shards reach the peer and come back unchanged, only between members, only in the current epoch."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.shards import Damaged, FetchDone, Shards
from deadpool_megatron.vault import (
    ChecksumMismatch,
    NotHeld,
    Replicator,
    SlotWriter,
    StaleEpoch,
    Target,
    Vault,
    VaultError,
    VaultServer,
    Version,
    fetch,
)
from deadpool_megatron.vault.errors import DeadlinePassed, GivenUp, Refused, TransferFailed
from deadpool_megatron.vault.frames import Begin, Begun, Bytes, Refusal
from deadpool_megatron.vault.wire import Deadlines, connect
from vault_processes import failures
from waiting import until

SECRET = bytes(range(32))
CHUNK = 1 << 16
UNIQUE = 3 * (1 << 20) + 777
PATIENT = Deadlines(connect=3600.0, idle=3600.0, backoff=0.02, backoff_limit=0.1, late=0.0)  # none passes in a test
SHORT = Deadlines(connect=1.0, idle=1.0, backoff=0.02, backoff_limit=0.1)  # for who really says nothing
HOLDER = Deadlines(connect=3600.0, idle=3.0, backoff=0.02, backoff_limit=0.1)


@dataclass
class Node:
    """One node's vault with its server and replicator, as an agent has them."""

    number: int
    deadlines: Deadlines = PATIENT
    secret: bytes = SECRET
    chunk_bytes: int = CHUNK
    commits: queue.Queue[tuple[int, int, int]] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.vault = Vault(f"x{os.getpid()}", self.number, chunk_bytes=self.chunk_bytes)
        self.server = VaultServer(self.vault, self.secret, "127.0.0.1", deadlines=self.deadlines)
        self.server.start()
        self.replicator = Replicator(self.vault, self.secret, lambda *c: self.commits.put(c), self.deadlines)

    @property
    def address(self) -> tuple[str, int]:
        return self.server.host, self.server.port

    def writer(self, rank: int = 0, unique: int = UNIQUE) -> SlotWriter:
        return SlotWriter(self.vault.allocate_own(rank, unique, 4096).path)

    def write(self, writer: SlotWriter, epoch: int, generation: int, seed: int | None = None) -> bool:
        if writer.open(epoch, generation, b"small state of %d" % generation) is None:
            return False
        writer.buffer[:] = content(generation if seed is None else seed, writer.unique_bytes)
        writer.complete()
        self.replicator.notify(writer.arena.info.rank)
        return True

    def close(self) -> None:
        self.replicator.stop()
        self.server.stop()
        self.vault.close()


def content(seed: int, size: int = UNIQUE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.fixture
def nodes() -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def make(**settings: object) -> Node:
        made.append(Node(len(made), **settings))
        return made[-1]

    yield make
    for node in made:
        node.close()


def test_a_shard_reaches_the_peer_and_a_spare_gets_it_back_after_the_owner_is_gone(nodes: Callable[..., Node]) -> None:
    owner, peer, spare = nodes(), nodes(), nodes()
    writer = owner.writer()
    owner.replicator.set_targets(0, {0: [Target(*peer.address)]})
    assert owner.write(writer, 0, 7)
    assert owner.commits.get() == (0, 0, 7)
    owner.close()
    for node in (peer, spare):
        node.server.set_epoch(1)
    assert fetch(spare.vault, SECRET, peer.address, 0, 1, Version(0, 7), PATIENT) == UNIQUE + len(b"small state of 7")
    arena = spare.vault.arena(0, "own")
    assert arena is not None
    small, unique = SlotWriter(arena.path).read(Version(0, 7))
    assert small == b"small state of 7"
    assert np.array_equal(np.frombuffer(unique, np.uint8), content(7))


def test_with_two_copies_a_version_is_safe_only_when_both_peers_have_it_and_either_gives_it_back(
    nodes: Callable[..., Node],
) -> None:
    owner, first, second, spare = nodes(), nodes(), nodes(), nodes()
    silent = socket.create_server(("127.0.0.1", 0))
    writer = owner.writer()
    owner.replicator.set_targets(0, {0: [Target(*first.address), Target(*silent.getsockname()[:2])]})
    owner.write(writer, 0, 7)
    until(lambda: bool(first.vault.holdings().ranks.get(0)))
    assert owner.commits.empty(), "one of two copies is not enough"
    owner.replicator.set_targets(0, {0: [Target(*first.address), Target(*second.address)]})
    assert owner.commits.get() == (0, 0, 7)
    owner.close()
    for peer in (first, second):
        spare.vault.drop(0)
        fetch(spare.vault, SECRET, peer.address, 0, 0, Version(0, 7), PATIENT)
    assert owner.commits.empty()
    silent.close()


def test_the_first_bytes_travel_while_the_worker_still_writes(nodes: Callable[..., Node]) -> None:
    owner, peer = nodes(), nodes()
    writer = owner.writer()
    owner.replicator.set_targets(0, {0: [Target(*peer.address)]})
    assert writer.open(0, 1, b"s") is not None
    writer.buffer[:] = content(1)
    writer.publish(20 * CHUNK)
    owner.replicator.notify(0)
    until(lambda: peer.vault.arena(0, "peer") is not None)
    arena = peer.vault.arena(0, "peer")
    assert arena is not None
    until(
        lambda: bytes(arena.slots[0].unique[19 * CHUNK : 20 * CHUNK]) == content(1)[19 * CHUNK : 20 * CHUNK].tobytes()
    )
    assert owner.commits.empty()
    assert peer.vault.holdings().ranks[0] == ()
    writer.complete()
    owner.replicator.notify(0)
    assert owner.commits.get() == (0, 0, 1)


def test_many_generations_in_a_row_commit_in_order_and_the_peer_holds_what_the_owner_does(
    nodes: Callable[..., Node],
) -> None:
    owner, peer = nodes(), nodes()
    writers = [owner.writer(rank) for rank in range(3)]
    owner.replicator.set_targets(0, {rank: [Target(*peer.address)] for rank in range(3)})
    for generation in range(20):
        for writer in writers:
            assert owner.write(writer, 0, generation)
        done = {owner.commits.get() for _ in writers}
        assert done == {(rank, 0, generation) for rank in range(3)}
        owner.vault.set_committed(0, generation)
        peer.vault.set_committed(0, generation)
    versions = lambda node: {r: [h.generation for h in held] for r, held in node.vault.holdings().ranks.items()}  # noqa: E731
    assert versions(peer) == versions(owner) == {rank: [18, 19] for rank in range(3)}
    for rank in range(3):
        peer.vault.find(rank, Version(0, 19), ("peer",))[1].verify()


def test_a_slot_opened_again_while_it_is_sent_is_abandoned_and_never_committed(nodes: Callable[..., Node]) -> None:
    owner, peer = nodes(), nodes()
    writer = owner.writer()
    owner.replicator.set_targets(0, {0: [Target(*peer.address)]})
    for generation in range(5):
        assert writer.open(0, generation, b"x") is not None
        writer.buffer[:] = generation
        writer.publish(10 * CHUNK)
        owner.replicator.notify(0)
        time.sleep(0.03)
    writer.complete()
    owner.replicator.notify(0)
    assert owner.commits.get() == (0, 0, 4)
    assert owner.commits.empty()
    assert [h.generation for h in peer.vault.holdings().ranks[0]] == [4]
    arena = peer.vault.arena(0, "peer")
    assert arena is not None
    slot = arena.find(Version(0, 4))
    assert slot is not None
    assert np.all(np.frombuffer(slot.unique, np.uint8) == 4)


def test_the_wrong_secret_gets_nothing_and_writes_nothing(nodes: Callable[..., Node]) -> None:
    owner, stranger = nodes(), nodes(secret=bytes(32))
    writer = owner.writer()
    owner.write(writer, 0, 1)
    until(lambda: bool(owner.vault.holdings().ranks[0]))
    with pytest.raises(Refused, match="another job") as refused:
        fetch(stranger.vault, stranger.secret, owner.address, 0, 0, Version(0, 1), PATIENT)
    assert refused.value.code == "not-a-member"
    theirs = stranger.writer(5)
    stranger.replicator.set_targets(0, {5: [Target(*owner.address)]})
    stranger.write(theirs, 0, 1)
    until(lambda: 5 in failures(stranger.replicator))
    assert 5 not in owner.vault.holdings().ranks
    assert owner.server.refused_members >= 2


def test_a_server_that_does_not_know_the_secret_is_not_believed() -> None:
    """A client must not take a shard from, or give one to, something that only listens on the right port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def imposter() -> None:
        sock, _ = listener.accept()
        sock.sendall(b"DPVAULT3" + bytes(32))
        sock.recv(64, socket.MSG_WAITALL)
        sock.sendall(bytes(32))
        sock.close()

    thread = threading.Thread(target=imposter)
    thread.start()
    with pytest.raises(Refused, match="does not know our job secret"):
        connect("127.0.0.1", listener.getsockname()[1], SECRET, PATIENT)
    thread.join()
    listener.close()


def test_garbage_on_the_wire_changes_nothing_and_kills_nothing(nodes: Callable[..., Node]) -> None:
    node = nodes()
    for junk in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(500), b""):
        with socket.create_connection(node.address) as sock:
            sock.sendall(junk)
    for body in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x02\x93\xc0", b"\x00\x00\x00\x00"):
        channel = connect(*node.address, SECRET, PATIENT)
        channel.sock.sendall(body + bytes(16))
        with pytest.raises(TransferFailed):
            channel.receive()
        channel.close()
    writer = node.writer()
    node.write(writer, 0, 1)
    until(lambda: bool(node.vault.holdings().ranks[0]))


def test_a_zombie_of_an_older_epoch_is_refused_and_cut_off(nodes: Callable[..., Node]) -> None:
    zombie, peer = nodes(), nodes()
    writer = zombie.writer()
    zombie.replicator.set_targets(0, {0: [Target(*peer.address)]})
    assert writer.open(0, 1, b"x") is not None
    writer.publish(10 * CHUNK)
    zombie.replicator.notify(0)  # in the middle of a shard when the job goes on without it
    until(lambda: peer.vault.arena(0, "peer") is not None)
    peer.server.set_epoch(1)
    writer.complete()
    zombie.replicator.notify(0)
    until(lambda: "epoch 1" in failures(zombie.replicator).get(0, ""))
    assert zombie.commits.empty()
    assert peer.vault.holdings().ranks[0] == ()
    assert peer.server.refusals["stale epoch"] > 0
    with pytest.raises(StaleEpoch):
        fetch(Vault("zombie", 9), SECRET, peer.address, 0, 0, Version(0, 1), PATIENT)


def test_a_new_epoch_cuts_off_a_shard_that_is_being_received(nodes: Callable[..., Node]) -> None:
    peer = nodes()
    channel = connect(*peer.address, SECRET, PATIENT)
    channel.send(Begin(0, 0, 0, 1, UNIQUE, 100, 5, CHUNK, (1 << 64) - 1, 0))
    assert channel.receive() == Begun(0, False)
    peer.server.set_epoch(1)
    with pytest.raises(TransferFailed):
        channel.receive()
    channel.close()


def test_a_changed_byte_in_flight_is_never_accepted(nodes: Callable[..., Node]) -> None:
    owner, peer = nodes(), nodes()
    proxy = FlippingProxy(peer.address, flip_at=UNIQUE // 2)
    writer = owner.writer()
    owner.replicator.set_targets(0, {0: [Target(*proxy.address)]})
    owner.write(writer, 0, 1)
    # the first passage is damaged and refused, the next one is clean
    assert owner.commits.get() == (0, 0, 1)
    assert peer.server.mismatches == 1
    peer.vault.find(0, Version(0, 1), ("peer",))[1].verify()
    proxy.close()


def test_a_changed_byte_in_the_source_vault_is_never_restored(nodes: Callable[..., Node]) -> None:
    owner, peer, spare = nodes(), nodes(), nodes()
    writer = owner.writer()
    owner.replicator.set_targets(0, {0: [Target(*peer.address)]})
    owner.write(writer, 0, 1)
    owner.commits.get()
    arena = peer.vault.arena(0, "peer")
    assert arena is not None
    slot = arena.find(Version(0, 1))
    assert slot is not None
    slot.unique[UNIQUE - 5] ^= 1
    for source, into in ((peer.address, spare.vault), (peer.vault, peer.vault)):
        with pytest.raises(ChecksumMismatch):
            fetch(into, SECRET, source, 0, 0, Version(0, 1), PATIENT)
        restored = into.arena(0, "own")
        assert restored is None or restored.find(Version(0, 1)) is None


def test_a_holder_that_is_told_of_a_complaint_gives_up_what_has_changed_and_gives_again_what_has_not(
    nodes: Callable[..., Node],
) -> None:
    owner, spare = nodes(), nodes()
    found: list[tuple[int, str, Version]] = []
    owner.server._on_damaged = lambda *what: found.append(what)
    writer = owner.writer()
    owner.write(writer, 0, 5)
    until(lambda: owner.vault.holdings().ranks[0])
    assert fetch(spare.vault, SECRET, owner.address, 0, 0, Version(0, 5), PATIENT, doubted=True) > UNIQUE
    assert not found
    spare.vault.drop(0, "own")
    _, slot = owner.vault.find(0, Version(0, 5))
    slot.unique[1000] ^= 1
    with pytest.raises(GivenUp, match="changed in memory at its holder"):
        fetch(spare.vault, SECRET, owner.address, 0, 0, Version(0, 5), PATIENT, doubted=True)
    assert found == [(0, "own", Version(0, 5))] and not owner.vault.holdings().ranks[0]


@pytest.mark.parametrize(("times", "comes"), [(4, True), (8, False)])
def test_one_complaint_condemns_no_copy(nodes: Callable[..., Node], times: int, comes: bool) -> None:
    """The first two connections ask only; each try then has two."""
    owner = nodes(chunk_bytes=1 << 20)
    owner.write(owner.writer(), 0, 5)
    until(lambda: owner.vault.holdings().ranks[0])
    between = FlippingProxy(owner.address, 200_000, times, back=True)
    spare = Shards(f"y{os.getpid()}", 9, SECRET, "127.0.0.1")
    try:
        spare.fetch(0, 0, 5, r.Source(0, 0, []), r.Address(*between.address))
        done = spare.events.get()
        assert isinstance(done, FetchDone)
        assert (done.version == (0, 5)) is comes and bool(done.error) is not comes
        assert owner.vault.holdings().ranks[0], "it is good, whoever complains"
    finally:
        spare.close()
        between.close()


def test_a_copy_that_has_changed_is_found_out_by_its_holder_and_told_as_gone() -> None:
    owner = Shards(f"z{os.getpid()}", 0, SECRET, "127.0.0.1")
    spare = Shards(f"z{os.getpid()}", 1, SECRET, "127.0.0.1")
    try:
        writer = SlotWriter(owner.allocate(0, UNIQUE, 100))
        assert writer.open(0, 5, b"small") is not None
        writer.buffer[:] = content(5, writer.unique_bytes)
        writer.complete()
        assert owner.holdings()[0] == {0: [(0, 5)]}
        owner.corrupt(0)
        spare.fetch(0, 0, 5, r.Source(0, 0, []), r.Address("127.0.0.1", owner.server.port))
        done = spare.events.get()
        assert isinstance(done, FetchDone) and done.version is None and done.gone
        assert owner.events.get() == Damaged(0, "own", 5) and not owner.holdings()[0]
    finally:
        spare.close()
        owner.close()


def test_a_peer_that_dies_and_comes_back_elsewhere_gets_the_committed_version_again(nodes: Callable[..., Node]) -> None:
    owner, first, second = nodes(), nodes(), nodes()
    writer = owner.writer()
    owner.replicator.set_targets(0, {0: [Target(*first.address)]})
    owner.write(writer, 0, 1)
    owner.commits.get()
    owner.vault.set_committed(0, 1)
    first.close()
    assert owner.write(writer, 0, 2)  # the worker is not disturbed
    until(lambda: 0 in failures(owner.replicator))
    owner.server.set_epoch(1)
    owner.replicator.set_targets(1, {0: [Target(*second.address)]})
    until(lambda: [h.generation for h in second.vault.holdings().ranks.get(0, ())] == [1])
    assert owner.commits.get() == (0, 0, 1)  # safe again, under the version it had
    assert owner.write(writer, 1, 1)
    assert owner.commits.get() == (0, 1, 1)
    held = [(h.epoch, h.generation) for h in second.vault.holdings().ranks[0]]
    assert held == [(0, 1), (1, 1)]


def test_a_peer_that_accepts_and_then_says_nothing_costs_the_worker_nothing(nodes: Callable[..., Node]) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    for deadlines in (PATIENT, SHORT):
        owner = nodes(deadlines=deadlines)
        writer = owner.writer()
        owner.replicator.set_targets(0, {0: [Target(*silent.getsockname()[:2])]})
        for generation in (0, 1):
            assert owner.write(writer, 0, generation)
            until(lambda owner=owner: bool(owner.vault.holdings().ranks[0]))
    until(lambda: "1 s" in failures(owner.replicator).get(0, ""))
    with pytest.raises(DeadlinePassed):
        fetch(Vault("unused", 9), SECRET, silent.getsockname()[:2], 0, 0, Version(0, 1), SHORT)
    silent.close()


def test_everything_stops_whatever_it_is_doing_and_no_deadline_is_waited_for(nodes: Callable[..., Node]) -> None:
    owner, peer = nodes(), nodes()
    silent = socket.create_server(("127.0.0.1", 0))
    # connected and idle; in the middle of a shard; waiting for a proof; connecting into the void; nothing to do
    peers = {0: peer.address, 1: peer.address, 2: silent.getsockname()[:2], 3: ("10.255.255.1", 9), 4: None}
    writers = [owner.writer(rank) for rank in peers]
    owner.replicator.set_targets(0, {rank: [Target(*a)] if a else [] for rank, a in peers.items()})
    for writer in writers:
        if writer.arena.info.rank == 1:
            writer.open(0, 1, b"")
            writer.publish(5 * CHUNK)
            owner.replicator.notify(1)
        else:
            owner.write(writer, 0, 1)
    assert owner.commits.get() == (0, 0, 1)
    pending = socket.create_connection(peer.address)  # never proves anything
    time.sleep(0.2)
    for stop in (owner.replicator.stop, peer.server.stop, owner.server.stop, peer.replicator.stop):
        stop()
    pending.close()
    silent.close()
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("vault-") for name in names)


def test_taking_the_memory_for_a_big_shard_may_last_longer_than_its_holder_waits(
    nodes: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 32 << 20  # more than a socket takes unread
    owner, spare = nodes(deadlines=HOLDER), nodes()
    owner.write(owner.writer(unique=size), 0, 1)
    until(lambda: bool(owner.vault.holdings().ranks[0]))
    allocate = spare.vault.allocate_own

    def slowly(rank: int, *sizes: int) -> object:
        if spare.vault.arena(rank, "own") is None:
            time.sleep(2 * HOLDER.idle)
        return allocate(rank, *sizes)

    monkeypatch.setattr(spare.vault, "allocate_own", slowly)
    assert fetch(spare.vault, SECRET, owner.address, 0, 0, Version(0, 1), PATIENT) > size
    spare.vault.find(0, Version(0, 1), ("own",))[1].verify()


def test_a_local_copy_needs_no_network(nodes: Callable[..., Node]) -> None:
    owner, peer = nodes(), nodes()
    writer = owner.writer()
    owner.replicator.set_targets(0, {0: [Target(*peer.address)]})
    owner.write(writer, 0, 1)
    owner.commits.get()
    peer.server.stop()
    fetch(peer.vault, SECRET, peer.vault, 0, 0, Version(0, 1))
    peer.vault.find(0, Version(0, 1), ("own",))[1].verify()


def test_what_is_not_held_is_said_so(nodes: Callable[..., Node]) -> None:
    owner, spare = nodes(), nodes()
    with pytest.raises(NotHeld, match=r"version \(0, 9\) of rank 0"):
        fetch(spare.vault, SECRET, owner.address, 0, 0, Version(0, 9), PATIENT)
    with pytest.raises(NotHeld):
        fetch(spare.vault, SECRET, owner.vault, 0, 0, Version(0, 9), PATIENT)


def test_a_peer_without_room_says_so_and_the_owner_goes_on(nodes: Callable[..., Node]) -> None:
    owner, peer = nodes(), nodes()
    channel = connect(*peer.address, SECRET, PATIENT)
    channel.send(Begin(0, 0, 0, 1, 1 << 50, 100, 5, CHUNK, (1 << 64) - 1, 0))
    answer = channel.receive()
    assert isinstance(answer, Refusal)
    assert answer.code == "no-room"
    assert "bytes in /dev/shm" in answer.message
    channel.close()
    writer = owner.writer()
    owner.replicator.set_targets(0, {0: [Target(*peer.address)]})
    owner.write(writer, 0, 1)
    assert owner.commits.get() == (0, 0, 1)


def test_a_shard_of_another_size_takes_the_place_of_one_nobody_needs_only(nodes: Callable[..., Node]) -> None:
    owner, peer = nodes(), nodes()
    owner.replicator.set_targets(0, {0: [Target(*peer.address)]})
    owner.write(owner.writer(), 0, 1)
    owner.commits.get()
    owner.vault.drop(0)
    assert owner.write(owner.writer(unique=5000), 0, 2)
    until(lambda: "another size" in failures(owner.replicator).get(0, ""))
    peer.vault.set_committed(0, 2)  # now (0, 1) is no longer needed
    assert owner.commits.get() == (0, 0, 2)


def test_a_transfer_cut_in_the_middle_is_not_held(nodes: Callable[..., Node]) -> None:
    peer = nodes()
    channel = connect(*peer.address, SECRET, PATIENT)
    channel.send(Begin(0, 0, 0, 1, UNIQUE, 100, 5, CHUNK, (1 << 64) - 1, 0))
    assert channel.receive() == Begun(0, False)
    channel.send(Bytes(0, 0, [123]))
    channel.sock.sendall(b"ab")
    channel.close()
    until(lambda: not peer.server._channels)
    assert peer.vault.holdings().ranks[0] == ()
    arena = peer.vault.arena(0, "peer")
    assert arena is not None
    assert not arena.slots[0].sealed


WRITER = """
import sys, time
from deadpool_megatron.vault import SlotWriter
writer = SlotWriter(sys.argv[1])
generation = int(sys.argv[2])
while True:
    if writer.open(0, generation, b"g%d" % generation) is None:
        continue
    step = writer.unique_bytes // 16
    for at in range(0, writer.unique_bytes, step):
        writer.buffer[at : at + step] = generation % 251
        writer.publish(min(at + step, writer.unique_bytes))
        time.sleep(0.0005)
    writer.complete()
    print(generation, flush=True)
    generation += 1
"""


def test_a_writer_killed_at_any_moment_leaves_only_whole_versions(nodes: Callable[..., Node]) -> None:
    owner, peer = nodes(), nodes()
    path = owner.vault.allocate_own(0, UNIQUE, 100).path
    owner.replicator.set_targets(0, {0: [Target(*peer.address)]})
    generator = np.random.default_rng(5)
    generation, torn = 0, 0
    for _ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, path, str(generation)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        end = None
        while end is None or time.monotonic() < end:
            owner.replicator.notify(0)
            try:
                _, _, done = owner.commits.get(timeout=0.002)
            except queue.Empty:
                continue
            owner.vault.set_committed(0, done)
            peer.vault.set_committed(0, done)
            end = end or time.monotonic() + float(generator.uniform(0, 0.02))
        child.kill()
        child.wait()
        child.stdout.close()
        while owner.vault.checksum(0):
            pass
        arena = owner.vault.arena(0, "own")
        assert arena is not None
        torn += sum(not slot.sealed for slot in arena.slots)
        held = owner.vault.holdings().ranks[0]
        assert held
        for one in held:
            slot = arena.find(Version(one.epoch, one.generation))
            assert slot is not None
            assert np.all(np.frombuffer(slot.unique, np.uint8) == one.generation % 251)
            owner.vault.find(0, Version(one.epoch, one.generation), ("own",))[1].verify()
        kept = peer.vault.arena(0, "peer")  # still written to: what the dead writer has published is sent
        assert kept is not None and all(slot.recheck() for slot in kept.slots)
        generation = max((slot.version or Version(0, 0)).generation for slot in arena.slots) + 1
        owner.vault.set_floor(0, generation)  # a killed worker's last version is never committed by the others
    print(f"{generation} generations, {torn} torn slots seen, none offered")
    assert torn > 0


@pytest.mark.perf
def test_transfer_speed_against_a_raw_socket(nodes: Callable[..., Node]) -> None:
    size = 128 << 20
    owner, peer, spare = (nodes(chunk_bytes=1 << 20) for _ in range(3))
    writer = owner.writer(unique=size)
    writer.open(0, 1, b"x")
    writer.buffer[:] = 5
    writer.complete()
    while owner.vault.checksum(0):
        pass
    times: dict[str, list[float]] = {
        "raw socket": [],
        "replicated": [],
        "fetched, 1 stream": [],
        "fetched, 2 streams": [],
    }
    for _ in range(3):
        peer.vault.drop(0)
        peer.vault.allocate_peer(0, size, 4096)
        times["raw socket"].append(_raw_seconds(owner.vault, size))
        start = time.perf_counter()
        owner.replicator.set_targets(0, {0: [Target(*peer.address)]})
        owner.commits.get()
        times["replicated"].append(time.perf_counter() - start)
        for streams, name in ((1, "fetched, 1 stream"), (2, "fetched, 2 streams")):
            spare.vault.drop(0)
            spare.vault.allocate_own(0, size, 4096)
            start = time.perf_counter()
            fetch(spare.vault, SECRET, peer.address, 0, 0, Version(0, 1), PATIENT, streams)
            times[name].append(time.perf_counter() - start)
    best = {name: min(each) for name, each in times.items()}
    rates = ", ".join(f"{name} {size / seconds / 1e9:.2f}" for name, seconds in best.items())
    print(f"GB/s, best of 3, one process: {rates}; all verified (load {os.getloadavg()[0]:.0f})")
    # a machine that runs other things too makes single ratios wild; this only finds a path that has become slow
    assert best["replicated"] < 10 * best["raw socket"]
    assert best["fetched, 2 streams"] < 10 * best["raw socket"]


def _raw_seconds(vault: Vault, size: int) -> float:
    """The same bytes from shared memory to memory over one loopback socket, with nothing around it."""
    arena = vault.arena(0, "own")
    assert arena is not None
    view, target = arena.slots[0].unique, memoryview(bytearray(size))
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        sock.sendall(view)
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with socket.create_connection(listener.getsockname()) as sock:
        start = time.perf_counter()
        while target:
            target = target[sock.recv_into(target) :]
        seconds = time.perf_counter() - start
    thread.join()
    listener.close()
    return seconds


class FlippingProxy:
    """Passes bytes on both ways and changes one bit of the first connections, on the way there or ``back``."""

    def __init__(self, target: tuple[str, int], flip_at: int, times: int = 1, back: bool = False) -> None:
        self._target, self._flip_at, self._times, self._back = target, flip_at, times, back
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._times -= 1
            flip = self._flip_at if self._times >= 0 else -1
            there, back = (-1, flip) if self._back else (flip, -1)
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            threading.Thread(target=self._pass, args=(far, near, back), daemon=True).start()
            threading.Thread(target=self._pass, args=(near, far, there), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, flip: int) -> None:
        at = 0
        try:
            while data := source.recv(1 << 16):
                if at <= flip < at + len(data):
                    changed = bytearray(data)
                    changed[flip - at] ^= 1
                    data = bytes(changed)
                at += len(data)
                target.sendall(data)
        except OSError:
            pass
        for sock in (source, target):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_the_secret_must_be_32_bytes() -> None:
    with pytest.raises(VaultError, match="32 bytes"):
        VaultServer(Vault("a", 0), b"short", "127.0.0.1")
