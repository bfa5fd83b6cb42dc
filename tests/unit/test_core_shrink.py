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
from deadpool_megatron.cluster.core.effects import Keep, Send
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.durable import ShardFile
from simulated import DEADLINES, SimulatedJob

MEMORY = DurableSpec("", "", resume=True)
DURABLE = DurableSpec("/durable", "job", 100, resume=True)


def job(nodes: int = 3, spares: int = 0, slots: int = 1, replica: int = 1, **more: Any) -> SimulatedJob:
    """Has committed generation 5. No durable directory, unless it is asked for."""
    more = {"durable": MEMORY, **more}
    it = SimulatedJob(nodes, spares, slots, replica=replica, when_out_of_spares="shrink", **more)
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
    epoch = it.core.epoch
    for place, node in enumerate(there):
        held = [rank for rank in ranks if (rank - place) % len(there) < 2 and rank not in without]
        if nodes is None or node in nodes:
            it.feed(r.SetAside(epoch, node, held, []))


def coordinates(width: int) -> list[r.CoordinateInfo]:
    """Of so many replicas of one rank."""
    return [r.CoordinateInfo(rank, 0, 0, rank) for rank in range(width)]


def write(it: SimulatedJob, error: str = "") -> None:
    """The drain under way comes to its end."""
    name = it.told(r.DrainShards)[-1].name
    if error:
        it.feed(r.ShardsDrained(it.active[0], name, [], error))
    else:
        it.feed(r.GenerationSealed(seal(it, name), name, "", []))


def base(it: SimulatedJob) -> r.Base | None:
    """What the start under way, or the last one, begins with out of memory."""
    roster: r.Roster = it.told(r.Roster)[-1]
    return roster.base


def seal(it: SimulatedJob, name: str) -> int:
    """All shards of the drain under way are written: the node that writes its manifest."""
    for node in it.active:
        ranks = placing.ranks_of(it.core.assignment, node).values()
        shards = [ShardFile(rank, f"rank-{rank:05d}.safetensors", 100, "0", "layout") for rank in ranks]
        it.feed(r.ShardsDrained(node, name, shards, ""))
    told = next(each for each in reversed(it.sent) if isinstance(each.record, r.SealGeneration))
    assert told.node is not None
    return told.node


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
    roster, (_, resume) = it.told(r.Roster)[-1], it.told(r.ResumeAt)
    assert roster.anew and len(roster.assignment) == 2 and roster.epoch == it.core.epoch == 2
    assert roster.base == r.Base(1, -1, 5) and (resume.generation, resume.recut) == (5, "")
    whole = r.InMemory(r.Base(1, -1, 5), coordinates(3), [[0, 2]] * 3, [[]] * 3)
    assert resume.memory == whole and not it.told(r.DrainShards)
    (event,) = it.events("shrunk")
    assert (event["width"], event["was"], event["iteration"], event["lost"]) == (2, 3, 5, [1])
    begin(it)
    assert it.told(r.Placement)[-1].unique_bytes == [1 << 20] * 2 and it.events("training")[-1]["width"] == 2
    assert [event["planned_bytes"] for event in it.events("training")] == [3 << 20, 2 << 20]
    it.commit(6)
    assert it.core.committed == 6


@pytest.mark.parametrize("leaves", [True, False])
def test_where_no_node_has_room_for_what_a_lost_one_had_the_copy_that_is_kept_of_it_does(leaves: bool) -> None:
    it = job(nodes=4)
    it.lose(1)
    it.arrive()
    taken = it.core.assignment[1].node
    if leaves:  # its copies would go with it
        it.core.nodes[3].role = "leaving"
    it.feed(r.FetchFailed(it.core.epoch, taken, 1, 2, 5, "rank 1 (own) needs 8 bytes", own=True))
    if leaves:
        assert it.core.phase is not Phase.STARTING and it.finish is None
        return
    assert base(it) == r.Base(1, -1, 5) and it.finish is None and it.core.phase is Phase.STARTING
    answer(it)
    begin(it)
    assert it.events("shrunk")[-1]["width"] == 3


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
    assert code == Exit.NO_SPARE and "nobody survives" in message


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
    assert it.end[0] == Exit.NO_SPARE
    it = job(nodes=3, slots=2, replica=3, can_rescue=False, durable=DURABLE)
    it.lose(1)
    it.arrive()
    it.prepare()
    write(it)
    assert it.end[0] == Exit.NO_SPARE and "generation 5 is durable" in it.end[1]


def test_a_node_lost_in_the_last_drain_or_in_the_new_start_costs_no_more_than_the_nodes_can_no_longer_hold() -> None:
    it = job(nodes=4)
    it.lose(1)
    it.arrive()
    it.lose(0)
    assert it.told(r.Declare)[-1].purpose == "drain" and it.finish is None
    drain(it)
    assert it.active == [2, 3]
    it.register(0)
    it.lose(3)
    answer(it)
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
    assert base(it) == r.Base(1, -1, 5)
    answer(it)
    assert it.told(r.ResumeAt)[-1].memory.base == r.Base(1, -1, 5) and len(it.told(r.ResumeAt)) == 3


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
    assert not it.told(r.Agree)[1:] and it.core.phase is Phase.STARTING and base(it) == r.Base(1, -1, 5)


def test_a_generation_that_nobody_holds_gives_way_to_the_newest_durable_one_or_the_job_ends() -> None:
    it = job()
    it.lose(1)
    drain(it, without=[1, 2])
    code, message = it.end
    assert code == Exit.GENERATION_LOST and it.events("base_lost")[0]["iteration"] == 5
    assert "nobody holds the shards of ranks 1, 2 of generation 5: nodes were lost while the job began anew" in message
    it = job(durable=DURABLE)
    for generation in (100, 200):
        it.commit(generation)
        write(it)
    name = it.told(r.DrainShards)[-1].name
    it.commit(201)
    it.lose(1)
    it.arrive(201)
    it.prepare()
    answer(it, without=[0])
    assert it.finish is None and it.core.phase is Phase.STARTING and it.core.epoch == 3
    assert it.events("base_lost")[0]["iteration"] == it.events("shrunk")[0]["iteration"] == 201
    assert base(it) is None and it.told(r.ResumeAt)[-1] == r.ResumeAt(200, name)
    said = "nobody holds the shard of rank 0 of generation 201: the job begins anew on nodes 0, 2"
    assert it.events("started_over")[-1]["message"] == said
    begin(it)


