"""The coordinator's decisions from start to end, with and without a spare: the pure Core, driven by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.records import SlotAddress
from deadpool_megatron.cluster.records.exits import Exit
from simulated import DEADLINES, SimulatedJob


def failed(  # noqa: ANN201
    node: int = 1,
    rank: int = 2,
    iteration: int = 5,
    phase: str = "training",
    text: str = "ValueError: x",
    epoch: int = 0,
    place: str = "training/utils.py:17",
):
    kind = text.split(":")[0]
    return r.WorkerFailed(node, 0, rank, phase, epoch, iteration, 0, kind, place, text, "Traceback ...")  # type: ignore[arg-type]


# ---- failure-free


def test_a_job_trains_once_every_agent_has_joined_and_every_coordinate_has_registered() -> None:
    job = SimulatedJob()
    job.join([0, 1, 2])
    assert not job.told(r.Roster)
    job.join([3])
    (roster,) = job.told(r.Roster)
    assert set(roster.vaults) == {0, 1, 2, 3} and not job.told(r.Placement)
    for rank in range(5):
        job.register(rank)
    assert job.core.phase is Phase.STARTING
    job.register(5)
    assert job.core.phase is Phase.RUNNING
    (placed,) = job.told(r.Placement)
    assert placed.groups == [[0, 1, 2]] and placed.unique_bytes == [1 << 20] * 6


def test_ranks_that_made_other_process_groups_end_the_job_before_it_trains() -> None:
    job = SimulatedJob()
    job.join()
    job.register(0)
    job.register(1, digest="other groups")
    code, message = job.end
    assert code == Exit.FAILED and "rank 1 on node 0" in message and "same flags" in message


def test_a_generation_is_committed_only_when_every_active_node_has_committed_it() -> None:
    job = SimulatedJob().train()
    job.commit(0, [0, 1])
    assert job.core.committed == -1 and not job.told(r.CommittedTo)
    job.commit(0, [2])
    assert job.core.committed == 0
    assert job.told(r.CommittedTo)[-1] == r.CommittedTo(0, (0, 0), 0)
    job.commit(1)
    assert [e["iteration"] for e in job.events("committed")] == [0, 1]


def test_a_spare_has_no_say_in_commits() -> None:
    job = SimulatedJob().train()
    job.commit(0, [0, 1, 3])
    assert job.core.committed == -1


def test_nodes_that_skip_different_generations_are_given_a_floor_to_meet_at() -> None:
    job = SimulatedJob().train()
    job.commit(0)
    job.commit(1, [0])
    job.commit(2, [1])
    assert job.told(r.CommittedTo)[-1].kept == (0, 0)
    assert job.told(r.CommittedTo)[-1].floor > 2


def test_a_node_whose_ranks_have_no_generation_in_common_has_the_floor_raised_once() -> None:
    job = SimulatedJob().train()
    job.commit(0)
    job.feed(r.Committed(0, 1, 2, apart=True))
    raised = job.told(r.CommittedTo)[-1]
    assert raised.kept == (0, 0) and raised.floor > 2
    job.feed(r.Committed(0, 1, 2, apart=True))
    assert job.told(r.CommittedTo)[-1] is raised
    job.commit(raised.floor)
    assert job.core.committed == raised.floor


def test_the_end_is_told_when_all_have_finished_and_the_job_is_done_when_all_have_left() -> None:
    job = SimulatedJob().train()
    for node in (0, 1, 2):
        assert not job.told(r.AllFinished)
        job.feed(r.Finished(0, node))
    assert job.told(r.AllFinished) == [r.AllFinished(0)]
    for rank, slot in enumerate(job.core.assignment):
        assert job.finish is None
        job.feed(r.WorkerExited(slot.node, slot.local, rank, 1, 0))
    assert job.end == (Exit.OK, "")


def test_a_script_that_never_trains_ends_well_too() -> None:
    job = SimulatedJob()
    job.join()
    for rank, slot in enumerate(job.core.assignment):
        job.feed(r.WorkerExited(slot.node, slot.local, rank, 1, 0))
    assert job.end == (Exit.OK, "")


def test_after_the_end_nothing_is_decided_any_more() -> None:
    job = SimulatedJob().train()
    job.take(job.core.interrupted(job.now))
    assert job.end[0] == Exit.INTERRUPTED
    assert job.core.node_lost(0, "gone", job.now) == [] and job.core.received(r.Finished(0, 1), job.now) == []
    assert job.core.inject(r.Fault("kill", 0), job.now)[0] == "the job has ended"


def test_a_node_without_memory_for_what_it_is_to_keep_ends_the_job_only_where_nothing_is_protected_yet() -> None:
    full = r.NoRoom(3, "rank 1 (peer) needs 8 bytes of node 3's memory")
    job = SimulatedJob().train()
    job.feed(full)
    assert job.end == (Exit.USAGE, f"node 3: {full.message}")
    job = SimulatedJob().train()
    job.commit(5)
    job.lose(1)
    job.recover()
    job.feed(full)
    assert job.finish is None and job.events("no_room")[-1]["node"] == 3


# ---- one loss


def test_a_lost_node_is_replaced_by_the_spare_and_training_goes_on() -> None:
    job = SimulatedJob().train()
    job.lose(1)
    (declared,) = job.told(r.Declare)
    assert declared.epoch == 1 and declared.purpose == "resume" and declared.replaced == [2, 3]
    assert declared.lost_nodes == [1] and declared.assignment[2:4] == [SlotAddress(3, 0), SlotAddress(3, 1)]
    assert declared.groups == [[0, 3, 2]] and 1 not in declared.vaults
    job.arrive(5)
    (agreed,) = job.told(r.Agree)
    assert agreed.generation == 5 and {rank: s.node for rank, s in agreed.sources.items()} == {2: 2, 3: 2}
    assert job.told(r.Form) == [r.Form(1)], "groups form beside the transfer"
    job.prepare()
    job.form()
    assert job.told(r.Form) == [r.Form(1)]
    job.restore()
    assert job.core.phase is Phase.RESTORING
    job.resume()
    assert job.core.phase is Phase.RUNNING and job.core.next_deadline() is None
    names = [e.event for e in job.emitted if e.event in PHASES]
    assert names == list(PHASES)


PHASES = ("detected", "declared", "aborted", "agreed", "prepared", "reformed", "restored", "resumed")


def test_nothing_goes_on_before_the_last_node_is_through() -> None:
    job = SimulatedJob().train()
    job.lose(0)
    last = job.active[-1]
    first = job.active[:-1]
    for node in first:
        job.offer(node)
    assert not job.told(r.Agree)
    job.offer(last)
    for node in first:
        job.feed(r.NodeReady(1, node))
    assert not job.events("prepared")
    job.feed(r.NodeReady(1, last))
    for node in first:
        job.feed(r.NodeFormed(1, node, 1))
    assert not job.events("reformed")


def test_groups_form_once_everybody_who_took_over_has_arrived_and_a_generation_is_agreed() -> None:
    job = SimulatedJob().train()
    job.lose(1)
    spare = next(node for node in job.active if node >= job.core.job.active_nodes)
    for node in job.active:
        job.offer(node, arrived=node != spare)
    assert job.told(r.Agree) and not job.told(r.Form)
    for node in job.active:
        if node != spare:
            job.feed(r.NodeReady(1, node))
    job.feed(r.NodeArrived(0, spare))
    assert not job.told(r.Form), "of another epoch"
    job.feed(r.NodeArrived(1, spare))
    assert job.told(r.Form) == [r.Form(1)]
    job.feed(r.NodeArrived(1, spare))
    assert job.told(r.Form) == [r.Form(1)]
    # Its shard is still on the way: groups are there first, on every node.
    job.form()
    assert job.core.phase is Phase.PREPARING and not job.events("reformed")
    job.feed(r.NodeReady(1, spare))
    assert job.events("prepared") and job.events("reformed") and job.core.phase is Phase.RESTORING
    job.restore()
    job.resume()
    assert job.core.phase is Phase.RUNNING


def test_a_spare_that_arrives_before_the_others_have_left_their_step_waits_for_them() -> None:
    job = SimulatedJob().train()
    job.lose(1)
    *others, spare = sorted(job.active)
    job.offer(spare)
    job.feed(r.NodeArrived(1, spare))
    assert not job.told(r.Form)
    for node in others:
        job.offer(node)
    assert job.told(r.Form) == [r.Form(1)]


@pytest.mark.parametrize("late", ["arrives", "has its shard"])
def test_a_spare_that_never_arrives_or_never_has_its_shard_is_lost_alone(late: str) -> None:
    job = SimulatedJob(nodes=6, spares=2).train()
    job.lose(1)
    spare = next(node for node in job.active if node >= job.core.job.active_nodes)
    for node in job.active:
        job.offer(node, arrived=node != spare)
    if late == "has its shard":
        job.feed(r.NodeArrived(1, spare))
        job.form()
    for node in job.active:
        if node != spare:
            job.feed(r.NodeReady(1, node))
    job.wait(DEADLINES.build + 0.001)
    told = [(s.node, s.record) for s in job.sent if isinstance(s.record, r.KeepStacks)]
    assert told == [(spare, r.KeepStacks(1, False))]
    job.wait(DEADLINES.abort + 0.001)
    assert [n for n, s in job.core.nodes.items() if s.role == "lost"] == [1, spare] and job.core.epoch == 2
    job.recover()
    assert job.core.phase is Phase.RUNNING


def test_a_fast_node_may_resume_before_the_slowest_has_told_that_it_formed() -> None:
    job = SimulatedJob().train()
    job.lose(1)
    job.arrive()
    job.prepare()
    for node in job.active[:-1]:
        job.feed(r.NodeFormed(1, node, 1))
        job.feed(r.NodeRestored(1, node))
        job.feed(r.NodeResumed(1, node, 5))
    slow = job.active[-1]
    job.feed(r.NodeFormed(1, slow, 1))
    job.feed(r.NodeRestored(1, slow))
    job.feed(r.NodeResumed(1, slow, 5))
    assert job.core.phase is Phase.RUNNING


@pytest.mark.parametrize("node", [0, 1, 2])
def test_every_node_can_be_lost_one_after_the_other_the_former_spares_included(node: int) -> None:
    job = SimulatedJob(nodes=6, spares=3).train()
    victim = node
    for epoch in (1, 2, 3):
        job.lose(victim)
        assert job.core.epoch == epoch
        job.recover(generation=4 + epoch)
        assert job.core.phase is Phase.RUNNING
        job.commit(4 + epoch)
        victim = job.core.assignment[2 * node].node
    assert victim == 5


def test_a_worker_that_dies_is_made_good_by_a_parked_spare_and_its_healthy_node_becomes_a_spare() -> None:
    job = SimulatedJob().train()
    job.feed(r.WorkerExited(2, 1, 5, 77, -9))
    assert job.core.nodes[2].role == "spare" and "rank 5 ended (signal 9)" in job.events("detected")[0]["cause"]
    assert job.told(r.Declare)[-1].replaced == [4, 5] and not job.told(r.Stop)
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.active == [0, 1, 3]
    job.park([2])
    job.lose(3)
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.active == [0, 1, 2]


def test_without_a_parked_spare_the_worker_is_started_again_in_its_own_slot() -> None:
    job = SimulatedJob(nodes=3, spares=0).train()
    job.feed(r.WorkerExited(2, 1, 5, 77, -9))
    declared = job.told(r.Declare)[-1]
    assert declared.replaced == [5] and declared.assignment[5] == SlotAddress(2, 1)
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.core.nodes[2].role == "active"


def test_a_node_whose_workers_die_again_and_again_is_a_bad_node() -> None:
    job = SimulatedJob(nodes=4, spares=0).train()
    for pid in range(job.core.job.worker_deaths):
        for _ in range(2):  # told again by an agent that was away for a moment
            job.feed(r.WorkerExited(2, 1, 5, 70 + pid, -9, pid))
        job.recover()
    assert job.core.nodes[2].role == "active"
    job.feed(r.WorkerExited(2, 1, 5, 77, -9, job.core.epoch))
    assert job.core.nodes[2].role == "lost" and "its workers ended 4 times" in job.events("detected")[-1]["cause"]


def test_all_workers_of_a_node_that_die_at_once_do_not_make_it_a_bad_node() -> None:
    """Somebody's pkill, memory that runs out, a fabric that hiccups: one cause, and the node's vault has all shards."""
    job = SimulatedJob(nodes=3, spares=0, slots=8).train()
    job.commit(5)
    for node in (1, 2):
        for local in range(8):
            job.feed(r.WorkerExited(node, local, 8 * node + local, 70 + local, -9, 0))
    assert job.told(r.Declare)[-1].replaced == list(range(8, 24))
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.active == [0, 1, 2]


def test_who_ends_because_a_neighbour_was_lost_is_not_counted_against_its_node() -> None:
    job = SimulatedJob(nodes=3, spares=0).train()
    for pid in range(3 * job.core.job.worker_deaths):
        job.feed(r.WorkerExited(2, 1, 5, 70 + pid, Exit.NEIGHBOUR_LOST))
        job.recover()
    assert job.core.nodes[2].role == "active" and not job.core.nodes[2].record.failures
    assert f"exit code {Exit.NEIGHBOUR_LOST}" in job.events("detected")[-1]["cause"]


def _ends_by_a_peer(job: SimulatedJob, node: int, local: int, pid: int, epoch: int) -> None:
    """A worker that has lost a peer, and of whose loss nobody has told it in time."""
    rank = 2 * node + local
    error = f"Error{pid}", "gloo.py:1", "Connection closed by peer", ""  # (the same one too often would end the job)
    job.feed(r.PeerError(epoch, node, rank, error[2]))
    job.feed(r.WorkerFailed(node, local, rank, "training", epoch, 4, 0, *error, communication=True))
    job.feed(r.WorkerExited(node, local, rank, pid, 1, epoch))


def test_who_has_lost_a_peer_and_was_told_too_late_is_not_counted_against_its_node() -> None:
    """The coordinator was held up for minutes, and reads of the ends of the others before that of the lost node."""
    job = SimulatedJob(nodes=7, spares=1).train()
    job.iterate(4)
    epoch = job.core.epoch
    for again in range(3):  # processes of a slot one after the other, as far as the coordinator can tell
        for node in range(1, 6):
            for local in range(2):
                _ends_by_a_peer(job, node, local, 100 * again + 10 * node + local, epoch)
    job.lose(0)
    job.recover()
    assert job.core.phase is Phase.RUNNING and [n for n, s in job.core.nodes.items() if s.gone] == [0]
    assert not any(state.record.deaths(job.now) for state in job.core.nodes.values())


def test_who_loses_a_peer_at_one_iteration_again_has_no_error_of_its_own_until_that_is_too_often() -> None:
    """As when the coordinator hangs, a node is lost meanwhile, and both come again before the iteration has ended."""
    job = SimulatedJob(nodes=4, spares=0).train()
    job.iterate(4)
    error = "RuntimeError", "gloo.py:1", "Connection closed by peer", ""
    for again in range(job.core.job.transient_retries + 2):
        assert job.core.phase is Phase.RUNNING and job.finish is None
        epoch = job.core.epoch
        job.feed(r.WorkerFailed(2, 1, 5, "training", epoch, 5, 0, *error, communication=True))
        job.feed(r.WorkerExited(2, 1, 5, 70 + again, 1, epoch))
        if not job.finish:
            job.recover()
    assert job.end[0] == Exit.REPEATED_ERROR


@pytest.mark.parametrize("gets_on", [False, True])
def test_a_node_whose_communication_fails_again_and_again_is_a_bad_node(gets_on: bool) -> None:
    job = SimulatedJob(nodes=4, spares=0).train()
    for pid in range(job.core.job.transient_retries + job.core.job.worker_deaths + 1):
        assert job.core.nodes[2].role == "active"
        _ends_by_a_peer(job, 2, 1, 70 + pid, job.core.epoch)
        job.recover()
        if gets_on:
            job.iterate(10 + pid)
    assert job.core.nodes[2].role == ("active" if gets_on else "lost")


def test_a_worker_that_crashes_in_the_same_iteration_again_is_not_made_good_a_second_time() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.iterate(4)
    for expected in (None, Exit.REPEATED_ERROR):
        slot = job.core.assignment[5]
        job.feed(r.WorkerExited(slot.node, slot.local, 5, 77, -11))
        if expected is None:
            job.recover()
    assert job.end[0] == Exit.REPEATED_ERROR and "rank 5 ended (signal 11)" in job.end[1]


def test_a_parked_worker_that_dies_is_started_again() -> None:
    job = SimulatedJob().train()
    job.feed(r.WorkerExited(3, 1, None, 77, -9))
    assert job.told(r.Respawn, node=3) == [r.Respawn(1)] and job.core.nodes[3].role == "spare"


def test_a_loss_told_twice_is_one_loss() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.lose(1)
    job.feed(r.WorkerExited(1, 0, 2, 77, -9))
    job.lose(1)
    assert job.core.epoch == 1


def test_a_spare_whose_workers_are_warm_is_taken_before_one_that_still_imports() -> None:
    job = SimulatedJob(nodes=5, spares=2)
    job.join()
    job.park([4])
    for rank in range(6):
        job.register(rank)
    job.lose(0)
    assert job.active == [4, 1, 2]
    job.lose(1)
    assert job.active == [4, 3, 2]


def away(it: SimulatedJob, *nodes: int) -> None:
    for node in nodes:
        it.take(it.core.node_away(node, it.now))


def test_an_agent_that_connects_again_in_time_costs_nothing() -> None:
    it = SimulatedJob().train()
    away(it, 1)
    it.wait(0.2 * DEADLINES.lease)
    it.join([1])
    it.wait(2 * DEADLINES.lease)
    assert it.events("reconnected") and not it.events("detected") and it.core.epoch == 0
    assert len(it.told(r.Placement, 1)) == 1, "what was told meanwhile it hears again"


def test_a_connection_that_takes_the_place_of_one_whose_end_nobody_has_noticed_is_told_too() -> None:
    it = SimulatedJob().train()
    assert not it.events("reconnected")
    it.join([1])
    assert [event["node"] for event in it.events("reconnected")] == [1]
    it.wait(2 * DEADLINES.lease)
    assert not it.events("detected") and it.core.epoch == 0


def test_an_agent_whose_connection_ends_before_it_has_joined_still_has_the_time_to_join() -> None:
    it = SimulatedJob()
    it.join([0, 1, 2])
    away(it, 3)
    it.wait(2 * DEADLINES.lease)
    it.join([3])
    assert [event["nodes"] for event in it.events("started")] == [4]
    it.train()
    _, coming, actions = it.core.add_spare("", it.now)
    it.take(actions)
    away(it, coming)
    it.wait(DEADLINES.join - 1)
    assert not it.events("detected") and it.core.nodes[coming].role == "spare"
    it.wait(2)
    causes = [event["cause"] for event in it.events("detected")]
    assert causes == [f"its agent has not joined within {DEADLINES.join:g} s"]


def test_an_agent_that_does_not_connect_again_is_lost_soon_and_each_in_its_own_time() -> None:
    it = SimulatedJob(nodes=6, spares=2).train()
    away(it, 1)
    it.wait(0.2 * DEADLINES.lease)
    away(it, 2)
    it.wait(0.1 * DEADLINES.lease)
    assert [event["node"] for event in it.events("detected")] == [1]
    it.join([2])
    assert [event["lost"] for event in it.events("declared")] == [[1]]
    assert it.events("declared")[0]["reason"] == "its agent is gone or silent"


def test_an_agent_that_is_known_to_live_has_two_leases_to_notice_that_its_connection_has_ended() -> None:
    it = SimulatedJob().train()
    away(it, 1)
    it.take(it.core.node_lives(1, it.now))
    it.wait(1.9 * DEADLINES.lease)
    assert not it.events("detected")
    it.wait(0.2 * DEADLINES.lease)
    assert [event["node"] for event in it.events("detected")] == [1]


def test_a_loss_while_another_agent_connects_again_is_declared_when_that_hears_of_it() -> None:
    it = SimulatedJob().train()
    it.commit(5)
    away(it, 0, 1)
    it.lose(1)
    assert not it.told(r.Declare)
    it.join([0])
    assert [event["lost"] for event in it.events("declared")] == [[1]]
    it.recover()
    assert it.core.phase is Phase.RUNNING


def test_a_spare_that_is_lost_is_not_waited_for_any_more() -> None:
    it = SimulatedJob().train()
    away(it, 3)
    it.lose(3)
    assert not it.core.awaits_agents and it.core.epoch == 0


def test_who_was_away_in_a_recovery_begins_it_again_with_the_others() -> None:
    it = SimulatedJob().train()
    it.commit(5)
    it.lose(0)
    away(it, 1)
    it.join([1])  # its agent is still in epoch 0
    assert [event["lost"] for event in it.events("declared")] == [[0], []]
    it.recover()
    assert it.core.phase is Phase.RUNNING


def test_no_deadline_passes_while_an_agent_may_connect_again() -> None:
    it = SimulatedJob().train()
    it.commit(5)
    it.lose(0)
    it.wait(DEADLINES.abort - 0.1)
    away(it, 1)
    it.wait(0.2)
    assert [event["node"] for event in it.events("detected")] == [0]


def test_a_node_that_comes_back_after_its_loss_is_told_to_go() -> None:
    job = SimulatedJob().train()
    job.lose(1)
    before = len(job.sent)
    job.join([1])
    assert [(s.node, type(s.record).__name__) for s in job.sent[before:]] == [(1, "Stop")]
    assert job.told(r.Stop, node=1)[-1].code == Exit.FENCED
    job.join([9])
    assert job.told(r.Stop, node=9)[-1].code == Exit.FENCED


# ---- a loss in the middle of a recovery

Step = Callable[[SimulatedJob], None]
_MIDDLE: dict[str, list[Step]] = {
    "aborting": [lambda job: job.offer(job.active[0])],
    "restoring": [SimulatedJob.arrive, lambda job: job.feed(r.NodeReady(job.core.epoch, job.active[0]))],
    "re-forming": [
        SimulatedJob.arrive,
        SimulatedJob.prepare,
        lambda job: job.feed(r.NodeFormed(job.core.epoch, job.active[0], 1)),
    ],
    "gathering parameters": [
        SimulatedJob.arrive,
        SimulatedJob.prepare,
        SimulatedJob.form,
        lambda job: job.feed(r.NodeRestored(job.core.epoch, job.active[0])),
    ],
}


def _in_the_middle(phase: str, nodes: int = 6, spares: int = 2) -> SimulatedJob:
    job = SimulatedJob(nodes=nodes, spares=spares).train()
    job.commit(4)
    job.lose(1)
    for step in _MIDDLE[phase]:
        step(job)
    assert job.core.phase.value == phase
    return job


@pytest.mark.parametrize("victim", [2, 4], ids=["a survivor", "the spare that took over"])
@pytest.mark.parametrize("phase", _MIDDLE)
def test_a_second_loss_in_any_phase_declares_the_next_epoch_and_recovers(phase: str, victim: int) -> None:
    job = _in_the_middle(phase)
    job.lose(victim)
    assert job.core.phase is Phase.ARRIVING and job.core.epoch == 2 and 5 in job.active
    assert job.core.next_deadline() == job.now + DEADLINES.abort
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.events("resumed")[-1]["epoch"] == 2


def _stale(job: SimulatedJob) -> None:
    """Everything an older epoch could still have to say."""
    for node in job.active:
        job.feed(r.Offer(1, node, {}, {}, {}))
        job.feed(r.NodeReady(1, node))
        job.feed(r.NodeFormed(1, node, 1))
        job.feed(r.NodeRestored(1, node))
        job.feed(r.NodeResumed(1, node, 5))
        job.feed(r.Committed(1, node, 6))
        job.feed(r.Iteration(node, 7, 1, 9, {}, None, 0.1, 0.0, 0, 0))
        job.feed(r.FetchFailed(1, node, 0, 2, 5, "torn"))
        job.feed(r.PeerError(1, node, 0, "connection closed"))
        job.feed(r.Finished(1, node))
        job.feed(r.Saved(1, node, 5, "/ckpt"))


@pytest.mark.parametrize("phase", _MIDDLE)
def test_answers_of_the_epoch_before_count_for_nothing_in_any_phase_of_the_next(phase: str) -> None:
    job = _in_the_middle(phase)
    job.lose(2)
    for expected, step in (
        (Phase.ARRIVING, SimulatedJob.arrive),
        (Phase.PREPARING, SimulatedJob.prepare),
        (Phase.FORMING, SimulatedJob.form),
        (Phase.RESTORING, SimulatedJob.restore),
        (Phase.RESTORING, SimulatedJob.resume),
    ):
        before = (job.core.next_deadline(), len(job.sent), len(job.emitted))
        _stale(job)
        assert job.core.phase is expected and job.core.epoch == 2 and job.core.iteration == -1
        assert before == (job.core.next_deadline(), len(job.sent), len(job.emitted))
        step(job)
    assert job.core.phase is Phase.RUNNING


def test_a_recovery_counts_nobody_as_through_who_was_through_the_one_before() -> None:
    job = SimulatedJob().train()
    for generation in (5, 8):
        _transient(job)
        job.arrive(generation)
        assert job.core.phase is Phase.PREPARING
        job.prepare()
        job.form()
        assert not job.told(r.AllFinished) and job.core.phase is Phase.RESTORING
        job.restore()
        assert job.core.phase is Phase.RESTORING
        job.resume(generation)
        assert job.core.phase is Phase.RUNNING


@pytest.mark.parametrize("phase", _MIDDLE)
def test_what_a_lost_node_still_says_counts_for_nothing(phase: str) -> None:
    job = _in_the_middle(phase)
    state = (job.core.phase, job.core.epoch, job.core.next_deadline(), len(job.sent), len(job.emitted))
    epoch = job.core.epoch
    for record in (
        r.Offer(epoch, 1, {}, {2: [(1, 99)]}, {}),
        r.NodeReady(epoch, 1),
        r.NodeFormed(epoch, 1, 1),
        r.NodeRestored(epoch, 1),
        r.NodeResumed(epoch, 1, 5),
        r.Committed(epoch, 1, 6),
        r.PeerError(epoch, 1, 2, "connection closed"),
        r.FetchFailed(epoch, 1, 2, 2, 5, "torn"),
        r.Iteration(1, 2, epoch, 50, {}, None, 0.1, 0.0, 0, 0),
        r.WorkerExited(1, 0, 2, 7, -9),
        failed(1),
        r.Registered(1, 0, r.CoordinateInfo(2, 0, 0, 0), 1, 1, "other groups", False),
    ):
        job.feed(record)
    assert state == (job.core.phase, job.core.epoch, job.core.next_deadline(), len(job.sent), len(job.emitted))
    assert job.core.iteration == -1


@pytest.mark.parametrize("phase", _MIDDLE)
def test_whoever_misses_the_deadline_of_a_phase_is_lost_and_only_they(phase: str) -> None:
    job = _in_the_middle(phase, nodes=8, spares=4)
    slow = job.active[1]
    # Everybody but one goes on; the step of this phase that all but one take:
    for node in job.active:
        if node == slow:
            continue
        match phase:
            case "aborting":
                job.offer(node)
            case "restoring":
                job.feed(r.NodeReady(1, node))
            case "re-forming":
                job.feed(r.NodeFormed(1, node, 1))
            case "gathering parameters":
                job.feed(r.NodeRestored(1, node))
                job.feed(r.NodeResumed(1, node, 5))
    due = job.core.next_deadline()
    assert due is not None
    job.wait(due - job.now - 0.001)
    assert job.core.epoch == 1
    job.wait(0.001)
    (late,) = job.events("late")
    assert (late["nodes"], late["phase"], late["ends"]) == ([slow], phase, phase != "restoring")
    assert f"node {slow} missed" in late["message"] and "stacks-node*-*.txt" in late["message"]
    assert job.core.epoch == 1
    assert [s.node for s in job.sent if isinstance(s.record, r.KeepStacks)] == [slow]
    due = job.core.next_deadline()
    assert due is not None
    job.wait(due - job.now)
    assert job.core.nodes[slow].role == "lost" and job.core.epoch == 2
    assert [n for n, s in job.core.nodes.items() if s.role == "lost"] == [1, slow]
    assert f"missed the deadline of phase '{phase}'" in job.events("detected")[-1]["cause"]
    job.recover()
    assert job.core.phase is Phase.RUNNING


@pytest.mark.parametrize("phase", ["aborting", "re-forming"])
def test_a_worker_that_hangs_in_a_recovery_costs_an_epoch_and_no_node(phase: str) -> None:
    """It is no node's fault at first; where it comes again and no iteration has ended, it is."""
    job = SimulatedJob(nodes=3, spares=0).train()
    job.commit(5)
    job.take(job.core.inject(r.Fault("abort", -1, 0, None, 1, "", 0.0), job.now)[1])

    def deaths() -> int:
        return job.core.nodes[1].record.deaths(job.core.members.unix_s)

    for turn in range(5):
        epoch = job.core.epoch
        if phase == "re-forming":
            job.arrive()
            job.prepare()
        for node in (0, 2):
            job.offer(node)
            job.feed(r.NodeFormed(epoch, node, 1))
        due = job.core.next_deadline()
        assert due is not None and job.core.phase.value == phase
        job.wait(due - job.now)
        assert job.told(r.KeepStacks)[-1] == r.KeepStacks(epoch, True)
        job.feed(r.WorkerExited(1, 0, 2, 100 + turn, -9, epoch))
        if turn == 0:  # the other one of the node hung too
            job.feed(r.WorkerExited(1, 1, 3, 100 + turn, -9, epoch))
            job.feed(r.WorkerReady(1, 1, 200))
            assert "rank 3 hung in a recovery" in job.events("detected")[-1]["cause"] and not deaths()
            job.feed(r.WorkerReady(1, 0, 101))
            continue
        if turn < 4:
            assert "hung in a recovery" in job.events("detected")[-1]["cause"] and job.core.epoch == epoch + 1
            assert job.told(r.Declare)[-1].replaced == [2, 3] and deaths() == turn
            job.feed(r.WorkerReady(1, 0, 101 + turn))
    assert job.core.nodes[1].role == "lost"


