"""All is killed, preempted or lost beyond what memory covers, for real; the durable tier brings it back bitwise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.vault import PREFIX, Arena, Version
from flags import tiny_gpt
from jobs import EXAMPLE, ROOT, Job, Jobs, alone, assert_same_checkpoint, launch_flags
from machines import Machines, MachinesJob

ITERATIONS = 24
SMALL = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]


def flags(iterations: int = ITERATIONS) -> list[str]:
    """Data parallel alone, one process a node, and a learning-rate schedule that goes on to the end."""
    return [*tiny_gpt(iters=iterations), *SMALL, "--global-batch-size", "16", "--lr-decay-iters", str(iterations)]


def durable(directory: Path, interval: int, *more: str) -> list[str]:
    return ["--deadpool-durable-dir", str(directory), "--deadpool-durable-interval", str(interval), *more]


def until_durable(job: Job, generation: int) -> None:
    job.until(f"generation {generation} durable", lambda: [
        e for e in job.events("durable") if e["iteration"] >= generation
    ])  # fmt: skip


def assert_goes_on_like(job: Job, want: Job, first: int) -> None:
    """Every iteration from ``first`` on is the undisturbed run's, and so is all state at the end."""
    expected = {iteration: exact for iteration, *exact in want.exact()}
    seen = {iteration: exact for iteration, *exact in job.exact()}
    assert min(seen) == first and max(seen) == max(expected)
    assert all(expected[iteration] == exact for iteration, exact in seen.items())
    assert job.hashes() == want.hashes()


SAVED = 4


@pytest.fixture(scope="module")
def undisturbed(module_jobs: Jobs) -> Job:
    """Saves Megatron's own checkpoints too, so that an exported one can be compared."""
    save = ["--save", str(module_jobs.directory / "own"), "--save-interval", "1", "--ckpt-format", "torch_dist"]
    return module_jobs.start("undisturbed", launch_flags(2, 0, 1), [*flags(), *save]).finished(300)


@pytest.fixture(scope="module")
def killed(module_jobs: Jobs) -> Path:
    """The durable directory of a job of which nothing is left."""
    store = module_jobs.directory / "store"
    job = module_jobs.start("killed", launch_flags(2, 0, 1), [*flags(), *durable(store, SAVED)], held=True)
    job.hold(2 * SAVED + 2)
    until_durable(job, SAVED)
    job.kill_everything()
    return store


@pytest.mark.timeout(400)
def test_a_job_killed_whole_and_then_preempted_goes_on_bitwise_both_times(
    jobs: Jobs, undisturbed: Job, killed: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(killed, tmp_path / "store"))
    generations = sorted(int(p.parent.name.split("-")[1]) for p in store.glob("*/manifest.json"))
    assert generations and len(generations) <= 2
    newest = generations[-1]

    more = durable(store, 1000, "--deadpool-resume", "auto", "--deadpool-on-preempt")
    preempted = jobs.start("preempted", launch_flags(2, 0, 1), [*flags(), *more], held=True)
    preempted.hold(newest + 4)  # or it may have come to its end before its drain has
    preempted.until("a newer commit", lambda: [e for e in preempted.events("committed") if e["iteration"] > newest])
    for each in preempted.processes():  # as a batch system does it: every process is told
        each.send_signal(signal.SIGTERM)
    assert preempted.wait() == Exit.PREEMPTED, preempted.log_tails()
    last = preempted.events("durable")[-1]["iteration"]
    assert f"training goes on from durable generation {newest}" in preempted.output
    assert f"preempted: generation {last} is durable in {store}" in preempted.output
    assert preempted.exact()[0][0] == newest and last > newest

    resumed = jobs.start("resumed", launch_flags(2, 0, 1), [*flags(), *more]).finished(300)
    assert resumed.events("durable_resumed")[0]["iteration"] == last
    assert "not the settings of durable generation" not in resumed.output  # the same flags are the same settings
    assert_goes_on_like(resumed, undisturbed, last)


