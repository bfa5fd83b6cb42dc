"""What torch promises on a GPU holds under the emulation, each checked in a process of its own.

The processes are forked from one that has imported torch, so that a check costs milliseconds, not an import.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import pytest
import torch

from deadpool_megatron.emulation import EmulationError, install, is_installed

pytestmark = pytest.mark.versions(torch=True)


class InOwnProcess(Protocol):
    """Runs a function in a new process; raises here what it raises there."""

    def __call__(self, check: Callable[..., Any], *args: Any) -> Any: ...


@pytest.fixture(scope="module")
def in_own_process() -> Iterator[InOwnProcess]:
    """Processes without emulation until the function asks for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.utils.data"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        yield lambda check, *args: pool.submit(check, *args).result()


@pytest.fixture
def emulated(in_own_process: InOwnProcess) -> InOwnProcess:
    """Processes under the emulation."""
    return lambda check, *args: in_own_process(_emulated, check, *args)


def _emulated(check: Callable[..., Any], *args: Any) -> Any:
    install()
    return check(*args)


# Refusal


def _a_gpu_is_visible() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2


def _install_beside_a_gpu() -> tuple[str, bool, bool, bool]:
    _a_gpu_is_visible()
    zeros, environment = torch.zeros, dict(os.environ)
    with pytest.raises(EmulationError) as refusal:
        install()
    return str(refusal.value), is_installed(), torch.zeros is zeros, dict(os.environ) == environment


def test_a_visible_gpu_is_refused_in_one_line_and_nothing_is_changed(in_own_process: InOwnProcess) -> None:
    message, installed, torch_untouched, environment_untouched = in_own_process(_install_beside_a_gpu)
    assert "2 real GPU(s)" in message
    assert "CUDA_VISIBLE_DEVICES" in message
    assert "\n" not in message
    assert not installed
    assert torch_untouched
    assert environment_untouched


def _forced() -> tuple[bool, str]:
    _a_gpu_is_visible()
    install(force=True)
    return is_installed(), torch.zeros(1, device="cuda").device.type


def test_a_visible_gpu_is_left_alone_when_forced(in_own_process: InOwnProcess) -> None:
    assert in_own_process(_forced) == (True, "cpu")


def _twice() -> bool:
    before = torch.zeros, torch.Tensor.to, torch.distributed.new_group
    install()
    return before == (torch.zeros, torch.Tensor.to, torch.distributed.new_group)


def test_installing_twice_is_installing_once(emulated: InOwnProcess) -> None:
    assert emulated(_twice)


# Tensors


def _factories() -> set[str]:
    x = torch.zeros(2, 3, device="cpu")
    cuda = torch.device("cuda", 1)
    layer = torch.nn.Linear(2, 2)
    made = [
        torch.zeros(2, device="cuda"),
        torch.ones(2, device="cuda:1"),
        torch.empty((2, 2), dtype=torch.bfloat16, device=cuda),
        torch.full((2,), 3.0, device=0),
        torch.tensor([1, 2], device=torch.cuda.current_device(), pin_memory=True),
        torch.arange(4, device="cuda"),
        torch.randn(2, device="cuda", dtype=torch.float32),
        torch.randint(0, 5, (3,), device="cuda"),
        torch.randperm(4, device="cuda"),
        torch.as_tensor([1.0], device="cuda"),
        torch.empty_strided((2, 2), (2, 1), device="cuda"),
        torch.triu_indices(3, 3, device="cuda"),
        torch.zeros_like(x, device="cuda"),
        torch.empty_like(x, device=cuda),
        x.new_empty(4, device="cuda"),
        x.new_tensor([1.0], device="cuda"),
        x.to("cuda"),
        x.to(0),
        x.to(cuda, non_blocking=True),
        x.to(device="cuda", dtype=torch.float64),
        x.cuda(),
        x.cuda(0, non_blocking=True),
        x.pin_memory(),
        layer.cuda().weight,
        layer.to("cuda").bias,
        layer.to(device=cuda, dtype=torch.bfloat16).weight,
    ]
    assert made[-1].dtype is torch.bfloat16
    assert x.to("cuda", torch.float16).dtype is torch.float16
    assert x.to(x.double()).dtype is torch.float64
    assert torch.full((2,), 3.0, device=0).tolist() == [3.0, 3.0]
    assert all(t.is_cuda for t in made)
    return {t.device.type for t in made}


