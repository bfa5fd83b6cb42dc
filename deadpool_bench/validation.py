"""`deadpool bench model`: is the simulation right? Real jobs with failures seconds apart instead of days.

Several real jobs are disturbed at random times. Each is then predicted by `goodput.simulate` from its own failure times
and its own pace, with the recovery time taken from the *other* jobs, so that nothing predicts itself.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deadpool_bench.harness.jobs import Job
from deadpool_bench.progress import progress, say, step
from deadpool_megatron.jobs.job import JobError
from deadpool_megatron.simulate.goodput import Cluster, Costs, simulate

_START_S = 600.0
_RECOVER_S = 120.0
_TOLERATED = 0.10


@dataclass(frozen=True, slots=True)
class Disturbed:
    """One real job. ``faults`` are seconds from the end of its first iteration, where ``wall_s`` begins, too.

    ``kept`` counts iterations that were done once and for all in that time, ``pace_s`` is their mean length where
    nothing disturbed them, ``recoveries_s`` the time from each fault to the end of the first iteration after it, less
    the pace.
    """

    faults: list[float]
    wall_s: float
    kept: int
    pace_s: float
    recoveries_s: list[float]

    @property
    def goodput(self) -> float:
        """The measured one: time of the iterations that count over the time that passed."""
        return self.kept * self.pace_s / self.wall_s


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench model`."""
    add = parser.add_argument
    add("--jobs", type=int, default=2, metavar="J", help="real jobs (default: 2)")
    add("--faults", type=int, default=5, metavar="F", help="killed nodes a job, as many spares (default: 5)")
    add("--gap", type=float, default=4.0, metavar="S", help="mean seconds between faults (default: 4)")
    add("--active-nodes", type=int, default=2, metavar="N", help="nodes that train (default: 2)")
    add("--nproc-per-node", type=int, default=1, metavar="P", help="workers a node (default: 1)")
    add("--seed", type=int, default=0, help="of moments and victims (default: 0)")
    add("--emulate-cpu", action="store_true", help="emulate CUDA on the CPU")
    add("--out", metavar="FILE", help="write all figures as JSON")
    add("script", help="training script")
    add("arguments", nargs=argparse.REMAINDER, help="its arguments, without --deadpool")


def _disturb(options: argparse.Namespace, run_dir: Path, rng: random.Random) -> Disturbed:
    launch = ["--local-nodes", str(options.active_nodes + options.faults), "--spare-nodes", str(options.faults)]
    launch += ["--nproc-per-node", str(options.nproc_per_node), *(["--emulate-cpu"] if options.emulate_cpu else [])]
    moments: list[float] = []
    with Job(run_dir, launch, [options.script, *options.arguments, "--deadpool"]) as job:
        job.until("first iteration", partial(job.events, "iteration"), _START_S)
        job.until("warm spares", lambda: len(job.events("parked")) == options.faults, _START_S)
        start = job.events("iteration")[-1]["t"]
        for _ in range(options.faults):
            due = time.time() + rng.expovariate(1.0 / options.gap)
            # At least one iteration between two faults: else the second belongs to the recovery of the first.
            job.until("iteration", partial(_more, job, len(job.events("iteration"))), _RECOVER_S)
            time.sleep(max(0.0, due - time.time()))
            status = job.status()
            victim = rng.choice([n["node"] for n in status["nodes"] if n["role"] == "active"])
            epoch = status["epoch"]
            moments.append(job.kill_node(victim))
            back = partial(_after, job, epoch)
            job.until("iteration after the fault", back, _RECOVER_S)
            step()
        job.until("five more iterations", partial(_more, job, len(job.events("iteration")) + 4), _RECOVER_S)
        iterations = job.events("iteration")
    return _account(iterations, moments, start)


def _more(job: Job, count: int) -> bool:
    return len(job.events("iteration")) > count


def _after(job: Job, epoch: int) -> list[dict[str, Any]]:
    return [e for e in job.events("iteration") if e["epoch"] > epoch]


def _account(iterations: list[dict[str, Any]], moments: list[float], start: float) -> Disturbed:
    """From the reports of iterations and the moments of the faults to what the job did."""
    inside = [e for e in iterations if e["t"] > start]
    first_of = {e["epoch"]: e for e in reversed(inside)}  # the first report of each epoch
    calm = [e["seconds"] for e in inside if first_of[e["epoch"]] is not e or e["epoch"] == iterations[0]["epoch"]]
    pace = statistics.mean(calm)
    recoveries = []
    for moment in moments:
        first = next(e for e in inside if e["t"] > moment and first_of[e["epoch"]] is e)
        recoveries.append(first["t"] - moment - pace)
    wall = inside[-1]["t"] - start
    kept = len({e["iteration"] for e in inside})
    return Disturbed([m - start for m in moments], wall, kept, pace, recoveries)


def predicted(job: Disturbed, recovery_s: float) -> float:
    """What the model says of a job's goodput, from its failure times and pace."""
    gaps = [b - a for a, b in zip([0.0, *job.faults], job.faults, strict=False)]
    cluster = Cluster(nodes=2, spares=len(job.faults), iteration_s=job.pace_s, repair_s=1e9)
    outcome = simulate("deadpool", cluster, Costs(recovery_s=recovery_s), iter(gaps), job.wall_s)
    return outcome.useful_s / outcome.wall_s  # the spares are not what is compared here


def run_model(options: argparse.Namespace) -> int:
    """Measure, predict, compare; returns 0 when every prediction is within 10 % of its measurement."""
    rng = random.Random(options.seed)
    base = Path(tempfile.mkdtemp(prefix="deadpool-bench-"))
    if options.jobs < 2:
        say("deadpool: --jobs must be 2 or more: each is predicted from the others")
        return 2
    jobs: list[Disturbed] = []
    try:
        with progress("kills", options.jobs * options.faults):
            for number in range(options.jobs):
                jobs.append(_disturb(options, base / f"job-{number}", rng))
                say(f"job {number + 1}: {len(jobs[-1].faults)} faults in {jobs[-1].wall_s:.1f} s")
    except JobError as err:
        say(f"deadpool: {err}")
        return 1
    rows = []
    header = ("job", 4), ("faults", 7), ("wall s", 8), ("pace s", 7), ("recovery s", 11), ("measured", 9)
    print(" ".join(f"{name:>{width}}" for name, width in (*header, ("model", 8), ("error", 7))))
    worst = 0.0
    for number, job in enumerate(jobs):
        others = [s for other in jobs if other is not job for s in other.recoveries_s]
        model = predicted(job, statistics.mean(others))
        error = model / job.goodput - 1.0
        worst = max(worst, abs(error))
        rows.append({"job": asdict(job), "measured": job.goodput, "model": model, "error": error})
        print(
            f"{number + 1:>4} {len(job.faults):>7} {job.wall_s:>8.1f} {job.pace_s:>7.3f} "
            f"{statistics.mean(job.recoveries_s):>11.3f} {job.goodput:>9.1%} {model:>8.1%} {error:>+7.1%}"
        )
    print(f"{sum(len(j.faults) for j in jobs)} faults; the model is within {worst:.1%} of every job")
    if options.out:
        Path(options.out).write_text(json.dumps({"seed": options.seed, "jobs": rows}, indent=1) + "\n")
    return int(worst > _TOLERATED)
