"""A worker ends, its node lives: who stands by there takes its place, no spare is spent, bit for bit as ever."""

from __future__ import annotations

import os
import signal

import pytest

from flags import duo_gpt, tiny_gpt
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


def _end_at_once(job: Job, victims: list[int], hold: int | None) -> None:
    """SIGKILL, while the others stand still, so that nobody does anything between the first and the last. Then the job,
    which was held before an iteration, goes on to that of ``hold``."""
    others = [each for each in job.processes() if each.pid not in victims]
    for each in others:
        each.send_signal(signal.SIGSTOP)
    job.hold(hold)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    for each in others:
        each.send_signal(signal.SIGCONT)


@pytest.mark.timeout(300)
def test_who_stands_by_takes_the_place_of_rank_0_and_neither_a_spare_nor_the_survivor_moves(jobs: Jobs) -> None:
    flags = duo_gpt("pipeline", iters=ITERATIONS)
    more = ["--deadpool-standby-workers", "imports"]
    job = jobs.start("killed", launch_flags(3, 1, slots=1), [*flags, *more], held=True)
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_that_end_at_once_are_replaced_in_one_epoch_also_all_but_one(jobs: Jobs) -> None:
    """TP2 x PP2 x DP2. One worker of each node, rank 0 among them; then every worker but the last. Those that stand by
    have set up their coordinates."""
    flags = tiny_gpt(iters=ITERATIONS)
    more = ["--deadpool-standby-workers", "coordinate", "--deadpool-lease", "20"]  # standing still is no silence
    job = jobs.start("at-once", launch_flags(4), [*flags, *more], held=True)
    _wait_for(job, 8)
    job.hold(3)
    for epoch, victims in ((1, [0, 2, 4, 6]), (2, [0, 1, 2, 3, 4, 5, 6])):
        job.until("the iteration before", lambda epoch=epoch: job.status()["iteration"] >= 3 * epoch - 1)
        before = job.pids()
        standbys = _wait_for(job, 8)
        _end_at_once(job, [before[rank] for rank in victims], 6 if epoch == 1 else None)
        job.until_event("resumed", epoch=epoch)
        if epoch == 1:
            want = {rank: standbys[rank // 2, rank % 2] if rank in victims else before[rank] for rank in before}
            job.until("the processes of the epoch", lambda want=want: job.pids() == want)
    job.finished()
    assert [(e["epoch"], e["nodes"]) for e in job.events("declared")] == [(1, [0, 1, 2, 3]), (2, [0, 1, 2, 3])]
    assert sorted(e["rank"] for e in job.events("detected")) == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert all(e["stood_by"] for e in job.events("detected"))
    assert_same_training(job, undisturbed(launch_flags(4), flags), ITERATIONS, rank=7)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_who_stands_by_may_die_before_and_as_it_takes_over_and_its_node_too(jobs: Jobs) -> None:
    """Two stages, each on a node, and a spare: used when who stood by on node 0 dies. Node 0 is a spare from then on,
    and takes the place of node 1, which is lost with all its processes as one of them takes over."""
    flags = duo_gpt("pipeline", iters=ITERATIONS)
    job = jobs.start("dies", launch_flags(3, 1, slots=1), [*flags, *STANDBY], held=True)
    first = _wait_for(job, 2)[0, 0]
    os.kill(first, signal.SIGKILL)
    job.until("another standby", lambda: _standbys(job).get((0, 0), first) != first)
    assert any("another one is started" in e["cause"] for e in job.events("standbys"))
    assert not job.events("detected"), "it costs nothing"
    building = ["--at", "take-over.building", "--fault", "kill-worker"]
    assert job.command("inject", "--node", "0", *building, timeout_s=60.0).returncode == 0
    job.arm((0, 2, 2, "--fault", "kill-worker"), until=5)
    job.until("node 0 as a spare", lambda: any(e["node"] == 0 for e in job.events("parked")))
    job.until("who stands by on both nodes", lambda: _standbys(job).keys() == {(1, 0), (2, 0)})
    assert job.command("inject", "--node", "1", "--at", "take-over.built", timeout_s=60.0).returncode == 0
    job.inject(1, 6, 2, "--fault", "kill-worker")
    job.hold(None)
    job.finished()
    assert [e["nodes"] for e in job.events("declared")] == [[0, 1], [2, 1], [2, 1], [2, 0]]
    assert_same_training(
        job, undisturbed(launch_flags(2, slots=1), flags), ITERATIONS, rank=1, mute=frozenset({1, 2, 5, 6})
    )
