"""The emulation is there only where it is asked for, and a script run under it sees what `python SCRIPT` shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deadpool_megatron.emulation import environment


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_no_other_package_installs_it() -> None:
    code = (
        "import importlib, json, sys\n"
        "for name in ('cli', 'launcher', 'config', 'cluster', 'vault', 'snapshot', 'comm', 'recovery', 'observe'):\n"
        "    importlib.import_module('deadpool_megatron.' + name)\n"
        "import torch\n"
        "from deadpool_megatron.emulation import is_installed\n"
        "patched = [str(f) for f in (torch.cuda.is_available, torch.Tensor.to, torch.zeros)\n"
        "           if str(getattr(f, '__module__', '')).startswith('deadpool_megatron.emulation')]\n"
        "patching = [m for m in sys.modules if m.startswith('deadpool_megatron.emulation.')]\n"
        "print(json.dumps([is_installed(), patched, patching]))\n"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, [], []]


def test_the_environment_is_known_without_importing_torch() -> None:
    # The launcher hands it to its workers, and must start at once.
    done = _python(
        "-c",
        "import json, sys; from deadpool_megatron.emulation import environment\n"
        "print(json.dumps([environment(), 'torch' in sys.modules]))",
    )
    assert json.loads(done.stdout) == [environment(), False]
    assert environment()["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_a_script_sees_its_own_arguments_path_and_name(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, torch\n"
        "import beside\n"
        "print(json.dumps([sys.argv, __name__, beside.__file__, torch.cuda.is_available(),\n"
        "                  os.environ['TORCHDYNAMO_DISABLE']]))\n"
    )
    (tmp_path / "beside.py").touch()
    done = _python("-m", "deadpool_megatron.emulation", str(script), "--flag", "value")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        [str(script), "--flag", "value"],
        "__main__",
        str(tmp_path / "beside.py"),
        True,
        "1",
    ]


def test_without_a_script_it_says_how_it_is_used() -> None:
    done = _python("-m", "deadpool_megatron.emulation")
    assert done.returncode == 1
    assert done.stderr == "usage: python -m deadpool_megatron.emulation SCRIPT [ARGS]\n"


def test_a_script_that_is_not_there_is_named_in_one_line() -> None:
    done = _python("-m", "deadpool_megatron.emulation", "/nowhere/train.py")
    assert done.returncode == 1
    assert done.stderr == "deadpool: /nowhere/train.py: no such script\n"


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_processes_of_multiprocessing_are_emulated_too(tmp_path: Path, method: str) -> None:
    (tmp_path / "beside.py").write_text("import torch\n\ndef devices():\n    return torch.cuda.device_count()\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from beside import devices\n"
        "if __name__ == '__main__':\n"
        f"    with multiprocessing.get_context('{method}').Pool(1) as pool:\n"
        "        print(pool.apply(devices))\n"
    )
    done = _python("-m", "deadpool_megatron.emulation", str(script))
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr
