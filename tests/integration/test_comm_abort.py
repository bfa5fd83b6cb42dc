"""Abort frees a blocked rank, whatever it is blocked in, also when its peer is stopped or dead with a message half
transmitted; and after abort nothing of the old epoch works. No time-out ends anything here: without the abort, a rank
would stay where it is."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from comm_processes import NEVER_S, Worker, run, worker_main
from deadpool_megatron.comm import communicators
from deadpool_megatron.comm.reports import CommunicatorAborted
from waiting import until

pytestmark = pytest.mark.versions(torch=True)

LARGE = 16 * 1024 * 1024  # floats: 64 MB, far more than socket buffers hold
VICTIM = 2
WORLD = 3

_DATA = torch.ones(
    WORLD * LARGE if __name__ == "__main__" else 1
)  # made once: filling 64 MB takes longer than an abort
_ROOM = [torch.zeros(LARGE if __name__ == "__main__" else 1) for _ in range(WORLD)]


def data(numel: int) -> torch.Tensor:
    return _DATA[:numel]


def room(index: int = 0, numel: int = LARGE) -> torch.Tensor:
    return _ROOM[index][:numel]


Start = Callable[[dist.ProcessGroup, int], Any]


def ring(numel: int) -> Start:
    def start(group: dist.ProcessGroup, me: int) -> Any:
        ops = [
            dist.P2POp(dist.isend, data(numel), (me + 1) % WORLD, group),
            dist.P2POp(dist.irecv, room(0, numel), (me - 1) % WORLD, group),
        ]
        return dist.batch_isend_irecv(ops)

    return start


def to_victim(numel: int) -> Start:
    def start(group: dist.ProcessGroup, me: int) -> Any:
        if me == VICTIM:
            return [dist.irecv(room(0, numel), src=0, group=group), dist.irecv(room(1, numel), src=1, group=group)]
        return [dist.isend(data(numel), dst=VICTIM, group=group)]

    return start


def from_victim(group: dist.ProcessGroup, me: int) -> Any:
    """The victim never sends."""
    return [] if me == VICTIM else [dist.irecv(torch.empty(4), src=VICTIM, group=group)]


def half_received(group: dist.ProcessGroup, me: int) -> Any:
    """The victim has begun to send a large message when it stops."""
    if me == VICTIM:
        return [dist.isend(data(LARGE), dst=to, group=group) for to in (0, 1)]
    return [dist.irecv(room(), src=VICTIM, group=group)]


def broadcast(group: dist.ProcessGroup, me: int) -> Any:
    return dist.broadcast(data(LARGE), src=0, group=group, async_op=True)


def gather(group: dist.ProcessGroup, me: int) -> Any:
    out = _ROOM if me == VICTIM else None
    return dist.gather(data(LARGE), out, dst=VICTIM, group=group, async_op=True)


def scatter(group: dist.ProcessGroup, me: int) -> Any:
    rows = [data(LARGE) for _ in range(WORLD)] if me == 0 else None
    return dist.scatter(room(), rows, src=0, group=group, async_op=True)


def reduce(group: dist.ProcessGroup, me: int) -> Any:
    return dist.reduce(data(LARGE), dst=VICTIM, group=group, async_op=True)


def all_to_all(group: dist.ProcessGroup, me: int) -> Any:
    return dist.all_to_all_single(room(0, 3 * LARGE // 4), data(3 * LARGE // 4), group=group, async_op=True)


def all_reduce(numel: int) -> Start:
    return lambda group, me: dist.all_reduce(data(numel), group=group, async_op=True)


def all_gather(group: dist.ProcessGroup, me: int) -> Any:
    return dist.all_gather_into_tensor(torch.empty(WORLD * LARGE // 8), data(LARGE // 8), group=group, async_op=True)


def reduce_scatter(group: dist.ProcessGroup, me: int) -> Any:
    return dist.reduce_scatter_tensor(room(0, LARGE // 8), data(WORLD * LARGE // 8), group=group, async_op=True)


def barrier(group: dist.ProcessGroup, me: int) -> Any:
    return None if me == VICTIM else dist.barrier(group=group, async_op=True)


def functional_broadcast(group: dist.ProcessGroup, me: int) -> None:
    """The wait is in C++: no Python code of ours sees it."""
    result = funcol.broadcast(data(LARGE), 0, group)
    if me != VICTIM:
        funcol.wait_tensor(result)


def absent(operation: Callable[[dist.ProcessGroup], Any]) -> Start:
    """The victim does not come; the operation blocks inside of its call."""
    return lambda group, me: None if me == VICTIM else operation(group)


OPERATIONS: dict[str, Start] = {
    "isend_large": to_victim(LARGE),
    "isend_small_unreceived": lambda group, me: (
        [] if me == VICTIM else [dist.isend(torch.ones(4), dst=VICTIM, group=group)]
    ),
    "recv": from_victim,
    "recv_half": half_received,
    "batch_large": ring(LARGE),
    "broadcast": broadcast,
    "gather": gather,
    "scatter": scatter,
    "reduce": reduce,
    "all_to_all": all_to_all,
    "all_reduce": all_reduce(4),
    "all_reduce_large": all_reduce(LARGE),
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "barrier": barrier,
    "objects": absent(lambda group: dist.all_gather_object([None] * WORLD, {"a": 1}, group=group)),
    "monitored_barrier": absent(lambda group: dist.monitored_barrier(group=group)),
    "functional_large": functional_broadcast,
    "functional": absent(lambda group: funcol.all_reduce(torch.ones(4), "sum", group).sum().item()),
}


HALF_SENT = ["isend_large", "batch_large", "recv_half", "broadcast", "gather", "all_to_all", "functional_large"]


def finish(works: Any) -> None:
    for work in works if isinstance(works, list) else [works]:
        if work is not None:
            work.wait()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def blocked_and_freed(worker: Worker, start: Start, fault: int, victim_pid: int) -> float:
    """On a survivor: block with the victim out, have the fault declared, return seconds from abort to exception."""
    until(lambda: state_of(victim_pid) in "TZ", "the victim's stop", 0.002)
    worker.meet(f"start/{fault}", WORLD - 1)
    if worker.rank == 0:
        threading.Timer(0.4, lambda: worker.store.clone().set(f"fault/{fault}", b"1")).start()
    with pytest.raises(RuntimeError):
        finish(start(dist.group.WORLD, worker.rank))
        dist.barrier()  # who had nothing to do with the victim meets it here
    freed = time.monotonic()
    assert worker.store.check([f"fault/{fault}"]), "it was not blocked"
    worker.await_abort(fault + 1)
    return freed - worker.aborted_at[fault]


def nothing_works(worker: Worker) -> None:
    """Poisoned: every operation raises at once, on every group, and no group can be made."""
    assert worker.comm.poisoned
    for start in OPERATIONS.values():
        with pytest.raises(RuntimeError):
            finish(start(dist.group.WORLD, worker.rank))
    with pytest.raises(CommunicatorAborted):
        dist.new_group([0, 1])


def healthy(worker: Worker) -> list[float]:
    """What the large all-reduce takes."""
    seconds = []
    for _ in range(3):
        begun = time.monotonic()
        dist.all_reduce(data(LARGE).clone())
        seconds.append(time.monotonic() - begun)
    return seconds


def stopped_peer(worker: Worker) -> dict[str, list[float]]:
    """Round after round: the victim joins an operation, is stopped in it, the others must come out on abort.

    Seconds until they did, by operation; under "healthy" what the large all-reduce takes between ranks that run."""
    communicators._ABORT_DEADLINE_S = NEVER_S  # an abort that leaves a wait stuck does not come back
    worker.init()
    funcol.wait_tensor(funcol.broadcast(torch.ones(1), 0, dist.group.WORLD))  # the first one imports for seconds
    worker.watch()
    worker.store.set(f"pid/{worker.rank}", str(os.getpid()))
    victim_pid = int(worker.store.get(f"pid/{VICTIM}"))
    times: dict[str, list[float]] = {"healthy": healthy(worker)}
    fault = 0
    for names in (list(OPERATIONS), HALF_SENT):
        for name in names:
            start = OPERATIONS[name]
            dist.all_reduce(torch.ones(4))
            worker.meet(f"round/{fault}")
            if worker.rank == VICTIM:
                begun = time.monotonic()
                works = start(dist.group.WORLD, worker.rank)
                time.sleep(0.05)  # its part is posted: peers will start to transmit
                os.kill(os.getpid(), signal.SIGSTOP)
                worker.await_abort(fault + 1)
                with pytest.raises(RuntimeError):
                    finish(works)
                    dist.barrier()
                times.setdefault(name, []).append(time.monotonic() - begun)
            else:
                times.setdefault(name, []).append(blocked_and_freed(worker, start, fault, victim_pid))
                worker.meet(f"freed/{fault}", WORLD - 1)
                if worker.rank == 0:
                    os.kill(victim_pid, signal.SIGCONT)
            if fault == 1 and worker.rank != VICTIM:  # (it has no part in some operations)
                nothing_works(worker)
            fault += 1
            # The end of a dead backend waits for its stuck pool thread; that must not hold up anybody (nor the GIL).
            worker.comm.reform(fault, worker.store)
    dist.all_reduce(torch.ones(4))
    return times


def shown(worst: dict[str, float], whole: float) -> None:
    for name, seconds in worst.items():
        print(f"seconds from abort to exception, worst: {name:24s} {seconds:.4f}")
    print(f"an all-reduce of 64 MB between ranks that run: {whole:.4f}")


def test_abort_frees_a_rank_blocked_on_a_stopped_peer() -> None:
    results = run(__file__, "stopped_peer", world=WORLD)
    assert all(results[rank].keys() == {"healthy", *OPERATIONS} for rank in range(WORLD))


@pytest.mark.perf
def test_abort_frees_a_rank_blocked_on_a_stopped_peer_sooner_than_a_large_operation_takes_some_times() -> None:
    results = run(__file__, "stopped_peer", world=WORLD)
    worst = {name: max(max(results[r][name]) for r in (0, 1)) for name in OPERATIONS}
    whole = max(min(results[r]["healthy"]) for r in range(WORLD))
    shown(worst, whole)
    assert max(worst.values()) < 10 * whole, worst


KILLED_IN = ["isend_large", "recv_half", "broadcast", "gather"]


def dead_peer(worker: Worker) -> dict[str, float]:
    """The victim is killed with a message half transmitted; a spare takes over; the next victim is the spare."""
    communicators._ABORT_DEADLINE_S = NEVER_S  # as above
    turn = 0
    if worker.spare:
        turn = int(os.environ["ID"]) - WORLD + 1
        worker.store.wait([f"called/{turn}"])
        worker.become(VICTIM)
    worker.init()
    worker.watch(turn)
    worker.reports = [None] * turn
    if worker.spare:
        worker.comm.reform(turn, worker.store)
    times = {} if worker.spare else {"healthy": min(healthy(worker))}
    for fault in range(turn, len(KILLED_IN)):
        worker.store.set(f"pid/{fault}/{worker.rank}", str(os.getpid()))
        dist.all_reduce(torch.ones(4))
        start = OPERATIONS[KILLED_IN[fault]]
        if worker.rank == VICTIM:
            worker.works = start(dist.group.WORLD, worker.rank)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGSTOP)
            raise AssertionError("it was to be killed")
        victim_pid = int(worker.store.get(f"pid/{fault}/{VICTIM}"))
        until(lambda p=victim_pid: state_of(p) == "T", "the victim's stop", 0.002)
        worker.meet(f"start/{fault}", WORLD - 1)
        if worker.rank == 0:
            threading.Timer(0.3, os.kill, (victim_pid, signal.SIGKILL)).start()  # the driver declares it
        with pytest.raises(RuntimeError):
            finish(start(dist.group.WORLD, worker.rank))
            dist.barrier()
        freed = time.monotonic()
        worker.await_abort(fault + 1)
        times[KILLED_IN[fault]] = freed - worker.aborted_at[fault]
        worker.store.set(f"called/{fault + 1}", b"1")
        worker.comm.reform(fault + 1, worker.store)
    dist.all_reduce(x := torch.ones(4))
    assert x.eq(WORLD).all()
    return times


def test_abort_frees_a_rank_whose_peer_died_in_the_middle_of_a_message() -> None:
    results = run(__file__, "dead_peer", world=WORLD, spares=len(KILLED_IN))
    assert sorted(results) == [0, 1, WORLD + len(KILLED_IN) - 1]


@pytest.mark.perf
def test_abort_frees_a_rank_whose_peer_died_sooner_than_a_large_operation_takes_some_times() -> None:
    results = run(__file__, "dead_peer", world=WORLD, spares=len(KILLED_IN))
    worst = {name: max(results[r][name] for r in (0, 1)) for name in KILLED_IN}
    whole = max(results[r]["healthy"] for r in (0, 1))
    shown(worst, whole)
    assert max(worst.values()) < 10 * whole, worst


if __name__ == "__main__":
    worker_main({"stopped_peer": stopped_peer, "dead_peer": dead_peer})
