"""The promise: an agent drains and reads back exactly its own shards, and no worker begins with another model's."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent import durable
from deadpool_megatron.cluster.agent.commits import Upkeep
from deadpool_megatron.cluster.agent.durable import Loaded, NodeDurability
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.shards import FetchDone, Shards
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.durable import (
    Done,
    DurableError,
    Item,
    Layout,
    Staged,
    files,
    load_shards,
    loading,
    split_small,
    trailer_of,
)
from deadpool_megatron.vault import (
    CONSTANT,
    Arena,
    ConstantsWriter,
    SlotWriter,
    VaultFull,
    Version,
    constants_of,
    small_capacity,
)
from waiting import until

UNIQUE = 1 << 20
LAYOUT = Layout(UNIQUE, "digest", (Item("all", "U8", (UNIQUE,), 0, UNIQUE),))
JOB = {"model": {"hidden_size": 64, "ffn_hidden_size": 256}, "command": {}, "versions": {}}


class Node:
    """The agent's side of one node that runs ranks 0 and 1."""

    def __init__(self, directory: Path, number: int = 0, drains: bool = True) -> None:
        self.shards = Shards(f"n{os.getpid()}", number, bytes(32), "127.0.0.1")
        self.sent: list[Any] = []
        self.durability = NodeDurability(number, str(directory), "job", self.shards, self.sent.append, drains)
        self.writers: dict[int, SlotWriter] = {}

    def begin(self, job: dict[str, Any] = JOB) -> None:
        """Its workers tell of themselves and get their memory."""
        for rank in (0, 1):
            data = msgspec.json.encode(job)
            half = len(data) // 2
            for part, piece in enumerate((data[:half], data[half:])):
                self.durability.described(r.Described(rank, part, 2, piece), rank)
            self.writers[rank] = SlotWriter(self.shards.allocate(rank, UNIQUE, 1000))
            self.durability.granted(rank, UNIQUE + (1 << 16))

    def capture(self, generation: int) -> list[bool]:
        """Both workers take a generation; whether they had a slot for it."""
        taken = []
        for rank, writer in self.writers.items():
            taken.append(writer.open(0, generation, b"small %d" % rank + trailer_of(LAYOUT)) is not None)
            if taken[-1]:
                writer.buffer[:] = generation + rank
                writer.publish(UNIQUE)
                writer.complete()
            while self.shards.vault.checksum(rank):
                pass
        return taken

    def news(self, kind: type) -> Any:
        """The next piece of news of one kind, handled as the agent handles it."""
        while True:
            event = self.shards.events.get()
            if not isinstance(event, FetchDone):
                self.durability.handle(event)
            if isinstance(event, kind):
                return event

    def durable(self, generation: int, name: str) -> None:
        """Drain and seal what is committed."""
        self.durability.drain(r.DrainShards(name, 0, generation, 0.0), [0, 1])
        assert not self.news(Done).error
        drained = self.sent[-1]
        assert isinstance(drained, r.ShardsDrained) and [s.rank for s in drained.shards] == [0, 1]
        places = [r.CoordinateInfo(rank, 0, 0, rank) for rank in (0, 1)]
        self.durability.seal(r.SealGeneration(name, 0, generation, places, drained.shards, []))
        assert not self.news(Done).error

    def close(self) -> None:
        self.durability.close()
        for writer in self.writers.values():
            writer.close()
        self.shards.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    made = [Node(tmp_path, 0), Node(tmp_path, 1)]
    yield made
    for node in made:
        node.close()


NAME = "generation-000000000005-job-1"


@pytest.fixture
def drained(nodes: list[Node]) -> list[Node]:
    """The first node's generation 5 is durable; the second node is of a new job."""
    nodes[0].begin()
    assert nodes[0].capture(5) == [True, True]
    nodes[0].shards.vault.set_committed(0, 5)
    nodes[0].durable(5, NAME)
    return nodes


