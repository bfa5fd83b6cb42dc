"""examples/pretrain_gpt.py where torch's own Adam can load a checkpoint of the distributed optimizer.

Upstream (megatron-core 0.19) has two defects that only show without Apex and Transformer Engine, so on every machine
without a GPU: `DistributedOptimizer.state_dict` wants Adam's steps of an optimizer that has not stepped yet, and
`load_state_dict` gives every parameter the same step tensor, which then advances once for each of them.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_state_dict = DistributedOptimizer.state_dict
_load_state_dict = DistributedOptimizer.load_state_dict


def state_dict(self: Any) -> Any:
    """With steps of zero before the first step."""
    for group in self.optimizer.param_groups:
        for p in group["params"]:
            state = self.optimizer.state[p]
            if not state:
                state |= {"exp_avg": torch.zeros_like(p.data), "exp_avg_sq": torch.zeros_like(p.data)}
            state.setdefault("step", torch.tensor(0.0))
    return _state_dict(self)


def load_state_dict(self: Any, state: Any) -> None:
    """With a step for each parameter."""
    _load_state_dict(self, state)
    for each in self.optimizer.state.values():
        if "step" in each:
            each["step"] = each["step"].clone()


DistributedOptimizer.state_dict = state_dict
DistributedOptimizer.load_state_dict = load_state_dict
runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"), run_name="__main__")
