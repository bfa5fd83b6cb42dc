"""examples/pretrain_gpt.py where torch's own Adam can load a checkpoint of the distributed optimizer.

Without Apex and Transformer Engine, so on every machine without a GPU, upstream (megatron-core 0.19) asks an optimizer
that has not stepped yet for its step when it loads, and fails. Loaded that way Adam's step is still not the
checkpoint's, so a run that goes on from one is exact up to its first update.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

_state_dict = DistributedOptimizer.state_dict


def state_dict(self: Any) -> Any:
    """With steps of zero before the first step."""
    for group in self.optimizer.param_groups:
        for p in group["params"]:
            state = self.optimizer.state[p]
            if not state:
                state |= {"exp_avg": torch.zeros_like(p.data), "exp_avg_sq": torch.zeros_like(p.data)}
            state.setdefault("step", torch.tensor(0.0))
    return _state_dict(self)


if not HAVE_APEX_OR_TE:
    DistributedOptimizer.state_dict = state_dict
runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"), run_name="__main__")
