"""Data iterators that can go back to the start of an iteration."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

__all__ = ["ReplayIterator"]


class ReplayIterator:
    """Hands on what ``source`` yields and remembers it, so that it can be drawn again.

    Sits under Megatron's `RerunDataIterator`, whose own replay ends with the iteration; a recovery may go back further.
    What was drawn before the oldest mark is forgotten. Items are remembered as shallow copies, since Megatron's batch
    functions may take entries out of the dictionaries they are given. ``owner`` is the iterator that draws from this.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.owner: Any = None
        self._drawn: deque[Any] = deque()
        self._first = 0  # position of _drawn[0]
        self._next = 0  # position of the next item to be handed out
        self._marks: dict[int, int] = {}

    def __iter__(self) -> ReplayIterator:
        return self

    def __next__(self) -> Any:
        index = self._next - self._first
        if index < len(self._drawn):
            item = self._drawn[index]
        else:
            item = next(self.source)
            self._drawn.append(copy.copy(item))
        self._next += 1
        return copy.copy(item)

    def mark(self, generation: int, keep_from: int) -> None:
        """Generation ``generation`` begins here; marks before generation ``keep_from`` are no longer needed."""
        self._marks = {g: p for g, p in self._marks.items() if keep_from <= g < generation}
        self._marks[generation] = self._next
        oldest = min(self._marks.values())
        while self._first < oldest:
            self._drawn.popleft()
            self._first += 1

    def remembers(self, generation: int) -> bool:
        """Whether `rewind` can go back to where ``generation`` began."""
        return generation in self._marks

    def renew(self, source: Iterator[Any], generation: int) -> None:
        """Draw from ``source`` from now on, which stands where ``generation`` begins; forget all that was drawn."""
        self.source = source
        self._drawn.clear()
        self._first = self._next = 0
        self._marks = {generation: 0}

    def rewind(self, generation: int) -> None:
        """Go back to where ``generation`` began. Raises KeyError when that mark has been dropped."""
        self._next = self._marks[generation]
