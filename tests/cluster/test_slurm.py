"""The batch scripts on a real Slurm of several nodes: a node that Slurm marks down costs the job nothing."""

from __future__ import annotations

import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import slurm
from deadpool_megatron.cluster.coordinator.drain_sources import Slurm as Source
from deadpool_megatron.cluster.coordinator.drain_sources import SourceError
from docs_commands import commands
from jobs import PACED, ROOT, Job, Jobs, assert_same_training, launch_flags, set_pace

pytestmark = [pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not()), pytest.mark.timeout(600)]

_UNDER_WAY = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    made = slurm.Slurm(4)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def checkout(cluster: slurm.Slurm, request: pytest.FixtureRequest) -> Path:
    """A directory that looks like a checkout, where `sbatch` is called."""
    directory = cluster.directory / request.node.name[:60]
    tools = directory / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("scripts", "examples"):
        (directory / name).symlink_to(ROOT / name)
    deadpool = tools / "deadpool"
    deadpool.write_text(f'#!/usr/bin/env bash\nPYTHONPATH={ROOT} exec {sys.executable} -m deadpool_megatron.cli "$@"\n')
    deadpool.chmod(deadpool.stat().st_mode | stat.S_IXUSR)
    return directory


def _state(cluster: slurm.Slurm, number: str) -> str:
    return cluster.job(number)["JobState"]


def _ended(cluster: slurm.Slurm, number: str) -> dict[str, str]:
    cluster.until("end of the job", lambda: _state(cluster, number) not in _UNDER_WAY)
    return cluster.job(number)


# ---- training, and the loss of a node


class SlurmJob(Job):
    """A job that a batch script has started."""

    def __init__(self, cluster: slurm.Slurm, number: str, directory: Path) -> None:
        self.cluster, self.number = cluster, number
        self.run_dir = directory / "runs" / f"{number}.0"
        self.hash_file = directory / "hash.json"
        self._out = directory / f"deadpool-tiny-{number}.out"
        self._environment = None

    def until(self, what: str, find: Callable[[], Any], deadline_s: float = 180.0) -> Any:
        """Poll until ``find`` gives something; fails when the job ends first."""

        def found() -> Any:
            ended = _state(self.cluster, self.number) not in _UNDER_WAY
            value = find()
            assert value or not ended, f"the job ended before {what}\n{self.log_tails()}\n{self.cluster.logs()}"
            return value

        return self.cluster.until(what, found)


def _undisturbed(directory: Path, nodes: int, more: list[str]) -> Job:
    """The batch script's training, without Slurm and without a failure."""
    flags = (ROOT / "examples" / "cpu_tiny.args").read_text().split()
    one = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    jobs = Jobs(directory)
    try:
        return jobs.start("undisturbed", launch_flags(nodes, slots=1), [*flags, *one, *more]).finished()
    finally:
        jobs.end()


def _held(cluster: slurm.Slurm, checkout: Path, *more: str) -> tuple[SlurmJob, Path]:
    """Three nodes train and one waits; node 1 is n2, node 2 prints, the batch script is on node 0 (n1).

    The job is held until the spare is there, and slow until the test lets it go: a busy machine takes long for both. It
    is past iteration 3; with it comes the file of its pace.
    """
    pace, examples = checkout / "pace", checkout / "examples"
    examples.unlink()
    examples.mkdir()
    (examples / "cpu_tiny.args").symlink_to(ROOT / "examples" / "cpu_tiny.args")
    (examples / "pretrain_gpt.py").symlink_to(PACED)
    set_pace(pace, "hold 0")
    number = cluster.command(
        *["sbatch", "--parsable", "--nodes=4", "scripts/slurm/pretrain_tiny.sbatch", *more],
        *["--deadpool-state-hash", str(checkout / "hash.json")],
        directory=checkout,
        PACE_FILE=str(pace),
    )
    job = SlurmJob(cluster, number, checkout)
    job.until_event("parked")
    set_pace(pace, 0.5)
    job.until("iteration 3", lambda: [e for e in job.events("iteration") if e["iteration"] >= 3])
    return job, pace


def test_a_node_that_slurm_marks_down_is_replaced_and_the_run_ends_bitwise_equal(
    cluster: slurm.Slurm, checkout: Path, tmp_path: Path
) -> None:
    iterations = 24
    more = ["--train-iters", str(iterations), "--global-batch-size", "6"]
    job, pace = _held(cluster, checkout, *more)
    before = job.pids()
    cluster.kill_node("n2")
    set_pace(pace, 0)
    job.until_event("resumed")
    ended = _ended(cluster, job.number)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.log_tails()
    cluster.until("n2 marked down by Slurm", lambda: cluster.states()["n2"] == "down")
    assert [e["lost"] for e in job.events("declared")] == [[1]]
    after = job.pids()
    assert {r: after[r] for r in (0, 2)} == {r: before[r] for r in (0, 2)}

    assert_same_training(job, _undisturbed(tmp_path, 3, more), iterations, rank=2)
    cluster.restart_node("n2")


