"""A rank is killed, a standby takes its coordinate: every group and every kind of operation works again, in place."""

import hashlib
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel

from comm_processes import Worker, kill_self, run, worker_main

pytestmark = pytest.mark.versions(torch=True)

VICTIM = 2


def make_groups(worker: Worker) -> dict[str, dist.ProcessGroup]:
    """Groups as a 3-D layout makes them: every rank makes all, is in some; also of size one, and a Gloo twin."""
    world = worker.world
    groups = {"world": dist.group.WORLD}
    for name, rows in {
        "tp": [[i, i + 1] for i in range(0, world, 2)],
        "dp": [list(range(k, world, 2)) for k in range(2)],
        "twin": [list(range(world))],
        "alone": [[i] for i in range(world)],
        "some": [[0, 2, 3]],
    }.items():
        for row in rows:
            group = dist.new_group(row, group_desc=name)
            if worker.rank in row:
                groups[name] = group
    return groups


def exercise(group: dist.ProcessGroup) -> None:
    """Every collective, point-to-point, batched, coalesced, functional and object operation, with checked results."""
    ranks = dist.get_process_group_ranks(group)
    n, me = len(ranks), ranks.index(dist.get_rank())
    total = n * (n + 1) / 2
    mine = torch.full((4,), float(me + 1))

    x = mine.clone()
    dist.all_reduce(x, group=group)
    assert x.eq(total).all()
    work = dist.all_reduce(y := mine.clone(), group=group, async_op=True)
    work.wait()
    assert y.eq(total).all()
    outs = [torch.empty(4) for _ in ranks]
    dist.all_gather(outs, mine, group=group)
    assert [o[0].item() for o in outs] == [i + 1 for i in range(n)]
    flat = torch.empty(4 * n)
    dist.all_gather_into_tensor(flat, mine, group=group)
    assert flat[::4].tolist() == [i + 1 for i in range(n)]
    shard = torch.empty(2)
    dist.reduce_scatter_tensor(shard, torch.full((2 * n,), float(me + 1)), group=group)
    assert shard.eq(total).all()
    x = mine.clone()
    dist.broadcast(x, src=ranks[-1], group=group)
    assert x.eq(n).all()
    x = mine.clone()
    dist.reduce(x, dst=ranks[0], group=group)
    assert me != 0 or x.eq(total).all()
    dist.gather(mine, outs if me == 0 else None, dst=ranks[0], group=group)
    dist.scatter(
        x := torch.empty(4),
        [torch.full((4,), float(i)) for i in range(n)] if me == 0 else None,
        src=ranks[0],
        group=group,
    )
    assert x.eq(me).all()
    out = torch.empty(n)
    dist.all_to_all_single(out, torch.full((n,), float(me)), group=group)
    assert out.tolist() == list(range(n))
    dist.barrier(group=group)
    objects = [None] * n
    dist.all_gather_object(objects, {"me": me}, group=group)
    assert [o["me"] for o in objects] == list(range(n))
    box = [me]
    dist.broadcast_object_list(box, src=ranks[0], group=group)
    assert box == [0]
    with dist._coalescing_manager(group=group, async_ops=True) as manager:
        a, b = mine.clone(), mine.clone() * 2
        dist.all_reduce(a, group=group)
        dist.all_reduce(b, group=group)
    manager.wait()
    assert a.eq(total).all() and b.eq(2 * total).all()
    z = funcol.all_reduce(mine.clone(), "sum", group)
    assert z.eq(total).all()
    if n > 1:
        left, right = ranks[(me - 1) % n], ranks[(me + 1) % n]
        got = torch.empty(4)
        ops = [dist.P2POp(dist.isend, mine, right, group), dist.P2POp(dist.irecv, got, left, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        assert got.eq((me - 1) % n + 1).all()
        if me == 0:
            dist.send(mine, ranks[1], group=group)
        elif me == 1:
            dist.recv(got, ranks[0], group=group)
            assert got.eq(1).all()
    dist.monitored_barrier(group=group)


def check_books(worker: Worker, groups: dict[str, dist.ProcessGroup]) -> None:
    """What torch says of the groups is what it said before."""
    for group in groups.values():
        assert type(group) is dist.ProcessGroup
        assert dist.get_backend(group) == "gloo"
        assert isinstance(group._get_backend(torch.device("cpu")), dist.ProcessGroupGloo)
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 30
    assert groups["tp"].group_desc == "tp"
    assert c10d._resolve_process_group(groups["tp"].group_name) is groups["tp"]
    assert dist.get_rank() == worker.rank


def ddp_digest(group: dist.ProcessGroup) -> str:
    """Three steps of DDP from a fixed seed; hash of the parameters."""
    torch.manual_seed(7)
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)), process_group=group
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(100 * step + dist.get_rank())
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    data = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def take_over(worker: Worker) -> dict[str, object]:
    if worker.spare:
        worker.store.wait(["fault/0"])
        worker.become(int(worker.store.get("victim/0")))
    worker.init()
    groups = make_groups(worker)
    before = ""
    if not worker.spare:
        worker.watch()
        for group in groups.values():
            exercise(group)
        before = ddp_digest(groups["world"])
        worker.store.set(f"ddp/{worker.rank}", before)
        worker.meet("exercised")
        if worker.rank == VICTIM:
            kill_self()
        with pytest.raises(RuntimeError):
            for _ in range(100_000):
                dist.all_reduce(torch.ones(4), group=groups["world"])
        worker.await_abort(1)
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1), group=groups["alone"])  # nothing of the old epoch works, not even alone
    same = {name: id(group) for name, group in groups.items()}
    report = worker.comm.reform(1, worker.store)
    assert {name: id(group) for name, group in groups.items()} == same
    check_books(worker, groups)
    for group in groups.values():
        exercise(group)
    later = dist.new_group([0, 2], group_desc="later")
    if worker.rank in (0, 2):
        exercise(later)
    after = ddp_digest(groups["world"])
    assert after == worker.store.get(f"ddp/{worker.rank}").decode()
    # and again, planned, without a death: the former spare is a rank like any other now
    worker.comm.abort()
    worker.comm.reform(2, worker.store)
    for group in groups.values():
        exercise(group)
    if worker.rank in (0, 2):
        exercise(later)
    return {"report": str(report), "digest": worker.comm.table_digest(), "pid": os.getpid()}


def test_a_standby_takes_a_killed_ranks_place_in_all_groups() -> None:
    results = run(__file__, "take_over", world=4, spares=1)
    print(results[4]["report"])
    assert sorted(results) == [0, 1, 3, 4]
    assert len({r["digest"] for r in results.values()}) == 1


if __name__ == "__main__":
    worker_main({"take_over": take_over})
