"""`deadpool bench model`: is the simulation right? Real jobs with failures seconds apart instead of days.

Several real jobs are disturbed at random times. Each is then predicted by `goodput.simulate` from its own failure times
and its own pace, with what a recovery, a shrink and a growth cost taken from the *other* jobs, so that nothing predicts
itself. With ``--strategy shrink`` each lost node comes back after a while, and a job without a spare goes on with fewer
replicas until then; what they cost is taken likewise, the moments at which nodes are back are the job's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deadpool_bench.changes import SHRINKING
from deadpool_bench.harness.jobs import Job
from deadpool_bench.kills import launch_options
from deadpool_bench.progress import progress, say, step
from deadpool_bench.widths import add_forked, from_forks
from deadpool_megatron.jobs.job import JobError
from deadpool_megatron.simulate.goodput import Cluster, Costs, Strategy, simulate

_START_S = 600.0
_RECOVER_S = 120.0
_TOLERATED = 0.10
_NAMES = ("recovery", "shrink", "growth")
Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Disturbed:
    """One real job. ``faults`` are seconds from the end of its first iteration, where ``wall_s`` begins, too.

    ``kept`` counts iterations that were done once and for all in that time. ``costs_s`` has by name what each event
    cost: ``recovery`` and ``shrink`` the time from a fault to the end of the first iteration after it, ``growth`` that
    from the last iteration before that counts; less the pace, which is the mean length of undisturbed iterations at
    that width. ``repairs_s``: from each fault, until the lost node was a spare.
    """

    cluster: Cluster
    faults: list[float]
    wall_s: float
    kept: int
    costs_s: dict[str, list[float]]
    repairs_s: list[float] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """The measured one: time of the iterations that count over the time that passed."""
        return self.kept * self.cluster.iteration_s / self.wall_s


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deadpool bench model`."""
    add = parser.add_argument
    text = "without a spare: as many spares as faults, or fewer replicas (default: deadpool)"
    add("--strategy", choices=("deadpool", "shrink"), default="deadpool", help=text)
    add("--jobs", type=int, default=2, metavar="J", help="real jobs (default: 2)")
    add("--faults", type=int, default=5, metavar="F", help="killed nodes a job (default: 5)")
    add("--gap", type=float, default=4.0, metavar="S", help="mean seconds between faults (default: 4)")
    add("--spares", type=int, default=0, metavar="S", help="spares at first, with shrink (default: 0)")
    add("--repair", type=float, default=5.0, metavar="S", help="seconds until a node joins, with shrink (default: 5)")
    add("--active-nodes", type=int, default=2, metavar="N", help="nodes that train (default: 2)")
    add("--nproc-per-node", type=int, default=1, metavar="P", help="workers a node (default: 1)")
    add("--seed", type=int, default=0, help="of moments and victims (default: 0)")
    add_forked(parser)
    add("--out", metavar="FILE", help="write all figures as JSON")
    add("script", help="training script")
    add("arguments", nargs=argparse.REMAINDER, help="its arguments, without --deadpool")