def test_scontrol_tells_who_is_drained(cluster: slurm.Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    assert Source({"SLURM_JOB_NODELIST": "n[1-3]"}).ask() == {}
    for name in ("n2", "n4"):
        cluster.command("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=its fan is loud")
    try:
        (told,) = Source({"SLURM_JOB_NODELIST": "n[1-3]"}).ask().items()
        assert told[0] == "n2" and told[1].startswith("Slurm has it as IDLE+DRAIN")
        assert told[1].endswith("(its fan is loud)")
        assert [*Source({}).ask()] == ["n2", "n4"]
    finally:
        cluster.command("scontrol", "update", "NodeName=n2,n4", "State=RESUME")
    with pytest.raises(SourceError, match="scontrol"):
        Source({"SLURM_JOB_NODELIST": "nobody"}).ask()


@pytest.mark.slow
def test_a_node_that_slurm_drains_is_moved_out_while_it_is_healthy(cluster: slurm.Slurm, checkout: Path) -> None:
    more = ["--train-iters", "40", "--global-batch-size", "6"]
    job, pace = _held(cluster, checkout, *more, "--deadpool-drain-from", "slurm", "--deadpool-drain-poll", "1")
    cluster.command("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=its fan is loud")
    try:
        job.until("node 1 has left", lambda: [e for e in job.events("left") if e["node"] == 1])
        set_pace(pace, 0)
        ended = _ended(cluster, job.number)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.log_tails()
    finally:
        cluster.command("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)
    assert "DRAIN (its fan is loud)" in job.events("drain_wanted")[0]["cause"]
    assert [e["lost"] for e in job.events("declared")] == [[1]] and job.events("declared")[0]["nodes"] == [0, 3, 2]


@pytest.mark.slow
def test_a_job_at_its_time_limit_goes_on_from_the_durable_tier_in_its_next_start_bitwise(
    cluster: slurm.Slurm, checkout: Path, tmp_path: Path
) -> None:
    more = ["--train-iters", "30"]
    durable = ["--deadpool-durable-dir", f"{checkout}/generations", "--deadpool-durable-interval", "0"]
    durable += ["--deadpool-resume", "auto", "--deadpool-on-preempt", "--deadpool-state-hash", f"{checkout}/hash.json"]
    number = cluster.command(
        *["sbatch", "--parsable", "--requeue", "--export=ALL,MAX_REQUEUES=1", *TINY.split()[1:], *more, *durable],
        directory=checkout,
    )
    job = SlurmJob(cluster, number, checkout)
    job.until("iteration 5", lambda: [e for e in job.events("iteration") if e["iteration"] >= 5])
    cluster.command("scancel", "--batch", "--signal=USR1", number)  # what #SBATCH --signal=B:USR1@600 asks for
    cluster.until("the second start", lambda: (checkout / "runs" / f"{number}.1" / "events.jsonl").exists())
    assert _ended(cluster, number)["JobState"] == "COMPLETED", job.output
    assert "exit code 74; job" in job.output
    first = max(e["iteration"] for e in job.events("iteration"))
    job.run_dir = checkout / "runs" / f"{number}.1"
    again = [e["iteration"] for e in job.events("iteration")]
    assert 0 < again[0] <= first + 1 < 29 and again[-1] == 29
    assert job.hashes() == _undisturbed(tmp_path, 2, more).hashes()


TINY, LARGE = "sbatch scripts/slurm/pretrain_tiny.sbatch", "sbatch scripts/slurm/pretrain_65b.sbatch"
STATUS, INJECT = "deadpool status --run-dir runs/JOBID.0", "deadpool inject --run-dir runs/JOBID.0 --node 1"


def test_every_command_of_the_page_is_run_here() -> None:
    assert commands(ROOT / "docs" / "slurm.md", "sbatch", "deadpool") == [TINY, STATUS, INJECT, LARGE]


@pytest.mark.slow
def test_the_commands_of_the_page_do_what_it_says(cluster: slurm.Slurm, checkout: Path) -> None:
    tools = f"{checkout}/.venv/bin:{cluster.environment['PATH']}"
    submitted = cluster.command(*TINY.split(), directory=checkout)
    job = SlurmJob(cluster, submitted.split()[-1], checkout)
    job.until_event("parked")
    job.until_event("iteration")
    inject, status = (text.replace("JOBID", job.number).split() for text in (INJECT, STATUS))
    cluster.command(*inject, directory=checkout, PATH=tools)
    job.until_event("resumed")
    assert "node" in cluster.command(*status, directory=checkout, PATH=tools)
    assert _ended(cluster, job.number)["JobState"] == "COMPLETED"
    assert [e["lost"] for e in job.events("declared")] == [[1]]


# ---- exit codes, the queue, and the end; the training script is a few lines of Python


def _submit(cluster: slurm.Slurm, checkout: Path, program: str, *options: str) -> str:
    (checkout / "script.py").write_text(program)
    return cluster.command(
        *["sbatch", "--parsable", "--nodes=2", "--output=out", "--open-mode=append", *options],
        *["scripts/slurm/run.sh", "0", "1", "script.py"],
        directory=checkout,
        PATH=f"{checkout}/.venv/bin:{cluster.environment['PATH']}",
    )


_SLEEP = (
    "import os, pathlib, time\n"
    "start = os.environ.get('SLURM_RESTART_COUNT', '0')\n"
    "pathlib.Path(f\"up-{start}-{os.environ['RANK']}\").touch()\n"
    "time.sleep(600 * (start == '0'))\n"
)


def _asleep(cluster: slurm.Slurm, checkout: Path, *options: str) -> str:
    number = _submit(cluster, checkout, _SLEEP, *options)
    cluster.until("two sleeping workers", lambda: len(list(checkout.glob("up-0-*"))) == 2)
    return number


def test_the_exit_code_of_the_job_is_that_of_the_script_and_its_reason_is_in_the_output(
    cluster: slurm.Slurm, checkout: Path
) -> None:
    number = _submit(cluster, checkout, "import os, sys\nsys.exit(5 if os.environ['RANK'] == '1' else 0)\n")
    ended = _ended(cluster, number)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "5:0"), (checkout / "out").read_text()
    assert re.search(r"deadpool: rank 1 on node 1 \(\S+\) failed \(exit code 5\)", (checkout / "out").read_text())


@pytest.mark.slow
def test_the_signal_before_the_time_limit_ends_the_job_in_order_and_puts_it_back_into_the_queue(
    cluster: slurm.Slurm, checkout: Path
) -> None:
    number = _asleep(cluster, checkout, "--requeue", "--export=ALL,MAX_REQUEUES=1")
    cluster.command("scancel", "--batch", "--signal=USR1", number)  # what #SBATCH --signal=B:USR1@600 asks for
    cluster.until("the second start", lambda: len(list(checkout.glob("up-1-*"))) == 2)
    assert _ended(cluster, number)["JobState"] == "COMPLETED"
    out = (checkout / "out").read_text()
    assert "goes back into the queue" in out and out.count("2 nodes, 0 of them spares") == 2
    assert (checkout / "runs" / f"{number}.0").is_dir() and (checkout / "runs" / f"{number}.1").is_dir()


@pytest.mark.slow
def test_a_cancelled_job_leaves_no_process_and_does_not_come_back(cluster: slurm.Slurm, checkout: Path) -> None:
    number = _asleep(cluster, checkout, "--requeue", "--export=ALL,MAX_REQUEUES=1")
    cluster.command("scancel", number)
    assert _ended(cluster, number)["JobState"] == "CANCELLED"
    cluster.until("no process of the job", lambda: not cluster.processes_of(number))


def test_the_large_batch_script_is_accepted_by_slurm_and_starts_what_its_config_says(
    cluster: slurm.Slurm, checkout: Path
) -> None:
    """With the demo's model in the place of 65B, and a script that only shows its arguments."""
    program = "import os, sys\nopen('args-' + os.environ['RANK'], 'w').write(' '.join(sys.argv))\n"
    (checkout / "script.py").write_text(program)
    tiny = (ROOT / "configs" / "cpu_tiny.yaml").read_text()
    one = tiny.replace("parallel-size: 2", "parallel-size: 1").replace("gpus_per_node: 2", "gpus_per_node: 1")
    (checkout / "tiny.yaml").write_text(one)
    number = cluster.command(
        *["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--output=out", "--time=20"],
        *[*LARGE.split()[1:], "--train-iters", "7"],
        directory=checkout,
        CONFIG="tiny.yaml",
        SPARES="0",
        GPUS="1",
        SAVE=f"{checkout}/save",
        SCRIPT="script.py",
        AGENT_FLAGS="--emulate-cpu",
    )
    ended = _ended(cluster, number)
    assert ended["JobState"] == "COMPLETED", (checkout / "out").read_text()
    assert ended["Requeue"] == "1"
    arguments = [(checkout / f"args-{rank}").read_text().split() for rank in range(2)]
    assert arguments[0] == arguments[1]
    assert arguments[0][:3] == [str(checkout / "script.py"), "--num-layers", "4"]
    assert arguments[0][-2:] == ["--train-iters", "7"] and f"{checkout}/save" in arguments[0]
