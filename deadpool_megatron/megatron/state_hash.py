"""SHA-256 over one coordinate's whole state, to prove two runs equal bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from deadpool_megatron.megatron.low_precision import plain_tensors, scaling_state
from deadpool_megatron.megatron.optimizer_state import Numbers, plain_fields, state_tensors, step_counters
from deadpool_megatron.megatron.small_state import tracker_states
from deadpool_megatron.snapshot import capture_host_rng, encode, host_bytes


def _update(sha: Any, name: str, tensor: torch.Tensor) -> None:
    sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(host_bytes(tensor).tobytes())


def digests(args: Mapping[str, Any], model: list[Any], optimizer: Any, scheduler: Any) -> dict[str, str]:
    """Hex SHA-256 by part: params, main_params, moments, steps, rng, data.

    ``params`` are the model's own parameters (16-bit, or quantized), buffers and scales of FP8, ``main_params`` and
    ``moments`` this coordinate's optimizer shard, ``steps`` the hyperparameters and steps of its parameter groups,
    ``data`` the sample counters and the LR schedule.
    """
    parts = {name: hashlib.sha256() for name in ("params", "main_params", "moments", "steps", "rng", "data")}
    for c, chunk in enumerate(model):
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            for part, plain in plain_tensors(tensor):
                _update(parts["params"], f"{c}.{name}{part}", plain)
        for prefix, module in chunk.named_modules():
            for name, state, key in scaling_state(module):
                _update(parts["params"], f"{c}.{prefix}.{name}", state[key])
    for each in state_tensors(optimizer):
        _update(parts["main_params" if each.main else "moments"], each.name, each.tensor)
    parts["steps"].update(repr((step_counters(optimizer), Numbers(optimizer).read())).encode())
    parts["rng"].update(encode(capture_host_rng()))
    _update(parts["rng"], "torch", torch.get_rng_state())
    _update(parts["rng"], "device", torch.cuda.get_rng_state())
    for name, state in sorted(tracker_states().items()):
        _update(parts["rng"], name, state)
    counters = (args["consumed_train_samples"], args["consumed_valid_samples"], plain_fields(vars(scheduler)))
    parts["data"].update(repr(counters).encode())
    return {name: sha.hexdigest() for name, sha in parts.items()}
