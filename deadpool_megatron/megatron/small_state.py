"""Small state: everything but the optimizer's tensors that an iteration depends on, captured at its start.

The reference list is upstream's checkpoint (megatron/training/checkpointing.py, get_rng_state and
generate_state_dict) plus what a checkpoint does not need and a bitwise retry does: the log's accumulators, module
buffers that forward passes change, and the run's counters (`host.Fields`).

Two halves. What the host holds is encoded at once, some KB. What a device holds (buffers, the loss scale, scales of
FP8, sums of losses) is copied on the device into tensors of ours by one batched call, and those travel with the unique
state: so nothing here waits for the device.
"""

from __future__ import annotations

import time
from typing import Any, Final

import torch
from megatron.core import tensor_parallel
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine

from deadpool_megatron.megatron.frozen import Frozen
from deadpool_megatron.megatron.host import Host
from deadpool_megatron.megatron.low_precision import first_module, put_first_module, register, registered, scaling_state
from deadpool_megatron.megatron.optimizer_state import Numbers, members, plain_fields, put_fields
from deadpool_megatron.megatron.sums import cumulative, put_cumulative
from deadpool_megatron.snapshot import capture_host_rng, decode, encode, restore_host_rng

_LOGGED: Final = 256  # sums of losses that are staged; Megatron has a handful
# Buffers that follow from the model's config alone and are large: tables of rotary embeddings (YarnRotaryEmbedding).
_DERIVED: Final = frozenset(("cos_cached", "sin_cached"))
# What the rerun state machine knows from iteration to iteration: its reports are collectives at every Nth, and results
# of the first one in a process are not looked at.
_RERUN: Final = ("current_iteration", "first_iteration_complete", "large_value_counts", "max_values")
_LATER: Final = frozenset(("rerun.first_iteration_complete",))  # generations of older versions do not have them


