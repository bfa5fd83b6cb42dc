"""One disturbed job after another: nodes killed at random moments, and how long the way back took."""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from deadpool_bench.harness.jobs import Job
from deadpool_bench.progress import say, step
from deadpool_megatron.jobs.job import JobError
from deadpool_megatron.observe.recoveries import PHASES

START_S: Final = 600.0
RECOVER_S: Final = 180.0
Fault = Literal["kill", "stop", "kill-and-copies"]
_A_JOB: Final = 2  # blows to workers: a node that loses some more often counts as bad itself
_DURABLE_INTERVAL: Final = 5  # generations; as many iterations are lost at most, and what was committed meanwhile


@dataclass(frozen=True, slots=True)
class Recovery:
    """One blow. Times are seconds from it; ``iteration_s`` is the run's own median.

    ``lost_iterations`` are completed ones that had to be done again. ``groups``: process groups re-formed, and
    all, once for each member. ``durable``: memory could not answer, the durable generation did.
    """

    node: int
    iteration: int
    resumed_from: int
    phases: dict[str, float]
    first_iteration_s: float
    iteration_s: float
    blocked_share: float
    nodes: tuple[int, ...] = ()
    lost_iterations: int = 0
    unique_bytes: int = 0
    groups: tuple[int, int] = (0, 0)
    durable: bool = False

    @property
    def disturbance_s(self) -> float:
        """Blow to first completed iteration, beyond the normal time of that iteration."""
        return self.first_iteration_s - self.iteration_s

    def breakdown(self) -> dict[str, float]:
        """Seconds each phase took, from the one before it, with ``redo`` at the end."""
        out: dict[str, float] = {}
        last = 0.0
        for name in PHASES:
            if name in self.phases:
                out[name] = self.phases[name] - last
                last = self.phases[name]
        out["redo"] = self.first_iteration_s - last
        return out


def spread(values: Sequence[float]) -> str:
    """Median, least, most and count."""
    return f"median {statistics.median(values):.3f}, min {min(values):.3f}, max {max(values):.3f} (n={len(values)})"


def medians(found: Sequence[Recovery]) -> dict[str, float]:
    """Median seconds of each phase."""
    rows = [r.breakdown() for r in found]
    return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in (*PHASES, "redo")}


def launch_options(options: argparse.Namespace, spares: int, active: int | None = None) -> list[str]:
    """Options of `deadpool launch` from those of a bench."""
    nodes = options.active_nodes if active is None else active
    flags = ["--local-nodes", str(nodes + spares), "--spare-nodes", str(spares)]
    flags += ["--nproc-per-node", str(options.nproc_per_node)]
    return [*flags, "--emulate-cpu"] if options.emulate_cpu else flags


def _victims(job: Job, rng: random.Random, count: int) -> list[int]:
    """``count`` active nodes whose loss at once the redundancy covers: no two of one protection group."""
    status = job.status()
    active = [n["node"] for n in status["nodes"] if n["role"] == "active"]
    if count == 1:
        return [rng.choice(active)]
    protection = status.get("protection") or {}
    groups = [[n for n in group if n in active] for group in protection.get("groups", [])]
    if not groups:  # the ring: nobody together with the next one
        start = rng.randrange(len(active))
        picked = [active[(start + 2 * i) % len(active)] for i in range(count)]
    else:
        rng.shuffle(groups)
        picked = [rng.choice(group) for group in groups[:count]]
    if len(set(picked)) < count or (not groups and 2 * count > len(active)):
        raise JobError(f"{count} nodes at once are more than the redundancy of {len(active)} active nodes covers")
    return picked


