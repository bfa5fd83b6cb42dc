"""Unique state: what no other coordinate can give back, as a list of named tensors.

Under the distributed optimizer (megatron/core/optimizer/distrib_optimizer.py) that is this rank's shard of the fp32
main parameters and of Adam's moments; 16-bit parameters come back by the data-parallel all-gather. Without it every
replica has the whole state, and each keeps its own copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from deadpool_megatron.megatron.support import UserError

__all__ = [
    "initialize_optimizer_state",
    "main_parameters",
    "members",
    "named_unique_tensors",
    "read_steps",
    "write_steps",
]


def members(optimizer: Any) -> list[Any]:
    """The optimizers a (Chained)Optimizer consists of, those without parameters left out."""
    each = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in each if not getattr(one, "is_stub_optimizer", False)]


def _inner(member: Any) -> Any:
    """The torch (or fused) optimizer inside."""
    return member.optimizer


def main_parameters(member: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and fp32 master tensor of every parameter the member steps, in the order of its parameter groups."""
    for g, group in enumerate(_inner(member).param_groups):
        for i, parameter in enumerate(group["params"]):
            yield f"group{g}.{i}", parameter


def initialize_optimizer_state(optimizer: Any) -> None:
    """Give every parameter the state its first step would make, so that all tensors exist before training.

    torch makes Adam's state lazily, with zeros (torch.optim.Adam._init_group); zeros made earlier are the same bits.
    Fused optimizers of Transformer Engine and apex do the same through ``initialize_state`` or at their first step.

    Raises:
        UserError: an optimizer whose state is not known.
    """
    for member in members(optimizer):
        inner = _inner(member)
        if isinstance(inner, torch.optim.Adam):  # AdamW too
            for group in inner.param_groups:
                for parameter in group["params"]:
                    state = inner.state[parameter]
                    if state:
                        continue
                    on_device = group.get("capturable") or group.get("fused")
                    state["step"] = torch.zeros(
                        (), dtype=torch.float32, device=parameter.device if on_device else torch.device("cpu")
                    )
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    if group.get("amsgrad"):
                        state["max_exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif isinstance(inner, torch.optim.SGD):
            for group in inner.param_groups:
                if group.get("momentum"):
                    # SGD's first step copies the gradient instead of adding to zeros: there is nothing to make early.
                    raise UserError("--optimizer sgd with --sgd-momentum above 0 is not supported with --deadpool yet")
        elif hasattr(inner, "initialize_state"):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    if not inner.state[parameter]:
                        inner.initialize_state(parameter, False)
        elif type(inner).__name__ == "FusedAdam":
            for group in inner.param_groups:
                for parameter in group["params"]:
                    state = inner.state[parameter]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(parameter)
                        state["exp_avg_sq"] = torch.zeros_like(parameter)
        else:
            raise UserError(f"optimizer {type(inner).__name__} is not supported with --deadpool yet")


def named_unique_tensors(optimizer: Any) -> list[tuple[str, torch.Tensor]]:
    """All tensors of the unique state in a fixed order: master parameters, then moments, member by member.

    The tensors are the live ones, fp32 mostly, on the device of the optimizer; step counters are small state.
    """
    out: list[tuple[str, torch.Tensor]] = []
    for m, member in enumerate(members(optimizer)):
        state = _inner(member).state
        for name, parameter in main_parameters(member):
            out.append((f"optimizer{m}.{name}.main", parameter.data))
        for name, parameter in main_parameters(member):
            for key in sorted(k for k, v in state[parameter].items() if k != "step" and torch.is_tensor(v)):
                out.append((f"optimizer{m}.{name}.{key}", state[parameter][key]))
    return out


def read_steps(optimizer: Any) -> list[list[float]]:
    """Adam's step counters, by member: per parameter (torch) or per group (fused optimizers)."""
    out: list[list[float]] = []
    for member in members(optimizer):
        inner = _inner(member)
        steps = [float(s["step"]) for s in (inner.state[p] for _, p in main_parameters(member)) if "step" in s]
        out.append(steps or [float(group["step"]) for group in inner.param_groups if "step" in group])
    return out


def write_steps(optimizer: Any, steps: list[list[float]]) -> None:
    """The reverse of `read_steps`; each parameter keeps a counter of its own."""
    for member, values in zip(members(optimizer), steps, strict=True):
        inner = _inner(member)
        states = [s for s in (inner.state[p] for _, p in main_parameters(member)) if "step" in s]
        if states:
            for state, value in zip(states, values, strict=True):
                if torch.is_tensor(state["step"]):
                    state["step"].fill_(value)
                else:
                    state["step"] = type(state["step"])(value)
        else:
            groups = [group for group in inner.param_groups if "step" in group]
            if not groups and values:
                groups = list(inner.param_groups)  # a fused optimizer sets the counter at its first step
            for group, value in zip(groups, values, strict=False):
                old = group.get("step", 0)
                if torch.is_tensor(old):
                    old.fill_(value)
                else:
                    group["step"] = int(value)
