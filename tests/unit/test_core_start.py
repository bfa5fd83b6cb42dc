"""A node is lost before there is a generation to go on from, or when everything is saved."""

from __future__ import annotations

import json

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.core.effects import Action, Keep
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.records.exits import Exit
from simulated import DEADLINES, SimulatedJob


def _peer_error(job: SimulatedJob, text: str) -> None:
    """Rank 2 raises, perhaps since a peer is gone."""
    job.feed(r.WorkerFailed(1, 0, 2, "setup", 0, -1, 0, text.split(":")[0], "here:1", text, "Traceback ...", True))


# ---- losses at the start


def test_a_node_lost_at_the_start_costs_the_start_and_a_spare() -> None:
    job = SimulatedJob()
    job.join()
    job.register(0)
    job.lose(0)
    first, again = job.told(r.Roster)
    assert (first.anew, again.anew, again.epoch) == (False, True, 1)
    assert job.active == [3, 1, 2] and job.core.phase is Phase.STARTING
    assert job.events("started_over")[0]["lost"] == [0]
    for rank in range(6):
        job.register(rank)
    assert job.core.phase is Phase.RUNNING and job.told(r.Placement)[0].epoch == 1
    job.commit(0)
    assert job.core.committed == 0


def test_what_is_told_of_a_start_that_is_over_has_no_say() -> None:
    job = SimulatedJob()
    job.join()
    for rank in range(5):
        job.register(rank)
    job.lose(0)
    job.feed(r.Registered(2, 1, r.CoordinateInfo(5, 0, 0, 5), 1 << 20, 1 << 10, "groups", True, 0, 0))
    job.feed(r.WorkerExited(1, 0, 2, 11, 1, 0))
    job.wait(60)
    assert job.core.phase is Phase.STARTING and job.finish is None
    for rank in range(6):
        job.register(rank)
    assert job.core.phase is Phase.RUNNING


def test_spares_last_as_long_as_nodes_are_lost_at_the_start_and_then_the_job_can_be_queued_again() -> None:
    job = SimulatedJob(nodes=5, spares=2)
    job.join()
    job.lose(0)
    job.lose(3)
    assert job.active == [4, 1, 2] and job.core.epoch == 2
    job.lose(4)
    code, message = job.end
    assert code == Exit.NO_SPARE and "node 4 was lost before the first generation was committed" in message


def test_a_spare_whose_agent_is_still_to_come_takes_the_place_of_a_node_lost_at_the_start() -> None:
    job = SimulatedJob()
    job.join([0, 1, 2])
    job.lose(2)
    assert not job.told(r.Roster)
    job.join([3])
    (roster,) = job.told(r.Roster)
    assert roster.anew and job.active == [0, 1, 3]


def test_an_error_at_the_start_that_a_lost_peer_may_have_caused_waits_for_the_lease() -> None:
    job = SimulatedJob()
    job.join()
    _peer_error(job, "DistNetworkError: connection reset")
    job.feed(r.WorkerExited(1, 0, 2, 11, 1))
    assert job.finish is None
    job.lose(0)
    job.wait(60)
    assert job.finish is None and job.core.epoch == 1


def test_an_error_at_the_start_that_no_loss_explains_is_tried_again_and_then_ends_the_job_and_is_named() -> None:
    job = SimulatedJob(retries=2)
    job.join()
    for epoch in range(3):
        assert job.finish is None and job.core.epoch == epoch
        _peer_error(job, "DistNetworkError: no such host")
        job.feed(r.WorkerExited(1, 0, 2, 11 + epoch, 1, epoch))
        job.wait(DEADLINES.lease + 2)
    assert job.end == (1, "rank 2 on node 1: DistNetworkError: no such host")


def test_a_worker_that_a_signal_ends_at_the_start_costs_the_start_and_no_spare() -> None:
    job = SimulatedJob()
    job.join()
    job.feed(r.WorkerExited(1, 0, 2, 11, -9))
    assert job.active == [0, 1, 2] and job.told(r.Roster)[-1].anew and job.core.epoch == 1


def test_the_start_begins_anew_where_the_first_generation_is_not_committed_yet() -> None:
    job = SimulatedJob().train()
    job.lose(1)
    for node in job.active:
        job.feed(
            r.Offer(1, node, {rank: None for rank, at in enumerate(job.core.assignment) if at.node == node}, {}, {})
        )
    assert job.core.phase is Phase.STARTING and job.core.epoch == 2 and job.active == [0, 3, 2]
    assert job.told(r.Roster)[-1].anew


def test_where_another_launcher_starts_the_workers_it_has_to_start_them_again() -> None:
    job = SimulatedJob()
    for node in range(4):
        job.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [node, 10 + node], respawns=False))
    job.lose(1)
    assert job.end[0] == Exit.NO_SPARE and "another launcher" in job.end[1]


def _nobody_has_anything(job: SimulatedJob) -> list[Action]:
    """Every rank was in its first step; what the Core decides then."""
    assert job.core.recovery is not None
    epoch, actions = job.core.epoch, list[Action]()
    for node in sorted(job.core.recovery.givers):
        live = dict.fromkeys(placing.ranks_of(job.core.assignment, node).values())
        actions += job.core.received(r.Offer(epoch, node, live, {}, {}), job.now)
    return actions


