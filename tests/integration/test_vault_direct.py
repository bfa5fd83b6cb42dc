"""The promise: shards that peers read directly (nixl) are as whole, and as well guarded, as those sent over TCP.

Each node is a process of its own. UCX runs over its TCP or shared memory here, which take the same calls as RDMA does.
"""

from __future__ import annotations

import importlib.util
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deadpool_megatron.observe import LOGS
from deadpool_megatron.vault import clean_leftovers
from flags import duo_gpt
from jobs import Jobs, launch_flags
from vault_processes import NodeProcess
from waiting import until

if importlib.util.find_spec("nixl") is None:
    pytest.skip("nixl is not installed: pip install nixl", allow_module_level=True)

CHUNK = 1 << 16
UNIQUE = 3 * (1 << 20) + 777
BIG = 64 << 20

Make = Callable[..., NodeProcess]


@pytest.fixture
def nodes() -> Iterator[Make]:
    made: list[NodeProcess] = []

    def make(**settings: object) -> NodeProcess:
        made.append(NodeProcess(len(made), **settings))
        return made[-1]

    yield make
    for node in made:
        if node.process.poll() is None:
            node.process.send_signal(signal.SIGCONT)
        node.end()
    clean_leftovers("/dev/shm")


@pytest.mark.parametrize("ucx", ["tcp", pytest.param("tcp,sm", marks=pytest.mark.slow)])
def test_a_shard_is_read_by_the_peer_and_by_the_spare_and_every_byte_is_the_same(nodes: Make, ucx: str) -> None:
    owner, peer, spare = (nodes(ucx=ucx) for _ in range(3))
    owner("targets", 0, 0, peer.port)
    for generation in (7, 8, 9):
        assert owner("write", 0, UNIQUE, generation)
        assert owner("committed") == [0, 0, generation]
        for node in (owner, peer):
            node("set_committed", 0, generation)
    assert peer("held", 0) == [[0, 8, "peer"], [0, 9, "peer"]]
    assert peer("equal", 0, "peer", 0, 8) and peer("equal", 0, "peer", 0, 9)
    size = UNIQUE + len(b"small state of 9")
    assert peer("bytes_read") == 3 * size, "nothing came another way"
    owner.kill()
    for node in (peer, spare):
        node("set_epoch", 1)
    assert spare("fetch", peer.port, 0, 1, 0, 9) == size
    assert spare("equal", 0, "own", 0, 9)
    assert spare("bytes_read") == size


