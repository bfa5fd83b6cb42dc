"""Nodes lost before the first generation is committed, and after the last iteration: the run ends as if nothing had
happened, its last checkpoint whole.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deadpool_megatron.cluster.records.exits import Exit
from flags import duo_gpt
from jobs import Job, Jobs, assert_same_checkpoint, launch_flags

ITERATIONS = 5
FLAGS = [*duo_gpt("data", iters=ITERATIONS), "--deadpool-lease", "6"]
# The last checkpoint and two evaluations come after `train`: 5 is no multiple of the interval.
_AFTER = ["--save-interval", "3", "--eval-iters", "2", "--ckpt-format", "torch_dist", "--split", "90,5,5"]


def _evaluations(job: Job) -> list[str]:
    logs = sorted((job.run_dir / "logs").glob("rank-1*.log"))  # of who printed it first, and of who took over
    text = "".join(log.read_text() for log in logs)
    return re.findall(r"loss at iteration \d+ on .*", text)


@pytest.fixture(scope="module")
def saved(module_jobs: Jobs) -> tuple[Job, Path]:
    """The run in which nothing happens, and where it has saved."""
    save = module_jobs.directory / "save"
    return module_jobs.start("calm", launch_flags(2, 0, 1), [*FLAGS, *_AFTER, "--save", str(save)]).finished(), save


@pytest.mark.parametrize(
    ("points", "more"),
    [
        pytest.param(["save.during", "evaluation.during"], [], id="the last checkpoint and an evaluation"),
        pytest.param(
            ["evaluation.after", "step.finished"], [], id="the evaluations and the end", marks=pytest.mark.slow
        ),
        pytest.param(["save.before", "save.after"], [], id="around the checkpoint", marks=pytest.mark.slow),
        pytest.param(["save.after"], ["--async-save"], id="an asynchronous checkpoint", marks=pytest.mark.slow),
        pytest.param(["save.finalized"], ["--async-save"], id="and its end", marks=pytest.mark.slow),
    ],
)
def test_a_node_lost_after_the_last_iteration_costs_nothing(
    points: list[str], more: list[str], saved: tuple[Job, Path], jobs: Jobs
) -> None:
    calm, want = saved
    save, spares = jobs.directory / "save", len(points)
    flags = [*FLAGS, *_AFTER, *more, "--save", str(save)]
    job = jobs.start("killed", launch_flags(2 + spares, spares, 1), flags, held=True)
    job.until_event("started")
    for node, point in enumerate(points):
        at = ["--at", point, "--at-iteration", str(ITERATIONS - 1)]
        armed = job.command("inject", "--node", str(node), "--fault", "kill", *at)
        assert armed.returncode == 0, armed.stderr
    job.hold(None)
    job.finished()
    # (A node may be lost before the coordinator has heard from all that the recovery before is through.)
    assert [e["lost"] for e in job.events("declared")] == [[node] for node in range(spares)] and job.events("resumed")
    assert job.hashes() == calm.hashes()
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(ITERATIONS)
    assert_same_checkpoint(save / f"iter_{ITERATIONS:07d}", want / f"iter_{ITERATIONS:07d}")
    assert _evaluations(job)[-2:] == _evaluations(calm)[-2:] != []


def _started(job: Job) -> bool:
    nodes = job.status()["nodes"] if (job.run_dir / "status.json").exists() else []
    return bool(nodes) and all(node["agent_pid"] for node in nodes)


def test_a_node_lost_at_the_start_costs_the_start_and_a_spare(jobs: Jobs) -> None:
    calm = jobs.start("calm", launch_flags(2, 0, 1), FLAGS).finished()
    job = jobs.start("killed", launch_flags(3, 1, 1), FLAGS, held="wait")
    job.until("all agents", lambda: _started(job))
    job.kill_node(0)
    job.until_event("started_over")
    job.hold(None)
    job.finished()
    assert job.hashes() == calm.hashes() and not job.events("declared")
    assert job.exact() == calm.exact()


def test_a_node_lost_at_the_start_without_a_spare_ends_in_a_code_that_is_queued_again(jobs: Jobs) -> None:
    job = jobs.start("killed", launch_flags(2, 0, 1), FLAGS, held="wait")
    job.until("all agents", lambda: _started(job))
    job.kill_node(0)
    assert job.wait() == Exit.NO_SPARE
    assert "before the first generation was committed" in job.output