def test_a_parked_spare_that_is_lost_disturbs_nobody_and_is_never_chosen() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.feed(r.WorkerExited(3, 0, None, 30, -9))
    assert job.core.phase is Phase.RUNNING and job.core.epoch == 0 and not job.told(r.Declare)
    job.lose(0)
    assert job.active == [4, 1, 2]


def test_a_spare_lost_before_the_job_is_complete_does_not_keep_the_others_waiting() -> None:
    job = SimulatedJob()
    job.join([0, 1, 2])
    job.lose(3)
    assert len(job.told(r.Roster)) == 1


@pytest.mark.parametrize(("missing", "goes_on"), [(3, True), (1, False)], ids=["a spare", "an active node"])
def test_nobody_waits_for_ever_for_an_agent_that_never_joins(missing: int, goes_on: bool) -> None:
    job = SimulatedJob()
    job.join([n for n in range(4) if n != missing])
    job.wait(0.5)
    assert job.core.next_deadline() is not None
    job.wait(DEADLINES.join - 1)
    assert job.core.nodes[missing].role != "lost"
    job.wait(2)
    if goes_on:
        assert len(job.told(r.Roster)) == 1 and job.finish is None
    else:
        (roster,) = job.told(r.Roster)
        assert roster.anew and roster.epoch == 1 and job.active == [0, 3, 2]


