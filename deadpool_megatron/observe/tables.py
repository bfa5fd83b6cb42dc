"""Tables for the terminal: the grid of coordinates, the nodes, a recovery. Plain text where there is no terminal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from deadpool_megatron.observe.recoveries import PHASES, Recovery, recoveries

__all__ = ["grid_table", "job_tables", "make_console", "nodes_table", "phases_table", "ranks_text", "seconds_text"]

_MOST_CELLS = 64  # coordinates; above it the grid would fill screens, and the nodes' table says the same
_BAR = 24  # characters
_PLAIN_WIDTH = 118
_NODE_COLOURS: Final = ("cyan", "blue", "magenta", "yellow", "bright_cyan", "bright_blue", "bright_magenta")
_ROLE_STYLE: Final = {"active": "green", "spare": "cyan", "lost": "bold red"}
_MEANING: Final = {
    "detected": "the loss is known to the coordinator",
    "declared": "next epoch; the spare's slots take the lost coordinates",
    "aborted": "every survivor has left its training step",
    "agreed": "newest generation that every coordinate can give",
    "prepared": "spare has built the model and holds the lost shards",
    "reformed": "all process groups exist again, in place",
    "restored": "16-bit parameters gathered again",
    "resumed": "every rank trains",
}


def make_console() -> Console:
    """Colours and the terminal's width on a terminal; else plain text of a fixed width, so that nothing is cut."""
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, no_color=True, width=max(_PLAIN_WIDTH, shutil.get_terminal_size().columns))


def new_table(console: Console, **options: Any) -> Table:
    """A table in the style of all of ours: lines on a terminal, ASCII elsewhere."""
    shape = box.ROUNDED if console.is_terminal else box.ASCII2
    return Table(box=shape, title_justify="left", title_style="bold", header_style="bold", **options)


def seconds_text(seconds: float) -> str:
    """Seconds with a unit that keeps three digits."""
    return f"{seconds * 1000:.0f} ms" if abs(seconds) < 1 else f"{seconds:.2f} s"


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks as ranges: ``0-3, 6``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _node_style(node: int) -> str:
    return _NODE_COLOURS[node % len(_NODE_COLOURS)]


def _cell(members: Sequence[Mapping[str, Any]], lost: frozenset[int], moved: frozenset[int]) -> Text:
    out = Text()
    for c in sorted(members, key=lambda c: (c["tp"], c["rank"])):
        if out:
            out.append("\n")
        out.append(f"tp {c['tp']}  rank {c['rank']:<3} ")
        if c["node"] in lost:
            out.append(f"node {c['node']} lost", "bold red")
        elif c["rank"] in moved:
            out.append(f"node {c['node']} (took over)", "bold green")
        else:
            out.append(f"node {c['node']}", _node_style(c["node"]))
    return out


def grid_table(
    console: Console,
    status: Mapping[str, Any],
    lost: Iterable[int] = (),
    moved: Iterable[int] = (),
) -> Table | None:
    """The coordinates as a grid, pipeline stages down and data-parallel replicas across.

    Args:
        status: the content of ``status.json``.
        lost: nodes to be shown as lost where the status does not say so yet.
        moved: ranks that a spare has taken over.

    Returns:
        None before the coordinates are known, and for more of them than a screen holds.
    """
    coordinates = status["coordinates"]
    if not coordinates or len(coordinates) > _MOST_CELLS or any(c["tp"] is None for c in coordinates):
        return None
    gone = frozenset(lost) | {n["node"] for n in status["nodes"] if n["role"] == "lost"}
    cells: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for c in coordinates:
        cells.setdefault((c["pp"], c["dp"]), []).append(c)
    replicas = sorted({dp for _, dp in cells})
    table = new_table(console, title="coordinates", show_lines=True)
    table.add_column("")
    for dp in replicas:
        table.add_column(f"dp {dp}", no_wrap=True)
    for pp in sorted({pp for pp, _ in cells}):
        table.add_row(f"pp {pp}", *(_cell(cells.get((pp, dp), []), gone, frozenset(moved)) for dp in replicas))
    return table


