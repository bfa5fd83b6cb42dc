"""A worker out of the fork server is what its agent would have started itself: environment, output, end, exit code."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from deadpool_bench.harness import forking
from deadpool_bench.harness.forking import FORK_SERVER
from deadpool_megatron.cluster.agent import workers
from deadpool_megatron.cluster.agent.pulse import shared_page
from deadpool_megatron.cluster.agent.workers import (
    PARENT_PID,
    STACKS_FILE,
    Worker,
    start_worker,
)
from deadpool_megatron.jobs.descendants import Descendants
from jobs import environment

# Says what it found, then does as its argument says.
SCRIPT = """\
import json, os, signal, sys, __main__
found = {"argv": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ), "session": os.getsid(0)}
print(json.dumps(found), flush=True)
exec(sys.argv[1])
"""


def start(directory: Path, ending: str, environment: Mapping[str, str]) -> Worker:
    """A worker that runs `SCRIPT`; the caller is its agent."""
    script = directory / "script.py"
    script.write_text(SCRIPT)
    env = {**environment, STACKS_FILE: str(directory / "stacks")}
    command = [sys.executable, "-m", "deadpool_megatron.worker", str(script), ending]
    shared = shared_page("muster")
    try:
        return start_worker(command, env, 0, None, directory / "log", shared)
    finally:
        os.close(shared)


@pytest.mark.parametrize(
    ("ending", "code"),
    [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV), ("1 / 0", 1), ("", 0)],
)
def test_the_agent_learns_how_a_forked_worker_ended(
    tmp_path: Path, ending: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "start_process", forking._start_worker)
    worker = start(tmp_path, ending, environment({"A_WORD": "of its own"}, forked=True))
    select.select([worker.pidfd], [], [])
    os.close(os.pidfd_open(worker.pid))  # nobody has waited for it, so its id is its own
    assert worker.process.wait() == code and worker.process.poll() == code
    lines = (tmp_path / "log").read_text().splitlines()
    found = json.loads(lines[0])
    assert found["argv"][1:] == [ending] and found["cwd"] == os.getcwd() and found["session"] == worker.pid
    assert found["env"]["A_WORD"] == "of its own" and found["env"][PARENT_PID] == str(os.getpid())
    assert ("ZeroDivisionError" in lines[-1]) == (ending == "1 / 0")
    worker.close()


def test_a_forked_worker_is_found_by_the_word_in_its_environment_and_ends_with_its_agent(tmp_path: Path) -> None:
    descendants = Descendants()
    code = f"""\
import signal, test_fork_server as t
t.forking.install()
worker = t.start(t.Path({str(tmp_path)!r}), 'signal.pause()', t.os.environ)
signal.pause()
"""
    env = environment({"PYTHONPATH": os.pathsep.join(sys.path)}) | {FORK_SERVER: environment(forked=True)[FORK_SERVER]}
    agent = subprocess.Popen([sys.executable, "-c", code], env=env | descendants.environment)
    try:
        while not (found := [p for p in descendants.living() if p.pid != agent.pid]):
            assert agent.poll() is None
        while not (tmp_path / "log").read_text():
            assert found[0].is_running()
    finally:
        agent.kill()
        agent.wait()
    psutil.wait_procs(found)
    assert not descendants.living()
