"""Swap after swap: no limit on their number, nothing left behind, failures while forming lead to the next epoch."""

import os
import signal
import statistics
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from comm_processes import NEVER_S, Worker, exchange, kill_self, run, until_retired, worker_main
from deadpool_megatron.comm import ReformError, communicators, forming
from waiting import until

pytestmark = pytest.mark.versions(torch=True)

SWAPS = 320  # more than torch's one-byte backend types
MANY = 20
KEPT = 10
LARGE = 16 * 1024 * 1024  # floats: 64 MB, far more than socket buffers hold


def footprint() -> dict[str, float]:
    """Threads, descriptors and resident MB, once the background has let go of what the last swaps retired."""
    process = psutil.Process()
    until_retired()
    return {"threads": process.num_threads(), "fds": process.num_fds(), "mb": process.memory_info().rss / 2**20}


def swap_for_ever(worker: Worker) -> dict[str, dict[str, float]]:
    worker.init()
    pair = dist.new_group([0, 1], group_desc="pair")
    seen: dict[str, dict[str, float]] = {}
    for epoch in range(1, SWAPS + 1):
        exchange([None, pair])
        worker.meet(f"swap/{epoch}")  # an abort while a peer still reads is a failure for that peer
        worker.comm.abort()
        assert worker.comm.reform(epoch, worker.store).reformed == 2
        for group in (None, pair):
            dist.all_reduce(x := torch.ones(4), group=group)
            assert x.eq(2).all()
        if epoch in (20, SWAPS):
            seen[str(epoch)] = footprint()
    return seen


def assert_bounded(first: dict[str, float], last: dict[str, float], mb: float) -> None:
    assert last["threads"] <= first["threads"] + 3, (first, last)
    assert last["fds"] <= first["fds"] + 4, (first, last)
    assert last["mb"] <= first["mb"] + mb, (first, last)


def test_swaps_have_no_limit_and_leave_nothing_behind() -> None:
    results = run(__file__, "swap_for_ever", world=2)
    for seen in results.values():
        print(f"after 20 swaps {seen['20']}, after {SWAPS} {seen[str(SWAPS)]}")
        assert_bounded(seen["20"], seen[str(SWAPS)], mb=10)


def layout(world: int) -> list[list[list[int]]]:
    """24 groups a rank: what TP2 x PP2 x DP2 makes, several times over."""
    half, quarter = world // 2, world // 4
    families = [
        [[i, i + 1] for i in range(0, world, 2)],
        [[i, i + half] for i in range(half)],
        [[i, i + quarter] for b in range(0, world, half) for i in range(b, b + quarter)],
        [list(range(b, b + half)) for b in (0, half)],
        [[i] for i in range(world)],
        [list(range(k, world, 2)) for k in range(2)],
    ]
    return (families * 4)[:23]  # and WORLD


def twenty_four_groups(worker: Worker) -> dict[str, object]:
    worker.init()
    begun = time.monotonic()
    groups = [dist.group.WORLD]
    for family in layout(worker.world):
        for row in family:
            group = dist.new_group(row)
            if worker.rank in row:
                groups.append(group)
    assert len(groups) == 24
    for group in groups:
        dist.all_reduce(torch.ones(4), group=group)
    made = time.monotonic() - begun
    seconds, seen = [], {}
    for epoch in range(1, MANY + 1):
        for group in groups:
            dist.all_reduce(torch.ones(4), group=group)
        exchange(groups)
        worker.meet(f"swap/{epoch}")
        worker.comm.abort()
        report = worker.comm.reform(epoch, worker.store)
        assert report.reformed == 24
        seconds.append(report.seconds)
        if epoch in (2, MANY):
            seen[str(epoch)] = footprint()
    kept = []
    communicators._QUIET_S = NEVER_S  # a training thread always comes out here, however late it may be
    for epoch in range(MANY + 1, MANY + KEPT + 1):
        for group in groups:
            dist.all_reduce(torch.ones(4), group=group)
        worker.idle()
        worker.meet(f"keep/{epoch}")
        worker.comm.abort()
        report = worker.comm.reform(epoch, worker.store)
        assert report.reformed == 0, str(report)
        kept.append(report.seconds)
    return {"made": made, "seconds": seconds, "seen": seen, "kept": kept}


def test_twenty_four_groups_of_eight_ranks_re_form_and_leave_nothing() -> None:
    for result in run(__file__, "twenty_four_groups", world=8).values():
        assert_bounded(result["seen"]["2"], result["seen"][str(MANY)], mb=40)


