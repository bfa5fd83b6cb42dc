"""`deadpool bench overhead`: what snapshots cost in failure-free time, against none and against Megatron's checkpoints.

In one job blocks of iterations with and without snapshots alternate, so that both see the same machine, memory and
processes; every iteration after the warm-up counts, from its beginning to the beginning of the next one. ``--pairs``
adds whole runs with and without DeadPool, one after the other, where everything of DeadPool is gone in the one without.
The same harness measures Megatron's own checkpoint of every iteration, synchronous and asynchronous.

What is there is written after each block, and ``--minutes`` ends a job whose share of the time is over: its whole
blocks count. A job that fails costs what it would have measured, and the exit code.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deadpool_bench.blocks import Ranks, pairs, read_ranks, seconds, snapshot_report, timeline
from deadpool_bench.checkpoints import CHECKPOINTS, check_kind
from deadpool_bench.harness.jobs import Job
from deadpool_bench.pictures import draw_overhead
from deadpool_bench.progress import progress, say, step
from deadpool_bench.ratio import Comparison, compare
from deadpool_megatron.jobs.job import JobError
from deadpool_megatron.observe import STATUS
from deadpool_megatron.observe.figures import MissingPlots
from deadpool_megatron.vault import parse_cpus

_TIMED = Path(__file__).with_name("timed.py")
_PRECISIONS = ("bf16", "fp16", "fp32")
_RUN_S = 3600.0
_LOOK_S = 0.2
_DISTURBED_S = 5.0  # between two looks whether anything was lost
_CLOSE_S = 25.0  # of the minutes: the last job is ended, what it measured is written and drawn
_GRACE_S = 8.0  # of that, for a job that is told to end


def add_overhead_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench overhead`."""
    parser.add_argument(
        "--blocks", type=int, default=40, metavar="N", help="blocks a job, half with (default: %(default)s)"
    )
    parser.add_argument("--block", type=int, default=10, metavar="I", help="iterations a block (default: 10)")
    parser.add_argument("--warmup", type=int, default=10, metavar="I", help="iterations not counted (default: 10)")
    parser.add_argument("--pairs", type=int, default=0, metavar="P", help="pairs of whole runs as well (default: 0)")
    parser.add_argument(
        "--precisions", default="bf16", metavar="LIST", help=f"of {', '.join(_PRECISIONS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoints",
        default="none",
        metavar="LIST",
        help="Megatron's to compare with: sync, async, or none (default: %(default)s)",
    )
    parser.add_argument("--active-nodes", type=int, default=4, metavar="N", help="nodes (default: 4)")
    parser.add_argument("--nproc-per-node", type=int, default=2, metavar="P", help="workers a node (default: 2)")
    parser.add_argument("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="end by then, at least 1, with the blocks that are whole (no limit)"
    )
    parser.add_argument(
        "--cores",
        metavar="W:A",
        help="workers on processors W, agents and the thread of each worker that "
        "copies into the vault on A (as in 0-5,8:6-7; default: all on all)",
    )
    parser.add_argument("--trace", action="store_true", help="keep torch's profile of one iteration of rank 0")
    parser.add_argument("--out", metavar="DIR", help="write overhead.json, times and pictures there")
    parser.add_argument("script", help="training script")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="its arguments, without --deadpool, --save and --train-iters"
    )