def test_constants_that_no_vault_has_any_more_come_from_the_durable_directory(nodes: list[Node]) -> None:
    first, second = nodes
    first.begin()
    layout = Layout(64, "constants", (Item("frozen", "U8", (64,), 0, 64),))
    writer = ConstantsWriter(first.shards.allocate(constants_of(0), 64, 1000))
    assert writer.begin(trailer_of(layout)) is not None
    writer.buffer[:] = 7
    writer.complete()
    assert first.capture(5) == [True, True] and first.shards.vault.checksum(constants_of(0))
    first.shards.vault.set_committed(0, 5)
    first.durable(5, NAME)
    writer.close()
    assert second.shards.durable_constants is not None
    second.shards.durable_constants(0, 0)
    assert bytes(second.shards.vault.find(constants_of(0), CONSTANT)[1].unique) == bytes([7]) * 64


def test_slots_stay_from_the_order_to_drain_until_they_are_copied_out(nodes: list[Node]) -> None:
    node = nodes[0]
    node.begin()
    assert node.capture(5) == [True, True]
    node.shards.vault.set_committed(0, 5)
    node.durability.drain(r.DrainShards(NAME, 0, 5, 0.0), [0, 1])
    assert node.capture(6) == [True, True]
    node.shards.vault.set_committed(0, 6)
    assert node.capture(7) == [False, False]  # the drainer's answer has not been heard yet
    node.news(Staged)
    assert node.capture(7) == [True, True]
    assert not node.news(Done).error


def test_a_copy_that_is_not_what_it_was_is_told_of_before_the_drain_has_failed(nodes: list[Node]) -> None:
    node = nodes[0]
    node.begin()
    assert node.capture(5) == [True, True]
    node.shards.vault.find(1, Version(0, 5))[1].unique[7] ^= 1
    node.durability.drain(r.DrainShards(NAME, 0, 5, 0.0), [0, 1])
    assert node.news(Done).unusable == 1
    failed, told = node.sent[-2:]
    assert isinstance(failed, r.FetchFailed) and isinstance(told, r.ShardsDrained) and told.error
    assert (failed.rank, failed.source, failed.generation, failed.version_epoch) == (1, failed.node, 5, 0)
    node.durability.drain(r.DrainShards(f"{NAME}2", 0, 5, 0.0), [0, 1])
    node.shards.server.set_epoch(1)
    node.news(Done)
    assert isinstance(node.sent[-1], r.ShardsDrained) and not isinstance(node.sent[-2], r.FetchFailed), "epoch is over"


def test_an_attempt_that_is_given_up_frees_the_slots(nodes: list[Node]) -> None:
    node = nodes[0]
    node.begin()
    node.capture(5)
    node.shards.vault.set_committed(0, 5)
    node.durability.drain(r.DrainShards(NAME, 0, 5, 600.0), [0, 1])
    node.durability.give_up(r.GiveUpDrain(NAME, 0))
    node.capture(6)
    node.shards.vault.set_committed(0, 6)
    assert node.capture(7) == [True, True]


class _Clock:
    """The time a node's durable tier goes by, moved by the test."""

    def __init__(self, node: Node) -> None:
        self.now = 0.0
        node.durability._now = lambda: self.now  # type: ignore[method-assign]


def _with_a_drainer_that_hangs(node: Node) -> subprocess.Popen[bytes]:
    """The node has begun, and this is its drainer, which is stopped."""
    node.begin()
    process = node.durability._drainer._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    return process


def _commit(node: Node, generation: int) -> list[bool]:
    taken = node.capture(generation)
    node.shards.vault.set_committed(0, generation)
    return taken


def test_a_drainer_that_hangs_costs_one_wait_and_the_next_drain_has_another(nodes: list[Node]) -> None:
    node = nodes[0]
    clock = _Clock(node)
    process = _with_a_drainer_that_hangs(node)
    _commit(node, 5)
    node.durability.drain(r.DrainShards(NAME, 0, 5, 0.0), [0, 1])
    _commit(node, 6)
    clock.now = 59.0
    node.durability.look()
    assert node.capture(7) == [False, False] and not node.sent
    clock.now = 61.0
    node.durability.look()
    node.durability.look()
    (told,) = node.sent
    assert isinstance(told, r.ShardsDrained) and "its drainer hung and was ended" in told.error
    assert _commit(node, 7) == [True, True]
    node.durability.give_up(r.GiveUpDrain(NAME, 1))
    assert node.news(Done).error
    node.durable(7, f"{NAME}2")
    assert node.durability._drainer._process is not process


