"""A survivor never stays blocked: communicators aborted again and again at random moments of real iterations."""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import time

import pytest

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.link.link import Spoke
from deadpool_megatron.observe import JOB
from flags import tiny_gpt, with_value
from jobs import Job, Jobs, launch_flags, undisturbed


def _footprint(pid: int) -> tuple[int, int]:
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def _floor(footprints: list[tuple[int, int]]) -> tuple[int, int]:
    return min(f[0] for f in footprints), min(f[1] for f in footprints)


def _abort(job: Job, spoke: Spoke) -> bool:
    """Ask for one abort; False when the job is still busy with the last."""
    spoke.send(r.encode(r.Inject(r.Fault("abort", -1))))
    while (packet := spoke.receive(1.0)) is None:
        assert job.process.poll() is None, "the job ended before all aborts were asked for"
    reply = r.decode_from_coordinator(packet)
    assert isinstance(reply, r.InjectReply)
    return not reply.error


def _aborted_again_and_again(jobs: Jobs, aborts: int, tensor: int) -> Job:
    """TP x PP2 x DP2 on four nodes comes through so many aborts and ends as if there had been none."""
    # Enough iterations that the run outlasts the aborts, few enough that it ends soon after them.
    # A message taken out by force leaves its backend's threads until the operation time-out, so that one is short.
    flags = with_value(tiny_gpt(iters=12 + 6 * aborts), "--tensor-model-parallel-size", tensor)
    flags += ["--deadpool-operation-timeout", "30"]
    want = undisturbed(launch_flags(4, slots=tensor), flags)
    began = [e["t"] for e in want.events("iteration")]
    iteration_s = statistics.median(later - t for t, later in itertools.pairwise(began))

    rng = random.Random(20261121)
    footprints: list[tuple[int, int]] = []
    job = jobs.start(f"aborted-{aborts}", launch_flags(4, slots=tensor), flags)
    job.until("first iteration", lambda: job.events("iteration"))
    address = json.loads((job.run_dir / JOB).read_text())
    spoke = Spoke(address["coordinator"], "inject-test", bytes.fromhex(address["secret"]), 600.0)
    pids = job.pids()
    for done in range(aborts):
        time.sleep(rng.uniform(0.0, iteration_s))
        job.until("another abort", lambda: _abort(job, spoke))
        if done % (aborts // 6) == 0:
            footprints.append(_footprint(pids[0]))
    spoke.close()
    job.finished()

    declared = [e["epoch"] for e in job.events("declared")]
    assert len(declared) == aborts and declared == [e["epoch"] for e in job.events("aborted")]
    assert job.pids() == pids and not job.events("detected")
    # A message taken out by force keeps its backend until the operation time-out, so the count goes up and down;
    # what piles up raises the floor. 24 groups of 3 threads each would show at once.
    for what, early, late in zip(("descriptors", "threads"), footprints[1], _floor(footprints[-3:]), strict=True):
        assert late < early + 40, f"{what} grew: {footprints}"
    assert job.hashes() == want.hashes()
    return job


@pytest.mark.timeout(300)
def test_every_abort_unblocks_every_rank_and_nothing_of_the_run_changes(jobs: Jobs) -> None:
    _aborted_again_and_again(jobs, 8, tensor=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_aborts_unblock_every_rank_and_leave_nothing_behind(jobs: Jobs) -> None:
    _aborted_again_and_again(jobs, 200, tensor=2)


@pytest.mark.perf
@pytest.mark.timeout(400)
def test_an_abort_frees_every_rank_in_less_than_an_iterations_time(jobs: Jobs) -> None:
    job = _aborted_again_and_again(jobs, 30, tensor=2)
    declared = {e["epoch"]: e["t"] for e in job.events("declared")}
    took = [e["t"] - declared[e["epoch"]] for e in job.events("aborted")]
    times = [e["t"] for e in job.events("iteration")]
    iteration_s = statistics.median(later - t for t, later in itertools.pairwise(times))
    print(
        f"aborts: median {statistics.median(took):.3f} s, slowest {max(took):.3f} s; an iteration {iteration_s:.3f} s"
    )
    assert statistics.median(took) < iteration_s