def one(
    job: Job,
    rng: random.Random,
    count: int = 1,
    fault: Fault = "kill",
    frozen: Sequence[int] = (),
    workers: int = 0,
    stand_by: bool = False,
) -> Recovery:
    """Strike ``count`` random active nodes at a random moment of an iteration, once the job runs steadily.

    ``workers``: kill so many random workers at once in the place of nodes; ``stand_by``: once another process stands by
    for each of them.

    ``stop`` freezes a node in the place of killing it, so that only its silence tells. ``kill-and-copies`` spoils all
    copies of its shards in other nodes' memory first, which restoring finds by the checksums. ``frozen`` are processes
    to be let go at the same moment (a spare's, that had been kept from getting warm).
    """
    steady = len(job.events("iteration")) + 3
    job.until("three iterations", lambda: len(job.events("iteration")) >= steady, RECOVER_S)
    if not frozen:
        parked = partial(_parked, job, count)
        job.until("warm spares", parked, START_S)
    if stand_by:
        job.until("processes that stand by", partial(_all_stood_by, job), START_S)
    before = job.status()
    reports = job.events("iteration")
    usual = statistics.median(e["seconds"] for e in reports[-3:])
    blocked = statistics.mean(e["blocked_s"] / e["seconds"] for e in (reports[1:] or reports))
    struck = rng.sample(before["coordinates"], workers)
    victims = sorted({c["node"] for c in struck}) if workers else _victims(job, rng, count)
    time.sleep(rng.uniform(0.0, usual))
    at = job.events("iteration")[-1]["iteration"] + 1
    if fault == "kill-and-copies":
        ranks = [c["rank"] for c in before["coordinates"] if c["node"] in victims]
        job.signal_nodes(signal.SIGSTOP, *victims)  # nothing newer arrives while the copies are spoilt
        if not job.spoil_copies(*ranks):
            job.failed(f"no copies of ranks {ranks} to spoil")
    if workers:
        moment = time.time()
        for each in struck:
            job.signal_process(each["pid"], signal.SIGKILL)
    else:
        moment = job.signal_nodes(signal.SIGSTOP if fault == "stop" else signal.SIGKILL, *victims)
    for pid in frozen:
        job.signal_process(pid, signal.SIGCONT)
    epoch = before["epoch"]
    first = job.until("iteration after the blow", partial(_first_after, job, epoch), RECOVER_S)[0]
    phases = {e["event"]: e["t"] - moment for e in job.events() if e["epoch"] > epoch or e["t"] >= moment}
    resumed = [e["iteration"] for e in job.events("resumed") if epoch < e["epoch"] <= first["epoch"]][-1]
    training = job.events("training")
    after = [e for e in job.events() if e["t"] >= moment]
    reformed = [(e["changed"], e["of"]) for e in after if e["event"] == "reformed"]
    return Recovery(
        victims[0],
        at,
        resumed,
        {name: phases[name] for name in PHASES if name in phases},
        first["t"] - moment,
        usual,
        blocked,
        tuple(victims),
        max(0, at - resumed),
        int(training[-1].get("unique_bytes", 0)) if training else 0,
        reformed[-1] if reformed else (0, 0),
        any(e["event"] == "durable_fallback" for e in after),
    )


def _parked(job: Job, count: int) -> bool:
    return len([s for s in job.status()["spares"] if s["state"] == "parked"]) >= count


def _all_stood_by(job: Job) -> bool:
    status = job.status()
    return sum(len(n.get("standbys", {})) for n in status["nodes"]) == len(status["coordinates"])


def _first_after(job: Job, epoch: int) -> list[dict[str, Any]]:
    return [e for e in job.events("iteration") if e["epoch"] > epoch][:1]


def recoveries(
    options: argparse.Namespace,
    base: Path,
    name: str,
    kills: int,
    *,
    active: int | None = None,
    arguments: Sequence[str] = (),
    count: int = 1,
    fault: Fault = "kill",
    cold: bool = False,
    durable: bool = False,
    workers: int = 0,
) -> list[Recovery]:
    """``kills`` recoveries, over as many jobs as their spares allow.

    Args:
        name: of the run directories.
        active: nodes that train, those of the options when None.
        arguments: of the script, after those of the options.
        count: nodes struck at once.
        durable: committed generations are drained to a directory beside the job's; struck once there is one.
        cold: the spare's workers are kept from importing anything until the blow. One recovery a job.
        workers: killed at once in the place of nodes; there is one spare then.
    """
    rng = random.Random(f"{options.seed}-{name}")
    a_job = 1 if cold else _A_JOB if workers else max(1, options.spares_per_job // count)
    stand_by = "--deadpool-standby-workers" in (*options.arguments, *arguments)
    out: list[Recovery] = []
    number = 0
    while len(out) < kills:
        number += 1
        script = [options.script, *options.arguments, *arguments, "--deadpool"]
        if durable:
            script += ["--deadpool-durable-dir", str(base / f"{name}-{number}-durable")]
            script += ["--deadpool-durable-interval", str(_DURABLE_INTERVAL)]
        spares = 1 if workers else count * min(a_job, kills - len(out))
        with Job(base / f"{name}-{number}", launch_options(options, spares, active), script) as job:
            frozen = _freeze_spares(job) if cold else []
            job.until("first iteration", partial(job.events, "iteration"), START_S)
            if durable:
                job.until("durable generation", partial(job.events, "durable"), RECOVER_S)
            for _ in range(min(a_job, kills - len(out))):
                out.append(one(job, rng, count, fault, frozen, workers, stand_by))
                say(f"{name} {len(out)}: node {out[-1].nodes}, disturbance {out[-1].disturbance_s:.3f} s")
                step()
    return out


def _freeze_spares(job: Job) -> list[int]:
    def started() -> list[int]:
        try:
            status = job.status()
        except FileNotFoundError:
            return []
        return [pid for s in status["spares"] for pid in s["pids"] if pid]

    pids: list[int] = job.until("spare's workers", started, START_S)
    for pid in pids:
        job.signal_process(pid, signal.SIGSTOP)
    return pids
