"""The promise: a command line that cannot work is refused in one line, and an export runs the job it exports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deadpool_megatron.cluster.records.exits import Exit
from deadpool_megatron.commands.export import script_arguments
from deadpool_megatron.config import ConfigError, from_script_arguments
from deadpool_megatron.launcher.processes import _checkpoint_to_load


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--deadpool-resume", "auto"], "--deadpool-resume needs --deadpool-durable-dir"),
        (["--deadpool-on-preempt"], "--deadpool-on-preempt needs --deadpool-durable-dir"),
        (["--deadpool-durable-dir", "d", "--deadpool-resume", "newest"], "must be auto, none, or the number"),
        (["--deadpool-durable-dir", "d", "--deadpool-durable-interval", "-1"], "must be 0 or more generations"),
        (["--deadpool-durable-dir", "d", "--deadpool-durable-keep", "0"], "must be 1 or more generations"),
        (["--deadpool-durable-dir", "d", "--deadpool-durable-deadline", "0"], "must be more than 0 seconds"),
        (["--deadpool-durable-dir", "d", "--deadpool-export", "e"], "--deadpool-export needs --deadpool-resume"),
        (
            ["--deadpool-when-out-of-spares", "wait", "--deadpool-wait-for-spare", "5"],
            "--deadpool-wait-for-spare has no use",
        ),
    ],
)
def test_settings_of_the_durable_tier_that_contradict_each_other_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_script_arguments(["--deadpool", *flags])


def test_a_generation_may_be_asked_for_by_number() -> None:
    flags = ["--deadpool", "--deadpool-durable-dir", "d", "--deadpool-resume", "40"]
    assert from_script_arguments(flags).resume == "40"


def test_an_export_keeps_the_jobs_arguments_but_none_of_loading_saving_reporting_and_deadpool() -> None:
    job = ["--num-layers", "4", "--save", "a", "--load=b", "--async-save", "--bf16", "--save-interval", "10"]
    job += ["--deadpool", "--deadpool-durable-dir", "d", "--deadpool-on-preempt", "--deadpool-resume=auto", "--lr", "1"]
    job += ["--no-deadpool-on-preempt", "--tensorboard-dir", "t", "--data-path", "1", "p"]
    assert script_arguments(job) == ["--num-layers", "4", "--bf16", "--lr", "1", "--data-path", "1", "p"]


def test_the_checkpoint_that_would_be_loaded_is_found(tmp_path: Path) -> None:
    assert _checkpoint_to_load(["--load", str(tmp_path)]) == -1
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40\n")
    assert _checkpoint_to_load(["--load", "nowhere", f"--load={tmp_path}"]) == 40
    assert _checkpoint_to_load(["--load", str(tmp_path), "--finetune"]) == -1
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert _checkpoint_to_load(["--load", str(tmp_path)]) == -1
    assert _checkpoint_to_load([]) == -1


def test_a_job_ends_with_its_own_code_beside_generations_of_which_none_can_be_read(tmp_path: Path) -> None:
    (there := tmp_path / "generation-000000000200-job-1").mkdir()
    (there / "manifest.json").write_text("{}")
    (tmp_path / "train.py").write_text("")
    command = [sys.executable, "-m", "deadpool_megatron.cli", "launch", "--local-nodes", "2", "--emulate-cpu"]
    command += ["--run-dir", str(tmp_path / "run"), str(tmp_path / "train.py"), "--deadpool", "--deadpool-durable-dir"]
    ended = subprocess.run([*command, str(tmp_path), "--deadpool-resume", "auto"], capture_output=True, text=True)
    assert ended.returncode == Exit.GENERATION_LOST, ended.stderr
    assert "generations 200 (cannot be read): " in ended.stderr and len(ended.stderr.splitlines()) == 1
