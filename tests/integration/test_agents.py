"""`deadpool agent` in the place of torchrun: one command a machine, here several on one.

Most of these run a few lines of Python instead of Megatron; one trains, and loses a whole machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from deadpool_megatron.cluster.records.exits import Exit
from flags import duo_gpt, tiny_gpt
from jobs import ENDED_BY, EXAMPLE, PACED, ROOT, Jobs, assert_same_training, launch_flags, set_pace, undisturbed
from machines import Machines, MachinesJob, torchrun_environments

DUMP = (
    "import json, os, sys, pathlib\n"
    "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'GROUP_WORLD_SIZE']\n"
    "names.append('MASTER_ADDR')\n"
    "e = {k: os.environ[k] for k in names} | {'argv': sys.argv[1:]}\n"
    "assert not any('SECRET' in k for k in os.environ)\n"
    "pathlib.Path(__file__).with_name('env-' + e['RANK']).write_text(json.dumps(e))\n"
)
# Every process that begins, with what it may run on; the first one of rank 1 dies in its second iteration.
MASKS = """
import os, runpy
from pathlib import Path
from megatron.training import training

here, before, steps = Path(__file__).parent, training.train_step, []
(here / f"mask-{{os.environ['RANK']}}-{{os.getpid()}}").write_text(" ".join(map(str, sorted(os.sched_getaffinity(0)))))

def dies_once(*args, **kwargs):
    steps.append(0)
    if os.environ["RANK"] == "1" and len(steps) == 2 and not (here / "died").exists():
        (here / "died").touch()
        os._exit(3)
    return before(*args, **kwargs)