# ---- copies that cannot be had


def test_a_copy_that_turns_out_unreadable_is_not_asked_for_again() -> None:
    job = SimulatedJob().train()
    job.lose(1)
    version = [(0, 5)]
    old = [(0, 4)]

    def offers() -> None:
        job.feed(r.Offer(job.core.epoch, 0, {0: 5, 1: 5}, {0: old + version, 1: old + version}, {4: old, 5: old}))
        job.feed(r.Offer(job.core.epoch, 2, {4: 5, 5: 5}, {4: old, 5: old}, {2: old + version, 3: old + version}))
        job.feed(r.Offer(job.core.epoch, 3, {2: None, 3: None}, {}, {}))

    offers()
    assert job.told(r.Agree)[-1].generation == 5
    job.feed(r.FetchFailed(1, 3, 2, 2, 5, "checksum of slice 3 differs"))
    assert job.core.epoch == 2 and job.events("refused")[0]["cause"] == "checksum of slice 3 differs"
    offers()
    assert job.told(r.Agree)[-1].generation == 4
    job.feed(r.FetchFailed(2, 3, 2, 2, 4, "checksum of slice 1 differs"))
    offers()
    code, message = job.end
    assert code == Exit.GENERATION_LOST and "of ranks 2" in message and "--load" in message