def test_tensors_made_for_a_gpu_or_moved_there_stay_on_the_cpu(emulated: InOwnProcess) -> None:
    assert emulated(_factories) == {"cpu"}


def _types() -> list[str]:
    x = torch.zeros(2)
    assert x.type("torch.cuda.HalfTensor").dtype is torch.float16
    assert x.type(torch.bfloat16).dtype is torch.bfloat16
    assert x.type(torch.cuda.DoubleTensor).dtype is torch.float64
    assert torch.cuda.LongTensor([1, 2]).tolist() == [1, 2]
    assert torch.cuda.IntTensor(3).shape == (3,)
    return [x.type(), x.bfloat16().type(), x.half().type(), x.bool().type()]


def test_type_names_are_those_of_a_gpu(emulated: InOwnProcess) -> None:
    # Megatron buckets gradients by these names.
    assert emulated(_types) == [f"torch.cuda.{name}Tensor" for name in ("Float", "BFloat16", "Half", "Bool")]


# Streams, events, properties


def _streams_and_events() -> float:
    side = torch.cuda.Stream()
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    x = torch.zeros(4, device="cuda")
    with torch.cuda.stream(side):
        with mock.patch("time.perf_counter", return_value=7.0):
            before.record()
        x += 1
        with mock.patch("time.perf_counter", return_value=7.25):
            after.record(side)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.current_stream().wait_event(after)
    side.wait_event(torch.cuda.default_stream().record_event())
    after.synchronize()
    side.synchronize()
    torch.cuda.synchronize()
    x.record_stream(side)
    assert x.tolist() == [1.0] * 4
    assert after.query()
    assert side.query()
    assert torch.cuda.current_stream() is torch.cuda.default_stream()
    assert not torch.cuda.is_current_stream_capturing()
    return before.elapsed_time(after)


def test_events_measure_the_work_between_them_in_milliseconds(emulated: InOwnProcess) -> None:
    assert emulated(_streams_and_events) == 250.0


def _properties(local_world_size: str) -> dict[str, Any]:
    os.environ["LOCAL_WORLD_SIZE"] = local_world_size
    torch.cuda.set_device(1)
    torch.cuda.empty_cache()
    torch.cuda.nvtx.range_push("name")
    torch.cuda.nvtx.range_pop()
    free, total = torch.cuda.mem_get_info()
    return {
        "available": torch.cuda.is_available(),
        "count": torch.cuda.device_count(),
        "current": torch.cuda.current_device(),
        "capability": torch.cuda.get_device_capability(),
        "major": torch.cuda.get_device_properties(0).major,
        "memory": free <= total == torch.cuda.get_device_properties(0).total_memory,
        "allocated": torch.cuda.memory_allocated() + torch.cuda.max_memory_allocated() + torch.cuda.memory_reserved(),
        "statistics": torch.cuda.memory_stats()["allocation.all.current"],
    }


def test_every_local_process_finds_a_device(emulated: InOwnProcess) -> None:
    assert emulated(_properties, "3") == {
        "available": True,
        "count": 3,
        "current": 0,
        "capability": (9, 0),
        "major": 9,
        "memory": True,
        "allocated": 0,
        "statistics": 0,
    }


# Random numbers


def _rng() -> None:
    torch.cuda.manual_seed(5)
    first = torch.rand(4, device="cuda")
    state = torch.cuda.get_rng_state()
    second = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state, device=0)
    assert torch.equal(torch.rand(4, device="cuda"), second)
    torch.cuda.random.set_rng_state(state)
    assert torch.equal(torch.cuda.random.get_rng_state(device="cuda"), state)
    assert torch.equal(torch.rand(4, device="cuda"), second)
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    torch.cuda.manual_seed_all(5)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    # It seeds the devices too; device and CPU are one generator here, and it must not be seeded anew in between.
    torch.manual_seed(7)
    drawn = torch.rand(4)
    torch.default_generator.manual_seed(7)
    assert torch.equal(torch.rand(4), drawn)
    assert torch.cuda.default_generators[0].initial_seed() == 7


