"""Groups over NCCL through aborts and re-forms, with `fake_nccl` in NCCL's place and everything else real."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fake_nccl
from comm_processes import Worker, run, worker_main
from deadpool_megatron.comm import CommunicatorAborted


def total(group: dist.ProcessGroup) -> float:
    """The sum of ranks + 1 of the group's members, by an all-reduce."""
    x = torch.full((1,), float(dist.get_rank() + 1))
    dist.all_reduce(x, group=group)
    fake_nccl.FakeNccl.synchronize()
    return x.item()


def first_use(worker: Worker) -> dict[str, list[str]]:
    """After an abort nobody begins to make a communicator: its peers never come, and no abort would be seen."""
    manners = fake_nccl.install()
    worker.init()
    used, unused = (dist.new_group([0, 1], backend="nccl") for _ in range(2))
    assert total(used) == 3
    worker.comm.abort()
    for group in (used, unused):
        with pytest.raises(CommunicatorAborted):
            dist.all_reduce(torch.ones(1), group=group)
    return {"began": manners.connecting, "aborted": sorted(manners.aborted)}


def test_no_communicator_is_begun_after_an_abort() -> None:
    for seen in run(__file__, "first_use", world=2).values():
        assert seen == {"began": ["1"], "aborted": ["1", "2"]}


if __name__ == "__main__":
    worker_main({"first_use": first_use})
