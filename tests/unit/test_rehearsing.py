"""Who rehearses which coordinate, who takes over, and who makes room; data sets that are built ahead of time."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import zmq

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.crew import Crew
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.standbys import CALM_S
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import EMULATE, Worker
from deadpool_megatron.cluster.coordinator.validate import misfit
from deadpool_megatron.cluster.placement.domains import parse_domains
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.config import DeadpoolConfig
from emulated import emulated_process, in_emulation  # noqa: F401
from simulated import SimulatedJob
from waiting import until

# ---- which


def _roles(active: int, spares: int, slots: int, count: int) -> list[list[int]]:
    """By spare, the coordinates of its slots."""
    jobs = [KnownJob(active + spare, active, slots, Scheme.parse("1")) for spare in range(spares)]
    return [[rank for local in range(slots) for rank in job.in_turn(local, count)] for job in jobs]


def test_spares_rehearse_one_node_after_the_other_and_as_many_as_they_are_asked_to() -> None:
    assert _roles(4, 2, 2, 1) == [[0, 1], [2, 3]]
    assert _roles(4, 2, 2, 2) == [[0, 2, 1, 3], [4, 6, 5, 7]]
    assert _roles(2, 3, 1, 1) == [[0], [1], [0]]
    assert _roles(2, 1, 1, 5) == [[0, 1]]
    assert _roles(4, 2, 2, 0) == [[], []]


def _planned(job: SimulatedJob) -> dict[int, list[int]]:
    """By spare, the coordinates it is to rehearse."""
    return {node: sorted(state.rehearses) for node, state in job.core.nodes.items() if state.rehearses}


def _staged(domains: str = "", nvlink: str = "", tp: int = 1, **more: Any) -> SimulatedJob:
    """Four nodes of one rank each in two stages train, three are spares, which rehearse one each."""
    labels = parse_domains(domains, 7, nvlink)
    job = SimulatedJob(nodes=7, spares=3, slots=1, domains=labels, rehearsals=1, **more)
    job.join()
    job.park()
    for rank in range(4):
        info = r.CoordinateInfo(rank, rank % tp, rank // 2, rank // tp)
        job.feed(r.Registered(rank, 0, info, 1 << 20, 1 << 10, "groups", True, 0, 0, True, False))
    job._groups = job.core.protection.groups
    job.wait(0.0)
    return job


def test_rehearsals_are_spread_over_the_pipeline_stages_and_only_who_is_to_do_another_one_is_told() -> None:
    job = _staged()
    assert _planned(job) == {4: [0], 5: [2], 6: [1]}
    assert _told(job) == [(5, r.Rehearse({0: [2]})), (6, r.Rehearse({0: [1]}))]


def test_a_spare_rehearses_what_it_would_be_taken_for() -> None:
    """By rack; by NVLink domain where a group spans one, even if another spare does the same."""
    assert _planned(_staged("0-1=r1,2-3=r2,4=r2,5=r1,6=r2")) == {4: [2], 5: [1], 6: [3]}
    assert _planned(_staged(nvlink="0-1=n1,2-3=n2,4-6=n2", tp=2)) == {4: [2], 5: [3], 6: [2]}


def test_in_whatever_order_spares_are_parked_each_goes_on_with_what_it_has_begun_where_that_is_as_good() -> None:
    job = SimulatedJob(nodes=5, spares=3, rehearsals=1)
    job.join()
    for rank in range(4):
        job.register(rank)
    for spare in (4, 3, 2):
        job.park([spare])
        job.wait(0.0)
    assert _planned(job) == {2: [0, 1], 3: [2, 3], 4: [0, 1]} and not _told(job)


def test_what_a_spare_knows_it_keeps_and_the_next_one_takes_what_nobody_knows() -> None:
    job = _staged()
    for node, rank in ((4, 0), (5, 2), (6, 1)):
        job.feed(r.Rehearsed(node, [rank]))
    job.lose(2)
    assert job.core.assignment[2].node == 5
    job.recover()
    job.wait(0.0)
    assert _planned(job) == {4: [0], 6: [1]} and len(_told(job)) == 2
    error, node, actions = job.core.add_spare("h", job.now)
    job.take(actions)
    job.join([node])
    job.park([node])
    job.wait(0.0)
    assert not error and _planned(job) == {4: [0], 6: [1], node: [3]} and len(_told(job)) == 2, "it has begun with 3"
    job.feed(r.WorkerExited(4, 0, None, 40, -9))
    job.feed(r.WorkerReady(4, 0, 41))
    job.wait(0.0)
    assert _planned(job) == {4: [0], 6: [1], node: [3]} and len(_told(job)) == 2


def test_a_spare_that_connects_again_is_told_again_and_the_next_coordinator_knows_what_they_do() -> None:
    job = _staged()
    job.join([5])
    job.wait(0.0)
    assert [node for node, _ in _told(job)] == [5, 6, 5]
    kept = job.core.dump()
    after = SimulatedJob(nodes=7, spares=3, slots=1, rehearsals=1)
    after.take(after.core.restored(kept, after.now))
    assert _planned(after) == _planned(job)


def test_the_spare_of_a_planned_move_is_left_alone_meanwhile() -> None:
    job = _staged()
    job.iterate(0)
    _drain(job, 3)
    assert _told(job)[-1] == (4, r.Rehearse({0: [3]}))
    count = len(_told(job))
    job.feed(r.WorkerReady(6, 0, 61))
    job.wait(0.0)
    assert len(_told(job)) == count and _planned(job)[4] == [3]


# ---- the coordinator's choice


def test_the_spare_that_has_rehearsed_a_lost_node_takes_it_over() -> None:
    job = SimulatedJob(nodes=6, spares=3).train()
    job.feed(r.Rehearsed(5, [2, 3]))
    job.feed(r.Rehearsed(4, [4]))  # half of node 2: as good as nothing
    assert [(e["node"], e["ranks"]) for e in job.events("rehearsed")] == [(5, [2, 3]), (4, [4])]
    job.lose(1)
    assert job.active == [0, 5, 2]
    job.recover()
    job.lose(2)
    assert job.active == [0, 5, 3], "the lowest of those that have not"


def test_a_rehearsal_that_is_over_counts_no_more() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.feed(r.Rehearsed(4, [2, 3]))
    job.feed(r.Rehearsed(4, [3], "rank 2 is rehearsed no more"))
    job.lose(1)
    assert job.active == [0, 3, 2]


def test_why_a_rehearsal_has_failed_is_known_until_the_spare_is_asked_again_or_takes_over() -> None:
    job = _staged()
    why = "it ended with 1; see spare.log"
    for drain in (True, False):
        job.feed(r.Rehearsed(4, [], f"rank 0 is rehearsed no more: {why}", {0: why}))
        assert job.core.nodes[4].unrehearsed == {0: why}
        if drain:
            job.iterate(0)
            _drain(job, 3)
        else:
            job.lose(5)
            job.lose(6)
            job.lose(0)
            assert job.active[0] == 4
        assert not job.core.nodes[4].unrehearsed


def test_a_rehearsal_of_a_rank_that_the_job_has_not_is_refused() -> None:
    assert misfit(r.Rehearsed(4, [0, 8]), 8, 0) == "Rehearsed of rank 8, and the job has ranks 0 to 7"
    assert not misfit(r.Rehearsed(4, [0, 7]), 8, 0)
    assert misfit(r.Rehearsed(4, [0], "", {-1: ""}), 8, 0) == "Rehearsed of rank -1, and the job has ranks 0 to 7"


# ---- a planned move


def _drain(job: SimulatedJob, node: int) -> None:
    error, actions = job.core.drain(node, job.now)
    assert not error
    job.take(actions)


def _told(job: SimulatedJob) -> list[tuple[int | None, r.Rehearse]]:
    return [(s.node, s.record) for s in job.sent if isinstance(s.record, r.Rehearse)]


def test_a_node_is_drained_once_a_spare_has_rehearsed_what_it_does() -> None:
    job = SimulatedJob(nodes=6, spares=2, rehearsals=1).train()
    job.iterate(0)
    _drain(job, 1)
    assert _told(job) == [(4, r.Rehearse({0: [2], 1: [3]}))]
    job.feed(r.Rehearsed(4, [2]))
    job.wait(0.0)
    assert not job.told(r.Hold) and not job.events("leaving"), "training goes on meanwhile"
    job.feed(r.Rehearsed(4, [2, 3]))
    job.wait(0.0)
    assert len(job.told(r.Hold)) == 1
    for node in range(4):
        job.feed(r.NodeHeld(0, node, job.told(r.Hold)[0].iteration, False))
    assert job.active == [0, 4, 2, 3]


def test_the_spare_that_takes_the_node_rehearses_it() -> None:
    """By failure domain node 5 does; node 4 has the lower number."""
    racks = {node: {"rack": f"r{node % 2}"} for node in range(6)}
    job = SimulatedJob(nodes=6, spares=2, rehearsals=1, domains=racks).train()
    job.iterate(0)
    _drain(job, 1)
    assert [s.node for s in job.sent if isinstance(s.record, r.Rehearse)] == [5]
    job.feed(r.Rehearsed(5, [2, 3]))
    job.wait(0.0)
    for node in range(4):
        job.feed(r.NodeHeld(0, node, job.told(r.Hold)[0].iteration, False))
    assert job.active == [0, 5, 2, 3]


def test_who_is_known_to_a_spare_already_is_drained_at_once_and_so_is_everybody_without_rehearsals() -> None:
    job = SimulatedJob(nodes=6, spares=2, rehearsals=1).train()
    job.iterate(0)
    job.feed(r.Rehearsed(5, [2, 3]))
    _drain(job, 1)
    assert job.told(r.Hold) and not job.told(r.Rehearse)
    job = SimulatedJob(nodes=6, spares=2).train()
    job.iterate(0)
    _drain(job, 1)
    assert job.told(r.Hold) and not job.told(r.Rehearse)


@pytest.mark.parametrize("end", ["fails", "lost", "late", "recovery"])
def test_a_drain_goes_on_without_a_rehearsal_that_does_not_come(end: str) -> None:
    job = SimulatedJob(nodes=6, spares=2, rehearsals=1).train()
    job.iterate(0)
    _drain(job, 1)
    if end == "fails":
        job.feed(r.Rehearsed(4, [], "out of memory"))
    elif end == "lost":
        job.lose(4)
    elif end == "late":
        job.wait(job.core.job.deadlines.build - 1.0)
        assert not job.told(r.Hold)
        job.wait(2.0)
    else:
        job.lose(3)
        job.wait(1.0)
        assert not job.told(r.Hold), "not in a recovery"
        job.recover()
    job.wait(0.0)
    assert len(job.told(r.Hold)) == 1 and "node 1 is being drained" in job.core.cannot_drain(0)[0]


def test_a_node_that_is_lost_while_its_drain_waits_is_drained_no_more() -> None:
    job = SimulatedJob(nodes=6, spares=2, rehearsals=1).train()
    job.iterate(0)
    _drain(job, 1)
    job.lose(1)
    job.recover()
    job.wait(0.0)
    assert not job.told(r.Hold) and job.core.cannot_drain(0)[0] == ""


# ---- the processes of a node


class _Node:
    """A spare of one slot in a job of two nodes, with real processes that do nothing; it rehearses both ranks."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        at = "127.0.0.1"
        settings = AgentSettings(
            DeadpoolConfig(), "j", 2, 1, 2, at, f"{at}:1", bytes(32), str(directory), command, environment
        )
        self.job = KnownJob(2, 2, 1, Scheme.parse("1"))
        self.crew = Crew(self.job, WorkerProcesses(settings, self.job, zmq.Poller(), lambda: False), 2)
        self.crew.start(1)

    def park(self) -> list[Worker]:
        """Its worker is parked; those that rehearse now, by rank."""
        self.crew.workers[0].parked = True
        self.crew.rehearse()
        return list(self.crew.beside)

    def take(self, rank: int) -> list[Worker]:
        """The coordinate is this node's; who holds one now."""
        self.job.ranks = {0: rank}
        self.crew.choose()
        return self.crew.give_coordinates()

    def leave(self, worker: Worker) -> None:
        """It has ended."""
        until(lambda: worker.process.poll() is not None)
        self.crew.left(worker)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., _Node]]:
    made: list[_Node] = []

    def make(**environment: str) -> _Node:
        made.append(_Node(tmp_path, os.environ | environment))
        return made[-1]

    yield make
    for each in made:
        each.crew.end(at_once=True, told=False)


