"""The right one is blamed: what follows from a fault elsewhere spends no spare and counts against nobody."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.core import Core
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.cluster.core.signs import CAUSE_S, XIDS, Role, role_of
from deadpool_megatron.cluster.placement.domains import parse_domains
from deadpool_megatron.cluster.records.exits import Exit
from simulated import SimulatedJob


def rack(nodes: int = 4, spares: int = 2, **more: Any) -> SimulatedJob:
    """Some nodes train, two ranks each."""
    job = SimulatedJob(nodes=nodes + spares, spares=spares, slots=2, **more).train()
    job.commit(5)
    return job


def tells(job: SimulatedJob, node: int, xid: int, **more: Any) -> None:
    job.feed(r.MachineSign(node, xid, **more))


def dies(job: SimulatedJob, node: int, code: int = -9, epoch: int = 0, local: int = 0) -> None:
    job.feed(r.WorkerExited(node, local, 2 * node + local, 700 + 10 * node + local, code, epoch))


def deaths(job: SimulatedJob, node: int) -> int:
    return job.core.nodes[node].record.deaths(job.now)


@pytest.mark.parametrize("order", ["cause first", "cause last", "sign last"])
def test_one_bad_gpu_of_a_rack_costs_one_node_and_one_spare(order: str) -> None:
    """The run of 704 GPUs: Xid 149 on one node, 145 on the others, and every worker dies."""
    job = rack(16)
    others = [node for node in range(16) if node != 5]
    if order == "cause first":
        tells(job, 5, 149)
        dies(job, 5)
    for node in others:
        tells(job, node, 145)
        for local in range(2):
            dies(job, node, -6, local=local)
    if order == "cause last":
        tells(job, 5, 149)
        dies(job, 5)
    if order == "sign last":
        dies(job, 5)
        tells(job, 5, 149)
    assert job.active == [*range(5), 16, *range(6, 16)], "the node of the cause is replaced, nobody else"
    assert not any(deaths(job, node) for node in others)
    job.recover()
    assert job.core.phase is Phase.RUNNING
    if order == "sign last":  # it had given way by then, as a healthy node, and is a spare that is the last to be taken
        assert job.core.nodes[5].role == "spare" and job.core.members.spares() == [17, 5]
    else:
        assert job.core.nodes[5].role == "left", "it gave its shards, and leaves"
        assert job.events("left")[-1]["node"] == 5
    assert job.core.members.spares()[0] == 17
    assert "sign" in [each.kind for each in job.core.nodes[5].record.failures]
    follows = [
        event["cause"] for event in job.events("detected") if "after Xid 149: NVLink NETIR error" in event["cause"]
    ]
    assert bool(follows) == (order != "sign last"), "it is said why"


def test_a_cause_that_shows_after_the_node_was_started_again_in_place_has_it_replaced() -> None:
    job = rack()
    tells(job, 2, 145)
    dies(job, 2)
    assert job.active == [0, 1, 2, 3] and deaths(job, 2) == 1, "a link that nobody else explains counts"
    tells(job, 2, 149)
    assert job.active == [0, 1, 4, 3] and job.core.nodes[2].role == "leaving"
    job.recover()
    assert job.core.nodes[2].role == "left"


def test_a_link_error_counts_until_its_other_end_turns_out_to_be_the_cause() -> None:
    job = rack()
    tells(job, 1, 74)
    dies(job, 1)
    assert deaths(job, 1) == 1 and job.active == [0, 1, 2, 3]
    tells(job, 3, 79)
    assert deaths(job, 1) == 0
    dies(job, 1, local=1)
    assert deaths(job, 1) == 0


def test_a_cause_in_another_nvlink_domain_explains_no_link() -> None:
    job = rack(domains=parse_domains("", 6, "0-1=n1,2-3=n2"))
    tells(job, 0, 149)
    tells(job, 1, 145)
    tells(job, 2, 145)
    dies(job, 1)
    dies(job, 2)
    assert deaths(job, 1) == 0 and deaths(job, 2) == 1


def test_a_node_that_is_lost_explains_the_links_of_others() -> None:
    job = rack()
    job.lose(0)
    tells(job, 1, 145)
    dies(job, 1)
    dies(job, 2)
    assert deaths(job, 1) == 0 and deaths(job, 2) == 1
    assert [slot.node for slot in job.core.assignment[::2]] == [4, 1, 5, 3]


def test_a_cause_is_forgotten_after_a_while() -> None:
    job = rack()
    tells(job, 0, 149)
    job.now += r.SPREAD_S + 1.0
    tells(job, 1, 145)
    dies(job, 1)
    assert deaths(job, 1) == 1
    job.now += CAUSE_S
    dies(job, 0)
    assert job.core.nodes[0].role == "spare", "as any node that has lost a worker"


def test_without_a_spare_the_node_of_the_cause_stays_and_its_worker_is_started_again() -> None:
    job = rack(spares=0)
    tells(job, 1, 79)
    dies(job, 1)
    assert job.core.nodes[1].role == "active" and job.told(r.Declare)[-1].replaced == [2]
    job.recover()
    assert job.core.phase is Phase.RUNNING and job.active == [0, 1, 2, 3]


def test_a_node_at_fault_that_died_too_often_still_gives_its_shards() -> None:
    job = rack()
    for pid in range(4):
        job.core.nodes[1].record.add(job.now, "worker", "ended", 90 + pid)
    tells(job, 1, 48)
    dies(job, 1)
    assert job.core.nodes[1].role == "leaving"


def test_who_is_aborted_for_a_peer_follows_and_who_crashes_of_his_own_does_not() -> None:
    job = rack()
    tells(job, 0, 79)
    dies(job, 1, -signal.SIGABRT)
    assert deaths(job, 1) == 0 and job.active == [0, 1, 2, 3]
    dies(job, 2, -signal.SIGSEGV)
    assert deaths(job, 2) == 1 and job.core.nodes[2].role == "spare"


def test_of_deaths_in_one_epoch_the_first_is_the_cause_of_aborts() -> None:
    """NCCL's watchdog aborts a process whose peer is gone; there are no other signs."""
    job = rack()
    dies(job, 0, -9)
    for node in (1, 2):
        dies(job, node, -signal.SIGABRT)
    assert [deaths(job, node) for node in range(4)] == [1, 0, 0, 0]
    assert [slot.node for slot in job.core.assignment[::2]] == [4, 1, 2, 3], "one spare"
    job.recover()
    dies(job, 3, -signal.SIGABRT, job.core.epoch)
    assert deaths(job, 3) == 1, "in another epoch"


