"""Planned moves, stuck workers and a coordinator that starts again: the pure Core, driven by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.effects import Emit, Keep, Send
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.placement.domains import parse_domains
from deadpool_megatron.cluster.records import SlotAddress
from deadpool_megatron.cluster.records.exits import Exit
from simulated import DEADLINES, SimulatedJob


def hold(job: SimulatedJob, missed: bool = False) -> int:
    """Every active node waits where it was told to."""
    iteration: int = job.told(r.Hold)[-1].iteration
    for node in job.active:
        job.feed(r.NodeHeld(job.core.epoch, node, iteration, missed))
    return iteration


# ---- drain


def test_a_drained_node_gives_its_coordinates_to_a_spare_at_a_step_boundary_and_then_leaves() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    error, actions = job.core.drain(1, job.now)
    job.take(actions)
    assert error == "" and job.told(r.Hold)[-1].iteration > 5
    at = hold(job)
    declared = job.told(r.Declare)[-1]
    assert declared.lost_nodes == [] and declared.assignment[2:4] == [SlotAddress(3, 0), SlotAddress(3, 1)]
    assert job.core.nodes[1].role == "leaving" and not job.told(r.Stop, node=1)
    job.recover(at)
    assert job.core.phase is Phase.RUNNING and job.core.nodes[1].role == "left"
    assert job.told(r.Stop, node=1)[0].code == Exit.OK and job.events("left")[0]["node"] == 1
    assert job.events("agreed")[-1]["iteration"] == at


def test_the_drained_nodes_own_vault_is_a_source_until_it_leaves() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    job.take(job.core.drain(1, job.now)[1])
    at = hold(job)
    for node in (0, 2, 3):
        job.offer(node, at)
    assert not job.told(r.Agree)
    job.offer(1, at)
    assert job.told(r.Agree)[-1].generation == at


def test_a_drained_node_that_dies_on_the_way_out_is_an_ordinary_loss() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    job.take(job.core.drain(1, job.now)[1])
    at = hold(job)
    job.lose(1)
    assert job.core.epoch == 2
    job.recover(at)
    assert job.core.phase is Phase.RUNNING and job.core.nodes[1].role == "lost"


def test_a_drain_whose_spare_dies_is_called_off_and_training_goes_on() -> None:
    job = SimulatedJob(nodes=4, spares=1).train()
    job.iterate(4)
    before = list(job.core.assignment)
    job.take(job.core.drain(1, job.now)[1])
    job.lose(3)
    assert job.core.epoch == 0, "nobody needs the spare yet"
    at = hold(job)
    (stays,) = job.events("stays")
    assert stays["node"] == 1 and job.core.epoch == 1 and job.core.assignment == before
    job.recover(at)
    assert job.core.phase is Phase.RUNNING and job.core.nodes[1].role == "active" and job.finish is None
    assert "deadpool join" in job.core.drain(1, job.now)[0]


def test_a_rank_past_the_boundary_costs_a_drain_an_iteration_but_not_the_job() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    job.take(job.core.drain(1, job.now)[1])
    job.feed(r.NodeHeld(0, 0, 9, True))
    assert job.told(r.Declare)[-1].replaced == [2, 3]


def test_a_drain_that_nobody_heeds_ends_in_an_ordinary_recovery() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    job.take(job.core.drain(1, job.now)[1])
    job.wait(120.0)
    assert job.told(r.Declare)[-1].replaced == [2, 3]


def test_what_cannot_be_drained_is_refused_with_the_reason() -> None:
    job = SimulatedJob(nodes=3, spares=0).train()
    assert "deadpool join" in job.core.drain(1, job.now)[0] and not job.core.cannot_drain(1)[1]
    assert "there is no node 9" in job.core.drain(9, job.now)[0] and not job.core.cannot_drain(9)[1]
    job = SimulatedJob().train()
    job.lose(1)
    assert "not now" in job.core.drain(0, job.now)[0] and "lost already" in job.core.drain(1, job.now)[0]
    assert job.core.cannot_drain(0)[1], "it may be asked again when the recovery is over"


def test_a_drain_may_be_asked_for_again_while_a_spare_is_starting() -> None:
    job = SimulatedJob(nodes=3, spares=0).train()
    _, number, actions = job.core.add_spare("", job.now)
    job.take(actions)
    for step in (lambda: None, lambda: job.join([number])):
        step()
        why, later = job.core.cannot_drain(1)
        assert "one is starting" in why and later and job.core.drain(1, job.now) == (why, [])
    job.park([number])
    assert job.core.cannot_drain(1) == ("", False)


def test_a_spare_is_drained_at_once() -> None:
    job = SimulatedJob().train()
    job.take(job.core.drain(3, job.now)[1])
    assert job.core.nodes[3].role == "left" and job.told(r.Stop, node=3)[0].code == Exit.OK
    assert not job.told(r.Declare)


def test_the_others_hear_of_a_node_that_is_gone_without_an_epoch_at_once_or_when_they_are_back() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.take(job.core.drain(3, job.now)[1])
    job.lose(4)
    assert [record.nodes for record in job.told(r.Departed)] == [[3], [4]] and not job.told(r.Declare)
    job.join([1])
    assert job.told(r.Departed, node=1)[-1].nodes == [3, 4]


# ---- join


def test_a_node_that_joins_gets_a_number_nobody_had_and_is_a_spare_once_it_is_parked() -> None:
    job = SimulatedJob().train()
    job.lose(1)
    job.recover()
    error, node, actions = job.core.add_spare("", job.now)
    job.take(actions)
    assert (error, node) == ("", 4)
    job.join([4])
    assert job.told(r.Roster, node=4)[0].epoch == 1
    job.park([4])
    job.lose(2)
    assert job.told(r.Declare)[-1].assignment[4:6] == [SlotAddress(4, 0), SlotAddress(4, 1)]


def test_a_node_that_said_it_would_join_and_does_not_is_forgotten() -> None:
    job = SimulatedJob().train()
    _, node, actions = job.core.add_spare("", job.now)
    job.take(actions)
    job.wait(200.0)
    assert job.core.nodes[node].role == "lost" and job.core.phase is Phase.RUNNING and not job.told(r.Declare)


# ---- stuck


def test_a_stuck_rank_is_ended_and_made_good_and_those_that_wait_for_it_are_left_alone() -> None:
    job = SimulatedJob().train()
    for rank in (0, 1, 3, 4, 5):
        node = job.core.assignment[rank].node
        job.feed(r.Stalled(0, node, rank, 5, 30.0, "waiting"))
    job.feed(r.Stalled(0, 1, 2, 5, 30.0, "busy"))
    assert not job.told(r.EndStuck)
    job.wait(5.0)
    assert job.told(r.EndStuck) == [r.EndStuck(0, 2)] and job.sent[-1].node == 1
    job.feed(r.WorkerExited(1, 0, 2, 9, -9))
    job.recover()
    assert job.core.phase is Phase.RUNNING


@pytest.mark.parametrize("others", ["waiting", "busy"])
@pytest.mark.parametrize("state", ["silent", "busy"])
@pytest.mark.parametrize("spares", [0, 1])
def test_when_all_ranks_of_a_node_stand_still_they_are_made_good_together_and_their_node_stays(
    others: Any, state: Any, spares: int
) -> None:
    """As when its disk hangs, or an operator stops them; the others wait, on a device or in a communication."""
    job = SimulatedJob(nodes=3 + spares, spares=spares).train()
    here = [rank for rank in range(6) if job.core.assignment[rank].node == 1]
    for rank in {*range(6)} - {*here}:
        job.feed(r.Stalled(0, job.core.assignment[rank].node, rank, 5, 30.0, others))
    for rank in here:
        job.feed(r.Stalled(0, 1, rank, 5, 30.0, state))
    job.wait(5.0)
    if (state, others) == ("busy", "busy"):  # nobody can be told from those that wait
        assert job.told(r.Declare)[-1].replaced == [] and not job.told(r.EndStuck)
        return
    assert job.told(r.EndStuck) == [r.EndStuck(0, rank) for rank in here]
    assert {message.node for message in job.sent[-2:]} == {1}
    for local, rank in enumerate(here):
        job.feed(r.WorkerExited(1, local, rank, 9 + local, -9))
    job.recover()
    assert (
        job.core.phase is Phase.RUNNING and not job.core.nodes[1].gone and len(job.core.nodes[1].record.failures) == 1
    )
    assert job.core.nodes[1].role == ("spare" if spares else "active")


def test_a_stuck_rank_is_named_again_when_nobody_has_heard_of_it() -> None:
    job = SimulatedJob().train()
    for _ in range(9):
        job.feed(r.Stalled(0, 1, 2, 5, 30.0, "busy"))
        job.wait(5.0)
    assert job.told(r.EndStuck) == [r.EndStuck(0, 2)] * 2


def test_a_communication_nobody_gets_out_of_is_formed_again_with_everybody() -> None:
    job = SimulatedJob().train()
    for rank in range(6):
        job.feed(r.Stalled(0, job.core.assignment[rank].node, rank, 5, 30.0, "waiting"))
    job.wait(1.0)
    assert job.told(r.Declare)[-1].replaced == [] and not job.told(r.EndStuck)


def test_a_rank_that_looks_stuck_when_training_ends_keeps_the_coordinator_from_no_rest() -> None:
    job = SimulatedJob().train()
    job.feed(r.Stalled(0, 1, 2, 5, 30.0, "busy"))
    for node in job.active:
        job.feed(r.Finished(0, node))
    assert job.core.phase is Phase.FINISHING and job.core.next_deadline() is None


def test_a_node_that_is_drained_before_it_has_joined_is_not_waited_for() -> None:
    job = SimulatedJob().train()
    _, number, actions = job.core.add_spare("", job.now)
    job.take(actions)
    job.take(job.core.drain(number, job.now)[1])
    assert job.core.nodes[number].role == "left" and job.core.next_deadline() is None


# ---- a coordinator that starts again


def restarted(job: SimulatedJob, settled: bool = True, come_back: bool = True) -> SimulatedJob:
    """A new coordinator that knows what the old one kept, and the agents that come back to it."""
    kept = json.loads(json.dumps(job.core.dump()))
    core = Core(job.core.job)
    job.core = core
    job.take(core.restored(kept, job.now))
    if come_back:
        all_come_back(job, settled)
    return job


def test_agents_have_time_to_notice_that_the_machine_of_the_coordinator_is_gone() -> None:
    """Their pings find it within two leases, where a new coordinator may be there after less than one."""
    job = SimulatedJob().train()
    lease = 30.0
    job.core.job = replace(job.core.job, deadlines=replace(DEADLINES, lease=lease))
    restarted(job, come_back=False)
    job.wait(2 * lease)
    all_come_back(job)
    job.wait(lease)
    assert not job.events("detected") and job.core.phase is Phase.RUNNING


def test_the_end_of_a_process_counts_once_whoever_is_told_of_it_again() -> None:
    """An agent tells each coordinator of workers that have ended; counted each time, its healthy node would be lost."""
    job = SimulatedJob(spares=0, nodes=3).train()
    job.commit(5)
    gone = r.WorkerExited(0, 0, 0, 0, -9, 0)
    job.feed(gone)
    deaths = job.core.nodes[0].record.deaths(job.core.members.unix_s)
    for _ in range(2):
        restarted(job)
        job.feed(gone)
    assert job.core.nodes[0].record.deaths(job.core.members.unix_s) == deaths == 1


def test_a_machine_that_comes_back_under_a_new_number_is_in_its_rack_again() -> None:
    domains = parse_domains("0-1=r1,2-3=r2")
    job = SimulatedJob(nodes=5, spares=1, slots=1, domains=domains).train()
    job.lose(2)
    job.recover()
    _, number, actions = job.core.add_spare("host", job.now, was=2)
    job.take(actions)
    job.join([number])
    job.park([number])
    for core in (job.core, restarted(job).core):
        assert core.protection.labels(number) == {"rack": "r2"}


def all_come_back(job: SimulatedJob, settled: bool = True) -> None:
    core = job.core
    for node, state in core.nodes.items():
        if not state.gone:
            slots = range(core.job.slots_per_node)
            pids = [10 * node + i for i in slots]
            job.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, pids, {}, core.epoch, settled))
    job.park()


def test_an_error_of_the_last_save_that_a_new_coordinator_hears_again_is_no_bug_of_training() -> None:
    """Found by the simulation: it ended the job with 79, and nothing was made durable."""
    job = SimulatedJob().train()
    job.lose(1)
    job.recover()
    job.lose(0)
    for new_coordinator in (False, True):
        assert job.finish is None and job.told(r.Declare)[-1].purpose == "save"
        job.arrive(7)
        job.prepare()
        job.form()
        job.restore()
        if new_coordinator:
            restarted(job, come_back=False)
        slot, epoch = job.core.assignment[5], job.core.epoch
        job.feed(
            r.WorkerFailed(slot.node, slot.local, 5, "training", epoch, 7, 0, "OSError", "save.py", "no space left", "")
        )
        job.feed(r.WorkerExited(slot.node, slot.local, 5, 50 + epoch, 1, epoch))
    assert job.finish is None, "it is not the moment to decide: agents come back"
    all_come_back(job)
    code, message = job.end
    assert code == Exit.NO_SPARE and "rank 5 raised the same error again: no space left" in message


def test_who_had_left_before_the_coordinator_died_is_not_waited_for() -> None:
    job = SimulatedJob().train()
    for node in job.active:
        job.feed(r.Finished(0, node))
    workers = [(slot.node, slot.local, rank) for rank, slot in enumerate(job.core.assignment)]
    for node, local, rank in workers[:3]:
        job.feed(r.WorkerExited(node, local, rank, 10 * node + local, 0, 0))
    restarted(job)
    assert job.finish is None and job.core.phase is Phase.FINISHING
    for node, local, rank in workers[3:]:
        job.feed(r.WorkerExited(node, local, rank, 10 * node + local, 0, 0))
    assert job.end[0] == Exit.OK


def test_the_end_is_not_looked_for_while_agents_come_back() -> None:
    """One of them may have lost a worker, for which nobody would wait in vain then."""
    job = SimulatedJob().train()
    job.commit(3)
    restarted(job, come_back=False)
    first = job.active[0]
    job.feed(r.Join(first, 1000 + first, "127.0.0.1", 2000 + first, [], {}, 0, True))
    job.feed(r.WorkerExited(first, 0, 0, 10 * first, -9, 0))
    for node in job.active:
        job.feed(r.Finished(0, node))
    assert job.core.phase is Phase.RUNNING
    all_come_back(job)
    assert job.told(r.Declare)[-1].replaced == [0] and not job.told(r.AllFinished)


def test_the_time_for_a_spare_is_not_over_while_one_that_may_join_is_on_its_way() -> None:
    job = SimulatedJob(spares=0, wait_for_spare_s=20.0).train()
    job.commit(3)
    job.lose(1)
    job.arrive(3)
    job.wait(15.0)
    _, number, actions = job.core.add_spare("", job.now)
    job.take(actions)
    job.wait(10.0)
    assert job.finish is None and job.core.epoch == 1
    job.join([number])
    job.park([number])
    assert job.told(r.Declare)[-1].purpose == "resume" and number in job.active


def test_training_does_not_notice_that_the_coordinator_was_away() -> None:
    job = SimulatedJob().train()
    job.commit(3)
    restarted(job)
    job.wait(10 * DEADLINES.lease)
    assert job.core.phase is Phase.RUNNING and job.core.epoch == 0 and not job.told(r.Declare)
    job.lose(1)
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.core.epoch == 1


def test_a_node_that_comes_back_late_hears_what_was_told_of_commits_without_it() -> None:
    """Else it would keep slots for ever that nobody waits for, and no generation would be committed any more."""
    job = SimulatedJob().train()
    job.commit(5)
    restarted(job, come_back=False)
    back = [r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [], {}, 0, True) for node in job.core.nodes]
    for join in back[:2]:
        job.feed(join)
    job.feed(r.Committed(0, 0, 6))
    job.feed(r.Committed(0, 1, 5))  # it has skipped 6, or has it on the way: both are given a floor to meet at
    assert not job.told(r.CommittedTo)[1:], "what the third was told before may still count"
    job.feed(back[2])
    (told,) = job.told(r.CommittedTo)[-1:]
    assert told.floor > 6
    job.sent.clear()
    job.feed(back[2])  # its connection was reset
    assert job.told(r.CommittedTo, back[2].node) == [told]


def test_iterations_that_ended_while_the_coordinator_was_away_are_told_when_a_node_is_back() -> None:
    job = SimulatedJob().train()
    job.commit(3)
    restarted(job, come_back=False)
    for node in job.core.nodes:
        job.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [], {}, 0, True, iteration=9 if node == 2 else -1))
    assert job.core.iteration == 9


def test_a_node_whose_connection_was_replaced_in_a_recovery_has_missed_it() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.commit(1)
    job.lose(1)
    assert job.core.epoch == 1
    job.feed(r.Join(3, 1003, "127.0.0.1", 2003, [], {}, 0, True))  # the spare that takes over
    assert job.core.epoch == 2 and "node 3 was away" in job.events("declared")[-1]["reason"]
    job.feed(r.Join(4, 1004, "127.0.0.1", 2004, [], {}, 0, True))  # one that is not needed
    assert job.core.epoch == 2
    job.recover()
    job.feed(r.Join(3, 1003, "127.0.0.1", 2003, [], {}, 2, True))
    assert job.core.epoch == 2 and job.core.phase is Phase.RUNNING


def _replaced_connection(job: SimulatedJob, node: int, settled: bool = True) -> None:
    """The agent is there again before the end of its connection is noticed: what went over that is lost."""
    job.sent.clear()
    job.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [], {}, job.core.epoch, settled))


def test_a_node_whose_connection_was_replaced_at_the_end_hears_that_all_have_finished() -> None:
    """Its workers wait for that without a deadline."""
    job = SimulatedJob().train()
    for node in job.active:
        job.feed(r.Finished(0, node))
    _replaced_connection(job, 2)
    assert job.told(r.AllFinished, 2) == [r.AllFinished(0)]


def test_a_node_that_trains_again_is_not_late_when_it_has_said_so_over_a_connection_that_had_ended() -> None:
    job = SimulatedJob().train()
    job.commit(5)
    job.lose(1)
    job.arrive()
    job.prepare()
    job.form()
    job.restore()
    for node in (0, 3):
        job.feed(r.NodeResumed(1, node, 5))
    _replaced_connection(job, 2)
    assert job.core.epoch == 2 and job.core.nodes[2].role == "active"


def test_a_node_whose_connection_was_replaced_at_the_start_hears_again_who_keeps_what() -> None:
    job = SimulatedJob().train()
    (placement,) = job.told(r.Placement)
    _replaced_connection(job, 2)
    assert job.told(r.Placement, 2) == [placement]
    job.lose(1)
    job.recover()
    _replaced_connection(job, 2)
    assert not job.told(r.Placement), "an epoch's declaration has it"


def test_a_spare_that_is_asked_for_what_it_has_has_its_time_however_late_the_others_were() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.commit(5)
    job.lose(1)
    job.wait(DEADLINES.abort - 1.0)
    for node in (0, 2, 3):
        job.offer(node, 4)  # generation 5 is committed
    assert job.told(r.Declare, 4)
    job.wait(DEADLINES.abort - 2.0)
    assert job.core.nodes[4].role == "spare" and job.core.epoch == 1
    job.offer(4, 4)
    assert job.told(r.Agree)


def test_a_spare_that_is_asked_and_whose_connection_ended_meanwhile_is_not_waited_for_in_vain() -> None:
    for away in (False, True):
        job = SimulatedJob(nodes=5, spares=2).train()
        job.commit(5)
        job.lose(1)
        for node in (0, 2, 3):
            job.offer(node, 4)
        assert job.told(r.Declare, 4)
        if away:  # the coordinator stood still
            job.take(job.core.node_away(4, job.now))
        _replaced_connection(job, 4)
        assert job.core.epoch == 2 and job.core.nodes[4].role == "spare"


def test_what_one_node_was_told_as_committed_stays_so_for_all_when_the_coordinator_has_died_of_it() -> None:
    """The one has freed what was before, the others wait with both: with a floor alone they keep different ones."""
    job = SimulatedJob().train()
    job.commit(5)
    restarted(job, come_back=False)
    for node in job.core.nodes:
        kept = (0, 6) if node == 1 else (0, 5)
        job.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [], {}, 0, True, kept=kept))
        if node < 3:
            job.feed(r.Committed(0, node, 8 if node == 1 else 6))
    told = job.told(r.CommittedTo)[-1]
    assert tuple(told.kept or ()) == (0, 6) and told.floor >= 6 and job.core.committed == 6


def test_deaths_that_are_days_apart_do_not_make_a_bad_node() -> None:
    """A job goes on for months. A coordinator that starts again knows when each was."""
    job = SimulatedJob(nodes=3, spares=0).train()
    most = job.core.job.worker_deaths
    for pid in range(3 * most):
        job.now += 24 * 3600.0 / most
        job.feed(r.WorkerExited(2, 1, 5, 70 + pid, -9, pid))
        job.recover()
    assert job.core.nodes[2].role == "active"
    restarted(job)
    job.now += 9 * 3600.0
    job.feed(r.WorkerExited(2, 1, 5, 98, -9, job.core.epoch))
    job.recover()
    assert job.core.nodes[2].role == "active", "the one before the last two is a day old"
    job.now += 3600.0
    job.feed(r.WorkerExited(2, 1, 5, 99, -9, job.core.epoch))
    assert job.core.nodes[2].role == "lost" and "its workers ended 4 times" in job.events("detected")[-1]["cause"]


def test_ends_of_processes_count_once_and_only_for_the_coordinate_they_have() -> None:
    """Node 1 has not heard that its coordinates are node 4's: it renews those processes when it does."""
    job = SimulatedJob(nodes=5, spares=2).train()
    ends = [r.WorkerExited(1, local, 2 + local, 70 + local, -9) for local in range(2)]
    job.feed(ends[0])
    assert job.core.nodes[1].role == "spare" and len(job.core.nodes[1].record.failures) == 1
    restarted(job, come_back=False)
    job.sent.clear()
    for node in job.core.nodes:
        job.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [], {}, 0, False))
        for end in ends if node == 1 else ():
            job.feed(end)
    assert len(job.core.nodes[1].record.failures) == 1 and not job.told(r.Respawn) and job.core.epoch == 2