def test_a_node_that_finishes_before_another_has_told_of_its_groups_is_not_forgotten() -> None:
    job = SimulatedJob().train()
    job.commit(5)
    job.lose(1)
    job.arrive()
    job.prepare()
    late = job.active[-1]
    for node in job.active:
        if node != late:
            job.feed(r.NodeFormed(1, node, 12))
            job.feed(r.NodeRestored(1, node))
            job.feed(r.NodeResumed(1, node, 5))
            job.feed(r.Finished(1, node))
    job.feed(r.NodeFormed(1, late, 12))
    job.feed(r.NodeRestored(1, late))
    job.feed(r.NodeResumed(1, late, 5))
    assert not job.told(r.AllFinished)
    job.feed(r.Finished(1, late))
    assert job.told(r.AllFinished) == [r.AllFinished(1)]


def test_a_spare_without_room_gives_way_to_another_one_and_no_copy_is_refused() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.commit(5)
    job.lose(1)
    (first,) = set(job.told(r.Declare)[-1].replaced and [s.node for s in job.core.assignment]) - {0, 1, 2}
    job.arrive()
    job.feed(r.FetchFailed(1, first, 2, 2, 5, "rank 2 (own) needs 8 bytes", 0, own=True))
    assert job.core.epoch == 2 and not job.events("refused") and job.events("detected")[-1]["node"] == first
    job.recover()
    assert job.core.phase is Phase.RUNNING and first not in {s.node for s in job.core.assignment}


