"""Groups form in a thread beside the training thread's work; an abort in the middle costs that epoch and no more."""

import time

import pytest
import torch
import torch.distributed as dist

from comm_processes import Worker, kill_self, run, worker_main
from deadpool_megatron.comm import ReformError
from waiting import until

pytestmark = pytest.mark.versions(torch=True)


def _all_reduce_is_right(worker: Worker) -> bool:
    x = torch.full((4,), float(worker.rank + 1))
    dist.all_reduce(x)
    return bool(x.eq(worker.world * (worker.world + 1) / 2).all())


def _none() -> dist.Store:
    raise AssertionError("another store is asked for")


def beside(worker: Worker) -> dict[str, object]:
    """Formed in the back while the training thread does something else, on a spare too; then used at once."""
    if worker.spare:
        worker.become(2)
    worker.init()
    tp = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][worker.rank // 2]
    if not worker.spare:
        worker.meet("made")  # who dies while others still connect is another test's
    if worker.spare:
        assert worker.comm._standby
    elif worker.rank == 2:
        kill_self()
    else:
        worker.comm.abort()
    worker.meet("arrived")
    worker.comm.begin_reform(1, lambda: worker.store)
    forming = worker.comm._forming
    assert forming is not None
    until(forming.settled.is_set, "groups that formed in the back")
    unreal = worker.spare and worker.comm._standby  # until it is asked for, nothing has moved in
    report = worker.comm.reform(1, _none)
    x = torch.full((2,), float(worker.rank))
    dist.all_reduce(x, group=tp)
    return {
        "right": _all_reduce_is_right(worker) and x.tolist() == [1.0 if worker.rank < 2 else 5.0] * 2,
        "unreal": unreal,
        "groups": report.groups,
    }


def test_groups_are_there_when_the_training_thread_comes_for_them() -> None:
    results = run(__file__, "beside", world=4, spares=1)
    assert sorted(results) == [0, 1, 3, 4]
    assert all(each["right"] and each["groups"] == 2 for each in results.values()), results
    assert results[4]["unreal"]


def superseded(worker: Worker) -> dict[str, object]:
    """Epoch 1 begins to form and can never end (nobody else comes, no deadline passes). Epoch 2 is declared meanwhile,
    and works."""
    if worker.spare:
        worker.become(1)
    worker.init()
    if not worker.spare:
        worker.meet("made")  # who dies while others still connect is another test's
        if worker.rank == 1:
            kill_self()
        worker.comm.abort()
    out: dict[str, object] = {}
    if worker.rank == 0 or worker.spare:
        worker.comm.begin_reform(1, worker.store)
        time.sleep(0.2)  # blocked in a wait for the others by now
        worker.comm.abort(1)
        out["poisoned"] = worker.comm.poisoned
        if worker.rank == 0:
            try:
                worker.comm.reform(1, worker.store)
            except ReformError as error:
                out["error"] = str(error)
        else:  # its training thread was building its model, and goes on to
            x = torch.ones(2)
            dist.all_reduce(x)
            out["builds"] = worker.comm._standby
    worker.meet("second")
    worker.comm.begin_reform(2, worker.store)
    worker.comm.reform(2, worker.store)
    return {"right": _all_reduce_is_right(worker), "standby": worker.comm._standby, **out}


def test_an_epoch_that_is_over_before_its_groups_are_needed_leaves_nothing_behind() -> None:
    results = run(__file__, "superseded", world=3, spares=1)
    assert sorted(results) == [0, 2, 3]
    assert all(each["right"] and not each["standby"] for each in results.values()), results
    assert "aborted while forming" in results[0]["error"] and results[0]["poisoned"]
    assert results[3]["builds"] and not results[3]["poisoned"], "a spare's groups are not real: nothing to poison"


def more_groups(worker: Worker) -> str:
    """A group that is made while the others form would never get its connections."""
    worker.init()
    worker.comm.abort()
    worker.meet("aborted")
    worker.comm.begin_reform(1, worker.store)
    forming = worker.comm._forming
    assert forming is not None
    until(forming.settled.is_set, "groups that formed")
    worker.meet("formed")  # who is told ends its connections, and no peer may still be making them
    digest = worker.comm.table_digest
    worker.comm.table_digest = lambda: digest() + "more"
    try:
        worker.comm.reform(1, worker.store)
    except ReformError as error:
        return str(error)
    return ""


def test_a_group_made_meanwhile_is_told_and_not_left_without_connections() -> None:
    results = run(__file__, "more_groups", world=2)
    assert all("made other process groups while they were formed" in each for each in results.values()), results


if __name__ == "__main__":
    worker_main({"beside": beside, "superseded": superseded, "more_groups": more_groups})
