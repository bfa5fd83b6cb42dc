"""NCCL groups are aborted and re-formed in place, as far as one GPU goes: one rank, groups of size one.

`python -m pytest -m gpu tests/gpu` runs it where a GPU is at hand. What blocked peers do is in `shared_device.py`,
which makes NCCL take several ranks on one device; step 1 of `scripts/gpu_kit.sh` runs both.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from comm_processes import NEVER_S, Worker, run, until_retired, worker_main
from deadpool_megatron.comm import communicators, warm_up
from deadpool_megatron.comm.inplace import pointee
from deadpool_megatron.comm.nccl import NCCL_ENVIRONMENT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not dist.is_nccl_available(), reason="needs a CUDA device"),
]
ROUNDS = 30
Groups = dict[str, dist.ProcessGroup]


def make(worker: Worker) -> Groups:
    """The kinds of groups Megatron makes: plain NCCL, with options, Gloo beside it, and both in one."""
    torch.cuda.set_device(0)
    if worker.spare:
        dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    else:
        store = dist.PrefixStore("first", worker._client())
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = 8
    return {
        "world": dist.group.WORLD,
        "plain": dist.new_group([0], group_desc="plain"),
        "options": dist.new_group([0], pg_options=options, timeout=timedelta(seconds=77), group_desc="options"),
        "gloo": dist.new_group([0], backend="gloo", group_desc="gloo"),
        "both": dist.new_group([0], backend="cpu:gloo,cuda:nccl", group_desc="both"),
    }


def use(groups: Groups) -> None:
    """Collectives on the device and on a side stream, with checked results."""
    side = torch.cuda.Stream()
    for name, group in groups.items():
        device = "cpu" if name == "gloo" else "cuda"
        x = torch.arange(1 << 20, dtype=torch.float32, device=device)
        dist.all_reduce(x, group=group)
        out = torch.empty_like(x)
        dist.all_gather_into_tensor(out, x, group=group)
        dist.broadcast(out, src=0, group=group)
        if device == "cuda":
            with torch.cuda.stream(side):
                side.wait_stream(torch.cuda.default_stream())
                work = dist.all_reduce(out, group=group, async_op=True)
                work.wait()
            torch.cuda.default_stream().wait_stream(side)
            torch.cuda.synchronize()
        assert torch.equal(out.cpu(), torch.arange(1 << 20, dtype=torch.float32)), name


def nccl_backend(group: dist.ProcessGroup) -> object:
    return group._get_backend(torch.device("cuda"))


def rounds(worker: Worker) -> dict[str, object]:
    communicators._ABORT_DEADLINE_S = NEVER_S  # an abort that leaves something stuck does not come back
    groups = make(worker)
    use(groups)
    kept = torch.arange(1 << 20, device="cuda")  # the device context lives through it all
    objects = {name: id(group) for name, group in groups.items()}
    aborts, reforms, free = [], [], []
    for epoch in range(1, ROUNDS + 1):
        before = pointee(nccl_backend(groups["options"]))
        in_flight = torch.ones(64 << 20, device="cuda")
        dist.all_reduce(in_flight, group=groups["plain"], async_op=True)
        begun = time.monotonic()
        report = worker.comm.abort()
        aborts.append(time.monotonic() - begun)
        assert (report.nccl_aborted, report.nccl_stuck) == (4, 0), report
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(4, device="cuda"), group=groups["plain"])
        reform = worker.comm.reform(epoch, worker.store)
        reforms.append(reform.seconds)
        methods = {each.group.split()[0]: each.method for each in reform.each}
        assert all(methods[name] == "swapped" for name in ("default_pg", "plain", "options", "both")), methods
        assert pointee(nccl_backend(groups["options"])) != before
        assert isinstance(nccl_backend(groups["both"]), dist.ProcessGroupNCCL)
        assert objects == {name: id(group) for name, group in groups.items()}
        options = nccl_backend(groups["options"]).options
        assert options.is_high_priority_stream and options.config.max_ctas == 8
        assert options.config.blocking == 0
        assert options._timeout == timedelta(seconds=77)
        use(groups)
        assert torch.equal(kept, torch.arange(1 << 20, device="cuda"))
        if epoch in (5, ROUNDS):
            until_retired()
            free.append(torch.cuda.mem_get_info()[0])
    return {"aborts": aborts, "reforms": reforms, "lost": free[0] - free[1]}


def test_nccl_groups_are_aborted_and_re_formed_again_and_again() -> None:
    (seen,) = run(__file__, "rounds", world=1, env=NCCL_ENVIRONMENT).values()
    assert seen["lost"] < 256 << 20, f"{seen['lost']} bytes of the device lost"


@pytest.mark.perf
def test_nccl_groups_are_aborted_sooner_than_some_re_forms_take() -> None:
    (seen,) = run(__file__, "rounds", world=1, env=NCCL_ENVIRONMENT).values()
    aborts, reforms = max(seen["aborts"]), max(seen["reforms"])
    print(f"slowest abort {aborts:.3f} s, slowest re-form {reforms:.3f} s")
    assert aborts < 5 * reforms


def standby(worker: Worker) -> str:
    """A spare builds its groups alone with the fake backend, then gets NCCL in the same objects."""
    if not worker.spare:
        worker.store.wait(["spare is done"], timedelta(seconds=200))
        return "watched"
    warm_up(torch.device("cuda", 0))
    worker.become(0)
    groups = make(worker)
    assert dist.get_backend(groups["plain"]) == "nccl"
    dist.all_reduce(torch.ones(4, device="cuda"), group=groups["plain"])  # meets nobody, does nothing
    worker.comm.reform(1, worker.store)
    use(groups)
    worker.store.set("spare is done", b"1")
    return type(nccl_backend(groups["plain"])).__name__


def test_a_spares_groups_become_nccl() -> None:
    results = run(__file__, "standby", world=1, spares=1, env=NCCL_ENVIRONMENT)
    assert results[1] == "ProcessGroupNCCL"


if __name__ == "__main__":
    worker_main({"rounds": rounds, "standby": standby})
