"""The promise: what is durable is decided by commits alone, a failed drain costs that drain, and memory comes first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.durable import DurableSpec
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.members import Members
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.durable import ShardFile
from deadpool_megatron.durable.format import generation_of
from simulated import DEADLINES, SimulatedJob


def spec(**more: Any) -> DurableSpec:
    return DurableSpec("/durable", "job", **{"interval": 4, **more})


def job(spares: int = 1, **more: Any) -> SimulatedJob:
    """Three nodes of two ranks train."""
    return SimulatedJob(nodes=3 + spares, spares=spares, durable=spec(**more)).train()


def run(job: SimulatedJob, generations: range) -> None:
    for generation in generations:
        job.now += 1.0
        job.commit(generation)


def drained(job: SimulatedJob, name: str, node: int, error: str = "") -> None:
    ranks = [rank for rank, slot in enumerate(job.core.assignment) if slot.node == node]
    shards = [ShardFile(rank, f"rank-{rank:05d}.safetensors", 100, "0", "layout") for rank in ranks]
    job.feed(r.ShardsDrained(node, name, [] if error else shards, error))


def names(job: SimulatedJob) -> list[str]:
    return [record.name for record in job.told(r.DrainShards)]


def make_durable(job: SimulatedJob, error: str = "") -> str:
    """The drain under way comes to its end."""
    name = names(job)[-1]
    for node in job.active:
        drained(job, name, node)
    seal = job.told(r.SealGeneration)[-1]
    assert seal.name == name and [shard.rank for shard in seal.shards] == list(range(6))
    job.feed(r.GenerationSealed(job.core.assignment[0].node, name, error, []))
    return name


# ---- no directory


def test_without_a_directory_training_begins_with_nothing_and_nothing_is_drained() -> None:
    """The number of replicas may change nevertheless."""
    it = SimulatedJob(nodes=4, spares=1, durable=DurableSpec("", "", resume=True)).train()
    assert it.told(r.ResumeAt) == [r.ResumeAt(-1)]
    run(it, range(300))
    assert not names(it) and it.core.durable == -1 and not it.core.dump()["now"]["durable"]
    it.take(it.core.preempted(it.now))
    assert it.told(r.ExitNotice) and it.finish is None
    it.lose(0)
    it.recover(299)
    assert it.core.phase is Phase.RUNNING
    it.take(it.core.inject(r.Fault("abort", 0), it.now)[1])
    for node in it.active:
        it.feed(r.Offer(it.core.epoch, node, {}, {}, {}, arrived=True))
    assert it.end[0] == Exit.GENERATION_LOST and "durable" not in it.end[1]


# ---- draining


def test_every_kth_generation_is_drained_after_its_commit_one_at_a_time() -> None:
    it = job()
    run(it, range(5))
    (order,) = it.told(r.DrainShards)
    assert (order.generation, generation_of(order.name)) == (4, 4)
    run(it, range(5, 10))
    assert len(names(it)) == 1  # the first is not through yet
    make_durable(it)
    assert it.core.durable == 4
    run(it, range(10, 12))
    assert [order.generation for order in it.told(r.DrainShards)] == [4, 10]  # what was due is caught up with


def test_a_drain_is_spread_over_half_the_time_until_the_next_one() -> None:
    it = job()
    run(it, range(5))  # a second a generation
    assert it.told(r.DrainShards)[0].seconds == 2.0


def test_nothing_is_durable_before_the_manifest_is_and_every_shard_is_in_it() -> None:
    it = job()
    run(it, range(5))
    name = names(it)[0]
    for node in (0, 1):
        drained(it, name, node)
    assert not it.told(r.SealGeneration)
    drained(it, name, 2)
    assert it.told(r.SealGeneration) and it.core.durable == -1
    it.feed(r.GenerationSealed(0, name, "", []))
    assert it.core.durable == 4
    assert it.events("durable")[0]["bytes"] == 600


def test_only_as_many_as_asked_for_are_kept() -> None:
    it = job(keep=2)
    run(it, range(5))
    first = make_durable(it)
    run(it, range(5, 9))
    second = make_durable(it)
    run(it, range(9, 13))
    make_durable(it)
    assert [seal.keep for seal in it.told(r.SealGeneration)] == [[], [first], [second]]


@pytest.mark.parametrize("how", ["its node is lost", "its drainer ends", "the disk is full", "it takes too long"])
def test_what_may_have_been_sealed_is_not_removed_and_counts_where_memory_cannot_answer(how: str) -> None:
    """Found by the simulation: who sealed a generation, and removed older ones, was cut off before it could say so."""
    it = job(keep=1)
    run(it, range(5))
    first = make_durable(it)
    run(it, range(5, 9))
    name = names(it)[-1]
    for node in it.active:
        drained(it, name, node)
    sealer = it.told(r.SealGeneration)[-1]
    assert sealer.name == name and not sealer.keep
    if how == "its node is lost":
        it.lose(it.core.assignment[0].node)
    elif how == "it takes too long":
        it.wait(3000.0)
    else:
        it.feed(r.GenerationSealed(it.core.assignment[0].node, name, how, [], how == "its drainer ends"))
    (given_up,) = [each for each in it.told(r.GiveUpDrain) if each.name == name]
    removed = how == "the disk is full"
    durability = it.core._durability
    assert given_up.remover == (it.core.assignment[0].node if removed else -1)
    assert durability.fallback() == ((4, first) if removed else (8, name))
    assert [*durability.dump()][-1] == (4, first)
    assert list(durability.bad(name, "no such file")) == [] and durability.fallback() == (4, first)


def test_a_failed_drain_is_told_and_training_and_the_durable_generation_stay() -> None:
    it = job()
    run(it, range(5))
    make_durable(it)
    run(it, range(5, 9))
    name = names(it)[-1]
    drained(it, name, 1, "[Errno 28] No space left on device")
    (failed,) = it.events("durable_failed")
    assert "generation 8 could not be drained to /durable: node 1: [Errno 28]" in failed["message"]
    assert "generation 4 stays durable" in failed["message"]
    assert it.told(r.GiveUpDrain)[-1] == r.GiveUpDrain(name, 0)
    assert it.core.phase is Phase.RUNNING and it.core.durable == 4
    drained(it, name, 0)  # too late: means nothing
    run(it, range(9, 12))
    assert len(names(it)) == 2  # not tried again at every commit
    run(it, range(12, 13))
    make_durable(it)
    assert it.core.durable == 12


def test_a_manifest_that_cannot_be_written_makes_nothing_durable() -> None:
    it = job()
    run(it, range(5))
    make_durable(it, "[Errno 5] Input/output error")
    assert it.core.durable == -1 and it.events("durable_failed")


def test_a_drain_that_takes_too_long_is_given_up_and_told() -> None:
    it = job(deadline=30.0)
    run(it, range(5))
    it.wait(31.0)
    (failed,) = it.events("durable_failed")
    assert "nodes 0, 1, 2 took longer than --deadpool-durable-deadline (30 s)" in failed["message"]
    assert it.core.phase is Phase.RUNNING
    run(it, range(5, 9))
    assert len(names(it)) == 2


def test_a_node_lost_while_its_shard_is_drained_costs_that_attempt_which_is_made_again() -> None:
    it = job()
    run(it, range(5))
    name = names(it)[0]
    drained(it, name, 0)
    it.lose(1)
    assert it.told(r.GiveUpDrain)[-1].name == name
    it.recover(4)
    run(it, range(5, 6))
    assert [order.generation for order in it.told(r.DrainShards)] == [4, 5]
    assert len(set(names(it))) == 2
    make_durable(it)
    assert it.core.durable == 5


def test_a_loss_after_the_last_shard_does_not_undo_the_drain() -> None:
    it = job()
    run(it, range(5))
    for node in it.active:
        drained(it, names(it)[0], node)
    it.lose(1)
    it.feed(r.GenerationSealed(0, names(it)[0], "", []))
    assert it.core.durable == 4


def test_without_a_durable_directory_nothing_is_drained() -> None:
    it = SimulatedJob().train()
    run(it, range(300))
    assert not it.told(r.DrainShards) and it.core.durable == -1


# ---- when memory cannot answer


def lose_two_neighbours(it: SimulatedJob) -> None:
    """A node and its peer: ranks 0 and 1 are nowhere any more."""
    it.lose(0)
    it.lose(1)


def test_memory_that_can_answer_is_asked_first() -> None:
    it = job(complete=((3, "generation-000000000003-x-1"),))
    run(it, range(4, 6))
    it.lose(0)
    it.arrive(5)
    assert it.told(r.Agree)[-1].generation == 5 and it.told(r.Agree)[-1].durable == ""


def test_more_losses_than_memory_covers_go_back_to_the_durable_generation_with_the_sentence_that_says_so() -> None:
    it = job(spares=2)
    run(it, range(7))
    name = make_durable(it)
    run(it, range(7, 8))
    lose_two_neighbours(it)
    it.arrive(6)
    agree = it.told(r.Agree)[-1]
    assert (agree.generation, agree.sources, agree.durable) == (4, {}, name)
    (told,) = it.events("durable_fallback")
    assert told["message"] == (
        "more nodes were lost than the redundancy covers, which is any 1 node: no vault holds the shards of ranks 0, 1 "
        "any more; training goes back to durable generation 4"
    )
    it.prepare()
    it.form()
    run(it, range(4, 5))  # the vaults have it in two places again before training goes on
    it.restore()
    it.resume(4)
    assert it.core.phase is Phase.RUNNING and it.core.committed == 4
    run(it, range(5, 6))
    assert [order.generation for order in it.told(r.DrainShards)] == [4]  # it is durable: not once more
    run(it, range(6, 9))
    assert [order.generation for order in it.told(r.DrainShards)] == [4, 8]


def test_nothing_is_drained_before_a_spares_worker_has_said_what_its_shard_is() -> None:
    it = job()
    run(it, range(4))
    it.lose(1)
    it.arrive(3)
    it.prepare()
    it.form()
    run(it, range(4, 5))  # committed by the vaults alone
    it.restore()
    it.resume(4)
    assert not it.told(r.DrainShards)
    run(it, range(5, 6))
    assert [order.generation for order in it.told(r.DrainShards)] == [5]


def test_a_durable_generation_that_cannot_be_read_gives_way_to_the_one_before() -> None:
    it = job(spares=2, complete=((8, "newer"), (4, "older")))
    run(it, range(9, 10))
    lose_two_neighbours(it)
    it.arrive(9)
    assert it.told(r.Agree)[-1].durable == "newer"
    it.feed(r.FetchFailed(it.core.epoch, 2, 4, -1, 8, "its checksum does not fit"))
    it.arrive(9)
    assert it.told(r.Agree)[-1].durable == "older"
    it.feed(r.FetchFailed(it.core.epoch, 2, 4, -1, 4, "gone"))
    it.arrive(9)
    code, message = it.end
    assert code == Exit.GENERATION_LOST and "more nodes were lost than the redundancy covers" in message
    assert message.endswith("what is durable in /durable a new job finds with --deadpool-resume auto"), "perhaps others"


def test_a_node_that_changes_what_is_durable_in_memory_condemns_no_durable_generation_and_is_lost_in_the_end() -> None:
    it = job(spares=3, complete=((8, "newer"),))
    run(it, range(9))
    it.lose(1)
    it.lose(0)
    first = it.core.epoch
    while it.core.nodes[2].role == "active":
        for node in it.core.members.present():
            it.feed(r.Offer(it.core.epoch, node, {}, {}, {}))
        assert it.told(r.Agree)[-1].durable == "newer" and it.core.epoch - first <= it.core.job.worker_deaths
        it.feed(r.FetchFailed(it.core.epoch, 2, 4, 2, 8, "chunk 0 has changed in memory", it.core.epoch))
    assert it.core.nodes[2].role == "lost" and it.core.durable == 8


def test_a_job_that_must_end_says_what_is_durable() -> None:
    it = SimulatedJob(nodes=2, spares=0, can_rescue=False, durable=spec(complete=((4, "older"),))).train()
    it.lose(0)
    code, message = it.end
    assert code == Exit.NO_SPARE
    assert message.endswith("generation 4 is durable in /durable: start the job again with --deadpool-resume auto")


# ---- the start of a new job


def loading(complete: tuple[tuple[int, str], ...], spares: int = 0) -> SimulatedJob:
    it = SimulatedJob(nodes=3 + spares, spares=spares, durable=spec(complete=complete, resume=True))
    it.join()
    return it


def test_a_new_job_begins_with_the_newest_generation_once_every_vault_holds_it() -> None:
    it = loading(((8, "newer"), (4, "older")))
    assert it.told(r.LoadShards) == [r.LoadShards("newer", 8)]
    for node in (0, 1):
        it.feed(r.ShardsLoaded(node, "newer", ""))
    assert not it.told(r.ResumeAt)
    it.feed(r.ShardsLoaded(2, "newer", ""))
    assert it.told(r.ResumeAt) == [r.ResumeAt(8)]
    for rank in range(6):
        it.register(rank)
    run(it, range(8, 12))
    assert not it.told(r.DrainShards)
    run(it, range(12, 13))
    assert it.told(r.DrainShards)[0].generation == 12


def test_a_generation_that_one_node_cannot_read_is_told_and_the_one_before_is_taken_by_all() -> None:
    it = loading(((8, "newer"), (4, "older")))
    it.feed(r.ShardsLoaded(0, "newer", ""))
    it.feed(r.ShardsLoaded(1, "newer", "its checksum does not fit"))
    it.feed(r.ShardsLoaded(2, "newer", ""))
    assert [record.name for record in it.told(r.LoadShards)] == ["newer", "older"]
    assert "its checksum does not fit" in it.events("durable_failed")[0]["message"]
    for node in range(3):
        it.feed(r.ShardsLoaded(node, "older", ""))
    assert it.told(r.ResumeAt) == [r.ResumeAt(4)]


def test_a_job_never_starts_from_zero_because_nothing_can_be_read() -> None:
    it = loading(((8, "newer"),))
    it.feed(r.ShardsLoaded(1, "newer", "its checksum does not fit"))
    code, message = it.end
    assert code == Exit.GENERATION_LOST and "no durable generation in /durable can be read" in message
    assert not it.told(r.ResumeAt)


def test_one_that_was_asked_for_and_cannot_be_read_ends_the_job_with_the_names_of_the_others() -> None:
    it = SimulatedJob(nodes=3, spares=0, durable=spec(complete=((8, "newer"),), resume=True, others=(4, 2)))
    it.join()
    it.feed(r.ShardsLoaded(1, "newer", "its checksum does not fit"))
    code, message = it.end
    assert code == Exit.GENERATION_LOST and not it.told(r.ResumeAt)
    assert "durable generation 8 in /durable cannot be read (its checksum does not fit)" in message
    assert message.endswith("ask for another one that is there: 4, 2")


@pytest.mark.parametrize("spares", [0, 1])
def test_who_does_not_say_that_it_has_read_its_shards_is_named_and_lost_in_the_end(spares: int) -> None:
    """Its mount hangs. That says nothing of the generation: the others' are not given up for an older one."""
    it = loading(((8, "newer"), (4, "older")), spares)
    for node in (0, 2):
        it.feed(r.ShardsLoaded(node, "newer", ""))
    it.wait(2399.0)
    told = it.events("durable_loading")
    assert [round(each["seconds"]) for each in told] == [60, 120, 240, 480, 960, 1920]
    assert [each["nodes"] for each in told] == [[1]] * 6
    assert told[0]["message"] == (
        "60 s and no answer of node 1, to read durable generation 8 from /durable; after 2400 s a node is lost"
    )
    assert it.core.nodes[1].role != "lost"
    it.wait(2.0)
    assert it.core.nodes[1].role == "lost" and not it.events("durable_failed")
    if spares:
        assert it.active == [0, 3, 2] and it.told(r.LoadShards)[-1] == r.LoadShards("newer", 8, 1)
        for node in it.active:
            it.feed(r.ShardsLoaded(node, "newer", "", 1))
        assert it.told(r.ResumeAt) == [r.ResumeAt(8)]
        it.wait(1e6)
        assert len(it.events("durable_loading")) == 6 and it.finish is None
    else:
        code, message = it.end
        assert code == Exit.NO_SPARE and "within 2400 s: does that directory hang there?" in message


