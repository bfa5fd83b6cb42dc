"""`deadpool bench widths`: iterations with fewer replicas against those with all, in one job that shrinks and grows.

The job has no spare. It trains a block of iterations, loses a node, trains a block with the replicas that are left,
gets a node, trains a block with all again, and so on: both widths see the same machine. The global batch is the same,
so that W - k of W replicas should take W / (W - k) times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from deadpool_bench.changes import SHRINKING, changes, lose, show_changes, warm
from deadpool_bench.harness.fork_server import forked
from deadpool_bench.harness.jobs import Job
from deadpool_bench.kills import START_S, launch_options
from deadpool_bench.progress import progress, say, step
from deadpool_bench.ratio import compare
from deadpool_megatron.jobs.job import JobError
from deadpool_megatron.vault import parse_cpus


def add_widths_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench widths`."""
    add = parser.add_argument
    add("--cycles", type=int, default=6, metavar="C", help="blocks of each width (default: %(default)s)")
    add("--block", type=int, default=10, metavar="I", help="iterations of a block (default: %(default)s)")
    add("--warmup", type=int, default=3, metavar="I", help="before each, not counted (default: %(default)s)")
    add("--active-nodes", type=int, default=2, metavar="N", help="nodes that train at first (default: %(default)s)")
    add("--nproc-per-node", type=int, default=1, metavar="P", help="workers a node (default: %(default)s)")
    add("--cores", metavar="A:B", help="processors of each node, its agent's too (as in 0:1; default: all on all)")
    add("--seed", type=int, default=0, help="of the victims (default: 0)")
    add_forked(parser)
    add("--out", metavar="FILE", help="write all figures as JSON")
    add("script", help="training script")
    add("arguments", nargs=argparse.REMAINDER, help="its arguments, without --deadpool")


def add_forked(parser: argparse.ArgumentParser) -> None:
    """The options of jobs under the emulation."""
    parser.add_argument("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU")
    text = "processes begin with their imports done, as in the tests (with --emulate-cpu)"
    parser.add_argument("--forked", action="store_true", help=text)


def from_forks(options: argparse.Namespace) -> Any:
    """A context in which jobs start as ``--forked`` says. Raises ValueError where they cannot."""
    if options.forked and not options.emulate_cpu:
        raise ValueError("--forked: only with --emulate-cpu")
    return forked(Path(options.script)) if options.forked else nullcontext()


class _Blocks:
    """Blocks of a job's iterations, one width after the other."""

    def __init__(self, options: argparse.Namespace, job: Job, cores: Sequence[set[int]]) -> None:
        self._o = options
        self._job = job
        self._cores = cores
        self._events = job.follow(START_S)
        self.width = 0

    def next(self) -> list[float]:
        """Seconds of a block's iterations at the next width that the job takes. Raises JobError when it ends."""
        rows: list[dict[str, Any]] = []
        for event in self._events:
            if event["event"] != "iteration" or event["replicas"] == self.width:
                continue
            if not rows or event["epoch"] != rows[-1]["epoch"]:
                self._pin()
                rows = []
            rows.append(event)
            if len(rows) >= self._o.warmup + self._o.block:
                self.width = event["replicas"]
                return [e["seconds"] for e in rows[self._o.warmup :]]
        self._job.failed(f"ended: {self._job.output.strip()[-300:]}")

    def _pin(self) -> None:
        nodes = list(dict.fromkeys(c["node"] for c in self._job.status()["coordinates"]))
        for node, cpus in zip(nodes, self._cores, strict=False):
            for pid in _threads(self._job.node_pids(node)):
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(pid, cpus)


def _threads(pids: Sequence[int]) -> Iterator[int]:
    """Ids of all threads of these processes and of those below them."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for each in [process, *process.children(recursive=True)]:
                yield from (thread.id for thread in each.threads())


def _cores(options: argparse.Namespace) -> list[set[int]]:
    """Processors of each node. Raises ValueError, one line."""
    cores = [set(parse_cpus(text)) for text in options.cores.split(":")] if options.cores else []
    missing = set().union(*cores) - os.sched_getaffinity(0)
    if missing:
        raise ValueError(f"--cores {options.cores}: this process may not use processor {min(missing)}")
    if cores and len(cores) != options.active_nodes:
        raise ValueError(f"--cores {options.cores}: as many lists as nodes, which are {options.active_nodes}")
    return cores


def run_widths(options: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    try:
        if options.cycles < 2 or options.active_nodes < 2 or options.block < 1 or options.warmup < 0:
            raise ValueError("--cycles and --active-nodes must be 2 or more, --block 1, --warmup 0")
        cores, forks = _cores(options), from_forks(options)
    except ValueError as err:
        say(f"deadpool: bench widths: {err}")
        return 2
    found: dict[str, Any] = {"full": [], "narrow": [], "changes": []}
    try:
        with forks, progress("blocks", 2 * options.cycles):
            _measure(options, cores, found)
    except JobError as err:  # what was measured before still counts
        say(f"deadpool: {err}")
        found["error"] = str(err)
    pairs = list(zip(found["narrow"], found["full"], strict=False))
    if len(pairs) > 1:
        ideal, result = found["widths"][0] / found["widths"][1], compare(pairs)
        found["ratio"] = result.as_dict() | {"ideal": ideal}
        for width, one in zip(found["widths"], (result.off, result.on), strict=False):
            print(
                f"{width} replicas: mean {1e3 * one.mean:.1f} ms, median {1e3 * one.median:.1f} ms, "
                f"p99 {1e3 * one.p99:.1f} ms (n={one.count})"
            )
        print(
            f"ratio {result.ratio:.3f}, 95 % interval {result.low:.3f} to {result.high:.3f} (medians "
            f"{result.median_ratio:.3f}), ideal {ideal:.3f}: {result.ratio / ideal - 1:+.1%} "
            f"({result.low / ideal - 1:+.1%} to {result.high / ideal - 1:+.1%})"
        )
    if found["changes"]:
        show_changes({"DeadPool": found["changes"]})
    if options.out:
        found["changes"] = [asdict(each) for each in found["changes"]]
        conditions = {"cores": options.cores, "cpus": os.cpu_count(), "load": os.getloadavg(), "seed": options.seed}
        Path(options.out).write_text(json.dumps(conditions | found, indent=1) + "\n")
    return int("error" in found or "ratio" not in found)


def _measure(options: argparse.Namespace, cores: Sequence[set[int]], found: dict[str, Any]) -> None:
    rng = random.Random(options.seed)
    run_dir = Path(tempfile.mkdtemp(prefix="deadpool-bench-")) / "widths"
    script = [options.script, *options.arguments, *SHRINKING]
    kills: list[float] = []
    with Job(run_dir, launch_options(options, 0), script) as job:
        blocks = _Blocks(options, job, cores)
        try:
            for cycle in range(options.cycles):
                for name in ("full", "narrow"):
                    if cycle or name == "narrow":
                        job.until("warm servers", partial(warm, job), START_S)
                        job.join() if name == "full" else kills.append(lose(job, rng))
                    found[name].append(blocks.next())
                    say(f"{blocks.width} replicas: mean {statistics.mean(found[name][-1]):.3f} s an iteration")
                    found.setdefault("widths", []).append(blocks.width)
                    step()
        finally:
            found["changes"] = changes(job.events(), kills)
