"""Is the coordinator gone, or are we? An agent that lost the coordinator asks the other agents.

A node that reaches more than half of the nodes (itself counted) is on the side that goes on: then it is the coordinator
that is away, and training must not notice. A node that does not, and still does not half a lease later, is cut off: it
fences itself, because the others have gone on, or will, without it.

In a large job it asks a sample, drawn anew each time: all of them asking all others would be a connection for each pair
of nodes at the one moment when the coordinator is away.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.link.reach import CONNECT_S, reached

_MOST_ASKED = 64  # of a job cut one to three, a node of the larger part finds itself cut off once in 100,000 times


def on_smaller_side(reached: int, others: int) -> bool:
    """Does a node that has lost the coordinator, and reaches ``reached`` of the ``others``, have to fence itself?"""
    return (reached + 1) * 2 <= others + 1


class Fence:
    """One agent's doubt. `cut_off` is called a few times a second; connecting is done in a thread.

    Args:
        ask: connects to addresses, and calls what it is given with how many have answered; None: over TCP.
        chance: draws the sample.
    """

    def __init__(
        self,
        node: int,
        lease: float,
        ask: Callable[[list[r.Address], Callable[[int], None]], None] | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self._node = node
        self._ask = ask or _ask_over_tcp
        self._chance = chance or random.Random()
        self._lease = lease
        self._since: float | None = None
        self._reached: int | None = None
        self._ask_at = 0.0
        self._alone_since: float | None = None
        self._others = 0

    def connected(self) -> None:
        """The coordinator is there."""
        self._since = None

    def cut_off(self, vaults: Mapping[int, r.Address], now: float) -> bool:
        """The connection to the coordinator is down. True when this node is on the smaller side."""
        if self._since is None:
            self._since, self._reached, self._alone_since = now, None, None
            self._ask_at = now + self._lease
        if self._reached is not None:
            alone = on_smaller_side(self._reached, self._others)
            self._reached = None
            if not alone:
                self._alone_since = None
            elif self._alone_since is None:
                self._alone_since = now
            if self._alone_since is not None:  # it may be a cut of a moment, which the lease of others forgives
                self._ask_at = now + self._lease / 8
                return now - self._alone_since >= self._lease / 2
        if now >= self._ask_at:
            self._ask_at = now + self._lease + CONNECT_S
            others = [a for node, a in vaults.items() if node != self._node]
            if len(others) > _MOST_ASKED:
                others = self._chance.sample(others, _MOST_ASKED)
            self._others = len(others)
            self._ask(others, self._answered)
        return False

    def _answered(self, reached: int) -> None:
        self._reached = reached


def _ask_over_tcp(others: list[r.Address], tell: Callable[[int], None]) -> None:
    """In a thread. Where none is left nothing is told, and they are asked again."""

    def ask() -> None:
        tell(reached([(each.host, each.port) for each in others]))

    with suppress(RuntimeError):
        threading.Thread(target=ask, name="deadpool-fence", daemon=True).start()