class _Staged:
    """Copies of device tensors that change before the commit gate, taken at the start of an iteration.

    The live ones are looked up each time: Megatron replaces some instead of changing them. One that is no more of the
    dtype and shape that it had at the begin, or was none then, has no place in the shard: it is *loose*, and goes with
    the host's half.
    """

    def __init__(self, model: list[Any], scalers: list[Any]) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []
        self._names: list[str] = []
        self._absent: dict[str, tuple[dict[str, Any], str]] = {}
        for c, chunk in enumerate(model):
            for prefix, module in chunk.named_modules():
                if hasattr(module, "_maintain_float32_expert_bias"):  # upstream does so at its first forward pass
                    module._maintain_float32_expert_bias()
                for name, buffer in module._buffers.items():
                    if name in _DERIVED:
                        continue
                    full = f"small.chunk{c}.{prefix}.{name}"
                    if buffer is None:
                        self._absent[full] = (module._buffers, name)
                        continue
                    self._places.append((module._buffers, name))
                    self._names.append(full)
                for name, state, key in scaling_state(module):
                    self._places.append((state, key))
                    self._names.append(f"small.chunk{c}.{prefix}.{name}")
        for s, scaler in enumerate(scalers):
            self._places.append((vars(scaler), "_scale"))
            self._names.append(f"small.scaler{s}")
        with torch.no_grad():
            self._copies = [place[name].detach().clone().contiguous() for place, name in self._places]
            device = torch.device("cuda", torch.cuda.current_device())
            self._sums = torch.zeros(_LOGGED, dtype=torch.float32, device=device)
        self._slots = [self._sums[i] for i in range(_LOGGED)]
        self.items = [*zip(self._names, self._copies, strict=True), ("small.log", self._sums)]

    def take(self, log: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Copy all; returns ``log`` with each device tensor replaced by where its value is, and loose tensors by name.

        Waits for nothing.
        """
        live: list[torch.Tensor] = []
        copies: list[torch.Tensor] = []
        loose = {full: place[name] for full, (place, name) in self._absent.items() if place[name] is not None}
        for full, (place, name), copy in zip(self._names, self._places, self._copies, strict=True):
            tensor = place[name]
            if tensor.dtype is copy.dtype and tensor.shape == copy.shape:
                live.append(tensor)
                copies.append(copy)
            else:
                loose[full] = tensor
        described: dict[str, Any] = {}
        used = 0
        for key, value in log.items():
            staged = torch.is_tensor(value) and value.numel() == 1 and value.dtype == torch.float32
            if staged and used < _LOGGED:
                described[key] = {"slot": used, "shape": list(value.shape)}
                live.append(value.detach().reshape(()))
                copies.append(self._slots[used])
                used += 1
            else:
                described[key] = value
        if live:
            with torch.no_grad():
                torch._foreach_copy_(copies, live)
        return described, loose

    def put_back(self, described: dict[str, Any], loose: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The reverse of `take`; returns the log."""
        log: dict[str, Any] = {}
        device = self._sums.device
        with torch.no_grad():
            for full, (place, name), copy in zip(self._names, self._places, self._copies, strict=True):
                tensor, right = place[name], loose.get(full, copy)
                if tensor.dtype is right.dtype and tensor.shape == right.shape:
                    tensor.copy_(right)
                else:  # as upstream does it, so that whoever holds the buffer sees it
                    tensor.data = right.to(tensor.device, copy=True)
            for full, (place, name) in self._absent.items():
                place[name] = loose[full].to(device, copy=True) if full in loose else None
            for key, value in described.items():
                if isinstance(value, dict):
                    log[key] = self._slots[value["slot"]].clone().reshape(value["shape"])
                else:
                    log[key] = value
        return log


def unlike(one: bytes, other: bytes) -> list[str]:
    """In what a capture and a later one differ, by name; how long an interval has lasted is not part of the state."""
    states = [_leaves(decode(data) | {"interval_s": 0.0}) for data in (one, other)]
    names = states[0].keys() | states[1].keys() - (_LATER - states[0].keys())
    return sorted(name for name in names if states[0].get(name) != states[1].get(name))


def _leaves(state: dict[str, Any], prefix: str = "") -> dict[str, bytes]:
    out: dict[str, bytes] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            out |= _leaves(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = encode({"": value})
    return out


def positions(data: bytes) -> list[int]:
    """By data iterator, where it stood when the small state was captured (`ReplayIterator.position`)."""
    found: list[int] = decode(data)["positions"]
    return found


def tracker_states() -> dict[str, torch.Tensor]:
    """By name, the states of upstream's random number tracker; in graph-safe mode it holds live generators."""
    states = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {name: s.get_state() if isinstance(s, torch.Generator) else s for name, s in states.items()}


class SmallState:
    """Captures and restores the small state of one coordinate.

    Args:
        model, optimizer, scheduler: Megatron's own; ``model`` is the list of model chunks. The optimizer's state must
            have been made (`UniqueState`).
        frozen: parameters that are in no generation.
        scaled: modules with delayed scaling (`prepare_scaling`).
    """

    def __init__(
        self,
        host: Host,
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        frozen: Frozen,
        scaled: list[tuple[str, Any]],
    ) -> None:
        self._scaled = scaled
        self._frozen = frozen
        self._host = host
        self._scheduler = scheduler
        self._numbers = Numbers(optimizer)
        scalers = (getattr(member.optimizer, "grad_scaler", None) for member in members(optimizer))
        self._scalers = list({id(scaler): scaler for scaler in scalers if scaler is not None}.values())
        self._staged = _Staged(model, self._scalers)
        self.log: dict[str, Any] = {}
        self.logged_before = False
        self.positions: list[int] = []  # by data iterator

    def items(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors of the half that travels with the unique state; they hold still until the next `capture`."""
        return self._staged.items

    def capture(self, iteration: int) -> bytes:
        """The host's half of the state at the start of ``iteration``, and the staging of the device's half.

        Waits for no device, unless a buffer has become loose (`_Staged`), and allocates nothing on one.
        """
        log, loose = self._staged.take(self.log | cumulative())
        return encode(
            {
                "args": self._host.fields.read(iteration),
                "host_rng": capture_host_rng(),
                "device_rng": torch.cuda.get_rng_state().numpy().tobytes(),
                "tracker": {name: state.numpy().tobytes() for name, state in tracker_states().items()},
                "scheduler": plain_fields(vars(self._scheduler)),
                "numbers": self._numbers.read(),
                "scalers": [
                    {k: v for k, v in scaler.state_dict().items() if not torch.is_tensor(v)} for scaler in self._scalers
                ],
                "log": log,
                "loose": loose,
                "logged_before": self.logged_before,
                "positions": self.positions,
                "frozen": self._frozen.expected,
                "first_module": first_module(),
                "registered": registered(self._scaled),
                "interval_s": _interval_s(self._host),
                "rerun": _rerun(),
            }
        )

    def restore(self, data: bytes) -> None:
        """Make the live small state that of ``data`` and of `items`."""
        state = decode(data)
        self._host.fields.write(state["args"])
        restore_host_rng(state["host_rng"])
        torch.cuda.set_rng_state(_as_state(state["device_rng"]))
        _restore_tracker(state["tracker"])
        # What the scheduler has set in the groups is among their numbers: it does not step here.
        put_fields(vars(self._scheduler), state["scheduler"])
        self._numbers.write(state["numbers"])
        self._frozen.expected = state["frozen"]
        self.log = put_cumulative(self._staged.put_back(state["log"], state["loose"]))
        for scaler, saved in zip(self._scalers, state["scalers"], strict=True):
            if saved:  # a constant one has nothing to load
                scaler.load_state_dict({**saved, "scale": scaler.scale.clone()})
        put_first_module(state["first_module"])
        register(self._scaled, state["registered"])
        self.logged_before = state["logged_before"]
        # train() starts it again where it was stopped: what it prints is divided by all iterations of the interval.
        self._host.timers("interval-time", log_level=0)._elapsed = state["interval_s"]
        _put_rerun(state["rerun"])
        update_num_microbatches(self._host.args["consumed_train_samples"], consistency_check=False)


def _interval_s(host: Host) -> float:
    """Seconds since the last line of the log, of which upstream prints the mean of an iteration."""
    timer = host.timers("interval-time", log_level=0)
    return float(timer._elapsed + (time.time() - timer._start_time if timer._started else 0.0))


def _rerun() -> dict[str, Any]:
    machine = get_rerun_state_machine()
    return {name: getattr(machine, name) for name in _RERUN}


def _put_rerun(saved: dict[str, Any]) -> None:
    machine = get_rerun_state_machine()
    for name, value in saved.items():
        setattr(machine, name, value)


def _as_state(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _restore_tracker(saved: dict[str, bytes]) -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    for name, value in saved.items():
        current = states.get(name)
        if isinstance(current, torch.Generator):
            current.set_state(_as_state(value))
        else:
            states[name] = _as_state(value)
    tracker.set_states(states)
    if hasattr(tracker, "_current_state_name"):
        tracker._current_state_name = "default-rng"
