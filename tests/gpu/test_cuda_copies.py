"""The promise on a CUDA device: bitwise copies, no wait of the host, and a gate that holds the state still."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest
import torch

from deadpool_megatron.snapshot import CudaCopyEngine, ShardPlan, Snapshotter
from deadpool_megatron.vault import SlotWriter, Vault, Version

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GIB = 1 << 30


@pytest.fixture
def vault() -> Iterator[Vault]:
    made = Vault(f"g{os.getpid()}", 0)
    yield made
    made.close()


def settle(vault: Vault) -> None:
    while vault.checksum(0):
        pass


def snapshotter_of(vault: Vault, items: list[tuple[str, torch.Tensor]]) -> tuple[Snapshotter, CudaCopyEngine]:
    plan = ShardPlan(items)
    writer = SlotWriter(vault.allocate_own(0, plan.nbytes, 1000).path)
    engine = CudaCopyEngine()
    return Snapshotter(plan, writer, engine), engine


def keep_busy(seconds: float) -> None:
    """Queue work of about that long on the current stream."""
    torch.cuda._sleep(int(seconds * torch.cuda.get_device_properties(0).clock_rate * 1000))


def test_tensors_of_every_dtype_stride_and_place_come_back_bitwise(vault: Vault) -> None:
    base = torch.randn(1000, 48, device="cuda")
    items = [
        ("a", base[:500]),
        ("b", base[500:]),
        ("transposed", torch.randn(7, 5, device="cuda").t()),
        ("half", torch.randn(33, device="cuda").to(torch.bfloat16)),
        ("steps on the host", torch.arange(12.0)),
        ("flags", torch.tensor([True, False, True], device="cuda")),
        ("big", torch.randn(20 << 20, device="cuda")),
    ]
    snapshotter, engine = snapshotter_of(vault, items)
    before = [tensor.clone() for _, tensor in items]
    assert snapshotter.open(0, 5, b"small")
    snapshotter.tick()
    snapshotter.gate()
    for _, tensor in items:
        tensor.zero_()  # ordered after the copies by the gate
    engine.settle()
    settle(vault)
    assert snapshotter.restore(Version(0, 5)) == b"small"
    for (name, tensor), kept in zip(items, before, strict=True):
        assert torch.equal(tensor, kept), name
    snapshotter.close()


def test_the_state_is_copied_as_it_was_although_the_host_has_run_far_ahead(vault: Vault) -> None:
    state = torch.zeros(GIB // 4, device="cuda")
    snapshotter, engine = snapshotter_of(vault, [("state", state)])
    for generation in range(4):
        keep_busy(0.05)
        state.fill_(float(generation))  # the update of the iteration before
        assert snapshotter.open(0, generation, b"")
        for _ in range(8):
            keep_busy(0.005)
            snapshotter.tick()
        snapshotter.gate()
        state.fill_(-1.0)  # the optimizer's step: must not be seen by the copies
        engine.settle()
        settle(vault)
        vault.set_committed(0, generation)
        slot = vault.arena(0, "own").find(Version(0, generation))  # type: ignore[union-attr]
        assert slot is not None
        kept = torch.frombuffer(slot.unique, dtype=torch.float32)
        assert kept.min() == kept.max() == generation
        del kept
    snapshotter.close()


def test_opening_ticking_and_gating_do_not_wait_for_the_device(vault: Vault) -> None:
    snapshotter, engine = snapshotter_of(vault, [("state", torch.zeros(GIB // 4, device="cuda"))])
    snapshotter.open(0, 0, b"")
    snapshotter.gate()
    engine.settle()
    torch.cuda.synchronize()
    keep_busy(3.0)  # the copies of the next generation cannot begin before this is over
    over = torch.cuda.current_stream().record_event()
    snapshotter.open(0, 1, b"")
    for _ in range(8):
        snapshotter.tick()
    snapshotter.gate()
    assert not over.query()
    torch.cuda.synchronize()
    engine.settle()
    snapshotter.close()


def test_what_another_stream_still_writes_does_not_reach_what_is_restored(vault: Vault) -> None:
    """As a reduction that an abort has freed, on a stream of its own."""
    state = torch.full((1 << 20,), 7.0, device="cuda")
    snapshotter, engine = snapshotter_of(vault, [("state", state)])
    snapshotter.open(0, 3, b"")
    snapshotter.gate()
    engine.settle()
    settle(vault)
    with torch.cuda.stream(torch.cuda.Stream()):
        keep_busy(0.5)
        state.fill_(-1.0)
    snapshotter.restore(Version(0, 3))
    torch.cuda.synchronize()
    assert state.eq(7.0).all()
    snapshotter.close()


def test_the_stream_of_the_copies_is_given_to_nobody_else() -> None:
    """As communicators draw them: twice all that torch has of the default priority, and of the highest."""
    ours = CudaCopyEngine()._stream
    for priority in torch.cuda.Stream.priority_range():
        assert ours.cuda_stream not in {torch.cuda.Stream(priority=priority).cuda_stream for _ in range(64)}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_worker_of_the_second_device_makes_no_context_on_the_first(vault: Vault) -> None:
    path = vault.allocate_own(0, 1 << 20, 1000).path
    program = f"""
        import torch
        from deadpool_megatron.snapshot import CudaCopyEngine, ShardPlan, Snapshotter
        from deadpool_megatron.vault import SlotWriter
        torch.cuda.set_device(1)
        plan = ShardPlan([("state", torch.zeros(1 << 18, device="cuda"))])
        engine = CudaCopyEngine()
        snapshotter = Snapshotter(plan, SlotWriter({path!r}), engine)
        snapshotter.open(0, 0, b"")
        snapshotter.gate()
        engine.settle()
        assert not torch._C._cuda_hasPrimaryContext(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@pytest.mark.perf
def test_unpaced_copies_reach_nine_tenths_of_what_pinned_memory_gives(vault: Vault) -> None:
    state = torch.zeros(GIB // 2, device="cuda")  # 2 GiB
    pinned = torch.empty(GIB // 2, pin_memory=True)
    snapshotter, engine = snapshotter_of(vault, [("state", state)])
    stream = torch.cuda.Stream()
    ceiling = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.cuda.stream(stream):
            pinned.copy_(state, non_blocking=True)
        stream.synchronize()
        ceiling = max(ceiling, 4 * state.numel() / (time.perf_counter() - start))
    reached = 0.0
    for generation in range(3):
        snapshotter.open(0, generation, b"")
        snapshotter.gate()
        engine.settle()
        settle(vault)
        vault.set_committed(0, generation)
        reached = max(reached, snapshotter.account().bandwidth)
    print(f"pinned copy {ceiling / 1e9:.1f} GB/s, into the vault {reached / 1e9:.1f} GB/s")
    assert reached >= 0.9 * ceiling
    snapshotter.close()
