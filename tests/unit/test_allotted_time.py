"""The time a job is allotted runs from its own begin, also on processes that came later."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent import worker_processes
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.config import DeadpoolConfig
from emulated import emulated_process, in_emulation  # noqa: F401


@in_emulation
def _a_process_that_came_later(directory: Path) -> None:
    import os
    import time

    import torch
    from megatron.training import global_vars, training

    from deadpool_megatron import config as settings
    from deadpool_megatron.megatron.hooks import Hooks
    from deadpool_megatron.megatron.lm import MegatronLM
    from deadpool_megatron.megatron.standby import RunningJob

    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=0, world_size=1)
    args: dict[str, Any] = {"exit_duration_in_mins": 60, "exit_signal_handler": False, "save": None, "iteration": 5}
    args |= {"exit_interval": None, "phase_transition_iterations": None, "non_persistent_save_interval": None}
    global_vars._GLOBAL_ARGS = SimpleNamespace(**args)  # type: ignore[assignment]
    global_vars._GLOBAL_TIMERS = object()

    def over() -> bool:
        return bool(training.checkpoint_and_decide_exit(None, None, None, 6, 0, {}, None))

    host: Any = MegatronLM()
    host.fields = None
    session: Any = SimpleNamespace(declared_epoch=1, wait_generation=lambda epoch: "generation")
    page: Any = None
    spare = Hooks(host, session, page, settings.DeadpoolConfig(), -1, page, True, page)
    spare._data = SimpleNamespace(build=lambda call, fields, at: "data")  # type: ignore[assignment]
    now = time.time()
    assert not over(), "its own begin was just now"
    for begun in (now - 600 * 60, now):
        spare.learn_job(RunningJob("groups", begun, {}))
        assert spare.build_iterators(page) == "data"
        assert host.begun == begun and over() is (begun < now)
    for begun in (now - 600 * 60, now):
        os.environ["DEADPOOL_BEGAN"] = str(begun)
        Hooks(host, session, page, settings.DeadpoolConfig(), -1, page, False, page)._goes_on()
        assert host.begun == begun and over() is (begun < now)


def test_it_is_over_for_a_spare_when_it_is_for_the_job(tmp_path: Path) -> None:
    _a_process_that_came_later(tmp_path)


def test_workers_of_a_new_start_are_told_when_the_job_began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[dict[str, str]] = []
    monkeypatch.setattr(
        worker_processes, "start_worker", lambda command, env, *_: told.append(env) or MagicMock(pidfd=0)
    )
    monkeypatch.setattr(worker_processes, "_descriptors", lambda worker: [])
    settings: Any = SimpleNamespace(
        config=DeadpoolConfig(), environment={}, slots_per_node=1, node=0, adopt="", pin=False, command=[],
        log_dir=str(tmp_path),
    )  # fmt: skip
    job = KnownJob(0, 2, 1, Scheme.parse("1"))
    processes = worker_processes.WorkerProcesses(settings, job, MagicMock(), lambda: False)
    for epoch in (0, 4):
        job.roster(r.Roster(epoch, [r.SlotAddress(0, 0)], {}, 1, anew=bool(epoch), began=1234.5))
        processes.start(0, 0)
    assert [env.get("DEADPOOL_BEGAN") for env in told] == [None, "1234.5"]
