"""A worker ends, its node lives: who stands by there takes its place, no spare is spent, bit for bit as ever."""

from __future__ import annotations

import pytest

from flags import duo_gpt
from jobs import Job, Jobs, assert_same_training, launch_flags, undisturbed

ITERATIONS = 8
STANDBY = ["--deadpool-standby-workers", "device"]


def _standbys(job: Job) -> dict[tuple[int, int], int]:
    """By node and local index, the processes that stand by."""
    nodes = job.status()["nodes"]
    return {(n["node"], int(local)): pid for n in nodes for local, pid in n.get("standbys", {}).items()}


def _wait_for(job: Job, count: int) -> dict[tuple[int, int], int]:
    job.until_event("training")
    job.until(f"{count} standbys", lambda: len(_standbys(job)) == count)
    return _standbys(job)


def _log_of(job: Job, rank: int, epoch: int) -> str:
    return (job.run_dir / "logs" / f"rank-{rank}.epoch-{epoch}.log").readlink().name


def _kept(before: dict[int, int], after: dict[int, int]) -> list[int]:
    return sorted(rank for rank, pid in before.items() if after[rank] == pid)


@pytest.mark.timeout(300)
def test_who_stands_by_takes_the_place_of_rank_0_and_neither_a_spare_nor_the_survivor_moves(jobs: Jobs) -> None:
    flags = duo_gpt("pipeline", iters=ITERATIONS)
    job = jobs.start("killed", launch_flags(3, 1, slots=1), [*flags, *STANDBY], held=True)
    standbys, before = _wait_for(job, 2), job.pids()
    job.arm((0, 3, 2, "--fault", "kill-worker"), until=5)
    job.until_event("resumed", epoch=1)
    job.until("another standby", lambda: _standbys(job).get((0, 0), standbys[0, 0]) != standbys[0, 0])
    after = job.pids()
    assert after == {0: standbys[0, 0], 1: before[1]}
    job.hold(None)
    job.finished()
    assert [(e["nodes"], e["replaced"]) for e in job.events("declared")] == [([0, 1], [0])]
    assert [e.get("stood_by") for e in job.events("detected")] == [True]
    assert _log_of(job, 0, 1) == "standby-node0-0.log"
    want = undisturbed(launch_flags(2, slots=1), flags)
    assert_same_training(job, want, ITERATIONS, rank=1)
