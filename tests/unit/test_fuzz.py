"""The promise: whatever bytes reach agent, vault or coordinator, none of them crashes and none changes their state.

Three layers, each below the one before it: bytes of somebody outside the job; packets of the job that were changed or
cut (who does so on the way between two ends: `test_link.py`); and well-formed records whose values are nonsense. All in
one process, through the real decoders, checks and handlers, tens of thousands; some thousands through real sockets.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.uplink import Uplink
from deadpool_megatron.cluster.coordinator.validate import misfit
from deadpool_megatron.cluster.link.link import Hub, Spoke
from deadpool_megatron.config import DeadpoolConfig
from deadpool_megatron.vault import SlotWriter, Vault, VaultError, VaultServer, Version, frames, wire
from deadpool_megatron.vault.errors import Malformed
from deadpool_megatron.vault.wire import Deadlines
from simulated import SimulatedJob

PATIENT = Deadlines(connect=60.0, idle=60.0, late=0.0)
SECRET = bytes(range(32))
OTHER = bytes(range(1, 33))


def mutated(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Bits flipped, pieces cut out, repeated, overwritten or taken from another message."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(out) + 1)
        match chance.randrange(7):
            case 0 if out:
                out[at % len(out)] ^= 1 << chance.randrange(8)
            case 1:
                del out[at:]
            case 2:
                del out[at : at + chance.randrange(1, 9)]
            case 3:
                out[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                out[at:at] = out[max(0, at - 8) : at]
            case 5:
                other = chance.choice(others)
                out[at:] = other[min(at, len(other)) :]
            case _ if out:
                out[at % len(out)] = chance.choice((0, 1, 0x7F, 0x80, 0xC0, 0xCF, 0xD3, 0xFF))
    return bytes(out)


_NUMBERS = (-(1 << 62), -1, 0, 1, 2, 3, 4, 5, 7, 8, 9, 1 << 16, 1 << 47, (1 << 63) - 1)


def bent(chance: random.Random, packet: bytes) -> bytes:
    """A well-formed record with some of its numbers, however deep inside, exchanged for others."""

    def bend(value: Any) -> Any:
        if isinstance(value, dict):
            return {bend(key) if isinstance(key, int) else key: bend(each) for key, each in value.items()}
        if isinstance(value, list):
            return [bend(each) for each in value]
        bends = isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.2
        return chance.choice(_NUMBERS) if bends else value

    assert packet[1:2] == b"\0", "too short to be compressed"
    return packet[:2] + msgspec.msgpack.encode(bend(msgspec.msgpack.decode(packet[2:])))


def _said_by_agents() -> list[r.AgentRecord]:
    """One of each record an agent sends, as in a job of 4 nodes of 2."""
    info = r.CoordinateInfo(2, 0, 0, 2)
    held = {2: [(0, 4), (0, 5)]}
    return [
        r.Join(1, 1001, "127.0.0.1", 2001, [10, 11], {"switch": "s1"}),
        r.WorkerReady(3, 0, 30),
        r.Registered(1, 0, info, 1 << 20, 1 << 10, "groups", True),
        r.WorkerExited(1, 0, 2, 10, -9),
        r.PeerError(0, 1, 2, "connection closed"),
        r.Offer(0, 1, {2: 5, 3: None}, held, held, {77: [(0, 5)]}),
        r.NodeArrived(0, 1),
        r.NodeReady(0, 1),
        r.NodeFormed(0, 1, 12),
        r.NodeRestored(0, 1),
        r.NodeResumed(0, 1, 5),
        r.Committed(0, 1, 6),
        r.Covered(0, 1, 5),
        r.FetchFailed(0, 1, 2, 2, 5, "torn"),
        r.Finished(0, 1),
        r.StateHash(1, 2, {"params": "00"}),
        r.Saved(0, 1, 5, "/ckpt"),
        r.DamagedCopy(0, 1, 2, "own", 5),
        r.VaultMemory(1, 1 << 30, 0, 2, "nixl", "RDMA device mlx5_0"),
        r.Refusals(1, {"malformed": 1}),
    ]


def _told_to_agents() -> list[r.CoordinatorRecord]:
    slots = [r.SlotAddress(node, local) for node in range(4) for local in range(2)]
    vaults = {node: r.Address("127.0.0.1", 2000 + node) for node in range(4)}
    return [
        r.Roster(0, slots, vaults),
        r.Departed([3]),
        r.Placement(0, [[0, 2], [1, 3]], [1 << 20] * 8, [1 << 16] * 8),
        r.Declare(1, "resume", "why", [1], [2, 3], slots, vaults, [[0, 2], [1, 3]], [1 << 20] * 8, [1 << 16] * 8),
        r.Agree(1, 5, {2: r.Source(0, 0)}, {3: [[r.Share(0, 2, 1, 0)]]}),
        r.Form(1),
        r.CommittedTo(1, (0, 5), 6),
        r.AllFinished(1),
        r.Stop(0, ""),
    ]


def test_no_changed_or_cut_packet_crashes_the_decoder_of_an_agent() -> None:
    """20,000 at the end of an agent; those at the coordinator's go on into its `Core`, below."""
    chance = random.Random(1)
    packets = [r.encode(x) for x in _told_to_agents()]
    refused = 0
    for _ in range(20_000):
        try:
            r.decode_from_coordinator(mutated(chance, chance.choice(packets), packets))
        except r.RecordError:
            refused += 1
    assert refused > 5_000


