"""A recovery as bars: who did what, when. Pure: recoveries in, bars out; drawing is `observe.figures`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deadpool_megatron.observe.recoveries import PHASES, Recovery
from deadpool_megatron.observe.rundir import LOGS, read_node_logs

# What a bar can be, in order, with what it means.
ACTS: Final = {
    "detect": "detection (from the failure until the coordinator knows)",
    "abort": "leaving the step",
    "agree": "agreeing on a generation",
    "prepare": "building the model, fetching and restoring shards",
    "re-form": "re-forming process groups",
    "gather": "gathering 16-bit parameters",
    "compare": "comparing what all ranks hold",
    "start": "starting again",
    "redo": "first iteration",
    "wait": "waiting for others",
}
_ACTS: Final = ("agree", "abort", "agree", "prepare", "re-form", "gather", "compare", "start")  # after each phase
_MOST_ROWS = 20
_STRIKE: Final = re.compile(r"deadpool: fault \S+ strikes node (\d+) at ([\d.]+)")


@dataclass(frozen=True, slots=True)
class Bar:
    """One act of one row; ``start`` and ``end`` are seconds from the timeline's zero."""

    row: str
    act: str
    start: float
    end: float


@dataclass(slots=True)
class Timeline:
    """All bars of one recovery. ``zero`` is unix seconds; ``exact`` says whether the moment of the failure is known.

    If it is not, zero is the last sign of life of the node that failed, and detection took at most what is shown.
    ``left_out`` counts nodes without a row of their own, for pictures that would not fit a page.
    """

    recovery: Recovery
    zero: float
    exact: bool
    rows: list[str] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    left_out: int = 0


def deaths(run_dir: str | Path, events: Iterable[Mapping[str, Any]]) -> dict[int, list[tuple[float, bool]]]:
    """By node, the moments at which it failed: (unix seconds, exact).

    Exact are injected faults: the process that strikes writes the time to its log first. For other failures it is the
    node's last sign of life, the last line of its own log.
    """
    out: dict[int, list[tuple[float, bool]]] = {}
    for path in (Path(run_dir) / LOGS).glob("*.log"):
        if path.is_symlink():
            continue
        for node, when in _STRIKE.findall(path.read_text(errors="replace")):
            out.setdefault(int(node), []).append((float(when), True))
    for event in events:  # a fault that is injected at once strikes when it is asked for
        if event["event"] == "inject" and event.get("iteration") is None and event.get("node", -1) >= 0:
            out.setdefault(event["node"], []).append((event["t"], True))
    seen: dict[int, float] = {}
    for line in read_node_logs(run_dir):
        seen[line["node"]] = max(seen.get(line["node"], 0.0), line["t"])
    for node, when in seen.items():
        out.setdefault(node, []).append((when, False))
    return out


def _failure(r: Recovery, moments: Mapping[int, list[tuple[float, bool]]]) -> tuple[float, bool]:
    if r.stuck_since is not None:
        return r.first_sign, False
    known = [
        (exact, t) for node in r.causes for t, exact in moments.get(node, ()) if r.began - 300.0 < t <= r.began + 0.001
    ]
    if not known:
        return r.began, False
    exact, t = max(known)
    return min(t, r.began), exact


def timeline(r: Recovery, moments: Mapping[int, list[tuple[float, bool]]] | None = None) -> Timeline:
    """Lay one recovery out. ``moments`` as from `deaths`; without them detection is not shown."""
    zero, exact = _failure(r, moments or {})
    out = Timeline(r, zero, exact)

    def bar(row: str, act: str, start: float | None, end: float | None) -> None:
        if start is not None and end is not None and end > start:
            out.bars.append(Bar(row, act, start - zero, end - zero))

    t = r.times
    out.rows.append("job")
    bar("job", "detect", zero, t.get("detected", t.get("declared")))
    acts = dict(zip(PHASES[1:], _ACTS, strict=True))
    before = t.get("declared")
    for name in PHASES[2:]:
        bar("job", acts[name], before, t.get(name))
        before = t.get(name, before)
    bar("job", "redo", t.get("resumed"), r.redone)
    nodes = sorted({*r.active, *r.lost, *r.steps})
    shown = _choose(r, nodes)
    out.left_out = len(nodes) - len(shown)
    for node in shown:
        row = f"node {node}" + (" (lost)" if node in r.lost else " (spare)" if node in r.new_nodes else "")
        out.rows.append(row)
        if node in r.lost:
            bar(row, "detect", zero, t.get("detected", t.get("declared")))
            continue
        s = r.steps.get(node, {})
        declared, agreed, formed = t.get("declared"), t.get("agreed"), t.get("prepared")
        if node in r.new_nodes:  # it had no step to leave, and builds from the declaration on
            bar(row, "prepare", declared, s.get("prepared"))
        else:
            bar(row, "abort", declared, s.get("aborted"))
            bar(row, "wait", s.get("aborted"), agreed)
            bar(row, "prepare", agreed, s.get("prepared"))
        bar(row, "wait", s.get("prepared"), formed)
        bar(row, "re-form", formed, s.get("reformed"))
        bar(row, "gather", s.get("reformed"), s.get("restored"))
        bar(row, "start", s.get("restored"), s.get("resumed"))
        bar(row, "redo", s.get("resumed"), r.redone)
    return out


def _choose(r: Recovery, nodes: list[int]) -> list[int]:
    """The nodes to show: the lost ones and the spares that came, then those who were last to resume."""
    if len(nodes) <= _MOST_ROWS:
        return nodes
    first = [n for n in nodes if n in r.lost or n in r.new_nodes][:_MOST_ROWS]
    rest = sorted((n for n in nodes if n not in first), key=lambda n: -max(r.steps.get(n, {}).values(), default=0.0))
    return sorted(first + rest[: _MOST_ROWS - len(first)])
