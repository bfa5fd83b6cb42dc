"""Data iterators that can go back to the start of an iteration."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from deadpool_megatron.snapshot import capture_host_rng, restore_host_rng


class Passes:
    """Draws from a data loader, pass after pass, as upstream's ``cyclic_iter`` (megatron/training/training.py) does,
    with a position that another process can take up.

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


class ReplayIterator:
    """Hands on what ``source`` yields and remembers it, so that it can be drawn again.

    Sits under Megatron's `RerunDataIterator`, whose own replay ends with the iteration; a recovery may go back further.
    What was drawn before the oldest mark is forgotten. Items are remembered as shallow copies, since Megatron's batch
    functions may take entries out of the dictionaries they are given. ``owner`` is the iterator that draws from this.

    Drawing may move random numbers on (a loader's seed at the begin of a pass, `RandomSeedDataset` at every sample), so
    where they stood after a draw is remembered too.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.owner: Any = None
        self._drawn: deque[tuple[Any, dict[str, Any] | None, int]] = deque()  # item, random numbers, position after it
        self._first = 0  # index of _drawn[0]
        self._next = 0  # index of the next item to be handed out
        self._begin = 0  # position before _drawn[0]
        self._marks: dict[int, int] = {}

    @property
    def position(self) -> int:
        """Where this stands, for `seek` in another process: items drawn of the present pass (`Passes`), or of all."""
        index = self._next - self._first
        return self._drawn[index - 1][2] if index else self._begin

    def __iter__(self) -> ReplayIterator:
        return self

    def __next__(self) -> Any:
        index = self._next - self._first
        if index < len(self._drawn):
            item, random, _ = self._drawn[index]
            if random is not None:
                restore_host_rng(random)
        else:
            before = capture_host_rng()
            item = next(self.source)
            after = capture_host_rng()
            self._drawn.append((copy.copy(item), None if before == after else after, self._after(self.position)))
        self._next += 1
        return copy.copy(item)

    def _after(self, position: int) -> int:
        return self.source.drawn if isinstance(self.source, Passes) else position + 1

    def seek(self, position: int) -> None:
        """Stand where the iterator of another process stood. For one that was built there and has drawn nothing.

        What a source does at its first draw, the other one's did then: it is done now, and random numbers left alone.
        """
        before = capture_host_rng()
        try:
            if isinstance(self.source, Passes):
                self.source.seek(position)
            else:
                self._drawn.append((copy.copy(next(self.source)), None, position + 1))
        except StopIteration:
            pass  # validation data may be at their end
        finally:
            restore_host_rng(before)
        self._begin = position

    def mark(self, generation: int, keep_from: int) -> None:
        """Generation ``generation`` begins here; marks before generation ``keep_from`` are no longer needed."""
        self._marks = {g: p for g, p in self._marks.items() if keep_from <= g < generation}
        self._marks[generation] = self._next
        oldest = min(self._marks.values())
        while self._first < oldest:
            self._begin = self._drawn.popleft()[2]
            self._first += 1

    def remembers(self, generation: int) -> bool:
        """Whether `rewind` can go back to where ``generation`` began."""
        return generation in self._marks

    def renew(self, source: Iterator[Any], generation: int) -> None:
        """Draw from ``source`` from now on, which stands where ``generation`` begins; forget all that was drawn."""
        self.source = source
        self._drawn.clear()
        self._first = self._next = self._begin = 0
        self._marks = {generation: 0}

    def rewind(self, generation: int) -> None:
        """Go back to where ``generation`` began. Raises KeyError when that mark has been dropped."""
        self._next = self._marks[generation]
