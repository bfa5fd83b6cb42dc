"""The promise: one command says what snapshots cost, against none and against checkpoints, and keeps it on file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deadpool_bench.blocks import pairs, read_ranks
from flags import tiny_gpt
from jobs import EXAMPLE, ROOT

# Tells where it and its agent may run, then dies in its 14th iteration; as often as it is started again.
DIES = f"""
import json, os, runpy, sys
from pathlib import Path
from megatron.training import training

before, steps = training.train_step, []

def dies(*args, **kwargs):
    steps.append(0)
    if len(steps) == 14:
        cpus = [sorted(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")]
        Path(__file__).with_name("cpus").write_text(json.dumps([cpus, sorted(os.sched_getaffinity(os.getppid()))]))
        os._exit(3)
    return before(*args, **kwargs)

training.train_step = dies
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""


def _bench(out: Path, script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    flags = tiny_gpt("none")
    at = flags.index("--train-iters")
    flags = [*flags[:at], *flags[at + 2 :], "--tensor-model-parallel-size", "1"]
    command = [sys.executable, "-m", "deadpool_megatron.cli", "bench", "overhead", "--emulate-cpu", *options]
    command += ["--active-nodes", "2", "--nproc-per-node", "1", "--checkpoints", "sync,async", "--out", str(out)]
    return subprocess.run(
        [*command, str(script), *flags], capture_output=True, text=True, cwd=ROOT, timeout=850, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_overhead_benchmark_measures_prints_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _bench(out, EXAMPLE, "--blocks", "4", "--block", "3", "--warmup", "2", "--pairs", "2")
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


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_job_that_dies_costs_no_block_and_cores_are_kept_apart(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    one, other = sorted(os.sched_getaffinity(0))[:2]
    sizes = ["--blocks", "40", "--block", "2", "--warmup", "2", "--checkpoints", "none"]
    done = _bench(tmp_path / "out", script, *sizes, "--cores", f"{one}:{other}")
    assert done.returncode == 1
    found = json.loads((tmp_path / "out" / "overhead.json").read_text())["results"]["bf16"]
    assert found["error"] in done.stderr and any(t in found["error"] for t in ("a recovery", "ended with"))
    assert found["blocks"]["pairs"] == 2  # of the iterations 2 to 12 five blocks are whole
    assert found["snapshot"]["generations"] >= 4 and "4 of 40 blocks" in done.stdout
    threads, agent = json.loads((tmp_path / "cpus").read_text())
    assert [thread for thread in threads if thread != [one]] == [[other]]  # the one that copies
    assert agent == [other]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_time_limit_ends_the_job_and_what_it_measured_is_there(tmp_path: Path) -> None:
    sizes = ["--blocks", "4000", "--block", "1", "--warmup", "1", "--checkpoints", "none", "--minutes", "1"]
    done = _bench(tmp_path / "out", EXAMPLE, *sizes)
    assert "are over, it is ended" in done.stderr
    both = pairs(read_ranks(tmp_path / "out" / "01-snapshot-bf16.times"))
    found = json.loads((tmp_path / "out" / "overhead.json").read_text())["results"]["bf16"]
    assert len(found["seconds"]["on"]) == len(found["seconds"]["off"]) == len(both)
    assert done.returncode == (0 if len(both) > 1 else 1)
