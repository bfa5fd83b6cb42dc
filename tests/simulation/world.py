"""Time, chance and processes."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Pipe", "Process", "World"]

_LATE_S = 0.1  # a good part of the shortest iteration


class World:
    """The clock and what is due. ``trace``: a line for everything worth one, None where nobody looks."""

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.trace: list[str] | None = [] if trace else None
        self.slow = 1.0  # every delay of the network is so many times longer
        self.late_at = 0.0  # when the last message that took `_LATE_S` or longer over the network arrived
        self._heap: list[tuple[float, int, Process, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def clock(self) -> float:
        """Seconds since the start."""
        return self.now

    def say(self, who: str, what: object) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f} {who}: {what}")

    def push(self, at: float, process: Process, call: Callable[..., None], *args: Any) -> None:
        """``call`` is due, in ``process``."""
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, process, call, args))

    def step(self) -> bool:
        """The next event; False when nothing is due any more."""
        if not self._heap:
            return False
        self.now, _, process, call, args = heapq.heappop(self._heap)
        self.events += 1
        if process.frozen:
            process.do(call, *args)
        elif process.alive:
            call(*args)
        return True

    def delay(self, low: float, high: float) -> float:
        """Seconds; one in twenty takes ten times as long."""
        chance = self.chance.random
        seconds = low + (high - low) * chance()
        return seconds * 10 if chance() < 0.05 else seconds


class Process:
    """Lives, is frozen, thaws, dies. What is due while it is frozen happens when it thaws, in order."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.frozen = False
        self._late: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    def later(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        """Call it then, if this process lives."""
        self.world.push(self.world.now + seconds, self, call, *args)

    def do(self, call: Callable[..., None], *args: Any) -> None:
        """Now, or when it thaws."""
        if not self.alive:
            return
        if self.frozen:
            self._late.append((call, args))
        else:
            call(*args)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        self.frozen = False
        while self._late and self.alive and not self.frozen:
            call, args = self._late.popleft()
            call(*args)

    def die(self) -> None:
        """SIGKILL."""
        self.alive = False
        self._late.clear()


class Pipe:
    """One direction of one connection: what is sent arrives in order, each after a delay of its own."""

    def __init__(self, world: World, low: float, high: float, far: bool = False) -> None:
        """``far``: over the network."""
        self._world = world
        self._low = low
        self._high = high
        self._far = far
        self._last = 0.0

    def send(self, to: Process, call: Callable[..., None], *args: Any, late: float = 0.0) -> None:
        """``call`` happens in ``to`` when it arrives, so many seconds later than usual."""
        world = self._world
        delay = world.delay(self._low, self._high)
        self._last = max(self._last, world.now + late + (delay * world.slow if self._far else delay))
        if self._far and self._last - world.now >= _LATE_S:
            world.late_at = max(world.late_at, self._last)
        world.push(self._last, to, call, *args)
