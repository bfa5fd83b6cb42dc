"""Workers that are replaced by who stands by on their own node: how many epochs that takes, and what it spends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.standbys import CALM_S
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import Worker
from deadpool_megatron.cluster.coordinator.validate import misfit
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.config import DeadpoolConfig
from simulated import SimulatedJob
from waiting import until

# ---- the coordinator


def _job(spares: int = 1) -> SimulatedJob:
    job = SimulatedJob(nodes=4 + spares, spares=spares).train()
    job.commit(0)
    job.iterate(0)
    return job


def _dies(job: SimulatedJob, node: int, local: int, stands_by: bool = True, epoch: int = 0, pid: int = 0) -> None:
    rank = 2 * node + local
    job.feed(r.WorkerExited(node, local, rank, pid or 10 * node + local, -9, epoch, stands_by=stands_by))


def _offer(job: SimulatedJob, node: int) -> None:
    job.feed(r.Offer(job.core.epoch, node, {2 * node: 1, 2 * node + 1: 1}, {}, {}))


def test_a_worker_for_which_another_process_stands_by_spends_no_spare() -> None:
    job = _job()
    _dies(job, 1, 0)
    assert job.active == [0, 1, 2, 3] and job.core.epoch == 1
    assert job.told(r.Declare)[-1].replaced == [2]
    assert job.events("detected")[-1]["stood_by"]
    job = _job()
    _dies(job, 1, 0, stands_by=False)
    assert job.active == [0, 4, 2, 3] and "stood_by" not in job.events("detected")[-1]


def test_workers_that_end_at_once_are_one_epoch_and_one_death_of_each_node_whoever_tells_first() -> None:
    job = _job()
    job.feed(r.Standbys(1, {0: 7, 1: 8}))
    for node, local, epoch in ((1, 0, 0), (0, 0, 0), (1, 1, 1), (2, 0, 0), (0, 1, 1), (3, 1, 0)):
        _dies(job, node, local, epoch=epoch)
    assert job.core.epoch == 1 and len(job.events("declared")) == 1 and job.active == [0, 1, 2, 3]
    assert [job.core.nodes[n].record.deaths(job.now) for n in range(4)] == [1, 1, 1, 1]
    assert job.core._recoveries.vacant == {(1, 0), (0, 0), (1, 1), (2, 0), (0, 1), (3, 1)}
    job.recover()
    assert job.core.recovery is None and len(job.events("resumed")) == 1


def test_who_ends_after_its_node_has_offered_its_live_state_is_another_epoch() -> None:
    job = _job()
    _dies(job, 1, 0)
    _offer(job, 2)
    _dies(job, 2, 0, epoch=1)
    assert job.core.epoch == 2 and job.told(r.Declare)[-1].replaced == [2, 4] and job.active == [0, 1, 2, 3]


def test_one_of_those_that_end_at_once_for_which_nobody_stands_by_has_its_node_replaced() -> None:
    for first in (True, False):
        job = _job()
        _dies(job, 1, 0, stands_by=first)
        _dies(job, 1, 1, stands_by=not first)
        assert job.active == [0, 4, 2, 3] and job.core.nodes[1].role == "spare", first


def test_who_took_the_place_and_ends_too_has_the_node_replaced_where_nobody_stands_by_any_more() -> None:
    job = _job()
    _dies(job, 1, 0)
    _offer(job, 1)
    job.feed(r.WorkerExited(1, 0, 2, 99, -9, 1))
    assert job.active == [0, 4, 2, 3] and job.core.epoch == 2


def test_a_node_whose_workers_die_four_times_is_replaced_although_others_stand_by() -> None:
    job = _job()
    for time in range(4):
        _dies(job, 1, 0, epoch=job.core.epoch, pid=1000 + time)
        assert (job.core.nodes[1].role == "lost") is (time == 3)
        job.recover(5 + time)
        job.iterate(10 + time)


def test_one_that_hung_in_a_recovery_and_was_ended_is_replaced_in_the_same_epoch() -> None:
    job = _job(spares=0)
    job.take(job.core.inject(r.Fault("abort", -1, 0, None, 1, "", 0.0), job.now)[1])
    for node in (0, 2, 3):
        _offer(job, node)
    due = job.core.next_deadline()
    assert due is not None
    job.wait(due - job.now)
    assert job.told(r.KeepStacks)[-1] == r.KeepStacks(1, True)
    _dies(job, 1, 0, epoch=1)
    assert job.core.epoch == 1 and job.core.nodes[1].record.deaths(job.now) == 0
    assert "hung in a recovery" in job.events("detected")[-1]["cause"]
    _offer(job, 1)
    assert job.events("agreed")


def test_the_next_coordinator_knows_who_is_replaced_by_whom_stands_by() -> None:
    job = _job()
    _dies(job, 1, 0)
    _dies(job, 2, 0)
    core = Core(job.core.job)
    core.restored(job.core.dump(), job.now)
    assert core._recoveries.in_place == core._recoveries.vacant == {(1, 0), (2, 0)}


def test_who_stands_by_is_told_of_and_what_cannot_be_is_refused() -> None:
    job = _job()
    job.feed(r.Standbys(1, {0: 7}, "the process that stood by for local worker 1 has ended"))
    assert job.events("standbys")[-1]["locals"] == [0] and job.core.nodes[1].standbys == {0: 7}
    job.lose(1)
    assert job.core.nodes[1].standbys == {}
    assert misfit(r.Standbys(1, {-1: 7}), 8, 0) == "Standbys of local worker -1"
    assert not misfit(r.Standbys(1, {1: 7}), 8, 0)


# ---- the processes of a node


class _Node:
    """Node 0 of a job of two with two slots each, with real processes that do nothing."""

    def __init__(self, directory: Path, level: str) -> None:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        at = "127.0.0.1"
        settings = AgentSettings(
            DeadpoolConfig(standby_workers=level), "j", 0, 2, 2, at, f"{at}:1", bytes(32), str(directory), command,
            dict(os.environ),
        )  # fmt: skip
        self.job = KnownJob(0, 2, 2, Scheme.parse("1"))
        self.crew = Crew(self.job, WorkerProcesses(settings, self.job, zmq.Poller(), lambda: False), 0, level)
        self.crew.start(2)
        self.now = 0.0

    def look(self, seconds: float = CALM_S) -> list[Worker]:
        """Time passes while its workers train; those that stand by, ready or not."""
        self.crew.standbys.look(self.crew.workers.values(), True, self.now)
        self.now += seconds
        self.crew.standbys.look(self.crew.workers.values(), True, self.now)
        return [each for each in self.crew.beside if each.standby and not each.retired]

    def all_ready(self) -> list[Worker]:
        """One for each slot."""
        for _ in range(2):
            for each in self.look():
                each.parked = True
        return self.look()

    def ends(self, worker: Worker) -> None:
        """By a signal."""
        self.crew._processes.kill(worker)
        until(lambda: worker.process.poll() is not None)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., _Node]]:
    made: list[_Node] = []

    def make(level: str = "device") -> _Node:
        made.append(_Node(tmp_path, level))
        return made[-1]

    yield make
    for each in made:
        each.crew.end(at_once=True, told=False)


def test_each_slot_gets_one_to_stand_by_one_after_the_other_and_not_before_training_is_calm(
    node: Callable[..., _Node],
) -> None:
    here = node()
    assert here.look(CALM_S / 2) == []
    here.crew.standbys.look(here.crew.workers.values(), False, here.now)  # a recovery
    assert here.look(CALM_S / 2) == []
    (first,) = here.look()
    assert here.look() == [first] and here.crew.standbys.pids() == {}
    first.parked = True
    assert here.crew.standbys.pids() == {0: first.pid}
    first, second = here.look()
    second.parked = True
    assert here.crew.standbys.pids() == {0: first.pid, 1: second.pid} and len(here.look()) == 2


def test_who_stands_by_takes_the_slot_and_the_next_one_is_started_when_all_is_calm(node: Callable[..., _Node]) -> None:
    here = node()
    first, _ = here.all_ready()
    old = here.crew.workers[0]
    here.ends(old)
    here.crew.reap(old)
    here.job.declare(r.Declare(1, "resume", "", [], [0], here.job._tables.assignment, {}, [], [], [], None))
    here.crew.renew(0)
    assert here.crew.workers[0] is first and here.crew.give_coordinates() == [first] and first.rank == 0
    assert here.crew.standbys.pids().keys() == {1}
    assert [each.local for each in here.look()] == [1, 0]


def test_one_that_ends_is_replaced_and_after_three_in_a_row_not_for_an_hour(node: Callable[..., _Node]) -> None:
    here = node()
    for time in range(3):
        (each,) = here.look()
        here.ends(each)
        here.crew.left(each)
        told = here.crew.standbys.left(each, "it ended with -9")
        assert ("another one is started" in told) is (time < 2), told
    assert "none is started for an hour after 3 in a row" in told
    (other,) = here.look()
    assert other.local == 1
    other.parked = True
    here.now += 3600.0
    assert [each.local for each in here.look()] == [1, 0]


def test_without_the_flag_nobody_stands_by(node: Callable[..., _Node]) -> None:
    assert node("none").look() == []


def test_one_that_could_not_set_up_its_coordinate_waits_without_it_the_next_time(node: Callable[..., _Node]) -> None:
    here = node("coordinate")
    (first,) = here.look()
    assert first.rehearses == 0
    first.parked = True
    assert here.crew.standbys.pids() == {0: first.pid} and here.crew.rehearsed() == []
    here.ends(first)
    here.crew.left(first)
    here.crew.standbys.left(first, "out of memory")
    (second,) = here.look()
    assert (second.local, second.rehearses) == (0, None)


def test_they_end_with_the_coordinates_of_their_node_and_where_the_start_begins_anew(
    node: Callable[..., _Node],
) -> None:
    for end in (Crew.end_standbys, Crew.start_over):
        here = node()
        standing = here.all_ready()
        end(here.crew)
        assert all(each.retired for each in standing) and here.crew.standbys.pids() == {}
