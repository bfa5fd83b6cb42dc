"""Only what changed is re-formed: a group that lost nobody and in which nothing is under way keeps its backend and its
connections; anything else is not kept, whoever of its members knows of it."""

import os
import threading

import pytest
import torch
import torch.distributed as dist

from comm_processes import LOOPBACK, NEVER_S, Worker, exchange, kill_self, run, worker_main
from deadpool_megatron.comm import communicators
from deadpool_megatron.comm.inplace import pointee
from middleman import Middleman

pytestmark = pytest.mark.versions(torch=True)

VICTIM = 2
LAYOUT = {
    "tp": [[0, 1], [2, 3]],
    "dp": [[0, 2], [1, 3]],
    "ahead": [[0, 1]],  # a member posts an operation that its peer does not
    "late": [[0, 1]],  # the same, after the abort
    "p2p": [[0, 1]],  # used for point-to-point
    "cut": [[0, 1]],  # its connection breaks
    "alone": [[0], [1], [2], [3]],
}
Groups = dict[str, dist.ProcessGroup]


def make(worker: Worker) -> Groups:
    groups: Groups = {"world": dist.group.WORLD}
    for name, rows in LAYOUT.items():
        for row in rows:
            group = dist.new_group(row, group_desc=name)
            if worker.rank in row:
                groups[name] = group
    return groups


def use(groups: Groups) -> None:
    """Collectives with checked results, several in a row."""
    for group in groups.values():
        ranks = dist.get_process_group_ranks(group)
        for round_ in range(3):
            x = torch.full((1024,), float(dist.get_rank() + round_))
            dist.all_reduce(x, group=group)
            assert x.eq(sum(ranks) + round_ * len(ranks)).all()
            everyone: list[object] = [None] * len(ranks)
            dist.all_gather_object(everyone, (dist.get_rank(), round_), group=group)
            assert everyone == [(rank, round_) for rank in ranks]


def methods(report: object) -> dict[str, str]:
    return {each.group.split()[0]: f"{each.method} {each.why}".strip() for each in report.each}


def backends(groups: Groups) -> dict[str, int]:
    return {name: pointee(group._get_backend(torch.device("cpu"))) for name, group in groups.items()}


def one_lost(worker: Worker) -> dict[str, dict[str, str]]:
    """The victim dies while the others wait for it in WORLD; then nobody dies and everything is quiet; then again."""
    communicators._QUIET_S = NEVER_S  # a training thread always comes out here, however late it may be
    if worker.spare:
        worker.store.wait(["fault/0"])
        worker.become(int(worker.store.get("victim/0")))
    worker.init()
    groups = make(worker)
    seen: dict[str, dict[str, str]] = {}
    if not worker.spare:
        use(groups)
        if "p2p" in groups:
            exchange([groups["p2p"]])
        worker.watch()
        worker.idle()
        worker.meet("used")
        if worker.rank == VICTIM:
            kill_self()
        if worker.rank == 0:
            works = [dist.all_reduce(torch.ones(4), group=groups["ahead"], async_op=True)]
            assert works
        if worker.rank == 1:
            (record,) = [each for each in worker.comm.groups() if each.desc == "cut"]
            assert worker.comm._connections.shutdown_only(record.connections) == 1
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(4))
        worker.await_abort(1)
        if worker.rank == 0:
            assert dist.all_reduce(torch.ones(4), group=groups["late"], async_op=True)
    before = backends(groups)
    seen["lost"] = methods(worker.comm.reform(1, worker.store))
    after = backends(groups)
    kept = {name for name in groups if seen["lost"]["default_pg" if name == "world" else name].startswith("kept")}
    assert {name for name in groups if before[name] == after[name]} >= kept
    use(groups)
    worker.idle()
    worker.meet("quiet")
    worker.comm.abort()
    seen["quiet"] = methods(worker.comm.reform(2, worker.store))
    use(groups)
    exchange(groups.values())
    worker.meet("loud")
    worker.comm.abort()
    seen["loud"] = methods(worker.comm.reform(3, worker.store))
    use(groups)
    worker.meet("end")
    return seen


