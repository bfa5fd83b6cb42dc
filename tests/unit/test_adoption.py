"""An agent takes in the workers that somebody else has started, and sees them end as it would see its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent import adoption
from deadpool_megatron.cluster.agent.adoption import AdoptedProcess, Adoption, AdoptionError, present
from deadpool_megatron.cluster.agent.pulse import shared_page
from deadpool_megatron.cluster.agent.workers import DOORBELL_FD, PARENT_PID, Worker

NAME = f"deadpool-test-{os.getpid()}"
# Comes as local rank argv[1], says what it found, rings, tells argv[2] as its last word if that is a number, and ends
# (or waits to be killed).
RANK = """
import os, socket, sys, time
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.adoption import present
control, found = present(sys.argv[3], int(sys.argv[1]), lambda: None)
print(found["RANK"], found["DEADPOOL_AGENT_PID"], flush=True)
os.pwrite(int(found["DEADPOOL_MUSTER_FD"]), b"x", int(sys.argv[1]))
os.eventfd_write(int(found["DEADPOOL_DOORBELL_FD"]), 1)
if sys.argv[2].isdigit():
    socket.socket(fileno=control).send(r.encode(r.Leaving(int(sys.argv[2]))))
    sys.exit(int(sys.argv[2]))
time.sleep(60)
"""


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def _come(ranks: list[subprocess.Popen[str]], local: int, last: str) -> None:
    command = [sys.executable, "-c", RANK, str(local), last, NAME]
    ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))


def _hear(worker: Worker) -> None:
    for record in worker.receive():
        if isinstance(record, r.Leaving) and isinstance(worker.process, AdoptedProcess):
            worker.process.said = record.code


def test_workers_that_come_in_any_order_are_taken_by_their_local_rank(ranks: list[subprocess.Popen[str]]) -> None:
    agent = Adoption(NAME)
    _come(ranks, 1, "3")
    _come(ranks, 0, "wait")
    shared = shared_page("muster")
    workers = [agent.take(local, 4 + local, {"RANK": str(4 + local)}, shared, lambda: False) for local in (0, 1)]
    agent.close()
    assert [w.pid for w in workers] == [ranks[1].pid, ranks[0].pid]
    for worker, process in zip(workers, (ranks[1], ranks[0]), strict=True):
        assert process.stdout is not None
        assert process.stdout.readline().split() == [str(worker.rank), str(os.getpid())]
        os.set_blocking(worker.doorbell, True)
        assert os.eventfd_read(worker.doorbell) == 1
    assert os.pread(shared, 2, 0) == b"xx", "both see the same memory"
    os.close(shared)
    ranks[0].wait()
    _hear(workers[1])
    assert workers[1].process.wait() == 3, "what it said last"
    assert workers[0].process.poll() is None
    ranks[1].send_signal(signal.SIGKILL)
    assert workers[0].process.wait() == -signal.SIGKILL, "it said nothing"
    for worker in workers:
        worker.close()


def test_an_agent_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "COME_S", 0.3)
    agent = Adoption(NAME)
    with pytest.raises(AdoptionError, match=r"local rank 0 has not come to its agent within 0\.3 s"):
        agent.take(0, 0, {}, 0, lambda: False)
    with pytest.raises(OSError, match="in use"):
        Adoption(NAME)
    agent.close()


def test_a_rank_does_not_wait_for_an_agent_that_will_never_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdoptionError, match="it ended"):
        present(NAME, 0, lambda: "it ended")
    monkeypatch.setattr(adoption, "COME_S", 0.3)
    with pytest.raises(AdoptionError, match=r"no agent of this node has come up within 0\.3 s"):
        present(NAME, 0, lambda: None)


def test_the_names_of_what_an_adopted_worker_finds_are_the_workers_own() -> None:
    assert (PARENT_PID, DOORBELL_FD) == ("DEADPOOL_AGENT_PID", "DEADPOOL_DOORBELL_FD")
