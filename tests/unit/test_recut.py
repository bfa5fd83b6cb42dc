"""Shards of W replicas become those of any other number, every byte where it belongs."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from megatron.core import parallel_state

from deadpool_megatron.compat import UserError
from deadpool_megatron.durable import (
    FORMAT,
    Coordinate,
    DirectorySource,
    Item,
    Layout,
    Manifest,
    Piece,
    ShardFile,
    Source,
    read_recut,
    trailer_of,
)
from deadpool_megatron.durable.errors import Damaged, NotFit
from deadpool_megatron.durable.files import write_constants, write_shard
from deadpool_megatron.durable.format import MANIFEST, directory_name, encode_manifest
from deadpool_megatron.durable.recut import cut
from deadpool_megatron.durable.start import can_recut
from deadpool_megatron.durable.store import LocalStore
from deadpool_megatron.megatron import optimizer_state, width
from deadpool_megatron.megatron.in_memory import MemorySource
from deadpool_megatron.megatron.optimizer_state import Member
from deadpool_megatron.megatron.pieces import _names, _origins, pieces_of, trained_parameters
from deadpool_megatron.megatron.same_model import batch_of
from deadpool_megatron.megatron.width import CannotRead, OtherWidth, in_directory
from deadpool_megatron.snapshot import ShardPlan, decode, encode
from deadpool_megatron.vault import VaultError, constants_of

NAME = directory_name(40, "job", 1)
SIZES = {"embedding": 700, "norm": 4, "matrix": 256, "bias": 20}  # elements
ELEMENT = 4
ARGS = {"dataloader_type": "single"}
SMALL = "small.log"
CONSTANTS = bytes(range(10, 34))
CONSTANTS_LAYOUT = Layout(64, "constants", (Item("frozen", "U8", (4, 6), 0, 24),))
NOWHERE: Callable[[str, int, memoryview], None] = lambda name, at, data: None  # noqa: E731


def content(tensor: str) -> bytes:
    return random.Random(tensor).randbytes(SIZES[tensor.partition("/")[0]] * ELEMENT)


def replica(rank: int, width: int, pad: int = 16) -> tuple[Layout, bytes]:
    """Two buckets, each cut evenly as the distributed optimizer does: padded to a multiple of the width."""
    items, unique = [], bytearray()

    def add(name: str, pieces: tuple[Piece, ...], data: bytes) -> None:
        items.append(Item(name, "U8", (len(data),), len(unique), len(data), pieces))
        unique.extend(data + bytes(-len(data) % 64))

    counted = []
    for bucket in (("matrix", "bias"), ("embedding", "norm")):
        total = sum(SIZES[tensor] for tensor in bucket)
        part = -(-total // (pad * width)) * pad
        at = 0
        for tensor in bucket:
            begin, end = max(at, rank * part), min(at + SIZES[tensor], (rank + 1) * part)
            if begin < end:
                counted.append(tensor)
                for kind in ("main", "exp_avg"):
                    whole = f"{tensor}/{kind}"
                    first, nbytes = (begin - at) * ELEMENT, (end - begin) * ELEMENT
                    data = content(whole)[first : first + nbytes]
                    add(f"group0.{len(counted)}.{kind}", (Piece(whole, first, nbytes),), data)
            at += SIZES[tensor]
    steps = b"".join(len(tensor).to_bytes(ELEMENT, "little") for tensor in counted)
    add("steps", tuple(Piece(f"{tensor}/step", 0, ELEMENT) for tensor in counted), steps)
    return Layout(len(unique), f"digest-{rank}-{width}", tuple(items)), bytes(unique)


def written(rank: int, width: int, says: bool = True) -> tuple[Layout, bytes, bytes]:
    """What a rank of the old job has written: layout, unique bytes, small state."""
    layout, unique = replica(rank, width)
    items = [*layout.items, Item(SMALL, "U8", (9,), len(unique), 9)]
    if not says:
        items = [msgspec.structs.replace(item, pieces=()) for item in items]
    layout = Layout(len(unique) + 64, layout.digest, tuple(items))
    state = {"rank": rank, "numbers": [], "args": {"consumed_valid_samples": 0}}
    return layout, unique + (b"log of %2d" % rank).ljust(64, b"\0"), encode(state)


def coordinates(width: int) -> tuple[Coordinate, ...]:
    return tuple(Coordinate(rank, 0, 0, rank) for rank in range(width))


def saved(store: LocalStore, width: int, says: bool = True) -> Manifest:
    constants = write_constants(store, CONSTANTS_LAYOUT, memoryview(CONSTANTS.ljust(64, b"\0")))
    shards: list[ShardFile] = []
    for rank in range(width):
        layout, unique, small = written(rank, width, says)
        shard = write_shard(store, NAME, rank, 40, layout, memoryview(unique), small)
        shards.append(msgspec.structs.replace(shard, constants=constants))
    return Manifest(FORMAT, 40, 0, NAME, "", width, coordinates(width), tuple(shards), {})


class CopiesInMemory:
    """As `vault.Copies`; what it gives is garbage once it was taken."""

    def __init__(self, width: int, says: bool = True) -> None:
        old = {rank: written(rank, width, says) for rank in range(width)}
        self._small = {rank: small + trailer_of(layout) for rank, (layout, _, small) in old.items()}
        self._small |= {constants_of(rank): trailer_of(CONSTANTS_LAYOUT) for rank in old}
        self._unique = {rank: unique for rank, (_, unique, _) in old.items()}
        self._unique |= {constants_of(rank): CONSTANTS.ljust(64, b"\0") for rank in old}
        self.places = {holder: [("here", 1)] for holder in self._unique}
        self.smalls: list[int] = []  # all that were asked for
        self.asked: list[tuple[int, Sequence[tuple[int, int]]]] = []
        self.lost: set[int] = set()
        self.closed = False

    def small(self, rank: int) -> bytes:
        self.smalls.append(rank)
        return self._small[rank]

    def read(self, rank: int, ranges: Sequence[tuple[int, int]], take: Callable[[int, memoryview], None]) -> None:
        self.asked.append((rank, ranges))
        bounds = [0, *(bound for each in ranges for bound in each), len(self._unique[rank])]
        assert bounds == sorted(bounds) and len(set(bounds[1:-1])) == len(bounds) - 2
        for begin, end in ranges:
            while begin < end:
                upto = min(end, (begin // 100 + 1) * 100)  # of one chunk
                data = bytearray(self._unique[rank][begin:upto])
                if rank in self.lost:
                    raise VaultError(f"nobody holds chunk {begin // 100} of {rank}")
                take(begin, memoryview(data))
                data[:] = b"x" * len(data)
                begin = upto

    def close(self) -> None:
        self.closed = True


def in_memory(copies: CopiesInMemory, width: int) -> MemorySource:
    return MemorySource(copies, 40, coordinates(width))  # type: ignore[arg-type]


def source_of(kind: str, directory: Path, width: int, says: bool = True) -> Source:
    if kind == "memory":
        return in_memory(CopiesInMemory(width, says), width)
    store = LocalStore(str(directory))
    return DirectorySource(store, saved(store, width, says))


both = pytest.mark.parametrize("kind", ["files", "memory"])


@both
@pytest.mark.parametrize("before", [1, 2, 3, 7])
@pytest.mark.parametrize("after", [1, 2, 3, 5, 8])
def test_shards_of_any_number_of_replicas_become_those_of_any_other(
    tmp_path: Path, before: int, after: int, kind: str
) -> None:
    source = source_of(kind, tmp_path, before)
    for rank in range(after):
        layout, want = replica(rank, after)
        got = bytearray(len(want))
        places = {item.name: item for item in layout.items}

        def put(name: str, at: int, data: memoryview, got: bytearray = got, places: dict[str, Item] = places) -> None:
            got[places[name].offset + at : places[name].offset + at + len(data)] = data

        read_recut(source, range(before), layout, SIZES, put)
        assert bytes(got) == want


@both
def test_a_shard_says_what_it_consists_of(tmp_path: Path, kind: str) -> None:
    source = source_of(kind, tmp_path, 2)
    assert source.layout(1) == written(1, 2)[0] and source.layout(constants_of(1)) == CONSTANTS_LAYOUT


def test_of_memory_only_what_is_wanted_is_asked_for_and_each_small_state_once() -> None:
    copies = CopiesInMemory(4)
    source = in_memory(copies, 4)
    layout, _ = replica(0, 8)
    source.small(0)
    read_recut(source, range(4), layout, SIZES, NOWHERE)
    [(rank, ranges)] = copies.asked
    assert copies.smalls == [0, 1, 2, 3] and rank == 0
    assert sum(end - begin for begin, end in ranges) == sum(item.nbytes for item in layout.items)


def test_of_a_directory_each_file_with_something_wanted_is_read_once(tmp_path: Path, monkeypatch: Any) -> None:
    store = LocalStore(str(tmp_path))
    source = DirectorySource(store, saved(store, 4))
    opened: list[str] = []
    monkeypatch.setattr(store, "open", lambda name: opened.append(name) or LocalStore.open(store, name))
    read_recut(source, range(4), replica(0, 8)[0], SIZES, NOWHERE)
    headers = [f"{NAME}/rank-{rank:05d}.safetensors" for rank in range(4)]
    assert opened == [*headers, headers[0]]


def test_what_nobody_has_or_what_says_of_no_piece_is_refused_by_its_name() -> None:
    shards = [replica(rank, 2)[0] for rank in range(2)]
    lacking = Layout(0, "", tuple(item for item in shards[1].items if item.name != "group0.2.main"))
    with pytest.raises(NotFit, match=r"no shard has byte \d+ of .*/main"):
        cut(replica(0, 1)[0], [shards[0], lacking], SIZES)
    scale = Layout(4, "", (Item("optimizer0.group0.0.exp_avg.scale", "F32", (), 0, 4),))
    with pytest.raises(NotFit, match=r"exp_avg\.scale cannot be cut anew"):
        cut(scale, shards, SIZES)


def test_what_only_the_old_model_has_is_refused_by_its_name_though_all_of_the_new_one_is_there() -> None:
    shards = [replica(rank, 2)[0] for rank in range(2)]
    whole = replica(0, 1)[0]
    with pytest.raises(NotFit, match=r"bias/\w+ is in it, and not in this job"):
        cut(Layout(0, "", ()), shards, SIZES.keys() - {"bias"})
    plain = tuple(item for item in whole.items if not item.name.endswith(".exp_avg"))
    with pytest.raises(NotFit, match="matrix/exp_avg is in it"):  # another optimizer
        cut(Layout(0, "", plain), shards, SIZES)


def _adam(model: torch.nn.Module) -> SimpleNamespace:
    inner = torch.optim.Adam(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    inner.step()
    return SimpleNamespace(optimizer=inner)


def test_a_parameter_of_another_shape_is_another_tensor_though_its_bytes_would_do(monkeypatch: Any) -> None:
    monkeypatch.setattr(optimizer_state, "_replicas", lambda member, group: None)

    def layout(*size: int) -> tuple[Layout, frozenset[str]]:
        model = torch.nn.Linear(*size, bias=False)
        pieces = pieces_of([model], _adam(model))
        items = tuple(Item(name, "U8", (), 0, sum(p.nbytes for p in its), its) for name, its in pieces.items())
        return Layout(0, "", items), trained_parameters([model])

    large, names = layout(16, 8)
    assert cut(large, [large], names)
    for size in ((16, 4), (8, 16)):
        small, names = layout(*size)
        with pytest.raises(NotFit, match=r"0\.weight\[8x16\]/.* is in it, and not in this job"):
            cut(small, [large], names)


@both
def test_a_generation_of_an_earlier_version_is_refused_since_it_does_not_say_what_it_consists_of(
    tmp_path: Path, kind: str
) -> None:
    with pytest.raises(NotFit, match="does not say what its shards consist of"):
        read_recut(source_of(kind, tmp_path, 2, says=False), range(2), replica(0, 1)[0], SIZES, NOWHERE)


def test_a_file_that_has_changed_is_found(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    manifest = saved(store, 2)
    file = tmp_path / NAME / manifest.shards[1].file
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged, match="checksum"):
        read_recut(DirectorySource(store, manifest), range(2), replica(0, 1)[0], SIZES, NOWHERE)


def generation(directory: Path, monkeypatch: Any) -> str:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    manifest = saved(LocalStore(str(directory)), 2)
    (directory / NAME / MANIFEST).write_bytes(encode_manifest(manifest))
    return str(directory)


def test_what_follows_from_the_width_is_refused_at_another(tmp_path: Path, monkeypatch: Any) -> None:
    directory = generation(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="with full_validation True it has to have as many replicas") as told:
        OtherWidth(in_directory(directory, NAME), {"full_validation": True} | ARGS)
    assert "\n" not in str(told.value)


def test_a_passing_error_of_the_disk_ends_no_start_and_a_lasting_one_says_what_to_move(
    tmp_path: Path, monkeypatch: Any
) -> None:
    directory = generation(tmp_path, monkeypatch)
    monkeypatch.setattr(width, "_AGAIN_S", 0.0)
    failures = [OSError(5, "Input/output error")]
    read = width.read_manifest

    def fails(*args: Any) -> Manifest:
        if failures:
            raise failures.pop()
        return read(*args)

    monkeypatch.setattr(width, "read_manifest", fails)
    with pytest.raises(UserError, match="full_validation"):  # it has been read
        OtherWidth(in_directory(directory, NAME), {"full_validation": True})
    monkeypatch.setattr(width, "_PATIENCE_S", 0.0)
    failures.append(OSError(5, "Input/output error"))
    with pytest.raises(CannotRead, match=f"{NAME} cannot be read: ") as told:
        in_directory(directory, NAME)
    assert "\n" not in str(told.value)


def test_what_fails_after_it_was_read_for_longer_than_anybody_waits_is_read_again(monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr(width.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(width.time, "sleep", lambda seconds: None)
    failures = [OSError(5, "Input/output error")]

    def reads() -> str:
        now[0] += 60.0
        if failures:
            raise failures.pop()
        return "all of it"

    assert width._patient("there", reads) == "all of it"
    failures.extend(OSError(5, "Input/output error") for _ in range(2))
    with pytest.raises(CannotRead):
        width._patient("there", reads)


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> tuple[ShardPlan, dict[str, torch.Tensor], bytes]:
    """This process is rank 0 of 2: the plan of its shard, the tensors, and what they are to become."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for kind in ("tensor_model", "pipeline_model", "context", "expert_model"):
        monkeypatch.setattr(parallel_state, f"get_{kind}_parallel_rank", lambda: 0)
    layout, want = replica(0, 2)
    tensors = {item.name: torch.zeros(item.nbytes, dtype=torch.uint8) for item in layout.items}
    name = next(iter(tensors))
    tensors[name] = torch.zeros(len(tensors[name]), 2, dtype=torch.uint8)[:, 0]  # one that is not contiguous
    tensors[SMALL] = torch.zeros(9, dtype=torch.uint8)
    monkeypatch.setattr(width, "pieces_of", lambda *args: {item.name: item.pieces for item in layout.items})
    monkeypatch.setattr(width, "trained_parameters", lambda model: frozenset(SIZES))
    return ShardPlan([*tensors.items()]), tensors, want


