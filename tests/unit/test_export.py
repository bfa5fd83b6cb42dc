"""The promise: an export starts the job of the manifest as it was, from wherever it is asked for, and only reads."""

from __future__ import annotations

import argparse
import os
import subprocess
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
