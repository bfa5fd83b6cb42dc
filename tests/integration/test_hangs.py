"""A rank that hangs where nobody looks for it: its stacks are kept, its process ends, another one takes its place."""

from __future__ import annotations

import pytest

from deadpool_megatron.cluster.records.exits import Exit
from flags import duo_gpt
from jobs import Jobs, assert_same_training, launch_flags, undisturbed

ITERATIONS = 8


@pytest.mark.timeout(300)
def test_a_rank_that_does_not_leave_its_step_costs_an_epoch_and_no_node(jobs: Jobs) -> None:
    flags = duo_gpt("data", iters=ITERATIONS)
    short = ["--deadpool-hang-floor", "0", "--deadpool-lease", "3", "--deadpool-abort-deadline", "6"]
    job = jobs.start("abort", launch_flags(2, 0, slots=1), [*flags, *short], held=True)
    job.arm((1, 4, 2, "--fault", "hang"))
    log = job.run_dir / "logs" / "rank-1.log"
    job.until("that it hangs", lambda: "fault hang strikes" in log.read_text())
    assert job.command("inject", "--fault", "abort", timeout_s=60.0).returncode == Exit.OK
    job.finished()
    (late,) = job.events("late")
    assert (late["nodes"], late["phase"]) == ([1], "aborting") and "stacks-node*-*.txt" in late["message"]
    assert "strike" in (job.run_dir / "logs" / "stacks-node1-0.txt").read_text()
    first, again = job.events("declared")
    assert (first["replaced"], again["replaced"], again["nodes"]) == ([], [1], [0, 1])
    assert "hung in a recovery" in again["reason"] and not [e for e in job.events("detected") if "local" not in e]
    assert_same_training(job, undisturbed(launch_flags(2, slots=1), flags), ITERATIONS, rank=1)
