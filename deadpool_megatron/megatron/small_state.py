"""Small state: everything but the optimizer's tensors that an iteration depends on, captured at its start.

The reference list is upstream's checkpoint (megatron/training/checkpointing.py, get_rng_state and
generate_state_dict) plus what a checkpoint does not need and a bitwise retry does: the log's accumulators, module
buffers that forward passes change, and the run's mutable ``args``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any, Final

import torch
from megatron.core import tensor_parallel
from megatron.core.num_microbatches_calculator import update_num_microbatches

from deadpool_megatron.megatron.unique_state import members, read_steps, write_steps
from deadpool_megatron.snapshot import capture_host_rng, decode, encode, restore_host_rng

__all__ = ["MUTABLE_ARGS", "SmallState", "apply_args"]

# Fields of Megatron's args that change while it trains.
MUTABLE_ARGS: Final = (
    "iteration",
    "curr_iteration",
    "consumed_train_samples",
    "consumed_valid_samples",
    "skipped_train_samples",
    "num_floating_point_operations_so_far",
    "do_train",
    "do_valid",
    "do_test",
    "eval_iters",
)


def apply_args(args: Namespace, saved: dict[str, Any]) -> None:
    """Set the mutable fields of Megatron's args to those of a generation."""
    for name, value in saved.items():
        setattr(args, name, value)


class SmallState:
    """Captures and restores the small state of one coordinate.

    Args:
        args, model, optimizer, scheduler: Megatron's own; ``model`` is the list of model chunks.
    """

    def __init__(self, args: Namespace, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        self._args = args
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._buffers = [
            (f"chunk{c}.{name}", buffer)
            for c, chunk in enumerate(model)
            for name, buffer in chunk.named_buffers()
            if buffer is not None
        ]
        self._scalers = [
            m.grad_scaler for m in members(optimizer) if getattr(m, "grad_scaler", None) is not None
        ]
        self.log: dict[str, Any] = {}
        self.logged_before = False
        self.flops: float = args.num_floating_point_operations_so_far

    def capture(self, iteration: int) -> bytes:
        """The state at the start of ``iteration``, some tens of KB. Allocates nothing on the device."""
        args = self._args
        fields = {name: getattr(args, name) for name in MUTABLE_ARGS if hasattr(args, name)}
        # train() keeps these two in local variables; args has the values train() began with.
        fields["iteration"] = iteration
        fields["num_floating_point_operations_so_far"] = self.flops
        return encode(
            {
                "args": fields,
                "host_rng": capture_host_rng(),
                "torch_rng": torch.get_rng_state(),
                "device_rng": torch.cuda.get_rng_state(),
                "tracker": {
                    name: _as_tensor(state)
                    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()
                },
                "num_steps": self._scheduler.num_steps,
                "steps": read_steps(self._optimizer),
                "scalers": [scaler.state_dict() for scaler in self._scalers],
                "buffers": {name: buffer for name, buffer in self._buffers},
                "log": {k: v for k, v in self.log.items()},
                "logged_before": self.logged_before,
            }
        )

    def restore(self, data: bytes) -> int:
        """Make the live small state that of ``data``; returns its iteration."""
        state = decode(data)
        apply_args(self._args, state["args"])
        restore_host_rng(state["host_rng"])
        torch.set_rng_state(state["torch_rng"])
        torch.cuda.set_rng_state(state["device_rng"])
        _restore_tracker(state["tracker"])
        # The scheduler's own load_state_dict adds to num_steps instead of setting it.
        self._scheduler.num_steps = 0
        self._scheduler.step(increment=state["num_steps"])
        write_steps(self._optimizer, state["steps"])
        for scaler, saved in zip(self._scalers, state["scalers"], strict=True):
            scaler.load_state_dict(saved)
        for name, buffer in self._buffers:
            buffer.copy_(state["buffers"][name])
        self.log = state["log"]
        self.logged_before = state["logged_before"]
        self.flops = state["args"]["num_floating_point_operations_so_far"]
        update_num_microbatches(self._args.consumed_train_samples, consistency_check=False)
        iteration: int = state["args"]["iteration"]
        return iteration


def _as_tensor(state: Any) -> torch.Tensor:
    """A tracker state as bytes; in graph-safe mode the tracker holds live generators."""
    return state.get_state() if isinstance(state, torch.Generator) else state


def _restore_tracker(saved: dict[str, torch.Tensor]) -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    for name, value in saved.items():
        current = states.get(name)
        if isinstance(current, torch.Generator):
            current.set_state(value)
        else:
            states[name] = value
    tracker.set_states(states)
    if hasattr(tracker, "_current_state_name"):
        tracker._current_state_name = "default-rng"
