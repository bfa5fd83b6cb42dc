"""The promise: an export starts the job of the manifest as it was, from wherever it is asked for, and only reads."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deadpool_megatron.commands.export import add_export_arguments, prepare, run_export
from deadpool_megatron.durable import (
    FORMAT,
    Coordinate,
    DurableError,
    Item,
    Layout,
    Manifest,
    begin,
    directory_name,
    this_process,
)
from deadpool_megatron.durable.files import seal, write_shard
from deadpool_megatron.durable.store import LocalStore
from deadpool_megatron.launcher.local import add_launch_arguments
from deadpool_megatron.launcher.plan import check
from deadpool_megatron.launcher.processes import coordinator_settings
from deadpool_megatron.worker import _run_script

LAYOUT = Layout(64, "digest", (Item("a", "U8", (64,), 0, 64),))


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's directory and the user's, each with a script of that name."""
    for name in ("job", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text("import megatron\n")
    (tmp_path / "here" / "generations").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def durable(tmp_path: Path, generation: int, arguments: list[str] | None = None, **command: Any) -> Path:
    """A generation of a job, in the user's directory."""
    store = LocalStore(str(tmp_path / "here" / "generations"))
    name = directory_name(generation, "job", 1)
    shard = write_shard(store, name, 0, generation, LAYOUT, memoryview(bytes(64)), b"small")
    told = {"directory": str(tmp_path / "job"), "script": "train.py", "arguments": arguments or [], "slots_per_node": 1}
    job = {"command": told | command}
    seal(store, Manifest(FORMAT, generation, 0, name, "now", 1, (Coordinate(0, 0, 0, 0),), (shard,), job))
    return Path(store.root) / name


def options(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    return parser.parse_args(["--durable-dir", "generations", "--output", "out/checkpoint", *more])


def after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_relative_paths_of_the_user_are_of_the_users_directory_and_the_jobs_of_its_own(tmp_path: Path) -> None:
    durable(tmp_path, 40)
    here, job = tmp_path / "here", tmp_path / "job"
    _, script, command = prepare(options("--run-dir", "run"))
    assert Path.cwd() == job and script == str(job / "train.py") and script in command
    assert after(command, "--deadpool-export") == str(here / "out" / "checkpoint") == command[-1]
    assert after(command, "--deadpool-durable-dir") == str(here / "generations")
    assert after(command, "--run-dir") == str(here / "run")
    os.chdir(here)
    assert prepare(options("--script", "train.py"))[1] == str(here / "train.py")


def test_a_job_that_was_given_a_module_is_started_with_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "job" / "deadpool_test_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .names import OUT")
    (package / "names.py").write_text("OUT = []")
    tells = "from deadpool_megatron.megatron.description import describe_job\n"
    (package / "train.py").write_text(f"{tells}from . import OUT\nOUT.append(describe_job({{}}))")
    (tmp_path / "job" / "train.py").write_text(
        f"{tells}import deadpool_test_package as p\np.OUT.append(describe_job({{}}))"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.syspath_prepend(tmp_path / "job")
    monkeypatch.setattr(sys, "argv", sys.argv)
    name = "deadpool_test_package.train"
    for script, module in ((package / "train.py", name), (tmp_path / "job" / "train.py", "")):
        _run_script(str(script), module, ["--num-layers", "2"])
    by_module, by_file = (json.loads(told)["command"] for told in importlib.import_module("deadpool_test_package").OUT)
    assert by_module["module"] == name and by_file["module"] == ""

    durable(tmp_path, 40, **{key: by_module[key] for key in ("script", "module", "arguments")})
    _, script, command = prepare(options("--", "--bf16"))
    at = command.index("-m")
    assert command[at : at + 5] == ["-m", name, "--num-layers", "2", "--bf16"] and script == str(package / "train.py")
    parsed = argparse.ArgumentParser()
    add_launch_arguments(parsed)
    read = parsed.parse_args(command)
    assert (read.module, read.script, read.arguments[:2]) == (True, name, ["--num-layers", "2"])
    os.chdir(tmp_path / "here")
    assert "-m" not in prepare(options("--script", "train.py"))[2]


def test_a_model_whose_flags_come_from_a_checkpoint_is_built_from_it_again_or_the_flags_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["--load", "own", "--use-checkpoint-args", "--save", "own", "--exit-on-missing-checkpoint", "--bf16"]
    durable(tmp_path, 40, job)
    assert run_export(options()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--use-checkpoint-args" in line and "own is not on this machine: give those flags after --" in line
    os.chdir(tmp_path / "here")
    command = prepare(options("--", "--num-layers", "2"))[2]
    assert "--use-checkpoint-args" not in command and "--load" not in command and after(command, "--num-layers") == "2"
    (tmp_path / "job" / "own").mkdir()
    os.chdir(tmp_path / "here")
    command = prepare(options())[2]
    assert "--use-checkpoint-args" in command and after(command, "--load") == "own" and "--save" not in command


@pytest.mark.parametrize(("more", "newer_than"), [([], 60), (["--deadpool-export", "out"], -1)])
def test_an_export_is_of_what_is_durable_however_new_the_checkpoint_is_that_the_job_names(
    tmp_path: Path, more: list[str], newer_than: int
) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("60")
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    job = ["--load", str(tmp_path), "--deadpool", "--deadpool-durable-dir", "d", "--deadpool-resume", "auto", *more]
    plan = check(parser.parse_args(["--local-nodes", "2", "train.py", *job]), 2, "--local-nodes", "127.0.0.1")
    start = coordinator_settings(plan, "job", bytes(32)).durable
    assert start is not None and start.newer_than == newer_than


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """The generations, on a file system that nobody can write to."""
    where = tmp_path / "here" / "generations"
    durable(tmp_path, 40)
    done = subprocess.run(["mount", "--bind", where, where], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no right to mount a file system here: {done.stderr.strip()}")
    subprocess.run(["mount", "-o", "remount,ro,bind", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


def test_an_export_needs_to_write_nothing_to_the_durable_directory(read_only: Path) -> None:
    prepare(options())
    found, lease = begin(str(read_only), None, "40", 1, -1, pytest.fail)
    assert lease is None and [number for number, _ in found.usable] == [40]
    with pytest.raises(DurableError, match="cannot be written to"):
        begin(str(read_only), this_process("job"), "40", 1, -1, pytest.fail)


def test_generations_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> str:
        os.chdir(tmp_path / "here")
        assert run_export(options(*more)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "there is no durable generation in " in said()
    broken = durable(tmp_path, 60)
    os.truncate(broken / "rank-00000.safetensors", 5)
    assert f"durable generation 60 cannot be read: {broken}" in said() and said().endswith("has 60 (cannot be read)")
    durable(tmp_path, 40)
    assert f"durable generation 60 cannot be read: {broken}" in said("--generation", "60")
    assert said("--generation", "60").endswith("has 60 (cannot be read), 40")
    assert said("--generation", "50").endswith("has no durable generation 50; it has 60 (cannot be read), 40")
    assert prepare(options())[0].generation == 40