@pytest.mark.parametrize("spares", [0, 1])
def test_a_node_that_changes_what_it_reads_each_time_is_lost_before_the_start_begins_for_ever(spares: int) -> None:
    it = loading(((8, "newer"),), spares)
    for epoch in range(it.core.job.worker_deaths + 1):
        assert it.core.epoch == epoch and it.told(r.LoadShards)[-1].epoch == epoch and it.finish is None
        for node in it.active:
            it.feed(r.ShardsLoaded(node, "newer", "", epoch))
        it.feed(r.FetchFailed(epoch, 1, 2, 1, 8, "chunk 0 has changed in memory", epoch))
    assert it.core.nodes[1].role == "lost"
    if spares:
        assert it.active == [0, 3, 2] and it.told(r.LoadShards)[-1].epoch == it.core.epoch and it.finish is None
    else:
        code, message = it.end
        assert code == Exit.NO_SPARE and "\n" not in message
        assert "its memory changes what is read into it: chunk 0 has changed in memory" in message


def test_the_first_job_of_all_begins_without() -> None:
    assert loading(()).told(r.ResumeAt) == [r.ResumeAt(-1)]


def test_a_generation_of_another_number_of_replicas_is_left_to_the_ranks_and_stays_until_there_is_another() -> None:
    it = SimulatedJob(nodes=3, spares=0, durable=spec(keep=2, resume=True, recut=((8, "wider"),)))
    it.join()
    assert it.told(r.ResumeAt) == [r.ResumeAt(8, "wider")] and not it.told(r.LoadShards)
    assert it.events("durable_resumed")[0]["iteration"] == 8
    for rank in range(6):
        it.register(rank)
    run(it, range(8, 13))
    name = it.told(r.DrainShards)[0].name
    for node in range(3):
        drained(it, name, node)
    assert it.told(r.SealGeneration)[0].keep == ["wider"]


