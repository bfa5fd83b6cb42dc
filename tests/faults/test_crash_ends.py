"""Crash points at the start and the end of a job: it ends well, or says in one line why it cannot go on.

::

    DEADPOOL_TEST_RESULTS=DIR python -m pytest -m slow -s tests/faults/test_crash_ends.py
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crash_cases import ELSEWHERE, ENDS
from crashes import write_results
from deadpool_megatron import points
from deadpool_megatron.cli import main
from deadpool_megatron.cluster import records as r  # noqa: F401 - adds the points of messages
from deadpool_megatron.observe import JOB, LOGS
from flags import duo_gpt
from jobs import PACED, Job, Jobs, launch_flags
from waiting import until

ITERATIONS = 12
FLAGS = [*duo_gpt("data", iters=ITERATIONS), "--deadpool-lease", "3", "--deadpool-abort-deadline", "15"]
ENDS_S = 120.0
RESUMED = ("coordinator.load-shards", "coordinator.resume-at")
EARLY = (*RESUMED, "coordinator.placement", "agent.vault-memory", "agent.no-room")
SAVED = ("worker.shard-ready", "agent.saved")


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """What became of each; with what only other ways of starting a job pass."""
    rows = [_row(name, "", f"not passed here: {why}", False) for name, why in ELSEWHERE.items()]
    yield rows
    write_results("ends", rows)


@pytest.fixture(scope="module")
def calm(module_jobs: Jobs) -> Job:
    """The undisturbed run; it leaves durable generations behind, and so takes its time."""
    pace = module_jobs.directory / "pace"
    pace.write_text("0.3")
    flags = [*FLAGS, *_durable(module_jobs.directory / "durable")]
    job = module_jobs.start("calm", launch_flags(2, 0, 1), flags, PACED, extra={"PACE_FILE": str(pace)}).finished()
    assert job.events("durable"), "no generation was drained before the end"
    return job


def _durable(directory: Path) -> list[str]:
    return ["--deadpool-durable-dir", str(directory), "--deadpool-durable-interval", "5"]


def _row(point: str, role: str, outcome: str, equal: bool) -> dict[str, Any]:
    nothing = {"fault": "", "trigger": "", "detected_s": None, "recovered_s": None, "lost_iterations": None}
    row = {"point": point, "role": role, "outcome": outcome, "bitwise_equal": equal, "epochs": 0, "nodes": 2}
    return {**row, **nothing}


def _start(point: str, jobs: Jobs, calm: Job, directory: Path) -> Job:
    flags, spares = list(FLAGS), 1
    if point in RESUMED:
        flags += [*_durable(calm.run_dir.parent / "durable"), "--deadpool-resume", "auto"]
    if point == "agent.no-room":
        flags += ["--deadpool-host-memory", "2000000"]  # enough for the own shard, too little for a peer's
    if point == "agent.preemption-notice":
        flags += [*_durable(directory / "durable"), "--deadpool-on-preempt"]
    if point in SAVED:
        save = ["--save", str(directory / "save"), "--save-interval", "10000"]
        flags, spares = [*flags, *save, "--train-iters", "1000"], 0
    return jobs.start(point, launch_flags(2 + spares, spares, 1), flags)


def _arm(point: str, job: Job) -> None:
    where = points.POINTS[point][0]
    if point in EARLY:
        job.until("the coordinator", lambda: (job.run_dir / JOB).exists())
        if where != "coordinator":
            job.until("agents", lambda: job.status()["nodes"][0]["agent_pid"])
    else:
        job.until_event("committed")
    victim = [] if where == "coordinator" else ["--node", "0"]
    fault = "kill-coordinator" if where == "coordinator" else "kill"
    command = ["inject", "--run-dir", str(job.run_dir), *victim, "--fault", fault, "--at", point]
    until(lambda: main(command) == 0, lambda: f"everybody to be there\n{job.log_tails()}", 0.1)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("point", list(ENDS))
def test_a_crash_at_the_start_or_the_end_ends_well_or_with_a_clear_line(
    point: str, jobs: Jobs, calm: Job, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = _start(point, jobs, calm, tmp_path)
    _arm(point, job)
    if point in SAVED:
        job.kill_node(1)
    if point == "agent.preemption-notice":
        os.kill(job.status()["nodes"][0]["agent_pid"], signal.SIGTERM)
    if point == "coordinator.exit-notice":
        job.process.send_signal(signal.SIGUSR2)
    code = job.wait(ENDS_S)
    logs = [p.read_text(errors="replace") for p in (job.run_dir / LOGS).glob("*.log")]
    struck = any("deadpool: fault kill" in text for text in [job.output, *logs])
    stopped = [e["message"] for e in job.events("stopped")]
    equal = code == 0 and job.hashes() == calm.hashes()
    role = "coordinator" if points.POINTS[point][0] == "coordinator" else "survivor"
    outcome = f"ends: {stopped[0].splitlines()[0]}" if code and stopped else "recovered"
    print(f"{point}: exit code {code}, {outcome}")
    if struck:
        rows.append(_row(point, role, outcome, equal))
    assert struck, f"{point} was not passed\n{job.log_tails()}"
    well = code == 0 and equal
    clear = bool(code and ENDS[point] and stopped and ENDS[point] in stopped[0])
    assert well or clear, f"{code}: {stopped}\n{job.log_tails()}"