def test_rng_states_taken_and_set_repeat_the_same_numbers(emulated: InOwnProcess) -> None:
    emulated(_rng)


def _dropout_under_megatrons_tracker() -> None:
    from megatron.core.datasets.utils import compile_helpers
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    compile_helpers()  # upstream's ends the process where there is no Makefile
    torch.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 1234)
    outside = torch.cuda.get_rng_state()
    with tracker.fork("model-parallel-rng"):
        first = torch.rand(4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), outside)
    with tracker.fork("model-parallel-rng"):
        second = torch.rand(4, device="cuda")
    assert not torch.equal(first, second)
    torch.manual_seed(1234)
    assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.rand(4), second)


def test_megatrons_rng_tracker_keeps_its_streams_apart(emulated: InOwnProcess) -> None:
    emulated(_dropout_under_megatrons_tracker)


# Saving, loading data, training, communicating


def _save(path: Path) -> None:
    layer = torch.nn.Linear(3, 2).to("cuda")
    torch.nn.init.constant_(layer.weight, 0.5)
    torch.save({"layer": layer.state_dict(), "half": torch.ones(4, device="cuda", dtype=torch.bfloat16)}, path)
    _check_saved(path)


def _check_saved(path: Path) -> None:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    assert loaded["layer"]["weight"].eq(0.5).all()
    assert loaded["half"].dtype is torch.bfloat16
    assert loaded["half"].device.type == "cpu"


def test_files_saved_under_the_emulation_load_with_it_and_without(
    emulated: InOwnProcess, in_own_process: InOwnProcess, tmp_path: Path
) -> None:
    emulated(_save, tmp_path / "state.pt")
    in_own_process(_check_saved, tmp_path / "state.pt")


class _Squares(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), index * index, device="cuda")


def _load_with_workers() -> tuple[list[int], int]:
    # In a process that a fork server made, workers would come from a fork server too, and know no emulation.
    context = multiprocessing.get_context("fork")
    loader = torch.utils.data.DataLoader(
        _Squares(), batch_size=4, num_workers=2, pin_memory=True, multiprocessing_context=context
    )
    batches = [batch.cuda(non_blocking=True) for batch in loader]
    return [int(value) for batch in batches for value in batch[:, 0]], len(batches)


def test_data_loader_workers_deliver_every_batch_in_order(emulated: InOwnProcess) -> None:
    assert emulated(_load_with_workers) == ([i * i for i in range(10)], 3)


def _train(device: str) -> str:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 8, device=device)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def test_training_gives_bitwise_what_it_gives_on_the_cpu(emulated: InOwnProcess, in_own_process: InOwnProcess) -> None:
    assert emulated(_train, "cuda") == in_own_process(_train, "cpu")


def _communicate(store: Path, how: str) -> tuple[str, str, float]:
    import torch.distributed as dist

    common: dict[str, Any] = {"rank": 0, "world_size": 1, "store": dist.FileStore(str(store), 1)}
    if how == "positional":
        dist.init_process_group("nccl", **common)
    elif how == "default":
        dist.init_process_group(**common)
    else:
        dist.init_process_group(backend="cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0), **common)
    group = dist.new_group([0], backend="nccl", pg_options=object(), group_desc="tensor")
    x = torch.full((2,), 3.0, device="cuda")
    dist.all_reduce(x, group=group)
    dist.all_reduce(x)
    dist.barrier(device_ids=[0])
    backends = dist.get_backend(), dist.get_backend(group)
    dist.destroy_process_group()
    return *backends, float(x.sum())


@pytest.mark.parametrize("how", ["positional", "default", "keyword"])
def test_groups_asked_for_with_nccl_work_over_gloo(emulated: InOwnProcess, tmp_path: Path, how: str) -> None:
    assert emulated(_communicate, tmp_path / "store", how) == ("gloo", "gloo", 6.0)