def test_who_has_rehearsed_the_coordinate_takes_the_slot_and_all_others_end(node: Callable[..., _Node]) -> None:
    spare = node()
    assert spare.crew.rehearsed() == []
    first, second = spare.park()
    parked = spare.crew.workers[0]
    assert (first.rehearses, second.rehearses) == (0, 1)
    first.parked = second.parked = True
    assert spare.crew.rehearsed() == [0, 1]
    assert spare.take(1) == [second], "at once: it has its memory"
    assert spare.crew.workers == {0: second} and spare.crew.beside == [first, parked]
    for each in (first, parked):
        spare.leave(each)
    assert spare.crew.beside == [] and second.process.poll() is None
    spare.crew.rehearse()
    assert spare.crew.beside == [], "a node that trains rehearses nothing"


def test_who_has_rehearsed_takes_the_slot_of_one_that_is_not_parked_or_has_died(node: Callable[..., _Node]) -> None:
    """At once: what has been told to one that is in the slot, another one does not hear."""
    for dies in (False, True):
        spare = node()
        first, _ = spare.park()
        first.parked, parked = True, spare.crew.workers[0]
        parked.parked = False
        if dies:
            spare.crew._processes.kill(parked)
            spare.crew.reap(parked)  # waits for its end
        assert spare.take(0) == [first] and spare.crew.workers == {0: first}
        assert (parked in spare.crew.beside) is not dies


