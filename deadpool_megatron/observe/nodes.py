"""`deadpool nodes`: the machines of a job, what each does and what has failed there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deadpool_megatron.observe.narrative import count_text
from deadpool_megatron.observe.rundir import STATUS, NotWhole, read_whole
from deadpool_megatron.observe.screen import Node, nodes_of
from deadpool_megatron.observe.strict_json import strict_json
from deadpool_megatron.observe.tables import make_console, new_table


class NoNodes(Exception):
    """There is no job to show; the message is one line."""


def show_nodes(run_dir: str | Path, as_json: bool) -> None:
    """Print them. Raises NoNodes."""
    path = Path(run_dir) / STATUS
    try:
        status = read_whole(path, ("phase", "nodes", "coordinates", "spares"))
    except NotWhole as err:
        raise NoNodes(str(err)) from None
    except OSError as err:
        raise NoNodes(f"no status at {path}: {err.strerror}; name a job's directory with --run-dir") from None
    nodes = nodes_of(status)
    if as_json:
        known = {node["node"]: node for node in status["nodes"]}
        unfit = _unfit(status)
        told = [_as_json(node, known[node.number]) | {"unfit": unfit.get(node.number, "")} for node in nodes]
        print(strict_json(told, indent=1))
        return
    console = make_console()
    console.print(_table(console, nodes, status["nodes"], _unfit(status)))
    for line in status.get("covered", ()):
        console.print(line)


def _unfit(status: Mapping[str, Any]) -> dict[int, str]:
    """By spare, why it has failed its last check."""
    return {spare["node"]: spare["unfit"] for spare in status["spares"] if spare.get("unfit")}


def _as_json(node: Node, told: Mapping[str, Any]) -> dict[str, Any]:
    failures = [{"t": t, "kind": kind, "cause": cause} for t, kind, cause in told.get("failures") or ()]
    return {
        "node": node.number,
        "machine": told.get("name", ""),
        "state": node.state,
        "lemon": bool(told.get("lemon")),
        "domains": told.get("domains") or {},
        "failures": failures,
    }


def _table(console: Console, nodes: list[Node], told: list[Mapping[str, Any]], unfit: Mapping[int, str]) -> Table:
    known = {node["node"]: node for node in told}
    table = new_table(console, title="nodes")
    domains = any(node.get("domains") for node in told)
    for name in ("node", "machine", "state", *(("domain",) if domains else ())):
        table.add_column(name, no_wrap=True)
    table.add_column("failures", overflow="fold")
    for node in nodes:
        mine = known[node.number]
        state = Text(node.state)
        if mine.get("lemon") and node.state in ("spare", "starting"):
            state.append(", lemon", "yellow")
        if node.number in unfit:
            state.append(", unfit", "red")
        where = [" ".join(f"{kind} {name}" for kind, name in (mine.get("domains") or {}).items())] if domains else []
        table.add_row(str(node.number), mine.get("name", ""), state, *where, _failures(mine.get("failures") or ()))
    return table


def _failures(failures: Any) -> str:
    if not failures:
        return "-"
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))} {kind}: {cause}" for when, kind, cause in failures
    ]
    return "\n".join([count_text(len(lines), "failure"), *reversed(lines)] if len(lines) > 1 else lines)
