"""One transfer at a time into the own arena of a rank: what an older epoch still brings must not land any more."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .errors import Refused, StaleEpoch


class Intake:
    """One transfer. Its thread checks before it writes; `Intakes` cuts it off when another one is wanted.

    Attributes:
        is_cut: it is to end.
    """

    def __init__(self, rank: int, epoch: int) -> None:
        self.rank = rank
        self.epoch = epoch
        self.left = threading.Event()
        self.is_cut = False
        self._lock = threading.Lock()
        self._shuts: list[Callable[[], None]] = []

    def check(self) -> None:
        """Raises StaleEpoch once it is to end."""
        if self.is_cut:
            raise StaleEpoch(f"the transfer of rank {self.rank} in epoch {self.epoch} is over: a newer epoch began")

    def add(self, shut: Callable[[], None]) -> None:
        """``shut`` wakes who reads from a connection of it, from any thread. Raises StaleEpoch once it is to end."""
        with self._lock:
            self.check()
            self._shuts.append(shut)

    def cut(self) -> None:
        """End it. Any thread; returns at once."""
        with self._lock:
            self.is_cut = True
            shuts, self._shuts = self._shuts, []
        for shut in shuts:
            shut()

    def __enter__(self) -> Intake:
        return self

    def __exit__(self, *error: object) -> None:
        self.left.set()


class Intakes:
    """All of one vault. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[int, Intake] = {}

    def begin(self, rank: int, epoch: int, patience_s: float) -> Intake:
        """The one transfer into the own arena of ``rank`` from now on; the one before is cut off and waited for.

        Raises StaleEpoch when the one before is of a newer epoch, Refused when it does not end within ``patience_s``.
        """
        with self._lock:
            before = self._newest.get(rank)
            mine = Intake(rank, epoch)
            if before is not None and before.epoch > epoch:
                raise StaleEpoch(f"rank {rank} is fetched in epoch {before.epoch} already, not in {epoch}")
            self._newest[rank] = mine
        if before is not None:
            before.cut()
            if not before.left.wait(patience_s):
                mine.left.set()
                raise Refused(f"another transfer of rank {rank} does not end", "busy")
        return mine

    def end_before(self, epoch: int) -> None:
        """Cut off what belongs to older epochs."""
        with self._lock:
            old = [intake for intake in self._newest.values() if intake.epoch < epoch]
        for intake in old:
            intake.cut()
