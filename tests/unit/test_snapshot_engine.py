"""The promise: what is restored is bitwise what was captured, and the copying is spread and never forgotten."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from deadpool_megatron.snapshot import HostCopyEngine, Pacing, ShardPlan, Snapshotter
from deadpool_megatron.snapshot.engine import CopyError
from deadpool_megatron.vault import ChecksumMismatch, NotHeld, SlotWriter, Vault, VaultError, Version

MIB = 1 << 20


@pytest.fixture
def vault() -> Iterator[Vault]:
    made = Vault(f"s{os.getpid()}", 0)
    yield made
    made.close()


def settle(vault: Vault) -> None:
    while vault.checksum(0):
        pass


def items() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(3)
    base = torch.randn(1000, 48)
    return [
        ("a", base[:500]),
        ("b", base[500:]),
        ("transposed", torch.randn(7, 5).t()),
        ("strided", torch.randn(10, 10)[:, ::3]),
        ("half", torch.randn(33).to(torch.bfloat16)),
        ("step", torch.tensor(4.0)),
        ("none", torch.empty(0)),
        ("flags", torch.tensor([True, False, True])),
        ("big", torch.randn(3 * MIB)),
    ]


def test_every_tensor_is_restored_bitwise_whatever_its_dtype_and_strides(vault: Vault) -> None:
    tensors = items()
    plan = ShardPlan(tensors)
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 1000).path)
    snapshotter = Snapshotter(plan, writer, HostCopyEngine())
    before = [tensor.clone() for _, tensor in tensors]
    assert snapshotter.open(0, 5, b"small")
    snapshotter.tick()
    snapshotter.gate()
    settle(vault)
    for _, tensor in tensors:
        tensor.zero_()
    assert snapshotter.restore(Version(0, 5)) == b"small"
    for (name, tensor), kept in zip(tensors, before, strict=True):
        assert torch.equal(tensor, kept), name
    snapshotter.close()
    writer.close()


def test_the_layout_is_aligned_and_does_not_depend_on_aliasing() -> None:
    tensors = items()
    plan, apart = ShardPlan(tensors), ShardPlan([(name, tensor.clone()) for name, tensor in tensors])
    assert plan.digest() == apart.digest()
    assert plan.nbytes == apart.nbytes
    assert all(item.offset % 64 == 0 for item in plan._items)
    assert ShardPlan(tensors[::-1]).digest() != plan.digest()
    assert ShardPlan([("a", torch.zeros(3))]).digest() != ShardPlan([("a", torch.zeros(3, dtype=torch.int32))]).digest()
    with pytest.raises(ValueError, match="twice there: x"):
        ShardPlan([("x", torch.zeros(1)), ("x", torch.zeros(1))])


def test_neighbours_in_one_storage_are_copied_as_one_and_large_ones_in_slices() -> None:
    flat = torch.zeros(64 * 1024)
    views = [(str(index), flat[index * 1024 : (index + 1) * 1024]) for index in range(64)]
    assert len(ShardPlan(views).segments) == 1
    assert len(ShardPlan(views[::2]).segments) == 32
    one, two = torch.zeros(32), torch.zeros(32)
    assert len(ShardPlan([("one", one[:16]), ("two", two[16:])]).segments) == 2  # neighbours in number only
    big = ShardPlan([("big", torch.zeros(5 * MIB))], slice_bytes=8 * MIB)
    assert [segment.nbytes for segment in big.segments] == [8 * MIB, 8 * MIB, 4 * MIB]
    assert ShardPlan([("tiny slices", torch.zeros(5 * MIB))], slice_bytes=1).slice_bytes == 4 * MIB


def test_all_is_copied_once_whatever_the_ticks_and_what_is_left_at_the_gate(vault: Vault) -> None:
    tensor = torch.randn(20 * MIB)
    plan = ShardPlan([("x", tensor)])  # 20 segments
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 10).path)
    pacing = Pacing(limit=1.0, least=4 * MIB, bandwidth=1.0)  # next to nothing may be copied before the gate
    snapshotter = Snapshotter(plan, writer, HostCopyEngine(), pacing)
    assert snapshotter.open(0, 0, b"")
    for _ in range(16):
        snapshotter.tick()
    assert snapshotter.stats.copied_bytes < plan.nbytes // 2
    snapshotter.gate()
    assert snapshotter.stats.copied_bytes == plan.nbytes
    vault.set_committed(0, 0)
    assert snapshotter.open(0, 1, b"")
    snapshotter.gate()  # an iteration without ticks: all is copied here
    assert snapshotter.stats.copied_bytes == plan.nbytes
    settle(vault)
    assert {(h.epoch, h.generation) for h in vault.holdings().ranks[0]} == {(0, 0), (0, 1)}
    assert writer.arena.slots[1].unique == memoryview(tensor.numpy()).cast("B")
    snapshotter.close()


def test_large_slices_are_copied_while_the_training_thread_goes_on(vault: Vault) -> None:
    plan = ShardPlan([("x", torch.randn(4 * MIB))], slice_bytes=16 * MIB)
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 10).path)
    training, go_on, seconds = threading.current_thread(), threading.Event(), itertools.count()

    def clock() -> float:
        """Holds up whoever looks at it but the training thread; for the others each look is a second later."""
        if threading.current_thread() is training:
            return 0.0
        go_on.wait()
        return float(next(seconds))

    engine = HostCopyEngine(clock)
    snapshotter = Snapshotter(plan, writer, engine)
    assert snapshotter.open(0, 0, b"")  # comes back though nothing can be copied
    assert not writer.arena.slots[0].sealed
    go_on.set()
    snapshotter.gate()
    assert writer.arena.slots[0].sealed and engine.totals.busy_s == 1.0
    snapshotter.close()


def test_a_generation_that_is_given_up_cannot_be_restored(vault: Vault) -> None:
    plan = ShardPlan([("x", torch.randn(20 * MIB))])
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 10).path)
    snapshotter = Snapshotter(plan, writer, HostCopyEngine(), Pacing(limit=1.0, least=4 * MIB, bandwidth=1.0))
    assert snapshotter.open(0, 0, b"")
    snapshotter.tick()
    snapshotter.give_up()
    snapshotter.gate()
    settle(vault)
    with pytest.raises(NotHeld):
        snapshotter.restore(Version(0, 0))
    assert vault.holdings().ranks[0] == ()


def test_a_shard_of_which_a_slice_could_not_be_copied_is_never_held(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ShardPlan([(f"t{i}", torch.full((2 * MIB,), float(i + 1))) for i in range(3)])
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 10).path)
    snapshotter = Snapshotter(plan, writer, HostCopyEngine(), Pacing())
    copy, calls = torch._foreach_copy_, itertools.count()

    def fails_once(into: list[torch.Tensor], out_of: list[torch.Tensor]) -> None:
        if next(calls) == 1:
            raise RuntimeError("cannot allocate memory")
        copy(into, out_of)

    monkeypatch.setattr(torch, "_foreach_copy_", fails_once)
    engine, segments = snapshotter._engine, len(plan.segments)
    slot = writer.open(0, 5, b"")
    assert slot is not None
    engine.begin(slot)
    for index in range(segments):
        engine.copy(index, index + 1)
    engine.finish()
    engine.gate()
    settle(vault)
    assert vault.holdings().ranks == {0: ()} and not slot.sealed
    with pytest.raises(CopyError, match="cannot allocate memory"):
        snapshotter.open(0, 6, b"")
    assert snapshotter.open(0, 6, b"")
    snapshotter.gate()
    settle(vault)
    tensors = [(segment.tensor, segment.tensor.clone()) for segment in plan.segments]
    for tensor, _ in tensors:
        tensor.zero_()
    snapshotter.restore(Version(0, 6))
    assert all(torch.equal(tensor, kept) for tensor, kept in tensors)
    snapshotter.close()
    writer.close()


def test_a_damaged_shard_leaves_the_tensors_alone(vault: Vault) -> None:
    tensor = torch.arange(1000)
    plan = ShardPlan([("x", tensor)])
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 10).path)
    snapshotter = Snapshotter(plan, writer, HostCopyEngine())
    snapshotter.open(0, 0, b"")
    snapshotter.gate()
    settle(vault)
    slot = writer.arena.find(Version(0, 0))
    assert slot is not None
    slot.unique[17] ^= 4
    tensor += 1
    with pytest.raises(ChecksumMismatch):
        snapshotter.restore(Version(0, 0))
    assert torch.equal(tensor, torch.arange(1000) + 1)


def test_a_skipped_generation_is_counted_and_costs_nothing(vault: Vault) -> None:
    plan = ShardPlan([("x", torch.zeros(100))])
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 10).path)
    snapshotter = Snapshotter(plan, writer, HostCopyEngine())
    for generation in range(4):
        taken = snapshotter.open(0, generation, b"")
        snapshotter.tick()
        snapshotter.gate()
        assert taken == (generation < 2)
    assert snapshotter.stats.skipped == 2
    assert snapshotter.stats.copied_bytes == 0


def test_an_arena_of_another_size_is_refused(vault: Vault) -> None:
    writer = SlotWriter(vault.allocate_own(0, 128, 10).path)
    with pytest.raises(VaultError, match="ask for a new arena"):
        Snapshotter(ShardPlan([("x", torch.zeros(100))]), writer, HostCopyEngine())


@pytest.mark.perf
def test_an_idle_tick_costs_no_more_than_some_calls_of_python(vault: Vault) -> None:
    plan = ShardPlan([("x", torch.zeros(100))])
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 10).path)
    snapshotter = Snapshotter(plan, writer, HostCopyEngine())
    nothing: dict[str, int] = {}
    best: dict[str, float] = {}
    for _ in range(20):
        for name, call in (("tick", snapshotter.tick), ("call", nothing.copy)):
            start = time.perf_counter()
            for _ in range(1000):
                call()
            best[name] = min(best.get(name, math.inf), (time.perf_counter() - start) / 1000)
    print(f"idle tick: {best['tick'] * 1e9:.0f} ns; an empty dict's copy: {best['call'] * 1e9:.0f} ns")
    assert best["tick"] < 20 * best["call"]
