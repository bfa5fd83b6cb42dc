"""`deadpool bench overhead`: what snapshots cost in failure-free time, against none and against Megatron's checkpoints.

In one job blocks of iterations with and without snapshots alternate, so that both see the same machine, memory and
processes; every iteration after the warm-up counts, from its beginning to the beginning of the next one. ``--pairs``
adds whole runs with and without DeadPool, one after the other, where everything of DeadPool is gone in the one without.
The same harness measures Megatron's own checkpoint of every iteration, synchronous and asynchronous.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deadpool_megatron.evaluate.checkpoints import CHECKPOINTS, check_kind
from deadpool_megatron.evaluate.jobs import Job, JobError
from deadpool_megatron.evaluate.pictures import draw_overhead
from deadpool_megatron.evaluate.ratio import Comparison, compare
from deadpool_megatron.observe.figures import MissingPlots

__all__ = ["add_overhead_arguments", "run_overhead"]

_PRECISIONS = ("bf16", "fp16", "fp32")
_RUN_S = 3600.0


def add_overhead_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench overhead`."""
    parser.add_argument("--blocks", type=int, default=40, metavar="N", help="blocks a job, half with (default: 40)")
    parser.add_argument("--block", type=int, default=10, metavar="I", help="iterations a block (default: 10)")
    parser.add_argument("--warmup", type=int, default=10, metavar="I", help="iterations not counted (default: 10)")
    parser.add_argument("--pairs", type=int, default=0, metavar="P", help="pairs of whole runs as well (default: 0)")
    parser.add_argument(
        "--precisions", default="bf16,fp32", metavar="LIST", help=f"of {', '.join(_PRECISIONS)} (default: bf16,fp32)"
    )
    parser.add_argument(
        "--checkpoints", default="sync,async", metavar="LIST", help="Megatron's to compare with: sync, async, or none"
    )
    parser.add_argument("--active-nodes", type=int, default=4, metavar="N", help="nodes (default: 4)")
    parser.add_argument("--nproc-per-node", type=int, default=2, metavar="P", help="workers a node (default: 2)")
    parser.add_argument("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU")
    parser.add_argument("--trace", action="store_true", help="keep torch's profile of one iteration of rank 0")
    parser.add_argument("--out", metavar="DIR", help="write overhead.json and the pictures there")
    parser.add_argument("script", help="training script")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="its arguments, without --deadpool, --save and --train-iters"
    )


class _Bench:
    """One call of the benchmark: its options and where its jobs run."""

    def __init__(self, options: argparse.Namespace, base: Path) -> None:
        self.o = options
        self.base = base
        self._jobs = 0

    @property
    def iterations(self) -> int:
        """Of a job with blocks; the last one is not counted, it may be traced."""
        return int(self.o.warmup + self.o.blocks * self.o.block + 1)

    def run(self, what: str, precision: str, flags: Sequence[str] = (), deadpool: bool = True) -> dict[str, Any]:
        """One job; returns each rank's record and the job's last status and events. Raises JobError."""
        self._jobs += 1
        name = f"{self._jobs:02d}-{what}-{precision}"
        times = self.base / f"{name}.times"
        o = self.o
        launch = ["--local-nodes", str(o.active_nodes), "--nproc-per-node", str(o.nproc_per_node)]
        launch += ["--emulate-cpu"] if o.emulate_cpu else []
        launch += ["--alone"] if o.active_nodes == 1 else []
        script = [_timed_script(), str(Path(o.script).resolve()), *self._arguments(precision), *flags]
        environment = os.environ | {
            "BENCH_TIMED_OUT": str(times),
            "BENCH_TIMED_WHAT": what,
            "BENCH_TIMED_BLOCK": str(o.block),
            "BENCH_TIMED_WARMUP": str(o.warmup),
            "BENCH_TIMED_TRACE": str(int(o.trace and what == "snapshot")),
        }
        with Job(self.base / name, launch, [*script, *(["--deadpool"] if deadpool else [])], environment) as job:
            code = job.wait(_RUN_S)
            if code:
                job.failed(f"ended with {code}: {job.output.strip()[-300:]}")
            check_kind(job)
            ranks = [json.loads(path.read_text()) for path in sorted(times.glob("rank-*.json"))]
            if not ranks:
                job.failed("no rank has written its times")
            if (times / "trace.json.gz").exists() and o.out:
                (Path(o.out) / f"trace-{precision}.json.gz").write_bytes((times / "trace.json.gz").read_bytes())
            status = job.status() if deadpool else {}
            events = job.events("iteration") if deadpool else []
        return {"ranks": sorted(ranks, key=lambda r: r["rank"]), "status": status, "events": events}

    def _arguments(self, precision: str) -> list[str]:
        kept = [text for text in self.o.arguments if text not in ("--bf16", "--fp16")]
        kept += [] if precision == "fp32" else [f"--{precision}"]
        return [*kept, "--train-iters", str(self.iterations)]

    def blocks(self, job: dict[str, Any]) -> list[tuple[list[float], list[float]]]:
        """Pairs of neighbouring blocks, (with, without), of rank 0."""
        rows = job["ranks"][0]["rows"]
        found: list[tuple[bool, list[float]]] = []
        for row, following in itertools.pairwise(rows):
            number = row["iteration"] - self.o.warmup
            if number < 0:
                continue
            if number % self.o.block == 0:
                found.append((row["on"], []))
            found[-1][1].append(following["begin"] - row["begin"])
        pairs = []
        for (one_on, one), (other_on, other) in zip(found[::2], found[1::2], strict=False):
            assert one_on != other_on
            pairs.append((one, other) if one_on else (other, one))
        return pairs