def test_the_end_of_a_process_whose_number_another_one_had_in_its_slot_counts() -> None:
    job = SimulatedJob().train()
    for count in (1, 2):
        job.feed(r.WorkerExited(3, 0, None, 70, -9))
        assert len(job.told(r.Respawn, 3)) == count
        job.feed(r.WorkerReady(3, 0, 70))


def test_an_end_that_was_decided_is_the_end_whatever_comes_after_the_coordinator_has_died_of_it() -> None:
    job = SimulatedJob(nodes=3, spares=0).train()
    job.lose(1)
    assert job.finish is not None
    code, message = job.finish.code, job.finish.message
    job.finish = None
    restarted(job, come_back=False)
    job.feed(r.Join(0, 1000, "127.0.0.1", 2000, [], {}, 0, True))
    job.feed(r.WorkerExited(0, 0, 0, 70, 1))
    assert (job.finish.code, job.finish.message) == (code, message)


def test_a_node_that_has_said_that_it_joins_is_waited_for() -> None:
    job = SimulatedJob(nodes=3, spares=0).train()
    job.commit(1)
    _, number, actions = job.core.add_spare("", job.now)
    job.take(actions)
    job.lose(1)
    assert job.events("waiting") and job.finish is None
    job.join([number])
    assert job.active == [0, number, 2] and job.told(r.Declare)[-1].purpose == "resume"
    job = SimulatedJob(nodes=3, spares=0).train()
    job.commit(1)
    job.take(job.core.add_spare("", job.now)[2])
    job.lose(1)
    job.arrive()
    job.wait(2 * DEADLINES.join)
    assert len(job.told(r.Declare)) == 2 and job.finish is not None, "it has not come"