def test_of_many_shards_that_nobody_holds_some_are_named() -> None:
    it = job(nodes=20)
    it.lose(1)
    drain(it, without=range(1, 13))
    assert "of ranks 1, 2, 3, 4, 5, 6, 7, 8 and 4 more of generation 5" in it.end[1]


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
    it = SimulatedJob(3, 0, 1, durable=DURABLE, can_rescue=False).train()
    it.commit(5)
    it.lose(1)
    it.arrive()
    it.prepare()
    write(it)
    assert it.end[0] == Exit.NO_SPARE and "durable" in it.end[1]


@pytest.mark.parametrize("durable", [MEMORY, DURABLE])
def test_a_job_that_another_launcher_has_started_cannot_begin_anew_and_ends_as_ever(durable: DurableSpec) -> None:
    it = SimulatedJob(3, 0, 1, durable=durable, when_out_of_spares="shrink", can_rescue=False)
    for node in range(3):
        it.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [node], respawns=False))
    for rank in range(3):
        it.register(rank)
    it._groups = it.core.protection.groups
    it.commit(5)
    it.lose(1)
    if durable is DURABLE:
        it.arrive()
        it.prepare()
        write(it)
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


def rejoin(it: SimulatedJob, nodes: Sequence[int], epoch: int, **more: Any) -> None:
    """Agents are back, in the epoch that they were told."""
    for node in nodes:
        it.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [10 * node], epoch=epoch, **more))


@pytest.mark.parametrize("heard", [1, 2])
@pytest.mark.parametrize("answers", [[], [0], [0, 2]])
def test_a_coordinator_that_takes_over_in_the_new_start_asks_all_again_what_they_hold(
    answers: list[int], heard: int
) -> None:
    it = job()
    it.lose(1)
    it.arrive()
    it.prepare()
    answer(it, nodes=answers)
    again = restarted(it, it.core.dump())
    rejoin(again, [0, 2], epoch=heard)
    assert again.core.phase is Phase.STARTING and again.active == [0, 2] and len(again.core.assignment) == 2
    assert again.core.epoch == (2 if heard == 2 else 3) and not again.told(r.ResumeAt)
    assert base(again) == r.Base(1, -1, 5)
    answer(again)
    (resume,) = again.told(r.ResumeAt)
    assert resume.memory == r.InMemory(r.Base(1, -1, 5), coordinates(3), [[0, 2]] * 3, [[]] * 3)
    begin(again)
    again.commit(6)
    assert again.core.committed == 6


def test_a_coordinator_that_takes_over_in_the_recovery_that_ends_with_fewer_replicas_goes_on_with_it() -> None:
    it = job()
    it.lose(1)
    it.arrive()
    again = restarted(it, it.core.dump())
    rejoin(again, [0, 2], epoch=1)
    again._held, again._groups = it._held, it._groups
    assert again.told(r.Declare)[-1].purpose == "drain"
    drain(again)
    assert again.active == [0, 2] and again.told(r.ResumeAt)[-1].memory.base == r.Base(2, -1, 5)
    begin(again)


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_node_that_a_coordinator_which_takes_over_does_not_find_is_not_waited_for(lost: str) -> None:
    it = job(nodes=4)
    it.lose(1)
    it.arrive()
    it.prepare()
    if lost == "after":
        answer(it)
    again = restarted(it, it.core.dump())
    rejoin(again, [0, 2], epoch=2)
    again.wait(60.0)
    assert again.active == [0, 2] and again.core.nodes[3].role == "lost" and base(again) == r.Base(1, -1, 5)
    answer(again)
    assert again.told(r.ResumeAt)[-1].memory.holders == [[0, 2]] * 4
    begin(again)


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
    answer(again)
    assert again.events("shrunk")[0]["width"] == 2 and again.events("shrunk")[0]["was"] == 3


def test_the_width_is_kept_before_anybody_is_told_of_it() -> None:
    it = job()
    it.lose(1)
    it.arrive()
    it.feed(r.NodeReady(it.core.epoch, 0))
    actions = it.core.received(r.NodeReady(it.core.epoch, 2), it.now)
    (told,) = (i for i, each in enumerate(actions) if isinstance(each, Send) and isinstance(each.record, r.Roster))
    kept = next(each for each in actions[:told] if isinstance(each, Keep) and "members" in each.parts)
    assert kept.parts["members"]["world_size"] == 2
    assert json.loads(json.dumps(kept.parts["layout"]["base"]))[0] == [1, -1, 5]


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


def test_a_node_that_comes_brings_no_replica_back_before_it_was_found_fit() -> None:
    """One that has no room for its shards would end the job."""
    it = narrower(spare_check_s=600.0)
    node = come(it)
    it.wait(0.1)
    it.commit(7)
    assert it.core.phase is Phase.RUNNING
    it.feed(r.SpareChecked(node, it.told(r.CheckSpare)[-1].number))
    it.commit(8)
    assert it.core.phase is Phase.STARTING and node in it.active