class _Bench:
    """One call of the benchmark: its options, where its jobs run, and how long."""

    def __init__(self, options: argparse.Namespace, base: Path, parts: int) -> None:
        self.o = options
        self.base = base
        self.found: dict[str, Any] = {}
        self.failed = False
        self._jobs = 0
        self._parts = parts
        self._end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes - _CLOSE_S

    @property
    def iterations(self) -> int:
        """Of a job with blocks; the last one is not counted, it may be traced."""
        return int(self.o.warmup + self.o.blocks * self.o.block + 1)

    def run(
        self,
        what: str,
        precision: str,
        flags: Sequence[str] = (),
        deadpool: bool = True,
        grown: Callable[[Ranks, Job], None] | None = None,
    ) -> Ranks:
        """One job, to its end or to that of its share of the time; what its ranks measured.

        ``grown`` is called after each block and once at the end. Raises JobError when the job fails.
        """
        self._jobs += 1
        name = f"{self._jobs:02d}-{what}-{precision}"
        times = (Path(self.o.out) if self.o.out else self.base) / f"{name}.times"
        for old in times.glob("*"):
            old.unlink()
        o = self.o
        launch = ["--local-nodes", str(o.active_nodes), "--nproc-per-node", str(o.nproc_per_node)]
        launch += ["--emulate-cpu"] if o.emulate_cpu else []
        launch += ["--alone"] if o.active_nodes == 1 else []
        script = [str(_TIMED), str(Path(o.script).resolve()), *self._arguments(precision), *flags]
        environment = os.environ | {
            "BENCH_TIMED_OUT": str(times),
            "BENCH_TIMED_WHAT": what,
            "BENCH_TIMED_BLOCK": str(o.block),
            "BENCH_TIMED_WARMUP": str(o.warmup),
            "BENCH_TIMED_TRACE": str(int(o.trace and what == "snapshot")),
            "BENCH_TIMED_CORES": o.cores or "",
        }
        with Job(self.base / name, launch, [*script, *(["--deadpool"] if deadpool else [])], environment) as job:
            self._wait(job, times, grown)
            check_kind(job)
            if (times / "trace.json.gz").exists() and o.out:
                (times / "trace.json.gz").rename(Path(o.out) / f"trace-{precision}.json.gz")
            return read_ranks(times)

    def _wait(self, job: Job, times: Path, grown: Callable[[Ranks, Job], None] | None) -> None:
        """Until the job has ended, or is ended because its share of the time is over."""
        now = time.monotonic()
        share = min(_RUN_S, (self._end - now) / self._parts)
        self._parts -= 1
        size, done, due = 0, 0, now + _DISTURBED_S
        while (code := job.process.poll()) is None:
            if time.monotonic() > now + share:
                say(f"deadpool: {job.run_dir.name}: its {share:.0f} s are over, it is ended")
                job.end(_GRACE_S)
                break
            if time.monotonic() > due:
                due += _DISTURBED_S
                if job.events("declared"):
                    job.failed("a recovery has disturbed it; what was measured before counts")
            written = times / "rank-0.jsonl"
            if written.exists() and written.stat().st_size != size:
                size = written.stat().st_size
                ranks = read_ranks(times)
                step(len(ranks[0]) - done)
                done = len(ranks[0])
                if grown:
                    grown(ranks, job)
            time.sleep(_LOOK_S)
        step(self.o.blocks - done)
        if grown:
            grown(read_ranks(times), job)
        if code:
            job.failed(f"ended with {code}: {job.output.strip()[-300:]}")

    def _arguments(self, precision: str) -> list[str]:
        kept = [text for text in self.o.arguments if text not in ("--bf16", "--fp16")]
        kept += [] if precision == "fp32" else [f"--{precision}"]
        return [*kept, "--train-iters", str(self.iterations)]

    def lost(self, found: dict[str, Any], what: str, err: Exception) -> None:
        """A part has failed; what was measured before still counts."""
        say(f"deadpool: {what}: {err}")
        found.setdefault("error", str(err))
        self.failed = True

    def save(self) -> None:
        """Write what there is, if anybody wants it."""
        if self.o.out:
            _write(Path(self.o.out), self.o, self.found)


# ---- the benchmark


def _one_precision(bench: _Bench, precision: str) -> None:
    o = bench.o
    say(f"{precision}: {o.blocks} blocks of {o.block} iterations, with and without snapshots")
    found: dict[str, Any] = bench.found.setdefault(precision, {})
    both: list[tuple[list[float], list[float]]] = []

    def grown(ranks: Ranks, job: Job) -> None:
        both[:] = pairs(ranks)
        found["seconds"] = {"on": [s for on, _ in both for s in on], "off": [s for _, off in both for s in off]}
        found["timeline"] = timeline(ranks)
        if len(both) > 1:
            found["blocks"] = compare(both).as_dict()
            status = job.status() if (job.run_dir / STATUS).exists() else {}
            found["snapshot"] = snapshot_report(ranks, status, job.events("iteration"))
        bench.save()

    try:
        bench.run("snapshot", precision, grown=grown)
    except JobError as err:
        bench.lost(found, precision, err)
    try:
        result = compare(both)
    except ValueError as err:
        bench.lost(found, precision, err)
    else:
        print(f"  {2 * len(both)} of {o.blocks} blocks")
        _print_blocks(precision, result, found["snapshot"])
    if o.pairs:
        _whole_runs(bench, precision, found)
    found["checkpoints"] = {}
    for kind in [k for k in o.checkpoints.split(",") if k and k != "none"]:
        _checkpoint(bench, precision, kind, found)


def _whole_runs(bench: _Bench, precision: str, found: dict[str, Any]) -> None:
    runs = []
    try:
        for number in range(bench.o.pairs):
            sides = {}
            for deadpool in (True, False) if number % 2 == 0 else (False, True):
                sides[deadpool] = seconds(bench.run("nothing", precision, deadpool=deadpool))
            runs.append((sides[True], sides[False]))
        found["runs"] = compare(runs).as_dict()
        print(f"  whole runs, {len(runs)} pairs: {_ratio(compare(runs))}")
    except (JobError, ValueError) as err:
        bench.lost(found.setdefault("runs", {}), "whole runs", err)
    bench.save()


