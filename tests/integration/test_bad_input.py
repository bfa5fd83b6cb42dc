"""What a user can get wrong, through the real command: one clear line on stderr, an exit code, soon, nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deadpool_megatron.cluster.records.exits import Exit, what_to_do
from flags import tiny_gpt
from jobs import EXAMPLE, ROOT, Job, Jobs, launch_flags


def _cli(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of one `deadpool` command."""
    done = subprocess.run(
        [sys.executable, "-m", "deadpool_megatron.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    return done.returncode, done.stderr


FOUR = ["--local-nodes", "4", "--nproc-per-node", "2", "--emulate-cpu"]
CASES = {
    "only spares": (["--local-nodes", "2", "--spare-nodes", "2", str(EXAMPLE), "--deadpool"], "leaves no node"),
    "spares without --deadpool": (["--local-nodes", "3", "--spare-nodes", "1", str(EXAMPLE)], "needs --deadpool"),
    "one active node": (["--local-nodes", "2", "--spare-nodes", "1", str(EXAMPLE), "--deadpool"], "2 active nodes"),
    "indivisible": ([*FOUR, str(EXAMPLE), "--tensor-model-parallel-size", "3"], "are not a multiple of"),
    "no script": ([*FOUR, "nowhere/pretrain.py"], "script nowhere/pretrain.py does not exist"),
    "unknown flag": ([*FOUR, str(EXAMPLE), "--deadpool", "--deadpool-lise", "3"], "did you mean --deadpool-lease?"),
    "no shared memory": (
        [*FOUR, "--shm-directory", "/no/such/shm", str(EXAMPLE), "--deadpool"],
        "--shm-directory /no/such/shm does not exist",
    ),
    "bad value": ([*FOUR, str(EXAMPLE), "--deadpool", "--deadpool-lease", "soon"], "--deadpool-lease"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_told_in_one_line_before_anything_starts(case: str, tmp_path: Path) -> None:
    arguments, why = CASES[case]
    code, said = _cli("launch", "--run-dir", str(tmp_path / "run"), *arguments)
    assert code == Exit.USAGE and said.startswith("deadpool: ") and said.count("\n") == 1 and why in said
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, said = _cli("launch", "--run-dir", str(tmp_path / "file" / "run"), "--local-nodes", "1", str(EXAMPLE))
    assert code == Exit.USAGE and said.startswith("deadpool: ") and str(tmp_path / "file") in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "inject"])
def test_a_run_directory_without_a_job_is_named(command: str, tmp_path: Path) -> None:
    more = ["--node", "0"] if command == "inject" else []
    code, said = _cli(command, "--run-dir", str(tmp_path), *more)
    assert code == Exit.USAGE and said.startswith("deadpool: no ") and str(tmp_path) in said


# ---- what only shows once workers run


def _ends_with_one_line(job: Job, code: int, *parts: str) -> None:
    assert job.wait() == code, job.log_tails()
    said, *advice = [line for line in job.output.splitlines() if line.startswith("deadpool: ")]
    assert advice == ([] if code == Exit.USAGE else [f"deadpool: {what_to_do(code)}"]), job.output
    for part in parts:
        assert part in said
    assert "Traceback" not in job.output
    job.until_gone(60)


def test_an_exception_of_the_script_before_training_is_named(jobs: Jobs) -> None:
    script = jobs.directory / "broken.py"
    script.write_text(
        "import os, time\nif os.environ['RANK'] == '1':\n    open('/no/such/vocab.json')\ntime.sleep(600)\n"
    )
    job = jobs.start("run", launch_flags(2, slots=1), [], script)
    _ends_with_one_line(job, 1, "rank 1 on node 1", "FileNotFoundError", "/no/such/vocab.json")


def test_a_flag_of_megatron_that_is_not_supported_is_named(jobs: Jobs) -> None:
    flags = [*tiny_gpt("none"), "--tensor-model-parallel-size", "1", "--iterations-to-skip", "3"]
    job = jobs.start("run", launch_flags(2, slots=1), flags)
    _ends_with_one_line(job, Exit.USAGE, "--iterations-to-skip is not supported with --deadpool")


def test_a_flag_that_megatron_does_not_know_is_named(jobs: Jobs) -> None:
    flags = [*tiny_gpt("none"), "--tensor-model-parallel-size", "1", "--no-such-flag"]
    job = jobs.start("run", launch_flags(2, slots=1), flags)
    assert job.wait() == 2
    said = next(line for line in job.output.splitlines() if line.startswith("deadpool: "))
    assert said.startswith("deadpool: rank ") and said.endswith("error: unrecognized arguments: --no-such-flag")
    job.until_gone(60)


def test_a_vault_that_does_not_fit_says_how_many_bytes_are_needed_and_there(jobs: Jobs) -> None:
    small = jobs.directory / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs of a chosen size here, that takes root: {done.stderr.strip()}")
    try:
        flags = [*tiny_gpt("none"), "--tensor-model-parallel-size", "1"]
        job = jobs.start("run", [*launch_flags(2, slots=1), "--shm-directory", str(small)], flags)
        _ends_with_one_line(job, Exit.USAGE, "bytes", str(small))
    finally:
        jobs.end()
        subprocess.run(["umount", str(small)], check=True)
