"""The losses of an iteration on their way to the host, without anybody waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

_MOST: Final = 64  # losses of one iteration
_DEPTH: Final = 8  # iterations the host may be ahead of the device


class LossReport:
    """Hands each iteration's losses to ``tell`` as soon as they are on the host.

    Values on the host are told at once. Those on a device are copied to pinned memory behind the work that makes them,
    and told by a later `poll`; the order stays.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[torch.cuda.Event, torch.Tensor, list[str], Callable[[dict[str, float]], None]]]
        self._waiting = deque()
        self._buffers: list[torch.Tensor] = []
        self._events: list[torch.cuda.Event] = []
        self._used = 0

    def add(self, losses: Mapping[str, Any], tell: Callable[[dict[str, float]], None]) -> None:
        """An iteration's losses, by name: numbers or tensors of one element. Waits for nothing."""
        on_device = [v for v in losses.values() if torch.is_tensor(v) and v.device.type == "cuda"]
        if not on_device:
            tell({name: float(value) for name, value in losses.items()})
            return
        if not self._buffers:
            self._buffers = [torch.zeros(_MOST, dtype=torch.float64, pin_memory=True) for _ in range(_DEPTH)]
            self._events = [torch.cuda.Event() for _ in range(_DEPTH)]
        names = list(losses)[:_MOST]
        if len(self._waiting) == _DEPTH:
            self._waiting.popleft()  # so far ahead the report is not worth a wait
        buffer, event = self._buffers[self._used % _DEPTH], self._events[self._used % _DEPTH]
        self._used += 1
        with torch.no_grad():
            values = [torch.as_tensor(losses[name], device=on_device[0].device).reshape(()) for name in names]
            buffer[: len(names)].copy_(torch.stack([value.double() for value in values]), non_blocking=True)
        event.record()
        self._waiting.append((event, buffer, names, tell))

    def poll(self) -> None:
        """Tell what has arrived. Waits for nothing."""
        while self._waiting and self._waiting[0][0].query():
            _, buffer, names, tell = self._waiting.popleft()
            tell(dict(zip(names, buffer[: len(names)].tolist(), strict=True)))

    def drop(self) -> None:
        """Forget what is not told yet: its epoch has ended, and it may be garbage."""
        self._waiting.clear()

    def flush(self) -> None:
        """Tell all; waits for the device if need be."""
        if self._waiting:
            self._waiting[-1][0].synchronize()
            self.poll()