@pytest.mark.timeout(300)
def test_a_second_job_is_refused_while_the_owner_of_the_directory_lives_and_changes_nothing(
    jobs: Jobs, killed: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(killed, tmp_path / "store"))
    more = durable(store, 12, "--deadpool-resume", "auto")
    owner = jobs.start("owner", launch_flags(2, 0, 1), [*flags(), *more], held=True)
    owner.hold(10)
    owner.until_event("training")
    first = owner.status()["coordinator_pid"]
    os.kill(first, signal.SIGKILL)  # it is started again, as the owner
    owner.until("another coordinator", lambda: owner.status()["coordinator_pid"] != first)

    def there() -> dict[str, int]:
        files = [p for p in store.rglob("*") if p.is_file() and not p.name.startswith(("owner-", "."))]
        return {str(p): p.stat().st_mtime_ns for p in files}

    was = there()
    second = jobs.start("second", launch_flags(2, 0, 1), [*flags(), *more])
    assert second.wait() == Exit.USAGE, second.log_tails()
    last = second.output.splitlines()[-1]
    assert last.startswith(f"deadpool: --deadpool-durable-dir {store} belongs to job ")
    assert last.endswith("; end that job, or give this one another directory")
    assert there() == was
    owner.hold(ITERATIONS - 2)
    until_durable(owner, 12)
    owner.hold(None)
    owner.finished(300)
    assert not owner.events("durable_taken") and not owner.events("durable_failed")
    assert json.loads(max(store.glob("owner-*.json")).read_text())["ended"], "the next job need not wait"


@pytest.mark.timeout(200)
def test_a_job_of_another_model_or_with_nothing_said_is_refused_with_the_way_out(jobs: Jobs, killed: Path) -> None:
    store = killed
    anew = jobs.start("anew", launch_flags(2, 0, 1), [*flags(), *durable(store, 5)])
    assert anew.wait() == Exit.USAGE
    assert "of an earlier job: give --deadpool-resume auto to go on from there" in anew.output
    more = durable(store, 5, "--deadpool-resume", "auto")
    wider = jobs.start("wider", launch_flags(2, 0, 1), [*flags(), "--hidden-size", "128", *more])
    assert wider.wait() == Exit.USAGE, wider.log_tails()
    assert "is not of this job: " in wider.output and "hidden_size is 64 in it and 128 here" in wider.output
    assert len([line for line in wider.output.splitlines() if "stood still" not in line]) <= 2
    relu = jobs.start("relu", launch_flags(2, 0, 1), [*flags(), "--squared-relu", *more])
    assert relu.wait() == Exit.USAGE and "squared_relu is False in it and True here" in relu.output
    other = jobs.start("other", launch_flags(4, 0, 1), [*flags(), "--tensor-model-parallel-size", "2", *more])
    assert other.wait() == Exit.USAGE, other.log_tails()
    assert "tensor_model_parallel_size is 1 in it and 2 here" in other.output
    batch = jobs.start("batch", launch_flags(4, 0, 1), [*flags(), "--global-batch-size", "32", *more])
    assert batch.wait() == Exit.USAGE, batch.log_tails()
    assert "global_batch_size is 16 in it and 32 here" in batch.output


def _global_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A ``torch_dist`` checkpoint's model parameters, whole, by name."""
    whole = Path(f"{checkpoint}.pt")
    dcp_to_torch_save(checkpoint, whole)
    content = torch.load(whole, weights_only=False)
    return {k: v for k, v in content.items() if isinstance(v, torch.Tensor) and not k.startswith("optimizer")}


