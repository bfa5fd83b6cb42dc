"""Survivors over NCCL: the abort frees the training thread at once and goes on for seconds. What the thread got is
garbage, and may end in any error: it is the epoch's. NCCL is `fake_nccl`; session and communicators are real."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

import fake_nccl
from comm_processes import NEVER_S, Worker, run, worker_main
from deadpool_megatron.cluster import records as r
from deadpool_megatron.comm import communicators
from deadpool_megatron.comm.reports import AbortReport
from deadpool_megatron.recovery import Patience, Session, UnexplainedError, rejoin
from waiting import until

NO_TIME = Patience(0.0, 0.0, 0.0)  # what is waited for is there already


def split(x: torch.Tensor) -> None:
    torch.ones(8).split([int(v) if v == v else 3 for v in x.tolist()])  # RuntimeError that names no communication


def reshape(x: torch.Tensor) -> None:
    if x.isnan().any():
        raise ValueError("the permutation has 3 rows, its index 5")


def check_for_nan(x: torch.Tensor) -> None:
    assert not x.isnan().any(), "found NaN in local forward loss calculation"


def look_up(x: torch.Tensor) -> None:
    ["a token"][0 if x[0] == x[0] else 7]


STEPS: dict[str, Callable[[torch.Tensor], None]] = {
    "split": split,
    "reshape": reshape,
    "check for NaN": check_for_nan,
    "look up": look_up,
}


@dataclass
class Trained:
    """What `rejoin` needs of a trainer, with nothing to restore."""

    rank: int = 0
    live_generation: int | None = 0
    live_epoch: int = 0
    unwound: int = 0
    proofs: list[Callable[[], None]] = field(default_factory=list)
    graphs_end: threading.Event = field(default_factory=threading.Event)

    def let_go(self) -> None:
        self.graphs_end.set()

    def unwind(self) -> None:
        self.unwound += 1

    def restore(self, agreed: r.Generation) -> None: ...

    def synchronize(self) -> None: ...

    def prove(self) -> None:
        if self.proofs:
            self.proofs.pop()()


@dataclass
class Agent:
    """The other end of a survivor's control socket: answers as an agent does when all have arrived."""

    worker: Worker
    line: socket.socket

    def declare(self, epoch: int) -> None:
        self.line.send(r.encode(r.Declare(epoch, "resume", "why", [1], [], [r.SlotAddress(0, 0)], {}, [])))

    def declare_when_blocked(self, epoch: int) -> None:
        """The other rank does not come: once the operation is queued it stays."""
        nccl = fake_nccl.FakeNccl
        until(lambda: nccl.awaited and nccl.at_work, "a wait for an operation under way", 0.001)
        self.declare(epoch)

    def serve(self) -> None:
        while True:
            record = r.decode_from_worker(self.line.recv(1 << 17))
            if isinstance(record, r.Arrived):
                self.worker.store.set(f"abort/{record.epoch}", b"1")
                self.line.send(r.encode(r.Generation(record.epoch, 0, 0, "/arena", {})))
                self.line.send(r.encode(r.Form(record.epoch)))


