"""Data iterators that can go back to the start of an iteration."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["ReplayIterator"]


class ReplayIterator:
    """Hands on what ``source`` yields and remembers it, so that it can be drawn again.

    Sits under Megatron's `RerunDataIterator`, whose own replay ends with the iteration; a recovery may go back further.
    What was drawn before the oldest mark is forgotten. Items are remembered as shallow copies, since Megatron's batch
    functions may take entries out of the dictionaries they are given. ``owner`` is the iterator that draws from this.

    Drawing may move torch's random numbers on, so where they stood after a draw is remembered too: torch's DataLoader
    takes a seed when it begins to iterate, which with ``--dataloader-type cyclic`` is at the first draw of every epoch.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.owner: Any = None
        self._drawn: deque[Any] = deque()
        self._first = 0  # position of _drawn[0]
        self._next = 0  # position of the next item to be handed out
        self._marks: dict[int, int] = {}
        self._primed = False

    @property
    def started(self) -> bool:
        """Whether anything has been drawn before the present position, in this process or in those it stands for."""
        return self._primed or self._next > 0

    def __iter__(self) -> ReplayIterator:
        return self

    def __next__(self) -> Any:
        index = self._next - self._first
        if index < len(self._drawn):
            item, random = self._drawn[index]
            if random is not None:
                torch.set_rng_state(random)
        else:
            before = torch.get_rng_state()
            item = next(self.source)
            after = torch.get_rng_state()
            self._drawn.append((copy.copy(item), None if torch.equal(before, after) else after))
        self._next += 1
        return copy.copy(item)

    def prime(self) -> None:
        """Draw the next item ahead, leaving the random numbers alone.

        For a spare that begins where others have drawn before: what its source does at its first draw, they did then.
        """
        before = torch.get_rng_state()
        try:
            self._drawn.append((copy.copy(next(self.source)), None))
        except StopIteration:
            return  # validation data may be at their end
        finally:
            torch.set_rng_state(before)
        self._primed = True

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
        self._primed = False

    def rewind(self, generation: int) -> None:
        """Go back to where ``generation`` began. Raises KeyError when that mark has been dropped."""
        self._next = self._marks[generation]