def _disturb(options: argparse.Namespace, run_dir: Path, rng: random.Random) -> Disturbed:
    shrinks = options.strategy == "shrink"
    spares = options.spares if shrinks else options.faults
    script = [options.script, *options.arguments, *(SHRINKING if shrinks else ["--deadpool"])]
    moments: list[float] = []
    joins: list[float] = []  # when lost nodes are to join
    with Job(run_dir, launch_options(options, spares), script) as job:

        def until(what: str, find: Callable[[], Any], deadline_s: float = _RECOVER_S) -> Any:
            def found() -> Any:
                while joins and joins[0] <= time.time():
                    joins.pop(0)
                    job.join()
                return find()

            return job.until(what, found, deadline_s)

        def iterations() -> list[Event]:
            return job.events("iteration")

        until("first iteration", iterations, _START_S)
        until("warm spares", lambda: len(job.events("parked")) == spares, _START_S)
        begun = iterations()[-1]
        for _ in range(options.faults):
            due = time.time() + rng.expovariate(1.0 / options.gap)
            nodes, epoch = until("the next fault", partial(_victims, job, due, len(iterations())), _START_S)
            moments.append(job.kill_node(rng.choice(nodes)))
            until("iteration after the fault", partial(_after, job, epoch))
            if shrinks:
                joins.append(time.time() + options.repair)
            step()
        if shrinks:
            until("all nodes", lambda: len(_returns(job.events(), begun["t"])) == options.faults, _START_S)
            until("all replicas", lambda: iterations()[-1]["replicas"] == begun["replicas"])
        done = len(iterations())
        until("five more iterations", lambda: len(iterations()) >= done + 5)
        events = job.events()
    repairs = [back - fault for back, fault in zip(_returns(events, begun["t"]), moments, strict=False)]
    return _account(events, moments, begun["t"], options.active_nodes, spares, repairs)


def _victims(job: Job, due: float, done: int) -> tuple[list[int], int] | None:
    """Nodes of which one may be lost, and the epoch; None before ``due``, and while only one node trains.

    At least one iteration, beyond those ``done``, is between two faults, and between a growth and a fault: else the
    second belongs to the recovery of the first.
    """
    if time.time() < due:
        return None
    status, iterations = job.status(), job.events("iteration")
    active = [n["node"] for n in status["nodes"] if n["role"] == "active"]
    steady = len(iterations) > done and iterations[-1]["epoch"] == status["epoch"]
    return (active, status["epoch"]) if steady and len(active) > 1 else None


def _after(job: Job, epoch: int) -> bool:
    return bool(job.events("iteration")[-1]["epoch"] > epoch)


def _returns(events: Sequence[Event], start: float) -> list[float]:
    """Unix seconds at which nodes that joined after ``start`` were parked first, in the order in which they joined.

    One that took a lost node's place before it was parked was back when it joined.
    """
    parked: dict[int, float] = {e["node"]: e["t"] for e in reversed(events) if e["event"] == "parked"}
    joined = [e for e in events if e["event"] == "joined" and e["t"] > start]
    return [parked[e["node"]] if e["node"] in parked else e["t"] for e in joined]