@both
def test_a_rank_takes_its_part_and_what_is_alike_and_what_never_changes(
    tmp_path: Path, kind: str, first_of_two: tuple[ShardPlan, dict[str, torch.Tensor], bytes]
) -> None:
    plan, tensors, want = first_of_two
    other = OtherWidth(source_of(kind, tmp_path, 3), ARGS)
    state = decode(other.small)
    assert state["rank"] == 0 and other.constants and not other.note
    other.fill(plan, [], None)
    assert bytes(tensors.pop(SMALL).tolist()) == b"log of  0"
    for name, _, offset, nbytes in plan.items():
        assert name == SMALL or bytes(tensors[name].tolist()) == want[offset : offset + nbytes]
    for frozen in (torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(6, 4, dtype=torch.uint8).T):
        other = OtherWidth(source_of(kind, tmp_path, 3), ARGS)
        other.fill_constants(ShardPlan([("frozen", frozen)]))
        assert bytes(frozen.flatten().tolist()) == CONSTANTS
    for name, size in (("frozen", 24), ("others", 24)):
        with pytest.raises(UserError, match="of this job: it has other frozen parameters"):
            other.fill_constants(ShardPlan([(name, torch.zeros(size, dtype=torch.uint8))]))


@both
def test_copies_of_what_a_device_holds_have_to_be_the_same_ones(
    tmp_path: Path, kind: str, first_of_two: tuple[ShardPlan, dict[str, torch.Tensor], bytes]
) -> None:
    _, tensors, _ = first_of_two
    other = OtherWidth(source_of(kind, tmp_path, 3), ARGS)
    tensors[SMALL] = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"small\.log has 9 bytes in it and 8 here"):
        other.fill(ShardPlan([*tensors.items()]), [], None)
    del tensors[SMALL]
    with pytest.raises(UserError, match=r"small\.log is in it, and not in this job"):
        other.fill(ShardPlan([*tensors.items()]), [], None)