def nodes_table(console: Console, status: Mapping[str, Any]) -> Table:
    """The nodes with their roles and processes."""
    table = new_table(console, title="nodes")
    for name in ("node", "role", "agent pid", "ranks", "worker pids"):
        table.add_column(name)
    spares = {s["node"]: s for s in status["spares"]}
    for n in status["nodes"]:
        mine = [c for c in status["coordinates"] if c["node"] == n["node"]]
        role = Text(n["role"], _ROLE_STYLE.get(n["role"], ""))
        pids = [c["pid"] for c in mine]
        if n["node"] in spares:
            role.append(f", {spares[n['node']]['state']}")
            pids = spares[n["node"]]["pids"]
        shown = ", ".join("-" if pid is None else str(pid) for pid in pids)
        table.add_row(str(n["node"]), role, str(n["agent_pid"] or "-"), ranks_text(c["rank"] for c in mine), shown)
    return table


def phases_table(
    console: Console, recovery: Recovery, zero: float, after: Sequence[tuple[str, str, float]] = ()
) -> Table:
    """Each phase of a recovery with its time since ``zero`` (unix seconds), and what it took.

    ``after`` are further rows (name, meaning, unix seconds), in order.
    """
    rows: list[tuple[str, str, float]] = []
    rows += [(name, _MEANING[name], recovery.times[name]) for name in PHASES if name in recovery.times]
    rows += after
    span = max((t - zero for _, _, t in rows), default=0.0) or 1.0
    full, empty = ("█", "·") if console.is_terminal else ("#", ".")
    table = new_table(console)
    table.add_column("phase", style="bold", no_wrap=True)
    table.add_column("what has happened then", overflow="fold")
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, style="green")
    before = zero
    for name, meaning, t in rows:
        first, last = (min(_BAR, max(0, round(_BAR * (x - zero) / span))) for x in (before, t))
        last = max(last, first + 1) if first < _BAR else _BAR
        bar = empty * first + full * (last - first) + empty * (_BAR - last)
        table.add_row(name, meaning, f"+{seconds_text(t - zero)}", seconds_text(t - before), bar)
        before = t
    return table


def _summary(status: Mapping[str, Any]) -> Text:
    iteration, committed = status["iteration"], status["generation"]["committed"]
    out = Text()
    out.append(status["phase"], "bold")
    out.append(f", epoch {status['epoch']}")
    out.append(f", last iteration {iteration}" if iteration >= 0 else ", no iteration yet")
    out.append(f", committed generation {committed}" if committed >= 0 else ", nothing committed yet")
    protection = status.get("protection")
    if protection and protection["groups"]:
        now, full = protection["survives_now"], protection["survives_when_full"]
        out.append(f"\nprotected against the loss of any {now} node{'s' * (now != 1)} now", "" if now else "yellow")
        if not protection["full"]:
            waits = ranks_text(protection["not_covered_yet"])
            out.append(f" (any {full} once node {waits} has its copies back)", "yellow")
        out.append(f"; when fully redundant: {protection['tolerated']}\n")
    age = time.time() - status["t"]
    if status["phase"] != "ended" and age > 5.0:
        out.append(f" (last change {age:.0f} s ago)", "yellow")
    return out


def job_tables(console: Console, status: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> RenderableType:
    """All that `deadpool status` shows of a job."""
    parts: list[RenderableType] = [_summary(status)]
    known = recoveries(events)
    moved = {rank for r in known for rank in r.replaced}
    grid = grid_table(console, status, moved=moved)
    if grid is not None:
        parts.append(grid)
    parts.append(nodes_table(console, status))
    if known:
        last = known[-1]
        how = {None: "under way", "resumed": f"resumed from iteration {last.generation}"}.get(last.end, last.end)
        lost = f"node {ranks_text(last.lost)} lost" if last.lost else "no node lost"
        parts.append(Text(f"last recovery (of {len(known)}): {lost}, {last.reason}; {how}", "bold"))
        parts.append(phases_table(console, last, last.began))
    return Group(*parts)
