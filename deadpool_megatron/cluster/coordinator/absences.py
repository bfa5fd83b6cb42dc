"""Agents whose connection has ended: does the process live that had it?

A reset on the way ends a connection, too, so each may come back for a while (`Core.node_away`). Meanwhile its vault's
port is asked. Where it is refused nobody listens any more, and the process has ended. Who says the first word, as a
vault does, lives and can be reached. That a connection is taken says nothing: the kernel of a process that is stopped
takes it as well.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.link.reach import until_refused

Ask = Callable[[r.Address, Callable[[bool], None]], Callable[[], None]]
"""Asks an address until it refuses: calls what it is given with False for each word that is said, and then with True,
in any thread. Returns what ends the asking."""
_MOST_ASKED: Final = 64  # at a time


@dataclass(slots=True, eq=False)
class _Question:
    """Asked during one absence of a node."""

    stop: Callable[[], None] = lambda: None
    lives: bool = False  # its word has come


class Absences:
    """One thread uses it.

    Args:
        ask: None: over TCP.
    """

    def __init__(self, ask: Ask | None = None) -> None:
        self._ask = ask or _ask_over_tcp
        self._asked: dict[int, _Question] = {}  # by node
        self._answers: queue.SimpleQueue[tuple[int, _Question, bool]] = queue.SimpleQueue()

    @property
    def asks(self) -> bool:
        """An answer may come."""
        return bool(self._asked)

    def began(self, node: int, vault: r.Address) -> bool:
        """The connection of this node's agent has ended; its vault listens there (port 0: it has none).

        False: too many are asked, as after a reset of all connections at once, so the lease decides over this one.
        """
        self.over(node)
        if len(self._asked) >= _MOST_ASKED:
            return False
        if vault.port:
            question = self._asked[node] = _Question()
            question.stop = self._ask(vault, lambda refused: self._answers.put((node, question, refused)))
        return True

    def over(self, node: int) -> None:
        """It is back, or lost."""
        if node in self._asked:
            self._asked.pop(node).stop()

    def answers(self, awaits: Callable[[int], bool]) -> list[tuple[int, bool]]:
        """Of nodes that are still away, by ``awaits``, what was found out: whether the agent has ended, or it lives."""
        for node in [node for node in self._asked if not awaits(node)]:
            self.over(node)
        out: list[tuple[int, bool]] = []
        while not self._answers.empty():
            node, question, refused = self._answers.get()
            # (an answer of an earlier absence says nothing of this one, and more than one word says nothing new)
            if self._asked.get(node) is not question or (question.lives and not refused):
                continue
            out.append((node, refused))
            question.lives = True
            if refused:
                self.over(node)
        return out

    def close(self) -> None:
        """Ask nobody any more."""
        for node in [*self._asked]:
            self.over(node)


def _ask_over_tcp(vault: r.Address, tell: Callable[[bool], None]) -> Callable[[], None]:
    """In a thread; where none is left the lease decides."""
    stopped = threading.Event()

    def ask() -> None:
        if until_refused((vault.host, vault.port), stopped, lambda: tell(False)):
            tell(True)

    with suppress(RuntimeError):
        threading.Thread(target=ask, name="deadpool-absence", daemon=True).start()
    return stopped.set
