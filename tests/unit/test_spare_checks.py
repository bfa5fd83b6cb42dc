"""A spare is checked before it is used, and again while it is parked: who asks, what is looked at, what follows."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.checks import DEADLINE_S
from deadpool_megatron.cluster.core.job import Phase
from deadpool_megatron.megatron import self_check
from deadpool_megatron.vault import Scratch, Vault, VaultServer, clean_leftovers, exchange
from deadpool_megatron.vault.errors import ChecksumMismatch, Refused, TransferFailed
from deadpool_megatron.vault.frames import Echo
from deadpool_megatron.vault.wire import Deadlines, accept
from simulated import SimulatedJob

SECRET = bytes(range(32))
EVERY_S = 600.0


def checked(nodes: int = 6, spares: int = 3, **more: object) -> SimulatedJob:
    job = SimulatedJob(nodes, spares, spare_check_s=EVERY_S, **more).train()  # type: ignore[arg-type]
    job.wait(0.0)
    return job


def asked(job: SimulatedJob, node: int) -> list[r.CheckSpare]:
    return job.told(r.CheckSpare, node)


def answer(job: SimulatedJob, node: int, why: str = "") -> None:
    job.feed(r.SpareChecked(node, asked(job, node)[-1].number, why, 0.1, 0.001))


# ---- the coordinator


def test_a_spare_is_checked_once_the_job_trains_and_again_and_again_with_other_partners() -> None:
    job = SimulatedJob(5, 1, spare_check_s=EVERY_S)
    job.join()
    job.park()
    job.wait(0.0)
    assert not asked(job, 4), "the start is not held up"
    for rank in range(8):
        job.register(rank)
    job.wait(0.0)
    (first,) = asked(job, 4)
    assert set(first.partners) <= {0, 1, 2, 3} and len(first.partners) == 3
    # two slots of each shard of two ranks, own and kept for another node
    assert first.memory_bytes == 2 * 2 * 2 * job.core._layout.largest
    answer(job, 4)
    assert [(e["node"], e["was"]) for e in job.events("checked")] == [(4, "")]
    job.wait(EVERY_S - 1)
    assert len(asked(job, 4)) == 1
    job.wait(1)
    answer(job, 4)
    assert len(asked(job, 4)) == 2 and asked(job, 4)[1].partners != first.partners
    assert len(job.events("checked")) == 1, "that all is well is said once"


def test_without_checks_nobody_is_asked_and_no_deadline_is_kept() -> None:
    job = SimulatedJob().train()
    job.wait(10 * EVERY_S)
    assert not job.told(r.CheckSpare) and job.core.next_deadline() is None


def test_a_spare_that_fails_is_taken_only_where_no_other_one_is() -> None:
    job = checked()
    answer(job, 3, "worker 0: a product is wrong")
    answer(job, 4)
    assert [(e["node"], e["cause"]) for e in job.events("unfit")] == [(3, "worker 0: a product is wrong")]
    assert job.core.nodes[3].record.failures[-1].kind == "check"
    for lost, spare in ((0, 4), (1, 5), (2, 3)):
        job.lose(lost)
        assert job.core.assignment[2 * lost].node == spare
        job.recover()
    assert not job.core.nodes[3].unfit, "it trains"


def test_a_lemon_is_better_than_one_that_fails_and_one_that_still_starts_is_too() -> None:
    job = checked()
    for fan in range(2):
        job.core.members.failed(4, "lost", f"fan {fan}")
    answer(job, 3, "no memory")
    job.feed(r.WorkerExited(5, 0, None, 50, -9))  # it starts again
    job.lose(0)
    assert job.core.assignment[0].node == 5
    job.recover()
    job.lose(1)
    assert job.core.assignment[2].node == 4


def test_a_worker_that_has_died_is_started_again_in_its_slot_rather_than_its_node_given_to_one_that_fails() -> None:
    job = checked(4, 1)
    answer(job, 3, "no memory")
    job.feed(r.WorkerExited(1, 0, 2, 10, -9))
    assert job.core.assignment[2].node == 1


def test_one_that_never_answers_has_failed_after_a_deadline_and_counts_again_when_it_does() -> None:
    job = checked()
    answer(job, 4)
    answer(job, 5)
    job.wait(DEADLINE_S - 1)
    assert not job.events("unfit")
    job.wait(1)
    assert [(e["node"], "answered" in e["cause"]) for e in job.events("unfit")] == [(3, True)]
    job.lose(0)
    assert job.core.assignment[0].node == 4
    answer(job, 3)  # in the middle of a recovery
    assert job.core.phase is not Phase.RUNNING and not job.core.nodes[3].unfit
    assert [(e["node"], bool(e["was"])) for e in job.events("checked")][-1] == (3, True)


def test_the_record_has_a_failure_once_however_often_it_is_found() -> None:
    job = checked(4, 1)
    for _ in range(3):
        answer(job, 3, "no memory")
        job.wait(EVERY_S)
    assert [each.kind for each in job.core.nodes[3].record.failures] == ["check"]
    assert len(job.events("unfit")) == 1


def test_a_recovery_waits_for_no_check_and_judges_none() -> None:
    job = checked()
    job.lose(0)
    job.wait(1.0)
    before = len(job.told(r.CheckSpare))
    job.offer(1)  # all others are late
    job.wait(25.0)
    assert job.core.phase is not Phase.RUNNING
    assert len(job.told(r.CheckSpare)) == before and not job.events("unfit")


def test_a_spare_that_starts_again_or_connects_again_is_asked_anew() -> None:
    job = checked(4, 1)
    job.feed(r.WorkerExited(3, 0, None, 30, -9))
    job.wait(2 * DEADLINE_S)
    assert not job.events("unfit") and len(asked(job, 3)) == 1, "who is not parked is not judged"
    job.feed(r.WorkerReady(3, 0, 31))
    job.wait(0.0)
    assert len(asked(job, 3)) == 2
    job.feed(r.SpareChecked(3, asked(job, 3)[0].number, "of another process"))
    assert not job.core.nodes[3].unfit
    job.join([3])
    job.wait(0.0)
    assert len(asked(job, 3)) == 3


def test_the_next_coordinator_knows_who_has_failed_and_asks_again() -> None:
    job = checked()
    answer(job, 3, "no memory")
    kept = job.core.dump()
    after = SimulatedJob(6, 3, spare_check_s=EVERY_S)
    after.take(after.core.restored(kept, after.now))
    assert after.core.nodes[3].unfit == "no memory"
    for node in range(6):
        after.join([node])
    after.park()
    after.wait(0.0)
    assert asked(after, 3) and asked(after, 4)


def test_a_drain_goes_to_a_spare_that_has_not_failed_and_that_one_rehearses() -> None:
    job = checked(rehearsals=1)
    answer(job, 3, "no memory")
    why, actions = job.core.drain(1, job.now)
    job.take(actions)
    assert not why and [s.node for s in job.sent if isinstance(s.record, r.Rehearse)] == [4]


@pytest.mark.parametrize(
    ("node", "more", "why"), [(1, {}, "no spare"), (3, {"off": True}, "--deadpool-spare-check is 0")]
)
def test_what_cannot_fail_is_refused(node: int, more: dict[str, bool], why: str) -> None:
    job = SimulatedJob(spare_check_s=0.0 if more else EVERY_S).train()
    refused, actions = job.core.inject(r.Fault("fail-check", node), job.now)
    assert why in refused and not actions


def test_an_injected_failure_is_looked_for_at_once() -> None:
    job = checked(4, 1)
    answer(job, 3)
    why, actions = job.core.inject(r.Fault("fail-check", 3), job.now)
    job.take(actions)
    assert not why and job.told(r.Arm, 3)
    job.wait(0.0)
    assert len(asked(job, 3)) == 2


# ---- the worker


def test_a_worker_computes_what_is_known_and_copies_over_its_device(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path / "scratch"))
    assert not scratch.copied
    state = torch.get_rng_state()
    assert self_check.check(scratch.path) == "" and scratch.copied
    assert torch.equal(torch.get_rng_state(), state)
    assert "a product of matrices on cpu is wrong" in self_check.check(scratch.path, add=1)
    scratch.close()
    assert not list(tmp_path.iterdir())


def test_what_an_agent_that_was_killed_has_left_of_a_check_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "deadpool-job-3-check-0"
    scratch = Scratch(str(path))
    assert clean_leftovers(str(tmp_path)) == [] and path.exists(), "it is in use"
    left = os.open(path, os.O_RDWR)  # as when its agent is gone: nobody holds the lock
    scratch._mapped.close()
    os.close(scratch._fd)
    assert clean_leftovers(str(tmp_path)) == [path.name]
    os.close(left)
    Scratch(str(path)).close()
    assert not path.exists()


def test_the_product_is_what_integers_give() -> None:
    product = self_check.product(torch.device("cpu"))
    index = torch.arange(256 * 256, dtype=torch.int64)
    left, right = (index * 7 % 13 - 6).view(256, 256), (index * 5 % 11 - 5).view(256, 256)
    assert torch.equal(product.to(torch.int64), left @ right)


# ---- the links and the memory


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VaultServer]:
    vault = Vault("echo", 0, str(tmp_path), limit_bytes=1 << 20)
    served = VaultServer(vault, SECRET, "127.0.0.1")
    served.start()
    yield served
    served.stop()
    vault.close()


def test_bytes_go_to_another_vault_and_back(server: VaultServer) -> None:
    assert exchange(("127.0.0.1", server.port), SECRET, 0, 1 << 20) > 0
    with pytest.raises(Refused):
        exchange(("127.0.0.1", server.port), bytes(32), 0, 1 << 20)
    assert server.refusals["changed or no frame"] == 0


def test_what_comes_back_changed_is_noticed() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        channel = accept(listener.accept()[0], SECRET, Deadlines())
        echo = channel.receive()
        assert isinstance(echo, Echo)
        payload = bytearray(echo.nbytes)
        channel.fill(memoryview(payload))
        payload[-1] ^= 1
        channel.send(echo, memoryview(payload))

    threading.Thread(target=serve, daemon=True).start()
    with listener, pytest.raises(ChecksumMismatch):
        exchange(("127.0.0.1", listener.getsockname()[1]), SECRET, 0, 1 << 20)


def test_a_link_that_takes_nothing_is_noticed() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(TransferFailed):
        threading.Thread(target=lambda: silent.accept()[0].close(), daemon=True).start()
        exchange(("127.0.0.1", silent.getsockname()[1]), SECRET, 0, 1 << 20, Deadlines(connect=30.0, idle=30.0))


def test_a_vault_says_what_it_lacks(tmp_path: Path) -> None:
    assert Vault("room", 0, str(tmp_path)).lacks(1 << 20) == ""
    assert "bytes for shards" in Vault("room", 0, str(tmp_path)).lacks(1 << 60)
    assert "--deadpool-host-memory allows 100" in Vault("room", 0, str(tmp_path), limit_bytes=100).lacks(101)