def test_a_coordinator_that_cannot_look_before_training_still_begins_at_another_width_not_from_zero() -> None:
    before = SimulatedJob(nodes=4, spares=1, durable=spec(resume=True, recut=((8, "wider"),)))
    before.join()
    it = again(again(before, ()), ())
    assert it.told(r.ResumeAt) == [r.ResumeAt(8, "wider")] and not it.told(r.LoadShards)


def test_what_a_job_at_another_width_has_itself_made_durable_comes_first_for_a_coordinator_that_cannot_look() -> None:
    before = SimulatedJob(nodes=4, spares=1, durable=spec(resume=True, recut=((8, "wider"),))).train()
    run(before, range(8, 13))
    own = make_durable(before)
    it = again(before, ())
    assert it.core._durability.fallback() == (12, own)


def test_a_job_that_went_on_at_another_width_and_must_end_says_what_is_durable() -> None:
    recut = spec(resume=True, recut=((8, "wider"),))
    it = SimulatedJob(nodes=2, spares=0, can_rescue=False, durable=recut).train()
    it.lose(0)
    assert it.end[1].endswith("generation 8 is durable in /durable: start the job again with --deadpool-resume auto")


# ---- another job's directory


def test_a_job_whose_directory_was_taken_trains_on_drains_nothing_more_and_says_so_once() -> None:
    it = job()
    run(it, range(5))
    name = names(it)[0]
    for _ in range(2):
        it.take(it.core.durable_taken("/durable belongs to job x", it.now))
    (given_up,) = it.told(r.GiveUpDrain)
    assert (given_up.name, given_up.remover) == (name, -1), "nobody removes it"
    for node in it.active:
        drained(it, name, node)  # what was under way comes too late
    run(it, range(5, 20))
    assert names(it) == [name] and not it.told(r.SealGeneration) and it.finish is None
    (told,) = it.events("durable_taken")
    assert told["message"] == "/durable belongs to job x; training goes on, and drains nothing more"


