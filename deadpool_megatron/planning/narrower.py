"""With how many replicas fewer a run can go on where no spare is left (``when_out_of_spares: shrink``).

Fewer replicas hold larger parts of the optimizer's state, on devices and in vaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from deadpool_megatron.cluster.placement import assignment as placing
from deadpool_megatron.cluster.placement.redundancy import Scheme
from deadpool_megatron.durable import fills
from deadpool_megatron.planning.budget import Budget, budget
from deadpool_megatron.planning.files import PlanError, RunFile
from deadpool_megatron.planning.model import Flags


@dataclass(frozen=True, slots=True)
class Narrower:
    """One number of replicas, and the nodes that it fills. ``device``, ``vault_node``: bytes, as of `Budget`.

    ``why_not``: why it does not fit, in words; empty: it does.
    """

    replicas: int
    nodes: int
    device: float
    vault_node: float
    why_not: str


def narrower(run: RunFile, plan: Budget) -> list[Narrower]:
    """From the widest down to the first that does not fit; those that fill whole nodes. None where nothing shrinks."""
    sizes, out = plan.sizes, list[Narrower]()
    if run.deadpool.when_out_of_spares != "shrink":
        return out
    replica = sizes.world // sizes.dp
    instances = Flags(run.name, run.megatron).number("num-distributed-optimizer-instances", 1)
    for replicas in range(sizes.dp - 1, 0, -1):
        nodes = placing.nodes_for(replicas, replica, run.cluster.gpus_per_node)
        if nodes is not None and fills(replicas * sizes.cp, sizes.ep, instances) and not (out and out[-1].why_not):
            out.append(_one(run, replicas, nodes))
    return out


def _one(run: RunFile, replicas: int, nodes: int) -> Narrower:
    micro = int(run.megatron["micro-batch-size"]) * replicas
    batch = math.ceil(int(run.megatron["global-batch-size"]) / micro) * micro  # one replica may have one more
    few = nodes < Scheme.parse(run.deadpool.redundancy).size
    settings = replace(
        run.deadpool,
        when_out_of_spares="save",
        redundancy="1" if few else run.deadpool.redundancy,  # what is left of a scheme is not more
        domains="",
        nvlink_domains="",
        deadpool=nodes > 1,
    )
    there = replace(
        run,
        cluster=replace(run.cluster, nodes=nodes, spare_nodes=0),
        megatron={**run.megatron, "global-batch-size": batch},
        deadpool=settings,
    )
    try:
        plan = budget(there)
    except PlanError as err:
        return Narrower(replicas, nodes, 0.0, 0.0, str(err).removeprefix(f"{run.name}: "))
    return Narrower(replicas, nodes, plan.device, plan.vault_node, "")
