"""The promise: what is restored is bitwise what was captured, and the copying is spread and never forgotten."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator

import pytest
import torch

from deadpool_megatron.snapshot import HostCopyEngine, Pacing, ShardPlan, Snapshotter
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
    plan = ShardPlan([("x", torch.randn(64 * MIB))], slice_bytes=64 * MIB)
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 10).path)
    snapshotter = Snapshotter(plan, writer, HostCopyEngine())
    assert snapshotter.open(0, 0, b"")
    asked = snapshotter.stats.open_s
    assert not writer.arena.slots[0].sealed  # it takes some 50 ms
    snapshotter.gate()
    assert writer.arena.slots[0].sealed and snapshotter.account().copied_s > asked
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


def test_an_idle_tick_costs_less_than_a_few_microseconds(vault: Vault) -> None:
    plan = ShardPlan([("x", torch.zeros(100))])
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 10).path)
    snapshotter = Snapshotter(plan, writer, HostCopyEngine())
    rounds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            snapshotter.tick()
        rounds.append((time.perf_counter() - start) / 1000)
    print(f"idle tick: {statistics.median(rounds) * 1e9:.0f} ns")
    assert min(rounds) < 5e-6
