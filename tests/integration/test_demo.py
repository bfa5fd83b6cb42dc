"""The demo ends in "EQUAL" on real training, and leaves no process behind when it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from waiting import until

ROOT = Path(__file__).parents[2]


def _start(run_dir: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "deadpool_megatron.demo", "--run-dir", str(run_dir), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _of(run_dir: Path) -> Iterator[psutil.Process]:
    """Launchers of this demo; everything below them shares their fate, by the launcher's own tests."""
    for process in psutil.process_iter():
        try:
            if str(run_dir) in " ".join(process.cmdline()) and process.pid != os.getpid():
                yield process
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_shows_a_killed_node_and_two_equal_runs(tmp_path: Path) -> None:
    demo = _start(tmp_path, "--iterations", "6", "--iteration", "3")
    out, err = demo.communicate()
    assert demo.returncode == 0, out + err
    assert "6 losses, 48 SHA-256 and 6 surviving processes as undisturbed" in out
    assert re.search(r"^EQUAL: node 0 lost in iteration 3, resumed from [23];", out, re.MULTILINE)
    assert "48 of 48 digests equal" in out
    for phase in ("detected", "declared", "aborted", "agreed", "prepared", "reformed", "restored", "resumed", "redone"):
        assert re.search(rf"^{phase} .*\+[\d.]+ m?s", out, re.MULTILINE), phase
    assert "node 4+" in out


def test_interrupted_demo_leaves_no_process(tmp_path: Path) -> None:
    demo = _start(tmp_path)
    until((tmp_path / "undisturbed" / "events.jsonl").exists, "the first run")
    children = psutil.Process(demo.pid).children(recursive=True)
    assert children
    demo.send_signal(signal.SIGINT)
    _, err = demo.communicate()
    assert demo.returncode == 130
    assert "interrupted" in err
    psutil.wait_procs(children)
    assert not list(_of(tmp_path))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--node", "4"], "--node 4: the nodes that train are 0 to 3"),
        (["--iteration", "12"], "--iteration 12: a run has iterations 0 to 11"),
        (["--tick", "0"], "--tick: must be 1 to "),
        (["--script", "nowhere.py"], "nowhere.py does not exist"),
    ],
)
def test_bad_option_is_refused_before_any_training(tmp_path: Path, options: list[str], says: str) -> None:
    demo = _start(tmp_path / "run", *options)
    _, err = demo.communicate()
    assert demo.returncode == 2
    assert says in err
    assert not (tmp_path / "run").exists()