def test_who_hears_of_a_drain_too_late_is_not_waited_for_until_the_end_of_an_abort() -> None:
    job = SimulatedJob().train()
    job.commit(4)
    job.iterate(4)
    drain(job, 1)
    iteration = job.told(r.Hold)[-1].iteration
    job.feed(r.NodeHeld(0, 0, iteration, False))
    job.wait(1)
    assert not job.told(r.Declare)
    job.wait(2)
    assert job.told(r.Declare)[-1].reason == "node 1 is drained" and job.active == [0, 3, 2]


def test_all_hold_still_soon_also_where_training_went_far_back() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.commit(5)
    job.iterate(20)
    job.lose(1)
    job.recover()
    job.park()
    drain(job, 0)
    assert 5 < job.told(r.Hold)[-1].iteration < 15
    drained = SimulatedJob(nodes=5, spares=2).train()
    drained.iterate(20)
    drain(drained, 0)
    assert drained.told(r.Hold)[-1].iteration > 20


def test_who_has_said_that_it_joins_and_is_late_makes_the_wait_no_longer() -> None:
    job = SimulatedJob(nodes=3, spares=0, wait_for_spare_s=1.0).train()
    job.commit(1)
    job.take(job.core.add_spare("", job.now)[2])
    job.wait(DEADLINES.join - 10)
    job.lose(1)
    job.offer(0)
    job.offer(2)
    job.wait(9)
    assert job.core.phase is Phase.WAITING
    job.wait(2)
    assert job.told(r.Declare)[-1].purpose == "save"


