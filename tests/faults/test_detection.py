"""How soon each class of failure is seen at the default settings, and that nothing is seen where nothing fails.

Minutes each, results as JSON for the documentation::

    DEADPOOL_TEST_RESULTS=DIR python -m pytest -m "perf or slow" -s tests/faults/test_detection.py
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from crashes import Gauntlet, write_results
from deadpool_megatron.config import DeadpoolConfig
from jobs import Jobs

DEFAULTS = DeadpoolConfig()
SILENCE = "a node falls silent"
# By class: the fault, the event that tells of it, the longest it may take from the fault until then, and how often. The
# measure is what the quickest silence of the same run took: from two thirds of a lease to a lease.
CLASSES: dict[str, tuple[list[str], str, float, int]] = {
    "a worker is killed": (["kill-worker"], "detected", 0.3, 3),
    "a worker crashes (SIGSEGV)": (["crash"], "detected", 0.3, 1),
    "a node dies, its connections end": (["kill"], "detected", 0.3, 3),
    "the agent alone dies": (["kill-agent"], "detected", 0.3, 3),
    SILENCE: (["stop-agent"], "detected", 1.7, 2),
    "a worker is stopped (SIGSTOP)": (["stop"], "stuck", 2.8, 2),
    "a worker hangs in its own code": (
        ["hang", "--at", "slice.before"],
        "stuck",
        4.5 * DEFAULTS.hang_floor / DEFAULTS.lease,
        2,
    ),
    "the coordinator dies": (["kill-coordinator"], "coordinator_back", 1.5, 3),
}
# At the default settings: no deadline is shorter than a user's.
LENIENT = ["--deadpool-lease", str(DEFAULTS.lease), "--deadpool-hang-floor", str(DEFAULTS.hang_floor)]
UNDER_LOAD_S = 300.0


@pytest.mark.perf
@pytest.mark.timeout(900)
def test_every_class_of_failure_is_seen_in_its_time_at_the_default_settings(jobs: Jobs) -> None:
    gauntlet = Gauntlet(jobs, "detection", 5000, more=LENIENT)
    rows: list[dict[str, Any]] = []
    try:
        for number, (name, (fault, event, _, times)) in enumerate(CLASSES.items()):
            found = [gauntlet.suffer(fault, event, (number + i) % 4) for i in range(times)]
            rows.append(
                {
                    "class": name,
                    "times": times,
                    "detected_s": [each["detected_s"] for each in found],
                    "recovered_s": [each["recovered_s"] for each in found if each["recovered_s"] is not None],
                    "lost_iterations": max(each["lost_iterations"] for each in found),
                }
            )
            print(rows[-1], flush=True)
    finally:
        jobs.end()
        gauntlet.end()
        write_results("detection", rows)
    silence = min(next(row["detected_s"] for row in rows if row["class"] == SILENCE))
    for row in rows:
        limit = CLASSES[row["class"]][2] * silence
        assert max(row["detected_s"]) < limit, f"{row['class']}: seen after {row['detected_s']}, not {limit:.1f} s"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_every_processor_busy_nobody_is_taken_for_lost_or_stuck_or_slow(jobs: Jobs) -> None:
    gauntlet = Gauntlet(jobs, "busy", 100000, 1, more=LENIENT)
    load: list[subprocess.Popen[bytes]] = []
    try:
        gauntlet.settle()
        gauntlet.pace("0")
        for _ in range(2 * (os.cpu_count() or 1)):
            load.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        end = time.monotonic() + UNDER_LOAD_S
        before = gauntlet.status()["iteration"]
        while time.monotonic() < end:
            assert gauntlet.job.process.poll() is None, gauntlet.job.log_tails()
            time.sleep(1.0)
        done = gauntlet.status()["iteration"] - before
        alarms = ("detected", "declared", "stuck", "straggler", "peer_error")
        wrong = [e for name in alarms for e in gauntlet.events(name)]
        print(f"{done} iterations in {UNDER_LOAD_S:g} s with {len(load)} busy processes beside; {len(wrong)} alarms")
        row = {"class": "nothing, every processor busy", "times": done, "detected_s": [], "recovered_s": []}
        write_results("busy", [row | {"lost_iterations": 0}] if not wrong else [])
        assert not wrong and done > 0
    finally:
        for process in load:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        jobs.end()
        gauntlet.end()
