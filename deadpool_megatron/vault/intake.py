"""One transfer at a time into the own arena of a rank: what an older epoch still brings must not land any more."""

from __future__ import annotations

import threading
from typing import Protocol

from .errors import Refused, StaleEpoch


class _Channel(Protocol):
    def shut(self) -> None:
        """Wake whoever reads or writes. Any thread."""


class Intake:
    """One transfer. Its thread checks before it writes; `Intakes` cuts it off when another one is wanted."""

    def __init__(self, rank: int, epoch: int) -> None:
        self.rank = rank
        self.epoch = epoch
        self.left = threading.Event()
        self._lock = threading.Lock()
        self._channels: list[_Channel] = []
        self._cut = False

    @property
    def is_cut(self) -> bool:
        """It is to end. Any thread."""
        return self._cut

    def check(self) -> None:
        """Raises StaleEpoch once it is to end."""
        if self._cut:
            raise StaleEpoch(f"the transfer of rank {self.rank} in epoch {self.epoch} is over: a newer epoch began")

    def add(self, channel: _Channel) -> None:
        """What it reads from. Raises StaleEpoch once it is to end."""
        with self._lock:
            self.check()
            self._channels.append(channel)

    def cut(self) -> None:
        """End it. Any thread; returns at once."""
        with self._lock:
            self._cut = True
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.shut()

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