training.train_step = dies_once
runpy.run_path({example!r}, run_name="__main__")
"""
# So small that the processors of any machine are enough.
SMALL_SHARES = "from deadpool_megatron.cluster.agent import pinning\npinning._LEAST, pinning._PER_WORKER = 1, 0\n"
SLEEP = (
    "import os, pathlib, subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "pathlib.Path(__file__).with_name('up-' + os.environ['RANK']).touch()\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    all_machines = Machines(tmp_path)
    yield all_machines
    all_machines.end()


def _script(machines: Machines, program: str) -> list[str]:
    path = machines.directory / "script.py"
    path.write_text(program)
    return [str(path), "--some-flag", "7"]


def _environments(directory: Path, count: int) -> list[dict[str, object]]:
    return [json.loads((directory / f"env-{rank}").read_text()) for rank in range(count)]


# ---- one word is changed


def test_a_torchrun_command_line_gives_the_same_environments_with_one_word_changed(machines: Machines) -> None:
    script = _script(machines, DUMP)
    port = str(machines.port)
    line = ["--nnodes", "2", "--nproc_per_node=2", "--master_addr", "127.0.0.1", "--master_port", port]
    line += ["--max-restarts=0", "--tee", "3", "--log_dir", "logs"]
    want = torchrun_environments(machines.directory, [[*line, "--node_rank", str(n)] for n in (0, 1)], script, 4)
    for n in (1, 0):
        machines.start([*line, "--node_rank", str(n)], script)
    assert machines.codes() == [0, 0]
    got = _environments(machines.directory, 4)
    assert [e["argv"] for e in got] == [["--some-flag", "7"]] * 4
    assert got == want


def test_agents_without_a_rank_get_one_each_whoever_is_first_and_share_no_secret_by_hand(machines: Machines) -> None:
    script = _script(machines, DUMP)
    line = ["--nnodes=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{machines.port}", "--rdzv-id=x"]
    for _ in range(3):
        machines.start(line, script)
    assert machines.codes() == [0, 0, 0]
    assert [e["RANK"] for e in _environments(machines.directory, 3)] == ["0", "1", "2"]
    assert (machines.run_dir / "job.json").stat().st_mode & 0o077 == 0


def test_slurm_and_kubernetes_number_the_nodes_and_a_secret_file_needs_no_shared_directory(machines: Machines) -> None:
    script = _script(machines, DUMP)
    secret = machines.directory / "secret"
    secret.write_text("ab" * 32 + "\n")
    secret.chmod(0o600)
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    env = {"DEADPOOL_SECRET_FILE": str(secret), "PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{machines.port}"}
    machines.start(["--run-dir", "one"], script, env | {"JOB_COMPLETION_INDEX": "1"})
    machines.start(["--run-dir", "two"], script, env | slurm | {"SLURM_PROCID": "0"})
    assert machines.codes() == [0, 0]
    assert len(_environments(machines.directory, 2)) == 2
    assert (machines.directory / "one" / "logs" / "rank-1.log").exists()
    assert (machines.directory / "two" / "logs" / "rank-0.log").exists()


def test_the_coordinator_may_run_on_a_machine_of_its_own_and_gives_the_jobs_code(machines: Machines) -> None:
    script = _script(
        machines,
        "import os, pathlib, sys, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    pathlib.Path(__file__).with_name('up-0').touch()\n"
        "    sys.exit(0)\n"
        "while not pathlib.Path(__file__).with_name('up-0').exists():\n"  # a node that comes later finds no job
        "    time.sleep(0.01)\n"
        "sys.exit(5)\n",
    )
    line = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{machines.port}"]
    for n in (0, 1):
        machines.start([*line, "--node-rank", str(n), "--no-coordinator"], script)
    machines.start(line, script, command="coordinator")
    assert machines.codes() == [5, 5, 5]
    why = re.compile(r"^deadpool: rank 1 on node 1 \(\S+\) failed", re.MULTILINE)
    assert why.search(machines.output(2))
    assert why.search(machines.output(0)), "an agent alone on its machine says why, too"


# ---- refusals


def _refused(machines: Machines, options: Sequence[str], env: dict[str, str] | None = None) -> str:
    machines.start(options, _script(machines, DUMP), env)
    assert machines.codes() == [Exit.USAGE]
    (said,) = [line for line in machines.output(0).splitlines() if line.startswith("deadpool: ")]
    return said


def test_a_coordinator_that_is_not_there_is_said_after_the_join_timeout(machines: Machines) -> None:
    line = ["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", f"127.0.0.1:{machines.port}"]
    assert "nothing listens at 127.0.0.1" in _refused(machines, [*line, "--rdzv-conf", "join_timeout=1"])


def test_something_else_at_the_endpoint_is_said(machines: Machines) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        line = ["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", f"127.0.0.1:{other.getsockname()[1]}"]
        said = _refused(machines, [*line, "--rdzv-conf", "join_timeout=2"], {"DEADPOOL_SECRET": "cd" * 32})
        assert "listens but does not answer" in said


def test_a_port_in_use_is_said_by_the_node_that_hosts_the_coordinator(machines: Machines) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = _refused(machines, ["--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", f"127.0.0.1:{port}"])
    assert f"cannot listen on 127.0.0.1:{port}" in said


def test_agents_that_disagree_and_agents_too_many_are_sent_away_and_the_job_goes_on(machines: Machines) -> None:
    script = _script(machines, DUMP)
    line = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{machines.port}"]
    machines.start([*line, "--node-rank", "0"], script)
    machines.until("the coordinator", lambda: (machines.run_dir / "job.json").exists())
    others = [
        (["--nnodes", "3", *line[2:], "--node-rank", "1"], "was started with --nnodes 3, the coordinator with 2"),
        ([*line, "--node-rank", "1", "--nproc-per-node", "2"], "with --nproc-per-node 2, the coordinator with 1"),
        ([*line, "--node-rank", "0", "--no-coordinator"], "is taken by"),
        ([*line, "--node-rank", "1", "--rdzv-id", "other"], ""),
    ]
    for options, _ in others[:3]:
        machines.start(options, script)
    for i, (_, why) in enumerate(others[:3], start=1):
        assert machines.code(i) == Exit.USAGE
        assert why in machines.output(i)
    machines.start([*line, "--node-rank", "1"], script)
    assert machines.code(0) == machines.code(4) == 0


# ---- ends


def _sleeping(machines: Machines, *more: str) -> None:
    script = _script(machines, SLEEP)
    for n in (0, 1):
        line = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{machines.port}", "--node-rank", str(n)]
        machines.start([*line, *more], script)
    machines.until("two sleeping workers", lambda: len(list(machines.directory.glob("up-*"))) == 2)
    # the command, its agent, a worker and the worker's child on both; and the coordinator
    assert len(machines.processes()) == 9


@pytest.mark.parametrize("signum", ENDED_BY)
def test_an_interrupt_where_the_coordinator_is_ends_the_job_on_every_machine(
    machines: Machines, signum: signal.Signals
) -> None:
    _sleeping(machines)
    machines.started[0].send_signal(signum)
    code, word = ENDED_BY[signum]
    assert machines.codes() == [code, code]
    machines.until_gone()
    assert word in machines.output(0) and word in machines.output(1)


def test_a_command_that_is_killed_takes_its_machines_processes_along(machines: Machines) -> None:
    _sleeping(machines)
    machines.started[1].kill()
    assert machines.code(0) == Exit.FAILED and "node 1 was lost" in machines.output(0)
    machines.until_gone()


def test_agents_whose_coordinator_is_gone_for_good_end_by_themselves_and_say_so(machines: Machines) -> None:
    _sleeping(machines, "--rdzv-conf", "coordinator_timeout=2")
    machines.kill_tree(0)
    assert machines.code(1) == Exit.RECOVERY_FAILED
    assert "the coordinator has been gone for 2 s" in machines.output(1)
    machines.until_gone()


@pytest.mark.parametrize("gone", ["the coordinator", "a command"])
def test_with_preemption_notices_a_command_s_end_is_no_notice(machines: Machines, gone: str) -> None:
    script = _script(machines, SLEEP)
    durable = str(machines.directory / "durable")
    script += ["--deadpool", "--deadpool-on-preempt", "--deadpool-durable-dir", durable]
    for n in (0, 1):
        line = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{machines.port}", "--node-rank", str(n)]
        machines.start([*line, "--emulate-cpu", "--rdzv-conf", "coordinator_timeout=2"], script)
    machines.until("two sleeping workers", lambda: len(list(machines.directory.glob("up-*"))) == 2)
    if gone == "the coordinator":
        machines.kill_tree(0)
        assert machines.code(1) == Exit.RECOVERY_FAILED
        assert "the coordinator has been gone for 2 s" in machines.output(1)
    else:
        machines.started[1].kill()
        assert machines.code(0) == Exit.NO_SPARE and "node 1" in machines.output(0)
    machines.until_gone()


# ---- training


@pytest.mark.timeout(300)
def test_training_under_agents_loses_a_machine_takes_it_back_as_a_spare_and_ends_bitwise_equal(
    machines: Machines, jobs: Jobs
) -> None:
    iterations = 20
    flags = [*tiny_gpt("none", iters=iterations), "--tensor-model-parallel-size", "1"]
    want = undisturbed(launch_flags(2, slots=1), flags)
    hash_file = Path(f"{machines.run_dir}.hash.json")
    script = [str(PACED), *flags, "--deadpool", "--deadpool-state-hash", str(hash_file)]
    line = ["--nnodes", "3", "--spare-nodes", "1", "--emulate-cpu", "--tee", "none"]
    line += ["--rdzv-endpoint", f"127.0.0.1:{machines.port}"]
    set_pace(machines.pace, "hold 0")
    for n in range(3):
        machines.start([*line, "--node-rank", str(n), "--local-addr", f"127.0.0.{n + 1}"], script)
    job = MachinesJob(machines)
    job.arm((1, 3, 1), until=10)
    job.until_event("training")
    survivor = job.pids()[0]
    assert machines.code(1) == 128 + signal.SIGKILL
    machines.start([*line, "--node-rank", "1"], script)  # the same command again, as a batch system would give it
    assert job.until_event("joined")["node"] == 3
    job.hold(None)
    assert [machines.code(n) for n in (0, 2, 3)] == [0, 0, 0], job.log_tails()
    assert "its agent was ended by signal 9" in machines.output(1)
    assert [e["lost"] for e in job.events("declared")] == [[1]]
    assert job.pids()[0] == survivor
    machines.until_gone()
    assert_same_training(job, want, iterations, rank=1)


# ---- where agents run


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [True, False])
def test_agents_pin_themselves_and_no_worker_whenever_it_is_started(machines: Machines, wanted: bool) -> None:
    addresses = [a.address for each in psutil.net_if_addrs().values() for a in each if a.family == socket.AF_INET]
    address = next((a for a in addresses if not a.startswith("127.")), None)
    if address is None or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs an address that is not loopback's, and two processors")
    site = machines.directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SMALL_SHARES)
    (machines.directory / "script.py").write_text(MASKS.format(example=str(EXAMPLE)))
    flags = [*duo_gpt("data", iters=8), "--deadpool", *([] if wanted else ["--no-deadpool-pin-agents"])]
    line = ["--nnodes", "2", "--emulate-cpu", "--tee", "none", "--rdzv-endpoint", f"{address}:{machines.port}"]
    for n in range(2):
        env = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}  # and with it no fork server
        own = ["--node-rank", str(n), "--local-addr", address]
        machines.start([*line, *own], [str(machines.directory / "script.py"), *flags], env)
    assert machines.codes() == [0, 0], machines.outputs()
    job, whole = MachinesJob(machines), sorted(os.sched_getaffinity(0))
    for node in range(2):
        lines = (job.run_dir / "logs" / f"node-{node}.jsonl").read_text().splitlines()
        pinned = [each["cpus"] for each in map(json.loads, lines) if each["event"] == "pinned"]
        assert pinned == ([whole[-1:]] if wanted else [])
    masks = [path.read_text() for path in machines.directory.glob("mask-*")]
    assert len(masks) == 3 and set(masks) == {" ".join(map(str, whole))}
