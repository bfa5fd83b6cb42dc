"""torch's own `reconfigure` (2.14 on) for the groups it can help, the swap for the others, in one epoch.

Alone it does not keep what is promised: it keeps a backend's pool threads, and those may be blocked by a message that
is half sent; a call under way cannot be ended. Members see that coming and swap such a group; the last test says what
happens otherwise (docs/measurements/comm-reconfigure.md).
"""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from comm_processes import Worker, exchange, run, worker_main
from deadpool_megatron.comm import CommunicatorError, Communicators, ReformError
from deadpool_megatron.comm import reconfigure as native
from deadpool_megatron.comm.table import backend_of
from waiting import until

LARGE = 16 * 1024 * 1024
INSTALL = {"strategy": "reconfigure"}
ALONE_S = 8.0
needs_reconfigure = pytest.mark.skipif(not native.offered(), reason=f"torch {torch.__version__} has no reconfigure")


def methods(report: object) -> dict[str, str]:
    return {each.group.split()[0]: f"{each.method} {each.why}".strip() for each in report.each}


def sums_are_right(*groups: dist.ProcessGroup | None) -> None:
    for group in groups:
        dist.all_reduce(x := torch.ones(8), group=group)
        assert x.eq(dist.get_world_size(group)).all()


def two_half_sent_broadcasts(worker: Worker, group: dist.ProcessGroup | None) -> None:
    """Rank 0 is the root of two broadcasts (Gloo has two pool threads a group) that rank 1 stops receiving."""
    data = [torch.ones(LARGE) for _ in range(2)]
    worker.store.set(f"pid/{worker.rank}", str(os.getpid()))
    peer = int(worker.store.get("pid/1"))
    worker.meet("ready")
    if worker.rank == 1:
        works = [dist.broadcast(x, src=0, group=group, async_op=True) for x in data]
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGSTOP)
        worker.comm.abort()
        assert works
        return
    until(lambda: Path(f"/proc/{peer}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", "the peer's stop")
    works = [dist.broadcast(x, src=0, group=group, async_op=True) for x in data]
    time.sleep(0.5)
    worker.comm.abort()
    os.kill(peer, signal.SIGCONT)


def half_sent(worker: Worker) -> dict[str, object]:
    """One group has pool threads that nothing frees in a test's time, the other has not."""
    worker.init()
    other = dist.new_group([0, 1], group_desc="other")
    exchange([None, other])
    two_half_sent_broadcasts(worker, None)
    report = worker.comm.reform(1, worker.store)
    sums_are_right(None, other)
    # The backends are different now: one made for this epoch, one from the beginning. Both are reconfigured from here.
    for epoch in (2, 3):
        exchange([None, other])
        worker.meet(f"used/{epoch}")
        worker.comm.abort()
        again = methods(worker.comm.reform(epoch, worker.store))
        assert {what.split()[0] for what in again.values()} == {"reconfigured"}, again
        sums_are_right(None, other)
    worker.meet("end")
    return {"methods": methods(report)}


@needs_reconfigure
def test_a_group_with_blocked_pool_threads_is_swapped_the_others_reconfigured() -> None:
    results = run(__file__, "half_sent", world=2, install=INSTALL)
    print(results)
    for seen in results.values():
        assert seen["methods"] == {"default_pg": "swapped point-to-point, busy", "other": "reconfigured point-to-point"}


def left_behind(worker: Worker) -> dict[str, object]:
    """Rank 1 agrees to reconfigure and does not come: rank 0 is in a call that only its time-out ends. It is left
    behind, and the next epoch swaps what it is working on."""
    worker.init()
    pair = dist.new_group([0, 1], group_desc="pair")
    exchange([None, pair])
    worker.meet("made")
    worker.comm.abort()
    if worker.rank == 1:
        go_on, reconfigure = threading.Event(), native.reconfigure

        def absent(*args: object) -> None:
            worker.store.clone().set("absent", b"1")
            go_on.wait()
            raise RuntimeError("never came")

        native.reconfigure = absent  # type: ignore[assignment]
        threading.Thread(target=lambda: (worker.store.clone().wait(["given up"]), worker.comm.abort())).start()
        with pytest.raises(ReformError):
            worker.comm.reform(1, worker.store)
        native.reconfigure = reconfigure
    else:
        threading.Thread(
            target=lambda: (worker.store.clone().wait(["absent"]), time.sleep(0.5), worker.comm.abort())
        ).start()
        with pytest.raises(ReformError, match="aborted while forming"):
            worker.comm.reform(1, worker.store)
        worker.store.set("given up", b"1")
    report = worker.comm.reform(2, worker.store)
    sums_are_right(None, pair)
    if worker.rank == 0:
        assert any(thread.name == "deadpool-forming-1" for thread in threading.enumerate()), "it was to be left behind"
    for thread in threading.enumerate():  # the limit of forming passes, and nobody notices
        if thread.name == "deadpool-forming-1" and worker.rank == 0:
            thread.join()
    worker.meet("its end")
    sums_are_right(None, pair)
    worker.meet("used")
    worker.comm.abort()
    worker.comm.reform(3, worker.store)
    sums_are_right(None, pair)
    worker.meet("end")
    return {"methods": methods(report)}


@needs_reconfigure
def test_a_reconfigure_that_waits_for_nobody_is_left_behind_and_its_group_swapped() -> None:
    results = run(__file__, "left_behind", world=2, install=INSTALL | {"form_timeout_s": 30.0})
    print(results)
    for seen in results.values():
        assert seen["methods"]["default_pg"].startswith("swapped")
    assert "spoilt" in results[0]["methods"]["default_pg"]


def other_server(worker: Worker) -> dict[str, str]:
    """The next epoch has another store: what was made with the old one cannot meet there."""
    worker.init()
    exchange([None])
    worker.meet("made")
    worker.comm.abort()
    if worker.rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        worker.store.set("new server", str(server.port))
    store = dist.TCPStore("127.0.0.1", int(worker.store.get("new server")), None, False)
    first = methods(worker.comm.reform(1, store))
    exchange([None])
    worker.meet("used")
    worker.comm.abort()
    second = methods(worker.comm.reform(2, store))
    sums_are_right(None)
    worker.meet("end")
    return {"first": first["default_pg"], "second": second["default_pg"]}


@needs_reconfigure
def test_groups_follow_the_coordinator_to_another_store() -> None:
    results = run(__file__, "other_server", world=2, install=INSTALL)
    for seen in results.values():
        assert seen == {"first": "swapped point-to-point, store gone", "second": "reconfigured point-to-point"}


def alone(worker: Worker) -> dict[str, float]:
    """torch's reconfigure without the agreement that looks for blocked threads."""
    worker.init()
    two_half_sent_broadcasts(worker, None)
    worker.comm._poison.set = False
    (record,) = worker.comm.groups()
    backend = backend_of(record, "gloo")
    worker.store.set(f"handle/{worker.rank}", native.handle(backend))
    handles = tuple(worker.store.get(f"handle/{rank}").decode() for rank in range(worker.world))
    begun = time.monotonic()
    native.reconfigure(backend, 1, handles, 20.0)
    formed = time.monotonic()
    dist.all_reduce(torch.ones(1))
    return {"reconfigure": formed - begun, "all_reduce": time.monotonic() - formed}


@needs_reconfigure
@pytest.mark.perf
def test_alone_it_is_held_up_by_the_pool_threads_it_keeps() -> None:
    """When this fails because upstream got better, the objection "busy" can go."""
    install = INSTALL | {"operation_timeout_s": ALONE_S}
    results = run(__file__, "alone", world=2, install=install)
    print(results)
    assert max(sum(r.values()) for r in results.values()) > 0.4 * ALONE_S


@pytest.mark.skipif(native.offered(), reason="this torch has reconfigure")
def test_without_it_the_wish_is_refused_in_one_line() -> None:
    with pytest.raises(CommunicatorError, match=r"^[^\n]*needs torch 2\.14[^\n]*$"):
        Communicators.install(standby=False, strategy="reconfigure")


if __name__ == "__main__":
    worker_main({"half_sent": half_sent, "left_behind": left_behind, "other_server": other_server, "alone": alone})