def test_a_replica_comes_back_with_a_node_from_the_next_generation_that_all_commit() -> None:
    it = narrower()
    node = come(it)
    assert it.core.phase is Phase.RUNNING
    it.commit(7, nodes=[0])
    assert it.core.phase is Phase.RUNNING
    it.commit(7, nodes=[2])
    assert it.core.phase is Phase.STARTING and it.active == [0, 2, node]
    assert it.told(r.Roster)[-1].anew and base(it) == r.Base(2, 2, 7)
    (event,) = it.events("grown")
    assert (event["width"], event["was"], event["iteration"], event["spares"]) == (3, 2, 7, [])
    assert it.told(r.ResumeAt)[-1].generation == 5
    answer(it)
    whole = r.InMemory(r.Base(2, 2, 7), coordinates(2), [[0, node], [0, 2]], [[]] * 2)
    assert it.told(r.ResumeAt)[-1] == r.ResumeAt(7, memory=whole) and not it.told(r.DrainShards)
    begin(it)
    it.commit(8)
    assert it.told(r.Placement)[-1].unique_bytes == [1 << 20] * 3
    it.lose(node)
    assert it.told(r.Declare)[-1].purpose == "drain"
    it.arrive(8)
    it.prepare()
    answer(it)
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
    assert it.core.phase is Phase.STARTING and it.told(r.Roster)[-1].epoch == it.core.epoch
    there = [node for node in it.core.members.present() if node != coming]
    it.join([coming])
    assert it.events("joined")[-1]["node"] == coming and it.told(r.Roster, coming)[-1].epoch == it.core.epoch
    assert it.told(r.Roster, coming)[-1].base.generation == 6
    answer(it, nodes=there)  # which has nothing of it, and is not waited for
    assert it.told(r.ResumeAt)[-1].generation == 6
    it.feed(r.SetAside(it.core.epoch, coming, [], []))
    begin(it)


def test_each_replica_that_comes_back_has_its_generation_at_once() -> None:
    it = job(nodes=4)
    it.lose(1)
    drain(it)
    begin(it)
    it.lose(2)
    answer(it)
    begin(it)
    it.commit(6)
    for width, generation in ((3, 7), (4, 8)):
        come(it)
        it.commit(generation)
        answer(it)
        assert it.events("grown")[-1]["width"] == width and it.told(r.ResumeAt)[-1].generation == generation
        begin(it)


def replaced(**more: Any) -> SimulatedJob:
    """A spare comes while the job prepares to go on with fewer replicas: it begins anew with as many, from memory."""
    it = narrower(**more)
    it.lose(0)
    it.arrive(6)
    come(it)
    it.prepare()
    assert it.core.phase is Phase.STARTING and len(it.active) == 2 and it.events("shrunk")[-1]["was"] == 2
    answer(it)
    return it


def test_who_asks_again_where_a_start_begins_hears_of_the_generation_that_all_begin_with() -> None:
    """The job was wider, went on with what was cut anew for it, and begins at the same width with one of its own."""
    it = replaced()
    told = it.told(r.ResumeAt)[-1]
    assert told.generation == 6 and told.memory.base == r.Base(3, -1, 6)
    for each in it.active:
        it.feed(r.Join(each, 1000 + each, "127.0.0.1", 2000 + each, [99], epoch=it.core.epoch))
        assert it.told(r.ResumeAt, each)[-1] == told
    begin(it)


def test_a_loss_before_the_first_commit_of_a_job_as_wide_as_before_does_not_go_back_to_what_is_durable() -> None:
    it = narrower(nodes=4, durable=DURABLE)
    it.commit(100)
    write(it)
    it.commit(106)
    it.lose(0)
    it.arrive(106)
    come(it)
    it.prepare()
    answer(it)
    assert it.events("shrunk")[-1]["was"] == it.events("shrunk")[-1]["width"] == 3
    begin(it)
    it.iterate(106)
    come(it)
    it.lose(2)
    for node in sorted(it.core.recovery.givers if it.core.recovery is not None else ()):
        it.feed(r.Offer(it.core.epoch, node, {}, {}, {}, arrived=True))
    assert not it.events("durable_fallback") and it.core.phase is Phase.STARTING
    assert base(it) == r.Base(3, -1, 106)


def test_what_is_read_of_a_durable_generation_is_forgotten_where_the_width_changes_meanwhile() -> None:
    it = replaced(durable=DURABLE)
    begin(it)
    it.commit(100)
    write(it)
    it.commit(101)
    it.lose(it.active[0])
    it.arrive(101)
    come(it)
    it.prepare()
    answer(it, without=[0])
    assert it.told(r.LoadShards)[-1].generation == 100
    it.wait(1.0)
    it.lose(it.active[0])
    assert it.core.phase is Phase.STARTING and len(it.active) == 1
    told = it.told(r.ResumeAt)[-1]
    assert (told.generation, told.recut) == (100, it.told(r.DrainShards)[-1].name)
    it.feed(r.Join(it.active[0], 1, "127.0.0.1", 1, [99], epoch=it.core.epoch))
    assert it.told(r.ResumeAt, it.active[0]) == [told]
    it.wait(10_000.0)
    assert it.finish is None
    begin(it)


def test_nodes_that_fill_no_replica_are_spares_until_there_are_enough() -> None:
    it = narrower(nodes=4, replica=2)
    assert it.active == [0, 2] and it.core.members.spares() == [3]
    it.lose(0)
    it.recover()
    assert it.active == [3, 2] and not it.events("grown")
    come(it)
    it.commit(7)
    assert not it.events("grown")
    come(it)
    it.commit(8)
    answer(it)
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
        assert bool(it.events("grown")) is grows


def test_a_spare_that_is_not_parked_or_has_failed_its_check_brings_no_replica_back() -> None:
    it = narrower()
    _, node, actions = it.core.add_spare("host", it.now)
    it.take(actions)
    it.join([node])
    it.commit(7)
    assert not it.events("grown")
    it.park([node])
    it.core.nodes[node].unfit = "a wrong result"
    it.commit(8)
    assert not it.events("grown")


def test_a_recovery_puts_growing_off_to_the_first_generation_that_all_commit_when_it_is_over() -> None:
    it = narrower()
    come(it)
    it.commit(7, nodes=[0])
    it.take(it.core.inject(r.Fault("abort", 0), it.now)[1])
    assert it.core.recovery is not None
    it.commit(7)
    it.arrive(7)
    it.prepare()
    it.commit(7)  # as a vault does with what it has fetched
    assert it.core.recovery is not None and not it.events("grown")
    it.form()
    it.restore()
    it.resume(7)
    assert it.core.phase is Phase.RUNNING and not it.events("grown")
    it.commit(8)
    assert it.events("grown")[0]["iteration"] == 8