@pytest.mark.usefixtures("first_of_two")
def test_what_never_changes_comes_from_whichever_replica_has_it() -> None:
    copies = CopiesInMemory(3)
    for rank in (0, 1):
        del copies.places[constants_of(rank)]
    frozen = torch.zeros(4, 6, dtype=torch.uint8)
    other = OtherWidth(in_memory(copies, 3), ARGS)
    assert other.constants
    other.fill_constants(ShardPlan([("frozen", frozen)]))
    assert bytes(frozen.flatten().tolist()) == CONSTANTS and copies.asked[-1][0] == constants_of(2)
    del copies.places[constants_of(2)]
    assert not OtherWidth(in_memory(copies, 3), ARGS).constants


def test_a_copy_that_cannot_be_read_is_told_of_with_the_reason(
    first_of_two: tuple[ShardPlan, dict[str, torch.Tensor], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = CopiesInMemory(3)
    other = OtherWidth(in_memory(copies, 3), ARGS)
    copies.lost = {1, constants_of(0)}
    with pytest.raises(CannotRead, match=r"^generation 40 in memory cannot be read: nobody holds chunk \d of 1$"):
        other.fill(first_of_two[0], [], None)
    with pytest.raises(CannotRead, match="nobody holds chunk 0 of"):
        other.fill_constants(ShardPlan([("frozen", torch.zeros(4, 6, dtype=torch.uint8))]))
    other.close()
    assert copies.closed
    monkeypatch.setattr(copies, "_small", {0: other.small})
    with pytest.raises(CannotRead, match="the copy of holder 0 does not say what it consists of"):
        OtherWidth(in_memory(copies, 3), ARGS)


def test_no_more_validation_samples_are_counted_than_batches_of_the_new_size_had() -> None:
    saved = {"consumed_valid_samples": 8 * 5 * 8}
    args = {"eval_global_batch_size": 6, "eval_iters": 5, "eval_interval": 10}
    width._put_valid_samples(saved, args, 85)
    assert saved["consumed_valid_samples"] == 8 * 5 * 6
    width._put_valid_samples(saved, args | {"eval_global_batch_size": 8}, 85)
    assert saved["consumed_valid_samples"] == 8 * 5 * 6
    width._put_valid_samples(saved, args | {"eval_iters": 0}, 85)
    assert saved["consumed_valid_samples"] == 8 * 5 * 6


def test_with_a_step_schedule_the_batch_size_of_the_moment_is_not_compared() -> None:
    assert batch_of({"global_batch_size": 8}) == batch_of({"global_batch_size": 8, "step_batch_size_schedule": None})
    schedule = {"step_batch_size_schedule": "0:8 100:16"}
    assert batch_of({"global_batch_size": 8} | schedule) == batch_of({"global_batch_size": 16} | schedule)


def test_state_of_an_optimizer_that_has_no_pieces_is_refused_as_that(tmp_path: Path) -> None:
    scale = Layout(4, "", (Item("optimizer0.group0.0.momentum_buffer", "F32", (), 0, 4),))
    with pytest.raises(NotFit, match="this optimizer's state is not cut anew"):
        read_recut(source_of("files", tmp_path, 2), range(2), scale, SIZES, NOWHERE)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_group_of_several_dtypes_says_of_no_piece_since_its_order_is_another_inside(mixed: bool) -> None:
    model = torch.nn.ParameterList([torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4)])
    if not mixed:
        model[1] = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    inner = torch.optim.Adam([torch.nn.Parameter(torch.zeros(4)) for _ in model])
    optimizer = SimpleNamespace(
        optimizer=inner,
        model_param_group_index_map={p: (0, order) for order, p in enumerate(model)},
        _get_model_param_range_map=lambda parameter: {"param": SimpleNamespace(start=0, end=4)},
    )
    origins = _origins(Member(optimizer), {id(p): name for name, p in model.named_parameters()}, list(model))
    assert sorted(origins.values()) == ([] if mixed else [("0", 0), ("1", 0)])


def test_only_whole_replicas_with_all_experts_can_be_more_or_fewer() -> None:
    def of(width: int, ranks: int, experts: int = 1) -> Manifest:
        coordinates = [Coordinate(d * ranks + t, t, 0, d, 0, d % experts) for d in range(width) for t in range(ranks)]
        return Manifest(FORMAT, 40, 0, NAME, "", width * ranks, tuple(coordinates), (), {})

    assert can_recut(of(2, 4), 4) and can_recut(of(2, 4), 12) and not can_recut(of(2, 4), 6)
    assert not can_recut(of(2, 4, experts=2), 4) and can_recut(of(2, 4, experts=2), 16)
    assert [world for world in range(1, 9) if can_recut(of(4, 1, experts=2), world)] == [2, 4, 6, 8]


def test_experts_of_another_place_are_other_tensors_of_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("rank", 1), ("world_size", 3)):
        monkeypatch.setattr(parallel_state, f"get_expert_model_parallel_{name}", lambda value=value: value)
    model = torch.nn.ParameterDict({"dense": torch.nn.Parameter(torch.zeros(2)), "expert": torch.zeros(4)})
    model["expert"] = torch.nn.Parameter(torch.zeros(4))
    model["expert"].allreduce = False
    assert sorted(_names([model]).values()) == ["0.dense[2]", "0.expert[4]@1"]
    assert trained_parameters([model]) == {"0.dense[2]", *(f"0.expert[4]@{place}" for place in range(3))}