def test_nonsense_of_a_member_crashes_nobody_and_what_does_not_fit_the_job_changes_nothing() -> None:
    """25,000 records of a member gone mad, into a Core in every phase."""
    chance = random.Random(2)
    packets = [r.encode(x) for x in _said_by_agents()]
    job = SimulatedJob(nodes=5, spares=1).train()
    job.commit(4)
    jobs = [copy.deepcopy(job)]
    job.lose(1)
    for step in (SimulatedJob.arrive, SimulatedJob.prepare, SimulatedJob.form):
        jobs.append(copy.deepcopy(job))
        step(job)
    jobs.append(job)
    decoded = fitted = 0
    fresh = [copy.deepcopy(j) for j in jobs]
    for turn in range(25_000):
        which = turn % len(jobs)
        if jobs[which].finish is not None:
            jobs[which] = copy.deepcopy(fresh[which])
        job = jobs[which]
        packet = chance.choice(packets)
        try:
            record = r.decode_from_agent(bent(chance, packet) if turn % 2 else mutated(chance, packet, packets))
        except r.RecordError:
            continue
        decoded += 1
        node = getattr(record, "node", -1)
        if isinstance(record, r.Inject | r.Enlist) or node not in job.core.nodes:
            continue  # the coordinator answers those itself, or the name of the sender does not fit
        before = (job.core.phase, job.core.epoch, list(job.core.assignment))
        cause = misfit(record, job.core.job.world_size, job.core.epoch)
        if cause:
            assert "\n" not in cause and len(cause) < 400
            assert before == (job.core.phase, job.core.epoch, list(job.core.assignment))
            continue
        fitted += 1
        job.feed(record)
        for rank in job.core.coordinates:
            assert 0 <= rank < job.core.job.world_size
        assert len(set(job.core.assignment)) == job.core.job.world_size
    assert decoded > 10_000 and 1_000 < fitted < decoded - 1_000, (decoded, fitted)


@pytest.mark.parametrize(
    "record",
    [
        r.Registered(1, 0, r.CoordinateInfo(8, 0, 0, 0), 1, 1, "x", True),
        r.Registered(1, 0, r.CoordinateInfo(2, 0, -1, 0), 1, 1, "x", True),
        r.Registered(1, 0, r.CoordinateInfo(2, 0, 0, 0), -1, 1, "x", True),
        r.Registered(1, 0, r.CoordinateInfo(2, 0, 0, 0), 1 << 60, 1, "x", True),
        r.Offer(0, 1, {8: 1}, {}, {}),
        r.Offer(0, 1, {2: -5}, {}, {}),
        r.Offer(0, 1, {}, {2: [(1, 5)]}, {}),
        r.Offer(0, 1, {}, {}, {2: [(0, -1)]}),
        r.Offer(0, 1, {}, {}, {}, {5: [(7, 0)]}),
        r.Committed(1, 1, 5),
        r.Committed(-1, 1, 5),
        r.Committed(0, 1, 1 << 62),
        r.FetchFailed(0, 1, 8, 1, 5, "why"),
        r.StateHash(1, -1, {}),
        r.WorkerReady(1, -1, 5),
        r.Join(1, 1, "h", 70000, []),
    ],
)
def test_sizes_ranks_and_epochs_are_checked_against_the_job(record: r.AgentRecord) -> None:
    assert misfit(record, 8, 0)
    assert all(not misfit(good, 8, 0) for good in _said_by_agents())


# ---- the vault


