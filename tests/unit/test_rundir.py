"""The run directory: readers never see half of anything, and the secret is for its owner."""

from __future__ import annotations

import json
import os
import stat
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deadpool_megatron.cluster.agent.watch import Watch
from deadpool_megatron.observe import ERROR, EVENTS, JOB, LOGS, STATUS, RunDirectory, follow_events, read_events, rundir
from deadpool_megatron.observe.rundir import RECOVERIES, NodeLog
from waiting import until


def test_events_are_read_in_order_with_their_time(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.event("started", nodes=4)
    run.event("stopped", code=0)
    events = read_events(tmp_path / "run")
    assert [(e["event"], e.get("nodes"), e.get("code")) for e in events] == [("started", 4, None), ("stopped", None, 0)]
    assert events[0]["t"] <= events[1]["t"]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.event("started")
    with open(tmp_path / EVENTS, "a") as f:
        f.write('{"event": "half')
    assert [e["event"] for e in read_events(tmp_path)] == ["started"]


def test_no_events_yet_are_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "nothing") == []


def test_the_status_is_replaced_in_one_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.status({"iteration": 0, "filler": "x" * 10000})
    done = threading.Event()
    broken: list[str] = []

    def read() -> None:
        while not done.is_set():
            try:
                json.loads((tmp_path / STATUS).read_text())
            except ValueError as err:
                broken.append(str(err))

    reader = threading.Thread(target=read)
    reader.start()
    for iteration in range(300):
        run.status({"iteration": iteration, "filler": "x" * (iteration * 50)})
    done.set()
    reader.join()
    assert not broken and json.loads((tmp_path / STATUS).read_text())["iteration"] == 299