def test_growing_waits_while_a_node_is_drained_or_awaited() -> None:
    it = narrower(nodes=5)
    come(it)
    it.take(it.core.drain(0, it.now)[1])
    assert it.core.drain_under_way is not None
    it.commit(7)
    assert not it.events("grown")
    it.take(it.core.cancel_drain(0, it.now)[1])
    it.recover(7)
    it.take(it.core.node_away(2, it.now))
    it.commit(8)
    assert not it.events("grown") and it.core.committed == 8
    rejoin(it, [2], epoch=it.core.epoch, kept=(3, 8))
    it.commit(9)
    assert it.events("grown")[0]["iteration"] == 9


def test_a_job_does_not_grow_that_a_node_is_through_with() -> None:
    it = narrower()
    come(it)
    it.feed(r.Finished(it.core.epoch, 0))
    it.commit(7)
    assert not it.events("grown")


@pytest.mark.parametrize("known", ["by this coordinator", "by one that takes over", "by one of before"])
def test_a_job_does_not_grow_where_what_is_left_to_train_gets_shorter_by_an_iteration_at_most(known: str) -> None:
    """Of three replicas two are left: three iterations take as long as two of all replicas."""
    it = narrower(iterations=20)
    come(it)
    if known != "by this coordinator":
        state = it.core.dump()
        if known == "by one of before":
            del state["layout"]["iterations"]
        here = it.active
        it = restarted(it, state)
        for each in (*here, 3):
            it.feed(r.Join(each, 1000 + each, "127.0.0.1", 2000 + each, [10 * each], epoch=it.core.epoch))
        it.park([3])
    it.commit(17)
    assert bool(it.events("grown")) is (known == "by one of before")


def test_a_job_that_has_all_its_replicas_does_not_grow() -> None:
    it = job(nodes=4, spares=1)
    it.commit(6)
    come(it)
    it.commit(7)
    assert not it.events("grown") and it.core.phase is Phase.RUNNING


def growing(durable: DurableSpec = MEMORY) -> tuple[SimulatedJob, int]:
    """A new start is under way, from generation 107 in memory, with a node more; 100 is durable, if anything is."""
    it = narrower(durable=durable)
    if durable.directory:
        it.commit(100)
        write(it)
    node = come(it)
    it.commit(107)
    answer(it)
    return it, node


def test_a_node_lost_in_the_start_of_a_wider_job_has_it_begin_at_the_width_before_from_the_same_generation() -> None:
    it, node = growing()
    it.register(0)
    it.lose(node)
    assert it.core.phase is Phase.STARTING and it.active == [0, 2] and it.finish is None
    answer(it)
    assert it.told(r.ResumeAt)[-1].memory.base == r.Base(2, 2, 107) and len(it.told(r.ResumeAt)) == 4
    begin(it)
    it.commit(108)


def test_a_coordinator_that_takes_over_in_the_start_of_a_wider_job_knows_its_width() -> None:
    it, node = growing(DURABLE)
    assert it.core.job.durable is not None
    # What comes first in the directory is not what the others begin with.
    found = replace(it.core.job.durable, recut=((107, "another"),), complete=((107, "own"),))
    again = restarted(it, it.core.dump(), found)
    rejoin(again, [0, 2, node], epoch=it.core.epoch)
    answer(again)
    assert again.core.phase is Phase.STARTING and again.active == [0, 2, node] and len(again.core.assignment) == 3
    assert again.told(r.ResumeAt) == [it.told(r.ResumeAt)[-1]] and again.told(r.ResumeAt)[-1].generation == 107
    again = restarted(it, it.core.dump(), found)
    rejoin(again, [0, 2, node], epoch=it.core.epoch)
    answer(again, without=[1])
    assert again.told(r.ResumeAt) == [r.ResumeAt(100, it.told(r.DrainShards)[0].name)]


def test_what_is_drained_at_leisure_gives_way_to_a_newer_generation_that_brings_a_replica_back() -> None:
    it = narrower(durable=DURABLE)
    it.wait(600.0)
    it.commit(100)
    slow = it.told(r.DrainShards)[-1]
    assert slow.generation == 100 and slow.seconds > 0
    it.commit(101)
    assert it.told(r.DrainShards)[-1] is slow
    come(it)
    it.commit(102)
    assert it.events("grown")[0]["iteration"] == 102 and it.told(r.DrainShards)[-1] is slow
    assert it.told(r.GiveUpDrain) == [r.GiveUpDrain(slow.name, 0)]
    answer(it)
    begin(it)
    it.commit(103)  # what was given up is caught up with
    assert it.told(r.DrainShards)[-1].generation == 103
    it.feed(r.ShardsDrained(0, slow.name, [], "it was given up"))
    write(it)
    assert it.core.durable == 103


@pytest.mark.parametrize("grows", [True, False])
def test_a_generation_that_was_not_drained_when_the_width_changed_is_due_with_the_first_commit_after(
    grows: bool,
) -> None:
    it = narrower(durable=DURABLE)
    if grows:
        come(it)
        it.commit(100)
    else:
        it.lose(0)
        it.arrive(100)  # which no node had told that it is committed
        it.prepare()
    answer(it)
    assert it.told(r.ResumeAt)[-1].generation == 100
    begin(it)
    it.commit(101)
    assert it.told(r.DrainShards)[-1].generation == 101


def test_what_a_preempted_job_drains_is_not_given_up_for_a_replica_that_could_come_back() -> None:
    it = narrower(durable=DURABLE)
    it.commit(7)
    it.take(it.core.preempted(it.now))
    last = it.told(r.DrainShards)[-1]
    assert last.generation == 7
    come(it)
    it.commit(8)
    assert it.told(r.DrainShards)[-1] is last and not it.told(r.GiveUpDrain) and not it.events("grown")


