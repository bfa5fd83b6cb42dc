"""Shards of W replicas become those of any other number, every byte where it belongs."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from megatron.core import parallel_state

from deadpool_megatron.compat import UserError
from deadpool_megatron.durable import FORMAT, Coordinate, Item, Layout, Manifest, Piece, ShardFile, read_recut
from deadpool_megatron.durable.errors import Damaged, NotFit
from deadpool_megatron.durable.files import read_header, write_shard
from deadpool_megatron.durable.format import MANIFEST, directory_name, encode_manifest
from deadpool_megatron.durable.recut import cut
from deadpool_megatron.durable.start import can_recut
from deadpool_megatron.durable.store import LocalStore
from deadpool_megatron.megatron import optimizer_state, width
from deadpool_megatron.megatron.optimizer_state import Member
from deadpool_megatron.megatron.pieces import _names, _origins, pieces_of, trained_parameters
from deadpool_megatron.megatron.same_model import batch_of
from deadpool_megatron.megatron.width import OtherWidth
from deadpool_megatron.snapshot import encode

NAME = directory_name(40, "job", 1)
SIZES = {"embedding": 700, "norm": 4, "matrix": 256, "bias": 20}  # elements
ELEMENT = 4


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


def saved(store: LocalStore, width: int, says: bool = True) -> Manifest:
    shards: list[ShardFile] = []
    for rank in range(width):
        layout, unique = replica(rank, width)
        if not says:
            items = tuple(msgspec.structs.replace(item, pieces=()) for item in layout.items)
            layout = msgspec.structs.replace(layout, items=items)
        shards.append(write_shard(store, NAME, rank, 40, layout, memoryview(unique), b"small %d" % rank))
    coordinates = tuple(Coordinate(rank, 0, 0, rank) for rank in range(width))
    return Manifest(FORMAT, 40, 0, NAME, "", width, coordinates, tuple(shards), {})


@pytest.mark.parametrize("before", [1, 2, 3, 7])
@pytest.mark.parametrize("after", [1, 2, 3, 5, 8])
def test_shards_of_any_number_of_replicas_become_those_of_any_other(tmp_path: Path, before: int, after: int) -> None:
    store = LocalStore(str(tmp_path))
    manifest = saved(store, before)
    for rank in range(after):
        layout, want = replica(rank, after)
        got = bytearray(len(want))
        places = {item.name: item for item in layout.items}

        def put(name: str, at: int, data: memoryview, got: bytearray = got, places: dict[str, Item] = places) -> None:
            got[places[name].offset + at : places[name].offset + at + len(data)] = data

        read_recut(store, manifest, range(before), layout, SIZES, put)
        assert bytes(got) == want


def test_what_a_shard_consists_of_is_in_its_file(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    manifest = saved(store, 2)
    assert read_header(store, NAME, manifest.shards[1]).layout == replica(1, 2)[0]


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


def test_a_generation_of_an_earlier_version_is_refused_since_it_does_not_say_what_it_consists_of(
    tmp_path: Path,
) -> None:
    store = LocalStore(str(tmp_path))
    with pytest.raises(NotFit, match="does not say what its shards consist of"):
        read_recut(store, saved(store, 2, says=False), range(2), replica(0, 1)[0], SIZES, lambda name, at, data: None)


def test_a_file_that_has_changed_is_found(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    manifest = saved(store, 2)
    file = tmp_path / NAME / manifest.shards[1].file
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged, match="checksum"):
        read_recut(store, manifest, range(2), replica(0, 1)[0], SIZES, lambda name, at, data: None)


def generation(directory: Path, monkeypatch: Any) -> str:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    manifest = saved(LocalStore(str(directory)), 2)
    (directory / NAME / MANIFEST).write_bytes(encode_manifest(manifest))
    return str(directory)


def test_what_follows_from_the_width_is_refused_at_another(tmp_path: Path, monkeypatch: Any) -> None:
    directory = generation(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="with full_validation True it has to have as many replicas") as told:
        OtherWidth(directory, NAME, {"full_validation": True, "dataloader_type": "single"})
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
        OtherWidth(directory, NAME, {"full_validation": True})
    monkeypatch.setattr(width, "_PATIENCE_S", 0.0)
    failures.append(OSError(5, "Input/output error"))
    with pytest.raises(width.CannotRead, match=f"{NAME} cannot be read: ") as told:
        OtherWidth(directory, NAME, {"full_validation": True})
    assert "\n" not in str(told.value)


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
    store = LocalStore(str(tmp_path))
    scale = Layout(4, "", (Item("optimizer0.group0.0.momentum_buffer", "F32", (), 0, 4),))
    with pytest.raises(NotFit, match="this optimizer's state is not cut anew"):
        read_recut(store, saved(store, 2), range(2), scale, SIZES, lambda name, at, data: None)


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
