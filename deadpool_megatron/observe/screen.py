"""One screen of a job, of any size, on a terminal of any size: what it does, what is wrong, its nodes, what happened.

Lines are given out from the top: the headline, protection, spares and the last recovery are always there, then what is
abnormal; the nodes take the richest form that leaves room for some events: a line each, cells with names, with numbers,
one character each, or for thousands only those that are not as they should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from deadpool_megatron.cluster.records.values import few_nodes
from deadpool_megatron.observe.narrative import ranks_text
from deadpool_megatron.observe.tables import DOING, RECOVERING

_LEAST_EVENTS: Final = 3
_MOST_EVENTS: Final = 15
_NAMED: Final = 3  # nodes that a line names; the rest is counted
_GROUP: Final = 10  # characters between blanks
# By the state of a node: its character where there is room for one only, its colour, and what the legend says.
_STATES: Final = {
    "active": ("#", "green", "trains"),
    "recovering": ("r", "yellow", "recovers"),
    "spare": ("s", "cyan", "warm spare"),
    "starting": ("~", "blue", "spare that starts"),
    "leaving": ("d", "magenta", "is drained"),
    "lost": ("X", "bold red", "lost"),
    "left": (".", "bright_black", "has left"),
}


@dataclass(frozen=True, slots=True)
class Node:
    """One node as the screen shows it; ``name`` is empty where all nodes are on one machine."""

    number: int
    name: str
    state: str
    ranks: tuple[int, ...]
    generation: int | None
    step: str | None

    @property
    def called(self) -> str:
        """Number and name."""
        return f"{self.number} {self.name}".rstrip()


def nodes_of(status: Mapping[str, Any]) -> list[Node]:
    """The nodes of a ``status.json``, by number."""
    names = {n.get("name", "") for n in status["nodes"]}
    held: dict[int, list[Mapping[str, Any]]] = {}
    for c in status["coordinates"]:
        held.setdefault(c["node"], []).append(c)
    spares = {s["node"]: s["state"] for s in status["spares"]}
    recovers = status["phase"] in RECOVERING
    out = []
    for n in status["nodes"]:
        mine = held.get(n["node"], [])
        state = str(n["role"])
        step = mine[0].get("step") if mine else None
        if state == "spare" and spares.get(n["node"]) != "parked":
            state = "starting"
        elif state == "active" and recovers and step != "resumed":
            state = "recovering"
        generation = mine[0].get("generation") if mine else None
        name = n.get("name", "") if len(names) > 1 else ""
        out.append(Node(n["node"], name, state, tuple(c["rank"] for c in mine), generation, step))
    return out


def named(nodes: Sequence[Node]) -> str:
    """A few nodes by number and name, the rest counted."""
    return few_nodes([f"{n.number} ({n.name})" if n.name else n.number for n in nodes], _NAMED)


def waits_for(nodes: Iterable[Node]) -> list[Node]:
    """Of a recovery under way: those that are behind the others; nobody while all are at the same step."""
    order = list(DOING)
    reached = {n.number: order.index(n.step) for n in nodes if n.state == "recovering" and n.step in order}
    if len(set(reached.values())) < 2:
        return []
    least = min(reached.values())
    return [n for n in nodes if reached.get(n.number) == least]


# ---- forms of the nodes


def _legend(nodes: Sequence[Node], characters: bool) -> Text:
    out = Text("nodes: ", "bold")
    for state, (character, style, meaning) in _STATES.items():
        count = sum(n.state == state for n in nodes)
        if count:
            out.append(f"{character} " if characters else "", style).append(f"{count} {meaning}", style).append("  ")
    return out


def _style(node: Node) -> str:
    return _STATES.get(node.state, ("?", "", ""))[1]


def _character(node: Node) -> str:
    return _STATES.get(node.state, ("?", "", ""))[0]


def _lines(nodes: Sequence[Node], width: int) -> list[Text]:
    called = max(len(n.called) for n in nodes)
    out = []
    for n in nodes:
        doing = DOING.get(n.step, "") if n.state == "recovering" else _STATES.get(n.state, ("", "", n.state))[2]
        line = Text("  ").append(f"{n.called:<{called}}  {doing:<18}", _style(n))
        if n.ranks:
            line.append(f"  rank{'s' if len(n.ranks) > 1 else ''} {ranks_text(n.ranks)}")
            line.append("" if n.generation is None else f"  generation {n.generation}")
        out.append(line)
    return out


def _cells(nodes: Sequence[Node], width: int, label: Callable[[Node], str]) -> list[Text]:
    cell = max(len(label(n)) for n in nodes) + 2
    a_row = max(1, (width - 2) // cell)
    rows = math.ceil(len(nodes) / a_row)
    out = [Text("  ") for _ in range(rows)]
    for i, n in enumerate(nodes):  # along the rows, as one reads
        out[i // a_row].append(f"{label(n):<{cell}}", _style(n))
    return out


_named_cells = partial(_cells, label=lambda n: f"{_character(n)} {n.called}")
_numbers = partial(_cells, label=lambda n: f"{_character(n)}{n.number}")


def _characters(nodes: Sequence[Node], width: int) -> list[Text]:
    first = len(str(nodes[-1].number)) + 4
    groups = max(1, (width - first) // (_GROUP + 1))
    a_row = groups * _GROUP
    out = []
    for begin in range(0, len(nodes), a_row):
        line = Text(f"  {nodes[begin].number:>{first - 4}}  ", "dim")
        for i, n in enumerate(nodes[begin : begin + a_row]):
            line.append(" " if i and i % _GROUP == 0 else "").append(_character(n), _style(n))
        out.append(line)
    return out


def _odd_ones(nodes: Sequence[Node], width: int) -> list[Text]:
    odd = [n for n in nodes if n.state != "active"]
    return _named_cells(odd, width) if odd else []


_FORMS: Final = (_lines, _named_cells, _numbers, _characters, _odd_ones)


def _grid(nodes: Sequence[Node], width: int, room: int) -> list[Text]:
    """At most ``room`` lines."""
    if not nodes or room < 2:
        return [_legend(nodes, False)][: max(0, room)]
    for form in _FORMS:
        lines = form(nodes, width)
        if len(lines) < room:
            return [_legend(nodes, form in (_named_cells, _numbers, _characters, _odd_ones)), *lines]
    return [_legend(nodes, True), *lines[: room - 2], Text("  ...")]


def compose(
    head: Sequence[Text], alarms: Sequence[Text], nodes: Sequence[Node], events: Sequence[Text], width: int, height: int
) -> list[Text]:
    """The lines of a screen, at most ``height`` of them, each at most ``width`` columns.

    Args:
        head: always there, if at all possible, and not cut.
        alarms: what is abnormal, most important first.
        events: oldest first; the newest of them are shown.
    """
    console = Console(width=width)
    out = [part for line in head for part in line.wrap(console, width)][:height]
    left = height - len(out)
    # Some nodes and some events beside it; where there is no room for that, one line in the place of an event.
    most = max(1, left - 8)
    least_events = _LEAST_EVENTS - (1 if alarms and left <= 8 else 0)
    shown = list(alarms[:most])
    if len(alarms) > most == 1:
        shown = [Text(f"1 of {len(alarms)}: ", "red").append(alarms[0])]
    elif len(alarms) > most:
        shown[-1] = Text(f"and {len(alarms) - most + 1} more that are not as they should be", "red")
    out += shown[: max(0, left)]
    left = height - len(out)
    if nodes and left >= 2:
        out += [Text(), *_grid(nodes, width, left - 1 - min(least_events, len(events)) - 1)]
    left = height - len(out)
    if events and left >= 2:
        if not nodes and left >= 3:
            out.append(Text())
            left -= 1
        out += [Text("last events", "bold"), *events[-min(left - 1, _MOST_EVENTS) :]]
    for line in out:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return out[:height]
