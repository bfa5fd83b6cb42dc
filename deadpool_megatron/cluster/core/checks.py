"""Could a parked spare take over? It is asked when it is parked, and again and again while it waits. Pure.

::

    parked, or the interval has passed -> CheckSpare .. SpareChecked -> fit, or *unfit*: taken where no other one is
                                                 '-- no answer within a deadline: unfit

Only while the job trains, and nothing waits for an answer: a check that a recovery comes between counts when its answer
comes, or is asked for anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from deadpool_megatron.cluster import records as r
from deadpool_megatron.cluster.core.effects import Effects, Persist, Send, emit
from deadpool_megatron.cluster.core.state import JobState
from deadpool_megatron.cluster.placement.redundancy import cost

DEADLINE_S: Final = 120.0
"""An answer takes a second; a machine that takes so long is none to take over."""
_PARTNERS: Final = 3


@dataclass(slots=True)
class _Check:
    """The newest one of a node. ``deadline``: None when it has been answered, or has passed."""

    number: int
    due: float  # the next one
    deadline: float | None


class SpareChecks:
    """The checks of one job's spares."""

    def __init__(self, state: JobState) -> None:
        self._state = state
        self._checks: dict[int, _Check] = {}
        self._number = 0
        self._look_at: float | None = 0.0

    @property
    def due(self) -> float | None:
        """When `tick` has something to do in a job that trains; None: when a spare has been parked."""
        return self._look_at if self._state.job.spare_check_s else None

    def ask_at(self, node: int, now: float) -> None:
        """Whatever was asked of a node, ask it anew, if it is a parked spare by then."""
        if self._state.members.nodes[node].role == "spare":
            self._checks.pop(node, None)
            self._look_at = now

    def tick(self, now: float) -> Effects:
        """Ask whose check is due; who has not answered in time is unfit. Only while the job trains."""
        if self.due is None or now < self.due:
            return
        ready = self._state.members.ready_spares()
        self._checks = {node: check for node, check in self._checks.items() if node in ready}
        for node in ready:
            check = self._checks.get(node)
            if check is not None and check.deadline is not None and now >= check.deadline:
                check.deadline = None
                yield from self._failed(node, f"its check has not been answered within {DEADLINE_S:g} s")
            if check is None or (check.deadline is None and now >= check.due):
                yield self._ask(node, now)
        times = [check.due if check.deadline is None else check.deadline for check in self._checks.values()]
        self._look_at = min(times, default=None)

    def _ask(self, node: int, now: float) -> Send:
        state = self._state
        self._number += 1
        self._checks[node] = _Check(self._number, now + state.job.spare_check_s, now + DEADLINE_S)
        trains = state.members.active()
        first = self._number * _PARTNERS  # others each time, and not the same for all
        partners = {trains[(first + i) % len(trains)] for i in range(_PARTNERS)}
        needed = 0
        if state.layout.known:
            needed = cost(state.protection.scheme, state.layout.largest, state.job.slots_per_node).memory_bytes
        return Send(node, r.CheckSpare(self._number, needed, sorted(partners)))

    def answered(self, record: r.SpareChecked) -> Effects:
        """A spare knows whether it could take over; also after the deadline, or in the middle of a recovery."""
        check, node = self._checks.get(record.node), self._state.members.nodes[record.node]
        if check is None or check.number != record.number or node.role != "spare":
            return
        check.deadline = None
        self._look_at = check.due if self._look_at is None else min(self._look_at, check.due)
        if record.why:
            yield from self._failed(record.node, record.why)
            return
        first = not node.checked
        was, node.unfit, node.checked = node.unfit, "", True
        if was or first:
            seconds, link_s = round(record.seconds, 6), round(record.link_s, 6)
            yield emit("checked", node=record.node, seconds=seconds, link_s=link_s, was=was)
        if was:
            yield Persist(("members",))

    def _failed(self, node: int, why: str) -> Effects:
        state = self._state.members.nodes[node]
        was, state.unfit, state.checked = state.unfit, why, True
        if not was:  # else the record would be full of it
            self._state.members.failed(node, "check", why)
        if was != why:
            yield emit("unfit", node=node, cause=why)
            yield Persist(("members",))