def test_a_job_whose_directory_was_taken_leaves_at_once_when_it_is_preempted() -> None:
    it = job()
    run(it, range(5))
    it.take(it.core.durable_taken("/durable belongs to job x", it.now))
    it.take(it.core.preempted(it.now))
    why = "preempted: no newer generation could be made durable: /durable belongs to job x"
    assert it.end == (Exit.PREEMPTED, why)


# ---- preemption


def test_a_preempted_job_drains_what_is_committed_at_once_and_leaves() -> None:
    it = job()
    run(it, range(7))
    assert [order.generation for order in it.told(r.DrainShards)] == [4]
    it.take(it.core.preempted(it.now))
    last = it.told(r.DrainShards)[-1]
    assert (last.generation, last.seconds) == (6, 0.0)  # the one that was under way is given up for it
    assert it.told(r.GiveUpDrain)[0].name == names(it)[0]
    make_durable(it)
    assert it.end == (Exit.PREEMPTED, "preempted: generation 6 is durable in /durable, and the job has left")


def test_a_preempted_job_leaves_although_it_has_committed_newer_generations_meanwhile() -> None:
    it = job()
    run(it, range(3))
    it.now += 1.0
    it.take(it.core.preempted(it.now))
    run(it, range(3, 9))  # iterations are faster than a drain
    make_durable(it)
    assert it.end == (Exit.PREEMPTED, "preempted: generation 2 is durable in /durable, and the job has left")


