"""The launcher as a plain one, and every way to end it: exit codes as the scripts', and nothing stays behind.

Most of these run a few lines of Python instead of Megatron: what is tested is the launcher, its agents and workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from deadpool_megatron.cluster.records.exits import Exit, what_to_do
from deadpool_megatron.observe import ERROR
from flags import duo_gpt, tiny_gpt
from jobs import ENDED_BY, Job, Jobs, launch_flags


def _plain(jobs: Jobs, program: str, *more: str, nodes: int = 2, slots: int = 2) -> Job:
    script = jobs.directory / "script.py"
    script.write_text(program)
    launch = ["--local-nodes", str(nodes), "--nproc-per-node", str(slots), *more]
    return jobs.start("run", launch, ["--some-flag", "7"], script, deadpool=False)


def _said(job: Job) -> list[str]:
    """Our lines but for the last one of a job that did not end well, which says what to do."""
    return [x for x in job.output.splitlines() if x.startswith("deadpool: ") and "; what to do: " not in x]


# ---- plain mode


def test_every_worker_finds_the_environment_and_arguments_torchrun_would_give(jobs: Jobs) -> None:
    job = _plain(
        jobs,
        "import json, os, sys, pathlib\n"
        "e = {k: os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')}\n"
        "pathlib.Path(__file__).with_name('env-' + e['RANK']).write_text(json.dumps([e, sys.argv[1:], __name__]))\n",
    ).finished()
    for rank in range(4):
        env, argv, name = json.loads((jobs.directory / f"env-{rank}").read_text())
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank % 2))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"]) == ("4", "2", "127.0.0.1")
        assert argv == ["--some-flag", "7"] and name == "__main__"
    assert not _said(job)


def test_the_workers_can_rendezvous_as_under_torchrun(jobs: Jobs) -> None:
    _plain(
        jobs,
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.ones(1); dist.all_reduce(x)\n"
        "assert x.item() == dist.get_world_size() == 4\n"
        "dist.destroy_process_group()\n",
    ).finished()


def test_a_module_is_run_as_by_python_itself(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    package = jobs.directory / "recipes"
    package.mkdir()
    (package / "__init__.py").write_text("WHO = 'recipes'\n")
    program = "import os, sys, pathlib\nfrom . import WHO\n"
    program += (
        "pathlib.Path('ran-' + os.environ['RANK']).write_text(f'{__name__} {__package__} {WHO} {sys.argv[1:]}')\n"
    )
    (package / "tiny.py").write_text(program)
    monkeypatch.chdir(jobs.directory)
    launch = ["--standalone", "--nnodes=1", "--local-nodes", "2", "--nproc_per_node", "1", "-m"]
    jobs.start("run", launch, ["--lr", "1"], Path("recipes.tiny"), deadpool=False).finished()
    for rank in range(2):
        assert (jobs.directory / f"ran-{rank}").read_text() == "__main__ recipes recipes ['--lr', '1']"


@pytest.mark.parametrize(
    ("end", "code", "how"),
    [
        ("sys.exit(3)", 3, "exit code 3"),
        ("raise ValueError('no such thing')", 1, "exit code 1"),
        ("os.kill(os.getpid(), 9)", 1, "signal 9"),
    ],
)
def test_the_first_worker_that_fails_ends_the_job_with_its_code(jobs: Jobs, end: str, code: int, how: str) -> None:
    job = _plain(jobs, f"import os, sys, time\nif os.environ['RANK'] == '3':\n    {end}\ntime.sleep(600)\n")
    assert job.wait() == code
    log = job.run_dir / "logs" / "rank-3.log"
    (first,) = _said(job)
    why = "; see its log" if "raise" not in end else ": ValueError: no such thing"
    assert first.startswith("deadpool: rank 3 on node 1 (") and first.endswith(f" failed ({how}){why}")
    assert f"\n    its log: {log}\ndeadpool: {what_to_do(code)}\n" in job.output
    error = json.loads((job.run_dir / ERROR).read_text())["message"]
    assert error["errorCode"] == code and f"failed ({how})" in error["message"]
    job.until_gone(60)
    if "raise" in end:
        assert "ValueError: no such thing" in log.read_text()
        mine = json.loads((log.parent / "error-node1-1.json").read_text())["message"]
        assert mine["message"] == "ValueError: no such thing" and "Traceback" in mine["extraInfo"]["py_callstack"]


# ---- ends


_SLEEP = (
    "import os, pathlib, time\npathlib.Path(__file__).with_name('up-' + os.environ['RANK']).touch()\ntime.sleep(600)\n"
)
_CHILD = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"


def _sleeping(jobs: Jobs, children: bool, *more: str) -> Job:
    job = _plain(jobs, _CHILD + _SLEEP if children else _SLEEP, *more)
    job.until("four sleeping workers", lambda: len(list(jobs.directory.glob("up-*"))) == 4)
    # launcher, coordinator, 2 agents, 4 workers, and a child of each worker (that has no environment while exec works)
    job.until("all processes", lambda: len(job.processes()) == (12 if children else 8))
    job.until("them in its status", lambda: _agents(job) and all(job.pids().values()))
    return job


def _agents(job: Job) -> bool:
    return all(node["agent_pid"] for node in job.status()["nodes"])


@pytest.mark.parametrize("signum", ENDED_BY)
def test_an_interrupt_ends_every_process_the_workers_children_included(jobs: Jobs, signum: signal.Signals) -> None:
    job = _sleeping(jobs, children=True)
    job.process.send_signal(signum)
    code, word = ENDED_BY[signum]
    assert job.wait() == code
    job.until_gone(60)
    (said,) = _said(job)
    assert word in said and job.status()["end"]["code"] == code


def test_the_warning_of_a_batch_system_reaches_what_handles_it_and_ends_nothing_else(jobs: Jobs) -> None:
    script = jobs.directory / "script.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__)\n"
        "def save(signum, frame):\n"
        "    here.with_name('saved-' + os.environ['RANK']).touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "here.with_name('ready-' + os.environ['RANK']).touch()\n"
        "time.sleep(600)\n"
    )
    launch = ["--local-nodes", "2", "--nproc-per-node", "2"]
    job = jobs.start("run", launch, ["--exit-signal-handler"], script, deadpool=False)
    job.until("all workers", lambda: len(list(jobs.directory.glob("ready-*"))) == 4)
    for process in job.processes():  # as a batch system does it: every process is told
        with contextlib.suppress(psutil.NoSuchProcess):  # the first that are told may end the others at once
            process.send_signal(signal.SIGUSR2)
    job.finished()
    assert len(list(jobs.directory.glob("saved-*"))) == 4 and not _said(job)


def test_a_job_that_trains_goes_on_after_the_warning_where_nothing_handles_it(jobs: Jobs) -> None:
    job = jobs.start("warned", launch_flags(2, slots=1), duo_gpt("data", 3), held=True)
    job.until_event("started")
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        for process in job.processes():
            process.send_signal(signum)
    job.until_event("exit_notice")
    job.hold(None)
    job.finished()
    assert max(e["iteration"] for e in job.events("iteration")) == 2


def test_when_the_launcher_is_killed_its_agents_and_workers_end_by_themselves(jobs: Jobs) -> None:
    job = _sleeping(jobs, children=True)
    job.process.kill()
    job.process.wait()
    job.until_gone(60)
    end = job.status()["end"]
    assert job.status()["phase"] == "ended" and end["code"] == Exit.TERMINATED
    assert end["message"].endswith("every process of the job is ended") and job.events("stopped")


def test_a_coordinator_that_is_killed_is_started_again_but_not_for_ever(jobs: Jobs) -> None:
    # Forked, each starts at once: six of them have to die within two minutes, on any machine.
    job = _sleeping(jobs, True, "--emulate-cpu")
    workers = job.pids()
    for _ in range(6):
        killed = job.status()["coordinator_pid"]
        assert job.pids() == workers
        os.kill(killed, signal.SIGKILL)
        job.until("another coordinator", lambda k=killed: job.process.poll() is not None or _coordinator(job) != k, 30)
    assert job.wait() == Exit.RECOVERY_FAILED
    again = "deadpool: the coordinator was ended by signal 9; it is started again"
    over = "deadpool: the coordinator was ended by signal 9 again and again; the job is over"
    assert _said(job) == [*[again] * 5, over]
    assert job.output.endswith(f"deadpool: {what_to_do(Exit.RECOVERY_FAILED)}\n")
    job.until_gone(60)


def _coordinator(job: Job) -> int:
    pid: int = job.status()["coordinator_pid"]
    return pid


def test_the_run_directory_is_locked_against_those_who_remove_old_files(jobs: Jobs) -> None:
    """As systemd-tmpfiles asks before it removes something."""
    job = _sleeping(jobs, children=False)
    directory = os.open(job.run_dir, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    job.process.send_signal(signal.SIGINT)
    job.until_gone(60)
    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(directory)


def test_an_agent_that_dies_in_plain_mode_ends_the_job(jobs: Jobs) -> None:
    job = _sleeping(jobs, children=False)
    os.kill(job.status()["nodes"][1]["agent_pid"], signal.SIGKILL)
    assert job.wait() == Exit.FAILED
    (said,) = _said(job)
    assert "node 1 was lost" in said
    job.until_gone(60)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_training_job_leaves_neither_process_nor_shared_memory_however_it_is_ended(
    jobs: Jobs, signum: signal.Signals
) -> None:
    vaults = jobs.directory / "shm"
    vaults.mkdir()
    launch = ["--local-nodes", "3", "--spare-nodes", "1", "--emulate-cpu", "--shm-directory", str(vaults)]
    flags = [*tiny_gpt("none", iters=100000), "--tensor-model-parallel-size", "1"]
    job = jobs.start("run", launch, flags)
    job.until_event("iteration")
    assert list(vaults.glob("deadpool-*"))
    job.process.send_signal(signum)
    assert job.wait() == (Exit.INTERRUPTED if signum == signal.SIGINT else -signal.SIGKILL)
    job.until_gone(60)
    assert not list(vaults.iterdir())