def _timed_script() -> str:
    """The file of `deadpool_megatron.megatron.timed`, found without importing Megatron here."""
    package = importlib.util.find_spec("deadpool_megatron")
    assert package is not None and package.origin is not None
    return str(Path(package.origin).parent / "megatron" / "timed.py")


# ---- what a job with snapshots tells


def _measured(ranks: Iterable[dict[str, Any]], warmup: int) -> list[dict[str, Any]]:
    """Accounts of all ranks' iterations with snapshots, each with the iteration's ``seconds``."""
    out = []
    for rank in ranks:
        rows = rank["rows"]
        for row, following in itertools.pairwise(rows):
            if row["iteration"] >= warmup and row["on"] and "account" in row:
                out.append({**row["account"], "seconds": following["begin"] - row["begin"], "rank": rank["rank"]})
    return out


def _cpu_per_iteration(ranks: Iterable[dict[str, Any]], warmup: int) -> dict[str, float]:
    """CPU seconds an iteration: of all workers, with and without; of all agents likewise."""
    totals = {"workers_on": 0.0, "workers_off": 0.0, "agents_on": 0.0, "agents_off": 0.0}
    counts = {"on": 0, "off": 0}
    seen_nodes: set[tuple[float, ...]] = set()
    for number, rank in enumerate(ranks):
        rows = rank["rows"]
        for row, following in itertools.pairwise(rows):
            if row["iteration"] >= warmup:
                which = "on" if row["on"] else "off"
                totals[f"workers_{which}"] += following["cpu"] - row["cpu"]
                counts[which] += number == 0
        marks = rank["agent_cpu"]
        key = tuple(cpu for _, cpu in marks)
        if key in seen_nodes:  # another worker of the same node
            continue
        seen_nodes.add(key)
        first = rows[0]["iteration"]
        for (at, cpu), (_, later) in itertools.pairwise(marks):
            if at >= warmup:
                totals["agents_on" if rows[at - first]["on"] else "agents_off"] += later - cpu
    return {name: value / max(1, counts[name.rsplit("_", 1)[1]]) for name, value in totals.items()}


def _snapshot_report(job: dict[str, Any], bench: _Bench) -> dict[str, Any]:
    accounts = _measured(job["ranks"], bench.o.warmup)
    shares = [a["blocked_s"] / a["seconds"] for a in accounts]
    commits = [e["commit_s"] / e["seconds"] for e in job["events"] if e.get("commit_s") and e["iteration"] >= 1]
    last = job["ranks"][0]["rows"][-1].get("account", {})
    return {
        "blocked_share": {
            "mean": statistics.mean(shares),
            "median": statistics.median(shares),
            "max": max(shares),
        },
        "blocked_s": statistics.mean(a["blocked_s"] for a in accounts),
        "stall_s": statistics.mean(a["gate_s"] for a in accounts),
        "device_stall_s": statistics.mean(a["device_stall_s"] for a in accounts),
        "copied_bytes": statistics.mean(a["copied_bytes"] for a in accounts),
        "copied_s": statistics.median(a["copied_s"] for a in accounts),
        "copy_bandwidth": statistics.median(a["bandwidth"] for a in accounts),
        "skipped": last.get("skipped", 0),
        "generations": sum(1 for a in accounts if a["rank"] == 0),
        "commit_share": statistics.median(commits) if commits else None,
        "planned_bytes": job["status"].get("snapshot", {}).get("planned_bytes"),
        "expected_bytes": job["status"].get("snapshot", {}).get("expected_bytes"),
        "cpu_s": _cpu_per_iteration(job["ranks"], bench.o.warmup),
    }


# ---- the benchmark


def _one_precision(bench: _Bench, precision: str) -> dict[str, Any]:
    o = bench.o
    _say(f"{precision}: {o.blocks} blocks of {o.block} iterations, with and without snapshots")
    job = bench.run("snapshot", precision)
    pairs = bench.blocks(job)
    found: dict[str, Any] = {
        "blocks": compare(pairs).as_dict(),
        "snapshot": _snapshot_report(job, bench),
        "seconds": {"on": [s for on, _ in pairs for s in on], "off": [s for _, off in pairs for s in off]},
        "timeline": job["ranks"][-1]["timeline"],
    }
    _print_blocks(precision, compare(pairs), found["snapshot"])
    if o.pairs:
        runs = []
        for number in range(o.pairs):
            sides = {}
            for deadpool in (True, False) if number % 2 == 0 else (False, True):
                rows = bench.run("nothing", precision, deadpool=deadpool)["ranks"][0]["rows"]
                sides[deadpool] = [b["begin"] - a["begin"] for a, b in itertools.pairwise(rows)][o.warmup :]
            runs.append((sides[True], sides[False]))
        found["runs"] = compare(runs).as_dict()
        print(f"  whole runs, {o.pairs} pairs: {_ratio(compare(runs))}")
    return found


