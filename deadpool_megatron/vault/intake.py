"""One writer at a time for each copy: what an older epoch still brings must not land any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from .errors import Busy, StaleEpoch


class Intake:
    """One transfer. Its thread checks before it writes; `Intakes` cuts it off when another one is wanted.

    Attributes:
        left: nothing of it is written any more.
        is_cut: it is to end.
    """

    def __init__(self, what: str, epoch: int, before: Intake | None = None) -> None:
        self.epoch = epoch
        self.left = threading.Event()
        self.is_cut = False
        self._what = what
        self._before = before
        self._lock = threading.Lock()
        self._shuts: list[Callable[[], None]] = []

    def check(self) -> None:
        """Raises StaleEpoch once it is to end."""
        if self.is_cut:
            raise StaleEpoch(f"the transfer of {self._what} in epoch {self.epoch} is over: a newer one began")

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """It is not cut off in here; for what takes no time, as opening a slot. Raises StaleEpoch."""
        with self._lock:
            self.check()
            yield

    def add(self, shut: Callable[[], None]) -> None:
        """``shut`` wakes who reads from a connection of it, from any thread. Raises StaleEpoch once it is to end."""
        with self.allowed():
            self._shuts.append(shut)

    def cut(self) -> None:
        """End it. Any thread; returns at once."""
        with self._lock:
            self.is_cut = True
            shuts, self._shuts = self._shuts, []
        for shut in shuts:
            shut()

    def begin(self, patience_s: float) -> None:
        """Cut off the ones before and wait for them. Raises Busy when they do not leave in time."""
        deadline, before = time.monotonic() + patience_s, self._before
        while before is not None:  # one that was refused has left, and the one that it waited for may not have
            before.cut()
            if not before.left.wait(max(0.0, deadline - time.monotonic())):
                self.left.set()
                raise Busy(f"another transfer of {self._what} does not end")
            before = before._before
        self._before = None

    def __enter__(self) -> Intake:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._shuts.clear()
        self.left.set()


class Intakes:
    """All of one vault that go into own arenas, or all that go into what it keeps for others. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[Hashable, Intake] = {}
        self._epoch = 0

    def begin(self, key: Hashable, what: str, epoch: int, patience_s: float) -> Intake:
        """The one writer of ``key`` from now on; the one before is cut off and waited for.

        Raises StaleEpoch when ``epoch`` is over, Busy when the one before does not end within ``patience_s``.
        """
        with self._lock:
            before = self._newest.get(key)
            newest = max(self._epoch, before.epoch if before is not None else 0)
            if newest > epoch:
                raise StaleEpoch(f"{what} of epoch {epoch} refused: epoch {newest} has begun here")
            mine = self._newest[key] = Intake(what, epoch, before)
        mine.begin(patience_s)
        return mine

    def end_before(self, epoch: int) -> None:
        """Cut off what belongs to older epochs; no more of them begins."""
        with self._lock:
            self._epoch = max(self._epoch, epoch)
            old = [intake for intake in self._newest.values() if intake.epoch < epoch]
        for intake in old:
            intake.cut()