def test_a_rehearsal_that_was_not_through_when_the_coordinate_was_given_is_over(node: Callable[..., _Node]) -> None:
    spare = node(**{EMULATE: "1"})
    first, _ = spare.park()
    parked = spare.crew.workers[0]
    parked.parked = False
    assert spare.take(0) == [] and first.retired
    first.parked = parked.parked = True
    assert spare.crew.give_coordinates() == [parked]


def test_who_has_not_rehearsed_waits_until_those_that_share_its_device_have_ended(node: Callable[..., _Node]) -> None:
    spare = node()
    first, second = spare.park()
    first.parked = True  # the one for this rank is not that far
    assert spare.take(1) == []
    spare.leave(first)
    assert spare.crew.give_coordinates() == []
    spare.leave(second)
    assert spare.crew.give_coordinates() == [spare.crew.workers[0]] and spare.crew.workers[0].rehearses is None


def test_where_there_are_no_devices_nobody_waits(node: Callable[..., _Node]) -> None:
    spare = node(**{EMULATE: "1"})
    spare.park()
    assert spare.take(1) == [spare.crew.workers[0]]


def test_a_rehearsal_that_has_ended_by_itself_is_not_begun_again(node: Callable[..., _Node]) -> None:
    spare = node()
    first, second = spare.park()
    first.process.kill()  # type: ignore[attr-defined]
    spare.leave(first)
    spare.crew.rehearse()
    assert spare.crew.beside == [second]
    assert spare.crew.unrehearsed == {0: f"it ended with -9; see {first.log}"}
    spare.crew.rehearse({0: [0, 1]})
    assert not spare.crew.unrehearsed, "it was asked to"


