"""NCCL's side as far as it goes without a GPU: aborts run side by side under one deadline, options are carried over."""

import os
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from deadpool_megatron.comm.nccl import NCCL_ENVIRONMENT, Aborts, options_for, set_environment
from deadpool_megatron.comm.table import GroupRecord
from waiting import until

pytestmark = pytest.mark.versions(torch=True)

NEVER_S = 1e6  # a deadline that no test sees


class Abortable:
    """A backend whose abort returns only when all of `together` have begun theirs (as ranks' aborts can)."""

    def __init__(
        self,
        together: threading.Barrier | None = None,
        for_ever: threading.Event | None = None,
        error: Exception | None = None,
    ) -> None:
        self.together, self.for_ever, self.error = together, for_ever, error
        self.called, self.done = 0, False

    def abort(self) -> None:
        self.called += 1
        if self.together is not None:
            self.together.wait()
        if self.for_ever is not None:
            self.for_ever.wait()
        if self.error is not None:
            raise self.error
        self.done = True


def test_aborts_that_wait_for_one_another_all_finish() -> None:
    together = threading.Barrier(3)
    backends = [Abortable(together) for _ in range(3)]
    assert Aborts().run(backends, time.monotonic() + NEVER_S) == (3, 0)
    assert all(backend.done for backend in backends)


def test_an_abort_that_hangs_costs_the_deadline_and_no_more() -> None:
    release = threading.Event()
    hangs = [Abortable(for_ever=release) for _ in range(3)]
    aborts = Aborts()
    assert aborts.run(hangs, time.monotonic() + 0.2) == (0, 3)  # waiting for one of them would never end
    until(lambda: all(hang.called for hang in hangs), "their threads")
    assert aborts.run(hangs, time.monotonic()) == (0, 3)
    assert [hang.called for hang in hangs] == [1, 1, 1]  # the second call has joined the first
    release.set()
    assert aborts.run(hangs, time.monotonic() + NEVER_S) == (3, 0)


def test_an_abort_that_fails_keeps_no_other_from_its_end(caplog: pytest.LogCaptureFixture) -> None:
    backends = [Abortable(), Abortable(error=RuntimeError("ProcessGroup abort timed out")), Abortable()]
    assert Aborts().run(backends, time.monotonic() + NEVER_S) == (3, 0)
    assert [backend.done for backend in backends] == [True, False, True]
    assert "not aborted: ProcessGroup abort timed out" in caplog.text


def test_environment_keeps_the_watchdog_from_killing_survivors() -> None:
    assert NCCL_ENVIRONMENT["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert NCCL_ENVIRONMENT["NCCL_RUNTIME_CONNECT"] == "0"  # nor the training thread from hearing of an abort


def test_what_a_script_exports_is_overridden_with_one_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "NCCL_NVLS_ENABLE": "0"})
    for _ in range(2):  # each group that is made
        set_environment()
    assert NCCL_ENVIRONMENT.items() <= os.environ.items()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("TORCH_NCCL_ASYNC_ERROR_HANDLING=1 is overridden with 0")


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch without NCCL")
def test_new_options_carry_what_the_creator_asked_for() -> None:
    asked = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    asked.config.cga_cluster_size = 2
    asked.config.max_ctas = 16
    asked.config.blocking = 1  # torch's own note in the options of the group's first communicator
    record = GroupRecord("7", (3, 5), "tp", "nccl", {"cuda": "nccl"}, timedelta(seconds=77), options=asked)
    options = options_for(record)
    assert options is not asked  # torch writes into the ones it is given
    assert options.is_high_priority_stream
    assert (options.config.cga_cluster_size, options.config.max_ctas) == (2, 16)
    assert options.config.blocking == 0
    assert options._timeout == timedelta(seconds=77)
    assert list(options.global_ranks_in_group) == [3, 5]
    assert options.group_name == "7"
