"""What one node knows of the job follows what it is told, and it tells of a generation once all its ranks have it."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.agent import Agent
from deadpool_megatron.cluster.agent.commits import Commits
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.recovery import NodeRecovery
from deadpool_megatron.cluster.agent.shards import RankCommitted
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.vault import constants_of

VAULTS = {node: r.Address("host", 9000 + node) for node in range(3)}
MOVED = [r.SlotAddress(0, 0), r.SlotAddress(0, 1), r.SlotAddress(2, 0), r.SlotAddress(2, 1)]


@pytest.fixture
def job() -> KnownJob:
    """Node 0 of two active ones with two slots each; node 2 is the spare."""
    job = KnownJob(0, 2, 2, Scheme.parse("1"))
    job.roster(r.Roster(0, [], VAULTS, 1))
    return job


def _declare(epoch: int = 1) -> r.Declare:
    return r.Declare(epoch, "resume", "test", [1], [1], MOVED, VAULTS, [[0, 2]], [8] * 4, [4] * 4, None, 3)


def test_a_first_roster_leaves_the_first_assignment_and_a_later_one_brings_its_own(job: KnownJob) -> None:
    assert (job.epoch, job.ranks, job.targets()) == (0, {0: 0, 1: 1}, None)
    spare = KnownJob(2, 2, 2, Scheme.parse("1"))
    assert spare.ranks == {}
    assert spare.roster(r.Roster(4, MOVED, VAULTS, 7))
    assert (spare.epoch, spare.ranks, spare.vaults) == (4, {0: 2, 1: 3}, VAULTS)


def test_who_has_left_without_an_epoch_is_not_counted_any_more(job: KnownJob) -> None:
    job.departed(r.Departed([1, 7]))
    assert job.vaults == {0: VAULTS[0], 2: VAULTS[2]}
    job.declare(_declare())
    assert job.vaults == VAULTS


def test_an_epoch_moves_coordinates_and_what_is_kept_for_whom(job: KnownJob) -> None:
    job.place(r.Placement(0, [[0, 1]], [8] * 4, [4] * 4, 2))
    before = job.targets()
    assert before is not None and {t.port for each in before.values() for t in each} == {9001}
    job.declare(_declare())
    after = job.targets()
    assert after is not None and {t.port for each in after.values() for t in each} == {9002}
    assert job.kept_for_others() == ({2: (8, 4), 3: (8, 4)}, {}, {constants_of(2), constants_of(3)})
    assert job.declared is not None and job.declared.epoch == 1 and job.declared.assignment == []


def test_a_change_is_understood_by_who_holds_what_it_was_made_from(job: KnownJob) -> None:
    job.place(r.Placement(0, [[0, 1]], [8] * 4, [4] * 4, 2))
    moved, groups = {2: MOVED[2], 3: MOVED[3]}, {0: [0, 2]}
    change = r.Changed(1, "resume", "test", [1], [1], 2, 3, moved, {}, [], groups)
    assert job.whole(change) == _declare()
    assert job.whole(r.Changed(1, "resume", "test", [1], [1], 5, 3, moved, {}, [], groups)) is None


def test_a_generation_is_told_once_when_all_ranks_have_it(job: KnownJob) -> None:
    commits = Commits(job)
    assert commits.committed(0, 5) is None
    assert commits.committed(0, 6) is None
    assert commits.committed(1, 5) == commits.last == r.Committed(0, 0, 5)
    assert commits.committed(1, 6) == commits.last == r.Committed(0, 0, 6)


def test_what_ranks_had_of_an_older_epoch_does_not_count_in_the_next(job: KnownJob) -> None:
    commits = Commits(job)
    commits.committed(0, 5)
    job.declare(_declare())
    commits.restart()
    assert commits.committed(1, 5) is None
    assert commits.committed(0, 5) == r.Committed(1, 0, 5)


def test_a_node_is_redundant_again_once_all_its_ranks_have_the_agreed_generation_everywhere(
    job: KnownJob,
) -> None:
    commits = Commits(job)
    job.declare(_declare())
    commits.restart()
    assert commits.covered(0, 5) is None  # nothing is agreed
    commits.agreed(r.Agree(1, 5, {}, {}))
    assert [commits.covered(rank, 5) for rank in (0, 0)] == [None, None]
    assert commits.covered(1, 6) is None
    assert commits.covered(1, 5) == r.Covered(1, 0, 5)
    assert commits.covered(1, 5) is None, "told once"


def test_a_rank_has_committed_nothing_before_its_constants_are_at_their_keepers(job: KnownJob) -> None:
    commits = Commits(job)
    commits.has_constants(constants_of(1))
    of_0, of_1, again = RankCommitted(0, 0, 5), RankCommitted(1, 0, 5), RankCommitted(1, 0, 6)
    assert commits.due(of_0) == [of_0] and commits.due(of_1) == commits.due(again) == []
    there = RankCommitted(constants_of(1), 0, 0)
    assert commits.due(there) == [of_1, again] and commits.due(there) == []
    assert commits.due(of_1) == [of_1]
    commits.restart()
    assert commits.due(of_1) == [], "in a new epoch they may belong elsewhere"


def test_a_rank_that_has_become_one_without_constants_waits_for_none() -> None:
    """Else it would never commit again: of how many replicas a job has follows which stage a rank is."""
    agent, told = _agent({})
    agent.from_worker(MagicMock(retired=False), r.ArenaRequest(constants_of(1), 8, 8))
    slots = [r.SlotAddress(0, 0), r.SlotAddress(0, 1)]
    agent.from_coordinator(r.Roster(3, slots, VAULTS, 1, anew=True))
    told.clear()
    for rank in (0, 1):
        agent.happened(RankCommitted(rank, 3, 5))
    assert told == [r.Committed(3, 0, 5)]


def test_ranks_that_can_have_no_generation_in_common_any_more_are_told_of_once(job: KnownJob) -> None:
    commits = Commits(job)
    commits.committed(0, 5)
    assert commits.committed(1, 5) == r.Committed(0, 0, 5)
    assert commits.committed(0, 6) is None, "the other one may still come to it"
    assert commits.committed(1, 7) == commits.last == r.Committed(0, 0, 7, apart=True)
    assert commits.committed(0, 7) is None, "told once"
    assert commits.committed(0, 8) is None
    assert commits.committed(1, 8) == r.Committed(0, 0, 8), "the job may take the very next one"


def test_ranks_that_wait_with_what_is_below_the_floor_are_not_apart_for_it(job: KnownJob) -> None:
    commits = Commits(job)
    commits.committed(0, 4)
    commits.committed_to(r.CommittedTo(0, (0, 3), 6))
    assert commits.committed(1, 6) is None, "the other one has 6 as well, soon"
    assert commits.committed(0, 6) == r.Committed(0, 0, 6)


def test_what_may_be_overwritten_by_now_is_not_told_again(job: KnownJob) -> None:
    commits = Commits(job)
    commits.committed(0, 5)
    told = commits.committed(1, 5)
    assert commits.last == told
    commits.committed_to(r.CommittedTo(0, (0, 5), 5))
    commits.committed_to(r.CommittedTo(0, None, 8))
    assert commits.last == told, "what is kept stays"
    commits.committed_to(r.CommittedTo(0, (0, 9), 9))
    assert commits.last is None


def test_a_spare_that_is_asked_again_says_again_what_it_has() -> None:
    """The first answer went over a connection that had ended: it would be waited for in vain, and count as lost."""
    spare = KnownJob(3, 2, 2, Scheme.parse("1"))
    told: list[r.AgentRecord] = []
    crew, shards = MagicMock(workers={}), MagicMock()
    crew.mine.return_value, crew.renewing.return_value, shards.holdings.return_value = {}, False, ({}, {}, {})
    recovery = NodeRecovery(spare, crew, shards, MagicMock(), MagicMock(), told.append)
    recovery.declare(_declare())
    recovery.asked_again()
    assert told == [r.Offer(1, 3, {}, {}, {}, {})] * 2


def _agent(workers: dict[int, Any]) -> tuple[Agent, list[r.AgentRecord]]:
    """Of node 0, and what the coordinator hears of it."""
    told: list[r.AgentRecord] = []
    settings = MagicMock(node=0, active_nodes=2, durable_dir="", adopt="", host="host")
    settings.config.hang_floor, settings.config.lease = 0, 5.0
    crew, shards = MagicMock(workers=workers, beside=[]), MagicMock()
    crew.rehearsed.return_value = []
    crew.unrehearsed = {}
    crew.mine.return_value, shards.server.port = {}, 1
    job = KnownJob(0, 2, 2, Scheme.parse("1"))
    agent = Agent(
        settings, job, crew, MagicMock(), shards, MagicMock(), MagicMock(),
        lambda packet: told.append(r.decode_from_agent(packet)),
    )  # fmt: skip
    return agent, told


def test_what_was_done_once_is_told_again_to_a_coordinator_that_may_have_started_again() -> None:
    """One that is gone took what it had heard with it: after the next loss a line would be printed twice."""
    agent, told = _agent({})
    for iteration in (4, 5):
        agent.from_worker(MagicMock(retired=False), r.SideEffect(0, 3, 0, iteration, "log"))
    told.clear()
    agent.introduce()
    assert [each for each in told if isinstance(each, r.SideEffect)] == [r.SideEffect(0, 3, 0, 5, "log")]


def test_where_no_processes_stand_by_nobody_looks_for_them() -> None:
    agent, told = _agent({})
    for asked in (True, False):
        agent._crew.standbys = MagicMock(asked=asked)
        agent._crew.standbys.pids.return_value = {0: 7}
        agent.look(connected=True)
        assert agent._crew.standbys.pids.called is asked
    assert told == [r.Standbys(0, {0: 7})]


def test_what_a_spare_could_not_rehearse_is_told_again() -> None:
    agent, told = _agent({})
    agent._crew.unrehearsed = {3: "out of memory"}  # type: ignore[misc]
    agent.introduce()
    assert [each for each in told if isinstance(each, r.Rehearsed)] == [r.Rehearsed(0, [], "", {3: "out of memory"})]


def test_that_a_node_is_redundant_again_is_told_again_in_its_epoch() -> None:
    """Else the job counts it as lost, in what it says may be lost, until the next recovery."""
    agent, told = _agent({})
    agent._job.ranks = {0: 0}
    agent._commits.agreed(r.Agree(0, 5, {}, {}))
    agent.happened(RankCommitted(0, 0, 5))
    told.clear()
    agent.introduce()
    assert [each for each in told if isinstance(each, r.Covered)] == [r.Covered(0, 0, 5)]
    agent._job.epoch, told[:] = 1, []
    agent.introduce()
    assert not [each for each in told if isinstance(each, r.Covered)]


def test_the_error_of_a_worker_that_has_not_ended_yet_is_told_again() -> None:
    """Without it nobody knows that a lost peer may have caused its end, which ends the job while it starts."""
    worker = MagicMock(local=0, rank=0, pid=7, parked=False, exited=False, retired=False, registered=None, broken=None)
    agent, told = _agent({0: worker})
    agent.from_worker(worker, r.WorkerFailed(0, 0, 0, "setup", 0, -1, 0, "k", "p", "reset by peer", "", True))
    agent.introduce()
    assert told[0] == told[-1] == worker.failed and len(told) == 3


def test_a_spares_worker_that_knows_its_device_later_is_parked_once() -> None:
    """Megatron-Bridge's: its device comes up with the environment of the job."""
    worker = MagicMock(local=0, rank=None, pid=7, parked=False, retired=False, numa=-1)
    agent, told = _agent({0: worker})
    for numa in (-1, 1):
        agent.from_worker(worker, r.WorkerStep("parked", 0, numa=numa))
    assert [type(each) for each in told].count(r.WorkerReady) == 1 and worker.parked and worker.numa == 1


def test_a_worker_that_is_being_ended_has_no_say_any_more() -> None:
    """It may have registered with the groups of another number of replicas just before its end was ordered."""
    worker = MagicMock(local=0, rank=0, pid=7, parked=False, retired=True, registered=None)
    agent, told = _agent({0: worker})
    coordinate = r.CoordinateInfo(0, 0, 0, 0)
    agent.from_worker(worker, r.Registered(0, 0, coordinate, 64, 16, "groups of 3", False))
    agent.from_worker(worker, r.WorkerFailed(0, 0, 0, "setup", 0, -1, 2, "k", "p", "not of this job", "", False))
    assert not told


def test_a_new_start_tells_again_who_is_parked_on_a_node_that_had_coordinates_for_a_while() -> None:
    told: list[r.AgentRecord] = []
    crew = MagicMock()
    crew.idle.return_value = [MagicMock(local=0, pid=70)]
    NodeRecovery(KnownJob(3, 2, 1, Scheme.parse("1")), crew, *[MagicMock()] * 3, told.append).start_over()
    assert told == [r.WorkerReady(3, 0, 70)]