def test_nobody_waits_for_a_spare_when_no_node_is_left_that_keeps_state() -> None:
    job = SimulatedJob(nodes=2, spares=0, wait_for_spare_s=600.0).train()
    job.commit(1)
    job.lose(0)
    assert job.core.phase is Phase.ARRIVING and job.finish is None
    job.lose(1)
    assert job.finish is not None and job.finish.code == Exit.NO_SPARE


def test_a_drained_node_comes_back_when_its_spare_is_of_no_use() -> None:
    job = SimulatedJob().train()
    job.commit(1)
    job.take(job.core.drain(1, job.now)[1])
    for node in job.active:
        job.feed(r.NodeHeld(0, node, 3, missed=False))
    assert job.active == [0, 3, 2] and job.core.nodes[1].role == "leaving"
    job.feed(r.FetchFailed(1, 3, 2, 1, 1, "no room", own=True))
    assert job.active == [0, 1, 2] and job.events("stays")[-1]["node"] == 1 and job.finish is None


def test_a_recovery_the_coordinator_died_in_begins_again_under_a_new_epoch() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.lose(1)
    job.arrive()
    restarted(job, settled=False)
    assert job.core.epoch == 2 and job.core.phase is Phase.ARRIVING
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.active == [0, 3, 2]


def test_a_node_that_died_while_the_coordinator_was_away_is_found_out() -> None:
    job = restarted(SimulatedJob().train(), come_back=False)
    for node in (0, 2, 3):
        job.feed(r.Join(node, 1, "h", 1, [1, 2], {}, 0, True))
    job.park([3])
    job.wait(30.0)
    assert job.core.nodes[1].role == "lost" and job.told(r.Declare)[-1].replaced == [2, 3]