@pytest.mark.perf
def test_twenty_four_groups_re_form_as_fast_as_they_are_made_and_are_kept_in_less() -> None:
    results = run(__file__, "twenty_four_groups", world=8)
    made = max(result["made"] for result in results.values())
    slowest = [max(column) for column in zip(*(r["seconds"] for r in results.values()), strict=True)]
    print(
        f"24 groups, 8 ranks, {os.cpu_count()} cores: slowest rank of each swap, "
        f"median {statistics.median(slowest):.3f} s, min {min(slowest):.3f}, max {max(slowest):.3f}"
    )
    kept = [max(column) for column in zip(*(r["kept"] for r in results.values()), strict=True)]
    print(f"all of them kept: median {statistics.median(kept):.3f} s, min {min(kept):.3f}, max {max(kept):.3f}")
    print(f"made, with one operation each, in {made:.3f} s; footprint {results[0]['seen']}")
    assert statistics.median(slowest) < 2 * made
    assert statistics.median(kept) < statistics.median(slowest)


def aborting_when(worker: Worker, key: str, epoch: int) -> None:
    """Abort the forming of an epoch, begun or not, once there is such a key in the store."""
    store = worker.store.clone()
    threading.Thread(target=lambda: (store.wait([key]), worker.comm.abort(epoch)), daemon=True).start()


def failing_to_form(worker: Worker) -> str:
    """Epoch 1: rank 1 never comes and rank 0 is aborted. Epoch 2: rank 1 dies half-way. Epoch 3: the spare is in.
    Epoch 4: a rank comes late, with an old epoch: it must not get in, nor disturb the others."""
    if worker.spare:
        worker.store.wait(["fault/0"])
        worker.become(1)
        worker.init()
        pair = dist.new_group([0, 1])
        worker.comm.reform(3, worker.store)
    else:
        worker.init()
        pair = dist.new_group([0, 1])
        exchange([None, pair])
        worker.meet("made")
        worker.comm.abort()
        if worker.rank == 0:

            def end() -> None:
                until(lambda: worker.comm._forming_epoch == 1, "the begin of epoch 1")
                time.sleep(0.5)  # in a wait for the other rank by now
                worker.comm.abort(1)

            ending = threading.Thread(target=end, daemon=True)
            ending.start()
            with pytest.raises(ReformError, match="aborted while forming"):
                worker.comm.reform(1, worker.store)
            ending.join()
            assert worker.comm.poisoned
            with pytest.raises(ReformError, match="not after"):
                worker.comm.reform(1, worker.store)
            worker.watch()
            worker.store.set("first try over", b"1")
            with pytest.raises(ReformError):  # its peer dies while forming
                worker.comm.reform(2, worker.store)
            worker.await_abort(1)
            with pytest.raises(RuntimeError):
                dist.barrier()
            worker.comm.reform(3, worker.store)
        else:
            worker.store.wait(["first try over"])
            worker.comm._connections.watching = kill_self  # when it opens a device: what is swapped is agreed on
            worker.comm.reform(2, worker.store)
    for group in (None, pair):
        dist.all_reduce(x := torch.ones(4), group=group)
        assert x.eq(2).all()
    worker.meet("before the late one")
    worker.comm.abort()
    if worker.rank == 1:
        aborting_when(worker, "others went to 5", 4)
        with pytest.raises(ReformError, match="aborted while forming"):
            worker.comm.reform(4, worker.store)
    else:
        worker.comm.begin_reform(5, worker.store)
        worker.store.set("others went to 5", b"1")
    worker.comm.reform(5, worker.store)
    for group in (None, pair):
        dist.all_reduce(x := torch.ones(4), group=group)
        assert x.eq(2).all()
    return "done"


def over_before_it_forms(worker: Worker) -> str:
    """The word that an epoch is over comes before its forming has begun."""
    worker.init()
    exchange([None])
    worker.meet("made")
    worker.comm.abort(1)
    with pytest.raises(ReformError, match="aborted while forming"):
        worker.comm.reform(1, worker.store)
    worker.comm.reform(2, worker.store)
    sums_are_right(None)
    return "done"


def test_an_epoch_that_is_over_before_it_forms_is_not_waited_for() -> None:
    assert len(run(__file__, "over_before_it_forms", world=2)) == 2


def test_a_failure_while_forming_leads_to_the_next_epoch() -> None:
    results = run(__file__, "failing_to_form", world=2, spares=1)
    assert sorted(results) == [0, 2]


def sums_are_right(*groups: dist.ProcessGroup | None) -> None:
    for group in groups:
        dist.all_reduce(x := torch.ones(8), group=group)
        assert x.eq(dist.get_world_size(group)).all()


