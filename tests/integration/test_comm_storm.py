"""Aborts at random moments of a pipeline-like mix of operations, in a row: never a hang, never a wrong sum."""

import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from comm_processes import NEVER_S, Worker, run, worker_main
from comm_storm import AbortStorm
from deadpool_megatron.comm import communicators

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
    communicators._ABORT_DEADLINE_S = NEVER_S  # an abort that leaves a wait stuck does not come back
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
    calm = []
    for _ in range(5):
        begun = time.monotonic()
        iteration(groups, worker.rank)
        calm.append(time.monotonic() - begun)
    process = psutil.Process()
    return {
        "iterations": iterations,
        "worst_freed": max(going.freed_s),
        "forced": sum(report.waits_forced for report in going.aborts),
        "calm": min(calm),
        "threads": process.num_threads(),
        "python_threads": threading.active_count(),
    }


def test_sixty_aborts_at_random_moments() -> None:
    results = run(__file__, "storm", world=WORLD)
    print(results)
    assert sorted(results) == list(range(WORLD))


@pytest.mark.perf
def test_aborts_at_random_moments_free_everybody_sooner_than_some_iterations_take() -> None:
    results = run(__file__, "storm", world=WORLD)
    print(results)
    calm = max(seen["calm"] for seen in results.values())
    assert max(seen["worst_freed"] for seen in results.values()) < 20 * calm


if __name__ == "__main__":
    worker_main({"storm": storm})