def test_no_epoch_is_told_before_it_is_kept() -> None:
    job = SimulatedJob().train()
    actions = job.core.node_lost(1, "gone", job.now)
    order = [a for a in actions if isinstance(a, Keep) or (isinstance(a, Send) and isinstance(a.record, r.Declare))]
    assert isinstance(order[0], Keep) and order[0].parts["members"]["epoch"] == 1 and isinstance(order[-1], Send)


def test_a_job_that_was_finishing_finishes() -> None:
    job = SimulatedJob().train()
    for node in (0, 1, 2):
        job.feed(r.Finished(0, node))
    restarted(job)
    assert job.told(r.AllFinished)[-1] == r.AllFinished(0) and len(job.told(r.AllFinished)) == 2


def test_what_was_done_once_is_told_with_the_agreed_generation_even_by_a_new_coordinator() -> None:
    job = SimulatedJob().train()
    job.feed(r.SideEffect(2, 5, 0, 4, "evaluation"))
    restarted(job)
    job.lose(1)
    job.arrive()
    assert job.told(r.Agree)[-1].done == {"evaluation": 4}
    job.feed(r.SideEffect(2, 5, 0, 4, "evaluation"))  # an agent that is there again tells what nobody may know
    assert len([e for e in job.emitted if isinstance(e, Emit) and e.event == "evaluation"]) == 1


