"""`deadpool bench recovery`: kill nodes at random moments and time the way back, against restarting from a checkpoint.

A disturbance is the time from the kill to the end of the first iteration completed after it, less the normal time of
one iteration. The baseline is the same job without DeadPool: the same kill, then the same command again with
``--load`` of a checkpoint that the job saved the iteration before. That is the best case for it, and it loads weights
only: upstream cannot load Adam's state back without apex or Transformer Engine (DistributedOptimizer.load_state_dict).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deadpool_megatron.evaluate.jobs import Job, JobError

__all__ = ["Recovery", "add_recovery_arguments", "run_recovery"]

_PHASES = ("detected", "declared", "aborted", "agreed", "prepared", "reformed", "restored", "resumed")
_START_S = 600.0
_RECOVER_S = 120.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """One kill. Times are seconds from the kill; ``iteration_s`` is the run's own median."""

    node: int
    iteration: int
    resumed_from: int
    phases: dict[str, float]
    first_iteration_s: float
    iteration_s: float
    blocked_share: float

    @property
    def disturbance_s(self) -> float:
        """Kill to first completed iteration, beyond the normal time of that iteration."""
        return self.first_iteration_s - self.iteration_s


def add_recovery_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench recovery`."""
    parser.add_argument("--kills", type=int, default=10, metavar="K", help="kills to measure (default: 10)")
    parser.add_argument("--restarts", type=int, default=3, metavar="R", help="restarts to measure (default: 3)")
    parser.add_argument("--active-nodes", type=int, default=4, metavar="N", help="nodes that train (default: 4)")
    parser.add_argument("--nproc-per-node", type=int, default=2, metavar="P", help="workers a node (default: 2)")
    parser.add_argument("--spares-per-job", type=int, default=1, metavar="S", help="spares, kills a job (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims (default: 0)")
    parser.add_argument("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU")
    parser.add_argument("--out", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("script", help="training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments, without --deadpool and --save")


def _launch(options: argparse.Namespace, spares: int) -> list[str]:
    flags = ["--local-nodes", str(options.active_nodes + spares), "--spare-nodes", str(spares)]
    flags += ["--nproc-per-node", str(options.nproc_per_node)]
    return [*flags, "--emulate-cpu"] if options.emulate_cpu else flags


def _one_recovery(job: Job, rng: random.Random) -> Recovery:
    """Kill a random active node at a random moment of an iteration, once the job runs steadily."""
    before = job.events("iteration")
    job.until("three iterations", lambda: len(job.events("iteration")) >= len(before) + 3, _RECOVER_S)
    job.until("warm spare", lambda: any(s["state"] == "parked" for s in job.status()["spares"]), _START_S)
    epoch = job.status()["epoch"]
    usual = statistics.median(e["seconds"] for e in job.events("iteration")[-3:])
    blocked = statistics.mean(e["blocked_s"] / e["seconds"] for e in job.events("iteration")[1:])
    victim = rng.choice([n["node"] for n in job.status()["nodes"] if n["role"] == "active"])
    time.sleep(rng.uniform(0.0, usual))
    at = job.events("iteration")[-1]["iteration"] + 1
    moment = job.kill_node(victim)

    def first_after() -> Any:
        return [e for e in job.events("iteration") if e["epoch"] > epoch][:1]

    first = job.until("iteration after the kill", first_after, _RECOVER_S)[0]
    phases = {e["event"]: e["t"] - moment for e in job.events() if e["epoch"] > epoch or e["t"] >= moment}
    resumed = next(e["iteration"] for e in job.events("resumed") if e["epoch"] > epoch)
    return Recovery(
        victim,
        at,
        resumed,
        {name: phases[name] for name in _PHASES},
        first["t"] - moment,
        usual,
        blocked,
    )


def _recoveries(options: argparse.Namespace, base: Path) -> list[Recovery]:
    rng = random.Random(options.seed)
    out: list[Recovery] = []
    number = 0
    while len(out) < options.kills:
        number += 1
        script = [options.script, *options.arguments, "--deadpool"]
        with Job(base / f"deadpool-{number}", _launch(options, options.spares_per_job), script) as job:
            job.until("first iteration", partial(job.events, "iteration"), _START_S)
            for _ in range(min(options.spares_per_job, options.kills - len(out))):
                out.append(_one_recovery(job, rng))
                _say(f"kill {len(out)}: node {out[-1].node}, disturbance {out[-1].disturbance_s:.3f} s")
    return out


def _restarts(options: argparse.Namespace, base: Path) -> list[float]:
    """Seconds from the kill to the first iteration completed after the restart."""
    rng = random.Random(options.seed)
    out: list[float] = []
    for number in range(1, options.restarts + 1):
        checkpoint = base / f"checkpoint-{number}"
        save = ["--save", str(checkpoint), "--save-interval", "3", "--ckpt-format", "torch_dist"]
        script = [options.script, *options.arguments, *save]
        with Job(base / f"restart-{number}-a", _launch(options, 0), script) as job:
            latest = checkpoint / "latest_checkpointed_iteration.txt"
            job.until("checkpoint", latest.exists, _START_S)
            saved = int(latest.read_text())
            job.until("iteration after it", partial(job.has_printed, saved + 1), _RECOVER_S)
            moment = job.kill_node(rng.randrange(options.active_nodes))
            job.wait()
        load = ["--load", str(checkpoint), "--no-load-optim", "--no-load-rng"]
        with Job(base / f"restart-{number}-b", _launch(options, 0), [*script, *load]) as job:
            job.until("first iteration", job.printed_iterations, _START_S)
            out.append(time.time() - moment)
        _say(f"restart {number}: {out[-1]:.1f} s")
    return out


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _spread(values: Sequence[float]) -> str:
    return f"median {statistics.median(values):.3f}, min {min(values):.3f}, max {max(values):.3f} (n={len(values)})"


def run_recovery(options: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    base = Path(tempfile.mkdtemp(prefix="deadpool-bench-"))
    try:
        kills = _recoveries(options, base)
    except JobError as err:
        _say(f"deadpool: {err}")
        return 1
    failed = ""
    restarts: list[float] = []
    try:
        restarts = _restarts(options, base)
    except JobError as err:  # what was measured of the kills still counts
        failed = str(err)
    print(f"disturbance per kill (s): {_spread([k.disturbance_s for k in kills])}")
    print(f"kill to first completed iteration (s): {_spread([k.first_iteration_s for k in kills])}")
    print(f"one iteration (s): {_spread([k.iteration_s for k in kills])}")
    last = dict.fromkeys(range(len(kills)), 0.0)
    for name in _PHASES:
        print(f"  {name:<10} +{statistics.median(k.phases[name] - last[i] for i, k in enumerate(kills)):.3f} s")
        last = {i: k.phases[name] for i, k in enumerate(kills)}
    redo = [k.first_iteration_s - k.phases["resumed"] for k in kills]
    print(f"  {'redo':<10} +{statistics.median(redo):.3f} s")
    print(f"blocked on DeadPool, failure-free: {_spread([100 * k.blocked_share for k in kills])} % of an iteration")
    if restarts:
        print(f"restart from a checkpoint, kill to first completed iteration (s): {_spread(restarts)}")
        ratio = statistics.median(restarts) / statistics.median(k.first_iteration_s for k in kills)
        print(f"restart / DeadPool: {ratio:.1f}")
    if options.out:
        Path(options.out).write_text(
            json.dumps({"kills": [asdict(k) for k in kills], "restarts_s": restarts, "seed": options.seed}, indent=1)
        )
    if failed:
        _say(f"deadpool: {failed}")
    return int(bool(failed))
