"""What a process cannot hear while it stands still is nobody's silence."""

from __future__ import annotations

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.link.awake import AwakeClock
from deadpool_megatron.cluster.records.exits import Exit
from simulated import DEADLINES, SimulatedJob


class _Time:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_time_goes_on_while_the_process_runs_and_not_while_it_stands_still() -> None:
    time = _Time()
    clock = AwakeClock(2.0, time)
    for _ in range(10):
        time.now += 1.5
        clock.now()
    assert clock.now() == 65.0 and not clock.stood_still() and not clock.just_woke(1000.0)
    time.now += 30.0
    assert clock.now() == 65.0 and clock.just_woke(3.0)
    assert clock.stood_still() == 30.0 and not clock.stood_still()
    for _ in range(3):
        time.now += 1.0
        assert clock.now() == time.now - 30.0
    assert not clock.just_woke(3.0)


def _back(job: SimulatedJob, node: int, settled: bool = True, epoch: int | None = None) -> None:
    epoch = job.core.epoch if epoch is None else epoch
    job.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [0, 1], epoch=epoch, settled=settled))


def _away(job: SimulatedJob, *nodes: int) -> None:
    for node in nodes:
        job.take(job.core.node_away(node, job.now, stood_still=True))


def test_nodes_that_come_back_after_a_standstill_have_lost_nothing() -> None:
    job = SimulatedJob().train()
    job.commit(0)
    _away(job, 0, 1, 2, 3)
    for node in range(4):
        _back(job, node)
    job.wait(100)
    assert job.core.phase is Phase.RUNNING and job.core.epoch == 0 and not job.events("detected")


def test_a_node_that_does_not_come_back_is_lost() -> None:
    job = SimulatedJob().train()
    job.commit(0)
    _away(job, 0, 1)
    _back(job, 0)
    job.wait(DEADLINES.lease + 1)
    assert not job.events("detected")
    job.wait(10)
    assert [e["node"] for e in job.events("detected")] == [1] and job.active == [0, 3, 2]


def test_a_recovery_that_was_under_way_begins_again_as_its_messages_may_be_lost() -> None:
    job = SimulatedJob().train()
    job.commit(0)
    job.lose(0)
    _away(job, 1, 2)
    assert job.core.epoch == 1
    _back(job, 1, settled=False)
    _back(job, 2, settled=False)
    assert job.core.epoch == 2 and job.finish is None
    job.recover(0)
    assert job.core.phase is Phase.RUNNING


def test_a_loss_while_others_are_awaited_is_declared_when_they_are_back() -> None:
    job = SimulatedJob().train()
    job.commit(0)
    _away(job, 1)
    job.lose(0)
    assert job.core.epoch == 0
    _back(job, 1)
    assert job.core.epoch == 1 and job.active == [3, 1, 2]


@pytest.mark.parametrize("phase", ["starting", "finishing"])
def test_a_standstill_at_the_start_or_the_end_ends_no_job(phase: str) -> None:
    job = SimulatedJob()
    if phase == "starting":
        job.join()
    else:
        job.train()
        for node in range(3):
            job.feed(r.Finished(0, node))
    _away(job, 0, 1, 2)
    for node in range(3):
        _back(job, node)
    job.wait(100)
    if phase == "starting":
        assert job.core.phase is Phase.STARTING and job.core.epoch == 0
        return
    assert len(job.told(r.AllFinished)) == 2
    for rank in range(6):
        job.feed(r.WorkerExited(rank // 2, rank % 2, rank, 10, 0))
    assert job.end[0] == Exit.OK