def test_a_drain_that_is_nearly_through_at_the_notice_is_followed_by_one_of_the_newest_generation() -> None:
    it = job()
    run(it, range(7))
    for node in it.active:
        drained(it, names(it)[0], node)  # its manifest is being written
    it.now += 1.0
    it.take(it.core.preempted(it.now))
    it.now += 1.0
    it.feed(r.GenerationSealed(it.core.assignment[0].node, names(it)[0], "", []))
    assert it.told(r.DrainShards)[-1].generation == 6 and it.finish is None  # without waiting for a commit
    make_durable(it)
    assert it.end == (Exit.PREEMPTED, "preempted: generation 6 is durable in /durable, and the job has left")


def test_a_second_notice_changes_nothing() -> None:
    it = job()
    run(it, range(3))
    for _ in range(2):
        it.take(it.core.preempted(it.now))
    assert len(names(it)) == 1


def test_a_preempted_job_that_cannot_drain_leaves_in_time_and_says_what_there_is() -> None:
    it = job(preempt_deadline=20.0, complete=((4, "older"),))
    run(it, range(5, 7))
    it.take(it.core.preempted(it.now))
    it.wait(21.0)
    code, message = it.end
    assert code == Exit.PREEMPTED
    assert "--deadpool-preempt-deadline (20 s)" in message and "the newest is generation 4" in message


