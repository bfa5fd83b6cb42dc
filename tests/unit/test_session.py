"""A worker's line to its agent, over a real socket pair: declarations first, one wait a step, no life without it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest
import torch

from deadpool_megatron.cluster import records as r
from deadpool_megatron.megatron.hooks import Hooks
from deadpool_megatron.recovery import Refused, Session, Superseded, session
from waiting import until

PATIENT_S = 600.0  # of waits that end with what is waited for
SLOTS = [r.SlotAddress(0, 0)]


def declare(epoch: int) -> r.Declare:
    return r.Declare(epoch, "resume", "why", [1], [], SLOTS, {}, [])


@dataclass
class Line:
    """A session and the agent's end of it."""

    agent: socket.socket
    session: Session
    heard: list[int] = field(default_factory=list)
    formed: list[int] = field(default_factory=list)

    def tell(self, record: Any) -> None:
        self.agent.send(r.encode(record))

    def hear(self) -> Any:
        return r.decode_from_worker(self.agent.recv(1 << 17))

    def in_background(self, call: Callable[[], Any]) -> Callable[..., Any]:
        """Run ``call`` in a thread; what is returned waits for its result (an exception is the result too)."""
        result: list[Any] = []

        def work() -> None:
            try:
                result.append(call())
            except (Superseded, Refused) as err:
                result.append(err)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()

        def outcome(patience_s: float | None = None) -> Any:
            thread.join(patience_s)
            assert result, "still waiting"
            return result[0]

        return outcome


@pytest.fixture
def line() -> Line:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.dup(ours.fileno())  # stays open for ever: a session that loses its agent ends the process, here the test run
    heard: list[int] = []
    formed: list[int] = []
    return Line(ours, Session(theirs.detach(), heard.append, formed.append), heard, formed)


def test_what_a_worker_tells_reaches_the_agent_in_order(line: Line) -> None:
    line.session.step("parked", 0)
    line.session.step("formed", 2, 11)
    assert [line.hear(), line.hear()] == [r.WorkerStep("parked", 0), r.WorkerStep("formed", 2, 11)]