def test_a_slot_that_is_asked_for_another_coordinate_rehearses_that_once_there_is_room(
    node: Callable[..., _Node],
) -> None:
    spare = node()
    first, second = spare.park()
    first.parked = second.parked = True
    spare.crew.rehearse({0: [1]})
    assert spare.crew.rehearsed() == [1] and first.retired and spare.crew.beside == [first, second]
    second.parked = False
    spare.crew.rehearse({0: [0]})
    for each in (first, second):
        assert spare.crew.rehearsed() == []
        spare.leave(each)
        spare.crew.rehearse()
    (now,) = spare.crew.beside
    assert now.rehearses == 0 and not now.retired


def test_a_start_that_begins_anew_ends_the_rehearsals_of_a_node_that_is_in_it(node: Callable[..., _Node]) -> None:
    spare = node()
    rehearsing = spare.park()
    spare.job.ranks = {0: 1}
    spare.crew.start_over()
    assert all(each.retired for each in rehearsing)


def test_a_parked_worker_begins_a_new_start_itself_and_any_other_process_gives_way_to_a_fresh_one(
    node: Callable[..., _Node],
) -> None:
    spare = node()
    (worker,) = spare.crew.workers.values()
    worker.parked = True
    assert spare.crew.start_over() == [], "it has no coordinate in that start"
    spare.job.roster(r.Roster(4, [r.SlotAddress(2, 0)], {}, 1, anew=True, began=12.5))
    ((begins, environment),) = spare.crew.start_over()
    assert begins is worker and not worker.retired and (worker.rank, worker.parked) == (0, False)
    assert environment.items() >= {
        "RANK": "0", "WORLD_SIZE": "1", "DEADPOOL_EPOCH": "4", "DEADPOOL_BEGAN": "12.5", "GROUP_WORLD_SIZE": "1",
    }.items()  # fmt: skip
    assert spare.crew.start_over() == [] and worker.retired, "one that has begun the start before"


