"""When a spare node pays for itself.

Nodes fail independently, at a constant rate. A lost node is out for a time R; a failure finds no spare when as many
others as there are spares are out (Poisson with mean rate x R). With a spare a failure costs a recovery; without one a
restart, half a checkpoint interval of lost work, and the wait for a replacement; or, of a job that goes on with a
replica fewer, two restarts and that replica's share of the wait. What counts is training done for each node paid for,
with S spares

    goodput(S) = N / (N + S) / (1 + failures an hour x mean hours a failure costs)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deadpool_megatron.planning.files import Cluster

_MOST = 64


@dataclass(frozen=True, slots=True)
class Spares:
    """What spares are worth. ``goodput`` is by number of spares, from 0."""

    hours_between: float
    cost_without_hours: float
    break_even_hours: float
    goodput: tuple[float, ...]
    best: int


def _none_left(mean_out: float, count: int) -> float:
    """Probability that ``count`` or more others are out when a node fails."""
    if not mean_out:
        return float(count == 0)
    # By logarithms: the powers alone are too large for a float.
    few = sum(math.exp(k * math.log(mean_out) - mean_out - math.lgamma(k + 1)) for k in range(count))
    return max(0.0, 1.0 - few)


def spares(cluster: Cluster, recovery_s: float, replicas: int = 0) -> Spares:
    """Do the arithmetic for up to a number of spares beyond which more only cost.

    Args:
        replicas: of a job that goes on with one fewer where no spare is left; 0: it stops.
    """
    rate = cluster.nodes * cluster.failures / 1000 / 24  # an hour
    if replicas:
        without = 2 * cluster.restart_minutes / 60 + cluster.replace_hours / replicas
    else:
        without = (cluster.restart_minutes + cluster.checkpoint_minutes / 2) / 60 + cluster.replace_hours
    with_spare = recovery_s / 3600
    mean_out = rate * cluster.replace_hours
    goodput = []
    for count in range(_MOST):
        empty = _none_left(mean_out, count)
        lost = rate * (empty * without + (1 - empty) * with_spare)
        goodput.append(cluster.nodes / (cluster.nodes + count) / (1 + lost))
    best = max(range(_MOST), key=goodput.__getitem__)
    hours = math.inf if rate == 0 else 1 / rate
    return Spares(hours, without, hours / cluster.nodes, tuple(goodput[: max(best + 3, cluster.spare_nodes + 2)]), best)
