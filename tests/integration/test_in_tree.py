"""A patched script under any per-rank launcher: its ranks become workers of agents they start themselves."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.intree.patching import State, change, load_sets
from deadpool_megatron.launcher.torchrun import let_torchrun_go
from flags import duo_gpt, tiny_gpt
from jobs import EXAMPLE, PACED, Job, Jobs, assert_same_training, launch_flags, set_pace, undisturbed
from machines import MachinesJob
from ranks import Ranks, attached
from upstream import VERSIONS, checkout

ITERATIONS = 6


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    all_ranks = Ranks(tmp_path)
    set_pace(all_ranks.pace, "hold 0")  # `_kill` lets them go on
    yield all_ranks
    all_ranks.end()


def _kill(ranks: Ranks, node: int, iteration: int, tick: int) -> MachinesJob:
    """Arm a kill before training begins."""
    job = MachinesJob(ranks)
    ranks.until("start of the job", lambda: (ranks.run_dir / "events.jsonl").exists() and job.events("started"))
    job.arm((node, iteration, tick))
    return job


def _assert_same_end(job: MachinesJob, want: Job, mute: int) -> None:
    expected = {iteration: exact for iteration, *exact in want.exact()}
    seen = dict((iteration, exact) for iteration, *exact in job.exact())
    assert set(expected) - {mute} <= set(seen) and all(expected[i] == exact for i, exact in seen.items())
    assert job.hashes() == want.hashes()


@pytest.mark.versions(torch=True, megatron=True)
@pytest.mark.timeout(300)
def test_ranks_of_another_launcher_survive_the_loss_of_the_node_of_rank_0(ranks: Ranks, jobs: Jobs) -> None:
    want = undisturbed(launch_flags(2, slots=1), duo_gpt())
    script = [str(attached(ranks.directory, PACED)), *duo_gpt(), *ranks.deadpool(spares=1)]
    for rank in range(3):
        ranks.start_rank(rank, 3, script)
    pids = [process.pid for process in ranks.started]
    job = _kill(ranks, 0, 3, 2)
    ranks.until("training", lambda: job.events("training"))
    assert job.pids() == {0: pids[0], 1: pids[1]}, "the launcher's processes are the workers"
    assert ranks.codes() == [-9, 0, 0]
    ranks.until_gone()
    assert job.events("resumed") and job.pids() == {0: pids[2], 1: pids[1]}
    _assert_same_end(job, want, mute=2)
    assert "iteration        6/" in ranks.output(1), "a worker's output goes where its launcher wants it"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_a_spare_every_launcher_sees_the_exit_code_of_the_job(ranks: Ranks) -> None:
    script = [str(attached(ranks.directory, PACED)), *duo_gpt(), *ranks.deadpool()]
    for rank in range(2):
        ranks.start_rank(rank, 2, script)
    _kill(ranks, 1, 3, 2)
    assert ranks.codes() == [Exit.NO_SPARE, -9]
    ranks.until("the reason", lambda: "deadpool: no spare is left for node 1" in ranks.output(0))
    ranks.until_gone()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_drained_node_leaves_its_launcher_with_code_0(ranks: Ranks, jobs: Jobs) -> None:
    want = undisturbed(launch_flags(2, slots=1), duo_gpt(iters=40))
    script = [str(attached(ranks.directory, EXAMPLE)), *duo_gpt(iters=40), *ranks.deadpool(spares=1)]
    for rank in range(3):
        ranks.start_rank(rank, 3, script)
    job = MachinesJob(ranks)
    ranks.until("training", lambda: (ranks.run_dir / "events.jsonl").exists() and job.events("training"))
    done = job.command("drain", "--node", "0")
    assert done.returncode == 0, done.stderr
    assert ranks.codes() == [0, 0, 0]
    ranks.until_gone()
    assert job.events("left")[0]["node"] == 0 and not job.events("detected")
    assert job.hashes() == want.hashes()


def test_an_agent_that_cannot_start_ends_its_ranks_with_one_line(ranks: Ranks) -> None:
    with socket.create_server(("127.0.0.1", ranks.port + 1)):
        ranks.start_rank(0, 2, [str(attached(ranks.directory, EXAMPLE)), *duo_gpt(), *ranks.deadpool()])
        assert ranks.codes() == [Exit.USAGE]
    assert "cannot listen on" in ranks.output(0)
    last = ranks.output(0).splitlines()[-1]
    assert last == "deadpool: the agent of this node could not start; the line above says why"


def test_what_the_launcher_did_not_say_is_asked_for_in_one_line(ranks: Ranks) -> None:
    script = [str(attached(ranks.directory, EXAMPLE)), "--deadpool"]
    ranks.start_command([sys.executable, *script], {"RANK": "", "SLURM_PROCID": ""})
    ranks.start_command([sys.executable, *script, "--deadpool-leese", "2"], {})
    assert ranks.codes() == [Exit.USAGE, Exit.USAGE]
    assert ranks.output(0).startswith("deadpool: --deadpool: RANK (or SLURM_PROCID) is not set: start one process")
    assert ranks.output(1) == "deadpool: unknown flag --deadpool-leese; did you mean --deadpool-lease?\n"


def test_without_deadpool_a_patched_script_is_the_script(ranks: Ranks) -> None:
    plain = ranks.directory / "plain.py"
    plain.write_text("import os, sys\nprint('plain', sys.argv[1:], 'DEADPOOL_MODE' in os.environ)\n")
    ranks.start_command([sys.executable, str(attached(ranks.directory, plain)), "--lr", "1"], {})
    assert ranks.codes() == [0] and ranks.output(0) == "plain ['--lr', '1'] False\n"


@pytest.mark.versions(torch=True)
@pytest.mark.timeout(120)
def test_torchruns_do_not_wait_for_one_that_has_failed_once_they_are_let_go(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ranks.directory / "script.py"
    script.write_text(
        "import json, os\n"
        "if os.environ['RANK'] == '1':\n"
        "    with open('env', 'w') as file:\n"
        "        json.dump(dict(os.environ), file)\n"
        "os._exit(os.environ['RANK'] == '1')\n"
    )
    monkeypatch.setenv("LOGLEVEL", "INFO")
    _torchruns(ranks, 3, [str(script)], slots=1)
    assert ranks.code(1) == 1
    waiting = "seconds for other agents to finish"
    ranks.until("the others to wait", lambda: all(waiting in ranks.output(rank) for rank in (0, 2)))
    let_torchrun_go(json.loads((ranks.directory / "env").read_text()))
    assert ranks.codes() == [0, 1, 0]
    assert "Error waiting on exit barrier" not in ranks.outputs()


# ---- upstream's own script


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", VERSIONS)
def test_upstreams_pretrain_gpt_survives_a_kill_through_hooks_and_through_patches(
    name: str, ranks: Ranks, jobs: Jobs
) -> None:
    tree = checkout(name, ranks.directory)
    script = tree / "pretrain_gpt.py"
    want = jobs.start("undisturbed", launch_flags(2, slots=1), duo_gpt(), script).finished()
    hooked = jobs.start("hooked", launch_flags(3, 1, slots=1), duo_gpt(), script)
    hooked.until_event("started")
    hooked.inject(0, 3, 2)
    hooked.finished()
    assert hooked.events("resumed")
    assert_same_training(hooked, want, ITERATIONS, rank=1, mute=frozenset({2}))

    assert change(tree, load_sets(), State.APPLIED)[0].name == name
    for rank in range(3):
        ranks.start_rank(rank, 3, [str(script), *duo_gpt(), *ranks.deadpool(spares=1)])
    patched = _kill(ranks, 0, 3, 2)
    assert ranks.codes() == [-9, 0, 0] and patched.events("resumed")
    ranks.until_gone()  # the coordinator writes the hashes last
    _assert_same_end(patched, want, mute=2)
    assert change(tree, load_sets(), State.CLEAN)[1]


@pytest.mark.slow
@pytest.mark.versions(torch=True)
@pytest.mark.timeout(250)
@pytest.mark.parametrize("lost", [0, 1])
def test_one_torchrun_a_node_works_like_any_launcher(ranks: Ranks, jobs: Jobs, lost: int) -> None:
    flags = tiny_gpt("none", iters=ITERATIONS)
    want = undisturbed(launch_flags(2), flags)
    script = [str(attached(ranks.directory, PACED)), *flags, *ranks.deadpool(spares=1)]
    _torchruns(ranks, 3, script)
    job = _kill(ranks, lost, 3, 2)
    codes = [int(node == lost) for node in range(3)]
    assert ranks.codes() == codes, "a torchrun whose rank was killed ends with 1"
    ranks.until_gone()
    assert job.events("resumed")
    _assert_same_end(job, want, mute=2)
    if lost:  # that of node 0 takes its store along, and the others say so
        assert "exit barrier" not in ranks.outputs(), "nobody has waited for the torchrun of the lost node"


@pytest.mark.slow
@pytest.mark.versions(torch=True)
@pytest.mark.timeout(250)
@pytest.mark.parametrize("node", [0, 1])
def test_the_torchrun_of_a_drained_node_leaves_while_the_job_goes_on(ranks: Ranks, node: int) -> None:
    script = [str(attached(ranks.directory, PACED)), *duo_gpt(iters=40), *ranks.deadpool(spares=1)]
    _torchruns(ranks, 3, script, slots=1)
    job = MachinesJob(ranks)
    ranks.until("start of the job", lambda: (ranks.run_dir / "events.jsonl").exists() and job.events("started"))
    job.hold(30)
    done = job.command("drain", "--node", str(node))
    assert done.returncode == 0, done.stderr
    assert ranks.code(node) == 0
    others = [process for n, process in enumerate(ranks.started) if n != node]
    assert not job.events("finished") and all(process.poll() is None for process in others)
    job.hold(None)
    assert ranks.codes() == [0, 0, 0]
    ranks.until_gone()


def _torchruns(ranks: Ranks, nodes: int, script: list[str], slots: int = 2) -> None:
    for node in range(nodes):
        options = ["--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(slots)]
        options += ["--master-addr", "127.0.0.1", "--master-port", str(ranks.port)]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *script]
        ranks.start_command(command, {"DEADPOOL_EMULATE_CPU": "1", "OMP_NUM_THREADS": "1"})