def test_a_refusal_ends_with_the_copy_that_was_given_up() -> None:
    job = SimulatedJob(nodes=4, spares=1).train()
    job.commit(5)
    job.feed(r.WorkerExited(0, 0, 0, 1, -9))
    job.arrive()
    taken = job.core.assignment[0].node
    job.feed(r.FetchFailed(1, taken, 0, 0, 5, "chunk 0 has changed in memory", 0))
    assert job.core.epoch == 2 and len(job.events("refused")) == 1
    job.feed(r.DamagedCopy(1, 0, 0, "own", 5))
    job.arrive()  # node 0 offers that version of rank 0 again: it has fetched a whole one
    told = job.told(r.Agree)[-1].sources[0]
    assert 0 in {told.node, *told.others}


def test_a_copy_given_up_since_it_was_offered_costs_an_epoch_and_condemns_nothing() -> None:
    job = SimulatedJob().train()
    job.commit(5)
    job.lose(1)
    job.arrive()
    job.feed(r.FetchFailed(1, 0, 0, 0, 5, "node 0 has given up its copy of rank 0 since it was offered", gone=True))
    assert job.core.epoch == 2 and not job.events("refused")


def test_a_process_that_ends_before_it_has_taken_over_is_replaced() -> None:
    job = SimulatedJob(nodes=3, spares=0).train()
    job.commit(5)
    job.feed(r.WorkerExited(0, 1, 1, 1, -9))
    assert job.core.epoch == 1
    job.feed(r.WorkerExited(0, 1, None, 2, -9))
    assert job.core.epoch == 2 and job.told(r.Declare)[-1].replaced == [1]


def test_two_nodes_that_keep_each_others_shards_lost_at_once_are_more_than_the_redundancy_covers() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.commit(5)
    job.lose(1)
    job.lose(2)
    job.arrive()
    code, message = job.end
    assert code == Exit.GENERATION_LOST and "ranks 2, 3" in message and "more nodes were lost" in message
    assert "covers, which is any 1 node: no vault" in message
    assert job.told(r.Stop)[-1].code == Exit.GENERATION_LOST


def _nothing_to_give(job: SimulatedJob) -> None:
    for node in job.core.members.present():
        ranks = [rank for rank, slot in enumerate(job.core.assignment) if slot.node == node]
        job.feed(r.Offer(job.core.epoch, node, dict.fromkeys(ranks), {}, {}))


def test_a_spare_is_asked_before_a_generation_is_given_up() -> None:
    job = SimulatedJob(nodes=3, spares=1, slots=1).train()
    job.commit(5)
    job.feed(r.WorkerExited(0, 0, 0, 0, -9))
    job.recover()
    assert job.active == [2, 1]
    job.feed(r.PeerError(1, 1, 1, "connection reset"))
    job.wait(DEADLINES.lease + 2)
    job.feed(r.Offer(2, 1, {1: None}, {}, {}))
    job.feed(r.Offer(2, 2, {0: None}, {}, {}))
    assert job.told(r.Declare, 0)[-1].epoch == 2 and not job.told(r.Agree)[1:], "it may not have heard of this epoch"
    job.feed(r.Offer(2, 0, {}, {}, {0: [(0, 5)], 1: [(0, 5)]}))
    assert job.told(r.Agree)[-1].sources.keys() == {0, 1} and job.told(r.Agree)[-1].generation == 5


def test_a_spare_that_has_come_since_is_not_waited_for() -> None:
    job = SimulatedJob(nodes=2, spares=0, slots=1).train()
    job.commit(5)
    number = job.core.add_spare("host", job.now)[1]
    _transient(job)
    job.join([number])  # it hears of this epoch with the roster, and so does not say what it has
    for node in job.active:
        job.offer(node, 3)
    assert job.told(r.Agree)[-1].generation == 3


def test_a_spare_that_does_not_say_what_it_has_in_time_is_lost_and_the_others_go_on_without() -> None:
    job = SimulatedJob(nodes=3, spares=1, slots=1).train()
    job.commit(5)
    _transient(job)
    for node in job.active:
        job.offer(node, 3)
    assert not job.told(r.Agree)
    job.wait(DEADLINES.abort + 1)
    assert job.core.epoch == 2 and job.core.nodes[2].role == "lost"
    for node in job.active:
        job.offer(node, 3)
    assert job.told(r.Agree)[-1].generation == 3


def test_without_a_commit_nothing_that_was_trained_is_trained_from_the_start_again_without_a_word() -> None:
    job = SimulatedJob().train()
    job.iterate(0)
    job.lose(1)
    _nothing_to_give(job)
    code, message = job.end
    assert code == Exit.GENERATION_LOST and "node 1 was lost before the first generation was committed" in message