def test_groups_that_lost_nobody_and_are_quiet_are_kept_and_only_those() -> None:
    results = run(__file__, "one_lost", world=4, spares=1)
    lost = {rank: seen["lost"] for rank, seen in results.items()}
    for rank, seen in lost.items():
        print(rank, seen)
        assert seen["default_pg"].startswith("swapped")
    for rank in (0, 1):
        assert lost[rank]["tp"] == "kept"
        assert lost[rank]["ahead"].startswith("swapped")
        assert lost[rank]["late"] == "swapped busy"
        assert lost[rank]["p2p"] == "swapped point-to-point"
        assert lost[rank]["cut"] == "swapped disconnected"
        assert lost[rank]["alone"] == "kept"
    assert lost[1]["dp"] == lost[3]["dp"] == "kept"
    assert lost[0]["dp"].startswith("swapped") and lost[3]["tp"].startswith("swapped")
    assert {what.split()[0] for what in lost[4].values()} == {"swapped"}
    for seen in results.values():
        assert set(seen["quiet"].values()) == {"kept"}
        assert {what.split()[0] for what in seen["loud"].values()} == {"swapped"}


def late_look(worker: Worker) -> float:
    """The thread that would end quiet groups is not scheduled until the next epoch has its connections."""
    go = threading.Event()

    class Late(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            go.wait()
            return False  # it had not come out

    worker.init()
    worker.comm._left = Late()
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=group)
    worker.idle()
    worker.meet("made")
    worker.comm.abort()
    (late,) = [each for each in threading.enumerate() if each.name == "deadpool-abort"]
    worker.comm.reform(1, worker.store)
    go.set()
    late.join()
    worker.meet("looked")
    dist.all_reduce(x := torch.ones(1), group=group)
    worker.meet("end")
    return x.item()


def test_a_late_look_at_a_broken_epoch_ends_no_connection_of_the_next_one() -> None:
    assert run(__file__, "late_look", world=2) == {0: 2.0, 1: 2.0}


def still_at_work(worker: Worker) -> str:
    """A rank waits in C++, on a group that was quiet when the abort came: nothing of ours sees that it waits."""
    worker.init()
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=group)
    worker.idle()
    worker.meet("made")
    worker.comm.abort()
    said = ""
    if worker.rank == 0:
        with pytest.raises(RuntimeError) as caught:
            dist.monitored_barrier(group=group)
        said = type(caught.value).__name__
    worker.comm.reform(1, worker.store)
    dist.all_reduce(x := torch.ones(1), group=group)
    assert x.item() == 2
    worker.meet("end")
    return said


def test_who_waits_on_a_quiet_group_is_freed_all_the_same() -> None:
    results = run(__file__, "still_at_work", world=2)
    assert results[0] == "RuntimeError", "it was not refused, it was in there"


def forgotten(worker: Worker) -> float:
    """What lies between has forgotten the connection that was prepared for the next epoch: it had been idle."""
    worker.init()
    between = Middleman(int(os.environ["STORE"]))
    store = dist.TCPStore(LOOPBACK, between.port, None, False)
    worker.comm.prepare(store)
    between.drop()  # the newest one, which is that
    worker.comm.abort()
    worker.comm.reform(1, store)
    dist.all_reduce(x := torch.ones(1))
    worker.meet("end")
    return x.item()


def test_a_connection_to_the_store_that_was_forgotten_holds_up_nobody() -> None:
    assert run(__file__, "forgotten", world=2, install={"form_timeout_s": 60.0}) == {0: 2.0, 1: 2.0}


if __name__ == "__main__":
    scenarios = {"one_lost": one_lost, "late_look": late_look, "still_at_work": still_at_work, "forgotten": forgotten}
    worker_main(scenarios)
