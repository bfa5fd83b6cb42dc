"""What goes wrong beside the job does not end it: in the coordinator, an agent, the launcher, the store."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.coordinator.coordinator import Coordinator, CoordinatorSettings
from deadpool_megatron.cluster.coordinator.enlistment import Enlistment
from deadpool_megatron.cluster.coordinator.saved_state import Memory, read_state
from deadpool_megatron.cluster.core.job import JobSpec
from deadpool_megatron.cluster.link.awake import AwakeClock
from deadpool_megatron.cluster.notices import INTERRUPT, PREEMPT
from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.cluster.store import EMBEDDED, Guard, Store, StoreError, open_store
from deadpool_megatron.cluster.store.gateway import Gateway, StoreAddress
from deadpool_megatron.cluster.store.leadership import Leadership
from deadpool_megatron.launcher import node, processes
from deadpool_megatron.launcher.processes import CoordinatorProcess
from deadpool_megatron.launcher.serving import Serving
from deadpool_megatron.launcher.tee import Tee
from simulated import DEADLINES, SimulatedJob
from waiting import until

# ---- the coordinator


def _coordinator(hub: Any, state_hash: str = "") -> Coordinator:
    job = JobSpec(2, 0, 1, True, DEADLINES)
    settings = CoordinatorSettings("h", "h", 1, bytes(32), "run", job_id="job", state_hash=state_hash)
    coordinator = Coordinator(job, settings, MagicMock(), MagicMock(), Guard("leader", 1), hub=hub, run=MagicMock())
    coordinator._packet(b"node-0@job", r.encode(r.Join(0, 7, "h", 1, [8])))
    coordinator.interrupt()
    coordinator.turn(0.0)
    assert coordinator.finished
    return coordinator


def test_a_job_ends_as_it_has_although_its_hashes_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = _coordinator(MagicMock(port=1), str(tmp_path / "none" / "hash.json"))
    coordinator._core.seen.state_hashes[0] = {"all": "digest"}
    assert coordinator.end()[0] == Exit.INTERRUPTED
    assert "hash.json: No such file or directory" in capsys.readouterr().err


def test_whoever_leads_next_goes_on_with_a_job_that_has_not_begun(tmp_path: Path) -> None:
    """Its coordinator listens, and agents come to it: no other one would know of the job."""
    store = open_store(EMBEDDED, str(tmp_path), "job")
    guard = Leadership(store, 2.0).take()
    assert guard is not None
    job, told, hub = JobSpec(2, 0, 1, True, DEADLINES), list[Any](), MagicMock(port=1)
    for resume in (False, True):
        settings = CoordinatorSettings("h", "h", 1, bytes(32), "run", job_id="job", resume=resume)
        coordinator = Coordinator(job, settings, MagicMock(), store, guard, hub=hub, run=MagicMock())
        coordinator.begin(lambda port: told.append(read_state(store)))
        coordinator._packet(b"node-0@job", r.encode(r.Join(0, 7, "h", 1, [8])))
    assert all(state["now"]["phase"] == "starting" for state in told) and not hub.send.called
    coordinator._packet(b"node-1@job", r.encode(r.Join(1, 7, "h", 1, [8])))
    assert [call.args[0] for call in hub.send.call_args_list] == [b"node-0@job", b"node-1@job"]
    store.close()


def _older_state(store: Store, guard: Guard, *, without: tuple[str, str]) -> None:
    """A job is under way, of a DeadPool that knew nothing of this part of the state."""
    part, name = without
    state = SimulatedJob(2, 0, 1).train().core.dump()
    del state[part][name]
    Memory(store, guard).begin(state)


@pytest.mark.parametrize("without", [("now", "start_epoch"), ("members", "world_size"), ("layout", "widths")])
def test_a_state_of_another_version_ends_the_job_in_one_line_that_says_what_to_do(
    without: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(EMBEDDED, str(tmp_path), "job")
    guard = Leadership(store, 2.0).take()
    assert guard is not None
    _older_state(store, guard, without=without)
    settings = CoordinatorSettings("h", "h", 1, bytes(32), "run", job_id="job", resume=True)
    hub = MagicMock(port=1)

    def coordinate(start: Any) -> int:
        node._world_size(start)
        coordinator = Coordinator(
            JobSpec(2, 0, 1, True, DEADLINES), settings, MagicMock(), store, guard, hub, MagicMock()
        )
        coordinator.begin(lambda port: None)
        return 0

    start = SimpleNamespace(store=(EMBEDDED, "job"), run_dir=str(tmp_path), guard=guard, resume=True)
    monkeypatch.setattr(node, "_coordinator", coordinate)
    monkeypatch.setattr(node.msgspec.json, "decode", lambda settings, type: start)
    monkeypatch.setattr(sys, "argv", ["node", "coordinator"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    monkeypatch.setattr(node, "never_fails", lambda stands_still: None)
    assert node.main() == Exit.RECOVERY_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert f"of another version of DeadPool, and cannot be read (KeyError: '{without[1]}')" in line
    assert "--deadpool-resume auto" in line and not hub.send.called
    store.close()


def test_a_coordinator_that_goes_on_looks_for_durable_generations_of_the_width_that_the_job_has(tmp_path: Path) -> None:
    store = open_store(EMBEDDED, str(tmp_path), "job")
    guard = Leadership(store, 2.0).take()
    assert guard is not None
    state = SimulatedJob(2, 0, 1).train().core.dump()
    state["members"]["world_size"] = 1
    Memory(store, guard).begin(state)
    at_first: Any = SimpleNamespace(
        store=(EMBEDDED, "job"), run_dir=str(tmp_path), guard=guard, job=JobSpec(2, 0, 1, True, DEADLINES)
    )
    for resume, width in ((True, 1), (False, 2)):
        at_first.resume = resume
        assert node._world_size(at_first) == width
    store.close()


def test_a_coordinator_whose_run_directory_hangs_goes_on(tmp_path: Path) -> None:
    settings = CoordinatorSettings("h", "h", 1, bytes(32), str(tmp_path), job_id="job")
    hub = MagicMock(port=1, refused=0)
    coordinator = Coordinator(
        JobSpec(2, 0, 1, True, DEADLINES), settings, MagicMock(), MagicMock(), Guard("leader", 1), hub=hub
    )
    hangs = tmp_path / f".status.json.{coordinator._run._own}"
    os.mkfifo(hangs)  # who opens it stands still until somebody reads
    coordinator.begin(lambda port: None)
    coordinator._packet(b"node-0@job", r.encode(r.Join(0, 7, "h", 1, [8])))
    coordinator.interrupt()
    coordinator.turn(0.0)
    assert coordinator.finished and hub.send.called, "it has told everybody"
    assert json.loads(hangs.read_bytes())["phase"] == "starting"
    coordinator.end()
    assert json.loads((tmp_path / "status.json").read_text())["phase"] == "ended"


def test_a_directory_that_hangs_for_a_moment_does_not_make_the_status_a_rare_one() -> None:
    now, worked, written = [100.0], [0.0], []
    run, hub = MagicMock(), MagicMock(port=1, refused=0)

    def write(status: dict[str, Any]) -> None:
        written.append((now[0], status["again_s"]))
        now[0] += 0.3  # it hangs
        worked[0] += 0.0001

    run.status.side_effect = write
    settings = CoordinatorSettings("h", "h", 1, bytes(32), "run", job_id="job")
    coordinator = Coordinator(
        JobSpec(2, 0, 1, True, DEADLINES),
        settings,
        *(MagicMock(), MagicMock(), Guard("leader", 1), hub, run, lambda: now[0]),
        worked=lambda: worked[0],
    )
    for _ in range(60):
        coordinator.turn(0.0)
        now[0] += 0.5
    assert len(written) >= 5 and {again_s for _, again_s in written} == {5.2}, written


def test_the_user_can_end_a_job_whose_store_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    store = MagicMock()
    store.put.side_effect = StoreError("no space left on device")
    memory = Memory(store, Guard("leader", 1))
    memory.insists = False
    with pytest.raises(StoreError, match="no space"):
        memory.write({"now": {}})


def test_an_agent_that_comes_back_while_the_coordinator_takes_leave_hears_of_the_end() -> None:
    """Its connection was lost with the first word of it; nobody is there to tell it later."""
    hub = MagicMock(port=1)
    coordinator = _coordinator(hub)
    hub.farewell = lambda to, within_s, on_packet: on_packet(b"node-0@job", r.encode(r.Join(0, 7, "h", 1, [8])))
    hub.send.reset_mock()
    code, message = coordinator.end()
    hub.send.assert_called_once_with(b"node-0@job", r.encode(r.Stop(code, message)))


@pytest.mark.parametrize(
    ("listens", "finished", "again"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_an_error_of_the_coordinator_s_own_has_it_started_again(
    listens: bool, finished: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = MagicMock()
    monkeypatch.setattr(os, "kill", kill)

    def run(announce: Callable[[int], None]) -> None:
        if listens:
            announce(1)
        raise OSError("too many open files")

    with pytest.raises(OSError, match="too many"):
        node._serve(SimpleNamespace(run=run, finished=finished, interrupted=False), 2)  # type: ignore[arg-type]
    assert kill.called == again


def test_a_machine_that_comes_back_beside_its_coordinator_gets_a_place_once_its_lost_agent_is_given_up() -> None:
    """Told that its rank is taken, it would end, and the coordinator with it: the job that it has just come back to."""
    job = SimulatedJob(nodes=3, spares=1, slots=1).train()
    now, hub, spec = [0.0], MagicMock(port=1), job.core.job
    settings = CoordinatorSettings("h", "h", 1, bytes(32), "run", job_id="job", resume=True)
    office = Enlistment(spec, [], "job", 1)
    guard, store = Guard("leader", 1), MagicMock()
    coordinator = Coordinator(spec, settings, office, store, guard, hub, MagicMock(), lambda: now[0])
    coordinator._memory.read = lambda: json.loads(json.dumps(job.core.dump()))  # type: ignore[method-assign]
    coordinator.begin(lambda port: None)
    for n in (1, 2):
        pids = [10 * n]
        coordinator._packet(b"node-%d@job" % n, r.encode(r.Join(n, 1000 + n, "h", 2000 + n, pids)))
    asked = r.encode(r.Enlist("a", "h", 0, 3, 1, 1, []))
    answers: list[Any] = []
    while not answers and now[0] < 60.0:
        now[0] += 0.5
        coordinator._packet(b"enlist-a", asked)
        coordinator.turn(0.0)
        answers = [to for to in hub.send.call_args_list if to.args[0] == b"enlist-a"]
        if coordinator._core.nodes[0].gone and coordinator._core.recovery is not None:
            break  # the swap begins; it asks on, and is a spare as soon as that is over
    assert coordinator._core.nodes[0].gone and not answers


# ---- the agent


@pytest.mark.parametrize("serves", [False, True])
def test_an_agent_that_fails_while_the_job_runs_is_a_node_that_is_lost_and_not_one_that_could_not_start(
    serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the code of one that could not start, its command ends the coordinator that it hosts, and so the job."""
    agent = MagicMock(serves=serves)
    agent.run.side_effect = OSError("too many open files")
    monkeypatch.setattr(node, "AgentProcess", lambda settings: agent)
    if serves:
        assert node._agent(MagicMock()) == Exit.FAILED
    else:
        with pytest.raises(OSError, match="too many"):
            node._agent(MagicMock())


