"""Could this process train? A parked worker computes something with a known result, and copies over its device."""

from __future__ import annotations

import mmap
import os
import threading
from typing import Final

import torch
import xxhash

from deadpool_megatron import emulation
from deadpool_megatron.cluster import records as r
from deadpool_megatron.recovery import Session
from deadpool_megatron.vault import Scratch

_SIZE: Final = 256
_KNOWN: Final = 0x0981A7306CFCA931  # xxh3 of the product below, as 32-bit integers


class SelfChecks:
    """Answers `Check`s in a thread of their own: to take over does not wait for one.

    It touches no random numbers and nothing else that a training state has.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._next: r.Check | None = None
        self._works = False
        self._lock = threading.Lock()

    def begin(self, order: r.Check) -> None:
        """Check, after the one that is under way; of those that wait the newest one counts."""
        with self._lock:
            self._next = order
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, name="deadpool-check", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                order, self._next = self._next, None
                if order is None:
                    self._works = False
                    return
            injected = any(fault.kind == "fail-check" for fault in self._session.armed)
            try:
                why = check(order.path, int(injected))
            except Exception as err:  # noqa: BLE001 - whatever it is, it is what was looked for
                why = " ".join(f"{type(err).__name__}: {err}".split())[:500]
            self._session.tell(r.Checked(order.number, why))


def check(path: str, add: int = 0) -> str:
    """Why this process could not train, in one line; empty: it could.

    Args:
        path: of a `Scratch`: its first half is copied to the device, and from there into the second one.
        add: to the result of the computation, for trials.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.is_initialized() and not emulation.is_installed():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # (of this thread it would be the first one)
    if device.type == "cpu":
        return _check(path, add, device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        return _check(path, add, device)


def _check(path: str, add: int, device: torch.device) -> str:
    digest = xxhash.xxh3_64_intdigest((product(device) + add).to("cpu", torch.int32).numpy().tobytes())
    if digest != _KNOWN:
        return f"a product of matrices on {device} is wrong: {digest:016x} in the place of {_KNOWN:016x}"
    with open(path, "r+b") as file:
        source, target = Scratch.halves(memoryview(mmap.mmap(file.fileno(), 0)))
    there = torch.frombuffer(source, dtype=torch.uint8).to(device, copy=True)
    torch.frombuffer(target, dtype=torch.uint8).copy_(there)
    return ""


def product(device: torch.device) -> torch.Tensor:
    """Of two matrices of small integers: exact in every precision that a device may use for it."""
    index = torch.arange(_SIZE * _SIZE, dtype=torch.int32, device=device)
    left = (index * 7 % 13 - 6).to(torch.float32).view(_SIZE, _SIZE)
    right = (index * 5 % 11 - 5).to(torch.float32).view(_SIZE, _SIZE)
    return left @ right
