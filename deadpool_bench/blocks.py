"""What the ranks of `deadpool bench overhead` have written (`timed`), and what follows from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# By rank, the lines of its file.
Ranks = Mapping[int, Sequence[Mapping[str, Any]]]


def read_ranks(directory: Path) -> Ranks:
    """All that is whole in the files there; a line that was being written when its rank ended is left out."""
    out: dict[int, list[dict[str, Any]]] = {}
    for path in directory.glob("rank-*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        out[int(path.stem.removeprefix("rank-"))] = [json.loads(line) for line in lines if line.endswith("\n")]
    return dict(sorted(out.items()))


def _blocks(lines: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The blocks of one rank that are measured: all but the warm-up."""
    return (line for line in lines if line.get("block", -1) >= 0)


def pairs(ranks: Ranks) -> list[tuple[list[float], list[float]]]:
    """Seconds of the iterations of neighbouring blocks, (with, without), of rank 0. Half a pair does not count."""
    blocks = list(_blocks(ranks.get(0, ())))
    out = []
    for one, other in zip(blocks[::2], blocks[1::2], strict=False):
        both = {block["on"]: [row["seconds"] for row in block["rows"]] for block in (one, other)}
        out.append((both[True], both[False]))
    return out


def seconds(ranks: Ranks) -> list[float]:
    """Seconds of all measured iterations of rank 0."""
    return [row["seconds"] for block in _blocks(ranks.get(0, ())) for row in block["rows"]]


def timeline(ranks: Ranks) -> Any:
    """Of the last rank, the passes and copies of one iteration; None when the job did not come to its end."""
    lines = list(ranks.values())[-1] if ranks else ()
    return next((line["timeline"] for line in lines if "timeline" in line), None)


def cpu_per_iteration(ranks: Ranks) -> dict[str, float]:
    """CPU seconds an iteration: of all workers, with and without; of all agents likewise."""
    totals = {"workers_on": 0.0, "workers_off": 0.0, "agents_on": 0.0, "agents_off": 0.0}
    counts = {"on": 0, "off": 0}
    agents = {lines[0]["agent"]: rank for rank, lines in ranks.items() if lines}  # one rank speaks for its node's
    for number, (rank, lines) in enumerate(ranks.items()):
        for block in _blocks(lines):
            which = "on" if block["on"] else "off"
            totals[f"workers_{which}"] += sum(row["cpu"] for row in block["rows"])
            counts[which] += len(block["rows"]) if number == 0 else 0
            if agents[block["agent"]] == rank:
                totals[f"agents_{which}"] += block["agent_s"]
    return {name: value / max(1, counts[name.rsplit("_", 1)[1]]) for name, value in totals.items()}


def snapshot_report(
    ranks: Ranks, status: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What a job with snapshots says of them, from all ranks' measured iterations; None when there are none yet."""
    accounts = [
        {**row["account"], "seconds": row["seconds"], "rank": rank}
        for rank, lines in ranks.items()
        for block in _blocks(lines)
        for row in block["rows"]
        if block["on"] and "account" in row
    ]
    if not accounts:
        return None
    shares = [a["blocked_s"] / a["seconds"] for a in accounts]
    commits = [e["commit_s"] / e["seconds"] for e in events if e.get("commit_s") and e["iteration"] >= 1]
    ours = [a for a in accounts if a["rank"] == accounts[0]["rank"]]
    return {
        "blocked_share": {"mean": statistics.mean(shares), "median": statistics.median(shares), "max": max(shares)},
        "blocked_s": statistics.mean(a["blocked_s"] for a in accounts),
        "stall_s": statistics.mean(a["gate_s"] for a in accounts),
        "device_stall_s": statistics.mean(a["device_stall_s"] for a in accounts),
        "copied_bytes": statistics.mean(a["copied_bytes"] for a in accounts),
        "copied_s": statistics.median(a["copied_s"] for a in accounts),
        "copy_bandwidth": statistics.median(a["bandwidth"] for a in accounts),
        "skipped": ours[-1].get("skipped", 0),
        "generations": len(ours),
        "commit_share": statistics.median(commits) if commits else None,
        "planned_bytes": status.get("snapshot", {}).get("planned_bytes"),
        "expected_bytes": status.get("snapshot", {}).get("expected_bytes"),
        "cpu_s": cpu_per_iteration(ranks),
    }
