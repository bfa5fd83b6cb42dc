"""The promise: a durable generation is either whole and what was written, or it does not count."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import msgspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from safetensors import safe_open

from deadpool_megatron.durable import (
    FORMAT,
    Coordinate,
    DurableError,
    Item,
    Layout,
    Manifest,
    Unreadable,
    directory_name,
    find,
    open_store,
    this_process,
)
from deadpool_megatron.durable.errors import Cancelled, Damaged, NotFit
from deadpool_megatron.durable.files import (
    prune,
    read_manifest,
    read_shard,
    remove_attempt,
    seal,
    write_constants,
    write_shard,
)
from deadpool_megatron.durable.format import MANIFEST, SMALL, shard_name
from deadpool_megatron.durable.lease import Lease, take
from deadpool_megatron.durable.start import look_again, open_directory, survey
from deadpool_megatron.durable.store import LocalStore, ObjectStore, Reading, Store

WEIGHT = torch.arange(35, dtype=torch.float32).reshape(5, 7)
HALF = torch.arange(9, dtype=torch.bfloat16) / 3
# 64-byte steps, as snapshot.ShardPlan lays a shard out, with gaps after both tensors.
LAYOUT = Layout(256, "digest", (Item("main.weight", "F32", (5, 7), 0, 140), Item("half", "BF16", (9,), 192, 18)))
SMALL_STATE = b"small state of rank %d"


def unique_bytes() -> bytes:
    flat = bytearray(256)
    flat[:140] = WEIGHT.reshape(-1).view(torch.uint8).numpy().tobytes()
    flat[192:210] = HALF.view(torch.uint8).numpy().tobytes()
    return bytes(flat)


def write(
    store: Store, generation: int, ranks: int = 2, attempt: int = 1, sealed: bool = True, experts: int = 1
) -> str:
    name = directory_name(generation, "job", attempt)
    view = memoryview(unique_bytes())
    shards = [write_shard(store, name, rank, generation, LAYOUT, view, SMALL_STATE % rank) for rank in range(ranks)]
    manifest = Manifest(
        FORMAT,
        generation,
        0,
        name,
        "2026-11-21T12:00:00Z",
        ranks,
        tuple(Coordinate(rank, 0, 0, rank, 0, rank % experts) for rank in range(ranks)),
        tuple(shards),
        {"model": {"hidden_size": 64}},
    )
    if sealed:
        seal(store, manifest)
    return name


def write_file(store: Store, name: str, data: bytes) -> None:
    writing = store.create(name)
    writing.write(data)
    writing.commit()


def edit(store: Store, name: str, old: str, new: str) -> None:
    """Somebody changes a manifest."""
    text = store.open(f"{name}/{MANIFEST}").read().decode()
    assert old in text
    write_file(store, f"{name}/{MANIFEST}", text.replace(old, new).encode())


class Upload(AbstractBufferedFile):  # type: ignore[misc]
    """As the drivers of object stores do it: parts, and the object when the last one is there."""

    DEFAULT_BLOCK_SIZE = 128

    def _initiate_upload(self) -> None:
        self._parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> None:
        self._parts.append(self.buffer.getvalue())
        if final:
            self.fs.pipe_file(self.path, b"".join(self._parts))


class Uploads(MemoryFileSystem):  # type: ignore[misc]
    protocol = "uploads"
    store: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("uploads://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return Upload(self, path, mode) if mode == "wb" else super()._open(path, mode, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        with super()._open(self._strip_protocol(path), "xb" if mode == "create" else "wb") as file:
            file.write(value)


fsspec.register_implementation("uploads", Uploads, clobber=True)


@pytest.fixture(params=["directory", "uploads"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return LocalStore(str(tmp_path))
    made = open_store(f"uploads://durable-{tmp_path.name}")
    assert isinstance(made, ObjectStore)
    return made


def read(store: Store, name: str, rank: int = 0) -> tuple[bytes, bytes]:
    unique, small = bytearray(256), bytearray(100)
    shard = read_manifest(store, name).shards[rank]
    header = read_shard(store, name, shard, lambda h: (memoryview(unique), memoryview(small)[: h.small_bytes]))
    return bytes(unique), bytes(small[: header.small_bytes])


def test_a_shard_is_read_back_bit_for_bit(store: Store) -> None:
    name = write(store, 40)
    assert read(store, name, 1) == (unique_bytes(), SMALL_STATE % 1)


def test_anybody_can_read_a_shard_with_the_safetensors_library(tmp_path: Path) -> None:
    name = write(LocalStore(str(tmp_path)), 40)
    with safe_open(tmp_path / name / shard_name(0), "pt") as file:
        assert set(file.keys()) == {"main.weight", "half", SMALL}
        assert torch.equal(file.get_tensor("main.weight"), WEIGHT)
        assert torch.equal(file.get_tensor("half"), HALF)
        assert bytes(file.get_tensor(SMALL).numpy()) == SMALL_STATE % 0
        told = json.loads(file.metadata()["deadpool"])
    assert (told["format"], told["generation"], told["offsets"]) == (FORMAT, 40, [0, 192])


def test_without_its_manifest_a_generation_is_not_there(store: Store) -> None:
    write(store, 40)
    write(store, 60, sealed=False)
    found = find(store)
    assert [m.generation for m in found.complete] == [40]
    assert not found.damaged  # never finished is not damaged


def test_the_newest_generation_comes_first(store: Store) -> None:
    for generation in (40, 100, 60):
        write(store, generation)
    assert [m.generation for m in find(store).complete] == [100, 60, 40]


@pytest.mark.parametrize("place", ["header", "tensor", "small state"])
def test_a_file_with_one_changed_bit_is_refused(tmp_path: Path, place: str) -> None:
    store = LocalStore(str(tmp_path))
    name = write(store, 40)
    path = tmp_path / name / shard_name(0)
    data = bytearray(path.read_bytes())
    data[{"header": 9, "tensor": -60, "small state": -1}[place]] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged):
        read(store, name)
    assert read(store, name, 1)[0] == unique_bytes()


@pytest.mark.parametrize("cut", [1, 30, 10_000])
def test_a_generation_with_a_file_cut_off_does_not_count(tmp_path: Path, cut: int) -> None:
    store = LocalStore(str(tmp_path))
    name = write(store, 40)
    path = tmp_path / name / shard_name(1)
    size = path.stat().st_size
    os.truncate(path, max(0, size - cut))
    found = find(store)
    assert not found.complete
    (why,) = found.damaged.values()
    assert "bytes instead of" in why and shard_name(1) in why


def test_a_generation_with_a_file_missing_or_its_manifest_changed_does_not_count(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    (tmp_path / write(store, 40) / shard_name(1)).unlink()
    changed = tmp_path / write(store, 60) / MANIFEST
    changed.write_text(changed.read_text().replace('"hidden_size": 64', '"hidden_size": 65'))
    cut = tmp_path / write(store, 80) / MANIFEST
    cut.write_bytes(cut.read_bytes()[:-20])
    found = find(store)
    assert not found.complete and len(found.damaged) == 3


def test_what_fails_while_it_is_written_leaves_no_file(store: Store) -> None:
    def stop(nbytes: int) -> None:
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        write_shard(store, directory_name(40, "job", 1), 0, 40, LAYOUT, memoryview(unique_bytes()), b"", stop)
    assert store.size(f"{directory_name(40, 'job', 1)}/{shard_name(0)}") is None


FROZEN = memoryview(bytes(range(256)))


def with_constants(store: Store) -> tuple[str, str]:
    """The name of a whole generation with constants, and their path."""
    name = write(store, 40, ranks=1, sealed=False)
    constants = write_constants(store, LAYOUT, FROZEN)
    shard = write_shard(store, name, 0, 40, LAYOUT, memoryview(unique_bytes()), b"")
    shard = msgspec.structs.replace(shard, constants=constants)
    seal(store, Manifest(FORMAT, 40, 0, name, "now", 1, (Coordinate(0, 0, 0, 0),), (shard,), {}))
    return name, constants.path


def test_constants_that_cannot_be_read_once_are_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    name, path = with_constants(store)
    real, created = type(store).open, type(store).create

    def fails(self: Store, name: str) -> Reading:
        raise OSError("time-out")

    monkeypatch.setattr(type(store), "open", fails)
    monkeypatch.setattr(type(store), "create", lambda self, name: pytest.fail("it may be whole"))
    with pytest.raises(OSError, match=f"{path} cannot be read: time-out"):
        write_constants(store, LAYOUT, FROZEN)
    monkeypatch.setattr(type(store), "open", real)
    monkeypatch.setattr(type(store), "create", created)
    assert [m.name for m in find(store).complete] == [name]


def test_a_writing_that_is_given_up_takes_nothing_away_that_another_one_has_made(store: Store) -> None:
    """Replicas write the same constants; the drain of one of them is cancelled at its last block."""
    other: list[str] = []

    def cancelled(nbytes: int) -> None:
        if not other:
            other.extend(with_constants(store))
        raise Cancelled("not wanted any more")

    with pytest.raises(Cancelled):
        write_constants(store, LAYOUT, FROZEN, cancelled)
    gc.collect()  # a driver's file may end its upload when nobody has it any more
    assert [m.name for m in find(store).complete] == [other[0]]


def test_writers_with_one_process_id_write_files_of_their_own(store: Store) -> None:
    """Of several containers that share a directory; replicas write the same constants."""
    first, second = store.create("constants/x"), store.create("constants/x")
    first.write(b"A" * 100)
    second.write(b"B" * 50)
    first.write(b"A" * 100)
    first.commit()
    assert store.open("constants/x").read() == b"A" * 200
    second.write(b"B" * 150)
    second.commit()
    assert store.open("constants/x").read() == b"B" * 200


def test_what_changes_in_memory_while_it_is_written_does_not_appear(store: Store) -> None:
    frozen = bytearray(range(256))

    def changes(nbytes: int) -> None:
        frozen[3] ^= 1

    with pytest.raises(DurableError, match=r"constants/.* has changed in memory while it was written"):
        write_constants(store, LAYOUT, memoryview(frozen), changes)
    gc.collect()
    assert store.size(write_constants(store, LAYOUT, memoryview(frozen)).path)


def test_what_another_version_has_written_or_nobody_can_read_is_not_removed(store: Store) -> None:
    names = {g: write(store, g) for g in (20, 40, 60, 80, 100)}
    for generation, (old, new) in {20: ("durable/1", "durable/2"), 40: ('"epoch"', '"age": 1,\n "epoch"')}.items():
        edit(store, names[generation], old, new)
    edit(store, names[60], '"hidden_size": 64', '"hidden_size": 65')
    assert prune(store, names[100], []) == []
    assert set(store.directories()) == {names[g] for g in (20, 40, 60, 100)}


def test_old_generations_and_unfinished_attempts_are_removed_but_none_that_is_kept_or_newer(store: Store) -> None:
    names = {g: write(store, g) for g in (20, 40, 60, 80)}
    half = write(store, 50, sealed=False)
    under_way = write(store, 100, sealed=False)
    assert prune(store, names[80], [names[60]]) == []
    assert [m.generation for m in find(store).complete] == [80, 60]
    assert half not in store.directories() and under_way in store.directories()


def test_a_generation_that_is_being_removed_never_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path))
    name = write(store, 40)
    monkeypatch.setattr(LocalStore, "remove", lambda self, directory: None)  # dies before it gets to the files
    remove_attempt(store, name)
    assert not find(store).complete and (tmp_path / name / shard_name(0)).exists()


# ---- what a new job makes of it


HARM: dict[str, Callable[[Store, str], None]] = {
    "cut off": lambda store, name: write_file(store, f"{name}/{shard_name(1)}", b"short"),
    "missing": lambda store, name: store.remove_file(f"{name}/{shard_name(0)}"),
    "changed": lambda store, name: edit(store, name, '"hidden_size": 64', '"hidden_size": 65'),
    "of another version": lambda store, name: edit(store, name, "durable/1", "durable/2"),
    "with a field more": lambda store, name: edit(store, name, '"epoch"', '"age": 1,\n "epoch"'),
}


@pytest.mark.parametrize("harm", HARM)
def test_nothing_begins_from_zero_beside_generations_that_cannot_be_read(store: Store, harm: str) -> None:
    for generation in (40, 60):
        HARM[harm](store, write(store, generation))
    with pytest.raises(Unreadable, match=r"60 \(cannot be read\), 40 \(cannot be read\): .*-000000000060-.*: put back"):
        survey(store, "auto", 2, -1, True)
    with pytest.raises(Unreadable):
        survey(store, "auto", 2, 50, True)
    with pytest.raises(DurableError, match=r"of an earlier job: give --deadpool-resume auto"):
        survey(store, "none", 2, -1, True)
    usable, remarks, *_ = survey(store, "auto", 2, 61, True)
    assert (
        usable == () and "generation 60 " in remarks[-1] and "older than the checkpoint of iteration 61" in remarks[-1]
    )


def test_one_that_was_asked_for_and_cannot_be_read_is_named_with_the_others(store: Store) -> None:
    names = [write(store, g) for g in (40, 60, 80)]
    HARM["missing"](store, names[2])
    with pytest.raises(
        Unreadable, match=rf"durable generation 80 cannot be read: .*{names[2]}.*missing; .* has 80 .*, 60"
    ):
        survey(store, "80", 2, -1, True)
    assert survey(store, "60", 2, -1, True).others == (40,)
    assert survey(store, "auto", 2, -1, True).usable[0] == (60, names[1])


def test_auto_begins_with_the_newest_and_says_so_when_there_is_none(tmp_path: Path) -> None:
    usable, remarks, *_ = survey(open_directory(str(tmp_path / "new")), "auto", 2, -1, True)
    assert usable == () and "no durable generation" in remarks[0]
    store = LocalStore(str(tmp_path / "new"))
    names = [write(store, g) for g in (40, 60)]
    assert survey(store, "auto", 2, -1, True) == (((60, names[1]), (40, names[0])), (), (), ())


def test_a_generation_of_another_number_of_replicas_is_cut_anew_and_what_cannot_be_is_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    name = write(LocalStore(str(tmp_path)), 40, ranks=2)
    usable, remarks, _, recut = survey(open_directory(str(tmp_path)), "auto", 4, -1, True)
    assert (
        recut == ((40, name),) and not usable and "of 2 ranks, this job has 4: its shards are cut anew" in remarks[-1]
    )
    write(LocalStore(str(tmp_path)), 60, ranks=2, experts=2)
    with pytest.raises(NotFit, match=r"generation 60 .* of 2 ranks, this job has 3: .*deadpool export"):
        survey(open_directory(str(tmp_path)), "auto", 3, -1, True)


def test_a_job_that_would_start_anew_beside_old_generations_is_refused(tmp_path: Path) -> None:
    write(LocalStore(str(tmp_path)), 40)
    with pytest.raises(DurableError, match=r"generations 40 of an earlier job: give --deadpool-resume auto"):
        survey(open_directory(str(tmp_path)), "none", 2, -1, True)


def test_one_generation_can_be_asked_for_by_its_number(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    names = [write(store, g) for g in (40, 60)]
    assert survey(store, "40", 2, -1, False) == (((40, names[0]),), (), (60,), ())
    with pytest.raises(DurableError, match="no durable generation 50; it has 60, 40"):
        survey(store, "50", 2, -1, False)
    with pytest.raises(DurableError, match="has generation 60 besides 40"):
        survey(store, "40", 2, -1, True)


def test_a_newer_checkpoint_of_megatrons_goes_before_an_older_durable_generation(tmp_path: Path) -> None:
    write(LocalStore(str(tmp_path)), 40)
    usable, remarks, *_ = survey(open_directory(str(tmp_path)), "auto", 2, 50, True)
    assert usable == () and "older than the checkpoint of iteration 50" in remarks[0]
    assert survey(open_directory(str(tmp_path)), "auto", 2, 40, True)[0]


def test_a_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DurableError, match=r"durable-dir .*/no/where cannot be made: No such file"):
        survey(open_directory(str(tmp_path / "no" / "where")), "none", 2, -1, True)
    with pytest.raises(DurableError, match="durable-dir nowhere://x"):
        survey(open_directory("nowhere://x"), "none", 2, -1, True)


def test_a_coordinator_that_is_started_again_finds_what_its_job_was_to_begin_with_and_has_written_since(
    tmp_path: Path,
) -> None:
    store = LocalStore(str(tmp_path))
    old, new = ((generation, write(store, generation)) for generation in (40, 60))

    def found(lease: Lease | None, resume: str, newer_than: int = -1) -> tuple[tuple[int, str], ...]:
        return look_again(store, lease, resume, 2, newer_than, pytest.fail).usable

    assert found(None, "40") == (old,), "an export of an older one"
    lease = take(store, this_process("job"), pytest.fail)
    assert found(lease, "60") == (new,), "what is older was not asked for"
    assert found(lease, "40") == (new, old), "the newer one is this job's own"
    assert found(lease, "auto", 50) == (new,), "it has begun with a checkpoint of 50"
    assert found(lease, "auto") == (new, old)
    lease.end()