def test_a_failure_seen_while_agents_come_back_is_declared_when_all_of_them_can_hear_it() -> None:
    job = restarted(SimulatedJob().train(), come_back=False)
    job.feed(r.Join(0, 1, "h", 1, [1, 2], {}, 0, True))
    job.feed(r.WorkerExited(0, 0, 0, 1, -9))
    assert not job.told(r.Declare) and job.core.phase is Phase.RUNNING
    for node in (1, 2, 3):
        job.feed(r.Join(node, 1, "h", 1, [1, 2], {}, 0, True))
    (declared,) = job.told(r.Declare)
    assert declared.epoch == 1 and "rank 0 ended" in declared.reason


def test_a_node_is_not_drained_while_agents_come_back_it_may_have_shards_to_give() -> None:
    job = SimulatedJob().train()
    job.park()
    job.feed(r.WorkerExited(0, 0, 0, 1, -9))  # node 0 gives way to the spare: healthy, with shards of its coordinates
    restarted(job, come_back=False)
    error, actions = job.core.drain(0, job.now)
    assert "the coordinator has just come back" in error and not actions


def test_a_node_that_was_about_to_join_joins_the_new_coordinator_and_hides_no_loss() -> None:
    job = SimulatedJob().train()
    _, number, actions = job.core.add_spare("", job.now)
    job.take(actions)
    restarted(job, come_back=False)
    job.feed(r.Join(number, 1, "h", 1, [1, 2], {}, 0, True))
    assert len(job.events("started")) == 1 and job.events("joined")[-1]["node"] == number
    for node in (0, 2, 3):
        job.feed(r.Join(node, 1, "h", 1, [1, 2], {}, 0, True))
    job.park([3])
    job.wait(30.0)
    assert job.core.nodes[1].role == "lost" and job.told(r.Declare)[-1].replaced == [2, 3]


def drain(job: SimulatedJob, node: int) -> None:
    error, actions = job.core.drain(node, job.now)
    assert not error
    job.take(actions)


def test_a_drain_goes_on_with_a_coordinator_that_has_started_again() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    restarted(job, come_back=False)
    job.wait(1.0)
    assert len(job.told(r.Hold)) == 1, "not before all of them can hear it"
    all_come_back(job)
    job.wait(0.0)
    assert len(job.told(r.Hold)) == 2
    at = hold(job)
    job.recover(at)
    assert job.core.nodes[1].role == "left" and len(job.told(r.Declare)) == 1


@pytest.mark.parametrize("told", [True, False], ids=["told another iteration", "not told anything"])
def test_who_holds_still_for_the_coordinator_before_stands_still_no_longer_for_the_next_one(told: bool) -> None:
    """Others may be past that iteration already."""
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    restarted(job)
    if told:
        job.wait(0.0)
    job.feed(r.NodeHeld(0, 0, job.told(r.Hold)[0].iteration, False))
    assert job.told(r.Declare)[-1].replaced == [2, 3] and len(job.told(r.Hold)) == 1 + told
    job.recover()
    assert job.core.nodes[1].role == "left"


def test_nodes_that_hold_still_for_a_drain_that_no_coordinator_knows_are_set_free() -> None:
    job = SimulatedJob().train()
    job.feed(r.NodeHeld(0, 0, 7, False))
    assert job.told(r.Declare)[-1].replaced == []
    job.recover()
    assert job.core.phase is Phase.RUNNING


def test_a_drain_that_waits_for_a_rehearsal_goes_on_with_a_coordinator_that_has_started_again() -> None:
    job = SimulatedJob(rehearsals=1).train()
    drain(job, 1)
    restarted(job)
    job.wait(0.0)
    assert [s.node for s in job.sent if isinstance(s.record, r.Rehearse)] == [3, 3] and not job.told(r.Hold)
    job.feed(r.Rehearsed(3, [2, 3]))
    job.wait(0.0)
    hold(job)
    assert job.told(r.Declare)[-1].replaced == [2, 3]


def test_a_drain_goes_on_after_a_recovery_that_replaces_another_node() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.iterate(4)
    drain(job, 1)
    job.lose(2)
    job.wait(10.0)
    assert job.active == [0, 1, 3] and len(job.told(r.Hold)) == 1
    job.recover()
    job.wait(0.0)
    hold(job)
    assert job.active == [0, 4, 3]
    job.recover()
    assert job.core.nodes[1].role == "left" and not job.events("stays")


