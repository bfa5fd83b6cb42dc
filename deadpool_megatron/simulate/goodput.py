"""How much of a cluster's time becomes training under failures: a simulation, event by event. Pure, no clock.

Three ways to live with failures. In each a spare takes a lost node's place, and a repaired node is a spare again:

* ``deadpool``: training repeats what no generation had committed. Without a spare the job stops until a node is
  repaired, then restarts.
* ``shrink``: the same, but without a spare the job goes on with as many data-parallel replicas as its nodes hold, and
  with more when nodes are repaired. The nodes that are left over are spares meanwhile.
* ``checkpoint``: the job restarts from its last checkpoint, without a spare after a repair.

With fewer replicas the same global batch takes longer: W - k of W replicas train at (W - k)/W of the pace. Goodput is
the time of the iterations that count, at full speed and without any cost, over the time that passed, times the share of
nodes that is not spare at first. Failures come at one rate, however many nodes are under repair, and each strikes a
node that trains; one during a recovery begins it anew.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

Strategy = Literal["deadpool", "shrink", "checkpoint"]
STRATEGIES: Final[tuple[Strategy, ...]] = ("deadpool", "shrink", "checkpoint")
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
    until training goes on, detection included, without repeated work; ``shrink_s`` the same where it goes on with fewer
    replicas. ``growth_s`` is what taking replicas back costs: the standstill, and what is done again. ``commit_share``:
    a failure in this first part of an iteration finds the generation of that iteration not committed, and costs one
    iteration more. ``interval_s`` and ``save_s`` are a checkpoint's interval and how long training stands still for it.
    """

    overhead: float = 0.0
    recovery_s: float = 0.0
    shrink_s: float = 0.0
    growth_s: float = 0.0
    restart_s: float = 0.0
    commit_share: float = 0.5
    interval_s: float = math.inf
    save_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """``goodput`` is a share; times are seconds. ``lost_s`` is repeated work, ``down_s`` recovering and waiting.

    ``starved`` counts the failures without a spare, ``narrow_s`` is time with fewer replicas.
    """

    goodput: float
    wall_s: float
    useful_s: float
    failures: int
    lost_s: float
    down_s: float
    starved: int
    narrow_s: float


def poisson(rate_per_node_day: float, nodes: int, rng: random.Random) -> Iterator[float]:
    """Times between failures of ``nodes`` nodes, in seconds, each failing ``rate_per_node_day`` times a day."""
    while True:
        yield rng.expovariate(rate_per_node_day * nodes / _DAY_S)


def best_interval(costs: Costs, failures_per_s: float) -> Costs:
    """The checkpoint interval with the least loss: Young's sqrt(2 save MTBF), at least as long as saving takes."""
    if costs.save_s <= 0:
        return replace(costs, interval_s=1e-9)
    return replace(costs, interval_s=max(costs.save_s, math.sqrt(2 * costs.save_s / failures_per_s)))


def simulate(
    strategy: Strategy,
    cluster: Cluster,
    costs: Costs,
    gaps: Iterator[float],
    wall_s: float,
    repairs_s: Iterator[float] | None = None,
) -> Outcome:
    """Run for ``wall_s`` seconds of simulated time; ``gaps`` are times between failures, none when they end.

    ``repairs_s``: after how many seconds each lost node, in the order of their failures, is a spare (the cluster's
    ``repair_s``).
    """
    step = cluster.iteration_s * (1.0 + costs.overhead)
    pace = cluster.iteration_s / step  # useful seconds a second, at full strength and without saving
    if strategy == "checkpoint" and costs.interval_s < math.inf:
        pace *= costs.interval_s / (costs.interval_s + costs.save_s)
    repairs_s = repairs_s or itertools.repeat(cluster.repair_s)
    back: list[float] = []  # times at which nodes come back
    healthy = cluster.nodes + cluster.spares
    active = cluster.nodes  # those that train, or would if training did not stand still
    now = useful = lost = down = narrow = 0.0
    failures = starved = 0
    since_save = 0.0  # wall seconds of training since the last checkpoint
    into_step = 0.0  # wall seconds since the last iteration boundary
    until = pause = 0.0  # training stands still until then, for that long in all
    due = next(gaps, math.inf)

    def trainable() -> int:
        if healthy >= cluster.nodes:
            return cluster.nodes
        return healthy // cluster.replica_nodes * cluster.replica_nodes if strategy == "shrink" else 0

    while True:
        end = min([due, wall_s, *back[:1], *([until] if until > now else [])])
        trains = active > 0 and until <= now
        if trains:
            useful += (end - now) * pace * active / cluster.nodes
            narrow += (end - now) * (active < cluster.nodes)
            since_save += end - now
            into_step = (into_step + end - now) % (step * cluster.nodes / active)
            if costs.interval_s < math.inf and strategy == "checkpoint":
                since_save %= costs.interval_s + costs.save_s
        else:
            down += end - now
        now = end
        if now >= wall_s:
            break
        if now == due:
            failures += 1
            healthy -= 1
            heapq.heappush(back, now + next(repairs_s))
            due += next(gaps, math.inf)
            if trains:
                step_now = step * cluster.nodes / active
                again = into_step + (step_now if into_step < costs.commit_share * step_now else 0.0)
                if strategy == "checkpoint":
                    again = min(since_save, costs.interval_s)
                useful -= min(useful, again * pace * active / cluster.nodes)
                lost += again
                since_save = into_step = pause = 0.0
            if healthy >= active > 0:
                cost = costs.restart_s if strategy == "checkpoint" else costs.recovery_s
            else:
                starved += 1
                active = trainable()
                cost = costs.shrink_s
            pause = max(pause, cost) if active else 0.0
            until = now + pause
        elif back and now == back[0]:
            heapq.heappop(back)
            healthy += 1
        if now >= until and trainable() > active:  # it grows, or begins again
            pause = costs.growth_s if active else max(costs.restart_s, costs.recovery_s)
            active, until = trainable(), now + pause
            since_save = into_step = 0.0
    share_active = cluster.nodes / (cluster.nodes + cluster.spares)
    return Outcome(useful / wall_s * share_active, wall_s, useful, failures, lost, down, starved, narrow)


def mean(outcomes: Sequence[Outcome]) -> tuple[float, float, float]:
    """Mean goodput, and the least and the most of several runs."""
    values = [o.goodput for o in outcomes]
    return sum(values) / len(values), min(values), max(values)
