"""The baseline torchft trains the same model on the same data as Megatron, and one of its replicas is really killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flags import tiny_gpt
from jobs import EXAMPLE, ROOT

BENCH = [sys.executable, "-m", "deadpool_megatron.cli", "bench", "recovery"]
ONE = ["--active-nodes", "2", "--nproc-per-node", "1", "--emulate-cpu"]
SCRIPT = [str(EXAMPLE), *tiny_gpt("none", iters=4000), "--tensor-model-parallel-size", "1"]
# Each replica draws dropout masks of its own; without them the gradients are the same but for the order of sums.
SCRIPT += ["--hidden-dropout", "0", "--attention-dropout", "0"]


def _norms(logs: Path, pattern: str) -> dict[int, float]:
    """Gradient norm of each iteration, from the logs that have them: a swap gives the rank another."""
    line = re.compile(r" iteration +(\d+)/.* grad norm: ([0-9.]+)")
    texts = [path.read_text() for path in logs.glob(pattern)]
    return {int(n): float(norm) for text in texts for n, norm in line.findall(text)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft (extra baselines) is not installed")
def test_a_kill_under_torchft_is_measured_beside_ours_on_the_same_training(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [*BENCH, "--kills", "1", "--torchft", "1", "--shrinks", "1", "--modes", "", *ONE, "--out", str(out), *SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(out.read_text())
    defaults, tuned = said["torchft"]
    assert (defaults["settings"], tuned["settings"]) == ("defaults", "heartbeat 1 s, gloo 2 s")
    for each, heartbeat_s in ((defaults, 5.0), (tuned, 1.0)):
        # The last heartbeat may be as old as the interval between two (100 ms) when the replica dies.
        assert heartbeat_s - 0.3 < each["quorum_s"] < each["first_iteration_s"]
        assert each["participants"] == 2 and each["lost_iterations"] <= 2
    for changes in said["shrinks"].values():
        assert [(each["event"], each["width"]) for each in changes] == [("shrunk", 1), ("grown", 2)]
    assert len(said["shrinks"]) == 3
    (base,) = tmp_path.glob("deadpool-bench-*")
    (ours,) = base.glob("deadpool-*/logs")
    theirs = _norms(base / "torchft-defaults-0", "replica-2.log")  # the spare's; until the kill it computes nothing
    norms = _norms(ours, "rank-*.log")
    both = [n for n in sorted(norms.keys() & theirs.keys()) if n <= defaults["iteration"]]
    assert len(both) >= 3
    assert [theirs[n] for n in both] == pytest.approx([norms[n] for n in both], rel=0.02)
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if any(str(base) in part for part in p.info["cmdline"] or [])
    ]