def _checkpoint(bench: _Bench, precision: str, kind: str, found: dict[str, Any]) -> None:
    mine: dict[str, Any] = {}
    found["checkpoints"][kind] = mine
    with tempfile.TemporaryDirectory(prefix="deadpool-bench-save-", dir=bench.base) as directory:
        flags = ["--save", directory, "--save-interval", "1", "--ckpt-format", "torch_dist", *CHECKPOINTS[kind]]
        try:
            result = compare(pairs(bench.run("checkpoint", precision, flags, deadpool=False)))
        except (JobError, ValueError) as err:
            return bench.lost(mine, f"Megatron's {kind} checkpoint", err)
    mine |= result.as_dict()
    print(f"  Megatron's checkpoint of every iteration, {kind}: {_ratio(result)}")
    if ours := found.get("blocks"):
        mine["overhead_to_ours_at_least"] = (result.low - 1) / max(ours["high"] - 1, 1e-6)
        print(
            f"    its overhead {100 * (result.ratio - 1):.2f} %, ours {100 * (ours['ratio'] - 1):.2f} %; by the worse "
            f"ends of both intervals at least {mine['overhead_to_ours_at_least']:.0f} times ours"
        )
    bench.save()


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


def _wrong(o: argparse.Namespace) -> str:
    """What is wrong with the options; empty when nothing is."""
    wrong = [p for p in o.precisions.split(",") if p not in _PRECISIONS]
    wrong += [k for k in o.checkpoints.split(",") if k not in (*CHECKPOINTS, "none", "")]
    if wrong:
        return f"{wrong[0]!r} is not one of its choices"
    if o.blocks < 4 or o.blocks % 2:
        return "--blocks must be an even number of 4 or more"
    if o.minutes is not None and not 1 <= o.minutes < math.inf:
        return "--minutes must be at least 1"
    if wrong_cores := _wrong_cores(o.cores) if o.cores else "":
        return wrong_cores
    return "" if Path(o.script).is_file() else f"{o.script}: there is no such script"


def _wrong_cores(text: str) -> str:
    try:
        workers, agents = map(parse_cpus, text.split(":"))
    except ValueError:
        return f"--cores {text}: expected two lists of processors, as in 0-5:6,7"
    missing = (workers | agents) - os.sched_getaffinity(0)
    if missing:
        return f"--cores {text}: this process may not use processor {min(missing)}"
    if not workers or not agents or workers & agents:
        return f"--cores {text}: workers and agents each need processors of their own"
    return ""


def run_overhead(options: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit code: 1 when a part has failed, whose error is among the results."""
    if wrong := _wrong(options):
        say(f"deadpool: bench overhead: {wrong}")
        return 2
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    precisions = options.precisions.split(",")
    kinds = [k for k in options.checkpoints.split(",") if k and k != "none"]
    parts = len(precisions) * (1 + 2 * options.pairs + len(kinds))
    bench = _Bench(options, Path(tempfile.mkdtemp(prefix="deadpool-bench-")), parts)
    before = os.sched_getaffinity(0)
    if options.cores:  # everything but the workers; they move themselves (`timed`)
        os.sched_setaffinity(0, parse_cpus(options.cores.split(":")[1]))
    try:
        with progress("blocks", parts * options.blocks):
            for precision in precisions:
                _one_precision(bench, precision)
    finally:
        os.sched_setaffinity(0, before)
        bench.save()
        _draw(options, bench.found)
    return int(bench.failed)


def _write(directory: Path, options: argparse.Namespace, found: dict[str, Any]) -> None:
    conditions = {
        "command": sys.argv[1:],
        "cpus": os.cpu_count(),
        "cores": options.cores,
        "load": os.getloadavg(),
        "block": options.block,
        "blocks": options.blocks,
        "warmup": options.warmup,
    }
    new = directory / "overhead.json.new"
    new.write_text(json.dumps({"conditions": conditions, "results": found}, indent=1))
    new.replace(directory / "overhead.json")


def _draw(options: argparse.Namespace, found: dict[str, Any]) -> None:
    measured = {precision: each for precision, each in found.items() if "blocks" in each}
    if not (options.out and measured):
        return
    try:
        for path in draw_overhead(Path(options.out), measured):
            say(f"deadpool: {path}")
    except MissingPlots as err:
        say(f"deadpool: {err}")