@pytest.mark.parametrize("restarts", [False, True])
def test_a_job_that_megatron_is_told_to_end_does_not_grow_any_more(restarts: bool) -> None:
    it = narrower()
    come(it)
    it.take(it.core.preempted(it.now))
    assert it.told(r.ExitNotice)
    if restarts:
        it = restarted(it, it.core.dump())
        rejoin(it, [0, 2, 3], epoch=2, kept=(2, 6))
        it.park([3])
    it.commit(7)
    assert it.core.committed == 7 and not it.events("grown")


def test_processes_that_begin_anew_are_told_as_well_that_the_job_is_to_end() -> None:
    it = job()
    it.take(it.core.preempted(it.now))
    it.lose(1)  # the machines go one after the other
    drain(it)
    told = len(it.told(r.ExitNotice))
    begin(it)
    assert len(it.told(r.ExitNotice)) == told + 1 and len(it.events("exit_notice")) == 1


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
    it.lose(2)
    assert coming in it.active and it.core.phase is Phase.STARTING
    it.lose(3)
    assert coming not in it.active and it.core.nodes[coming].role == "spare"
    it.join([coming])
    it.park([coming])
    answer(it)
    assert it.told(r.ResumeAt)[-1].generation == 7
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
    answer(it)
    assert it.events("shrunk")[-1]["lost"] == [node] and it.told(r.ResumeAt)[-1].memory.base.generation == 107
    before = it.core.epoch - 1
    it.feed(
        r.WorkerFailed(0, 0, 0, "setup", before, -1, Exit.USAGE, "", "", "the same, told when that start was over", "")
    )
    it.feed(r.WorkerExited(2, 0, 1, 20, 1, before))
    assert it.finish is None
    begin(it)
    it.commit(108)
    assert it.core.committed == 108


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


@pytest.mark.parametrize("durable", [MEMORY, DURABLE])
def test_an_error_on_a_node_that_had_trained_ends_a_new_start_and_where_nothing_is_durable_the_next_one(
    durable: DurableSpec,
) -> None:
    it, _ = growing(durable)
    if not durable.directory:  # with the job its state would go, for what may have been a passing error
        epoch, before = it.core.epoch, base(it)
        it.feed(r.WorkerExited(2, 0, 1, 20, 1, epoch))
        assert it.finish is None and it.core.epoch == epoch + 1 and base(it) == before
        answer(it)
    it.feed(r.WorkerExited(2, 0, 1, 21, 1, it.core.epoch))
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
    return it, name, seal(it, name)


@pytest.mark.parametrize("answers", ["first", "late", "never"])
@pytest.mark.parametrize("error", ["", "no space left"])
def test_a_manifest_that_nobody_waits_for_any_more_counts_as_its_writer_says(error: str, answers: str) -> None:
    """The job begins anew from memory, and there is lost what it begins with."""
    it, name, writer = sealing()
    it.commit(201)
    it.lose(next(node for node in it.active if node != writer))
    it.arrive(201)
    it.prepare()
    said = r.GenerationSealed(writer, name, error, [])
    if answers == "first":
        it.feed(said)
    answer(it, without=[0])
    complete = 200 if answers != "first" or not error else 100
    assert it.finish is None and it.told(r.ResumeAt)[-1].generation == complete
    if answers == "late":
        it.feed(said)
        it.feed(said)
    if answers != "first" and error:  # that it is not whole is found by those that read it
        it.feed(r.FetchFailed(it.core.epoch, 0, 0, -1, 200, "/durable/x cannot be read: no manifest"))
        assert it.finish is None and it.told(r.ResumeAt)[-1].generation == 100
    begin(it)
    if error and answers != "never":
        assert it.core.durable == 100
        it.lose(it.active[0])  # nothing is committed: again from there
        assert it.told(r.ResumeAt)[-1].generation == 100


@pytest.mark.parametrize("how", ["in memory", "told"])
def test_a_manifest_of_another_width_is_nothing_that_a_recovery_goes_back_to(how: str) -> None:
    it, name, writer = sealing()
    it.commit(201)
    it.lose(next(node for node in it.active if node != writer))
    it.arrive(201)
    it.prepare()
    answer(it)
    begin(it)
    if how == "told":
        it.feed(r.GenerationSealed(writer, name, "", []))
    it.commit(202)
    write(it, "no space left")
    it.lose(it.active[0])
    for node in sorted(it.core.recovery.givers if it.core.recovery is not None else ()):
        it.feed(r.Offer(it.core.epoch, node, {}, {}, {}, arrived=True))
    assert not it.events("durable_fallback") and it.core.phase is Phase.STARTING
    assert it.told(r.ResumeAt)[-1] == r.ResumeAt(200, name)


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


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("fewer", [True, False])
def test_what_may_be_durable_is_what_a_start_begins_with_until_those_that_read_it_find_that_it_is_not(
    fewer: bool, memory: bool
) -> None:
    """Who was to write its manifest is lost, with all that memory had; nodes may come before the job is narrower."""
    it, name, writer = sealing()
    it.commit(201)
    gone = next(group for group in it.core.protection.groups if writer in group)
    for node in [writer] if memory else gone:
        it.lose(node)
    for _ in gone if not fewer else ():
        _, node, actions = it.core.add_spare("", it.now)
        it.take(actions)
        it.join([node])
    if memory:
        it.arrive(201)
        it.prepare()
        answer(it, without=[0])
    for node in sorted(it.core.recovery.givers if it.core.recovery is not None else ()):
        it.feed(r.Offer(it.core.epoch, node, {}, {}, {}, arrived=True))
    assert it.core.phase is Phase.STARTING
    (begun,) = it.events("shrunk")
    assert (begun["width"] < 4, begun["iteration"]) == (fewer, 201 if memory else 200)
    why = "/durable/x cannot be read: no manifest"
    if fewer:
        assert it.told(r.ResumeAt)[-1] == r.ResumeAt(200, name)
        it.feed(r.FetchFailed(it.core.epoch, it.active[0], 0, -1, 200, why))
        assert it.told(r.ResumeAt)[-1].generation == 100
    else:
        assert it.told(r.LoadShards)[-1].name == name
        it.feed(r.ShardsLoaded(it.active[0], name, why, it.core.epoch))
        assert it.told(r.LoadShards)[-1].generation == 100
    assert it.finish is None