def survivor(worker: Worker, group: dist.ProcessGroup, manners: fake_nccl.Manners) -> list[str]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.dup(ours.fileno())  # stays open for ever
    comm = worker.comm
    aborts: list[AbortReport] = []

    def end_epochs_before(epoch: int) -> None:
        aborts.append(comm.abort(epoch - 1))

    session = Session(theirs.detach(), end_epochs_before, lambda epoch: comm.begin_reform(epoch, worker.store))
    agent = Agent(worker, ours)
    threading.Thread(target=agent.serve, daemon=True).start()
    trained, seen = Trained(), []
    for epoch, step in enumerate(STEPS.values(), 1):
        x = torch.ones(2)
        dist.all_reduce(x, group=group)
        fake_nccl.FakeNccl.synchronize()
        assert x.eq(2).all()
        manners.slow = trained.graphs_end = threading.Event()  # an abort waits for the graphs that hold communicators
        threading.Thread(target=agent.declare_when_blocked, args=[epoch], daemon=True).start()
        try:
            dist.all_reduce(x, group=group)  # the other one does not come
            fake_nccl.FakeNccl.synchronize()
            step(x)
            raise AssertionError("it was not blocked")
        except Exception as err:  # noqa: BLE001 - as `Hooks` has it
            seen.append(type(err).__name__)
            rejoin(session, comm, trained, lambda: worker.store, NO_TIME, lambda err: False, err)  # type: ignore[arg-type]
        assert not any(abort.nccl_stuck for abort in aborts), aborts
        assert session.joined_epoch == epoch and trained.unwound == epoch and not comm.poisoned
    seen.append(compared_garbage(agent, session, trained, len(STEPS) + 1))
    seen.append(own_error(session, trained, worker))
    seen.append(lost_device(agent, session, trained, len(STEPS) + 3))
    return seen


def compared_garbage(agent: Agent, session: Session, trained: Trained, epoch: int) -> str:
    """The next node is lost while ranks compare their digests: they differ then, and the job must not end with it."""

    def differ() -> None:
        agent.declare(epoch + 1)
        assert session.wait_newer(epoch, 600.0)
        raise ValueError("after the recovery parameters differ")

    trained.proofs.append(differ)
    agent.declare(epoch)
    assert session.wait_newer(epoch - 1, 600.0)
    agent.worker.store.set(f"abort/{epoch}", b"1")
    rejoin(session, agent.worker.comm, trained, lambda: agent.worker.store, NO_TIME, lambda err: False, None)  # type: ignore[arg-type]
    assert session.joined_epoch == epoch + 1
    return "compared"


def own_error(session: Session, trained: Trained, worker: Worker) -> str:
    """Nothing has been declared: then it is this worker's own."""
    try:
        rejoin(session, worker.comm, trained, lambda: worker.store, NO_TIME, lambda err: False, ValueError("mine"))  # type: ignore[arg-type]
    except UnexplainedError:
        return "own"
    return "taken for the epoch's"


def lost_device(agent: Agent, session: Session, trained: Trained, epoch: int) -> str:
    """Garbage was an index, and a kernel has tripped over it: nothing that is declared can help this process."""
    agent.declare(epoch)
    assert session.wait_newer(epoch - 1, 600.0)
    for_ever = Patience(3600.0, 3600.0, 3600.0)
    copying = RuntimeError("copying a shard to the vault failed")
    copying.__cause__ = torch.AcceleratorError("CUDA error: device-side assert triggered")
    unwound = trained.unwound
    try:
        rejoin(session, agent.worker.comm, trained, lambda: agent.worker.store, for_ever, lambda err: True, copying)  # type: ignore[arg-type]
    except UnexplainedError:
        return "lost" if trained.unwound == unwound else "unwound"
    return "gone on"


def garbage(worker: Worker) -> list[str]:
    communicators._ABORT_DEADLINE_S = NEVER_S  # an abort that leaves a communicator stuck does not come back
    manners = fake_nccl.install()
    worker.init()
    group = dist.new_group([0, 1], backend="nccl")
    if worker.rank == 0:
        return survivor(worker, group, manners)
    for epoch in range(1, len(STEPS) + 3):
        if epoch <= len(STEPS):
            dist.all_reduce(torch.ones(2), group=group)
            fake_nccl.FakeNccl.synchronize()
        worker.store.wait([f"abort/{epoch}"])
        worker.comm.abort()
        worker.comm.reform(epoch, worker.store)
    return []


def test_whatever_garbage_raises_after_a_slow_abort_is_the_epochs() -> None:
    seen = run(__file__, "garbage", world=2)[0]
    assert seen == ["RuntimeError", "ValueError", "AssertionError", "IndexError", "compared", "own", "lost"]


if __name__ == "__main__":
    worker_main({"garbage": garbage})
