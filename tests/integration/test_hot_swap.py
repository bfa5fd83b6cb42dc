"""Nodes are killed for real at exact moments of real Megatron training; the run ends bit for bit as if nothing was.

Kills go through `deadpool inject`: the agent and all workers of the node get SIGKILL at the given forward or backward
pass (tick). A job takes half a minute to start on two cores, so several kills share one.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from deadpool_megatron.cluster.records.exits import Exit, what_to_do
from flags import duo_gpt, tiny_gpt, with_value
from jobs import (
    ROOT,
    Job,
    Jobs,
    alone,
    assert_same_checkpoint,
    assert_same_training,
    launch_flags,
    undisturbed,
)

# 4 microbatches a rank: 4 forward and 4 backward passes an iteration.
FIRST_TICK, STEADY_TICK, LAST_TICK = 1, 4, 8


def _armed_kills(job: Job, *kills: tuple[int, int, int], until: int | None = None) -> dict[int, int]:
    """Arm (node, iteration, tick) before training begins; returns the pids that train."""
    job.arm(*kills, until=until)
    job.until_event("training")
    return job.pids()


def _committed_before(job: Job, epoch: int) -> int:
    """The newest generation that was committed when an epoch was declared: nothing that is older may be gone on from.

    How far behind the iteration that is depends on how busy the machine is.
    """
    declared = job.until_event("declared", epoch=epoch)["t"]
    return max(e["iteration"] for e in job.events("committed") if e["t"] < declared)


def _by_iteration(job: Job) -> dict[int, object]:
    """Losses and grad norms; of an iteration that was repeated the last ones."""
    return {iteration: numbers for iteration, *numbers in job.exact()}


def _kept_their_processes(job: Job, before: dict[int, int], ranks: list[int]) -> bool:
    after = job.pids()
    return {r: before[r] for r in ranks} == {r: after[r] for r in ranks}


# ---- 1F1B: TP2 x PP2 x DP2 on 4 nodes; stage 0 on nodes 0 and 1, stage 1 on nodes 2 and 3

ITERATIONS = 9


def _calm() -> Job:
    return undisturbed(launch_flags(4), tiny_gpt(iters=ITERATIONS))


@pytest.mark.versions(torch=True, megatron=True)
@pytest.mark.timeout(400)
def test_1f1b_survives_first_stage_last_stage_and_former_spare_killed_in_one_run(jobs: Jobs) -> None:
    job = jobs.start("killed", launch_flags(7, 3), tiny_gpt(iters=ITERATIONS), held=True)
    before = _armed_kills(job, (0, 3, FIRST_TICK), (2, 5, STEADY_TICK), until=6)
    former_spare = job.until_event("declared", epoch=1)["nodes"][0]
    assert former_spare in (4, 5, 6)
    job.inject(former_spare, 7, LAST_TICK)
    job.hold(None)
    job.finished()
    assert [e["lost"] for e in job.events("declared")] == [[0], [2], [former_spare]]
    for resumed, struck in zip(job.events("resumed"), (3, 5, 7), strict=True):
        assert _committed_before(job, resumed["epoch"]) <= resumed["iteration"] <= struck
    assert _kept_their_processes(job, before, [2, 3, 6, 7])
    # Node 2 reports the losses and dies in iteration 5.
    assert_same_training(job, _calm(), ITERATIONS, rank=7, mute=frozenset({4}))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_under_deadpool_prints_what_megatron_prints_without_it(tmp_path: Path) -> None:
    assert alone(tmp_path, 8, tiny_gpt(iters=ITERATIONS)) == _calm().printed(7)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_averages_over_two_iterations_go_on_through_a_swap(jobs: Jobs) -> None:
    flags = [*tiny_gpt(iters=6), "--log-interval", "2"]
    want = undisturbed(launch_flags(4), flags)
    job = jobs.start("interval-killed", launch_flags(5, 1), flags, held=True)
    _armed_kills(job, (0, 3, STEADY_TICK))
    job.finished()
    assert sorted(want.printed(7)) == [1, 2, 4, 6]
    assert_same_training(job, want, 6, rank=7)


# ---- no pipeline: TP2 x DP2 on 2 nodes


@pytest.mark.timeout(300)
def test_a_worker_killed_under_a_living_agent_is_replaced_with_its_node(jobs: Jobs) -> None:
    job = jobs.start("flat-killed", launch_flags(3, 1), tiny_gpt("none", iters=6), held=True)
    job.arm((1, 3, 2, "--fault", "kill-worker", "--local", "1"))
    job.until_event("training")
    before = job.pids()
    job.finished()
    assert "rank 3 ended (signal 9)" in job.events("detected")[0]["cause"]
    assert _kept_their_processes(job, before, [0, 1])
    assert_same_training(job, undisturbed(launch_flags(2), tiny_gpt("none", iters=6)), 6, rank=3)


@pytest.mark.timeout(300)
def test_garbage_neither_ends_a_survivor_nor_is_printed(jobs: Jobs) -> None:
    """The first loss frees survivors in the middle of a pass, the second one in the all-reduce of the loss."""
    flags = tiny_gpt("none", iters=6)
    job = jobs.start("flat-garbage", launch_flags(4, 2), flags, ROOT / "tests" / "pretrain_garbage.py", held=True)
    job.arm((1, 2, 2), (0, 4, 1, "--at", "optimizer-step.after"))
    job.finished()
    assert [e["lost"] for e in job.events("declared")] == [[1], [0]] and not job.events("worker_error")
    assert not [p for p in (job.run_dir / "logs").glob("rank-3*.log") if re.search(r": +nan\b", p.read_text(), re.I)]
    assert_same_training(job, undisturbed(launch_flags(2), flags), 6, rank=3, mute=frozenset({4}))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_without_a_spare_the_survivors_save_the_checkpoint_megatron_itself_would_have_saved(
    jobs: Jobs, tensor: int, tmp_path: Path
) -> None:
    # Without dropout: with it, even Megatron's restart from its own checkpoint differs from the run that went on.
    flags = with_value(tiny_gpt("none", iters=6), "--tensor-model-parallel-size", tensor)
    flags += ["--hidden-dropout", "0", "--attention-dropout", "0"]
    flags += ["--ckpt-format", "torch_dist"]
    own, rescued = tmp_path / "own", tmp_path / "rescued"
    save = ["--save", str(own), "--save-interval", "1"]
    want = jobs.start(
        f"dry-undisturbed-{tensor}", launch_flags(2, slots=tensor), [*flags, *save], deadpool=False
    ).finished()
    job = jobs.start(
        f"dry-rescued-{tensor}",
        launch_flags(2, slots=tensor),
        [*flags, "--save", str(rescued), "--save-interval", "100"],
        held=True,
    )
    _armed_kills(job, (0, 3, 7), until=3)
    job.until("a generation to save", lambda: [e for e in job.events("committed") if e["iteration"]])
    job.hold(None)
    assert job.wait() == Exit.NO_SPARE_SAVED
    said, advice = [line for line in job.output.splitlines() if line.startswith("deadpool: ")][-2:]
    assert advice == f"deadpool: {what_to_do(Exit.NO_SPARE_SAVED)}"
    saved = int((rescued / "latest_checkpointed_iteration.txt").read_text())
    assert _committed_before(job, 1) <= saved <= 3
    assert f"iteration {saved} " in said and f"--load {rescued}" in said
    assert_same_checkpoint(rescued / f"iter_{saved:07}", own / f"iter_{saved:07}")
    load = [*flags, "--load", str(rescued)]
    script = ROOT / "tests" / "pretrain_loading.py"
    again = jobs.start(f"dry-loaded-{tensor}", launch_flags(2, slots=tensor), load, script, deadpool=False)
    lines = again.finished().printed(2 * tensor - 1)
    assert sorted(lines) == list(range(saved + 1, 7)) and lines[saved + 1] == want.printed(2 * tensor - 1)[saved + 1]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("durable", [False, True])
def test_what_only_a_spare_has_left_is_saved_before_the_end(jobs: Jobs, durable: bool, tmp_path: Path) -> None:
    """A spare is to take over, since a worker has died; both training nodes are lost before the next commit."""
    flags = with_value(tiny_gpt("none", iters=40), "--tensor-model-parallel-size", 1)
    flags += ["--deadpool-snapshot-interval", "6"]
    where = ["--deadpool-durable-dir", str(tmp_path / "durable")] if durable else ["--save", str(tmp_path / "saved")]
    name = f"spare-{'durable' if durable else 'saved'}"
    job = jobs.start(name, launch_flags(3, spares=1, slots=1), [*flags, *where, "--save-interval", "100"])
    job.until("a commit", lambda: [e for e in job.events("committed") if e["iteration"]])
    os.kill(job.pids()[0], signal.SIGKILL)
    job.until_event("declared", epoch=1)
    job.kill_node(1, 2)
    generation = _committed_before(job, 1)
    assert job.wait() == (Exit.NO_SPARE if durable else Exit.NO_SPARE_SAVED)
    assert job.events("agreed")[-1]["iteration"] == generation and job.events("declared")[-1]["nodes"] == [0]
    if not durable:
        assert int((tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text()) == generation
        return
    assert f"generation {generation} is durable" in job.output
    again = jobs.start(f"{name}-again", launch_flags(2, slots=1), [*flags, *where, "--deadpool-resume", "auto"])
    again.finished()
    assert again.events("durable_resumed")[0]["iteration"] == generation
    want = jobs.start(f"{name}-undisturbed", launch_flags(2, slots=1), flags).finished().printed(1)
    lines = again.printed(1)
    assert sorted(lines) == list(range(generation + 1, 41)) and lines[40] == want[40]


@pytest.mark.timeout(200)
def test_without_a_spare_and_without_save_the_job_says_so_and_ends_with_its_own_code(jobs: Jobs) -> None:
    job = jobs.start("flat-lost", launch_flags(2), tiny_gpt("none", iters=6), held=True)
    _armed_kills(job, (1, 2, 2))
    assert job.wait() == Exit.NO_SPARE
    said, advice = [line for line in job.output.splitlines() if line.startswith("deadpool: ")][-2:]
    assert advice == f"deadpool: {what_to_do(Exit.NO_SPARE)}"
    assert "no spare is left for node 1" in said and "--save" in said


def test_without_a_spare_the_others_keep_their_state_until_one_joins(jobs: Jobs) -> None:
    flags = duo_gpt("data", iters=6)
    want = undisturbed(launch_flags(2, 0, 1), flags)
    job = jobs.start("waits", launch_flags(2, 0, 1), [*flags, "--deadpool-wait-for-spare", "60"], held=True)
    # Tick 2 comes after the forward pass in which a held rank waits: the node is killed once the job is let go.
    before = _armed_kills(job, (1, 2, 2), until=2)
    job.until("a generation to go on from", lambda: [e for e in job.events("committed") if e["iteration"]])
    job.hold(None)
    job.until_event("waiting")
    job.until("the others to wait", lambda: job.status()["phase"] == "waiting for a spare")
    joined = job.join()
    job.finished()
    assert joined.wait() == Exit.OK
    assert [e["purpose"] for e in job.events("declared")] == ["resume", "resume"]
    assert _kept_their_processes(job, before, [0])
    assert (
        job.hashes() == want.hashes()
        and [e for i, e in enumerate(job.exact()) if e not in job.exact()[:i]] == want.exact()
    )


# ---- interleaved, MoE, upstream's script


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_interleaved_schedule_survives_two_kills(jobs: Jobs) -> None:
    flags = tiny_gpt("interleaved", iters=7)
    want = undisturbed(launch_flags(4), flags)
    job = jobs.start("interleaved-killed", launch_flags(6, 2), flags, held=True)
    before = _armed_kills(job, (1, 2, 3), (2, 5, 14))
    job.finished()
    assert [e["lost"] for e in job.events("declared")] == [[1], [2]]
    assert _kept_their_processes(job, before, [0, 1, 6, 7])
    assert_same_training(job, want, 7, rank=7, mute=frozenset({4}))


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_mixture_of_experts_survives_kills_on_its_first_and_last_stage(jobs: Jobs) -> None:
    flags = tiny_gpt(moe=True, iters=6)
    want = undisturbed(launch_flags(4), flags)
    job = jobs.start("moe-killed", launch_flags(6, 2), flags, held=True)
    before = _armed_kills(job, (0, 2, STEADY_TICK), (2, 4, 2))
    job.finished()
    assert [e["lost"] for e in job.events("declared")] == [[0], [2]]
    assert _kept_their_processes(job, before, [2, 3, 6, 7])
    assert_same_training(job, want, 6, rank=7, mute=frozenset({3}))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_upstreams_unmodified_pretrain_gpt_survives_a_kill(jobs: Jobs) -> None:
    where = os.environ.get("DEADPOOL_UPSTREAM")
    if not where:
        pytest.skip("set DEADPOOL_UPSTREAM to a directory with upstream's pretrain_gpt.py")
    script = Path(where) / "pretrain_gpt.py"
    flags = tiny_gpt(iters=6)
    want = jobs.start("upstream-undisturbed", launch_flags(4), flags, script).finished()
    job = jobs.start("upstream-killed", launch_flags(5, 1), flags, script, held=True)
    before = _armed_kills(job, (0, 3, STEADY_TICK))
    job.finished()
    assert _kept_their_processes(job, before, [2, 3, 4, 5, 6, 7])
    assert_same_training(job, want, 6, rank=7)