def test_what_is_durable_of_another_width_is_shown_and_said() -> None:
    it = job(durable=DURABLE)
    it.commit(100)
    write(it)
    it.lose(1)
    it.arrive(100)
    it.prepare()
    answer(it)
    begin(it)
    assert it.core.durable == 100
    it.commit(200)
    write(it, "no space left")
    assert "generation 100 stays durable" in it.events("durable_failed")[-1]["message"]


def test_a_preemption_of_a_narrower_job_that_begins_with_what_is_durable_leaves_at_once_and_names_it() -> None:
    it, _ = growing(DURABLE)
    cannot_read(it, 0, 0)
    assert it.told(r.ResumeAt)[-1].generation == 100
    it.take(it.core.preempted(it.now))
    code, message = it.end
    assert code == Exit.PREEMPTED and "generation 100 is durable" in message


def test_a_preemption_of_a_job_that_begins_with_what_is_in_memory_leaves_when_its_first_commit_is_durable() -> None:
    it, _ = growing(DURABLE)
    it.take(it.core.preempted(it.now))
    assert it.finish is None
    begin(it)
    it.commit(108)
    assert it.told(r.DrainShards)[-1].generation == 108
    write(it)
    assert it.end[0] == Exit.PREEMPTED and "generation 108 is durable" in it.end[1]


@pytest.mark.parametrize("durable", [100, None])
def test_a_preemption_of_a_job_that_does_not_come_to_its_first_commit_in_time_says_what_is_durable(
    durable: int | None,
) -> None:
    if durable:
        it, _ = growing(DURABLE)
    else:
        it = shrinking(durable=DURABLE)
        answer(it)
    it.take(it.core.preempted(it.now))
    cannot_read(it, 0, 0)
    assert it.finish is None and all(not each.gone for node, each in it.core.nodes.items() if node != 1)
    it.wait(61.0)
    code, message = it.end
    assert code == Exit.PREEMPTED and ("generation 100" if durable else "there is none") in message


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
    it = narrower(durable=DURABLE)
    for generation in (100, 200):
        it.commit(generation)
        write(it)
    come(it)
    it.commit(201)
    answer(it, without=[0])
    assert it.told(r.ResumeAt)[-1].generation == 200
    cannot_read(it, 0, 0)
    it.feed(r.FetchFailed(it.core.epoch - 1, 2, 1, -1, 200, "which the news of the new start has not reached"))
    assert it.core.phase is Phase.STARTING and it.told(r.ResumeAt)[-1].generation == 100
    assert len(it.core.assignment) == 3 and it.told(r.Roster)[-1].epoch == it.core.epoch
    cannot_read(it, 0, 0)
    assert it.end[0] == Exit.USAGE and "no other durable generation is there" in it.end[1]


def test_a_generation_of_this_width_that_cannot_be_read_gives_way_to_one_of_more_ranks() -> None:
    spec = replace(DURABLE, complete=((6, "of three"),), recut=((5, "of four"),))
    it = SimulatedJob(3, 0, 1, durable=spec, replica=1, when_out_of_spares="shrink")
    it.join()
    load = it.told(r.LoadShards)[-1]
    assert load.generation == 6
    it.feed(r.ShardsLoaded(2, load.name, "its checksum does not fit", it.core.epoch))
    assert it.finish is None and it.core.phase is Phase.STARTING and it.core.epoch > load.epoch
    assert it.told(r.ResumeAt)[-1] == r.ResumeAt(5, "of four")
    begin(it)


def test_a_node_that_comes_and_cannot_read_is_lost_once_all_others_can() -> None:
    it, node = growing()
    cannot_read(it, node, 2)
    it.register(0)
    assert it.finish is None and node in it.active
    it.register(1)
    assert it.events("shrunk")[-1]["lost"] == [node] and it.active == [0, 2]
    answer(it)
    assert it.told(r.ResumeAt)[-1].generation == 107 and not it.events("base_lost")
    begin(it)


def test_a_node_that_comes_is_not_lost_where_what_it_cannot_read_is_damaged() -> None:
    it, node = growing(DURABLE)
    cannot_read(it, node, 2)
    it.register(0)
    cannot_read(it, 2, 1)
    assert node in it.active and it.told(r.ResumeAt)[-1].generation == 100
    begin(it)


def test_what_no_node_can_read_is_damaged_also_where_all_of_them_have_just_come() -> None:
    it, _ = growing(DURABLE)
    assert it.told(r.ResumeAt)[-1].generation == 107
    for rank, slot in enumerate(it.core.assignment):
        it.core.members.nodes[slot.node].trained = False  # as when one node is left, and that has just come
        cannot_read(it, slot.node, rank)
    assert it.finish is None and not it.events("shrunk")[1:] and it.told(r.ResumeAt)[-1].generation == 100
    begin(it)


def test_where_another_launcher_starts_workers_the_user_is_told_what_to_move_away() -> None:
    spec = DurableSpec("/durable", "job", 100, resume=True, recut=((101, "newest"), (100, "before")))
    it = SimulatedJob(3, 0, 1, durable=spec)
    for node in range(3):
        it.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [99], respawns=False))
    assert it.told(r.ResumeAt)[-1] == r.ResumeAt(101, "newest")
    cannot_read(it, 0, 0)
    assert it.end[0] == Exit.USAGE and "move that directory away to start from generation 100" in it.end[1]


# ---- what nodes hold


