"""What has failed is kept with the machine, and who failed before is the last to be taken again: the pure Core."""

from __future__ import annotations

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.members import LEMON_S, FailureRecord
from simulated import SimulatedJob


def named(spares: int = 1) -> SimulatedJob:
    """A job of four nodes and more, each on a machine of its own."""
    return SimulatedJob(nodes=3 + spares, spares=spares, slots=1).train("machine{}")


def comes(job: SimulatedJob, name: str) -> int:
    """A machine joins as a spare."""
    error, node, actions = job.core.add_spare("", job.now)
    assert not error
    job.take(actions)
    job.join([node], name)
    job.park([node])
    return node


def kinds(job: SimulatedJob, node: int) -> list[str]:
    return [each.kind for each in job.core.nodes[node].record.failures]


def test_a_machine_that_comes_back_brings_its_record_and_another_one_does_not() -> None:
    job = named()
    job.now = 500.0
    job.lose(1, "its agent is gone or silent")
    job.recover()
    other, back = comes(job, "machine9"), comes(job, "machine1")
    assert not kinds(job, other) and job.core.nodes[other].was is None
    (failure,) = job.core.nodes[back].record.failures
    assert (failure.when, failure.kind, failure.cause) == (500.0, "lost", "its agent is gone or silent")
    assert job.core.nodes[back].was == 1
    assert "machine of node 1, a lemon: it failed 1 times" in job.events("joined")[-1]["message"]
    assert "message" not in job.events("joined")[-2]


def test_a_name_that_several_nodes_have_tells_nobody_apart() -> None:
    """All nodes of `deadpool launch` are on one machine."""
    job = SimulatedJob(nodes=4, spares=1, slots=1).train("here")
    job.lose(1)
    job.recover()
    assert not kinds(job, comes(job, "here"))


def test_a_name_that_several_nodes_had_at_once_tells_nobody_apart_when_they_are_gone_either() -> None:
    job = named()
    for node in [comes(job, "here") for _ in range(2)]:
        job.lose(node)
    another = comes(job, "here")
    assert not kinds(job, another) and job.core.nodes[another].was is None


def test_a_record_goes_on_from_number_to_number_and_to_the_next_coordinator() -> None:
    job = named(spares=2)
    job.feed(r.WorkerExited(1, 0, 1, 77, -9, 0))
    job.recover()
    job.park([1])
    job.lose(1, "silent")
    back = comes(job, "machine1")
    job.lose(back, "silent again")
    again = comes(job, "machine1")
    assert kinds(job, again) == ["worker", "lost", "lost"]
    core = Core(job.core.job)
    core.restored(job.core.dump(), job.now)
    assert core.nodes[again].record.failures == job.core.nodes[again].record.failures
    assert core.members.failures(again) == 3


def test_times_are_those_of_the_calendar() -> None:
    job = named()
    job.core = Core(job.core.job, since_1970=1e9)
    job.join()
    job.lose(3)
    assert job.core.nodes[3].record.failures[0].when == 1e9 + job.now


@pytest.mark.parametrize("late", [0.0, LEMON_S + 1.0])
def test_a_lemon_is_taken_only_while_no_other_spare_is_there(late: float) -> None:
    job = named(spares=3)
    for local in range(2):
        job.feed(r.WorkerExited(3, 0, None, 70 + local, -9))
        job.feed(r.WorkerReady(3, 0, 80 + local))
    job.now += late
    job.lose(1)
    assert job.active == ([0, 4, 2] if not late else [0, 3, 2])
    job.recover()
    job.lose(2)
    assert job.active == ([0, 4, 5] if not late else [0, 3, 4])
    job.recover()
    job.lose(0)
    assert set(job.active) == {3, 4, 5}, "better than none"


def test_a_lemon_is_passed_over_for_one_that_still_starts_but_a_node_that_is_only_moved_waits_for_nobody() -> None:
    for lost in (True, False):
        job = named(spares=2)
        job.feed(r.WorkerExited(3, 0, None, 70, -9))
        job.feed(r.WorkerReady(3, 0, 80))
        job.core.nodes[4].parked.clear()
        job.commit(3)
        if lost:
            job.lose(1)
        else:
            job.take(job.core.drain(1, job.now)[1])
            for node in (0, 1, 2):
                job.feed(r.NodeHeld(0, node, 3, False))
        assert job.active == [0, 4 if lost else 3, 2]


def test_of_two_lemons_the_one_that_failed_less_is_taken() -> None:
    job = named(spares=2)
    for node, times in ((3, 3), (4, 1)):
        for pid in range(times):
            job.feed(r.WorkerExited(node, 0, None, 70 + pid, -9))
            job.feed(r.WorkerReady(node, 0, 80 + pid))
    job.lose(1)
    assert job.active == [0, 4, 2]


def test_workers_that_end_in_one_epoch_are_one_failure_and_a_record_has_an_end() -> None:
    record = FailureRecord()
    for rank in range(8):
        record.add(1.0, "worker", f"rank {rank} ended", 4)
    assert len(record.failures) == 1 and record.deaths(2.0) == 1
    for epoch in range(5, 100):
        record.add(float(epoch), "worker", "ended\nand more", epoch)
    assert len(record.failures) == 32 and record.failures[-1].cause == "ended"
    assert record.deaths(99.0 + 24 * 3600.0 - 0.5) == 1