# ---- who starts the coordinator


class _Process:
    """A coordinator that listens; `die` ends it."""

    def __init__(self, code: int | None = None) -> None:
        self.stdout = io.BytesIO(b"1 2\n" if code is None else b"")
        self.signals: list[int] = []
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def wait(self) -> int:
        assert self.code is not None
        return self.code

    def send_signal(self, signum: int) -> None:
        self.signals.append(signum)


def _hosted(
    fails: int, monkeypatch: pytest.MonkeyPatch, killed: bool = False
) -> tuple[CoordinatorProcess, list[_Process]]:
    """A coordinator that was killed; it cannot be started again at once, but after so many tries."""
    started: list[_Process] = []
    left, now = [0], [0.0]

    def start(*of: Any, **more: Any) -> _Process:
        if left[0]:
            left[0] -= 1
            if killed:
                return _Process(-signal.SIGKILL)
            if left[0] % 2:
                return _Process(1)  # its interpreter does not come up
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(_Process())
        return started[-1]

    monkeypatch.setattr(processes, "replace", lambda settings, **changes: settings)
    monkeypatch.setattr(processes, "StoreWatch", lambda *of: SimpleNamespace(end=lambda: None, why=""))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    leadership = SimpleNamespace(guard=Guard("leader", 1))
    hosted = CoordinatorProcess(SimpleNamespace(start=start), MagicMock(), leadership)  # type: ignore[arg-type]
    started[0].code = -signal.SIGKILL
    left[0] = fails
    return hosted, started