def test_a_preempted_job_whose_newest_generation_is_durable_leaves_at_once() -> None:
    it = job()
    run(it, range(5))
    make_durable(it)
    it.take(it.core.preempted(it.now))
    assert it.end[0] == Exit.PREEMPTED and "generation 4 is durable" in it.end[1]


# ---- a coordinator that starts again


def again(before: SimulatedJob, complete: tuple[tuple[int, str], ...]) -> SimulatedJob:
    """Another coordinator in the place of the one of ``before``."""
    it = SimulatedJob(nodes=4, spares=1, durable=spec(complete=complete, resume=True))
    it.take(it.core.restored(json.loads(json.dumps(before.core.dump())), it.now))
    for node, state in it.core.nodes.items():
        it.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, list(state.pids.values())))
    return it


def test_a_node_lost_while_it_loads_its_shards_is_replaced_and_all_load_again() -> None:
    it = loading(((8, "newer"), (4, "older")), spares=1)
    it.feed(r.ShardsLoaded(0, "newer", ""))
    it.lose(1)
    assert it.told(r.LoadShards) == [r.LoadShards("newer", 8, 0), r.LoadShards("newer", 8, 1)]
    for node in it.active:
        it.feed(r.ShardsLoaded(node, "newer", "", 0))  # on its way since before the loss
    assert not it.told(r.ResumeAt)
    for node in it.active:
        it.feed(r.ShardsLoaded(node, "newer", "", 1))
    assert it.told(r.ResumeAt) == [r.ResumeAt(8)]


def test_a_coordinator_that_starts_again_loads_nothing_into_vaults_that_train_and_goes_on_draining() -> None:
    before = job()
    run(before, range(9))
    it = again(before, ((4, "older"),))
    assert it.core.phase is Phase.RUNNING and it.core.durable == 4
    assert not it.told(r.LoadShards) and not it.told(r.ResumeAt)
    run(it, range(9, 10))
    assert [order.generation for order in it.told(r.DrainShards)] == [9]


def test_a_coordinator_that_cannot_look_into_the_directory_still_knows_what_is_durable() -> None:
    before = job()
    run(before, range(7))
    make_durable(before)
    assert again(before, ()).core.durable == 4


def test_a_copy_that_fails_in_the_last_drain_gives_way_to_another_one_and_the_end_is_the_same() -> None:
    it = without_a_spare()
    it.arrive(5)
    first = it.told(r.Agree)[-1]
    rank, source = next(iter(first.sources.items()))
    holder = it.core.assignment[rank].node
    it.feed(r.FetchFailed(it.core.epoch, holder, rank, source.node, first.generation, "changed", source.version_epoch))
    assert it.core.phase is not Phase.ENDED and it.told(r.Declare)[-1].purpose == "drain"


def test_a_coordinator_that_starts_again_before_training_says_once_more_where_it_begins() -> None:
    before = SimulatedJob(nodes=4, spares=1, durable=spec(complete=((4, "older"),), resume=True))
    before.join()
    it = again(before, ((4, "older"),))
    assert it.told(r.LoadShards) == [r.LoadShards("older", 4)]


@pytest.mark.parametrize("loaded", [False, True])
def test_agents_that_were_away_while_the_coordinator_stood_still_hear_once_more_where_training_begins(
    loaded: bool,
) -> None:
    it = loading(((8, "newer"),))
    for node in range(3 if loaded else 2):
        it.feed(r.ShardsLoaded(node, "newer", ""))
    told = r.ResumeAt if loaded else r.LoadShards
    before = len(it.told(told)), len(it.told(r.Roster))
    for node in range(3):
        it.core.node_away(node, it.now, stood_still=True)
    for node in range(3):
        assert (len(it.told(told)), len(it.told(r.Roster))) == before
        it.feed(r.Join(node, 1000 + node, "127.0.0.1", 2000 + node, [10 * node, 10 * node + 1]))
    assert (len(it.told(told)), len(it.told(r.Roster))) == (before[0] + 1, before[1] + 1)
    assert it.told(told)[-1] == it.told(told)[0]


