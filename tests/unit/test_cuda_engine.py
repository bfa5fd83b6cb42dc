"""What of the copies on a device can be seen without one: its threads, their device, and who waits for them."""

from __future__ import annotations

import contextlib
import queue
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from deadpool_megatron.comm.nccl import Connecting
from deadpool_megatron.comm.table import GroupRecord
from deadpool_megatron.snapshot import CudaCopyEngine, ShardPlan, cuda_engine
from deadpool_megatron.snapshot.engine import CopyError, CopyTotals, PinError


def test_the_publisher_works_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = object.__new__(CudaCopyEngine)  # a whole one needs a stream
    engine._device, engine._queue = torch.device("cuda", 3), queue.SimpleQueue()
    seen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((threading.current_thread().name, device)))
    engine._queue.put(None)
    publisher = threading.Thread(target=engine._publish, name="publisher")
    publisher.start()
    publisher.join()
    assert seen == [("publisher", engine._device)]


def test_a_shard_of_which_a_copy_has_failed_is_not_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = object.__new__(CudaCopyEngine)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    engine._device, engine._queue, engine._publisher = None, queue.SimpleQueue(), None
    engine._failure, engine._turn = None, 4
    engine.totals = CopyTotals()
    done: list[str] = []
    engine._writer = SimpleNamespace(slot=SLOT, complete=lambda: done.append("complete"), publish=done.append)

    def fails() -> None:
        raise RuntimeError("an illegal memory access")

    for synchronize, completes in ((fails, False), (lambda: None, False), (lambda: None, True)):
        event = SimpleNamespace(synchronize=synchronize)
        engine._queue.put(cuda_engine._Landed(4, event, 8, 8, 0.0, completes))
    engine._queue.put(None)
    engine._publish()
    assert done == []
    with pytest.raises(CopyError, match="illegal memory access"):
        engine.settle()


class Stream:
    """Of no device."""

    asked: ClassVar[list[int]] = []  # priorities

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.asked.append(priority)

    def synchronize(self) -> None: ...


SLOT = SimpleNamespace(index=0, turn=0)


def bound(monkeypatch: pytest.MonkeyPatch, register: Any) -> Any:
    """An engine that has begun to page-lock its memory with ``register``."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **kwargs: None)
    monkeypatch.setattr(cuda_engine, "_runtime", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    engine: Any = CudaCopyEngine(torch.device("cuda", 3))
    arena = SimpleNamespace(address=4096, view=memoryview(bytearray(8)), path="/dev/shm/x", slots=[])
    engine.bind(ShardPlan([]), SimpleNamespace(arena=arena))
    return engine


def test_nothing_is_copied_before_the_memory_is_page_locked_and_binding_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def register(address: int, size: int, flags: int) -> int:
        asked.set()
        go_on.wait()
        return 0

    engine = bound(monkeypatch, register)
    asked.wait()  # `bind` is over
    restored = threading.Thread(target=engine.restore, args=[SLOT])
    restored.start()
    restored.join(0.05)
    assert restored.is_alive()
    go_on.set()
    restored.join()
    assert engine._registered == 4096


@pytest.mark.parametrize("first", ["begin", "restore"])
def test_memory_that_cannot_be_page_locked_ends_the_first_copy_with_the_line_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    engine = bound(monkeypatch, lambda address, size, flags: 2)
    for _ in range(2):
        with pytest.raises(PinError, match=r"8 bytes of /dev/shm/x .*cudaHostRegister: 2.*ulimit -l"):
            getattr(engine, first)(SLOT)


def test_copies_and_first_uses_of_groups_draw_from_no_pool_that_communicators_draw_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch gives 32 streams a priority to everybody in turn, communicators those of 0 (or of the highest): behind a
    collective that waits for a lost peer a copy would wait, too, and first uses on one stream for one another."""
    monkeypatch.setattr(Stream, "asked", [])
    bound(monkeypatch, lambda address, size, flags: 0)
    record = GroupRecord("tp", (0, 1), "tp", "nccl", {"cuda": "nccl"}, timedelta(minutes=1))
    connecting = Connecting(record, SimpleNamespace(), torch.device("cuda", 3))
    monkeypatch.setattr(connecting, "_use", lambda: None)
    connecting.run()
    assert connecting.error is None
    assert len({0, *Stream.asked}) == 3 and max(Stream.asked) < 0