def test_a_communication_error_without_a_commit_ends_the_job_with_a_line_too() -> None:
    job = SimulatedJob().train()
    job.iterate(0)
    _transient(job)
    _nothing_to_give(job)
    code, message = job.end
    assert code == Exit.GENERATION_LOST and "communication failed before the first generation" in message


# ---- no spare


def _rescued() -> SimulatedJob:
    job = SimulatedJob().train()
    job.lose(1)
    job.recover()
    job.lose(0)
    return job


def test_without_a_spare_the_survivors_save_what_would_be_lost() -> None:
    job = _rescued()
    declared = job.told(r.Declare)[-1]
    assert declared.purpose == "save" and declared.replaced == [0, 1]
    assert declared.assignment[0].node in (2, 3) and declared.assignment[0].local == 2
    assert len(set(declared.assignment)) == 6
    job.arrive(7)
    job.prepare()
    job.form()
    job.restore()
    assert job.core.phase is Phase.RESTORING
    for node in job.active:
        assert job.finish is None
        job.feed(r.Saved(job.core.epoch, node, 7, "/ckpt"))
    code, message = job.end
    assert code == Exit.NO_SPARE_SAVED and "iteration 7" in message and "--load /ckpt" in message


def test_a_loss_while_saving_begins_the_rescue_again_with_who_is_left() -> None:
    job = SimulatedJob(nodes=5, spares=1).train()
    job.lose(1)
    job.recover()
    job.commit(5)
    job.lose(0)
    assert job.core.epoch == 2
    job.lose(3)
    declared = job.told(r.Declare)[-1]
    assert declared.epoch == 3 and declared.purpose == "save" and {s.node for s in declared.assignment} == {2, 4}
    assert len(set(declared.assignment)) == 8


def test_a_checkpoint_that_is_not_saved_in_time_ends_the_job() -> None:
    job = _rescued()
    job.arrive(7)
    job.prepare()
    job.form()
    job.restore()
    job.feed(r.Saved(job.core.epoch, job.active[0], 7, "/ckpt"))
    for _ in range(4):
        job.wait(DEADLINES.build + 1)
    assert job.end[0] == Exit.NO_SPARE


@pytest.mark.parametrize("slow_link", [False, True], ids=["", "before all are known to have restored"])
def test_a_checkpoint_that_fails_with_the_same_error_again_ends_the_job_for_want_of_a_spare(slow_link: bool) -> None:
    job = _rescued()
    for again in range(2):
        assert job.finish is None and job.told(r.Declare)[-1].purpose == "save"
        job.arrive(7)
        job.prepare()
        job.form()
        if not (again and slow_link):
            job.restore()
        node, local = job.core.assignment[5].node, job.core.assignment[5].local
        epoch = job.core.epoch
        error = r.WorkerFailed(node, local, 5, "training", epoch, 7, 0, "OSError", "save.py", "no space left", "")
        job.feed(error)
        job.feed(r.WorkerExited(node, local, 5, 50 + epoch, 1, epoch))
    code, message = job.end
    assert code == Exit.NO_SPARE and "no spare is left for node 0 (its agent is gone or silent)" in message
    assert "rank 5 raised the same error again: no space left" in message


@pytest.mark.parametrize("spares", [1, 2])
def test_a_spare_that_has_come_by_the_time_a_checkpoint_fails_is_used(spares: int) -> None:
    """Of two nodes that are lost one is replaced while the others save; where one came too few, they save again."""
    job = SimulatedJob(nodes=5, spares=1).train()
    job.commit(0)
    job.take(job.core.node_away(0, job.now))
    job.take(job.core.node_away(1, job.now))
    job.wait(2.0)
    declared = job.told(r.Declare)[-1]
    assert declared.purpose == "save" and {slot.node for slot in declared.assignment} == {2, 3, 4}
    job.arrive(7)
    job.prepare()
    job.form()
    job.restore()
    for _ in range(spares - 1):
        _, node, actions = job.core.add_spare("h", job.now)
        job.take(actions)
        job.join([node])
        job.park([node])
    slot, epoch = job.core.assignment[5], job.core.epoch
    job.feed(r.WorkerExited(slot.node, slot.local, 5, 99, 1, epoch))
    declared = job.told(r.Declare)[-1]
    assert declared.epoch == epoch + 1 and job.finish is None
    assert declared.purpose == ("resume" if spares == 2 else "save")
    if spares == 2:
        assert sorted(job.active) == [2, 3, 4, 5] and len(declared.replaced) == 5
        assert sorted({node for group in declared.groups for node in group}) == [2, 3, 4, 5], "all are protected again"
        job.recover(7)
        assert job.core.phase is Phase.RUNNING and job.core.nodes[4].role == "active"
        job.lose(5)
        assert job.told(r.Declare)[-1].purpose == "save"


def test_the_error_of_a_try_to_save_that_is_over_does_not_end_the_next_one() -> None:
    job = _rescued()

    def fails(epoch: int) -> None:
        slot = job.core.assignment[5]
        job.feed(r.WorkerFailed(slot.node, slot.local, 5, "training", epoch, 7, 0, "OSError", "save.py", "full", ""))
        job.feed(r.WorkerExited(slot.node, slot.local, 5, 50 + epoch, 1, epoch))

    def saves() -> int:
        for step in (lambda: job.arrive(7), job.prepare, job.form, job.restore):
            step()
        return job.core.epoch

    fails(saves())
    second = saves()
    slot = job.core.assignment[4]
    job.feed(r.WorkerExited(slot.node, slot.local, 4, 99, -9, second))
    assert job.core.epoch == second + 1
    fails(second)
    assert job.finish is None and job.told(r.Declare)[-1].purpose == "save"
    fails(saves())
    assert job.end[0] == Exit.NO_SPARE and "raised the same error again" in job.end[1]


def test_without_a_spare_and_without_a_way_to_save_the_job_says_what_is_missing() -> None:
    job = SimulatedJob(nodes=3, spares=0, can_rescue=False).train()
    job.commit(0)
    job.lose(2, "rank 4 ended (signal 9)")
    code, message = job.end
    assert code == Exit.NO_SPARE and "no spare is left for node 2" in message and "--save" in message


def test_where_a_recovery_needs_other_processes_all_ranks_have_new_ones_in_one_epoch() -> None:
    job = SimulatedJob(nodes=3, spares=1, slots=2)
    job.restarts, job.can_rescue = True, False
    job.train()
    job.commit(0)
    job.lose(0)
    (declared,) = job.told(r.Declare)
    assert declared.replaced == [0, 1, 2, 3] and job.core.epoch == 1
    job.recover()
    job.lose(1)
    code, message = job.end
    assert code == Exit.NO_SPARE and "experts span nodes" in message and "--save" not in message


def test_when_nobody_survives_the_job_ends() -> None:
    job = SimulatedJob(nodes=2, spares=0, slots=1).train()
    job.commit(0)
    job.lose(0)
    job.lose(1)
    code, message = job.end
    assert code == Exit.NO_SPARE and "nobody survives" in message


# ---- errors that no loss explains


def test_a_communication_error_that_a_loss_explains_is_forgotten() -> None:
    job = SimulatedJob().train()
    job.feed(r.PeerError(0, 0, 0, "connection reset"))
    assert job.core.epoch == 0 and job.core.phase is Phase.RUNNING
    job.wait(DEADLINES.lease / 2)
    job.lose(1)
    job.recover()
    job.wait(10 * DEADLINES.lease)
    assert job.core.epoch == 1


