"""A run as a trace in Chrome's JSON format, which https://ui.perfetto.dev and chrome://tracing open. Pure.

Format: "Trace Event Format" (complete events X, instant events i, asynchronous pairs b/e, metadata M). Times are
microseconds from the first event of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from deadpool_megatron.observe.recoveries import PHASES, recoveries
from deadpool_megatron.observe.timeline import timeline

_JOB: Final = 0
_FIRST_NODE: Final = 1
_TRACKS: Final = {"iterations": 1, "commits": 2, "recoveries": 3, "events": 4}
_STEPS_TRACK: Final = 1
_SNAPSHOT_TRACK: Final = 100  # plus the rank
_QUIET: Final = frozenset({"iteration", "committed", "step", *PHASES})


def chrome_trace(
    events: Sequence[Mapping[str, Any]],
    node_lines: Iterable[Mapping[str, Any]] = (),
    moments: Mapping[int, list[tuple[float, bool]]] | None = None,
) -> dict[str, Any]:
    """The trace of a run.

    Args:
        events: as from `read_events`.
        node_lines: as from `read_node_logs`: snapshots and sends of every shard.
        moments: as from `timeline.deaths`, so that detection shows.
    """
    lines = list(node_lines)
    starts = [e["t"] for e in (*events, *lines)]
    starts += [e["t"] - e.get("seconds", 0.0) for e in events if e["event"] == "iteration"]
    zero = min(starts, default=0.0)
    out: list[dict[str, Any]] = []

    def us(t: float) -> float:
        return round((t - zero) * 1e6, 1)

    def complete(pid: int, tid: int, name: str, start: float, end: float, /, **args: Any) -> None:
        out.append(
            {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": us(start), "dur": us(end) - us(start), "args": args}
        )

    def instant(pid: int, tid: int, name: str, t: float, /, **args: Any) -> None:
        out.append({"ph": "i", "s": "t", "pid": pid, "tid": tid, "name": name, "ts": us(t), "args": args})

    for e in events:
        name = e["event"]
        if name == "iteration":
            complete(
                _JOB, _TRACKS["iterations"], f"iteration {e['iteration']}", e["t"] - e.get("seconds", 0.0), e["t"],
                epoch=e.get("epoch"), losses=e.get("losses"), blocked_ms=1e3 * e.get("blocked_s", 0.0),
            )  # fmt: skip
        elif name == "committed":
            what = f"generation {e.get('iteration')} committed"
            instant(_JOB, _TRACKS["commits"], what, e["t"], epoch=e.get("epoch"))
        elif name not in _QUIET:
            instant(_JOB, _TRACKS["events"], name, e["t"], **{k: v for k, v in e.items() if k not in ("t", "event")})
    nodes: set[int] = set()
    for r in recoveries(events):
        line = timeline(r, moments)
        for bar in line.bars:
            start, end = line.zero + bar.start, line.zero + bar.end
            if bar.row == "job":
                complete(_JOB, _TRACKS["recoveries"], bar.act, start, end, epoch=r.epoch)
            else:
                node = int(bar.row.split()[1])
                nodes.add(node)
                complete(_FIRST_NODE + node, _STEPS_TRACK, bar.act, start, end, epoch=r.epoch)
    ranks: set[tuple[int, int]] = set()
    for number, shard in enumerate(x for x in lines if x["event"] == "shard"):
        node, rank, what = shard["node"], shard["rank"], f"generation {shard['generation']}"
        nodes.add(node)
        ranks.add((node, rank))
        place = {"pid": _FIRST_NODE + node, "tid": _SNAPSHOT_TRACK + rank, "cat": "shard"}
        args = {"epoch": shard.get("epoch"), "bytes": shard.get("bytes")}
        # Asynchronous, since the next snapshot may open while the last is still on its way.
        for kind, end in (("snapshot", shard["copied"]), ("send", shard["stored"])):
            pair = place | {"id": f"{kind}-{number}", "name": f"{kind} {what}"}
            out.append(pair | {"ph": "b", "ts": us(shard["opened"]), "args": args})
            out.append(pair | {"ph": "e", "ts": us(max(end, shard["opened"]))})
        instant(_FIRST_NODE + node, _SNAPSHOT_TRACK + rank, f"{what} in two vaults", shard["stored"])
    out += _names(nodes, ranks)
    return {"traceEvents": out, "displayTimeUnit": "ms", "otherData": {"unix_seconds_at_zero": zero}}


def _names(nodes: Iterable[int], ranks: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    def named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
        return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}

    out = [named("process_name", _JOB, 0, "job")]
    out += [named("thread_name", _JOB, tid, name) for name, tid in _TRACKS.items()]
    for node in sorted(nodes):
        out.append(named("process_name", _FIRST_NODE + node, 0, f"node {node}"))
        out.append(named("thread_name", _FIRST_NODE + node, _STEPS_TRACK, "recovery"))
    for node, rank in sorted(ranks):
        out.append(named("thread_name", _FIRST_NODE + node, _SNAPSHOT_TRACK + rank, f"rank {rank}: snapshots, sends"))
    return out
