"""The promise: what only observes a worker never keeps it from starting, taking over or being ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent import worker_processes
from deadpool_megatron.cluster.agent.known import KnownJob
from deadpool_megatron.cluster.agent.settings import AgentSettings
from deadpool_megatron.cluster.agent.worker_processes import WorkerProcesses
from deadpool_megatron.cluster.agent.workers import STACKS_FILE, STACKS_SIGNAL
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.config import DeadpoolConfig


def processes(log_dir: Path, code: str) -> WorkerProcesses:
    command = [sys.executable, "-c", code]
    settings = AgentSettings(
        DeadpoolConfig(), "j", 0, 1, 1, "127.0.0.1", "127.0.0.1:1", bytes(32), str(log_dir), command, dict(os.environ)
    )
    return WorkerProcesses(settings, KnownJob(0, 1, 1, Scheme.parse("1")), zmq.Poller(), lambda: False)


def test_a_run_directory_that_cannot_be_written_ends_no_worker_and_no_agent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    ours = processes(tmp_path / "file" / "logs", "import time; print('here', flush=True); time.sleep(600)")
    worker = ours.start(0, None)
    ours.link_log(worker, 3)
    ours.keep_stacks(worker)
    assert worker.process.wait() == -STACKS_SIGNAL  # it has been told to show them, and has no handler here
    assert ours.reap(worker) == -STACKS_SIGNAL
    worker.close()
    assert "what that worker prints is lost" in capsys.readouterr().err


def test_files_that_hang_hold_up_neither_the_end_of_a_stuck_worker_nor_the_news_of_it(tmp_path: Path) -> None:
    """The file system that its log is on is what a worker may be stuck in."""
    ours = processes(tmp_path, "import time; time.sleep(600)")
    worker = ours.start(0, None)
    Path(worker.log).unlink()
    for path in (worker.log, ours.stacks_file(0)):
        os.mkfifo(path)  # who opens it stands still until somebody is at the other end
    ours.keep_stacks(worker)
    assert ours.reap(worker) == -STACKS_SIGNAL
    assert ours.last_words(worker) == []
    worker.close()
    assert b"Python stacks" in ours.stacks_file(0).read_bytes()


def test_a_log_that_cannot_be_linked_ends_no_take_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_processes, "_PATIENCE_S", 600.0)
    ours = processes(tmp_path, "print('here')")
    worker = ours.start(0, None)
    (tmp_path / "rank-3.epoch-0.log").mkdir()  # so that it cannot be replaced
    ours.link_log(worker, 3)
    assert ours.reap(worker) == 0
    ours.link_log(worker, 4)
    assert (tmp_path / "rank-4.epoch-0.log").read_text() == "here\n"
    worker.close()


def test_a_worker_without_a_file_for_its_stacks_runs_and_shows_them_in_its_log(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = (
        "import os, signal\n"
        "from deadpool_megatron.output import never_fails\n"
        "from deadpool_megatron.worker import _show_stacks_when_asked\n"
        "never_fails()\n"
        "_show_stacks_when_asked()\n"
        f"os.kill(os.getpid(), {int(STACKS_SIGNAL)})\n"
    )
    env = os.environ | {STACKS_FILE: str(tmp_path / "file" / "stacks")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "most recent call first" in done.stderr


@pytest.mark.timeout(30)
def test_a_worker_that_stands_still_does_not_hold_up_its_agent(tmp_path: Path) -> None:
    """One that is stopped while there is no coordinator that could judge it is told to wait every few seconds."""
    ours = processes(tmp_path, "import time; time.sleep(600)")
    worker = ours.start(0, None)
    for _ in range(5000):
        worker.send(r.KeepWaiting())
    ours.kill(worker)
    ours.reap(worker)
    worker.close()
