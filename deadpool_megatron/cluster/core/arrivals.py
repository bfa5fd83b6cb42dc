"""Agents that are still to join, and until when they may. Pure."""

from __future__ import annotations

from collections.abc import Iterable


class Arrivals:
    """Who is awaited, at the start of the job and later.

    Args:
        join_s: seconds that an agent has to join.
    """

    def __init__(self, join_s: float) -> None:
        self._join_s = join_s
        self._due: dict[int, float] = {}
        self._begun = False

    def expect(self, nodes: Iterable[int], now: float) -> None:
        """These are to come from now on."""
        self._begun = True
        self._due |= dict.fromkeys(nodes, now + self._join_s)

    @property
    def begun(self) -> bool:
        """Somebody was ever awaited: the time of those that begin with the job runs."""
        return self._begun

    def without(self, nodes: Iterable[int]) -> bool:
        """They have joined, or are not awaited any more; True when one of them was."""
        return any([self._due.pop(node, None) is not None for node in nodes])

    def clear(self) -> None:
        """Nobody is awaited any more."""
        self._due.clear()

    @property
    def due(self) -> float | None:
        """When somebody is late; None when nobody is awaited."""
        return min(self._due.values(), default=None)

    def late(self, now: float) -> set[int]:
        """Whose time is over."""
        return {node for node, due in self._due.items() if now >= due}

    @property
    def why_late(self) -> str:
        """What is said of them."""
        return f"its agent has not joined within {self._join_s:g} s"
