"""A coordinator that starts again, or wakes after a standstill, waits for its agents to come back, and learns what each
was in the midst of. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable


class Reunion:
    """Who is expected back. Over, and without effect, from the moment all are there or given up."""

    def __init__(self) -> None:
        self._expected: set[int] = set()
        self._unsettled = ""
        self._until = 0.0

    def begin(self, nodes: Iterable[int], unsettled: str, until: float) -> None:
        """These agents were there, and have until then; ``unsettled``: what was under way already, may be empty."""
        self._expected = set(nodes)
        self._unsettled = unsettled
        self._until = until

    def also(self, node: int, until: float) -> None:
        """The connection of this one ended while the coordinator stood still; it has until then to come back."""
        self._expected.add(node)
        self._until = until

    @property
    def waits(self) -> bool:
        """Somebody is not back."""
        return bool(self._expected)

    @property
    def due(self) -> float | None:
        """When those who are not back are given up; None when all are."""
        return self._until if self._expected else None

    @property
    def expected(self) -> set[int]:
        """Who is not back."""
        return self._expected

    def without(self, nodes: Iterable[int]) -> None:
        """Back, or lost."""
        self._expected -= set(nodes)

    def remember(self, unsettled: str) -> None:
        """Something that an epoch has to settle when all are back. The first is what is told."""
        self._unsettled = self._unsettled or unsettled

    def end(self) -> tuple[set[int], str]:
        """Nobody is waited for any more. Who has not come back, and what an epoch has to settle."""
        missing, self._expected = self._expected, set()
        unsettled, self._unsettled = self._unsettled, ""
        return missing, unsettled
