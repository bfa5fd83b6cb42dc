"""examples/pretrain_gpt.py over Gloo, with the manners of NCCL around a failure.

A lost peer raises nothing: who waits for it waits until the abort. Then an all-reduce is over, with NaN for its result,
and a barrier too; any other operation ends in an error that names no communication. The abort takes longer than that
error would be kept back if it were the worker's own.
"""

from __future__ import annotations

import functools
import runpy
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from deadpool_megatron.comm import Communicators, nccl
from deadpool_megatron.comm.inplace import bindings
from deadpool_megatron.megatron import hooks
from waiting import until

_run, _wait = nccl.Aborts.run, bindings.Work.wait
_allreduce, _barrier = bindings.ProcessGroup.allreduce, bindings.ProcessGroup.barrier
_reduced: dict[int, list[torch.Tensor]] = {}  # by work


def slowly(self: nccl.Aborts, backends: list[Any], deadline: float) -> tuple[int, int]:
    """There are none here: only the time passes."""
    time.sleep(3 * hooks._OWN_ERROR_S)
    return _run(self, backends, deadline)


@functools.wraps(_allreduce)
def allreduce(self: Any, tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """torch's, noted."""
    work = _allreduce(self, tensors, *args, **kwargs)
    _reduced[id(work)] = tensors
    return work


@functools.wraps(_barrier)
def barrier(self: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's, noted: NCCL's is an all-reduce."""
    work = _barrier(self, *args, **kwargs)
    _reduced[id(work)] = []
    return work


def wait(self: Any, timeout: timedelta = timedelta(0)) -> bool:
    """DeadPool's, but that an abort makes garbage of it."""
    tensors = _reduced.pop(id(self), None)
    try:
        return bool(_wait(self, timeout))
    except RuntimeError:
        until(lambda: Communicators._installed.poisoned, "the abort", 0.001)  # type: ignore[union-attr]
        if tensors is None:
            raise ValueError("the permutation has 3 rows, its index 5") from None
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        return True


if __name__ == "__main__":
    nccl.Aborts.run = slowly  # type: ignore[method-assign]
    bindings.Work.wait = wait
    bindings.ProcessGroup.allreduce, bindings.ProcessGroup.barrier = allreduce, barrier
    script = Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
