"""The recoveries of a run, read out of its events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["PHASES", "Recovery", "recoveries"]

PHASES: Final = ("detected", "declared", "aborted", "agreed", "prepared", "reformed", "restored", "resumed")


@dataclass(slots=True)
class Recovery:
    """From the first sign of a loss until training goes on; losses on the way belong to the same recovery.

    ``times`` are unix seconds by phase, in order; of a phase that was gone through again, the last time. ``sources``
    says by rank which node's vault gave its shard. ``end`` is ``"resumed"``, ``"saved"`` or ``"stopped"``, None while
    it is under way.
    """

    epoch: int = 0
    lost: list[int] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    reason: str = ""
    generation: int | None = None
    sources: dict[int, int] = field(default_factory=dict)
    groups: int | None = None
    times: dict[str, float] = field(default_factory=dict)
    end: str | None = None

    @property
    def began(self) -> float:
        """Unix seconds of the first event of it."""
        return next(iter(self.times.values()))

    def _phase(self, event: Mapping[str, Any]) -> None:
        name = event["event"]
        if name == "declared":
            self.epoch, self.reason = event["epoch"], event["reason"]
            self.lost += [node for node in event["lost"] if node not in self.lost]
            self.replaced = sorted({*self.replaced, *event["replaced"]})
            for later in PHASES[PHASES.index("declared") :]:
                self.times.pop(later, None)
        elif name == "agreed":
            self.generation = event["iteration"]
            self.sources = {int(rank): node for rank, node in event["sources"].items()}
        elif name == "reformed":
            self.groups = event["groups"]
        if name != "detected" or name not in self.times:
            self.times[name] = event["t"]


def recoveries(events: Iterable[Mapping[str, Any]]) -> list[Recovery]:
    """All recoveries, oldest first; the last one may still be under way. The loss of a spare is none."""
    out: list[Recovery] = []
    now: Recovery | None = None
    for event in events:
        name = event["event"]
        # Without a loss before it, a declaration answers a communication error with every node alive.
        if now is None and (name == "declared" or (name == "detected" and event["ranks"])):
            now = Recovery()
        if now is None:
            continue
        if name in PHASES:
            now._phase(event)
        if name in ("resumed", "saved", "stopped"):
            now.end = name
            out.append(now)
            now = None
    return [*out, now] if now is not None else out