@pytest.mark.timeout(400)
def test_an_exported_generation_is_the_checkpoint_megatron_itself_saves_and_loads_at_another_layout(
    jobs: Jobs, undisturbed: Job, killed: Path, tmp_path: Path
) -> None:
    exported, own = tmp_path / "exported", undisturbed.run_dir.parent / "own"
    # A generation that a busy machine skips is not drained, the next one is.
    generation = int(max(killed.glob("*/manifest.json")).parent.name.split("-")[1])
    command = [sys.executable, "-m", "deadpool_megatron.cli", "export", "--durable-dir", str(killed)]
    command += ["--output", str(exported), "--generation", str(generation), "--emulate-cpu"]
    command += ["--run-dir", str(tmp_path / "run")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert f"--load {exported}" in done.stdout
    assert_same_checkpoint(exported / f"iter_{generation:07d}", own / f"iter_{generation:07d}")

    # Plain Megatron, without us, with tensors split over two ranks; it saves what it has loaded.
    again = tmp_path / "again"
    load = ["--load", str(exported), "--no-load-optim", "--no-load-rng", "--no-save-optim", "--no-save-rng"]
    load += ["--save", str(again), "--save-interval", "1000", "--ckpt-format", "torch_dist"]
    load += ["--train-iters", str(generation)]
    alone(tmp_path, 2, [*flags(), *load, "--tensor-model-parallel-size", "2"])
    loaded, wanted = _global_tensors(again / f"iter_{generation:07d}"), _global_tensors(own / f"iter_{generation:07d}")
    assert len(wanted) > 10 and set(loaded) == set(wanted)
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())


def lose_with_its_copy(job: Job, node: int, rank: int) -> None:
    """A node is gone, and what its peer keeps of its rank is not what was written: memory has nothing left of it."""
    agents = {n["node"]: n["agent_pid"] for n in job.status()["nodes"]}

    def newest(kind: str) -> Version:
        (path,) = Path("/dev/shm").glob(f"{PREFIX}{job.process.pid}-*-{rank}-{kind}")
        arena = Arena.attach(str(path))
        written = [slot.version for slot in arena.slots if (slot.sealed if kind == "own" else slot.complete)]
        arena.close()
        return max(version for version in written if version)

    def nothing_is_on_its_way() -> bool:
        os.kill(agents[node], signal.SIGSTOP)  # sends nothing more
        if newest("own") == newest("peer"):
            return True
        os.kill(agents[node], signal.SIGCONT)
        return False

    job.until("all that is written at its peer, too", nothing_is_on_its_way)
    assert job.spoil_copies(rank) == 2  # both slots of one copy
    os.kill(agents[node], signal.SIGKILL)


@pytest.mark.timeout(400)
def test_when_memory_cannot_answer_a_survivor_and_a_spare_go_back_to_the_durable_generation_bitwise(
    jobs: Jobs, undisturbed: Job, tmp_path: Path
) -> None:
    newest = 10
    job = jobs.start("beyond", launch_flags(3, 1, 1), [*flags(), *durable(tmp_path, newest)], held=True)
    job.hold(newest + 6)  # so far on that nobody remembers the microbatches of then
    until_durable(job, newest)
    job.until("some iterations more", lambda: job.exact() and job.exact()[-1][0] == newest + 5)
    before = job.pids()
    lose_with_its_copy(job, 0, 0)
    job.hold(None)
    job.finished(300)
    (fallback,) = job.events("durable_fallback")
    assert "more nodes were lost than the redundancy covers" in job.output and ": no " in fallback["message"]
    assert f"training goes back to durable generation {fallback['iteration']}" in job.output
    back = fallback["iteration"]
    assert back in [e["iteration"] for e in job.events("durable")] and back >= newest
    assert job.pids()[1] == before[1]  # the survivor kept its process
    expected = {iteration: exact for iteration, *exact in undisturbed.exact()}
    assert [iteration for iteration, *_ in job.exact()].count(back + 1) == 2  # it was done again
    assert all(expected[iteration] == exact for iteration, *exact in job.exact())
    assert job.hashes() == undisturbed.hashes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_without_a_spare_and_without_a_way_to_save_leaves_what_the_survivors_hold(
    jobs: Jobs, undisturbed: Job, tmp_path: Path
) -> None:
    job = jobs.start("spareless", launch_flags(2, 0, 1), [*flags(), *durable(tmp_path, 1000)], held=True)
    job.arm((1, 9, 2))
    assert job.wait() == Exit.NO_SPARE
    (made,) = job.events("durable")
    assert f"generation {made['iteration']} is durable in {tmp_path}" in job.output
    goes_on = [*flags(), *durable(tmp_path, 1000, "--deadpool-resume", "auto")]
    again = jobs.start("again", launch_flags(2, 0, 1), goes_on).finished()
    assert_goes_on_like(again, undisturbed, made["iteration"])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("told", [0, 1])