class Vaults:
    """One vault that holds a committed copy for a peer, and its server."""

    def __init__(self) -> None:
        self.vault = Vault(f"f{os.getpid()}", 0, chunk_bytes=1 << 12)
        self.server = VaultServer(self.vault, SECRET, "127.0.0.1", deadlines=PATIENT)
        self.server.set_plan({3: 20_000})
        self.vault.allocate_own(0, 20_000, 4096)
        arena = self.vault.arena(0, "own")
        assert arena is not None
        writer = SlotWriter(arena.path)
        writer.open(0, 5, b"small")
        writer.buffer[:] = 7
        writer.complete()
        writer.close()
        self.vault.checksum(0)
        self.vault.set_committed(0, 5)
        self.server.start()

    def state(self) -> Any:
        arena = self.vault.arena(0, "own")
        assert arena is not None
        slot = arena.find(Version(0, 5))
        assert slot is not None, "the committed copy is gone"
        slot.verify()
        return self.vault.holdings(), self.vault.epoch, self.vault.kept, self.vault.floor

    def close(self) -> None:
        self.server.stop()
        self.vault.close()


@pytest.fixture
def vaults() -> Iterator[Vaults]:
    made = Vaults()
    yield made
    made.close()


def _frames() -> list[frames.Frame]:
    return [
        frames.Begin(0, 3, 0, 6, 20_000, 4096, 5, 1 << 12, Version(0, 5).pack(), Version(0, 5).pack()),
        frames.Share(0, 9, 0, 3, 0, 6, 20_000, 5, 1 << 12, Version(0, 5).pack(), Version(0, 5).pack()),
        frames.Begin(0, 3, 0, 6, 20_000, 4096, 5, 1 << 12, 0, 0, frames.Window(b"nixl", 1, 4096, 8192)),
        frames.Bytes(0, 0, [1, 2, 3]),
        frames.Taken(0, 3),
        frames.Complete(0),
        frames.Fetch(0, 0, 0, 5, 0, 1),
        frames.Fetch(0, 0, 0, 5, 0, 1, direct=True),
        frames.Fetch(0, 0, 0, 5, 0, 1, runs=[(0, 1), (2, 5)]),
        frames.Begun(0, False, direct=True),
        frames.Stored(0),
        frames.Sent(0, True),
        frames.Refusal(0, "code", "message"),
    ]


def _in_process(vaults: Vaults, data: bytes) -> bool:
    """``data`` as what a proven client sends, into the server's own handler; True when it was refused as no frame."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    ours.sendall(data)
    ours.shutdown(socket.SHUT_WR)
    channel = wire.Channel(theirs, PATIENT, bytes(32), True)
    try:
        vaults.server._requests(channel)
    except VaultError as err:
        return isinstance(err, Malformed)
    finally:
        ours.close()
        theirs.close()
    return False


def test_no_changed_frame_gets_past_the_tag_of_its_connection(vaults: Vaults) -> None:
    """20,000 frames into the server's handler."""
    chance = random.Random(3)
    before = vaults.state()
    encoded, refused = [], 0
    for frame in _frames():
        ours, theirs = socket.socketpair()
        wire.Channel(ours, Deadlines(), bytes(32), False).send(frame)
        encoded.append(theirs.recv(1 << 16))
        ours.close()
        theirs.close()
    for _ in range(20_000):
        good = chance.choice(encoded)
        bad = mutated(chance, good, encoded)
        if bad in encoded or any(bad.startswith(each) for each in encoded):
            continue  # whole frames, well sealed, by chance
        refused += _in_process(vaults, bad)
    assert vaults.state() == before
    assert refused > 1_000  # the others were cut off, which is an end and not a frame


def test_nonsense_in_well_sealed_frames_never_touches_what_is_committed(vaults: Vaults) -> None:
    """8,000 sequences of frames with wrong sizes, offsets, epochs and orders, of a member gone mad."""
    chance = random.Random(4)
    vaults.server.set_epoch(1)
    before = vaults.state()
    words = [0, 1, 5, 20_000, 1 << 12, (1 << 63) - 1, Version(1, 6).pack(), Version(0, 4).pack()]
    for _ in range(8_000):
        ours, theirs = socket.socketpair()
        sender = wire.Channel(ours, Deadlines(), bytes(32), False)
        for _ in range(chance.randrange(1, 4)):
            frame = chance.choice(_frames())
            changed: dict[str, Any] = {
                name: chance.choice(words)
                for name in frame.__struct_fields__
                if name not in ("kept", "floor") and chance.random() < 0.3 and isinstance(getattr(frame, name), int)
            }
            if isinstance(frame, frames.Fetch) and frame.runs is not msgspec.UNSET and chance.random() < 0.7:
                ends = [0, 1, 2, *words]
                changed["runs"] = [(chance.choice(ends), chance.choice(ends)) for _ in range(chance.randrange(4))]
            try:
                sender.send(msgspec.structs.replace(frame, **changed))
            except (OverflowError, msgspec.MsgspecError):
                continue
            if isinstance(frame, frames.Bytes) and chance.random() < 0.5:
                sender.send_raw(memoryview(chance.randbytes(4096)))
        ours.shutdown(socket.SHUT_WR)
        try:
            vaults.server._requests(wire.Channel(theirs, PATIENT, bytes(32), True))
        except VaultError:
            pass
        finally:
            ours.close()
            theirs.close()
    after = vaults.state()
    assert after[0].ranks[0] == before[0].ranks[0] and after[1:] == before[1:]
    assert vaults.server.refusals["stale epoch"] > 100
    assert vaults.server.misfits > 20, "of the vault's own epoch"
    assert not vaults.vault.holdings().ranks.get(3), "nothing was ever completed for anybody"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("to_vault", "to_coordinator"), [(250, 70), pytest.param(2_500, 700, marks=pytest.mark.slow)])
