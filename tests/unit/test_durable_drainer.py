"""The promise: draining never costs training or an older durable generation anything, whatever the disk does.

Real vaults, the real drainer process, real files; faults through the kernel's own means.
"""

from __future__ import annotations

import errno
import io
import os
import queue
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from deadpool_megatron.durable import (
    FORMAT,
    Answer,
    Cancel,
    Coordinate,
    Done,
    Drain,
    DrainerProcess,
    DurableError,
    Item,
    Layout,
    Manifest,
    Seal,
    ShardFile,
    Stage,
    Staged,
    Take,
    directory_name,
    drainer,
    find,
    load_constants,
    load_shards,
    open_store,
    split_small,
    this_process,
    trailer_of,
)
from deadpool_megatron.durable.errors import Damaged
from deadpool_megatron.durable.files import read_header, write_shard
from deadpool_megatron.durable.lease import take
from deadpool_megatron.durable.orders import DEAF_TO
from deadpool_megatron.durable.staging import Staging
from deadpool_megatron.durable.store import LocalStore, ObjectStore
from deadpool_megatron.vault import CONSTANT, ConstantsWriter, SlotWriter, Vault, Version, constants_of, small_capacity
from waiting import until

UNIQUE = 5 * (1 << 20) + 64
LAYOUT = Layout(UNIQUE, "digest", (Item("all", "U8", (UNIQUE,), 0, UNIQUE),))
SMALL = b"small"
TRAILER = trailer_of(LAYOUT)


class Node:
    """One rank's vault, the worker's end of it, and a drainer."""

    def __init__(self, directory: Path) -> None:
        self.vault = Vault(f"d{os.getpid()}", 0)
        self.directory = str(directory)
        self.path = self.vault.allocate_own(0, UNIQUE, 1 << 12).path
        self.writer = SlotWriter(self.path)
        self.job = ""
        self.answers: queue.Queue[Answer] = queue.Queue()
        self.drainer = DrainerProcess(self.answers.put)

    def stage(self) -> None:
        self.drainer.tell(Stage(0, UNIQUE + (1 << 12)))

    def capture(self, generation: int, epoch: int = 0, trailer: bytes = TRAILER) -> bool:
        """The worker takes a generation; False when no slot is free."""
        if self.writer.open(epoch, generation, SMALL + trailer) is None:
            return False
        self.writer.buffer[:] = generation % 251
        self.writer.publish(UNIQUE)
        self.writer.complete()
        while self.vault.checksum(0):
            pass
        return True

    def commit(self, generation: int) -> None:
        self.vault.set_committed(0, generation)

    def drain(self, generation: int, attempt: int = 1, seconds: float = 0.0) -> str:
        name = directory_name(generation, "job", attempt)
        self.drainer.give(Drain(self.directory, name, seconds, (Take(0, self.path, 0, generation),), self.job))
        return name

    def answer(self, kind: type) -> Answer:
        while True:
            answer = self.answers.get()
            if isinstance(answer, kind):
                return answer

    def done(self) -> Done:
        answer = self.answer(Done)
        assert isinstance(answer, Done)
        return answer

    def seal(self, drained: Done, keep: tuple[str, ...] = ()) -> Done:
        generation = int(drained.name.split("-")[1])
        manifest = Manifest(
            FORMAT, generation, 0, drained.name, "now", 1, (Coordinate(0, 0, 0, 0),), drained.shards, {}
        )
        self.drainer.give(Seal(self.directory, manifest, keep, self.job))
        return self.done()

    def durable(self, generation: int, attempt: int = 1, keep: tuple[str, ...] = ()) -> str:
        """Capture, commit, drain and seal one generation."""
        assert self.capture(generation)
        self.commit(generation)
        self.drain(generation, attempt)
        drained = self.done()
        assert not drained.error, drained.error
        sealed = self.seal(drained, keep)
        assert not sealed.error, sealed.error
        return sealed.name

    def complete(self) -> list[int]:
        return [m.generation for m in find(LocalStore(self.directory)).complete]

    def close(self) -> None:
        self.drainer.close()
        self.writer.close()
        self.vault.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def load(node: Node, name: str, generation: int) -> bytes:
    other = Vault(f"o{os.getpid()}", 1)
    try:
        versions = {0: Version(3, generation)}
        load_shards(other, open_store(node.directory), name, 0, versions, lambda small: 1 << 12, lambda *told: None)
        small, unique = SlotWriter(other.allocate_own(0, UNIQUE, 1 << 12).path).read(Version(3, generation))
        assert small == SMALL + TRAILER
        return bytes(unique)
    finally:
        other.close()