def test_a_drain_goes_on_when_the_coordinator_dies_in_the_recovery_that_came_between() -> None:
    job = SimulatedJob(nodes=5, spares=2).train()
    job.iterate(4)
    drain(job, 1)
    job.lose(2)
    restarted(job, settled=False)
    job.recover()
    job.wait(0.0)
    assert job.told(r.Hold)[-1].epoch == job.core.epoch == 2


def test_a_drain_whose_spare_takes_another_place_is_called_off_with_one_line() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    job.lose(2)
    job.recover()
    job.wait(0.0)
    assert job.events("stays") == [{"epoch": 1, "node": 1, "cause": "no parked spare is left to take over"}]
    assert len(job.told(r.Declare)) == 1 and job.core.next_deadline() is None


def test_a_drain_waits_for_its_spare_whose_worker_starts_again() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    job.feed(r.WorkerExited(3, 0, None, 30, -9))
    at = hold(job)
    assert job.told(r.Declare)[-1].replaced == [], "nobody holds still for that"
    job.recover(at)
    job.wait(100.0)
    assert len(job.told(r.Hold)) == 1
    job.feed(r.WorkerReady(3, 0, 31))
    job.wait(0.0)
    hold(job)
    assert job.told(r.Declare)[-1].replaced == [2, 3] and not job.events("stays")


def test_a_node_that_gives_way_before_it_is_drained_leaves_when_nobody_needs_its_shards() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    job.feed(r.WorkerExited(1, 0, 2, 10, -9))
    job.wait(1.0)
    assert job.core.nodes[1].role == "spare"
    job.recover()
    job.wait(0.0)
    assert job.events("left")[-1]["node"] == 1 and job.told(r.Stop, node=1)[0].code == Exit.OK


def test_a_drain_that_training_does_not_wait_for_is_called_off() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    for node in job.active:
        job.feed(r.Finished(0, node))
    assert job.core.phase is Phase.FINISHING and job.events("stays")[0]["cause"] == "training has finished"


def test_a_drained_node_that_did_not_hear_that_it_may_leave_hears_it_from_the_next_coordinator() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    at = hold(job)
    job.recover(at)
    restarted(job)
    before = len(job.events("left"))
    job.feed(r.Join(1, 1, "h", 1, [1, 2], {}, 1, True))
    assert job.told(r.Stop, node=1)[-1].code == Exit.OK and len(job.events("left")) == before + 1


def test_a_placement_nobody_heard_since_the_coordinator_died_is_told_again() -> None:
    job = SimulatedJob().train()
    before = job.told(r.Placement)
    restarted(job)
    assert len(before) == 1 and job.told(r.Placement) == before * 2
    job.lose(1)
    job.recover()
    restarted(job)
    assert len(job.told(r.Placement)) == 2, "an epoch's declaration has it"


# ---- waiting for a spare


def _waiting() -> SimulatedJob:
    job = SimulatedJob(nodes=3, spares=0, wait_for_spare_s=600.0).train()
    job.commit(5)
    job.lose(1)
    assert job.core.phase is Phase.ARRIVING and job.core.epoch == 1 and job.told(r.Declare)[0].purpose == "resume"
    for node in (0, 2):
        job.offer(node)
    assert job.core.phase is Phase.WAITING and not job.told(r.Agree) and job.events("waiting")[0]["lost"] == [1]
    return job


def test_without_a_spare_the_others_keep_their_state_and_wait_for_one() -> None:
    job = _waiting()
    job.wait(300)
    error, node, actions = job.core.add_spare("host", job.now)
    job.take(actions)
    assert (error, node) == ("", 3)
    job.join([3])
    assert job.core.epoch == 2 and job.active == [0, 3, 2]
    job.recover(5)
    assert job.core.phase is Phase.RUNNING and not job.events("stopped")
    job.lose(0)
    assert job.core.phase is Phase.ARRIVING and len(job.events("waiting")) == 2  # with a time of its own


def test_when_no_spare_comes_in_time_the_job_saves_and_ends_as_without_the_wait() -> None:
    job = _waiting()
    job.wait(599)
    assert job.core.phase is Phase.WAITING
    job.wait(2)
    assert job.told(r.Declare)[-1].purpose == "save" and job.core.epoch == 2


def test_a_coordinator_that_starts_again_waits_for_a_spare_no_longer_than_the_one_before() -> None:
    job = _waiting()
    job.wait(300)
    restarted(job, settled=False)
    for node in (0, 2):
        job.offer(node)
    assert job.core.phase is Phase.WAITING and job.core.epoch == 2
    assert [round(e["minutes"], 3) for e in job.events("waiting")] == [10.0, 5.0]
    job.wait(298)
    assert job.core.phase is Phase.WAITING
    job.wait(3)
    assert job.told(r.Declare)[-1].purpose == "save"


def test_another_loss_while_a_spare_is_waited_for_makes_the_wait_no_longer() -> None:
    job = _waiting()
    job.wait(300)
    job.lose(2)
    assert job.core.epoch == 2 and job.core.phase is Phase.ARRIVING
    job.offer(0)
    job.take(job.core.add_spare("host", job.now)[2])
    job.join([3])
    assert job.core.phase is Phase.WAITING  # one is too few
    job.wait(301)
    assert job.told(r.Declare)[-1].purpose == "save"


def test_a_spare_that_comes_after_the_wait_and_is_too_few_makes_it_no_longer() -> None:
    job = _waiting()
    job.wait(300)
    job.lose(2)
    job.offer(0)
    job.wait(299)
    job.take(job.core.add_spare("host", job.now)[2])
    job.wait(2)
    assert job.core.phase is Phase.WAITING  # it has said that it comes
    job.join([3])
    job.wait(1)
    assert job.told(r.Declare)[-1].purpose == "save"