def _checkpoints(bench: _Bench, precision: str, snapshot: Comparison | dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in [k for k in bench.o.checkpoints.split(",") if k and k != "none"]:
        with tempfile.TemporaryDirectory(prefix="deadpool-bench-save-", dir=bench.base) as directory:
            flags = ["--save", directory, "--save-interval", "1", "--ckpt-format", "torch_dist", *CHECKPOINTS[kind]]
            try:
                result = compare(bench.blocks(bench.run("checkpoint", precision, flags, deadpool=False)))
            except JobError as err:  # what was measured before still counts
                _say(f"deadpool: Megatron's {kind} checkpoint: {err}")
                found[kind] = {"error": str(err)}
                continue
        ours = snapshot["ratio"] - 1 if isinstance(snapshot, dict) else snapshot.ratio - 1
        ours_high = snapshot["high"] - 1 if isinstance(snapshot, dict) else snapshot.high - 1
        found[kind] = {**result.as_dict(), "overhead_to_ours_at_least": (result.low - 1) / max(ours_high, 1e-6)}
        print(f"  Megatron's checkpoint of every iteration, {kind}: {_ratio(result)}")
        print(
            f"    its overhead {100 * (result.ratio - 1):.2f} %, ours {100 * ours:.2f} %; by the worse ends of both "
            f"intervals at least {found[kind]['overhead_to_ours_at_least']:.0f} times ours"
        )
    return found


def _ratio(c: Comparison) -> str:
    return f"ratio {c.ratio:.4f}, 95 % interval {c.low:.4f} to {c.high:.4f} (medians {c.median_ratio:.4f})"


def _print_blocks(precision: str, c: Comparison, s: dict[str, Any]) -> None:
    for name, one in (("with", c.on), ("without", c.off)):
        print(
            f"  {precision} {name:<8} mean {1e3 * one.mean:.2f} ms, median {1e3 * one.median:.2f} ms, "
            f"p99 {1e3 * one.p99:.2f} ms (n={one.count})"
        )
    print(f"  {_ratio(c)}")
    b, cpu = s["blocked_share"], s["cpu_s"]
    print(
        f"  blocked: mean {100 * b['mean']:.3f} %, median {100 * b['median']:.3f} %, max {100 * b['max']:.2f} % of an "
        f"iteration; stall at the gate {1e6 * s['stall_s']:.0f} us on the host, {1e6 * s['device_stall_s']:.0f} us on "
        "the device"
    )
    print(
        f"  copied {s['copied_bytes']:,.0f} bytes a rank and generation, {s['copy_bandwidth'] / 1e9:.2f} GB/s, all "
        f"there after {1e3 * s['copied_s']:.1f} ms; {s['skipped']} of {s['generations']} generations skipped"
    )
    if s["commit_share"] is not None:
        print(
            f"  committed after {s['commit_share']:.2f} of an iteration: a failure costs {0.5 + s['commit_share']:.2f} "
            "iterations on average"
        )
    print(f"  bytes planned {s['planned_bytes']:,}, by the arithmetic {s['expected_bytes']:,}")
    print(
        f"  CPU seconds an iteration: workers {cpu['workers_on']:.4f} with, {cpu['workers_off']:.4f} without; "
        f"agents {cpu['agents_on']:.4f} with, {cpu['agents_off']:.4f} without"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_overhead(options: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit code."""
    precisions = options.precisions.split(",")
    wrong = [p for p in precisions if p not in _PRECISIONS]
    wrong += [k for k in options.checkpoints.split(",") if k not in (*CHECKPOINTS, "none", "")]
    if wrong:
        _say(f"deadpool: bench overhead: {wrong[0]!r} is not one of its choices")
        return 2
    if options.blocks < 4 or options.blocks % 2:
        _say("deadpool: bench overhead: --blocks must be an even number of 4 or more")
        return 2
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    bench = _Bench(options, Path(tempfile.mkdtemp(prefix="deadpool-bench-")))
    found: dict[str, Any] = {}
    try:
        for precision in precisions:
            found[precision] = _one_precision(bench, precision)
            found[precision]["checkpoints"] = _checkpoints(bench, precision, found[precision]["blocks"])
    except (JobError, ValueError) as err:
        _say(f"deadpool: {err}")
        return 1
    finally:
        if options.out and found:
            _write(Path(options.out), options, found)
    return 0


def _write(directory: Path, options: argparse.Namespace, found: dict[str, Any]) -> None:
    conditions = {
        "command": sys.argv[1:],
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "block": options.block,
        "blocks": options.blocks,
        "warmup": options.warmup,
    }
    (directory / "overhead.json").write_text(json.dumps({"conditions": conditions, "results": found}, indent=1))
    try:
        for path in draw_overhead(directory, found):
            _say(f"deadpool: {path}")
    except MissingPlots as err:
        _say(f"deadpool: {err}")