def test_arenas_that_go_and_come_again_are_never_mixed_up(nodes: Make) -> None:
    """New memory tends to lie where the old one was; a reader that still knows the old one must not read that."""
    owner, peer = nodes(), nodes()
    owner("targets", 0, 0, peer.port)
    for generation in range(6):
        size = UNIQUE if generation % 2 else UNIQUE // 2
        assert owner("write", 0, size, generation) and owner("committed") == [0, 0, generation]
        assert peer("equal", 0, "peer", 0, generation)
        for node in (owner, peer):
            node("drop", 0)
        owner("forget", 0)
    assert peer("bytes_read") == 3 * (UNIQUE + UNIQUE // 2) + 6 * len(b"small state of 0"), "none had to be sent"


def test_a_peer_without_nixl_is_sent_the_bytes_and_gives_them_back(nodes: Make) -> None:
    owner, plain, spare = nodes(), nodes(direct=False), nodes()
    owner("targets", 0, 0, plain.port)
    assert owner("write", 0, UNIQUE, 3) and owner("committed") == [0, 0, 3]
    assert plain("equal", 0, "peer", 0, 3)
    assert spare("fetch", plain.port, 0, 0, 0, 3) > UNIQUE and spare("equal", 0, "own", 0, 3)
    assert spare("bytes_read") == 0


@pytest.mark.slow
def test_an_owner_that_dies_while_it_is_read_leaves_nothing_half_and_its_successor_is_read(nodes: Make) -> None:
    first, peer, second = nodes(), nodes(), nodes()
    first("targets", 0, 0, peer.port)
    first("write", 0, BIG, 1, 0.9)
    until(lambda: peer("bytes_read") > 0)
    first.kill()
    assert peer("held", 0) == []
    second("set_epoch", 1)
    peer("set_epoch", 1)
    second("targets", 1, 0, peer.port)
    assert second("write", 0, BIG, 1, 1.0, 1) and second("committed") == [0, 1, 1]
    assert peer("equal", 0, "peer", 1, 1)


@pytest.mark.slow
def test_a_peer_that_dies_while_it_reads_costs_the_owner_nothing(nodes: Make) -> None:
    owner, first, second = nodes(), nodes(), nodes()
    owner("targets", 0, 0, first.port)
    owner("write", 0, BIG, 1, 0.9)
    until(lambda: first("bytes_read") > 0)
    first.kill()
    until(lambda: owner("failures", 0) != "")
    owner("targets", 0, 0, second.port)
    assert owner("write", 0, BIG, 2) and owner("committed") == [0, 0, 2]
    assert second("equal", 0, "peer", 0, 2)


@pytest.mark.slow
def test_bytes_that_come_too_late_never_land_in_memory_that_is_used_again(nodes: Make) -> None:
    """A holder that hangs in the middle of a read, and goes on when the shard has long come from somebody else."""
    holder, other, spare = nodes(), nodes(), nodes(patience_s=10.0)
    for node, seed in ((holder, 1), (other, 2)):
        node("write", 0, UNIQUE, seed)
        until(lambda node=node: node("held", 0) != [])
    spare("reserve", 0, UNIQUE, False)  # else the holder is asked twice, and stops before anything is read
    holder("stop_when_read")
    spare.tell("fetch", holder.port, 0, 0, 0, 1)
    answer = spare.answer()
    assert "did not prove its membership" in answer["error"], "the hung one was asked again, for TCP"
    assert spare("held", 0) == [] and spare("arenas") == []
    assert spare("fetch", other.port, 0, 0, 0, 2) > UNIQUE
    assert spare("lost") > 0
    holder.process.send_signal(signal.SIGCONT)
    until(lambda: holder("bytes_read") == 0)  # it lives again
    for _ in range(20):
        assert spare("fetch", other.port, 0, 0, 0, 2) > UNIQUE  # it is there: this verifies it
        time.sleep(0.05)
    holder.kill()
    until(lambda: spare("lost") == 0, "the end of what was read from it")


def test_a_slot_opened_again_while_it_is_read_is_abandoned_without_a_false_alarm(nodes: Make) -> None:
    owner, peer = nodes(), nodes()
    owner("write", 0, UNIQUE, 0, 0.5)
    owner("targets", 0, 0, peer.port)
    assert owner("rewrite", 0, UNIQUE, 40)[-1] == 39
    assert [generation for _, generation, _ in peer("held", 0)][-1:] == [39]
    assert peer("refusals")["checksum"] == 0, "a generation that was given up is no damage"


@pytest.mark.parametrize(
    "where", ["owner", *(pytest.param(each, marks=pytest.mark.slow) for each in ("peer", "spare"))]
)
def test_memory_that_cannot_be_registered_costs_speed_and_nothing_else(nodes: Make, where: str) -> None:
    made = {name: nodes() for name in ("owner", "peer", "spare")}
    made[where]("break_registration")
    owner, peer, spare = made.values()
    owner("targets", 0, 0, peer.port)
    owner("write", 0, UNIQUE, 1)
    assert owner("committed") == [0, 0, 1] and peer("equal", 0, "peer", 0, 1)
    assert spare("fetch", peer.port, 0, 0, 0, 1) > UNIQUE and spare("equal", 0, "own", 0, 1)
    assert (peer("bytes_read") > 0) is (where == "spare") and (spare("bytes_read") > 0) is (where == "owner")


@pytest.mark.parametrize("by", [1, 1 << 40])
def test_a_window_that_is_wrong_gives_nothing_to_anybody_and_the_bytes_are_sent_instead(nodes: Make, by: int) -> None:
    """By one byte it shows other bytes: the checksum finds that. Far off it shows memory that was never offered."""
    owner, peer = nodes(), nodes()
    owner("break_windows", by)
    owner("targets", 0, 0, peer.port)
    owner("write", 0, UNIQUE, 1)
    if by == 1:
        until(lambda: "arrived changed" in owner("failures", 0))
        assert peer("held", 0) == [] and peer("refusals")["checksum"] > 0
    else:
        assert owner("committed") == [0, 0, 1] and peer("equal", 0, "peer", 0, 1)
        assert peer("bytes_read") < UNIQUE


def test_what_is_not_planned_or_of_an_older_epoch_is_not_even_read(nodes: Make) -> None:
    owner, peer = nodes(), nodes()
    peer("plan", 0, UNIQUE + 1)
    owner("targets", 0, 0, peer.port)
    owner("write", 0, UNIQUE, 1)
    until(lambda: peer("refusals")["not as planned"] > 0)
    assert peer("bytes_read") == 0
    peer("plan", 0, UNIQUE)
    assert owner("committed") == [0, 0, 1]
    read = peer("bytes_read")
    peer("set_epoch", 1)
    owner("write", 0, UNIQUE, 2)
    until(lambda: "epoch 1" in owner("failures", 0))
    assert peer("refusals")["stale epoch"] > 0 and peer("bytes_read") == read


def _raw_seconds(size: int) -> float:
    """The same number of bytes through one loopback socket between two processes."""
    code = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.sendall(bytes(%d))"
    into = memoryview(bytearray(size))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = subprocess.Popen([sys.executable, "-c", code % size, str(listener.getsockname()[1])])
        with listener.accept()[0] as sock:
            start = time.perf_counter()
            while into:
                into = into[sock.recv_into(into) :]
            seconds = time.perf_counter() - start
        sender.wait()
    return seconds


@pytest.mark.perf
@pytest.mark.parametrize("ucx", ["tcp", "tcp,sm"])
def test_speed_of_direct_reads_against_a_raw_socket(nodes: Make, ucx: str) -> None:
    """No bound but a loose one: UCX over TCP copies more than a socket does. On RDMA, look at what this prints."""
    size = 256 << 20
    owner, peer, spare = (nodes(ucx=ucx, chunk_bytes=1 << 20) for _ in range(3))
    owner("write", 0, size, 1)
    until(lambda: owner("held", 0) != [])
    rates: dict[str, list[float]] = {"raw socket": [], "kept by the peer": [], "restored": []}
    for _ in range(5):
        peer("reserve", 0, size, True)
        spare("reserve", 0, size, False)
        rates["raw socket"].append(size / _raw_seconds(size) / 1e9)
        start = time.perf_counter()
        owner("targets", 0, 0, peer.port)
        assert owner("committed") == [0, 0, 1]
        rates["kept by the peer"].append(size / (time.perf_counter() - start) / 1e9)
        start = time.perf_counter()
        assert spare("fetch", peer.port, 0, 0, 0, 1) > size
        rates["restored"].append(size / (time.perf_counter() - start) / 1e9)
    for name, each in rates.items():
        print(f"UCX_TLS={ucx}: {name}: {statistics.median(each):.2f} GB/s ({min(each):.2f} to {max(each):.2f})")
    assert statistics.median(rates["kept by the peer"]) > statistics.median(rates["raw socket"]) / 50


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_lost_in_training_is_replaced_bitwise_with_shards_read_directly(tmp_path: Path) -> None:
    """Shards are read for their copies and for the spare; two replicas on two nodes, one spare."""
    jobs = Jobs(tmp_path)
    flags = duo_gpt("replicas")
    try:
        undisturbed = jobs.start("undisturbed", launch_flags(2, slots=1), flags).finished()
        extra = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
        ours = ["--deadpool-transport", "nixl"]
        job = jobs.start("killed", launch_flags(3, 1, slots=1), [*flags, *ours], extra=extra, held=True)
        job.arm((0, 3, 2))
        job.finished()
        assert [e["lost"] for e in job.events("declared")] == [[0]]
        assert {e["transport"] for e in job.events("memory")} == {"nixl"}
        assert not any("over TCP instead" in path.read_text() for path in (job.run_dir / LOGS).glob("*"))
        assert job.hashes() == undisturbed.hashes()
    finally:
        jobs.end()