def test_a_coordinator_that_cannot_be_started_again_at_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted, started = _hosted(4, monkeypatch)
    assert hosted.revive() is None and len(started) == 2
    hosted, started = _hosted(100, monkeypatch)
    code, message = hosted.revive() or (0, "")
    assert code == Exit.RECOVERY_FAILED and "cannot be started again" in message and len(started) == 1


def test_one_that_can_never_go_on_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted, _ = _hosted(0, monkeypatch)
    tries = [_Process(Exit.FAILED), _Process(Exit.RECOVERY_FAILED), _Process()]
    monkeypatch.setattr(hosted._processes, "start", lambda *of, **more: tries.pop(0))
    assert (hosted.revive() or (0,))[0] == Exit.RECOVERY_FAILED and len(tries) == 1


def test_one_that_is_killed_before_it_listens_counts_as_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted, started = _hosted(4, monkeypatch, killed=True)
    assert hosted.revive() is None and len(started) == 2
    hosted, started = _hosted(5, monkeypatch, killed=True)
    code, message = hosted.revive() or (0, "")
    assert code == Exit.RECOVERY_FAILED and "by signal 9 again and again" in message and len(started) == 1


def test_a_notice_ends_no_process_that_does_not_listen_to_it_yet_and_the_word_to_end_an_agent_at_once() -> None:
    for role, survives in ("coordinator", (PREEMPT, INTERRUPT)), ("agent", (PREEMPT,)):
        for signum in (PREEMPT, INTERRUPT):
            code = f"import os; os.kill(os.getpid(), {int(signum)})"
            begin = partial(processes._begin, 0, processes.HELD_BACK[role])
            done = subprocess.run([sys.executable, "-c", code], preexec_fn=begin)
            assert done.returncode == (0 if signum in survives else -signum)


