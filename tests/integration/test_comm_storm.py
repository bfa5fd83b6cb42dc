"""Aborts at random moments of a pipeline-like mix of operations, in a row: never a hang, never a wrong sum."""

import threading

import psutil
import pytest
import torch
import torch.distributed as dist

from comm_processes import Worker, run, worker_main
from comm_storm import AbortStorm

pytestmark = pytest.mark.versions(torch=True)

COUNT = 60
WORLD = 4
LARGE = 1024 * 1024  # floats


def iteration(groups: dict[str, dist.ProcessGroup], rank: int) -> None:
    """Overlapping: a large ring exchange, an async reduce-scatter and all-gather, small and object collectives."""
    tp, dp = groups["tp"], groups["dp"]
    send, got = torch.full((LARGE,), float(rank)), torch.empty(LARGE)
    ring = [dist.P2POp(dist.isend, send, (rank + 1) % WORLD), dist.P2POp(dist.irecv, got, (rank - 1) % WORLD)]
    works = dist.batch_isend_irecv(ring)
    shard = torch.empty(LARGE // 2)
    reduce = dist.reduce_scatter_tensor(shard, torch.ones(LARGE), group=dp, async_op=True)
    x = torch.ones(16)
    dist.all_reduce(x, group=tp)
    assert x.eq(2).all()
    for work in works:
        work.wait()
    assert got.eq((rank - 1) % WORLD).all()
    reduce.wait()
    assert shard.eq(2).all()
    full = torch.empty(LARGE)
    dist.all_gather_into_tensor(full, shard, group=dp)
    assert full.eq(2).all()
    dist.broadcast(send, src=0)
    assert send.eq(0).all()
    everyone: list[object] = [None] * WORLD
    dist.all_gather_object(everyone, rank)
    assert everyone == list(range(WORLD))


def storm(worker: Worker) -> dict[str, object]:
    worker.init()
    groups = {}
    for name, rows in {"tp": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]]}.items():
        for row in rows:
            group = dist.new_group(row)
            if worker.rank in row:
                groups[name] = group
    worker.meet("made")
    going = AbortStorm(worker.comm, worker._client, worker.rank, WORLD, count=COUNT, seed=5)
    going.start()
    iterations = 0
    while not going.over:
        try:
            iteration(groups, worker.rank)
            iterations += 1
        except RuntimeError:
            going.recover()
    for _ in range(3):
        iteration(groups, worker.rank)
    process = psutil.Process()
    return {
        "iterations": iterations,
        "worst_freed": max(going.freed_s),
        "forced": sum(report.waits_forced for report in going.aborts),
        "stuck": sum(report.waits_stuck for report in going.aborts),
        "threads": process.num_threads(),
        "python_threads": threading.active_count(),
    }


def test_sixty_aborts_at_random_moments() -> None:
    results = run(__file__, "storm", world=WORLD, limit_s=400)
    for rank, seen in results.items():
        print(rank, seen)
        assert seen["worst_freed"] < 1.0
        assert seen["stuck"] == 0


if __name__ == "__main__":
    worker_main({"storm": storm})