def shrinking(nodes: int = 4, **more: Any) -> SimulatedJob:
    """Begins anew without node 1, and nobody has said what it holds."""
    it = job(nodes, **more)
    it.lose(1)
    it.arrive()
    it.prepare()
    assert it.core.phase is Phase.STARTING and base(it) == r.Base(1, -1, 5)
    return it


def says(it: SimulatedJob, node: int, ranks: Sequence[int], constants: Sequence[int] = (), epoch: int = 2) -> None:
    it.feed(r.SetAside(epoch, node, list(ranks), list(constants)))


def test_a_rank_that_never_was_is_held_by_nobody() -> None:
    it = shrinking()
    for node in (0, 2, 3):
        says(it, node, [0, 1, 2, 3, 4, -1], [9])
    told = it.told(r.ResumeAt)[-1].memory
    assert told.holders == [[0, 2, 3]] * 4 and told.constants == [[]] * 4


def test_where_shards_are_is_told_once_all_nodes_have_answered_in_whatever_order() -> None:
    it = shrinking()
    says(it, 3, [3, 0], [3])
    says(it, 0, [0, 1])
    says(it, 3, [3, 0], [3])  # over another connection
    assert not it.told(r.ResumeAt)[1:]
    says(it, 2, [2, 1], [2])
    (_, resume) = it.told(r.ResumeAt)
    assert resume.memory.holders == [[0, 3], [0, 2], [2], [3]] and resume.memory.constants == [[], [], [2], [3]]
    says(it, 2, [2, 1], [2])
    assert len(it.told(r.ResumeAt)) == 2 and it.finish is None


def test_spares_answer_too_and_may_be_the_only_ones_that_hold_something() -> None:
    it = job(nodes=4, replica=2)
    it.lose(1)
    it.arrive()
    it.prepare()
    (spare,) = it.core.members.spares()
    for node in it.active:
        says(it, node, [0, 1, 2])
    assert len(it.told(r.ResumeAt)) == 1
    says(it, spare, [3])
    assert it.told(r.ResumeAt)[-1].memory.holders[3] == [spare]
    it.lose(spare)  # ranks that cannot read what it had say so
    assert it.finish is None and it.core.epoch == 2


def test_what_is_said_of_a_start_that_is_over_does_not_count() -> None:
    it = shrinking()
    for node in (0, 2, 3):
        says(it, node, [0, 1, 2, 3], epoch=1)
    says(it, 1, [0, 1, 2, 3])  # which is lost
    assert len(it.told(r.ResumeAt)) == 1
    says(it, 0, [0, 1, 2, 3])
    it.lose(3)
    assert it.core.epoch == 3 and base(it) == r.Base(1, -1, 5)
    for epoch in (2, 3):
        says(it, 2, [0, 1, 2, 3], epoch=epoch)
        assert len(it.told(r.ResumeAt)) == 1
    says(it, 0, [], epoch=3)
    assert it.told(r.ResumeAt)[-1].memory.holders == [[2]] * 4
    begin(it)


@pytest.mark.parametrize("answered", [True, False])
def test_a_node_with_ranks_that_is_lost_in_the_start_has_it_begin_anew_from_the_same_generation(answered: bool) -> None:
    it = shrinking()
    answer(it, nodes=[0, 2, 3] if answered else [0])
    it.lose(3)
    assert it.active == [0, 2] and it.core.epoch == 3 and base(it) == r.Base(1, -1, 5)
    assert len(it.told(r.ResumeAt)) == 1 + answered
    answer(it)
    assert it.told(r.ResumeAt)[-1].memory == r.InMemory(r.Base(1, -1, 5), coordinates(4), [[0, 2]] * 4, [[]] * 4)
    begin(it)


@pytest.mark.parametrize("answered", [True, False])
def test_a_spare_that_is_lost_before_all_have_answered_is_not_waited_for_and_has_nothing(answered: bool) -> None:
    for needed in (False, True):
        it = job(nodes=4, replica=2)
        it.lose(1)
        it.arrive()
        it.prepare()
        (spare,) = it.core.members.spares()
        says(it, it.active[0], [0, 1])
        if answered:
            says(it, spare, [3])
        else:
            says(it, it.active[1], [2] if needed else [2, 3])
        it.lose(spare)
        if answered:
            assert len(it.told(r.ResumeAt)) == 1
            says(it, it.active[1], [2] if needed else [2, 3])
        if needed:
            assert it.end[0] == Exit.GENERATION_LOST and "the shard of rank 3 of generation 5" in it.end[1]
        else:
            assert it.told(r.ResumeAt)[-1].memory.holders == [[0], [0], [2], [2]] and it.core.epoch == 2


@pytest.mark.parametrize("how", ["at once", "awaited"])
def test_a_node_that_connects_again_is_told_again_what_to_set_aside_and_answers_again(how: str) -> None:
    it = shrinking()
    answer(it, nodes=[0, 2])
    told = len(it.told(r.Roster, 3))
    if how == "awaited":
        it.take(it.core.node_away(3, it.now))
    rejoin(it, [3], epoch=2)
    (again,) = it.told(r.Roster, 3)[told:]
    assert again.base == r.Base(1, -1, 5) and len(it.told(r.ResumeAt)) == 1
    says(it, 3, [2, 3])
    assert it.told(r.ResumeAt)[-1].memory.holders == [[0], [0, 2], [2, 3], [0, 3]]
    rejoin(it, [0], epoch=2)
    assert it.told(r.ResumeAt, 0)[-1] == it.told(r.ResumeAt)[-2] and it.core.epoch == 2
    begin(it)


def test_an_answer_that_was_lost_with_a_connection_is_asked_for_again_where_workers_have_begun_anew_since() -> None:
    it = shrinking()
    answer(it, nodes=[0, 2])
    told = len(it.told(r.Roster, 3))
    it.feed(r.Join(3, 1003, "127.0.0.1", 2003, [33], epoch=2))
    assert [each.base for each in it.told(r.Roster, 3)[told:]] == [r.Base(1, -1, 5)]
    answer(it, nodes=[3])
    it.feed(r.Join(3, 1003, "127.0.0.1", 2003, [34], epoch=2))
    assert len(it.told(r.Roster, 3)) == told + 1 and it.told(r.ResumeAt, 3)[-1].generation == 5
    begin(it)