def _connects_again(job: SimulatedJob, node: int) -> None:
    job.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [10 * node, 10 * node + 1], epoch=job.core.epoch))


def test_a_connection_that_ends_and_comes_again_does_not_end_the_wait_for_a_spare_that_comes() -> None:
    job = _waiting()
    job.wait(590)
    job.take(job.core.add_spare("host", job.now)[2])
    job.wait(20)
    assert job.core.phase is Phase.WAITING
    job.take(job.core.node_away(2, job.now))
    _connects_again(job, 2)
    assert job.told(r.Declare)[-1].purpose == "resume"


def test_a_node_that_leaves_while_its_agent_is_away_is_not_waited_for() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    hold(job)
    job.take(job.core.node_away(1, job.now))
    job.recover()
    assert job.core.nodes[1].role == "left" and not job.core.awaits(1)


def test_who_connects_again_hears_that_all_are_to_hold_still() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    job.take(job.core.node_away(2, job.now))
    _connects_again(job, 2)
    holds = [s for s in job.sent if isinstance(s.record, r.Hold)]
    assert [s.node for s in holds] == [None, 2] and holds[0].record == holds[1].record


def test_nobody_is_told_to_hold_still_while_an_agent_is_away() -> None:
    job = SimulatedJob(rehearsals=1).train()
    drain(job, 1)
    job.take(job.core.node_away(2, job.now))
    job.feed(r.Rehearsed(3, [2, 3]))
    job.wait(0.0)
    assert not job.told(r.Hold)
    _connects_again(job, 2)
    job.wait(0.0)
    assert job.told(r.Hold)


def test_the_process_of_a_spare_is_begun_again_where_the_word_of_it_was_lost() -> None:
    job = SimulatedJob().train()
    gone = r.WorkerExited(3, 0, None, 30, -9)
    job.feed(gone)
    job.feed(gone)
    assert len(job.told(r.Respawn)) == 2


def test_of_several_nodes_that_hang_in_a_recovery_none_is_at_fault() -> None:
    job = SimulatedJob(nodes=4, spares=0).train()
    job.commit(5)
    job.take(job.core.inject(r.Fault("abort", -1, 0, None, 1, "", 0.0), job.now)[1])
    job.arrive()
    job.prepare()
    due = job.core.next_deadline()
    assert due is not None and job.core.phase is Phase.FORMING
    job.wait(due - job.now)
    assert job.told(r.KeepStacks)[-1].end
    restarted(job, settled=False)
    for node in range(4):
        job.feed(r.WorkerExited(node, 0, 2 * node, 10 * node, -9, 1))
    assert not any(state.record.failures for state in job.core.nodes.values())
    assert all("hung in a recovery" in event["cause"] for event in job.events("detected"))


# ---- a drain that is cancelled


def cancel(job: SimulatedJob, node: int) -> str:
    error, actions = job.core.cancel_drain(node, job.now)
    job.take(actions)
    return error


def test_a_drain_that_waits_for_a_spare_without_end_can_be_called_off() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    job.feed(r.WorkerExited(3, 0, None, 30, -9))  # the spare starts again
    hold(job)
    job.recover()
    job.wait(3600.0)
    assert job.core.drain_under_way == (1, "waits for a spare that is starting")
    epoch = job.core.epoch
    assert cancel(job, 1) == ""
    assert job.events("stays")[-1]["cause"] == "the drain was cancelled"
    assert job.core.epoch == epoch and job.core.drain_under_way is None
    job.feed(r.WorkerReady(3, 0, 31))
    job.wait(10.0)
    assert job.active == [0, 1, 2] and job.core.cannot_drain(2) == ("", False)


def test_nodes_that_hold_still_for_a_drain_that_is_cancelled_are_set_free() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    drain(job, 1)
    assert job.core.drain_under_way == (1, f"all hold still at iteration {job.told(r.Hold)[0].iteration}")
    job.feed(r.NodeHeld(0, 0, job.told(r.Hold)[0].iteration, False))
    assert cancel(job, 1) == ""
    assert job.told(r.Declare)[-1].replaced == [] and "cancelled" in job.told(r.Declare)[-1].reason
    job.feed(r.NodeHeld(0, 2, job.told(r.Hold)[0].iteration, False))
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.active == [0, 1, 2] and job.core.epoch == 1


def test_a_drain_is_cancelled_while_a_spare_rehearses_and_in_a_recovery_without_another_epoch() -> None:
    job = SimulatedJob(nodes=5, spares=2, rehearsals=1).train()
    drain(job, 1)
    assert job.core.drain_under_way == (1, "node 3 sets up what it does")
    assert cancel(job, 1) == "" and not job.told(r.Hold)
    drain(job, 1)
    job.lose(2)
    assert job.core.drain_under_way == (1, "waits until the job trains")
    assert cancel(job, 1) == ""
    job.recover()
    job.wait(10.0)
    assert job.core.epoch == 1 and job.core.nodes[1].role == "active" and not job.told(r.Hold)


def test_what_is_not_being_drained_or_is_replaced_already_cannot_be_called_off() -> None:
    job = SimulatedJob().train()
    job.iterate(4)
    assert cancel(job, 1) == "node 1 is not being drained"
    assert cancel(job, 9).startswith("there is no node 9")
    drain(job, 1)
    assert cancel(job, 2) == "node 2 is not being drained"
    hold(job)
    assert cancel(job, 1) == "node 1 is replaced already, and leaves when it has given its shards"
    job.recover()
    assert cancel(job, 1) == "node 1 has left already"
