"""Tables for the terminal: the grid of coordinates, the nodes, a recovery. Plain text of 80 columns elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from deadpool_megatron.observe.narrative import ranks_text, seconds_text
from deadpool_megatron.observe.recoveries import MEANING, PHASES, Recovery

_MOST_CELLS = 128  # coordinates; above it the grid would fill screens, and the nodes' table says the same
_PLAIN_WIDTH = 80
# Phases of `cluster.core.job.Phase` in which a recovery is under way.
RECOVERING: Final = ("aborting", "waiting for a spare", "restoring", "re-forming", "gathering parameters")
_WIDE = 100
_NODE_COLOURS: Final = ("cyan", "blue", "magenta", "yellow", "bright_cyan", "bright_blue", "bright_magenta")
_ROLE_STYLE: Final = {"active": "green", "spare": "cyan", "lost": "bold red"}
# Columns set apart by blanks, one line under the header: what fits into 80 columns, and survives being copied.
_PLAIN: Final = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def make_console() -> Console:
    """Colours and the terminal's width on a terminal; else plain text of 80 columns."""
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, no_color=True, width=_PLAIN_WIDTH)


def new_table(console: Console, **options: Any) -> Table:
    """A table in the style of all of ours: lines on a wide terminal, blanks between columns elsewhere."""
    lines = console.is_terminal and console.width >= _WIDE
    options.update(title_justify="left", title_style="bold", header_style="bold", pad_edge=lines)
    if not lines:
        options |= {"padding": (0, 1, 0, 0), "show_edge": False, "show_lines": False}
    return Table(box=box.ROUNDED if lines else _PLAIN, **options)


def _node_style(node: int) -> str:
    return _NODE_COLOURS[node % len(_NODE_COLOURS)]


# What a coordinate's node does while the job recovers, by the last step of the recovery that it has reached.
DOING: Final = {
    None: "aborting",
    "aborted": "restoring",
    "prepared": "re-forming",
    "reformed": "gathering",
    "restored": "starting",
    "resumed": "training",
}


def _state(c: Mapping[str, Any], phase: str, moved: frozenset[int] = frozenset()) -> str:
    """What to say of a coordinate beside its node: what it does while the job recovers, else the generation it holds.

    ``moved``: ranks that a spare has taken over.
    """
    if phase in RECOVERING and "step" in c:
        if c["step"] in (None, "aborted") and c["rank"] in moved:
            return "building"  # the spare that holds it had no step to leave
        return DOING.get(c["step"], str(c["step"]))
    return f"g{c['generation']}" if c.get("generation") is not None else "g-"


def _cell(
    members: Sequence[Mapping[str, Any]], lost: frozenset[int], moved: frozenset[int], phase: str, compact: bool
) -> Text:
    out = Text()
    for c in sorted(members, key=lambda c: (c.get("cp") or 0, c["tp"], c["rank"])):
        if out:
            out.append("\n")
        gone = c["node"] in lost
        mark = "!" if gone else "+" if c["rank"] in moved else " "
        style = "bold red" if gone else "bold green" if c["rank"] in moved else _node_style(c["node"])
        if compact:
            out.append(f"{c['rank']}@").append(f"{c['node']}{mark}", style)
            out.append(f"{'lost' if gone else _state(c, phase, moved)}")
        else:
            out.append(f"rank {c['rank']:<2} ").append(f"node {c['node']}{mark}", style)
            out.append(f" {'lost' if gone else _state(c, phase, moved)}")
    return out


def grid_table(
    console: Console, status: Mapping[str, Any], lost: Iterable[int] = (), moved: Iterable[int] = ()
) -> RenderableType | None:
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
    compact = len(replicas) * 24 > console.width - 8
    if compact and len(replicas) * 13 > console.width - 8:
        return None
    phase = str(status.get("phase", ""))
    table = new_table(console, title="coordinates", show_lines=True)
    table.add_column("")
    for dp in replicas:
        table.add_column(f"dp {dp}", no_wrap=True)
    for pp in sorted({pp for pp, _ in cells}):
        row = (_cell(cells.get((pp, dp), []), gone, frozenset(moved), phase, compact) for dp in replicas)
        table.add_row(f"pp {pp}", *row)
    legend = "g: newest generation held" + (", rank@node" if compact else "")
    legend += "; + taken over by a spare" if set(moved) else ""
    return Group(table, Text(legend, "dim"))


def nodes_table(console: Console, status: Mapping[str, Any], over: bool = False) -> Table:
    """The nodes with their roles and processes; ``over``: those that they had."""
    table = new_table(console, title="nodes, before the end" if over else "nodes")
    names = {n.get("name", "") for n in status["nodes"]}
    for name in ("node", *(("machine",) if len(names) > 1 else ()), "role", "agent pid", "ranks"):
        table.add_column(name, no_wrap=True)
    table.add_column("worker pids", overflow="fold")
    spares = {s["node"]: s for s in status["spares"]}
    for n in status["nodes"]:
        mine = [c for c in status["coordinates"] if c["node"] == n["node"]]
        role = Text(n["role"], _ROLE_STYLE.get(n["role"], ""))
        pids = [c["pid"] for c in mine]
        if n["node"] in spares:
            role.append("" if over else f", {spares[n['node']]['state']}")
            pids = spares[n["node"]]["pids"]
        shown = " ".join("-" if pid is None else str(pid) for pid in pids)
        machine = [n.get("name", "")] if len(names) > 1 else []
        table.add_row(
            str(n["node"]), *machine, role, str(n["agent_pid"] or "-"), ranks_text(c["rank"] for c in mine), shown
        )
    return table


def phases_table(
    console: Console, recovery: Recovery, zero: float, after: Sequence[tuple[str, str, float]] = ()
) -> Table:
    """Each phase of a recovery with its time since ``zero`` (unix seconds), and what it took.

    ``after`` are further rows (name, meaning, unix seconds), in order.
    """
    rows: list[tuple[str, str, float]] = []
    rows += [(name, MEANING[name], recovery.times[name]) for name in PHASES if name in recovery.times]
    rows += after
    span = max((t - zero for _, _, t in rows), default=0.0) or 1.0
    full, empty = ("█", "·") if console.is_terminal else ("#", ".")
    bar_width = 24 if console.width >= _WIDE else 12
    table = new_table(console)
    table.add_column("phase", style="bold", no_wrap=True)
    table.add_column("what is true then", overflow="fold")
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, style="green")
    before = zero
    for name, meaning, t in rows:
        first, last = (min(bar_width, max(0, round(bar_width * (x - zero) / span))) for x in (before, t))
        last = max(last, first + 1) if first < bar_width else bar_width
        bar = empty * first + full * (last - first) + empty * (bar_width - last)
        table.add_row(name, meaning, f"+{seconds_text(t - zero)}", seconds_text(t - before), bar)
        before = t
    return table
