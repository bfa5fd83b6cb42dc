"""What is installed is what jobs run on: the benches, and the equipment of tests, stay in the source repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jobs import ROOT

# The build writes beside what it builds from.
_BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what a wheel of this repository has, built without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if path.suffix in {".py", ".toml", ".md"} or path.name in {"LICENSE", "deadpool_megatron", "deadpool_bench"}:
            (source / path.name).symlink_to(path)
    built = subprocess.run(
        [sys.executable, "-c", _BUILD, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(out / built.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(out / "installed")
    return out / "installed"


def _python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=installed.parent, env=environment, capture_output=True, text=True, check=False
    )


def test_no_bench_and_no_equipment_of_tests_is_installed(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"deadpool_megatron"}
    modules = {path.relative_to(installed) for path in installed.rglob("*.py") if "examples" not in path.parts}
    assert modules == {path.relative_to(ROOT) for path in (ROOT / "deadpool_megatron").rglob("*.py")}
    benches = {"bench", "harness", "baselines", "gpu_kit", "control_plane", "forking.py", "timed.py", "kills.py"}
    assert not [path for path in modules if benches & set(path.parts)]


def test_the_examples_are_found_where_it_is_installed(installed: Path) -> None:
    done = _python(installed, "-m", "deadpool_megatron.cli", "examples")
    there = Path(done.stdout.strip())
    assert there == installed / "deadpool_megatron" / "examples", done.stderr
    assert {path.name for path in there.iterdir()} == {path.name for path in (ROOT / "examples").iterdir()}
    done = _python(installed, "-m", "deadpool_megatron.cli", "demo", "--help")
    assert f"(default: {there}/pretrain_gpt.py)" in "".join(line.strip() for line in done.stdout.splitlines())


def test_an_installed_deadpool_says_where_its_benches_are_and_does_all_else(installed: Path) -> None:
    for words in (["bench", "recovery", "--kills", "1", "train.py"], ["bench", "--help"]):
        done = _python(installed, "-m", "deadpool_megatron.cli", *words)
        assert done.returncode == 2 and not done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("deadpool: the benches are in the source repository")
    names = "import deadpool_megatron as d, deadpool_megatron.demo.main, deadpool_megatron.cli as c; print(d.__file__)"
    done = _python(installed, "-c", f"{names}; c.main(['schema'])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(installed / "deadpool_megatron" / "__init__.py")