def test_a_warm_server_is_begun_once_the_node_is_calm_and_before_processes_that_stand_by(
    node: Callable[..., _Node],
) -> None:
    spare = node()
    asked: list[bool] = []
    spare.crew._processes.keep_warm = asked.append  # type: ignore[method-assign,assignment]
    spare.crew.standbys = MagicMock(asked=True)
    (worker,) = spare.crew.workers.values()

    def look(now: float, calm: bool = True) -> bool:
        spare.crew.look(calm, now)
        return asked.pop()

    assert not look(0.0) and not look(CALM_S), "its worker is not parked"
    worker.parked = True
    assert not look(CALM_S) and not look(3 * CALM_S), "the job does not train"
    spare.job.place(r.Placement(1, [[0, 1]], [1, 1], [1, 1]))
    assert not look(10.0) and not look(10.0 + CALM_S / 2) and look(10.0 + CALM_S)
    assert not look(20.0, calm=False) and not look(20.0), "a recovery comes between"
    assert look(20.0 + CALM_S) and not spare.crew.standbys.look.called, "it is not ready"
    spare.crew._processes.keep_warm = lambda calm: True  # type: ignore[method-assign]
    spare.crew.look(True, 30.0)
    assert spare.crew.standbys.look.called


# ---- data sets


@in_emulation
def _data_sets() -> None:
    import inspect

    import numpy as np
    import torch

    from deadpool_megatron.megatron.host import Call
    from deadpool_megatron.megatron.lm.data_sets import DataSets

    class Data(torch.utils.data.Dataset[int]):
        pass

    def call(function: Callable[..., Any], *given: Any) -> Call:
        return Call(function, inspect.signature(function).bind(*given))

    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, device="cuda").item()]

    def kept(provider: Callable[[argparse.Namespace], Any], at: int, kind: str = "single") -> bool:
        """The data sets of the rehearsal are those of a generation of iteration ``at``; else they are built anew, with
        the random numbers that there would have been without it."""
        args = argparse.Namespace(seed=7, iteration=0, dataloader_type=kind, do_train=None)
        built: list[tuple[Any, list[float]]] = []
        ours = DataSets()

        def build(given: Any) -> Any:
            built.append((given(args), draw()))
            return built[-1][0]

        def iterators(given: Any) -> Any:
            sets = ours.build(call(build, given), args)
            args.do_train = True
            return sets

        before = dict(vars(args)), type(args)
        ours.build_ahead(call(iterators, provider), args)
        assert (dict(vars(args)), type(args)) == before
        args.iteration = at
        sets = iterators(provider)
        if len(built) == 1:
            return kind != "external" and sets is built[0][0]
        assert sets is built[1][0] and built[0][1] == built[1][1]
        return False

    def fails(args: argparse.Namespace) -> Any:
        raise ValueError("no such file")

    data = Data()
    assert kept(lambda args: (data, [Data(), None], None) if args.seed == 7 else None, 5)
    assert kept(lambda args: Data() if args.iteration >= 0 else None, 0)
    assert not kept(lambda args: Data() if args.iteration >= 0 else None, 5), "it looks at the position"
    assert not kept(lambda args: Data() if vars(args)["seed"] else None, 5), "it may have looked at anything"
    assert not kept(lambda args: setattr(args, "padded", 1) or Data(), 5), "others look at what it sets"
    assert not kept(lambda args: iter([1]), 5), "what stands somewhere"
    assert not kept(lambda args: Data(), 5, "external"), "so does this, and it is not even begun"
    ours, args = DataSets(), argparse.Namespace(dataloader_type="single")
    ours.build_ahead(call(lambda provider: provider(None), fails), args)
    seen: list[list[float]] = []
    ours.build_ahead(call(lambda provider: seen.append(draw()), fails), args)
    assert seen == [draw()], "whoever has no data sets draws what there would have been without it"


def test_data_sets_built_ahead_are_taken_if_all_that_they_were_built_from_is_the_same() -> None:
    _data_sets()
