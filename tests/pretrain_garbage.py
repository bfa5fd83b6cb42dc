"""examples/pretrain_gpt.py with the manners of NCCL: what an abort frees goes on with garbage, which ends in an error
that names no communication, and the abort takes longer than an error of a worker's own is kept back."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Any

from deadpool_megatron.comm import nccl
from deadpool_megatron.comm.waits import Poison
from deadpool_megatron.megatron import hooks

_run = nccl.Aborts.run


def slowly(self: nccl.Aborts, backends: list[Any], deadline: float) -> tuple[int, int]:
    """There are none here: only the time passes."""
    time.sleep(3 * hooks._OWN_ERROR_S)
    return _run(self, backends, deadline)


def garbage(self: Poison) -> Exception:
    return ValueError("the permutation has 3 rows, its index 5")


if __name__ == "__main__":
    nccl.Aborts.run, Poison.error = slowly, garbage  # type: ignore[method-assign, assignment]
    script = Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