def test_a_communication_error_with_every_node_alive_re_forms_with_the_same_nodes() -> None:
    job = SimulatedJob().train()
    job.feed(r.PeerError(0, 0, 0, "connection reset"))
    job.feed(r.PeerError(0, 1, 2, "connection reset"))
    job.wait(DEADLINES.lease + 1)
    (declared,) = job.told(r.Declare)
    assert declared.epoch == 1 and declared.replaced == [] and declared.lost_nodes == [] and job.active == [0, 1, 2]
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.core.nodes[3].role == "spare"


def _transient(job: SimulatedJob) -> None:
    job.feed(r.PeerError(job.core.epoch, 0, 0, "link flap"))
    job.wait(DEADLINES.lease + 1)


def test_communication_errors_without_end_are_given_up_after_the_retries() -> None:
    job = SimulatedJob(retries=2).train()
    for epoch in (1, 2):
        _transient(job)
        assert job.core.epoch == epoch
        job.recover()
    _transient(job)
    code, message = job.end
    assert code == Exit.RECOVERY_FAILED and "3 times" in message and "link flap" in message


def test_communication_errors_far_apart_do_not_add_up_over_the_life_of_a_job() -> None:
    job = SimulatedJob(retries=2).train()
    for epoch in range(1, 7):
        _transient(job)
        assert job.core.epoch == epoch and job.finish is None
        job.recover(generation=10 * epoch)
        job.iterate(10 * epoch)
        job.iterate(10 * epoch + 1)


def test_a_communication_error_at_the_same_iteration_again_and_again_is_given_up() -> None:
    job = SimulatedJob(retries=2).train()
    job.iterate(8)
    for _ in range(2):
        _transient(job)
        job.recover(generation=8)
        job.iterate(8)
    _transient(job)
    assert job.end[0] == Exit.RECOVERY_FAILED


def test_a_communication_error_in_the_middle_of_a_recovery_starts_it_again() -> None:
    job = _in_the_middle("re-forming")
    _transient(job)
    assert job.core.epoch == 2 and job.core.phase is Phase.ARRIVING and job.core.nodes[5].role == "spare"
    job.recover()
    assert job.core.phase is Phase.RUNNING


# ---- a recovery proves itself


def test_what_ranks_have_otherwise_is_told_with_its_nodes_and_the_comparison_after_the_restoring() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.lose(0)
    job.arrive(5)
    job.prepare()
    job.form()
    unlike = [r.Unlike("parameters", [1, 4])]
    job.feed(r.Compared(1, 0, job.core.epoch, 5, 0.004, unlike, True))  # before the last node has told that it restored
    (told,) = job.events("unlike")
    assert (told["part"], told["ranks"], told["equal"]) == ("parameters", [1, 4], True)
    assert told["nodes"] == sorted({job.core.assignment[rank].node for rank in (1, 4)})
    assert not job.events("compared")
    job.restore()
    job.resume(5)
    names = [each.event for each in job.emitted if each.event in ("restored", "compared", "resumed")]
    assert names == ["restored", "compared", "resumed"] and job.events("compared")[0]["seconds"] == 0.004
    job.feed(r.Compared(1, 0, job.core.epoch, 20, 0.002, [], True))  # by --deadpool-check-replicas
    assert job.events("compared")[-1]["iteration"] == 20
    job.feed(r.Compared(1, 0, job.core.epoch - 1, 21, 0.002, unlike, True))  # late, of an epoch that is over
    assert len(job.events("unlike")) == 1


def test_state_that_cannot_be_made_equal_ends_the_job_with_its_own_code() -> None:
    job = SimulatedJob().train()
    text = "after the recovery hyperparameters of rank 2 differ"
    job.feed(r.WorkerFailed(1, 0, 2, "training", 1, 5, Exit.UNEQUAL, "Unequal", "a.py:1", text, ""))
    assert job.end == (Exit.UNEQUAL, text)


# ---- errors of the worker's own


def test_an_error_of_a_worker_costs_one_spare_and_the_same_error_again_ends_the_job() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.feed(failed(1, 2))
    job.feed(r.WorkerExited(1, 0, 2, 11, 1))
    assert job.core.epoch == 1
    job.recover()
    job.feed(failed(3, 2, epoch=1))
    code, message = job.end
    assert code == Exit.REPEATED_ERROR
    assert "rank 2" in message and "iteration 5" in message and "ValueError: x" in message
    assert job.core.nodes[4].role == "spare"


def test_what_the_ranks_of_a_node_raise_at_once_is_one_error_and_the_same_again_ends_the_job() -> None:
    job = SimulatedJob(nodes=6, spares=2).train()
    for rank in (2, 3):
        job.feed(failed(1, rank, text="OSError: [Errno 5] /scratch/data.bin"))
    for local, rank in enumerate((2, 3)):
        job.feed(r.WorkerExited(1, local, rank, 11, 1))
    assert job.core.assignment[2].node != 1 != job.core.assignment[3].node
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.finish is None
    job.feed(failed(4, 3, text="OSError: [Errno 5] /scratch/data.bin", epoch=job.core.epoch))
    assert job.end[0] == Exit.REPEATED_ERROR


@pytest.mark.parametrize("what", ["text", "place"])
def test_an_error_is_known_again_by_its_type_and_place_or_rank(what: str) -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    for epoch in range(2):
        node = job.core.assignment[2].node
        text = f"RuntimeError: DataLoader worker (pid {4711 + epoch}) is killed" if what == "text" else "OSError: y"
        place = "utils/data.py:9" if what == "text" else f"training/utils.py:{epoch}"
        job.feed(failed(node, 2, text=text, place=place, epoch=epoch))
        if not epoch:
            job.feed(r.WorkerExited(node, 0, 2, 11, 1))
            job.recover()
    assert job.end[0] == Exit.REPEATED_ERROR


def test_an_error_that_the_job_has_come_through_may_come_again() -> None:
    """Of processes that take over, all errors are of no iteration, however many there have been since."""
    job = SimulatedJob(nodes=6, spares=3).train()
    for iteration in (5, 20):
        job.lose(job.active[0])
        node = job.core.assignment[0].node
        text = "OutOfMemoryError: device"
        job.feed(failed(node, 0, -1, "setup", text, job.core.epoch, "model.py:3"))
        job.feed(r.WorkerExited(node, 0, 0, 11, 1, job.core.epoch))
        assert job.finish is None
        job.recover()
        job.park()
        job.iterate(iteration)
    assert job.core.dump()["now"]["errors"] == []


def test_another_error_at_another_iteration_is_not_the_same_error() -> None:
    job = SimulatedJob(nodes=6, spares=3).train()
    for epoch, (iteration, text) in enumerate(((5, "ValueError: x"), (6, "ValueError: x"), (6, "OSError: y"))):
        node = job.core.assignment[2].node
        job.feed(failed(node, 2, iteration, text=text, epoch=epoch))
        job.feed(r.WorkerExited(node, 0, 2, 11, 1))
        job.recover()
    assert job.core.phase is Phase.RUNNING


def test_what_the_user_did_wrong_ends_the_job_with_the_users_line() -> None:
    job = SimulatedJob()
    job.join()
    job.feed(r.WorkerFailed(0, 0, 0, "setup", 0, -1, 2, "UserError", "a.py:1", "--fp8-format is not supported", ""))
    assert job.end == (Exit.USAGE, "--fp8-format is not supported")


def test_an_exception_before_training_ends_the_job_and_is_named() -> None:
    job = SimulatedJob()
    job.join()
    job.feed(failed(1, 2, -1, "setup", "FileNotFoundError: vocab.json"))
    job.feed(r.WorkerExited(1, 0, 2, 11, 1))
    code, message = job.end
    assert code == 1 and message == "rank 2 on node 1: FileNotFoundError: vocab.json"


def test_a_process_that_leaves_with_an_error_before_training_ends_the_job() -> None:
    job = SimulatedJob()
    job.join()
    job.feed(r.WorkerExited(1, 0, 2, 11, 3))
    assert job.end[0] == 3 and "exit code 3" in job.end[1] and "before training began" in job.end[1]