def test_while_a_drainer_that_hangs_cannot_be_ended_drains_fail_at_once(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits in the kernel for a disk, and dies when that answers."""
    node = nodes[0]
    clock = _Clock(node)
    process = _with_a_drainer_that_hangs(node)
    monkeypatch.setattr(process, "kill", lambda: None)
    _commit(node, 5)
    node.durability.drain(r.DrainShards(NAME, 0, 5, 0.0), [0, 1])
    clock.now = 61.0
    node.durability.look()
    node.durability.drain(r.DrainShards(f"{NAME}2", 0, 5, 0.0), [0, 1])
    assert node.sent[-1].name == f"{NAME}2" and "cannot be ended" in node.sent[-1].error
    assert [_commit(node, generation) for generation in (6, 7, 8)] == [[True, True]] * 3
    os.kill(process.pid, signal.SIGKILL)
    assert node.news(Done).error
    node.durable(8, f"{NAME}3")


@pytest.mark.parametrize("hangs", [True, False])
def test_a_drainer_that_does_not_give_up_what_it_writes_is_ended_before_the_next_drain(
    nodes: list[Node], hangs: bool
) -> None:
    """Its shards are copied, so no slot waits for it."""
    node = nodes[0]
    clock = _Clock(node)
    node.begin()
    _commit(node, 5)
    node.durability.drain(r.DrainShards(NAME, 0, 5, 600.0), [0, 1])
    node.news(Staged)
    process = node.durability._drainer._process
    assert process is not None
    clock.now = 1e4
    node.durability.look()  # it may take its time until it is to give up
    process.send_signal(signal.SIGSTOP)
    node.durability.give_up(r.GiveUpDrain(NAME, 0))
    if not hangs:
        process.send_signal(signal.SIGCONT)
        assert node.news(Done).error
    clock.now += 61.0
    node.durability.look()
    if hangs:
        assert "ended (-9)" in node.news(Done).error
    assert _commit(node, 6) == [True, True]
    node.durable(6, f"{NAME}2")
    assert (node.durability._drainer._process is not process) == hangs


def test_a_coordinate_that_moves_away_leaves_no_memory_and_no_thread_behind(nodes: list[Node]) -> None:
    node, job = nodes[0], KnownJob(0, 2, 2, Scheme.parse("1"))
    vaults = {each: r.Address("127.0.0.1", 1) for each in range(3)}
    job.roster(r.Roster(0, [], vaults, 1))
    upkeep = Upkeep(job, node.shards, node.durability)
    node.begin()
    upkeep.place(r.Placement(0, [[0, 1]], [UNIQUE] * 4, [1 << 16] * 4, 2))
    named = lambda: {thread.name for thread in threading.enumerate()}  # noqa: E731
    assert {"vault-send-0", "vault-send-1"} <= named()
    moved = [r.SlotAddress(0, 0), r.SlotAddress(2, 0), r.SlotAddress(1, 0), r.SlotAddress(1, 1)]
    job.declare(
        r.Declare(1, "resume", "test", [], [1], moved, vaults, [[0, 1], [2, 0]], [UNIQUE] * 4, [1 << 16] * 4, None, 3)
    )
    node.shards.server.set_epoch(1)
    told = node.durability._drainer._told
    assert 1 in told and node.shards.path_of(1)
    upkeep.committed_to(r.CommittedTo(1, (1, 5), 5))
    until(lambda: "vault-send-1" not in named(), "the end of its sender")
    assert "vault-send-0" in named()
    assert 0 in told and 1 not in told and not node.shards.path_of(1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_memory_that_is_made_for_coordinates_that_are_others_by_now_is_not_in_the_way(
    nodes: list[Node], in_memory: bool
) -> None:
    node = nodes[0]
    vault, begun, go_on = node.shards.vault, threading.Semaphore(0), Event()
    create = vault._create

    def slow(*arguments: Any) -> Any:
        begun.release()
        go_on.wait()
        return create(*arguments)

    vault._create = slow
    node.shards.plan({7: (UNIQUE, 1 << 16), 8: (UNIQUE, 1 << 16)}, {}, set())
    node.shards.reserve()
    begun.acquire()
    thread = next(each for each in threading.enumerate() if each.name == "vault-reserve")
    if in_memory:
        node.shards.set_aside(r.Base(0, 0, 5))
    else:
        Upkeep(KnownJob(0, 2, 2, Scheme.parse("1")), node.shards, None).empty()
    go_on.set()
    thread.join()
    assert node.shards.events.empty() and not vault.arenas() and not begun.acquire(blocking=False)
    node.shards.plan({7: (2 * UNIQUE, 1 << 16)}, {}, set())
    node.shards.reserve()
    assert isinstance(node.shards.events.get(), r.VaultMemory)


def test_where_memory_is_short_one_copy_of_what_is_aside_has_to_do(nodes: list[Node]) -> None:
    node = nodes[0]
    shards, vault = node.shards, node.shards.vault
    node.begin()
    assert node.capture(5) == [True, True]
    base = r.Base(0, 0, 5)
    shards.set_aside(base)
    left = vault.bytes_allocated
    vault.limit_bytes = left + Arena.size(0, "own", UNIQUE, small_capacity(1000), vault.chunk_bytes) - UNIQUE // 2
    with pytest.raises(VaultFull):
        shards.allocate(0, UNIQUE, 1000)
    assert shards.aside(base) == ([0, 1], []), "nobody else is known to have them"
    memory = r.InMemory(base, [r.CoordinateInfo(rank, 0, 0, rank) for rank in (0, 1)], [[0, 1], [0, 1]], [[], []])
    told = shards.places(r.ResumeAt(5, memory=memory), {0: r.Address("a", 1), 1: r.Address("b", 1)})
    assert [len(told.holders[rank]) for rank in (0, 1)] == [2, 2]
    assert shards.allocate(0, UNIQUE, 1000) and shards.aside(base) == ([0], []), "node 1 keeps the other one"
    with pytest.raises(VaultFull):
        shards.allocate(1, UNIQUE, 1000)
    assert shards.aside(base) == ([0], [])


def test_each_node_asks_itself_first_and_then_another_one_than_its_neighbours(nodes: list[Node]) -> None:
    base, vaults = r.Base(0, 0, 5), {node: r.Address(str(node), 1) for node in range(4)}
    memory = r.InMemory(base, [r.CoordinateInfo(0, 0, 0, 0)], [[0, 2, 3]], [[]])
    first = []
    for node in nodes:
        node.shards.set_aside(base)
        told = node.shards.places(r.ResumeAt(5, memory=memory), vaults)
        first.append([at.host for at in told.holders[0]])
    assert first == [["0", "2", "3"], ["2", "3", "0"]]


def test_a_start_that_begins_anew_leaves_no_drainer_memory_of_ranks_that_are_elsewhere(nodes: list[Node]) -> None:
    node = nodes[0]
    node.begin()
    node.durability.start_over()
    node.durability.granted(1, UNIQUE)
    node.durability.keep_only({1})
    assert node.durability._drainer._told.keys() == {1}


def test_a_new_job_finds_its_shards_in_its_vault_before_it_begins(drained: list[Node]) -> None:
    node = drained[1]
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    assert node.news(Loaded) == Loaded(NAME, "", 0)
    assert node.sent[-1] == r.ShardsLoaded(1, NAME, "")
    node.begin()
    assert node.durability.begin(0, 0) is None  # until the coordinator says that all have it
    node.durability.resume_at(r.ResumeAt(5), {})
    for rank in (0, 1):
        at = node.durability.begin(rank, 0)
        assert isinstance(at, r.Generation) and (at.generation, at.version_epoch) == (5, 0)
        small, unique = SlotWriter(at.path).read(Version(0, 5))
        assert split_small(small)[0] == b"small %d" % rank and bytes(unique) == bytes([5 + rank]) * UNIQUE
        assert not node.durability.refusal(rank, LAYOUT.digest)


def test_a_rank_of_a_job_of_another_width_is_told_which_generation_to_read(nodes: list[Node]) -> None:
    node = nodes[0]
    node.begin()
    node.durability.resume_at(r.ResumeAt(5, NAME), {})
    assert node.durability.begin(0, 0) == r.Generation(0, 5, -1, "", {}, recut=NAME)


def test_a_rank_finds_where_its_base_is_also_when_its_agent_is_told_once_more(nodes: list[Node]) -> None:
    node, base = nodes[0], r.Base(0, 0, 5)
    node.begin()
    node.capture(5)
    node.shards.set_aside(base)
    node.begin()
    memory = r.InMemory(base, [r.CoordinateInfo(rank, 0, 0, rank) for rank in (0, 1)], [[0], [0]], [[], []])
    vaults = {0: r.Address("127.0.0.1", 1)}
    below = os.open(os.devnull, os.O_RDONLY)
    node.durability.resume_at(r.ResumeAt(5, memory=memory), vaults)
    at = node.durability.begin(0, 0)
    assert isinstance(at, r.Generation)
    os.close(below)  # so that another file of its may have that number
    node.durability.resume_at(r.ResumeAt(5, memory=memory), vaults)
    told = msgspec.msgpack.decode(Path(at.memory).read_bytes(), type=r.InVaults)
    assert told.holders == {0: [vaults[0]], 1: [vaults[0]]} and told.secret == bytes(32)


def test_a_job_that_only_reads_has_no_drainer_with_its_memory(nodes: list[Node], tmp_path: Path) -> None:
    node = Node(tmp_path, 2, drains=False)
    try:
        node.begin()
        assert node.durability._drainer._process is None and not list(tmp_path.iterdir())
    finally:
        node.close()


def test_a_job_without_a_durable_directory_has_no_drainer_with_its_memory(nodes: list[Node]) -> None:
    there = NodeDurability(2, "", "job", nodes[0].shards, nodes[0].sent.append)
    there.granted(0, UNIQUE)
    assert there._drainer._process is None
    there.close()


def test_an_order_to_read_that_comes_again_does_not_cut_off_the_reading(
    drained: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that has started again would hear that the durable generation cannot be read, and end the job."""
    node, read, begun, goes_on = drained[1], loading.read_shard, Event(), Event()

    def slowly(*of: Any) -> Any:
        begun.set()
        assert goes_on.wait()
        return read(*of)

    monkeypatch.setattr(loading, "read_shard", slowly)
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    assert begun.wait()
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    goes_on.set()
    node.news(Loaded)
    assert node.sent == [r.ShardsLoaded(1, NAME, "")]
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    assert node.sent == [r.ShardsLoaded(1, NAME, "")] * 2, "the first answer may be lost"


def test_a_job_with_other_arguments_is_told_the_first_that_differs(drained: list[Node]) -> None:
    node = drained[1]
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    node.news(Loaded)
    node.begin({"model": {"hidden_size": 128, "ffn_hidden_size": 512}})
    node.durability.resume_at(r.ResumeAt(5), {})
    why = node.durability.begin(0, 0)
    assert isinstance(why, str) and "hidden_size is 64 in it and 128 here" in why and "deadpool export" in why


def test_settings_that_may_differ_are_named_and_those_of_an_older_manifest_count_where_it_has_them(
    nodes: list[Node],
) -> None:
    nodes[0].begin({"model": {"hidden_size": 64}, "settings": {"adam_beta2": 0.95, "seq_length": 64, "gone": 1}})
    assert nodes[0].capture(5) == [True, True]
    nodes[0].shards.vault.set_committed(0, 5)
    nodes[0].durable(5, NAME)
    node = nodes[1]
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    node.news(Loaded)
    node.begin({"model": {"hidden_size": 64, "rotary_base": 1}, "settings": {"adam_beta2": 0.99, "seq_length": 64}})
    node.durability.resume_at(r.ResumeAt(5), {})
    begun = node.durability.begin(0, 0)
    assert isinstance(begun, r.Generation)
    assert begun.note.endswith("durable generation 5, which training goes on from: adam_beta2 0.95 -> 0.99")


def test_a_shard_of_other_tensors_is_refused_even_if_all_arguments_agree(drained: list[Node]) -> None:
    node = drained[1]
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    node.news(Loaded)
    node.begin()
    assert "consists of other tensors" in node.durability.refusal(0, "another")
    assert not node.durability.refusal(0, LAYOUT.digest)


def test_a_spare_that_has_begun_with_a_durable_shard_takes_over_one_of_another_width(drained: list[Node]) -> None:
    node = drained[1]
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    node.news(Loaded)
    node.durability.start_over()  # and it is told nothing more, since it has no ranks in that one
    assert not node.durability.refusal(0, "another")


def test_when_memory_cannot_answer_each_rank_is_read_as_a_version_of_the_new_epoch(drained: list[Node]) -> None:
    node = drained[0]
    node.capture(6)
    node.shards.vault.set_committed(0, 6)
    node.shards.vault.set_epoch(3)
    node.durability.fetch(r.Agree(3, 5, {}, {}, durable=NAME), {0: 0, 1: 1})
    done = [node.news(FetchDone) for _ in range(2)]
    assert done == [FetchDone(rank, 3, 5, -1, (3, 5), "") for rank in (0, 1)]
    assert bytes(node.writers[1].read(Version(3, 5))[1]) == bytes([6]) * UNIQUE
    assert node.shards.vault.find(0, Version(0, 6))  # what was committed last is not given up for it


def test_memory_that_a_damaged_file_has_had_made_is_not_in_the_way_of_another_generation(drained: list[Node]) -> None:
    node = drained[1]
    node.shards.vault.allocate_own(0, UNIQUE + 1000, 1 << 16)  # as its header said, before its checksum did not fit
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    assert not node.news(Loaded).error and node.shards.vault.find(0, Version(0, 5))


def test_a_durable_generation_that_cannot_be_read_is_answered_with_the_reason(drained: list[Node]) -> None:
    node = drained[1]
    (Path(node.durability._directory) / NAME / "rank-00001.safetensors").write_bytes(b"cut")
    node.durability.load(r.LoadShards(NAME, 5), [0, 1])
    assert "3 bytes instead of" in node.news(Loaded).error
    node.durability.fetch(r.Agree(3, 5, {}, {}, durable=NAME), {0: 0, 1: 1})
    assert "3 bytes instead of" in node.news(FetchDone).error


@pytest.mark.timeout(30)
def test_memory_that_is_not_there_and_errors_of_our_own_do_not_condemn_what_is_durable(
    drained: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = drained[1]
    node.shards.vault.limit_bytes = 1
    node.durability.fetch(r.Agree(0, 5, {}, {}, durable=NAME), {0: 0, 1: 1})
    done = node.news(FetchDone)
    assert done.own and "--deadpool-host-memory" in done.error

    def fails(*args: object) -> None:
        raise RuntimeError("not thought of")

    monkeypatch.setattr(durable, "load_shards", fails)
    node.durability.fetch(r.Agree(0, 5, {}, {}, durable=NAME), {0: 0, 1: 1})
    done = node.news(FetchDone)
    assert done.own and "not thought of" in done.error


def test_an_epoch_that_is_over_ends_the_reading_in_the_middle_of_a_file(
    drained: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next epoch waits for it, and would take the generation for unreadable."""
    monkeypatch.setattr(files, "_BLOCK", 1 << 14)
    node = drained[1]
    vault, reads = node.shards.vault, []

    class Slow(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            reads.append(size)
            if len(reads) == 20:  # after the manifest and the header
                vault.set_epoch(1)
            return super().read(size)

    store = node.durability._store()
    monkeypatch.setattr(store, "open", lambda name: Slow(f"{store.root}/{name}"))
    with pytest.raises(DurableError, match="newer one began"):
        load_shards(vault, store, NAME, 0, {0: Version(0, 5)}, small_capacity, lambda *told: None)
    assert len(reads) == 20