# ---- no spare, and no way to save


def without_a_spare(**more: Any) -> SimulatedJob:
    it = SimulatedJob(nodes=3, spares=0, can_rescue=False, durable=spec(interval=100, **more)).train()
    run(it, range(6))
    it.lose(1, "its agent is gone")
    declared = it.told(r.Declare)[-1]
    assert declared.purpose == "drain" and it.active == [0, 2]
    return it


def gather(it: SimulatedJob) -> None:
    """The survivors have what the lost node had."""
    it.arrive(5)
    assert it.told(r.Agree)[-1].generation == 5 and not it.told(r.Form)
    it.prepare()


def test_before_a_job_ends_for_want_of_a_spare_the_newest_generation_is_made_durable() -> None:
    it = without_a_spare()
    gather(it)
    (order,) = it.told(r.DrainShards)
    assert (order.version_epoch, order.generation, order.seconds) == (-1, 5, 0.0)
    assert it.finish is None
    make_durable(it)
    code, message = it.end
    assert code == Exit.NO_SPARE and "no spare is left for node 1 (its agent is gone)" in message
    assert "generation 5 is durable in /durable: start the job again with --deadpool-resume auto" in message


def test_a_spare_that_is_there_takes_a_part_when_the_job_ends_for_want_of_another() -> None:
    it = SimulatedJob(nodes=5, spares=1, can_rescue=False, durable=spec(interval=100)).train()
    run(it, range(6))
    for node in (0, 1):
        it.take(it.core.node_away(node, it.now))
    it.wait(0.3 * DEADLINES.lease)
    assert it.told(r.Declare)[-1].purpose == "drain" and sorted(it.active) == [2, 3, 4]


def test_what_is_durable_already_is_not_drained_again() -> None:
    it = without_a_spare(complete=((5, "there"),))
    gather(it)
    assert it.end[0] == Exit.NO_SPARE and not it.told(r.DrainShards)


def test_a_last_drain_that_fails_or_hangs_ends_the_job_all_the_same() -> None:
    it = without_a_spare()
    gather(it)
    drained(it, names(it)[-1], 0, "no space left on device")
    assert (
        it.end[0] == Exit.NO_SPARE
        and "no space left on device; the job ends" in it.events("durable_failed")[0]["message"]
    )
    it = without_a_spare(deadline=50.0)
    gather(it)
    it.wait(51)
    assert it.end[0] == Exit.NO_SPARE


def test_a_copy_that_cannot_be_drained_at_the_end_is_refused_and_the_others_are_drained() -> None:
    it = without_a_spare()
    gather(it)
    name, epoch = names(it)[-1], it.core.epoch
    it.feed(r.FetchFailed(epoch, 2, 4, 2, 5, "chunk 0 has changed in memory", 0))
    drained(it, name, 2, "chunk 0 has changed in memory")
    assert it.finish is None and it.core.epoch == epoch + 1 and it.told(r.Declare)[-1].purpose == "drain"
    it.arrive(5)
    assert it.told(r.Agree)[-1].sources[4].node == 0, "its own copy is of no use any more"
    it.prepare()
    make_durable(it)
    assert it.end[0] == Exit.NO_SPARE and it.core.durable == 5


def test_another_node_lost_while_the_last_generation_is_drained_begins_that_again() -> None:
    it = SimulatedJob(nodes=4, spares=0, can_rescue=False, durable=spec(interval=100)).train()
    run(it, range(6))
    groups = it.core.protection.groups
    it.lose(1)
    it.arrive(5)
    it.prepare()
    assert len(names(it)) == 1
    it.lose(next(node for node in it.active if not any({1, node} <= set(group) for group in groups)))
    assert it.finish is None and it.told(r.Declare)[-1].purpose == "drain" and len(it.active) == 2
    it.arrive(5)
    it.prepare()
    assert len(set(names(it))) == 2


def test_without_room_for_what_the_lost_node_had_the_job_ends() -> None:
    it = without_a_spare()
    it.arrive(5)
    it.feed(r.FetchFailed(1, 0, 2, 2, 5, "rank 2 needs memory", 0, True))
    assert it.told(r.Declare)[-1].epoch == 2 and it.core.assignment[2].node == it.core.assignment[3].node == 2
    it.arrive(5)
    it.feed(r.FetchFailed(2, 2, 2, 0, 5, "rank 2 needs memory", 0, True))
    assert it.end[0] == Exit.NO_SPARE and "node 0, 2 has no room for what it had" in it.end[1]


