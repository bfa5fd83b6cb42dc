"""Groups over NCCL through aborts and re-forms, with `fake_nccl` in NCCL's place and everything else real."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

import fake_nccl
from comm_processes import Worker, kill_self, run, worker_main
from deadpool_megatron.comm import CommunicatorAborted, CommunicatorError, ReformError
from deadpool_megatron.comm.inplace import bindings
from waiting import until


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


def make(worker: Worker) -> dict[str, dist.ProcessGroup]:
    everybody = list(range(worker.world))
    groups = {name: dist.new_group(everybody, backend="nccl", group_desc=name) for name in ("tp", "dp", "unused")}
    alone = [dist.new_group([rank], backend="nccl", group_desc="alone") for rank in everybody]
    return groups | {"alone": alone[worker.rank]}


def take_over(worker: Worker) -> dict[str, object]:
    """Rank 2 is lost. The communicators that were there are made again, side by side: on rank 0 the first one comes up
    only when the second one is there."""
    manners = fake_nccl.install()
    if worker.spare:
        worker.store.wait(["fault/0"])
        worker.become(int(worker.store.get("victim/0")))
    worker.init()
    groups = make(worker)
    names = {name: group.group_name for name, group in groups.items()}
    if not worker.spare:
        assert [total(groups[name]) for name in ("tp", "dp", "alone")] == [6, 6, worker.rank + 1]
        worker.meet("used")
        if worker.rank == 2:
            kill_self()
        worker.store.wait(["fault/0"])
        worker.comm.abort()
    for noted in (manners.connecting, manners.connected, manners.blocking):
        noted.clear()
    if worker.rank == 0:
        manners.stuck.add(names["tp"])
        threading.Thread(target=free_the_first, args=(manners, names), daemon=True).start()
    worker.comm.reform(1, worker.store)
    made = sorted(manners.connected)
    assert made == sorted([names["tp"], names["dp"]]) and manners.blocking == [0, 0] and not manners.eager
    assert [total(groups[name]) for name in ("tp", "dp", "unused", "alone")] == [6, 6, 6, worker.rank + 1]
    assert all(type(group._get_backend(torch.device("cpu"))) is fake_nccl.FakeNccl for group in groups.values())
    return {"made": len(made)}


def free_the_first(manners: fake_nccl.Manners, names: dict[str, str]) -> None:
    until(lambda: names["dp"] in manners.connected, "the second communicator")
    manners.stuck.clear()


def test_communicators_that_were_there_are_made_again_side_by_side_and_no_others() -> None:
    assert sorted(run(__file__, "take_over", world=3, spares=1)) == [0, 1, 3]


def lost_while_forming(worker: Worker) -> int:
    """The next loss comes while communicators are made: they are aborted, and the epoch after that is another one."""
    manners = fake_nccl.install()
    worker.init()
    groups = make(worker)
    names = {name: group.group_name for name, group in groups.items()}
    assert [total(groups[name]) for name in ("tp", "dp")] == [3, 3]
    worker.comm.abort()
    manners.aborted.clear()
    if worker.rank == 0:
        manners.stuck.add(names["tp"])
    worker.meet("stuck")

    def declare() -> None:
        """On all ranks at once, while rank 0 holds up its first group, and both so that of the other one."""
        until(lambda: names["tp"] in manners.connecting[2:], "a communicator that is made")
        worker.comm.abort(1)

    threading.Thread(target=declare, daemon=True).start()
    with pytest.raises(ReformError, match=r"aborted while forming|not all members of group"):
        worker.comm.reform(1, worker.store)
    until(lambda: set(manners.aborted) >= {names["tp"], names["dp"]}, "the abort of what was made")
    worker.meet("aborted")  # a communicator that comes up now would be a good one to a rank that has not heard yet
    manners.stuck.clear()
    worker.comm.reform(2, worker.store)
    assert [total(groups[name]) for name in ("tp", "dp", "unused")] == [3, 3, 3]
    return worker.comm.epoch


def test_communicators_that_are_made_when_the_epoch_ends_are_aborted() -> None:
    assert run(__file__, "lost_while_forming", world=2) == {0: 2, 1: 2}


def another_kind(worker: Worker) -> str:
    """As torch makes where ProcessGroupNCCL2 is what the name nccl stands for."""
    fake_nccl.install()
    worker.init()
    bindings.ProcessGroupNCCL = type("ProcessGroupNCCL", (), {})
    with pytest.raises(CommunicatorError) as refused:
        dist.new_group([0], backend="nccl", group_desc="tp")
    return str(refused.value)


def test_a_group_of_another_kind_is_refused_when_it_is_made() -> None:
    said = run(__file__, "another_kind", world=1)[0]
    assert said.startswith("group tp 1 has a FakeNccl") and "TORCH_DIST_USE_NCCL2=0" in said and "\n" not in said


if __name__ == "__main__":
    scenarios = {"first_use": first_use, "take_over": take_over, "another_kind": another_kind}
    worker_main(scenarios | {"lost_while_forming": lost_while_forming})
