"""`deadpool bench faults`: what it survives, as a table made of what the tests of crash points and faults have written.

The tests write one JSON file a group into the directory that DEADPOOL_TEST_RESULTS names; this command puts them
together, and the table into the documentation, between two marks. Nothing in the table is written by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from deadpool_megatron import points
from deadpool_megatron.cluster import records as _records  # the registry is whole once the records are known
from deadpool_megatron.cluster.records.exits import Exit

BEGIN: Final = "<!-- what it survives: written by `deadpool bench faults` out of docs/measurements/faults.json -->\n"
END: Final = "<!-- end of what it survives -->\n"
_CASE = ("point", "role", "trigger")

assert _records


def add_faults_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--results", metavar="DIR", help="what tests have written there (DEADPOOL_TEST_RESULTS) comes into FILE")
    add(
        "--out",
        default="docs/measurements/faults.json",
        metavar="FILE",
        help="all results; newer ones of DIR take the place of older ones (default: %(default)s)",
    )
    add("--write", metavar="FILE.md", help="put the table into this file, between its marks (default: print it)")


def run_faults(options: argparse.Namespace) -> int:
    """`deadpool bench faults` after parsing."""
    try:
        out = Path(options.out)
        rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
        if options.results:
            found = sorted(Path(options.results).glob("*.json"))
            if not found:
                return _fail(f"no results in {options.results}: run the tests with DEADPOOL_TEST_RESULTS set to it")
            for path in found:
                rows = merge(rows, json.loads(path.read_text()))
            out.write_text(json.dumps(rows, indent=1) + "\n")
        if options.write:
            write_table(Path(options.write), rows)
        else:
            print(table(rows), end="")
    except (OSError, ValueError, KeyError) as err:
        return _fail(f"bench faults: {err}")
    return Exit.OK


def _fail(message: str) -> int:
    print(f"deadpool: {message}", file=sys.stderr)
    return Exit.USAGE


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return ("class", row["class"]) if "class" in row else tuple(row[name] for name in _CASE)


def merge(old: Sequence[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a case, the newer one; in the order of the registry."""
    rows = {_key(row): row for row in old} | {_key(row): row for row in new}
    order = {name: number for number, name in enumerate(points.POINTS)}
    known = [row for row in rows.values() if "class" in row or row["point"] in order]
    return sorted(known, key=lambda row: (-1, row["class"]) if "class" in row else (order[row["point"]], row["role"]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Both tables in Markdown: failures by class, then every crash point of the registry."""
    lines = ["| failure | times | detected after | trains again after | iterations lost |", "|---|---|---|---|---|"]
    for row in (row for row in rows if "class" in row):
        cells = [row["class"], str(row["times"]), _spread(row["detected_s"]), _spread(row["recovered_s"])]
        lines.append(f"| {' | '.join([*cells, str(row['lost_iterations'])])} |")
    lines += ["", "| crash point | who dies | while | outcome | detected | trains again | iterations lost | nodes |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    by_point: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_point.setdefault(row.get("point", ""), []).append(row)
    for name in points.POINTS:
        lines += [_line(row) for row in by_point.get(name, [])] or [f"| `{name}` | | | not run yet | | | | |"]
    return "\n".join(lines) + "\n"


_WHILE: Final = {
    "abort": "communicators are re-formed",
    "swap": "another worker is replaced",
    "loss": "another node is replaced",
    "own-worker": "its worker dies",
    "spare-worker": "a spare's worker dies",
    "starting-worker": "it starts again",
    "drain": "a node is drained",
    "join": "a node joins",
    "coordinator": "the coordinator starts again",
    "hang": "a rank hangs",
    "sign": "its machine tells of a fault",
    "bug": "its code raises",
    "garbage": "garbage is sent to it",
    "corrupt": "its copy is damaged",
    "damaged-source": "the copy it fetches is damaged",
    "damaged-own": "the copy it restores is damaged",
    "silent-agent": "a peer is gone that nobody reports",
    "command": "a command speaks to it",
    "": "training",
}


def _line(row: dict[str, Any]) -> str:
    outcome = row["outcome"]
    if outcome in ("recovered", "training did not notice"):
        outcome += ", bitwise equal" if row["bitwise_equal"] else ", **not bitwise equal**"
    seconds = [_seconds(row["detected_s"]), _seconds(row["recovered_s"])]
    lost = "" if row["lost_iterations"] is None else str(row["lost_iterations"])
    while_ = _WHILE.get(row["trigger"], row["trigger"])
    return f"| {' | '.join([f'`{row["point"]}`', row['role'], while_, outcome, *seconds, lost, str(row['nodes'])])} |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f} s"
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the table between the marks of a file. Raises ValueError when they are not there."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no marks '{BEGIN.strip()}' and '{END.strip()}'")
    before, rest = text.split(BEGIN)
    path.write_text(before + BEGIN + table(rows) + END + rest.split(END)[1])