def test_the_exit_codes_of_megatrons_rerun_state_machine_keep_their_meaning() -> None:
    job = SimulatedJob().train()
    for node in (0, 1, 2):
        job.feed(r.Finished(0, node))
    job.feed(r.WorkerExited(1, 0, 2, 11, 17))
    code, message = job.end
    assert code == 17 and "a result was wrong" in message and "after training had finished" not in message


# ---- plain mode


def test_in_plain_mode_the_first_failure_ends_the_job_with_its_exit_code() -> None:
    job = SimulatedJob(nodes=2, spares=0, deadpool=False)
    job.join()
    job.feed(r.WorkerExited(1, 0, 2, 11, 3))
    code, message = job.end
    assert code == 3 and message == "rank 2 on node 1 failed (exit code 3); see its log"


def test_in_plain_mode_a_lost_node_ends_the_job() -> None:
    job = SimulatedJob(nodes=2, spares=0, deadpool=False)
    job.join()
    job.lose(1)
    assert job.end[0] == Exit.FAILED and "DeadPool is off" in job.end[1]


def test_a_spare_has_no_copy_to_corrupt_before_it_takes_over() -> None:
    job = SimulatedJob().train()
    (spare, *_) = [number for number, node in job.core.nodes.items() if node.role == "spare"]
    why = f"node {spare} has no copy of its own now: it is a spare"
    assert job.core.inject(r.Fault("corrupt", spare), job.now) == (why, [])
    assert job.core.inject(r.Fault("corrupt", 0), job.now)[0] == ""
    assert job.core.inject(r.Fault("corrupt", spare, iteration=99), job.now)[0] == ""


def test_in_plain_mode_there_is_no_copy_to_corrupt() -> None:
    job = SimulatedJob(nodes=2, spares=0, deadpool=False)
    job.join()
    assert "keeps no copies" in job.core.inject(r.Fault("corrupt", 1), job.now)[0]


def test_in_plain_mode_the_job_is_done_when_all_have_left() -> None:
    job = SimulatedJob(nodes=2, spares=0, deadpool=False)
    job.join()
    for rank, slot in enumerate(job.core.assignment):
        job.feed(r.WorkerExited(slot.node, slot.local, rank, 1, 0))
    assert job.end == (0, "")


# ---- faults on demand


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (r.Fault("kill", 9), "there is no node 9: the job has nodes 0 to 3"),
        (r.Fault("kill", 1), "node 1 is lost already"),
        (r.Fault("kill", 0, iteration=6), "iteration 6 is over: the job is past iteration 6"),
        (r.Fault("kill-worker", 0, local=9), "there is no worker 9 on a node: 2 are numbered from 0"),
        (r.Fault("crash", 0, local=-1), "there is no worker -1 on a node: 2 are numbered from 0"),
    ],
)
def test_a_fault_that_cannot_strike_is_refused_with_the_reason(fault: r.Fault, why: str) -> None:
    job = SimulatedJob().train()
    job.lose(1)
    job.recover()
    job.iterate(6)
    assert job.core.inject(fault, job.now) == (why, [])


def test_a_fault_for_an_agent_that_is_not_there_yet_is_refused_and_not_lost() -> None:
    job = SimulatedJob()
    fault = r.Fault("kill", 1, iteration=3)
    why = "not now: the agent of node 1 is not connected; try again in a moment"
    assert job.core.inject(fault, job.now) == (why, [])
    job.train()
    assert job.core.inject(fault, job.now)[0] == ""


def test_a_fault_goes_to_its_node_and_an_abort_re_forms_with_everybody() -> None:
    job = SimulatedJob().train()
    error, actions = job.core.inject(r.Fault("kill-worker", 2, 1, 7, 3), job.now)
    job.take(actions)
    assert not error and job.told(r.Arm, node=2) == [r.Arm(r.Fault("kill-worker", 2, 1, 7, 3))]
    error, actions = job.core.inject(r.Fault("abort", -1), job.now)
    job.take(actions)
    assert not error and job.core.epoch == 1 and job.told(r.Declare)[-1].replaced == []
    assert "not training" in job.core.inject(r.Fault("abort", -1), job.now)[0]


def test_a_communication_error_before_training_is_the_workers_own_and_ends_nothing_by_itself() -> None:
    job = SimulatedJob()
    for node in range(4):
        job.feed(r.Join(node, 1, "h", 1, [1, 2]))
    job.feed(r.PeerError(0, 0, 0, "connection closed by peer"))
    assert job.core.phase is Phase.STARTING and job.core.next_deadline() is None


def test_who_has_restored_is_not_late_while_others_restore() -> None:
    job = SimulatedJob(nodes=3, spares=0).train()
    job.commit(5)
    job.take(job.core.inject(r.Fault("abort", -1, 0, None, 1, "", 0.0), job.now)[1])
    job.arrive()
    job.prepare()
    job.form()
    assert job.core.phase is Phase.RESTORING
    for node in (0, 2):
        job.feed(r.NodeRestored(1, node))
    due = job.core.next_deadline()
    assert due is not None
    job.wait(due - job.now)
    assert [s.node for s in job.sent if isinstance(s.record, r.KeepStacks)] == [1]


# ---- workers that end together


def _ends(job: SimulatedJob, node: int, local: int) -> None:
    rank = job.core.assignment.index(SlotAddress(node, local))
    job.feed(r.WorkerExited(node, local, rank, 10 * node + local, -9, job.core.epoch))


def test_workers_of_many_nodes_that_end_within_a_moment_are_one_epoch() -> None:
    job = SimulatedJob(nodes=16, spares=1, slots=4, gather_s=0.02).train()
    job.commit(0)
    for node in range(15):
        for local in range(4):
            _ends(job, node, local)
    assert not job.events("declared"), "more may end"
    job.wait(0.02)
    (declared,) = job.events("declared")
    assert declared["replaced"] == list(range(60)) and declared["reason"] == job.events("detected")[0]["cause"]
    assert job.core.next_deadline() == pytest.approx(job.now + DEADLINES.abort)


def test_one_that_ends_alone_is_replaced_when_the_moment_is_over_and_not_later_however_many_follow() -> None:
    job = SimulatedJob(nodes=8, spares=1, slots=2, gather_s=0.02).train()
    job.commit(0)
    _ends(job, 0, 0)
    assert job.core.next_deadline() == pytest.approx(job.now + 0.02)
    for node in range(1, 6):
        job.wait(0.018)
        _ends(job, node, 0)
    assert not job.events("declared")
    job.wait(0.011)
    assert len(job.events("declared")) == 1


def test_in_a_recovery_nobody_waits_for_more_ends() -> None:
    """When it is over nothing may be vacant any more."""
    job = SimulatedJob(nodes=4, spares=1, slots=2, gather_s=0.02).train()
    job.commit(0)
    _ends(job, 0, 0)
    job.wait(0.02)
    _ends(job, 1, 0)
    assert len(job.events("declared")) == 2


def test_a_node_that_is_lost_meanwhile_is_in_the_same_epoch() -> None:
    job = SimulatedJob(nodes=4, spares=1, slots=2, gather_s=0.02).train()
    job.commit(0)
    _ends(job, 0, 0)
    job.lose(1)
    job.wait(1.0)
    (declared,) = job.events("declared")
    assert declared["lost"] == [1] and set(declared["replaced"]) == {0, 2, 3}


def test_training_does_not_end_while_a_worker_that_has_just_ended_is_not_replaced() -> None:
    job = SimulatedJob(nodes=4, spares=1, slots=2, gather_s=0.02).train()
    job.commit(0)
    job.feed(r.Finished(0, 0))
    job.feed(r.Finished(0, 1))
    _ends(job, 0, 0)
    job.feed(r.Finished(0, 2))
    assert not job.told(r.AllFinished)
    job.wait(0.02)
    assert job.events("declared") and job.core.phase is Phase.ARRIVING
