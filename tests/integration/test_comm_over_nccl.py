"""Groups over NCCL through aborts and re-forms, with `fake_nccl` in NCCL's place and everything else real."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

import fake_nccl
from comm_processes import Worker, kill_self, run, worker_main
from deadpool_megatron.comm import ReformError
from deadpool_megatron.comm.inplace import bindings
from deadpool_megatron.comm.nccl import Exchanging
from deadpool_megatron.comm.reports import CommunicatorAborted, CommunicatorError
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

    declaring = threading.Thread(target=declare, daemon=True)
    declaring.start()
    with pytest.raises(ReformError, match=r"aborted while forming|not all members of group"):
        worker.comm.reform(1, worker.store)
    declaring.join()
    until(lambda: set(manners.aborted) >= {names["tp"], names["dp"]}, "the abort of what was made")
    worker.meet("aborted")  # a communicator that comes up now would be a good one to a rank that has not heard yet
    manners.stuck.clear()
    worker.comm.reform(2, worker.store)
    assert [total(groups[name]) for name in ("tp", "dp", "unused")] == [3, 3, 3]
    return worker.comm.epoch


def test_communicators_that_are_made_when_the_epoch_ends_are_aborted() -> None:
    assert run(__file__, "lost_while_forming", world=2) == {0: 2, 1: 2}


def message(worker: Worker, group: dist.ProcessGroup, how: str, low: int, high: int) -> None:
    """Between two members, if this is one: both ways in a batch, or one after the other."""
    if worker.rank not in (low, high):
        return
    peer = low + high - worker.rank
    sent, got = torch.full((2,), float(worker.rank)), torch.empty(2)
    if how == "batched":
        both = [dist.P2POp(dist.isend, sent, peer, group), dist.P2POp(dist.irecv, got, peer, group)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
    else:
        for call, tensor in ((dist.isend, sent), (dist.irecv, got))[:: 1 if worker.rank == low else -1]:
            call(tensor, peer, group=group).wait()
    fake_nccl.FakeNccl.synchronize()
    assert got.eq(peer).all()


def everybody(worker: Worker, group: dist.ProcessGroup) -> None:
    out = torch.empty(worker.world)
    dist.all_to_all_single(out, torch.arange(worker.world) + 10.0 * worker.rank, group=group)
    fake_nccl.FakeNccl.synchronize()
    assert out.eq(10 * torch.arange(worker.world) + worker.rank).all()


def met_again(worker: Worker) -> list[str]:
    """Rank 2 is lost. The training threads meet nobody for the first time when they are back: that waits for a peer
    that may be lost, deaf to an abort."""
    manners = fake_nccl.install()
    if worker.spare:
        worker.store.wait(["fault/0"])
        worker.become(int(worker.store.get("victim/0")))
    worker.init()
    names = ("stages", "experts", "pairs")
    stages, experts, pairs = (dist.new_group([0, 1, 2], backend="nccl", group_desc=name) for name in names)

    def step() -> None:
        for low, high in ((0, 1), (1, 2)):
            message(worker, stages, "batched", low, high)
        for low, high in ((0, 1), (0, 2), (1, 2)):
            message(worker, pairs, "alone", low, high)
        everybody(worker, experts)

    if not worker.spare:
        assert total(stages) == 6  # else the first batch is one of all members, in torch as well
        step()
        worker.meet("used")
        if worker.rank == 2:
            kill_self()
        worker.store.wait(["fault/0"])
        worker.comm.abort()
    manners.met.clear()
    worker.comm.reform(1, worker.store)
    made = sorted(entry.split(maxsplit=1)[1] for entry in manners.met)
    manners.met.clear()
    step()
    assert not manners.met
    return made


def test_members_that_exchanged_messages_are_connected_before_training_goes_on() -> None:
    met = {
        0: ["alone 0 1", "alone 0 2", "batched 0 1", "batched 0 1", "batched 0 2"],
        1: ["alone 0 1", "alone 1 2", "batched 0 1", "batched 0 1", "batched 1 2", "batched 1 2"],
        3: ["alone 0 2", "alone 1 2", "batched 0 2", "batched 1 2", "batched 1 2"],
    }
    assert run(__file__, "met_again", world=3, spares=1) == met


def lost_while_met(worker: Worker) -> int:
    """A peer is lost before it has met this one: the epoch ends all the same, and the next one is another."""
    manners = fake_nccl.install()
    worker.init()
    stages = dist.new_group([0, 1], backend="nccl", group_desc="stages")
    assert total(stages) == 3
    message(worker, stages, "batched", 0, 1)
    worker.comm.abort()
    manners.met.clear()
    if worker.rank == 0:
        worker.comm.begin_reform(1, worker.store)
        until(lambda: manners.met, "a first message")  # rank 1 does not come
        worker.comm.abort(1)
        with pytest.raises(ReformError, match="aborted while forming"):
            worker.comm.reform(1, worker.store)
        until(lambda: len(manners.aborted) > 1, "the abort of what was made")
        worker.store.set("aborted", b"1")
    else:
        hold(worker)
    worker.comm.reform(2, worker.store)
    message(worker, stages, "batched", 0, 1)
    return worker.comm.epoch


def hold(worker: Worker) -> None:
    """This rank's threads come no further than to the communicator."""
    use = Exchanging._use
    Exchanging._use = lambda self: worker.store.wait(["aborted"])  # type: ignore[method-assign]
    with pytest.raises(ReformError):
        worker.comm.begin_reform(1, worker.store)
        worker.store.wait(["aborted"])
        worker.comm.abort(1)
        worker.comm.reform(1, worker.store)
    Exchanging._use = use  # type: ignore[method-assign]


def test_who_waits_for_the_first_message_of_a_peer_that_is_lost_is_left_behind() -> None:
    assert run(__file__, "lost_while_met", world=2) == {0: 2, 1: 2}


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
    scenarios |= {"lost_while_forming": lost_while_forming, "met_again": met_again, "lost_while_met": lost_while_met}
    worker_main(scenarios)