def test_a_drained_generation_comes_back_into_another_vault_bit_for_bit(node: Node) -> None:
    node.stage()
    name = node.durable(40)
    assert node.complete() == [40]
    assert load(node, name, 40) == bytes([40]) * UNIQUE


def test_a_store_behind_fsspec_takes_a_drain_of_another_process_and_gives_it_back(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.directory = f"dir::file://{tmp_path}"
    try:
        node.stage()
        names = [node.durable(40), node.durable(60, keep=())]
        assert [m.name for m in find(open_store(node.directory)).complete] == names[1:]  # 40 is removed
        assert load(node, names[1], 60) == bytes([60]) * UNIQUE
    finally:
        node.close()


def test_a_slot_that_is_being_copied_out_is_not_overwritten_and_counts_again_afterwards(node: Node) -> None:
    assert node.capture(1)
    node.commit(1)
    node.vault.pin()
    assert node.capture(2)
    node.commit(2)
    assert not node.capture(3)  # both slots stay: 1 is being copied, 2 is the newest committed one
    assert node.vault.find(0, Version(0, 1))
    node.vault.unpin()
    assert node.capture(3)
    assert node.vault.find(0, Version(0, 2)) and node.vault.find(0, Version(0, 3))


def test_a_new_epoch_ends_a_pin(node: Node) -> None:
    assert node.capture(1)
    node.commit(1)
    node.vault.pin()
    node.vault.set_epoch(1)
    node.vault.set_committed(1, 2)
    assert node.capture(3, epoch=1)


def test_a_version_that_was_overwritten_is_never_written_as_another(node: Node) -> None:
    node.stage()
    for generation in (1, 2, 3):
        assert node.capture(generation)
        node.commit(generation)
    node.drain(1)
    done = node.done()
    assert not done.shards and "does not hold version (0, 1)" in done.error and done.unusable == 0


def test_bytes_that_changed_in_memory_are_not_made_durable(node: Node) -> None:
    node.stage()
    assert node.capture(1)
    node.vault.find(0, Version(0, 1))[1].unique[12345] ^= 1
    node.drain(1)
    done = node.done()
    assert "has changed in memory" in done.error and done.unusable == 0


def test_a_copy_that_changes_while_it_is_written_is_not_made_durable(node: Node, tmp_path: Path) -> None:
    """The vault's own is whole: nobody blames it, and the next drain takes it."""
    assert node.capture(1)
    staging = Staging(0, 2 * UNIQUE)
    staging.take(node.path, Version(0, 1))
    changes = [lambda: staging.unique.__setitem__(12345, staging.unique[12345] ^ 1)]

    def moved(nbytes: int) -> None:
        if changes:
            changes.pop()()

    def write() -> ShardFile:
        store = LocalStore(str(tmp_path))
        return write_shard(store, "g", 0, 1, LAYOUT, staging.unique, staging.small, moved, staging.verify)

    with pytest.raises(DurableError, match="chunk 0 of the copy of rank 0 has changed while it was written"):
        write()
    assert not list((tmp_path / "g").iterdir())
    staging.take(node.path, Version(0, 1))
    assert write().rank == 0


def test_slots_are_free_again_long_before_a_slow_disk_has_all(node: Node) -> None:
    node.stage()
    assert node.capture(1)
    node.commit(1)
    name = node.drain(1, seconds=1e6)  # days: this test does not see its end
    node.answer(Staged)
    assert node.capture(2)
    node.commit(2)
    assert node.capture(3)  # over the slot of generation 1
    node.drainer.cancel(Cancel(node.directory, name, True))
    assert "not wanted" in node.done().error
    until(lambda: not os.listdir(node.directory), "an empty directory")


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that says nothing: whoever opens a store of its hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("staged", [True, False])
def test_slots_are_free_again_when_the_directory_hangs(node: Node, staged: bool, silent: socket.socket) -> None:
    """Nothing of it is needed to copy shards out, also where another node would have told what they consist of."""
    if staged:
        node.stage()
    node.directory = f"ftp://127.0.0.1:{silent.getsockname()[1]}/generations"
    assert node.capture(1)
    node.commit(1)
    node.drain(1)
    assert isinstance(node.answers.get(), Staged)
    assert node.capture(2)
    node.commit(2)
    assert node.capture(3)


def test_a_drain_that_was_given_up_before_it_began_takes_nothing(node: Node) -> None:
    name, out = directory_name(1, "job", 1), io.BytesIO()
    assert node.capture(1)
    node.vault.drop(0, "own")  # who took it would say so
    here = drainer._Drainer(out)
    orders = (Drain(node.directory, name, 0.0, (Take(0, node.path, 0, 1),)), Cancel(node.directory, name, False))
    here.read(io.BytesIO(b"".join(msgspec.json.encode(each) + b"\n" for each in orders)))
    here.work()
    answers = [msgspec.json.decode(line, type=Answer) for line in out.getvalue().splitlines()]
    (done,) = [each for each in answers if isinstance(each, Done)]
    assert "not wanted" in done.error and done.unusable == -1


def test_memory_for_a_coordinate_that_is_here_no_more_is_given_back_for_good(node: Node) -> None:
    large = 256 << 20

    def holds() -> int:
        process = node.drainer._process
        assert process is not None
        words = Path(f"/proc/{process.pid}/statm").read_text().split()
        return int(words[1]) * os.sysconf("SC_PAGE_SIZE")

    node.stage()
    node.drainer.tell(Stage(7, large))
    until(lambda: holds() > large, "the memory of rank 7")
    node.drainer.forget(7)
    until(lambda: holds() < large, "its end")
    process = node.drainer._process
    assert process is not None
    process.kill()
    until(lambda: node.drainer._process is None, "the end of the drainer")
    node.durable(1)
    assert holds() < large, "the next one is not told of it"


def test_whoever_holds_a_copy_knows_what_it_consists_of(node: Node) -> None:
    """The drainer has heard nothing of this coordinate: its node is lost, and its copy was kept, or rebuilt, here."""
    assert node.capture(1)
    node.drain(1)
    done = node.done()
    assert [shard.layout for shard in done.shards] == [LAYOUT.digest]
    store = LocalStore(node.directory)
    header = read_header(store, f"{done.name}/{done.shards[0].file}", done.shards[0])
    assert header.layout == LAYOUT and header.small_bytes == len(SMALL)


def test_a_copy_that_does_not_say_what_it_consists_of_is_not_written(node: Node) -> None:
    assert node.capture(1, trailer=b"")
    node.drain(1)
    assert "does not say what it consists of" in node.done().error


def test_a_copy_that_was_read_says_what_it_consists_of_again(node: Node) -> None:
    name = node.durable(1)
    other = Vault(f"o{os.getpid()}", 1)
    try:
        load_shards(
            other, open_store(node.directory), name, 0, {0: Version(0, 1)}, small_capacity, lambda *_: None,
        )  # fmt: skip
        slot = other.find(0, Version(0, 1))[1]
        assert split_small(bytes(slot.small[: slot.small_bytes])) == (SMALL, LAYOUT)
    finally:
        other.close()


@pytest.mark.parametrize("damage", [b"", b"x"])
def test_what_a_copy_consists_of_is_read_or_is_damaged(damage: bytes) -> None:
    stored = SMALL + trailer_of(LAYOUT)
    if damage:
        stored = stored[: len(SMALL) + 4] + damage + stored[len(SMALL) + 5 :]
        with pytest.raises(Damaged, match="cannot be read"):
            split_small(stored)
    else:
        assert split_small(stored) == (SMALL, LAYOUT) and split_small(SMALL) == (SMALL, None)


def test_an_older_generation_stays_when_the_disk_is_full(node: Node) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # inherited by the drainer: no file may grow beyond what one generation's small files need
        node.stage()
        name = node.durable(40)
        node.drainer.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (UNIQUE // 2, before[1]))
        node.drainer = DrainerProcess(node.answers.put)
        node.stage()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert node.capture(60)
    node.drain(60)
    assert "File too large" in node.done().error
    assert node.complete() == [40] and load(node, name, 40) == bytes([40]) * UNIQUE


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one generation and a half."""
    where = tmp_path / "disk"
    where.mkdir()
    size = UNIQUE * 3 // 2
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no right to mount a file system here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_no_space_left_is_told_and_leaves_the_generation_before_and_room_for_the_next(tiny_disk: Path) -> None:
    node = Node(tiny_disk)
    try:
        node.stage()
        first = node.durable(40)
        assert node.capture(60)
        node.commit(60)
        second = node.drain(60)
        assert "No space left on device" in node.done().error
        node.drainer.cancel(Cancel(node.directory, second, True))
        assert node.complete() == [40] and load(node, first, 40) == bytes([40]) * UNIQUE
        shutil.rmtree(tiny_disk / first)
        node.drain(60, 2)
        assert not node.done().error
    finally:
        node.close()


def test_a_directory_that_went_away_is_told_and_not_made_again(node: Node) -> None:
    node.stage()
    gone = Path(node.directory)
    node.durable(40)
    away = gone.with_name("away")
    gone.rename(away)
    assert node.capture(60)
    node.commit(60)
    node.drain(60)
    assert "is not there (any more)" in node.done().error
    assert not gone.exists()
    away.rename(gone)
    node.drain(60, 2)
    drained = node.done()
    assert not drained.error and not node.seal(drained).error
    assert node.complete() == [60]


def test_nothing_is_written_or_removed_in_a_directory_that_is_another_jobs(node: Node) -> None:
    node.job = "first"
    store = open_store(node.directory)
    take(store, this_process("first"), pytest.fail)
    node.stage()
    old = node.durable(1)
    assert node.capture(2)
    node.commit(2)
    node.drain(2)
    drained = node.done()
    assert not drained.error
    store.claim("owner-000002.json", msgspec.json.encode(this_process("second")))
    sealed = node.seal(drained)
    assert sealed.error.startswith(f"--deadpool-durable-dir {node.directory} belongs to job second ")
    assert node.complete() == [1], "no manifest, and what is older stays"
    node.drainer.cancel(Cancel(node.directory, old, True, "first"))
    assert node.capture(3)
    node.commit(3)
    name = node.drain(3)
    assert "belongs to job second" in node.done().error
    assert store.directories() == sorted([old, drained.name]) and name not in store.directories()
    assert node.complete() == [1], "the other job may have begun with it"


def test_a_drainer_hears_none_of_a_batch_systems_signals_from_its_first_moment(node: Node) -> None:
    """It takes a second to import what it needs, and what comes in that time would end it."""
    node.stage()
    process = node.drainer._process
    assert process is not None
    for signum in DEAF_TO:
        process.send_signal(signum)
    node.durable(1)
    assert node.drainer._process is process


def test_a_drainer_that_dies_fails_its_drain_and_the_next_one_has_a_new_one(node: Node) -> None:
    node.stage()
    assert node.capture(1)
    node.drain(1, seconds=600.0)
    node.answer(Staged)
    process = node.drainer._process
    assert process is not None
    process.kill()
    assert "the drainer of this node ended" in node.done().error
    node.drain(1, 2)
    drained = node.done()
    assert not drained.error and not node.seal(drained).error
    assert node.complete() == [1]


@pytest.mark.timeout(60)
def test_another_drainer_copies_shards_out_before_it_touches_a_directory_that_hangs(
    node: Node, silent: socket.socket
) -> None:
    node.directory = f"ftp://127.0.0.1:{silent.getsockname()[1]}/generations"
    node.stage()
    node.drainer.kill()
    until(lambda: node.drainer._process is None, "its end")
    assert node.capture(1)
    node.drain(1)
    with silent.accept()[0]:  # it is at the directory
        process = node.drainer._process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        assert isinstance(node.answers.get(), Staged)


@pytest.mark.timeout(60)
def test_a_drainer_that_reads_nothing_holds_up_nobody(node: Node) -> None:
    """It stands still: its start hangs in a file system, say. Its orders are more than what a pipe takes."""
    node.stage()
    process = node.drainer._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    for rank in range(1, 3000):
        node.drainer.tell(Stage(rank, 1))
    assert node.capture(1)
    node.drain(1)
    process.send_signal(signal.SIGCONT)
    assert not node.done().error


def test_a_drainer_that_cannot_be_started_is_an_answer(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", fails)
        node.stage()
        assert node.capture(1)
        node.drain(1)
        assert isinstance(node.answer(Staged), Staged)
        assert "cannot be started" in node.done().error
    node.drain(1, 2)
    assert not node.done().error


def test_whatever_a_driver_raises_a_drain_and_a_seal_are_answered(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(url: str) -> None:
        raise RuntimeError("no credentials\nand a traceback")

    monkeypatch.setattr(drainer, "open_store", fails)
    out = io.BytesIO()
    here = drainer._Drainer(out)
    name = directory_name(1, "job", 1)
    manifest = Manifest(FORMAT, 1, 0, name, "now", 1, (Coordinate(0, 0, 0, 0),), (), {})
    here._orders.put(Drain("x", name, 0.0, ()))
    here._orders.put(Seal("x", manifest, ()))
    here._orders.put(Cancel("x", name, True))
    here._orders.put(None)
    here.work()
    answers = [msgspec.json.decode(line, type=Answer) for line in out.getvalue().splitlines()]
    assert [each.error for each in answers if isinstance(each, Done)] == ["no credentials"] * 2


def test_what_a_driver_raises_in_the_middle_of_a_file_may_pass() -> None:
    """A client library's own error would end the thread that reads for a recovery, or that renews the lease."""
    store = ObjectStore(SimpleNamespace(open=lambda path, mode: Breaking()), "base", "any://base")
    with pytest.raises(OSError, match="any://base: ValueError: connection lost"):
        store.open("file").read()


class Breaking(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise ValueError("connection lost")


def test_a_damaged_file_is_never_taken_for_a_shard(node: Node) -> None:
    node.stage()
    name = node.durable(40)
    path = Path(node.directory) / name / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    vault = Vault(f"o{os.getpid()}", 1)
    try:
        with pytest.raises(DurableError, match="has changed since it was written"):
            load_shards(
                vault,
                open_store(node.directory),
                name,
                0,
                {0: Version(0, 40)},
                lambda small: 1 << 12,
                lambda *told: None,
            )
        assert not vault.holdings().ranks.get(0)
    finally:
        vault.close()


def test_a_durable_generation_and_a_fetched_one_fill_a_slot_alike(node: Node) -> None:
    node.stage()
    name = node.durable(7)
    load_shards(
        node.vault, open_store(node.directory), name, 0, {0: Version(2, 7)}, lambda small: 1 << 12, lambda *told: None
    )
    node.vault.set_epoch(2)
    small, unique = node.writer.read(Version(2, 7))
    assert small == SMALL + TRAILER and np.all(np.frombuffer(unique, dtype=np.uint8) == 7)
    assert (2, 7) in [(h.epoch, h.generation) for h in node.vault.holdings().ranks[0]]


def test_an_answer_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        msgspec.json.decode(b'{"type": "Done", "name": "x", "sealed": false, "secret": 1}', type=Answer)


# ---- what never changes


def test_what_never_changes_is_one_file_for_all_generations_and_is_loaded_with_each(node: Node) -> None:
    nbytes = (1 << 20) + 64
    layout = Layout(nbytes, "constants", (Item("frozen", "U8", (nbytes,), 0, nbytes),))
    path = node.vault.allocate_own(constants_of(0), nbytes, 1 << 12).path
    writer = ConstantsWriter(path)
    node.stage()

    def drained(generation: int) -> Done:
        assert node.capture(generation)
        node.commit(generation)
        take = Take(0, node.path, 0, generation, path)
        node.drainer.give(Drain(node.directory, directory_name(generation, "job", 1), 0.0, (take,)))
        return node.done()

    early = drained(1)
    assert "constants of rank 0 are not in its vault yet" in early.error
    assert writer.begin(trailer_of(layout)) is not None
    writer.buffer[:] = 7
    writer.complete()
    while node.vault.checksum(constants_of(0)):
        pass
    for generation in (2, 3):
        done = drained(generation)
        assert not done.error and not node.seal(done).error
    (file,) = (Path(node.directory) / "constants").iterdir()
    assert node.complete() == [3]

    def loaded() -> tuple[list[int], bytes]:
        other, told = Vault(f"o{os.getpid()}", 1), []
        try:
            load_shards(
                other, open_store(node.directory), done.name, 0, {0: Version(0, 3)}, lambda small: 1 << 12,
                lambda holder, *_: told.append(holder),
            )  # fmt: skip
            return told, bytes(other.find(constants_of(0), CONSTANT)[1].unique)
        finally:
            other.close()

    assert loaded() == ([constants_of(0), 0], bytes([7]) * nbytes)
    slot = node.vault.find(constants_of(0), CONSTANT)[1]
    slot.unique[5] ^= 1  # nobody has them whole any more, in memory
    load_constants(node.vault, open_store(node.directory), 0, 0, lambda small: 1 << 12)
    assert bytes(node.vault.find(constants_of(0), CONSTANT)[1].unique) == bytes([7]) * nbytes
    with pytest.raises(DurableError, match="has none of rank 1"):
        load_constants(node.vault, open_store(node.directory), 1, 0, lambda small: 1 << 12)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DurableError, match="has changed since it was written"):
        loaded()
    node.drainer.close()
    node.drainer = DrainerProcess(node.answers.put)  # as in the next run: this one has not seen the file yet
    node.stage()
    assert not drained(4).error
    assert loaded() == ([constants_of(0), 0], bytes([7]) * nbytes), "it is written anew"
    file.unlink()
    assert node.complete() == [] and "constants" in next(iter(find(LocalStore(node.directory)).damaged.values()))
    slot.unique[5] ^= 1
    for damaged in (drained(5), drained(6)):
        assert damaged.unusable == constants_of(0) and "never changes of rank 0 has changed in memory" in damaged.error
        slot.recheck()  # by the agent: nobody has it from here any more
    assert not list(file.parent.iterdir())
