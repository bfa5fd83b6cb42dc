"""What `deadpool inject`, `drain` and `join` say when the coordinator ends while it is asked."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from deadpool_megatron.cli import main
from deadpool_megatron.cluster.link.link import Hub
from deadpool_megatron.cluster.records.exits import Exit

SECRET = bytes(range(32))


def _ends_when_asked(run_dir: Path) -> threading.Thread:
    """A coordinator that hears one request and ends."""
    hub = Hub("127.0.0.1", 0, SECRET, 5.0)
    job = {"coordinator": f"127.0.0.1:{hub.port}", "secret": SECRET.hex(), "lease": 5.0, "agent": {}}
    (run_dir / "job.json").write_text(json.dumps(job))

    def serve() -> None:
        heard: list[bytes] = []
        while not heard:
            hub.wait(0.2, lambda who, what: heard.append(what), lambda who: None)
        hub.close()

    thread = threading.Thread(target=serve)
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
