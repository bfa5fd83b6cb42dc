"""``torch.cuda`` on the CPU: one device, one stream that is always done, one generator."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from deadpool_megatron.emulation import graphs

CPU = torch.device("cpu")
_MEMORY = 1 << 34


class Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU
        self.cuda_stream = 0
        self.priority = 0

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        return None


class Event:
    """A moment; `elapsed_time` in milliseconds as in torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._t = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self._t = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``."""
        return (end._t - self._t) * 1e3


_STREAM = Stream()


def constant(value: Any) -> Callable[..., Any]:
    """A function that always answers so."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer


def _capability() -> tuple[int, int]:
    """Of a Hopper, or what DEADPOOL_EMULATED_CAPABILITY says ("10.0": MXFP8 and NVFP4 ask for a Blackwell)."""
    major, minor = os.environ.get("DEADPOOL_EMULATED_CAPABILITY", "9.0").split(".")
    return int(major), int(minor)


def _properties(*args: Any) -> SimpleNamespace:
    major, minor = _capability()
    return SimpleNamespace(
        name="cpu", major=major, minor=minor, total_memory=_MEMORY, multi_processor_count=1, uuid="0", warp_size=32
    )


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _call(function: Callable[[], Any], **kwargs: Any) -> None:
    function()


def install() -> None:
    """Replace the functions of torch.cuda that Megatron and its schedules call."""
    cuda = torch.cuda
    # One function object an entry: torch._dynamo refuses one object under two names.
    table: dict[str, Any] = {
        "is_available": constant(True),
        "is_initialized": constant(True),
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": constant(0),
        "set_device": constant(None),
        "synchronize": constant(None),
        "empty_cache": constant(None),
        "init": constant(None),
        "_lazy_init": constant(None),
        "_lazy_call": _call,
        "current_stream": constant(_STREAM),
        "default_stream": constant(_STREAM),
        "set_stream": constant(None),
        "stream": lambda stream: contextlib.nullcontext(stream),
        "Stream": Stream,
        "Event": Event,
        "is_current_stream_capturing": graphs.is_capturing,
        "CUDAGraph": graphs.CUDAGraph,
        "graph": graphs.Capture,
        "graph_pool_handle": constant((0, 0)),
        "get_device_properties": _properties,
        "get_device_capability": lambda *args: _capability(),
        "get_device_name": constant("cpu"),
        "memory_allocated": constant(0),
        "max_memory_allocated": constant(0),
        "memory_reserved": constant(0),
        "max_memory_reserved": constant(0),
        "memory_stats": lambda *a, **k: defaultdict(int),
        "reset_peak_memory_stats": constant(None),
        "mem_get_info": constant((_MEMORY, _MEMORY)),
        "utilization": constant(0),
        "temperature": constant(0),
        "power_draw": constant(0),
        "clock_rate": constant(0),
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": _manual_seed,
        # Device and CPU generator are one here; `torch.manual_seed` calls this, then seeds the CPU's with the same.
        "manual_seed_all": lambda seed: _manual_seed(seed),
        "default_generators": (graphs.DefaultGenerator(),),
    }
    for name, value in table.items():
        setattr(cuda, name, value)
    random: Any = cuda.random
    random.get_rng_state, random.set_rng_state = _get_rng_state, _set_rng_state
    cuda.nvtx.range_push = constant(None)
    cuda.nvtx.range_pop = constant(None)
    torch.accelerator.current_stream = constant(_STREAM)
    torch.accelerator.synchronize = constant(None)
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, check, constant(None))