def holding(it: SimulatedJob, node: int, ranks: Iterable[int], generation: int = 5) -> None:
    """A node offers copies from when it had, or kept, these ranks."""
    it.feed(r.Offer(it.core.epoch, node, {}, {}, {rank: [(0, generation)] for rank in ranks}))


def only_a_spare_is_left(can_rescue: bool = False) -> SimulatedJob:
    """Node 2 has taken over from node 0, whose worker had died, and is lost with node 1 before the next commit."""
    it = SimulatedJob(nodes=3, spares=1, slots=1, can_rescue=can_rescue, durable=spec(interval=100)).train()
    run(it, range(6))
    it.feed(r.WorkerExited(0, 0, 0, 0, -9))
    assert it.active == [2, 1]
    it.recover(5)
    it.lose(1)
    it.arrive(5)
    it.lose(2)
    return it


@pytest.mark.parametrize("can_rescue", [False, True])
def test_what_a_spare_still_has_of_all_lost_nodes_is_saved_before_the_end(can_rescue: bool) -> None:
    it = only_a_spare_is_left(can_rescue)
    assert it.told(r.Declare)[-1].purpose == ("save" if can_rescue else "drain") and it.active == [0]
    holding(it, 0, (0, 1))
    assert it.told(r.Agree)[-1].generation == 5
    it.prepare()
    if can_rescue:
        it.form()
        it.restore()
        it.feed(r.Saved(it.core.epoch, 0, 5, "/ckpt"))
        assert it.end[0] == Exit.NO_SPARE_SAVED
        return
    assert it.finish is None
    drained(it, names(it)[-1], 0)
    assert it.told(r.SealGeneration, 0), "the node that knows what job it is"


@pytest.mark.parametrize("hangs", [False, True])
def test_what_megatron_cannot_save_is_made_durable_before_the_end(hangs: bool) -> None:
    it = SimulatedJob(nodes=3, spares=0, slots=1, durable=spec(interval=100)).train()
    run(it, range(6))
    it.lose(1)
    assert it.told(r.Declare)[-1].purpose == "save"
    it.arrive(5)
    it.prepare()
    it.form()
    it.restore()
    if hangs:
        it.wait(DEADLINES.build + 1)
    else:
        it.feed(r.WorkerExited(2, 0, 2, 0, 1))
    assert it.told(r.Declare)[-1].purpose == "drain" and it.core.nodes[0].role == it.core.nodes[2].role == "active"
    epoch = it.core.epoch
    it.feed(r.WorkerFailed(0, 0, 0, "training", epoch, 5, 0, "OSError", "save.py", "no space left", ""))
    it.feed(r.WorkerExited(0, 0, 0, 0, 1, epoch))
    it.feed(r.WorkerFailed(2, 0, 2, "training", epoch, 5, 0, "OSError", "save.py", "no space left", ""))
    assert it.core.epoch == epoch and it.finish is None, "what becomes of the workers is no matter any more"
    it.arrive(5)
    it.prepare()
    for node in it.active:
        drained(it, names(it)[-1], node)
    it.feed(r.GenerationSealed(0, names(it)[-1], "", []))
    code, message = it.end
    assert code == Exit.NO_SPARE and "generation 5 is durable" in message
    assert ("it took too long" if hangs else "rank 2 ended (exit code 1)") in message


def test_who_writes_the_manifest_knows_what_job_it_is() -> None:
    it = SimulatedJob(nodes=3, spares=1, slots=1, durable=spec(interval=100)).train()
    it.core.members.hand_over({0: 2})
    assert it.active == [2, 1] and it.core.members.writer() == 1, "no worker of node 2 has told"
    again = Members(it.core.job)
    again.load(json.loads(json.dumps(it.core.members.dump())))
    assert again.writer() == 1


def test_where_nothing_complete_is_left_the_job_says_so() -> None:
    it = without_a_spare()
    for node in it.active:
        ranks = [rank for rank, slot in enumerate(it.core.assignment) if slot.node == node]
        it.feed(r.Offer(it.core.epoch, node, dict.fromkeys(ranks, 5), {}, {}))
    assert it.end[0] == Exit.NO_SPARE and "no generation is complete in memory" in it.end[1]