def test_nobody_decides_over_a_generation_while_a_node_that_may_hold_it_is_away() -> None:
    it = shrinking()
    it.take(it.core.node_away(3, it.now))
    answer(it, nodes=[0, 2], without=[3])
    assert it.finish is None and not it.events("base_lost")
    it.wait(60.0)
    assert it.core.nodes[3].role == "lost" and it.core.epoch == 3 and it.active == [0, 2]
    answer(it, without=[3])
    assert it.end[0] == Exit.GENERATION_LOST


def test_a_coordinator_that_takes_over_knows_of_a_loss_in_the_start_that_the_one_before_had_not_told() -> None:
    it = shrinking(nodes=4)
    it.take(it.core.node_away(3, it.now))
    it.lose(0)  # the others hear of it when node 3 is back
    assert it.core.epoch == 2
    again = restarted(it, it.core.dump())
    rejoin(again, [2, 3], epoch=2)
    assert again.core.epoch == 3 and again.active == [2, 3] and base(again) == r.Base(1, -1, 5)
    answer(again)
    begin(again)


def test_a_generation_that_nobody_can_read_any_more_in_memory_ends_the_job_where_nothing_is_durable() -> None:
    it = shrinking()
    answer(it)
    before = base(it)
    cannot_read(it, 0, 0)
    assert it.finish is None and base(it) == before, "once it may have been the fault of who read"
    answer(it)
    cannot_read(it, 0, 0)
    code, message = it.end
    assert code == Exit.GENERATION_LOST and "cannot be read: it is damaged" in message
    assert it.events("base_lost")[0]["iteration"] == 5


def test_a_generation_that_nobody_can_read_any_more_in_memory_gives_way_to_what_is_durable() -> None:
    it, _ = growing(DURABLE)
    epoch = it.core.epoch
    cannot_read(it, 0, 0)
    assert it.core.epoch == epoch + 1 and base(it) is None and len(it.core.assignment) == 3
    assert it.told(r.ResumeAt)[-1] == r.ResumeAt(100, it.told(r.DrainShards)[0].name)
    says(it, 0, [0], epoch=epoch)
    answered = restarted(it, it.core.dump())  # it counts no more
    rejoin(answered, it.active, epoch=epoch + 1)
    assert base(answered) is None and answered.told(r.ResumeAt) == [it.told(r.ResumeAt)[-1]]
    begin(it)


@pytest.mark.parametrize("repeatable", [True, False])
def test_what_a_job_begins_with_is_of_one_epoch_where_the_run_is_not_repeatable(repeatable: bool) -> None:
    it = job(nodes=4)
    it.core._layout.repeatable = repeatable
    it.take(it.core.inject(r.Fault("abort", 0), it.now)[1])
    it.recover()
    it.lose(1)
    it.arrive()
    it.prepare()
    assert base(it) == r.Base(2, -1 if repeatable else 0, 5)
    answer(it)
    assert it.told(r.ResumeAt)[-1].memory.base == base(it)


@pytest.mark.parametrize("trained", [True, False])
def test_a_loss_before_the_first_commit_has_the_job_begin_anew_from_the_same_generation(trained: bool) -> None:
    it = shrinking()
    answer(it)
    begin(it)
    if trained:
        it.iterate(5)
    it.lose(3)
    if trained:
        assert it.told(r.Declare)[-1].purpose == "drain"
        for node in (0, 2):
            it.feed(r.Offer(it.core.epoch, node, {node: 6}, {}, {}, arrived=True))
    assert it.core.phase is Phase.STARTING and it.active == [0, 2] and base(it) == r.Base(1, -1, 5)
    answer(it)
    assert it.told(r.ResumeAt)[-1].memory.coordinates == coordinates(4)
    begin(it)
    it.commit(6)
    assert it.core.committed == 6


def test_a_coordinator_that_takes_over_before_the_first_commit_begins_anew_from_the_same_generation() -> None:
    it = shrinking()
    answer(it)
    begin(it)
    it.iterate(5)
    again = restarted(it, it.core.dump())
    rejoin(again, [0, 2, 3], epoch=2, iteration=5)
    assert again.core.phase is Phase.RUNNING
    again.lose(3)
    for node in (0, 2):
        again.feed(r.Offer(again.core.epoch, node, {node: None}, {}, {}, arrived=True))
    assert again.core.phase is Phase.STARTING and again.active == [0, 2] and base(again) == r.Base(1, -1, 5)
    answer(again)
    assert again.told(r.ResumeAt)[-1].memory.coordinates == coordinates(4)


def test_with_the_first_commit_of_the_new_width_what_it_began_with_counts_no_more() -> None:
    it = shrinking(nodes=5)
    answer(it)
    begin(it)
    it.commit(6, nodes=[0, 2, 3])
    assert it.core.dump()["layout"]["base"] is not None
    actions = it.core.received(r.Committed(2, 4, 6), it.now)
    kept = [each for each in actions if isinstance(each, Keep) and "layout" in each.parts]
    assert kept[-1].parts["layout"]["base"] is None
    for each in (it, restarted(it, it.core.dump())):
        if each is not it:
            rejoin(each, [0, 2, 3, 4], epoch=2, kept=(2, 6))
        each.lose(3)
        each.lose(4)
        for node in (0, 2):
            each.feed(r.Offer(each.core.epoch, node, {node: None}, {}, {}, arrived=True))
        assert each.end[0] == Exit.NO_SPARE and "no generation is complete in memory" in each.end[1]


def test_a_job_does_not_grow_before_something_of_its_width_is_committed() -> None:
    it = shrinking()
    answer(it)
    begin(it)
    come(it)
    it.iterate(5)
    assert not it.events("grown")
    it.commit(6)
    assert base(it) == r.Base(2, 2, 6)
