"""What `deadpool inject`, `drain` and `join` say when the coordinator ends while it is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deadpool_megatron.cli import main
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.link.link import Hub
from deadpool_megatron.cluster.records.exits import Exit

SECRET = bytes(range(32))


def _listens(run_dir: Path) -> Hub:
    hub = Hub("127.0.0.1", 0, SECRET, 5.0)
    job = {"coordinator": f"127.0.0.1:{hub.port}", "secret": SECRET.hex(), "lease": 5.0, "agent": {}}
    (run_dir / "job.json").write_text(json.dumps(job))
    return hub


def _ends_when_asked(run_dir: Path) -> threading.Thread:
    """A coordinator that hears one request and ends."""
    hub = _listens(run_dir)

    def serve() -> None:
        heard: list[bytes] = []
        while not heard:
            hub.wait(0.2, lambda who, what: heard.append(what), lambda who: None)
        hub.close()

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def _answers(hub: Hub, replies: Sequence[object], asked: Callable[[bytes, bytes], None]) -> threading.Thread:
    """A coordinator that is ``asked`` until that has taken all ``replies``, and ends."""

    def serve() -> None:
        while replies:
            hub.wait(0.2, asked, lambda who: None)
        hub.wait(1.0, asked, lambda who: None)  # until the answer is out
        hub.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_a_command_says_that_the_coordinator_has_ended_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thread = _ends_when_asked(tmp_path)
    assert main(["inject", "--run-dir", str(tmp_path), "--fault", "abort"]) == Exit.USAGE
    thread.join()
    (said,) = capsys.readouterr().err.splitlines()
    assert "ended while it was asked" in said and "deadpool status" in said


def test_that_it_ends_is_what_kill_coordinator_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thread = _ends_when_asked(tmp_path)
    assert main(["inject", "--run-dir", str(tmp_path), "--fault", "kill-coordinator"]) == Exit.OK
    thread.join()
    assert "kill-coordinator, now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "events", "code", "said"),
    [
        ("node 1 has left already", [], Exit.OK, "may be taken away"),
        ("node 1 is lost already", [], Exit.USAGE, "node 1 is lost already"),
        ("node 1 is being drained already", [{"event": "left", "node": 1}], Exit.OK, "may be taken away"),
        ("", [{"event": "stays", "node": 1, "cause": "why"}], Exit.USAGE, "is not drained, training goes on: why"),
    ],
)
def test_who_waits_for_a_drain_asks_the_coordinator_that_has_started_again(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    events: list[dict[str, object]],
    code: int,
    said: str,
) -> None:
    """What the one before did last, no line may tell. That a worker has ended there is not the node's loss."""
    hub, log = _listens(tmp_path), tmp_path / "events.jsonl"
    log.touch()
    replies = [("", [{"event": "detected", "node": 1, "local": 0}, {"event": "coordinator_back"}]), (answer, events)]

    def asked(who: bytes, what: bytes) -> None:
        assert r.decode_from_agent(what) == r.Drain(1)
        error, lines = replies.pop(0)
        with log.open("a") as f:
            f.write("".join(json.dumps({"t": 0.0, "epoch": 0, **line}) + "\n" for line in lines))
        hub.send(who, r.encode(r.InjectReply(error)))

    thread = _answers(hub, replies, asked)
    assert main(["drain", "--run-dir", str(tmp_path), "--node", "1", "--timeout", "30"]) == code
    thread.join()
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_who_joins_waits_for_a_job_that_is_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = _listens(tmp_path)
    starting, ended = "not now, the job is starting; try again in a moment", "not now, the job is finishing"
    replies = [r.SpareAdded(starting, -1, later=True), r.SpareAdded(starting, -1, later=True), r.SpareAdded(ended, -1)]

    def asked(who: bytes, what: bytes) -> None:
        assert r.decode_from_agent(what) == r.AddSpare("")
        hub.send(who, r.encode(replies.pop(0)))

    thread = _answers(hub, replies, asked)
    assert main(["join", "--run-dir", str(tmp_path)]) == Exit.USAGE
    thread.join()
    assert capsys.readouterr().err.splitlines() == [f"deadpool: waiting: {starting}", f"deadpool: {ended}"]
