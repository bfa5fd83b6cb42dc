"""A survivor never stays blocked: communicators aborted again and again at random moments of real iterations."""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import time
from pathlib import Path

import pytest

from deadpool_megatron.cluster import Spoke
from deadpool_megatron.cluster import records as r
from deadpool_megatron.evaluate.jobs import Job
from deadpool_megatron.observe import JOB
from flags import tiny_gpt

LAUNCH = ["--local-nodes", "4", "--nproc-per-node", "2", "--emulate-cpu"]
SCRIPT = "examples/pretrain_gpt.py"


def _footprint(pid: int) -> tuple[int, int]:
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def _floor(footprints: list[tuple[int, int]]) -> tuple[int, int]:
    return min(f[0] for f in footprints), min(f[1] for f in footprints)


def _abort(spoke: Spoke) -> bool:
    """Ask for one abort; False when the job is still busy with the last."""
    spoke.send(r.encode(r.Inject(r.Fault("abort", -1))))
    packet = spoke.receive(600.0)
    assert packet is not None, "the coordinator does not answer"
    reply = r.decode_from_coordinator(packet)
    assert isinstance(reply, r.InjectReply)
    return not reply.error


def _seconds(job: Job) -> list[float]:
    """Of each iteration but the first ones."""
    ends = [e["t"] for e in job.events("iteration")]
    return [later - earlier for earlier, later in itertools.pairwise(ends[2:])]


def _aborted(tmp_path: Path, aborts: int) -> tuple[list[float], list[float]]:
    """Abort so often; nothing of the run changes.

    Returns the seconds until every rank had left its step, of each abort, and those of calm iterations.
    """
    # Enough iterations that the run outlasts the aborts, few enough that it ends soon after them.
    # A message taken out by force leaves its backend's threads until the operation time-out, so that one is short.
    flags = [*tiny_gpt("1f1b", iters=12 + 3 * aborts // 4), "--deadpool", "--deadpool-operation-timeout", "30"]
    with Job(tmp_path / "calm", LAUNCH, [SCRIPT, *flags, "--deadpool-state-hash", str(tmp_path / "calm.json")]) as job:
        assert job.wait() == 0
        calm_s = _seconds(job)

    rng = random.Random(20261121)
    footprints: list[tuple[int, int]] = []
    with Job(tmp_path / "run", LAUNCH, [SCRIPT, *flags, "--deadpool-state-hash", str(tmp_path / "run.json")]) as job:
        job.until("first iteration", lambda: job.events("iteration"), 300.0)
        address = json.loads((tmp_path / "run" / JOB).read_text())
        spoke = Spoke(address["coordinator"], "inject-test", bytes.fromhex(address["secret"]), 600.0)
        pids = {c["rank"]: c["pid"] for c in job.status()["coordinates"]}
        done = 0
        while done < aborts and len(job.events("resumed")) >= done - 1:
            time.sleep(rng.uniform(0.0, 0.45))
            if not _abort(spoke):
                time.sleep(0.02)
                continue
            done += 1
            if done % (aborts // 10) == 0:
                footprints.append(_footprint(pids[0]))
        spoke.close()
        assert job.wait() == 0

    declared = {e["epoch"]: e["t"] for e in job.events("declared")}
    aborted = {e["epoch"]: e["t"] for e in job.events("aborted")}
    assert len(declared) == aborts
    assert set(aborted) == set(declared)
    assert {c["rank"]: c["pid"] for c in job.status()["coordinates"]} == pids
    assert not job.events("detected")
    # A message taken out by force keeps its backend until the operation time-out, so the count goes up and down;
    # what piles up raises the floor. 24 groups of 3 threads each would show at once.
    for what, early, late in zip(("descriptors", "threads"), footprints[1], _floor(footprints[-4:]), strict=True):
        assert late < early + 40, f"{what} grew: {footprints}"
    calm = json.loads((tmp_path / "calm.json").read_text())
    assert json.loads((tmp_path / "run.json").read_text()) == calm
    return [aborted[epoch] - declared[epoch] for epoch in declared], calm_s


@pytest.mark.timeout(900)
@pytest.mark.parametrize("aborts", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_every_abort_unblocks_every_rank_and_nothing_of_the_run_changes(tmp_path: Path, aborts: int) -> None:
    _aborted(tmp_path, aborts)


@pytest.mark.perf
@pytest.mark.timeout(900)
def test_every_abort_unblocks_every_rank_in_the_time_of_some_iterations(tmp_path: Path) -> None:
    left_s, calm_s = _aborted(tmp_path, 30)
    slowest, iteration = max(left_s), statistics.median(calm_s)
    print(f"the slowest rank took {slowest:.2f} s to leave its step, a calm iteration {iteration:.2f} s")
    assert slowest < 5 * iteration