def half_sent(worker: Worker) -> str:
    """Rank 0 is the root of two broadcasts, one for each pool thread of the group, that rank 1 stops receiving. Whoever
    waited for them would stand still."""
    worker.init()
    data = [torch.ones(LARGE) for _ in range(2)]
    worker.store.set(f"pid/{worker.rank}", str(os.getpid()))
    peer = int(worker.store.get("pid/1"))
    worker.meet("ready")
    if worker.rank == 1:
        works = [dist.broadcast(x, src=0, async_op=True) for x in data]
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGSTOP)
        worker.comm.abort()
    else:
        while Path(f"/proc/{peer}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.01)
        works = [dist.broadcast(x, src=0, async_op=True) for x in data]
        time.sleep(0.5)
        worker.comm.abort()
        os.kill(peer, signal.SIGCONT)
    assert works
    worker.comm.reform(1, worker.store)
    sums_are_right(None)
    worker.meet("end")
    return "done"


def test_a_group_with_blocked_pool_threads_is_of_use_at_once() -> None:
    assert len(run(__file__, "half_sent", world=2)) == 2


def left_behind(worker: Worker) -> str:
    """Rank 1 agrees to form and does not connect: rank 0 is in a call that only its time-out ends."""
    worker.init()
    pair = dist.new_group([0, 1], group_desc="pair")
    exchange([None, pair])
    worker.meet("made")
    worker.comm.abort()
    if worker.rank == 1:
        build = forming.build_gloo

        def absent(*args: object) -> None:
            worker.store.clone().set("absent", b"1")
            threading.Event().wait()

        forming.build_gloo = absent  # type: ignore[assignment]
        threading.Thread(target=lambda: (worker.store.clone().wait(["given up"]), worker.comm.abort())).start()
        with pytest.raises(ReformError):
            worker.comm.reform(1, worker.store)
        forming.build_gloo = build
    else:
        threading.Thread(
            target=lambda: (worker.store.clone().wait(["absent"]), time.sleep(0.5), worker.comm.abort())
        ).start()
        with pytest.raises(ReformError, match="aborted while forming"):
            worker.comm.reform(1, worker.store)
        worker.store.set("given up", b"1")
    worker.comm.reform(2, worker.store)
    sums_are_right(None, pair)
    if worker.rank == 0 and worker.comm._form_timeout_s != NEVER_S:
        for old in threading.enumerate():
            if old.name == "deadpool-forming-1":
                old.join()  # its time-out passes, and nobody notices
    worker.meet("its end")
    sums_are_right(None, pair)
    worker.meet("used")
    worker.comm.abort()
    worker.comm.reform(3, worker.store)
    sums_are_right(None, pair)
    worker.meet("end")
    return "done"


@pytest.mark.parametrize("timeout_s", [10.0, NEVER_S])
def test_a_forming_that_waits_for_nobody_is_left_behind_and_harms_no_later_epoch(timeout_s: float) -> None:
    assert len(run(__file__, "left_behind", world=2, install={"form_timeout_s": timeout_s})) == 2


def other_server(worker: Worker) -> str:
    """The next epoch has another store."""
    worker.init()
    exchange([None])
    worker.meet("made")
    worker.comm.abort()
    if worker.rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        worker.store.set("new server", str(server.port))
    store = dist.TCPStore("127.0.0.1", int(worker.store.get("new server")), None, False)
    for epoch in (1, 2):
        assert worker.comm.reform(epoch, store).reformed == 1
        sums_are_right(None)
        exchange([None])
        worker.meet(f"used/{epoch}")
        worker.comm.abort()
    return "done"


def test_groups_follow_the_coordinator_to_another_store() -> None:
    assert len(run(__file__, "other_server", world=2)) == 2


def other_groups(worker: Worker) -> str:
    worker.init()
    dist.new_group([0, 1], group_desc="a" if worker.rank == 0 else "b")
    worker.meet("made")
    worker.comm.abort()
    worker.store.set(f"digest/{worker.rank}", worker.comm.table_digest())
    assert worker.store.get("digest/0") != worker.store.get("digest/1")
    aborting_when(worker, "told", 1)
    try:
        worker.comm.reform(1, worker.store)
    except ReformError as error:
        worker.store.set("told", b"1")
        return str(error)
    return "formed"


def test_ranks_that_made_other_groups_are_told_so_at_once() -> None:
    """Whose groups differ from those of the first is told so; the first one would wait for it for ever."""
    told, waited = sorted(run(__file__, "other_groups", world=2).values(), key=lambda text: "aborted" in text)
    assert "made other process groups" in told and "aborted while forming" in waited


if __name__ == "__main__":
    worker_main(
        {
            "swap_for_ever": swap_for_ever,
            "twenty_four_groups": twenty_four_groups,
            "failing_to_form": failing_to_form,
            "over_before_it_forms": over_before_it_forms,
            "half_sent": half_sent,
            "left_behind": left_behind,
            "other_server": other_server,
            "other_groups": other_groups,
        }
    )
