"""Spares that have set up the coordinate they take over, or another one: bit for bit as ever."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flags import duo_gpt, tiny_gpt
from jobs import Job, Jobs, assert_same_training, launch_flags, undisturbed

ITERATIONS = 8


def _rehearsed(job: Job) -> dict[int, list[int]]:
    """By spare node, the coordinates it has set up."""
    return {spare["node"]: spare["rehearsed"] for spare in job.status()["spares"] if spare["rehearsed"]}


def _wait_for(job: Job, rehearsed: dict[int, list[int]]) -> None:
    job.until_event("started")
    job.until("rehearsals", lambda: _rehearsed(job) == rehearsed)


def _log_of(job: Job, rank: int, epoch: int) -> str:
    return (job.run_dir / "logs" / f"rank-{rank}.epoch-{epoch}.log").readlink().name


@pytest.mark.timeout(400)
def test_rehearsed_spares_go_on_bit_for_bit_also_when_one_is_lost_as_it_takes_over(jobs: Jobs) -> None:
    """TP2 x DP2 on nodes 0 and 1. Node 0 goes to the first of two spares that know it, which dies; node 1 to the other
    one."""
    flags = [*tiny_gpt("none", iters=ITERATIONS), "--deadpool-rehearsals", "1"]
    job = jobs.start("killed", launch_flags(5, 3), flags, held=True)
    _wait_for(job, {2: [0, 1], 3: [2, 3], 4: [0, 1]})
    assert job.command("inject", "--node", "2", "--at", "take-over.rehearsed", timeout_s=60.0).returncode == 0
    job.arm((0, 2, 2), (1, 4, 1))
    job.finished()
    taken = [([0], [2, 1]), ([0, 2], [4, 1]), ([1], [4, 3])]
    told = [(sorted(set(e["lost"])), e["nodes"]) for e in job.events("declared")]
    assert [nodes for _, nodes in told] == [nodes for _, nodes in taken], told
    logs = [_log_of(job, rank, epoch) for rank, epoch in ((2, 3), (3, 3), (0, 2), (1, 2))]
    assert logs == [f"spare-node{n}-{rank % 2}-rank-{rank}.log" for n, rank in ((3, 2), (3, 3), (4, 0), (4, 1))]
    want = undisturbed(launch_flags(2), tiny_gpt("none", iters=ITERATIONS))
    assert_same_training(job, want, ITERATIONS, rank=3, mute=frozenset({3}))


@pytest.mark.timeout(300)
def test_a_rehearsal_is_seen_by_nobody_and_who_has_rehearsed_another_role_takes_over_too(
    jobs: Jobs, tmp_path: Path
) -> None:
    """Two stages, each on a node. A spare takes over the last one, which it has rehearsed: with that, and not before,
    it has a TensorBoard file. When that node is lost too, the spare that is left has rehearsed the first one."""
    pytest.importorskip("tensorboard")
    board = tmp_path / "board"
    flags = duo_gpt("pipeline", iters=ITERATIONS)
    more = ["--tensorboard-dir", str(board), "--deadpool-rehearsals", "1"]
    job = jobs.start("another", launch_flags(4, 2, slots=1), [*flags, *more], held=True)
    _wait_for(job, {2: [0], 3: [1]})
    assert len([*board.glob("events.out.*")]) == 1
    job.arm((1, 2, 1), until=4)
    job.until_event("resumed", epoch=1)
    assert len([*board.glob("events.out.*")]) == 2
    job.inject(3, 5, 1)
    job.hold(None)
    job.finished()
    assert [e["nodes"] for e in job.events("declared")] == [[0, 3], [0, 2]]
    assert [_log_of(job, 1, epoch) for epoch in (1, 2)] == ["spare-node3-0-rank-1.log", "spare-node2-0.log"]
    want = undisturbed(launch_flags(2, slots=1), flags)
    assert_same_training(job, want, ITERATIONS, rank=1, mute=frozenset({1, 4}))


@pytest.mark.timeout(300)
def test_the_spare_of_a_planned_move_rehearses_the_node_before_anybody_holds_still(jobs: Jobs) -> None:
    flags = duo_gpt("data", iters=ITERATIONS)
    job = jobs.start("drained", launch_flags(3, 1, slots=1), [*flags, "--deadpool-rehearsals", "1"], held=True)
    _wait_for(job, {2: [0]})
    with ThreadPoolExecutor(1) as aside:
        done = aside.submit(job.command, "drain", "--node", "1", timeout_s=200.0)
        job.until_event("leaving")
        assert [e["ranks"] for e in job.events("rehearsed")][-1] == [1]
        job.hold(None)
        assert done.result().returncode == 0, done.result().stderr
        assert "node 2 sets up what node 1 does" in done.result().stdout
    job.finished()
    assert [e["nodes"] for e in job.events("declared")] == [[0, 2]]
    assert _log_of(job, 1, 1) == "spare-node2-0-rank-1.log"
    assert_same_training(job, undisturbed(launch_flags(2, slots=1), flags), ITERATIONS, rank=1)