def test_the_jobs_secret_is_for_the_owners_eyes_only(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.job({"secret": "00"})
    assert stat.S_IMODE((tmp_path / JOB).stat().st_mode) == 0o600


def test_a_new_run_takes_nothing_of_an_older_one_for_its_own(tmp_path: Path) -> None:
    old = RunDirectory(tmp_path)
    old.event("stopped")
    old.status({})
    old.job({})
    (tmp_path / LOGS / "rank-0.log").write_text("old")
    (tmp_path / LOGS / "rank-0.epoch-1.log").symlink_to("spare-node4-0.log")
    (tmp_path / "mine.txt").write_text("not ours")
    RunDirectory(tmp_path)
    assert read_events(tmp_path) == [] and not list((tmp_path / LOGS).iterdir())
    assert not (tmp_path / STATUS).exists() and not (tmp_path / JOB).exists()
    assert (tmp_path / "mine.txt").read_text() == "not ours"


def test_what_an_attempt_has_left_stays_for_who_looks_for_its_error_and_its_secret_does_not(tmp_path: Path) -> None:
    for attempt in range(3):
        run = RunDirectory(tmp_path)
        run.event("stopped", code=attempt)
        run.status({})
        run.job({"secret": "00"})
        run.close()
        (tmp_path / LOGS / "rank-0.log").write_text(f"attempt {attempt}")
    for attempt in range(2):
        old = tmp_path / "attempts" / str(attempt + 1)
        assert (old / LOGS / "rank-0.log").read_text() == f"attempt {attempt}"
        assert [e["code"] for e in read_events(old)] == [attempt] and not (old / JOB).exists()
    assert (tmp_path / LOGS / "rank-0.log").read_text() == "attempt 2" and not (tmp_path / "attempts" / "3").exists()


def test_events_are_followed_to_the_last_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    alive = [True, True, True]

    def still() -> bool:
        run.event("iteration", iteration=len(alive))
        return bool(alive and alive.pop())

    assert [e["iteration"] for e in follow_events(tmp_path, still, 0.001)] == [3, 2, 1, 0]


def test_a_run_of_thousands_of_recoveries_does_not_grow_with_its_nodes(tmp_path: Path) -> None:
    """What the coordinator keeps of one is some kilobytes, and not what each node has told."""
    run = RunDirectory(tmp_path)
    nodes = 1000

    def recovery(epoch: int) -> None:
        run.note("detected", node=1, ranks=[1], cause="gone")
        run.note("declared", epoch=epoch, lost=[1], nodes=[0, 2], replaced=[1], reason="gone")
        for node in range(nodes):
            run.note("step", epoch=epoch, node=node, step="aborted")
        run.note("agreed", epoch=epoch, iteration=epoch)
        run.note("resumed", epoch=epoch)
        run.note("iteration", epoch=epoch, iteration=epoch, seconds=1.0)

    recovery(1)
    tracemalloc.start()
    try:
        for epoch in range(2, 12):
            recovery(epoch)
        run.flush()
        grown = tracemalloc.get_traced_memory()[0] / 10
    finally:
        tracemalloc.stop()
    run.close()
    assert grown < 20 * nodes
    assert (tmp_path / RECOVERIES).read_text().count("Recovery ") == 11


def test_a_coordinator_that_starts_again_on_a_full_disk_goes_on(
    tmp_path: Path, room: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    run.job({"pid": 1})
    run.close()
    room(5)
    again = RunDirectory(tmp_path, fresh=False)
    with pytest.raises(OSError, match="File too large"):
        again.job({"pid": 2})
    again.job({"pid": 2}, again=True)
    again.event("back")
    again.status({"phase": "running"})
    assert json.loads((tmp_path / JOB).read_text()) == {"pid": 1}
    assert capsys.readouterr().err.count("cannot be written") == 3
    room(1 << 30)
    again.status({"phase": "running"})
    again.flush()
    assert json.loads((tmp_path / JOB).read_text()) == {"pid": 2}
    assert [each["event"] for each in read_events(tmp_path)] == ["back"]


def test_a_full_disk_costs_nothing_but_events_that_are_too_many_to_wait(
    tmp_path: Path, room: Callable[[int], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "_MOST_WAITING", 4000)
    run = RunDirectory(tmp_path)
    run.event("first")
    run.status({"phase": "before"})
    room((tmp_path / EVENTS).stat().st_size + 10)  # in the middle of a line
    for number in range(100):
        run.event("more", number=number, text="x" * 50)
        run.status({"phase": "full", "text": "x" * 100})
    assert [e["event"] for e in read_events(tmp_path)] == ["first"]
    assert json.loads((tmp_path / STATUS).read_text()) == {"phase": "before"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("cannot be written" in line and "training goes on" in line for line in said)
    room(1 << 30)
    run.event("last")
    run.status({"phase": "after"})
    events = read_events(tmp_path)
    waited = [e["number"] for e in events if e["event"] == "more"]
    assert waited == list(range(len(waited))) and 20 < len(waited) < 60
    assert events[-1]["event"] == "unwritten" and events[-1]["lines"] == 100 - len(waited) + 1
    assert json.loads((tmp_path / STATUS).read_text()) == {"phase": "after"}
    assert capsys.readouterr().err.count("is written again") == 2
    run.close()


def test_a_file_system_that_hangs_holds_nobody_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_MOST_WAITING", 4000), ("_PATIENCE_S", 0.01), ("_SAY_AFTER_S", 0.0), ("_LAST_S", 60.0)):
        monkeypatch.setattr(rundir, name, value)
    run = RunDirectory(tmp_path, aside=True)
    run.event("first")
    until(lambda: read_events(tmp_path))
    hangs = tmp_path / f".{STATUS}.{run._own}"
    os.mkfifo(hangs)  # who opens it stands still until somebody reads
    run.status({"number": -1})
    until(lambda: not run._newest, "its thread to take the status")
    for number in range(100):
        run.status({"number": number})
        run.event("more", number=number, text="x" * 50)
    run.error(1, "why")
    assert [e["event"] for e in read_events(tmp_path)] == ["first"] and not (tmp_path / ERROR).exists()
    assert capsys.readouterr().err.count("does not answer; training goes on") == 1
    assert json.loads(hangs.read_bytes()) == {"number": -1}
    run.close()
    _, *more, last = read_events(tmp_path)
    waited = [e["number"] for e in more]
    assert waited == list(range(len(waited))) and 20 < len(waited) < 60
    assert last["event"] == "unwritten" and last["lines"] == 100 - len(waited)
    assert json.loads((tmp_path / STATUS).read_text()) == {"number": 99} and (tmp_path / ERROR).exists()


def test_a_node_s_log_on_a_full_disk_is_closed_without_a_word(tmp_path: Path, room: Callable[[int], None]) -> None:
    log = NodeLog(tmp_path, 1)
    room(10)
    log.write("step", text="x" * 50)
    log.write("step", text="x" * 50)
    log.close()
    assert (tmp_path / "node-1.jsonl").stat().st_size == 10


def test_a_node_s_log_that_hangs_does_not_hold_up_its_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_MOST_LINES", 10)
    monkeypatch.setattr(rundir, "_LAST_S", 60.0)
    log = tmp_path / "node-1.jsonl"
    os.mkfifo(log)  # who opens it stands still until somebody reads
    watch = Watch(1, "job", str(tmp_path), None)
    watch.committed(0, 1, 0)
    until(lambda: watch._log._aside is not None and watch._log._aside.held_up_s)
    for generation in range(1, 100):
        watch.committed(0, 1, generation)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(log.read_bytes)
        watch.close()
        generations = [json.loads(line)["generation"] for line in read.result().splitlines()]
    assert generations == list(range(11)), "the one that hangs and the ten that wait"


def test_a_node_s_log_is_written_again_once_that_is_possible(tmp_path: Path) -> None:
    """It cannot be made where the directory is gone or the disk read-only: no reason for a node not to join."""
    log = NodeLog(tmp_path / "gone", 1, limit=100)
    log.write("lost")
    (tmp_path / "gone").mkdir()
    log.write("step", text="x" * 100)
    old = tmp_path / "gone" / "node-1.jsonl.old"
    assert old.exists()
    old.unlink()
    old.mkdir()  # so that it cannot be put away
    for number in range(3):
        log.write("again", number=number, text="x" * 100)
    log.close()
    assert [json.loads(line)["number"] for line in log.path.read_text().splitlines()] == [0, 1, 2]


def test_a_line_that_a_dead_writer_left_unfinished_spoils_no_other(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.event("first")
    run.close()
    with open(tmp_path / EVENTS, "a") as f:
        f.write('{"t": 1, "event": "cu')
    run = RunDirectory(tmp_path, fresh=False)
    run.event("second")
    assert [e["event"] for e in read_events(tmp_path)] == ["first", "second"]
    run.close()


def test_of_a_long_run_not_every_iteration_is_written_but_those_around_everything_else_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "_WHOLE", 40)
    run = RunDirectory(tmp_path)
    for iteration in range(3000):
        if iteration == 2500:
            run.note("detected", epoch=0, node=1, cause="gone", ranks=[1])
        run.note("iteration", t=float(iteration), epoch=0, iteration=iteration, seconds=1.0)
        run.note("committed", t=iteration + 0.5, epoch=0, iteration=iteration)
    run.event("finished", epoch=0, iteration=2999)
    told = read_events(tmp_path)
    iterations = [e["iteration"] for e in told if e["event"] == "iteration"]
    assert iterations[:20] == list(range(20)) and {2499, 2500, 2501, 2999} <= {*iterations}
    assert len(told) < 40 * 10 and iterations == sorted(iterations)
    at = [e["event"] for e in told].index("detected")
    assert [(e["event"], e["iteration"]) for e in told[at - 2 : at]] == [("iteration", 2499), ("committed", 2499)]
    run.close()