def _account(
    events: Sequence[Event], moments: list[float], start: float, nodes: int, spares: int, repairs_s: list[float]
) -> Disturbed:
    """From the events of a job and the moments of the faults, Unix seconds, to what the job did."""
    iterations = [e for e in events if e["event"] == "iteration"]
    inside = [e for e in iterations if e["t"] > start]
    first_of = {e["epoch"]: e for e in reversed(inside)}  # the first report of each epoch
    calm: dict[int, list[float]] = {}
    for e in inside:
        if first_of[e["epoch"]] is not e or e["epoch"] == iterations[0]["epoch"]:
            calm.setdefault(e["replicas"], []).append(e["seconds"])
    widest = iterations[0]["replicas"]
    paces = {width: widest / width * statistics.mean(calm[widest]) for width in range(1, widest + 1)}
    paces |= {width: statistics.mean(seconds) for width, seconds in calm.items()}
    costs: dict[str, list[float]] = {name: [] for name in _NAMES}
    for before, e in itertools.pairwise(iterations):
        if e not in inside or first_of[e["epoch"]] is not e or e["epoch"] == before["epoch"]:
            continue
        faults = [moment for moment in moments if before["t"] <= moment < e["t"]]
        between = {each["event"] for each in events if before["t"] <= each["t"] < e["t"]}
        resized = between & {"shrunk", "grown"}
        if faults and "grown" not in resized:
            costs["shrink" if resized else "recovery"].append(e["t"] - faults[-1] - paces[e["replicas"]])
        elif resized and not faults:
            kept = [each["t"] for each in iterations if each["t"] < e["t"] and each["iteration"] < e["iteration"]]
            costs["growth"].append(e["t"] - kept[-1] - paces[e["replicas"]])
    cluster = Cluster(nodes, spares, paces[widest], 1e9, nodes // widest or 1)
    kept_count = len({e["iteration"] for e in inside})
    return Disturbed(cluster, [m - start for m in moments], inside[-1]["t"] - start, kept_count, costs, repairs_s)


def predicted(job: Disturbed, costs: Costs, strategy: Strategy = "deadpool") -> float:
    """What the model says of a job's goodput, from its failure times and pace."""
    gaps = [b - a for a, b in itertools.pairwise([0.0, *job.faults])]
    repairs = itertools.chain(job.repairs_s, itertools.repeat(job.cluster.repair_s))
    outcome = simulate(strategy, job.cluster, costs, iter(gaps), job.wall_s, repairs)
    return outcome.useful_s / outcome.wall_s  # the spares are not what is compared here


def _costs(job: Disturbed, others: Sequence[Disturbed]) -> Costs:
    """Of the others. Raises ValueError when they have none of what the job had."""
    means = dict.fromkeys(_NAMES, 0.0)
    for name, mine in job.costs_s.items():
        theirs = [s for other in others for s in other.costs_s[name]]
        if mine and not theirs:
            raise ValueError(f"there was a {name} in one job and none in the others to predict it with: more --faults")
        means[name] = statistics.mean(theirs) if theirs else 0.0
    return Costs(recovery_s=means["recovery"], shrink_s=means["shrink"], growth_s=means["growth"])


def run_model(options: argparse.Namespace) -> int:
    """Measure, predict, compare; returns 0 when every prediction is within 10 % of its measurement."""
    rng = random.Random(options.seed)
    base = Path(tempfile.mkdtemp(prefix="deadpool-bench-"))
    jobs: list[Disturbed] = []
    rows = []
    try:
        if options.jobs < 2:
            raise ValueError("--jobs must be 2 or more: each is predicted from the others")
        with from_forks(options), progress("kills", options.jobs * options.faults):
            for number in range(options.jobs):
                jobs.append(_disturb(options, base / f"job-{number}", rng))
                say(f"job {number + 1}: {len(jobs[-1].faults)} faults in {jobs[-1].wall_s:.1f} s")
    except ValueError as err:
        say(f"deadpool: {err}")
        return 2
    except JobError as err:
        say(f"deadpool: {err}")
        return 1
    header = ("job", 4), ("faults", 7), ("wall s", 8), ("pace s", 7), *((f"{name} s", 11) for name in _NAMES)
    print(" ".join(f"{name:>{width}}" for name, width in (*header, ("measured", 9), ("model", 8), ("error", 7))))
    worst = 0.0
    for number, job in enumerate(jobs):
        rows.append({"job": asdict(job), "measured": job.goodput})
        try:
            model = predicted(job, _costs(job, [other for other in jobs if other is not job]), options.strategy)
        except ValueError as err:  # the other rows still count
            say(f"deadpool: job {number + 1}: {err}")
            worst = math.inf
            continue
        error = model / job.goodput - 1.0
        worst = max(worst, abs(error))
        rows[-1] |= {"model": model, "error": error}
        means = (f"{statistics.mean(s):>7.3f} ({len(s)})" if s else f"{'-':>11}" for s in job.costs_s.values())
        print(
            f"{number + 1:>4} {len(job.faults):>7} {job.wall_s:>8.1f} {job.cluster.iteration_s:>7.3f} "
            f"{' '.join(means)} {job.goodput:>9.1%} {model:>8.1%} {error:>+7.1%}"
        )
    if worst < math.inf:
        print(f"{sum(len(j.faults) for j in jobs)} faults; the model is within {worst:.1%} of every job")
    if options.out:
        found = {"strategy": options.strategy, "seed": options.seed, "jobs": rows}
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
    return int(worst > _TOLERATED)
