"""The recoveries of a run, read out of its events. Pure: events in, records out; unknown events are passed over."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

PHASES: Final = ("detected", "declared", "aborted", "agreed", "prepared", "reformed", "restored", "compared", "resumed")
MEANING: Final = {  # short enough for a terminal of 80 columns
    "detected": "the coordinator knows of the loss",
    "declared": "next epoch; spares hold coordinates",
    "aborted": "every survivor has left its step",
    "agreed": "newest generation that all can give",
    "prepared": "model built, lost shards fetched",
    "reformed": "all process groups exist again",
    "restored": "16-bit parameters are gathered",
    "compared": "all ranks hold the same",
    "resumed": "every rank trains",
    "redone": "first iteration after it is done",
}
_PACE_WINDOW = 20


@dataclass(slots=True)
class Recovery:
    """From the first sign of a loss until training goes on; losses on the way belong to the same recovery.

    ``times`` are unix seconds by phase, in order; of a phase that was gone through again, the last time. ``steps`` are
    unix seconds by node and phase, as each node told it (its newest epoch). ``sources`` says by rank which node's vault
    gave its shard. ``end`` is ``"resumed"``, ``"shrunk"``, ``"saved"``, ``"stopped"`` or ``"started_over"`` (anew, for
    nothing was committed yet), None while it is under way. ``redone`` is the unix time at which the first iteration
    after it was complete, None before that.

    ``progress`` is the last completed iteration before the loss (-1: none), ``pace_s`` the usual seconds of one,
    ``taken_over`` says by lost node which node has its coordinates now, ``spares_left`` how many nodes are spare after
    it (None where the events do not say). ``stuck_since``: unix seconds of the last progress of a rank that was stuck
    and ended for it; None where none was. ``end_code``: the job's, where it ended.
    """

    epoch: int = 0
    lost: list[int] = field(default_factory=list)
    causes: dict[int, str] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    stood_by: list[int] = field(default_factory=list)  # ranks for which another process of their node did
    restarts: bool = False
    reason: str = ""
    purpose: str = "resume"
    generation: int | None = None
    sources: dict[int, int] = field(default_factory=dict)
    groups: int | None = None
    formed: tuple[int, int] | None = None  # groups re-formed, and all: summed over the ranks
    times: dict[str, float] = field(default_factory=dict)
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    active: list[int] = field(default_factory=list)
    new_nodes: list[int] = field(default_factory=list)
    progress: int = -1
    pace_s: float | None = None
    end: str | None = None
    end_message: str = ""
    end_code: int = 0
    names: dict[int, str] = field(default_factory=dict)  # of machines, by node, where there are several
    stuck_since: float | None = None
    directory: str = ""
    replicas: tuple[int, int] = (0, 0)  # that go on, and that there were, where they became fewer or more
    redone: float | None = None
    redone_iteration: int | None = None
    spares_left: int | None = None

    @property
    def first_sign(self) -> float:
        """Unix seconds of the last progress of what failed, where that is known; else as `began`."""
        return self.began if self.stuck_since is None else min(self.stuck_since, self.began)

    @property
    def began(self) -> float:
        """Unix seconds of the first event of it."""
        return next(iter(self.times.values()))

    @property
    def ended(self) -> float:
        """Unix seconds of the last thing known of it."""
        return max([*self.times.values(), *([self.redone] if self.redone is not None else [])])

    @property
    def what(self) -> str:
        """What failed and how that was seen, in a few words."""
        if self.lost:
            who = f"node {', '.join(map(self.called, self.lost))} lost"
        elif self.ranks:
            who = f"rank {', '.join(map(str, self.ranks))} ended, its node stays"
        else:
            who = "no node lost"
        causes = [cause for cause in dict.fromkeys(self.causes.values()) if cause]
        return f"{who}: {'; '.join(causes) or self.reason}"

    def called(self, node: int) -> str:
        """A node by its number, and the name of its machine where that is known."""
        return f"{node} ({self.names[node]})" if self.names.get(node) else str(node)

    @property
    def durations(self) -> dict[str, float]:
        """Seconds each phase took, from the one before it; with ``redone`` once that is known."""
        out: dict[str, float] = {}
        before = self.began
        rows: list[tuple[str, float]] = [(name, self.times[name]) for name in PHASES if name in self.times]
        if self.redone is not None:
            rows.append(("redone", self.redone))
        for name, t in rows:
            out[name] = t - before
            before = t
        return out

    @property
    def repeated(self) -> int | None:
        """How many completed iterations have to be done again; None before the generation is agreed."""
        return None if self.generation is None else max(0, self.progress + 1 - self.generation)

    def _phase(self, event: Mapping[str, Any]) -> None:
        name = event["event"]
        if name == "detected":
            self.causes.setdefault(event["node"], event.get("cause", ""))
            self.ranks = sorted({*self.ranks, *event.get("ranks", ())})
            if event.get("stood_by"):
                self.stood_by = sorted({*self.stood_by, *event["ranks"]})
                self.replaced = sorted({*self.replaced, *event["ranks"]})
            else:
                self.stood_by = sorted({*self.stood_by} - {*event.get("ranks", ())})
            if _is_node(event) and event.get("ranks") and event["node"] not in self.lost:
                self.lost.append(event["node"])  # the job may end before anything is declared
        elif name == "declared":
            self.epoch, self.reason = event["epoch"], event.get("reason", "")
            self.purpose = event.get("purpose", "resume")
            self.lost += [node for node in event.get("lost", ()) if node not in self.lost]
            self.replaced = sorted({*self.replaced, *event.get("replaced", ())})
            self.restarts = self.restarts or event.get("restarts", False)
            nodes = list(event.get("nodes", ()))
            before, self.active = set(self.active), nodes
            self.new_nodes += [n for n in nodes if before and n not in before and n not in self.new_nodes]
            self.steps.clear()
            for later in PHASES[PHASES.index("declared") :]:
                self.times.pop(later, None)
        elif name == "agreed":
            self.generation = event.get("iteration")
            self.sources = {int(rank): node for rank, node in event.get("sources", {}).items()}
        elif name == "reformed":
            self.groups = event.get("groups")
            self.formed = (event["changed"], event["of"]) if event.get("of") else None
        if name != "detected" or name not in self.times:
            self.times[name] = event["t"]


def _is_node(detected: Mapping[str, Any]) -> bool:
    """All of the node is gone, and not one of its workers alone."""
    return detected.get("rank") is None and detected.get("local") is None


class Story:
    """All of a run so far, folded event by event. What it does not know it passes over."""

    def __init__(self) -> None:
        self.recoveries: list[Recovery] = []
        self.active: list[int] = []
        self.spares: set[int] | None = None
        self.parked: set[int] = set()
        self.lost: set[int] = set()
        self.iteration = -1
        self.committed = -1
        self.committed_epoch = 0
        self.survives: tuple[int, int] | None = None  # epoch, how many nodes may be lost in it
        self.ended: Mapping[str, Any] | None = None
        self.names: dict[int, str] = {}
        self._paces: deque[float] = deque(maxlen=_PACE_WINDOW)
        self._now: Recovery | None = None
        self._awaits_iteration: Recovery | None = None
        self._stuck: dict[int, float] = {}  # by rank, unix seconds of its last progress

    @property
    def under_way(self) -> Recovery | None:
        """The recovery the job is in, if any."""
        return self._now

    @property
    def pace_s(self) -> float | None:
        """Usual seconds of an iteration: the median of the last ones, without those a recovery disturbed."""
        return statistics.median(self._paces) if self._paces else None

    def take(self, event: Mapping[str, Any]) -> Recovery | None:
        """Take one event; returns a recovery that is complete with it (its first iteration done, or the job ended)."""
        name = event["event"]
        done: Recovery | None = None
        if name == "started":
            total, spares = event.get("nodes", 0), event.get("spares", 0)
            self.names = dict(enumerate(event.get("names", ())))
            self.active = list(range(total - spares))
            self.spares = set(range(total - spares, total))
        elif name == "joined" and self.spares is not None:
            self.names[event["node"]] = event.get("name", "")
            self.spares.add(event["node"])
            self.lost.discard(event["node"])
        elif name == "parked":
            self.parked.add(event["node"])
        elif name == "left":
            self._leaves(event["node"])
        elif name == "committed":
            self.committed = event.get("iteration", self.committed)
            self.committed_epoch = event.get("epoch", 0)
        elif name == "protected":
            self.survives = (event.get("epoch", 0), event.get("survives", 0))
        elif name == "iteration":
            done = self._iteration(event)
        done = self._recovery(name, event) or done
        if name in ("finished", "stopped"):
            self.ended = event
            if done is None and self._awaits_iteration is not None:
                done, self._awaits_iteration = self._awaits_iteration, None
        return done

    def _leaves(self, node: int) -> None:
        self.lost.add(node)
        if self.spares is not None:
            self.spares.discard(node)

    def _iteration(self, event: Mapping[str, Any]) -> Recovery | None:
        self.iteration = event["iteration"]
        waiting = self._awaits_iteration
        if waiting is not None and event.get("epoch", 0) >= waiting.epoch:
            waiting.redone, waiting.redone_iteration = event["t"], event["iteration"]
            self._awaits_iteration = None
            return waiting
        if event["iteration"] > 0:  # the first one warms up
            self._paces.append(event.get("seconds", 0.0))
        return None

    def _recovery(self, name: str, event: Mapping[str, Any]) -> Recovery | None:
        interrupted: Recovery | None = None  # lost again before its first iteration was complete
        # Without a loss before it, a declaration answers a communication error with every node alive.
        if self._now is None and (name == "declared" or (name == "detected" and event.get("ranks"))):
            names = self.names if len(set(self.names.values())) > 1 else {}
            self._now = Recovery(names=names, progress=self.iteration, pace_s=self.pace_s, active=list(self.active))
            interrupted, self._awaits_iteration = self._awaits_iteration, None
        if name == "detected" and _is_node(event):
            self._leaves(event["node"])
        if name == "stuck":
            self._stuck[event["rank"]] = event["t"] - event.get("seconds", 0.0)
        if name in ("declared", "started_over") and self.spares is not None:
            nodes = list(event.get("nodes", ()))
            # A healthy node that gave way to a spare is one itself, with fresh workers.
            self.spares |= set(self.active) - set(event.get("lost", ()))
            self.spares -= set(nodes)
            self.active = nodes
        if name in ("shrunk", "grown"):
            self.active = list(event.get("nodes", ()))
            self.spares = set(event.get("spares", ()))
        now = self._now
        if now is None:
            return None
        if name == "detected":
            now.stuck_since = self._stuck.pop(event.get("rank", -1), now.stuck_since)
        if name in PHASES:
            now._phase(event)
        elif name == "step" and event.get("epoch") == now.epoch:
            now.steps.setdefault(event["node"], {})[event["step"]] = event["t"]
        if name not in ("resumed", "shrunk", "grown", "saved", "stopped", "started_over"):
            return interrupted
        now.end = name
        if name in ("shrunk", "grown"):
            now.generation, now.replicas = event.get("iteration"), (event.get("width", 0), event.get("was", 0))
        if name != "resumed":
            now.times.setdefault(name, event["t"])
            now.end_code = event.get("code", 0)
            now.end_message, now.directory = event.get("message", ""), event.get("directory", "")
        now.spares_left = None if self.spares is None else len(self.spares - self.lost)
        self.recoveries.append(now)
        self._now = None
        if name in ("resumed", "shrunk", "grown"):
            self._awaits_iteration = now
            return None
        return now


def recoveries(events: Iterable[Mapping[str, Any]]) -> list[Recovery]:
    """All recoveries, oldest first; the last one may still be under way. The loss of a spare is none."""
    story = Story()
    for event in events:
        story.take(event)
    return [*story.recoveries, story.under_way] if story.under_way is not None else story.recoveries