def test_an_error_that_comes_back_is_no_bug_while_the_machine_tells_of_a_fault() -> None:
    job = rack(spares=0)
    for epoch in range(2):
        tells(job, 1, 145)
        error = "AcceleratorError", "train.py:7", "CUDA error", ""
        job.feed(r.WorkerFailed(1, 0, 2, "training", epoch, 5, 0, *error))
        job.feed(r.WorkerExited(1, 0, 2, 70 + epoch, -6, epoch))
        job.recover()
    assert job.finish is None
    job.now += r.SPREAD_S + 1.0
    job.feed(r.WorkerFailed(1, 0, 2, "training", 2, 5, 0, *error))
    assert job.end[0] == Exit.REPEATED_ERROR


def test_a_spare_with_a_fault_is_a_lemon_and_a_sign_told_again_is_no_second_failure() -> None:
    job = rack()
    for _ in range(5):
        tells(job, 4, 119)
    assert len(job.core.nodes[4].record.failures) == 1
    job.lose(0)
    assert job.active[0] == 5


def test_what_ends_where_somebody_else_starts_the_workers_takes_the_node_along() -> None:
    job = rack()
    job.core.nodes[1].respawns = False
    tells(job, 0, 149)
    tells(job, 1, 145)
    dies(job, 1)
    assert job.core.nodes[1].role == "lost"


def test_the_next_coordinator_knows_the_cause_and_who_is_started_again_in_place() -> None:
    job = rack()
    tells(job, 0, 149)
    tells(job, 1, 145)
    dies(job, 1)
    core = Core(job.core.job)
    core.restored(job.core.dump(), job.now)
    assert core._recoveries.in_place == {(1, 0)}
    assert core._ends._signs._cause(0, r.SPREAD_S) == "Xid 149: NVLink NETIR error"


@pytest.mark.parametrize(("xid", "role"), [(48, Role.CAUSE), (63, Role.FOLLOWS), (149, Role.CAUSE), (145, Role.LINK)])
def test_the_table_has_what_nvidia_says(xid: int, role: Role) -> None:
    assert role_of(r.MachineSign(0, xid)) is role is XIDS[xid][0]


def test_the_driver_says_itself_what_follows_and_an_unknown_number_blames_nobody() -> None:
    assert role_of(r.MachineSign(0, 145, after=149)) is Role.FOLLOWS
    assert role_of(r.MachineSign(0, 149, after=145)) is Role.CAUSE
    assert role_of(r.MachineSign(0, 999)) is Role.PROGRAM
    job = rack()
    tells(job, 1, 999, device="0000:5a:00", text="something new")
    assert job.events("sign")[-1]["cause"] == "Xid 999: something new (GPU 0000:5a:00)"
    dies(job, 1)
    assert job.core.nodes[1].role == "spare"


def test_a_spare_that_never_trained_takes_no_blame_for_others() -> None:
    job = rack()
    tells(job, 4, 79)
    dies(job, 1, -int(signal.SIGABRT))
    assert deaths(job, 1) == 1


def test_a_fault_at_the_start_leaves_its_node_where_it_is() -> None:
    """Nobody has shards of it to give; its worker begins again, and ends of workers are counted as ever."""
    job = SimulatedJob(nodes=4, spares=1)
    job.join()
    job.park()
    tells(job, 1, 79)
    dies(job, 1, -int(signal.SIGABRT))
    assert job.core.nodes[1].role == "active" and job.core.phase is Phase.STARTING and job.core.epoch == 1
    sent = len(job.sent)
    job.feed(r.WorkerExited(1, 0, 2, 999, -6, 1))
    assert len(job.sent) > sent