def test_one_machine_that_is_told_to_leave_makes_all_leave_with_what_is_committed(
    jobs: Jobs, tmp_path: Path, told: int
) -> None:
    machines = Machines(tmp_path)
    try:
        line = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{machines.port}", "--emulate-cpu"]
        store = tmp_path / "store"
        script = [str(EXAMPLE), *flags(400), "--deadpool", *durable(store, 1000, "--deadpool-resume", "auto")]
        for n in (0, 1):
            machines.start([*line, "--node-rank", str(n)], [*script, "--deadpool-on-preempt"])
        job = MachinesJob(machines)
        job.until("a commit", lambda: [e for e in job.events("committed") if e["iteration"] > 2])
        machines.started[told].send_signal(signal.SIGTERM)
        assert machines.codes() == [Exit.PREEMPTED, Exit.PREEMPTED], machines.outputs()
        last = job.events("durable")[-1]["iteration"]
        assert f"preempted: generation {last} is durable" in machines.output(0)
        machines.until_gone()
    finally:
        machines.end()


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_more_nodes_lost_than_memory_covers_go_back_to_the_durable_generation_bitwise(
    jobs: Jobs, tmp_path: Path, schedule: str
) -> None:
    script = [*tiny_gpt(schedule, iters=40), "--lr-decay-iters", "40"]  # type: ignore[arg-type]
    want = jobs.start(f"{schedule}-undisturbed", launch_flags(4), script).finished()
    job = jobs.start(f"{schedule}-beyond", launch_flags(6, 2), [*script, *durable(tmp_path, 6)])
    until_durable(job, 6)
    before = job.pids()
    status = job.status()
    agents = {n["node"]: n["agent_pid"] for n in status["nodes"]}
    pair = status["protection"]["fatal"][0]  # a node and its peer, together: their shards are nowhere any more
    survivors = [c["rank"] for c in status["coordinates"] if c["node"] not in pair]
    assert len(pair) == 2 and len(survivors) == 4
    for node in pair:
        os.kill(agents[node], signal.SIGSTOP)
    for node in pair:
        os.kill(agents[node], signal.SIGKILL)
    job.finished(300)
    (fallback,) = job.events("durable_fallback")
    assert "training goes back to durable generation" in job.output
    back = fallback["iteration"]
    assert back in [e["iteration"] for e in job.events("durable")]
    after = job.pids()
    assert [before[r] for r in survivors] == [after[r] for r in survivors]  # they kept their processes
    expected = {iteration: exact for iteration, *exact in want.exact()}
    again = [iteration for iteration, *_ in job.exact()].count(back)
    assert again >= 1
    for iteration, *exact in job.exact():
        assert exact == expected[iteration], f"iteration {iteration} differs"
    assert job.hashes() == want.hashes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_goes_on_and_the_user_is_told_while_the_directory_is_away(jobs: Jobs, tmp_path: Path) -> None:
    store = tmp_path / "store"
    job = jobs.start("away", launch_flags(2, 0, 1), [*flags(400), *durable(store, 5)])
    until_durable(job, 5)
    store.rename(tmp_path / "away")
    failed = job.until_event("durable_failed")
    assert "is not there (any more); training goes on, generation" in failed["message"]
    (tmp_path / "away").rename(store)
    at = job.events("durable")[-1]["iteration"]
    until_durable(job, at + 1)
    assert failed["message"] in job.output
    job.kill_everything()
    manifest = max(store.glob("*/manifest.json"))
    assert json.loads(manifest.read_text())["generation"] > at