def test_a_notice_that_comes_while_the_coordinator_starts_again_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted, started = _hosted(0, monkeypatch)
    hosted.preempt()
    assert hosted.revive() is None and started[1].signals == [PREEMPT]


def _serving(gone_s: float = 60.0) -> tuple[Serving, Any, Any]:
    agent, lifeline = MagicMock(), SimpleNamespace(gone_since=None)
    return Serving(MagicMock(gone_s=gone_s), MagicMock(), None, agent, lifeline), agent, lifeline  # type: ignore[arg-type]


def test_an_end_that_the_job_had_is_told_where_its_coordinator_was_too() -> None:
    """That machine's agent hears of it, and ends with the same code as one that could not start."""
    for end, told in (
        ((Exit.USAGE, "a flag that is not known"), (Exit.USAGE, "a flag that is not known")),
        ((Exit.INTERRUPTED, "interrupted"), (Exit.USAGE, "could not start")),
    ):
        hosted = MagicMock(revive=lambda end=end: end)
        serving = Serving(MagicMock(), MagicMock(caught=[]), hosted)
        serving._why = "could not start"
        serving._until_end = lambda main: None  # type: ignore[method-assign]
        assert serving.run() == told


def test_who_has_won_the_election_and_cannot_read_the_store_gives_the_seat_back() -> None:
    """Its node is healthy, and trains on."""

    def start() -> None:
        raise StoreError("etcd does not answer")

    serving, agent, _ = _serving()
    seat = MagicMock()
    serving.may_lead(seat, ("h", 1), bytes(32), start)
    serving._won = True
    assert serving._seat_changes()
    serving._change_seats()
    seat.leadership.resign.assert_called_once()
    assert not serving.hosts and not serving._seat_changes() and not agent.send_signal.called


def test_a_coordinator_is_not_given_up_for_a_time_in_which_this_machine_stood_still() -> None:
    serving, agent, lifeline = _serving()
    now = [0.0]
    serving._clock = AwakeClock(5.0, lambda: now[0])
    lifeline.gone_since = serving._clock.now()
    now[0] += 1000.0
    serving._give_up(agent)
    assert not agent.send_signal.called
    for _ in range(61):
        now[0] += 1.0
        serving._give_up(agent)
    agent.send_signal.assert_called_once_with(INTERRUPT)  # its first SIGTERM may be a notice only, to it


# ---- what only shows


def test_the_logs_are_shown_although_one_cannot_be_read_and_a_line_that_never_ends_is_shown_in_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank-0.log").mkdir()
    (tmp_path / "rank-1.log").write_bytes(b"." * 1_200_000)
    tee = Tee(tmp_path, lambda name: True)
    until(lambda: tee._positions.get("rank-1.log") or not tee.is_alive(), "the line")
    with (tmp_path / "rank-1.log").open("ab") as log:
        log.write(b"\nthe end\n")
    tee.stop()
    assert capsys.readouterr().out.endswith("[rank-1] the end\n")


# ---- the store


def test_what_is_no_answer_of_etcd_s_has_the_next_member_asked() -> None:
    gateway = Gateway(StoreAddress.parse("etcd://a:1,b:1"), 5.0)
    answers = {"http://a:1": b"<html>not now</html>", "http://b:1": b'{"kvs": []}'}
    gateway._post = lambda endpoint, *of, **more: SimpleNamespace(status=200, data=answers[endpoint])  # type: ignore[method-assign]
    assert gateway.call("/v3/kv/range", {}) == {"kvs": []}
