"""A checkpoint that broke off leaves nothing to the next one, and ending it waits for nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron.core.dist_checkpointing.strategies import filesystem_async

from deadpool_megatron.megatron.reset import end_unfinished_saves, forget_write_results


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The queue by which megatron.core's writers tell what they wrote."""
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    return filesystem_async.get_write_results_queue("fork")


def test_what_a_broken_checkpoint_has_written_is_not_taken_for_what_the_next_one_has(results: Any) -> None:
    results.put("of the broken one")
    forget_write_results()
    results.put("of the broken one, from a writer that is being ended")
    queue = filesystem_async.get_write_results_queue()
    assert queue._manager is results._manager
    queue.put("of the next one")
    assert queue.get_nowait() == "of the next one" and queue.empty()


def test_where_what_keeps_the_results_is_gone_the_next_checkpoint_starts_it_anew(results: Any) -> None:
    process = results._manager._process
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    forget_write_results()
    filesystem_async.get_write_results_queue("fork").put("of the next one")


def _write(begun: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a write that a storage does not come back from
    begun.set()
    time.sleep(3600)


class _Caller:
    """As ``PersistentAsyncCaller`` of nvidia-resiliency-ext 0.7, which test_bridge.py has."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.queue, self.preload_q, self.comp_q = context.JoinableQueue(), context.JoinableQueue(), context.Queue()
        begun = context.Event()
        self.process: Any = context.Process(target=_write, args=(begun,), daemon=True)
        self.process.start()
        self.queue.put("a request that nobody takes" * 10_000)
        begun.wait()

    def close(self, abort: bool) -> None:
        if self.process:
            self.process.terminate()
            self.process.join()
            self.process = None


def test_a_writer_that_does_not_heed_its_end_holds_nobody_up() -> None:
    """It would be joined on the thread that the others of the recovery wait for."""
    callers = saving, idle = _Caller(), _Caller()
    processes = [caller.process for caller in callers]
    queue = SimpleNamespace(
        async_calls=deque([SimpleNamespace(async_caller=saving)]),
        persistent_caller=saving,
        _warmup_persistent_caller=idle,
        close=lambda abort: [caller.close(abort) for caller in callers],
    )
    try:
        end_unfinished_saves(queue, 0)
        assert not queue.async_calls and [caller.process for caller in callers] == [None, None]
        for process in processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
