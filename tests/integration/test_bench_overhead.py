"""The promise: one command says what snapshots cost, against none and against checkpoints, and keeps it on file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flags import tiny_gpt
from jobs import EXAMPLE, ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_overhead_benchmark_measures_prints_and_draws(tmp_path: Path) -> None:
    flags = tiny_gpt("none")
    at = flags.index("--train-iters")
    flags = [*flags[:at], *flags[at + 2 :], "--tensor-model-parallel-size", "1"]
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *[sys.executable, "-m", "deadpool_megatron.cli", "bench", "overhead", "--emulate-cpu", "--blocks", "4"],
            *["--block", "3", "--warmup", "2", "--active-nodes", "2", "--nproc-per-node", "1", "--pairs", "2"],
            *["--precisions", "bf16", "--out", str(out), str(EXAMPLE), *flags],
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "overhead.json").read_text())["results"]["bf16"]
    assert found["blocks"]["on"]["count"] == found["blocks"]["off"]["count"] == 6
    assert found["blocks"]["low"] <= found["blocks"]["ratio"] <= found["blocks"]["high"]
    assert found["runs"]["pairs"] == 2
    snapshot = found["snapshot"]
    assert snapshot["copied_bytes"] > 1_000_000 and 0 < snapshot["blocked_share"]["mean"] < 1
    assert snapshot["planned_bytes"] == pytest.approx(snapshot["expected_bytes"], rel=0.01)
    assert found["checkpoints"]["sync"]["ratio"] > 1
    assert sum(nbytes for *_, nbytes in found["timeline"]["copies"]) > 1_000_000
    assert (out / "cdf.png").stat().st_size > 1000 and (out / "timeline-bf16.png").stat().st_size > 1000
    assert "95 % interval" in done.stdout and "CPU seconds" in done.stdout