def test_strangers_at_the_real_sockets_get_nowhere(vaults: Vaults, to_vault: int, to_coordinator: int) -> None:
    """The vault's and the coordinator's socket still serve a member after all these connections."""
    chance = random.Random(5)
    before = vaults.state()
    threads = threading.active_count()
    hello = wire._MAGIC + bytes(32)
    for turn in range(to_vault):
        with socket.create_connection(("127.0.0.1", vaults.server.port)) as sock:
            kind = turn % 5
            if kind == 0:
                continue
            with contextlib.suppress(OSError):  # the vault may hang up before we are done
                sock.sendall(chance.randbytes(64) if kind < 3 else mutated(chance, hello, [hello])[:64])
                if kind == 4:
                    sock.sendall(chance.randbytes(200))
    with pytest.raises(VaultError):
        wire.connect("127.0.0.1", vaults.server.port, OTHER, PATIENT)
    channel = wire.connect("127.0.0.1", vaults.server.port, SECRET, PATIENT)
    channel.send(frames.Fetch(0, 0, 0, 5, 0, 1))
    found = channel.receive()
    assert isinstance(found, frames.Found) and found.unique_bytes == 20_000
    channel.close()
    assert vaults.state() == before and vaults.server.refused_members > to_vault // 5
    heard: list[bytes] = []
    hub = Hub("127.0.0.1", 0, SECRET, 60.0)
    try:
        greeting = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00CURVE".ljust(64, b"\x00")
        for turn in range(to_coordinator):
            with socket.create_connection(("127.0.0.1", hub.port)) as sock, contextlib.suppress(OSError):
                sock.sendall(greeting if turn % 3 == 0 else mutated(chance, greeting, [greeting]))
                sock.sendall(chance.randbytes(chance.randrange(1, 200)))
            hub.wait(0.0, lambda identity, packet: heard.append(packet), lambda identity: None)
        spoke = Spoke(f"127.0.0.1:{hub.port}", "node-1", SECRET, 60.0)
        spoke.socket.send_multipart([b"two", b"parts"])  # nothing of the protocol's
        spoke.send(b"hello")
        while not heard:
            hub.wait(1.0, lambda identity, packet: heard.append(packet), lambda identity: None)
        assert heard == [b"hello"] and hub.refused == 1
        spoke.close()
    finally:
        hub.close()
    assert threading.active_count() < threads + 50


def test_a_bad_answer_from_the_coordinator_is_counted_by_the_agent_and_no_more() -> None:
    hub, poller = Hub("127.0.0.1", 0, SECRET, 60.0), zmq.Poller()
    settings = AgentSettings(DeadpoolConfig(), "job", 1, 1, 2, "127.0.0.1", f"127.0.0.1:{hub.port}", SECRET)
    uplink = Uplink(settings, poller)
    heard: list[bytes] = []
    told: list[r.CoordinatorRecord] = []
    chance = random.Random(1)
    try:
        while not heard:
            uplink.post(b"here")
            hub.wait(0.1, lambda identity, packet: heard.append(packet), lambda identity: None)
        for _ in range(3_000):
            hub.socket.send_multipart([b"node-1@job", chance.randbytes(40)], zmq.NOBLOCK)
        while not told:  # a socket that sends to a full queue drops: what has just filled it has to be read first
            hub.send(b"node-1@job", r.encode(r.Stop(0, "well")))
            told += uplink.records(dict(poller.poll(500)))
        assert told[0] == r.Stop(0, "well") and uplink.malformed >= 1
    finally:
        uplink.close()
        hub.close()