def test_an_agent_that_reads_nothing_does_not_stop_training(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_ROOM_S", 0.01)
    news = [r.Iteration(0, 1, 0, number, {}, None, 1.0, 0.0, 0, 0) for number in range(5000)]
    for each in news:
        line.session.tell(each)
    line.agent.setblocking(False)
    heard = []
    with contextlib.suppress(BlockingIOError):
        while True:
            heard.append(line.hear())
    assert heard == news[: len(heard)] and 0 < len(heard) < len(news)
    line.session.tell(news[-1])
    assert line.hear() == news[-1], "it reads again"


def test_who_gives_a_recovery_up_ends_with_what_broke_it_and_does_not_end_the_job(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer was lost in the recovery, and the coordinator was held up: another process can make that good."""
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    broken = RuntimeError("Connection closed by peer")
    trainer = MagicMock(rank=1)
    trainer.let_go.side_effect = broken
    hooks = MagicMock(session=line.session, _patience=0.0)
    hooks.config.build_deadline = PATIENT_S
    line.tell(declare(1))
    with pytest.raises(RuntimeError) as raised:
        Hooks._rejoin(hooks, trainer, None)
    assert raised.value is broken and line.hear().text == "RuntimeError: Connection closed by peer"


def test_a_declaration_closes_the_epoch_and_aborts(line: Line) -> None:
    assert not line.session.closed
    line.tell(declare(1))
    declared = line.session.wait_declared(PATIENT_S)
    assert declared is not None and declared.epoch == 1
    assert line.session.closed
    until(lambda: line.heard == [1], "the abort")
    line.session.joined_epoch = 1
    assert not line.session.closed and line.session.wait_declared(0.05) is None


def test_time_without_a_coordinator_does_not_count_against_a_declaration(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("deadpool_megatron.recovery.session.time", SimpleNamespace(monotonic=lambda: now[0]))
    result: list[bool] = []
    thread = threading.Thread(target=lambda: result.append(line.session.wait_newer(0, 20.0)), daemon=True)
    thread.start()
    waiting = line.session._news._waiters  # type: ignore[attr-defined]
    until(lambda: waiting, "the training thread to wait")
    now[0] = 130.0
    line.tell(r.KeepWaiting())
    line.tell(r.Where(1))  # answered when that has been taken, and the training thread woken
    assert line.hear() == r.Whereabouts(1, False)
    until(lambda: waiting or result, "it to wait again")
    line.tell(declare(1))
    thread.join()
    assert result == [True]


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_abort_that_fails_does_not_make_a_worker_deaf() -> None:
    """It aborts once more when it has left its step, and forms its groups itself where that was not begun."""

    def fails(epoch: int) -> None:
        raise RuntimeError("can't start new thread")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.dup(ours.fileno())  # as in `line`
    line = Line(ours, Session(theirs.detach(), fails, fails))
    line.session.stand_by(3)
    assert line.hear() == r.Arrived(0, 3, None)
    line.tell(declare(1))
    assert line.hear() == r.Arrived(1, 3, None)
    line.tell(r.Form(1))
    line.session.wait_form(1)


def test_a_declaration_is_known_before_its_abort_is_over() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.dup(ours.fileno())  # as in `line`
    aborting, over = threading.Event(), threading.Event()

    def abort(epoch: int) -> None:
        aborting.set()
        over.wait()

    session = Session(theirs.detach(), abort, lambda epoch: None)
    ours.send(r.encode(declare(1)))
    aborting.wait()
    declared = session.wait_declared(0.0)  # what the abort has freed asks at once
    assert session.closed and declared is not None and declared.epoch == 1
    over.set()


def test_a_spare_that_stands_by_has_arrived_in_every_epoch_until_its_training_thread_says_so(line: Line) -> None:
    line.tell(declare(1))
    assert line.session.wait_newer(0, PATIENT_S)
    line.session.stand_by(3)
    assert line.hear() == r.Arrived(1, 3, None)
    line.tell(declare(2))
    assert line.hear() == r.Arrived(2, 3, None)
    line.session.arrive(2, 3, None)
    assert line.hear() == r.Arrived(2, 3, None)
    line.tell(declare(3))
    assert line.session.wait_newer(2, PATIENT_S)
    line.session.arrive(3, 3, 7)
    assert line.hear() == r.Arrived(3, 3, 7)


def test_groups_begin_to_form_before_anybody_waits_for_them_and_only_in_the_newest_epoch(line: Line) -> None:
    line.tell(declare(1))
    line.tell(r.Form(1))
    line.session.wait_form(1)
    assert line.formed == [1]
    line.tell(declare(2))
    line.tell(r.Form(1))
    line.tell(r.Form(2))
    line.session.wait_form(2)
    assert line.formed == [1, 2]


def test_an_older_declaration_changes_nothing(line: Line) -> None:
    line.tell(declare(2))
    assert line.session.wait_newer(1, PATIENT_S)
    line.tell(declare(1))
    line.tell(r.Arm(r.Fault("kill", 0)))
    until(lambda: line.session.armed, "a fault")
    assert line.heard == [2] and line.session.declared_epoch == 2


def test_the_same_declaration_once_more_names_who_has_ended_since_and_aborts_nothing(line: Line) -> None:
    named: list[list[int]] = []
    line.session.on_replaced = named.append
    line.tell(declare(1))
    line.tell(msgspec.structs.replace(declare(1), replaced=[3]))
    until(lambda: named == [[], [3]], "who is replaced")
    assert line.heard == [1] and line.session.declared_epoch == 1


AGREED = r.Generation(1, 5, 0, "/arena", {})
WAITS: dict[str, tuple[Callable[[Session], Any], Any, Any]] = {
    "generation": (lambda s: s.wait_generation(1), AGREED, AGREED),
    "form": (lambda s: s.wait_form(1), r.Form(1), None),
    "all finished": (lambda s: s.wait_all_finished(1), r.AllFinished(1), None),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_ends_with_its_record(line: Line, name: str) -> None:
    call, record, result = WAITS[name]
    line.tell(declare(1))
    assert line.session.wait_newer(0, PATIENT_S)
    outcome = line.in_background(lambda: call(line.session))
    line.tell(record)
    assert outcome() == result


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_ends_when_a_newer_epoch_is_declared(line: Line, name: str) -> None:
    call, _, _ = WAITS[name]
    line.tell(declare(1))
    outcome = line.in_background(lambda: call(line.session))
    line.tell(declare(2))
    superseded = outcome()
    assert isinstance(superseded, Superseded) and superseded.epoch == 2


def test_records_of_an_older_epoch_end_no_wait(line: Line) -> None:
    line.tell(declare(2))
    assert line.session.wait_newer(1, PATIENT_S)
    outcome = line.in_background(lambda: line.session.wait_generation(2))
    formed = line.in_background(lambda: line.session.wait_form(2))
    line.tell(r.Generation(1, 4, 0, "/old", {}))
    line.tell(r.Form(1))
    line.tell(r.Generation(2, 5, 0, "/new", {}))
    assert outcome() == r.Generation(2, 5, 0, "/new", {})
    with pytest.raises(AssertionError, match="still waiting"):
        formed(0.1)
    line.tell(r.Form(2))
    assert formed() is None


def test_waits_with_a_deadline_come_back_without_news(line: Line) -> None:
    assert line.session.wait_declared(0.1) is None and not line.session.wait_newer(0, 0.1)
    with pytest.raises(Refused, match=r"did not give rank 3 its memory within 0.1 s"):
        line.session.request_arena(3, 1, 1, deadline_s=0.1)


def test_a_parked_worker_waits_until_it_is_given_a_coordinate(line: Line) -> None:
    outcome = line.in_background(line.session.wait_take_over)
    line.tell(declare(1))
    line.tell(r.TakeOver(1, 6))
    assert outcome() == r.TakeOver(1, 6)


def test_memory_is_granted_or_refused_with_the_agents_line(line: Line) -> None:
    outcome = line.in_background(lambda: line.session.request_arena(2, 100, 10))
    assert line.hear() == r.ArenaRequest(2, 100, 10)
    line.tell(r.ArenaGranted(2, "/dev/shm/x"))
    assert outcome() == "/dev/shm/x"
    outcome = line.in_background(lambda: line.session.request_arena(2, 100, 10))
    line.hear()
    line.tell(r.ArenaRefused("no room: 100 bytes needed, 5 are there"))
    assert str(outcome()) == "no room: 100 bytes needed, 5 are there"


def test_memory_has_as_long_as_clearing_that_of_the_whole_node_takes(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 workers of 24 GiB: 115 s at 0.3 s a GiB, and a machine may be slower."""
    waited: list[float] = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(line.session._news, "wait_for", lambda found, within_s: waited.append(within_s))
    with pytest.raises(Refused, match="did not give rank 3 its memory"):
        line.session.request_arena(3, 24 << 30, 100)
    assert waited[0] > 5 * 115


def test_faults_add_up(line: Line) -> None:
    faults = (r.Fault("kill", 0, 0, 3), r.Fault("kill-worker", 0, 1, 5))
    for fault in faults:
        line.tell(r.Arm(fault))
    until(lambda: len(line.session.armed) == 2, "two faults")
    assert line.session.armed == faults


@pytest.mark.parametrize("busy", ["waiting for a record", "computing", "printing to who reads nothing"])
def test_a_worker_does_not_outlive_its_agent(busy: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    works = {
        "waiting for a record": "session.wait_form(0)",
        "computing": "while True: sum(range(1000))",
        "printing to who reads nothing": "while True: print('x' * 100, file=sys.stderr)",
    }
    work = works[busy]
    program = f"""
        import sys
        from deadpool_megatron.recovery import Session
        session = Session(int(sys.argv[1]), lambda epoch: None, lambda epoch: None)
        session.step("parked", 0)
        {work}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        theirs.close()
        assert r.decode_from_worker(ours.recv(1 << 17)) == r.WorkerStep("parked", 0)
        assert process.poll() is None
        ours.close()
        if busy.startswith("printing"):
            assert process.wait() == 81
            return
        _, said = process.communicate()
        assert process.returncode == 81 and "the agent of this node is gone" in said
    finally:
        process.kill()
        process.wait()


def test_a_fault_armed_before_anybody_asked_is_told_when_somebody_does(line: Line) -> None:
    fault = r.Fault("kill", 0, point="step.parked")
    line.tell(r.Arm(fault))
    until(lambda: line.session.armed, "a fault")
    heard: list[r.Fault] = []
    line.session.call_on_arm(heard.append)
    assert heard == [fault]
