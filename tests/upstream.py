"""Checkouts of upstream Megatron-LM for tests, made from a git repository the user names; upstream is never committed.

``DEADPOOL_UPSTREAM_GIT`` is a clone (bare or not) of https://github.com/NVIDIA/Megatron-LM with the tags, and
``DEADPOOL_BRIDGE_GIT`` one of https://github.com/NVIDIA-NeMo/Megatron-Bridge. Where one is not set, or lacks a version,
tests skip and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

__all__ = ["BRIDGE_MAIN", "MAIN", "VERSIONS", "bridge", "checkout", "git", "scripts"]

# Name of the patch set -> what git calls that version.
VERSIONS = {
    "core_v0.18.0": "core_v0.18.0",
    "core_v0.18.2": "core_v0.18.2",
    "core_v0.19.0": "core_v0.19.0",
    "main_d98e8a64": "d98e8a64ddf34856e74b24714e3bedb2f5a39553",
}
MAIN = "main_d98e8a64"
# Of Megatron-Bridge, which runs with `MAIN`.
BRIDGE_MAIN = "067f987df03b8355b03192d88d70f1709fedf51a"
_FILES = ("megatron", "pretrain_gpt.py", "gpt_builders.py", "model_provider.py", "hybrid_builders.py")


def git(*arguments: str) -> bytes:
    """Output of git in the named repository; skips the test where there is none or it lacks what is asked for."""
    return _git("DEADPOOL_UPSTREAM_GIT", "Megatron-LM with its tags", *arguments)


def _git(variable: str, of: str, *arguments: str) -> bytes:
    where = os.environ.get(variable)
    if not where:
        pytest.skip(f"set {variable} to a clone of {of}")
    repository = Path(where) / ".git" if (Path(where) / ".git").exists() else Path(where)
    done = subprocess.run(["git", f"--git-dir={repository}", *arguments], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"{variable} {where}: git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def checkout(name: str, directory: Path) -> Path:
    """The files of one version that a GPT run needs, with the dataset helpers of the installed wheel.

    Upstream compiles them with make at the first start, which needs a compiler and pybind11.
    """
    tree = directory / name
    tree.mkdir(parents=True)
    present = [f for f in _FILES if git("ls-tree", "--name-only", VERSIONS[name], "--", f)]
    archive = git("archive", VERSIONS[name], *present)
    subprocess.run(["tar", "x", "-C", str(tree)], input=archive, check=True)
    wheel = metadata.distribution("megatron-core").locate_file("megatron/core/datasets")
    for library in Path(str(wheel)).glob("helpers_cpp*.so"):
        shutil.copy(library, tree / "megatron" / "core" / "datasets")
    return tree


def bridge(directory: Path) -> Path:
    """Megatron-Bridge's main, to be put on the path before an installed one."""
    tree = directory / "bridge"
    tree.mkdir(parents=True)
    archive = _git("DEADPOOL_BRIDGE_GIT", "Megatron-Bridge", "archive", f"{BRIDGE_MAIN}:src", "megatron/bridge")
    subprocess.run(["tar", "x", "-C", str(tree)], input=archive, check=True)
    return tree


def scripts(name: str, directory: Path, *paths: str) -> None:
    """Single files of one version, beside one another in ``directory``; they run with the installed megatron-core."""
    for path in paths:
        (directory / Path(path).name).write_bytes(git("show", f"{VERSIONS[name]}:{path}"))
