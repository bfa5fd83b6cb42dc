"""Injected faults as a worker suffers them, and the crash points that lie inside of Megatron's and torch's own code.

Nothing here is in place until a fault is armed: then, and only then, the function that holds the point is wrapped.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import time
from typing import Any, Final

import torch

from deadpool_megatron import points
from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.agent.workers import PARENT_PID

_DAY_S = 86400.0


class InjectedError(Exception):
    """What `deadpool inject --fault raise` raises, as a bug in user code would."""


def strike(fault: r.Fault) -> None:
    """Suffer the fault, on the thread and at the place of the call. Most of them do not return."""
    points.announce(fault.kind, f"node {os.environ['DEADPOOL_NODE']}", sys.stdout)
    match fault.kind:
        case "hang":
            time.sleep(_DAY_S)
        case "raise":
            raise InjectedError("an error injected by deadpool inject")
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "kill-agent":
            os.kill(int(os.environ[PARENT_PID]), signal.SIGKILL)
            time.sleep(_DAY_S)  # the kernel ends this process, too
        case "kill" | "stop-agent":
            _whole_node(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        case _:
            os.kill(os.getpid(), signal.SIGKILL)


def _whole_node(signum: signal.Signals) -> None:
    import psutil

    agent = int(os.environ[PARENT_PID])
    # Workers out of a fork server are not among them: they are killed as their agent ends, and are not stopped.
    others = [child.pid for child in psutil.Process(agent).children(recursive=True) if child.pid != os.getpid()]
    for pid in [agent, *others, os.getpid()]:
        os.kill(pid, signum)


def arm(fault: r.Fault) -> None:
    """A fault has been armed in this process (told by the agent); for a crash point put it where it will be passed."""
    if not fault.point or fault.local != int(os.environ["LOCAL_RANK"]):
        return
    if points.POINTS[fault.point][0] != "worker":
        return
    if fault.point == "grad-norm.during":
        _grad_norm()
    elif fault.point == STEP:
        for module, name in _STEPS:
            if module in sys.modules:
                _around(fault.point, module, "", name, after=True)
    elif fault.point in _INSIDE:
        _around(fault.point, *_INSIDE[fault.point])
    points.arm(fault.point, -1 if fault.iteration is None else fault.iteration, lambda: strike(fault))


def _around(point: str, module: str, holder: str, name: str, after: bool) -> None:
    owner: Any = importlib.import_module(module)
    owner = getattr(owner, holder) if holder else owner
    original = getattr(owner, name)

    @functools.wraps(original)
    def passing(*args: Any, **kwargs: Any) -> Any:
        if not after:
            points.reach(point)
        result = original(*args, **kwargs)
        if after:
            points.reach(point)
        return result

    setattr(owner, name, passing)


def _grad_norm() -> None:
    from megatron.core.optimizer import optimizer

    native = optimizer.get_grad_norm_fp32

    def get_grad_norm_fp32(*args: Any, **kwargs: Any) -> Any:
        reduce = torch.distributed.all_reduce

        def all_reduce(*a: Any, **k: Any) -> Any:
            points.reach("grad-norm.during")
            return reduce(*a, **k)

        torch.distributed.all_reduce = all_reduce
        try:
            return native(*args, **kwargs)
        finally:
            torch.distributed.all_reduce = reduce

    optimizer.get_grad_norm_fp32 = get_grad_norm_fp32


STEP: Final = "optimizer-step.during"
# What steps the parameters of a group, of torch (AdamW too) and of the fused optimizers.
_STEPS: Final = (
    ("torch.optim.adam", "adam"),
    ("transformer_engine.pytorch.optimizers.fused_adam", "multi_tensor_applier"),
    ("apex.optimizers.fused_adam", "multi_tensor_applier"),
)
_BUCKETS: Final = ("megatron.core.distributed.param_and_grad_buffer", "_ParamAndGradBucketGroup")
# By point: module, what in it has the function (empty: itself), the function, and whether the point is after its call.
_INSIDE: Final = {
    "gradient-sync.before": (*_BUCKETS, "start_grad_sync", False),
    "gradient-sync.after": (*_BUCKETS, "finish_grad_sync", True),
    "param-gather.before": (*_BUCKETS, "start_param_sync", False),
    "param-gather.after": (*_BUCKETS, "finish_param_sync", True),
    "lr-step.before": ("megatron.core.optimizer_param_scheduler", "OptimizerParamScheduler", "step", False),
    "lr-step.after": ("megatron.core.optimizer_param_scheduler", "OptimizerParamScheduler", "step", True),
    "save.during": ("megatron.core.dist_checkpointing", "", "save", True),
}
