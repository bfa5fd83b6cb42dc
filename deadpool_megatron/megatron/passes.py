"""Upstream's ``cyclic_iter`` (megatron/training/training.py) with a position that another process can take up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class Passes:
    """Draws from a data loader, pass after pass, exactly as ``cyclic_iter`` does.

    A loader draws a seed from torch's random numbers when it begins a pass (with persistent workers, its first one),
    and that is when the first item after the end of the last pass is drawn. So an iterator at the end of a pass is not
    one at the begin of the next, and where a pass stands is more than which samples have been consumed.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._pass: Iterator[Any] | None = None
        self.drawn = 0  # items of the present pass; 0 only before the very first

    def __iter__(self) -> Passes:
        return self

    def __next__(self) -> Any:
        begun = self._pass is None
        while True:
            if self._pass is None:
                self._pass = iter(self._loader)
                self.drawn = 0
            for item in self._pass:
                self.drawn += 1
                return item
            if begun:
                raise RuntimeError("the data loader has no data: is the data set empty, or smaller than a batch?")
            self._pass, begun = None, True

    def seek(self, drawn: int) -> None:
        """Stand where ``drawn`` items of a pass have been drawn. Moves random numbers; call it before the first draw.

        A sampler that counts consumed samples stands there already (upstream builds it so); of any other one the
        present pass is drawn again up to there.
        """
        loader: Any = self._loader
        sampler: Any = getattr(loader, "batch_sampler", None)
        consumed = getattr(sampler, "consumed_samples", None)
        self.drawn = drawn
        if consumed is None:
            self._pass = iter(loader)
            for _ in range(drawn):
                next(self._pass)
        elif consumed % (sampler.total_samples - sampler.last_batch_size):
            self._pass = iter(loader)
        elif loader.persistent_workers:
            iter(loader)  # has begun a pass, so the next one draws no seed
            sampler.consumed_samples = consumed