def test_a_start_that_stands_still_leaves_stacks_once_and_loses_nobody() -> None:
    job = SimulatedJob()
    job.join()
    job.park()
    for rank in (0, 1, 2):
        job.register(rank)
    job.wait(1.0)
    job.wait(DEADLINES.build - 1.1)
    assert not job.events("late")
    job.wait(2 * DEADLINES.build)
    (late,) = job.events("late")
    assert (late["nodes"], late["phase"], late["ends"]) == ([1, 2], "starting", False)
    assert "nodes 1, 2 missed" in late["message"]
    assert [(s.node, s.record) for s in job.sent if isinstance(s.record, r.KeepStacks)] == [
        (1, r.KeepStacks(0, False)),
        (2, r.KeepStacks(0, False)),
    ]
    assert job.core.phase is Phase.STARTING and not [n for n, s in job.core.nodes.items() if s.gone]


def test_a_node_that_is_drained_when_the_start_begins_anew_leaves() -> None:
    """It has no coordinate any more, and no recovery ends that would let it go."""
    job = SimulatedJob().train()
    job.take(job.core.drain(1, job.now)[1])
    job.wait(DEADLINES.abort + 1.0)  # the first iteration takes long
    assert job.core.nodes[1].role == "leaving" and job.core.epoch == 1
    job.take(_nobody_has_anything(job))
    assert job.core.phase is Phase.STARTING and job.core.epoch == 2
    assert job.core.nodes[1].role == "left" and job.told(r.Stop, 1)[-1].code == Exit.OK


def test_what_ranks_planned_before_the_start_began_anew_is_nothing_to_a_new_coordinator() -> None:
    job = SimulatedJob().train()
    stored = json.loads(json.dumps(job.core.dump()))
    job.lose(1)
    for kept in _nobody_has_anything(job):
        if isinstance(kept, Keep):
            stored |= json.loads(json.dumps(kept.parts))
    core = Core(job.core.job)
    core.restored(stored, job.now)
    assert core.phase is Phase.STARTING and not core.coordinates


def test_what_was_done_before_the_start_began_anew_is_done_again() -> None:
    job = SimulatedJob()
    job.join()
    job.lose(1)
    job.feed(r.SideEffect(2, 5, 0, 0, "evaluation"))  # late
    assert job.core.dump()["now"]["done"] == {}


def test_a_worker_of_a_spare_that_ends_while_the_start_begins_anew_is_started_again() -> None:
    """Its agent has not heard of the new start yet; that leaves spares as they are."""
    job = SimulatedJob(nodes=5, spares=2)
    job.join()
    job.lose(1)
    job.feed(r.WorkerExited(4, 0, None, 40, -9, epoch=0))
    assert job.told(r.Respawn, 4) == [r.Respawn(0)]


def test_an_agent_that_has_missed_that_the_start_began_anew_is_told_again() -> None:
    job = SimulatedJob()
    job.join()
    job.lose(1)
    job.join([2])  # of epoch 0 still
    assert job.told(r.Roster, 2)[0].anew


def test_an_agent_whose_connection_was_replaced_at_the_start_hears_again_what_it_may_have_missed() -> None:
    """Nobody counts as late there: it would be waited for without end."""
    spec = DurableSpec("/durable", "job", complete=[(7, "g7")], resume=True)
    job = SimulatedJob(durable=spec)
    job.join()
    job.sent.clear()
    job.join([2])
    assert job.told(r.Roster, 2) and job.told(r.LoadShards, 2) == [r.LoadShards("g7", 7)]
    for node in job.active:
        job.feed(r.ShardsLoaded(node, "g7", ""))
    job.sent.clear()
    job.feed(r.Join(2, 1002, "127.0.0.1", 2002, [70, 71]))  # of other workers: the rest it has heard, or would not tell
    assert job.told(r.ResumeAt, 2) == [r.ResumeAt(7)] and not job.told(r.Roster)


def test_a_coordinator_that_comes_back_while_the_start_begins_anew_has_all_agents_begin() -> None:
    before = SimulatedJob()
    before.join()
    before.lose(1)
    job = SimulatedJob()
    job.take(job.core.restored(json.loads(json.dumps(before.core.dump())), job.now))
    job.feed(r.Join(0, 1000, "127.0.0.1", 2000, [0, 1], epoch=1))
    job.feed(r.Join(2, 1002, "127.0.0.1", 2002, [4, 5], epoch=0))
    job.feed(r.Join(3, 1003, "127.0.0.1", 2003, [6, 7], epoch=1))
    (roster,) = job.told(r.Roster)
    assert roster.anew and roster.epoch == 2 and job.active == [0, 3, 2]


# ---- losses at the end


def test_a_node_lost_after_everything_is_saved_is_no_loss() -> None:
    job = SimulatedJob().train()
    for node in (0, 1, 2):
        job.feed(r.Finished(0, node))
    job.lose(0)
    for node, rank, status in ((1, 2, 0), (1, 3, -9), (2, 4, 0), (2, 5, 0)):
        assert job.finish is None
        job.feed(r.WorkerExited(node, rank % 2, rank, 11, status))
    assert job.end[0] == Exit.OK


def test_a_node_lost_before_everybody_has_finished_is_replaced() -> None:
    job = SimulatedJob().train()
    job.commit(0)
    job.feed(r.Finished(0, 0))
    job.feed(r.Finished(0, 1))
    job.lose(2)
    assert job.core.recovery is not None and job.active == [0, 1, 3]