def test_each_rank_takes_its_own_experts_and_finds_those_of_others_in_order() -> None:
    parameters = {"dense", "expert@0", "expert@1"}

    def shard(*pieces: tuple[str, int, int]) -> Layout:
        items = [
            Item(f"item{i}", "U8", (n,), 0, n, (Piece(f"{t}/main", at, n),)) for i, (t, at, n) in enumerate(pieces)
        ]
        return Layout(0, "", tuple(items))

    four = [shard(("dense", 2 * d, 2), (f"expert@{d % 2}", 4 * (d // 2), 4)) for d in range(4)]
    for place in range(2):
        mine = cut(shard(("dense", 4 * place, 4), (f"expert@{place}", 0, 8)), four, parameters)
        assert [[copy.item for copy in copies if copy.to == "item1"] for copies in mine] == [
            ["item1"] if d % 2 == place else [] for d in range(4)
        ]


def test_a_part_of_replicated_state_may_end_between_two_tensors_of_one_parameter() -> None:
    """Each rank of a replicated optimizer has all of it, and writes an equal part."""

    def shard(*tensors: str) -> Layout:
        made_of = [(Piece(f"bias/{tensor}", 0, 80),) for tensor in tensors]
        return Layout(0, "", tuple(Item(f"item{i}", "U8", (80,), 0, 80, each) for i, each in enumerate(made_of)))

    whole = shard("main", "exp_avg")
    with pytest.raises(NotFit, match="bias/exp_avg is in it, and not in this job"):
        cut(shard("main"), [whole], {"bias"})
    assert cut(shard("main"), [whole], {"bias", "bias/main", "bias/exp_avg"})


@pytest.mark.parametrize(
    ("more", "replicas", "found"),
    [
        ({}, 4, [1, 2, 3]),
        ({"num_experts": 4, "expert_model_parallel_size": 2}, 4, [2]),
        ({"num_experts": 4, "expert_model_parallel_size": 2}, 2, "expert_model_parallel_size 2 takes all replicas"),
        (
            {"num_experts": 4, "expert_tensor_parallel_size": 1, "tensor_model_parallel_size": 2},
            4,
            "expert_tensor_parallel_size 1 and tensor_model_parallel_size 2 experts are not cut",
        ),
        ({"dataloader_type": "cyclic"}, 4, "with dataloader_type cyclic"),
        ({"global_batch_size": 0}, 4, "without --global-batch-size"),
    ],
)
def test_which_smaller_numbers_of_replicas_hold_the_model(
    more: dict[str, Any], replicas: int, found: list[int] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: replicas)
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 1)
    args = {"dataloader_type": "single", "global_batch_size": 12, **more}
    host: Any = SimpleNamespace(args=args, deals=lambda width: args["global_batch_size"] > 0)
    if isinstance(found, list):
        assert width.widths_below(host, Layout(0, "", ()), encode({"numbers": []}), True) == found
    else:
        with pytest.raises(UserError, match=re.escape(found)) as told:
            width.widths_below(host, Layout(0, "", ()), encode({"numbers": []}), True)
        assert "\n" not in str(told.value) and str(told.value).endswith("use save, or wait")


def test_a_job_that_has_become_as_narrow_as_its_experts_let_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 1)
    args = {"dataloader_type": "single", "num_experts": 4, "expert_model_parallel_size": 2}
    host: Any = SimpleNamespace(args=args, deals=lambda width: True)
    assert width.widths_below(host, Layout(0, "", ()), encode({"numbers": []}), False) == []
