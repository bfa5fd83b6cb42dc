"""How much of a cluster's time becomes training under failures: a simulation, event by event. Pure, no clock.

Three ways to live with failures:

* ``deadpool``: a spare takes over, training repeats what no generation had committed. Without a spare the job stops
  until a node is repaired, then restarts.
* ``checkpoint``: the job restarts from its last checkpoint, on a spare if there is one, else after a repair.
* ``shrink``: the replica of the lost node leaves until the node is repaired; no spares are kept.

Goodput is the time of the iterations that count, at full speed and without any cost, over the time that passed, times
the share of nodes that is not spare. Failures strike each node that is not under repair at the same rate, also during a
recovery, which then begins again.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

Strategy = Literal["deadpool", "checkpoint", "shrink"]
STRATEGIES: Final[tuple[Strategy, ...]] = ("deadpool", "checkpoint", "shrink")
_DAY_S: Final = 86400.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """What trains. Times are seconds; ``replica_nodes`` is the nodes of one data-parallel replica (at least 1)."""

    nodes: int
    spares: int
    iteration_s: float
    repair_s: float
    replica_nodes: int = 1


@dataclass(frozen=True, slots=True)
class Costs:
    """What a strategy costs. Times are seconds.

    ``overhead`` is the share by which failure-free iterations are longer. ``recovery_s`` is the time from a failure
    until training goes on, detection included, without repeated work. ``commit_share``: a failure in this first part of
    an iteration finds the generation of that iteration not committed, and costs one iteration more. ``interval_s`` and
    ``save_s`` are a checkpoint's interval and how long training stands still for it.
    """

    overhead: float = 0.0
    recovery_s: float = 0.0
    restart_s: float = 0.0
    commit_share: float = 0.5
    interval_s: float = math.inf
    save_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """``goodput`` is a share; times are seconds. ``lost_s`` is repeated work, ``down_s`` recovering and waiting."""

    goodput: float
    wall_s: float
    useful_s: float
    failures: int
    lost_s: float
    down_s: float
    starved: int


def poisson(rate_per_node_day: float, nodes: int, rng: random.Random) -> Iterator[float]:
    """Times between failures of ``nodes`` nodes, in seconds, each failing ``rate_per_node_day`` times a day."""
    while True:
        yield rng.expovariate(rate_per_node_day * nodes / _DAY_S)


def best_interval(costs: Costs, failures_per_s: float) -> Costs:
    """The checkpoint interval with the least loss: Young's sqrt(2 save MTBF), at least as long as saving takes."""
    if costs.save_s <= 0:
        return replace(costs, interval_s=1e-9)
    return replace(costs, interval_s=max(costs.save_s, math.sqrt(2 * costs.save_s / failures_per_s)))


def simulate(strategy: Strategy, cluster: Cluster, costs: Costs, gaps: Iterator[float], wall_s: float) -> Outcome:
    """Run for ``wall_s`` seconds of simulated time; ``gaps`` are times between failures. Ends early when they do."""
    step = cluster.iteration_s * (1.0 + costs.overhead)
    pace = cluster.iteration_s / step  # useful seconds a second, at full strength and without saving
    if strategy == "checkpoint" and costs.interval_s < math.inf:
        pace *= costs.interval_s / (costs.interval_s + costs.save_s)
    spares = cluster.spares
    repairs: list[float] = []  # times at which nodes come back
    now = useful = lost = down = 0.0
    failures = starved = 0
    gone_replicas = 0
    since_save = 0.0  # wall seconds of training since the last checkpoint
    into_step = 0.0  # wall seconds since the last iteration boundary
    due = next(gaps, math.inf)
    replicas = max(1, cluster.nodes // cluster.replica_nodes)

    def back(until: float) -> None:
        nonlocal spares, gone_replicas
        while repairs and repairs[0] <= until:
            heapq.heappop(repairs)
            if strategy == "shrink":
                gone_replicas = max(0, gone_replicas - 1)
            else:
                spares += 1

    def train(until: float) -> None:
        nonlocal now, useful, since_save, into_step
        while now < until:
            end = min([until, *repairs[:1]])
            share = 1.0 - gone_replicas / replicas
            useful += (end - now) * pace * max(share, 0.0)
            since_save += end - now
            into_step = (into_step + end - now) % step
            if costs.interval_s < math.inf and strategy == "checkpoint":
                since_save %= costs.interval_s + costs.save_s
            now = end
            back(now)

    while now < wall_s:
        train(min(due, wall_s))
        if now >= wall_s:
            break
        failures += 1
        due = now + next(gaps, math.inf)
        share = max(1.0 - gone_replicas / replicas, 0.0)
        if strategy == "checkpoint":
            again = min(since_save, costs.interval_s)
        else:
            again = into_step + (step if into_step < costs.commit_share * step else 0.0)
        again_useful = min(useful, again * pace * share)
        useful -= again_useful
        lost += again
        since_save = into_step = 0.0
        heapq.heappush(repairs, now + cluster.repair_s)
        pause = costs.restart_s if strategy == "checkpoint" else costs.recovery_s
        if strategy == "shrink":
            gone_replicas += 1
        elif spares > 0:
            spares -= 1
        else:
            starved += 1
            pause = max(costs.restart_s, costs.recovery_s) + max(0.0, repairs[0] - now)
            heapq.heappop(repairs)  # this one takes the place at once
        end = min(now + pause, wall_s)
        while due < end:  # a failure during the recovery begins it anew
            failures += 1
            heapq.heappush(repairs, due + cluster.repair_s)
            if strategy == "shrink":
                gone_replicas += 1
            elif spares > 0:
                spares -= 1
            else:
                starved += 1
                pause = max(pause, heapq.heappop(repairs) - due + costs.restart_s)
            end = min(due + pause, wall_s)
            due += next(gaps, math.inf)
        down += end - now
        now = end
        back(now)
    share_active = cluster.nodes / (cluster.nodes + (cluster.spares if strategy != "shrink" else 0))
    return Outcome(useful / wall_s * share_active, wall_s, useful, failures, lost, down, starved)


def mean(outcomes: Sequence[Outcome]) -> tuple[float, float, float]:
    """Mean goodput, and the least and the most of several runs."""
    values = [o.goodput for o in outcomes]
    return sum(values) / len(values), min(values), max(values)
