"""The promise: without a spare a job goes on with as many replicas as its nodes can hold, from what is newest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.core.effects import Keep
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.durable import ShardFile
from simulated import DEADLINES, SimulatedJob


def job(nodes: int = 3, spares: int = 0, slots: int = 1, replica: int = 1, **more: Any) -> SimulatedJob:
    """Has committed generation 5."""
    spec = DurableSpec("/durable", "job", 100, resume=True)
    it = SimulatedJob(nodes, spares, slots, durable=spec, replica=replica, when_out_of_spares="shrink", **more)
    it.train()
    it.commit(5)
    return it


def drain(it: SimulatedJob, without: Sequence[int] = ()) -> None:
    """What a recovery does up to the start with fewer replicas; nobody holds the shards of ranks ``without``."""
    it.arrive()
    it.prepare()
    answer(it, without)


def answer(it: SimulatedJob, without: Sequence[int] = (), nodes: Sequence[int] | None = None) -> None:
    """All (or these) say what they hold of what the job begins with: two nodes hold each shard, and no other has it."""
    memory = it.core._durability.memory
    assert memory is not None
    ranks = range(len(memory.coordinates))
    there = [node for node in it.core.members.present() if it.core.nodes[node].agent_pid]
    for place, node in enumerate(there):
        held = [rank for rank in ranks if (rank - place) % len(there) < 2 and rank not in without]
        if nodes is None or node in nodes:
            it.feed(r.SetAside(it.core.epoch, node, held, []))


def write(it: SimulatedJob, error: str = "") -> None:
    """The drain under way comes to its end."""
    name = it.told(r.DrainShards)[-1].name
    for node in it.active:
        ranks = placing.ranks_of(it.core.assignment, node).values()
        shards = [ShardFile(rank, f"rank-{rank:05d}.safetensors", 100, "0", "layout") for rank in ranks]
        it.feed(r.ShardsDrained(node, name, [] if error else shards, error))
        if error:
            return
    seal = next(each for each in reversed(it.sent) if isinstance(each.record, r.SealGeneration))
    assert seal.node is not None
    it.feed(r.GenerationSealed(seal.node, name, "", []))


def begin(it: SimulatedJob) -> None:
    """The new start comes to its first iteration."""
    for rank in range(len(it.core.assignment)):
        it.register(rank)
    it.park()
    assert it.core.phase is Phase.RUNNING
    it.resume()
    it.written = it.core.epoch


def test_a_replica_leaves_with_the_node_that_nobody_replaces_and_the_others_begin_with_the_newest_generation() -> None:
    it = job()
    it.lose(1)
    declared = it.told(r.Declare)[-1]
    assert declared.purpose == "drain" and it.finish is None
    drain(it)
    assert it.finish is None and it.core.phase is Phase.STARTING and it.active == [0, 2]
    roster, resume = it.told(r.Roster)[-1], it.told(r.ResumeAt)[-1]
    assert roster.anew and len(roster.assignment) == 2 and roster.epoch == it.core.epoch == 2
    assert resume.generation == 5 and resume.recut == it.told(r.DrainShards)[-1].name
    (event,) = it.events("shrunk")
    assert (event["width"], event["was"], event["iteration"], event["lost"]) == (2, 3, 5, [1])
    begin(it)
    assert it.told(r.Placement)[-1].unique_bytes == [1 << 20] * 2 and it.events("training")[-1]["width"] == 2
    it.commit(6)
    assert it.core.committed == 6


def test_one_loss_after_the_other_costs_one_replica_each_down_to_one_and_then_the_job_ends() -> None:
    it = job()
    for width, node in ((2, 0), (1, 1)):
        it.lose(node)
        drain(it)
        assert len(it.active) == width
        begin(it)
        it.commit(5)
    assert it.told(r.Placement)[-1].groups == [[2, 2]]  # nobody else keeps its copies
    it.lose(2)
    code, message = it.end
    assert code == Exit.NO_SPARE and "generation 5 is durable" in message


def test_the_healthy_nodes_of_the_replica_that_leaves_are_spares_at_once_and_the_next_loss_is_a_swap() -> None:
    """Two pipelines of four nodes."""
    it = job(nodes=8, slots=1, replica=4)
    it.lose(3)  # of the second replica, with nodes 1, 5, and 7
    drain(it)
    assert it.active == [0, 2, 4, 6] and it.events("shrunk")[0]["spares"] == [1, 5, 7]
    begin(it)
    it.commit(5)
    it.lose(4)
    assert it.told(r.Declare)[-1].purpose == "resume" and it.active == [0, 2, 1, 6]
    it.recover()
    assert it.core.phase is Phase.RUNNING and len(it.events("shrunk")) == 1


def test_several_nodes_lost_at_once_cost_no_more_replicas_than_the_others_cannot_hold() -> None:
    it = job(nodes=9, spares=1, replica=2)
    (pair,) = (group for group in it.core.protection.groups if 0 in group)
    for node in (0, next(node for node in (1, 2, 3) if node not in pair)):  # of two replicas; one is replaced
        it.lose(node)
    drain(it)
    assert it.events("shrunk")[0]["width"] == 3 and len(it.active) == 6
    assert len(it.events("shrunk")[0]["spares"]) == 1


def test_nodes_hold_whole_replicas_and_are_full_or_the_job_ends() -> None:
    it = job(nodes=4, slots=2)  # two replicas a node
    it.lose(1)
    drain(it)
    assert it.events("shrunk")[0]["width"] == 6 and len(it.active) == 3
    it = job(nodes=3, slots=2, replica=3, can_rescue=False)  # one would take one node and a half
    it.lose(1)
    drain(it)
    assert it.end[0] == Exit.NO_SPARE


def test_a_node_lost_in_the_last_drain_or_in_the_new_start_costs_no_more_than_the_nodes_can_no_longer_hold() -> None:
    it = job(nodes=4)
    it.lose(1)
    it.arrive()
    it.prepare()
    it.lose(0)
    assert it.told(r.Declare)[-1].purpose == "drain" and it.finish is None
    drain(it)
    assert it.active == [2, 3]
    it.register(0)
    it.lose(3)
    assert it.core.phase is Phase.STARTING and it.active == [2] and it.finish is None
    assert [each["width"] for each in it.events("shrunk")] == [2, 1]
    assert it.told(r.ResumeAt)[-1].generation == 5
    begin(it)


def test_a_node_lost_before_the_first_commit_of_the_new_width_has_the_job_begin_there_once_more() -> None:
    it = job(nodes=8, replica=2)
    it.lose(0)
    drain(it)
    begin(it)
    it.iterate(5)
    (spare,) = it.events("shrunk")[0]["spares"]
    it.lose(1)
    for node in sorted(it.core.recovery.givers if it.core.recovery is not None else ()):
        it.feed(r.Offer(it.core.epoch, node, {}, {}, {}, arrived=True))
    assert it.core.phase is Phase.STARTING and spare in it.active and len(it.events("shrunk")) == 1
    assert it.told(r.ResumeAt)[-1].generation == 5 and it.told(r.ResumeAt)[-1].recut


def test_what_was_written_by_a_wider_job_is_nothing_to_go_on_from() -> None:
    it = job(nodes=4, replica=2)
    it.lose(3)
    drain(it)
    begin(it)
    assert it.active == [0, 2]
    it.iterate(5)
    it.lose(2)
    old = {0: [(0, 5)], 1: [(0, 5)]}
    for node in sorted(it.core.recovery.givers if it.core.recovery is not None else ()):
        it.feed(r.Offer(it.core.epoch, node, {}, old, old, arrived=True))
    assert not it.told(r.Agree)[1:] and it.core.phase is Phase.STARTING


def test_a_generation_that_cannot_be_made_durable_gives_way_to_the_one_before_or_the_job_ends() -> None:
    it = job()
    it.lose(1)
    drain(it, "no space left")
    assert it.end[0] == Exit.NO_SPARE and "no checkpoint could be saved" in it.end[1]
    it = job()
    it.commit(100)
    write(it)
    it.commit(101)
    it.lose(1)
    it.arrive(101)
    it.prepare()
    write(it, "no space left")
    assert it.finish is None and it.events("shrunk")[0]["iteration"] == 100


def test_a_wait_for_a_spare_comes_first_and_a_spare_that_comes_costs_no_replica() -> None:
    it = job(wait_for_spare_s=60.0)
    it.lose(1)
    it.arrive()
    assert it.core.phase is Phase.WAITING
    it.wait(61.0)
    assert it.told(r.Declare)[-1].purpose == "drain"
    drain(it)
    assert it.events("shrunk")[0]["width"] == 2
    it = job(wait_for_spare_s=60.0)
    it.lose(1)
    it.arrive()
    _, node, actions = it.core.add_spare("host", it.now)
    it.take(actions)
    it.join([node])
    it.park([node])
    it.recover()
    assert not it.events("shrunk") and it.active == [0, node, 2]


def test_without_end_a_job_waits_for_a_node_to_come() -> None:
    it = SimulatedJob(3, 0, 1, when_out_of_spares="wait").train()
    it.commit(5)
    it.lose(1)
    it.arrive()
    it.wait(1e6)
    assert it.core.phase is Phase.WAITING and it.finish is None and it.events("waiting")[0]["minutes"] is None
    _, node, actions = it.core.add_spare("host", it.now)
    it.take(actions)
    it.join([node])
    it.park([node])
    it.recover()
    assert it.active == [0, node, 2] and it.core.phase is Phase.RUNNING


def test_saving_is_what_a_job_does_that_was_not_asked_to_shrink() -> None:
    it = SimulatedJob(3, 0, 1, durable=DurableSpec("/durable", "job", 100, resume=True), can_rescue=False).train()
    it.commit(5)
    it.lose(1)
    drain(it)
    assert it.end[0] == Exit.NO_SPARE and "durable" in it.end[1]


def test_a_job_that_another_launcher_has_started_cannot_begin_anew_and_ends_as_ever() -> None:
    spec = DurableSpec("/durable", "job", 100, resume=True)
    it = SimulatedJob(3, 0, 1, durable=spec, when_out_of_spares="shrink", can_rescue=False)
    for node in range(3):
        it.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [node], respawns=False))
    for rank in range(3):
        it.register(rank)
    it._groups = it.core.protection.groups
    it.commit(5)
    it.lose(1)
    drain(it)
    assert it.end[0] == Exit.NO_SPARE


# ---- a coordinator that starts again


def restarted(it: SimulatedJob, stored: dict[str, Any], found: DurableSpec | None = None) -> SimulatedJob:
    """Another coordinator, with the agents back in the epoch that they were told, and with what it has ``found``."""
    kept = json.loads(json.dumps(stored))
    again = SimulatedJob(
        it.core.job.nodes, it.core.job.spare_nodes, 1, durable=it.core.job.durable, replica=it.replica,
        when_out_of_spares="shrink",
    )  # fmt: skip
    again.core = Core(it.core.job if found is None else replace(it.core.job, durable=found))
    again.take(again.core.restored(kept, it.now))
    again.now = it.now
    return again


@pytest.mark.parametrize("cut", [0, 1])
def test_a_coordinator_that_takes_over_in_the_last_drain_or_in_the_new_start_goes_on_with_it(cut: int) -> None:
    it = job()
    it.lose(1)
    it.arrive()
    it.prepare()
    if cut:
        write(it)
    again = restarted(it, it.core.dump())
    for node in (0, 2):
        again.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [10 * node], epoch=1))
    again._held, again._groups = it._held, it._groups
    if not cut:
        assert again.told(r.Declare)[-1].purpose == "drain"
        drain(again)
    assert again.core.phase is Phase.STARTING and again.active == [0, 2] and len(again.core.assignment) == 2
    assert again.told(r.ResumeAt)[-1].generation == 5 and again.told(r.ResumeAt)[-1].recut
    begin(again)
    assert again.core.epoch >= 2


def test_a_coordinator_that_takes_over_a_narrower_job_knows_its_width() -> None:
    it = job(nodes=4)
    it.lose(1)
    drain(it)
    begin(it)
    it.commit(6)
    stored = it.core.dump()
    again = restarted(it, stored)
    for node in (0, 2, 3):
        pids = [10 * node]
        again.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, pids, epoch=it.core.epoch, kept=(2, 6)))
    assert again.core.phase is Phase.RUNNING and again.active == [0, 2, 3]
    again._held, again._groups = list(again.core.assignment), again.core.protection.groups
    again.written = it.core.epoch
    again.lose(0)
    again.arrive(6)
    again.prepare()
    write(again)
    assert again.events("shrunk")[0]["width"] == 2 and again.events("shrunk")[0]["was"] == 3


def test_the_width_is_kept_before_anybody_is_told_of_it() -> None:
    it = job()
    it.lose(1)
    it.arrive()
    it.prepare()
    name = it.told(r.DrainShards)[-1].name
    for node in it.active:
        ranks = placing.ranks_of(it.core.assignment, node).values()
        shards = [ShardFile(rank, "file", 100, "0", "layout") for rank in ranks]
        it.feed(r.ShardsDrained(node, name, shards, ""))
    seal = next(each for each in reversed(it.sent) if isinstance(each.record, r.SealGeneration))
    assert seal.node is not None
    actions = it.core.received(r.GenerationSealed(seal.node, name, "", []), it.now)
    kept = [each for each in actions if isinstance(each, Keep)]
    assert kept[-1].parts["members"]["world_size"] == 2


# ---- nodes that come again


def narrower(nodes: int = 3, **more: Any) -> SimulatedJob:
    """Has lost node 1, and trains with as many replicas as the others hold."""
    it = job(nodes, **more)
    it.lose(1)
    drain(it)
    begin(it)
    it.commit(6)
    return it


def come(it: SimulatedJob) -> int:
    """A node joins, and is parked."""
    _, node, actions = it.core.add_spare("host", it.now)
    it.take(actions)
    it.join([node])
    it.park([node])
    return node


def test_a_replica_comes_back_with_a_node_from_the_next_generation_which_becomes_durable_at_once() -> None:
    it = narrower()
    assert not it.told(r.DrainShards)[1:]
    node = come(it)
    it.commit(7)
    assert it.told(r.DrainShards)[-1].generation == 7 and it.core.phase is Phase.RUNNING
    it.commit(8)
    write(it)
    assert it.core.phase is Phase.STARTING and it.active == [0, 2, node] and it.told(r.Roster)[-1].anew
    (event,) = it.events("grown")
    assert (event["width"], event["was"], event["iteration"], event["spares"]) == (3, 2, 7, [])
    assert it.told(r.ResumeAt)[-1].generation == 7 and it.told(r.ResumeAt)[-1].recut == it.told(r.DrainShards)[-1].name
    begin(it)
    it.commit(8)
    assert it.told(r.Placement)[-1].unique_bytes == [1 << 20] * 3
    it.lose(node)
    assert it.told(r.Declare)[-1].purpose == "drain"
    it.arrive(8)
    it.prepare()
    write(it)
    assert it.events("shrunk")[-1]["width"] == 2 and it.told(r.ResumeAt)[-1].generation == 8


def test_a_node_that_has_said_that_it_joins_is_not_waited_for_by_a_new_start_and_is_told_when_it_comes() -> None:
    it = job(nodes=4)
    _, coming, actions = it.core.add_spare("host", it.now)
    it.take(actions)
    it.lose(1)
    it.arrive()
    it.wait(DEADLINES.join + 1)  # it does not come in time for a swap
    drain(it)
    begin(it)
    _, coming, actions = it.core.add_spare("host", it.now)
    it.take(actions)
    come(it)
    it.commit(6)
    write(it)
    assert it.core.phase is Phase.STARTING and it.told(r.Roster)[-1].epoch == it.core.epoch
    it.join([coming])
    assert it.events("joined")[-1]["node"] == coming and it.told(r.Roster)[-1].epoch == it.core.epoch
    begin(it)


def test_each_replica_that_comes_back_has_its_generation_at_once() -> None:
    it = job(nodes=4)
    it.lose(1)
    drain(it)
    begin(it)
    it.lose(2)
    it.arrive(5)
    it.prepare()
    write(it)
    begin(it)
    it.commit(6)
    for width, generation in ((3, 7), (4, 8)):
        come(it)
        it.commit(generation)
        write(it)
        assert it.events("grown")[-1]["width"] == width
        begin(it)


def test_who_asks_again_where_a_start_begins_hears_of_the_generation_that_all_begin_with() -> None:
    """The job was wider, went on with what was cut anew for it, and begins at the same width with one of its own."""
    it = narrower()
    it.lose(0)
    it.arrive(6)
    it.prepare()
    come(it)
    write(it)
    assert it.core.phase is Phase.STARTING and len(it.active) == 2 and it.events("shrunk")[-1]["was"] == 2
    for each in it.active:
        it.feed(r.ShardsLoaded(each, it.told(r.LoadShards)[-1].name, "", it.core.epoch))
    told = it.told(r.ResumeAt)[-1]
    assert (told.generation, told.recut) == (6, "")
    for each in it.active:
        it.feed(r.Join(each, 1000 + each, "127.0.0.1", 2000 + each, [99], epoch=it.core.epoch))
        assert it.told(r.ResumeAt)[-1] == told


def test_nodes_that_fill_no_replica_are_spares_until_there_are_enough() -> None:
    it = narrower(nodes=4, replica=2)
    assert it.active == [0, 2] and it.core.members.spares() == [3]
    it.lose(0)
    it.recover()
    assert it.active == [3, 2] and not it.events("grown")
    come(it)
    it.commit(7)
    assert len(it.told(r.DrainShards)) == 1
    come(it)
    it.commit(8)
    write(it)
    assert it.events("grown")[0]["width"] == 2 and len(it.active) == 4


def test_a_machine_that_fails_again_and_again_brings_no_replica_back() -> None:
    for times, grows in ((1, True), (2, False)):
        it = narrower()
        _, node, actions = it.core.add_spare("host", it.now)
        it.take(actions)
        it.join([node])
        for _ in range(times):
            it.core.members.failed(node, "lost", "its agent is gone or silent")
        it.park([node])
        it.commit(7)
        assert (len(it.told(r.DrainShards)) == 2) is grows


def test_a_spare_that_is_not_parked_or_has_failed_its_check_brings_no_replica_back() -> None:
    it = narrower()
    _, node, actions = it.core.add_spare("host", it.now)
    it.take(actions)
    it.join([node])
    it.commit(7)
    assert len(it.told(r.DrainShards)) == 1
    it.park([node])
    it.core.nodes[node].unfit = "a wrong result"
    it.commit(8)
    assert len(it.told(r.DrainShards)) == 1


def test_what_comes_between_puts_growing_off_and_what_cannot_be_written_is_not_tried_at_each_commit() -> None:
    it = narrower()
    come(it)
    it.commit(7)
    write(it, "no space left")
    it.commit(8)
    assert len(it.told(r.DrainShards)) == 2 and it.core.phase is Phase.RUNNING
    it.wait(31)
    it.commit(9)
    name = it.told(r.DrainShards)[-1].name
    it.feed(r.WorkerExited(0, 0, 0, 4711, -9, it.core.epoch))
    recovering = it.core.recovery is not None
    it.feed(r.GenerationSealed(0, name, "", []))
    assert recovering and not it.events("grown")


def test_a_job_that_has_all_its_replicas_does_not_grow() -> None:
    it = job(nodes=4, spares=1)
    it.commit(6)
    come(it)
    it.commit(7)
    assert not it.told(r.DrainShards)


def growing() -> tuple[SimulatedJob, int]:
    """A new start is under way, from generation 7, with a node more."""
    it = narrower()
    node = come(it)
    it.commit(7)
    write(it)
    return it, node


def test_a_node_lost_in_the_start_of_a_wider_job_has_it_begin_at_the_width_before_from_the_same_generation() -> None:
    it, node = growing()
    it.register(0)
    it.lose(node)
    assert it.core.phase is Phase.STARTING and it.active == [0, 2] and it.finish is None
    assert it.told(r.ResumeAt)[-1].generation == 7
    begin(it)
    it.commit(8)


def test_a_coordinator_that_takes_over_in_the_start_of_a_wider_job_knows_its_width() -> None:
    it, node = growing()
    # It is written at two widths: what comes first in the directory is not what the others begin with.
    assert it.core.job.durable is not None
    again = restarted(it, it.core.dump(), replace(it.core.job.durable, recut=((7, "another"),), complete=((7, "own"),)))
    for each in (0, 2, node):
        again.feed(r.Join(each, 1000 + each, "127.0.0.1", 2000 + each, [10 * each], epoch=it.core.epoch))
    assert again.core.phase is Phase.STARTING and again.active == [0, 2, node] and len(again.core.assignment) == 3
    assert again.told(r.ResumeAt)[-1] == it.told(r.ResumeAt)[-1] and again.told(r.ResumeAt)[-1].generation == 7


def test_what_is_drained_at_leisure_gives_way_to_a_newer_generation_that_brings_a_replica_back() -> None:
    it = narrower()
    it.wait(600.0)
    it.commit(100)
    slow = it.told(r.DrainShards)[-1]
    assert slow.generation == 100 and slow.seconds > 0
    it.commit(101)
    assert it.told(r.DrainShards)[-1] is slow
    come(it)
    it.commit(102)
    assert it.told(r.GiveUpDrain)[-1].name == slow.name
    assert (it.told(r.DrainShards)[-1].generation, it.told(r.DrainShards)[-1].seconds) == (102, 0.0)
    write(it)
    assert it.events("grown")[0]["iteration"] == 102


def test_what_a_preempted_job_drains_is_not_given_up_for_a_replica_that_could_come_back() -> None:
    it = narrower()
    it.commit(7)
    it.take(it.core.preempted(it.now))
    last = it.told(r.DrainShards)[-1]
    assert last.generation == 7
    come(it)
    it.commit(8)
    assert it.told(r.DrainShards)[-1] is last and not it.told(r.GiveUpDrain)


def test_a_spare_that_had_coordinates_for_the_last_drain_only_is_counted_as_parked_when_it_says_so() -> None:
    """Of three pipelines two nodes are lost at once, and one spare is there."""
    it = job(nodes=7, spares=1, replica=2)
    (pair,) = (group for group in it.core.protection.groups if 0 in group)
    for node in (0, next(node for node in range(1, 6) if node not in pair)):
        it.take(it.core.node_away(node, it.now))
    it.wait(2.0)
    assert it.told(r.Declare)[-1].purpose == "drain" and it.core.nodes[6].role == "active"
    drain(it)
    assert it.active and 6 in it.core.members.spares() and not it.core.members.ready_spares()
    for _ in range(2):  # its agent tells, and tells once more when it connects again
        it.feed(r.WorkerReady(6, 0, 60))
    assert it.core.members.ready_spares() == [6] and len([e for e in it.events("parked") if e["node"] == 6]) == 2
    begin(it)
    assert it.core.cannot_drain(it.active[0]) == ("", False)


def test_a_node_still_to_join_that_a_start_has_given_coordinates_is_a_spare_where_it_has_none_any_more() -> None:
    it = narrower(nodes=5)
    _, coming, actions = it.core.add_spare("host", it.now)
    it.take(actions)
    come(it)
    it.commit(7)
    write(it)
    it.lose(2)
    assert coming in it.active and it.core.phase is Phase.STARTING
    it.lose(3)
    assert coming not in it.active and it.core.nodes[coming].role == "spare"
    it.join([coming])
    it.park([coming])
    begin(it)
    assert it.core.members.ready_spares() == [coming]


@pytest.mark.parametrize("error", ["of the script", "of the user"])
def test_a_node_that_comes_and_cannot_set_up_is_lost_and_the_job_begins_as_narrow_as_it_was(error: str) -> None:
    it, node = growing()
    assert it.core.phase is Phase.STARTING and node in it.active
    if error == "of the script":
        it.feed(r.WorkerExited(node, 0, 2, 10 * node, 1, it.core.epoch))
    else:
        it.feed(
            r.WorkerFailed(
                node, 0, 2, "setup", it.core.epoch, -1, Exit.USAGE, "", "", "/durable cannot be read: not mounted", ""
            )
        )
    assert it.finish is None and it.core.phase is Phase.STARTING and it.active == [0, 2]
    assert it.events("shrunk")[-1]["lost"] == [node] and it.told(r.ResumeAt)[-1].generation == 7
    before = it.core.epoch - 1
    it.feed(
        r.WorkerFailed(0, 0, 0, "setup", before, -1, Exit.USAGE, "", "", "the same, told when that start was over", "")
    )
    it.feed(r.WorkerExited(2, 0, 1, 20, 1, before))
    assert it.finish is None
    begin(it)
    it.commit(8)
    assert it.core.committed == 8


def test_a_node_that_comes_is_not_lost_for_an_error_that_the_loss_of_another_explains() -> None:
    it, node = growing()
    epoch = it.core.epoch
    it.feed(r.WorkerFailed(node, 0, 2, "setup", epoch, -1, 0, "DistBackendError", "", "closed", "", communication=True))
    it.feed(r.WorkerExited(node, 0, 2, 10 * node, 1, epoch))
    assert it.finish is None and node in it.active
    it.lose(2)
    assert node in it.active and it.events("shrunk")[-1]["lost"] == [2] and it.active == [0, node]
    begin(it)


def test_a_node_that_comes_is_lost_for_an_error_of_communication_that_nothing_explains_twice() -> None:
    it, node = growing()
    for _ in range(it.core.job.transient_retries + 1):
        epoch = it.core.epoch
        assert node in it.active and it.core.phase is Phase.STARTING
        it.feed(r.WorkerFailed(node, 0, 2, "setup", epoch, -1, 0, "Error", "", "closed", "", communication=True))
        it.feed(r.WorkerExited(node, 0, 2, 10 * node + epoch, 1, epoch))
        it.wait(DEADLINES.lease + 2)
    assert it.finish is None and it.events("shrunk")[-1]["lost"] == [node] and it.active == [0, 2]


def test_an_error_on_a_node_that_had_trained_ends_a_new_start() -> None:
    it = narrower()
    come(it)
    it.commit(7)
    write(it)
    it.feed(r.WorkerExited(2, 0, 1, 20, 1, it.core.epoch))
    assert it.end[0] == Exit.FAILED


def sealing(keep: int = 2) -> tuple[SimulatedJob, str, int]:
    """Generation 100 is durable, and the manifest of 200 is being written: its name, and by which node."""
    spec = DurableSpec("/durable", "job", 100, keep=keep, resume=True)
    it = SimulatedJob(4, 0, 1, durable=spec, replica=1, when_out_of_spares="shrink").train()
    it.commit(5)
    it.commit(100)
    write(it)
    it.commit(200)
    name = it.told(r.DrainShards)[-1].name
    for node in it.active:
        ranks = placing.ranks_of(it.core.assignment, node).values()
        it.feed(
            r.ShardsDrained(node, name, [ShardFile(x, f"rank-{x:05d}.safetensors", 1, "0", "l") for x in ranks], "")
        )
    seal = next(each for each in reversed(it.sent) if isinstance(each.record, r.SealGeneration))
    assert seal.node is not None
    return it, name, seal.node


@pytest.mark.parametrize("error", ["", "no space left"])
def test_a_manifest_that_nobody_waits_for_any_more_counts_as_its_writer_says(error: str) -> None:
    it, name, writer = sealing()
    it.commit(201)
    it.lose(next(node for node in it.active if node != writer))
    it.arrive(201)
    it.prepare()
    it.feed(r.GenerationSealed(writer, name, error, []))
    write(it, "no space left")
    assert it.finish is None and it.events("shrunk")[-1]["iteration"] == (100 if error else 200)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_manifest_that_is_being_written_is_waited_for_where_memory_has_nothing_newer(keep: int) -> None:
    """Who writes it removes what is older."""
    it, name, writer = sealing(keep)
    for node in next(group for group in it.core.protection.groups if writer not in group):
        it.take(it.core.node_away(node, it.now))
    it.wait(2.0)
    assert it.core.recovery is not None
    for node in sorted(it.core.recovery.givers):
        it.feed(r.Offer(it.core.epoch, node, {}, {}, {}, arrived=True))
    assert not it.events("shrunk") and it.finish is None
    it.feed(r.GenerationSealed(writer, name, "", []))
    assert it.events("shrunk")[-1]["iteration"] == 200 and it.told(r.ResumeAt)[-1].recut == name


def test_what_is_durable_of_another_width_is_shown_and_said() -> None:
    it = narrower()
    assert it.core.durable == 5
    it.commit(100)
    write(it, "no space left")
    assert "generation 5 stays durable" in it.events("durable_failed")[-1]["message"]


def test_a_preemption_of_a_narrower_job_that_has_not_begun_leaves_at_once_and_names_what_is_durable() -> None:
    it = job()
    it.lose(1)
    drain(it)
    it.take(it.core.preempted(it.now))
    code, message = it.end
    assert code == Exit.PREEMPTED and "generation 5 is durable" in message


def test_hashes_of_ranks_that_the_job_has_no_more_are_forgotten() -> None:
    it = job()
    for rank in range(3):
        it.feed(r.StateHash(rank, rank, {"params": "of three"}))
    it.lose(1)
    drain(it)
    begin(it)
    assert it.core.seen.state_hashes == {}


def test_a_new_start_is_told_when_the_job_began_also_by_a_coordinator_that_takes_over() -> None:
    it = job()
    began = it.told(r.Roster)[0].began
    it.wait(100.0)
    it.lose(1)
    drain(it)
    assert it.told(r.Roster)[-1].began == began
    assert restarted(it, it.core.dump()).core._start.began == began


def cannot_read(it: SimulatedJob, node: int, rank: int) -> None:
    generation = it.told(r.ResumeAt)[-1].generation
    it.feed(r.FetchFailed(it.core.epoch, node, rank, -1, generation, "/durable/x cannot be read: it is damaged"))


def test_a_durable_generation_that_ranks_cannot_read_gives_way_to_the_one_before_it() -> None:
    it = narrower()
    it.commit(100)
    write(it)
    come(it)
    it.commit(101)
    write(it)
    assert it.told(r.ResumeAt)[-1].generation == 101
    cannot_read(it, 0, 0)
    it.feed(r.FetchFailed(it.core.epoch - 1, 2, 1, -1, 101, "which the news of the new start has not reached"))
    assert it.core.phase is Phase.STARTING and it.told(r.ResumeAt)[-1].generation == 100
    assert len(it.core.assignment) == 3 and it.told(r.Roster)[-1].epoch == it.core.epoch
    cannot_read(it, 0, 0)
    assert it.end[0] == Exit.USAGE and "no other durable generation is there" in it.end[1]


def test_a_node_that_comes_and_cannot_read_is_lost_once_all_others_can() -> None:
    it, node = growing()
    cannot_read(it, node, 2)
    it.register(0)
    assert it.finish is None and node in it.active
    it.register(1)
    assert it.events("shrunk")[-1]["lost"] == [node] and it.active == [0, 2]
    assert it.told(r.ResumeAt)[-1].generation == 7
    begin(it)


def test_a_node_that_comes_is_not_lost_where_what_it_cannot_read_is_damaged() -> None:
    it, node = growing()
    cannot_read(it, node, 2)
    it.register(0)
    cannot_read(it, 2, 1)
    assert node in it.active and it.told(r.ResumeAt)[-1].generation == 5
    begin(it)


def test_what_no_node_can_read_is_damaged_also_where_all_of_them_have_just_come() -> None:
    it, _ = growing()
    assert it.told(r.ResumeAt)[-1].generation == 7
    for rank, slot in enumerate(it.core.assignment):
        it.core.members.nodes[slot.node].trained = False  # as when one node is left, and that has just come
        cannot_read(it, slot.node, rank)
    assert it.finish is None and not it.events("shrunk")[1:] and it.told(r.ResumeAt)[-1].generation == 5
    begin(it)


def test_where_another_launcher_starts_workers_the_user_is_told_what_to_move_away() -> None:
    spec = DurableSpec("/durable", "job", 100, resume=True, recut=((101, "newest"), (100, "before")))
    it = SimulatedJob(3, 0, 1, durable=spec)
    for node in range(3):
        it.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [99], respawns=False))
    assert it.told(r.ResumeAt)[-1] == r.ResumeAt(101, "newest")
    cannot_read(it, 0, 0)
    assert it.end[0] == Exit.USAGE and "move that directory away to start from generation 100" in it.end[1]
